"""Perplexity, divergence and the cutting of texts, on a bigram model that can be computed by hand, and a real one."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import evaluate
from qjax.errors import DataError
from qjax.evaluate import language
from qjax.evaluate.text import bucket_ends

VOCAB = 11
BOS = 10


class Letters:
    """A tokenizer: digits and blanks are tokens 0 to 9."""

    bos_id = BOS

    def encode(self, text, *, special):
        assert special is False
        return [int(c) for c in text if c.isdigit()]


class NoStart(Letters):
    bos_id = None


def bigram(params, tokens):
    """Logits of the next token from this one alone."""
    return params[tokens]


@pytest.fixture
def table():
    return jnp.asarray(np.random.default_rng(0).normal(size=(VOCAB, VOCAB)), jnp.float32)


def by_hand(table, blocks):
    """Mean negative log-likelihood in float64, token by token."""
    logp = np.asarray(jax.nn.log_softmax(np.asarray(table, np.float64), axis=-1), np.float64)
    logits = np.asarray(table, np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = [-logp[a, b] for block in blocks for a, b in zip(block[:-1], block[1:], strict=True)]
    return sum(nll) / len(nll), len(nll)


# -- protocols ---------------------------------------------------------------------------------------------------------


def test_protocol_a_scores_each_piece_alone(table):
    text = "12345\n67\n\n890\n \n\n\n1\n\n" + "7" * 40
    blocks = [[BOS, 1, 2, 3, 4, 5, 6, 7], [BOS, 8, 9, 0], [BOS, 1], [BOS, *[7] * 7]]
    result = evaluate.perplexity(bigram, table, Letters(), text, "A", context=8)
    nll, count = by_hand(table, blocks)
    assert (result.tokens, result.blocks, result.protocol, result.context) == (count, 4, "A", 8)
    assert result.nll == pytest.approx(nll, rel=1e-6) and result.perplexity == pytest.approx(math.exp(nll), rel=1e-6)


def test_protocol_b_scores_whole_blocks_and_drops_the_rest(table):
    ids = [int(c) for c in "31415926535897932384"]
    result = evaluate.perplexity(bigram, table, Letters(), "3141592653\n\n5897932384", "b", context=7)
    nll, count = by_hand(table, [[BOS, *ids[i : i + 6]] for i in (0, 6, 12)])
    assert (result.tokens, result.blocks, result.protocol) == (18, 3, "B") and count == 18
    assert result.nll == pytest.approx(nll, rel=1e-6)


def test_without_a_start_token_the_first_token_is_only_read(table):
    a = evaluate.perplexity(bigram, table, NoStart(), "123\n\n4\n\n56", "A", context=8)  # a lone token predicts nothing
    assert (a.tokens, a.blocks) == (3, 2)
    b = evaluate.text_blocks(NoStart(), "1234567", "B", context=3)
    assert [list(x) for x in b.blocks] == [[1, 2, 3], [4, 5, 6]]


def test_start_token_can_be_given(table):
    blocks = evaluate.text_blocks(NoStart(), "12", context=8, bos=4)
    assert [list(b) for b in blocks.blocks] == [[4, 1, 2]]
    assert len(blocks) == 1 and list(blocks)[0] is blocks[0] is blocks.blocks[0]


def test_ids_instead_of_text(table):
    blocks = [[0, 1, 2], [3, 4], [5, 6, 7, 8, 9]]
    result = evaluate.perplexity(bigram, table, blocks)
    assert result.nll == pytest.approx(by_hand(table, blocks)[0], rel=1e-6) and result.tokens == 7


def test_context_comes_from_the_config(table):
    class Config:
        max_position_embeddings = 4

    assert evaluate.perplexity(bigram, table, Letters(), "1" * 9, "B", config=Config()).context == 4
    Config.max_position_embeddings = 10**6
    assert evaluate.perplexity(bigram, table, Letters(), "1" * 9, "A", config=Config()).context == 2048


@pytest.mark.parametrize("tokenizer", ["tokenizers", "transformers", "function"])
def test_other_tokenizers(tokenizer):
    class Encoding:
        ids = [1, 2]

    class Raw:
        def encode(self, text, add_special_tokens):
            assert not add_special_tokens
            return Encoding()

        def token_to_id(self, token):
            return 7 if token == "<s>" else None

    class Transformers:
        bos_token_id = 7

        def encode(self, text, add_special_tokens):
            assert not add_special_tokens
            return [1, 2]

    made = {"tokenizers": Raw(), "transformers": Transformers(), "function": lambda text: [1, 2]}[tokenizer]
    blocks = evaluate.text_blocks(made, "x", context=8)
    assert list(blocks.blocks[0]) == ([1, 2] if tokenizer == "function" else [7, 1, 2])


# -- batches -----------------------------------------------------------------------------------------------------------


def test_padding_and_order_change_nothing(table, monkeypatch):
    rng = np.random.default_rng(1)
    blocks = [list(rng.integers(0, VOCAB, n)) for n in rng.integers(2, 300, 40)]
    whole = evaluate.perplexity(bigram, table, blocks)
    monkeypatch.setattr(language, "TOKENS_PER_BATCH", {"cpu": 64})
    assert evaluate.perplexity(bigram, table, blocks[::-1]).nll == pytest.approx(whole.nll, rel=1e-7)
    assert whole.nll == pytest.approx(by_hand(table, blocks)[0], rel=1e-6)


def test_few_shapes_and_every_token_once():
    rng = np.random.default_rng(2)
    blocks = [rng.integers(0, VOCAB, n) for n in rng.integers(2, 513, 300)]
    made = evaluate.TextBlocks(tuple(b.astype(np.int32) for b in blocks), "ids", 512)
    batches = made.batches(4096)
    assert len({b.inputs.shape for b in batches}) <= 4
    assert all(b.inputs.size <= 4096 for b in batches)
    assert sum(int(b.mask.sum()) for b in batches) == made.tokens
    assert sum(b.inputs.size for b in batches) < 1.35 * made.tokens


def test_compiles_once_per_shape_and_not_again(table):
    traces = []

    def fn(params, tokens):
        traces.append(tokens.shape)
        return params[tokens]

    blocks = [[1] * n for n in (5, 5, 90, 95, 300)]
    for _ in range(2):
        evaluate.perplexity(fn, table, blocks)
    compiled = [t for t in traces if t != (1, 16)]  # the abstract check of the output reads 16 tokens
    assert len(compiled) == len(set(compiled)) <= 3


@pytest.mark.parametrize("seed", range(4))
def test_buckets_are_the_best_ones(seed):
    lengths = np.random.default_rng(seed).integers(1, 9, 12) * 16

    def cost(ends):
        return sum(min(e for e in ends if e >= n) for n in lengths)

    values = sorted(set(lengths.tolist()))
    import itertools

    best = {
        k: min(cost((*c, values[-1])) for c in itertools.combinations(values[:-1], k - 1))
        for k in range(1, min(4, len(values)) + 1)
    }
    ends = bucket_ends(lengths, 4)
    assert ends[-1] == values[-1] and list(ends) == sorted(ends)
    assert cost(ends) == best[len(ends)]
    assert len(ends) == 4 or best.get(len(ends) + 1, cost(ends)) >= cost(ends) - 0.03 * lengths.sum()


def test_one_length_is_one_bucket():
    assert bucket_ends(np.array([512] * 9), 4) == (512,)


# -- divergence --------------------------------------------------------------------------------------------------------


def exact_kl(a, b):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    log_p, log_q = (
        x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)
        for x in (a, b)
    )
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize("noise", [1e-3, 0.05, 1.0, 30.0])
def test_kl_against_float64(noise):
    rng = np.random.default_rng(3)
    a = (5 * rng.normal(size=(50, 200))).astype(np.float32)
    b = (a + noise * rng.normal(size=a.shape)).astype(np.float32)
    result = evaluate.logit_divergence(a, b)
    wanted = exact_kl(a, b)
    assert result.kl == pytest.approx(wanted.mean(), rel=1e-4)
    assert result.kl_stderr == pytest.approx(wanted.std(ddof=1) / math.sqrt(50), rel=1e-3)
    assert result.agreement == (a.argmax(-1) == b.argmax(-1)).mean()


def test_equal_models_have_no_divergence(table):
    result = evaluate.divergence(bigram, table, bigram, table, [[1, 2, 3], [4, 5]])
    assert (result.kl, result.agreement, result.count) == (0.0, 1.0, 3)
    assert result.scores()["recovery"] == 100.0


def test_divergence_carries_both_perplexities(table):
    other = table + 0.1 * jnp.sin(jnp.arange(VOCAB))
    text = evaluate.text_blocks(Letters(), "123456\n\n7890", context=5)
    result = evaluate.divergence(bigram, table, bigram, other, text)
    scores = result.scores()
    assert scores["float_perplexity"] == pytest.approx(evaluate.perplexity(bigram, table, text).perplexity, rel=1e-6)
    assert scores["perplexity"] == pytest.approx(evaluate.perplexity(bigram, other, text).perplexity, rel=1e-6)
    assert scores["tokens"] == text.tokens == result.count
    seen = np.concatenate([b[:-1] for b in text.blocks])
    assert result.kl == pytest.approx(exact_kl(table, other)[seen].mean(), rel=1e-4)


def test_divergence_of_any_model_on_batches(table):
    def linear(w, x):
        return x @ w

    x = np.random.default_rng(4).normal(size=(3, 5, VOCAB)).astype(np.float32)
    result = evaluate.divergence(linear, table, linear, 0.9 * table, list(x))
    assert result.count == 15 and "perplexity" not in result.scores()
    assert result.kl == pytest.approx(exact_kl(x @ np.asarray(table), x @ np.asarray(0.9 * table)).mean(), rel=1e-4)
    assert evaluate.divergence(linear, table, linear, 0.9 * table, x).kl == pytest.approx(result.kl, rel=1e-6)


def test_nan_is_not_hidden(table):
    broken = table.at[3].set(jnp.nan)
    assert math.isnan(evaluate.perplexity(bigram, broken, [[3, 4]]).perplexity)
    result = evaluate.divergence(bigram, table, bigram, broken, [[3, 4], [1, 2]])
    assert math.isnan(result.kl) and result.agreement <= 0.5


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda t: evaluate.perplexity(bigram, t, Letters(), " \n "), "text is empty"),
        (lambda t: evaluate.perplexity(bigram, t, Letters(), "123", "B", context=8), "3 tokens and protocol B needs 7"),
        (lambda t: evaluate.perplexity(bigram, t, Letters(), "123", "C"), "protocol 'C' is not known"),
        (lambda t: evaluate.perplexity(bigram, t, Letters(), "123", context=1), "leaves nothing to score"),
        (lambda t: evaluate.perplexity(bigram, t, Letters(), "no digits"), "no piece of the text"),
        (lambda t: evaluate.perplexity(bigram, t, Letters()), "give the text too"),
        (lambda t: evaluate.perplexity(bigram, t, []), "no token block"),
        (lambda t: evaluate.perplexity(bigram, t, [[0.5, 1.0]]), "integer ids"),
        (lambda t: evaluate.perplexity(bigram, t, [[1, 99]]), "token id 99 and the model knows 11"),
        (lambda t: evaluate.perplexity(lambda p, x: (p[x], None), t, [[1, 2]]), "gave a tuple"),
        (lambda t: evaluate.perplexity(lambda p, x: p[x][0], t, [[1, 2]]), "wrap it in a function"),
        (lambda t: evaluate.divergence(bigram, t, lambda p, x: p[x][..., :4], t, [[1, 2]]), "give logits"),
        (lambda t: evaluate.divergence(bigram, t, bigram, t, iter(())), "no prediction"),
        (lambda t: evaluate.text_blocks(object(), "1", context=4), "object is no tokenizer"),
    ],
)
def test_bad_input_is_one_sentence(table, call, says):
    with pytest.raises(DataError, match=says) as e:
        call(table)
    assert "\n" not in str(e.value)


def test_files_that_cannot_be_read(tmp_path):
    cases = {
        "empty.txt": (b"", "is empty"),
        "blank.txt": (b" \n\t\n", "is empty"),
        "latin.txt": ("é".encode("latin-1"), "not UTF-8"),
        "binary.txt": (bytes(range(256)), "not UTF-8"),
    }
    for name, (raw, says) in cases.items():
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(DataError, match=says):
            evaluate.read_text(tmp_path / name)
    for path in (tmp_path / "missing.txt", tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            evaluate.read_text(path)


def test_line_ends_and_byte_order_mark(tmp_path):
    (tmp_path / "t.txt").write_bytes("\ufeffone\r\n\r\ntwo\rthree".encode())
    assert evaluate.read_text(tmp_path / "t.txt") == "one\n\ntwo\nthree"


# -- the real model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories(data_dir):
    from qjax import models

    folder = data_dir / "models" / "stories260k"
    fn, params, config = models.load(folder)
    return (
        fn,
        params,
        config,
        models.tokenizer(folder),
        evaluate.read_text(data_dir / "text" / "tinystories-sample.txt"),
    )


@pytest.mark.parametrize("protocol, tokens", [("A", 56_046), ("B", 65_919)])
def test_tokens_of_the_published_protocols(stories, protocol, tokens):
    _, _, config, tokenizer, text = stories
    assert evaluate.text_blocks(tokenizer, text, protocol, context=config.max_position_embeddings).tokens == tokens


@pytest.mark.slow
def test_published_perplexity_a(stories):
    fn, params, config, tokenizer, text = stories
    result = evaluate.perplexity(fn, params, tokenizer, text, config=config)
    assert (result.tokens, result.blocks) == (56_046, 141)
    assert round(result.nll, 4) == 1.4572 and round(result.perplexity, 3) == 4.294


@pytest.mark.slow
@pytest.mark.parametrize("file, first, ppl", [("tinystories-sample.txt", None, 5.010), ("alice.txt", 32_704, 23.42)])
def test_published_perplexity_b(stories, data_dir, file, first, ppl):
    fn, params, config, tokenizer, _ = stories
    blocks = evaluate.text_blocks(tokenizer, evaluate.read_text(data_dir / "text" / file), "B", context=512)
    if first:
        blocks = evaluate.TextBlocks(blocks.blocks[: first // 511], "B", 512)
    assert float(f"{evaluate.perplexity(fn, params, blocks).perplexity:.4g}") == pytest.approx(ppl, abs=1e-9)

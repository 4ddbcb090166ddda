"""Models in the lm-evaluation-harness: against plain sums of log-probabilities, and against its own torch model."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.errors import DataError, ModelError
from qjax.interop import rows

pytest.importorskip("lm_eval", reason="the harness is not installed; pip install 'qjax[lm-eval]'")
from lm_eval.api.instance import Instance

from qjax.interop.lm_eval import QjaxLM, evaluate

pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness and of what it imports

TASKS = ["words_in_sentences", "short_tales"]
PAIRS = [
    ("The sun rises in the", " morning"),
    ("", "Once upon a time there was a king."),
    ("He opened the door with a ", "key"),
    ("She drank a cup of tea, " * 12 + "and then another", " cup of tea, and went to bed"),
    ("<s>The old man", " and the sea"),
]


@pytest.fixture(scope="module")
def folder(root) -> Path:
    return root / "examples" / "assets" / "books-6m"


@pytest.fixture(scope="module")
def loaded(folder):
    fn, params, _ = qjax.models.load(folder)
    return fn, params, qjax.models.tokenizer(folder)


@pytest.fixture(scope="module")
def lm(loaded) -> QjaxLM:
    return QjaxLM(*loaded)


@pytest.fixture(scope="module")
def local(root) -> Path:
    return root / "examples" / "lm_eval_task"


def asked(kind: str, *arguments) -> list[Instance]:
    return [Instance(kind, {}, a, i, metadata=("mine", i, 1)) for i, a in enumerate(arguments)]


def by_hand(fn, params, tokens: list[int], count: int) -> tuple[float, bool]:
    """Log-likelihood of the last tokens, one forward pass of this text alone, summed token by token in float64."""
    logits = np.asarray(jax.jit(fn)(params, np.array([tokens[:-1]], np.int32))[0], np.float64)
    total, greedy = 0.0, True
    for place in range(len(tokens) - 1 - count, len(tokens) - 1):
        row, wanted = logits[place], tokens[place + 1]
        total += row[wanted] - row.max() - np.log(np.exp(row - row.max()).sum())
        greedy &= int(row.argmax()) == wanted
    return float(total), bool(greedy)


def same(found, expected):
    for (a, greedy), (b, likeliest) in zip(found, expected, strict=True):
        assert a == pytest.approx(b, abs=1e-4) and greedy == likeliest


# -- log-likelihoods ---------------------------------------------------------------------------------------------------


def test_loglikelihood_is_the_sum_of_log_probabilities(lm, loaded):
    fn, params, tokenizer = loaded
    expected = []
    for context, continuation in PAIRS:
        text = context.removeprefix("<s>").rstrip()
        both = tokenizer.encode(context.removeprefix("<s>") + continuation, special=False)
        count = len(both) - len(tokenizer.encode(text, special=False))
        expected.append(by_hand(fn, params, [tokenizer.bos_id, *both], count))
    same(lm.loglikelihood(asked("loglikelihood", *PAIRS), disable_tqdm=True), expected)


def test_the_likeliest_token_is_greedy(lm, loaded):
    fn, params, tokenizer = loaded
    prompt = tokenizer.encode("He shook his")
    best = int(np.asarray(fn(params, jnp.asarray([prompt])))[0, -1].argmax())
    found = lm._loglikelihood_tokens([(None, prompt, [best]), (None, prompt, [best + 1])])
    assert [greedy for _, greedy in found] == [True, False] and found[0][0] > found[1][0]


def test_a_long_context_is_cut_from_the_left(loaded):
    fn, params, tokenizer = loaded
    lm = QjaxLM(*loaded, max_length=24)
    context, continuation = PAIRS[3]
    context_ids, ids = tokenizer.encode(context), tokenizer.encode(continuation, special=False)
    assert len(context_ids) > 24
    expected = by_hand(fn, params, (context_ids + ids)[-25:], len(ids))
    same(lm.loglikelihood(asked("loglikelihood", PAIRS[3]), disable_tqdm=True), [expected])


@pytest.mark.parametrize("length", [16, 24, 512])
def test_rolling_windows_score_each_token_once(loaded, length):
    fn, params, tokenizer = loaded
    lm = QjaxLM(*loaded, max_length=length, add_bos_token=False, batch_size=3)
    text = "The lamp was lit in the upper window, and so the boys knew that the ship had been seen. " * 3
    ids = tokenizer.encode(text, special=False)
    total, done = 0.0, 0
    while done < len(ids):
        count = min(length, len(ids) - done)
        before = [tokenizer.bos_id, *ids][: done + count + 1][-(length + 1) :]
        total += by_hand(fn, params, before, count)[0]
        done += count
    (found,) = lm.loglikelihood_rolling(asked("loglikelihood_rolling", (text,)), disable_tqdm=True)
    assert found == pytest.approx(total, abs=1e-3)


def test_each_padded_length_is_compiled_once(loaded):
    fn, params, tokenizer = loaded
    shapes: list[tuple[int, ...]] = []

    def counted(params, tokens):
        shapes.append(tokens.shape)
        return fn(params, tokens)

    lm = QjaxLM(counted, params, tokenizer, max_length=100, batch_size=4)
    shapes.clear()
    for start in (0, 1):
        lm._loglikelihood_tokens([(None, [0], list(range(1, n))) for n in range(2 + start, 102, 3)])
    assert sorted(shapes) == [(4, 16), (4, 32), (4, 64), (4, 100)]


def test_pieces_and_padding():
    assert [len(p) for p in rows.pieces(range(77))] == [64, 8, 4, 1]
    assert [i for p in rows.pieces(range(77)) for i in p] == list(range(77))
    assert [rows.padded(n, 100) for n in (1, 16, 17, 64, 65, 100)] == [16, 16, 32, 64, 100, 100]


# -- generation --------------------------------------------------------------------------------------------------------


def test_greedy_text_is_that_of_the_model(lm, loaded):
    fn, params, tokenizer = loaded
    settings = {"until": [], "max_gen_toks": 12, "do_sample": False}
    prompts = ["The old sailor took off his hat and", "Once"]
    found = lm.generate_until(asked("generate_until", *((p, settings) for p in prompts)), disable_tqdm=True)
    for prompt, text in zip(prompts, found, strict=True):
        ids = tokenizer.encode(prompt)
        assert text == tokenizer.decode(fn.generate(params, ids, 12)[0, len(ids) :])
    place = found[0].index(found[0].split()[2])
    stopped = lm.generate_until(asked("generate_until", (prompts[0], {**settings, "until": found[0].split()[2]})))
    assert stopped == [found[0][:place]]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"do_sample": True}, "request 7 of task 'mine' asks for sampling"),
        ({"temperature": 0.5}, "request 7 of task 'mine' asks for sampling"),
        ({"num_beams": 4}, "request 7 of task 'mine' sets {'num_beams': 4}"),
        ({"max_gen_toks": 512}, "asks for 512 new tokens, but the model reads 512"),
    ],
)
def test_what_is_not_greedy_is_refused_by_name(lm, settings, message):
    request = Instance("generate_until", {}, ("Once", settings), 0, metadata=("mine", 7, 1))
    with pytest.raises(DataError, match=message):
        lm.generate_until([request])


# -- errors and arguments ----------------------------------------------------------------------------------------------


def test_mistakes_are_named(lm, loaded, folder):
    fn, params, tokenizer = loaded
    with pytest.raises(DataError, match="has 1 tokens of context and 0 to score"):
        lm._loglikelihood_tokens([(("a", ""), [0], [])])
    with pytest.raises(DataError, match="token id 5000 and the model knows 4096"):
        lm._loglikelihood_tokens([(("a", "b"), [0], [5000])])
    with pytest.raises(ModelError, match="max_length is 0"):
        QjaxLM(lambda p, t: fn(p, t), params, tokenizer)
    with pytest.raises(ModelError, match="model_args are folder=DIR"):
        QjaxLM.create_from_arg_string(f"pretrained={folder}")
    with pytest.raises(ModelError, match="batch_size is 0"):
        QjaxLM.create_from_arg_obj({"folder": folder}, {"batch_size": 0})
    with pytest.raises(ModelError, match="needs a cache"):
        QjaxLM(lambda p, t: fn(p, t), params, tokenizer, max_length=8).generate_until(
            asked("generate_until", ("a", {}))
        )
    with pytest.raises(DataError, match="no task"):
        evaluate(lm, [])


def test_the_arguments_of_the_harness_make_a_model(folder):
    lm = QjaxLM.create_from_arg_string(f"folder={folder},max_length=64", {"batch_size": "auto", "device": "cuda:0"})
    assert (lm.max_length, lm.batch_size, lm.get_model_info()["recipe"]) == (64, None, "float")


# -- whole tasks -------------------------------------------------------------------------------------------------------


def test_the_local_tasks(lm, local, loaded):
    results = evaluate(lm, TASKS, include_path=local, bootstrap_iters=0)["results"]
    assert results["words_in_sentences"]["acc,none"] == pytest.approx(0.975, abs=0.026)
    assert results["short_tales"]["bits_per_byte,none"] == pytest.approx(1.473, abs=2e-3)
    # The same number from this package's own sums.
    fn, params, tokenizer = loaded
    texts = [json.loads(line)["text"] for line in (local / "tales.jsonl").read_text("utf-8").splitlines()]
    total = 0.0
    for text in texts[:2]:
        total += by_hand(fn, params, [tokenizer.bos_id, *(ids := tokenizer.encode(text))], len(ids))[0]
    found = lm.loglikelihood_rolling(asked("loglikelihood_rolling", *((t,) for t in texts[:2])), disable_tqdm=True)
    assert sum(found) == pytest.approx(total, abs=1e-3)


def test_a_quantized_model_is_scored_and_writes(loaded, local):
    fn, params, tokenizer = loaded
    model = qjax.quantize(fn, params, np.zeros((1, 16), np.int32), recipe="W4A16")
    lm = QjaxLM(model, model.params, tokenizer, base=fn)
    ids = tokenizer.encode("The ship sailed across the sea")
    found = lm._loglikelihood_tokens([(None, ids[:-2], ids[-2:])])
    same(found, [by_hand(model, model.params, ids, 2)])
    (text,) = lm.generate_until(asked("generate_until", ("The old sailor", {"max_gen_toks": 6})))
    assert text
    limited = evaluate(lm, TASKS[:1], include_path=local, limit=8, bootstrap_iters=0)
    assert len(limited["samples"]["words_in_sentences"]) == 8


@pytest.mark.torch
def test_the_harness_own_model_gives_the_same(data_dir, local, transformers):
    pytest.importorskip("accelerate", reason="the harness's torch model needs accelerate and peft")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder = data_dir / "models" / "stories260k"
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=8)
    ours = QjaxLM.from_folder(folder)
    manager = TaskManager(include_path=str(local), include_defaults=False)
    b = simple_evaluate(model=theirs, tasks=TASKS, task_manager=manager, bootstrap_iters=0)
    a = evaluate(ours, TASKS, include_path=local, bootstrap_iters=0)
    assert a["results"]["words_in_sentences"]["acc,none"] == b["results"]["words_in_sentences"]["acc,none"]
    for task in TASKS:
        for mine, other in zip(a["samples"][task], b["samples"][task], strict=True):
            for x, y in zip(mine["resps"], other["resps"], strict=True):
                np.testing.assert_allclose(np.ravel(x[0]).astype(float), np.ravel(y[0]).astype(float), atol=1e-4)
    prompts = [(p, {"until": ["."], "max_gen_toks": 40}) for p in ("Once upon a time", "The old man", "She said")]
    written = [m.generate_until(asked("generate_until", *prompts), disable_tqdm=True) for m in (ours, theirs)]
    assert written[0] == written[1]

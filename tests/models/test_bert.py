"""BERT: the real sentence encoder, parity with transformers, padding, folders."""

from __future__ import annotations

import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qjax
from qjax import models
from qjax.errors import ModelError
from qjax.models import BertConfig, TextEncoder, sentence_embedding

SIZES = {
    "vocab_size": 31,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 16,
}
# Sentences and their cosines by the original float32 weights; those stored here are in float16.
COSINES = [
    ("A man is playing a guitar.", "Someone is strumming a guitar.", 0.7186),
    ("The weather is lovely today.", "It is so sunny outside!", 0.6793),
    ("The weather is lovely today.", "He drove to the stadium.", 0.1046),
    ("How do I reset my password?", "What are the steps to change a forgotten password?", 0.8257),
    ("How do I reset my password?", "The whale surfaced beside the ship.", 0.0052),
    ("The cat sat on the mat.", "The mat sat on the cat.", 0.9724),
    ("Quantization reduces the precision of weights.", "Lower-bit weights make the network smaller.", 0.5702),
    ("Quantization reduces the precision of weights.", "She baked a chocolate cake.", 0.0238),
]


@pytest.fixture(scope="module")
def minilm(data_dir):
    folder = data_dir / "models" / "all-minilm-l6-v2"
    fn, params, _ = models.load(folder)
    return fn, params, models.tokenizer(folder)


def padded(tokenizer, texts):
    rows = [tokenizer.encode(t)[:256] for t in texts]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return tokens, np.array([[i < len(ids) for i in range(tokens.shape[1])] for ids in rows])


def cosines(embed, tokenizer):
    first, second = (embed(*padded(tokenizer, side)) for side in list(zip(*COSINES, strict=True))[:2])
    return np.sum(np.asarray(first) * np.asarray(second), axis=-1)


@pytest.mark.slow
def test_real_cosines(minilm):
    fn, params, tokenizer = minilm
    found = cosines(lambda tokens, mask: fn.sentence_embedding(params, tokens, mask), tokenizer)
    np.testing.assert_allclose(found, [c for *_, c in COSINES], atol=2e-4, rtol=0)


def test_real_cosines_quantized(minilm):
    fn, params, tokenizer = minilm
    tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    model = qjax.quantize(fn, params, tokens, jax.ShapeDtypeStruct((1, 16), bool), recipe="W8A16")
    ops = [row.op for row in model.report.rows]
    assert ops.count("attention") == 6 and ops.count("norm") == 13
    assert [row.op for row in model.report.quantized] == ["dot"] * 36
    found = cosines(lambda tokens, mask: sentence_embedding(model(model.params, tokens, mask), mask), tokenizer)
    np.testing.assert_allclose(found, [c for *_, c in COSINES], atol=0.02, rtol=0)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [{}, {"hidden_act": "gelu_new", "type_vocab_size": 3, "layer_norm_eps": 1e-3}])
def test_parity(tmp_path, transformers, settings):
    torch = importlib.import_module("torch")
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, **settings, initializer_range=0.3)
    model = transformers.BertModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.3)
    model.save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    tokens, types = rng.integers(0, 31, (2, 12)), rng.integers(0, config.type_vocab_size, (2, 12))
    mask = np.arange(12)[None] < np.array([[12], [7]])
    with torch.no_grad():
        t = torch.from_numpy
        theirs = model(t(tokens), t(mask.astype(np.int64)), t(types)).last_hidden_state.numpy()
        bare = model(t(tokens)).last_hidden_state.numpy()
    fn, params, _ = models.load(tmp_path)
    ours = np.asarray(jax.jit(fn)(params, tokens, mask, types))
    assert np.abs(ours - theirs)[mask].max() <= 1e-4 * np.abs(theirs).max()
    np.testing.assert_allclose(fn(params, tokens), bare, atol=1e-4 * np.abs(bare).max())
    assert np.abs(theirs - bare).max() > 0.1


@pytest.mark.slow
def test_padding_changes_nothing():
    fn = TextEncoder(BertConfig(**SIZES))
    params = fn.init(0)
    tokens = jnp.arange(10).reshape(2, 5)
    alone = fn.sentence_embedding(params, tokens)
    behind = jnp.pad(tokens, ((0, 0), (0, 4)), constant_values=30)
    mask = jnp.arange(9)[None] < jnp.array([[5], [5]])
    np.testing.assert_allclose(fn.sentence_embedding(params, behind, mask), alone, atol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(alone, axis=-1), 1.0, rtol=1e-5)
    assert np.abs(np.asarray(fn.sentence_embedding(params, behind)) - np.asarray(alone)).max() > 1e-3
    assert not sentence_embedding(jnp.ones((1, 3, 4)), jnp.zeros((1, 3))).any()


def test_dialects_of_checkpoints(tmp_path):
    fn = TextEncoder(BertConfig(**SIZES))
    params = fn.init(0)
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, "architectures": ["BertModel"], "model_type": "bert"}))
    path = tmp_path / "model.safetensors"
    models.save_weights(path, params, fn.config, dtype=np.float32)
    plain = load_file(path)
    old = {}
    for name, tensor in plain.items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        old[f"bert.{name}"] = tensor
    save_file({**old, "bert.pooler.dense.weight": np.ones((24, 24), np.float32)}, path)
    jax.tree.map(np.testing.assert_array_equal, models.load(tmp_path)[1], params)
    save_file({**plain, "cls.predictions.bias": np.ones(31, np.float32)}, path)
    with pytest.raises(ModelError, match=r"cls\.predictions\.bias"):
        models.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": None}, "lacks vocab_size"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"hidden_act": "gelo"}, "did you mean 'gelu'"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"position_embedding_type": "relative_key"}, "'relative_key'.*'absolute'"),
    ],
)
def test_refusals(change, words):
    with pytest.raises(ModelError, match=words):
        BertConfig.from_hf({**SIZES, **change})


def test_text_too_long():
    fn = TextEncoder(BertConfig(**SIZES))
    with pytest.raises(ModelError, match="T up to 16"):
        jax.eval_shape(fn, fn.abstract_params(), jax.ShapeDtypeStruct((1, 17), jnp.int32))

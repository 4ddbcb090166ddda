"""GPT-2 and OPT without transformers: both forms, the cache, quantization, dialects of checkpoints, refusals."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qjax
from qjax import models
from qjax.errors import ModelError
from qjax.models import Gpt2Config, LanguageModel, OptConfig

GPT2 = {"architectures": ["GPT2LMHeadModel"], "vocab_size": 19, "n_embd": 16, "n_layer": 3, "n_head": 2}
GPT2 |= {"n_positions": 16}
OPT = {"architectures": ["OPTForCausalLM"], "vocab_size": 19, "hidden_size": 16, "ffn_dim": 20, "num_hidden_layers": 3}
OPT |= {"num_attention_heads": 2, "max_position_embeddings": 16}
TOKENS = np.random.default_rng(0).integers(0, 19, (2, 10))


@pytest.fixture(scope="module", params=["gpt2", "opt"])
def model(request):
    raw = {"gpt2": GPT2, "opt": OPT}[request.param]
    fn = LanguageModel({"gpt2": Gpt2Config, "opt": OptConfig}[request.param].from_hf(raw))
    noise = iter(jax.random.split(jax.random.key(1), 200))
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(noise), x.shape), fn.init(0))
    return raw, fn, params


def test_cache_is_the_full_forward(model):
    _, fn, params = model
    whole = jax.jit(fn)(params, TOKENS)
    scanned, stacked = LanguageModel(fn.config, scan_layers=True), models.stack_layers(params)
    np.testing.assert_allclose(jax.jit(scanned)(stacked, TOKENS), whole, atol=1e-5)
    for f, p in ((fn, params), (scanned, stacked)):
        prefill = jax.jit(f.prefill)
        logits, cache = prefill(p, TOKENS[:, :6], f.init_cache(2, 10))
        np.testing.assert_allclose(logits, whole[:, :6], atol=1e-5)
        logits, cache = prefill(p, TOKENS[:, 6:9], cache)
        np.testing.assert_allclose(logits, whole[:, 6:9], atol=1e-5)
        logits, cache = jax.jit(f.decode_step)(p, TOKENS[:, 9], cache)
        np.testing.assert_allclose(logits, whole[:, 9], atol=1e-5)
        assert int(cache["length"]) == 10
    made = fn.generate(params, TOKENS[:1, :3], 5)
    np.testing.assert_array_equal(scanned.generate(stacked, TOKENS[:1, :3], 5), made)
    np.testing.assert_array_equal(made[0, 3:], np.argmax(jax.jit(fn)(params, made)[0, 2:-1], -1))
    assert jax.tree.structure(scanned.init(0)) == jax.tree.structure(stacked)


@pytest.mark.every(2)
@pytest.mark.parametrize("scan", [False, True])
def test_sites(model, scan):
    _, fn, params = model
    if scan:
        fn, params = LanguageModel(fn.config, scan_layers=True), models.stack_layers(params)
    quantized = qjax.quantize(fn, params, TOKENS, recipe="W8A16")
    products = 4 if isinstance(fn.config, Gpt2Config) else 6
    ops = [row.op for row in quantized.report.rows for _ in range(row.repeats)]
    assert ops.count("attention") == 3 and ops.count("norm") == 7
    assert [row.op for row in quantized.report.quantized for _ in range(row.repeats)] == ["dot"] * 3 * products
    wanted, found = np.asarray(fn(params, TOKENS)), np.asarray(quantized(quantized.params, TOKENS))
    assert 0 < np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()
    step = quantized.bind(fn.decode_step)
    assert step(quantized.params, TOKENS[:, 0], fn.init_cache(2, 4))[0].shape == (2, 19)


def test_folder_in_both_dialects(model, tmp_path):
    raw, fn, params = model
    (tmp_path / "config.json").write_text(json.dumps(raw))
    path = tmp_path / "model.safetensors"
    models.save_weights(path, params, fn.config, dtype=np.float32)
    again, read, config = models.load(tmp_path)
    assert again == fn and config == fn.config
    jax.tree.map(np.testing.assert_array_equal, read, params)
    tensors = {k.removeprefix("transformer.").removeprefix("model."): v for k, v in load_file(path).items()}
    if isinstance(config, Gpt2Config):
        assert tensors["h.0.mlp.c_fc.weight"].shape == (16, 64), "stored as [in, out]"
        tensors |= {
            "h.0.attn.bias": np.ones((1, 1, 16, 16), np.float32),
            "h.0.attn.masked_bias": np.ones((), np.float32),
        }
    else:
        assert tensors["decoder.embed_positions.weight"].shape == (18, 16), "two rows before the first position"
        assert tensors["decoder.layers.0.fc1.weight"].shape == (20, 16)
    save_file({**tensors, "lm_head.weight": np.ones((19, 16), np.float32)}, path)  # tied, so that it is not read
    jax.tree.map(np.testing.assert_array_equal, models.load(tmp_path)[1], params)
    save_file({**tensors, "extra.weight": np.ones(3, np.float32)}, path)
    with pytest.raises(ModelError, match=r"extra\.weight"):
        models.load(tmp_path)


def test_text_too_long(model):
    _, fn, _ = model
    with pytest.raises(ModelError, match="17 tokens is longer than the 16"):
        jax.eval_shape(fn, fn.abstract_params(), jax.ShapeDtypeStruct((1, 17), jnp.int32))


def test_gpt2_defaults():
    config = Gpt2Config.from_hf({**GPT2, "n_positions": None, "n_ctx": 64, "eos_token_id": [3, 4]})
    assert (config.max_position_embeddings, config.intermediate_size, config.eos_token_id) == (64, 64, (3, 4))
    assert Gpt2Config.from_hf({**GPT2, "n_inner": 24}).intermediate_size == 24


@pytest.mark.parametrize(
    ("read", "raw", "words"),
    [
        (Gpt2Config, {"n_embd": None}, "lacks n_embd"),
        (Gpt2Config, {"n_head": 3}, "num_attention_heads"),
        (Gpt2Config, {"activation_function": "gelu_nu"}, "did you mean 'gelu_new'"),
        (Gpt2Config, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        (Gpt2Config, {"add_cross_attention": True}, "add_cross_attention is True"),
        (Gpt2Config, {"n_inner": 0}, "intermediate_size is 0"),
        (OptConfig, {"ffn_dim": None}, "lacks ffn_dim"),
        (OptConfig, {"word_embed_proj_dim": 8}, "word_embed_proj_dim is 8 and hidden_size is 16"),
        (OptConfig, {"num_attention_heads": 3}, "num_attention_heads"),
    ],
)
def test_refusals(read, raw, words):
    with pytest.raises(ModelError, match=words):
        read.from_hf({**(GPT2 if read is Gpt2Config else OPT), **raw})

"""Mixtures of experts without transformers: the formula, both forms, the cache, quantization, refusals."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import qjax
from qjax import models
from qjax.errors import ModelError
from qjax.models import LanguageModel, MoeConfig, functional
from qjax.models.moe import Mixture

SIZES = {
    "vocab_size": 19,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 20,
}
MIXTRAL = {"architectures": ["MixtralForCausalLM"], **SIZES, "num_local_experts": 5}
QWEN = {"architectures": ["Qwen2MoeForCausalLM"], **SIZES}
TOKENS = np.random.default_rng(0).integers(0, 19, (2, 9))


@pytest.fixture(scope="module", params=[MIXTRAL, QWEN], ids=["mixtral", "qwen2"])
def model(request):
    fn = LanguageModel(MoeConfig.from_hf(request.param))
    return request.param, fn, fn.init(0)


def test_a_mixture_is_the_sum_over_its_experts():
    config = MoeConfig.from_hf(QWEN)
    product = {"dot_general": jax.lax.dot_general}
    p = functional.init_params(Mixture, config, 3, **product)
    x = np.random.default_rng(1).normal(size=(2, 7, 16)).astype(np.float32)

    def mlp(p, x):
        return jax.nn.silu(x @ p["gate"]["kernel"]) * (x @ p["up"]["kernel"]) @ p["down"]["kernel"]

    chances = jax.nn.softmax(x @ p["router"]["kernel"])
    ranks = np.argsort(-chances, axis=-1)[..., :2]
    assert set(ranks.ravel()) == set(range(5)), "every expert is asked"
    chosen = np.zeros(chances.shape, bool)
    np.put_along_axis(chosen, ranks, True, axis=-1)
    wanted = jax.nn.sigmoid(x @ p["shared_gate"]["kernel"]) * mlp(p["shared"], x)
    for e in range(5):
        expert = {k: {"kernel": v["kernel"][e]} for k, v in p["experts"].items()}
        wanted += np.where(chosen, chances, 0.0)[..., e, None] * mlp(expert, x)
    found = functional.bind(Mixture, config, p, **product)(x)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_experts_without_tokens(model):
    _, fn, params = model
    whole = jax.jit(fn)(params, TOKENS)
    one = jax.jit(fn)(params, TOKENS[:1, :1])  # at most two of five experts have a row
    np.testing.assert_allclose(one, whole[:1, :1], atol=1e-5)
    assert np.isfinite(one).all()


@pytest.mark.every(2)
def test_cache_and_scan(model):
    _, fn, params = model
    whole = jax.jit(fn)(params, TOKENS)
    scanned, stacked = LanguageModel(fn.config, scan_layers=True), models.stack_layers(params)
    assert stacked["layers"]["mlp"]["experts"]["up"]["kernel"].shape == (2, 5, 16, fn.config.moe_intermediate_size)
    np.testing.assert_allclose(jax.jit(scanned)(stacked, TOKENS), whole, atol=1e-5)
    together = models.fuse(params)
    assert set(together["layers"][0]["attn"]) >= {"qkv_proj"} and "experts" in together["layers"][1]["mlp"]
    for f, p in ((fn, params), (scanned, stacked), (LanguageModel(fn.config, fused=True), together)):
        logits, cache = jax.jit(f.prefill)(p, TOKENS[:, :8], f.init_cache(2, 9))
        np.testing.assert_allclose(logits, whole[:, :8], atol=1e-5)
        logits, _ = jax.jit(f.decode_step)(p, TOKENS[:, 8], cache)
        np.testing.assert_allclose(logits, whole[:, 8], atol=1e-5)


def is_packed(leaf):
    return isinstance(leaf, qjax.formats.QArray)


@pytest.mark.every(2)
@pytest.mark.parametrize("scan", [False, True])
def test_no_expert_stays_float(model, scan):
    _, fn, params = model
    if scan:
        fn, params = LanguageModel(fn.config, scan_layers=True), models.stack_layers(params)
    quantized = qjax.quantize(fn, params, TOKENS, recipe="W8A16")
    ops = [row.op for row in quantized.report.quantized for _ in range(row.repeats)]
    assert ops.count("ragged_dot") == 6
    leaves = jax.tree_util.tree_leaves_with_path(quantized.params, is_leaf=is_packed)
    experts = [leaf for path, leaf in leaves if "experts" in jax.tree_util.keystr(path)]
    assert len(experts) == (3 if scan else 6) and all(map(is_packed, experts))
    floats = [jax.tree_util.keystr(path) for path, leaf in leaves if not is_packed(leaf)]
    kept = ("lm_head", "router", "shared_gate")  # what decides between experts stays float in presets
    assert not [name for name in floats if "kernel" in name and not any(k in name for k in kept)]
    assert any("router" in name for name in floats)
    # Beside the float function of the rounded weights: that of the given ones may send a token to another expert.
    rounded = jax.tree.map(lambda x: x.dequantize() if is_packed(x) else x, quantized.params, is_leaf=is_packed)
    np.testing.assert_allclose(quantized(quantized.params, TOKENS), jax.jit(fn)(rounded, TOKENS), atol=1e-4)
    assert not np.allclose(jax.jit(fn)(params, TOKENS), jax.jit(fn)(rounded, TOKENS), atol=1e-4)


@pytest.mark.parametrize("model", [MIXTRAL], indirect=True, ids=["mixtral"])
@pytest.mark.parametrize("recipe", ["W4A16", "W8A8", "MXFP4A16"])
def test_other_recipes_reach_the_experts(model, recipe):
    _, fn, params = model
    quantized = qjax.quantize(fn, params, TOKENS, recipe=recipe)
    assert [row.op for row in quantized.report.quantized].count("ragged_dot") == 6
    assert np.isfinite(quantized(quantized.params, TOKENS)).all()


def test_gradients_reach_every_leaf(model):
    _, fn, params = model
    slopes = jax.jit(jax.grad(lambda p: jnp.square(fn(p, TOKENS)).mean()))(params)
    for path, slope in jax.tree_util.tree_leaves_with_path(slopes):
        assert np.asarray(slope).any(), jax.tree_util.keystr(path)


def test_folder(model, tmp_path):
    raw, fn, params = model
    assert MoeConfig.from_hf(fn.config.to_hf()) == fn.config
    (tmp_path / "config.json").write_text(json.dumps(raw))
    path = tmp_path / "model.safetensors"
    models.save_weights(path, params, fn.config, dtype=np.float32)
    mixtral = raw is MIXTRAL
    stored = load_file(path)
    name = "block_sparse_moe.experts.4.w3" if mixtral else "mlp.experts.4.up_proj"
    expert = stored[f"model.layers.1.{name}.weight"]
    np.testing.assert_array_equal(expert, params["layers"][1]["mlp"]["experts"]["up"]["kernel"][4].T)
    again, read, config = models.load(tmp_path)
    assert again == fn and config == fn.config
    jax.tree.map(np.testing.assert_array_equal, read, params)
    more = {"num_local_experts": 6, "num_experts": 6}
    (tmp_path / "config.json").write_text(json.dumps({**raw, **more}))
    with pytest.raises(ModelError, match=r"no tensor 'model\.layers\.0\.\S*experts\.5\."):
        models.load(tmp_path)


def test_layers_of_two_kinds_are_not_scanned(tmp_path):
    raw = {**QWEN, "mlp_only_layers": [1]}
    fn = LanguageModel(MoeConfig.from_hf(raw))
    params = fn.init(0)
    assert "experts" in params["layers"][0]["mlp"] and params["layers"][1]["mlp"]["up"]["kernel"].shape == (16, 24)
    for attempt in (
        lambda: models.stack_layers(params),
        lambda: LanguageModel(fn.config, scan_layers=True).abstract_params(),
    ):
        with pytest.raises(ModelError, match="differ in kind"):
            attempt()


def test_families_differ():
    mixtral, qwen = MoeConfig.from_hf(MIXTRAL), MoeConfig.from_hf(QWEN)
    assert (mixtral.moe_intermediate_size, mixtral.norm_topk_prob, mixtral.qkv_bias) == (24, True, False)
    assert (qwen.moe_intermediate_size, qwen.norm_topk_prob, qwen.qkv_bias) == (12, False, True)
    assert (mixtral.shared_intermediate_size, qwen.shared_intermediate_size) == (0, 20)
    third = MoeConfig.from_hf({**QWEN, "architectures": ["Qwen3MoeForCausalLM"]})
    assert third.qk_norm and third.head_dim == 8 and third.shared_intermediate_size == 0
    assert MoeConfig.from_hf({**QWEN, "decoder_sparse_step": 2}).dense_layers == (0,)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_experts": None}, "lacks num_experts"),
        ({"moe_intermediate_size": None}, "lacks moe_intermediate_size"),
        ({"shared_expert_intermediate_size": None}, "lacks shared_expert_intermediate_size"),
        ({"num_experts_per_tok": 6}, r"num_experts_per_tok \(6\) is more than num_experts \(5\)"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"architectures": ["Qwen2MoForCausalLM"]}, "did you mean 'Qwen2MoeForCausalLM'"),
    ],
)
def test_refusals(change, words):
    with pytest.raises(ModelError, match=words):
        MoeConfig.from_hf({**QWEN, **change})

"""The decoder against itself: scanned and unrolled forms, cache and full forward, generation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.errors import ModelError
from qjax.models import (
    Gpt2Config,
    LanguageModel,
    LlamaConfig,
    RopeScaling,
    fuse,
    generate,
    stack_layers,
    unstack_layers,
)

TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
CASES = {
    "llama": LlamaConfig(**TINY),
    "windows": LlamaConfig(**TINY, windows=(None, 4, 6), qkv_bias=True, tie_word_embeddings=True),
    "qk-norm": LlamaConfig(**TINY, qk_norm=True, rope_scaling=RopeScaling("linear", 2.0)),
}


def tokens(batch=2, length=12, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 61, (batch, length)), jnp.int32)


def names(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}


def test_names():
    found = names(LanguageModel(CASES["llama"]).abstract_params())
    assert found["layers/2/attn/q_proj/kernel"] == (32, 32)
    assert found["layers/2/attn/k_proj/kernel"] == (32, 16)
    assert found["layers/0/mlp/up/kernel"] == (32, 48)
    assert found["embed/embedding"] == (61, 32)
    assert found["lm_head/kernel"] == (32, 61)
    assert {"norm/scale", "layers/1/attn_norm/scale", "layers/1/mlp_norm/scale"} <= set(found)
    stacked = names(LanguageModel(CASES["llama"], scan_layers=True).abstract_params())
    assert stacked["layers/attn/q_proj/kernel"] == (3, 32, 32)
    assert "lm_head/kernel" not in names(LanguageModel(CASES["windows"]).abstract_params())


@pytest.mark.every(3)
@pytest.mark.parametrize("case", CASES)
def test_scanned_is_unrolled(case):
    fn = LanguageModel(CASES[case])
    scanned = LanguageModel(CASES[case], scan_layers=True)
    params = fn.init(1)
    stacked = stack_layers(params)
    assert jax.tree.structure(stacked) == jax.tree.structure(scanned.abstract_params())
    chex = jax.tree.map(np.array_equal, scanned.init(1), stacked)
    assert all(jax.tree.leaves(chex)), "the same seed gives the same weights in both forms"
    np.testing.assert_allclose(scanned(stacked, tokens()), fn(params, tokens()), rtol=1e-5, atol=1e-5)
    back = jax.tree.map(np.array_equal, unstack_layers(stacked), params)
    assert all(jax.tree.leaves(back))


@pytest.mark.every(3)
@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("case", CASES)
def test_cache_is_the_full_forward(case, scan_layers):
    fn = LanguageModel(CASES[case], scan_layers=scan_layers)
    params = fn.init(2)
    text = tokens()
    full = fn(params, text)
    cache = fn.init_cache(2, 16)
    logits, cache = jax.jit(fn.prefill)(params, text[:, :5], cache)
    parts = [logits]
    logits, cache = jax.jit(fn.prefill)(params, text[:, 5:8], cache)  # a second chunk behind the first
    parts.append(logits)
    step = jax.jit(fn.decode_step)
    for i in range(8, text.shape[1]):
        logits, cache = step(params, text[:, i], cache)
        parts.append(logits[:, None])
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), full, rtol=2e-5, atol=2e-5)
    assert int(cache["length"]) == text.shape[1]


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_fused_is_apart(scan_layers):
    """q, k and v as one matrix, gate and up as another: the same logits, the same 4-bit codes, with a cache."""
    fn = LanguageModel(CASES["windows"], scan_layers=scan_layers)
    fused = LanguageModel(CASES["windows"], scan_layers=scan_layers, fused=True)
    params = fn.init(3)
    together = fuse(params)
    assert jax.tree.structure(together) == jax.tree.structure(fused.abstract_params())
    first = together["layers"] if scan_layers else together["layers"][0]
    assert set(first["attn"]) == {"qkv_proj", "o_proj"} and set(first["mlp"]) == {"gate_up", "down"}
    text, cache = tokens(), fn.init_cache(2, 16)
    if scan_layers:
        want, got = (jax.jit(f.prefill)(p, text, cache)[0] for f, p in ((fn, params), (fused, together)))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        return
    recipe = qjax.Recipe([qjax.Rule("layers/**", weights=qjax.Int(4, group=16))])
    apart, one = (qjax.quantize(f, p, text, recipe=recipe) for f, p in ((fn, params), (fused, together)))
    assert len(one.report.quantized) == 3 * 4 and len(apart.report.quantized) == 3 * 7
    want, got = (m.bind(f.prefill)(m.params, text, cache)[0] for m, f in ((apart, fn), (one, fused)))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_fused_is_refused():
    config = Gpt2Config(61, 32, 48, 1, 4)
    with pytest.raises(ModelError, match="fused is for decoders of the Llama family, and this is a Gpt2"):
        LanguageModel(config, fused=True)
    with pytest.raises(ModelError, match="fuse takes the params of a Llama"):
        fuse(fuse(LanguageModel(CASES["llama"]).init()))


def test_causal():
    fn = LanguageModel(CASES["llama"])
    params = fn.init()
    text = tokens()
    changed = text.at[:, 7].set((text[:, 7] + 1) % 61)
    before, after = fn(params, text), fn(params, changed)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert not np.allclose(before[:, 7:], after[:, 7:])


def test_window_hides_the_far_past():
    fn = LanguageModel(LlamaConfig(**TINY, windows=(3, 3, 3)))  # three layers reach (3 - 1) * 3 = 6 positions back
    params = fn.init()
    text = tokens()
    changed = text.at[:, 0].set((text[:, 0] + 1) % 61)
    before, after = fn(params, text), fn(params, changed)
    np.testing.assert_array_equal(before[:, 7:], after[:, 7:])
    assert not np.allclose(before[:, 6], after[:, 6])


def test_bfloat16_stays_bfloat16():
    fn = LanguageModel(CASES["llama"])
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), fn.init())
    assert fn(params, tokens()).dtype == jnp.bfloat16
    logits, cache = fn.prefill(params, tokens(), fn.init_cache(2, 16, jnp.bfloat16))
    assert logits.dtype == jnp.bfloat16 and cache["layers"][0]["k"].dtype == jnp.bfloat16


@pytest.mark.slow
def test_gradients_flow_to_every_leaf():
    fn = LanguageModel(CASES["qk-norm"])
    params = fn.init()
    grads = jax.grad(lambda p: jnp.square(fn(p, tokens())).mean())(params)
    assert all(bool(jnp.any(g != 0)) for g in jax.tree.leaves(grads))


def test_greedy_generation_is_repeated_argmax():
    fn = LanguageModel(CASES["llama"])
    params = fn.init(3)
    text = np.asarray(tokens(2, 4))
    out = fn.generate(params, text, 5)
    assert out.shape == (2, 9)
    forward = jax.jit(fn)
    for i in range(4, 9):
        padded = np.pad(out[:, :i], ((0, 0), (0, 9 - i)))
        np.testing.assert_array_equal(np.argmax(forward(params, padded)[:, i - 1], -1), out[:, i])


def test_sampling_needs_and_obeys_a_key():
    fn = LanguageModel(CASES["llama"])
    params = fn.init(3)
    with pytest.raises(ModelError, match="jax.random.key"):
        fn.generate(params, [1, 2], 3, temperature=1.0)
    first, again, other = (fn.generate(params, [1, 2], 8, temperature=2.0, key=jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_generation_stops():
    fn = LanguageModel(CASES["llama"])
    params = fn.init(3)
    out = fn.generate(params, [1, 2], 6)
    assert fn.generate(params, [1, 2], 6, stop=(int(out[0, 3]),)).shape[1] <= 4


def test_generation_with_any_functions():
    calls = []

    def prefill(params, tokens, cache):
        calls.append("prefill")
        return jax.nn.one_hot((tokens + params) % 7, 7), cache

    def decode_step(params, tokens, cache):
        calls.append("decode")
        return jax.nn.one_hot((tokens + params) % 7, 7), cache + 1

    out = generate(jnp.int32(2), [1], 4, prefill=prefill, decode_step=decode_step, cache=jnp.int32(0))
    assert out.tolist() == [[1, 3, 5, 0, 2]]
    assert calls == ["prefill", "decode"], "each is traced once"


def test_bad_prompts_and_caches():
    fn = LanguageModel(CASES["llama"])
    params = fn.init()
    with pytest.raises(ModelError, match="token ids"):
        fn.generate(params, [], 3)
    with pytest.raises(ModelError, match="init_cache"):
        generate(params, [1, 2, 3], 4, prefill=fn.prefill, decode_step=fn.decode_step, cache=fn.init_cache(1, 5))
    with pytest.raises(ModelError, match="layers/0/attn"):
        fn({**params, "layers": [{}]}, tokens())

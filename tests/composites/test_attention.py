"""Attention in the spellings of libraries and of people; each match is recomputed from its own description."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax

from qjax import _compat
from qjax.composites import find_composites, find_nested

B, T, S, H, D = 2, 6, 6, 4, 8
TRIL = np.tril(np.ones((T, S), bool))
dpa = functools.partial(jax.nn.dot_product_attention, implementation="xla")


def einsum(q, k, v, mask=None, scale=D**-0.5):
    z = jnp.einsum("bthd,bshd->bhts", q, k) * scale
    if mask is not None:
        z = jnp.where(mask, z, -1e9)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(z, axis=-1), v)


def by_hand(q, k, v, shift=True):
    q, k, v = (a.transpose(0, 2, 1, 3) for a in (q, k, v))
    z = (q @ k.swapaxes(-1, -2)) / jnp.sqrt(float(D))
    e = jnp.exp(z - z.max(-1, keepdims=True)) if shift else jnp.exp(z)
    return ((e / e.sum(-1, keepdims=True)) @ v).transpose(0, 2, 1, 3)


def reciprocal(q, k, v):
    z = jnp.einsum("bthd,bshd->bhts", q * D**-0.25, k * D**-0.25)
    e = jnp.exp(z - lax.stop_gradient(z.max()))
    return jnp.einsum("bshd,bhts->bthd", v, e * (1.0 / e.sum(-1)[..., None]))


def added_mask(q, k, v):
    z = jnp.einsum("bthd,bshd->bhts", q, k) / math.sqrt(D)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(z + jnp.where(TRIL, 0.0, -1e9)), v)


def inverted_mask(q, k, v):
    z = jnp.einsum("bthd,bshd->bhts", q, k) / math.sqrt(D)
    z = jnp.where(jnp.triu(jnp.ones((T, S), bool), 1), jnp.finfo(z.dtype).min, z)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(z), v)


def masked_before_scaling(q, k, v):
    z = jnp.where(jnp.arange(S) <= jnp.arange(T)[:, None], jnp.einsum("bthd,bshd->bhts", q, k), -1e30)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(z * D**-0.5), v)


def softmax_where(q, k, v):
    z = jnp.einsum("bthd,bshd->bhts", q, k) / math.sqrt(D)
    p = jax.nn.softmax(z, where=jnp.asarray(TRIL))
    return jnp.einsum("bhts,bshd->bthd", p, v)


def softcap(q, k, v):
    z = 5.0 * jnp.tanh(jnp.einsum("bthd,bshd->bhts", q, k) * 0.3 / 5.0)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(TRIL, z, -2e38)), v)


def torch_like(q, k, v):
    """Batch and heads merged for the products, split for the mask."""
    q, k, v = (a.transpose(0, 2, 1, 3).reshape(B * H, -1, D) for a in (q, k, v))
    z = (q @ k.transpose(0, 2, 1)).reshape(B, H, T, S) / math.sqrt(D)
    z = jnp.where(jnp.asarray(TRIL)[None, None], z, -jnp.inf).reshape(B * H, T, S)
    out = jax.nn.softmax(z, -1) @ v
    return out.reshape(B, H, T, D).transpose(0, 2, 1, 3).reshape(B, T, H * D)


def transposed_scores(q, k, v):
    """Keys before queries, softmax over the last but one dimension."""
    z = jnp.einsum("bshd,bthd->bhst", k, q) * 0.25
    return jnp.einsum("bhst,bshd->bhtd", jax.nn.softmax(z, axis=2), v)


def upcast(q, k, v):
    z = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32) * 0.25
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(z).astype(q.dtype), v)


def per_example(q, k, v):
    one = lambda q, k, v: jax.nn.softmax(q @ k.T * 0.25) @ v  # noqa: E731
    return jax.vmap(jax.vmap(one, in_axes=1, out_axes=1))(q, k, v)


def temperature(q, k, v, tau):
    z = jnp.einsum("bthd,bshd->bhts", q, k) * jnp.exp(tau)[:, None, None]
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(z), v)


def general(q, k, v):
    z = lax.dot_general(k, q, (((3,), (3,)), ((2, 0), (2, 0))))  # h b s t
    p = jax.nn.softmax(z, axis=2)
    return lax.dot_general(p, v, (((2,), (1,)), ((0, 1), (2, 0))))


PLAIN = {
    "dpa": dpa,
    "einsum": einsum,
    "by_hand": by_hand,
    "no_shift": functools.partial(by_hand, shift=False),
    "reciprocal": reciprocal,
    "added_mask": added_mask,
    "inverted_mask": inverted_mask,
    "masked_before_scaling": masked_before_scaling,
    "softmax_where": softmax_where,
    "softcap": softcap,
    "torch_like": torch_like,
    "transposed_scores": transposed_scores,
    "upcast": upcast,
    "per_example": per_example,
    "general": general,
    "dpa_causal": functools.partial(dpa, is_causal=True),
    "dpa_window": functools.partial(dpa, local_window_size=(2, 0)),
    "remat_jit": jax.checkpoint(jax.jit(functools.partial(dpa, is_causal=True))),
    "flax_function": linen.dot_product_attention,
}
CAUSAL = {
    "added_mask": (0, None),
    "inverted_mask": (0, None),
    "masked_before_scaling": (0, None),
    "softmax_where": (0, None),
    "softcap": (0, None),
    "torch_like": (0, None),
    "dpa_causal": (0, None),
    "dpa_window": (0, 3),
    "remat_jit": (0, None),
}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_spellings(find, rand, name, dtype):
    q, k, v = (rand(B, n, H, D).astype(dtype) for n in (T, S, S))
    (match,) = find(PLAIN[name], q, k, v, op="attention")
    roles = dict(match.axes)
    assert roles["query"] == T and roles["key"] == S and roles["feature"] == roles["value"] == D
    if name != "torch_like":
        assert roles["batch"] == B and roles["head"] == H
    causal = match.causal and (match.causal.offset, match.causal.window)
    assert causal == CAUSAL.get(name)
    assert not match.padded and match.groups == 1 and not match.biases
    scale = {"general": 1.0, "softcap": 0.3, "transposed_scores": 0.25, "per_example": 0.25, "upcast": 0.25}
    assert math.isclose(match.scale * match.prescale, scale.get(name, D**-0.5), rel_tol=1e-2)
    assert match.softcap == (5.0 if name == "softcap" else None)


@pytest.mark.parametrize("name", ["einsum", "by_hand", "torch_like", "transposed_scores", "general", "per_example"])
def test_custom_jvp_softmax(find, rand, name):
    q, k, v = (rand(B, T, H, D) for _ in range(3))
    with jax.enable_custom_jvp_softmax(True) if hasattr(jax, "enable_custom_jvp_softmax") else _flag():
        (match,) = find(PLAIN[name], q, k, v, op="attention")
    assert match.softmax is not None


class _flag:
    def __enter__(self):
        jax.config.update("jax_softmax_custom_jvp", True)

    def __exit__(self, *error):
        jax.config.update("jax_softmax_custom_jvp", False)


def test_scale_before_and_after(find, rand):
    q, k, v = (rand(B, T, H, D) for _ in range(3))
    (match,) = find(lambda q, k, v: einsum(q * 0.5, k / 4.0, v, scale=3.0), q, k, v, op="attention")
    assert match.scale == 3.0 and match.prescale == 0.125


def test_temperature_per_head(find, rand):
    q, k, v = (rand(B, T, H, D) for _ in range(3))
    (match,) = find(temperature, q, k, v, rand(H), op="attention")
    assert [match.labels(gain.operand) for gain in match.gains] == [("head",)]


def test_masks_from_data(find, rand):
    q, k, v = (rand(B, T, H, D) for _ in range(3))
    tokens = jnp.asarray([[3, 1, 2, 0, 0, 0], [1, 2, 3, 4, 5, 0]])

    def padded(q, k, v, tokens):
        mask = linen.combine_masks(linen.make_causal_mask(tokens), linen.make_attention_mask(tokens >= 0, tokens > 0))
        return linen.dot_product_attention(q, k, v, mask=mask)

    def bert(q, k, v, tokens):
        z = jnp.einsum("bthd,bshd->bhts", q, k) + (1.0 - (tokens > 0)[:, None, None].astype(q.dtype)) * -10000.0
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(z), v)

    (match,) = find(padded, q, k, v, tokens, op="attention")
    assert match.padded and match.causal is not None and match.causal.offset == 0
    assert [m.fixed for m in match.masks].count(True) == 1
    (match,) = find(bert, q, k, v, tokens, op="attention")
    assert match.padded and match.causal is None
    assert [match.labels(m.operand) for m in match.masks] == [("batch", "key")]
    assert not match.biases


def test_biases(find, rand):
    q, k, v, table = rand(B, T, H, D), rand(B, S, H, D), rand(B, S, H, D), rand(2 * T, H)
    slopes = 2.0 ** -jnp.arange(1, H + 1)

    def t5(q, k, v, table):
        where = jnp.arange(S)[None] - jnp.arange(T)[:, None] + T
        z = jnp.einsum("bthd,bshd->bhts", q, k) + table[where].transpose(2, 0, 1)[None]
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(z), v)

    def alibi(q, k, v, table):
        z = jnp.einsum("bthd,bshd->bhts", q, k) * 0.5
        z = (z + slopes[:, None, None] * (jnp.arange(S)[None] - jnp.arange(T)[:, None])) / 2.0
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(TRIL, z, -1e9)), v)

    (match,) = find(t5, q, k, v, table, op="attention")
    assert [match.labels(bias.operand) for bias in match.biases] == [("query", "key", "head")]
    (match,) = find(alibi, q, k, v, table, op="attention")
    assert len(match.biases) == 1 and match.biases[0].factor == 0.5 and match.scale == 0.25
    assert match.causal is not None


def gemma(q, k, v, mask, table):
    q = q.reshape(B, T, 2, 2, D)
    z = jnp.einsum("BTKGH,BSKH->BTKGS", q, k[:, :, ::2]).reshape(B, T, 4, S)
    z = jnp.where(mask[:, :, None, :], jnp.tanh(z / 50.0) * 50.0, -2.3819763e38)
    p = jax.nn.softmax(z, axis=-1).astype(k.dtype).reshape(B, T, 2, 2, S)
    return jnp.einsum("BTKGS,BSKH->BTKGH", p, v[:, :, ::2]).reshape(B, T, 4, D)


def t5x(q, k, v, mask, table):
    hidden = lax.select(mask[:, None] > 0, jnp.zeros((B, 1, T, S)), jnp.full((B, 1, T, S), -1e10))
    z = jnp.einsum("bqhd,bkhd->bhqk", q, k) + (hidden + table)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(z), v)


def nano(q, k, v, mask, table):
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
    tril = jnp.tril(jnp.ones((T, S))).reshape(1, 1, T, S)
    z = jnp.where(tril == 0, float("-inf"), (q @ k.swapaxes(-2, -1)) * (1.0 / math.sqrt(D)))
    return jax.nn.softmax(z, axis=-1) @ v


def hidden_times(q, k, v, mask, table):
    z = jnp.einsum("bqhd,bkhd->bhqk", q, k) + (~mask[:, None]).astype(q.dtype) * -1e9
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(z), v)


def looked_up(q, k, v, mask, table):
    z = jnp.where(mask[:, jnp.arange(T)[::-1]][:, None], jnp.einsum("bqhd,bkhd->bhqk", q, k), -1e9)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(z), v)


@pytest.mark.parametrize("fn", [gemma, t5x, nano, hidden_times, looked_up])
def test_codebases(find, rand, fn):
    """As it stands in well-known code."""
    mask = jnp.asarray(np.random.default_rng(3).random((B, T, S)) > 0.3).at[..., 0].set(True)
    args = rand(B, T, H, D), rand(B, S, H, D), rand(B, S, H, D), mask, rand(1, H, T, S)
    (match,) = find(fn, *args, op="attention")
    assert match.padded == (fn is not nano) and (match.causal is not None) == (fn is nano)
    assert match.groups == (2 if fn is gemma else 1) and len(match.biases) == (fn is t5x)
    assert [mask.keep for mask in match.masks] == [True] if fn is not nano else [False]


def test_top_k_attention_is_declined(find, rand):
    """The mask is made from the scores: no single op could take it as an operand."""

    def fn(q, k, v):
        z = jnp.einsum("bthd,bshd->bhts", q, k)
        z = jnp.where(z >= jnp.sort(z, axis=-1)[..., -3:-2], z, -1e9)
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(z), v)

    assert find(fn, *(rand(B, T, H, D) for _ in range(3)), op="attention") == []


def test_bias_made_by_a_product(find, rand):
    """Both summands come from products; only one has keys."""
    q, k, v, w = rand(B, T, H, D), rand(B, S, H, D), rand(B, S, H, D), rand(D, S)

    def fn(q, k, v, w):
        bias = jnp.einsum("bthd,ds->bhts", q, w)
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(bias + jnp.einsum("bthd,bshd->bhts", q, k)), v)

    (match,) = find(fn, q, k, v, w, op="attention")
    assert match.k.value.shape == k.shape


def grouped(q, k, v, how):
    if how == "dpa":
        return dpa(q, k, v, is_causal=True)
    if how == "repeat":
        return einsum(q, jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2), jnp.asarray(TRIL))
    if how == "broadcast":
        k, v = (jnp.broadcast_to(a[:, :, :, None], (B, S, 2, 2, D)).reshape(B, S, 4, D) for a in (k, v))
        return einsum(q, k, v, jnp.asarray(TRIL))
    q = q.reshape(B, T, 2, 2, D)
    if how == "five":
        z = jnp.einsum("btkgd,bskd->bkgts", q, k)
        return jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(jnp.where(TRIL, z, -1e9)), v)
    q, k, v = q.transpose(0, 2, 3, 1, 4), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    z = q @ k[:, :, None].swapaxes(-1, -2)  # "matmul"
    return jax.nn.softmax(jnp.where(TRIL, z, -1e9)) @ v[:, :, None]


@pytest.mark.parametrize("how", ["dpa", "repeat", "broadcast", "five", "matmul"])
def test_grouped_heads(find, rand, how):
    args = rand(B, T, 4, D), rand(B, S, 2, D), rand(B, S, 2, D)
    (match,) = find(functools.partial(grouped, how=how), *args, op="attention")
    assert match.groups == 2
    assert {"batch": B, "head": 2, "group": 2, "query": T, "key": S}.items() <= dict(match.axes).items()
    assert match.causal is not None


def test_one_key_head(find, rand):
    x, wq, wk, wv = rand(B, T, 16), rand(16, H * D), rand(16, D), rand(16, D)

    def fn(x, wq, wk, wv):
        q, k, v = (x @ wq).reshape(B, T, H, D), x @ wk, x @ wv
        p = jax.nn.softmax(jnp.einsum("bthd,bsd->bhts", q, k) * 0.25)
        return jnp.einsum("bhts,bsd->bthd", p, v)

    (match,) = find(fn, x, wq, wk, wv, op="attention")
    assert match.groups == H
    assert match.labels(match.q) == ("batch", "query", "group", "feature")


def test_heads_are_told_from_batch_by_the_projection(find, rand):
    """No order of dimensions could tell: heads first, one batch dimension behind."""
    x, w = rand(T, B, 16), rand(3, H, 16, D)

    def fn(x, w):
        q, k, v = (jnp.einsum("tbm,hmd->htbd", x, part) for part in w)
        p = jax.nn.softmax(jnp.einsum("htbd,hsbd->hbts", q, k))
        return jnp.einsum("hbts,hsbd->tbhd", p, v)

    (match,) = find(fn, x, w, op="attention")
    assert match.labels(match.q) == ("head", "query", "batch", "feature")
    assert match.labels(match.v) == ("head", "key", "batch", "value")


def test_vit_fused_qkv(find, rand):
    x, w, wo = rand(B, T, 16), rand(16, 3 * H * D), rand(H * D, 16)

    def fn(x, w, wo):
        q, k, v = (x @ w).reshape(B, T, 3, H, D).transpose(2, 0, 3, 1, 4)
        p = jax.nn.softmax(q @ k.swapaxes(-1, -2) * D**-0.5, axis=-1)
        return (p @ v).transpose(0, 2, 1, 3).reshape(B, T, H * D) @ wo

    (match,) = find(fn, x, w, wo, op="attention")
    assert match.labels(match.q) == ("batch", "head", "query", "feature")
    assert match.exposed == ()


def test_rotary_and_split(find, rand):
    x, w = rand(B, T, 16), rand(16, 3 * H * D)

    def rope(x):
        angle = jnp.arange(T)[:, None] / 100.0 ** (jnp.arange(D // 2) / D)
        c, s = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([a * c - b * s, b * c + a * s], axis=-1)

    def fn(x, w):
        q, k, v = (a.reshape(B, T, H, D) for a in jnp.split(x @ w, 3, axis=-1))
        return dpa(rope(q), rope(k), v, is_causal=True)

    (match,) = find(fn, x, w, op="attention")
    assert match.labels(match.q) == ("batch", "query", "head", "group", "feature")


@pytest.mark.parametrize("shape", [(1, 6, 6), (2, 1, 6), (1, 1, 6), (2, 3, 1), (1, 1, 1)])
@pytest.mark.parametrize("name", ["dpa", "einsum", "by_hand", "general"])
def test_ones(find, rand, name, shape):
    """Names of sites must not change with shapes: one example, one query, one key."""
    b, t, s = shape
    (match,) = find(PLAIN[name], rand(b, t, H, D), rand(b, s, H, D), rand(b, s, H, D), op="attention")
    assert dict(match.axes)["query"] == t and dict(match.axes)["key"] == s and dict(match.axes)["head"] == H


def test_windows_of_an_image(find, rand):
    """Swin: windows in the batch, a mask that differs per window, a table of relative biases."""
    n = 3
    q, k, v, bias = rand(B * n, H, T, D), rand(B * n, H, T, D), rand(B * n, H, T, D), rand(H, T, T)
    mask = np.where(np.random.default_rng(1).random((n, T, T)) > 0.3, 0.0, -100.0 * 1e3).astype(np.float32)

    def fn(q, k, v, bias):
        z = q @ k.swapaxes(-1, -2) + bias[None]
        z = z.reshape(B, n, H, T, T) + jnp.asarray(mask)[None, :, None]
        return jax.nn.softmax(z.reshape(-1, H, T, T)) @ v

    (match,) = find(fn, q, k, v, bias, op="attention")
    assert len(match.masks) == 1 and len(match.biases) == 1 and match.masks[0].fixed
    assert match.causal is None and not match.padded


def test_cross_and_latent_attention(find, rand):
    x, latents, wk, wv = rand(B, 9, 16), rand(5, 16), rand(16, 16), rand(16, 16)

    def fn(x, latents, wk, wv, spec="td,bsd->bts"):
        p = jax.nn.softmax(jnp.einsum(spec, latents, x @ wk) * 0.25)
        return p @ (x @ wv)

    # One set of latents for the whole batch: the batch belongs to the keys alone, no attention per example.
    assert find(fn, x, latents, wk, wv, op="attention") == []
    each = lambda x, *rest: jax.vmap(lambda x: fn(x[None], *rest)[0])(x)  # noqa: E731
    assert find(each, x, latents, wk, wv, op="attention") == []
    copied = lambda x, latents, *rest: fn(  # noqa: E731
        x, jnp.broadcast_to(latents, (B, 5, 16)), *rest, "btd,bsd->bts"
    )
    (match,) = find(copied, x, latents, wk, wv, op="attention")
    assert dict(match.axes)["query"] == 5


def test_kv_cache(find, rand):
    def fn(q, cache_k, cache_v, new_k, new_v, at):
        k = lax.dynamic_update_slice(cache_k, new_k, (0, at, 0, 0))
        v = lax.dynamic_update_slice(cache_v, new_v, (0, at, 0, 0))
        mask = jnp.arange(12) <= at + jnp.arange(q.shape[1])[:, None]
        return dpa(q, k, v, mask=mask[None, None]), k, v

    for t in (1, 3):
        args = rand(B, t, H, D), rand(B, 12, H, D), rand(B, 12, H, D), rand(B, t, H, D), rand(B, t, H, D), jnp.int32(4)
        (match,) = find(fn, *args, op="attention")
        assert match.k.value.node.name == "dynamic_update_slice" and match.padded


def test_modules(find, rand, variables):
    x = rand(B, T, 16)
    for kwargs in ({}, {"dtype": jnp.bfloat16}, {"normalize_qk": True}, {"force_fp32_for_softmax": True}):
        module = linen.MultiHeadDotProductAttention(H, **kwargs)
        (match,) = find(module.apply, variables(module.init, x), x, op="attention")
        assert match.labels(match.q) == ("batch", "query", "head", "feature")
    module = linen.MultiHeadDotProductAttention(H, decode=True)
    cache = variables(module.init, x)
    step = lambda v, x: module.apply(v, x[:, :1], mutable=["cache"])[0]  # noqa: E731
    (match,) = find(step, cache, x, op="attention")
    assert match.padded
    graph, state = nnx.split(nnx.MultiHeadAttention(H, 16, decode=False, rngs=nnx.Rngs(0)))
    mask = linen.make_causal_mask(x[..., 0])
    (match,) = find(lambda state, x: nnx.merge(graph, state)(x, mask=mask), state, x, op="attention")
    assert match.causal is not None


def test_equinox(find, rand):
    eqx = pytest.importorskip("equinox")
    module = eqx.nn.MultiheadAttention(H, 16, key=jax.random.key(0))
    mask = jnp.asarray(TRIL)
    (match,) = find(lambda x: jax.vmap(lambda x: module(x, x, x, mask))(x), rand(B, T, 16), op="attention")
    assert match.causal is not None and match.labels(match.q) == ("batch", "query", "head", "feature")


def test_probabilities_read_elsewhere(find, rand):
    def fn(q, k, v):
        p = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
        return jnp.einsum("bhts,bshd->bthd", p, v), p.mean(1)

    (match,) = find(fn, *(rand(B, T, H, D) for _ in range(3)), op="attention")
    assert match.exposed == (match.probabilities.value,)


def test_two_values_for_one_softmax(find, rand):
    def fn(q, k, v, u):
        p = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
        return jnp.einsum("bhts,bshd->bthd", p, v), jnp.einsum("bhts,bshd->bthd", p, u)

    found = find(fn, *(rand(B, T, H, D) for _ in range(4)), op="attention")
    assert len(found) == 2 and all(match.exposed for match in found)


def test_control_flow(find_deep, rand):
    q, k, v = (rand(B, T, H, D) for _ in range(3))
    step = lambda c, _: (dpa(c, k, v), None)  # noqa: E731
    cases = [
        lambda q: lax.scan(step, q, None, length=3)[0],
        lambda q: lax.scan(jax.checkpoint(step), q, None, length=3)[0],
        lambda q: lax.while_loop(lambda c: c.sum() < 0, lambda c: einsum(c, k, v), q),
        lambda q: lax.cond(q.sum() > 0, lambda q: by_hand(q, k, v), lambda q: einsum(q, k, v), q),
    ]
    for fn, count in zip(cases, (1, 1, 1, 2), strict=True):
        assert [c.op for c in find_deep(fn, q)].count("attention") == count


def test_shard_map(rand):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("d")
    fn = jax.shard_map(functools.partial(dpa, is_causal=True), mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    found = find_nested(jax.make_jaxpr(fn)(*(rand(B, T, H, D) for _ in range(3))))
    (match,) = [c for c in found if c.op == "attention"]
    assert dict(match.axes)["head"] == H and match.causal is not None and match.output_path[1] == ("jaxpr", 0)


def test_gradients_and_training_steps_are_walked_without_harm(rand):
    """Derivatives hold products that read probabilities too; the forward attention is still one of them."""
    loss = lambda q: einsum(q, q, q).sum()  # noqa: E731
    for fn in (jax.grad(loss), jax.hessian(loss), jax.grad(jax.checkpoint(loss))):
        assert any(c.op == "attention" for c in find_nested(jax.make_jaxpr(fn)(rand(1, 3, 2, 4))))


def test_constants_from_outside_a_loop_are_known_inside(rand):
    """A mask made once, before the scan over layers."""
    q, keys = rand(B, T, H, D), rand(3, B, S, H, D)

    def fn(q, keys):
        mask = jnp.tril(jnp.ones((T, S), bool))

        def layer(c, k):
            return lax.cond(c.sum() > 0, lambda c: einsum(c, k, k, mask), lambda c: dpa(c, k, k, mask=mask[None]), c)

        step = jax.checkpoint(lambda c, k: (layer(c, k), None))
        return lax.while_loop(lambda c: c.sum() > 9, lambda c: lax.scan(step, c, keys)[0], q)

    closed = jax.make_jaxpr(fn)(q, keys)
    first, second = [c for c in find_nested(closed) if c.op == "attention"]
    assert first.causal is not None and second.causal is not None and not first.padded
    for match, branch in ((first, 0), (second, 1)):
        steps = [step for step in match.output_path if not isinstance(step, int)]
        assert ("body_jaxpr", 0) in steps and ("branches", branch) in steps
        eqn, jaxpr = None, closed
        for step in match.output_path:
            if isinstance(step, int):
                eqn = _compat.open_jaxpr(jaxpr).eqns[step]
            else:
                jaxpr = dict(_compat.sub_jaxprs(eqn.params))[step]
        assert eqn is match.output.node.eqn


def test_symbolic_sizes():
    """A model exported at any batch size and length has the same attention."""
    from jax import export

    batch, tokens = export.symbolic_shape("b, t")
    q = jax.ShapeDtypeStruct((batch, tokens, H, D), jnp.float32)

    def merged(q, k, v):
        q, k, v = (a.transpose(0, 2, 1, 3).reshape(-1, a.shape[1], D) for a in (q, k, v))
        z = (q @ k.transpose(0, 2, 1)).reshape(-1, H, q.shape[1], k.shape[1])
        z = z + jnp.where(jnp.arange(q.shape[1])[:, None] >= jnp.arange(k.shape[1]), 0.0, -1e9)
        return jax.nn.softmax(z).reshape(-1, q.shape[1], k.shape[1]) @ v

    for fn in (merged, functools.partial(dpa, is_causal=True)):
        (match,) = [c for c in find_composites(jax.make_jaxpr(fn)(q, q, q)) if c.op == "attention"]
        assert match.causal is not None and dict(match.axes)["head"] == H


def test_inside_a_custom_vjp(find_deep, rand):
    @jax.custom_vjp
    def flash(q, k, v):
        return dpa(q, k, v, is_causal=True)

    flash.defvjp(lambda q, k, v: (flash(q, k, v), (q, k, v)), lambda res, g: (g, g, g))
    found = find_deep(jax.jit(flash), *(rand(B, T, H, D) for _ in range(3)))
    (match,) = [c for c in found if c.op == "attention"]
    assert match.output_path[:4] == (0, ("jaxpr", 0), 0, ("call_jaxpr", 0))


def test_shared_body_gives_one_match_per_call(find, rand):
    layer = jax.jit(einsum)
    fn = lambda q, k, v: layer(layer(q, k, v), k, v)  # noqa: E731
    first, second = find(fn, *(rand(B, T, H, D) for _ in range(3)), op="attention")
    assert first.values.eqn is second.values.eqn
    assert first.output_path[0] == 0 and second.output_path[0] == 1
    assert second.q.value is first.output.users[0].output or second.q.value.node is not None


# ------------------------------------------------------------------------------------------- declined
def log_softmax(q, k, v):
    p = jnp.exp(jax.nn.log_softmax(jnp.einsum("bthd,bshd->bhts", q, k)))
    return jnp.einsum("bhts,bshd->bthd", p, v)


def normalised_later(q, k, v):
    e = jnp.exp(jnp.einsum("bthd,bshd->bhts", q, k))
    return jnp.einsum("bhts,bshd->bthd", e, v) / e.sum(-1).transpose(0, 2, 1)[..., None]


def wrong_axis(q, k, v):
    p = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k), axis=2)
    return jnp.einsum("bhts,bshd->bthd", p, v)


def head_axis(q, k, v):
    p = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k), axis=1)
    return jnp.einsum("bhts,bshd->bthd", p, v)


def values_over_queries(q, k, v):
    p = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
    return jnp.einsum("bhts,bthd->bshd", p, v)


def shift_along_keys(q, k, v):
    """The subtrahend differs along the softmax axis: a bias, not a shift."""
    z = jnp.einsum("bthd,bshd->bhts", q, k)
    e = jnp.exp(z - z.max(2, keepdims=True))
    return jnp.einsum("bhts,bshd->bthd", e / e.sum(-1, keepdims=True), v)


def off_by_one(q, k, v):
    e = jnp.exp(jnp.einsum("bthd,bshd->bhts", q, k))
    return jnp.einsum("bhts,bshd->bthd", e / (1.0 + e.sum(-1, keepdims=True)), v)


def sum_of_another(q, k, v):
    z = jnp.einsum("bthd,bshd->bhts", q, k)
    return jnp.einsum("bhts,bshd->bthd", jnp.exp(z) / jnp.exp(2 * z).sum(-1, keepdims=True), v)


def mask_below_the_cap(q, k, v):
    z = jnp.where(TRIL, jnp.einsum("bthd,bshd->bhts", q, k), -1e9)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(5 * jnp.tanh(z / 5)), v)


def squared_scores(q, k, v):
    z = jnp.einsum("bthd,bshd->bhts", q, k) ** 2
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(z), v)


def dropped(q, k, v):
    p = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
    p = jnp.where(jax.random.bernoulli(jax.random.key(0), 0.9, p.shape), p / 0.9, 0.0)
    return jnp.einsum("bhts,bshd->bthd", p, v)


def misaligned(q, k, v):
    """Heads of the probabilities meet other heads' values."""
    p = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
    return jnp.einsum("hbts,bshd->bthd", p[:, :2].transpose(0, 1, 2, 3), v[:, :, :2])


def mask_below_a_gain(q, k, v):
    """A gain of unknown sign turns a hidden score into the greatest."""
    z = jnp.where(TRIL, jnp.einsum("bthd,bshd->bhts", q, k), -1e9) * q.sum()
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(z), v)


def weights_times_values(q, k, v):
    p = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
    return jnp.einsum("bhts,bshd->bthd", p * p, v)


DECLINED = [
    log_softmax, normalised_later, wrong_axis, head_axis, values_over_queries, off_by_one, sum_of_another,
    mask_below_the_cap, mask_below_a_gain, squared_scores, dropped, misaligned, weights_times_values, shift_along_keys,
]  # fmt: skip


@pytest.mark.parametrize("fn", DECLINED)
def test_declined(find, rand, fn):
    assert find(fn, *(rand(B, T, H, D) for _ in range(3)), op="attention") == []


def test_flax_dropout_in_training_is_declined(find, rand, variables):
    x = rand(B, T, 16)
    module = linen.MultiHeadDotProductAttention(H, dropout_rate=0.1, deterministic=False)
    fn = lambda v, x: module.apply(v, x, rngs={"dropout": jax.random.key(1)})  # noqa: E731
    assert [c.op for c in find(fn, variables(module.init, x), x)] == ["softmax"]


def test_softmax_of_a_dense_layer_is_no_attention(find, rand):
    """Expected embeddings, a mixture of experts' router, a memory layer: two weights around a softmax."""
    x, w, e = rand(B, T, 16), rand(16, 12), rand(12, 16)
    assert find(lambda x, w, e: jax.nn.softmax((x + 1) @ w) @ e, x, w, e, op="attention") == []
    experts = rand(12, 16, 16)
    fn = lambda x, w, e: jnp.einsum("bte,emn,btm->btn", jax.nn.softmax(x @ w), e, x)  # noqa: E731
    assert find(fn, x, w, experts, op="attention") == []


def test_cudnn(monkeypatch, rand):
    """The cuDNN form, traced without a GPU: the checks of the installation are replaced, nothing is run."""
    cudnn = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda *a: 91300)
    monkeypatch.setattr(cudnn, "check_is_flash_attention", lambda *a, **k: None)
    q, k = rand(B, 8, 4, 16).astype(jnp.bfloat16), rand(B, 8, 2, 16).astype(jnp.bfloat16)
    fn = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    (match,) = find_composites(jax.make_jaxpr(lambda q, k: fn(q, k, k, is_causal=True))(q, k))
    assert match.op == "attention" and match.groups == 2 and match.causal.window is None
    assert match.labels(match.q) == ("batch", "query", "head+group", "feature") and match.scale == 0.25
    assert match.q.value.shape == q.shape and match.output_path == (1, ("call_jaxpr", 0), 0)
    bias = rand(1, 4, 8, 8).astype(jnp.bfloat16)
    (match,) = find_composites(jax.make_jaxpr(lambda q, k, b: fn(q, k, k, b))(q, k, bias))
    assert match.labels(match.biases[0].operand) == ("unit", "head+group", "query", "key") and match.causal is None

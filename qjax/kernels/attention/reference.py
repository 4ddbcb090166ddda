"""The oracle of attention over a quantized cache, in plain jnp and written from the equation.

With K~ = decode(codes of keys) and V~ likewise, token t of T of sequence b at position i = lengths[b] - T + t:

    seen(t, j)     = i - windows[b] < j <= i
    s[t, j]        = scale * sum over d of q[t, d] * K~[j, d]
    p[t, j]        = exp(s[t, j] - max over seen j of s) / sum over seen j of the same; 0 where j is not seen
    y[t, d]        = sum over j of p[t, j] * V~[j, d]

for each sequence, each head of keys, and each query head that shares it; in float32 (float64 for float64 queries). A
token that sees nothing gives zeros. What lies in the cache where no token sees it has no influence, NaN neither.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from qjax.formats import Format, QArray
from qjax.kernels.dot.reference import wide
from qjax.kernels.registry import Problem, register_lowering


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """The static part of attention over a cache.

    Attributes:
        scale: factor on the products of queries and keys.
        values: format of the values; that of the keys is the problem's ``weight``.
        implementation: the name of a lowering, or None to choose one.
    """

    scale: float
    values: Format
    implementation: str | None = None


def of_layer(cache: QArray, layer: Array) -> QArray:
    """Return keys or values of one layer, [B, H, S, D]."""
    return cache.index_stack(0, layer) if cache.stack_ndim == 3 else cache


def numbers_of(cache: QArray, dtype: Any) -> Array:
    """Return what keys or values of one layer stand for: float [B, H, S, D]."""
    return cache.fmt.decode(cache.unpacked(), cache.aux).astype(dtype)


def positions_seen(lengths: Array, windows: Array, tokens: int, room: int) -> Array:
    """Return which positions each token sees: bool [B, T, S]."""
    at = jnp.minimum(lengths, room)[:, None] - tokens + jnp.arange(tokens, dtype=jnp.int32)
    behind = at[:, :, None] - jnp.arange(room, dtype=jnp.int32)
    return (behind >= 0) & (behind < windows[:, None, None])


@register_lowering(
    "attention", name="reference", priority=-1, about="the oracle: dequantize keys and values, then float products"
)
def attention_reference(
    problem: Problem, q: Array, k: QArray, v: QArray, lengths: Array, windows: Array, layer: Array
) -> Array:
    """Return attention as the module's equations say it."""
    spec, dtype = problem.settings, wide(q.dtype)
    keys, values = (numbers_of(of_layer(a, layer), dtype) for a in (k, v))
    seen = positions_seen(lengths, windows, q.shape[2], keys.shape[2])  # [B, T, S]
    anywhere = jnp.any(seen, axis=1)[:, None, :, None]
    keys, values = (jnp.where(anywhere, a, 0) for a in (keys, values))
    how: dict[str, Any] = {"precision": lax.Precision.HIGHEST, "preferred_element_type": dtype}
    s = jnp.einsum("bhtgd,bhsd->bhtgs", q.astype(dtype) * spec.scale, keys, **how)
    seen = seen[:, None, :, None, :]
    most = jnp.max(jnp.where(seen, s, -jnp.inf), axis=-1, keepdims=True)
    any_seen = jnp.any(seen, axis=-1, keepdims=True)
    e = jnp.where(seen, jnp.exp(s - jnp.where(any_seen, lax.stop_gradient(most), 0)), 0)
    total = jnp.where(any_seen, jnp.sum(e, axis=-1, keepdims=True), 1)
    return jnp.einsum("bhtgs,bhsd->bhtgd", e / total, values, **how).astype(problem.out_dtype)

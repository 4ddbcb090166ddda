"""Scales of 4-bit keys and values (QoQ, arXiv:2405.04532): what a quantized cache stores per token and head.

The format of the QServe kernels: one scale s and one zero point z per vector of a head, both float16, and z a real
number that is not rounded:

    s = (max - min) / 15        z = -min / s        q = clip(round(x / s + z), 0, 15)        x~ = q s - s z

4 + 32 / D bits per element for heads of D channels: 4.25 at 128. The cache itself comes with quantized attention.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from qjax.formats.numerics import AnyArray

TOP = 15
LEAST_SCALE = 2.0**-14  # the smallest normal float16


def kv4_scales(x: AnyArray) -> tuple[Array, Array]:
    """Return the scale and zero point of each vector.

    A vector whose elements are equal (or differ by less than float16 can say, 15 * 2**-14) has scale 1 and zero -min:
    its codes are 0 and it decodes to min in float16.

    Args:
        x: float [.., D]: keys after rotary positions, or values, finite and within float16.

    Returns:
        float16 [.., 1] each.
    """
    x = jnp.asarray(x, jnp.float32)
    low, high = jnp.min(x, axis=-1, keepdims=True), jnp.max(x, axis=-1, keepdims=True)
    scale = (high - low) / TOP
    flat = scale < LEAST_SCALE
    zero = -low / jnp.where(flat, 1.0, scale)
    return jnp.where(flat, 1.0, scale).astype(jnp.float16), zero.astype(jnp.float16)


def kv4_encode(x: AnyArray, scale: AnyArray, zero: AnyArray) -> Array:
    """Return uint8 codes 0..15, [.., D]; what would be 16 is clipped (a kernel that masks it would make it 0)."""
    scale, zero = jnp.asarray(scale, jnp.float32), jnp.asarray(zero, jnp.float32)
    return jnp.clip(jnp.round(jnp.asarray(x, jnp.float32) / scale + zero), 0, TOP).astype(jnp.uint8)


def kv4_decode(codes: AnyArray, scale: AnyArray, zero: AnyArray) -> Array:
    """Return float32 [.., D]: code * scale - scale * zero."""
    scale, zero = jnp.asarray(scale, jnp.float32), jnp.asarray(zero, jnp.float32)
    return jnp.asarray(codes, jnp.float32) * scale - scale * zero

"""Scales of 4-bit keys and values (QoQ, arXiv:2405.04532): what a quantized cache stores per token and head.

The format of the QServe kernels: one scale s and one zero point z per vector of a head, both float16, and z a real
number that is not rounded:

    s = (max - min) / 15        z = -min / s        q = clip(round(x / s + z), 0, 15)        x~ = q s - s z

4 + 32 / D bits per element for heads of D channels: 4.25 at 128. `KV4` is the format of caches that
`qjax.ops.q_attention` reads.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax.formats.base import Aux, Format
from qjax.formats.numerics import AnyArray, finite_part
from qjax.formats.registry import register_format

TOP = 15
LEAST_SCALE = 2.0**-14  # the smallest normal float16
LARGEST = 65504.0  # of float16


def kv4_scales(x: AnyArray) -> tuple[Array, Array]:
    """Return the scale and zero point of each vector.

    A vector whose elements are equal, or so close that float16 cannot say it (they differ by less than 15 * 2**-14, or
    by less than 15 / 65504 of min, where z would be infinite), has scale 1 and zero -min: its codes are 0 and it
    decodes to min in float16.

    Args:
        x: float [.., D]: keys after rotary positions, or values, finite and within float16.

    Returns:
        float16 [.., 1] each.
    """
    x = jnp.asarray(x, jnp.float32)
    low, high = jnp.min(x, axis=-1, keepdims=True), jnp.max(x, axis=-1, keepdims=True)
    scale = (high - low) / TOP
    flat = (scale < LEAST_SCALE) | (jnp.abs(low) > LARGEST * scale)
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


@register_format("kv4")
@dataclasses.dataclass(frozen=True)
class KV4(Format):
    """Keys and values of 4 bits as QoQ stores them: a float16 scale and a float16 zero point for each vector of a head.

    What is beyond float16 counts as its end, and NaN as 0.
    """

    code_bits = 4
    code_dtype = np.dtype(np.uint8)  # pyright: ignore[reportIncompatibleMethodOverride,reportAssignmentType]
    per = "token"
    group = None
    symmetric = False
    elementwise = True
    weights_only = True

    def fit(self, x: AnyArray, weight: AnyArray | None = None) -> Aux:
        """Return {"scale", "zero"}, float16 [*stack, N, 1]."""
        scale, zero = kv4_scales(jnp.clip(finite_part(jnp.asarray(x, jnp.float32)), -LARGEST, LARGEST))
        return {"scale": scale, "zero": zero}

    def encode(self, x: AnyArray, aux: Aux) -> Array:
        """Return uint8 codes."""
        x = jnp.asarray(x, jnp.float32)
        return kv4_encode(jnp.where(jnp.isnan(x), 0.0, x), aux["scale"], aux["zero"])

    def decode(self, codes: AnyArray, aux: Aux) -> Array:
        """Return code * scale - scale * zero in float32."""
        return kv4_decode(codes, aux["scale"], aux["zero"])

"""NVFP4: blocks of 16 E2M1 elements with an E4M3 scale, under one float32 scale per matrix.

As NVIDIA describes it ("Introducing NVFP4 for Efficient and Accurate Low-Precision Inference", 2025): the finer
block and the fractional block scale cost 4.5 bits per element and follow the data more closely than a power of two
does; the float32 scale brings the block scales into the range of E4M3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array

from qjax.formats import e2m1
from qjax.formats.base import Aux, Format
from qjax.formats.float8 import to_float8
from qjax.formats.numerics import AnyArray, scale_for
from qjax.formats.registry import register_format

BLOCK = 16
SCALE_DTYPE = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST_SCALE = 448.0
SMALLEST_SCALE = 2.0**-9  # the smallest positive E4M3 number
SMALLEST_GLOBAL = 2.0**-117  # times the smallest block scale it is still a normal float32


@register_format("nvfp4")
@dataclasses.dataclass(frozen=True)
class NVFP4(Format):
    """``value = element * (block_scale * global_scale)``.

    global_scale = absmax of the matrix / (448 * 6), float32, one per matrix of a stack; block_scale = absmax of the
    block / (6 * global_scale), rounded to E4M3 and at least its smallest positive number, 2**-9: rounding it to 0
    would lose blocks whose largest elements can still be represented.
    """

    code_bits = 4
    per = "group"
    shares_constant = True
    group: ClassVar[int] = BLOCK

    @property
    def name(self) -> str:
        """``nvfp4``."""
        return "nvfp4"

    @property
    def code_dtype(self) -> np.dtype:
        """uint8 codes 0 .. 15 as in MXFP4."""
        return np.dtype(np.uint8)

    def shared_aux(self, low: AnyArray, high: AnyArray) -> Aux:
        """Return {"global_scale": float32 [*stack, 1, 1]}."""
        top = jnp.max(jnp.maximum(high, -low), axis=(-2, -1), keepdims=True, initial=0.0)
        bound = LARGEST_SCALE * e2m1.LARGEST
        scale = scale_for(top, bound, bound)
        return {"global_scale": jnp.maximum(scale, SMALLEST_GLOBAL)}

    def from_range(self, low: AnyArray, high: AnyArray, shared: Mapping[str, AnyArray] | None = None) -> Aux:
        """Return {"scale": float8_e4m3fn, blocked; "global_scale": float32 [*stack, 1, 1]}."""
        shared = dict(shared or self.shared_aux(low, high))
        inverse = 1.0 / (shared["global_scale"] * e2m1.LARGEST)
        scale = jnp.clip(jnp.maximum(high, -low) * inverse, SMALLEST_SCALE, LARGEST_SCALE)
        return {"scale": to_float8(scale, SCALE_DTYPE), **shared}

    def scale_of(self, aux: Aux) -> Array:
        """Return block_scale * global_scale, float32."""
        return jnp.asarray(aux["scale"], jnp.float32) * aux["global_scale"]

    def encode(self, x: AnyArray, aux: Aux) -> Array:
        """Return E2M1 codes."""
        return e2m1.to_e2m1(jnp.asarray(x, jnp.float32) * self.spread(1.0 / self.scale_of(aux), x.shape[-1]))

    def decode(self, codes: AnyArray, aux: Aux) -> Array:
        """Return element * block_scale * global_scale in float32."""
        return e2m1.from_e2m1(codes) * self.spread(self.scale_of(aux), codes.shape[-1])

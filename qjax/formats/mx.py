"""MXFP8 and MXFP4: blocks of 32 elements with a shared power of two (OCP Microscaling Formats (MX) v1.0).

Section 6.3 of the specification: the shared exponent of a block is floor(log2(absmax)) - emax, where emax is the
largest exponent of the element type; the scale is 2 to that power, stored as E8M0 (the exponent plus 127 in one
byte); each element divided by the scale is rounded to the element type, to nearest even, and saturates.

Because the scale is a power of two rounded down, elements between the largest number of the element type and the
next power of two saturate: 7 in a block with absmax 7 becomes 6 in MXFP4. That is the specification's choice.
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
from qjax.formats.float8 import ELEMENTS, element_dtype, to_float8
from qjax.formats.numerics import AnyArray, floor_log2, times_power_of_two
from qjax.formats.registry import register_format

BLOCK = 32
E8M0_BIAS = 127


class _Microscaling(Format):
    """What the MX formats share: the block and its E8M0 scale, kept as uint8 (exponent + 127, never 255: NaN)."""

    per = "group"
    group: ClassVar[int] = BLOCK

    @property
    def largest_exponent(self) -> int:
        """The exponent of the largest element: emax in the specification."""
        raise NotImplementedError(f"{type(self).__name__} has to define largest_exponent")

    def from_range(self, low: AnyArray, high: AnyArray, shared: Mapping[str, AnyArray] | None = None) -> Aux:
        """Return {"scale": uint8 exponent + 127}, one per block; a zero block has the smallest scale, 2**-127."""
        exponent = floor_log2(jnp.maximum(high, -low)) - self.largest_exponent
        return {"scale": (jnp.clip(exponent, -E8M0_BIAS, E8M0_BIAS) + E8M0_BIAS).astype(jnp.uint8)}

    def exponent_of(self, aux: Aux) -> Array:
        """Return the int32 exponents of the scales."""
        return jnp.asarray(aux["scale"], jnp.int32) - E8M0_BIAS

    def scale_of(self, aux: Aux) -> Array:
        """Return the float32 scales; 2**-127 reads as the subnormal that it is, which XLA on CPU takes for 0."""
        return times_power_of_two(jnp.ones(aux["scale"].shape, jnp.float32), self.exponent_of(aux))

    def _scaled(self, x: AnyArray, aux: Aux, sign: int) -> Array:
        """Return x * scale**sign, exact short of overflow and underflow."""
        return times_power_of_two(jnp.asarray(x, jnp.float32), self.spread(sign * self.exponent_of(aux), x.shape[-1]))


@register_format("mxfp4")
@dataclasses.dataclass(frozen=True)
class MXFP4(_Microscaling):
    """E2M1 elements in blocks of 32 with an E8M0 scale: 4.25 bits per element."""

    code_bits = 4

    @property
    def largest_exponent(self) -> int:
        """2: the exponent of 4 and 6."""
        return e2m1.LARGEST_EXPONENT

    @property
    def name(self) -> str:
        """``mxfp4``."""
        return "mxfp4"

    @property
    def code_dtype(self) -> np.dtype:
        """uint8 codes 0 .. 15: sign, two exponent bits, mantissa bit."""
        return np.dtype(np.uint8)

    def encode(self, x: AnyArray, aux: Aux) -> Array:
        """Return E2M1 codes."""
        return e2m1.to_e2m1(self._scaled(x, aux, -1))

    def decode(self, codes: AnyArray, aux: Aux) -> Array:
        """Return element * 2**exponent in float32."""
        return self._scaled(e2m1.from_e2m1(codes), aux, 1)


@register_format("mxfp8")
@dataclasses.dataclass(frozen=True)
class MXFP8(_Microscaling):
    """8-bit float elements in blocks of 32 with an E8M0 scale: 8.25 bits per element.

    Args:
        element: "e4m3fn" (largest exponent 8) or "e5m2" (15).
    """

    element: str = "e4m3fn"

    code_bits = 8

    def __post_init__(self) -> None:
        element_dtype("MXFP8", self.element)

    @property
    def name(self) -> str:
        """For example ``mxfp8_e4m3fn``."""
        return f"mxfp8_{self.element}"

    @property
    def code_dtype(self) -> np.dtype:
        """float8_e4m3fn or float8_e5m2."""
        return ELEMENTS[self.element]

    @property
    def largest_exponent(self) -> int:
        """8 for e4m3fn, 15 for e5m2."""
        return int(np.frexp(float(ml_dtypes.finfo(self.code_dtype).max))[1]) - 1

    def encode(self, x: AnyArray, aux: Aux) -> Array:
        """Return 8-bit float codes."""
        return to_float8(self._scaled(x, aux, -1), self.code_dtype)

    def decode(self, codes: AnyArray, aux: Aux) -> Array:
        """Return element * 2**exponent in float32."""
        return self._scaled(jnp.asarray(codes, jnp.float32), aux, 1)

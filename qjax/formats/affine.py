"""Integers of 2 to 8 bits with a scale and a real offset: the grid that LSQ+ learns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qjax.errors import FormatError
from qjax.formats.base import Aux, Format, ImplicitPer
from qjax.formats.numerics import AnyArray, round_even, saturate, scale_for
from qjax.formats.registry import register_format


@register_format("affine")
@dataclasses.dataclass(frozen=True)
class Affine(Format):
    """Uniform integers with a real offset: ``value = code * scale + offset``.

    ``Int(symmetric=False)`` has an integer zero point, so that 0 is exact and products can be formed on codes. Here the
    grid may lie anywhere: both ends of a range are met, and 0 is in general not exact. Dots whose other operand is
    `Int` or `Affine` too are formed on codes and corrected (`qjax.kernels.dot.affine`), others and convolutions in
    float: the padding of a convolution is 0, which is no code.
    Fitted to a range, scale = (max - min) / (2**b - 1) and the smallest code is min; the range is widened to
    include 0, as that of every format. Steps and offsets that were learned (`qjax.elastic`) are kept as they are.

    Source: LSQ+, Bhalgat et al. 2020 (arXiv:2004.09576), equations 1 to 3.

    Args:
        bits: 2 to 8.
        per: "tensor", "channel" (one scale and offset per output row) or "token" (the same, said of activations).
        group: length of a group along the contracted axis; excludes ``per``. The last group may be shorter.
        signed: codes -2**(b-1) .. 2**(b-1)-1 in int8, else 0 .. 2**b-1 in uint8. The numbers are the same.

    Raises:
        FormatError: for settings that contradict each other.
    """

    bits: int
    _: dataclasses.KW_ONLY
    per: str = ImplicitPer("channel")
    group: int | None = None
    signed: bool = True  # pyright: ignore[reportIncompatibleVariableOverride,reportIncompatibleMethodOverride]

    elementwise = True
    symmetric = False

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise FormatError(f"Affine: bits={self.bits!r}; 2 to 8 bits are possible")
        if not isinstance(self.signed, bool):
            raise FormatError(f"Affine: signed={self.signed!r}; True or False")
        self._check_granularity()

    @property
    def name(self) -> str:
        """For example ``affine4 per channel``."""
        return f"affine{self.bits}{self._suffix()}{'' if self.signed else ' unsigned'}"

    @property
    def code_bits(self) -> int:
        """Stored bits of one code."""
        return self.bits

    @property
    def code_dtype(self) -> np.dtype:
        """int8, or uint8 if unsigned."""
        return np.dtype(np.int8 if self.signed else np.uint8)

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code."""
        low = -(2 ** (self.bits - 1)) if self.signed else 0
        return low, low + 2**self.bits - 1

    def from_range(self, low: AnyArray, high: AnyArray, shared: Mapping[str, AnyArray] | None = None) -> Aux:
        """Return {"scale", "offset"}, float32, blocked."""
        top = 2**self.bits - 1
        # Halves first: max - min of a block that spans most of float32 would overflow, and halving is exact.
        scale = scale_for(high * 0.5 - low * 0.5, top / 2, top)
        low, high = jnp.asarray(low, jnp.float32), jnp.asarray(high, jnp.float32)
        # Nothing but zeros is code 0 without an offset: the product of such a row is then 0, and not a difference.
        return {"scale": scale, "offset": low - jnp.where(low == high, 0, self.code_range[0] * scale)}

    def encode(self, x: AnyArray, aux: Aux) -> Array:
        """Return int8 codes, or uint8 if unsigned."""
        x = jnp.asarray(x, jnp.float32)
        x = lax.select(lax.eq(x, x), x, lax.full_like(x, 0))
        length, (low, high) = x.shape[-1], self.code_range
        steps = (x - self.spread(aux["offset"], length)) * self.spread(1.0 / aux["scale"], length)
        return saturate(round_even(steps), low, high).astype(self.code_dtype)

    def decode(self, codes: AnyArray, aux: Aux) -> Array:
        """Return code * scale + offset in float32."""
        length = codes.shape[-1]
        return jnp.asarray(codes, jnp.float32) * self.spread(aux["scale"], length) + self.spread(aux["offset"], length)

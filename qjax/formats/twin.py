"""Twin uniform quantization: two even grids in one code (PTQ4ViT, Yuan et al., ECCV 2022, arXiv:2111.12293).

One bit of a code chooses between a fine and a coarse grid, the others count steps in it. The coarse step is the fine
one times a power of two, so that integer products of both can be brought together by a shift.

Numbers that are not negative (probabilities) take the fine grid near 0 and the coarse one above its end; what a GELU
gives takes the fine grid for its small negative part and the coarse one for the positive part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax.errors import FormatError
from qjax.formats.base import Aux, Format, ImplicitPer
from qjax.formats.numerics import AnyArray, round_even, scale_for
from qjax.formats.registry import register_format


@register_format("twin_uniform")
@dataclasses.dataclass(frozen=True)
class TwinUniform(Format):
    """Two grids of h = 2**(bits - 1) codes each, scale the step of the coarse one.

        code < h    code * scale / 2**ratio        (negative: -code * scale / 2**ratio)
        code >= h   (code - h) * scale

    A number goes to the fine grid where that reaches it (negative: if it is below 0), and there and in the coarse grid
    to the nearest code.

    Args:
        bits: 2 to 8.
        ratio: log2 of the ratio of the two steps, 0 to 15.
        negative: whether the fine grid is for negative numbers; else there are none.
        per: "tensor", "channel" or "token". group: length of a group; excludes ``per``.

    Raises:
        FormatError: for settings that cannot be.
    """

    bits: int
    ratio: int = 0
    _: dataclasses.KW_ONLY
    negative: bool = False
    per: str = ImplicitPer("tensor")
    group: int | None = None

    elementwise = True
    symmetric = False

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise FormatError(f"TwinUniform: bits={self.bits!r}; 2 to 8 bits are possible")
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, int) or not 0 <= self.ratio <= 15:
            raise FormatError(f"TwinUniform: ratio={self.ratio!r}; a whole number from 0 to 15")
        if not isinstance(self.negative, bool):
            raise FormatError(f"TwinUniform: negative={self.negative!r}; True or False")
        self._check_granularity()

    @property
    def name(self) -> str:
        """For example ``twin4 ratio 5 per tensor``."""
        return f"twin{self.bits} ratio {self.ratio}{' negative' if self.negative else ''}{self._suffix()}"

    @property
    def code_bits(self) -> int:
        """Stored bits of one code."""
        return self.bits

    @property
    def code_dtype(self) -> np.dtype:
        """uint8."""
        return np.dtype(np.uint8)

    @property
    def half(self) -> int:
        """Codes of one grid."""
        return 2 ** (self.bits - 1)

    def from_range(self, low: AnyArray, high: AnyArray, shared: Mapping[str, AnyArray] | None = None) -> Aux:
        """Return {"scale": float32}, blocked: the largest number is the last code."""
        return {"scale": scale_for(jnp.asarray(high), self.half - 1, self.half)}

    def encode(self, x: AnyArray, aux: Aux) -> Array:
        """Return uint8 codes. NaN counts as 0."""
        x = jnp.asarray(x, jnp.float32)
        steps = jnp.where(jnp.isnan(x), 0, x) * self.spread(1.0 / aux["scale"], x.shape[-1])
        fine = round_even((-steps if self.negative else steps) * np.float32(2**self.ratio))
        coarse = self.half + jnp.clip(round_even(steps), 0, self.half - 1)
        use_fine = steps < 0 if self.negative else fine < self.half
        return jnp.where(use_fine, jnp.clip(fine, 0, self.half - 1), coarse).astype(jnp.uint8)

    def decode(self, codes: AnyArray, aux: Aux) -> Array:
        """Return float32 numbers."""
        numbers = jnp.asarray(codes, jnp.float32)
        fine = numbers * np.float32((-1 if self.negative else 1) * 2.0**-self.ratio)
        value = jnp.where(numbers < self.half, fine, numbers - self.half)
        return value * self.spread(aux["scale"], codes.shape[-1])

"""Progressive: the weight format of QoQ with groups (Lin et al. 2024, "QServe", arXiv:2405.04532, section 4.1).

A row is first scaled into int8 numbers (kept real here: rounding happens once), then each group into b-bit codes with
an integer scale s1:

    w8 = clip(w / s0, -P, P)        q = clip(round(w8 / s1) + z, 0, 2**b - 1)
    w8~ = (q - z) * s1              w~ = w8~ * s0

Rounding adds at most s1 / 2, and s1 is at most about 2 P / (2**b - 1). So with the *protective range*
P = floor(127 (2**b - 1) / 2**b), 119 for 4 bits, no code that is chosen leaves int8, and a kernel can compute on
packed bytes without saturating.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array, lax

from qjax.errors import FormatError, near
from qjax.formats.base import Aux
from qjax.formats.numerics import AnyArray, round_even
from qjax.formats.registry import register_format
from qjax.formats.two_level import TwoLevel

ZEROS = ("pre", "post")


def protective_range(bits: int) -> int:
    """Return the P of b-bit codes: 95, 111, 119, 123, 125, 126 for 2 to 7 bits.

    The released table has 96 for 2 bits, where the bound of the text gives 95.25.
    """
    return 127 * (2**bits - 1) // 2**bits


@register_format("progressive")
@dataclasses.dataclass(frozen=True)
class Progressive(TwoLevel):
    """Few-bit codes with a zero point and an integer scale per group within int8 numbers, and a float scale per row.

    ``value = (code - zero) * step * scale``: scale = absmax of the row / P of ``scale_dtype``, step = (max - min of
    the group, 0 included) / (2**b - 1) in units of the scale, rounded, at least 1 (int8; 1..16 for 4 bits), zero =
    -min / step rounded, within the codes (a byte). 4 bits in groups of g and rows of K take 4 + 16/g + 16/K bits per
    element (4.129 for g = 128 and K = 4096).

    zeros="post" is the later release's: ``value = (code * step - zero) * scale`` with zero = -min rounded to an
    integer of up to 7 bits. For 4 bits it allows P = 120; the range of 119 is kept, which is within it.

    The step is rounded to nearest, so 15 steps may fall short of the range of a group by up to 7.5: that is the
    paper's choice, which clips quiet groups of loud rows.

    For one scale and zero point per row (QoQ's other format) there is ``Int(4, symmetric=False)``.

    Args:
        group: length of a group; the last one may be shorter.
        bits: 2 to 7.
        zeros: "pre" (the paper's) or "post".
        scale_dtype: "bfloat16" (any range, the default), "float16" (as released; rows whose absmax is below 0.0073 or
            above 7.8e6 would not fit it) or "float32".

    Raises:
        FormatError: a setting that cannot be.
    """

    group: int = 128
    bits: int = 4
    zeros: str = "pre"
    scale_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        self._check_settings()
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 7:
            raise FormatError(f"Progressive: bits={self.bits!r}; 2 to 7 bits are possible (for 8 there is Int(8))")
        if self.zeros not in ZEROS:
            raise FormatError(f"Progressive: zeros={self.zeros!r}{near(str(self.zeros), ZEROS)}; 'pre' or 'post'")

    @property
    def code_bits(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Stored bits of one code."""
        return self.bits

    @property
    def reach(self) -> int:
        """The protective range."""
        return protective_range(self.bits)

    @property
    def name(self) -> str:
        """For example ``progressive4 g128``."""
        more = (" post" if self.zeros == "post" else "") + (
            "" if self.scale_dtype == "bfloat16" else f" {self.scale_dtype}"
        )
        return f"progressive{self.bits} g{self.group}{more}"

    def from_range(self, low: AnyArray, high: AnyArray, shared: Mapping[str, AnyArray] | None = None) -> Aux:
        """Return {"scale", "step", "zero"}; a group of zeros has step 1 and zero 0."""
        aux = dict(shared or self.shared_aux(low, high))
        inverse = 1.0 / jnp.asarray(aux["scale"], jnp.float32)
        low, high = (jnp.clip(a * inverse, -self.reach, self.reach) for a in (low, high))
        step = jnp.maximum(jnp.round((high - low) * (1 / self.top)), 1.0)
        zero = jnp.clip(jnp.round(-low / step), 0, self.top) if self.zeros == "pre" else jnp.round(-low)
        return {**aux, "step": step.astype(jnp.int8), "zero": zero.astype(jnp.uint8)}

    def encode(self, x: AnyArray, aux: Aux) -> Array:
        """Return uint8 codes. Numbers beyond the protective range count as its ends."""
        length = x.shape[-1]
        w8 = jnp.asarray(x, jnp.float32) * self.spread(1.0 / jnp.asarray(aux["scale"], jnp.float32), length)
        w8 = jnp.clip(w8, -self.reach, self.reach)
        zero = self.spread(aux["zero"], length).astype(jnp.float32)
        inverse = self.spread(1.0 / jnp.asarray(aux["step"], jnp.float32), length)
        if self.zeros == "pre":
            steps = jnp.where(jnp.isnan(w8), 0.0, round_even(w8 * inverse)) + zero
        else:
            steps = round_even((jnp.where(jnp.isnan(w8), 0.0, w8) + zero) * inverse)
        return jnp.clip(steps, 0, self.top).astype(jnp.uint8)

    def decode(self, codes: AnyArray, aux: Aux) -> Array:
        """Return the numbers in float32; all but the last factor, the scale, is exact."""
        length = codes.shape[-1]
        zero, step = (self.spread(aux[name], length).astype(jnp.float32) for name in ("zero", "step"))
        codes = jnp.asarray(codes, jnp.float32)
        w8 = (codes - zero) * step if self.zeros == "pre" else codes * step - zero
        return w8 * self.spread(jnp.asarray(aux["scale"], jnp.float32), length)

    def as_int8(self, codes: AnyArray, aux: Aux) -> tuple[Array, Array]:
        """Return the int8 numbers, computed in bytes that wrap, and the scales of rows."""
        length = codes.shape[-1]
        zero, step = (self.spread(aux[name], length).astype(jnp.uint8) for name in ("zero", "step"))
        codes = jnp.asarray(codes).astype(jnp.uint8)
        w8 = (codes - zero) * step if self.zeros == "pre" else codes * step - zero
        return lax.bitcast_convert_type(w8, jnp.int8), jnp.asarray(aux["scale"], jnp.float32)

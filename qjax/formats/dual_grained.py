"""DualGrained: the weight format of DGQ (Zhang et al. 2023, "Dual Grained Quantization", arXiv:2310.04836).

With groups i of a row n, integer scales S2 and a float scale s1:

    w8[n, k] = (q[n, k] - zero[n, i]) * S2[n, i]        int8, within +-127
    w[n, k]  = s1[n] * w8[n, k]

Codes that would leave int8 are not used: with m = floor(127 / S2) they lie in max(zero - m, 0) .. min(zero + m, 15).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array

from qjax.formats.base import Aux
from qjax.formats.numerics import SMALLEST_SCALE, AnyArray, round_even
from qjax.formats.registry import register_format
from qjax.formats.two_level import TwoLevel

INT8_MOST = 127
"""The largest magnitude of an int8 number that is used."""


@register_format("dual_grained")
@dataclasses.dataclass(frozen=True)
class DualGrained(TwoLevel):
    """4-bit codes with a zero point and an integer scale per group, and a float scale per row.

    ``value = (code - zero) * step * scale``: code 0..15, zero 0..15 (a byte each), step 1..127 (int8), scale of
    ``scale_dtype``. A group of g elements and rows of K take 4 + 16/g + 16/K bits per element (4.129 for g = 128 and
    K = 4096; packing zeros to half bytes would give 4.098).

    Fitted without data, both levels are rounded to nearest: scale = absmax of the row / 127, step = (max - min of the
    group) / 15 / scale rounded, at least 1; the range of a group is widened to include 0. `qjax.DGQ` searches them.

    Args:
        group: length of a group; the last one may be shorter.
        scale_dtype: "bfloat16" (as released), "float16" or "float32".

    Raises:
        FormatError: a setting that cannot be.
    """

    group: int = 128
    scale_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        self._check_settings()

    @property
    def reach(self) -> int:
        """127."""
        return INT8_MOST

    @property
    def name(self) -> str:
        """For example ``dual_grained g128``."""
        return f"dual_grained g{self.group}" + ("" if self.scale_dtype == "bfloat16" else f" {self.scale_dtype}")

    def from_range(self, low: AnyArray, high: AnyArray, shared: Mapping[str, AnyArray] | None = None) -> Aux:
        """Return {"scale", "step", "zero"}; a group of zeros has step 1 and zero 0."""
        half = high * 0.5 - low * 0.5
        zero = jnp.round(-low * 0.5 / jnp.where(half < SMALLEST_SCALE, 1.0, half) * self.top)
        aux = dict(shared or self.shared_aux(low, high))
        fine = half * (2 / self.top)
        return self.with_steps(fine, jnp.clip(zero, 0, self.top).astype(jnp.uint8), aux["scale"])

    def with_steps(self, fine: AnyArray, zero: AnyArray, scale: AnyArray) -> Aux:
        """Return aux for float steps of groups [*stack, N, groups], given zeros and the stored scales [*stack, N, 1].

        The steps become the integers nearest to fine / scale, at least 1.
        """
        ratio = jnp.asarray(fine, jnp.float32) * (1.0 / jnp.asarray(scale, jnp.float32))
        step = jnp.clip(jnp.round(ratio), 1, INT8_MOST).astype(jnp.int8)
        return {"scale": jnp.asarray(scale), "step": step, "zero": jnp.asarray(zero)}

    def code_limits(self, aux: Aux, most: int = INT8_MOST) -> tuple[Array, Array]:
        """Return the smallest and the largest code of each group, int32, that stand for numbers within +-most."""
        zero, reach = jnp.asarray(aux["zero"], jnp.int32), most // jnp.asarray(aux["step"], jnp.int32)
        return jnp.maximum(zero - reach, 0), jnp.minimum(zero + reach, self.top)

    def encode(self, x: AnyArray, aux: Aux) -> Array:
        """Return uint8 codes; those that would leave int8 are replaced by the last that does not."""
        length = x.shape[-1]
        low, high = (self.spread(a, length).astype(jnp.float32) for a in self.code_limits(aux))
        zero = self.spread(aux["zero"], length).astype(jnp.float32)
        # Rounded before the zero point is added, as in Int: a fused multiply-add would let ties fall differently.
        steps = round_even(jnp.asarray(x, jnp.float32) * self.spread(1.0 / self.scale_of(aux), length))
        return jnp.where(jnp.isnan(steps), zero, jnp.clip(steps + zero, low, high)).astype(jnp.uint8)

    def decode(self, codes: AnyArray, aux: Aux) -> Array:
        """Return (code - zero) * step * scale in float32; the first two factors are exact."""
        length = codes.shape[-1]
        zero, step = (self.spread(aux[name], length).astype(jnp.float32) for name in ("zero", "step"))
        scale = self.spread(jnp.asarray(aux["scale"], jnp.float32), length)
        return (jnp.asarray(codes, jnp.float32) - zero) * step * scale

    def as_int8(self, codes: AnyArray, aux: Aux) -> tuple[Array, Array]:
        """Return (code - zero) * step as int8, and the scales of rows."""
        length = codes.shape[-1]
        zero, step = (self.spread(aux[name], length).astype(jnp.int8) for name in ("zero", "step"))
        return (jnp.asarray(codes).astype(jnp.int8) - zero) * step, jnp.asarray(aux["scale"], jnp.float32)

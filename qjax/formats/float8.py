"""8-bit floats with a float32 scale."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array

from qjax.errors import FormatError, near
from qjax.formats.base import Aux, Format, ImplicitPer
from qjax.formats.numerics import AnyArray, saturate, scale_for
from qjax.formats.registry import register_format

ELEMENTS = {"e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn), "e5m2": np.dtype(ml_dtypes.float8_e5m2)}
"""The two element types of OCP 8-bit Floating Point (OFP8) v1.0."""


def element_dtype(owner: str, element: str) -> np.dtype:
    """Return the dtype of a named element, or raise `FormatError` on behalf of ``owner``."""
    if element not in ELEMENTS:
        raise FormatError(f"{owner}: element={element!r}{near(str(element), ELEMENTS)}; 'e4m3fn' or 'e5m2'")
    return ELEMENTS[element]


def largest(dtype: np.dtype) -> float:
    """Return the largest finite number of an 8-bit float: 448 for e4m3fn, 57344 for e5m2."""
    return float(ml_dtypes.finfo(dtype).max)


def to_float8(x: AnyArray, dtype: np.dtype) -> Array:
    """Round float32 to an 8-bit float, to nearest even and saturating (also from infinity); NaN becomes 0."""
    top = largest(dtype)
    return saturate(x, -top, top).astype(dtype)


@register_format("float8")
@dataclasses.dataclass(frozen=True)
class Float8(Format):
    """8-bit floats (OCP OFP8 v1.0): ``value = code * scale``, scale = absmax / 448 (e4m3fn) or / 57344 (e5m2).

    Codes are stored in their own dtype. Conversion saturates: no infinity and no NaN is ever stored, although both
    types could hold NaN.

    Args:
        element: "e4m3fn" or "e5m2".
        per: "tensor", "channel" or "token".
        group: length of a group along the contracted axis; excludes ``per``.
    """

    element: str = "e4m3fn"
    _: dataclasses.KW_ONLY
    per: str = ImplicitPer("channel")
    group: int | None = None

    affine = True
    elementwise = True
    code_bits = 8

    def __post_init__(self) -> None:
        element_dtype("Float8", self.element)
        self._check_granularity()

    @property
    def name(self) -> str:
        """For example ``fp8_e4m3fn per channel``."""
        return f"fp8_{self.element}{self._suffix()}"

    @property
    def code_dtype(self) -> np.dtype:
        """float8_e4m3fn or float8_e5m2."""
        return ELEMENTS[self.element]

    def from_range(self, low: AnyArray, high: AnyArray, shared: Mapping[str, AnyArray] | None = None) -> Aux:
        """Return {"scale": float32}, blocked."""
        top = largest(self.code_dtype)
        return {"scale": scale_for(jnp.maximum(high, -low), top, top)}

    def encode(self, x: AnyArray, aux: Aux) -> Array:
        """Return 8-bit float codes."""
        inverse = self.spread(1.0 / aux["scale"], x.shape[-1])
        return to_float8(jnp.asarray(x, jnp.float32) * inverse, self.code_dtype)

    def decode(self, codes: AnyArray, aux: Aux) -> Array:
        """Return code * scale in float32."""
        return jnp.asarray(codes, jnp.float32) * self.spread(aux["scale"], codes.shape[-1])

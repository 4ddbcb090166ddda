"""Integers of 2 to 8 bits with a scale per tensor, channel, token or group."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax.errors import FormatError, near
from qjax.formats.base import Aux, Format, ImplicitPer
from qjax.formats.numerics import AnyArray, round_even, saturate, scale_for
from qjax.formats.registry import register_format


@register_format("int")
@dataclasses.dataclass(frozen=True)
class Int(Format):
    """Uniform integers: ``value = (code - zero) * scale``.

    Symmetric (zero is 0, codes int8):
        scale="half": scale = absmax / (2**(b-1) - 0.5), codes -2**(b-1) .. 2**(b-1)-1. The outermost codes cover a full
        step, as in Qwix; at few bits this wastes less of the range.
        scale="qmax": scale = absmax / (2**(b-1) - 1), codes within +-(2**(b-1) - 1), so that +-absmax is exact.
    Asymmetric (codes uint8): the range is widened to include 0,
        scale = (max - min) / (2**b - 1), zero = round(-min / scale), codes 0 .. 2**b-1, and 0 is exact.
        zero="float": the zero point may lie between codes, and is stored in float16: the ends of the range are met, and
        0 is not exact. For roundings that look for the best place (`qjax.HQQ`), and for weights only: sums over codes
        cannot be corrected by integers then, and products are formed in float.

    Rounding is to nearest, ties to even. Numbers are multiplied by the float32 reciprocal where a division is
    written here: see `qjax.formats.numerics`. A block that is all zero has scale 1 and decodes to exact zeros.

    Args:
        bits: 2 to 8.
        per: "tensor", "channel" (one scale per output row) or "token" (the same, said of activations).
        group: length of a group along the contracted axis; excludes ``per``. The last group may be shorter.
        symmetric: whether zero is code 0.
        scale: "half" or "qmax"; symmetric only.
        zero: "integer" or "float"; asymmetric only.

    Raises:
        FormatError: for settings that contradict each other.
    """

    bits: int
    _: dataclasses.KW_ONLY
    per: str = ImplicitPer("channel")
    group: int | None = None
    symmetric: bool = True
    scale: str = "half"
    zero: str = "integer"

    elementwise = True

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise FormatError(f"Int: bits={self.bits!r}; 2 to 8 bits are possible")
        self._check_granularity()
        if not isinstance(self.symmetric, bool):
            raise FormatError(f"Int: symmetric={self.symmetric!r}; True or False")
        if self.scale not in ("half", "qmax"):
            raise FormatError(f"Int: scale={self.scale!r}{near(str(self.scale), ('half', 'qmax'))}; 'half' or 'qmax'")
        if self.scale == "qmax" and not self.symmetric:
            raise FormatError("Int: scale='qmax' belongs to symmetric codes; leave it out with symmetric=False")
        if self.zero not in ("integer", "float"):
            wanted = near(str(self.zero), ("integer", "float"))
            raise FormatError(f"Int: zero={self.zero!r}{wanted}; 'integer' or 'float'")
        if self.zero == "float" and self.symmetric:
            raise FormatError("Int: zero='float' belongs to asymmetric codes; say symmetric=False with it")

    @property
    def name(self) -> str:
        """For example ``int4 g128``; asymmetric ``uint8 per channel``."""
        kind = "int" if self.symmetric else "uint"
        more = (" qmax" if self.scale == "qmax" else "") + (" float zero" if self.zero == "float" else "")
        return f"{kind}{self.bits}{self._suffix()}{more}"

    @property
    def affine(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether products can be formed on codes: where the zero point is an integer."""
        return self.zero == "integer"

    @property
    def weights_only(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether activations are refused: their products would be formed in float all the same."""
        return self.zero == "float"

    @property
    def code_bits(self) -> int:
        """Stored bits of one code."""
        return self.bits

    @property
    def code_dtype(self) -> np.dtype:
        """int8, or uint8 if asymmetric."""
        return np.dtype(np.int8 if self.symmetric else np.uint8)

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code."""
        if not self.symmetric:
            return 0, 2**self.bits - 1
        top = 2 ** (self.bits - 1) - 1
        return (-top if self.scale == "qmax" else -top - 1), top

    def from_range(self, low: AnyArray, high: AnyArray, shared: Mapping[str, AnyArray] | None = None) -> Aux:
        """Return {"scale": float32} or {"scale", "zero": uint8 or float16}, blocked."""
        if self.symmetric:
            bound = 2 ** (self.bits - 1) - (0.5 if self.scale == "half" else 1)
            return {"scale": scale_for(jnp.maximum(high, -low), bound, 2 ** (self.bits - 1))}
        top = 2**self.bits - 1
        # Halves first: max - min of a block that spans most of float32 would overflow, and halving is exact.
        scale = scale_for(high * 0.5 - low * 0.5, top / 2, top)
        zero = -low * (1.0 / scale)
        if self.zero == "float":
            return {"scale": scale, "zero": jnp.clip(zero, 0, top).astype(jnp.float16)}
        return {"scale": scale, "zero": jnp.clip(jnp.round(zero), 0, top).astype(jnp.uint8)}

    def encode(self, x: AnyArray, aux: Aux) -> Array:
        """Return int8 codes, or uint8 if asymmetric."""
        length = x.shape[-1]
        low, high = self.code_range
        steps = jnp.asarray(x, jnp.float32) * self.spread(1.0 / aux["scale"], length)
        if self.symmetric:
            return saturate(round_even(steps), low, high).astype(jnp.int8)
        # Rounded before the zero point is added: x * inverse + zero could be contracted into one instruction in one
        # context and not in another, and ties would fall differently.
        zero = self.spread(aux["zero"], length).astype(jnp.float32)
        if self.zero == "float":  # its fraction counts before rounding, the rest after it, as an integer zero does
            whole = round_even(zero)
            steps, zero = steps + (zero - whole), whole
        steps = round_even(steps)
        return jnp.clip(jnp.where(jnp.isnan(steps), zero, steps + zero), low, high).astype(jnp.uint8)

    def decode(self, codes: AnyArray, aux: Aux) -> Array:
        """Return (code - zero) * scale in float32."""
        length = codes.shape[-1]
        numbers = jnp.asarray(codes, jnp.float32)
        if not self.symmetric:
            numbers = numbers - self.spread(aux["zero"], length).astype(jnp.float32)
        return numbers * self.spread(aux["scale"], length)

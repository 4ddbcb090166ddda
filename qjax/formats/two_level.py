"""What formats of two levels share: small codes under integer scales of groups, under one float scale of a row.

A scale in floating point per group keeps four bits accurate, but breaks an integer product along K: the sums of groups
have to be scaled one by one. Where the scale of a group is an integer, a code becomes an int8 number by integer
arithmetic, and the product is an ordinary one of int8 by int8 with a scale per row. `DualGrained` (DGQ) and
`Progressive` (QoQ) differ in how they keep those numbers within int8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array, lax

from qjax.errors import FormatError, near
from qjax.formats.base import Aux, Format
from qjax.formats.numerics import AnyArray, scale_for

SCALE_DTYPES: Mapping[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


class TwoLevel(Format):
    """Base of the formats of two levels.

    Aux is {"scale": [*stack, N, 1] of ``scale_dtype``, "step": int8 [*stack, N, groups], "zero": uint8 likewise}.
    Subclasses are dataclasses with ``group`` and ``scale_dtype``, and say how far the int8 numbers of a fitted row
    reach.
    """

    per = "group"
    symmetric = False
    int8_rows = True
    weights_only = True

    group: int
    scale_dtype: str
    code_bits: ClassVar[int] = 4

    @property
    def reach(self) -> int:
        """The int8 number that the largest magnitude of a row is mapped to."""
        raise NotImplementedError(f"{type(self).__name__} has to define reach")

    @property
    def code_dtype(self) -> np.dtype:
        """uint8."""
        return np.dtype(np.uint8)

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.code_bits - 1

    def shared_aux(self, low: AnyArray, high: AnyArray) -> Aux:
        """Return {"scale"}, the largest magnitude of each row over `reach`."""
        size = jnp.max(jnp.maximum(high, -low), axis=-1, keepdims=True, initial=0.0)
        return {"scale": self.stored_scale(scale_for(size, self.reach, 128))}

    def stored_scale(self, scale: AnyArray) -> Array:
        """Return positive float32 scales in ``scale_dtype``, rounded up, so that what they span stays within reach.

        float16 reaches from 6.1e-5 to 65504; scales beyond are those.
        """
        return round_up(scale, SCALE_DTYPES[self.scale_dtype])

    def scale_of(self, aux: Aux) -> Array:
        """Return the float32 scale of each group: that of its row times its step."""
        return jnp.asarray(aux["scale"], jnp.float32) * jnp.asarray(aux["step"], jnp.float32)

    def _check_settings(self) -> None:
        name = type(self).__name__
        if isinstance(self.group, bool) or not isinstance(self.group, int) or self.group < 1:
            raise FormatError(
                f"{name}: group={self.group!r}; a group is a number of elements, 1 or more (for one scale and zero "
                "point per row there is Int(4, symmetric=False))"
            )
        if self.scale_dtype not in SCALE_DTYPES:
            raise FormatError(
                f"{name}: scale_dtype={self.scale_dtype!r}{near(str(self.scale_dtype), SCALE_DTYPES)}; one of "
                f"{', '.join(SCALE_DTYPES)}"
            )


def round_up(x: AnyArray, dtype: np.dtype) -> Array:
    """Return the least number of a 16-bit float dtype that is not below x; positive normal float32 numbers."""
    if dtype == np.float32:
        return jnp.asarray(x, jnp.float32)
    info = jnp.finfo(dtype)
    x = jnp.clip(jnp.asarray(x, jnp.float32), float(info.tiny), float(info.max))
    near_x = x.astype(dtype)
    above = lax.bitcast_convert_type(lax.bitcast_convert_type(near_x, jnp.uint16) + jnp.uint16(1), dtype)
    return jnp.where(near_x.astype(jnp.float32) < x, above, near_x)

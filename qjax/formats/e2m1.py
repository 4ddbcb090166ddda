"""The 4-bit float E2M1 of MXFP4 and NVFP4 (OCP Microscaling Formats v1.0, section 5.3.3).

One sign bit, two exponent bits, one mantissa bit. The magnitudes of codes 0 .. 7 are 0, 0.5, 1, 1.5, 2, 3, 4, 6;
bit 3 is the sign. There is no infinity and no NaN.

Code and magnitude are piecewise linear functions of one another, convex one way and concave the other, so each is a
maximum or minimum of three lines: no table, no gather.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from qjax.formats.numerics import AnyArray, saturate

LARGEST = 6.0
LARGEST_EXPONENT = 2


def to_e2m1(x: AnyArray) -> Array:
    """Round float32 to the nearest E2M1 number, ties to even mantissa, saturating at 6; NaN becomes 0.

    Returns:
        uint8 codes 0 .. 15 of the shape of x. Zero has code 0; a negative number that rounds to zero has too.
    """
    x = saturate(x, -LARGEST, LARGEST)
    size = jnp.abs(x)
    # Spacing 1/2 below 2, 1 below 4, 2 from there: even multiples of it are the even mantissas.
    step = jnp.where(size < 2.0, 0.5, jnp.where(size < 4.0, 1.0, 2.0))
    inverse = jnp.where(size < 2.0, 2.0, jnp.where(size < 4.0, 1.0, 0.5))
    size = jnp.round(size * inverse) * step
    code = jnp.minimum(jnp.minimum(size * 2.0, size + 2.0), size * 0.5 + 4.0).astype(jnp.uint8)
    return code | jnp.where((x < 0) & (code > 0), jnp.uint8(8), jnp.uint8(0))


def from_e2m1(codes: AnyArray) -> Array:
    """Return the float32 numbers of uint8 codes 0 .. 15."""
    code = (codes & 7).astype(jnp.float32)
    size = jnp.maximum(jnp.maximum(code * 0.5, code - 2.0), code * 2.0 - 8.0)
    return jnp.where(codes & 8 != 0, -size, size)

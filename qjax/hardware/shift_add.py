"""Products with 4-bit weights as shifts and adds, as MixPE's elements form them (arXiv 2411.16158).

A code q of 4 bits b_i is the sum of 2^i b_i, in two's complement with the highest term subtracted, so

    a q = sum of b_i (a << i)                  integers: four gated, shifted copies and three adders
    x q = +- 2^(e-25) sum of b_i (m << i)      halves: m is the 11-bit significand, e the exponent

Both are exact: |a q| fits 12 bits and m q fits 15. This module is the reference for that, not something to be fast.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from qjax.formats.numerics import AnyArray


def times_int(codes: AnyArray, a: AnyArray, *, signed: bool = True) -> Array:
    """Return codes * a as int32, by shifts and adds.

    Args:
        codes: integers of 4 bits: -8..7, or 0..15 where not ``signed``.
        a: int8.
    """
    return _shifted(codes, jnp.asarray(a).astype(jnp.int32), signed)


def times_half(codes: AnyArray, x: AnyArray, *, signed: bool = True) -> Array:
    """Return codes * x as float32, exact, by shifts and adds of the significand.

    Args:
        codes: integers of 4 bits: -8..7, or 0..15 where not ``signed``.
        x: float16, finite; subnormal numbers have no hidden bit and the exponent of the smallest normal ones.
    """
    bits = lax.bitcast_convert_type(jnp.asarray(x, jnp.float16), jnp.uint16).astype(jnp.int32)
    exponent, fraction = (bits >> 10) & 31, bits & 1023
    significand = jnp.where(exponent == 0, fraction, fraction | 1024)
    whole = _shifted(codes, significand, signed)
    whole = jnp.where(bits >> 15 != 0, -whole, whole)
    return jnp.ldexp(whole.astype(jnp.float32), jnp.maximum(exponent, 1) - 25)


def _shifted(codes: AnyArray, a: Array, signed: bool) -> Array:
    q = jnp.asarray(codes).astype(jnp.int32) & 15
    terms = [jnp.where((q >> i) & 1 != 0, a << i, 0) for i in range(4)]
    return terms[0] + terms[1] + terms[2] + (-terms[3] if signed else terms[3])

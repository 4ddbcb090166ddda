"""The arithmetic that every scaled format shares: safe scales, exact powers of two, what NaN and infinity become.

Three facts decide how it is written.

- XLA rewrites ``x / broadcast(s)`` into ``x * broadcast(1 / s)``, and ``x / constant`` likewise, whenever it can see
  the broadcast. A division would then round differently from one context to the next, so the reciprocal is written
  out: the same codes come out eagerly, under jit and under vmap, and they are the codes that Qwix gets on XLA.
- XLA on CPU flushes subnormal numbers to zero, so a block of subnormals counts as a zero block. Scales stay normal,
  in [2**-126, 2**126], which keeps their reciprocals normal too, and so small that no code decodes to infinity; a
  block that reaches the end of float32 saturates a little instead.
- Weights with NaN or infinity are refused by name before they get here. Should one arrive all the same (in an
  activation, say), ranges are taken over the finite elements, NaN is encoded as 0 and infinity as the largest code,
  so one bad element does not spoil its block.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

AnyArray = Array | np.ndarray
"""What formats compute on: arrays, tracers, and NumPy arrays that jnp takes as they are."""

SMALLEST_SCALE = 2.0**-126
LARGEST_SCALE = 2.0**126


def reciprocal(number: float) -> np.float32:
    """Return 1 / number rounded once to float32."""
    return np.float32(1.0) / np.float32(number)


def scale_for(size: AnyArray, bound: float, largest_code: float) -> Array:
    """Return ``size / bound``, kept such that it and its reciprocal are normal and no code decodes to infinity.

    Args:
        size: float32 blocked array, not negative: what the codes have to span.
        bound: the number in code units that ``size`` maps to.
        largest_code: the largest magnitude of a code.

    Returns:
        float32; 1 where ``size`` is zero or subnormal.
    """
    limit = min(LARGEST_SCALE, 0.999 * float(np.finfo(np.float32).max) / largest_code)
    size = jnp.asarray(size)
    scale = _clamp(size * reciprocal(bound), SMALLEST_SCALE, limit)
    return _where(lax.ge(size, lax.full_like(size, SMALLEST_SCALE)), scale, 1.0)


def finite_part(x: AnyArray) -> Array:
    """Return x with NaN and infinity replaced by 0, for taking ranges."""
    x = jnp.asarray(x)
    return _where(lax.is_finite(x), x, 0)


def saturate(x: AnyArray, low: float, high: float) -> Array:
    """Clip to [low, high]; NaN becomes 0."""
    x = jnp.asarray(x)
    return _where(lax.eq(x, x), _clamp(x, low, high), 0)


def round_even(x: AnyArray) -> Array:
    """Round to the nearest integer, ties to even, in the dtype of x."""
    return lax.round(jnp.asarray(x), lax.RoundingMethod.TO_NEAREST_EVEN)


# Written with lax, because each jnp function of this kind is a call of its own in what XLA gets to compile, and a model
# with dynamic activations has a thousand of them.


def _where(condition: Array, x: Array, other: float) -> Array:
    """Return x where the condition holds, a number elsewhere."""
    return lax.select(condition, x, lax.full_like(x, other))


def _clamp(x: Array, low: float, high: float) -> Array:
    """Return x within bounds; NaN stays NaN."""
    return lax.clamp(x.dtype.type(low), x, x.dtype.type(high))


def power_of_two(exponent: AnyArray) -> Array:
    """Return float32 2**exponent, exactly, for integer exponents in [-126, 127]."""
    bits = (exponent.astype(jnp.int32) + 127) << 23
    return lax.bitcast_convert_type(bits, jnp.float32)


def times_power_of_two(x: AnyArray, exponent: AnyArray) -> Array:
    """Return x * 2**exponent for integer exponents in [-252, 254].

    In two steps, because 2**-127 (the smallest E8M0 scale) and its like are not normal float32 numbers.
    """
    exponent = jnp.asarray(exponent, jnp.int32)
    half = exponent >> 1
    return jnp.asarray(x) * power_of_two(half) * power_of_two(exponent - half)


def floor_log2(x: AnyArray) -> Array:
    """Return int32 floor(log2(x)) of positive float32 numbers from the exponent bits; -127 for subnormals and 0."""
    bits = lax.bitcast_convert_type(jnp.asarray(x, jnp.float32), jnp.int32)
    return ((bits >> 23) & 0xFF) - 127

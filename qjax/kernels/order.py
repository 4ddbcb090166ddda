"""Keeping the compiler from unpacking every layer of a model before it computes the first.

A dequantized weight depends on nothing but parameters, so a scheduler is free to make all of them at once, and XLA's
default scheduler on CPU does: an unrolled model of L layers then holds L float copies of its weights (measured: 80 MiB
of temporary memory instead of 1, and 37 ms instead of 14, for 32 layers of width 256). `lax.optimization_barrier` is
dropped before scheduling in the XLA of jax 0.10. What no scheduler can ignore is data: `after(x, codes)` returns the
codes unchanged, computed in a way that needs x. It costs one exclusive-or in the loop that unpacks the codes anyway.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax


def runtime_zero(x: Array) -> Array:
    """Return a uint8 0 that the compiler cannot know before x is there; x must not be empty.

    For floats: whether the first element is below minus infinity. The passes that schedule and fuse take this for a
    computation; the code generator, later, sees that it is false, so that the loop does not compute it. For other
    dtypes: the sign bit of the first element, shifted out.
    """
    first = lax.slice(x, (0,) * x.ndim, (1,) * x.ndim).reshape(())
    if jnp.issubdtype(first.dtype, jnp.complexfloating):
        first = first.real
    if jnp.issubdtype(first.dtype, jnp.floating) and first.dtype.itemsize > 1:
        return lax.lt(first, jnp.array(-jnp.inf, first.dtype)).astype(jnp.uint8)
    if jnp.issubdtype(first.dtype, jnp.bool_):
        first = first.astype(jnp.uint8)
    width = first.dtype.itemsize * 8
    word = jnp.dtype(f"uint{width}")
    bits = lax.bitcast_convert_type(first, word)
    # Two shifts and not one by the whole width, which would be undefined, nor a mask by 0, which would be folded.
    return lax.shift_right_logical(lax.shift_right_logical(bits, word.type(width - 1)), word.type(1)).astype(jnp.uint8)


def after(x: Array, codes: Array) -> Array:
    """Return ``codes`` (of a one-byte dtype), not to be read before ``x`` has been computed."""
    if x.size == 0 or codes.dtype.itemsize != 1:
        return codes
    zero = runtime_zero(x)
    if jnp.issubdtype(codes.dtype, jnp.integer):
        return codes ^ zero.astype(codes.dtype)
    as_bytes = lax.bitcast_convert_type(codes, jnp.uint8) ^ zero
    return lax.bitcast_convert_type(as_bytes, codes.dtype)


def tree_after(x: Array, tree: object) -> object:
    """Apply `after` to every leaf of a one-byte dtype."""
    return jax.tree.map(lambda a: after(x, a) if hasattr(a, "dtype") and a.dtype.itemsize == 1 else a, tree)

"""Keeping the compiler from unpacking every layer of a model before it computes the first.

A dequantized weight depends on nothing but parameters, so a scheduler is free to make all of them at once, and XLA's
default scheduler on CPU does: an unrolled model of L layers then holds L float copies of its weights (measured: 72 MiB
of temporary memory instead of 1, and 30 ms instead of 9, for 32 layers of width 256). `lax.optimization_barrier` is
dropped before scheduling in the XLA of jax 0.10. A call that is marked not to be inlined stays one: what is inside
starts when every operand is there, activations included, and is compiled as fast as without it.

Inside a loop that slices the weight by its own step, nothing can be made early, and a call would only keep the slice
from being fused with what reads it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.xla_metadata import set_xla_metadata

SMALL_ELEMENTS = 1 << 16
"""Activations of no more elements are quantized in less time than it takes to compile one loop over them."""


def apart(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make ``function(static, *operands)`` one step of the compiled program, which starts when all operands are there.

    Args:
        function: of a hashable first argument and pytrees of arrays.
    """

    @functools.partial(jax.jit, static_argnums=0)
    def body(static: Any, *operands: Any) -> Any:
        with set_xla_metadata(inlineable=None):  # for this call, not for those of library functions in it
            return function(static, *operands)

    @functools.wraps(function)
    def call(static: Any, *operands: Any) -> Any:
        with set_xla_metadata(inlineable="false"):
            return body(static, *operands)

    return call


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

"""The oracle of quantized ragged products, in plain jnp.

Rows of x [M, K] are sorted by group; group g owns the next ``group_sizes[g]`` of them:

    y[m, n] = sum over k of x~[m, k] * W~[group of m, n, k],        0 for rows behind the last group

with x~ and W~ as in `qjax.kernels.dot.reference`.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from qjax.formats import QArray
from qjax.kernels.dot.reference import decoded, round_trip, wide
from qjax.kernels.registry import Act, Problem, register_lowering


@register_lowering("ragged_dot", name="reference", priority=-1, about="the oracle: dequantize all, then a ragged dot")
def ragged_dot_reference(problem: Problem, x: Array, w: QArray, act: Act | None, group_sizes: Array) -> Array:
    """Return the ragged product as the module's equation says it."""
    if act is not None:
        x = round_trip(x, act)
    w_kn = jnp.swapaxes(decoded(w, x.dtype), -1, -2)
    precision = problem.settings.precision if problem.settings else None
    y = lax.ragged_dot(x, w_kn, group_sizes, precision=precision, preferred_element_type=wide(x.dtype))
    return y.astype(problem.out_dtype)

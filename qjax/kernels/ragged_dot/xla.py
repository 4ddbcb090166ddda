"""Lowerings of quantized ragged products that XLA compiles.

- "dequantize": unpack all matrices, then `jax.lax.ragged_dot`.
- "experts": one group after the other in a loop, each by the lowering that `dot` would choose, on all rows, of which
  the group's own are kept. XLA on CPU has no ragged product and multiplies all rows by all matrices anyway; the loop
  unpacks one matrix at a time, skips groups without rows, and computes integer codes as integers.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array, lax

from qjax.formats import QArray
from qjax.kernels.dot.reference import wide
from qjax.kernels.dot.xla import on_one_cpu, zeros_like_varying
from qjax.kernels.ragged_dot.reference import ragged_dot_reference
from qjax.kernels.registry import Act, Problem, register_lowering, select


@register_lowering("ragged_dot", name="dequantize", priority=0, about="unpack all matrices, then a ragged dot")
def dequantize(problem: Problem, x: Array, w: QArray, act: Act | None, group_sizes: Array) -> Array:
    """Return the float ragged product with the dequantized weights."""
    return ragged_dot_reference(problem, x, w, act, group_sizes)


def _one_cpu(problem: Problem) -> bool | str:
    return on_one_cpu(problem) or "it is for one CPU device; elsewhere the compiler's own ragged product is better"


@register_lowering(
    "ragged_dot",
    platform="cpu",
    when=_one_cpu,
    name="experts",
    priority=1,
    about="one group at a time by the lowering of dot, groups without rows skipped",
)
def experts(problem: Problem, x: Array, w: QArray, act: Act | None, group_sizes: Array) -> Array:
    """Return the ragged product, one group at a time."""
    if x.size == 0 or not problem.stack[0]:
        return ragged_dot_reference(problem, x, w, act, group_sizes)
    inner = dataclasses.replace(problem, op="dot", stack=(), settings=None, out_dtype=jnp.dtype(wide(x.dtype)))
    lowering = select(inner)
    ends = jnp.cumsum(group_sizes.astype(jnp.int32))
    rows = jnp.arange(x.shape[0], dtype=jnp.int32)

    def add(g: Array, y: Array) -> Array:
        pick = lambda a: lax.dynamic_index_in_dim(a, g, 0, keepdims=False)  # noqa: E731
        end, size = pick(ends), pick(group_sizes)

        def own(y: Array) -> Array:
            matrix = w.index_stack(0, g).canonical()
            mine = (rows >= end - size) & (rows < end)
            return jnp.where(mine[:, None], lowering.function(inner, x, matrix, act), y)

        return lax.cond(size > 0, own, lambda y: y, y)

    zeros = zeros_like_varying((x.shape[0], problem.n), x, w)
    return lax.fori_loop(0, problem.stack[0], add, zeros).astype(problem.out_dtype)

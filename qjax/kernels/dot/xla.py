"""Lowerings of quantized products that XLA compiles, chosen by what was measured on CPU.

- "dequantize": unpack the weight, then a float dot. On one CPU device the weight is unpacked only once x is known
  (`qjax.kernels.order`) and, where rows are few, without interleaving (`qjax.kernels.phases`).
- "dequantize_blocks": the same, a block of output rows at a time in a loop, for weights so large that a float copy
  falls out of the cache. Compiling a loop costs 15 to 30 ms a product, which is why small weights go without.
- "int_dot": int8 x int8 -> int32 on codes, scaled afterwards, in `qjax.kernels.dot.integer`.
- "float8_dot": float8 x float8 -> float32 on codes, scaled afterwards.

Under a mesh that the compiler partitions over (more than one device) all of them are written as whole-array
operations, without loops and slices, so that sharded operands stay where they are.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qjax.formats import QArray
from qjax.kernels.dot.reference import contract, dot_reference, encoded, round_trip, wide
from qjax.kernels.order import apart, runtime_zero
from qjax.kernels.phases import decoded_phases, phase_count, split_phases
from qjax.kernels.registry import Act, Problem, register_lowering
from qjax.kernels.unpack import floats

BLOCK_ELEMENTS = 1 << 20
"""Elements of one block: 4 MiB of float32, which the last-level cache holds."""

LOOP_ELEMENTS = 3 << 20
"""Weights of more elements are dequantized in blocks."""

PHASE_ROWS = 128
"""At most so many rows are multiplied phase by phase."""

PHASE_ELEMENTS = 1 << 20
"""Weights of fewer elements are not: the gain is microseconds, and compiling P products takes longer than one."""

Dot = Callable[[Problem, Array, QArray, "Act | None"], Array]


def on_one_cpu(problem: Problem) -> bool:
    """Whether the op is compiled for a single CPU device, where loops and slices do no harm to sharding."""
    return problem.platform == "cpu" and problem.devices == 1


def over_stack(function: Dot) -> Dot:
    """Apply a lowering of plain matrices to a stack of them, one after the other.

    On CPU a loop over matrices is as fast as a batched dot and unpacks one matrix at a time.
    """

    def run(problem: Problem, x: Array, w: QArray, act: Act | None) -> Array:
        stacks = len(problem.stack)
        if not stacks:
            return function(problem, x, w, act)
        settings = dataclasses.replace(problem.settings, streamed=True) if problem.settings else None
        flat = dataclasses.replace(problem, stack=(), settings=settings)
        fmt = act[0] if act else None
        merge = lambda a: a.reshape(problem.matrices, *a.shape[stacks:])  # noqa: E731
        parts = (merge(x), _map_arrays(merge, w), {k: merge(a) for k, a in act[1].items()} if act else {})

        def one(part: tuple) -> Array:
            xi, wi, aux = part
            return function(flat, xi, wi, (fmt, aux) if fmt else None)

        y = lax.map(one, parts)
        return y.reshape(*problem.stack, *y.shape[1:])

    return run


def _map_arrays(function: Callable[[Array], Array], w: QArray) -> QArray:
    return dataclasses.replace(w, codes=function(w.codes), aux={k: function(a) for k, a in w.aux.items()})


def both_quantized(act: Act | None) -> Act:
    """Return the activations' format and aux, in a lowering that is only selected where they are quantized."""
    assert act is not None
    return act


def fold_rows(x: Array) -> Array:
    """Return [rows, K] from [*rows, K]."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


@register_lowering(
    "dot", name="dequantize", priority=0, about="unpack the weight, then a float dot (CPU: unpacked when x is known)"
)
@register_lowering("dot_transposed", name="dequantize", priority=0, about="unpack the weight, then a float dot")
def dequantize(problem: Problem, x: Array, w: QArray, act: Act | None) -> Array:
    """Return the float product with the dequantized weight."""
    if not on_one_cpu(problem) or x.size == 0:
        return dot_reference(problem, x, w, act)
    return over_stack(_dequantize_matrix)(problem, x, w, act)


def _dequantize_matrix(problem: Problem, x: Array, w: QArray, act: Act | None) -> Array:
    if act is not None:
        x = round_trip(x, act)
    return once_there(problem, _float_product)(problem, x, w)


def once_there(problem: Problem, function: Callable[..., Array]) -> Callable[..., Array]:
    """Make ``function(static, *operands)``, which unpacks a weight, start only when all its operands are there."""
    return function if problem.settings and problem.settings.streamed else _apart(function)


_apart = functools.lru_cache(maxsize=256)(apart)


def _float_product(problem: Problem, x: Array, w: QArray) -> Array:
    transposed = problem.op == "dot_transposed"
    precision = problem.settings.precision if problem.settings else None
    phases = 1 if transposed else _phases(problem, w)
    if phases == 1:
        return contract(
            x, floats(w).astype(x.dtype), transposed=transposed, out_dtype=problem.out_dtype, precision=precision
        )
    # Terms are summed in float32 at least, as inside one dot, and rounded once.
    terms = [
        contract(xp, wp.astype(x.dtype), transposed=False, out_dtype=wide(x.dtype), precision=precision)
        for xp, wp in zip(split_phases(x, phases), decoded_phases(w), strict=True)
    ]
    return sum(terms[1:], terms[0]).astype(problem.out_dtype)


def _phases(problem: Problem, w: QArray) -> int:
    if not isinstance(problem.rows, int) or problem.rows > PHASE_ROWS or problem.n * problem.k < PHASE_ELEMENTS:
        return 1
    return phase_count(w.fmt, w.length)


def _one_cpu(problem: Problem) -> bool | str:
    return on_one_cpu(problem) or "it is for one CPU device; over several the plain form stays sharded"


def _row_blocks(problem: Problem) -> bool | str:
    if problem.weight.whole_matrix:
        return f"{problem.weight.name} keeps scales of whole matrices, which blocks of rows would cut"
    return _one_cpu(problem)


def _large(problem: Problem) -> bool | str:
    if problem.n * problem.k <= LOOP_ELEMENTS:
        return f"the weight has no more than {LOOP_ELEMENTS} elements, where a loop does not pay"
    return True


_BLOCKS = {
    "platform": "cpu",
    "when": _row_blocks,
    "worth": _large,
    "name": "dequantize_blocks",
    "priority": 1,
    "about": "unpack the weight a block of output rows at a time, for large weights",
}


@register_lowering("dot", **_BLOCKS)
@register_lowering("dot_transposed", **_BLOCKS)
def dequantize_blocks(problem: Problem, x: Array, w: QArray, act: Act | None) -> Array:
    """Return the float product, a block of rows of the weight at a time."""
    if x.size == 0:
        return dot_reference(problem, x, w, act)
    return over_stack(_blocks_of_matrix)(problem, x, w, act)


def _blocks_of_matrix(problem: Problem, x: Array, w: QArray, act: Act | None) -> Array:
    if act is not None:
        x = round_trip(x, act)
    rows, x = x.shape[:-1], fold_rows(x)
    y = once_there(problem, in_blocks)((problem, _float_product), x, w)
    return y.astype(problem.out_dtype).reshape(*rows, y.shape[-1])


def in_blocks(what: tuple[Problem, Callable[[Problem, Array, QArray], Array]], x: Array, w: QArray) -> Array:
    """Return a product in the dtype of accumulation, a block of rows of the weight at a time.

    Args:
        what: the problem, without a stack, and a function that computes one block of it, given the problem with ``n``
            and ``out_dtype`` of the block.
        x: [rows, K], or [rows, N] if transposed.
        w: canonical [N, K].
    """
    problem, product = what
    step = min(problem.n, max(32, BLOCK_ELEMENTS // max(problem.k, 1) // 32 * 32))
    transposed = problem.op == "dot_transposed"
    partial = dataclasses.replace(problem, n=step, out_dtype=np.dtype(wide(x.dtype)))
    last = problem.n - step

    def as_bytes(a: Array) -> Array:
        # 8-bit floats are sliced as bytes: XLA on CPU would widen the whole array before each slice.
        return lax.bitcast_convert_type(a, jnp.uint8) if _is_float8(a.dtype) else a

    stored = _map_arrays(as_bytes, w)

    def block(start: Array) -> QArray:
        def take(whole: Array, dtype: np.dtype) -> Array:
            part = lax.dynamic_slice_in_dim(whole, start, step) if whole.shape[0] == problem.n else whole
            return lax.bitcast_convert_type(part, dtype) if _is_float8(dtype) else part

        aux = {name: take(a, w.aux[name].dtype) for name, a in stored.aux.items()}
        return dataclasses.replace(w, codes=take(stored.codes, w.codes.dtype), aux=aux)

    def forward(i: Array, y: Array) -> Array:
        start = jnp.minimum(i * step, last)  # the last block may overlap the one before: the same numbers again
        return lax.dynamic_update_slice_in_dim(y, product(partial, x, block(start)), start, axis=1)

    def backward(i: Array, y: Array) -> Array:
        start = jnp.minimum(i * step, last)
        part = lax.dynamic_slice_in_dim(x, start, step, axis=1)
        fresh = start + jnp.arange(step) >= i * step  # columns of the overlap are already summed
        part = jnp.where(fresh, part, jnp.zeros((), x.dtype))
        return y + product(partial, part, block(start))

    width = problem.k if transposed else problem.n
    zeros = zeros_like_varying((x.shape[0], width), x, w)
    return lax.fori_loop(0, -(-problem.n // step), backward if transposed else forward, zeros)


def _is_float8(dtype: np.dtype) -> bool:
    return dtype.itemsize == 1 and jnp.issubdtype(dtype, jnp.floating)


def zeros_like_varying(shape: tuple[int, ...], x: Array, w: QArray) -> Array:
    """Return zeros in the accumulation dtype that vary over the mesh axes over which x or w do.

    Inside shard_map the carry of a loop has to have the type that the body returns.
    """
    stored = next(a for a in (w.codes, *w.aux.values()) if a.size)  # a packed weight has its codes in aux
    zero = runtime_zero(x) | runtime_zero(stored)
    return jnp.broadcast_to(zero.astype(wide(x.dtype)), shape)


def _float8_pair(problem: Problem) -> bool | str:
    act, weight = problem.act, problem.weight
    if act is None:
        return "the activations are not quantized"
    for fmt in (act, weight):
        if not (fmt.affine and jnp.issubdtype(fmt.code_dtype, jnp.floating)):
            return f"{fmt.name} codes are no 8-bit floats with one factor"
        if fmt.per == "group":
            return f"{fmt.name} has a scale per group, which a product of codes would have to sum one by one"
    return True


@register_lowering(
    "dot", when=_float8_pair, name="float8_dot", priority=3, about="float8 x float8 -> float32 on codes, then scaled"
)
def float8_dot(problem: Problem, x: Array, w: QArray, act: Act | None) -> Array:
    """Return the product of float8 codes, accumulated in float32, times both scales."""
    if on_one_cpu(problem) and x.size:
        return over_stack(_float8_matrix)(problem, x, w, act)
    return _float8_matrix(problem, x, w, act)


def _float8_matrix(problem: Problem, x: Array, w: QArray, act: Act | None) -> Array:
    fmt, aux = both_quantized(act)
    codes = encoded(x, (fmt, aux))
    if not on_one_cpu(problem):
        y = _codes_product(problem, codes, w)
    elif problem.n * problem.k <= LOOP_ELEMENTS:
        y = once_there(problem, _codes_product)(problem, codes, w)
    else:  # XLA on CPU widens the codes of the whole weight: keep that to a block at a time
        y = once_there(problem, in_blocks)((problem, _codes_product), fold_rows(codes), w)
        y = y.reshape(*x.shape[:-1], problem.n)
    scale = jnp.moveaxis(w.fmt.scale_of(w.aux), -1, -2)  # [*stack, 1, N]
    scale = scale.reshape(*scale.shape[:-2], *(1,) * (y.ndim - len(problem.stack) - 1), scale.shape[-1])
    return (y * fmt.scale_of(aux) * scale).astype(problem.out_dtype)


def _codes_product(problem: Problem, codes: Array, w: QArray) -> Array:
    sharding = problem.settings.out_sharding if problem.settings else None
    return contract(codes, w.codes, transposed=False, out_dtype=jnp.float32, out_sharding=sharding)

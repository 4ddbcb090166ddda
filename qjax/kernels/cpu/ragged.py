"""The lowering "native" of ragged products: int8 activations by the `Int` matrices of their groups.

All rows are quantized at once, and those of each group multiplied by its matrix by the kernels of
`qjax.kernels.cpu.dot`, with the same bits: a row gives what it would give alone. Groups without rows are not read.

It is taken by itself for any number of rows, and matrices of 2^12 elements and more. By ``benchmarks/cpu_small.py``
(processor time on two busy cores with AVX-512 VNNI, four experts of 2^10 to 2^20 elements, 1 to 256 rows, unrolled and
in a scan) XLA's product by groups took 1.1 to 4.1 times as long; it was level in one case of those that were repeated.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax.formats import Int, QArray
from qjax.kernels.cpu.dot import can_multiply
from qjax.kernels.cpu.library import ISAS, RAGGED
from qjax.kernels.cpu.operands import (
    SMALLEST_MEASURED,
    activations,
    integers,
    not_worth,
    numbered,
    one_of,
    quantizing,
    refuses_activations,
)
from qjax.kernels.dot.xla import both_quantized
from qjax.kernels.ragged_dot.reference import ragged_dot_reference
from qjax.kernels.registry import Act, Problem, register_lowering


def _can(problem: Problem) -> bool | str:
    return refuses_activations(problem) or can_multiply(problem)


def _worth(problem: Problem) -> bool | str:
    return not_worth(problem, SMALLEST_MEASURED) or True


@register_lowering(
    "ragged_dot",
    Int,
    "cpu",
    when=_can,
    worth=_worth,
    name="native",
    priority=6,
    picks=True,
    about="compiled kernels: the rows of each group by its matrix, int8 activations, AVX-512 VNNI, AMX, AVX2, ARM",
)
def native(
    problem: Problem, x: Array, w: QArray, act: Act | None, group_sizes: Array, layer: Array | None = None
) -> Array:
    """Return the ragged product of int8 activations, weights read as they are stored and lie."""
    if not x.size or not w.codes.size:
        return ragged_dot_reference(problem, x, one_of(w, layer), act, group_sizes)
    act = both_quantized(act)
    assert isinstance(w.fmt, Int) and isinstance(act[0], Int)
    rows, x_scale = activations(dataclasses.replace(problem, stack=()), x, act)
    y = product(rows, x_scale, *integers(w), group_sizes, weight=w.fmt, act=act[0], layer=layer)
    return y[0].astype(problem.out_dtype)


def product(
    x: Array,
    x_scale: Array | None,
    codes: Array,
    scale: Array,
    zero: Array,
    group_sizes: Array,
    *,
    weight: Int,
    act: Int,
    layer: Array | None = None,
    instructions: str | None = None,
) -> Array:
    """Call the kernel.

    Args:
        x: float32, or int8 codes, [1, M, K], rows sorted by group.
        x_scale: float32 [1, M or 1, 1], or None: fitted to each row of x, as ``act`` does.
        codes: packed, [G, N, bytes], or [L * G, N, bytes] with a layer, and so are scales and zero points.
        scale: float32 [G, N or 1, groups or 1].
        zero: uint8 likewise, or [G, 0, 0] where ``weight`` is symmetric.
        group_sizes: integers [G].
        weight: format of the weight.
        act: format of the activations.
        layer: int32 scalar: which G matrices of the weight are read, clamped to those that there are.
        instructions: one of `ISAS`, or None for the best that the processor has.

    Returns:
        float32 [1, M, N]; 0 for rows behind the last group.
    """
    x_scale, own = quantizing(x, x_scale, act)
    return jax.ffi.ffi_call(RAGGED, jax.ShapeDtypeStruct((*x.shape[:2], codes.shape[1]), jnp.float32))(
        *(x, x_scale, codes, scale, zero, group_sizes.astype(jnp.int32), numbered(layer)),
        bits=np.int64(weight.bits),
        group=np.int64(weight.group or 0),
        is_signed=np.int64(weight.symmetric),
        **own,
        isa=np.int64(-1 if instructions is None else ISAS.index(instructions)),
    )

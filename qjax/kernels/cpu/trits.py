"""The lowering "native" for trit-planes (`TritPlanes`, PTQTP) with int8 activations.

The sum over a group is an exact integer for each plane, of trits that are taken out of their bytes in registers; it is
scaled, and planes and groups added in float32 in their order: the same bits by every instruction set, and for a row
alone and with others. AVX-512 VNNI reads one and two planes; three, and other processors, have plain C++.

For more than a few rows the bytes are taken apart again for every four; up to how many rows it is taken by itself is a
conservative guess, to be measured on an idle machine (``benchmarks/cpu_native.py``).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax.formats import Int, QArray, TritPlanes
from qjax.kernels.cpu.library import ISAS, TRITS
from qjax.kernels.cpu.operands import (
    activations,
    matrices,
    merged,
    not_worth,
    numbered,
    one_of,
    placed,
    quantizing,
    refuses_activations,
    refuses_place,
)
from qjax.kernels.dot.integer import LARGEST_SUM
from qjax.kernels.dot.reference import dot_reference
from qjax.kernels.dot.xla import both_quantized
from qjax.kernels.registry import Act, Problem, register_lowering

STORES = ("base3", "two_bit", "nibble")
"""Orders of trits, as numbered in ``src/trits.h``."""

MOST_ROWS = 512
"""Rows up to which it is taken by itself: there it was still a tenth faster than one product of the unpacked weight."""


def _can(problem: Problem) -> bool | str:
    weight = problem.weight
    assert isinstance(weight, TritPlanes)
    if why := refuses_activations(problem):
        return why
    if min(weight.group, problem.k) > LARGEST_SUM:
        return f"a sum of {min(weight.group, problem.k)} products may overflow int32"
    return refuses_place(problem) or True


def _worth(problem: Problem) -> bool | str:
    if (problem.rows or 0) > MOST_ROWS:
        return f"for more than {MOST_ROWS} rows one product of the whole weight may be faster"
    if problem.weight.planes == 3:  # type: ignore[attr-defined]
        return "three planes are read by plain C++, which is slow"
    return not_worth(problem) or True


@register_lowering(
    "dot",
    TritPlanes,
    "cpu",
    when=_can,
    worth=_worth,
    name="native",
    priority=6,
    picks=True,
    about="compiled kernels: trits taken apart in registers, int8 activations, a few rows, AVX-512 VNNI or portable",
)
def native(problem: Problem, x: Array, w: QArray, act: Act | None, layer: Array | None = None) -> Array:
    """Return the product of int8 activations and trit-planes, or those of one layer of a stack.

    Trits are read as they are stored, where they lie; only the scales of the layer are made float32 in front.
    """
    one = one_of(w, layer)
    if not x.size or not w.codes.size:
        return dot_reference(problem, x, one, act)
    act = both_quantized(act)
    assert isinstance(w.fmt, TritPlanes) and isinstance(act[0], Int)
    codes = matrices(w.codes, *w.codes.shape[-2:], lead=w.codes.shape[:-2])
    scales = jnp.moveaxis(w.fmt.scales(one.aux), 0, -3)  # [*stack, planes, N, groups]
    own = (codes, merged(problem, scales, w.fmt.planes * scales.shape[-2], scales.shape[-1]))
    return placed(problem, product(*activations(problem, x, act), *own, weight=w.fmt, act=act[0], layer=layer), x)


def product(
    x: Array,
    x_scale: Array | None,
    codes: Array,
    scale: Array,
    *,
    weight: TritPlanes,
    act: Int,
    layer: Array | None = None,
    instructions: str | None = None,
) -> Array:
    """Call the kernel.

    Args:
        x: float32, or int8 codes, [S, M, K].
        x_scale: float32 [S, M or 1, 1], or None: fitted to each row of x, as ``act`` does.
        codes: packed, [S, N, bytes], or [L * S, N, bytes] with a layer.
        scale: float32 [S, planes * N, groups].
        weight: format of the weight.
        act: format of the activations.
        layer: int32 scalar: which S matrices of the codes are read, clamped to those that there are.
        instructions: one of `ISAS`, or None for the best that the processor has.

    Returns:
        float32 [S, M, N].
    """
    x_scale, own = quantizing(x, x_scale, act)
    return jax.ffi.ffi_call(TRITS, jax.ShapeDtypeStruct((*x.shape[:2], codes.shape[1]), jnp.float32))(
        *(x, x_scale, codes, scale, numbered(layer)),
        planes=np.int64(weight.planes),
        store=np.int64(STORES.index(weight.store)),
        group=np.int64(weight.group),
        **own,
        isa=np.int64(-1 if instructions is None else ISAS.index(instructions)),
    )

"""The lowering "native": integer products on one CPU by kernels of our own, in C++ (``src``).

The kernels read weights in the neutral order in which they are stored, so nothing has to be packed. Activations are
quantized inside, by the rule of `qjax.formats.Int`. Sums over a group, or over a row where it has one scale, are exact;
they are scaled and added in float32 in the order of groups, whatever the processor, the threads and the other rows are:
a token's result does not depend on what it is computed with.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax.formats import Int, QArray
from qjax.formats.numerics import AnyArray
from qjax.kernels.cpu.library import ISAS, TARGET, library
from qjax.kernels.dot.integer import LARGEST_SUM
from qjax.kernels.dot.reference import CODES, dot_reference
from qjax.kernels.dot.xla import both_quantized
from qjax.kernels.registry import Act, Problem, register_lowering


def _can(problem: Problem) -> bool | str:
    weight, act = problem.weight, problem.act
    assert isinstance(weight, Int)
    if isinstance(lib := library(), str):
        return lib
    if act is None:
        return "the activations are not quantized"
    if not (isinstance(act, Int) and act.symmetric and act.per != "group"):
        return f"{act.name} activations have no kernel; Int(8, per='token') have, or 'tensor', fewer bits too"
    if weight.bits not in (2, 4, 8) or weight.zero == "float":
        return f"{weight.name} weights have no kernel; those of 2, 4 and 8 bits with integer zero points have"
    group = weight.group if weight.per == "group" else None
    if group and group < problem.k and group * weight.bits % 8:
        return f"groups of {group} codes of {weight.bits} bits do not end with a byte"
    if (group or problem.k) > LARGEST_SUM:
        return f"a sum of {group or problem.k} products may overflow int32"
    if problem.devices > 1:
        return "it is for one device; inside shard_map it runs on each"
    return True


def _worth(problem: Problem) -> bool | str:
    return "it runs where it is named"


@register_lowering(
    "dot",
    Int,
    "cpu",
    when=_can,
    worth=_worth,
    name="native",
    priority=6,
    about="int8 activations by compiled kernels: AVX2, AVX-512 VNNI, AMX or portable",
)
def native(problem: Problem, x: Array, w: QArray, act: Act | None) -> Array:
    """Return the product of integer codes times both scales."""
    if not x.size or not w.codes.size:
        return dot_reference(problem, x, w, act)
    fmt, aux = both_quantized(act)
    assert isinstance(fmt, Int) and isinstance(w.fmt, Int)
    stack, rows = problem.stack, x.shape[len(problem.stack) : -1]
    count = math.prod(rows)
    scale = fmt.scale_of(aux)
    if any(d > 1 for d in scale.shape[len(stack) : -1]):
        scale = jnp.broadcast_to(scale, (*scale.shape[: len(stack)], *rows, 1))
    codes = CODES in aux
    given = jnp.broadcast_to(jnp.asarray(aux[CODES]), x.shape) if codes else x.astype(jnp.float32)

    def merged(a: AnyArray, m: int, n: int) -> Array:
        a = jnp.asarray(a).reshape(*a.shape[: len(stack)], m, n)
        return jnp.broadcast_to(a, (*stack, m, n)).reshape(problem.matrices, m, n)

    y = product(
        merged(given, count, problem.k),
        merged(scale, math.prod(scale.shape[len(stack) :]), 1),
        merged(w.codes, *w.codes.shape[-2:]),
        merged(w.fmt.scale_of(w.aux), *w.aux["scale"].shape[-2:]),
        None if w.fmt.symmetric else merged(w.aux["zero"], *w.aux["zero"].shape[-2:]),
        weight=w.fmt,
        act=fmt,
    )
    return y.astype(problem.out_dtype).reshape(*stack, *rows, problem.n)


def product(
    x: Array,
    x_scale: Array,
    codes: Array,
    scale: Array,
    zero: Array | None,
    *,
    weight: Int,
    act: Int,
    instructions: str | None = None,
) -> Array:
    """Call the kernel.

    Args:
        x: float32, or int8 codes, [S, M, K].
        x_scale: float32 [S, M or 1, 1].
        codes: packed, [S, N, bytes].
        scale: float32 [S, N or 1, groups or 1].
        zero: uint8 likewise, or None where ``weight`` is symmetric.
        weight: format of the weight.
        act: format of the activations.
        instructions: one of `ISAS`, or None for the best that the processor has.

    Returns:
        float32 [S, M, N].
    """
    low, high = act.code_range
    s, m, _ = x.shape
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct((s, m, codes.shape[1]), jnp.float32))
    return call(
        x,
        x_scale,
        codes,
        scale,
        jnp.zeros((s, 0, 0), jnp.uint8) if zero is None else zero,
        bits=_int64(weight.bits),
        group=_int64(weight.group or 0),
        is_signed=_int64(weight.symmetric),
        low=_int64(low),
        high=_int64(high),
        isa=_int64(-1 if instructions is None else ISAS.index(instructions)),
    )


def _int64(value: int) -> np.int64:
    return np.int64(value)

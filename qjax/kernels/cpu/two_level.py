"""The lowering "native" for weights of two levels (`DualGrained`, `Progressive`) with int8 activations.

Codes become the int8 numbers that they stand for, `qjax.formats.Format.as_int8`, while they are read: for one row of
activations in registers, for several a few rows of the weight at a time in the cache. So the sum over a row is one
exact integer, scaled once, with the same bits as `qjax.kernels.dot.integer.int_dot` gives:

    y[m, n] = float32(sum over k of w8[n, k] q[m, k]) * sx[m] * scale[n]

It is taken by itself from as many elements as that of `qjax.kernels.cpu.dot`: a conservative guess, to be measured on
an idle machine (``benchmarks/cpu_native.py``).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax.formats import DualGrained, Int, Progressive, QArray
from qjax.formats.two_level import TwoLevel
from qjax.kernels.cpu.library import ISAS, TWO_LEVEL
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


def _can(problem: Problem) -> bool | str:
    weight = problem.weight
    assert isinstance(weight, TwoLevel)
    if why := refuses_activations(problem):
        return why
    if weight.code_bits not in (2, 4):
        return f"{weight.name} weights have no kernel; those of 2 and 4 bits have"
    if weight.group < problem.k and weight.group * weight.code_bits % 8:
        return f"groups of {weight.group} codes of {weight.code_bits} bits do not end with a byte"
    if problem.k > LARGEST_SUM:
        return f"a sum of {problem.k} products may overflow int32"
    return refuses_place(problem) or True


def _worth(problem: Problem) -> bool | str:
    return not_worth(problem) or True


@register_lowering(
    "dot",
    (DualGrained, Progressive),
    "cpu",
    when=_can,
    worth=_worth,
    name="native",
    priority=6,
    picks=True,
    about="compiled kernels: codes made int8 numbers as they are read, int8 activations, AVX-512 VNNI, AMX, AVX2, ARM",
)
def native(problem: Problem, x: Array, w: QArray, act: Act | None, layer: Array | None = None) -> Array:
    """Return the product of int8 activations and a weight of two levels, or of one layer of a stack of them.

    It is read as it is stored, where it lies; only the scales of the layer's rows are made float32 in front.
    """
    one = one_of(w, layer)
    if not x.size or not w.codes.size:
        return dot_reference(problem, x, one, act)
    act = both_quantized(act)
    assert isinstance(w.fmt, TwoLevel) and isinstance(act[0], Int)
    lead = tuple(w.codes.shape[:-2])
    codes, step, zero = (matrices(a, *a.shape[-2:], lead=lead) for a in (w.codes, w.aux["step"], w.aux["zero"]))
    scale = jnp.asarray(one.aux["scale"], jnp.float32)
    own = (codes, merged(problem, scale, *scale.shape[-2:]), step, zero)
    return placed(problem, product(*activations(problem, x, act), *own, weight=w.fmt, act=act[0], layer=layer), x)


def product(
    x: Array,
    x_scale: Array | None,
    codes: Array,
    scale: Array,
    step: Array,
    zero: Array,
    *,
    weight: TwoLevel,
    act: Int,
    layer: Array | None = None,
    instructions: str | None = None,
) -> Array:
    """Call the kernel.

    Args:
        x: float32, or int8 codes, [S, M, K].
        x_scale: float32 [S, M or 1, 1], or None: fitted to each row of x, as ``act`` does.
        codes: packed, [S, N, bytes], or [L * S, N, bytes] with a layer, and so are steps and zero points.
        scale: float32 [S, N or 1, 1].
        step: int8 [S, N or 1, groups or 1].
        zero: uint8, likewise.
        weight: format of the weight.
        act: format of the activations.
        layer: int32 scalar: which S matrices of the weight are read, clamped to those that there are.
        instructions: one of `ISAS`, or None for the best that the processor has.

    Returns:
        float32 [S, M, N].
    """
    x_scale, own = quantizing(x, x_scale, act)
    return jax.ffi.ffi_call(TWO_LEVEL, jax.ShapeDtypeStruct((*x.shape[:2], codes.shape[1]), jnp.float32))(
        *(x, x_scale, codes, scale, step, zero, numbered(layer)),
        bits=np.int64(weight.code_bits),
        group=np.int64(weight.group),
        after=np.int64(isinstance(weight, Progressive) and weight.zeros == "post"),
        **own,
        isa=np.int64(-1 if instructions is None else ISAS.index(instructions)),
    )

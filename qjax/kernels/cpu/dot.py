"""The lowering "native": products with integer weights on one CPU by kernels of our own, in C++ (``src``).

The kernels read weights in the neutral order in which they are stored, so nothing has to be packed.

- int8 activations are quantized inside, by the rule of `qjax.formats.Int`, and so are the scales of tokens fitted where
  they are dynamic: XLA then computes neither. Sums over a group, or over a row where it
  has one scale, are exact; they are scaled and added in float32 in the order of groups, whatever the processor, the
  threads and the other rows are: a token's result does not depend on what it is computed with.
- Activations that stay floats are multiplied in float32 by the numbers that codes stand for, unpacked in registers; a
  weight is not rounded to 16 bits where activations have them. For few rows: for many, unpacking the weight once for a
  float product is faster.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax.formats import Int, QArray
from qjax.formats.numerics import AnyArray
from qjax.kernels.act.reference import unit_scale
from qjax.kernels.cpu.library import DOT, FLOAT_DOT, ISAS, instruction_sets, library, say_once
from qjax.kernels.dot.integer import LARGEST_SUM
from qjax.kernels.dot.reference import CODES, dot_reference
from qjax.kernels.registry import Act, Problem, register_lowering

SMALLEST = 1 << 20
"""Weights of fewer elements are left to XLA unless the kernel is named; the benchmark begins here."""

FLOAT_ROWS = 16
"""Most rows for which activations that stay floats are multiplied here unless it is named."""

FAST = "avx512_vnni"
"""The plainest instruction set that was measured ahead of XLA (``benchmarks/cpu_native.py``)."""


def can_multiply(problem: Problem) -> bool | str:
    """Return whether the kernels for `Int` weights can compute a problem, or why not."""
    weight, act = problem.weight, problem.act
    assert isinstance(weight, Int)
    if act is None and problem.x_dtype.itemsize > 4:
        return f"it multiplies in float32, and the activations are {problem.x_dtype}"
    if act is not None and not (isinstance(act, Int) and act.symmetric and act.per != "group"):
        return f"{act.name} activations have no kernel; Int(8, per='token') have, or 'tensor', fewer bits too"
    if weight.bits not in (2, 4, 8) or weight.zero == "float":
        return f"{weight.name} weights have no kernel; those of 2, 4 and 8 bits with integer zero points have"
    group = weight.group if weight.per == "group" else None
    if group and group < problem.k and group * weight.bits % 8:
        return f"groups of {group} codes of {weight.bits} bits do not end with a byte"
    if act is not None and (group or problem.k) > LARGEST_SUM:
        return f"a sum of {group or problem.k} products may overflow int32"
    if problem.rows is None:
        return "the number of rows is not known"
    if problem.devices > 1:
        return "it is for one device; inside shard_map it runs on each"
    if isinstance(lib := library(), str):
        if problem.n * problem.k >= SMALLEST and not problem.exported and not _many(problem):
            say_once()
        return lib
    return True


def _many(problem: Problem) -> bool:
    return problem.act is None and (problem.rows or 0) > FLOAT_ROWS


def _worth(problem: Problem) -> bool | str:
    if _many(problem):
        return f"for more than {FLOAT_ROWS} rows of floats one product of the whole weight is faster"
    if problem.exported:
        return "a program that is exported has to run where these kernels are not, and jax.export refuses them"
    if problem.n * problem.k < SMALLEST:
        return f"the weight has fewer than {SMALLEST} elements, where XLA is quick enough"
    if FAST not in instruction_sets():
        return f"this processor has no {FAST}, without which XLA was faster"
    return True


@register_lowering(
    "dot",
    Int,
    "cpu",
    when=can_multiply,
    worth=_worth,
    name="native",
    priority=6,
    picks=True,
    about="compiled kernels: int8 activations by AVX-512 VNNI, AMX or AVX2, few rows of floats by AVX-512, or portable",
)
def native(problem: Problem, x: Array, w: QArray, act: Act | None, layer: Array | None = None) -> Array:
    """Return the product of x and a weight, read as it is stored, or of one layer of a stack, read where it lies."""
    if not x.size or not w.codes.size:
        return dot_reference(problem, x, w if layer is None else w.index_stack(0, layer), act)
    assert isinstance(w.fmt, Int)
    stack, rows = problem.stack, x.shape[len(problem.stack) : -1]
    count = math.prod(rows)

    def merged(a: AnyArray, m: int, n: int, lead: tuple[int, ...] = stack) -> Array:
        a = jnp.asarray(a).reshape(*a.shape[: len(lead)], m, n)
        return jnp.broadcast_to(a, (*lead, m, n)).reshape(math.prod(lead), m, n)

    def of_weight(a: AnyArray) -> Array:
        return merged(a, *a.shape[-2:], lead=tuple(w.codes.shape[:-2]))

    weight = [of_weight(w.codes), of_weight(w.fmt.scale_of(w.aux))]
    weight.append(jnp.zeros((len(weight[0]), 0, 0), jnp.uint8) if w.fmt.symmetric else of_weight(w.aux["zero"]))
    if act is None:
        y = float_product(merged(x.astype(jnp.float32), count, problem.k), *weight, weight=w.fmt, layer=layer)
        return y.astype(problem.out_dtype).reshape(*stack, *rows, problem.n)
    fmt, aux = act
    assert isinstance(fmt, Int)
    given = jnp.broadcast_to(jnp.asarray(aux[CODES]), x.shape) if CODES in aux else x.astype(jnp.float32)
    if problem.settings is not None and problem.settings.fitted:
        x_scale = None  # that in aux is not read, and so XLA does not compute it
    else:
        scale = fmt.scale_of(aux)
        if any(d > 1 for d in scale.shape[len(stack) : -1]):
            scale = jnp.broadcast_to(scale, (*scale.shape[: len(stack)], *rows, 1))
        x_scale = merged(scale, math.prod(scale.shape[len(stack) :]), 1)
    y = product(merged(given, count, problem.k), x_scale, *weight, weight=w.fmt, act=fmt, layer=layer)
    return y.astype(problem.out_dtype).reshape(*stack, *rows, problem.n)


def product(
    x: Array,
    x_scale: Array | None,
    codes: Array,
    scale: Array,
    zero: Array,
    *,
    weight: Int,
    act: Int,
    layer: Array | None = None,
    instructions: str | None = None,
) -> Array:
    """Call the kernel for int8 activations.

    Args:
        x: float32, or int8 codes, [S, M, K].
        x_scale: float32 [S, M or 1, 1], or None: fitted to each row of x, as ``act`` does.
        codes: packed, [S, N, bytes], or [L * S, N, bytes] with a layer, and so are scales and zero points.
        scale: float32 [S, N or 1, groups or 1].
        zero: uint8 likewise, or [S, 0, 0] where ``weight`` is symmetric.
        weight: format of the weight.
        act: format of the activations.
        layer: int32 scalar: which S matrices of the weight are read, clamped to those that there are.
        instructions: one of `ISAS`, or None for the best that the processor has.

    Returns:
        float32 [S, M, N].
    """
    low, high = act.code_range
    own: dict[str, Any] = {"low": np.int64(low), "high": np.int64(high), "unit": np.float32(0)}
    if x_scale is None:
        own["unit"] = np.float32(unit_scale(act))
        x_scale = jnp.zeros((x.shape[0], 0, 0), jnp.float32)
    return _call(DOT, x, (x_scale, codes, scale, zero), weight, layer, instructions, own)


def float_product(
    x: Array,
    codes: Array,
    scale: Array,
    zero: Array,
    *,
    weight: Int,
    layer: Array | None = None,
    instructions: str | None = None,
) -> Array:
    """Call the kernel for float activations, float32 [S, M, K]; the rest as in `product`."""
    return _call(FLOAT_DOT, x, (codes, scale, zero), weight, layer, instructions, {})


def _call(
    target: str,
    x: Array,
    more: tuple[Array, ...],
    weight: Int,
    layer: Array | None,
    instructions: str | None,
    own: dict[str, Any],
) -> Array:
    s, m, _ = x.shape
    return jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((s, m, more[-3].shape[1]), jnp.float32))(
        x,
        *more,
        jnp.zeros((0,), jnp.int32) if layer is None else jnp.asarray(layer, jnp.int32).reshape(1),
        bits=np.int64(weight.bits),
        group=np.int64(weight.group or 0),
        is_signed=np.int64(weight.symmetric),
        isa=np.int64(-1 if instructions is None else ISAS.index(instructions)),
        **own,
    )

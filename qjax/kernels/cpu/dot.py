"""The lowering "native": products with integer weights on one CPU by kernels of our own, in C++ (``src``).

The kernels read weights in the neutral order in which they are stored, so nothing has to be packed.

- int8 activations are quantized inside, by the rule of `qjax.formats.Int`, and so are the scales of tokens fitted where
  they are dynamic: XLA then computes neither. Sums over a group, or over a row where it
  has one scale, are exact; they are scaled and added in float32 in the order of groups, whatever the processor, the
  threads and the other rows are: a token's result does not depend on what it is computed with.
- Activations that stay floats are multiplied in float32 by the numbers that codes stand for, unpacked in registers; a
  weight is not rounded to 16 bits where activations have them. More rows than a few are multiplied by AMX where it has
  bfloat16: codes are exact in it, and a float is cut in parts that are, so that products are exact and sums are rounded
  as those of float32 are. Without it, unpacking the weight once for a float product is faster for many rows.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax.formats import Int, QArray
from qjax.kernels.cpu.library import DOT, FLOAT_DOT, ISAS, has_bf16_tiles
from qjax.kernels.cpu.operands import (
    activations,
    integers,
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
from qjax.kernels.registry import Act, Problem, register_lowering

FLOAT_ROWS = 16
"""Most rows of floats that are multiplied here without tiles of bfloat16, unless it is named."""

PARTS = {"float32": 3, "float16": 2, "bfloat16": 1}
"""How many numbers of bfloat16 a float is the sum of."""

TILE = 32
"""Columns that one instruction for tiles sums over; groups have to end with it."""


def can_multiply(problem: Problem) -> bool | str:
    """Return whether the kernels for `Int` weights can compute a problem, or why not."""
    weight, act = problem.weight, problem.act
    assert isinstance(weight, Int)
    if act is None and problem.x_dtype.name not in PARTS:
        return f"it multiplies in float32, and the activations are {problem.x_dtype}"
    if act is not None and (why := refuses_activations(problem)):
        return why
    if weight.bits not in (2, 4, 8) or weight.zero == "float":
        return f"{weight.name} weights have no kernel; those of 2, 4 and 8 bits with integer zero points have"
    group = weight.group if weight.per == "group" else None
    if group and group < problem.k and group * weight.bits % 8:
        return f"groups of {group} codes of {weight.bits} bits do not end with a byte"
    if act is not None and (group or problem.k) > LARGEST_SUM:
        return f"a sum of {group or problem.k} products may overflow int32"
    return refuses_place(problem, not _many(problem)) or True


def _lacks_tiles(problem: Problem) -> str:
    """Why floats are not multiplied by tiles of bfloat16; "" where they are."""
    assert isinstance(problem.weight, Int)
    group = problem.weight.group if problem.weight.per == "group" else None
    if group and group < problem.k and group % TILE:
        return f"groups of {group} columns are no multiple of {TILE}"
    return "" if has_bf16_tiles() else "this processor has no AMX with bfloat16"


def _many(problem: Problem) -> bool:
    """Whether there are more rows of floats than there is a fast kernel for."""
    return problem.act is None and (problem.rows or 0) > FLOAT_ROWS and bool(_lacks_tiles(problem))


def _worth(problem: Problem) -> bool | str:
    if _many(problem):
        why = _lacks_tiles(problem)
        return f"{why}, and for more than {FLOAT_ROWS} rows of floats one product of the whole weight is faster then"
    return not_worth(problem) or True


@register_lowering(
    "dot",
    Int,
    "cpu",
    when=can_multiply,
    worth=_worth,
    name="native",
    priority=6,
    picks=True,
    about="compiled kernels: int8 activations by AVX-512 VNNI, AMX, AVX2 or ARM's dot products, floats by AMX, few "
    "rows of them by AVX-512 or NEON, or portable",
)
def native(problem: Problem, x: Array, w: QArray, act: Act | None, layer: Array | None = None) -> Array:
    """Return the product of x and a weight, read as it is stored, or of one layer of a stack, read where it lies."""
    if not x.size or not w.codes.size:
        return dot_reference(problem, x, one_of(w, layer), act)
    assert isinstance(w.fmt, Int)
    own = integers(w)  # with a layer, of all layers
    if act is None:
        given = merged(problem, x.astype(jnp.float32), math.prod(x.shape[len(problem.stack) : -1]), problem.k)
        return placed(problem, float_product(given, *own, weight=w.fmt, layer=layer, parts=PARTS[x.dtype.name]), x)
    assert isinstance(act[0], Int)
    given, x_scale = activations(problem, x, act)
    return placed(problem, product(given, x_scale, *own, weight=w.fmt, act=act[0], layer=layer), x)


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
    x_scale, own = quantizing(x, x_scale, act)
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
    parts: int = 3,
) -> Array:
    """Call the kernel for float activations, float32 [S, M, K]; the rest as in `product`.

    ``parts``: of how many numbers of bfloat16 those of x are sums (`PARTS`).
    """
    return _call(FLOAT_DOT, x, (codes, scale, zero), weight, layer, instructions, {"parts": np.int64(parts)})


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
        numbered(layer),
        bits=np.int64(weight.bits),
        group=np.int64(weight.group or 0),
        is_signed=np.int64(weight.symmetric),
        isa=np.int64(-1 if instructions is None else ISAS.index(instructions)),
        **own,
    )

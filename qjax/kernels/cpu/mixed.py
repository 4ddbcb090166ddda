"""The lowering "native" for `MixedBits` weights: strips of 2 and 4 bits, their scales of two levels read as they lie.

Products are in float32, of the numbers that codes stand for, for few rows: a weight is unpacked in registers, its scale
codes with it, 16 rows side by side. Activations that are quantized are rounded in front, and their numbers multiplied:
the scales of strips of 16 columns, of which each row has its own, leave little to gain from integers. FP16 corrections
are added to the result of each row.

For many rows unpacking the weight once and a float product are faster. By ``benchmarks/cpu_small.py`` (processor time
on two busy cores with AVX-512, weights of 2^12 to 2^22 elements, unrolled and in a scan) XLA took 1.6 to 25 times as
long at one row, the larger the weight the more, and 1.1 to 2 times at 64; at 128 rows it was level or ahead from 2^14
elements on.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax.formats import MixedBits, QArray
from qjax.kernels.cpu.library import ISAS, MIXED
from qjax.kernels.cpu.operands import (
    SMALLEST_MEASURED,
    matrices,
    merged,
    not_worth,
    numbered,
    one_of,
    placed,
    refuses_place,
)
from qjax.kernels.dot.reference import dot_reference, round_trip
from qjax.kernels.registry import Act, Problem, register_lowering

MOST_ROWS = 64
"""Rows up to which it is taken by itself."""

ARRAYS = {
    "words": np.uint16,
    "tile_scale": np.float16,
    "tile_zero": np.uint16,
    "wide_scale": np.float16,
    "wide_zero": np.uint8,
    "exponent": np.int8,
    "strips": np.uint8,
    "outlier_value": np.float16,
    "outlier_column": np.uint16,
    "outlier_row": np.uint32,
}
"""Aux in the order of the handler, and what is given for those that a weight has not: arrays without columns."""


def _can(problem: Problem) -> bool | str:
    if problem.x_dtype.itemsize > 4:
        return f"it multiplies in float32, and the activations are {problem.x_dtype}"
    return refuses_place(problem, not _many(problem)) or True


def _many(problem: Problem) -> bool:
    return (problem.rows or 0) > MOST_ROWS


def _worth(problem: Problem) -> bool | str:
    if _many(problem):
        return f"for more than {MOST_ROWS} rows of floats one product of the whole weight is faster"
    if problem.weight.strip < 16:  # type: ignore[attr-defined]
        return "strips of 8 columns are read by plain C++, which is slow"
    return not_worth(problem, SMALLEST_MEASURED) or True


@register_lowering(
    "dot",
    MixedBits,
    "cpu",
    when=_can,
    worth=_worth,
    name="native",
    priority=6,
    picks=True,
    about="compiled kernels: strips of 2 and 4 bits and their scales unpacked in registers, few rows, AVX-512",
)
def native(problem: Problem, x: Array, w: QArray, act: Act | None, layer: Array | None = None) -> Array:
    """Return the product of floats and a weight of 2-bit and 4-bit strips, read as it is stored and lies."""
    if not x.size or not w.codes.size:
        return dot_reference(problem, x, one_of(w, layer), act)
    assert isinstance(w.fmt, MixedBits)
    if act is not None:
        x = round_trip(x, act)
    rows = math.prod(x.shape[len(problem.stack) : -1])
    lead = tuple(w.codes.shape[:-2])  # of the weight: with a layer, one axis more than the product has
    none = {name: jnp.zeros((1,) * len(lead) + (1, 0), dtype) for name, dtype in ARRAYS.items()}
    arrays = (w.codes, *(jnp.asarray(w.aux.get(name, none[name])) for name in ARRAYS))
    given = merged(problem, x.astype(jnp.float32), rows, problem.k)
    own = (matrices(a, *a.shape[-2:], lead=lead) for a in arrays)
    return placed(problem, product(given, *own, weight=w.fmt, layer=layer), x)


def product(
    x: Array,
    codes: Array,
    *own: Array,
    weight: MixedBits,
    layer: Array | None = None,
    instructions: str | None = None,
) -> Array:
    """Call the kernel.

    Args:
        x: float32 [S, M, K].
        codes: packed, [S, N, bytes], or [L * S, N, bytes] with a layer, and so are the others.
        own: `ARRAYS`, [S, N or 1, columns] each.
        weight: format of the weight.
        layer: int32 scalar: which S matrices of the weight are read, clamped to those that there are.
        instructions: one of `ISAS`, or None for the best that the processor has; there is one for AVX-512, and a plain
            one.

    Returns:
        float32 [S, M, N].
    """
    strips = weight.strips(x.shape[-1])
    settings = {
        "strip": weight.strip,
        "narrow": strips.narrow,
        "wide": strips.wide,
        "aligned": weight.rule.aligned,
        "tile": weight.tile,
        "wide_group": weight.wide_group,
        "scale_bits": sum(bits << (4 * i) for i, bits in enumerate(weight.scale_bits)),
        "isa": -1 if instructions is None else ISAS.index(instructions),
    }
    return jax.ffi.ffi_call(MIXED, jax.ShapeDtypeStruct((*x.shape[:2], codes.shape[1]), jnp.float32))(
        *(x, codes, *own, numbered(layer)), **{name: np.int64(value) for name, value in settings.items()}
    )

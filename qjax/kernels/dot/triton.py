"""The lowering of products on NVIDIA's Ampere and Ada, by Triton kernels; it reads weights in neutral order.

With 16-bit activations by the kernel of `rows16`; with int8 activations, and float8 ones on Ada, by that of `rows8`. On
Hopper it runs too: there, packed weights have the kernels of `qjax.kernels.dot.mosaic`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array

from qjax.formats import Float8, Format, Int, QArray
from qjax.kernels.devices import cuda_processors
from qjax.kernels.dot.integer import LARGEST_SUM
from qjax.kernels.dot.reference import encoded
from qjax.kernels.dot.rows8 import rows8
from qjax.kernels.dot.rows16 import Cut, rows16
from qjax.kernels.dot.terms import in_matrices
from qjax.kernels.dot.triton_call import MOST_ELEMENTS, has_triton
from qjax.kernels.registry import Act, Problem, register_lowering
from qjax.kernels.tuned import Key, bucket, schedule_of

FIRST, FLOAT8_FIRST, LAST = (8, 0), (8, 9), (10, 0)
"""Compute capability from which on kernels compile, float8 compiles, and the choice is left to others."""

FEWEST_STEPS = 4
"""Steps that a part of a cut K has at least, so that its loads are under way."""

PROGRAMS = {16: 4, 32: 3, 64: 2, 128: 1}
"""Programs that a processor runs at once, by tokens of a tile: K is cut while there are fewer."""

FEW_TOKENS = 256
"""Tokens up to which a 4-bit or 8-bit weight is read more cheaply than it is dequantized for a float product. Above,
the library's product is hard to beat without wgmma, and one pass over the weight costs little beside it."""


def cut_for(weight: Format, act: Format | None, n: int, k: int, rows: int, matrices: int = 1) -> Cut:
    """Return how a product is cut; a rule of thumb until cuts are tuned on a device.

    Args:
        weight: format of the weight.
        act: format of the activations, or None.
        n: rows of the weight.
        k: its columns.
        rows: tokens.
        matrices: products of that size.
    """
    tokens = next((t for t in (16, 32, 64) if t >= rows), 128)
    large = tokens == 128
    columns = 64 if large or (act is None and weight.code_bits == 8) else 128
    if act is None and weight.groups(k) > 1:
        columns = next(c for c in (columns, 64, 32) if weight.group % c == 0)  # type: ignore[operator]
    columns = max(32, min(columns, 1 << (k - 1).bit_length()))
    tile = 128 if large else 64
    blocks = -(-n // tile) * -(-rows // tokens) * matrices
    steps = -(-k // columns)
    fits = [s for s in range(1, steps + 1) if steps % s == 0 and steps // s >= FEWEST_STEPS]
    splits = max([s for s in fits if s * blocks <= PROGRAMS[tokens] * cuda_processors()], default=1)
    return Cut(tile, tokens, columns, splits, warps=8 if large else 4, stages=3 if large else 4)


REVISIONS = {"rows16": 1, "rows8": 1}
"""Of each kernel; raised where a cut means another program, so that what was measured before is not taken."""


def _cut(problem: Problem, tokens: int) -> Cut:
    """How a product is cut: as was measured best on this device, else by `cut_for`."""
    weight, act, n, k = problem.weight, problem.act, problem.n, problem.k
    kernel = "rows8" if act else "rows16"
    formats = weight.name + (f" x {act.name}" if act else "")
    key = Key(kernel, REVISIONS[kernel], formats, problem.x_dtype.name, n, k, bucket(tokens), problem.matrices)

    def fits(cut: Cut) -> bool:
        whole = -(-k // cut.columns) % cut.splits == 0
        return whole and (act is not None or weight.groups(k) == 1 or weight.group % cut.columns == 0)  # type: ignore[operator]

    return schedule_of(key, cut_for(weight, act, n, k, tokens, problem.matrices), fits)


def _runs(problem: Problem) -> bool | str:
    if problem.capability is None:
        return "it is not known for which GPU is compiled (no CUDA device, no jax.sharding.AbstractDevice)"
    if problem.capability < FIRST:
        major, minor = problem.capability
        return f"it takes compute capability 8.0 (Ampere) or newer, and this device has {major}.{minor}"
    if not isinstance(problem.rows, int):
        return "the number of rows is not known when compiling"
    if problem.devices > 1:
        return f"the compiler would partition it over {problem.devices} devices; call it inside jax.shard_map"
    if problem.matrices * max(problem.n * problem.k, problem.rows * max(problem.n, problem.k)) > MOST_ELEMENTS:
        return "an operand has more than 2**31 elements, whose places Pallas miscounts"
    why = _refuses_floats(problem) if problem.act is None else _refuses_codes(problem, problem.act)
    return why or has_triton()


def _refuses_floats(problem: Problem) -> str | None:
    weight = problem.weight
    if not isinstance(weight, Int) or weight.bits not in (4, 8):
        return f"codes of {weight.name} weights are no integers of 4 or 8 bits"
    if weight.zero == "float":
        return f"zero points of {weight.name} lie between codes"
    if weight.groups(problem.k) > 1 and weight.group % 32:  # type: ignore[operator]
        return f"groups of {weight.group} columns are no multiple of 32"
    if problem.x_dtype not in (jnp.bfloat16, jnp.float16):
        return f"activations are {problem.x_dtype.name}; cast them to bfloat16 or float16"
    return None


def _refuses_codes(problem: Problem, act: Format) -> str | None:
    for fmt in (problem.weight, act):
        if fmt.per == "group":
            return f"{fmt.name} has a scale per group, which a product of codes would have to sum one by one"
    pair = (problem.weight, act)
    integers = all(isinstance(fmt, Int) and fmt.symmetric and fmt.bits == 8 for fmt in pair)
    floats = all(isinstance(fmt, Float8) and fmt.code_dtype == jnp.float8_e4m3fn for fmt in pair)
    if not integers and not floats:
        return f"{pair[0].name} x {act.name} is neither int8 x int8, both symmetric, nor float8_e4m3fn x float8_e4m3fn"
    if integers and problem.k > LARGEST_SUM:
        return f"a sum of {problem.k} products may overflow int32"
    if floats and problem.capability is not None and problem.capability < FLOAT8_FIRST:
        return "tensor cores multiply float8 from compute capability 8.9 (Ada) on"
    return None


def _worth(problem: Problem) -> bool | str:
    if problem.capability is not None and problem.capability >= LAST:
        return "it has been compiled for Ampere, Ada and Hopper alone; name it to run it here"
    if problem.act is not None:
        return "XLA's library has this product as well, and which is faster has not been measured"
    if problem.rows is not None and problem.rows > FEW_TOKENS:
        return f"more than {FEW_TOKENS} tokens, where a float product with the dequantized weight is expected to win"
    return True


@register_lowering(
    "dot",
    (Int, Float8),
    "cuda",
    when=_runs,
    worth=_worth,
    name="triton",
    priority=4,
    about="Triton on Ampere, Ada and Hopper: codes of 4 or 8 bits as they lie, with 16-bit activations; W8A8, if named",
    adds=True,
)
@in_matrices
def triton(problem: Problem, x: Array, w: QArray, act: Act | None, terms: Mapping[str, Array]) -> Array:
    """Return the product by the kernel."""
    count, n, k = problem.matrices, problem.n, problem.k
    tokens = math.prod(x.shape[len(problem.stack) : -1])
    cut = _cut(problem, tokens)
    codes = w.codes.reshape(count, n, -1)
    if act is not None:
        fmt, aux = act
        of_tokens = jnp.broadcast_to(fmt.scale_of(aux), (*x.shape[:-1], 1))
        of_rows = jnp.broadcast_to(w.fmt.scale_of(w.aux), (*problem.stack, n, 1))
        return rows8(
            codes,
            of_rows.reshape(count, n),
            encoded(x, act).reshape(count, tokens, k),
            of_tokens.reshape(count, tokens),
            out_dtype=problem.out_dtype,
            cut=cut,
            terms=terms,
        )
    assert isinstance(problem.weight, Int)
    scale, zero = (
        None if a is None else a.reshape(count, *a.shape[-2:]) for a in (w.fmt.scale_of(w.aux), w.fmt.zero_of(w.aux))
    )
    assert scale is not None
    x = x.reshape(count, tokens, k)
    return rows16(codes, scale, zero, x, fmt=problem.weight, out_dtype=problem.out_dtype, cut=cut, terms=terms)

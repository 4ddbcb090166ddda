"""The lowering of W4A8 on NVIDIA's Hopper: weights in the tiles of `CodeTiles`, int8 activations, by `codes4x8`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from jax import Array

from qjax.formats import CodeTiles, DualGrained, Int, Progressive, QArray
from qjax.kernels.dot.codes4x8 import codes4x8
from qjax.kernels.dot.hopper import STEP, WIDE
from qjax.kernels.dot.integer import LARGEST_SUM
from qjax.kernels.dot.mosaic import coded, on_hopper
from qjax.kernels.dot.schedules import Footprint, chosen
from qjax.kernels.dot.terms import in_matrices
from qjax.kernels.registry import Act, Problem, register_lowering


def footprint(fmt: CodeTiles) -> Footprint:
    """Return what the kernel holds of a step: codes, and levels or float32 scales."""
    numbers = (2 if fmt.leveled else 0) + (0 if fmt.whole_rows else 4)
    per_row = numbers * (STEP // fmt.block if fmt.block else 1)
    return Footprint(WIDE * (STEP // 2 + per_row), act=1, tall=True, one_sum=fmt.whole_rows)


def _refuses(problem: Problem) -> str | None:
    weight, act = problem.weight, problem.act
    if not isinstance(weight, CodeTiles):
        why = CodeTiles.cannot(weight, problem.k)
        return why or "the weight lies in neutral order; qjax.ops.pack(w, 'mosaic') makes the kernel's, once"
    if act is None:
        other = "; qjax.ops.pack(w, 'mosaic') is for them" if isinstance(weight.like, Int) else ""
        return f"activations are floats, and a weight in tiles for codes takes int8 ones{other}"
    if not (isinstance(act, Int) and act.bits == 8 and act.symmetric):
        return f"{act.name} activations are no symmetric int8 ones"
    if act.per == "group":
        return f"{act.name} activations have a scale per group, where one per token or tensor is needed"
    if weight.whole_rows and problem.k > LARGEST_SUM:
        return f"a sum of {problem.k} products may overflow int32"
    return None


@register_lowering(
    "dot",
    (CodeTiles, DualGrained, Progressive),
    "cuda",
    when=on_hopper(_refuses),
    name="mosaic",
    priority=5,
    about="wgmma on Hopper: 4-bit weights, packed for it, expanded to int8 in registers, with int8 activations",
    adds=True,
)
@in_matrices
def w4a8(problem: Problem, x: Array, w: QArray, act: Act | None, terms: Mapping[str, Array]) -> Array:
    """Return the product by the kernel."""
    assert act is not None and isinstance(problem.weight, CodeTiles)
    count, tokens = problem.matrices, math.prod(x.shape[len(problem.stack) : -1])
    codes, of_tokens = coded(problem, x, act)
    levels = w.aux.get("levels")
    return codes4x8(
        w.aux["tiles"].reshape(count, -1),
        None if levels is None else levels.reshape(count, -1),
        w.aux["scale"].reshape(count, -1),
        codes,
        of_tokens,
        fmt=problem.weight,
        n=problem.n,
        out_dtype=problem.out_dtype,
        schedule=chosen("codes4x8", problem, tokens, footprint(problem.weight)),
        terms=terms,
    )

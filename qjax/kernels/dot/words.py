"""The lowering of weight-only products on NVIDIA's Hopper by `words16`: codes of 2 and 4 bits, floats, trit-planes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array

from qjax.formats import MXFP4, NF4, NVFP4, Int, QArray, TritPlanes, TritTiles, WordTiles
from qjax.formats.word_tiles import Planes
from qjax.kernels.dot.hopper import STEP, WIDE
from qjax.kernels.dot.mosaic import on_hopper
from qjax.kernels.dot.schedules import Footprint, chosen
from qjax.kernels.dot.terms import in_matrices
from qjax.kernels.dot.words16 import words16
from qjax.kernels.registry import Act, Problem, register_lowering

ORDERS = (WordTiles, TritTiles)
"""What the kernel reads."""

NEUTRAL = (NF4, MXFP4, NVFP4, TritPlanes)
"""What has one of these orders, always."""


def footprint(fmt: Planes) -> Footprint:
    """Return what the kernel holds of a step: words, and float32 scales, 16-bit zero points and factors."""
    held = 0
    for plane in fmt.planes:
        numbers = (4 if plane.block else 0) + (2 if plane.zero else 0)
        per_row = numbers * (STEP // plane.block if plane.block else 1) + (2 * STEP // 16 if plane.factor else 0)
        held += WIDE * (STEP * plane.decoder.bits // 8 + per_row)
    alone = len(fmt.planes) == 1
    return Footprint(held, tall=True, one_sum=alone, rolling=alone and fmt.planes[0].block is not None)


def refuses_words(problem: Problem) -> str | None:
    """Return why a weight and 16-bit activations have no kernel of `words16`, or None."""
    weight = problem.weight
    if not isinstance(weight, Planes):
        kind = next(kind for kind in ORDERS if isinstance(weight, kind.takes))
        why = kind.cannot(weight, problem.k)
        return why or "the weight lies in neutral order; qjax.ops.pack(w, 'mosaic') makes the kernel's, once"
    if problem.act is not None:
        wanted = "pack(w, 'mosaic_int8')" if isinstance(weight.like, Int) and weight.like.bits == 4 else "neutral(w)"
        act = f"activations are quantized ({problem.act.name})"
        return f"{act}, and a weight in tiles takes 16-bit floats; qjax.ops.{wanted}"
    if problem.x_dtype not in (jnp.bfloat16, jnp.float16):
        return f"activations are {problem.x_dtype.name}; cast them to bfloat16 or float16"
    return None


@register_lowering(
    "dot",
    (*ORDERS, *NEUTRAL),
    "cuda",
    when=on_hopper(refuses_words),
    name="mosaic",
    priority=5,
    about="wgmma on Hopper: 2, 4 and 8 bits, float8, NF4, MXFP4, NVFP4, trits, packed for it, with 16-bit activations",
    adds=True,
)
@in_matrices
def words(problem: Problem, x: Array, w: QArray, act: Act | None, terms: Mapping[str, Array]) -> Array:
    """Return the product by the kernel."""
    assert isinstance(problem.weight, Planes)
    count, tokens = problem.matrices, math.prod(x.shape[len(problem.stack) : -1])
    return words16(
        {name: a.reshape(count, -1) for name, a in w.aux.items()},
        x.reshape(count, tokens, problem.k),
        planes=problem.weight.planes,
        n=problem.n,
        out_dtype=problem.out_dtype,
        schedule=chosen("words16", problem, tokens, footprint(problem.weight)),
        terms=terms,
    )

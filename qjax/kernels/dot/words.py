"""The lowering of weight-only products on NVIDIA's Hopper by `words16`: small floats, tables, 2 bits, trit-planes."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array

from qjax.formats import MXFP4, NF4, NVFP4, QArray, TritPlanes, TritTiles, WordTiles
from qjax.formats.word_tiles import Planes
from qjax.kernels.dot.mosaic import chosen, on_hopper
from qjax.kernels.dot.reference import dot_reference
from qjax.kernels.dot.words16 import words16
from qjax.kernels.registry import Act, Problem, register_lowering

ORDERS = (WordTiles, TritTiles)


def _refuses(problem: Problem) -> str | None:
    weight = problem.weight
    if not isinstance(weight, Planes):
        kind = next(kind for kind in ORDERS if isinstance(weight, kind.takes))
        why = kind.cannot(weight, problem.k)
        return why or "the weight lies in neutral order; qjax.ops.pack(w, 'mosaic') makes the kernel's, once"
    if problem.act is not None:
        return f"activations are quantized ({problem.act.name}), and a weight in tiles takes 16-bit floats"
    if problem.x_dtype not in (jnp.bfloat16, jnp.float16):
        return f"activations are {problem.x_dtype.name}; cast them to bfloat16 or float16"
    return None


@register_lowering(
    "dot",
    (*ORDERS, NF4, MXFP4, NVFP4, TritPlanes),
    "cuda",
    when=on_hopper(_refuses),
    name="mosaic",
    priority=5,
    about="wgmma on Hopper: float8, 4-bit floats, NF4, 2 bits and trit-planes, packed for it, with 16-bit activations",
)
def words(problem: Problem, x: Array, w: QArray, act: Act | None) -> Array:
    """Return the product by the kernel."""
    rows = x.shape[len(problem.stack) : -1]
    if x.size == 0 or not problem.n or not problem.matrices:
        return dot_reference(problem, x, w, act)
    assert isinstance(problem.weight, Planes)
    count, tokens = problem.matrices, math.prod(rows)
    y = words16(
        {name: a.reshape(count, -1) for name, a in w.aux.items()},
        x.reshape(count, tokens, problem.k),
        planes=problem.weight.planes,
        n=problem.n,
        out_dtype=problem.out_dtype,
        schedule=chosen("words16", problem, tokens),
    )
    return y.reshape(*problem.stack, *rows, problem.n)

"""The lowering of products with weights of 2-bit and 4-bit strips on NVIDIA's Hopper, by `mixed16`.

Corrections in FP16 are a second product, by XLA: number by number, each times the activations of its column, summed by
rows. That reads few bytes, and takes as long as there are tokens: beyond `MOST` the weight is dequantized.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array

from qjax.formats import MixedBits, MixedTiles, QArray
from qjax.formats.mixed_tiles import COLUMNS, QUADS
from qjax.formats.packing import unpack_bits
from qjax.kernels.dot.mixed16 import STAGES, mixed16
from qjax.kernels.dot.mosaic import chosen, on_hopper
from qjax.kernels.dot.reference import dot_reference
from qjax.kernels.registry import Act, Problem, register_lowering

MOST = 64
"""Tokens up to which corrections are added number by number. A guess: unmeasured."""


def _refuses(problem: Problem) -> str | None:
    weight = problem.weight
    if not isinstance(weight, MixedTiles):
        why = MixedTiles.cannot(weight, problem.k)
        return why or "the weight lies in neutral order; qjax.ops.pack(w, 'mosaic') makes the kernel's, once"
    if problem.act is not None:
        return f"activations are quantized ({problem.act.name}), and a weight in tiles takes 16-bit floats"
    if problem.x_dtype not in (jnp.bfloat16, jnp.float16):
        return f"activations are {problem.x_dtype.name}; cast them to bfloat16 or float16"
    if weight.like.outliers and problem.rows > MOST:  # type: ignore[operator] (known: on_hopper asked)
        return f"its FP16 corrections are added one by one, for up to {MOST} rows, and there are {problem.rows}"
    return None


@register_lowering(
    "dot",
    (MixedTiles, MixedBits),
    "cuda",
    when=on_hopper(_refuses),
    name="mosaic",
    priority=5,
    about="wgmma on Hopper: strips of 2 and 4 bits, packed for it, with 16-bit activations; FP16 corrections by XLA",
)
def mixed(problem: Problem, x: Array, w: QArray, act: Act | None) -> Array:
    """Return the product by the kernel."""
    rows = x.shape[len(problem.stack) : -1]
    if x.size == 0 or not problem.n or not problem.matrices:
        return dot_reference(problem, x, w, act)
    fmt = problem.weight
    assert isinstance(fmt, MixedTiles)
    count, tokens = problem.matrices, math.prod(rows)
    aux = {name: a.reshape(count, -1) for name, a in w.aux.items()}
    x = x.reshape(count, tokens, problem.k)
    schedule = chosen("mixed16", problem, tokens, STAGES)
    splits = math.gcd(schedule.splits, fmt.padded_length // COLUMNS)  # a step has twice the columns of other kernels'
    sparse = "outlier_value" in aux
    y = mixed16(
        aux["tiles"],
        aux["unit"],
        which(fmt, aux["strips"]),
        x,
        bits=fmt.like.scale_bits,
        n=problem.n,
        out_dtype=jnp.float32 if sparse else problem.out_dtype,
        schedule=dataclasses.replace(schedule, splits=splits),
    )
    if sparse:
        y = (y + corrections(aux, x, problem.n)).astype(problem.out_dtype)
    return y.reshape(*problem.stack, *rows, problem.n)


def which(fmt: MixedTiles, strips: Array) -> Array:
    """Return which strip of each quad is 4-bit, uint8 [E, K'/64], of the map as it is stored, uint8 [E, bytes]."""
    quads = fmt.like.strips(fmt.length).wide
    known = unpack_bits(strips, 2, quads, signed=False)
    return jnp.pad(known, ((0, 0), (0, fmt.padded_length // COLUMNS * QUADS - quads)))


def corrections(aux: dict[str, Array], x: Array, n: int) -> Array:
    """Return the products of the FP16 corrections, float32 [E, M, N].

    Args:
        aux: of the weight, [E, anything] each.
        x: [E, M, K].
        n: N.
    """

    def one(values: Array, columns: Array, at: Array, unit: Array, x: Array) -> Array:
        terms = jnp.take(x.T, columns.astype(jnp.int32), axis=0, mode="clip").astype(jnp.float32)
        terms = terms * (values.astype(jnp.float32) * unit[0])[:, None]
        return jax.ops.segment_sum(terms, at.astype(jnp.int32), n, indices_are_sorted=True).T

    return jax.vmap(one)(aux["outlier_value"], aux["outlier_column"], aux["outlier_at"], aux["unit"], x)

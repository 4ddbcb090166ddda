"""The lowering of products with weights of 2-bit and 4-bit strips on NVIDIA's Hopper, by `mixed16`.

Corrections in FP16 are a second product, by XLA. Up to `MOST` tokens number by number, each times the activations of
its column, summed by rows: few bytes, and work that grows with tokens and that no tensor core does. Beyond, they are
put into a matrix of zeros in the dtype of the activations (in units of the weight, where float16 holds them exactly)
and multiplied as any matrix.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from qjax.formats import MixedBits, MixedTiles, QArray
from qjax.kernels.dot.mixed16 import FOOTPRINT, mixed16
from qjax.kernels.dot.mosaic import on_hopper
from qjax.kernels.dot.reference import dot_reference
from qjax.kernels.dot.schedules import chosen
from qjax.kernels.registry import Act, Problem, register_lowering

MOST = 64
"""Tokens up to which corrections are added number by number. A guess, unmeasured."""


def _refuses(problem: Problem) -> str | None:
    weight = problem.weight
    if not isinstance(weight, MixedTiles):
        why = MixedTiles.cannot(weight, problem.k)
        return why or "the weight lies in neutral order; qjax.ops.pack(w, 'mosaic') makes the kernel's, once"
    if problem.act is not None:
        return f"activations are quantized ({problem.act.name}), and a weight in tiles takes 16-bit floats"
    if problem.x_dtype not in (jnp.bfloat16, jnp.float16):
        return f"activations are {problem.x_dtype.name}; cast them to bfloat16 or float16"
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
    sparse = "outlier_value" in aux
    y = mixed16(
        aux,
        x,
        fmt=fmt,
        n=problem.n,
        out_dtype=jnp.float32 if sparse else problem.out_dtype,
        schedule=chosen("mixed16", problem, tokens, FOOTPRINT),
    )
    if sparse:
        y = (y + corrections(aux, x, problem.n)).astype(problem.out_dtype)
    return y.reshape(*problem.stack, *rows, problem.n)


def corrections(aux: dict[str, Array], x: Array, n: int) -> Array:
    """Return the products of the FP16 corrections, float32 [E, M, N].

    Args:
        aux: of the weight, [E, anything] each.
        x: [E, M, K].
        n: N.
    """
    tokens, length = x.shape[1:]

    def by_number(values: Array, columns: Array, at: Array, x: Array) -> Array:
        terms = jnp.take(x.T, columns, axis=0, mode="clip").astype(jnp.float32) * values.astype(jnp.float32)[:, None]
        return jax.ops.segment_sum(terms, at, n, indices_are_sorted=True).T

    def by_matrix(values: Array, columns: Array, at: Array, x: Array) -> Array:
        there = jnp.zeros((n, length), x.dtype).at[at, columns]
        matrix = there.set(values.astype(x.dtype), indices_are_sorted=True, unique_indices=True)
        return lax.dot_general(x, matrix, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    columns, at = (aux[name].astype(jnp.int32) for name in ("outlier_column", "outlier_at"))
    y = jax.vmap(by_number if tokens <= MOST else by_matrix)(aux["outlier_value"], columns, at, x)
    return y * aux["unit"][:, :1, None]

"""The oracle of quantized products, in plain jnp and written from the equation.

With x [*stack, *rows, K], codes of W [*stack, N, K] and, where the activations are quantized, their aux:

    W~[n, k] = decode(codes, aux)[n, k]
    x~[r, k] = x[r, k]                       or   decode_act(encode_act(x, act_aux), act_aux)[r, k]
    y[r, n]  = sum over k of x~[r, k] * W~[n, k]        ("dot")
    y[r, k]  = sum over n of x[r, n] * W~[n, k]         ("dot_transposed", the gradient of dot with respect to x)

Weight-only products are formed in the dtype of x, exactly as the original product would be with the dequantized
weight in its place; those of quantized activations in float32 (float64 for float64 x). Sums are accumulated in
float32 at least, and rounded once to the dtype of the result.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from qjax.formats import QArray
from qjax.kernels.registry import Act, Problem, register_lowering

Precision = Any

CODES = "codes"
"""In the aux of activations: their codes, where they are known already."""


def wide(dtype: DTypeLike) -> jnp.dtype:
    """Return the dtype in which products with this dtype are accumulated: float32, or float64 for float64."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def contract(
    x: Array, w: Array, *, transposed: bool, out_dtype: DTypeLike, precision: Precision = None, out_sharding: Any = None
) -> Array:
    """Return the float product of x [*stack, *rows, K], or [*stack, *rows, N] if transposed, and w [*stack, N, K]."""
    stacks = w.ndim - 2
    batch = tuple(range(stacks))
    dims = (((x.ndim - 1,), (stacks if transposed else stacks + 1,)), (batch, batch))
    y = lax.dot_general(
        x, w, dims, precision=precision, preferred_element_type=wide(x.dtype), out_sharding=out_sharding
    )
    return y.astype(out_dtype)


def decoded(w: QArray, dtype: DTypeLike) -> Array:
    """Return the canonical weight as floats: [*stack, N, K]."""
    return w.fmt.decode(w.unpacked(), w.aux).astype(dtype)


def encoded(x: Array, act: Act) -> Array:
    """Return the codes of activations, of the shape of x: those that came with their aux, or new ones."""
    fmt, aux = act
    if CODES in aux:
        return jnp.broadcast_to(jnp.asarray(aux[CODES]), x.shape)
    return fmt.encode(x, aux)


def round_trip(x: Array, act: Act) -> Array:
    """Return what the quantized activations stand for, in float32 (float64 for float64 x).

    The codes carry no derivative; that of the aux passes through, so that scales can be learned.
    """
    fmt, aux = act
    codes = lax.stop_gradient(encoded(lax.stop_gradient(x), act))
    return fmt.decode(codes, aux).astype(wide(x.dtype))


@register_lowering("dot", name="reference", priority=-1, about="the oracle: dequantize, then a float dot")
@register_lowering("dot_transposed", name="reference", priority=-1, about="the oracle: dequantize, then a float dot")
def dot_reference(problem: Problem, x: Array, w: QArray, act: Act | None) -> Array:
    """Return the product as the module's equation says it."""
    if act is not None:
        x = round_trip(x, act)
    return contract(
        x,
        decoded(w, x.dtype),
        transposed=problem.op == "dot_transposed",
        out_dtype=problem.out_dtype,
        precision=problem.settings.precision if problem.settings else None,
        out_sharding=problem.settings.out_sharding if problem.settings else None,
    )

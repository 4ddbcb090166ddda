"""W8A8 as a Triton kernel: products of int8 or float8_e4m3fn codes, scaled per row and per token.

    total[n, m] = sum over k of w[n, k] * x[m, k]          on the tensor cores, in int32 exactly, or in float32
    y[m, n]     = total[n, m] * w_scale[n] * x_scale[m]

Rows of both operands lie along K, as tensor cores want bytes, so weights are read in neutral order. Where K is cut, the
parts of an integer product are added as integers. Reads behind the last row, token or column are masked, and nothing is
padded. For NVIDIA's Ampere (int8) and Ada (both); it runs on newer ones too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from qjax.kernels.dot.rows16 import Cut, both, inside, inside_and_after, place, plus, read, write
from qjax.kernels.dot.terms import with_terms
from qjax.kernels.dot.triton_call import TritonKernel, pallas_triton


def rows8(
    w: Array,
    w_scale: Array,
    x: Array,
    x_scale: Array,
    *,
    out_dtype: Any,
    cut: Cut,
    terms: Mapping[str, Array] = {},
    interpret: bool = False,
) -> Array:
    """Multiply a stack of codes of activations by a stack of codes of weights, and scale.

    Args:
        w: int8 or float8_e4m3fn [E, N, K].
        w_scale: float32 [E, N].
        x: [E, M, K] of the dtype of w, M at least 1.
        x_scale: float32 [E, M].
        out_dtype: dtype of the result.
        cut: how the work is cut.
        terms: what is added before the result is rounded: "bias" [E, N], "residual" [E, M, N].
        interpret: whether Pallas' interpreter runs it, for tests.

    Returns:
        [E, M, N].
    """
    count, tokens, length = x.shape
    n = w.shape[1]
    steps = -(-length // cut.columns)
    assert steps % cut.splits == 0
    sums = jnp.dtype(jnp.int32 if w.dtype == jnp.int8 else jnp.float32)
    name, dtype = f"w8a8_{jnp.dtype(w.dtype).name}", w.dtype
    w, x = (lax.bitcast_convert_type(a, jnp.int8) for a in (w, x))  # Pallas cannot say zero in float8 behind a mask
    whole = cut.splits == 1
    names, late = inside_and_after(terms, cut)
    kernel = TritonKernel(
        _body(cut, count, n, tokens, length, dtype, sums, steps // cut.splits, names),
        name,
        jax.ShapeDtypeStruct((cut.splits * count, tokens, n), jnp.dtype(out_dtype) if whole else sums),
        (-(-tokens // cut.tokens) * -(-n // cut.rows), cut.splits, count),
        cut.warps,
        cut.stages,
        interpret,
    )
    if whole:
        return kernel(w, x, w_scale, x_scale, *(terms[name] for name in names))
    y = jnp.sum(kernel(w, x).reshape(cut.splits, count, tokens, n), axis=0).astype(jnp.float32)
    return with_terms(y * w_scale[:, None, :] * x_scale[:, :, None], late, out_dtype)


def _body(
    cut: Cut, count: int, n: int, tokens: int, length: int, dtype: Any, sums: Any, steps: int, names: Sequence[str]
) -> Any:
    pl = pallas_triton()[0]

    def body(w: Any, x: Any, *rest: Any) -> None:
        *scales, y = rest
        scales, terms = scales[: len(scales) - len(names)], scales[len(scales) - len(names) :]
        rows, places = place(cut, n, tokens)
        part, e = pl.program_id(1), pl.program_id(2)
        in_rows, in_tokens = inside(rows, n, cut.rows), inside(places, tokens, cut.tokens)

        def step(s: Any, total: Array) -> Array:
            columns = (part * steps + s) * cut.columns + jnp.arange(cut.columns)
            in_length = inside(columns, length, cut.columns)
            w_tile = read(w.at[e, rows[:, None], columns[None, :]], both(in_rows, in_length))
            x_tile = read(x.at[e, places[:, None], columns[None, :]], both(in_tokens, in_length))
            w_tile, x_tile = (lax.bitcast_convert_type(a, dtype) for a in (w_tile, x_tile))
            dims = (((1,), (1,)), ((), ()))
            return total + lax.dot_general(w_tile, x_tile, dims, preferred_element_type=sums)

        total = lax.fori_loop(0, steps, step, jnp.zeros((cut.rows, cut.tokens), sums))
        if scales:
            of_rows, of_tokens = read(scales[0].at[e, rows], in_rows), read(scales[1].at[e, places], in_tokens)
            total = total.astype(jnp.float32) * of_rows[:, None] * of_tokens[None, :]
            total = plus(total, names, terms, e, rows, places, in_rows, in_tokens)
        write(y.at[part * count + e, places[None, :], rows[:, None]], total.astype(y.dtype), both(in_rows, in_tokens))

    return body

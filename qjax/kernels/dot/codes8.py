"""W8A8 on the tensor cores of NVIDIA's Hopper: products of int8 or float8_e4m3fn codes, scaled per row and per token.

    part[n, m]  = sum over k in a step of 128 of w[n, k] * x[m, k]         on the tensor cores, in int32 or float32
    total[n, m] = sum over steps of part[n, m]                             exactly, or in float32 on ordinary cores
    y[m, n]     = total[n, m] * w_scale[n] * x_scale[m]

Adding steps outside the tensor cores is what keeps float8 exact enough: inside, sums of float8 products keep about 14
bits. Codes lie in neutral order, rows of bytes, and TMA brings them as they are, so weights need no packing. Blocks of
threads, ring and cut of K are those of `hopper`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from qjax.formats.tiles import ROWS
from qjax.kernels.dot.endings import Ending
from qjax.kernels.dot.hopper import (
    STEP,
    WIDE,
    Place,
    Schedule,
    Work,
    added,
    hopper_kernel,
    in_cells,
    load,
    pallas,
    tiling,
    turned,
    written,
)


def codes8(
    w: Array,
    w_scale: Array,
    x: Array,
    x_scale: Array,
    *,
    out_dtype: Any,
    schedule: Schedule,
    terms: Mapping[str, Array] = {},
    interpret: Any = None,
) -> Array:
    """Multiply a stack of codes of activations by a stack of codes of weights, and scale.

    Args:
        w: int8 or float8_e4m3fn [E, N, K]; N and K multiples of 128.
        w_scale: float32 [E, N].
        x: [E, M, K] of the dtype of w, M at least 1.
        x_scale: float32 [E, M].
        out_dtype: dtype of the result.
        schedule: how the work is cut.
        terms: what is added (`Ending`).
        interpret: settings of the interpreter, for tests.

    Returns:
        [E, M, N].
    """
    count, tokens, k = x.shape
    n = w.shape[1]
    x = in_cells(x, k)
    cut = schedule.splits > 1
    out = written(x, count, n, n, out_dtype, schedule)
    ending = Ending(terms, out_dtype, schedule)
    call = _kernel(out, x.dtype, k, schedule, ending.inside, interpret)
    rows = w.reshape(count * n, k)
    if not cut:
        # Scales of whole tiles, so that none is read from behind the last token.
        padded = jnp.pad(x_scale, ((0, 0), (0, -tokens % schedule.tokens)))
        return ending.finished(call(rows, x, w_scale, padded, *ending.operands(out, n))[:, :tokens])
    y = added(call(rows, x), schedule)[:, :tokens]
    return ending.finished(y * w_scale[:, None, :] * x_scale[:, :, None])


def _kernel(
    out: jax.ShapeDtypeStruct, dtype: Any, k: int, schedule: Schedule, terms: Sequence[str], interpret: Any
) -> Any:
    pl, plgpu = pallas()
    layouts, tile, n = plgpu.Layout, schedule.tokens, out.shape[2]
    steps = k // STEP // schedule.splits
    sums = jnp.dtype(jnp.int32 if dtype == jnp.int8 else jnp.float32)
    cells = tiling(STEP, 8)

    def work(at: Place, w: Any, x: Any, *scales: Any) -> Work:
        def step(_: Any, w_s: Any, x_s: Any, totals: tuple[Array]) -> tuple[Array]:
            def product(acc: Any) -> Array:
                plgpu.wgmma(acc, w_s.at[at.own()], turned(x_s))
                plgpu.wgmma_wait(0)
                return acc[...]

            return (totals[0] + pl.run_scoped(product, plgpu.ACC((ROWS, tile), sums)),)

        def finish(totals: tuple[Array, ...], _: int) -> Array:
            total = totals[0].astype(jnp.float32)
            if not scales:
                return total
            of_rows = load(scales[0].at[at.matrix, at.own_of_matrix()], layouts.WGMMA.reduce(1))
            of_tokens = load(scales[1].at[at.matrix, pl.ds(at.tokens * tile, tile)], layouts.WGMMA.reduce(0))
            total = total * lax.broadcast_in_dim(of_rows, total.shape, (0,))
            return total * lax.broadcast_in_dim(of_tokens, total.shape, (1,))

        above = at.matrix * (n // WIDE)
        of_w = plgpu.BlockSpec((WIDE, STEP), lambda k: (above + at.rows, at.part * steps + k), transforms=cells)
        of_x = plgpu.BlockSpec((tile, STEP), lambda k: (at.tokens, at.part * steps + k), transforms=cells)
        return Work(step, finish, [(w, of_w), (x.at[at.matrix], of_x)])

    how = {"schedule": schedule, "terms": terms, "interpret": interpret}
    return hopper_kernel(work, out, rows=n, steps=steps, sums=sums, **how)

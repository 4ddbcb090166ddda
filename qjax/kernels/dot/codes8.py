"""W8A8 on the tensor cores of NVIDIA's Hopper: products of int8 or float8_e4m3fn codes, scaled per row and per token.

    part[n, m]  = sum over k in a step of 128 of w[n, k] * x[m, k]         on the tensor cores, in int32 or float32
    total[n, m] = sum over steps of part[n, m]                             exactly, or in float32 on ordinary cores
    y[m, n]     = total[n, m] * w_scale[n] * x_scale[m]

Adding steps outside the tensor cores is what keeps float8 exact enough: inside, sums of float8 products keep about 14
bits. Codes lie in neutral order, rows of bytes, and TMA brings them as they are, so weights need no packing. Transposed
for the same reason as in `tiles16`: tokens are the narrow side. Blocks of threads, ring and cut of K are as there.
"""

from __future__ import annotations

import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from qjax._compat import JAX_VERSION
from qjax.kernels.dot.tiles16 import ROWS, STEP, WARPGROUPS, Schedule, tiling


def codes8(
    w: Array,
    w_scale: Array,
    x: Array,
    x_scale: Array,
    *,
    out_dtype: Any,
    schedule: Schedule,
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
        interpret: settings of the interpreter, for tests.

    Returns:
        [E, M, N].
    """
    count, tokens, k = x.shape
    n = w.shape[1]
    below = -tokens % 8 if tokens > 8 else 0  # cells of TMA
    x = jnp.pad(x, ((0, 0), (0, below), (0, 0))) if below else x
    cut = schedule.splits > 1
    partial = jnp.dtype(jnp.float32 if cut or jnp.dtype(out_dtype).itemsize != 2 else out_dtype)
    out = jax.ShapeDtypeStruct((schedule.splits * count, x.shape[1], n), partial)
    call = _kernel(out, x.dtype, k, schedule, interpret)
    rows = w.reshape(count * n, k)
    if not cut:
        # Scales of whole tiles, so that none is read from behind the last token.
        padded = jnp.pad(x_scale, ((0, 0), (0, -tokens % schedule.tokens)))
        return call(rows, x, w_scale, padded)[:, :tokens].astype(out_dtype)
    y = jnp.sum(call(rows, x).reshape(schedule.splits, count, *out.shape[1:]), axis=0)[:, :tokens]
    return (y * w_scale[:, None, :] * x_scale[:, :, None]).astype(out_dtype)


def _kernel(out: jax.ShapeDtypeStruct, dtype: Any, k: int, schedule: Schedule, interpret: Any) -> Any:
    pl: Any = importlib.import_module("jax.experimental.pallas")
    plgpu: Any = importlib.import_module("jax.experimental.pallas.mosaic_gpu")
    layouts = plgpu.Layout
    tile = schedule.tokens
    steps = k // STEP // schedule.splits
    wide = WARPGROUPS * ROWS
    count, tokens, n = out.shape[0] // schedule.splits, out.shape[1], out.shape[2]
    out_bits = out.dtype.itemsize * 8
    sums = jnp.dtype(jnp.int32 if dtype == jnp.int8 else jnp.float32)

    def load(ref: Any, layout: Any) -> Array:
        where = (ref,) if JAX_VERSION >= (0, 11) else (ref, ())
        return plgpu.load(*where, layout=layout, optimized=False)

    def turned(ref: Any) -> Any:
        return ref.T if JAX_VERSION >= (0, 11) else plgpu.transpose_ref(ref, (1, 0))

    def body(w: Any, x: Any, *rest: Any) -> None:
        *scales, y, y_tile = rest
        group = lax.axis_index("warpgroup")
        e, i, j, part = (lax.axis_index(name) for name in ("matrix", "rows", "tokens", "part"))

        def step(_: Any, w_s: Any, x_s: Any, total: Array) -> Array:
            def product(acc: Any) -> Array:
                plgpu.wgmma(acc, w_s.at[pl.ds(group * ROWS, ROWS)], turned(x_s))
                plgpu.wgmma_wait(0)
                return acc[...]

            return total + pl.run_scoped(product, plgpu.ACC((ROWS, tile), sums))

        def around(pipeline: Any) -> None:
            total = pipeline(plgpu.layout_cast(jnp.zeros((ROWS, tile), sums), layouts.WGMMA))
            total = total.astype(jnp.float32)
            if scales:
                of_rows = load(scales[0].at[e, pl.ds(i * wide + group * ROWS, ROWS)], layouts.WGMMA.reduce(1))
                of_tokens = load(scales[1].at[e, pl.ds(j * tile, tile)], layouts.WGMMA.reduce(0))
                total = total * lax.broadcast_in_dim(of_rows, total.shape, (0,))
                total = total * lax.broadcast_in_dim(of_tokens, total.shape, (1,))
            total = total.astype(out.dtype)
            if out_bits == 32 or JAX_VERSION < (0, 11):  # others are turned as they are stored
                total = plgpu.layout_cast(total, layouts.WGMMA_TRANSPOSED)
            turned(y_tile.at[group])[...] = total
            plgpu.commit_smem()
            there = y.at[part * count + e, pl.ds(j * tile, tile), pl.ds(i * wide + group * ROWS, ROWS)]
            plgpu.copy_smem_to_gmem(y_tile.at[group], there)
            plgpu.wait_smem_to_gmem(0)

        above = e * (n // wide)
        cells = tiling(plgpu, STEP, 8)
        plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(steps,),
            wg_axis="warpgroup",
            num_compute_wgs=WARPGROUPS,
            memory_registers=40,
            max_concurrent_steps=min(schedule.stages, steps),
            compute_context=around,
            in_specs=[
                plgpu.BlockSpec((wide, STEP), lambda k: (above + i, part * steps + k), transforms=cells),
                plgpu.BlockSpec((tile, STEP), lambda k: (j, part * steps + k), transforms=cells),
            ],
        )(w, x.at[e])

    return plgpu.kernel(
        body,
        out_type=out,
        grid=(n // wide, -(-tokens // tile), schedule.splits, count),
        grid_names=("rows", "tokens", "part", "matrix"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((WARPGROUPS, tile, ROWS), out.dtype, transforms=tiling(plgpu, 1024 // out_bits, out_bits))
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **({} if interpret is None else {"interpret": interpret}),
    )

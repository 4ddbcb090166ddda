"""W8A16 on the tensor cores of NVIDIA's Hopper: 8-bit integers in tiles, 16-bit activations.

The quantized operand is the left one of `wgmma`, which may come from registers, so the product is formed transposed,

    part[n, m]  = sum over k in block of (code[n, k] - zero[n, block]) * x[m, k]       on the tensor cores, in float32
    total[n, m] = sum over blocks of scale[n, block] * part[n, m]
    y[m, n]     = total[n, m]

with whole numbers on the left side: a code less its zero point is exact in bfloat16 and float16, and scales stay in
float32, so the weight is never rounded. Blocks of threads, ring and cut of K are those of `hopper`. Weights of 2 and 4
bits have a kernel of their own (`words16`).

Structure after the public descriptions of Marlin (arXiv:2408.11743) and Machete.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from qjax.formats.tiles import OFFSET, ROWS, IntTiles, rounded_up
from qjax.kernels.dot.endings import Ending
from qjax.kernels.dot.hopper import (
    STEP,
    WARPGROUPS,
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


def tiles16(
    tiles: Array,
    scale: Array,
    zero: Array | None,
    x: Array,
    *,
    fmt: IntTiles,
    n: int,
    out_dtype: Any,
    schedule: Schedule,
    terms: Mapping[str, Array] = {},
    interpret: Any = None,
) -> Array:
    """Multiply a stack of activations by a stack of weights in tiles.

    Args:
        tiles: int8 [E, N' K'], as `IntTiles` orders them; E matrices.
        scale: float32 [E, G N'].
        zero: bfloat16 [E, G N'], or None.
        x: bfloat16 or float16 [E, M, K], M at least 1.
        fmt: the format of the weight.
        n: N, rows of a matrix.
        out_dtype: dtype of the result.
        schedule: how the work is cut.
        terms: what is added (`Ending`).
        interpret: settings of the interpreter, for tests.

    Returns:
        [E, M, N].
    """
    count, tokens, length = x.shape
    rows, columns = rounded_up(n), fmt.columns
    x = in_cells(x, -(-length // columns) * columns)  # the weight was padded when it was packed
    operands = in_tiles(tiles, scale, zero, fmt, rows)
    out = written(x, count, n, rows, out_dtype, schedule)
    ending = Ending(terms, out_dtype, schedule)
    how = {"terms": ending.inside, "interpret": interpret}
    call = tiles16_kernel(out, x.dtype, fmt, rows, schedule, zero is not None, **how)
    y = call(*operands, x, *ending.operands(out, rows))
    return ending.finished(added(y, schedule)[:, :tokens, :n])


def in_tiles(tiles: Array, scale: Array, zero: Array | None, fmt: IntTiles, rows: int) -> list[Array]:
    """Return the arrays of a stack of weights as the kernel takes them, with ``rows`` padded to whole tiles."""
    count, columns = tiles.shape[0], fmt.columns
    cells = tiles.reshape(count * rows // ROWS, fmt.padded_length // columns, ROWS, columns)
    numbers = [a.reshape(count, fmt.blocks, rows) for a in (scale, zero) if a is not None]
    return [cells, *numbers]


def tiles16_kernel(
    out: jax.ShapeDtypeStruct,
    dtype: Any,
    fmt: IntTiles,
    rows: int,
    schedule: Schedule,
    zeros: bool,
    *,
    tiles: int = 0,
    terms: Sequence[str] = (),
    interpret: Any = None,
) -> Any:
    """Return the kernel itself, on the arrays of `in_tiles` and activations [E, M', K'].

    Args:
        out: [splits E, M', N or N'] and its dtype.
        dtype: of the activations.
        fmt: the format of the weight.
        rows: N'.
        schedule: how the work is cut.
        zeros: whether there are zero points.
        tiles: where a table says which matrix a tile of tokens meets, its rows (`hopper_kernel`); then the activations
            are [1, M', K'] and the result is [splits, M', ...].
        terms: what the last operands are (`hopper_kernel`).
        interpret: settings of the interpreter, for tests.
    """
    pl, plgpu = pallas()
    layouts = plgpu.Layout
    tile, columns, block = schedule.tokens, fmt.columns, fmt.block or STEP
    steps = fmt.padded_length // STEP // schedule.splits
    blocks = STEP // block  # of scales in a step
    per_row = fmt.block is None

    def over_rows(numbers: Array, shape: tuple[int, ...]) -> Array:
        return lax.broadcast_in_dim(numbers, shape, (0,))

    def work(place: Place, cells: Any, scale: Any, *rest: Any) -> Work:
        *zero, x = rest
        group, e, i, j, part, first, _ = place
        own = place.own()

        def weights(w_s: Any, z_s: Any, at: int) -> Array:
            """Cells as 16-bit numbers in the registers of the left operand, [64, columns]."""
            # The relayout comes before the cast, while codes move two to a register.
            codes = plgpu.layout_cast(load(w_s.at[group, at], layouts.WGMMA_UPCAST_2X), layouts.WGMMA)
            numbers, base = codes, 0
            if dtype == jnp.bfloat16:
                numbers = codes.astype(dtype)
            else:  # jax converts each code to float16 by itself; as last bits of 1024 they go two at once
                bits = (codes ^ jnp.int8(-128)).astype(jnp.int16) & jnp.int16(0xFF) | jnp.int16(0x6400)
                numbers, base = lax.bitcast_convert_type(bits, dtype), 1024 + OFFSET
            if z_s is None:
                return numbers - jnp.asarray(base, dtype) if base else numbers
            z = load(z_s.at[0 if per_row else at * columns // block, own], layouts.WGMMA.reduce(1))
            z = (z.astype(jnp.float32) + base).astype(dtype)
            return numbers - over_rows(z, numbers.shape)

        def step(_: Any, w_s: Any, *rest: Any) -> tuple[Array]:
            numbers: list[Any]
            *numbers, x_s, (total,) = rest
            z_s = numbers[-1] if zeros else None

            def product(first: int, acc: Any) -> Array:
                for at in range(first, first + block // columns):
                    w = weights(w_s, z_s, at)
                    plgpu.wgmma(acc, w, turned(x_s.at[:, pl.ds(at * columns, columns)]))
                plgpu.wgmma_wait(0)
                return acc[...]

            for b in range(blocks):
                sums = functools.partial(product, b * block // columns)
                sums = pl.run_scoped(sums, plgpu.ACC((ROWS, tile), jnp.float32))
                if not per_row:
                    sums = sums * over_rows(load(numbers[0].at[b, own], layouts.WGMMA.reduce(1)), sums.shape)
                total = total + sums
            # The slot was read by ordinary loads and is refilled by TMA: two proxies, which a fence orders.
            plgpu.commit_smem()
            return (total,)

        def finish(totals: tuple[Array, ...], _: int) -> Array:
            total = totals[0]
            if per_row:
                total = total * over_rows(
                    load(scale.at[e, 0, place.own_of_matrix()], layouts.WGMMA.reduce(1)), total.shape
                )
            return total

        above = e * (rows // WIDE)
        # A scale per row is read at the end, and the ring carries none; its zero point is the same at every step.
        numbers = [*([] if per_row else [scale]), *zero]
        number_spec = plgpu.BlockSpec((blocks, WIDE), lambda k: (0 * k if per_row else part * steps + k, i))
        cells_shape = (WARPGROUPS, STEP // columns, ROWS, columns)
        cells_spec = plgpu.BlockSpec(cells_shape, lambda k: (above + i, part * steps + k, 0, 0))
        where, of_tokens, start = (e, tile, j) if first is None else (0, pl.Element(tile), first)
        x_spec = plgpu.BlockSpec((of_tokens, STEP), lambda k: (start, part * steps + k), transforms=tiling(columns, 16))
        ring = [(cells, cells_spec), *((a.at[e], number_spec) for a in numbers), (x.at[where], x_spec)]
        return Work(step, finish, ring)

    how = {"schedule": schedule, "tiles": tiles, "terms": terms, "interpret": interpret}
    return hopper_kernel(work, out, rows=rows, steps=steps, sums=jnp.float32, **how)

"""Attention with log-coded probabilities on NVIDIA's Hopper: a block of threads takes 64 queries of a head.

The scores of its queries and the values of the head come into shared memory once, in tiles of 64 keys, and stay there
for both passes: the first finds maxima and sums of the rows, the second makes of each score the number of its code,
2**-E * M in bfloat16, which is the left operand of `wgmma` from registers and meets the tile of values. That number is
chosen by a chain of comparisons with the bounds of the format, so no code is looked up in memory.

Both operands are exact (`qjax.kernels.log_attention.lookup`). The reciprocal of a sum is taken once a row, where the
oracle divides: a number on the edge between two codes may fall to the other side.

Written for one source on jax 0.10 and newer.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qjax.formats.log import Log, denominator
from qjax.kernels.dot.hopper import load, pallas, tiling

QUERIES = 64
"""Rows of scores that a warpgroup multiplies at once."""

KEYS = 64
"""Columns of scores in a tile."""

MEMORY = 224 * 1024
"""Bytes of shared memory that scores and values of a block may take."""

CHANNELS = 256
"""Most channels of a head: columns of one `wgmma`."""


def padded_channels(channels: int) -> int:
    """Return so many channels that tiles of values are swizzled cells: 32, or a multiple of 64."""
    return 32 if channels <= 32 else -(-channels // 64) * 64


def memory(keys: int, channels: int, bits: int) -> int:
    """Return the bytes of shared memory that scores of so many bits and values in 16 bits take, with the result."""
    length, width = -(-keys // KEYS) * KEYS, padded_channels(channels)
    return length * (QUERIES * bits // 8 + 2 * width) + 4 * QUERIES * width


def levels(fmt: Log) -> tuple[np.ndarray, np.ndarray]:
    """Return the bounds of a format, and the numbers 2**-E * M above the first, between them and below the last."""
    shifts, numerators, _ = fmt.tables()
    numbers = np.ldexp(numerators.astype(np.float64), -shifts)[: fmt.levels]
    numbers = np.append(numbers, 0.0) if fmt.zero_code is not None else numbers
    bounds = fmt.bounds()
    return bounds, numbers[: len(bounds) + 1].astype(np.float32)


def attend(scores: Array, numbers: Array, *, fmt: Log, interpret: Any = None) -> Array:
    """Return D times the product of the probabilities' numbers and those of the values.

    Args:
        scores: bfloat16, float16 or float32 [E, M, N].
        numbers: codes of the values less their zero point, bfloat16 [E, N, D].
        fmt: of the probabilities, up to `qjax.kernels.log_attention.lookup.MOST_BITS` bits.
        interpret: settings of the interpreter, for tests.

    Returns:
        float32 [E, M, D]; to be divided by the denominator of the format.
    """
    pl, plgpu = pallas()
    count, rows, keys = scores.shape
    channels = numbers.shape[-1]
    tall, long, width = -rows % QUERIES, -keys % KEYS, padded_channels(channels)
    scores = jnp.pad(scores, [(0, 0), (0, 0), (0, long)], constant_values=-np.inf)
    scores = jnp.pad(scores, [(0, 0), (0, tall), (0, 0)])
    numbers = jnp.pad(numbers, [(0, 0), (0, long), (0, width - channels)])
    tiles, layouts = (keys + long) // KEYS, plgpu.Layout
    bounds, chain = levels(fmt)

    def body(s_ref: Any, v_ref: Any, y_ref: Any, s_tiles: Any, v_tiles: Any, y_tile: Any, arrived: Any) -> None:
        head, block = lax.axis_index("head"), lax.axis_index("block")
        mine = pl.ds(block * QUERIES, QUERIES)

        def fetch(t: Any, _: Any) -> None:
            along = pl.ds(t * KEYS, KEYS)
            plgpu.copy_gmem_to_smem(s_ref.at[head, mine, along], s_tiles.at[t], arrived.at[t])
            plgpu.copy_gmem_to_smem(v_ref.at[head, along], v_tiles.at[t], arrived.at[t])

        def of(t: Any) -> Array:
            return load(s_tiles.at[t], layouts.WGMMA).astype(jnp.float32)

        def along_rows(a: Array) -> Array:
            return lax.broadcast_in_dim(a, (QUERIES, KEYS), (0,))

        def filled(value: float) -> Array:
            return plgpu.layout_cast(jnp.full((QUERIES,), value, jnp.float32), layouts.WGMMA.reduce(1))

        def largest(t: Any, most: Array) -> Array:
            plgpu.barrier_wait(arrived.at[t])
            return jnp.maximum(most, jnp.max(of(t), axis=1))

        lax.fori_loop(0, tiles, fetch, None)
        most = lax.fori_loop(0, tiles, largest, filled(-np.inf))
        most = jnp.where(most > np.float32(-np.inf), most, np.float32(0))  # a row that is wholly hidden
        spread = along_rows(most)
        total = lax.fori_loop(0, tiles, lambda t, z: z + jnp.sum(jnp.exp(of(t) - spread), axis=1), filled(0.0))
        inverse = along_rows(jnp.where(total > 0, 1 / total, np.float32(0)))

        def multiply(acc: Any) -> None:
            def add(t: Any, _: Any) -> None:
                u = jnp.exp(of(t) - spread) * inverse
                p = jnp.full(u.shape, chain[0], jnp.float32)
                p = plgpu.layout_cast(p, layouts.WGMMA)
                for bound, number in zip(bounds, chain[1:], strict=True):
                    p = jnp.where(u < bound, number, p)
                plgpu.wgmma(acc, p.astype(jnp.bfloat16), v_tiles.at[t])
                plgpu.wgmma_wait(0)

            lax.fori_loop(0, tiles, add, None)
            y_tile[...] = acc[...]

        pl.run_scoped(multiply, plgpu.ACC((QUERIES, width), jnp.float32))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(y_tile, y_ref.at[head, mine])
        plgpu.wait_smem_to_gmem(0)

    swizzled = tiling(min(width, 64), 16)
    y = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((count, rows + tall, width), jnp.float32),
        grid=((rows + tall) // QUERIES, count),
        grid_names=("block", "head"),
        scratch_types=[
            plgpu.SMEM((tiles, QUERIES, KEYS), scores.dtype),
            plgpu.SMEM((tiles, KEYS, width), jnp.bfloat16, transforms=swizzled),
            plgpu.SMEM((QUERIES, width), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=tiles),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **({} if interpret is None else {"interpret": interpret}),
    )(scores, numbers)
    return y[:, :rows, :channels]


def scaled(y: Array, fmt: Log, scale: Array) -> Array:
    """Return what `attend` gives as numbers of the values' scale."""
    return y * (scale * np.float32(1 / denominator(fmt.bits)))

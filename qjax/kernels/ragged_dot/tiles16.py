"""Ragged products on Hopper's tensor cores: a mixture of experts with 4-bit and 8-bit weights in tiles.

    y[m, n] = sum over k of x[m, k] * W[group of m, n, k],        0 for rows behind the last group

The product, its widening and its scales are those of `qjax.kernels.dot.tiles16`. What is different is that the matrix
of a tile of tokens is looked up, in a table that XLA computes in front from the sizes of the groups (`placing`), and
that a tile stores those of its tokens alone that belong to its group. Its other tokens are those of neighbours, whose
products are computed and dropped. A group of few tokens is one tile, so that its weight is read once.
"""

from __future__ import annotations

from typing import Any

from jax import Array

from qjax.formats.tiles import IntTiles, rounded_up
from qjax.kernels.dot.hopper import Schedule, added, in_cells, written
from qjax.kernels.dot.tiles16 import in_tiles, tiles16_kernel
from qjax.kernels.ragged_dot.placing import most_tiles, placed


def ragged_tiles16(
    tiles: Array,
    scale: Array,
    zero: Array | None,
    x: Array,
    group_sizes: Array,
    *,
    fmt: IntTiles,
    n: int,
    out_dtype: Any,
    schedule: Schedule,
    interpret: Any = None,
) -> Array:
    """Multiply rows, sorted by group, by the matrix of their group.

    Args:
        tiles: uint8 [E, N' K'/2] or int8 [E, N' K'], as `IntTiles` orders them; E matrices.
        scale: float32 [E, G N'].
        zero: bfloat16 [E, G N'], or None.
        x: bfloat16 or float16 [M, K], M at least 1.
        group_sizes: integers [E].
        fmt: the format of the weight.
        n: N, rows of a matrix.
        out_dtype: dtype of the result.
        schedule: how the work is cut.
        interpret: settings of the interpreter, for tests.

    Returns:
        [M, N].
    """
    tokens, length = x.shape
    rows, columns = rounded_up(n), fmt.columns
    x = in_cells(x, -(-length // columns) * columns)
    table = placed(group_sizes, tokens, schedule.tokens)
    out = written(x, 1, n, rows, out_dtype, schedule)
    how = {"tiles": most_tiles(tokens, group_sizes.shape[0], schedule.tokens), "interpret": interpret}
    call = tiles16_kernel(out, x.dtype, fmt, rows, schedule, zero is not None, **how)
    y = call(table, *in_tiles(tiles, scale, zero, fmt, rows), x[None])
    return added(y, schedule)[0, :tokens, :n].astype(out_dtype)

"""Which tile of tokens meets which matrix, where the sizes of groups are known only when the program runs.

Rows [M] are sorted by group. A kernel takes them in tiles of a fixed number of rows, whose first row has to be a
multiple of 8, the rows that TMA moves together; groups begin anywhere. So the tiles of a group begin at the multiple of
8 at or below its first row, and a tile owns those of its rows that belong to the group:

    first[g, i] = 8 floor(start[g] / 8) + i tile
    begin, end  = first[g, i] and first[g, i] + tile, cut to start[g] and start[g + 1]

Rows behind the last group are one more group, without a matrix: its tiles write zeros. Every row is owned once.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from qjax.kernels.dot.hopper import CELL

NO_MATRIX = -1
"""In the place of a matrix: rows that belong to no group."""


def most_tiles(rows: int, groups: int, tile: int) -> int:
    """Return how many tiles there are at most, whatever the sizes.

    A group of s rows, which begins up to 7 rows behind its first tile, has at most (s + 7 + tile - 1) / tile tiles, and
    one where all rows are those of the first 8. No more groups than rows have any; the rows of no group are one more.

    Args:
        rows: M.
        groups: G.
        tile: rows of a tile, a multiple of 8.
    """
    filled = min(groups + 1, rows)
    return filled if rows <= CELL else (rows + (tile + CELL - 2) * filled) // tile


def placed(group_sizes: Array, rows: int, tile: int) -> Array:
    """Return the tiles as int32 [tiles, 4]: (matrix, first row / 8, begin, end); behind the last one, begin = end.

    Args:
        group_sizes: integers [G], not negative; rows beyond M are cut off.
        rows: M, at least 1.
        tile: rows of a tile, a multiple of 8.
    """
    groups = group_sizes.shape[0]
    before = jnp.arange(groups)[:, None] <= jnp.arange(groups)  # sums over a few groups: XLA makes one loop of each
    ends = jnp.sum(jnp.where(before, group_sizes.astype(jnp.int32)[:, None], 0), axis=0, dtype=jnp.int32)
    ends = jnp.append(jnp.minimum(ends, rows), rows)
    starts = jnp.append(0, ends[:-1])
    first = starts // CELL * CELL
    count = jnp.where(ends > starts, (ends - first + tile - 1) // tile, 0)
    before = jnp.arange(groups + 1)[:, None] <= jnp.arange(groups + 1)
    upto = jnp.sum(jnp.where(before, count[:, None], 0), axis=0, dtype=jnp.int32)
    index = jnp.arange(most_tiles(rows, groups, tile), dtype=jnp.int32)[:, None]
    mine = (upto - count <= index) & (index < upto)  # [tiles, G + 1], one group of each at most
    at = first + (index - upto + count) * tile
    matrix = jnp.append(jnp.arange(groups, dtype=jnp.int32), NO_MATRIX)
    parts = (matrix, at // CELL, jnp.maximum(starts, at), jnp.minimum(ends, at + tile))
    return jnp.stack([jnp.sum(jnp.where(mine, p, 0), axis=1, dtype=jnp.int32) for p in parts], axis=1)

"""Ragged products on Hopper's tensor cores: a mixture of experts whose weights lie in words.

    y[m, n] = sum over k of x[m, k] * W[group of m, n, k],        0 for rows behind the last group

Product, widening and scales are those of `qjax.kernels.dot.words16`. What is different is that the matrix of
a tile of tokens is looked up, in a table that XLA computes in front from the sizes of the groups (`placing`), and that
a tile stores those of its tokens alone that belong to its group. Its other tokens are those of neighbours, whose
products are computed and dropped. A group of few tokens is one tile, so that its weight is read once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax import Array

from qjax.formats.tiles import rounded_up
from qjax.formats.word_tiles import Planes
from qjax.kernels.dot.hopper import Schedule, added, in_cells, written
from qjax.kernels.dot.words16 import in_words, words16_kernel
from qjax.kernels.ragged_dot.placing import most_tiles, placed


def experts16(
    aux: Mapping[str, Array],
    x: Array,
    group_sizes: Array,
    *,
    fmt: Planes,
    n: int,
    out_dtype: Any,
    schedule: Schedule,
    interpret: Any = None,
) -> Array:
    """Multiply rows, sorted by group, by the matrix of their group.

    Args:
        aux: the arrays of the weight, each [E, anything], as its format orders them; E matrices.
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
    rows, columns = rounded_up(n), rounded_up(length)
    x = in_cells(x, columns)
    table = placed(group_sizes, tokens, schedule.tokens)
    out = written(x, 1, n, rows, out_dtype, schedule)
    how = {"tiles": most_tiles(tokens, group_sizes.shape[0], schedule.tokens), "interpret": interpret}
    call = words16_kernel(out, x.dtype, fmt.planes, rows, columns, schedule, **how)
    y = call(table, *in_words(aux, fmt.planes, rows, columns, schedule), x[None])
    return added(y, schedule)[0, :tokens, :n].astype(out_dtype)

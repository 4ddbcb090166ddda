"""Sparse FP16 corrections of a matrix, in CSR: values, columns and where each row begins.

The number of corrections is fixed by the shape of the matrix, so that the layers of a stack have as many. What is kept
is the largest by a key, exactly so many, without sorting the whole matrix.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qjax.formats.numerics import AnyArray

Sparse = tuple[Array, Array, Array]
"""Values float16 [n]; columns uint16 or uint32 [n], rising within a row; and uint32 [N + 1], where each row begins."""


def column_dtype(length: int) -> np.dtype:
    """Return the dtype of column indices into rows of ``length``: 16 bits below 65536."""
    return np.dtype(np.uint16 if length < 65536 else np.uint32)


def ranked(score: AnyArray, first: AnyArray, allowed: AnyArray) -> Array:
    """Return keys, uint32: those of ``first`` above all others, by score within each; 0 where not allowed.

    Args:
        score: float32, not negative.
        first, allowed: bool, of the shape of score.
    """
    bits = jnp.maximum(lax.bitcast_convert_type(jnp.asarray(score, jnp.float32), jnp.uint32), 1)
    return jnp.where(allowed, jnp.where(first, bits | np.uint32(1 << 31), bits), np.uint32(0))


def largest(keys: AnyArray, count: int) -> Array:
    """Return where the ``count`` largest keys are, bool; of equal ones the first.

    The bound is found bit by bit: 32 sums over the matrix in the place of a sort.
    """
    flat = jnp.asarray(keys).reshape(-1)

    def one(i: Array, bound: Array) -> Array:
        trial = bound | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(jnp.sum(flat >= trial, dtype=jnp.int32) >= count, trial, bound)

    bound = lax.fori_loop(0, 32, one, jnp.uint32(0))
    above, equal = flat > bound, flat == bound
    left = count - jnp.sum(above, dtype=jnp.int32)
    return (above | (equal & (jnp.cumsum(equal, dtype=jnp.int32) <= left))).reshape(keys.shape)


def to_sparse(values: AnyArray, where: AnyArray, count: int) -> Sparse:
    """Return the ``count`` numbers of values [N, K] at which ``where`` is true."""
    n, length = values.shape
    before = jnp.cumsum(where.reshape(-1), dtype=jnp.int32)
    at = jnp.searchsorted(before, jnp.arange(1, count + 1, dtype=jnp.int32))
    rows = jnp.concatenate([jnp.zeros(1, jnp.int32), before[length - 1 :: length]]).astype(jnp.uint32)
    kept = jnp.take(values.reshape(-1), at).astype(jnp.float16)
    return kept, (at % length).astype(column_dtype(length)), rows


def row_numbers(rows: AnyArray, count: int) -> Array:
    """Return the row of each of ``count`` sparse numbers, int32, from where rows begin."""
    ends = jnp.asarray(rows)[1:].astype(jnp.int32)
    return jnp.searchsorted(ends, jnp.arange(count, dtype=jnp.int32), side="right").astype(jnp.int32)


def add_sparse(dense: AnyArray, sparse: Sparse, factor: AnyArray) -> Array:
    """Return dense [N, K] plus ``factor`` times the sparse numbers."""
    values, columns, rows = sparse
    at = jnp.asarray(dense).at[row_numbers(rows, values.shape[0]), columns.astype(jnp.int32)]
    numbers = values.astype(jnp.float32) * factor
    return at.add(numbers, indices_are_sorted=True, unique_indices=True, mode="promise_in_bounds")

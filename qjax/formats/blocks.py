"""Blocks: which elements of a canonical matrix [*stack, N, K] share a scale.

A blocked array has the rank of the matrix: [*stack, 1, 1] per tensor, [*stack, N, 1] per channel or token,
[*stack, N, ceil(K / group)] per group, where the last group is the shorter one if ``group`` does not divide K.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from qjax.formats.numerics import AnyArray

GRANULARITIES = ("tensor", "channel", "token", "group")


def group_count(length: int, group: int | None) -> int:
    """Return the number of blocks along a row of ``length`` elements."""
    return 1 if group is None else -(-length // group)


def grouped(x: AnyArray, group: int) -> Array:
    """Split rows into groups: [..., K] -> [..., ceil(K / group), group], the tail filled with zeros."""
    x = jnp.asarray(x)
    if tail := -x.shape[-1] % group:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, tail)])
    return x.reshape(*x.shape[:-1], x.shape[-1] // group, group)


def block_rows(x: AnyArray, per: str, group: int | None) -> Array:
    """Return the blocks of x [*stack, N, K] as rows [blocks, n], the tail of an uneven last group filled with zeros."""
    x = jnp.asarray(x)
    if per == "tensor":
        return x.reshape(-1, x.shape[-2] * x.shape[-1])
    if per == "group" and group is not None:
        return grouped(x, group).reshape(-1, group)
    return x.reshape(-1, x.shape[-1])


def in_chunks(function: Callable[..., Any], of: Any, numbers: int) -> Any:
    """Apply a function of rows to so many numbers at a time, which then stay in the cache of a CPU.

    On other platforms, and where there are several devices, on which rows may lie spread out, it is applied at once.

    Args:
        function: of arrays [rows, ..] that treats every row by itself, to a tree of such arrays.
        of: its arguments, the first with the most numbers.
        numbers: of the first argument.
    """
    rows, n = of[0].shape
    some = max(1, numbers // max(n, 1))
    if some >= rows or jax.default_backend() != "cpu" or jax.device_count() > 1:
        return function(*of)
    pad = -rows % some
    parts = jax.tree.map(lambda a: jnp.pad(a, ((0, pad), (0, 0))).reshape(-1, some, a.shape[1]), of)
    out = lax.map(lambda part: function(*part), parts)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:rows], out)


def reduce_blocks(x: AnyArray, per: str, group: int | None, reduce: Callable[..., Array]) -> Array:
    """Reduce each block to one number.

    Args:
        x: [*stack, N, K]. The tail of an uneven last group is filled with zeros before reducing, so the reduction
            has to be one that zeros do not disturb (a sum, or a maximum of numbers that are not negative).
        per: one of `GRANULARITIES`.
        group: length of a group; used only when ``per`` is "group".
        reduce: ``reduce(x, axis=..., keepdims=...)``, such as `jnp.sum`.

    Returns:
        The blocked array.
    """
    if per == "tensor":
        return reduce(x, axis=(-2, -1), keepdims=True)
    if per == "group" and group is not None:
        return reduce(grouped(x, group), axis=-1, keepdims=False)
    return reduce(x, axis=-1, keepdims=True)


def spread(blocked: AnyArray, length: int, group: int | None) -> Array:
    """Repeat one number per block over its elements: [..., G] -> [..., K], or [..., 1] where one block is all.

    The result broadcasts against [..., K]; the size-1 forms are left alone, because broadcasting is free.
    """
    blocks = blocked.shape[-1]
    if group is None or (blocks == 1 and length):
        return jnp.asarray(blocked)
    full = jnp.broadcast_to(blocked[..., None], (*blocked.shape, group)).reshape(*blocked.shape[:-1], blocks * group)
    return full if blocks * group == length else full[..., :length]

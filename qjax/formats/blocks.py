"""Blocks: which elements of a canonical matrix [*stack, N, K] share a scale.

A blocked array has the rank of the matrix: [*stack, 1, 1] per tensor, [*stack, N, 1] per channel or token,
[*stack, N, ceil(K / group)] per group, where the last group is the shorter one if ``group`` does not divide K.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

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

"""Scales of trit-planes for whole matrices: the rounds of `qjax.formats.trit_steps` over all groups, piece by piece."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qjax._compat import explicit_sharding
from qjax.errors import FormatError, near
from qjax.formats import trit_steps
from qjax.formats.blocks import group_count, grouped
from qjax.formats.numerics import AnyArray, finite_part, floor_log2, times_power_of_two

PIECE = {"cpu": 1 << 18}
"""Weights that go through the rounds together: on a CPU what its caches hold, elsewhere what fills the device."""
LARGE_PIECE = 1 << 26


def check_settings(who: str, iterations: int, eps: float, init: str) -> None:
    """Refuse settings of the rounds that cannot be, in the name of whom they were given to."""
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise FormatError(f"{who}: iterations={iterations!r}; a number of rounds, such as 50")
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps < 1:
        raise FormatError(f"{who}: eps={eps!r}; from 0 to below 1, such as 1e-4")
    if init not in trit_steps.INITS:
        raise FormatError(f"{who}: init={init!r}{near(str(init), trit_steps.INITS)}; 'residual' or 'sign'")


@functools.partial(jax.jit, static_argnames=("group", "planes", "tied", "iterations", "eps", "init"))
def fit_scales(
    x: AnyArray, group: int, planes: int, *, tied: bool, iterations: int, eps: float, init: str
) -> list[Array]:
    """Return the scales of each plane, largest first and none negative: float32 [*stack, N, groups] each.

    Args:
        x: float [*stack, N, K]; NaN and infinity count as 0.
        group: length of a group along K; the last one may be shorter.
        planes: 1 to 3.
        tied: whether scales are in the ratio 3.
        iterations: rounds at most.
        eps: a group stops once its scales move by less than this part of its mean magnitude.
        init: "residual" or "sign", as `qjax.formats.trit_steps.first_moments` describes them.
    """
    x = lax.stop_gradient(finite_part(jnp.asarray(x, jnp.float32)))
    length, blocks = x.shape[-1], grouped(jnp.abs(x), group)  # [*stack, N, groups, G]
    if not blocks.size:
        return [jnp.zeros(blocks.shape[:-1], jnp.float32) for _ in range(planes)]
    short = length - group * (group_count(length, group) - 1)  # of the last group
    last = np.arange(blocks.shape[-2]) == blocks.shape[-2] - 1

    def of_groups(size: Array, count: AnyArray) -> Array:
        """[G, ...], [...] -> [K, ...]."""
        # In a unit of its own, so that neither sums of huge nor squares of tiny numbers leave float32.
        exponent = floor_log2(jnp.max(size, axis=0))
        size = times_power_of_two(size, -exponent[None])
        there = np.arange(group).reshape(-1, *[1] * (size.ndim - 1)) < count
        start = trit_steps.first_moments(size, there, planes, init)
        mean = jnp.sum(size, axis=0) / count
        found = trit_steps.run(size, start, tied=tied, iterations=iterations, eps=eps * mean)
        scales = jnp.abs(trit_steps.solve(found.moments, tied))  # once more, for the planes as they are now
        return jnp.sort(times_power_of_two(scales, exponent[None]), axis=0)[::-1]

    count = np.where(last, short, group).astype(np.float32)
    if explicit_sharding(x) is not None:  # merging axes would lose how they are laid out
        scales = of_groups(jnp.moveaxis(blocks, -1, 0), jnp.asarray(count))
        return list(scales)
    rows = blocks.reshape(-1, group)  # [M, G]
    counts = jnp.broadcast_to(jnp.asarray(count), blocks.shape[:-1]).reshape(-1)
    piece = min(len(rows), max(1, PIECE.get(jax.default_backend(), LARGE_PIECE) // group))
    more = -len(rows) % piece
    rows = jnp.pad(rows, ((0, more), (0, 0))).reshape(-1, piece, group)
    counts = jnp.pad(counts, (0, more), constant_values=1.0).reshape(-1, piece)
    scales = lax.map(lambda one: of_groups(one[0].T, one[1]), (rows, counts))  # [pieces, K, piece]
    merged = jnp.moveaxis(scales, 1, 0).reshape(planes, -1)[:, : len(blocks.reshape(-1, group))]
    return list(merged.reshape(planes, *blocks.shape[:-1]))

"""Searches that judge weights by what they do to the output: error forms with the second moment of the inputs.

The squared error of output n over all rows of activations X is a quadratic form in what its weights are off by:

    sum over t of (x_t · e_n)²  =  e_n H e_nᵀ        H = XᵀX, `qjax.statistics.SecondMoment`

so a search needs H and never X. A group's own share, with the other groups left out, is the form of a diagonal block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qjax.formats import Aux, Format
from qjax.formats.blocks import grouped
from qjax.formats.numerics import AnyArray

CHUNK_ELEMENTS = 1 << 22
"""Elements of the rows that are searched at a time."""

PARTS = 4
"""Parts of a large moment: of its blocks of parts, those below the diagonal are not multiplied."""


def moment_of(statistics: Any) -> Array:
    """Return the second moment [K, K] over the mean of its diagonal: errors are compared and not reported."""
    h = jnp.asarray(statistics["second_moment"], jnp.float32)
    mean = jnp.mean(jnp.diagonal(h))
    return h / jnp.where(mean > 0, mean, 1.0)


def diagonal_blocks(h: AnyArray, group: int) -> Array:
    """Return [groups, group, group] from [K, K]; a short last block is filled with zeros."""
    tail = -h.shape[0] % group
    padded = jnp.pad(jnp.asarray(h), ((0, tail), (0, tail)))
    count = padded.shape[0] // group
    each = jnp.arange(count)
    return padded.reshape(count, group, count, group)[each, :, each, :]


def row_errors(e: AnyArray, h: AnyArray) -> Array:
    """Return e_n H e_nᵀ of each row: [N, K], [K, K] -> [N]. H is symmetric."""
    k = e.shape[-1]
    parts = PARTS if k >= 1024 else 1
    edges = [k * i // parts for i in range(parts + 1)]
    total = jnp.zeros(e.shape[0], jnp.float32)
    for start, stop in zip(edges, edges[1:], strict=False):
        here, rest = e[:, start:stop], h[start:stop, start:]
        # Each pair of different parts counts twice.
        twice = jnp.where(jnp.arange(start, k) < stop, 1.0, 2.0)
        total += jnp.sum(jnp.matmul(here, rest, precision=lax.Precision.HIGHEST) * e[:, start:] * twice, axis=-1)
    return total


def group_errors(e: AnyArray, blocks: AnyArray) -> Array:
    """Return the form of each group of each row: [N, K], [groups, g, g] -> [N, groups]."""
    parts = grouped(e, blocks.shape[-1])
    times = jnp.einsum("ngk,gkl->ngl", parts, blocks, precision=lax.Precision.HIGHEST)
    return jnp.sum(times * parts, axis=-1)


def least(candidates: Sequence[float] | np.ndarray, error: Callable[[Array], Array]) -> tuple[Array, Array]:
    """Return (the candidate with the least error, that error), elementwise; the first of equal ones.

    Args:
        candidates: numbers to try.
        error: float32 array of errors for one candidate.
    """
    tries = jnp.asarray(np.asarray(candidates, np.float32))
    first = error(tries[0])

    def step(best: tuple[Array, Array], candidate: Array) -> tuple[tuple[Array, Array], None]:
        chosen, lowest = best
        here = error(candidate)
        better = here < lowest
        return (jnp.where(better, candidate, chosen), jnp.where(better, here, lowest)), None

    # first * 0 rather than zeros: inside shard_map the carry has to vary over devices as the errors do.
    return lax.scan(step, (first * 0 + tries[0], first), tries[1:])[0]


def by_rows(function: Callable[..., Any], *arrays: AnyArray) -> Any:
    """Apply a function of rows [n, ..] to arrays [N, ..] a bounded number of rows at a time."""
    n, k = arrays[0].shape[0], max(a.shape[-1] for a in arrays)
    size = max(1, CHUNK_ELEMENTS // max(k, 1))
    if n <= size:
        return function(*arrays)
    count = -(-n // size)
    size = -(-n // count)
    split = [jnp.pad(a, ((0, count * size - n), (0, 0))).reshape(count, size, a.shape[-1]) for a in arrays]
    out = lax.map(lambda parts: function(*parts), tuple(split))
    return jax.tree.map(lambda a: a.reshape(count * size, *a.shape[2:])[:n], out)


def clipped(w: AnyArray, fmt: Format, h: AnyArray, ratios: Sequence[float] | np.ndarray) -> Aux:
    """Return aux of ranges shrunk by the ratio with the least output error, each block on its own.

    Args:
        w: float32 [N, K].
        fmt: a format with one range per row or group. What its blocks share stays that of the whole range.
        h: second moment [K, K]. With groups, each is judged by its own inputs only.
        ratios: factors to try.
    """
    grouping = fmt.group if fmt.per == "group" and fmt.group is not None else None
    blocks = diagonal_blocks(h, grouping) if grouping else None

    def one(w: Array) -> Aux:
        low, high = fmt.range_of(w)
        shared = fmt.shared_aux(low, high)

        def error(ratio: Array) -> Array:
            aux = fmt.from_range(low * ratio, high * ratio, shared)
            e = w - fmt.decode(fmt.encode(w, aux), aux)
            return group_errors(e, blocks) if blocks is not None else row_errors(e, h)[:, None]

        ratio, _ = least(ratios, error)
        return fmt.from_range(low * ratio, high * ratio, shared)

    return by_rows(one, jnp.asarray(w, jnp.float32))

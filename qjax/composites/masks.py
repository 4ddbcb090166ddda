"""Deciding whether a constant mask is causal, and how wide its window is.

A mask may have billions of elements, so it is looked at where a causal mask has its edge, in a few whole rows and
columns, and at random places; small ones are looked at everywhere.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from qjax.composites import axes as ax
from qjax.composites.axes import Axis
from qjax.composites.constants import at
from qjax.composites.scores import Condition
from qjax.composites.softmax import MASKED

_EVERYWHERE = 1 << 14
_RANDOM = 2048
_STAND_IN = 31


@dataclasses.dataclass(frozen=True)
class Causal:
    """Query ``t`` sees the keys ``t + offset - window < s <= t + offset``; ``window`` is None where it sees all."""

    offset: int
    window: int | None


def concrete(axes: Sequence[Axis]) -> list[int]:
    """Return sizes of axes, with a stand-in for symbolic ones: masks know positions, not lengths."""
    return [a.size if isinstance(a.size, int) else _STAND_IN for a in axes]


def causal(conditions: Sequence[Condition], query: Sequence[Axis], key: Sequence[Axis]) -> Causal | None:
    """Return what kind of causal mask the conditions make together, or None if they make none or depend on data.

    Args:
        conditions: of a mask, joined by "and".
        query: the axes that make up the query positions, outermost first.
        key: the axes that make up the key positions.
    """
    rows, columns = math.prod(concrete(query)), math.prod(concrete(key))
    if not conditions or not all(c.value.fixed for c in conditions) or rows < 2 or columns < 2:
        return None
    first = _all(conditions, query, key, np.zeros(columns, int), np.arange(columns))
    last = _all(conditions, query, key, np.full(columns, rows - 1), np.arange(columns))
    if not last.any() or not first.any():
        return None
    edge = int(np.flatnonzero(last)[-1])
    # The last row may see everything because there are fewer keys than positions: take the edge from the first then.
    offset = edge - (rows - 1) if edge < columns - 1 else int(np.flatnonzero(first)[-1])
    if offset >= columns - 1:
        return None
    window = None
    start = int(np.flatnonzero(last)[0])
    if start > 0:
        window = rows - 1 + offset - start + 1
    t, s = _places(rows, columns, offset, window)
    expected = s <= t + offset
    if window is not None:
        expected &= s > t + offset - window
    if not np.array_equal(_all(conditions, query, key, t, s), expected):
        return None
    return Causal(offset, window)


def _places(rows: int, columns: int, offset: int, window: int | None) -> tuple[np.ndarray, np.ndarray]:
    if rows * columns <= _EVERYWHERE:
        t, s = np.divmod(np.arange(rows * columns), columns)
        return t, s
    rng = np.random.default_rng(0)
    every_row, every_column = np.arange(rows), np.arange(columns)
    picks = [(rng.integers(0, rows, _RANDOM), rng.integers(0, columns, _RANDOM))]
    for row in (0, rows // 3, rows - 1):
        picks.append((np.full(columns, row), every_column))
    for column in (0, columns // 2, columns - 1):
        picks.append((every_row, np.full(rows, column)))
    for shift in (0, 1) if window is None else (0, 1, -window, 1 - window):
        picks.append((every_row, every_row + offset + shift))
    t, s = (np.concatenate(parts) for parts in zip(*picks, strict=True))
    inside = (s >= 0) & (s < columns)
    return t[inside], s[inside]


def _all(
    conditions: Sequence[Condition], query: Sequence[Axis], key: Sequence[Axis], t: np.ndarray, s: np.ndarray
) -> np.ndarray:
    return np.logical_and.reduce([_kept(c, query, key, t, s) for c in conditions])


def _kept(condition: Condition, query: Sequence[Axis], key: Sequence[Axis], t: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Whether the scores of queries ``t`` and keys ``s`` stay; other axes (batch, heads) are looked at in turns."""
    coordinates: dict[Axis, np.ndarray] = {}
    for axes, positions in ((query, t), (key, s)):
        rest = positions
        for axis, size in zip(reversed(axes), reversed(concrete(axes)), strict=True):
            rest, coordinates[axis] = np.divmod(rest, size)
    index = []
    for label in condition.labels:
        i = np.zeros(len(t), int)
        for axis in ax.leaves([label]):
            if axis not in coordinates:
                coordinates[axis] = np.arange(len(t)) * 7919 % concrete([axis])[0]
            i = i * concrete([axis])[0] + coordinates[axis]
        index.append(i)
    found = np.broadcast_to(np.asarray(at(condition.value, index)), t.shape)
    if condition.factor is not None:
        return found.astype(np.float64) * condition.factor > MASKED
    return (found != 0) == condition.keep

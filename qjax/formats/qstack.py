"""QStack: a stacked weight whose slices have different formats."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.typing import DTypeLike

from qjax.errors import LayoutError
from qjax.formats.layout import axis_index
from qjax.formats.qarray import QArray
from qjax.formats.views import stack


@functools.partial(jax.tree_util.register_dataclass, data_fields=("parts",), meta_fields=("axis", "assign"))
@dataclasses.dataclass(frozen=True, eq=False)
class QStack:
    """A leaf that stands for one array while its slices along one stack axis are stored in several formats.

    Slice k is slice ``assign[k][1]`` of ``parts[assign[k][0]]`` along ``axis``. Every part has the shape of the whole
    but for its length along that axis; a part may be a float array (slices left alone) or a `QStack` along another
    axis.

    Attributes:
        parts: the stored arrays, each with the stack axis.
        axis: the user's axis, not negative.
        assign: (part, position) for each index of the axis.
    """

    parts: tuple[Any, ...]  # of QArray, QStack and float arrays, or placeholders
    axis: int
    assign: tuple[tuple[int, int], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The user's shape."""
        shape = list(self.parts[0].shape)
        shape[self.axis] = len(self.assign)
        return tuple(shape)

    @property
    def ndim(self) -> int:
        """Number of the user's dimensions."""
        return self.parts[0].ndim

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> np.dtype:
        """The float dtype that the array stands for."""
        return np.dtype(self.parts[0].dtype)

    @property
    def nbytes(self) -> int:
        """Bytes as stored, over all parts."""
        return sum(p.nbytes if is_quantized(p) else math.prod(p.shape) * np.dtype(p.dtype).itemsize for p in self.parts)

    @property
    def bits_per_element(self) -> float:
        """8 * nbytes / size; 0 for an empty array."""
        return 8 * self.nbytes / self.size if self.size else 0.0

    def __len__(self) -> int:
        """Size of the leading axis."""
        return self.shape[0]

    def __repr__(self) -> str:
        """Show the parts and which slices they hold."""
        return f"QStack(axis={self.axis}, assign={self.assign}, parts={self.parts!r})"

    def index_stack(self, axis: int, i: int | Array) -> QArray | Array | QStack:
        """Return slice i of a stack axis, which is dropped.

        Along the axis of the QStack, i has to be static and the part's slice is returned; along another stack axis
        every part is sliced.

        Raises:
            LayoutError: for a traced i along the axis of the QStack, whose format would depend on data:
                `dequantize_at` selects at run time.
        """
        axis = axis_index(axis, self.ndim)
        if axis != self.axis:
            parts = tuple(_index(p, axis, i) for p in self.parts)
            return QStack(parts, self.axis - (axis < self.axis), self.assign)
        if isinstance(i, Tracer):
            raise LayoutError(
                f"a traced index into axis {axis} of a stack of several formats ({len(self.parts)} parts); "
                "use dequantize_at, or a static index"
            )
        i = int(i)
        if not -len(self.assign) <= i < len(self.assign):
            raise IndexError(f"index {i} on axis {axis} of size {len(self.assign)}")
        part, position = self.assign[i]
        return _index(self.parts[part], axis, position)

    def __getitem__(self, i: int) -> QArray | Array | QStack:
        """Return slice i of the leading axis, which has to be a stack axis."""
        return self.index_stack(0, i)

    def dequantize_at(self, i: int | Array, dtype: DTypeLike | None = None) -> Array:
        """Return slice i along the axis of the QStack as floats; i may be traced and is clamped.

        One branch of a `lax.switch` per part, so that only the part in question is decoded.
        """
        target = np.dtype(self.dtype if dtype is None else dtype)
        part, position = (jnp.asarray(column, jnp.int32) for column in zip(*self.assign, strict=True))
        i = jnp.clip(i, 0, len(self.assign) - 1)
        branches = [lambda k, p=p: _floats(_index(p, self.axis, k), target) for p in self.parts]
        return lax.switch(part[i], branches, position[i])

    def runs(self) -> list[tuple[int, int, QArray | Array | QStack]]:
        """Return the contiguous runs (start, stop, value): slices start .. stop-1 are those of value, in order."""
        runs: list[list[int]] = []  # start, stop, part, first position
        for k, (part, position) in enumerate(self.assign):
            if runs and runs[-1][2] == part and position == runs[-1][3] + k - runs[-1][0]:
                runs[-1][1] = k + 1
            else:
                runs.append([k, k + 1, part, position])
        return [(a, b, _slice(self.parts[p], self.axis, first, b - a)) for a, b, p, first in runs]

    def dequantize(self, dtype: DTypeLike | None = None) -> Array:
        """Return the array in the user's layout, in ``dtype`` (by default the dtype that it stands for)."""
        target = np.dtype(self.dtype if dtype is None else dtype)
        whole = jnp.concatenate([_floats(p, target) for p in self.parts], axis=self.axis)
        starts = np.cumsum([0, *(p.shape[self.axis] for p in self.parts)])
        order = np.array([starts[part] + position for part, position in self.assign], np.int32)
        if np.array_equal(order, np.arange(whole.shape[self.axis])):
            return whole
        return jnp.take(whole, order, axis=self.axis)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        """Dequantize for NumPy, which would otherwise take the array for a sequence of its slices."""
        return np.asarray(self.dequantize(), dtype=dtype)

    def astype(self, dtype: DTypeLike) -> QStack:
        """Return the same parts standing for another float dtype; float parts are converted."""
        return QStack(tuple(p.astype(dtype) for p in self.parts), self.axis, self.assign)


def stack_slices(slices: Sequence[QArray | Array], axis: int = 0) -> QStack:
    """Make a QStack from slices: those of one format and layout share a part, so do those left in float.

    Args:
        slices: arrays of one shape, quantized or not, without the axis.
        axis: the user's axis that the stack gets.
    """
    if not slices:
        raise LayoutError("a stack needs at least one slice")
    shapes = {tuple(s.shape) for s in slices}
    if len(shapes) > 1:
        raise LayoutError(f"slices of one stack have one shape, these have {sorted(shapes)}")
    axis = axis_index(axis, len(slices[0].shape) + 1)
    kinds: dict[Any, list[int]] = {}
    for k, s in enumerate(slices):
        kinds.setdefault((s.fmt, s.view, s.dtype) if isinstance(s, QArray) else "float", []).append(k)
    parts, assign = [], {}
    for number, members in enumerate(kinds.values()):
        group = [slices[k] for k in members]
        assign |= {k: (number, position) for position, k in enumerate(members)}
        if packed := [s for s in group if isinstance(s, QArray)]:
            part = stack(packed)
            parts.append(part.transpose([*range(1, axis + 1), 0, *range(axis + 1, part.ndim)]))
        else:
            parts.append(jnp.stack([jnp.asarray(g) for g in group], axis=axis))
    return QStack(tuple(parts), axis, tuple(assign[k] for k in range(len(slices))))


def is_quantized(x: Any) -> bool:
    """Return whether x is a `QArray` or a `QStack`."""
    return isinstance(x, QArray | QStack)


def _index(x: QArray | Array | QStack, axis: int, i: int | Array) -> QArray | Array | QStack:
    if isinstance(x, QArray | QStack):
        return x.index_stack(axis, i)
    return lax.dynamic_index_in_dim(jnp.asarray(x), i, axis, keepdims=False)


def _slice(x: QArray | Array | QStack, axis: int, start: int, size: int) -> QArray | Array | QStack:
    if isinstance(x, QArray):
        return x.slice_stack(axis, start, size)
    if isinstance(x, QStack):
        return QStack(tuple(_slice(p, axis, start, size) for p in x.parts), x.axis, x.assign)
    return lax.slice_in_dim(jnp.asarray(x), start, start + size, axis=axis)


def _floats(x: QArray | Array | QStack, dtype: np.dtype) -> Array:
    return x.dequantize(dtype) if isinstance(x, QArray | QStack) else jnp.asarray(x).astype(dtype)

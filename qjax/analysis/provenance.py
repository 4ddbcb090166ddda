"""Where a value in a jaxpr comes from: which parameter leaf, through which views, at which slice.

A `Ref` says "this value is leaf 7, its axes in this order, taken at slice i of axis 0". It follows a leaf through
transposes, reshapes, casts, slices and into scan bodies, so that a product which reads it, however it is written,
is known to read *that leaf* and along which of its axes it contracts.

A dimension of a `Ref` is a tuple of atoms ``(axis, stride, size)``, major to minor: the position along the leaf's
``axis`` is the sum of ``index * stride`` over its atoms. A whole axis is the single atom ``(axis, 1, n)``; reshapes
split and merge atoms; the empty tuple is a unit dimension that no leaf axis stands behind.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.analysis.known import Known

Atom = tuple[int, int, int]
Dim = tuple[Atom, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Index:
    """One leaf axis sliced away at a single position.

    Attributes:
        axis: the leaf's axis.
        values: the position for each time step of ``loop``, or one position when ``loop`` is None.
        loop: id of the loop whose counter selects the slice; None for a static index.
        event: program order of a static index, which groups the slices of one Python loop.
    """

    axis: int
    values: tuple[int, ...]
    loop: int | None
    event: int = -1


@dataclasses.dataclass(frozen=True, slots=True)
class Ref:
    """A value that is an exact view of one parameter leaf.

    Attributes:
        leaf: position among the flattened parameter leaves.
        dims: for each dimension of the value, the atoms of the leaf behind it.
        index: the axes sliced away, in order of slicing.
        ranges: ``(axis, start, size)`` where only part of an axis is read.
    """

    leaf: int
    dims: tuple[Dim, ...]
    index: tuple[Index, ...] = ()
    ranges: tuple[tuple[int, int, int], ...] = ()

    @staticmethod
    def whole(leaf: int, shape: tuple[int, ...]) -> Ref:
        """The leaf itself."""
        return Ref(leaf, tuple(((axis, 1, size),) for axis, size in enumerate(shape)))

    def axes_of(self, dims: Sequence[int]) -> tuple[int, ...] | None:
        """Leaf axes behind the dimensions ``dims``, in leaf order; None if one of them is only partly behind them."""
        atoms = [a for d in dims for a in self.dims[d]]
        axes = self.leaf_axes(dims)
        everywhere = [a for dim in self.dims for a in dim]
        for axis in axes:
            if any(a[0] == axis and a[1] == GATHERED for a in atoms):
                continue  # each looked up dimension picks along the whole axis
            if sum(a[0] == axis for a in atoms) != sum(a[0] == axis for a in everywhere):
                return None
        return axes

    def leaf_axes(self, dims: Sequence[int]) -> tuple[int, ...]:
        """Leaf axes behind the dimensions ``dims``, wholly or in part, in leaf order (in which groups run)."""
        return tuple(sorted({a[0] for d in dims for a in self.dims[d]}))

    def summed_axes(self, dims: Sequence[int]) -> tuple[int, ...]:
        """Leaf axes that a sum over ``dims`` runs along: a sum over looked up matrices runs along none."""
        return tuple(sorted({a[0] for d in dims for a in self.dims[d] if a[1] != GATHERED}))


# ---------------------------------------------------------------------------------------------- views of a leaf


def _same(ref: Ref, eqn: Any, knowns: list[Known | None], event: int) -> Ref | None:
    return ref


def _cast(ref: Ref, eqn: Any, knowns: list[Known | None], event: int) -> Ref | None:
    return ref if jnp.issubdtype(eqn.params["new_dtype"], jnp.floating) else None


def _transpose(ref: Ref, eqn: Any, knowns: list[Known | None], event: int) -> Ref | None:
    return dataclasses.replace(ref, dims=tuple(ref.dims[p] for p in eqn.params["permutation"]))


def _squeeze(ref: Ref, eqn: Any, knowns: list[Known | None], event: int) -> Ref | None:
    gone = {d % len(ref.dims) for d in eqn.params["dimensions"]}
    index = list(ref.index)
    for d in sorted(gone):
        for axis, _, _ in ref.dims[d]:  # a stack of one: jnp drops the slice and squeezes at once
            index.append(Index(axis, (0,), None, event))
    dims = tuple(dim for d, dim in enumerate(ref.dims) if d not in gone)
    return dataclasses.replace(ref, dims=dims, index=tuple(index))


def _expand_dims(ref: Ref, eqn: Any, knowns: list[Known | None], event: int) -> Ref | None:
    rank = len(ref.dims) + len(eqn.params["dimensions"])
    new = {d % rank for d in eqn.params["dimensions"]}
    it = iter(ref.dims)
    return dataclasses.replace(ref, dims=tuple(() if d in new else next(it) for d in range(rank)))


def _broadcast_in_dim(ref: Ref, eqn: Any, knowns: list[Known | None], event: int) -> Ref | None:
    shape, source = eqn.params["shape"], eqn.invars[0].aval.shape
    to = dict(zip(eqn.params["broadcast_dimensions"], range(len(source)), strict=True))
    dims: list[Dim] = []
    for d, size in enumerate(shape):
        if d in to and source[to[d]] == size:
            dims.append(ref.dims[to[d]])
        elif size == 1:
            dims.append(())
        else:
            return None
    return dataclasses.replace(ref, dims=tuple(dims))


def _reshape(ref: Ref, eqn: Any, knowns: list[Known | None], event: int) -> Ref | None:
    if eqn.params.get("dimensions") is not None:  # a transpose comes first
        ref = dataclasses.replace(ref, dims=tuple(ref.dims[d] for d in eqn.params["dimensions"]))
    target = eqn.outvars[0].aval.shape
    atoms = [a for dim in ref.dims for a in dim if a[2] != 1]
    if 0 in target or math.prod(a[2] for a in atoms) != math.prod(target):
        return None
    dims: list[Dim] = []
    for size in target:
        dim: list[Atom] = []
        room = size
        while room > 1:
            axis, stride, n = atoms.pop(0)
            if room % n == 0:
                dim.append((axis, stride, n))
                room //= n
            elif n % room == 0:  # split: the major part goes here, the minor part waits
                dim.append((axis, stride * (n // room), room))
                atoms.insert(0, (axis, stride, n // room))
                room = 1
            else:
                return None
        dims.append(_coalesce(dim))
    # axes of size one keep no atom: they are unit dimensions now, which is what they are to a product
    return dataclasses.replace(ref, dims=tuple(dims))


def _coalesce(dim: list[Atom]) -> Dim:
    out: list[Atom] = []
    for axis, stride, size in dim:
        if out and out[-1][0] == axis and out[-1][1] == stride * size:
            out[-1] = (axis, stride, out[-1][2] * size)
        else:
            out.append((axis, stride, size))
    return tuple(out)


def _take_range(ref: Ref, d: int, start: int, size: int, event: int) -> Ref | None:
    """Restrict dimension ``d`` to ``[start, start + size)``, statically."""
    dim = ref.dims[d]
    if len(dim) != 1:
        return None
    axis, stride, n = dim[0]
    if any(r[0] == axis for r in ref.ranges) or stride != 1 or _parts(ref, axis) != 1:
        return None
    dims = list(ref.dims)
    if size == 1:
        dims[d] = ()
        return dataclasses.replace(ref, dims=tuple(dims), index=(*ref.index, Index(axis, (start,), None, event)))
    dims[d] = ((axis, stride, size),)
    return dataclasses.replace(ref, dims=tuple(dims), ranges=(*ref.ranges, (axis, start, size)))


def _parts(ref: Ref, axis: int) -> int:
    return sum(a[0] == axis for dim in ref.dims for a in dim)


def _slice(ref: Ref, eqn: Any, knowns: list[Known | None], event: int) -> Ref | None:
    p = eqn.params
    shape = eqn.invars[0].aval.shape
    strides = p["strides"] or (1,) * len(shape)
    out: Ref | None = ref
    for d, (start, limit, step) in enumerate(zip(p["start_indices"], p["limit_indices"], strides, strict=True)):
        if (start, limit) == (0, shape[d]) and step == 1:
            continue
        size = -(-(limit - start) // step)
        if out is None or (step != 1 and size != 1) or not out.dims[d]:
            return None
        out = _take_range(out, d, int(start), int(size), event)
    return out


def _split(ref: Ref, eqn: Any, knowns: list[Known | None], event: int) -> list[Ref | None]:
    axis, start, out = eqn.params["axis"], 0, []
    for size in eqn.params["sizes"]:
        out.append(_take_range(ref, axis, start, int(size), event))
        start += int(size)
    return out


def _dynamic_slice(ref: Ref, eqn: Any, knowns: list[Known | None], event: int) -> Ref | None:
    shape, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    out: Ref | None = ref
    for d, (n, size) in enumerate(zip(shape, sizes, strict=True)):
        if size == n and n != 1:
            continue
        out = _dynamic_range(out, d, n, size, knowns[1 + d], event) if out is not None else None
    return out


def _dynamic_range(ref: Ref, d: int, n: int, size: int, known: Known | None, event: int) -> Ref | None:
    if not ref.dims[d]:
        return ref if n == 1 else None
    if known is not None and known.loop is None and known.value.ndim == 0:
        return _take_range(ref, d, int(np.clip(known.value, 0, n - size)), size, event)
    if size != 1 or len(ref.dims[d]) != 1:
        return None
    axis, stride, _ = ref.dims[d][0]
    if stride != 1 or _parts(ref, axis) != 1 or any(r[0] == axis for r in ref.ranges):
        return None
    if known is not None and known.value.ndim == 1:
        values, loop = tuple(int(v) for v in np.clip(known.value, 0, n - 1)), known.loop
    else:  # an index that only the run knows: any slice may be read
        values, loop = tuple(range(n)), DYNAMIC
    dims = list(ref.dims)
    dims[d] = ()
    return dataclasses.replace(ref, dims=tuple(dims), index=(*ref.index, Index(axis, values, loop, event)))


DYNAMIC = -1
"""Loop id of an index that depends on run-time data."""


def picked_axis(eqn: Any) -> tuple[int, int, bool] | None:
    """The one axis of which a gather picks single positions, all others whole.

    Returns:
        The axis, which component of the index vectors picks along it, and whether the axis is dropped; or None for
        any other gather. Components for whole axes (jax makes them when it maps a slice) can only select everything.
    """
    p = eqn.params
    dn, shape, sizes = p["dimension_numbers"], eqn.invars[0].aval.shape, p["slice_sizes"]
    picked = [d for d, (n, s) in enumerate(zip(shape, sizes, strict=True)) if s != n]
    if not picked and len(dn.start_index_map) == 1:
        picked = list(dn.start_index_map)  # an axis of length one
    clipped = len(dn.start_index_map) == 1 or "FILL" not in str(p["mode"])
    if len(picked) != 1 or not clipped or dn.operand_batching_dims or sizes[picked[0]] != 1:
        return None
    axis = picked[0]
    if axis not in dn.start_index_map or tuple(dn.collapsed_slice_dims) not in ((), (axis,)):
        return None
    return axis, dn.start_index_map.index(axis), bool(dn.collapsed_slice_dims)


def _gather(ref: Ref, eqn: Any, knowns: list[Known | None], event: int) -> Ref | None:
    """``stack[i]`` with a known integer, or the matrices of a stack picked by data (the experts of a token)."""
    dn, shape = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
    found = picked_axis(eqn)
    if found is None:
        return None
    axis, component, dropped = found
    known, batch = knowns[1], eqn.invars[1].aval.shape[:-1]
    if known is not None and not batch and len(dn.start_index_map) == 1:
        value = known.value.reshape(-1) if known.loop is not None else known.value.reshape(())
        out = _dynamic_range(ref, axis, shape[axis], 1, Known(value, known.loop), event)
        if out is None or not dropped:
            return out
        return dataclasses.replace(out, dims=tuple(dim for d, dim in enumerate(out.dims) if d != axis))
    source = ref.dims[axis]
    if len(shape) < 3 or len(source) != 1 or source[0][1:] != (1, shape[axis]):
        return None  # rows of a table are an embedding, not matrices of a stack
    out_rank = len(eqn.outvars[0].aval.shape)
    looked_up = iter([((source[0][0], GATHERED, n),) for n in batch])
    kept = iter([() if d == axis else dim for d, dim in enumerate(ref.dims) if not (d == axis and dropped)])
    dims = tuple(next(kept) if d in dn.offset_dims else next(looked_up) for d in range(out_rank))
    return dataclasses.replace(ref, dims=dims)


GATHERED = 0
"""Stride of an atom whose positions along the leaf axis are data: it can be batched over, nothing else."""


VIEWS: dict[str, Callable[[Ref, Any, list[Known | None], int], Any]] = {
    "convert_element_type": _cast,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "expand_dims": _expand_dims,
    "broadcast_in_dim": _broadcast_in_dim,
    "reshape": _reshape,
    "slice": _slice,
    "split": _split,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    **{
        name: _same
        for name in (
            "copy",
            "copy_p",
            "stop_gradient",
            "sharding_constraint",
            "reduce_precision",
            "device_put",
            "pvary",
            "pcast",
            "mesh_cast",
            "reshard",
            "name",
        )
    },
}
"""Primitive name -> how a `Ref` passes through it (a list for primitives with several outputs)."""

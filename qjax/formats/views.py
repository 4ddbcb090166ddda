"""Views on packed codes: slices, transposes, reshapes and concatenations that move codes and never change them.

Each function takes a `QArray` and returns one, or raises `LayoutError` where the result could not be stored exactly
(cutting a group or a byte in two, say). They are the bodies of the methods of `QArray`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array, lax

from qjax.errors import LayoutError
from qjax.formats.layout import Layout, axis_index, in_sizes, pair_dimensions, resolve_shape
from qjax.formats.packing import row_pad
from qjax.formats.qarray import QArray
from qjax.formats.rotation import SIGNS, SMOOTH


def _label(q: QArray, axis: int) -> tuple[int, str, int]:
    """Return the user's axis made non-negative, its kind, and its storage axis (of stack and out axes)."""
    axis = axis_index(axis, q.ndim)
    kind, number = q.view.order[axis]
    return axis, kind, number + q.stack_ndim if kind == "o" else number


def _refuse(q: QArray, axis: int, kind: str, what: str) -> LayoutError:
    names = {"i": "an in axis (packed and grouped)", "o": "an out axis", "s": "a stack axis", "u": "a unit axis"}
    return LayoutError(
        f"{what} along axis {axis} of a quantized array of shape {q.shape}: it is {names[kind]}, "
        f"in axes are {q.in_axes}, out axes {q.out_axes}, stack axes {q.stack_axes}; dequantize first"
    )


def _check_cut(q: QArray, kind: str, what: str) -> None:
    """Refuse to take a matrix apart whose scales belong to all of it."""
    if kind in ("o", "i") and q.fmt.whole_matrix:
        raise LayoutError(
            f"{what} of a quantized array of shape {q.shape}: scales and corrections of {q.fmt.name} belong to whole "
            f"matrices, which can be taken apart along stack axes only ({q.stack_axes or 'there are none'}); "
            "dequantize first"
        )


def _each(q: QArray, axis: int, function: Callable[[Array], Array], layout: Layout, keep: bool) -> QArray:
    """Apply a function to codes and aux along one storage axis; ``keep`` leaves shared aux (size 1) alone."""
    size = q.codes.shape[axis]

    def on_aux(a: Array) -> Array:
        return a if keep and a.shape[axis] != size else function(a)

    return dataclasses.replace(q, codes=function(q.codes), aux={k: on_aux(a) for k, a in q.aux.items()}, layout=layout)


def _index(q: QArray, axis: int, storage: int, i: int | Array) -> QArray:
    """Drop a stack or out axis at one index, static or traced."""
    size = q.codes.shape[storage]
    if isinstance(i, int) and not -size <= i < size:
        raise IndexError(f"index {i} on axis {axis} of size {size}")

    def pick(a: Array) -> Array:
        return lax.dynamic_index_in_dim(a, i if a.shape[storage] == size else 0, storage, keepdims=False)

    aux = {k: pick(a) for k, a in q.aux.items()}
    return dataclasses.replace(q, codes=pick(jnp.asarray(q.codes)), aux=aux, layout=q.view.without(axis))


def index_stack(q: QArray, axis: int, i: int | Array) -> QArray:
    """Return slice i of a stack axis, which is dropped. A traced i is clamped as by `lax.dynamic_slice`."""
    axis, kind, storage = _label(q, axis)
    if kind != "s":
        raise _refuse(q, axis, kind, "an index into a stack")
    return _index(q, axis, storage, i)


def slice_stack(q: QArray, axis: int, start: int | Array, size: int) -> QArray:
    """Return ``size`` slices of a stack axis from ``start``, static or traced (clamped as by `lax.dynamic_slice`)."""
    axis, kind, storage = _label(q, axis)
    if kind != "s":
        raise _refuse(q, axis, kind, "a slice of a stack")
    return _each(q, storage, lambda a: lax.dynamic_slice_in_dim(a, start, size, storage), q.view, keep=True)


def getitem(q: QArray, item: int | slice | Array) -> QArray:
    """Index or slice the user's leading axis, which has to be a stack or an out axis (any axis for a slice of all)."""
    if isinstance(item, tuple):
        if len(item) != 1:
            raise LayoutError(
                "a quantized array takes one index at a time; use index_stack, slice_axis or take by axis"
            )
        item = item[0]
    if item is Ellipsis:
        return q
    if not q.ndim:
        raise LayoutError("a quantized array without dimensions cannot be indexed")
    if isinstance(item, slice):
        start, stop, step = item.indices(q.shape[0])
        if step != 1:
            raise LayoutError(f"a quantized array is sliced in steps of 1, not {step}; use take")
        return slice_axis(q, 0, start, max(start, stop))
    if item is None:
        return expand_dims(q, 0)
    axis, kind, storage = _label(q, 0)
    if kind == "u":
        return dataclasses.replace(q, layout=q.view.without(axis))
    if kind == "i":
        raise _refuse(q, axis, kind, "an index")
    if not isinstance(item, int) and getattr(item, "ndim", 0):
        return take(q, 0, item)
    _check_cut(q, kind, f"an index along axis {axis}")
    return _index(q, axis, storage, int(item) if not hasattr(item, "dtype") else item)


def slice_axis(q: QArray, axis: int, start: int, limit: int) -> QArray:
    """Return elements start .. limit-1 of any of the user's axes.

    Along an in axis only if it is the first one, ``start`` lies on a byte and on a group, and the other in axes are
    whole; a shorter last group or byte is fine.
    """
    axis, kind, storage = _label(q, axis)
    size = q.shape[axis]
    if not 0 <= start <= limit <= size:
        raise LayoutError(f"slice {start}:{limit} of axis {axis} of size {size}")
    if (start, limit) == (0, size):
        return dataclasses.replace(q, layout=q.view)
    if kind == "u":
        raise _refuse(q, axis, kind, "an empty slice")
    _check_cut(q, kind, f"slice {start}:{limit} along axis {axis}")
    if kind == "i":
        return _slice_in(q, axis, start, limit)
    return _each(q, storage, lambda a: lax.slice_in_dim(a, start, limit, axis=storage), q.view, keep=True)


def _slice_in(q: QArray, axis: int, start: int, limit: int) -> QArray:
    if q.view.order[axis] != ("i", 0):
        raise _refuse(q, axis, "i", f"slice {start}:{limit}")
    tail, fmt, packing = math.prod(q.view.in_tail), q.fmt, q.fmt.packing
    first, last = start * tail, limit * tail
    group = fmt.group if fmt.per == "group" else None
    if SIGNS in q.aux and (first % q.aux[SIGNS].shape[-1] or (last - first) % q.aux[SIGNS].shape[-1]):
        raise LayoutError(
            f"slice {start}:{limit} of in axis {axis} of a weight that was rotated in blocks of "
            f"{q.aux[SIGNS].shape[-1]}, which mixes all of a block; slice whole blocks, or dequantize first"
        )
    begin = packing.offset(first)
    if begin is None or (group and first % group):
        raise LayoutError(
            f"slice {start}:{limit} of in axis {axis}: element {first} of a row starts inside a byte or word of codes "
            f"({fmt.name}) or a group ({group}); slice at multiples of both, or dequantize first"
        )
    width = packing.row_bytes(last - first)
    codes = lax.slice_in_dim(jnp.asarray(q.codes), begin, begin + width, axis=-1)

    def on_aux(name: str, a: Array) -> Array:
        if name == SMOOTH:
            return lax.slice_in_dim(jnp.asarray(a), first, last, axis=-1)
        if name == SIGNS or name in fmt.row_aux or group is None or a.shape[-1] == 1:
            return a
        return lax.slice_in_dim(jnp.asarray(a), first // group, -(-last // group), axis=-1)

    aux = {k: on_aux(k, a) for k, a in q.aux.items()}
    layout = dataclasses.replace(q.view, pad=row_pad(packing, last - first))
    return dataclasses.replace(q, codes=codes, aux=aux, layout=layout)


def take(q: QArray, axis: int, indices: Array, mode: str = "clip") -> QArray:
    """Gather along a stack or out axis by integers, traced or not: an embedding's rows, an expert's matrices.

    The axis is replaced by the dimensions of ``indices``: none for a scalar, one for a vector, and so on. ``mode`` is
    that of `jnp.take`; "fill" is not offered, since codes have no fill value.
    """
    axis, kind, storage = _label(q, axis)
    if kind not in ("s", "o"):
        raise _refuse(q, axis, kind, "a gather")
    _check_cut(q, kind, f"a gather along axis {axis}")
    if mode not in ("clip", "wrap"):
        raise LayoutError(f"take: mode={mode!r}; 'clip' or 'wrap'")
    indices = jnp.asarray(indices)
    size = q.codes.shape[storage]
    layout = q.view.split(axis, indices.ndim) if indices.ndim else q.view.without(axis)

    def pick(a: Array) -> Array:
        if a.shape[storage] == size:
            return jnp.take(a, indices, axis=storage, mode=mode)
        shape = (*a.shape[:storage], *(1,) * indices.ndim, *a.shape[storage + 1 :])
        return jnp.reshape(a, shape)

    return dataclasses.replace(
        q, codes=pick(jnp.asarray(q.codes)), aux={k: pick(a) for k, a in q.aux.items()}, layout=layout
    )


def transpose(q: QArray, perm: Sequence[int] | None = None) -> QArray:
    """Permute the user's dimensions; nothing is moved."""
    perm = tuple(range(q.ndim))[::-1] if perm is None else tuple(axis_index(int(a), q.ndim) for a in perm)
    if sorted(perm) != list(range(q.ndim)):
        raise LayoutError(f"transpose of {q.ndim} dimensions by {perm}")
    view = q.view
    return dataclasses.replace(q, layout=dataclasses.replace(view, order=tuple(view.order[a] for a in perm)))


def expand_dims(q: QArray, axis: int | Sequence[int]) -> QArray:
    """Insert dimensions of size 1; nothing is moved."""
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    total = q.ndim + len(axes)
    where = {axis_index(a, total) for a in axes}
    if len(where) != len(axes):
        raise LayoutError(f"expand_dims names an axis twice: {axes}")
    labels = iter(q.view.order)
    order = tuple(("u", 0) if a in where else next(labels) for a in range(total))
    return dataclasses.replace(q, layout=dataclasses.replace(q.view, order=order))


def squeeze(q: QArray, axis: int | Sequence[int] | None = None) -> QArray:
    """Remove dimensions of size 1 (all of them by default)."""
    if axis is None:
        axes = [a for a, n in enumerate(q.shape) if n == 1 and q.view.order[a] != ("i", 0)]
    else:
        axes = [axis_index(a, q.ndim) for a in ((axis,) if isinstance(axis, int) else axis)]
    for a in sorted(axes, reverse=True):
        if q.shape[a] != 1:
            raise LayoutError(f"squeeze of axis {a} of size {q.shape[a]}")
        q = _drop_unit(q, a)
    return q


def _drop_unit(q: QArray, axis: int) -> QArray:
    """Remove a user's dimension of size 1, stored or not."""
    axis, kind, storage = _label(q, axis)
    if kind == "u":
        return dataclasses.replace(q, layout=q.view.without(axis))
    if kind in ("s", "o"):
        return _index(q, axis, storage, 0)
    if q.view.count("i") == 1:
        raise LayoutError("the only in axis of a quantized array cannot be removed; dequantize first")
    number = q.view.order[axis][1]
    sizes = in_sizes(q.view, q.length)
    tail = tuple(n for k, n in enumerate(sizes) if k != number)[1:]
    layout = dataclasses.replace(q.view.without(axis), in_tail=tail)
    placeholder = q.codes.ndim - 2
    return dataclasses.replace(
        q,
        codes=jnp.reshape(q.codes, q.codes.shape[:placeholder] + q.codes.shape[placeholder + 1 :]),
        aux={k: jnp.reshape(a, a.shape[:placeholder] + a.shape[placeholder + 1 :]) for k, a in q.aux.items()},
        layout=layout,
    )


def _reorder_out(q: QArray) -> QArray:
    """Store the out axes in the order in which the user sees them."""
    seen = [k for kind, k in q.view.order if kind == "o"]
    if seen == sorted(seen):
        return q
    _check_cut(q, "o", "a reshape that merges out axes in another order than they are stored,")
    stacks, rank = q.stack_ndim, q.codes.ndim
    perm = [*range(stacks), *(stacks + k for k in seen), *range(stacks + len(seen), rank)]
    place = {k: n for n, k in enumerate(seen)}
    order = tuple((kind, place[k]) if kind == "o" else (kind, k) for kind, k in q.view.order)
    return dataclasses.replace(
        q,
        codes=jnp.transpose(q.codes, perm),
        aux={k: jnp.transpose(a, perm) for k, a in q.aux.items()},
        layout=dataclasses.replace(q.view, order=order),
    )


def reshape(q: QArray, shape: Sequence[int]) -> QArray:
    """Reshape, merging or splitting stack axes, out axes, or in axes among themselves; unit dimensions come and go.

    Raises:
        LayoutError: if dimensions of different kinds, or in axes out of their flattened order, would be merged.
    """
    new = resolve_shape(shape, q.size)
    if new == q.shape:
        return dataclasses.replace(q, layout=q.view)
    # Unit dimensions first: they have no stored counterpart, so they may be dropped and inserted at will.
    for a in reversed(range(q.ndim)):
        if q.view.order[a][0] == "u":
            q = _drop_unit(q, a)
    for left, right in reversed(pair_dimensions(q.shape, new)):
        if left and not right:
            q = _drop_unit(q, left[0])
    pairs = pair_dimensions(q.shape, new)
    for left, _ in pairs:
        kinds = {q.view.order[a][0] for a in left}
        numbers = [q.view.order[a][1] for a in left]
        # Out axes may be moved before they are merged; the order of in axes is that of the groups, and stays.
        apart = kinds != {"o"} and numbers != list(range(min(numbers), min(numbers) + len(left))) if left else False
        if len(kinds) > 1 or apart:
            raise LayoutError(
                f"a reshape from {q.shape} to {new} would merge dimensions {left}, which are not stored side by side "
                f"(in axes {q.in_axes}, out axes {q.out_axes}, stack axes {q.stack_axes}); dequantize first"
            )
    return _regroup(_reorder_out(q) if any(len(left) > 1 for left, _ in pairs) else q, pairs, new)


def _regroup(q: QArray, pairs: list[tuple[list[int], list[int]]], new: tuple[int, ...]) -> QArray:
    """Apply a checked reshape: each pair's stored axes become the pair's new ones."""
    order: list[tuple[str, int]] = [("u", 0)] * len(new)
    sizes: dict[str, list[list[int]]] = {"s": [], "o": [], "i": []}  # new sizes per pair, in storage order
    spans: dict[str, list[int]] = {"s": [], "o": []}  # stored axes per pair
    for kind in "soi":
        own = [
            (q.view.order[left[0]][1], left, right)
            for left, right in pairs
            if left and q.view.order[left[0]][0] == kind
        ]
        number = 0
        for _, left, right in sorted(own):
            for b in right:
                order[b] = (kind, number)
                number += 1
            sizes[kind].append([new[b] for b in right])
            if kind != "i":
                spans[kind].append(len(left))
    tail = tuple(n for part in sizes["i"] for n in part)[1:]
    stored = q.codes.shape

    def apply(a: Array) -> Array:
        shape: list[int] = []
        at = 0
        for kind in "so":
            for span, part in zip(spans[kind], sizes[kind], strict=True):
                old = a.shape[at : at + span]
                if old == stored[at : at + span]:
                    shape += part
                elif all(n == 1 for n in old):
                    shape += [1] * len(part)
                else:
                    raise LayoutError(
                        f"aux of shape {a.shape} neither follows nor is shared by codes of shape {stored}"
                    )
                at += span
        return jnp.reshape(a, (*shape, *(1,) * len(tail), a.shape[-1]))

    layout = dataclasses.replace(q.view, order=tuple(order), in_tail=tail)
    return dataclasses.replace(q, codes=apply(q.codes), aux={k: apply(a) for k, a in q.aux.items()}, layout=layout)


def canonical(q: QArray) -> QArray:
    """Return the view [*stack, N, K]: out axes merged into one (N = 1 if there is none), in axes into one."""
    stacks = q.stack_ndim
    outs = q.codes.ndim - stacks - q.view.count("i")

    def apply(a: Array) -> Array:
        shape = (*a.shape[:stacks], math.prod(a.shape[stacks : stacks + outs]), a.shape[-1])
        return a if a.shape == shape else jnp.reshape(a, shape)

    layout = Layout((*(("s", k) for k in range(stacks)), ("o", 0), ("i", 0)), (), q.layout.pad)
    return dataclasses.replace(q, codes=apply(q.codes), aux={k: apply(a) for k, a in q.aux.items()}, layout=layout)


def concatenate(arrays: Sequence[QArray], axis: int) -> QArray:
    """Join arrays of one format along a stack or out axis.

    Aux that an array shares along that axis (the scale of ``per="tensor"``) is repeated over its part, so that the
    joined array decodes to the same numbers.
    """
    if not arrays:
        raise LayoutError("concatenate needs at least one array")
    first = arrays[0]
    axis, kind, _ = _label(first, axis)
    if kind not in ("s", "o"):
        raise _refuse(first, axis, kind, "a concatenation")
    if len(arrays) > 1:
        _check_cut(first, kind, f"a concatenation along axis {axis}")
    if kind == "o" and len(arrays) > 1 and any(SMOOTH in q.aux or SIGNS in q.aux for q in arrays):
        how = "smoothed by constants" if any(SMOOTH in q.aux for q in arrays) else "rotated by signs"
        raise LayoutError(f"concatenate: each of these weights is {how} of its own; dequantize first")
    if any(q.view.order != first.view.order for q in arrays):
        arrays = [_reorder_out(q) for q in arrays]
        first = arrays[0]
    for q in arrays:
        if (q.fmt, q.view, q.dtype, sorted(q.aux)) != (first.fmt, first.view, first.dtype, sorted(first.aux)):
            raise LayoutError(
                f"concatenate: {q!r} and {first!r} differ in format, layout or dtype; "
                "all have to agree, or dequantize first"
            )
        if [n for a, n in enumerate(q.shape) if a != axis] != [n for a, n in enumerate(first.shape) if a != axis]:
            raise LayoutError(f"concatenate along axis {axis}: shapes {first.shape} and {q.shape} differ elsewhere")
    _, _, storage = _label(first, axis)

    def full(q: QArray, a: Array) -> Array:
        shape = (*a.shape[:storage], q.codes.shape[storage], *a.shape[storage + 1 :])
        return jnp.broadcast_to(a, shape)

    def joined(name: str) -> Array:
        parts = [full(q, q.aux[name]) for q in arrays]
        # Along other axes an aux may be shared in one array and not in another of the same format.
        shape = tuple(max(p.shape[d] for p in parts) for d in range(parts[0].ndim))
        parts = [jnp.broadcast_to(p, (*shape[:storage], p.shape[storage], *shape[storage + 1 :])) for p in parts]
        return jnp.concatenate(parts, axis=storage)

    codes = jnp.concatenate([jnp.asarray(q.codes) for q in arrays], axis=storage)
    return dataclasses.replace(first, codes=codes, aux={k: joined(k) for k in first.aux}, layout=first.view)


def stack(arrays: Sequence[QArray]) -> QArray:
    """Join arrays of one format and shape along a new leading stack axis."""
    if not arrays:
        raise LayoutError("stack needs at least one array")
    grown = []
    for q in arrays:
        view = q.view
        order = (("s", 0), *((kind, k + 1) if kind == "s" else (kind, k) for kind, k in view.order))
        aux = {k: jnp.asarray(a)[None] for k, a in q.aux.items()}
        layout = dataclasses.replace(view, order=order)
        grown.append(dataclasses.replace(q, codes=jnp.asarray(q.codes)[None], aux=aux, layout=layout))
    return concatenate(grown, 0)

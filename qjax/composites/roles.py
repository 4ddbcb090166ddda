"""Telling batch, head, group and token axes of attention apart.

The products alone do not say which axis is which. The projection that made the queries does: its heads come from the
weight, like the features, its batch and its tokens from the activation. Where there is no projection in sight, heads
that were split off the feature dimension are known, and then the usual order of dimensions decides.
"""

from __future__ import annotations

from collections.abc import Sequence

from qjax.composites import axes as ax
from qjax.composites.axes import Axis, Labels
from qjax.composites.constants import ELEMENTWISE
from qjax.composites.graph import Node, Value
from qjax.composites.scores import product_dims

_STEPS = 64


def roles(
    q: Value,
    labels: Labels,
    batch: Sequence[Axis],
    free: Sequence[Axis],
    feature: Sequence[Axis],
    query: Sequence[Axis] | None,
) -> dict[Axis, str]:
    """Return the role of every axis of the scores but the key's: ``batch``, ``head``, ``group`` or ``query``.

    Args:
        q: the queries as they enter the product.
        labels: axes of their dimensions.
        batch: axes shared with the keys.
        free: axes of the queries alone.
        feature: axes that are contracted.
        query: the token axes, if a causal mask has told them.
    """
    sides, together, place = _origin(q, labels)
    if not all(a in place for a in batch):
        place = {a: d for d, label in enumerate(labels) for a in ax.leaves([label])}
    found: dict[Axis, str] = {}
    feature_sides = {sides[a] for a in feature if a in sides}
    if len(feature_sides) == 1:
        (weight,) = feature_sides
        for axis in batch:
            if axis in sides:
                found[axis] = "head" if sides[axis] == weight else "batch"
        for axis in free:
            if axis in sides:
                found[axis] = "group" if sides[axis] == weight else "query"
    for dim in together.values():  # split off one dimension of an input: with the features, they are heads
        if any(a in feature for a in dim):
            found.update({a: "head" for a in dim if a in batch})
            found.update({a: "group" for a in dim if a in free})
        elif len(dim) > 1 and any(a in batch for a in dim) and any(a in free for a in dim):
            found.update({a: "head" for a in dim if a in batch})
            found.update({a: "group" for a in dim if a in free})
    _usual_order(found, place, batch, free)
    if query is not None and set(query) <= set(free):
        found.update({a: "query" if a in query else "group" for a in free})
    elif free and not any(found[a] == "query" for a in free):
        found.update({a: "query" for a in free})
    return found


def _usual_order(found: dict[Axis, str], place: dict[Axis, int], batch: Sequence[Axis], free: Sequence[Axis]) -> None:
    """Decide what is left: the innermost shared axis is the head, a second query axis right behind it the group."""
    open_ = [a for a in batch if a not in found]
    if open_ and "head" not in found.values():
        last = max(open_, key=lambda a: place.get(a, -1))
        # A single shared axis in front is the batch; behind anything else (a batch of one, tokens) it is the head.
        if len(batch) > 1 or place.get(last, 0) > 0:
            found[last] = "head"
    for axis in batch:
        found.setdefault(axis, "batch")
    undecided = [a for a in free if a not in found]
    if len(free) > 1 and batch and "group" not in found.values():
        behind = max(place.get(a, -1) for a in batch) + 1
        for axis in undecided:
            if place.get(axis) == behind and any(a is not axis and place.get(a) != behind for a in free):
                found[axis] = "group"
    for axis in free:
        found.setdefault(axis, "query")


def _origin(value: Value, labels: Labels) -> tuple[dict[Axis, str], dict[int, list[Axis]], dict[Axis, int]]:
    """Walk back to the projection or input that ``value`` was made from.

    Returns:
        For each axis, which side of the projection's product it comes from (empty without a projection); the axes of
        each dimension of the input (empty without one); and for each axis its dimension in what was reached.
    """
    alias: dict[Axis, list[Axis]] = {}  # axis of a whole -> axes of the slice that was taken
    for _ in range(_STEPS):
        value, labels = ax.strip(value, labels)
        node = value.node
        source = _source(node, value) if node is not None else None
        if source is None:
            break
        labels = [_resized(label, n, alias) for label, n in zip(labels, source.shape, strict=True)]
        value = source
    dims = {d: [b for a in ax.leaves([label]) for b in _sliced(a, alias)] for d, label in enumerate(labels)}
    place = {a: d for d, axes in dims.items() for a in axes}
    if value.node is None:
        return {}, dims, place
    if value.node.name == "dot_general":
        return _sides(value.node, dims), {}, place
    return {}, {}, place


def _source(node: Node, value: Value) -> Value | None:
    """Return the operand of the same rank to follow through one step of rotary embedding, norm, bias or split."""
    if node.name in ("slice", "dynamic_slice", "split", "concatenate", "pad"):
        return node.inputs[0]
    if node.name in ELEMENTWISE:
        return next((v for v in node.inputs if not v.fixed and v.shape == value.shape), None)
    return None


def _resized(label: tuple[Axis, ...], size: int, alias: dict[Axis, list[Axis]]) -> tuple[Axis, ...]:
    axes = ax.leaves([label])
    if ax.size(axes) == size:
        return label
    new = Axis(size)
    alias[new] = axes
    return (new,)


def _sliced(axis: Axis, alias: dict[Axis, list[Axis]]) -> list[Axis]:
    """Return the axes that ``axis`` was before it was traced back through slices."""
    if axis not in alias:
        return [axis]
    return [b for a in alias[axis] for b in _sliced(a, alias)]


def _sides(node: Node, dims: dict[int, list[Axis]]) -> dict[Axis, str]:
    batch, free = product_dims(node)
    sides = ["batch"] * len(batch[0]) + ["lhs"] * len(free[0]) + ["rhs"] * len(free[1])
    return {a: sides[d] for d, axes in dims.items() for a in axes}

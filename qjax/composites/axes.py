"""Following dimensions through ops that only move, split, merge or repeat them.

A dimension is labelled with the :class:`Axis` objects it is made of, outermost first; a merged ``batch * heads``
dimension has two. Reshapes that split a dimension split its axis, for every label that mentions it.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Sequence

from qjax.composites.constants import uniform
from qjax.composites.graph import Node, Value


class Axis:
    """One logical axis, identified by the object; ``parts`` is set once a reshape has split it."""

    __slots__ = ("parts", "size")

    def __init__(self, size: int):
        self.size = size
        self.parts: tuple[Axis, Axis] | None = None

    def __repr__(self) -> str:
        return f"Axis({self.size})"

    def split(self, size: int) -> tuple[Axis, Axis]:
        """Split into an outer axis of ``size`` and the rest; ``size`` divides this axis."""
        self.parts = (Axis(size), Axis(self.size // size))
        return self.parts


Label = tuple[Axis, ...]
Labels = list[Label]

# Ops whose result is their (only or corresponding) operand, as far as a match is concerned.
_SAME = frozenset(
    {
        "convert_element_type",
        "copy",
        "copy_p",
        "device_put",
        "mesh_cast",
        "name",
        "optimization_barrier",
        "pbroadcast",
        "pcast",
        "pvary",
        "reduce_precision",
        "reshard",
        "sharding_constraint",
        "stop_gradient",
    }
)
_MOVES = frozenset({"transpose", "reshape", "broadcast_in_dim", "squeeze", "expand_dims"})
TRANSPARENT = _SAME | _MOVES


def fresh(shape: Iterable[int]) -> Labels:
    """Return new labels for a value of ``shape``."""
    return [(Axis(n),) for n in shape]


def leaves(labels: Iterable[Label]) -> list[Axis]:
    """Return the axes of ``labels`` in order, with those that have been split replaced by their parts."""
    out: list[Axis] = []
    stack = [axis for label in labels for axis in label][::-1]
    while stack:
        axis = stack.pop()
        if axis.parts is None:
            out.append(axis)
        else:
            stack += axis.parts[::-1]
    return out


def proper(axes: Iterable[Axis]) -> list[Axis]:
    """Return the axes that are not of size one."""
    return [a for a in axes if a.size != 1]


def regroup(labels: Sequence[Label], shape: Sequence[int]) -> Labels | None:
    """Return labels of ``shape`` after a row-major reshape, splitting axes where needed; None if they do not align."""
    pending = collections.deque(leaves(labels))
    if 0 in shape or any(a.size == 0 for a in pending):
        return None
    out: Labels = []
    for size in shape:
        if size == 1:
            out.append((pending.popleft(),) if pending and pending[0].size == 1 else (Axis(1),))
            continue
        # Sizes may be symbolic (exported at any batch size): only equality and divisibility are asked for.
        label: list[Axis] = []
        need = size
        while need != 1:
            if not pending:
                return None
            axis = pending.popleft()
            if axis.size != need and need % axis.size != 0:
                if axis.size % need != 0:
                    return None
                axis, rest = axis.split(need)
                pending.appendleft(rest)
            label.append(axis)
            need = need // axis.size
        out.append(tuple(label))
    return None if proper(pending) else out


def shared(value: Value, shape: Sequence[int], labels: Labels) -> Labels:
    """Return labels of an operand of an elementwise op whose result has ``shape`` and ``labels``."""
    if not value.shape:
        return []
    return [label if n == m else (Axis(1),) for n, m, label in zip(value.shape, shape, labels, strict=True)]


def backward(node: Node, out: Labels, position: int = 0) -> Labels | None:
    """Return the labels of the operand of a transparent node, given those of its result; None if there are none."""
    name = node.name
    if name in _SAME:
        return out
    source = node.inputs[0].shape
    if name == "transpose":
        labels: Labels = [()] * len(source)
        for i, d in enumerate(node.params["permutation"]):
            labels[d] = out[i]
        return labels
    if name == "broadcast_in_dim":
        shape = node.output.shape
        dims = node.params["broadcast_dimensions"]
        return [out[d] if n == shape[d] else (Axis(1),) for n, d in zip(source, dims, strict=True)]
    if name == "squeeze":
        dims = {d % len(source) for d in node.params["dimensions"]}
        rest = iter(out)
        return [(Axis(1),) if d in dims else next(rest) for d in range(len(source))]
    if name == "reshape" and node.params.get("dimensions") is None:
        return regroup(out, source)
    return None


def forward(node: Node, labels: Labels) -> Labels | None:
    """Return the labels of the result of a transparent node, given those of its operand; None if there are none."""
    name = node.name
    if name in _SAME:
        return labels
    shape = node.output.shape
    if name == "transpose":
        return [labels[d] for d in node.params["permutation"]]
    if name == "broadcast_in_dim":
        out = fresh(shape)
        for i, d in enumerate(node.params["broadcast_dimensions"]):
            if node.inputs[0].shape[i] == shape[d]:
                out[d] = labels[i]
        return out
    if name == "squeeze":
        dims = {d % len(labels) for d in node.params["dimensions"]}
        return [label for d, label in enumerate(labels) if d not in dims]
    if name == "reshape" and node.params.get("dimensions") is None:
        return regroup(labels, shape)
    return None


def result_of(node: Node, operand: Value) -> Value:
    """Return the result of a transparent node that corresponds to ``operand``."""
    return node.outputs[node.inputs.index(operand)] if len(node.outputs) > 1 else node.output


def source_of(value: Value) -> Value | None:
    """Return what a transparent node made ``value`` from, or None if no such node made it."""
    node = value.node
    if node is None or node.name not in TRANSPARENT:
        return None
    return node.inputs[node.outputs.index(value)] if len(node.outputs) > 1 else node.inputs[0]


def strip(value: Value, labels: Labels, passed: list[Node] | None = None) -> tuple[Value, Labels]:
    """Walk back through transparent nodes as far as dimensions can be followed.

    Args:
        value: where to start.
        labels: of its dimensions.
        passed: collects the nodes walked through.

    Returns:
        The value at the other end and the labels of its dimensions.
    """
    while (source := source_of(value)) is not None:
        assert value.node is not None
        before = backward(value.node, labels)
        if before is None:
            break
        if passed is not None:
            passed.append(value.node)
        value, labels = source, before
    return value, labels


def root(value: Value) -> Value:
    """Return what ``value`` is, up to moved dimensions and precision."""
    while (source := source_of(value)) is not None:
        value = source
    return value


def scaled(node: Node) -> tuple[Value, float] | None:
    """Return (operand, factor) of a product or quotient with a known number, else None."""
    if node.name == "neg":
        return node.inputs[0], -1.0
    if node.name == "mul":
        for operand, other in (node.inputs, node.inputs[::-1]):
            factor = uniform(other)
            if factor is not None and operand.shape == node.output.shape:
                return operand, factor
    elif node.name == "div":
        factor = uniform(node.inputs[1])
        if factor and node.inputs[0].shape == node.output.shape:
            return node.inputs[0], 1.0 / factor
    return None


def size(axes: Iterable[Axis]) -> int:
    """Return the number of elements spanned by ``axes``."""
    return math.prod(a.size for a in axes)

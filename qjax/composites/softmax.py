"""Finding softmaxes, however they are written.

The anchor is ``exp``; the proof is a quotient whose divisor is the sum of that very exponential along some axes, laid
back over them. A shift inside the exponential belongs to the softmax only if it is constant along those axes.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from qjax.composites import axes as ax
from qjax.composites.axes import Axis, Labels
from qjax.composites.base import Composite, between, ordered
from qjax.composites.constants import uniform
from qjax.composites.graph import Level, Node, Value

MASKED = -1e4
"""A constant at or below this, put in place of a score, removes it: its exponential is zero."""


@dataclasses.dataclass(frozen=True)
class Softmax(Composite):
    """``output = exp(logits) / sum(exp(logits), axes)``.

    Attributes:
        logits: the operand, before any shift.
        axes: dimensions of ``output`` that sum to one, ascending.
        exp: the node of the exponential.
        labels: axes of the output's dimensions, for walking on from here.
        logit_labels: axes of the operand's dimensions.
        zeroed: predicates (stripped) of ``where(mask, p, 0)`` that repeat a mask of the logits.
    """

    op: ClassVar[str] = "softmax"
    logits: Value
    axes: tuple[int, ...]
    exp: Node
    labels: tuple[tuple[Axis, ...], ...] = dataclasses.field(repr=False)
    logit_labels: tuple[tuple[Axis, ...], ...] = dataclasses.field(repr=False)
    zeroed: tuple[Value, ...] = dataclasses.field(repr=False, default=())


def find_softmax(level: Level) -> list[Softmax]:
    """Return the softmaxes of a level, in program order of their exponentials.

    Matched: ``jax.nn.softmax`` (with or without ``JAX_SOFTMAX_CUSTOM_JVP``, with ``where=``), exponential over sum by
    hand with or without subtracting a maximum, as a quotient or as a product with the reciprocal, with casts between.
    Not matched: ``exp(log_softmax(x))``, a divisor with something added, and products normalised later.
    """
    return [found for node in level.named("exp") for found in _from_exp(level, node)]


def _from_exp(level: Level, exp: Node) -> list[Softmax]:
    start = exp.output
    if not start.shape:
        return []
    masks = _zero_masks(exp)
    sums: dict[Node, Labels] = {}
    quotients: list[tuple[Node, Labels]] = []
    queue: list[tuple[Value, Labels]] = [(start, ax.fresh(start.shape))]
    for value, labels in queue:
        for user in value.users:
            if user.name == "reduce_sum":
                sums[user] = labels
            elif user.name == "div" and user.inputs[0] is value or user.name == "mul":
                if user.output.shape == value.shape:
                    quotients.append((user, labels))
            elif user.name == "select_n":
                if zeroes(user, value, masks):
                    queue.append((user.output, labels))
            elif user.name in ax.TRANSPARENT and (after := ax.forward(user, labels)) is not None:
                queue.append((ax.result_of(user, value), after))
        if len(queue) > 32:
            return []
    if not sums:
        return []
    found = []
    for node, labels in quotients:
        divisor = _divisor(node, {v for v, _ in queue})
        if divisor is None:
            continue
        soft = _normalised(divisor, node, labels, sums)
        if soft is None:
            continue
        logits, logit_labels = _logits(exp, queue[0][1], soft)
        dims = tuple(d for d, label in enumerate(labels) if set(soft) & set(ax.leaves([label])))
        if not all(set(ax.leaves([labels[d]])) <= set(soft) for d in dims):
            continue  # merged with another dimension meanwhile
        output = node.output
        if len(output.users) == 1 and output not in level.outputs and zeroes(output.users[0], output, masks):
            output = output.users[0].output
        # A shift computed from afar (budget) is an operand like any other; the exponential always belongs.
        nodes = between([output], [logits, *masks]) or between([output], [exp.output, *masks]) or set()
        nodes.add(exp)
        found.append(
            Softmax(
                kind="softmax",
                output=output,
                nodes=ordered(nodes),
                exposed=level.exposed(nodes, output),
                logits=logits,
                axes=dims,
                exp=exp,
                labels=tuple(labels),
                logit_labels=tuple(logit_labels),
                zeroed=tuple(masks),
            )
        )
    return found


def _zero_masks(exp: Node) -> list[Value]:
    """Predicates of masks right below the exponential; where one hides a score, the exponential is zero already."""
    value, masks = exp.inputs[0], []
    for _ in range(8):
        node = value.node
        if node is None:
            break
        if node.name in ax.TRANSPARENT:
            value = node.inputs[0]
        elif node.name == "sub":
            value = node.inputs[0]
        elif node.name == "select_n" and (fill := masked_fill(node)) is not None:
            if fill[2]:
                masks.append(ax.root(node.inputs[0]))
            value = fill[0]
        else:
            break
    return masks


def masked_fill(node: Node) -> tuple[Value, float, bool] | None:
    """Return (scores, fill, whether a true predicate keeps them) of a select that hides scores, else None."""
    if len(node.inputs) != 3:
        return None
    for scores, fill, keep in ((node.inputs[2], node.inputs[1], True), (node.inputs[1], node.inputs[2], False)):
        number = uniform(fill)
        if number is not None and number <= MASKED:
            return scores, number, keep
    return None


def zeroes(node: Node, value: Value, masks: list[Value]) -> bool:
    """Whether a select only repeats, with zeros, a mask that the exponential has seen."""
    return (
        len(node.inputs) == 3
        and node.inputs[2] is value
        and uniform(node.inputs[1]) == 0.0
        and any(ax.root(node.inputs[0]) is mask for mask in masks)
    )


def _divisor(node: Node, exponentials: set[Value]) -> Value | None:
    """Return what the exponential is divided by at ``node``, up to moved dimensions."""
    if node.name == "div":
        return node.inputs[1]
    for exponential, factor in (node.inputs, node.inputs[::-1]):
        if exponential not in exponentials:
            continue
        source = ax.root(factor).node
        if source is not None and source.name == "div" and uniform(source.inputs[0]) == 1.0:
            return factor
        if source is not None and source.name == "integer_pow" and source.params["y"] == -1:
            return factor
    return None


def _normalised(divisor: Value, node: Node, labels: Labels, sums: dict[Node, Labels]) -> list[Axis] | None:
    """Return the axes summed over, if ``divisor`` is a sum of the exponential laid out along it."""
    value, below = ax.strip(divisor, ax.shared(divisor, node.output.shape, labels))
    while value.node is not None and value.node.name in ("div", "integer_pow") and value.node not in sums:
        inner = value.node.inputs[-1] if value.node.name == "div" else value.node.inputs[0]
        if inner.shape != value.shape:
            return None
        value, below = ax.strip(inner, below)  # the reciprocal, checked by _divisor
        if node.name == "div":
            return None
    total = value.node
    if total is None or total not in sums:
        return None
    summed = {int(d) % len(sums[total]) for d in total.params["axes"]}
    kept = [label for d, label in enumerate(sums[total]) if d not in summed]
    soft = ax.leaves([label for d, label in enumerate(sums[total]) if d in summed])
    if len(kept) != len(below) or not soft:
        return None
    for ours, theirs in zip(kept, below, strict=True):
        if ax.proper(ax.leaves([ours])) != ax.proper(ax.leaves([theirs])):
            return None
    return soft


def _logits(exp: Node, labels: Labels, soft: list[Axis]) -> tuple[Value, Labels]:
    """Return the softmax operand: the exponential's, without a shift that is constant along the softmax axes."""
    value, below = ax.strip(exp.inputs[0], labels)
    node = value.node
    if node is not None and node.name == "sub" and node.inputs[0].shape == node.output.shape:
        shift = node.inputs[1]
        if not shift.shape or _constant_along(shift, ax.shared(shift, node.output.shape, below), soft):
            return node.inputs[0], below
    return exp.inputs[0], labels


def _constant_along(value: Value, labels: Labels, soft: list[Axis]) -> bool:
    """Whether ``value`` is broadcast along the axes ``soft``."""
    for _ in range(8):
        if not set(soft) & set(ax.leaves(labels)):
            return True
        source = ax.source_of(value)
        if source is None:
            return False
        assert value.node is not None
        before = ax.backward(value.node, labels)
        if before is None:
            return False
        value, labels = source, before
    return False

"""From the operand of a softmax back to the product of queries and keys: scale, soft-cap, biases, masks.

The steps in between may come in any order that is the same as
``mask(softcap * tanh(scale * product / softcap) + biases)``; anything else is not attention scores.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from qjax.composites import axes as ax
from qjax.composites.axes import Axis, Labels
from qjax.composites.constants import at, uniform
from qjax.composites.graph import Node, Value
from qjax.composites.softmax import MASKED, masked_fill

_STEPS = 160
_LOOKS = 4096


@dataclasses.dataclass(frozen=True)
class Condition:
    """One condition of a mask: the scores where ``value`` is ``keep`` stay, the others are removed.

    Attributes:
        value: boolean (or 0 and 1 as numbers); with ``factor``, a constant summand: zero where scores stay.
        labels: axes of its dimensions.
        keep: which truth value keeps.
        fill: what takes the place of a removed score, or is added to it; -inf for a constant summand.
        factor: number that the constant summand is multiplied by; None for a predicate.
    """

    value: Value
    labels: tuple[tuple[Axis, ...], ...]
    keep: bool
    fill: float
    factor: float | None = None


@dataclasses.dataclass(frozen=True)
class Term:
    """A value that is added (``factor`` times) or multiplied (to the power ``factor``), with axes of its dimensions."""

    value: Value
    labels: tuple[tuple[Axis, ...], ...]
    factor: float


@dataclasses.dataclass
class Scores:
    """What stands between the product and the softmax.

    Attributes:
        product: the product of queries and keys.
        labels: axes of its dimensions.
        key_side: which operand holds the keys.
        scale: factor on the product.
        softcap: ``scores = softcap * tanh(scale * product / softcap)``; None if there is none.
        gains: run-time factors on the product (a temperature per head).
        biases: summands.
        conditions: of all masks, joined by "and".
        nodes: the nodes passed, the product included.
    """

    product: Node
    labels: Labels
    key_side: int
    scale: float
    softcap: float | None
    gains: tuple[Term, ...]
    biases: tuple[Term, ...]
    conditions: tuple[Condition, ...]
    nodes: tuple[Node, ...]


@dataclasses.dataclass(frozen=True)
class _State:
    factor: float = 1.0
    cap: float | None = None
    gains: tuple[Term, ...] = ()
    biases: tuple[Term, ...] = ()
    conditions: tuple[Condition, ...] = ()
    nodes: tuple[Node, ...] = ()


def find_scores(logits: Value, labels: Labels, soft: list[Axis]) -> Iterator[Scores]:
    """Yield the ways in which ``logits`` come from a product of queries and keys (two, if a bias is a product too).

    Args:
        logits: operand of a softmax.
        labels: axes of its dimensions.
        soft: the axes that the softmax sums over.
    """
    # One budget for all branches: sums of sums that share operands would take exponential time otherwise.
    yield from _back(logits, labels, _State(), soft, iter(range(_STEPS)))


def _back(value: Value, labels: Labels, state: _State, soft: list[Axis], budget: Iterator[int]) -> Iterator[Scores]:
    for _ in budget:
        passed: list[Node] = []
        value, labels = ax.strip(value, labels, passed)
        node = value.node
        if node is None or value.fixed:
            return
        state = dataclasses.replace(state, nodes=(*state.nodes, *passed, node))
        if node.name == "dot_general":
            side = _key_side(node, labels, soft)
            scale = state.factor if state.cap is None else state.factor * state.cap
            if side is not None:
                yield Scores(
                    product=node,
                    labels=labels,
                    key_side=side,
                    scale=scale,
                    softcap=state.cap,
                    gains=state.gains,
                    biases=state.biases,
                    conditions=state.conditions,
                    nodes=state.nodes,
                )
            return
        if (found := ax.scaled(node)) is not None:
            value = found[0]
            state = dataclasses.replace(state, factor=state.factor * found[1])
        elif node.name == "tanh" and state.cap is None and not state.gains:
            value = node.inputs[0]
            state = dataclasses.replace(state, cap=state.factor, factor=1.0)
        elif node.name == "select_n":
            hidden = masked_fill(node)
            # Below a soft-cap a fill is not a mask: tanh brings it back to the cap. Nor below a gain of unknown sign.
            if hidden is None or state.cap is not None or state.gains or hidden[0].shape != node.output.shape:
                return
            scores, fill, keep = hidden
            if fill * state.factor > MASKED:
                return
            below = ax.shared(node.inputs[0], node.output.shape, labels)
            split = _conditions(node.inputs[0], below, keep, fill * state.factor)
            value, state = scores, dataclasses.replace(state, conditions=(*state.conditions, *split))
        elif node.name in ("mul", "div"):
            gained = _gain(node, labels, soft)
            if gained is None or state.cap is not None:
                return
            value, term = gained
            state = dataclasses.replace(state, gains=(*state.gains, term))
        elif node.name in ("add", "sub") and state.cap is None and not state.gains:
            yield from _sum(node, labels, state, soft, budget)
            return
        else:
            return


def _key_side(node: Node, labels: Labels, soft: list[Axis]) -> int | None:
    """Return the operand whose only free dimension is the softmax's, if the other has none of it."""
    batch, free = product_dims(node)
    groups = labels[len(batch[0]) : len(batch[0]) + len(free[0])], labels[len(batch[0]) + len(free[0]) :]
    for side in (1, 0):
        axes = [a for a in ax.leaves(groups[side]) if a.size != 1 or a in soft]
        if axes == soft:
            return side
    return None


def product_dims(node: Node) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Return (batch, free) dimensions of each operand of a ``dot_general``, as numbers of the operand's dimensions."""
    contracted, batch = node.params["dimension_numbers"]
    free = tuple(
        tuple(d for d in range(v.ndim) if d not in contracted[i] and d not in batch[i])
        for i, v in enumerate(node.inputs)
    )
    return tuple(tuple(b) for b in batch), free


def _sum(node: Node, labels: Labels, state: _State, soft: list[Axis], budget: Iterator[int]) -> Iterator[Scores]:
    """Go on along the summand that leads to a product; the other one is a bias or an additive mask."""
    sign = -1.0 if node.name == "sub" else 1.0
    choices = [(node.inputs[0], node.inputs[1], sign)]
    if node.name == "add":
        choices.append((node.inputs[1], node.inputs[0], 1.0))
    for scores, other, factor in choices:
        if scores.shape != node.output.shape or scores.fixed:
            continue
        biases, conditions = _summands(other, ax.shared(other, node.output.shape, labels), factor * state.factor)
        after = dataclasses.replace(state, biases=(*state.biases, *biases), conditions=(*state.conditions, *conditions))
        yield from _back(scores, labels, after, soft, budget)


def _gain(node: Node, labels: Labels, soft: list[Axis]) -> tuple[Value, Term] | None:
    """Return (scores, factor) of a product with a run-time value that is constant along the softmax axes."""
    choices = [(node.inputs[0], node.inputs[1], 1.0 if node.name == "mul" else -1.0)]
    if node.name == "mul":
        choices.append((node.inputs[1], node.inputs[0], 1.0))
    for scores, gain, power in choices:
        if scores.shape != node.output.shape or scores.fixed:
            continue
        below = ax.shared(gain, node.output.shape, labels)
        source, above = ax.strip(gain, below)
        if len(ax.proper(ax.leaves(above))) <= 1 and not set(soft) & set(ax.leaves(above)) and source is not scores:
            return scores, Term(source, tuple(above), power)
    return None


def _conditions(value: Value, labels: Labels, keep: bool, fill: float) -> list[Condition]:
    """Split a predicate into conditions that all have to hold."""
    out: list[Condition] = []
    stack = [(value, labels, keep)]
    while stack:
        value, labels, keep = stack.pop()
        source, below = ax.strip(value, labels)
        if source.fixed and (number := uniform(source)) is not None and bool(number) == keep:
            continue  # holds everywhere
        whole = Condition(source, tuple(below), keep, fill)
        node = source.node
        if node is None or len(out) + len(stack) > 16:
            out.append(whole)
            continue
        parts: list[tuple[Value, bool]] = []
        if node.name == ("and" if keep else "or") and source.dtype == bool:
            parts = [(v, keep) for v in node.inputs]
        elif node.name == "not" and source.dtype == bool:
            parts = [(node.inputs[0], not keep)]
        elif node.name in ("ne", "eq") and uniform(node.inputs[1]) == 0.0:
            parts = [(node.inputs[0], keep == (node.name == "ne"))]
        elif node.name == "select_n" and source.dtype == bool and keep and uniform(node.inputs[1]) == 0.0:
            parts = [(v, keep) for v in node.inputs[::2]]  # where(a, b, False)
        if not parts:
            out.append(whole)
        stack += [(v, ax.shared(v, source.shape, below), kept) for v, kept in reversed(parts)]
    return out


def _summands(value: Value, labels: Labels, factor: float) -> tuple[list[Term], list[Condition]]:
    """Split what is added to scores into biases and masks: ``mask_bias + position_bias`` is one of each."""
    biases: list[Term] = []
    conditions: list[Condition] = []
    stack = [(value, labels, factor)]
    while stack:
        value, labels, factor = stack.pop()
        source, below = ax.strip(value, labels)
        node = source.node
        found = _additive(source, below, factor)
        if found is not None:
            conditions += found
        elif node is not None and node.name == "add" and not source.fixed and len(stack) < 8:
            stack += [(v, ax.shared(v, source.shape, below), factor) for v in reversed(node.inputs)]
        else:
            biases.append(Term(source, tuple(below), factor))
    return biases, conditions


def _additive(source: Value, below: Labels, factor: float) -> list[Condition] | None:
    """Return the conditions of a mask that is added: zero where scores stay, hugely negative elsewhere."""
    if source.fixed:
        if not source.shape or not _hides(source, factor):
            return None
        return [Condition(source, tuple(below), False, -float("inf"), factor)]
    while source.node is not None and (found := ax.scaled(source.node)) is not None:
        factor *= found[1]
        source, below = ax.strip(found[0], below)
    node = source.node
    if source.dtype == bool and factor <= MASKED:  # hidden * -1e9
        return _conditions(source, below, False, factor)
    if node is not None and node.name == "select_n" and len(node.inputs) == 3:
        chosen = [uniform(v) for v in node.inputs[1:]]
        for keep in (False, True):
            stay, gone = chosen[keep], chosen[not keep]
            if stay == 0.0 and gone is not None and gone * factor <= MASKED:
                return _conditions(node.inputs[0], ax.shared(node.inputs[0], source.shape, below), keep, gone * factor)
    if node is not None and node.name == "sub":  # (1 - keep) * -1e9 or (keep - 1) * 1e9, of a keep known to be 0 or 1
        for predicate, one, fill in (*node.inputs[::-1], factor), (*node.inputs, -factor):
            if uniform(one) == 1.0 and fill <= MASKED and ax.root(predicate).dtype == bool:
                return _conditions(predicate, ax.shared(predicate, source.shape, below), True, fill)
    return None


def _hides(value: Value, factor: float) -> bool:
    """Whether a constant summand is zero or hugely negative at every place looked at."""
    shape = [n if isinstance(n, int) else 31 for n in value.shape]  # symbolic lengths: any will do
    elements = math.prod(shape)
    if elements <= _LOOKS:
        flat = np.arange(elements)
    else:
        flat = np.unique(np.random.default_rng(0).integers(0, elements, _LOOKS))
    numbers = factor * np.asarray(at(value, np.unravel_index(flat, shape)), np.float64)
    gone = numbers <= MASKED
    return bool(np.any(gone) and np.all(gone | (numbers == 0.0)))

"""Finding activation functions by what they compute.

From an anchor (``tanh``, ``erf``, ``logistic``, ...) every elementwise result nearby is tried: if all of its data
comes from one value, the formula between the two is evaluated on a few numbers in double precision and compared with
the known functions. How the formula is associated, or which identity the author used, does not matter; a formula that
differs in any constant is not matched.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from qjax.composites import constants
from qjax.composites.base import Composite, ordered
from qjax.composites.constants import uniform
from qjax.composites.graph import Level, Node, Value

_X = np.concatenate([np.linspace(-5.0, 5.0, 21), [-11.3, -0.013, 0.021, 9.7]])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


_CURVES: dict[str, np.ndarray] = {
    "gelu": 0.5 * _X * constants.ELEMENTWISE["erfc"](-_X / np.sqrt(2.0)),
    "gelu_tanh": _X * _sigmoid(2.0 * np.sqrt(2.0 / np.pi) * (_X + 0.044715 * _X**3)),
    "quick_gelu": _X * _sigmoid(1.702 * _X),
    "silu": _X * _sigmoid(_X),
    "relu": np.maximum(_X, 0.0),
}

# Which functions an anchor may be part of.
_ANCHORS: dict[str, tuple[str, ...]] = {
    "tanh": ("gelu_tanh", "silu"),
    "erf": ("gelu",),
    "erfc": ("gelu",),
    "logistic": ("silu", "quick_gelu", "gelu_tanh"),
    "exp": ("silu", "quick_gelu", "gelu_tanh"),
    "max": ("relu",),
    "select_n": ("relu",),
}

_REACH = 10  # candidates tried per anchor
_LENGTH = 28  # equations in one formula
_CASTS = frozenset({"convert_element_type", "copy", "copy_p"})


@dataclasses.dataclass(frozen=True)
class Activation(Composite):
    """``output = f(input)``, elementwise.

    ``kind`` is ``"gelu"``, ``"silu"`` (also known as swish), ``"quick_gelu"`` (``x * sigmoid(1.702 x)``) or ``"relu"``.

    Attributes:
        input: the operand; an upcast just for this formula belongs to the match.
        approximate: for GELU, whether it is the tanh form.
    """

    op: ClassVar[str] = "activation"
    input: Value
    approximate: bool = False


def find_activations(level: Level, taken: set[Node] | frozenset[Node] = frozenset()) -> list[Activation]:
    """Return the activation functions of a level, one per formula.

    Args:
        level: where to look.
        taken: nodes that belong to other composites (the ``max(0, var)`` of a LayerNorm is no ReLU).
    """
    found: dict[Value, Activation] = {}
    known: dict[tuple, str | None] = {}
    for name, curves in _ANCHORS.items():
        for anchor in level.named(name):
            if anchor in taken or not anchor.output.shape or not _plausible(anchor):
                continue
            for node in _candidates(anchor):
                if node in taken:
                    continue
                match = _formula(node, anchor, curves, known)
                if match is None or match.kind == "relu" and _part_of_more(match):
                    continue
                if match.output not in found:
                    found[match.output] = _finish(level, match)
                break
    return list(found.values())


def _is_float(value: Value) -> bool:
    return value.dtype is not None and jnp.issubdtype(value.dtype, jnp.floating)


def _plausible(anchor: Node) -> bool:
    """A cheap test for the anchors that are common outside activations."""
    if not _is_float(anchor.output):
        return False
    if anchor.name == "max":
        return any(uniform(v) == 0.0 for v in anchor.inputs) and not _bounded(anchor)
    if anchor.name == "select_n":
        return any(uniform(v) == 0.0 for v in anchor.inputs[1:])
    return True


def _bounded(node: Node) -> bool:
    """Whether the result is only clipped further, as in relu6 and hard_sigmoid."""
    users = node.output.users
    return len(users) == 1 and users[0].name == "min"


def _candidates(anchor: Node) -> list[Node]:
    """Elementwise nodes downstream that may be the end of the formula, nearest first."""
    if anchor.name in ("max", "select_n"):
        return [anchor]
    shape = anchor.output.shape
    seen, queue = {anchor}, [anchor]
    for node in queue:
        for user in node.output.users:
            if user in seen or len(queue) > _REACH:
                continue
            if user.name in constants.ELEMENTWISE and user.output.shape == shape and _is_float(user.output):
                seen.add(user)
                queue.append(user)
    return sorted(queue[1:], key=lambda n: n.index)


def _part_of_more(relu: Activation) -> bool:
    """Whether a ``max(x, 0)`` is a step of something else: softplus, CELU (meets ``x`` again), random numbers."""
    made_by = {v.node.name for v in _upstream([relu.input]) if v.node is not None}
    if made_by & {"bitcast_convert_type", "random_bits"}:
        return True
    for user in relu.output.users:
        others = [v for v in user.inputs if v is not relu.output]
        if user.name in constants.ELEMENTWISE and relu.input in _upstream(others):
            return True
    return False


def _upstream(values: list[Value]) -> list[Value]:
    """Return values and what they are computed from by a few elementwise operations."""
    found = [v for v in values if not v.fixed]
    for value in found:
        if value.node is not None and value.node.name in constants.ELEMENTWISE and len(found) < 24:
            found += [v for v in value.node.inputs if not v.fixed and v not in found]
    return found


def _formula(end: Node, anchor: Node, curves: tuple[str, ...], known: dict[tuple, str | None]) -> Activation | None:
    """Return the activation that ``end`` computes from a single value, if any."""
    shape = end.output.shape
    inside: list[Node] = []
    frontier = {v for v in end.inputs if not v.fixed}
    inside.append(end)
    while len(inside) <= _LENGTH:
        if len(frontier) == 1 and anchor in inside:
            (x,) = frontier
            if x.shape == shape and _is_float(x):
                kind = _recognise(x, inside, curves, known)
                if kind is not None:
                    return Activation(
                        kind=kind.removesuffix("_tanh"),
                        output=end.output,
                        nodes=ordered(inside),
                        exposed=(),
                        input=x,
                        approximate=kind.endswith("_tanh"),
                    )
        latest = max(frontier, key=lambda v: v.node.index if v.node is not None else -1, default=None)
        if latest is None or latest.node is None or latest.shape != shape:
            return None
        if latest.node.name not in constants.ELEMENTWISE:
            return None
        inside.append(latest.node)
        frontier.discard(latest)
        frontier.update(v for v in latest.node.inputs if not v.fixed)
    return None


def _recognise(x: Value, inside: list[Node], curves: tuple[str, ...], known: dict[tuple, str | None]) -> str | None:
    """Name the function that the nodes compute from ``x``; equal formulas are evaluated once."""
    nodes = sorted(inside, key=lambda n: n.index)
    number: dict[Value, int] = {x: -1}
    key: list = []
    half = False
    for i, node in enumerate(nodes):
        operands: list = []
        for v in node.inputs:
            if v in number:
                operands.append(number[v])
            else:
                constant = uniform(v)
                if constant is None:
                    return None
                operands.append((constant, v.dtype == bool))
        number[node.output] = i
        half = half or (_is_float(node.output) and np.dtype(node.output.dtype).itemsize < 4)
        extra = node.params.get("y") if node.name == "integer_pow" else node.params.get("new_dtype")
        key.append((node.name, str(extra), tuple(operands)))
    signature = (tuple(key), half, curves)
    if signature not in known:
        known[signature] = _compare(_evaluate(nodes, key), half, curves)
    return known[signature]


def _evaluate(nodes: list[Node], key: list) -> np.ndarray | None:
    results: list[np.ndarray] = []
    for node, (name, _, operands) in zip(nodes, key, strict=True):
        values = []
        for operand in operands:
            if isinstance(operand, tuple):
                values.append(np.asarray(bool(operand[0]) if operand[1] else operand[0]))
            else:
                values.append(_X if operand < 0 else results[operand])
        try:
            results.append(constants.apply(name, node.params, values, keep_floats=True))
        except (TypeError, ValueError):
            return None
    return results[-1]


def _compare(y: np.ndarray | None, half: bool, curves: tuple[str, ...]) -> str | None:
    if y is None or np.shape(y) != _X.shape:
        return None
    # The constants of a half-precision formula are rounded to 8 or 11 bits.
    tolerance = (4e-3 if half else 2e-6) * (1.0 + np.abs(_X))
    return next((name for name in curves if np.all(np.abs(y - _CURVES[name]) <= tolerance)), None)


def _finish(level: Level, match: Activation) -> Activation:
    """Take in an upcast before and the downcast after, where nothing else reads what lies between."""
    nodes = set(match.nodes)
    x, output = match.input, match.output
    while x.node is not None and x.node.name in _CASTS and all(user in nodes for user in x.users):
        if x in level.outputs or not _is_float(x.node.inputs[0]):
            break
        nodes.add(x.node)
        x = x.node.inputs[0]
    while len(output.users) == 1 and output.users[0].name in _CASTS and output not in level.outputs:
        after = output.users[0]
        if after.output.dtype not in (output.dtype, x.dtype):
            break
        nodes.add(after)
        output = after.output
    return dataclasses.replace(
        match, input=x, output=output, nodes=ordered(nodes), exposed=level.exposed(nodes, output)
    )

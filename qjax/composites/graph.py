"""One control-flow level of a jaxpr, seen flat.

The pieces of one softmax or one SiLU lie in several nested ``jit`` and ``custom_jvp_call`` bodies (``_where``,
``silu``, ``tril``, ``_take``, ...). :func:`inlined` looks through those bodies without re-tracing or copying anything:
it walks the equations once and substitutes variables by identity, so that every :class:`Node` is an existing equation,
with the :class:`Value` objects that reach it. ``scan``, ``while``, ``cond``, ``shard_map`` and kernels stay opaque
nodes; their bodies are levels of their own.

A body that is called twice (one jaxpr object, two call equations) gives separate nodes and values per call, which is
why a value is an object of its own and not the ``Var``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jax.core import Tracer
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from qjax import _compat
from qjax.composites import constants

Path = tuple[Any, ...]
"""Address of an equation: its number, behind ``number, (parameter, index)`` for each call that it lies in."""

# Parameter that holds the body of a call which computes just what its body computes.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "closed_call": "call_jaxpr",
    "core_closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
}

# A custom_vjp_call is an author's unit; it is looked through only if its body is a small formula made of these.
_FORMULA = (
    frozenset(constants.ELEMENTWISE)
    | constants.STRUCTURAL
    | {
        "reduce_sum",
        "reduce_max",
        "stop_gradient",
        "copy",
        "copy_p",
        "iota",
    }
)
_FORMULA_EQUATIONS = 64

# Evaluation is recursive and repeats shared operands; what takes more operations than this is no mask or number.
_HEAVY = 128

# cuDNN attention is one primitive inside a custom_vjp_call.
FUSED_ATTENTION = "dot_product_attention_fwd_wrapper"


class Value:
    """A value of the flat view: what one variable, literal or constant holds in one call of its jaxpr.

    Attributes:
        atom: the ``Var`` or ``Literal`` in the jaxpr that binds it.
        scope: path of the call whose body binds ``atom``; ``()`` for the level's own jaxpr.
        node: the node that computes it; ``None`` for inputs of the level, literals and constants.
        users: nodes that read it, in program order; a node that reads it twice is listed twice.
        const: the concrete literal or constant, if known.
        source: for an input that is known to be a value of the level outside, that value.
        fixed: whether it can be computed, with little work, without any input of the level.
        weight: operations that this takes; 0 if it is not fixed.
        aliases: further (scope, variable) that hold it: results of the calls in which it is computed, from inside out.
    """

    __slots__ = ("_uniform", "aliases", "atom", "const", "fixed", "node", "scope", "shape", "source", "users", "weight")

    def __init__(self, atom: Any, scope: Path, node: Node | None = None, const: Any = None, weight: int = 0):
        self.atom = atom
        self.scope = scope
        self.node = node
        self.const = const
        self.fixed = weight > 0
        self.weight = weight
        self.source: Value | None = None
        self.users: list[Node] = []
        self.aliases: tuple[tuple[Path, Any], ...] = ()
        self.shape: tuple[int, ...] = getattr(atom.aval, "shape", ())

    @property
    def aval(self) -> Any:
        """The abstract value."""
        return self.atom.aval

    @property
    def dtype(self) -> Any:
        """The element type; ``None`` for tokens and other values without one."""
        return getattr(self.atom.aval, "dtype", None)

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    def __repr__(self) -> str:
        origin = self.node.name if self.node is not None else "const" if self.fixed else "input"
        return f"Value({self.dtype}{list(self.shape)} from {origin})"


class Node:
    """One equation in one call of its jaxpr.

    Attributes:
        eqn: the equation.
        name: its primitive's name.
        path: address from the level's jaxpr, such as ``(12, ("jaxpr", 0), 3)`` for equation 3 in the body (parameter
            ``jaxpr``) of equation 12.
        inputs: values of the operands.
        outputs: values of the results.
        index: position in :attr:`Level.nodes`; operands come from smaller indices.
    """

    __slots__ = ("eqn", "index", "inputs", "name", "outputs", "path")

    def __init__(self, eqn: JaxprEqn, name: str, path: Path, inputs: tuple[Value, ...], index: int):
        self.eqn = eqn
        self.name = name
        self.path = path
        self.inputs = inputs
        self.index = index
        self.outputs: tuple[Value, ...] = ()

    @property
    def params(self) -> dict[str, Any]:
        """The equation's parameters."""
        return self.eqn.params

    @property
    def output(self) -> Value:
        """The first result."""
        return self.outputs[0]

    def __repr__(self) -> str:
        return f"Node({self.name} at {self.path})"


@dataclasses.dataclass(frozen=True, eq=False)
class Level:
    """One control-flow level, flat.

    Attributes:
        jaxpr: the level's own (open) jaxpr.
        nodes: equations in program order, calls replaced by their bodies.
        inputs: values of the jaxpr's constvars, then of its invars.
        outputs: values of the jaxpr's outvars.
        units: bodies of ``custom_vjp_call`` equations that are not looked through, each a flat view of its own whose
            paths start at this level. A rule for the derivative makes such a body a unit, so no match crosses its
            border, but matches inside it are as good as any.
    """

    jaxpr: Jaxpr
    nodes: tuple[Node, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    units: tuple[Level, ...]
    _named: dict[str, list[Node]] = dataclasses.field(repr=False)

    def named(self, *names: str) -> Iterator[Node]:
        """Yield the nodes of the primitives called ``names``, name by name, each in program order."""
        for name in names:
            yield from self._named.get(name, ())

    def node_at(self, path: Path) -> Node:
        """Return the node at ``path``.

        Raises:
            KeyError: no node of this level has that path.
        """
        for node in self.nodes:
            if node.path == path:
                return node
        raise KeyError(path)

    def exposed(self, nodes: Iterable[Node], result: Value) -> tuple[Value, ...]:
        """Return the values computed by ``nodes``, other than ``result``, that something else reads as well."""
        inside = set(nodes)
        returned = set(self.outputs)
        return tuple(
            value
            for node in sorted(inside, key=lambda n: n.index)
            for value in node.outputs
            if value is not result and (value in returned or any(user not in inside for user in value.users))
        )


def inlined(jaxpr: Any, consts: Sequence[Any] = (), scope: Path = (), outside: Sequence[Value | None] = ()) -> Level:
    """Return the flat view of one control-flow level; linear in the number of equations reached.

    Args:
        jaxpr: an open jaxpr, or a closed one (then its own constants are used).
        consts: values of ``jaxpr.constvars``, where known. They let masks and other constants be evaluated.
        scope: put in front of every path.
        outside: for each of ``jaxpr.invars`` the value of the enclosing level that it is, None where it differs from
            step to step. Only values that are fixed there matter.
    """
    consts = list(consts) or _compat.consts_of(jaxpr)
    jaxpr = _compat.open_jaxpr(jaxpr)
    nodes: list[Node] = []
    named: dict[str, list[Node]] = {}
    variables = _compat.constvars_and_invars(jaxpr)
    known = len(consts) if len(consts) == len(jaxpr.constvars) else 0
    inputs = tuple(_constant(v, consts[i], scope) if i < known else Value(v, scope) for i, v in enumerate(variables))
    for value, source in zip(inputs[len(variables) - len(outside) :], outside, strict=True):
        if source is not None and source.fixed:
            value.fixed, value.weight, value.const, value.source = True, source.weight, source.const, source
    outputs = _walk(jaxpr, inputs, scope, nodes, named)
    units = tuple(
        inlined(body, scope=(*node.path, ("call_jaxpr", 0)))
        for node in named.get("custom_vjp_call", ())
        if (body := node.params.get("call_jaxpr")) is not None
    )
    return Level(jaxpr, tuple(nodes), inputs, outputs, units, named)


def _constant(atom: Any, const: Any, scope: Path) -> Value:
    # Keys have no NumPy form, and under an outer transformation a constant may be a tracer: no use for evaluation.
    evaluable = isinstance(getattr(const, "dtype", np.dtype(float)), np.dtype) and not isinstance(const, Tracer)
    return Value(atom, scope, const=const if evaluable else None, weight=int(evaluable))


def _walk(
    jaxpr: Jaxpr, inputs: Sequence[Value], scope: Path, nodes: list[Node], named: dict[str, list[Node]]
) -> tuple[Value, ...]:
    env = dict(zip(_compat.constvars_and_invars(jaxpr), inputs, strict=True))
    evaluable = constants.EVALUABLE
    for i, eqn in enumerate(jaxpr.eqns):
        operands = tuple(
            Value(a, scope, const=a.val, weight=1) if isinstance(a, Literal) else env[a] for a in eqn.invars
        )
        name = eqn.primitive.name
        if name in _CALLS or name == "custom_vjp_call":
            body = _body(name, eqn)
            if body is not None:
                param, sub, consts = body
                inner = (*scope, i, (param, 0))
                bound = [_constant(v, c, inner) for v, c in zip(sub.constvars, consts, strict=True)]
                results = _walk(sub, [*bound, *operands], inner, nodes, named)
                for variable, value in zip(eqn.outvars, results, strict=True):
                    value.aliases = (*value.aliases, (scope, variable))
                env.update(zip(eqn.outvars, results, strict=True))
                continue
        node = Node(eqn, name, (*scope, i), operands, len(nodes))
        weight = 1 if name in evaluable else 0
        for value in operands:
            value.users.append(node)
            weight = weight + value.weight if weight and value.fixed else 0
        if weight > _HEAVY:
            weight = 0
        node.outputs = tuple([Value(v, scope, node, weight=weight) for v in eqn.outvars])
        env.update(zip(eqn.outvars, node.outputs, strict=True))
        nodes.append(node)
        named.setdefault(name, []).append(node)
    return tuple(Value(a, scope, const=a.val, weight=1) if isinstance(a, Literal) else env[a] for a in jaxpr.outvars)


def _body(name: str, eqn: JaxprEqn) -> tuple[str, Jaxpr, list[Any]] | None:
    """Return (parameter, open body, its constants) of a call that may be looked through, else None."""
    param = _CALLS.get(name, "call_jaxpr")
    closed = eqn.params.get(param)
    if closed is None:
        return None
    consts, body = _compat.consts_of(closed), _compat.open_jaxpr(closed)
    if len(body.invars) != len(eqn.invars) or len(body.outvars) != len(eqn.outvars):
        return None
    if len(consts) != len(body.constvars):
        return None
    if name == "custom_vjp_call" and not _is_formula(body) and not _is_fused_attention(body):
        return None
    return param, body, consts


def _is_formula(body: Jaxpr, budget: int = _FORMULA_EQUATIONS) -> bool:
    if len(body.eqns) > budget:
        return False
    for eqn in body.eqns:
        name = eqn.primitive.name
        if name in _CALLS:
            inner = eqn.params.get(_CALLS[name])
            if inner is None or not _is_formula(_compat.open_jaxpr(inner), budget - len(body.eqns)):
                return False
        elif name not in _FORMULA:
            return False
    return True


def _is_fused_attention(body: Jaxpr) -> bool:
    return any(eqn.primitive.name == FUSED_ATTENTION for eqn in body.eqns)

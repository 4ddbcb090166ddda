"""All matchers over one level."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from qjax import _compat, plugins
from qjax.composites.activation import find_activations
from qjax.composites.attention import find_attention
from qjax.composites.base import Composite
from qjax.composites.graph import Level, Node, Value, inlined
from qjax.composites.norm import find_norms, variance_clips
from qjax.composites.softmax import find_softmax


def find_composites(jaxpr: Any, consts: Sequence[Any] = ()) -> list[Composite]:
    """Return the composites of one control-flow level, in program order of their results.

    Args:
        jaxpr: an open (or closed) jaxpr: the top level, or the body of a scan, while, cond or shard_map. Bodies of
            nested ``jit``, ``remat`` and custom-rule calls belong to the level; bodies of nested control flow do not.
        consts: values of ``jaxpr.constvars``, where known, so that captured masks can be recognised as causal.

    Returns:
        Attention, softmax (also inside attention), activations and norms.
    """
    plugins.load()
    return composites_of(inlined(jaxpr, consts))


def find_nested(jaxpr: Any, consts: Sequence[Any] = ()) -> list[Composite]:
    """Return the composites of a program and of all its control flow, with paths from the program's own jaxpr.

    Bodies are searched knowing which of their inputs are constants outside: a causal mask that is made once and used
    by every step of a scan over layers is still known to be causal inside.

    Args:
        jaxpr: an open (or closed) jaxpr.
        consts: values of ``jaxpr.constvars``, where known.
    """
    plugins.load()
    return [found for level in levels(inlined(jaxpr, consts)) for found in composites_of(level)]


def levels(level: Level) -> Iterator[Level]:
    """Yield a level and, depth first in program order, the levels of the control flow in it."""
    yield level
    for unit in level.units:
        # A unit is searched together with its level; control flow inside it is not.
        yield from itertools.islice(levels(unit), 1, None)
    for node in level.nodes:
        for step, body, outside in _bodies(node):
            yield from levels(inlined(body, scope=(*node.path, step), outside=outside))


def _bodies(node: Node) -> Iterator[tuple[tuple[str, int], Any, list[Value | None]]]:
    """Yield (step, body, values outside) for each body of a control-flow node."""
    params, operands = node.params, list(node.inputs)
    if node.name == "scan":
        consts, _ = _compat.scan_arity(params)
        yield ("jaxpr", 0), params["jaxpr"], _padded(operands[:consts], params["jaxpr"])
    elif node.name == "while":
        split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        yield ("cond_jaxpr", 0), params["cond_jaxpr"], _padded(operands[: split[0]], params["cond_jaxpr"])
        yield ("body_jaxpr", 0), params["body_jaxpr"], _padded(operands[split[0] : split[1]], params["body_jaxpr"])
    elif node.name == "cond":
        for i, branch in enumerate(params["branches"]):
            yield ("branches", i), branch, _padded(operands[1:], branch)
    elif node.name == "shard_map":
        yield ("jaxpr", 0), params["jaxpr"], []


def _padded(known: list[Value], body: Any) -> list[Value | None]:
    return [*known, *[None] * (len(_compat.open_jaxpr(body).invars) - len(known))]


Matcher = Callable[[Level], list[Composite]]
"""A site matcher: the composites it finds on one flat level."""

_MATCHERS: list[Matcher] = []


def register_matcher(matcher: Matcher) -> Matcher:
    """Add a site matcher of your own; used as a decorator.

    What it returns becomes sites, named after the weights upstream and the composite's ``kind``, and reported like
    the built-in ones. Matching has to be precise: a composite that is not what it says would be quantized wrongly.

    Args:
        matcher: a function of a `Level`; registering the same function again changes nothing.
    """
    if matcher not in _MATCHERS:
        _MATCHERS.append(matcher)
    return matcher


def composites_of(level: Level) -> list[Composite]:
    """Return the composites of a flat level; see :func:`find_composites`."""
    softmaxes, norms = find_softmax(level), find_norms(level)
    taken = {node for composite in (*softmaxes, *norms) for node in composite.nodes} | variance_clips(level)
    found: list[Composite] = [*find_attention(level, softmaxes), *softmaxes, *norms]
    found += find_activations(level, taken)
    for matcher in _MATCHERS:
        found += matcher(level)
    for unit in level.units:
        found += composites_of(unit)
    return sorted(found, key=lambda c: _order(c))


def _order(composite: Composite) -> tuple[int, ...]:
    return tuple(step for step in composite.output_path if isinstance(step, int))

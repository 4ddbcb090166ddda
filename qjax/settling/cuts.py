"""Cutting a flat program into blocks: where few values pass from one layer to the next.

A block is what stands under the first number of site names (``layers/3``), or a site without one by itself. Between the
products of one block and those of the next the program is cut where the fewest values that depend on data pass: in a
transformer that is one, the residual stream.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qjax._compat import bind
from qjax.composites import Level, Node, Value
from qjax.passes.units import AttentionUnit, LinearUnit

Unit = LinearUnit | AttentionUnit


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """A stretch of a flat program.

    Attributes:
        name: what its sites have in common.
        units: numbers of the units in it.
        start, stop: its equations.
        inputs, outputs: values that depend on data and enter or leave it.
    """

    name: str
    units: tuple[int, ...]
    start: int
    stop: int
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


def blocks_of_units(level: Level, units: Sequence[Unit], parameters: int) -> list[Block]:
    """Cut a program into blocks.

    Args:
        level: the flat program, whose inputs are constants, then parameters, then arguments.
        units: in program order.
        parameters: how many of the inputs come before the arguments.
    """
    data = _depending(level, set(level.inputs[parameters:]))
    names = [prefix(unit.name) for unit in units]
    members: list[list[int]] = []
    for n, name in enumerate(names):
        if members and names[members[-1][-1]] == name:
            members[-1].append(n)
        else:
            members.append([n])
    spans = [_span([units[n] for n in group]) for group in members]
    cuts, live = [0], [tuple(v for v in level.inputs[parameters:] if v.users)]
    for (_, before), (after, _) in zip(spans, spans[1:], strict=False):
        at = min(range(before + 1, after + 1), key=lambda c: (len(_live(level, c, data)), c))
        cuts.append(at)
        live.append(_live(level, at, data))
    cuts.append(len(level.nodes))
    live.append(tuple(dict.fromkeys(v for v in level.outputs if v in data)))
    return [
        Block(names[group[0]], tuple(group), cuts[n], cuts[n + 1], live[n], live[n + 1])
        for n, group in enumerate(members)
    ]


def prefix(name: str) -> str:
    """The name of the block that a site belongs to."""
    found = re.match(r"(?:[^/]*[^/\d][^/]*/)*?\d+(?=/)", name)
    return found[0] if found else name


def _span(units: Sequence[Unit]) -> tuple[int, int]:
    indices = [node.index for unit in units for node in products_of(unit)]
    return min(indices), max(indices)


def products_of(unit: Unit) -> tuple[Node, ...]:
    """The products of a unit."""
    return unit.nodes if isinstance(unit, LinearUnit) else (unit.found.scores, unit.found.values)


def _depending(level: Level, given: set[Value]) -> set[Value]:
    for node in level.nodes:
        if any(v in given for v in node.inputs):
            given.update(node.outputs)
    return given


def _live(level: Level, cut: int, data: set[Value]) -> tuple[Value, ...]:
    """Values that depend on data, are there before an equation, and are read from it on."""
    out = []
    made = [*level.inputs, *(v for node in level.nodes[:cut] for v in node.outputs)]
    returned = set(level.outputs)
    for value in made:
        if value in data and (value in returned or any(user.index >= cut for user in value.users)):
            out.append(value)
    return tuple(out)


def evaluated(
    level: Level,
    block: Block,
    env: Mapping[Value, Any],
    products: Mapping[Node, Callable[[Sequence[Any]], Sequence[Any]]],
) -> list[Any]:
    """Evaluate a block.

    Args:
        level: the flat program.
        block: which part of it.
        env: what its inputs and the parameters are.
        products: equations whose operands are changed, and how.

    Returns:
        Its outputs.
    """
    known = dict(env)

    def read(value: Value) -> Any:
        if value not in known:
            if value.node is None:
                return value.const
            run(value.node)  # what is computed from parameters alone, before the block
        return known[value]

    def run(node: Node) -> None:
        operands: Sequence[Any] = [read(v) for v in node.inputs]
        if node in products:
            operands = products[node](operands)
        known.update(zip(node.outputs, bind(node.eqn, operands), strict=True))

    for node in level.nodes[block.start : block.stop]:
        run(node)
    return [read(v) for v in block.outputs]

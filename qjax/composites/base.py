"""What a match is, for every kind of composite."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import ClassVar

from qjax.composites.graph import Node, Path, Value


@dataclasses.dataclass(frozen=True)
class Composite:
    """Several equations that together compute one thing.

    Attributes:
        op: the family: attention, softmax, activation or norm.
        kind: what exactly, within the family (``"gelu"``, ``"rms_norm"``, ...).
        output: the result.
        nodes: the equations that compute it from the match's operands, in program order, masks and constants aside.
        exposed: values computed on the way that something outside the match reads too. A rewrite has to keep them.
    """

    op: ClassVar[str]
    kind: str
    output: Value
    nodes: tuple[Node, ...] = dataclasses.field(repr=False)
    exposed: tuple[Value, ...] = dataclasses.field(repr=False)

    @property
    def output_path(self) -> Path:
        """Address of the equation that yields the result."""
        assert self.output.node is not None
        return self.output.node.path

    @property
    def paths(self) -> tuple[Path, ...]:
        """Addresses of all equations of the match, in program order."""
        return tuple(node.path for node in self.nodes)


def ordered(nodes: set[Node] | list[Node]) -> tuple[Node, ...]:
    """Return distinct nodes in program order."""
    return tuple(sorted(set(nodes), key=lambda node: node.index))


def between(results: Iterable[Value], stops: Iterable[Value], budget: int = 64) -> set[Node] | None:
    """Return the nodes that compute ``results`` from ``stops`` and constants; None if there are more than ``budget``.

    A value that reaches an input of the level on another way is fine: the walk just ends there.
    """
    seen: set[Node] = set()
    ends = set(stops)
    stack = [v for v in results if v not in ends]
    while stack:
        node = stack.pop().node
        if node is None or node in seen:
            continue
        if len(seen) == budget:
            return None
        seen.add(node)
        stack += [v for v in node.inputs if not v.fixed and v not in ends]
    return seen

"""What the walk over a jaxpr records: reads of weights and composites, loops, slicings."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from qjax.analysis.provenance import Ref
from qjax.analysis.values import Near
from qjax.composites import Composite

Path = tuple[Any, ...]
"""Address of an equation: equation numbers and ``(parameter, index)`` steps into sub-jaxprs. Valid for one trace."""


@dataclasses.dataclass
class Loop:
    """One loop of the program.

    Attributes:
        length: trip count; None for a while loop.
        leaves: the leaves it slices.
        enclosing: ids of the loops around it.
        path: address of its equation.
    """

    length: int | None
    leaves: set[int]
    enclosing: tuple[int, ...]
    path: Path


@dataclasses.dataclass(frozen=True)
class Read:
    """One equation (or composite) that can become a site.

    Attributes:
        path: address of the equation.
        op: dot, conv, ragged_dot, embedding, matmul, attention, softmax, activation, norm, opaque.
        kind: what exactly, within ``op`` (``gelu``, ``rms_norm``, ``scores``).
        side: operand number of the weight, or None.
        ref: the weight's provenance, or None.
        in_axes, out_axes, batch_axes: leaf axes that are contracted, kept, and batched.
        loops: ids of the enclosing loops, outermost first.
        shapes: operand shapes; out_shape: result shape.
        flops: multiply-adds counted twice, for one execution.
        near, scope: for naming what reads no leaf.
        reason: why it cannot be quantized; empty if it can.
        leaves: leaves that a computed weight is made of.
    """

    path: Path
    op: str
    kind: str
    side: int | None
    ref: Ref | None
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    batch_axes: tuple[int, ...]
    loops: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    out_shape: tuple[int, ...]
    dtype: str
    flops: int
    near: Near | None
    scope: str
    reason: str = ""
    leaves: tuple[int, ...] = ()
    composite: Composite | None = None


@dataclasses.dataclass(frozen=True)
class Slicing:
    """One slicing of a leaf outside a scan's own slices: which event, leaf and axis, where, inside which loop."""

    event: int
    leaf: int
    size: int
    position: int | None
    loop: int | None


@dataclasses.dataclass
class Analysis:
    """What the walk found.

    Attributes:
        reads: in program order.
        loops: by id.
        other_uses: leaf -> names of the primitives that read it outside any site.
        slicing: static and run-time slicings in program order.
    """

    reads: list[Read]
    loops: dict[int, Loop]
    other_uses: dict[int, set[str]]
    slicing: list[Slicing]


def scope_of(scope: str, eqn: Any) -> str:
    """The named scopes around an equation: those of the enclosing bodies, then its own."""
    own = str(eqn.source_info.name_stack)
    return f"{scope}/{own}" if scope and own else scope or own


def flops_of(op: str, eqn: Any) -> int:
    """Floating-point operations of one product, a multiply-add counted as two."""
    out = math.prod(eqn.outvars[0].aval.shape)
    lhs, rhs = (a.aval.shape for a in eqn.invars[:2])
    if op == "dot":
        (lc, _), _ = eqn.params["dimension_numbers"]
        return 2 * out * math.prod(lhs[d] for d in lc)
    if op == "conv":
        spec = eqn.params["dimension_numbers"].rhs_spec
        return 2 * out * math.prod(rhs) // max(rhs[spec[0]], 1)
    dn = eqn.params["ragged_dot_dimension_numbers"]
    (lc, _), _ = dn.dot_dimension_numbers
    return 2 * out * math.prod(lhs[d] for d in lc)

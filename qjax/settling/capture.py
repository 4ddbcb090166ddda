"""What reaches the units of a program: inputs of linear layers as rows, operands of attentions head by head.

The flat view of a program (`qjax.composites.Level`) is a list of equations with the values between them, so any value
can be had by evaluating as far as it and returning it. Everything else is dropped by the compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax._compat import bind, consts_of
from qjax.composites import Attention, Level, Value
from qjax.composites.attention import Operand
from qjax.passes.units import AttentionUnit, LinearUnit
from qjax.program import Program
from qjax.rewriting.activations import Rows
from qjax.settling.cuts import products_of


class UnseparableError(Exception):
    """An attention whose operands cannot be laid out as [batch, head, rows, channels]."""


def capture(
    program: Program, level: Level, units: Sequence[LinearUnit | AttentionUnit], arrays: Sequence[Any]
) -> list[tuple[Array, ...]]:
    """Evaluate a program and return the data of units: see `AdaLog.settled`; traced under jit.

    Args:
        program: the trace. level: its flat view. units: found in that view.
        arrays: the array leaves of a call.
    """
    last = max((node.index for unit in units for node in products_of(unit)), default=-1)
    read = _evaluated(program, level, arrays, last + 1)
    return [_data(program, unit, read) for unit in units]


def values_of(program: Program, level: Level, values: Sequence[Value], arrays: Sequence[Any]) -> list[Any]:
    """Evaluate a program as far as needed and return some of its values; traced under jit."""
    last = max((v.node.index for v in values if v.node is not None), default=-1)
    read = _evaluated(program, level, arrays, last + 1)
    return [read(v) for v in values]


def _evaluated(program: Program, level: Level, arrays: Sequence[Any], count: int) -> Callable[[Value], Any]:
    env: dict[Value, Any] = dict(zip(level.inputs, [*consts_of(program.jaxpr), *arrays], strict=True))

    def read(value: Value) -> Any:
        return env[value] if value in env else value.const

    for node in level.nodes[:count]:
        env.update(zip(node.outputs, bind(node.eqn, [read(v) for v in node.inputs]), strict=True))
    return read


def _data(program: Program, unit: LinearUnit | AttentionUnit, read: Any) -> tuple[Array, ...]:
    if isinstance(unit, LinearUnit):
        node, side = unit.nodes[0], unit.sides[0]
        values: list[Any] = [None, None]
        values[side] = read(node.inputs[side])
        number = program.by_name[unit.name].read
        rows = Rows(node.eqn, values, program, number, side).matrix
        return (rows.reshape(-1, rows.shape[-1]).astype(jnp.float32),)
    found = unit.found
    parts = (found.q, "query", "feature"), (found.k, "key", "feature"), (found.probabilities, "query", "key")
    laid = [laid_out(found, o, read(o.value), rows, last) for o, rows, last in parts if o is not None]
    laid.append(laid_out(found, found.v, read(found.v.value), "key", "value"))
    return tuple(laid)


def laid_out(found: Attention, operand: Operand, x: Any, rows: str, last: str) -> Array:
    """Return an operand as float32 [B, H, rows, channels]; what is neither head, row nor channel is batch."""
    kinds: dict[str, list[int]] = {"batch": [], "head": [], rows: [], last: []}
    for d, label in enumerate(found.labels(operand)):
        parts = set(label.split("+"))
        heads = parts <= {"head", "group"}
        kinds["head" if heads else label if label in (rows, last) else "batch"].append(d)
    order = [sorted(dims, key=lambda d: operand.dims[d]) for dims in kinds.values()]
    sizes = [int(np.prod([x.shape[d] for d in dims], dtype=int)) for dims in order]
    return jnp.transpose(x, [d for dims in order for d in dims]).reshape(sizes).astype(jnp.float32)


def separable(unit: AttentionUnit) -> str:
    """Why the operands of an attention cannot be laid out side by side; "" where they can."""
    found = unit.found
    if found.probabilities is None:
        return "it is one fused kernel"
    shapes = []
    for operand, rows, last in (
        (found.q, "query", "feature"),
        (found.k, "key", "feature"),
        (found.probabilities, "query", "key"),
        (found.v, "key", "value"),
    ):
        shapes.append(
            jax.eval_shape(
                lambda x, o=operand, r=rows, c=last: laid_out(found, o, x, r, c),
                jax.ShapeDtypeStruct(operand.value.shape, jnp.float32),
            ).shape
        )
    (b, h, t, d), (kb, kh, s, kd), p, (vb, vh, vs, _) = shapes
    if (b, h) != (kb, kh) or (b, h) != (vb, vh):
        return "several queries share a key, or its heads are merged with its batch"
    if kd != d or vs != s or p != (b, h, t, s):
        return "its dimensions are merged with one another"
    return ""

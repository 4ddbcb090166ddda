"""Equations that are views of a weight: they pass through a QArray exactly, on its codes.

Each takes the equation and its operands, of which the first is quantized, and returns what the equation gives; where
codes cannot follow, it raises `LayoutError`, and the weight is dequantized there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax import ops
from qjax._compat import bind
from qjax.analysis.provenance import picked_axis
from qjax.errors import LayoutError
from qjax.formats import QArray, QStack
from qjax.rewriting import selection
from qjax.rewriting.selection import Selected, dense
from qjax.rewriting.sharding import quantized_specs


def _cast(eqn: Any, values: list[Any]) -> Any:
    dtype = eqn.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        raise LayoutError(f"a cast to {dtype} needs the numbers themselves")
    return selection.astype(values[0], dtype)


def _reshape(eqn: Any, values: list[Any]) -> Any:
    q = values[0]
    if eqn.params.get("dimensions") is not None:
        q = selection.transpose(q, tuple(eqn.params["dimensions"]))
    return selection.reshape(q, eqn.outvars[0].aval.shape)


def _broadcast(eqn: Any, values: list[Any]) -> Any:
    shape, where = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    q = values[0]
    new = tuple(d for d in range(len(shape)) if d not in where)
    if any(shape[d] != q.shape[i] for i, d in enumerate(where)) or any(shape[d] != 1 for d in new):
        raise LayoutError("broadcasting repeats numbers")
    return selection.expand_dims(q, new)


def _slice(eqn: Any, values: list[Any]) -> Any:
    q, p = values[0], eqn.params
    strides = p["strides"] or (1,) * q.ndim
    for axis, (start, limit, step) in enumerate(zip(p["start_indices"], p["limit_indices"], strides, strict=True)):
        if step != 1 and limit - start > step:
            raise LayoutError("strided slices are not views")
        limit = limit if step == 1 else start + 1
        if (start, limit) != (0, q.shape[axis]):
            q = selection.slice_axis(q, axis, start, limit)
    return q


def _split(eqn: Any, values: list[Any]) -> list[Any]:
    out, start = [], 0
    for size in eqn.params["sizes"]:
        out.append(selection.slice_axis(values[0], eqn.params["axis"], start, start + int(size)))
        start += int(size)
    return out


def _dynamic_slice(eqn: Any, values: list[Any]) -> Any:
    q, sizes = values[0], eqn.params["slice_sizes"]
    shape = q.shape
    for axis, (size, start) in enumerate(zip(sizes, values[1:], strict=True)):
        if size != shape[axis]:
            if size == 1 and q.ndim == 2 and isinstance(q, QArray) and axis in q.out_axes:  # one row of a table
                return ops.q_take(q, axis, jnp.clip(start, 0, shape[axis] - 1)[None])
            if size != 1 or not selection.is_stack_axis(q, axis):
                raise LayoutError("only single slices of a stack axis are views at a run-time index")
            q = selection.expand_dims(_pick(q, axis, jnp.clip(start, 0, shape[axis] - 1)), (axis,))
    return q


def _pick(q: Any, axis: int, index: Any) -> Any:
    """One slice of a stack axis at a traced index."""
    return Selected(q, index) if isinstance(q, QStack) else selection.slice_of(q, axis, index)


def _gather(eqn: Any, values: list[Any]) -> Any:
    q, index = values
    dn, found = eqn.params["dimension_numbers"], picked_axis(eqn)
    if found is None:
        raise LayoutError("only lookups of whole rows along one axis have a quantized form")
    axis, component, dropped = found
    rows, size = index[..., component], q.shape[axis]
    clipped = jnp.clip(rows, 0, size - 1)
    if not rows.ndim and selection.is_stack_axis(q, axis):
        picked = _pick(q, axis, clipped)
        return picked if dropped else selection.expand_dims(picked, (axis,))
    if not isinstance(q, QArray):
        raise LayoutError("rows of a stack with several formats")
    # [*axes before, *looked up, *axes after], a unit axis behind the looked up ones if the axis is not dropped
    taken = q.take(axis, clipped) if q.ndim > 2 else ops.q_take(q, axis, clipped)
    if "FILL" in str(eqn.params["mode"]):
        fill = jnp.nan if eqn.params.get("fill_value") is None else eqn.params["fill_value"]
        outside = (rows < 0) | (rows >= size)
        if not rows.ndim and isinstance(taken, QArray) and taken.fmt.affine and np.isnan(fill):
            taken = _scaled_away(taken, outside)
            return taken if dropped else selection.expand_dims(taken, (axis,))
        outside = outside.reshape((1,) * axis + rows.shape + (1,) * (q.ndim - axis - 1))
        taken = dense(taken)
        taken = jnp.where(outside, jnp.asarray(fill, taken.dtype), taken)
    if not dropped:
        taken = selection.expand_dims(taken, (axis + rows.ndim,))
    looked_up = iter(range(axis, axis + rows.ndim))
    kept = iter(d for d in range(taken.ndim) if not axis <= d < axis + rows.ndim)
    order = tuple(next(kept) if d in dn.offset_dims else next(looked_up) for d in range(taken.ndim))
    return selection.transpose(taken, order)


def _scaled_away(q: QArray, outside: Any) -> QArray:
    """A weight that is NaN where ``outside``, a scalar, is true: its scales are."""
    scale = q.aux["scale"]
    return dataclasses.replace(q, aux={**q.aux, "scale": jnp.where(outside, jnp.nan, scale).astype(scale.dtype)})


def _on_children(eqn: Any, values: list[Any]) -> Any:
    """An equation that does the same to every array, whatever its shape: it passes to codes and scales."""
    if isinstance(values[0], Selected):
        raise LayoutError("a selected slice has no children of its own")
    return jax.tree.map(lambda child: bind(eqn, [child])[0], values[0])


def _constrained(eqn: Any, values: list[Any]) -> Any:
    sharding = eqn.params["sharding"]
    if not isinstance(sharding, jax.sharding.NamedSharding) or not isinstance(values[0], QArray):
        raise LayoutError("only named shardings of a weight have a quantized form")
    specs = quantized_specs(values[0], sharding.spec, sharding.mesh)
    return jax.tree.map(
        lambda child, spec: lax.with_sharding_constraint(child, jax.sharding.NamedSharding(sharding.mesh, spec)),
        values[0],
        specs,
    )


VIEWS: dict[str, Callable[[Any, list[Any]], Any]] = {
    "convert_element_type": _cast,
    "transpose": lambda eqn, values: selection.transpose(values[0], tuple(eqn.params["permutation"])),
    "reshape": _reshape,
    "squeeze": lambda eqn, values: selection.squeeze(values[0], tuple(eqn.params["dimensions"])),
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "split": _split,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "sharding_constraint": _constrained,
    **{name: _on_children for name in ("pvary", "pcast")},
    **{name: lambda eqn, values: values[0] for name in ("copy", "copy_p", "stop_gradient", "name")},
}
"""Primitive -> how a quantized first operand passes through it, exactly; LayoutError where it cannot."""

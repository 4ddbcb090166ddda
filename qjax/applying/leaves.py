"""Turning float leaves into stored ones, as planned: one jitted call per shape and format."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.applying.storage import LeafPlan, Slices, alike, assignment
from qjax.errors import QjaxError
from qjax.formats import QArray, QStack, assemble, canonical_matrix, quantize_array
from qjax.passes import RTN


def quantize_leaf(plan: LeafPlan, leaf: Any) -> tuple[Any, dict[tuple[int, ...], float]]:
    """Store one float leaf as planned.

    Args:
        plan: how.
        leaf: the float array, of ``plan.shape``.

    Returns:
        A `QArray` (or a `QStack` where slices have different formats), and the SQNR in dB of each quantized slice.

    Raises:
        QjaxError: the leaf holds NaN or infinity.
    """
    if not bool(_all_finite(leaf)):
        bad = int(np.sum(~np.isfinite(np.asarray(leaf, np.float32))))
        raise QjaxError(
            f"{plan.name}: {bad} of its {leaf.size} numbers are NaN or infinite and cannot be quantized; "
            "repair the checkpoint, or add a rule with skip=True for it"
        )
    positions = {axis: list(range(leaf.shape[axis])) for axis in plan.key_axes}
    return _part(plan, leaf, plan.slices, plan.key_axes, positions)


@jax.jit
def _all_finite(x: Any) -> Any:
    return jnp.isfinite(x).all()


def _part(
    plan: LeafPlan, leaf: Any, slices: Slices, key_axes: tuple[int, ...], positions: dict[int, list[int]]
) -> tuple[Any, dict[tuple[int, ...], float]]:
    """Quantize the part of a leaf whose slices along ``key_axes`` are stored as ``slices`` says.

    Args:
        plan: of the whole leaf.
        leaf: the part.
        slices: how it is stored, keyed by positions along ``key_axes``; along the other key axes it is stored alike.
        key_axes: the key axes along which the part may still differ.
        positions: key axis -> the positions of the whole leaf that the part holds.
    """
    distinct = list(dict.fromkeys(slices.values()))
    if len(distinct) == 1:
        stored = distinct[0]
        if stored.fmt is None:
            return jnp.asarray(leaf), {}
        q, sqnr = _stored(
            leaf, stored.fmt, stored.rounding, stored.observer, plan.in_axes, plan.stack_axes, plan.key_axes
        )
        keys = itertools.product(*(positions[a] for a in plan.key_axes))
        return q, dict(zip(keys, np.asarray(sqnr, np.float64).reshape(-1).tolist(), strict=True))
    axis, groups = key_axes[0], alike(slices)
    parts, figures = [], {}
    for inner, where in groups:
        rows = jnp.take(jnp.asarray(leaf), jnp.asarray(where), axis=axis)
        part, found = _part(plan, rows, inner, key_axes[1:], {**positions, axis: [positions[axis][i] for i in where]})
        parts.append(part)
        figures.update(found)
    return QStack(tuple(parts), axis=axis, assign=assignment(groups)), figures


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5, 6))
def _stored(
    leaf: Any, fmt: Any, rounding: Any, observer: Any, in_axes: Any, stack_axes: Any, key_axes: Any
) -> tuple[QArray, Any]:
    if rounding is None and observer is None:
        q = quantize_array(leaf, fmt, in_axes=in_axes, stack_axes=stack_axes)
    else:
        q = round_array(leaf, fmt, rounding or RTN(), observer, in_axes, stack_axes)
    return q, _sqnr(leaf, q, key_axes)


def round_array(leaf: Any, fmt: Any, rounding: Any, observer: Any, in_axes: Any, stack_axes: Any) -> QArray:
    """Round each matrix of a (stacked) weight with a rounding function.

    Args:
        leaf: float array. fmt: the format.
        rounding: with ``round(matrix [N, K], fmt, observer=...) -> (codes, aux)``.
        observer: how the range is chosen, or None.
        in_axes, stack_axes: of the leaf.
    """
    matrix = canonical_matrix(leaf, in_axes, stack_axes)
    one: Any = functools.partial(rounding.round, fmt=fmt, observer=observer)
    for _ in range(matrix.ndim - 2):
        one = jax.vmap(one)
    codes, aux = one(matrix)
    return assemble(codes, aux, fmt, shape=leaf.shape, in_axes=in_axes, stack_axes=stack_axes, dtype=leaf.dtype)


def _sqnr(leaf: Any, q: QArray, axes: tuple[int, ...]) -> Any:
    """10·log10(Σw² / Σ(w − q)²) over all but ``axes``; inf where nothing is lost."""
    w = leaf.astype(jnp.float32)
    error = w - q.dequantize(jnp.float32)
    rest = tuple(a for a in range(w.ndim) if a not in axes)
    signal, noise = jnp.sum(w * w, rest), jnp.sum(error * error, rest)
    ratio = jnp.where(noise > 0, signal / jnp.where(noise > 0, noise, 1), jnp.inf)
    order = sorted(range(len(axes)), key=lambda i: axes[i])
    out = 10 * jnp.log10(ratio)
    # the sums keep the axes in the leaf's order; the keys want them in slicing order
    return jnp.transpose(out, [order.index(i) for i in range(len(axes))]) if len(axes) > 1 else out

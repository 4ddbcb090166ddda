"""Turning float leaves into stored ones, as planned: one jitted call per shape and format."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import QjaxError
from qjax.formats import QArray, QStack, assemble, canonical_matrix, quantize_array
from qjax.storage import LeafPlan, Stored


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
    return _quantize(plan, leaf, plan.slices, plan.key_axes, plan.in_axes, plan.stack_axes)


@jax.jit
def _all_finite(x: Any) -> Any:
    return jnp.isfinite(x).all()


def _quantize(
    plan: LeafPlan,
    leaf: Any,
    slices: Any,
    key_axes: tuple[int, ...],
    in_axes: tuple[int, ...],
    stack_axes: tuple[int, ...],
) -> tuple[Any, dict[tuple[int, ...], float]]:
    """Quantize a (slice of a) leaf whose remaining key axes are ``key_axes``; one `QStack` level per mixed axis."""
    distinct = list(dict.fromkeys(slices.values()))
    if len(distinct) == 1:
        stored = distinct[0]
        if stored.fmt is None:
            return jnp.asarray(leaf), {}
        q, sqnr = _uniform(leaf, stored, in_axes, stack_axes, len(key_axes))
        values = np.asarray(sqnr).reshape(-1)
        keys = list(itertools.product(*(range(leaf.shape[a]) for a in key_axes)))
        return q, {k: float(v) for k, v in zip(keys, values, strict=True)}
    axis, size = key_axes[0], leaf.shape[key_axes[0]]
    by_position = {i: {k[1:]: s for k, s in slices.items() if k[0] == i} for i in range(size)}
    kinds: list[tuple[Any, list[int]]] = []  # what is stored alike, and where
    for i in range(size):
        described = tuple(sorted(by_position[i].items()))
        for known, where in kinds:
            if known == described:
                where.append(i)
                break
        else:
            kinds.append((described, [i]))
    parts, assign, sqnrs = [], [(0, 0)] * size, {}
    for number, (_, where) in enumerate(kinds):
        rows = jnp.take(jnp.asarray(leaf), jnp.asarray(where), axis=axis)
        inner = {(p, *k): s for p, i in enumerate(where) for k, s in by_position[i].items()}
        if len(set(inner.values())) > 1:
            part, found = _inner_mixed(plan, rows, inner, key_axes, in_axes, stack_axes)
        else:
            part, found = _quantize(plan, rows, inner, key_axes, in_axes, stack_axes)
        parts.append(part)
        for p, i in enumerate(where):
            assign[i] = (number, p)
        sqnrs.update({(where[k[0]], *k[1:]): v for k, v in found.items()})
    return QStack(tuple(parts), axis=axis, assign=tuple(assign)), sqnrs


def _inner_mixed(plan: LeafPlan, rows: Any, inner: Any, key_axes: Any, in_axes: Any, stack_axes: Any) -> Any:
    raise QjaxError(
        f"{plan.name}: formats differ along two stacked axes {key_axes} at once; let them differ along the outer one "
        "only, or store the inner stack as separate leaves"
    )


def _uniform(
    leaf: Any, stored: Stored, in_axes: tuple[int, ...], stack_axes: tuple[int, ...], n_keys: int
) -> tuple[QArray, Any]:
    if stored.rounding is None and stored.observer is None:
        return _nearest(leaf, stored.fmt, in_axes, stack_axes, n_keys)
    return _rounded(leaf, stored.fmt, stored.rounding, stored.observer, in_axes, stack_axes, n_keys)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _nearest(leaf: Any, fmt: Any, in_axes: Any, stack_axes: Any, n_keys: int) -> tuple[QArray, Any]:
    q = quantize_array(leaf, fmt, in_axes=in_axes, stack_axes=stack_axes)
    return q, _sqnr(leaf, q, stack_axes[:n_keys])


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5, 6))
def _rounded(
    leaf: Any, fmt: Any, rounding: Any, observer: Any, in_axes: Any, stack_axes: Any, n_keys: int
) -> tuple[QArray, Any]:
    from qjax.passes import RTN

    q = round_array(leaf, fmt, rounding or RTN(), observer, in_axes, stack_axes)
    return q, _sqnr(leaf, q, stack_axes[:n_keys])


def round_array(leaf: Any, fmt: Any, rounding: Any, observer: Any, in_axes: Any, stack_axes: Any) -> QArray:
    """Round each matrix of a (stacked) weight with a rounding function.

    Args:
        leaf: float array. fmt: the format.
        rounding: ``rounding(matrix [N, K], fmt, observer=...) -> (codes, aux)``.
        observer: how the range is chosen, or None.
        in_axes, stack_axes: of the leaf.
    """
    matrix, layout = canonical_matrix(leaf, in_axes=in_axes, stack_axes=stack_axes)
    one = functools.partial(rounding, fmt=fmt, observer=observer)
    for _ in range(matrix.ndim - 2):
        one = jax.vmap(one)
    codes, aux = one(matrix)
    return assemble(codes, aux, fmt, layout, leaf.dtype)


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

"""Putting the slices of a leaf together that were quantized one by one."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from qjax.applying.storage import LeafPlan, Slices, alike, assignment
from qjax.formats import QStack, concatenate, is_quantized


def joined(plan: LeafPlan, pieces: Mapping[tuple[int, ...], Any]) -> Any:
    """A leaf, or the part of it that is there.

    Args:
        plan: of the leaf.
        pieces: key -> that slice as stored, key axes kept with size 1. Keys are a product of positions.

    Returns:
        A `QArray`, or a `QStack` where formats differ.
    """
    if not plan.key_axes:
        return pieces[()]
    return _part({key: plan.slices[key] for key in pieces}, plan.key_axes, pieces, ())


def _part(
    slices: Slices, key_axes: tuple[int, ...], pieces: Mapping[tuple[int, ...], Any], prefix: tuple[int, ...]
) -> Any:
    if not key_axes:
        return pieces[prefix]
    axis, inner_axes = key_axes[0], key_axes[1:]
    if len(set(slices.values())) == 1:
        at = [sorted({key[n] for key in slices}) for n in range(len(key_axes))]
        return _concatenated([*itertools.product(*at)], key_axes, pieces, prefix)
    parts = []
    for inner, where in alike(slices):
        rows = [_part(inner, inner_axes, pieces, (*prefix, position)) for position in where]
        parts.append(_join(rows, axis))
    groups = alike(slices)
    return QStack(tuple(parts), axis=axis, assign=assignment(groups))


def _concatenated(
    keys: list[tuple[int, ...]],
    axes: tuple[int, ...],
    pieces: Mapping[tuple[int, ...], Any],
    prefix: tuple[int, ...],
) -> Any:
    if not axes:
        return pieces[prefix]
    rows = []
    for position, group in itertools.groupby(keys, key=lambda key: key[0]):
        rows.append(_concatenated([key[1:] for key in group], axes[1:], pieces, (*prefix, position)))
    return _join(rows, axes[0])


def _join(rows: list[Any], axis: int) -> Any:
    if len(rows) == 1:
        return rows[0]
    if isinstance(rows[0], QStack):  # the same inner groups in each row, since rows are alike
        first = rows[0]
        parts = tuple(_join([row.parts[n] for row in rows], axis) for n in range(len(first.parts)))
        return QStack(parts, axis=first.axis, assign=first.assign)
    return concatenate(rows, axis) if is_quantized(rows[0]) else jnp.concatenate(rows, axis)

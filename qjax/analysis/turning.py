"""Applying rotations: folding the scales of norms into what reads them, then mixing channels.

The residual stream x of a decoder with RMS norms can be stored as x R for an orthogonal R (QuaRot, arXiv:2404.00456;
SpinQuant, arXiv:2405.16406): whatever writes it is multiplied by R along its output axis, whatever reads it by the
transpose along its input axis. Before that the scale of each norm has to be one.

    group = stream_group(program)
    for fold in group.folds: ...                       # fold.group says why one cannot be folded
    changed = folded(group, read)                      # {(leaf, slice): array}
    changed |= rotated(group, matrix, overlaid(changed, read))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.analysis.channels import ChannelGroup, Read, Refusal
from qjax.analysis.naming import SliceKey
from qjax.errors import QjaxError


def overlaid(changed: Mapping[tuple[str, SliceKey], Any], read: Read) -> Read:
    """A `Read` that sees changes already made."""
    return lambda leaf, key: changed[leaf, key] if (leaf, key) in changed else read(leaf, key)


def folded(group: ChannelGroup, read: Read) -> dict[tuple[str, SliceKey], Any]:
    """The leaf slices that change when all scales in the way of a rotation become one.

    A scale whose elements are all equal is in nobody's way and stays.

    Args:
        group: of kind ``"rotate"``.
        read: gives the slices as they are.

    Raises:
        QjaxError: a scale that cannot be folded, with the reason; or a zero in a scale beside a bias that is not.
    """
    out: dict[tuple[str, SliceKey], Any] = {}
    for fold in group.folds:
        look = overlaid(out, read)
        old = np.asarray(look(fold.leaf, fold.slice), np.float32) + fold.offset
        if np.ptp(old) == 0:
            continue
        if isinstance(fold.group, Refusal):
            raise QjaxError(f"the scale {fold.leaf} cannot be folded into its readers: {fold.group.reason}")
        factors = _factors(fold.group, fold.leaf, fold.slice, old)
        for touch in fold.group.touches:
            place = touch.leaf, touch.slice
            value = look(*place)
            xp: Any = np if isinstance(value, np.ndarray) else jnp
            by = np.where(touch.index < 0, np.float32(1.0), factors[np.maximum(touch.index, 0)])
            wide = value.astype(xp.float32) + touch.offset
            if touch.power < 0:
                wide = wide * by
            elif place == (fold.leaf, fold.slice):
                wide = xp.where(touch.index < 0, wide, xp.float32(1.0))
            else:
                lost = (by == 0) & (wide != 0)
                if bool(lost.any()):
                    raise QjaxError(
                        f"the scale {fold.leaf} has a zero where {touch.leaf} has none, so that it cannot be folded; "
                        "make that element of the scale a small number"
                    )
                wide = xp.where(by == 0, xp.float32(0.0), wide / np.where(by == 0, np.float32(1.0), by))
            out[place] = (wide - touch.offset).astype(value.dtype)
    return out


def _factors(group: ChannelGroup, leaf: str, key: SliceKey, scale: np.ndarray) -> np.ndarray:
    """The scale of each factor, as its leaf says it."""
    factors = np.ones(group.size, np.float32)
    for touch in group.touches:
        if (touch.leaf, touch.slice) == (leaf, key):
            index = np.broadcast_to(touch.index, scale.shape)
            if (index < 0).any() or touch.power < 0:
                raise QjaxError(f"only part of the scale {leaf} can be folded into its readers")
            factors[index] = scale
            if not np.array_equal(factors[index], scale):
                raise QjaxError(f"the scale {leaf} differs among channels that its readers cannot tell apart")
    return factors


def rotated(group: ChannelGroup, matrix: Any, read: Read) -> dict[tuple[str, SliceKey], Any]:
    """The leaf slices that change when the channels of a group are mixed: the row vector x becomes ``x @ matrix``.

    Args:
        group: of kind ``"rotate"``, its scales folded.
        matrix: float [size, size], orthogonal, zero between blocks; or [n, n] for blocks that all have n channels; or a
            function that multiplies rows [.., n] of a block by such a matrix, which is then not looked at (a fast
            transform).
            Where ``group.keeps_ones`` is not empty it has to leave the vector of ones as it is.
        read: gives the slices as they are.

    Returns:
        The new slices, in the dtype of the old ones; products are taken in float32.

    Raises:
        QjaxError: the wrong kind of group, or a matrix that is not as said.
    """
    full = None if callable(matrix) else _checked(group, np.asarray(matrix, np.float64))
    out: dict[tuple[str, SliceKey], Any] = {}
    for touch in group.touches:
        place = touch.leaf, touch.slice
        old: Any = out[place] if place in out else read(*place)
        xp: Any = np if isinstance(old, np.ndarray) else jnp
        dims = [d for d, n in enumerate(touch.index.shape) if n > 1]
        front = xp.moveaxis(old, dims, range(len(dims)))
        flat = front.reshape(touch.index.size, -1).astype(xp.float32)
        for block in np.unique(group.blocks[np.unique(touch.index[touch.index >= 0])]):
            members = np.flatnonzero(group.blocks == block)
            at = _places(touch.index.ravel(), members)  # [copies, members]
            if full is None:
                mixed = xp.moveaxis(matrix(xp.moveaxis(flat[at], 1, -1)), -1, 1)
                if xp is np:
                    flat = flat.copy()
                    flat[at] = mixed
                else:
                    flat = flat.at[at].set(mixed)
                continue
            part = np.asarray(full[np.ix_(members, members)], np.float32)
            if xp is np:
                flat = flat.copy()
                flat[at] = np.matmul(part.T, flat[at])
            else:
                flat = flat.at[at].set(jnp.matmul(part.T, flat[at], precision="highest"))
        out[place] = xp.moveaxis(flat.astype(old.dtype).reshape(front.shape), range(len(dims)), dims)
    return out


def _places(index: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Positions of each channel, one row for each copy of the channels."""
    positions = np.argsort(index, kind="stable")
    starts = np.searchsorted(index[positions], members)
    copies = int((index == members[0]).sum())
    return positions[starts[None, :] + np.arange(copies)[:, None]]


def _checked(group: ChannelGroup, matrix: np.ndarray) -> np.ndarray:
    sizes = np.bincount(group.blocks)
    if group.kind != "rotate":
        raise QjaxError(f"{group.site}: a group of kind 'rotate' is needed, not {group.kind!r}")
    if matrix.shape != (group.size, group.size) and set(sizes) == {len(matrix)} and matrix.ndim == 2:
        full = np.zeros((group.size, group.size))
        for block in range(len(sizes)):
            own = np.flatnonzero(group.blocks == block)
            full[np.ix_(own, own)] = matrix
        matrix = full
    if matrix.shape != (group.size, group.size):
        raise QjaxError(
            f"{group.site}: a matrix of {group.size} x {group.size} is needed (blocks of {sorted(set(sizes.tolist()))} "
            f"channels), not {list(matrix.shape)}"
        )
    if np.abs(matrix @ matrix.T - np.eye(group.size)).max() > 1e-4:
        raise QjaxError(f"{group.site}: the matrix is not orthogonal")
    if np.abs(matrix[group.blocks[:, None] != group.blocks[None, :]]).max(initial=0.0) > 1e-6:
        raise QjaxError(f"{group.site}: the matrix mixes channels of different blocks; see group.blocks")
    if group.keeps_ones and np.abs(matrix.sum(axis=0) - 1).max() > 1e-4:
        raise QjaxError(
            f"{group.site}: the matrix has to leave the vector of ones as it is, because of "
            f"{', '.join(group.keeps_ones[:3])}; qjax.analysis.turning.keeping_ones makes such a matrix"
        )
    return matrix


def keeping_ones(matrix: Any) -> np.ndarray:
    """An orthogonal [n, n] that leaves the vector of ones as it is, from an orthogonal [n - 1, n - 1].

    A reflection takes the vector of ones to the first axis and back; the matrix acts on the others in between.
    """
    inner = np.asarray(matrix, np.float64)
    n = len(inner) + 1
    mirror = np.full(n, 1 / np.sqrt(n))
    mirror[0] -= 1.0
    mirror /= max(np.linalg.norm(mirror), 1e-30)
    reflection = np.eye(n) - 2 * np.outer(mirror, mirror)
    middle = np.eye(n)
    middle[1:, 1:] = inner
    return reflection @ middle @ reflection

"""Channels that can be rescaled, reordered or rotated without changing the function, and which parameters then change.

`channel_group` answers, for the input (or output) of a linear site: if channel k were multiplied by a factor f_k, which
slices of which parameter leaves have to be multiplied by which of them, so that the function stays what it was? Or it
says which equation forbids it. Nothing goes by the names of layers: the answer comes from the equations
(`qjax.analysis.gauge`), for every site of a program at once.

    group = channel_group(program, "layers/3/attn/o_proj/kernel")
    if isinstance(group, ChannelGroup):
        changed = scaled(group, f, read)          # {(leaf, slice): array}
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from qjax.analysis.groups import ChannelGroup, Fold, Kind, Refusal, Side, Touch
from qjax.analysis.naming import SliceKey
from qjax.analysis.solving import solution
from qjax.errors import QjaxError

if TYPE_CHECKING:
    from qjax.program import Program

__all__ = [
    "ChannelGroup",
    "Fold",
    "Kind",
    "Read",
    "Refusal",
    "Side",
    "Touch",
    "channel_group",
    "permuted",
    "scaled",
    "stream_group",
]


def channel_group(program: Program, site: str, kind: Kind = "scale", of: Side = "input") -> ChannelGroup | Refusal:
    """The group of channels that the input (or output) of a linear site belongs to.

    Args:
        program: from `qjax.trace`.
        site: name of a site that reads a parameter.
        kind: multiply channels by positive factors, permute them, or mix them by an orthogonal matrix.
        of: the site's input, or its output (as SmoothAttention needs it: ask for the output of the keys' weight).

    Returns:
        The group, or why there is none.

    Raises:
        QjaxError: the site is unknown, or reads no parameter.
    """
    found = program.site(site)
    if found.leaf is None or found.op not in ("dot", "conv", "ragged_dot", "embedding"):
        raise QjaxError(f"{site} is a {found.op} without a weight of its own; ask for a site that reads a parameter")
    return solution(program, kind).group(site, of)


def stream_group(program: Program, kind: Kind = "rotate") -> ChannelGroup | Refusal:
    """The residual stream: the group of what the first table or weight of the program writes.

    Args:
        program: from `qjax.trace`.
        kind: rotate or permute it (norms fix its scale).

    Returns:
        The group, or why it has to stay.
    """
    solved = solution(program, kind)
    first = next(iter(solved.gauge.outputs), None)
    if first is None:
        return Refusal("", "the program multiplies by no parameter", "", "equation")
    return solved.group(first, "output")


# ---------------------------------------------------------------------------------------------------- applying

Read = Callable[[str, SliceKey], Any]
"""``read(leaf, slice)``: the float values of a leaf slice, sliced axes dropped. What changes is computed in NumPy where
it gives NumPy arrays, else in JAX."""


def scaled(group: ChannelGroup, factors: Any, read: Read) -> dict[tuple[str, SliceKey], Any]:
    """The leaf slices that change when the channels of a group are multiplied by factors.

    Args:
        group: of kind ``"scale"``.
        factors: float [size], positive; one for each factor of the group, not for each channel.
        read: gives the slices as they are.

    Returns:
        The new slices, in the dtype of the old ones; products are taken in float32.

    Raises:
        QjaxError: the wrong kind of group, or the wrong number of factors.
    """
    factors = factors if hasattr(factors, "shape") else np.asarray(factors)
    if group.kind != "scale" or factors.shape != (group.size,):
        raise QjaxError(
            f"{group.site}: {group.size} factors for a group of kind 'scale' are needed, not "
            f"{list(factors.shape)} for one of kind {group.kind!r}"
        )
    out: dict[tuple[str, SliceKey], Any] = {}
    for touch in group.touches:
        place = touch.leaf, touch.slice
        old: Any = out[place] if place in out else read(*place)
        xp: Any = np if isinstance(old, np.ndarray) else jnp
        values = xp.asarray(factors, xp.float32)[np.maximum(touch.index, 0)]
        by = xp.where(touch.index < 0, xp.float32(1.0), values if touch.power > 0 else 1.0 / values)
        wide = (old.astype(xp.float32) + touch.offset) * by - touch.offset
        out[place] = wide.astype(old.dtype)
    return out


def permuted(group: ChannelGroup, order: Any, read: Read) -> dict[tuple[str, SliceKey], Any]:
    """The leaf slices that change when the channels of a group are reordered.

    Args:
        group: of kind ``"permute"``.
        order: int [size], a permutation that stays within ``group.blocks``: what stands at place j afterwards stood
            at place ``order[j]`` before.
        read: gives the slices as they are.

    Returns:
        The new slices.

    Raises:
        QjaxError: the wrong kind of group, no permutation, or one that leaves its block (the first such pair is named).
    """
    order = np.asarray(order)
    if group.kind != "permute" or not np.array_equal(np.sort(order), np.arange(group.size)):
        raise QjaxError(f"{group.site}: an order of {group.size} channels of a group of kind 'permute' is needed")
    moved = np.flatnonzero(group.blocks[order] != group.blocks)
    if len(moved):
        j = int(moved[0])
        raise QjaxError(
            f"{group.site}: channel {int(order[j])} (block {int(group.blocks[order[j]])}) cannot move to place {j} "
            f"(block {int(group.blocks[j])}); sort within group.blocks"
        )
    out: dict[tuple[str, SliceKey], Any] = {}
    for touch in group.touches:
        place = touch.leaf, touch.slice
        old: Any = out[place] if place in out else read(*place)
        xp: Any = np if isinstance(old, np.ndarray) else jnp
        dims = [d for d, n in enumerate(touch.index.shape) if n > 1]
        source = _sources(touch.index.ravel(), order)
        front = xp.moveaxis(old, dims, range(len(dims)))
        flat = front.reshape(touch.index.size, -1)[source].reshape(front.shape)
        out[place] = xp.moveaxis(flat, range(len(dims)), dims)
    return out


def _sources(index: np.ndarray, order: np.ndarray) -> np.ndarray:
    """For each position, which position its new content comes from: the n-th of a channel from the n-th of another."""
    positions = np.argsort(index, kind="stable")
    starts = np.searchsorted(index[positions], np.arange(len(order)))
    rank = np.empty(len(index), np.int64)
    firsts = np.searchsorted(index[positions], index[positions])
    rank[positions] = np.arange(len(index)) - firsts
    fixed = index < 0
    wanted = starts[order[np.maximum(index, 0)]] + rank
    return np.where(fixed, np.arange(len(index)), positions[np.where(fixed, 0, wanted)])

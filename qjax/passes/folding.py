"""What smoothing passes share: sites whose input channels take factors together, and where these can be folded.

Sites that read the same activations (q, k and v) have one row of factors; what is before them (a norm, a projection)
takes up the reciprocals, where the equations allow it (`qjax.analysis.channels`). Where they do not, the factors of a
site may still be kept beside its weight (`qjax.passes.Edits.smooth`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.analysis.channels import ChannelGroup, channel_group, scaled
from qjax.errors import RecipeError
from qjax.formats import canonical_matrix
from qjax.passes.leaves import Leaves
from qjax.passes.prepare import Edits
from qjax.patterns import compile_pattern
from qjax.program import Program

UNFOLDED = ("beside", "skip", "error")
"""What becomes of a site whose factors nothing takes up: kept beside the weight, not smoothed, or an error."""


@dataclasses.dataclass(frozen=True, eq=False)
class Shared:
    """Sites that are smoothed by the same factors.

    Attributes:
        sites: their names, those chosen.
        channels: site -> int [K] (or [E, K]): the factor of each input channel; -1 where it has to stay.
        size: how many factors there are.
        group: what takes the factors up, or None.
        reason: why nothing does.
    """

    sites: tuple[str, ...]
    channels: Mapping[str, np.ndarray]
    size: int
    group: ChannelGroup | None
    reason: str = ""


def shared_inputs(program: Program, leaves: Leaves, chosen: Sequence[str], match: str) -> list[Shared]:
    """The chosen sites whose names match, by the factors that they share.

    Args:
        program: the trace.
        leaves: parameters; those that may be edited are folded into.
        chosen: names of linear sites.
        match: a pattern as in rules.
    """
    matches = compile_pattern(match).fullmatch
    wanted = [name for name in chosen if matches(name + "/")]
    out, done = [], set()
    for name in wanted:
        if name in done:
            continue
        group = channel_group(program, name)
        reason = "" if isinstance(group, ChannelGroup) else group.reason
        if isinstance(group, ChannelGroup):
            # A site that divides by the factors (q beside k) has no range of its own that they could level.
            mine = [n for n in wanted if n in group.sites and n not in done]
            locked = next((t for t in group.touches if not leaves.editable(t.leaf, t.slice)), None)
            split = [n for n in mine if (np.asarray(group.sites[n]) < 0).any()]
            if locked is not None:
                reason = f"{locked.leaf} is read by other blocks too"
            elif split:
                reason = f"some channels of {split[0]} have to stay as they are"
            else:
                done |= set(mine)
                out.append(Shared(tuple(mine), {n: group.sites[n] for n in mine}, group.size, group))
                continue
        done.add(name)
        site = program.by_name[name]
        shape = program.leaf_avals[program.leaf_names.index(site.leaf)].shape  # type: ignore[arg-type]
        k = math.prod(shape[axis] for axis in site.in_axes)
        out.append(Shared((name,), {name: np.arange(k)}, k, None, reason))
    return out


def weight_matrix(program: Program, leaves: Leaves, name: str) -> Any:
    """The weight of a site as it is now, float [*stack, N, K]."""
    site = program.by_name[name]
    gone = sorted(axis for axis, _ in site.slice)
    below = lambda axis: axis - sum(g < axis for g in gone)  # noqa: E731
    value = jnp.asarray(leaves.slice(site.leaf, site.slice))  # type: ignore[arg-type]
    ins = [below(axis) for axis in site.in_axes]
    stacks = [below(axis) for axis in site.batch_axes if axis not in gone and axis not in site.in_axes]
    return canonical_matrix(value, ins, stacks)


def gathered(numbers: Any, channels: np.ndarray, size: int, reduce: Any = np.maximum) -> np.ndarray:
    """Numbers per channel [K] or [E, K] brought together by factor: float32 [size]."""
    out = np.zeros(size, np.float32)
    numbers = np.broadcast_to(np.asarray(numbers, np.float32), channels.shape)
    reduce.at(out, channels[channels >= 0], numbers[channels >= 0])
    return out


def leaves_no_room(program: Program, name: str) -> bool:
    """Whether factors cannot be kept beside a weight: the windows of a convolution overlap, and each has the others."""
    return program.by_name[name].op == "conv"


def smoothed(
    who: str,
    program: Program,
    shared: Sequence[Shared],
    factors: Callable[[Shared], np.ndarray],
    leaves: Leaves,
    unfolded: str,
) -> Edits:
    """The edits of a smoothing: activations are divided by factors, weights multiplied.

    Args:
        who: the pass, for messages.
        program: the trace.
        shared: what `shared_inputs` found.
        factors: gives the factors of one group, float32 [size], positive.
        leaves: parameters.
        unfolded: one of `UNFOLDED`.

    Raises:
        RecipeError: nothing takes up the factors of a site, and that is to be an error.
    """
    slices: dict[Any, Any] = {}
    beside: dict[str, Any] = {}
    notes = []

    def read(leaf: str, key: Any) -> Any:
        return slices[leaf, key] if (leaf, key) in slices else leaves.slice(leaf, key)

    for one in shared:
        if one.group is not None:
            s = factors(one)
            slices |= scaled(one.group, 1.0 / s, read)
            into = ", ".join(dict.fromkeys(t.leaf for t in one.group.touches if t.power > 0))
            notes.append(f"{', '.join(one.sites)}: factors {_range(s)} folded into {into}")
            continue
        (name,) = one.sites
        if unfolded == "error":
            raise RecipeError(
                f"{who}: {name} cannot be smoothed by folding: {one.reason}; leave it out (match=...), or keep its "
                "factors beside the weight (unfolded='beside')"
            )
        if unfolded == "skip" or leaves_no_room(program, name):
            notes.append(f"{name}: not smoothed, because {one.reason}")
            continue
        s = factors(one)
        beside[name] = s
        notes.append(f"{name}: factors {_range(s)} kept beside the weight, because {one.reason}")
    return Edits(slices=slices, smooth=beside, notes=tuple(notes))


def within_reach(s: np.ndarray, good: np.ndarray) -> np.ndarray:
    """Factors where they are known and 1 elsewhere, none more than 2**20 from the middle one, which is 1."""
    if not good.any():
        return np.ones_like(s, np.float32)
    middle = np.exp2(np.mean(np.log2(s[good], dtype=np.float64)))
    out = np.ones(s.shape, np.float64)
    out[good] = np.clip(s[good] / middle, 2.0**-20, 2.0**20)
    return out.astype(np.float32)


def _range(s: np.ndarray) -> str:
    return f"{float(s.min()):.3g} to {float(s.max()):.3g}"

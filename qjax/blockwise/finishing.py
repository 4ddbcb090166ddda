"""Finishing passes on one block: each is told of every weight as it is rounded, and what it edits is laid over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from qjax.analysis.naming import SliceKey
from qjax.applying.storage import LeafPlan
from qjax.calibration import State
from qjax.passes.finish import checked_finish
from qjax.passes.leaves import Leaves, ordered
from qjax.passes.prepare import lay_over, verified
from qjax.program import Program

if TYPE_CHECKING:
    from qjax.blockwise.run import BlockQuantizer


class Finisher:
    """The finishing passes of a recipe on one block.

    Args:
        steps: the passes.
        program: the trace.
        leaves: the parameters, of which those of the block may be changed.
        states: for each pass, what was gathered at the sites of the block.
        inside: the sites of the block.
    """

    def __init__(
        self,
        steps: Sequence[Any],
        program: Program,
        leaves: Leaves,
        states: Sequence[Mapping[str, State]],
        inside: set[str],
    ):
        self.steps, self.program, self.leaves, self.states, self.inside = steps, program, leaves, states, inside
        self.edited: dict[tuple[int, SliceKey], Any] = {}
        self.reasons: dict[tuple[str, str], list[str]] = {}
        self.done: dict[str, int] = {}

    def rounded(self, plan: LeafPlan, key: tuple[int, ...], readers: Sequence[str], value: Any, piece: Any) -> None:
        """Tell the passes of a slice that was rounded.

        Args:
            plan: how its leaf is stored.
            key: positions along the key axes.
            readers: names of the sites that read it.
            value: the float slice, key axes kept with size 1.
            piece: the same as stored.
        """
        if not self.steps:
            return
        error = jnp.asarray(value, jnp.float32) - piece.dequantize(jnp.float32)
        error = jnp.squeeze(error, plan.key_axes)
        at = dict(zip(plan.key_axes, key, strict=True))
        left = [a for a in range(len(plan.shape)) if a not in at]
        for name in readers:
            site = self.program.by_name[name]
            rest = {axis: position for axis, position in site.slice if axis not in at}
            if not set(at) <= {axis for axis, _ in site.slice}:
                self._say("its weight is stored in slices, and it reads several", name)
                continue
            own = error[tuple(rest.get(axis, slice(None)) for axis in left)]
            for number, step in enumerate(self.steps):
                who = type(step).__name__
                if name not in self.inside:
                    self._say("a later block reads its weight too", name, who)
                elif name not in self.states[number]:
                    self._say("no batch reached it", name, who)
                else:
                    self._apply(step, who, name, own, self.states[number][name])

    def _apply(self, step: Any, who: str, name: str, error: Any, state: State) -> None:
        edits = step.after(self.program, self.leaves, self.program.by_name[name], error, state)
        if isinstance(edits, str):
            self._say(edits, name, who)
            return
        edits = verified(step, self.program, edits, self.leaves)
        lay_over(self.leaves, edits)
        changed = [((leaf, ()), v) for leaf, v in edits.leaves.items()] + list(edits.slices.items())
        for (leaf, key), value in changed:
            self.edited[self.leaves.number[leaf], ordered(key)] = value
        self.done[who] = self.done.get(who, 0) + bool(changed)

    def _say(self, reason: str, name: str, who: str = "") -> None:
        for each in [who] if who else [type(step).__name__ for step in self.steps]:
            self.reasons.setdefault((each, reason), []).append(name)

    def notes(self) -> list[str]:
        """What the report should say."""
        left = self.reasons.items()
        return [f"{who}: {count} sites" for who, count in self.done.items()] + [
            f"{who}: left alone, because {reason}: {', '.join(names)}" for (who, reason), names in left
        ]


def finish_block(job: BlockQuantizer, number: int, live: list[dict[int, Any]]) -> Finisher:
    """What tells the finishing passes of each weight of a block, with what they ask for gathered.

    Args:
        job: the job.
        number: of the block.
        live: what it takes, by batch.
    """
    steps = checked_finish(job.recipe.finish)
    found = [job.gathered(number, live, f"finish {at}", step) for at, step in enumerate(steps)]
    leaves = job.leaves.only(job.own(number)) if found else job.leaves
    inside = set(job.shaped_for(job.first)[0].schedule.blocks[number].sites)
    return Finisher(job.recipe.finish, job.plan.program, leaves, found, inside)

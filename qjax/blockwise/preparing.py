"""Prepare passes that look at activations, on one block: gather what a pass asks for, let it edit, check, lay over.

A pass may edit what the block at hand alone reads: earlier blocks are packed, and later ones have not been looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qjax.analysis.naming import SliceKey
from qjax.applying.planning import Plan
from qjax.applying.readers import slices_read
from qjax.blockwise.schedule import Schedule
from qjax.calibration import State
from qjax.errors import QjaxError
from qjax.passes.leaves import Leaves
from qjax.passes.prepare import lay_over, pass_statistics, said, verified
from qjax.program import Program
from qjax.rewriting.taps import Tap
from qjax.sources import Static

if TYPE_CHECKING:
    from qjax.blockwise.run import BlockQuantizer

Smooth = dict[tuple[int, tuple[int, ...]], Any]
"""(position of a leaf, positions along its key axes) -> factors [K] that are kept beside that slice."""


def pass_taps(step: Any, chosen: Sequence[str]) -> dict[str, Tap]:
    """What a pass wants to know of each site."""
    statistics = pass_statistics(step)
    return {name: Tap(statistics=statistics) for name in chosen}


def own_slices(program: Program, schedules: Sequence[Schedule], number: int) -> Callable[[str, SliceKey], bool]:
    """Whether a slice of a leaf is read by one block and by no other.

    Args:
        program: names the leaves.
        schedules: one for each shape of batches.
        number: of the block.
    """
    position = {name: n for n, name in enumerate(program.leaf_names)}
    mine: set[tuple[int, int | None]] = set()
    others: set[tuple[int, int | None]] = set()
    for schedule in schedules:
        for n, block in enumerate(schedule.blocks):
            reads = {(use.value, use.index) for use in block.reads}
            if n == number:
                mine |= reads
            else:
                others |= reads

    def editable(name: str, key: SliceKey) -> bool:
        leaf, index = position[name], dict(key).get(0)
        if (leaf, None) in others or (index is None and any(at == leaf for at, _ in others)):
            return False
        if index is not None and (leaf, index) in others:
            return False
        return (leaf, None) in mine or (leaf, index) in mine

    return editable


def formats_of(plan: Plan, sites: Sequence[str]) -> dict[str, Any]:
    """The formats that the weights of sites will be stored in."""
    names = dict.fromkeys(sites)
    return {
        name: plan.leaves[position].slices[key].fmt
        for name, position, key in slices_read(plan.program, plan.leaves, names)
    }


def edit_block(
    step: Any,
    program: Program,
    leaves: Leaves,
    chosen: Sequence[str],
    states: Mapping[str, State],
    plan: Plan,
    due: Sequence[tuple[int, tuple[int, ...]]],
    smooth: Smooth,
) -> list[str]:
    """Let one pass edit a block.

    Args:
        step: the pass.
        program: the trace.
        leaves: the parameters, of which those of the block may be changed; edits are laid over them.
        chosen: sites of the block whose weights are quantized, and that batches reached.
        states: what was gathered at them.
        plan: what becomes of leaves.
        due: the slices that are packed after this block.
        smooth: factors kept beside weights so far; multiplied by those that the pass returns.

    Returns:
        Its notes.
    """
    edits = verified(step, program, step.edit(program, leaves, tuple(chosen), dict(states)), leaves)
    lay_over(leaves, edits)
    who, notes = type(step).__name__, said(step, edits)
    static = [name for name in edits.smooth if isinstance(plan.decisions[name].inputs, Static)]
    if static:
        notes = [n for n in notes if not n.startswith(tuple(f"{who}: {name}: factors" for name in static))]
        notes.append(
            f"{who}: not smoothed, because factors that nothing in front takes up cannot be kept beside constant "
            f"scales of inputs (static(..., smooth=...) finds both together): {', '.join(static)}"
        )
    kept = {name: f for name, f in edits.smooth.items() if name not in static}
    found: dict[tuple[int, tuple[int, ...]], Any] = {}
    for name, position, key in slices_read(program, plan.leaves, kept):
        factors = np.asarray(kept[name], np.float32)
        if (position, key) not in due:
            notes.append(f"{who}: not smoothed, because a later block reads its weight too: {name}")
        elif not np.array_equal(found.setdefault((position, key), factors), factors):
            raise QjaxError(f"{who} gives two readers of {plan.leaves[position].name} different factors; one is needed")
    for where, factors in found.items():
        smooth[where] = factors * smooth.get(where, 1.0)
    return notes


def prepare_block(
    job: BlockQuantizer, number: int, live: list[dict[int, Any]]
) -> tuple[dict[tuple[int, Any], Any], list[str]]:
    """Run the passes that look at activations on a block: what they changed that is not packed, and their notes.

    Args:
        job: the job, whose leaves are edited.
        number: of the block.
        live: what it takes, by batch.
    """
    notes: list[str] = []
    steps = job.passes[1]
    if not steps:
        return {}, notes
    program, plan, due = job.plan.program, job.plan, job.due[number]
    leaves = job.leaves.only(job.own(number), formats_of(plan, job.chosen_in(number)))
    before = _flat(leaves.edits)
    for at, step in enumerate(steps):
        seen = job.gathered(number, live, f"prepare {at}", step)
        notes += edit_block(step, program, leaves, list(seen), seen, plan, due, job.smooth)
    packed = {(p, tuple(zip(plan.leaves[p].key_axes, key, strict=True))) for p, key in due}
    changed = {at: value for at, value in _flat(leaves.edits).items() if before.get(at) is not value}
    return {at: value for at, value in changed.items() if at not in packed}, notes


def _flat(edits: Mapping[int, Mapping[Any, Any]]) -> dict[tuple[int, Any], Any]:
    return {(position, key): value for position, found in edits.items() for key, value in found.items()}

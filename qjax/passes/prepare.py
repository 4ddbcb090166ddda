"""Prepare passes: edits of the parameters, across sites, before weights are rounded.

Smoothing moves scale from activations into weights, rotation mixes channels, reordering permutes them, pruning removes
them: each changes several leaves together and leaves the function as it was, or nearly. A pass is a frozen dataclass
with two class attributes and one method, and needs no registration: it is named in ``Recipe(prepare=[...])``.

Passes that look at no activations run first, on the whole program. Those that do (``needs_batches``) run on one block
after the other, in order, just before its weights are rounded: each says by ``statistics`` what is to be gathered at
the chosen sites of the block, and may edit what that block alone reads. After each the block is observed again, so
that the next pass, and the roundings, see the activations as they have become.

After each pass a verifier looks at what it returned (`verified`), so that a mistake is found where it was made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from qjax.analysis.naming import SliceKey
from qjax.errors import QjaxError, RecipeError, near
from qjax.lazy import Lazy
from qjax.passes.leaves import Leaves, ordered
from qjax.program import Program
from qjax.statistics import Statistic


@dataclasses.dataclass(frozen=True)
class Edits:
    """What a pass changes.

    Attributes:
        leaves: new values of parameter leaves, by name; shapes and dtypes stay.
        slices: new values of slices, by (name, slice): the axes that the slice names are dropped.
        smooth: site -> factors [K] of its input channels that could not be folded into what comes before: they are kept
            beside its weight, which is multiplied by them, and the activations are divided by them as they pass.
        notes: what the report should say, such as which sites were smoothed and which could not be.
    """

    leaves: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    slices: Mapping[tuple[str, SliceKey], Any] = dataclasses.field(default_factory=dict)
    smooth: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@runtime_checkable
class PreparePass(Protocol):
    """What a prepare pass offers.

    Attributes:
        needs_batches: whether it looks at activations. Then it also has ``statistics``, a tuple of what it needs of
            them (`qjax.statistics`), and its ``edit`` takes a fourth argument: site -> state.
        exact: whether the float function stays the same up to rounding; `qjax.testing.check_pass` checks it.

    A pass that needs no batches and copes with leaves that are `qjax.Lazy` says so by ``lazy = True``; it may return
    lazy leaves.
    """

    needs_batches: ClassVar[bool]
    exact: ClassVar[bool]

    def edit(self, program: Program, leaves: Leaves, chosen: Sequence[str]) -> Edits:
        """Return the edits.

        Args:
            program: the trace; sites by name, and what each reads.
            leaves: the parameter leaves as earlier passes left them, by name.
            chosen: names of the sites whose weights the recipe quantizes; of the block at hand, for a pass that looks
                at activations.
        """
        ...


def pass_statistics(step: Any) -> tuple[Statistic, ...]:
    """What a pass needs to know of activations.

    Raises:
        RecipeError: it says that it needs batches, and not what of them.
    """
    found: tuple[Any, ...] = tuple(getattr(step, "statistics", None) or ())
    if not found or not all(isinstance(s, Statistic) for s in found):
        raise RecipeError(
            f"the prepare pass {step!r} needs batches but its `statistics` is {found!r}; a tuple of qjax.statistics "
            "such as (ChannelRange(),) says what to gather"
        )
    return found


def split_passes(passes: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Passes that look at no activations, and those that do.

    Raises:
        RecipeError: something is no pass, or one that looks at no activations comes after one that does.
    """
    first, later = [], []
    for step in passes:
        if not isinstance(step, PreparePass):
            raise RecipeError(
                f"prepare holds {step!r}, which is no pass: a pass has needs_batches, exact and "
                "edit(program, leaves, chosen)"
            )
        if step.needs_batches:
            pass_statistics(step)
            later.append(step)
        elif later:
            raise RecipeError(
                f"prepare holds {step!r} after {later[-1]!r}: passes that look at activations go block by block, once "
                "the others are done; put it in front"
            )
        else:
            first.append(step)
    return first, later


def run_passes(
    passes: Sequence[Any], program: Program, leaves: Sequence[Any], chosen: Sequence[str]
) -> tuple[list[Any], list[str]]:
    """Run the prepare passes that look at no activations, in order, each verified.

    Args:
        passes: from ``recipe.prepare``.
        program: the trace.
        leaves: the parameter leaves, in program order.
        chosen: names of the sites whose weights are quantized.

    Returns:
        The leaves after all passes, and their notes.

    Raises:
        RecipeError: something in ``prepare`` is no pass, looks at activations, or needs leaves that are not in memory.
        QjaxError: a pass returned what it must not.
    """
    current = Leaves(program.leaf_names, leaves)
    notes: list[str] = []
    first, later = split_passes(passes)
    if later:
        raise RecipeError(f"the prepare pass {later[0]!r} looks at activations: pass calibration data as batches=")
    for step in first:
        lazy = next((n for n, v in zip(program.leaf_names, current.values, strict=True) if isinstance(v, Lazy)), None)
        if lazy is not None and not getattr(step, "lazy", False):
            raise RecipeError(
                f"the prepare pass {step!r} changes leaves together, and {lazy} is read when its block is due; run it "
                "on parameters in memory, or leave it out"
            )
        edits = verified(step, program, step.edit(program, current, tuple(chosen)))
        if edits.smooth:
            raise QjaxError(
                f"{type(step).__name__} returned factors to keep beside weights; only a pass with needs_batches may"
            )
        lay_over(current, edits)
        notes += said(step, edits)
    return [current[name] for name in program.leaf_names], notes


def lay_over(leaves: Leaves, edits: Edits) -> None:
    """Put edits into leaves."""
    for name, value in edits.leaves.items():
        leaves.put(leaves.number[name], (), value)
    for (name, key), value in edits.slices.items():
        leaves.put(leaves.number[name], key, value)


def said(step: Any, edits: Edits) -> list[str]:
    """The notes of a pass, with its name."""
    return [f"{type(step).__name__}: {note}" for note in edits.notes]


def verified(step: Any, program: Program, edits: Any, leaves: Leaves | None = None) -> Edits:
    """Check what a pass returned.

    Args:
        step: the pass.
        program: the trace.
        edits: what it returned.
        leaves: those that it was given, where not all of them may be changed.

    Raises:
        QjaxError: no `Edits`, an unknown leaf, another shape or dtype, numbers that are not finite, a slice that may
            not be changed, or factors for a site that does not exist.
    """
    who = type(step).__name__
    if not isinstance(edits, Edits):
        raise QjaxError(f"{who}.edit returned {type(edits).__name__}; it has to return qjax.passes.Edits")
    avals = dict(zip(program.leaf_names, program.leaf_avals, strict=True))
    changed = [((name, ()), value) for name, value in edits.leaves.items()] + list(edits.slices.items())
    for (name, key), value in changed:
        if name not in avals:
            raise QjaxError(f"{who} edits {name!r}, which is no parameter leaf{near(name, avals)}")
        was, at = avals[name], dict(key)
        shape = tuple(n for axis, n in enumerate(was.shape) if axis not in at)
        if tuple(value.shape) != shape or value.dtype != was.dtype:
            raise QjaxError(
                f"{who} changes {name}{list(key) or ''} from {was.dtype}{list(shape)} to {value.dtype}"
                f"{list(value.shape)}; a pass keeps shapes and dtypes"
            )
        if leaves is not None and not leaves.editable(name, ordered(key)):
            raise QjaxError(f"{who} edits {name}{list(key) or ''}, which other blocks read: leaves.editable says so")
        if isinstance(value, Lazy) or not jnp.issubdtype(value.dtype, jnp.floating):
            continue
        if not bool(np.isfinite(np.asarray(value, np.float32)).all()):
            raise QjaxError(f"{who} leaves numbers in {name} that are NaN or infinite")
    for name, factors in edits.smooth.items():
        site = program.by_name.get(name)
        if site is None or site.leaf is None:
            raise QjaxError(f"{who} gives factors for {name!r}, which is no site with a weight")
        factors = np.asarray(factors, np.float32)
        if factors.ndim != 1 or not (np.isfinite(factors) & (factors > 0)).all():
            raise QjaxError(f"{who} gives factors for {name} that are not positive finite numbers in one row [K]")
    return edits

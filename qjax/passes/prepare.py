"""Prepare passes: edits of the parameters, across sites, before weights are rounded.

Smoothing moves scale from activations into weights, rotation mixes channels, reordering permutes them, pruning removes
them: each changes several leaves together and leaves the function as it was, or nearly. A pass is a frozen dataclass
with two class attributes and one method, and needs no registration: it is named in ``Recipe(prepare=[...])``.

After each pass a verifier looks at what it returned (`verified`), so that a mistake is found where it was made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax.errors import QjaxError, RecipeError, near
from qjax.program import Program


@dataclasses.dataclass(frozen=True)
class Edits:
    """What a pass changes.

    Attributes:
        leaves: new values of parameter leaves, by name; shapes and dtypes stay.
        notes: what the report should say, such as which sites were smoothed and which could not be.
    """

    leaves: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


@runtime_checkable
class PreparePass(Protocol):
    """What a prepare pass offers.

    Attributes:
        needs_batches: whether it looks at activations.
        exact: whether the float function stays the same up to rounding; `qjax.testing.check_pass` checks it.
    """

    needs_batches: ClassVar[bool]
    exact: ClassVar[bool]

    def edit(self, program: Program, leaves: Mapping[str, Array], chosen: Sequence[str]) -> Edits:
        """Return the edits.

        Args:
            program: the trace; sites by name, and what each reads.
            leaves: the parameter leaves as earlier passes left them, by name.
            chosen: names of the sites whose weights the recipe quantizes.
        """
        ...


def run_passes(
    passes: Sequence[Any], program: Program, leaves: Sequence[Any], chosen: Sequence[str]
) -> tuple[list[Any], list[str]]:
    """Run prepare passes in order, each verified.

    Args:
        passes: from ``recipe.prepare``.
        program: the trace.
        leaves: the parameter leaves, in program order.
        chosen: names of the sites whose weights are quantized.

    Returns:
        The leaves after all passes, and their notes.

    Raises:
        RecipeError: something in ``prepare`` is no pass.
        QjaxError: a pass returned what it must not.
    """
    current = dict(zip(program.leaf_names, leaves, strict=True))
    notes: list[str] = []
    for step in passes:
        if not isinstance(step, PreparePass):
            raise RecipeError(
                f"prepare holds {step!r}, which is no pass: a pass has needs_batches, exact and "
                "edit(program, leaves, chosen)"
            )
        edits = verified(step, program, step.edit(program, dict(current), tuple(chosen)))
        current.update(edits.leaves)
        notes += [f"{type(step).__name__}: {note}" for note in edits.notes]
    return [current[name] for name in program.leaf_names], notes


def verified(step: Any, program: Program, edits: Any) -> Edits:
    """Check what a pass returned.

    Raises:
        QjaxError: no `Edits`, an unknown leaf, another shape or dtype, or numbers that are not finite.
    """
    who = type(step).__name__
    if not isinstance(edits, Edits):
        raise QjaxError(f"{who}.edit returned {type(edits).__name__}; it has to return qjax.passes.Edits")
    avals = dict(zip(program.leaf_names, program.leaf_avals, strict=True))
    for name, value in edits.leaves.items():
        if name not in avals:
            raise QjaxError(f"{who} edits {name!r}, which is no parameter leaf{near(name, avals)}")
        was = avals[name]
        if tuple(value.shape) != tuple(was.shape) or value.dtype != was.dtype:
            raise QjaxError(
                f"{who} changes {name} from {was.dtype}{list(was.shape)} to {value.dtype}{list(value.shape)}; "
                "a pass keeps shapes and dtypes"
            )
        if jnp.issubdtype(value.dtype, jnp.floating) and not bool(np.isfinite(np.asarray(value, np.float32)).all()):
            raise QjaxError(f"{who} leaves numbers in {name} that are NaN or infinite")
    return edits

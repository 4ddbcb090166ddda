"""What a site of a supernet carries: tables of steps, their names, and the steps that a choice picks from them.

A table has a column for each of 2 to 8 bits. There is one for each form: weights have a step for each output channel,
or one for the tensor, or, in a space with groups, one for each output and group along the contracted axis (a row each,
the groups of the first output first), and all of these symmetric or with an offset.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax

from qjax.rewriting.given import Fields

CHOICE = "choice"
"""The row of the choice among the fields of a site."""

INPUT_SIGNED = "input.signed"
"""Above 0 where activations have been negative when training began, 0 where not; float32, with derivative zero.

Float because optimizers and `jax.grad` take no other leaves. Weight decay shrinks it and never brings it to 0, nor 0
away from there, so what it says stays.
"""

CHANNEL, TENSOR = "channel", "tensor"
"""Granularities of weights; a whole number is the length of a group."""

FEW, MANY = 0, 6
"""First and last column of a table."""

Roles = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Axes of a leaf: stacks of matrices, outputs, contracted ones."""


@dataclasses.dataclass(frozen=True)
class Forms:
    """What the tables of a site hold: what the space can ask for. Layers of a scan have the same.

    Attributes:
        weights: (granularity, symmetric) pairs. acts: symmetries of activations; empty where they are float always.
        abs_offset: as in `Space`.
        sample: how many elements of a tensor an initial step is tried on at most; None is all.
        groups: as in `Space`: what the column of groups counts through.
        contracted: how many numbers an output sums over.
        roles: how the first reader of the weight uses the axes of the leaf, where this site uses them in another way:
            steps belong to the weight.
    """

    weights: tuple[tuple[str | int, bool], ...]
    acts: tuple[bool, ...]
    abs_offset: bool = False
    sample: int | None = None
    groups: tuple[int, ...] = ()
    contracted: int = 0
    roles: Roles | None = None

    def weight_fields(self) -> list[str]:
        """Names of the tables of a weight."""
        return [name for form in self.weights for name in names_of(*form) if name is not None]

    def input_fields(self) -> list[str]:
        """Names of the tables of activations."""
        if not self.acts:
            return []
        return [INPUT_SIGNED, *(name for s in self.acts for name in input_names_of(s) if name is not None)]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of groups that there are tables for."""
        return tuple(dict.fromkeys(grain for grain, _ in self.weights if isinstance(grain, int)))


def names_of(grain: str | int, symmetric: bool) -> tuple[str, str | None]:
    """Names of the scale and the offset of a weight in a form."""
    where = grain if isinstance(grain, str) else f"group{grain}"
    if symmetric:
        return f"weight.scale.{where}", None
    return f"weight.scale.{where}.asymmetric", f"weight.offset.{where}"


def input_names_of(symmetric: bool) -> tuple[str, str | None]:
    """Names of the scale and the offset of activations in a form."""
    return ("input.scale", None) if symmetric else ("input.scale.asymmetric", "input.offset")


def _column(table: Any, bits: Any) -> Any:
    """The column of a bit width of a table [..., 7]; its derivative in the others is exactly zero."""
    return lax.dynamic_index_in_dim(table, jnp.clip(bits - 2, FEW, MANY), table.ndim - 1, keepdims=False)


def _selected(fields: Fields, names: tuple[str, str | None], bits: Any) -> tuple[Any, Any]:
    """The step and offset of one form."""
    scale = _column(fields[names[0]], bits)
    return scale, jnp.zeros_like(scale) if names[1] is None else _column(fields[names[1]], bits)


def weight_steps(fields: Fields, forms: Forms, row: Any, rows: int) -> tuple[Any, Any]:
    """The steps and offsets of a weight at a choice, [*stacks, rows] each.

    Args:
        fields: tables of the site.
        forms: what they hold, without groups.
        row: int32 [5], may be traced.
        rows: N.
    """
    found: Any = None
    for grain, symmetric in forms.weights:
        own = _selected(fields, names_of(grain, symmetric), row[0])
        own = tuple(jnp.broadcast_to(a, (*a.shape[:-1], rows)) for a in own)
        found = _picked(found, (row[2] == int(grain == CHANNEL)) & (row[3] == int(symmetric)), own)
    return found


def group_steps(fields: Fields, forms: Forms, row: Any) -> tuple[Any, Any, int]:
    """The steps and offsets of a weight's groups at a choice, one for each run of ``unit`` numbers.

    Tables of all lengths are spread to runs of their greatest common divisor, so that one shape serves every choice.

    Args:
        fields: tables [*stacks, N * groups, 7] of the site.
        forms: what they hold.
        row: int32 [6], may be traced.

    Returns:
        (step, offset, unit), the arrays [*stacks, N, K / unit].
    """
    unit, found = math.gcd(*forms.lengths), None
    for length, symmetric in forms.weights:
        assert isinstance(length, int)
        own = _selected(fields, names_of(length, symmetric), row[0])
        own = tuple(jnp.repeat(by_output(a, length, forms), length // unit, axis=-1) for a in own)
        found = _picked(found, (row[5] == forms.groups.index(length)) & (row[3] == int(symmetric)), own)
    assert found is not None
    return *found, unit


def by_output(steps: Any, length: int, forms: Forms) -> Any:
    """Steps of groups [*stacks, N * groups] as [*stacks, N, groups]."""
    return steps.reshape(*steps.shape[:-1], -1, forms.contracted // length)


def input_steps(fields: Fields, forms: Forms, row: Any) -> tuple[Any, Any]:
    """The step and offset of activations at a choice, [1] each."""
    found: Any = None
    for symmetric in forms.acts:
        own = _selected(fields, input_names_of(symmetric), row[1])
        found = _picked(found, row[4] == int(symmetric), own)
    return found


def _picked(before: Any, here: Any, own: Any) -> Any:
    """``own`` where a choice asks for it, else what was found before it."""
    return own if before is None else tuple(jnp.where(here, a, b) for a, b in zip(own, before, strict=True))

"""From a recipe's decisions to what each parameter leaf is stored as.

Storage belongs to the slice of a leaf, decisions to sites. A slice that several sites read is stored once: a skip by
any of them keeps it float, two different formats are an error that names both. The axes along which a leaf is
quantized are those that its first quantized reader sums over.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qjax.analysis.naming import LINEAR, Site, SliceKey
from qjax.errors import RecipeError
from qjax.formats import quantize_array
from qjax.program import Program
from qjax.recipe import Decision
from qjax.sources import Static

INPUT = "input"
"""Prefix of the arrays of a weight that belong to the activations it meets."""

WEIGHT_OPS = (*LINEAR, "embedding")
"""Ops of the sites that read a weight."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """How one slice is stored.

    Attributes:
        fmt: the format, or None for float.
        rounding: how weights are rounded; None is round-to-nearest.
        observer: how the range is chosen; None is the largest magnitude.
        reason: why it stays float.
        note: anything the report should say.
        inputs: prefix and source of the constant activation scales that are kept with the weight.
    """

    fmt: Any = None
    rounding: Any = None
    observer: Any = None
    reason: str = ""
    note: str = dataclasses.field(default="", compare=False)
    inputs: tuple[tuple[str, Static], ...] = ()


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """How one leaf is stored.

    Attributes:
        leaf: position among the parameter leaves. name: its path. shape, dtype: of the float leaf.
        in_axes, stack_axes: along which it is quantized.
        key_axes: the stack axes that a loop or an index slices; ``slices`` has a key for each of their positions.
        slices: positions along ``key_axes`` -> how that slice is stored.
    """

    leaf: int
    name: str
    shape: tuple[int, ...]
    dtype: Any
    in_axes: tuple[int, ...]
    stack_axes: tuple[int, ...]
    key_axes: tuple[int, ...]
    slices: Mapping[tuple[int, ...], Stored]

    @property
    def uniform(self) -> Stored | None:
        """The storage that all slices share, or None."""
        distinct = set(self.slices.values())
        return next(iter(self.slices.values())) if len(distinct) == 1 else None


Slices = Mapping[tuple[int, ...], Stored]
"""Positions along the key axes -> how that slice is stored."""


def alike(slices: Slices) -> list[tuple[Slices, list[int]]]:
    """Group the positions of the first key axis by what is stored behind them.

    Returns:
        For each group what is stored (keyed by the remaining axes) and its positions, in order of appearance.
    """
    by_position: dict[int, dict[tuple[int, ...], Stored]] = {}
    for key, stored in slices.items():
        by_position.setdefault(key[0], {})[key[1:]] = stored
    groups: list[tuple[Slices, list[int]]] = []
    for position, inner in by_position.items():
        same = next((where for known, where in groups if known == inner), None)
        if same is None:
            groups.append((inner, [position]))
        else:
            same.append(position)
    return groups


def assignment(groups: list[tuple[Slices, list[int]]]) -> tuple[tuple[int, int], ...]:
    """The ``assign`` of a `QStack` whose parts are ``groups``: (part, position within it) for each position."""
    placed = {at: (part, i) for part, (_, where) in enumerate(groups) for i, at in enumerate(where)}
    return tuple(placed[at] for at in sorted(placed))


def plan_leaves(program: Program, decisions: Mapping[str, Decision]) -> dict[int, LeafPlan]:
    """Decide how each leaf is stored.

    Args:
        program: the trace.
        decisions: site name -> decision, from ``recipe.decide``.

    Returns:
        Leaf position -> plan, for the leaves of which some slice is quantized.

    Raises:
        RecipeError: two rules ask for different formats of one slice, a group exceeds its axis, or a site that a rule
            wants quantized cannot be.
    """
    readers: dict[str, list[tuple[Site, Decision]]] = defaultdict(list)
    for site in program.sites:
        if site.leaf is not None and site.op in WEIGHT_OPS:
            readers[site.leaf].append((site, decisions[site.name]))
    plans = {}
    for position, name in enumerate(program.leaf_names):
        plan = _plan_leaf(position, name, program.leaf_avals[position], readers.get(name, []))
        if plan is not None:
            plans[position] = plan
    return plans


def _plan_leaf(position: int, name: str, aval: Any, readers: list[tuple[Site, Decision]]) -> LeafPlan | None:
    wanted = [(s, d) for s, d in readers if d.weights is not None and not d.skip]
    for site, decision in wanted:
        if site.reason and decision.weights is not None and not decision.clamp_group:
            raise RecipeError(
                f"{site.name}: rule {decision.rule} asks for {decision.weights.name} weights, but {site.reason}; "
                "add a rule with skip=True for it in front"
            )
    usable = [(s, d) for s, d in wanted if not s.reason]
    if not usable:
        return None
    lead = next((s for s, _ in usable if s.op in LINEAR), usable[0][0])
    key_axes = tuple(a for a, _ in lead.slice if a not in lead.in_axes)
    stack_axes = (*key_axes, *(a for a in lead.batch_axes if a not in lead.in_axes))
    length = math.prod(aval.shape[a] for a in lead.in_axes)
    slices = {}
    for key in itertools.product(*(range(aval.shape[a]) for a in key_axes)):
        here = [(s, d) for s, d in readers if reads_slice(s.slice, dict(zip(key_axes, key, strict=True)))]
        slices[key] = _stored(here, length)
    if all(s.fmt is None for s in slices.values()):
        return None
    return LeafPlan(position, name, tuple(aval.shape), aval.dtype, lead.in_axes, stack_axes, key_axes, slices)


def reads_slice(key: SliceKey, position: Mapping[int, int]) -> bool:
    """Whether a reader of the slice ``key`` reads at a position (axis -> index) of the leaf."""
    return all(position.get(axis, at) == at for axis, at in key)


def _stored(readers: list[tuple[Site, Decision]], length: int) -> Stored:
    """How one slice is stored, from all its readers."""
    for site, decision in readers:
        if decision.skip:
            return Stored(reason=decision.reason if len(readers) == 1 else f"{decision.reason} at {site.name}")
    chosen: list[tuple[Site, Decision]] = [(s, d) for s, d in readers if d.weights is not None and not s.reason]
    if not chosen:
        reasons = [s.reason or d.reason for s, d in readers]
        return Stored(reason=next((r for r in reasons if r), "nothing reads it"))
    site, decision = chosen[0]
    fmt = decision.weights
    assert fmt is not None
    for other, d in chosen[1:]:
        if (d.weights, d.rounding, d.weight_observer) != (fmt, decision.rounding, decision.weight_observer):
            wanted = d.weights.name if d.weights is not None else "float"
            raise RecipeError(
                f"{site.name} and {other.name} read the same weight, and rule {decision.rule} wants {fmt.name} while "
                f"rule {d.rule} wants {wanted}; give both the same format and rounding, or skip one of them to keep "
                "the weight float"
            )
    note = decision.note
    if fmt.group is not None and fmt.group > length and fmt.clamped(length) != fmt:  # a short MX block is a block
        if not decision.clamp_group:
            raise RecipeError(
                f"{site.name}: a group of {fmt.group} is longer than the {length} numbers that the product sums over; "
                f"use group={length} or less, or clamp_group=True in the rule"
            )
        note = f"{note}; " * bool(note) + f"one group: the axis has {length} elements, the rule's group is {fmt.group}"
        fmt = fmt.clamped(length)
    elif fmt.group is not None and fmt.group < length and length % fmt.group:
        note = f"{note}; " * bool(note) + _of_the_rest(fmt, length)
    inputs = tuple((input_prefix(s.name), d.inputs) for s, d in readers if isinstance(d.inputs, Static))
    return Stored(fmt, decision.rounding, decision.weight_observer, note=note, inputs=inputs)


@functools.cache
def _of_the_rest(fmt: Any, length: int) -> str:
    """A note on the shorter last group of a row, and what it costs."""

    def bits(k: int) -> float:
        weight = jax.ShapeDtypeStruct((64, k), jnp.float32)
        return jax.eval_shape(lambda w: quantize_array(w, fmt, in_axes=1), weight).bits_per_element

    more = bits(length) - bits(-(-length // fmt.group) * fmt.group)
    costs = f", which costs {more:.2f} bits a weight" if more >= 0.005 else ""
    short = length % fmt.group
    return f"groups of {fmt.group} do not divide the axis of {length}: the last one holds {short} weights{costs}"


def input_prefix(site: str) -> str:
    """Under which names the constant scales of a site's activations stand among the arrays of its weight.

    ``input`` for the first reader of the weight, ``input#1`` for the next, as its name says.
    """
    head, mark, number = site.rpartition("#")
    return f"{INPUT}#{number}" if mark and head and number.isdigit() else INPUT


def check_decisions(program: Program, decisions: Mapping[str, Decision], settles: bool = False) -> None:
    """Refuse what this version cannot do, naming the site.

    Args:
        program: the trace.
        decisions: by site.
        settles: whether a search will replace static operands by fixed ones.

    Raises:
        RecipeError: static activations that no scale serves, or quantized results and composites.
    """
    for site in program.sites:
        d = decisions[site.name]
        if d.skip or d.rule is None:
            continue
        if isinstance(d.inputs, Static):
            if d.weights is None:
                raise RecipeError(
                    f"{site.name}: rule {d.rule} asks for static inputs and float weights; constant scales are kept "
                    "with a quantized weight, so give weights= a format too, or use dynamic(...)"
                )
        operands = bool(d.operands) and d.inputs is None and site.op in ("attention", "matmul")
        if d.outputs is not None or not operands and (d.operands or site.op not in WEIGHT_OPS):
            what = "outputs" if d.outputs is not None else "operands" if d.operands else f"inputs of a {site.op}"
            raise RecipeError(
                f"{site.name}: rule {d.rule} asks for quantized {what}, which qjax cannot do yet; weights and inputs "
                "of linear sites, weights of embeddings, and operands of attention and matmul can be quantized"
            )
        for name, source in d.operands.items():
            if isinstance(source, Static) and not settles:
                raise RecipeError(
                    f"{site.name}: rule {d.rule} asks for a static scale of its operand {name}, which only a search "
                    "finds (settle=qjax.passes.AdaLog()); use dynamic(...), or fixed(...) where it is known"
                )

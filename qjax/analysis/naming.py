"""From reads to named sites: one site for each slice of a leaf that an equation reads.

The names are the contract of the design: the leaf's path, with the index of the slice after the longest common prefix
of the leaves that the same loop slices, and ``#1``, ``#2`` for further reads of the same slice in program order. A
Python loop over a stack leaves static slices in the jaxpr; slices that follow one another at the same position form
the same kind of loop.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter

from qjax.analysis.provenance import DYNAMIC, Index, Ref
from qjax.analysis.reads import Analysis, Path, Read
from qjax.analysis.values import Near, common_prefix

SliceKey = tuple[tuple[int, int], ...]
"""Which slice of a leaf: ``((axis, position), ...)`` in order of slicing; empty for the whole leaf."""

LINEAR = ("dot", "conv", "ragged_dot")
"""Ops that the rule word ``linear`` stands for, where they read a parameter."""


@dataclasses.dataclass(frozen=True)
class Site:
    """One place where numbers can be quantized.

    Attributes:
        name: as in the design; what rules match.
        op: ``dot``, ``conv``, ``ragged_dot``, ``embedding``, ``matmul``, ``attention``, ``softmax``, ``activation``,
            ``norm`` or ``opaque``.
        kind: what exactly (``gelu``, ``rms_norm``, ``scores``).
        leaf: path of the leaf it reads, or None.
        slice: which slice of the leaf.
        in_axes, out_axes, batch_axes: leaf axes that the product contracts, keeps and batches over.
        weight_shape: shape of the slice in the leaf's layout, or None.
        shapes: operand shapes. out_shape: result shape.
        dtype: dtype of the weight (or of the result, for a site without one).
        repeats: how often it runs in one call; None where a while loop decides.
        flops: of one call (of one iteration of a while loop).
        bytes: of the weight slice in its float dtype.
        reason: why it cannot be quantized; empty if it can.
        read: position among the analysis' reads. path: address of the equation in this trace.
    """

    name: str
    op: str
    kind: str
    leaf: str | None
    slice: SliceKey
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    batch_axes: tuple[int, ...]
    weight_shape: tuple[int, ...] | None
    shapes: tuple[tuple[int, ...], ...]
    out_shape: tuple[int, ...]
    dtype: str
    repeats: int | None
    flops: int
    bytes: int
    reason: str
    read: int
    path: Path

    @property
    def reads_parameter(self) -> bool:
        """Whether the site reads a parameter leaf."""
        return self.leaf is not None


@dataclasses.dataclass(frozen=True)
class Slices:
    """Which slice a read takes at each step of the loops that choose it.

    Attributes:
        loops: ids of those loops (DYNAMIC for an index known at run time only).
        by_step: ``(step of each loop) -> slice key``.
        name_of: slice key -> name of the site.
    """

    loops: tuple[int, ...]
    by_step: dict[tuple[int, ...], SliceKey]
    name_of: dict[SliceKey, str]


def name_sites(
    analysis: Analysis, leaf_names: list[str], leaf_shapes: list[tuple[int, ...]], itemsizes: list[int]
) -> tuple[list[Site], list[Slices]]:
    """Name every read, one site per slice.

    Args:
        analysis: from `qjax.analysis.sites.analyze`.
        leaf_names, leaf_shapes, itemsizes: of the parameter leaves.

    Returns:
        The sites in program order, and for each read its slices.
    """
    groups = _static_groups(analysis, leaf_names)
    seen: Counter[str] = Counter()
    sites: list[Site] = []
    slices: list[Slices] = []
    for number, read in enumerate(analysis.reads):
        made, table = _sites_of(number, read, analysis, leaf_names, leaf_shapes, itemsizes, groups, seen)
        sites += made
        slices.append(table)
    return sites, slices


def _sites_of(
    number: int,
    read: Read,
    analysis: Analysis,
    leaf_names: list[str],
    leaf_shapes: list[tuple[int, ...]],
    itemsizes: list[int],
    groups: dict[int, tuple[str, ...]],
    seen: Counter[str],
) -> tuple[list[Site], Slices]:
    """The sites of one read: one for each slice that some loop step takes."""
    leaf, weight_shape, size = None, None, 0
    if read.ref is not None:
        leaf = leaf_names[read.ref.leaf]
        weight_shape = _slice_shape(read.ref, leaf_shapes[read.ref.leaf])
        segments, index, kind = leaf.split("/"), read.ref.index, ""
        size = math.prod(weight_shape) * itemsizes[read.ref.leaf]
    else:
        segments, index = _place(read, leaf_names)
        kind = read.kind
    by_step, counts, loops = _steps(index)
    length = _executions(read, analysis)
    sites, name_of = [], {}
    for key, steps in counts.items():
        path = _insert(segments, index, [i for _, i in key], analysis, leaf_names, groups)
        base = "/".join(part for part in (path, kind) if part)
        name = base if not seen[base] else f"{base}#{seen[base]}"
        seen[base] += 1
        name_of[key] = name
        repeats = None if length is None else max(1, length * steps // max(len(by_step), 1)) if loops else length
        sites.append(
            Site(
                name=name,
                op=read.op,
                kind=read.kind,
                leaf=leaf,
                slice=key,
                in_axes=read.in_axes,
                out_axes=read.out_axes,
                batch_axes=read.batch_axes,
                weight_shape=weight_shape,
                shapes=read.shapes,
                out_shape=read.out_shape,
                dtype=read.dtype,
                repeats=repeats,
                flops=read.flops * (repeats or 1),
                bytes=size,
                reason=read.reason,
                read=number,
                path=read.path,
            )
        )
    return sites, Slices(loops, by_step, name_of)


def _slice_shape(ref: Ref, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of one slice in the leaf's layout."""
    part = {axis: size for axis, _, size in ref.ranges}
    gone = {i.axis for i in ref.index}
    return tuple(part.get(axis, n) for axis, n in enumerate(shape) if axis not in gone)


def _place(read: Read, leaf_names: list[str]) -> tuple[list[str], tuple[Index, ...]]:
    """Where a site without a leaf of its own belongs: what the weights upstream have in common, or its scope."""
    near = read.near
    if read.leaves:  # a computed weight is named after what it is made of
        paths = [tuple(leaf_names[i].split("/")) for i in read.leaves]
        near = Near(common_prefix(paths), near.index if near is not None and len(paths) > 1 else None)
    if near is not None and near.segments:
        return list(near.segments), near.index or ()
    scope = clean_scope(read.scope)
    return scope.split("/") if scope else [], ()


def _steps(
    index: tuple[Index, ...],
) -> tuple[dict[tuple[int, ...], SliceKey], Counter[SliceKey], tuple[int, ...]]:
    """Enumerate the loop steps behind ``index``: step -> slice, how many steps take each slice, and the loops.

    Two indices of the same loop move together; every run-time index moves alone.
    """
    movers: list[tuple[int, list[int]]] = []  # (loop id, positions in index)
    for at, i in enumerate(index):
        if i.loop is None:
            continue
        for loop, members in movers:
            if loop == i.loop and loop != DYNAMIC:
                members.append(at)
                break
        else:
            movers.append((i.loop, [at]))
    by_step: dict[tuple[int, ...], SliceKey] = {}
    counts: Counter[SliceKey] = Counter()
    ranges = [range(len(index[members[0]].values)) for _, members in movers]
    for step in itertools.product(*ranges):
        at_step = {m: s for (_, members), s in zip(movers, step, strict=True) for m in members}
        key = tuple((i.axis, i.values[at_step.get(at, 0)]) for at, i in enumerate(index))
        by_step[step] = key
        counts[key] += 1
    ordered = Counter({key: counts[key] for key in sorted(counts, key=lambda k: tuple(p for _, p in k))})
    return by_step, ordered, tuple(loop for loop, _ in movers)


def _executions(read: Read, analysis: Analysis) -> int | None:
    total = 1
    for loop in read.loops:
        length = analysis.loops[loop].length
        if length is None:
            return None
        total *= length
    return total


def _insert(
    segments: list[str],
    index: tuple[Index, ...],
    positions: list[int],
    analysis: Analysis,
    leaf_names: list[str],
    groups: dict[int, tuple[str, ...]],
) -> str:
    """Put each slice position after the common prefix of the leaves that its loop slices."""
    marks = []
    for order, (i, position) in enumerate(zip(index, positions, strict=True)):
        if i.loop is None or i.loop == DYNAMIC:
            prefix = groups.get(i.event, tuple(segments))
        else:
            prefix = common_prefix([tuple(leaf_names[n].split("/")) for n in analysis.loops[i.loop].leaves])
        marks.append((min(len(prefix), len(segments)), order, str(position)))
    out = list(segments)
    for at, _, text in sorted(marks, reverse=True):
        out.insert(at, text)
    return "/".join(out)


def _static_groups(analysis: Analysis, leaf_names: list[str]) -> dict[int, tuple[str, ...]]:
    """Common prefix of the leaves sliced together, for each slicing event outside a scan's own slices.

    Static slices come from Python loops. A leaf joins the current group while the group is still at its first
    position, or if it is a member already; anything else opens a new group, so that two stacks looped over one after
    the other stay apart. Slices at a run-time index belong to the loop around them.
    """
    members: list[set[int]] = []
    group_of: dict[int, int] = {}
    run_time: dict[int | None, int] = {}
    current, first, size, moved = -1, None, None, False
    for s in analysis.slicing:
        if s.position is None:
            if s.loop not in run_time:
                run_time[s.loop] = len(members)
                members.append(set())
            group = run_time[s.loop]
        else:
            joins = (
                current >= 0 and s.size == size and (s.leaf in members[current] or (not moved and s.position == first))
            )
            if not joins:
                current, first, size, moved = len(members), s.position, s.size, False
                members.append(set())
            moved = moved or s.position != first
            group = current
        members[group].add(s.leaf)
        group_of[s.event] = group
    prefixes = [common_prefix([tuple(leaf_names[n].split("/")) for n in m]) for m in members]
    return {event: prefixes[group] for event, group in group_of.items()}


_WRAPPER = re.compile(r"^(?:jvp|transpose|vmap|remat|checkpoint|rematted_computation|custom_\w+)\((.*)\)$")


def clean_scope(scope: str) -> str:
    """Drop from a name stack what is not a scope: transform wrappers and einsum specifications."""
    kept = []
    for part in scope.split("/"):
        while match := _WRAPPER.match(part):
            part = match.group(1)
        if part and "->" not in part and part not in ("checkpoint", "rematted_computation") and "," not in part:
            kept.append(part)
    return "/".join(kept)

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

import dataclasses
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import jax.numpy as jnp
import numpy as np

from qjax._compat import collector_paused
from qjax.analysis import gauge_arithmetic, gauge_moves, gauge_products
from qjax.analysis.gauge import Gauge, Reason
from qjax.analysis.naming import SliceKey
from qjax.errors import QjaxError

if TYPE_CHECKING:
    from qjax.program import Program

_RULES = (gauge_arithmetic, gauge_moves, gauge_products)

Kind = Literal["scale", "permute", "rotate"]
Side = Literal["input", "output"]


@dataclasses.dataclass(frozen=True, eq=False)
class Touch:
    """What happens to one leaf slice.

    Attributes:
        leaf, slice: the leaf's path and the slice, as in `Site`.
        index: int32, of the slice's rank (sliced axes dropped) and of size one along axes where it repeats: the factor
            that multiplies each element, or -1 where none does.
        power: +1: the elements are multiplied by their factor; -1: divided by it.
        offset: what is multiplied is the leaf plus this number (a norm that multiplies by ``1 + w``): the new leaf is
            ``(leaf + offset) * f - offset``.
    """

    leaf: str
    slice: SliceKey
    index: np.ndarray = dataclasses.field(repr=False)
    power: int
    offset: float = 0.0

    @property
    def axes(self) -> tuple[int, ...]:
        """Axes of the whole leaf along which the factors differ."""
        gone = {axis for axis, _ in self.slice}
        kept = [axis for axis in range(self.index.ndim + len(gone)) if axis not in gone]
        return tuple(axis for axis, n in zip(kept, self.index.shape, strict=True) if n > 1)


@dataclasses.dataclass(frozen=True)
class Fold:
    """A scale per channel that stands in the way of a rotation until it is one.

    Attributes:
        leaf, slice: where it is.
        offset: the scale is the leaf plus this number.
        group: the factors that it can be exchanged with (see `folded`), or why it cannot be folded: a table that the
            head shares with the embedding, say, has to be stored twice first.
    """

    leaf: str
    slice: SliceKey
    offset: float
    group: ChannelGroup | Refusal = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that change together.

    Attributes:
        site: the site asked for.
        kind: ``"scale"``: any positive factors; ``"permute"``: orders that stay within blocks; ``"rotate"``:
            orthogonal matrices that mix within blocks.
        size: how many factors are free.
        channels: int32 [K] (flattened input axes, as in the canonical matrix of the site; [E, K] where a batch of
            matrices has channels of its own): the factor that each channel is multiplied by, -1 where it has to stay.
        blocks: int32 [size]: a permutation or rotation mixes only channels of the same block; zeros for factors.
        touches: what has to be multiplied; a leaf slice may appear more than once.
        sites: every linear site whose input is multiplied by some of the factors, with its own ``channels``.
        divided: those whose input is divided by some, likewise.
        folds: for rotations: scales (of norms) that have to be folded into their readers first.
        keeps_ones: for rotations: reasons why the matrix has to leave the vector of ones of each block as it is
            (names of the norms that subtract a mean); empty if any orthogonal matrix will do.
    """

    site: str
    kind: Kind
    size: int
    channels: np.ndarray = dataclasses.field(repr=False)
    blocks: np.ndarray = dataclasses.field(repr=False)
    touches: tuple[Touch, ...]
    sites: Mapping[str, np.ndarray] = dataclasses.field(repr=False)
    divided: Mapping[str, np.ndarray] = dataclasses.field(repr=False)
    folds: tuple[Fold, ...] = ()
    keeps_ones: tuple[str, ...] = ()

    @property
    def leaves(self) -> tuple[str, ...]:
        """The leaves touched, in program order, once each."""
        return tuple(dict.fromkeys(t.leaf for t in self.touches))

    @property
    def untie(self) -> tuple[str, ...]:
        """Leaves that have to be stored twice before the scales can be folded: a head that is the embedding."""
        refused = [f.group for f in self.folds if isinstance(f.group, Refusal)]
        return tuple(dict.fromkeys(r.consumer for r in refused if r.kind == "shared"))


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a site's channels have to stay.

    Attributes:
        site: the site asked for.
        reason: a sentence.
        consumer: the site or primitive that forbids it.
        kind: ``"equation"`` that lets nothing through, ``"shared"`` leaf (``consumer``) that would have to be stored
            twice, ``"argument"`` or ``"result"`` of the function, or ``"blocks"`` of single channels.
    """

    site: str
    reason: str
    consumer: str
    kind: str = "equation"

    def __str__(self) -> str:
        return f"{self.site}: {self.reason}"


def channel_group(program: Program, site: str, kind: Kind = "scale", of: Side = "input") -> ChannelGroup | Refusal:
    """The group of channels that the input (or output) of a linear site belongs to.

    Args:
        program: from `qjax.trace`.
        site: name of a site that reads a parameter.
        kind: multiply channels by positive factors, or permute them.
        of: the site's input, or its output (as SmoothAttention needs it: ask for the output of the keys' weight).

    Returns:
        The group, or why there is none.

    Raises:
        QjaxError: the site is unknown, or reads no parameter.
    """
    found = program.site(site)
    if found.leaf is None or found.op not in ("dot", "conv", "ragged_dot", "embedding"):
        raise QjaxError(f"{site} is a {found.op} without a weight of its own; ask for a site that reads a parameter")
    return _solution(program, kind).group(site, of)


class _Solution:
    """A gauge, with tables to look groups up in."""

    def __init__(self, program: Program, kind: Kind):
        self.program = program
        self.kind: Kind = kind
        with collector_paused():
            self.gauge = Gauge(program, kind)
        resolve = self.gauge.ties.resolve
        self.terms: list[tuple[str, SliceKey, np.ndarray, float]] = []
        for (leaf, key), entries in self.gauge.entries.items():
            for entry in {e.ranges: e for e in reversed(entries)}.values():
                for codes in entry.terms:
                    roots = resolve(codes)
                    if roots.any():
                        self.terms.append((program.leaf_names[leaf], key, roots, entry.offset))
        self.inputs = {name: resolve(codes) for name, codes in self.gauge.inputs.items()}
        self.term_of = _Table([t[2] for t in self.terms])
        self.names = list(self.inputs)
        self.site_of = _Table([self.inputs[n] for n in self.names])
        self.cells = self._cells() if kind != "scale" else None
        self.known: dict[bytes, Any] = {}
        self.leaf_numbers = {name: n for n, name in enumerate(program.leaf_names)}

    def _cells(self) -> np.ndarray:
        """A fingerprint for each unknown: a permutation moves a channel only to one with the same."""
        ties = self.gauge.ties
        marks = np.zeros(ties.count, np.uint64)
        leaves = [(t[2], np.zeros((), np.int64)) for t in self.terms]
        for n, (codes, keys) in enumerate([*self.gauge.separators, *leaves]):
            roots, keys = np.broadcast_arrays(ties.resolve(codes), keys)
            np.add.at(marks, roots.ravel(), _mixed(keys.ravel().astype(np.uint64), n))
        return marks

    def group(self, site: str, of: Side) -> ChannelGroup | Refusal:
        gauge = self.gauge
        raw = (gauge.inputs if of == "input" else gauge.outputs).get(site)
        if raw is None:
            return self.refusal(site, of, 0)
        channels = self.laid_out(site, gauge.ties.resolve(raw) * self.sign(of), of)
        roots = np.abs(channels).ravel()
        free, first = np.unique(roots, return_index=True)
        first = np.sort(first[free > 0])
        free = roots[first]
        if not len(free):
            return self.refusal(site, of, gauge.ties.why(raw) or (gauge.origin.get(site, 0) if of == "input" else 0))
        number = _Numbering(free, np.sign(channels.ravel()[first]))
        found = self.members(number)
        if found is None:
            verb = "change places" if self.kind == "permute" else "be mixed"
            return Refusal(site, f"no two channels of its {of} may {verb}", site, "blocks")
        return ChannelGroup(site, self.kind, len(free), number.split(channels)[0][1], *found)

    def group_of_leaf(self, leaf: str, key: SliceKey) -> ChannelGroup | Refusal:
        """The group that multiplies a leaf slice, whatever reads what comes of it."""
        for name, slice_key, codes, _ in self.terms:
            if (name, slice_key) == (leaf, key):
                free, first = np.unique(np.abs(codes).ravel(), return_index=True)
                free, first = free[free > 0], first[free > 0]
                number = _Numbering(free, np.sign(codes.ravel()[first]))
                found = self.members(number)
                assert found is not None
                return ChannelGroup(leaf, self.kind, len(free), number.split(codes)[0][1].ravel(), *found)
        entries = self.gauge.entries.get((self.leaf_numbers[leaf], key), [])
        why = next((w for e in entries for t in e.terms if (w := self.gauge.ties.why(t))), 0)
        return self.refusal(leaf, "output", why)

    def members(self, number: _Numbering) -> Any:
        """Blocks, touches and sites of a set of unknowns; None if none of them can change places with another."""
        key = number.sorted.tobytes() + number.order.tobytes() + number.signs.tobytes()
        if key in self.known:
            return self.known[key]
        free = number.sorted[np.argsort(number.order)]
        blocks = np.zeros(len(free), np.int32)
        if self.cells is not None:
            _, first, blocks = np.unique(self.cells[free], return_index=True, return_inverse=True)
            blocks = np.argsort(np.argsort(first))[blocks.reshape(-1)].astype(np.int32)
            if len(np.unique(blocks)) == len(free):
                self.known[key] = None
                return None
        touches = []
        for n in self.term_of.of(free):
            leaf, slice_key, codes, offset = self.terms[n]
            touches += [Touch(leaf, slice_key, index, power, offset) for power, index in number.split(codes)]
        sites: dict[int, dict[str, np.ndarray]] = {1: {}, -1: {}}
        for n in self.site_of.of(free):
            name = self.names[n]
            for power, index in number.split(self.laid_out(name, self.inputs[name] * self.sign("input"), "input")):
                sites[power][name] = index
        folds, ones = self.conditions(free)
        self.known[key] = blocks, tuple(touches), sites[1], sites[-1], folds, ones
        return self.known[key]

    def conditions(self, free: np.ndarray) -> tuple[tuple[Fold, ...], tuple[str, ...]]:
        """What a rotation of unknowns asks for besides."""
        resolve = self.gauge.ties.resolve
        folds: dict[tuple[str, SliceKey], Fold] = {}
        for codes, place, offset in self.gauge.folds:
            if np.isin(resolve(codes), free).any():
                for key in place.keys:
                    leaf = self.program.leaf_names[place.leaf]
                    scales = _solution(self.program, "scale").group_of_leaf(leaf, key)
                    folds.setdefault((leaf, key), Fold(leaf, key, offset, scales))
        reasons = [self.gauge.reasons[r] for codes, r in self.gauge.ones if np.isin(resolve(codes), free).any()]
        ones = [_site_at(self.program, reason) or reason.what for reason in reasons]
        return tuple(folds.values()), tuple(dict.fromkeys(ones))

    def sign(self, of: Side) -> int:
        """A weight has the reciprocals of the factors of its input."""
        return -1 if of == "input" and self.kind == "scale" else 1

    def laid_out(self, name: str, codes: np.ndarray, of: Side) -> np.ndarray:
        """Codes of a leaf slice as [K], or [*others, K] where they differ along other axes."""
        site = self.program.by_name[name]
        leaf = self.leaf_numbers[site.leaf or ""]
        shape = self.program.leaf_avals[leaf].shape
        gone = {axis for axis, _ in site.slice}
        kept = [axis for axis in range(len(shape)) if axis not in gone]
        own = list(site.in_axes if of == "input" or site.op == "embedding" else site.out_axes)
        others = [axis for axis in kept if axis not in own and codes.shape[kept.index(axis)] > 1]
        ref = self.program.analysis.reads[site.read].ref
        ranges = {axis: (start, size) for axis, start, size in ref.ranges} if ref is not None else {}
        for axis in own + others:
            d = kept.index(axis)
            if codes.shape[d] == 1:
                codes = np.repeat(codes, ranges.get(axis, (0, shape[axis]))[1], axis=d)
            elif axis in ranges:
                codes = np.take(codes, range(ranges[axis][0], sum(ranges[axis])), axis=d)
        rest = [axis for axis in kept if axis not in own and axis not in others]
        codes = codes.transpose([kept.index(axis) for axis in (*others, *own, *rest)])
        return codes.reshape(*codes.shape[: len(others)], -1)

    def refusal(self, site: str, of: Side, number: int) -> Refusal:
        reason = self.gauge.reasons[number]
        who = self.where(reason)
        verb = {"scale": "a factor per channel", "permute": "another order of channels", "rotate": "mixed channels"}
        text = {
            "argument": f"its {of} is an argument of the function",
            "result": f"its {of} is a result of the function",
            "free": f"its {of} is not followed by the analysis",
            "shared": f"{reason.what} is read in more ways than one, which want different factors",
            "equation": f"its {of} passes through {who}, which does not let through {verb[self.kind]}",
        }[reason.kind]
        return Refusal(site, text, who, reason.kind)

    def where(self, reason: Reason) -> str:
        """Name of the site or composite at a reason's equation, with its primitive."""
        if reason.kind != "equation":
            return reason.what or reason.kind
        at = _site_at(self.program, reason)
        return f"{at} ({reason.what})" if at else f"a {reason.what}"


def _site_at(program: Program, reason: Reason) -> str:
    """Name of what the equation belongs to; empty if it is no part of a site."""
    steps = dict(reason.steps)
    for number, read in enumerate(program.analysis.reads):
        if read.path == reason.path or read.composite is not None and reason.path in read.composite.paths:
            slices = program.slices[number]
            key = slices.by_step.get(tuple(steps.get(loop, 0) for loop in slices.loops), ())
            return slices.name_of.get(key, next(iter(slices.name_of.values()), ""))
    return ""


class _Numbering:
    """Roots to factor numbers, each oriented so that the channels asked for are multiplied, not divided."""

    def __init__(self, roots: np.ndarray, signs: np.ndarray):
        self.order = np.argsort(roots)
        self.sorted, self.signs = roots[self.order], signs[self.order]

    def split(self, codes: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """``(power, factor numbers)`` of codes, for the powers that occur."""
        at = np.searchsorted(self.sorted, np.abs(codes)).clip(0, len(self.sorted) - 1)
        index = np.where(self.sorted[at] == np.abs(codes), self.order[at], -1).astype(np.int32)
        power = np.sign(codes) * self.signs[at]
        parts = [(p, np.where(power == p, index, -1).astype(np.int32)) for p in (1, -1)]
        return [(p, part) for p, part in parts if (part >= 0).any()]


class _Table:
    """Which arrays hold an unknown."""

    def __init__(self, arrays: list[np.ndarray]):
        own = [np.unique(np.abs(a)) for a in arrays]
        roots = np.concatenate(own) if own else np.zeros(0, np.int32)
        numbers = np.repeat(np.arange(len(own)), [len(a) for a in own])
        order = np.argsort(roots, kind="stable")
        self.roots, self.numbers = roots[order], numbers[order]

    def of(self, roots: np.ndarray) -> list[int]:
        """Numbers of the arrays that hold one of the roots, ascending."""
        wanted = np.zeros(max(int(roots.max()), int(self.roots.max(initial=0))) + 1, bool)
        wanted[roots] = True
        return [int(n) for n in np.unique(self.numbers[wanted[self.roots]])]


def _mixed(keys: np.ndarray, salt: int) -> np.ndarray:
    """Pseudo-random 64-bit numbers of (key, salt): SplitMix64."""
    with np.errstate(over="ignore"):
        x = keys * np.uint64(0x9E3779B97F4A7C15) + np.uint64((salt * 0xD1342543DE82EF95 + 1) % (1 << 64))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


_SOLVED: weakref.WeakKeyDictionary[Program, dict[str, _Solution]] = weakref.WeakKeyDictionary()


def _solution(program: Program, kind: Kind) -> _Solution:
    solved = _SOLVED.setdefault(program, {})
    if kind not in solved:
        solved[kind] = _Solution(program, kind)
    return solved[kind]


def stream_group(program: Program, kind: Kind = "rotate") -> ChannelGroup | Refusal:
    """The residual stream: the group of what the first table or weight of the program writes.

    Args:
        program: from `qjax.trace`.
        kind: rotate or permute it (norms fix its scale).

    Returns:
        The group, or why it has to stay.
    """
    solution = _solution(program, kind)
    first = next(iter(solution.gauge.outputs), None)
    if first is None:
        return Refusal("", "the program multiplies by no parameter", "", "equation")
    return solution.group(first, "output")


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

"""From a gauge to groups: tables that find, for the channels of a site, everything that changes with them."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from qjax._compat import collector_paused
from qjax.analysis import gauge_arithmetic, gauge_moves, gauge_products
from qjax.analysis.flows import Reason
from qjax.analysis.gauge import Gauge
from qjax.analysis.groups import ChannelGroup, Fold, Kind, Refusal, Side, Touch
from qjax.analysis.naming import SliceKey

if TYPE_CHECKING:
    from qjax.program import Program

_RULES = (gauge_arithmetic, gauge_moves, gauge_products)
"""Imported for the rules that they register."""


class Solution:
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
        """The group of a site's channels."""
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
                    scales = solution(self.program, "scale").group_of_leaf(leaf, key)
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
        """The refusal that a reason is."""
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
        left, right = (np.searchsorted(self.roots, roots, side=side) for side in ("left", "right"))
        counts = right - left
        starts = np.repeat(left - np.cumsum(counts) + counts, counts)
        return [int(n) for n in np.unique(self.numbers[starts + np.arange(len(starts))])]


def _mixed(keys: np.ndarray, salt: int) -> np.ndarray:
    """Pseudo-random 64-bit numbers of (key, salt): SplitMix64."""
    with np.errstate(over="ignore"):
        x = keys * np.uint64(0x9E3779B97F4A7C15) + np.uint64((salt * 0xD1342543DE82EF95 + 1) % (1 << 64))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


_SOLVED: weakref.WeakKeyDictionary[Program, dict[str, Solution]] = weakref.WeakKeyDictionary()


def solution(program: Program, kind: Kind) -> Solution:
    """The solution of a program, made once."""
    solved = _SOLVED.setdefault(program, {})
    if kind not in solved:
        solved[kind] = Solution(program, kind)
    return solved[kind]

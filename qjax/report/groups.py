"""Rows that say the same thing, said once: 32 equal layers become ``layers/{0..31}/mlp/up/kernel x32``.

A name is split into its text and its numbers. Rows whose texts agree, and whose stated facts agree, form a group; the
group's name writes each position's numbers as a range. Because a group must never claim rows it does not hold, numbers
at several positions (``layers/3/experts/7``) are merged only where they fill the whole product of their ranges.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

from qjax.report.data import SiteRow

_NUMBER = re.compile(r"\d+")
_FIGURE = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")
_ELISION = "…"


@dataclass(frozen=True)
class Group:
    """Rows shown as one line: the common name, the rows in program order."""

    name: str
    rows: tuple[SiteRow, ...]

    @property
    def count(self) -> int:
        """Number of sites in the group."""
        return len(self.rows)

    @property
    def formats(self) -> tuple[tuple[str, int], ...]:
        """Formats in the group and how many sites have each, most frequent first."""
        return tuple(Counter(r.format for r in self.rows).most_common())

    @property
    def bytes_before(self) -> int:
        """Bytes of the group's float weights."""
        return sum(r.bytes_before for r in self.rows)

    @property
    def bytes_after(self) -> int:
        """Bytes of the group's weights as stored."""
        return sum(r.bytes_after for r in self.rows)

    @property
    def bits(self) -> float | None:
        """Average stored bits per weight; None for rows without weights of their own."""
        elements = sum(r.elements for r in self.rows)
        return 8.0 * sum(r.bytes_after for r in self.rows if r.elements) / elements if elements else None

    @property
    def sqnr(self) -> tuple[float, float] | None:
        """Lowest and highest SQNR in dB of the group, NaN where one is; None where none was measured."""
        known = [r.sqnr_db for r in self.rows if r.sqnr_db is not None]
        if any(math.isnan(v) for v in known):  # one NaN is news; a range would hide it
            return math.nan, math.nan
        return (min(known), max(known)) if known else None

    def distinct(self, read: Callable[[SiteRow], str]) -> tuple[str, ...]:
        """Distinct non-empty values of a text field, in program order."""
        return tuple(dict.fromkeys(v for v in map(read, self.rows) if v))


def group_rows(rows: Iterable[SiteRow], most: int = 40) -> tuple[Group, ...]:
    """Collapse rows that agree, coarser only as far as needed to come under `most` groups.

    A group whose numbers need more than five runs to write (a search's scattered choices) counts as unreadable too.
    Three degrees are tried in turn: everything that is stated agrees (sizes, format, inputs, lowering, note, reason);
    names and quantized-or-not agree, so formats may differ within a group; the same with every number of the name free.
    The last degree is returned even where it has more than `most` groups.

    Args:
        rows: in program order.
        most: the number of lines that is still readable.

    Returns:
        Groups in the order of their first rows.
    """
    rows = tuple(rows)
    groups: tuple[Group, ...] = ()
    for key, exact in ((_stated, True), (_coarse, True), (_coarse, False)):
        groups = _grouped(rows, key, exact)
        # A long list of scattered layers says less than all layers with a count per format.
        if len(groups) <= most and not any(_ELISION in g.name for g in groups):
            break
    return groups


def _stated(row: SiteRow) -> Hashable:
    # A reason or note may name its own site; that must not keep equal layers apart.
    return (
        row.op,
        row.shape,
        row.format,
        row.quantized,
        row.inputs,
        row.lowering,
        row.repeats,
        row.bytes_after,
        row.note.replace(row.name, ""),
        row.reason.replace(row.name, ""),
    )


def _coarse(row: SiteRow) -> Hashable:
    return (row.op, row.shape, row.quantized)


def _grouped(rows: tuple[SiteRow, ...], key: Callable[[SiteRow], Hashable], exact: bool) -> tuple[Group, ...]:
    order = {id(row): i for i, row in enumerate(rows)}
    buckets: dict[Hashable, list[SiteRow]] = {}
    for row in rows:
        buckets.setdefault((_NUMBER.sub("*", row.name), key(row)), []).append(row)
    groups = [g for bucket in buckets.values() for g in (_split(bucket) if exact else [_merged(bucket)])]
    return tuple(sorted(groups, key=lambda g: order[id(g.rows[0])]))


def _split(rows: list[SiteRow]) -> list[Group]:
    """Cut one bucket into groups whose number positions form full products."""
    numbers = [tuple(map(int, _NUMBER.findall(r.name))) for r in rows]
    columns = [sorted(set(c)) for c in zip(*numbers, strict=True)]
    if len(rows) == 1 or math.prod(map(len, columns)) == len(set(numbers)) == len(rows):
        return [_merged(rows)]
    # Not a full product: fix the position with the fewest values and try each value on its own.
    varying = [i for i, c in enumerate(columns) if len(c) > 1]
    if not varying:  # equal names; they cannot be told apart and are shown as one line
        return [_merged(rows)]
    position = min(varying, key=lambda i: len(columns[i]))
    parts = [[r for r, n in zip(rows, numbers, strict=True) if n[position] == v] for v in columns[position]]
    return [g for part in parts for g in _split(part)]


def _merged(rows: list[SiteRow]) -> Group:
    numbers = [tuple(map(int, _NUMBER.findall(r.name))) for r in rows]
    texts = _NUMBER.split(rows[0].name)
    columns = [sorted(set(c)) for c in zip(*numbers, strict=True)]
    name = texts[0]
    # Spelling such as layer_007 is kept where the number does not vary.
    spelled = _NUMBER.findall(rows[0].name)
    for text, column, written in zip(texts[1:], columns, spelled, strict=True):
        name += (written if len(column) == 1 else "{" + ranges(column) + "}") + text
    return Group(name, tuple(rows))


def fold_notes(notes: Iterable[str]) -> tuple[str, ...]:
    """Notes that differ in numbers only, as one each: whole numbers as ranges, others from the least to the largest.

    ``layers/0/up: factors 0.7 to 1.4`` and the same of other layers become ``layers/{0..3}/up: factors 0.6–0.9 to
    1.2–1.9 (×4)``.
    """
    alike: dict[str, list[list[str]]] = {}
    for note in notes:
        alike.setdefault(_FIGURE.sub("\0", note), []).append(_FIGURE.findall(note))
    return tuple(_folded(key.split("\0"), found) for key, found in alike.items())


def _folded(texts: list[str], found: list[list[str]]) -> str:
    out = texts[0]
    for text, column in zip(texts[1:], zip(*found, strict=True), strict=True):
        different = sorted(set(column), key=float)
        if len(different) == 1:
            out += column[0]
        elif all(n.isdigit() for n in column):
            out += "{" + ranges(sorted(set(map(int, column)))) + "}"
        else:
            out += f"{different[0]}–{different[-1]}"
        out += text
    return out if len(found) == 1 else f"{out} (×{len(found)})"


def ranges(numbers: Iterable[int]) -> str:
    """Write sorted distinct integers compactly: ``0..3,5,8..9``; long lists keep the first and last runs."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    text = [str(a) if a == b else f"{a},{b}" if b == a + 1 else f"{a}..{b}" for a, b in runs]
    return ",".join(text if len(text) <= 5 else [*text[:3], _ELISION, text[-1]])

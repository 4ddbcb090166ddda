"""A report in a terminal: a headline, the quantized sites, the sites left in float, notes and scores.

Everything is built from rich renderables; printed by rich they have colour, rendered to a string they are plain text.
Narrow terminals lose columns (shape, then lowering), never rows.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.console import Group as Stack
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qjax.report.data import Report, SiteRow
from qjax.report.groups import Group, fold_notes, group_rows
from qjax.report.scores import score_lines

MOST_LINES = 48
"""Lines per table before a report in a terminal stops and points at the HTML form."""


def render_text(report: Report, width: int = 100) -> str:
    """Return `report` as plain text of at most `width` columns (60 at least), without trailing blanks."""
    width = max(60, width)
    console = Console(
        file=io.StringIO(),
        width=width,
        color_system=None,
        force_terminal=False,
        legacy_windows=False,
        highlight=False,
        emoji=False,
        markup=False,
    )
    for part in renderables(report, width):
        console.print(part)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines()).strip("\n") + "\n"


def renderables(report: Report, width: int) -> tuple[Any, ...]:
    """The parts of a report as rich renderables, top to bottom."""
    notes = _Footnotes()
    done = report.quantized
    weights = tuple(r for r in report.left if r.leaf)
    free = tuple(r for r in report.left if not r.leaf)
    parts: list[Any] = [_headline(report), ""]
    if done:
        heading = _heading("Quantized", _sites(len(done)) + said_of_inputs(report))
        parts += [heading, _quantized(report, width, notes), ""]
    if weights:
        parts += [_heading("Left in float", _sites(len(weights))), _left(weights, width), ""]
    if free:
        parts += [_heading("Without weights, left in float", _sites(len(free))), _free(free, width), ""]
    if not report.rows:
        parts.append(Text("No site was found: the function multiplies nothing by a parameter.", style="yellow"))
    if notes or report.notes:
        lines = [*notes.lines(), *(_marked("•", n) for n in fold_notes(report.notes))]
        parts += [_heading("Notes", ""), Padding(Stack(*lines), (0, 0, 1, 2))]
    if report.scores:
        parts += [_heading("Scores", ""), scores_table(report.scores)]
    return tuple(parts)


def size(n: float) -> str:
    """Bytes in decimal units with three figures: ``980 B``, ``1.04 MB``."""
    n = float(n)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(n) < 999.5 or unit == "TB":
            break
        n /= 1000
    digits = 0 if unit == "B" or abs(n) >= 99.95 else 1 if abs(n) >= 9.995 else 2
    return f"{n:.{digits}f} {unit}"


def span(low: float, high: float) -> str:
    """A range of decibels: ``38.1``, ``38.1–41.2``, ``exact``."""
    a, b = decibel(low), decibel(high)
    return a if a == b else f"{a}–{b}"


def decibel(value: float) -> str:
    """One SQNR: ``38.1``, ``exact`` when infinite."""
    if math.isnan(value):
        return "NaN"
    return "exact" if value == math.inf else "-∞" if value == -math.inf else f"{value:.1f}"


def summary(report: Report) -> str:
    """One line: ``1.04 MB (float32) → 320 kB (3.26x smaller), 8.50 bits per weight``."""
    dtype = f" ({report.float_dtype})" if report.float_dtype else ""
    text = f"{size(report.float_bytes)}{dtype} → {size(report.stored_bytes)} ({report.compression:.2f}x smaller)"
    bits, own = report.bits(), report.bits(report.quantized)
    if bits is not None:
        text += f", {bits:.2f} bits per weight"
        if own is not None and f"{own:.2f}" != f"{bits:.2f}":
            text += f" ({own:.2f} where quantized)"
    return text


def beside_source(report: Report) -> str:
    """The size beside that of a folder with narrower floats: ``1.72x smaller than in its folder, which holds ..``."""
    holds = f"in its folder, which holds {size(report.source_bytes)} ({report.source_dtype})"
    if report.stored_bytes <= report.source_bytes:
        return f"{report.source_bytes / max(report.stored_bytes, 1):.2f}x smaller than {holds}"
    wide = f"{report.stored_bytes / report.source_bytes:.2f}x as large as {holds}"
    return f"{wide}: what stays float is kept as {report.float_dtype}"


class _Footnotes:
    """Notes of rows, numbered in order of first use, so that a long note is read once and not once per line."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._sites: dict[str, int] = {}

    def mark(self, group: Group) -> str:
        notes = dict.fromkeys(_generic(r) for r in group.rows if r.note)
        for r in group.rows:
            if r.note:
                self._sites[_generic(r)] = self._sites.get(_generic(r), 0) + 1
        return " ".join(f"[{self._numbers.setdefault(n, len(self._numbers) + 1)}]" for n in notes)

    def __bool__(self) -> bool:
        return bool(self._numbers)

    def lines(self) -> list[Any]:
        return [_marked(f"[{k}]", f"{note} ({_sites(self._sites[note])})") for note, k in self._numbers.items()]


def _generic(row: SiteRow) -> str:
    return _nameless(row.note, row.name)


def _nameless(remark: str, name: str) -> str:
    """A remark without the site's own name (as a whole word, and not where it is a quoted pattern)."""
    if "/" not in name and not any(c.isdigit() for c in name):  # it may be a word of the sentence
        return remark
    return re.sub(rf"(?<![\w/'#.-]){re.escape(name)}(?![\w/'#-])", "the site", remark)


def _headline(report: Report) -> Text:
    text = Text()
    text.append(report.model or "model", style="bold")
    if report.recipe:
        text.append(" · ").append(report.recipe, style="bold cyan")
    text.append("\n" + summary(report))
    if report.widened:
        text.append(f"\n{beside_source(report)}")
    if report.other_bytes:
        text.append(f"\n{size(report.other_bytes)} of other parameters (norms, biases, …) unchanged", style="dim")
    return text


def _heading(title: str, more: str) -> Text:
    return Text(title, style="bold").append(f"  {more}" if more else "", style="not bold dim")


def _sites(n: int) -> str:
    return f"{n} site" if n == 1 else f"{n:,} sites"


def _marked(mark: str, text: str) -> Any:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True, min_width=3, style="dim")
    grid.add_column(overflow="fold")
    grid.add_row(mark, Text(text))
    return grid


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")


@dataclass(frozen=True)
class _Column:
    """One column before layout: its head, its cells, whether it is a number."""

    head: str
    cells: tuple[str, ...]
    right: bool = False

    @property
    def width(self) -> int:
        return max([len(self.head), *(len(line) for cell in self.cells for line in cell.split("\n"))])


def _lay_out(
    names: list[tuple[str, str]],
    columns: list[_Column],
    width: int,
    fill: str = "",
    head: str = "site",
    least: int = 20,
) -> Table:
    """Build a table whose first column holds site names, broken at their slashes where they are too long.

    Args:
        names: (name, marks) per row.
        columns: the others; empty ones are dropped.
        width: of the whole table.
        fill: head of the column that wraps instead of the names (the reasons), where there is one.
        head: of the first column.
        least: width of the first column in any case.
    """
    columns = [c for c in columns if any(c.cells)]
    fixed = sum(c.width + 2 for c in columns if c.head != fill)
    longest = max(len(f"{n} {m}".rstrip()) for n, m in names)
    spare = width - fixed - (24 if fill and any(c.head == fill for c in columns) else 0)
    room = max(least, min(longest, spare), len(head))
    table = _table()
    table.add_column(head, no_wrap=True, width=room)
    for c in columns:
        # Figures never break; words may, at their blanks.
        table.add_column(c.head, justify="right" if c.right else "left", no_wrap=c.right, overflow="fold")
    for i, (name, marks) in enumerate(names):
        table.add_row(_name(name, marks, room), *(Text(c.cells[i]) for c in columns))
    return table


def _name(name: str, marks: str, room: int) -> Text:
    lines = [""]
    for piece in _pieces(name, room - 2):
        if len(lines[-1]) + len(piece) > room:
            lines.append("  ")
        lines[-1] += piece
    text = Text("\n".join(lines))
    if marks:
        text.append(("\n  " if len(lines[-1]) + 1 + len(marks) > room else " ") + marks, style="dim")
    return text


def _pieces(name: str, room: int) -> list[str]:
    """Segments of a name with their slashes; a segment longer than `room` is cut."""
    segments = [s + "/" for s in name.split("/")]
    segments[-1] = segments[-1][:-1]
    return [s[i : i + room] for s in segments for i in range(0, max(1, len(s)), room)]


def _counts(groups: tuple[Group, ...]) -> _Column:
    return _Column("", tuple(f"×{g.count}" if g.count > 1 else "" for g in groups), right=True)


def _quantized(report: Report, width: int, notes: _Footnotes) -> Any:
    groups = group_rows(report.quantized, MOST_LINES)
    shown = groups[:MOST_LINES]
    wide = width >= 110
    columns = [_counts(shown)]
    if wide:
        columns.append(_Column("shape", tuple(shape_text(g.rows[0].shape) for g in shown)))
    columns.append(_Column("stored as", tuple(_stored(g, not _common_inputs(report)) for g in shown)))
    columns.append(_Column("bits", tuple("" if g.bits is None else f"{g.bits:.2f}" for g in shown), right=True))
    columns.append(_Column("SQNR dB", tuple("" if g.sqnr is None else span(*g.sqnr) for g in shown), right=True))
    if wide:
        before = tuple(size(g.bytes_before) if g.bytes_before else "" for g in shown)
        columns.append(_Column("before", before, right=True))
    shared = tuple(size(g.bytes_after) if g.bytes_before else "shared" if g.rows[0].leaf else "" for g in shown)
    columns.append(_Column("after" if wide else "size", shared, right=True))
    if wide:
        columns.append(_Column("runs as", tuple("\n".join(g.distinct(lambda r: r.lowering)) for g in shown)))
    return _cut(_lay_out([(g.name, notes.mark(g)) for g in shown], columns, width), groups)


def _stored(group: Group, say_inputs: bool) -> str:
    """The format, or each format with its count; each with how inputs enter, where that differs between sites."""
    said = ((r.format, r.inputs if say_inputs and r.inputs != "float" else "") for r in group.rows)
    kinds = Counter(said).most_common()
    lines: list[str] = []
    for (fmt, inputs), count in kinds:
        lines.append(fmt if len(kinds) == 1 else f"{fmt} ×{count}")
        lines += [f"  in {inputs}"] if inputs else []
    return "\n".join(lines)


def why(group: Group, read: Callable[[SiteRow], Iterable[str]]) -> str:
    """Distinct non-empty remarks of a group's rows, their own names left out, joined."""
    return "; ".join(dict.fromkeys(_nameless(t, r.name) for r in group.rows for t in read(r) if t))


def said_of_inputs(report: Report) -> str:
    """What to add to the number of quantized sites: ``, inputs int8 dynamic per token``; "" where sites differ."""
    inputs = _common_inputs(report)
    return ", inputs stay float" if inputs == "float" else f", inputs {inputs}" if inputs else ""


def _common_inputs(report: Report) -> str:
    """How inputs enter every quantized site, where all agree; "" otherwise."""
    kinds = {r.inputs for r in report.quantized}
    return kinds.pop() if len(kinds) == 1 else ""


def _left(rows: tuple[SiteRow, ...], width: int) -> Any:
    groups = group_rows(rows, MOST_LINES)
    shown = groups[:MOST_LINES]
    columns = [_counts(shown)]
    if width >= 110:
        columns.append(_Column("shape", tuple(shape_text(g.rows[0].shape) for g in shown)))
    columns.append(_Column("kept as", tuple(", ".join(f for f, _ in g.formats) for g in shown)))
    columns.append(
        _Column("size", tuple(size(g.bytes_after) if g.bytes_after else "shared" for g in shown), right=True)
    )
    columns.append(_Column("why", tuple(why(g, lambda r: (r.reason,)) for g in shown)))
    return _cut(_lay_out([(g.name, "") for g in shown], columns, width, fill="why"), groups)


def _free(rows: tuple[SiteRow, ...], width: int) -> Any:
    """Sites that cost no bytes, by op and reason: of 500 sites these would be most of the lines and say least."""
    kinds: dict[tuple[str, str], list[SiteRow]] = {}
    for r in rows:
        kinds.setdefault((r.op, _nameless(r.reason, r.name)), []).append(r)
    counts = _Column("", tuple(f"×{len(k)}" if len(k) > 1 else "" for k in kinds.values()), right=True)
    reasons = _Column("why", tuple(reason for _, reason in kinds))
    return _lay_out([(op, "") for op, _ in kinds], [counts, reasons], width, fill="why", head="op", least=0)


def _cut(table: Table, groups: tuple[Group, ...]) -> Any:
    hidden = groups[MOST_LINES:]
    if not hidden:
        return table
    more = f"  … and {_sites(sum(g.count for g in hidden))} more; the HTML and JSON forms list every site"
    return Stack(table, Text(more, style="dim"))


def shape_text(shape: tuple[int, ...]) -> str:
    """``64×172``; "" for no shape."""
    return "×".join(map(str, shape))


def scores_table(scores: Mapping[str, float], head: str = "quantized") -> Table:
    """Scores as a rich table, float scores and recovery beside those of the model that `head` names."""
    lines = score_lines(scores)
    columns = [_Column("score", tuple(x.title for x in lines)), _Column("float", tuple(x.before for x in lines), True)]
    columns += [
        _Column(head, tuple(x.after for x in lines), True),
        _Column("recovery", tuple(x.kept for x in lines), True),
    ]
    table = _table()
    columns = [c for c in columns if any(c.cells)]
    for c in columns:
        table.add_column(c.head, justify="right" if c.right else "left", no_wrap=c.right)
    for cells in zip(*(c.cells for c in columns), strict=True):
        table.add_row(*cells)
    return table

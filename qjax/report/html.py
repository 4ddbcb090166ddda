"""A report as one HTML page: cards, figures, and a table that sorts, filters and folds equal layers.

The page is complete without its script (every site is in the table); the script adds folding, sorting and the filter.
Every text that comes from a program or a person is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from qjax.report import page, plots
from qjax.report.data import Report, SiteRow
from qjax.report.groups import Group, fold_notes, group_rows
from qjax.report.scores import score_lines, score_pairs, score_title, score_value
from qjax.report.svg import SERIES
from qjax.report.text import beside_source, decibel, said_of_inputs, shape_text, size, span, why

_HEADS = (
    ("Site", "site"),
    ("Op", ""),
    ("Shape", "s"),
    ("Stored as", "s"),
    ("Inputs", "m"),
    ("Bits", "n"),
    ("SQNR dB", "n"),
    ("Before", "n"),
    ("After", "n"),
    ("Runs as", ""),
    ("Why, or what to know", "w"),
)


def render_html(report: Report) -> str:
    """Return the page. Equal reports give equal bytes."""
    title = escape(" · ".join(t for t in (report.model or "model", report.recipe) if t))
    recipe = f" <small>{escape(report.recipe)}</small>" if report.recipe else ""
    body = "\n".join(
        (
            f"<h1>{escape(report.model or 'model')}{recipe}</h1>",
            f'<p class="muted">{_lead(report)}</p>',
            _cards(report),
            _figures(report),
            _scores(report),
            _notes(report),
            _table(report),
        )
    )
    script = f"<script>{page.SCRIPT}</script>" if report.rows else ""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{page.CSS}</style>\n</head>\n'
        f"<body>\n{body}\n{script}\n</body>\n</html>\n"
    )


def _lead(report: Report) -> str:
    done, left = len(report.quantized), sum(bool(r.leaf) for r in report.left)
    free = len(report.left) - left
    text = f"{done:,} of {done + left:,} sites with weights quantized" if report.rows else "no site was found"
    text += escape(said_of_inputs(report))
    text += f"; {left:,} left in float, {'its' if left == 1 else 'each with its'} reason below" if left else ""
    return text + (f"; {free:,} {'site' if free == 1 else 'sites'} without weights in float" if free else "")


def _cards(report: Report) -> str:
    cards = [
        (
            f"{size(report.float_bytes)} → {size(report.stored_bytes)}",
            f"parameters, before{f' ({report.float_dtype})' if report.float_dtype else ''} and after",
        ),
        (f"{report.compression:.2f}×", "smaller"),
    ]
    if report.widened:
        times, _, rest = beside_source(report).partition("x ")
        cards.append((f"{times}×", rest))
    all_bits, own = report.bits(), report.bits(report.quantized)
    if own is not None:
        more = "" if all_bits is None or f"{all_bits:.2f}" == f"{own:.2f}" else f"; {all_bits:.2f} over all sites"
        cards.append((f"{own:.2f}", f"bits per quantized weight{more}"))
    errors = [r.sqnr_db for r in report.quantized if r.sqnr_db is not None]
    if errors:
        worst = min(errors, key=lambda v: -math.inf if math.isnan(v) else v)
        cards.append((f"{decibel(worst)} dB" if math.isfinite(worst) else decibel(worst), "lowest SQNR of a site"))
    known = report.scores
    pairs = {name: (before, after, kept) for name, before, after, kept in score_pairs(known)}
    for name in ("perplexity", "top1", "kl", "agreement"):
        if name in pairs:
            before, after, kept = pairs[name]
            cards.append((score_value(name, after), f"{score_title(name)}; float {score_value(name, before)}"))
        elif name in known:
            cards.append((score_value(name, known[name]), score_title(name)))
    inner = "".join(f'<div class="card"><b>{escape(v)}</b><span>{escape(what)}</span></div>' for v, what in cards)
    return f'<div class="cards">{inner}</div>'


def _figures(report: Report) -> str:
    pairs = plots.scores(report)
    spread = "one point per site; equal bits are spread sideways"
    figures = (
        (
            "Size",
            "bytes as stored, scales included",
            plots.sizes(report, wide=not pairs),
            "" if pairs else ' class="wide"',
        ),
        ("Scores", "float against quantized", pairs, ""),
        ("Bits against error", spread, plots.bits_against_error(report), ""),
        ("Error by site", "higher is better; hover for the name", plots.error_by_site(report), ""),
    )
    inner = "".join(
        f"<figure{mark}><figcaption>{name} <span>· {what}</span></figcaption>{svg}</figure>"
        for name, what, svg, mark in figures
        if svg
    )
    return f'<div class="plots">{inner}</div>'


def _scores(report: Report) -> str:
    if not report.scores:
        return '<h2>Scores</h2><p class="muted">Not scored yet: <code>qjax eval</code> measures and adds them.</p>'
    lines = [(x.title, x.before, x.after, x.kept) for x in score_lines(report.scores)]
    columns = [True, any(r[1] for r in lines), True, any(r[3] for r in lines)]
    heads = ("", "float", "quantized", "recovery")

    def cells(tag: str, line: Sequence[str]) -> str:
        kept = [(i, c) for i, (c, keep) in enumerate(zip(line, columns, strict=True)) if keep]
        return "<tr>" + "".join(f"<{tag}{' class=n' if i else ''}>{escape(c)}</{tag}>" for i, c in kept) + "</tr>"

    return (
        f'<h2>Scores</h2><table class="scores"><thead>{cells("th", heads)}</thead>'
        f"<tbody>{''.join(cells('td', line) for line in lines)}</tbody></table>"
    )


def _notes(report: Report) -> str:
    if not report.notes:
        return ""
    return "<h2>Notes</h2><ul>" + "".join(f"<li>{escape(n)}</li>" for n in fold_notes(report.notes)) + "</ul>"


def _table(report: Report) -> str:
    if not report.rows:
        return ""
    index = {id(r): i for i, r in enumerate(report.rows)}
    formats = plots.formats_of(plots.measured(report))
    colours = {f: f"var(--c{min(k, SERIES - 1)})" for k, f in enumerate(formats)}
    groups = group_rows(report.rows, most=120)
    # A column that says the same of every site is in the line under the title instead.
    dropped = frozenset({"Inputs"}) if {r.inputs for r in report.rows} <= {"float", ""} else frozenset()
    head = "".join(f'<th class="{c}"><button type="button">{h}</button></th>' for h, c in _HEADS if h not in dropped)
    flat = "\n".join(_row(r, i, colours, dropped) for i, r in enumerate(report.rows))
    folded = "\n".join(
        _row(g.rows[0], None, colours, dropped)
        if g.count == 1
        else _group(g, [index[id(r)] for r in g.rows], colours, dropped)
        for g in groups
    )
    left = '<option value="float">left in float</option>' if report.left else ""
    merge = "" if len(groups) < len(report.rows) else " disabled"
    return (
        '<h2>Sites</h2><div class="tools"><input type="search" id="find" placeholder="filter: name, format, reason …" '
        'aria-label="filter sites"><select id="which" aria-label="which sites"><option value="all">all sites</option>'
        '<option value="weight">with weights</option>'
        f'<option value="done">quantized</option>{left}</select>'
        f'<label><input type="checkbox" id="merge" checked{merge}> fold equal layers</label>'
        '<span class="muted" id="shown"></span></div>'
        f'<div class="frame"><table id="sites"><thead><tr>{head}</tr></thead>'
        f'<tbody id="grouped" hidden>\n{folded}\n</tbody><tbody id="flat">\n{flat}\n</tbody></table></div>'
    )


def _row(row: SiteRow, index: int | None, colours: dict[str, str], dropped: frozenset[str]) -> str:
    bits = f"{row.bits_per_element:.2f}" if row.leaf else ""
    shared = "shared" if row.leaf and not row.bytes_before else ""
    cells = (
        (_breakable(row.name), row.name),
        escape(row.op),
        shape_text(row.shape),
        _formats([(row.format, 1)], colours),
        escape(row.inputs),
        (bits, bits),
        ("" if row.sqnr_db is None else decibel(row.sqnr_db), _number(row.sqnr_db)),
        (size(row.bytes_before) if row.bytes_before else shared, str(row.bytes_before or "")),
        (size(row.bytes_after) if row.bytes_before else shared, str(row.bytes_after or "")),
        escape(row.lowering),
        escape("; ".join(t for t in (row.reason, row.note) if t)),
    )
    mark = "" if index is None else f' id="r{index}"'
    return f'<tr class="{_kind(row)}"{mark}>{_cells(cells, dropped)}</tr>'


def _group(group: Group, members: Sequence[int], colours: dict[str, str], dropped: frozenset[str]) -> str:
    first, sqnr, bits = group.rows[0], group.sqnr, group.bits
    name = (
        f'<button type="button" class="open" aria-expanded="false">{_breakable(group.name)} '
        f'<span class="count">×{group.count}</span></button>'
    )
    cells = (
        (name, group.name),
        escape(first.op),
        shape_text(first.shape),
        _formats(group.formats, colours),
        "<br>".join(map(escape, group.distinct(lambda r: r.inputs))),
        ("" if bits is None else f"{bits:.2f}", "" if bits is None else str(bits)),
        ("" if sqnr is None else span(*sqnr), _number(None if sqnr is None else sqnr[0])),
        (size(group.bytes_before) if group.bytes_before else "", str(group.bytes_before or "")),
        (size(group.bytes_after) if group.bytes_before else "", str(group.bytes_after or "")),
        "<br>".join(map(escape, group.distinct(lambda r: r.lowering))),
        escape(why(group, lambda r: (r.reason, r.note))),
    )
    data = ",".join(map(str, members))
    return f'<tr class="{_kind(first)}" data-members="{data}">{_cells(cells, dropped)}</tr>'


def _kind(row: SiteRow) -> str:
    """Classes that the page's style and filter know."""
    return ("done" if row.quantized else "float") + (" weight" if row.leaf else "")


def _cells(cells: Sequence[str | tuple[str, str]], dropped: frozenset[str]) -> str:
    """Table cells; a pair is (shown, what it sorts by)."""
    out = []
    for cell, (head, kind) in zip(cells, _HEADS, strict=True):
        if head in dropped:
            continue
        shown, key = cell if isinstance(cell, tuple) else (cell, None)
        value = f' data-v="{escape(key)}"' if key is not None else ""
        out.append(f'<td class="{kind}"{value}>{shown}</td>' if kind else f"<td{value}>{shown}</td>")
    return "".join(out)


def _breakable(name: str) -> str:
    """A name that may break after its slashes."""
    return escape(name).replace("/", "/<wbr>")


def _formats(formats: Sequence[tuple[str, int]], colours: dict[str, str]) -> str:
    lines = []
    for fmt, count in formats:
        key = f'<i class="key" style="background:{colours[fmt]}"></i>' if fmt in colours else ""
        lines.append(key + escape(fmt) + (f' <span class="count">×{count}</span>' if len(formats) > 1 else ""))
    return "<br>".join(lines)


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return ""
    return ("" if value > 0 else "-") + "Infinity" if math.isinf(value) else repr(float(value))

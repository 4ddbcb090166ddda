"""The figures of a report, as SVG text that takes its colours from the page (`qjax.report.svg`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from qjax.report import svg
from qjax.report.data import Report, SiteRow
from qjax.report.scores import score_pairs, score_title, score_value
from qjax.report.text import decibel, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SPREAD = 0.025  # part of the axis, to either side, over which points with equal bits are spread


def formats_of(rows: Iterable[SiteRow]) -> tuple[str, ...]:
    """Formats in order of their bits, so that colours run from few bits to many."""
    bits: dict[str, float] = {}
    for r in rows:
        bits.setdefault(r.format, r.bits_per_element)
    return tuple(sorted(bits, key=lambda f: (bits[f], f)))


def bits_against_error(report: Report) -> str:
    """Bits per weight against SQNR, one point per site; "" where no error was measured."""
    rows = measured(report)
    if not rows:
        return ""
    from matplotlib.ticker import MaxNLocator

    with svg.style():
        figure, axes = svg.figure(5.4, 3.5)
        # Whole bits with room on both sides: one format alone then stands as a column, not as a cloud.
        low = math.floor(min(r.bits_per_element for r in rows)) - 1
        high = math.ceil(max(r.bits_per_element for r in rows)) + 1
        _scatter(axes, rows, _swarm(rows, _SPREAD * (high - low)), "bits")
        axes.set_xlim(low, high)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("stored bits per weight, scales included")
        return svg.render(figure, "bits", _tips(rows))


def error_by_site(report: Report) -> str:
    """SQNR of each site in program order; "" where no error was measured."""
    rows = measured(report)
    if not rows:
        return ""
    from matplotlib.ticker import MaxNLocator

    with svg.style():
        figure, axes = svg.figure(5.4, 3.5)
        _scatter(axes, rows, [i + 1.0 for i in range(len(rows))], "order")
        axes.set_xlabel("site, in program order")
        axes.margins(x=0.03)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
        return svg.render(figure, "order", _tips(rows))


def sizes(report: Report, wide: bool = False) -> str:
    """Bytes before and after: quantized weights, weights left in float, other parameters; "" without parameters.

    Args:
        report: the report.
        wide: for the page's whole width.
    """
    if not report.float_bytes:
        return ""
    parts = (
        ("quantized", *_bytes(report.quantized), "c0"),
        ("left in float", *_bytes(report.left), "c2"),
        ("norms, biases, …", report.other_bytes, report.other_bytes, "c7"),
    )
    with svg.style():
        figure, axes = svg.figure(9.0 if wide else 5.4, 1.6 if wide else 2.1)
        ends = [0.0, 0.0]
        for label, before, after, role in parts:
            if before or after:
                axes.barh(
                    [1, 0],
                    [before, after],
                    left=ends,
                    height=0.62,
                    color=svg.ROLES[role],
                    label=label,
                    edgecolor=svg.ROLES["paper"],
                    linewidth=0.8,
                )
                ends = [ends[0] + before, ends[1] + after]
        longest = max(ends) or 1.0
        for y, end in ((1, ends[0]), (0, ends[1])):
            axes.text(
                end + (0.007 if wide else 0.015) * longest, y, size(end), va="center", ha="left", color=svg.ROLES["ink"]
            )
        axes.set_yticks([1, 0])
        axes.set_yticklabels(["float", report.recipe or "quantized"], color=svg.ROLES["ink"])
        axes.set_xlim(0, (1.09 if wide else 1.18) * longest)
        axes.grid(False)
        axes.set_xticks([])
        for side in axes.spines.values():
            side.set_visible(False)
        axes.legend(
            loc="upper center",
            bbox_to_anchor=(0.45, -0.02),
            ncols=3,
            handlelength=0.8,
            handleheight=0.8,
            columnspacing=1.4,
        )
        return svg.render(figure, "sizes")


def scores(report: Report) -> str:
    """Each score that has a float partner as a pair of bars with its recovery; "" where there is none."""
    pairs = score_pairs(report.scores)
    pairs = tuple(p for p in pairs if all(map(math.isfinite, p[1:])))[:4]
    if not pairs:
        return ""
    with svg.style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.4, 2.1), layout="constrained")
        panels = figure.subplots(1, len(pairs), squeeze=False)[0]
        for axes, (name, before, after, kept) in zip(panels, pairs, strict=True):
            axes.bar([0, 1], [before, after], width=0.6, color=[svg.ROLES["c7"], svg.ROLES["c0"]])
            for x, v in ((0, before), (1, after)):
                axes.text(x, v, score_value(name, v), ha="center", va="bottom", color=svg.ROLES["ink"])
            axes.set_title(f"{score_title(name)}, {kept:.1f} % kept", fontsize=11)
            axes.set_xticks([0, 1])
            axes.set_xticklabels(["float", "quantized"])
            axes.set_yticks([])
            axes.set_xlim(-0.8, 1.8)
            axes.set_ylim(0, 1.2 * max(before, after, 1e-12))
            axes.grid(False)
            axes.spines["left"].set_visible(False)
        return svg.render(figure, "scores")


def _bytes(rows: Sequence[SiteRow]) -> tuple[int, int]:
    return sum(r.bytes_before for r in rows), sum(r.bytes_after for r in rows)


def measured(report: Report) -> list[SiteRow]:
    """Rows whose error is known, exact ones included."""
    return [r for r in report.rows if r.sqnr_db is not None and not math.isnan(r.sqnr_db)]


def _heights(axes: Axes, rows: Sequence[SiteRow]) -> list[float]:
    """SQNR as a finite height: exact sites stand a little above the best measured one, on a line that says so."""
    values = [float(r.sqnr_db or 0.0) for r in rows]
    finite = [v for v in values if math.isfinite(v)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    gap = max(3.0, 0.15 * (high - low))
    ends = {math.inf: (high + gap, "exact"), -math.inf: (low - gap, "all error")}
    for y, label in (ends[v] for v in ends if v in values):
        axes.axhline(y, color=svg.ROLES["muted"], linewidth=0.8, linestyle=":", zorder=0)
        axes.annotate(
            label,
            (0, y),
            xycoords=("axes fraction", "data"),
            xytext=(4, 3),
            textcoords="offset points",
            color=svg.ROLES["muted"],
        )
    return [ends[v][0] if v in ends else v for v in values]


def _swarm(rows: Sequence[SiteRow], spread: float) -> list[float]:
    """Bits of each site, points of equal bits spread evenly to either side so that each can be seen."""
    same: dict[float, list[int]] = {}
    for i, r in enumerate(rows):
        same.setdefault(round(r.bits_per_element, 2), []).append(i)
    x = [r.bits_per_element for r in rows]
    for members in same.values():
        if len(members) > 3:
            for k, i in enumerate(members):
                x[i] += spread * (2 * k / (len(members) - 1) - 1)
    return x


def _scatter(axes: Axes, rows: Sequence[SiteRow], x: Sequence[float], name: str) -> None:
    y = _heights(axes, rows)
    crowd = len(rows) > 120
    for k, fmt in enumerate(formats_of(rows)):
        members = [i for i, r in enumerate(rows) if r.format == fmt]
        points = axes.scatter(
            [x[i] for i in members],
            [y[i] for i in members],
            s=18 if crowd else 34,
            color=svg.ROLES[f"c{min(k, svg.SERIES - 1)}"],
            alpha=0.75,
            linewidths=0,
            label=fmt,
        )
        points.set_gid(f"{name}-{k}")
    axes.set_ylabel("SQNR of the stored weight, dB")
    axes.margins(y=0.12)
    formats = formats_of(rows)
    columns = len(formats) if sum(map(len, formats)) + 4 * len(formats) <= 52 else min(3, math.ceil(len(formats) / 2))
    axes.legend(
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=columns,
        handletextpad=0.1,
        columnspacing=1.2,
        borderaxespad=0.2,
    )


def _tips(rows: Sequence[SiteRow]) -> list[list[str]]:
    """Tooltips in the order in which `_scatter` draws, one list per format."""

    def tip(r: SiteRow) -> str:
        return f"{r.name}\n{r.format}, {r.bits_per_element:.2f} bits, {decibel(float(r.sqnr_db or 0.0))} dB"

    return [[tip(r) for r in rows if r.format == fmt] for fmt in formats_of(rows)]

"""A study as one HTML page: plots of what is kept against what is stored, and the tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from qjax.report import page, svg
from qjax.report.scores import score_title
from qjax.studies.result import Study


def render_page(study: Study) -> str:
    """The page; equal studies give equal bytes."""
    figures = [
        (f"{task}: distance to float against size", "lower left is better", distance_plot(study, task))
        for task in study.tasks
    ]
    figures += [
        (f"{task}: recovery of the float score", "lines are one standard error", recovery_plot(study, task))
        for task, score in study.tasks.items()
        if score
    ]
    figures.append(("Size", "all parameters as stored", size_plot(study)))
    shown = "".join(
        f"<figure><figcaption>{escape(name)} <span>· {escape(what)}</span></figcaption>{drawn}</figure>"
        for name, what, drawn in figures
        if drawn
    )
    title = f"{escape(study.model)} <small>{len(study.outcomes)} recipes</small>"
    body = [f"<h1>{title}</h1>", *(f'<p class="muted">{escape(line)}</p>' for line in study.about())]
    body += [f'<div class="plots">{shown}</div>', "<h2>Scores</h2>", _table(study.columns(), study.rows())]
    body += [
        f'<p class="muted">{escape(study.reading())}</p>',
        "<h2>Sizes</h2>",
        _table(study.size_columns(), study.size_rows()),
    ]
    for task in study.tasks:
        said = f"Each compared with the one above it, {escape(study.units.get(task, 'units'))} one by one."
        body += [f"<h2>Order on {escape(task)}</h2>", f'<p class="muted">{said}</p>']
        body += [_table(study.order_columns(task), study.order_rows(task), words=(4,))]
    head = f'<meta charset="utf-8">\n<title>{escape(study.model)}</title>\n'
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n{head}'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{page.CSS}{_CSS}</style>\n'
        "</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


_CSS = """
.plots { grid-template-columns: repeat(auto-fit, minmax(min(390px, 100%), 1fr)); align-items: start; }
.fit { width: fit-content; max-width: 100%; }
.fit + p { margin-top: 10px; max-width: 90ch; }
table.study { width: auto; }
table.study th { position: static; padding: 6px 10px; white-space: nowrap; }
table.study th.n, table.study td { padding: 5px 10px; white-space: nowrap; }
table.study td.refused { white-space: normal; color: var(--warn); text-align: left; }
"""


def distance_plot(study: Study, task: str) -> str:
    """The most sensitive metric of a task against the bytes as stored, a point for each recipe; "" without points."""
    metric = study.metrics[task][0]
    found = [(o, o.scores[task][metric]) for o in study.applied]
    found = [(o, e) for o, e in found if e.mean > 0 and math.isfinite(e.mean)]
    if not found:
        return ""
    scale, unit, _ = study.size_unit()
    with svg.style():
        figure, axes = svg.figure(5.4, 3.7)
        for n, (outcome, e) in enumerate(found):
            colour = svg.ROLES[f"c{n % svg.SERIES}"]
            error = e.stderr if e.stderr < e.mean else 0.0
            axes.errorbar(
                [outcome.stored_bytes / scale], [e.mean], [error], fmt="o", markersize=6, color=colour, elinewidth=1.2
            )
        axes.set_yscale("log")
        axes.margins(0.12)
        axes.set_xlabel(f"stored, {unit}")
        axes.set_ylabel(study.order_columns(task)[1])
        axes.figure.canvas.draw()
        _label(axes, [(o.stored_bytes / scale, e.mean, o.name) for o, e in found])
        return svg.render(figure, f"distance-{_slug(task)}")


def recovery_plot(study: Study, task: str) -> str:
    """Recovery of each recipe as a bar from 100 percent, with its standard error."""
    score = study.tasks[task]
    found = [o for o in study.ordered if not o.refused and math.isfinite(o.recovery[task].mean)]
    if not found:
        return ""
    with svg.style():
        figure, axes = svg.figure(5.4, 1.0 + 0.32 * len(found))
        spots = list(range(len(found)))[::-1]
        for y, o in zip(spots, found, strict=True):
            kept, error = o.recovery[task].mean, o.recovery[task].stderr
            axes.barh(
                [y], [kept - 100], left=100, height=0.6, color=svg.ROLES["c0"], xerr=[error], ecolor=svg.ROLES["ink"]
            )
        axes.set_yticks(spots)
        axes.set_yticklabels([o.name for o in found], color=svg.ROLES["ink"])
        axes.axvline(100, color=svg.ROLES["muted"], linewidth=0.8)
        axes.grid(False, axis="y")
        axes.set_xlabel(f"recovery, % of the float model's {score_title(score).lower()}")
        return svg.render(figure, f"recovery-{_slug(task)}")


def size_plot(study: Study) -> str:
    """Bytes of the float model and of each recipe."""
    scale, unit, digits = study.size_unit()
    shown = [o for o in study.ordered if not o.refused]
    names = ["float", *(o.name for o in shown)]
    sizes = [study.float_bytes / scale, *(o.stored_bytes / scale for o in shown)]
    with svg.style():
        figure, axes = svg.figure(5.4, 0.8 + 0.32 * len(names))
        spots = list(range(len(names)))[::-1]
        colours = [svg.ROLES["c7"]] + [svg.ROLES["c0"]] * (len(names) - 1)
        axes.barh(spots, sizes, height=0.6, color=colours)
        for y, value in zip(spots, sizes, strict=True):
            axes.text(value + 0.01 * max(sizes), y, f"{value:,.{digits}f} {unit}", va="center", color=svg.ROLES["ink"])
        axes.set_yticks(spots)
        axes.set_yticklabels(names, color=svg.ROLES["ink"])
        axes.set_xlim(0, 1.16 * max(sizes))
        axes.set_xticks([])
        axes.grid(False)
        axes.spines["bottom"].set_visible(False)
        return svg.render(figure, "size")


def _label(axes: object, points: Sequence[tuple[float, float, str]]) -> None:
    """Names beside points, each moved up or down until it covers no earlier one."""
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    to_pixels = axes.transData.transform
    taken: list[tuple[float, float, float]] = []  # left, right, middle height
    middle = sum(axes.get_xlim()) / 2
    for x, y, name in sorted(points, key=lambda p: -p[1]):
        left, height = to_pixels((x, y))
        width, right_side = 6.4 * len(name) * axes.figure.dpi / 72, x <= middle
        start = left + 8 if right_side else left - 8 - width
        spot = height
        while any(s < start + width and start < e and abs(spot - h) < 12 * axes.figure.dpi / 72 for s, e, h in taken):
            spot -= 3
        taken.append((start, start + width, spot))
        axes.annotate(
            name,
            (x, y),
            xytext=((8 if right_side else -8) * 72 / axes.figure.dpi, (spot - height) * 72 / axes.figure.dpi),
            textcoords="offset points",
            ha="left" if right_side else "right",
            va="center",
            fontsize=9,
        )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[int] = ()) -> str:
    """A table of names and figures; columns in ``words`` are words too."""

    def cell(n: int, text: str, tag: str = "td") -> str:
        return f"<{tag}>{escape(text)}</{tag}>" if n in (0, *words) else f'<{tag} class="n">{escape(text)}</{tag}>'

    def row(cells: Sequence[str]) -> str:
        if len(cells) < len(heads):
            return f'<td>{escape(cells[0])}</td><td class="refused" colspan="{len(heads) - 1}">{escape(cells[1])}</td>'
        return "".join(cell(n, c) for n, c in enumerate(cells))

    head = "".join(cell(n, h, "th") for n, h in enumerate(heads))
    body = "".join(f"<tr>{row(cells)}</tr>" for cells in rows)
    shown = f'<table class="study"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="frame fit">{shown}</div>'


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text)

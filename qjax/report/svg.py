"""Figures as SVG text that takes its colours from the page.

matplotlib draws with marker colours that stand for roles (ink, grid, series 0..7); the SVG text is then rewritten to
``var(--ink)`` and so on, so that one drawing serves the light and the dark page. Text stays text: it is searchable, it
scales, and it uses the page's font. Namespaces, metadata and dates are dropped: inline SVG needs none of them, the file
holds no address of any other place, and equal reports give equal bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from qjax.report.page import CSS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = 8
"""Series that get a colour of their own; further ones share the last."""

ROLES = {
    "ink": "#0a0a01",
    "muted": "#0a0a02",
    "grid": "#0a0a03",
    "paper": "#0a0a04",
    **{f"c{i}": f"#0a0a1{i}" for i in range(SERIES)},
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": ROLES["ink"],
    "axes.edgecolor": ROLES["grid"],
    "axes.labelcolor": ROLES["muted"],
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": ROLES["grid"],
    "grid.linewidth": 0.6,
    "xtick.color": ROLES["muted"],
    "ytick.color": ROLES["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "figure.facecolor": "none",
}


LIGHT = dict(re.findall(r"--(\w+): (#\w+)", CSS.split("@media")[0]))
"""The roles' colours on the light page, for pictures that are files of their own."""


def style(colours: Mapping[str, str] = ROLES) -> Any:
    """A context in which matplotlib draws in the page's style; `LIGHT` as colours for a file of its own."""
    import matplotlib

    drawn = {ROLES[role]: colours[role] for role in ROLES}
    return matplotlib.rc_context({k: drawn.get(v, v) if isinstance(v, str) else v for k, v in STYLE.items()})


def figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of that size in inches, and its axes."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    return made, made.subplots()


def render(drawn: Figure, name: str, tips: list[list[str]] | None = None) -> str:
    """Render and rewrite as the module's docstring says. `tips[k]` names the points of the group ``<name>-k``."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": f"qjax-{name}"}):  # unique ids per figure of a page, equal in every run
        FigureCanvasSVG(drawn).print_svg(out, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.S)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    # The page decides the width; the height follows from the view box.
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', svg, count=1)
    svg = re.sub(r"""font:\s*([\d.]+px)\s*'[^;"]*""", r"font: \1 var(--font)", svg)
    svg = re.sub(r"""font-family:\s*[^;"]*""", "font-family: var(--font)", svg)
    for role, colour in ROLES.items():
        svg = svg.replace(colour, f"var(--{role})")
    for k, group in enumerate(tips or ()):
        svg = _with_titles(svg, f"{name}-{k}", group)
    # Element ids are global to a page: every figure's get its name in front.
    svg = re.sub(r'\bid="', f'id="{name}.', svg)
    svg = re.sub(r'href="#', f'href="#{name}.', svg)
    return re.sub(r"url\(#", f"url(#{name}.", svg).strip()


def _with_titles(svg: str, gid: str, titles: Sequence[str]) -> str:
    """Give the points drawn by one scatter their tooltips."""
    start = svg.index(f'<g id="{gid}">')
    remaining = iter(titles)

    def titled(match: re.Match[str]) -> str:
        return f"<use {match[1].rstrip()}><title>{escape(next(remaining))}</title></use>"

    return svg[:start] + re.sub(r"<use ([^>]*)/>", titled, svg[start:], count=len(titles))

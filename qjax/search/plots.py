"""The front as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qjax.report import svg
from qjax.search.assigning import Assignment, amount
from qjax.search.choices import Found
from qjax.search.groups import FLOAT
from qjax.search.subnet_front import SubnetFront

_UNITS = {
    "bits": ((1.0, "bits per weight"),),
    "bytes": ((1e9, "GB as stored"), (1e6, "MB as stored"), (1e3, "kB as stored"), (1.0, "bytes as stored")),
    "seconds": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "joules": ((1.0, "J"), (1e-3, "mJ"), (1e-6, "µJ")),
}
_LOSS = {
    "kl": "KL to float, nats, sum of groups",
    "output": "output error, sum of groups",
    "fisher": "second-order KL, nats, sum of groups",
}
_CURVES = {"Lagrangian": "Lagrangian front"}
_ROOM = 1.06
"""How far beyond the last point of interest the picture goes."""


def plot_front(found: Assignment, path: str | Path) -> None:
    """Draw what can be had for what, and the assignment among it.

    The picture ends where every group is quantized, or at the budget if that is more: on the way from there to float
    little is lost and the axis would be given to it. The axis says what float costs.

    Args:
        found: from `qjax.search.assign`.
        path: of the file; its ending says the kind, ``.svg`` or ``.png``.
    """
    import matplotlib
    from matplotlib.ticker import LogFormatter

    front = [p for p in found.front if p.loss > 0] or list(found.front)
    loss = found.loss if found.whole is None else found.whole
    same = found.whole is None or found.by in ("kl", "fisher")  # sums in other units have no place beside measured ones
    unit, name = _unit(found.budget.kind, max(found.cost, found.front[0].cost))
    first, last = _range(found)
    with svg.style(svg.LIGHT), matplotlib.rc_context({"svg.hashsalt": "qjax", "figure.facecolor": svg.LIGHT["paper"]}):
        figure, axes = svg.figure(6.8, 4.2)
        drawn = [("sums of single losses", front, "c0")] if same else []
        for n, (name_, points) in enumerate(found.curves.items()):
            label = f"{_CURVES.get(name_, name_)}, measured"
            drawn.append((label, [p for p in points if p.loss > 0], f"c{n + 2}"))
        for label, points, colour in drawn:
            shown: Any = {"ms": 3.5, "lw": 1.4, "color": svg.LIGHT[colour], "label": label}
            axes.plot([p.cost / unit for p in points], [p.loss for p in points], "o-", **shown)
        inside = [p.loss for _, points, _ in drawn for p in points if first <= p.cost <= last] + [loss]
        inside = [loss for loss in inside if loss > 0]
        if inside:  # else float is all there is to see
            axes.set_yscale("log")
            axes.set_ylim(min(inside) / 2.5, max(inside) * 2.5)
            if max(inside) < 20 * min(inside):  # too short for powers of ten
                for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                    which(LogFormatter(minor_thresholds=(2, 0.5)))
        axes.set_xlim(first / unit, last / unit)
        axes.axvline(found.budget.amount / unit, color=svg.LIGHT["muted"], lw=1, ls="--")
        note: dict[str, Any] = {"textcoords": "offset points", "color": svg.LIGHT["muted"], "fontsize": 10}
        if first <= found.budget.amount <= last:
            at, bottom = found.budget.amount / unit, axes.get_xaxis_transform()
            left = found.budget.amount < (first + last) / 2
            axes.annotate(
                "budget",
                (at, 0),
                xycoords=bottom,
                xytext=(4 if left else -4, 5),
                ha="left" if left else "right",
                **note,
            )
        for point in front:
            if same and len(point.counts) == 1 and first <= point.cost <= last:
                left = point.cost < last - 0.2 * (last - first)
                spot: dict[str, Any] = {"xytext": (7, 4) if left else (-6, -5), "ha": "left" if left else "right"}
                axes.annotate(f"all {next(iter(point.counts))}", (point.cost / unit, point.loss), **spot, **note)
        if loss > 0:
            axes.plot([found.cost / unit], [loss], "o", ms=9, color=svg.LIGHT["c1"], zorder=3)
        counts = ", ".join(f"{n} × {c}" for c, n in found.counts.items())
        axes.set_title(f"{counts}: {amount(found.budget.kind, found.cost)}, loss {loss:.2g}", loc="left", fontsize=11)
        axes.set_xlabel(name + _beyond(found, last))
        axes.set_ylabel("KL to float, nats" if found.curves else _LOSS.get(found.by, found.by))
        if found.curves:
            axes.legend(fontsize=10)
        _save(figure, path)


def plot_subnets(seen: SubnetFront, path: str | Path, found: Found | None = None, score_name: str = "score") -> None:
    """Draw both curves of a front of subnets, and what a search found among them.

    Lines join the best scores so far; points that another beats for less are pale.

    Args:
        seen: from `qjax.search.choice_front`.
        path: of the file; its ending says the kind, ``.svg`` or ``.png``.
        found: from `qjax.search.search_choice`, with its baselines where it has some.
        score_name: of the score, for the axis.
    """
    import matplotlib

    costs = [p.cost for points in seen.curves.values() for p in points]
    unit, name = (1.0, "average bits") if seen.kind == "bits" else _unit(seen.kind, max(costs, default=1.0))
    with svg.style(svg.LIGHT), matplotlib.rc_context({"svg.hashsalt": "qjax", "figure.facecolor": svg.LIGHT["paper"]}):
        figure, axes = svg.figure(6.8, 4.2)
        for n, (label, points) in enumerate(seen.curves.items()):
            shown: Any = {"ms": 3.5, "lw": 1.4, "color": svg.LIGHT[f"c{n + 2}"], "label": _CURVES.get(label, label)}
            spent, scores = (np.array([getattr(p, what) for p in points], float) for what in ("cost", "score"))
            ahead = scores > np.maximum.accumulate(np.r_[-np.inf, scores[:-1]])
            axes.plot(spent[ahead] / unit, scores[ahead], "o-", **shown)
            # Beaten for less: sums of single losses are not what whole subnets lose.
            beaten: Any = {"ms": 3.5, "ls": "", "alpha": 0.3, "color": shown["color"]}
            if not ahead.all():
                axes.plot(
                    spent[~ahead] / unit, scores[~ahead], "o", label=f"{shown['label']}, beaten for less", **beaten
                )
        at = None
        if found is not None:
            at = sum(found.average) / len(found.average) if seen.kind == "bits" else found.costs.get(seen.kind)
        if found is not None and at is not None:
            axes.plot([at / unit], [found.score], "o", ms=9, color=svg.LIGHT["c1"], zorder=3, label="found")
            axes.set_title(f"{found.spent}: {score_name} {found.score:.4g}", loc="left", fontsize=11)
        axes.set_xlabel(name)
        axes.set_ylabel(score_name)
        axes.legend(fontsize=10)
        _save(figure, path)


def _save(figure: Any, path: str | Path) -> None:
    """Write a picture, the same bytes of the same picture; its folder is made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, **({"metadata": {"Date": None}} if str(path).endswith(".svg") else {"dpi": 150}))


def _unit(kind: str, value: float) -> tuple[float, str]:
    """The largest unit that is not larger than a cost."""
    return next((u for u in _UNITS[kind] if value >= u[0]), _UNITS[kind][-1])


def _range(found: Assignment) -> tuple[float, float]:
    """Costs at the left and right end."""
    costs = [p.cost for p in found.front]
    quantized = [p.cost for p in found.front if FLOAT not in p.counts]
    last = max([*quantized, min(found.budget.amount, costs[-1]), found.cost])
    room = max(last - costs[0], 1e-3 * last) * (_ROOM - 1)
    return costs[0] - room, last + 2 * room


def _beyond(found: Assignment, last: float) -> str:
    """What the axis says of float where the picture ends before it."""
    dearest = found.front[-1]
    if dearest.cost <= last or tuple(dearest.counts) != (FLOAT,):
        return ""
    return f" (float: {amount(found.budget.kind, dearest.cost)})"

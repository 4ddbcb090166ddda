"""The front as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qjax.search.assigning import Assignment, amount

_UNITS = {"bits": (1.0, "bits per weight"), "bytes": (1e6, "MB"), "seconds": (1e-3, "ms"), "joules": (1e-3, "mJ")}
_LOSS = {
    "kl": "KL to float, sum of groups (nats)",
    "output": "output error, sum of groups",
    "fisher": "second-order KL",
}


def plot_front(found: Assignment, path: str | Path) -> None:
    """Draw what can be had for what, and the assignment among it.

    Args:
        found: from `qjax.search.assign`.
        path: of the file; its ending says the kind, ``.svg`` or ``.png``.
    """
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "qjax"  # equal fronts give equal files
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    unit, name = _UNITS[found.budget.kind]
    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 11}):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.plot(
            [p.cost / unit for p in found.front], [p.loss for p in found.front], "o-", ms=3, label="front (convex)"
        )
        axes.axvline(found.budget.amount / unit, color="0.6", lw=1, ls="--")
        what = ", ".join(f"{n} {c}" for c, n in found.counts.items())
        axes.plot(
            [found.cost / unit],
            [found.loss],
            "s",
            color="tab:red",
            label=f"{amount(found.budget.kind, found.cost)}: {what}",
        )
        positive = [p.loss for p in found.front if p.loss > 0]
        if positive:
            axes.set_yscale("symlog", linthresh=min(positive))
        axes.set_xlabel(name)
        axes.set_ylabel(_LOSS.get(found.by, found.by))
        axes.grid(True, lw=0.4)
        axes.legend(frameon=False)
        more: dict[str, Any] = {"metadata": {"Date": None}} if str(path).endswith(".svg") else {}
        figure.savefig(path, **more)

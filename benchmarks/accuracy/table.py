"""The accuracy table as Markdown, and its plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.checks import PRIMARY, Check
from benchmarks.accuracy.measuring import FLOAT, kept
from benchmarks.accuracy.rows import Row

COLUMNS: dict[str, tuple[tuple[str, str, str], ...]] = {  # model -> (task, metric, heading)
    "books-6m": (("B", "kl", "KL"), ("B", "perplexity", "ppl B"), ("A", "perplexity", "ppl A")),
    "stories260k": (("A", "kl", "KL"), ("A", "perplexity", "ppl A"), ("B", "perplexity", "ppl B")),
    "vit-tiny": (("images", "kl", "KL"), ("images", "top1", "right")),
    "minilm": (("pairs", "output_error", "error"), ("pairs", "cosine_drift", "drift")),
    "resnet20": (("images", "kl", "KL"), ("images", "top1", "right")),
}


def cell(task_scores: dict[str, Any], metric: str) -> str:
    """A figure; divergences and errors with their standard error."""
    found = task_scores[metric]
    mean, error = found["mean"], found["stderr"]
    if mean is None:
        return "∞"
    if metric == "top1":
        return f"{100 * mean:.1f} %"
    if metric == "perplexity":
        return f"{mean:.3f}" if mean < 100 else f"{mean:.0f}"
    if not error or not mean:
        return f"{mean:.3g}"
    digits = max(0, min(7, -math.floor(math.log10(error))))
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def table(folder: Path, rows: Sequence[Row], models: Sequence[str], brief: bool = False) -> str:
    """One line for each row.

    Args:
        folder: of the results.
        rows: in order; sections become lines of their own.
        models: columns.
        brief: the most sensitive figure of each model alone.
    """
    columns = [(m, *c) for m in models for c in (COLUMNS[m][:1] if brief else COLUMNS[m])]
    heads = ["", "bits", *(f"{m} {h}" for m, _, _, h in columns)]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    lines.append(_line("float", "", [_cell(kept(folder, m, FLOAT), t, k) for m, t, k, _ in columns]))
    section = ""
    for row in rows:
        found = {m: kept(folder, m, row.name) for m in models}
        if not any(found.values()):
            continue
        if row.section != section:
            section = row.section
            lines.append(_line(f"**{section}**", "", [""] * len(columns)))
        bits = next((f"{r['bits']:.2f}" for r in found.values() if r and r.get("bits")), "")
        lines.append(_line(row.title, bits, [_cell(found[m], t, k) for m, t, k, _ in columns]))
    return "\n".join(lines)


def _cell(found: dict[str, Any] | None, task: str, metric: str) -> str:
    if found is None:
        return ""
    if "refused" in found:
        return "refused"
    return cell(found["scores"][task], metric)


def _line(name: str, bits: str, cells: Sequence[str]) -> str:
    return "| " + " | ".join([name, bits, *cells]) + " |"


def refusals(folder: Path, rows: Sequence[Row], models: Sequence[str]) -> list[str]:
    """Why rows could not be measured, in words."""
    lines = []
    for row in rows:
        for model in models:
            found = kept(folder, model, row.name)
            if found and "refused" in found:
                lines.append(f"- {row.name} on {model}: {found['refused']}")
    return lines


def checks_table(checks: Sequence[Check]) -> str:
    """The orderings."""
    lines = ["| ordering | model | | |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {c.title} | {c.model} | {c.verdict} | {c.said} |" for c in checks])


METHODS = {
    "rtn": "RTN",
    "mse": "MSE range",
    "hqq": "HQQ",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "rotated-gptq": "GPTQ, rotated",
    "twobit": "2/4/16 bits",
    "ptqtp": "PTQTP",
    "preset": "presets",
}


def plot(folder: Path, rows: Sequence[Row], models: Sequence[str], path: Path) -> None:
    """Bits against distance to float, a panel for each model; written as SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "accuracy", "svg.fonttype": "none", "font.size": 9}):
        figure, panels = pyplot.subplots(1, len(models), figsize=(3.3 * len(models), 3.6), squeeze=False)
        for axes, model in zip(panels[0], models, strict=True):
            task, metric = PRIMARY[model]
            points: dict[str, list[tuple[float, float]]] = {}
            for row in rows:
                found = kept(folder, model, row.name)
                if not found or "scores" not in found or found["bits"] is None or found["bits"] > 6:
                    continue
                if "w4a8" in row.name:
                    continue
                mean = found["scores"][task][metric]["mean"]
                kind = next((k for k in sorted(METHODS, key=len, reverse=True) if row.name.startswith(k)), None)
                if mean and kind:
                    points.setdefault(kind, []).append((found["bits"], mean))
            for n, (kind, title) in enumerate(METHODS.items()):
                found_here = sorted(points.get(kind, []))
                if found_here:
                    style = {"ls": "none" if kind == "preset" else "-", "lw": 1, "color": f"C{n}"}
                    axes.plot(*zip(*found_here, strict=True), marker="o", ms=4, label=title, **style)
            axes.set_yscale("log")
            axes.set_title(model)
            axes.set_xlabel("stored bits per quantized weight")
            axes.set_ylabel("KL to float, nats" if metric == "kl" else "output error")
            axes.grid(alpha=0.3)
        handles = {label: h for axes in panels[0] for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=len(METHODS), frameon=False)
        figure.tight_layout(rect=(0, 0.07, 1, 1))
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)

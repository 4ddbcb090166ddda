"""The orderings that the table is judged by, each with the paired test behind it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.measuring import kept, units_of
from benchmarks.accuracy.models import LANGUAGE
from benchmarks.accuracy.rows import TRANSFORMERS
from qjax.evaluate import paired_test

PRIMARY = {  # task and metric that orderings are judged by
    "books-6m": ("B", "kl"),
    "stories260k": ("A", "kl"),
    "vit-tiny": ("images", "kl"),
    "minilm": ("pairs", "output_error"),
    "resnet20": ("images", "kl"),
}
JUDGED = {
    *(f"{key}-w{bits}g{group}" for key in ("rtn", "gptq") for bits in (4, 3) for group in (128, 64)),
    *("dgq-w4a8", "qoq-w4a8-g128", "rtn-w4a8", "rtn-w4a8-g128", "ptqtp-2"),
}
"""Rows that the orderings below look at: they are measured first."""
PASS, FAIL, MISSING = "pass", "FAIL", "not measured"


@dataclasses.dataclass(frozen=True)
class Check:
    """An ordering on one model."""

    title: str
    model: str
    verdict: str
    said: str


def value(folder: Path, model: str, row: str, task: str, metric: str) -> float | None:
    """A figure, or None where it was not measured."""
    found = kept(folder, model, row)
    if found is None or "scores" not in found:
        return None
    return found["scores"][task][metric]["mean"]


def better(folder: Path, title: str, model: str, row: str, than: str) -> Check:
    """Check that a row is nearer to float than another."""
    task, metric = PRIMARY[model]
    figures = [value(folder, model, r, task, metric) for r in (row, than)]
    if any(v is None for v in figures):
        return Check(title, model, MISSING, "")
    a, b = (units_of(folder, model, r, task) for r in (row, than))
    test = paired_test(a[metric], b[metric], a["cluster"])
    said = f"{metric} {figures[0]:.4g} against {figures[1]:.4g}, difference {test.difference:.2g} ± {test.stderr:.1g}"
    said += f", p = {test.p:.1g}" if test.p > 1e-12 else ", p < 1e-12"
    return Check(title, model, PASS if test.difference < 0 else FAIL, said)


def near_in_perplexity(folder: Path, title: str, model: str, row: str, to: str, percent: float) -> Iterable[Check]:
    """Check that a row's perplexity is at most so many percent above another's, on every text."""
    for task in ("B", "A"):
        a, b = (value(folder, model, r, task, "perplexity") for r in (row, to))
        name = f"{title}, protocol {task}"
        if a is None or b is None:
            yield Check(name, model, MISSING, "")
            continue
        gap = 100 * (a / b - 1)
        yield Check(name, model, PASS if gap <= percent else FAIL, f"{a:.4f} against {b:.4f}: {gap:+.2f} %")


def orderings(folder: Path, models: Sequence[str]) -> list[Check]:
    """Every ordering of the issue, on every model that it is for."""
    found: list[Check] = []
    for bits in (4, 3):
        for group in (128, 64):
            for model in models:
                if group == 64 and model not in TRANSFORMERS:
                    continue
                title = f"GPTQ beats RTN at {bits} bits, g{group}"
                found.append(better(folder, title, model, f"gptq-w{bits}g{group}", f"rtn-w{bits}g{group}"))
    for model in models:
        if model in LANGUAGE:
            title = "DGQ W4A8 within 1 % perplexity of RTN W4A16 g128"
            found += near_in_perplexity(folder, title, model, "dgq-w4a8", "rtn-w4g128", 1.0)
    for model in (m for m in models if m in TRANSFORMERS):
        found.append(better(folder, "DGQ W4A8 beats RTN W4A8 per channel", model, "dgq-w4a8", "rtn-w4a8"))
        found.append(better(folder, "QoQ g128 beats RTN W4A8 g128", model, "qoq-w4a8-g128", "rtn-w4a8-g128"))
        found.append(better(folder, "QoQ g128 beats RTN W4A8 per channel", model, "qoq-w4a8-g128", "rtn-w4a8"))
        found.append(better(folder, "PTQTP with 2 planes beats INT3 g128", model, "ptqtp-2", "rtn-w3g128"))
        found.append(better(folder, "INT4 g128 beats PTQTP with 2 planes", model, "rtn-w4g128", "ptqtp-2"))
    return found


def counted(checks: Sequence[Any]) -> str:
    """How many hold."""
    by = {v: sum(c.verdict == v for c in checks) for v in (PASS, FAIL, MISSING)}
    return ", ".join(f"{n} {'passed' if v == PASS else 'FAILED' if v == FAIL else v}" for v, n in by.items() if n)

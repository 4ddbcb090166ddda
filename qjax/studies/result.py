"""The result of a study as plain data, and its forms: Markdown, JSON, one HTML page."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qjax.evaluate.paired import Estimate, Paired
from qjax.report.scores import score_title
from qjax.report.text import size

VERSION = 1
"""Version of the JSON form."""

SURE = 0.01
"""p-value below which two recipes are said to differ."""

Scores = Mapping[str, Mapping[str, Estimate]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one recipe did to the model.

    Attributes:
        name: of the recipe.
        recipe: its digest.
        refused: why it could not be applied; everything below is then empty.
        stored_bytes: all parameters as stored.
        bits: stored bits per quantized weight, scales included; None where no weight is quantized.
        bits_all: the same over all weights that sites read, those left in float included.
        seconds: quantizing, with compilation.
        scores: task -> metric -> mean with standard error.
        recovery: task -> percent of the float score, with the error of the ratio; not of tasks without a score.
        notes: of the report.
    """

    name: str
    recipe: str
    refused: str = ""
    stored_bytes: int = 0
    bits: float | None = None
    bits_all: float | None = None
    seconds: float = 0.0
    scores: Scores = dataclasses.field(default_factory=dict)
    recovery: Mapping[str, Estimate] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def average(self) -> float:
        """Mean recovery over the tasks, in percent; NaN where there is none."""
        kept = [e.mean for e in self.recovery.values()]
        return sum(kept) / len(kept) if kept else math.nan


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two recipes on one metric of one task, unit by unit."""

    task: str
    metric: str
    a: str
    b: str
    test: Paired

    @property
    def sure(self) -> bool:
        """Whether the difference is more than chance: p below `SURE`."""
        return self.test.p < SURE


@dataclasses.dataclass(frozen=True)
class Study:
    """All outcomes.

    Attributes:
        model: its name.
        tasks: task -> its score metric, "" without one.
        metrics: task -> its metrics, the most sensitive first.
        counts: task -> (units, clusters).
        float_bytes: all parameters of the float model.
        float_scores: its scores.
        outcomes: in the order that was asked for.
        comparisons: every pair of applied recipes, on the most sensitive metric of each task.
        calibration: a sentence on the calibration data; "" without.
    """

    model: str
    tasks: Mapping[str, str]
    metrics: Mapping[str, tuple[str, ...]]
    counts: Mapping[str, tuple[int, int]]
    float_bytes: int
    float_scores: Scores
    outcomes: tuple[Outcome, ...]
    comparisons: tuple[Comparison, ...]
    calibration: str = ""

    @property
    def applied(self) -> tuple[Outcome, ...]:
        """Outcomes of recipes that could be applied."""
        return tuple(o for o in self.outcomes if not o.refused)

    def columns(self) -> list[str]:
        """Headers of the recovery table."""
        heads = ["", *(["average recovery"] if sum(map(bool, self.tasks.values())) > 1 else [])]
        for task, score in self.tasks.items():
            where = f"{task}: " if len(self.tasks) > 1 else ""
            heads += [f"{where}{score_title(score).lower()}", f"{where}recovery"] if score else []
            heads += [where + _metric_title(m) for m in self.metrics[task] if m not in ("nll", "correct")]
        return heads

    def rows(self) -> list[list[str]]:
        """The recovery table: the float model, then every recipe."""
        several = sum(map(bool, self.tasks.values())) > 1
        rows = []
        for outcome in (None, *self.outcomes):
            name, scores = (outcome.name, outcome.scores) if outcome else ("float", self.float_scores)
            cells = [name]
            if outcome is not None and outcome.refused:
                rows.append([name, f"cannot be applied: {outcome.refused}"])
                continue
            cells += [_percent(outcome.average if outcome else 100.0)] if several else []
            for task, score in self.tasks.items():
                if score:
                    cells += [_shown(score, scores[task][score])]
                    cells += [_shown("recovery", outcome.recovery[task]) if outcome else _percent(100.0)]
                shown = [m for m in self.metrics[task] if m not in ("nll", "correct")]
                cells += [_shown(m, scores[task][m]) if outcome else "" for m in shown]
            rows.append(cells)
        return rows

    def size_columns(self) -> list[str]:
        """Headers of the size table."""
        return ["", "stored", "of float", "bits per quantized weight", "bits over all weights", "seconds"]

    def size_rows(self) -> list[list[str]]:
        """The size table: bytes as stored, embeddings and norms included."""
        rows = [["float", size(self.float_bytes), "100 %", "", "", ""]]
        for o in self.applied:
            bits = ["" if b is None else f"{b:.3f}" for b in (o.bits, o.bits_all)]
            part = f"{100 * o.stored_bytes / self.float_bytes:.1f} %"
            rows.append([o.name, size(o.stored_bytes), part, *bits, f"{o.seconds:.0f}"])
        return rows

    def comparison(self, task: str, a: str, b: str) -> Comparison | None:
        """How a and b differ on a task, as ``a - b``."""
        for c in self.comparisons:
            if c.task == task and (c.a, c.b) == (a, b):
                return c
            if c.task == task and (c.a, c.b) == (b, a):
                return Comparison(task, c.metric, a, b, dataclasses.replace(c.test, difference=-c.test.difference))
        return None

    def ranking(self, task: str) -> list[tuple[Outcome, Comparison | None]]:
        """Applied recipes from best to worst on the most sensitive metric, each compared with the one before it."""
        metric = self.metrics[task][0]
        order = sorted(self.applied, key=lambda o: o.scores[task][metric].mean)
        before = [None, *order[:-1]]
        return [(o, b and self.comparison(task, b.name, o.name)) for o, b in zip(order, before, strict=True)]

    # -- forms -----------------------------------------------------------------------------------------------------

    def markdown(self) -> str:
        """The tables as Markdown."""
        parts = [f"# {self.model}: {len(self.outcomes)} recipes", "", *self.about(), "", "## Scores", ""]
        parts += [_markdown_table(self.columns(), self.rows()), "", READING, "", "## Sizes", ""]
        parts += [_markdown_table(self.size_columns(), self.size_rows()), ""]
        for task in self.tasks:
            parts += [f"## Order on {task}", "", *_order_lines(self, task), ""]
        return "\n".join(parts)

    def about(self) -> list[str]:
        """Sentences on the data."""
        lines = []
        for task, (units, clusters) in self.counts.items():
            pieces = f" in {clusters:,} blocks" if clusters != units else ""
            lines.append(f"Scored on {task}: {units:,} units{pieces}.")
        return [*lines, *([self.calibration] if self.calibration else [])]

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data; figures that JSON cannot hold are null."""
        return {"version": VERSION, **_plain(dataclasses.asdict(self))}

    def json(self) -> str:
        """As JSON text."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def html(self) -> str:
        """One self-contained page with the tables and plots."""
        from qjax.studies.page import render_page

        return render_page(self)

    def save(self, folder: str | Path) -> tuple[Path, ...]:
        """Write ``study.md``, ``study.json`` and ``study.html``; each is replaced as a whole."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for name, text in (("study.md", self.markdown()), ("study.json", self.json()), ("study.html", self.html())):
            fresh = folder / f".{name}.partial"
            fresh.write_text(text, encoding="utf-8")
            written.append(fresh.replace(folder / name))
        return tuple(written)

    def __str__(self) -> str:
        return self.markdown()


READING = (
    "Behind ± stand standard errors. Recovery is 100 · score / float score (for perplexity, float in percent of "
    "quantized): above 100 it is noise. Perplexity and accuracy tell formats apart badly; KL divergence and the paired "
    "tests below do, and a ranking on one task holds for that task."
)


def order_words(c: Comparison) -> str:
    """What a comparison says, of the second recipe against the first."""
    gap = f"{-c.test.difference:+.2g} ± {c.test.stderr:.1g}"
    if math.isnan(c.test.p):
        return f"{gap}, no test possible"
    p = f"p = {c.test.p:.2g}" if c.test.p >= 1e-12 else "p < 1e-12"
    return f"{gap}, {p}" + ("" if c.sure else ": no difference that these data show")


def _order_lines(study: Study, task: str) -> list[str]:
    metric = study.metrics[task][0]
    lines = [f"By {_metric_title(metric)}, each compared with the one above it, unit by unit:", ""]
    for n, (outcome, c) in enumerate(study.ranking(task), 1):
        said = f" ({order_words(c)})" if c else ""
        lines.append(f"{n}. {outcome.name}: {_shown(metric, outcome.scores[task][metric])}{said}")
    return lines


def _metric_title(metric: str) -> str:
    titles = {"kl": "KL to float", "agreement": "agreement", "output_error": "output error"}
    return titles.get(metric, metric.replace("_", " "))


def _shown(metric: str, found: Estimate) -> str:
    """A figure with as many digits as its error leaves sure."""
    factor, unit = (
        (100.0, " %") if metric in ("top1", "agreement", "correct") else (1.0, " %" if metric == "recovery" else "")
    )
    value, error = factor * found.mean, factor * found.stderr
    if not math.isfinite(value):
        return str(value)
    if not error > 0 or not math.isfinite(error):
        return f"{value:.4g}{unit}"
    digits = max(0, min(8, 1 - math.floor(math.log10(error))))
    return f"{value:.{digits}f} ± {error:.{digits}f}{unit}"


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f} %"


def _markdown_table(heads: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(r + [""] * (len(heads) - len(r))) + " |" for r in rows])


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

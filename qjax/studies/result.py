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
        units: task -> what is counted.
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
    units: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def applied(self) -> tuple[Outcome, ...]:
        """Outcomes of recipes that could be applied."""
        return tuple(o for o in self.outcomes if not o.refused)

    @property
    def ordered(self) -> tuple[Outcome, ...]:
        """Outcomes from best to worst: by their mean rank over the tasks, those that were refused last."""
        ranks = {id(o): 0.0 for o in self.applied}
        for task in self.tasks:
            for rank, (outcome, _) in enumerate(self.ranking(task)):
                ranks[id(outcome)] += rank
        return tuple(sorted(self.outcomes, key=lambda o: ranks.get(id(o), math.inf)))

    def columns(self) -> list[str]:
        """Headers of the recovery table, with units."""
        heads = ["", *(["average recovery, %"] if sum(map(bool, self.tasks.values())) > 1 else [])]
        for task, score in self.tasks.items():
            where = f"{task}: " if len(self.tasks) > 1 else ""
            heads += [where + _title(score), f"{where}{_title('recovery')}"] if score else []
            heads += [where + _title(m) for m in self.metrics[task] if m not in ("nll", "correct")]
        return heads

    def rows(self) -> list[list[str]]:
        """The recovery table: the float model, then every recipe, the best first."""
        several = sum(map(bool, self.tasks.values())) > 1
        rows = []
        for outcome in (None, *self.ordered):
            name, scores = (outcome.name, outcome.scores) if outcome else ("float", self.float_scores)
            cells = [name]
            if outcome is not None and outcome.refused:
                rows.append([name, f"cannot be applied: {outcome.refused}"])
                continue
            cells += [_percent(outcome.average) if outcome else "100"] if several else []
            for task, score in self.tasks.items():
                if score:
                    cells += [_shown(score, scores[task][score])]
                    cells += [_shown("recovery", outcome.recovery[task]) if outcome else "100"]
                shown = [m for m in self.metrics[task] if m not in ("nll", "correct")]
                cells += [_shown(m, scores[task][m]) if outcome else _OF_FLOAT.get(m, "0") for m in shown]
            rows.append(cells)
        return rows

    def size_unit(self) -> tuple[float, str, int]:
        """The unit that all sizes are shown in: its bytes, its name, and decimals."""
        least = min([self.float_bytes, *(o.stored_bytes for o in self.applied)])
        scale, name = next(((s, n) for s, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if least >= s), (1.0, "B"))
        return scale, name, 0 if scale == 1 else max(0, 2 - math.floor(math.log10(least / scale)))

    def size_columns(self) -> list[str]:
        """Headers of the size table, with units."""
        stored = f"stored, {self.size_unit()[1]}"
        return ["", stored, "of float, %", "bits per quantized weight", "bits over all weights", "seconds to quantize"]

    def size_rows(self) -> list[list[str]]:
        """The size table: bytes as stored, embeddings and norms included."""
        scale, _, digits = self.size_unit()
        rows = [["float", f"{self.float_bytes / scale:,.{digits}f}", "100", "", "", ""]]
        for o in self.ordered:
            if o.refused:
                continue
            bits = ["" if b is None else f"{b:.3f}" for b in (o.bits, o.bits_all)]
            seconds = f"{o.seconds:.0f}" if o.seconds >= 10 else f"{o.seconds:.1f}"
            part = f"{100 * o.stored_bytes / self.float_bytes:.1f}"
            rows.append([o.name, f"{o.stored_bytes / scale:,.{digits}f}", part, *bits, seconds])
        return rows

    def order_columns(self, task: str) -> list[str]:
        """Headers of the order on a task."""
        return ["", _title(self.metrics[task][0]), "more than the one above", "p", ""]

    def order_rows(self, task: str) -> list[list[str]]:
        """The order on a task: each recipe compared with the one above it, unit by unit."""
        metric, rows = self.metrics[task][0], []
        for outcome, c in self.ranking(task):
            cells = [outcome.name, _shown(metric, outcome.scores[task][metric])]
            rows.append(cells + (["", "", ""] if c is None else _compared(metric, c)))
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
        parts += [_markdown_table(self.columns(), self.rows()), "", self.reading(), "", "## Sizes", ""]
        parts += [_markdown_table(self.size_columns(), self.size_rows()), ""]
        for task in self.tasks:
            parts += [f"## Order on {task}", "", _markdown_table(self.order_columns(task), self.order_rows(task)), ""]
        return "\n".join(parts)

    def about(self) -> list[str]:
        """Sentences on the data."""
        lines = []
        for task, (units, clusters) in self.counts.items():
            pieces = f" in {clusters:,} blocks" if clusters != units else ""
            lines.append(f"Scored on {task}: {units:,} {self.units.get(task, 'units')}{pieces}.")
        return [*lines, *([self.calibration] if self.calibration else [])]

    def reading(self) -> str:
        """How to read the tables."""
        said = ["Behind ± stand standard errors."]
        if any(self.tasks.values()):
            said.append(
                "Recovery is 100 · score / float score (for perplexity, float in percent of quantized): above 100 it "
                "is noise."
            )
        said.append(
            "Recipes stand in the order of their distance to float, which tells them apart where scores do not; the "
            "paired tests below say how surely. An order on one task holds for that task."
        )
        return " ".join(said)

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


_TITLES = {
    "kl": "KL to float, nats",
    "agreement": "agreement, %",
    "top1": "top-1, %",
    "recovery": "recovery, %",
    "output_error": "output error, relative",
    "cosine_drift": "cosine drift",
}
_OF_FLOAT = {"agreement": "100"}
"""What the float model is from itself: all distances are 0."""
_PERCENT = ("top1", "agreement", "correct")


def _title(metric: str) -> str:
    """A metric or score with its unit, as the head of a column."""
    return _TITLES.get(metric) or score_title(metric).lower()


def _compared(metric: str, c: Comparison) -> list[str]:
    """What a comparison says of the second recipe: how much more than the first, p, and a word where it is unsure."""
    factor = 100.0 if metric in _PERCENT else 1.0
    gap = _figure(-factor * c.test.difference, factor * c.test.stderr, "+")
    if math.isnan(c.test.p):
        return [gap, "", "no test possible"]
    p = f"{c.test.p:.2g}" if c.test.p >= 1e-12 else "< 1e-12"
    return [gap, p, "" if c.sure else "no difference that these data show"]


def _shown(metric: str, found: Estimate) -> str:
    """A figure in the unit of its column."""
    factor = 100.0 if metric in _PERCENT else 1.0
    return _figure(factor * found.mean, factor * found.stderr)


def _figure(value: float, error: float, sign: str = "") -> str:
    """A figure with as many digits as its error leaves sure."""
    if not math.isfinite(value):
        return str(value)
    if not error > 0 or not math.isfinite(error):
        return f"{value:{sign}.4g}"
    digits = max(0, min(8, 1 - math.floor(math.log10(error))))
    return f"{value:{sign}.{digits}f} ± {error:.{digits}f}"


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"


def _markdown_table(heads: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(r + [""] * (len(heads) - len(r))) + " |" for r in rows])


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

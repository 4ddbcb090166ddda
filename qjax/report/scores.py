"""Scores as lines of a table: what each is called, its figures, and how much of the float model's it keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from qjax.report.data import LOWER_IS_BETTER, recovery

_TITLES = {
    "perplexity": "Perplexity",
    "kl": "KL divergence to float, nats",
    "agreement": "Top-1 agreement with float",
    "top1": "Top-1 accuracy",
    "top5": "Top-5 accuracy",
    "recovery": "Recovery of the float score",
    "tokens": "Tokens scored",
    "images": "Images scored",
}
# Said by another line already: perplexity is exp(nll), an error stands behind its value, counts behind their rates.
_SILENT = ("nll", "kl_stderr", "correct")
_RATES = ("agreement", "top1", "top5")


@dataclass(frozen=True)
class ScoreLine:
    """One line: cells are ready to print, "" where there is nothing to say."""

    name: str
    title: str
    before: str
    after: str
    kept: str


def score_pairs(scores: Mapping[str, float]) -> tuple[tuple[str, float, float, float], ...]:
    """Return (name, float score, quantized score, recovery in percent) for every score with a ``float_`` partner."""
    return tuple(
        (name, scores[f"float_{name}"], value, recovery(value, scores[f"float_{name}"], name not in LOWER_IS_BETTER))
        for name, value in scores.items()
        if f"float_{name}" in scores and name not in _SILENT
    )


def score_lines(scores: Mapping[str, float]) -> tuple[ScoreLine, ...]:
    """All scores as lines, those with a float partner first."""
    pairs = score_pairs(scores)
    lines = [
        ScoreLine(
            name,
            score_title(name),
            _with_detail(f"float_{name}", before, scores),
            _with_detail(name, after, scores),
            "" if math.isnan(kept) else f"{kept:.2f} %",
        )
        for name, before, after, kept in pairs
    ]
    paired = {name for name, *_ in pairs}
    for name, value in scores.items():
        base = name.removeprefix("float_")
        # A lone recovery repeats what the paired lines say.
        if base in paired or base in _SILENT or (pairs and name == "recovery"):
            continue
        lines.append(ScoreLine(name, score_title(name), "", _with_detail(name, value, scores), ""))
    return tuple(lines)


def score_title(name: str) -> str:
    """What a score is called in a table."""
    if name.startswith("float_"):
        return f"{score_title(name[6:])}, float model"
    return _TITLES.get(name, name.replace("_", " "))


def score_value(name: str, value: float) -> str:
    """A score as text: rates and recoveries in percent, counts whole, the rest with four figures."""
    base = name.removeprefix("float_")
    if math.isnan(value):
        return "NaN"
    if base in _RATES:
        return f"{100 * value:.2f} %"
    if base == "recovery" or base.endswith("_recovery"):
        return f"{value:.2f} %"
    if float(value).is_integer() and base not in LOWER_IS_BETTER:
        return f"{int(value):,}"
    if base == "perplexity":
        return f"{value:.4f}" if value < 100 else f"{value:.1f}"
    return f"{value:.4g}"


def _with_detail(name: str, value: float, scores: Mapping[str, float]) -> str:
    """The value with what makes it readable: an error behind a divergence, the count behind an accuracy."""
    text = score_value(name, value)
    prefix = "float_" if name.startswith("float_") else ""
    error, count = scores.get("kl_stderr", math.nan), scores.get(f"{prefix}correct")
    if name == "kl" and error > 0 and math.isfinite(value):
        digits = -math.floor(math.log10(error))  # as many as the error leaves sure
        return f"{value:.{digits}f} ± {error:.{digits}f}" if 0 <= digits <= 7 else f"{value:.4g} ± {error:.1g}"
    if name == f"{prefix}top1" and count is not None:
        return f"{text} ({int(count):,})"
    return text

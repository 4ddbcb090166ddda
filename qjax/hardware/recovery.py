"""How much of a model's scores a format keeps, before anyone has measured it: published figures by model size.

One number is made of the published ones as the study asks, from averages and not from one benchmark: the mean over
the two leaderboards, HumanEval and HumanEval+, each taken as 100 at most, since what is above is noise. Arena-Hard is
left out: its standard error is one to two points. Between sizes the mean is interpolated in log P, and above the
largest it stays.

The figures are of Llama 3.1 Instruct. For another size they are interpolated, or extrapolated, and `source` says which:
a choice that hangs on it asks for a measurement. Below 8B parameters nothing was published, only that 4-bit weights
lose two to five points at 1B to 3B. Decided here: with every halving of P the loss grows by half of what it is at 8B.
That gives W4A16 a loss of 3.4 points at 3B and 5 at 1B.
"""

from __future__ import annotations

import math
import tomllib
from functools import cache
from importlib import resources
from typing import Literal

Source = Literal["", "measured", "published", "interpolated", "extrapolated"]
"""Where a recovery comes from; "" for the float model, whose recovery is 100 by definition, and for unknown ones."""

_AVERAGED = ("v1", "v2", "humaneval", "humaneval_plus")
_SAME_SIZE = 1.05
"""Ratio of parameters up to which a model has the size of a published one."""


@cache
def published() -> dict[str, list[tuple[float, float]]]:
    """Return for each format of the study (parameters, recovery in percent), by size."""
    text = (resources.files("qjax.hardware") / "recovery.toml").read_text()
    out: dict[str, list[tuple[float, float]]] = {}
    for row in tomllib.loads(text)["rows"]:
        for name, scores in row.items():
            if name != "params":
                kept = [min(100.0, scores[s]) for s in _AVERAGED if s in scores]
                out.setdefault(name, []).append((row["params"], sum(kept) / len(kept)))
    return {name: sorted(rows) for name, rows in out.items()}


def prior(scheme: str, params: float) -> float | None:
    """Return the expected recovery in percent, or None for a format that nothing was published about."""
    if scheme == "BF16":
        return 100.0
    rows = published().get(scheme)
    if rows is None:
        return None
    x = math.log2(params)
    first, last = rows[0], rows[-1]
    if params <= first[0]:
        loss = 100 - first[1]
        return max(0.0, first[1] - 0.5 * loss * (math.log2(first[0]) - x))
    if params >= last[0]:
        return last[1]
    for (p0, r0), (p1, r1) in zip(rows, rows[1:], strict=False):
        if params <= p1:
            share = (x - math.log2(p0)) / (math.log2(p1) - math.log2(p0))
            return r0 + share * (r1 - r0)
    raise AssertionError("the sizes are sorted")


def source(scheme: str, params: float) -> Source:
    """Return where `prior` takes the recovery from: a published size, between two of them, or beyond them."""
    rows = published().get(scheme)
    if rows is None:
        return ""
    sizes = [p for p, _ in rows]
    if any(max(p / params, params / p) <= _SAME_SIZE for p in sizes):
        return "published"
    return "interpolated" if sizes[0] < params < sizes[-1] else "extrapolated"

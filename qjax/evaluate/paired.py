"""Standard errors and paired tests of scores that were measured unit by unit (token by token, image by image).

Two models that are scored on the same units differ by far less than their scores scatter, because a hard token is hard
for both: their difference is judged by the differences unit by unit. Units that belong together (the tokens of a block)
are not independent, so the errors here are those of sums over *clusters*, as in regressions with clustered errors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from qjax.errors import DataError

LEAST_CLUSTERS = 10
"""With fewer clusters each unit counts as one of its own: the error of so few sums would itself be a guess."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error.

    Attributes:
        mean: over the units; NaN where a unit is.
        stderr: its standard error; NaN for a single unit.
        count: number of units.
        clusters: number of independent pieces that the error was taken from; ``count`` where units stand alone.
    """

    mean: float
    stderr: float
    count: int
    clusters: int

    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.stderr:.1g}"


@dataclass(frozen=True)
class Paired:
    """How two models differ on the same units.

    Attributes:
        difference: mean of a - b.
        stderr: its standard error.
        p: two-sided p-value of "there is no difference".
        count: number of units.
        clusters: number of independent pieces; see `Estimate`.
        test: "t" or "sign".
    """

    difference: float
    stderr: float
    p: float
    count: int
    clusters: int
    test: str


def estimate(values: Any, clusters: Any = None) -> Estimate:
    """Mean and standard error of values that may depend on one another within clusters.

    With residuals r = v - mean, G clusters and n units, stderr^2 = G / (G - 1) * sum_g (sum_{i in g} r_i)^2 / n^2,
    which is the usual s^2 / n where every unit is a cluster of its own.

    Args:
        values: float or bool [n].
        clusters: integers [n], equal where units belong together; None: every unit alone. Fewer than
            `LEAST_CLUSTERS` of them count as none.

    Raises:
        DataError: no value, or shapes that differ.
    """
    v = np.asarray(values, np.float64)
    if v.ndim != 1 or not len(v):
        raise DataError(f"an estimate needs a flat, non-empty array of values, and this one has shape {v.shape}")
    mean = float(v.mean())
    sums, groups = _cluster_sums(v - mean, clusters)
    if groups < 2:
        return Estimate(mean, math.nan, len(v), groups)
    square = groups / (groups - 1) * float(np.square(sums).sum()) / len(v) ** 2
    return Estimate(mean, math.sqrt(square), len(v), groups)


def paired_test(a: Any, b: Any, clusters: Any = None) -> Paired:
    """Compare two models on the same units: Student's t of the paired differences, or the sign test for yes and no.

    For booleans (right or wrong) the p-value is the exact one of McNemar's test: of the units where the two disagree,
    how many go to each is binomial with probability 1/2.

    Args:
        a, b: float [n] or bool [n], units in the same order.
        clusters: as for `estimate`; booleans count unit by unit.

    Raises:
        DataError: shapes or kinds that differ.
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or (a.dtype == bool) != (b.dtype == bool):
        raise DataError(f"a paired test needs the same units of both, not {a.dtype}{a.shape} and {b.dtype}{b.shape}")
    if a.dtype == bool:
        found = estimate(a.astype(np.float64) - b)
        wins, losses = int((a & ~b).sum()), int((b & ~a).sum())
        return Paired(found.mean, found.stderr, _binomial_p(wins, losses), found.count, found.count, "sign")
    found = estimate(a.astype(np.float64) - b.astype(np.float64), clusters)
    if not found.stderr > 0:
        p = 1.0 if found.mean == 0 else math.nan if math.isnan(found.stderr) else 0.0
    else:
        p = student_p(found.mean / found.stderr, found.clusters - 1)
    return Paired(found.mean, found.stderr, p, found.count, found.clusters, "t")


def student_p(t: float, freedom: int) -> float:
    """Two-sided p-value of Student's t, in float64.

    It is the regularised incomplete beta function I_x(freedom / 2, 1 / 2) at x = freedom / (freedom + t^2), summed as
    sin and cos series (Abramowitz and Stegun 26.7.3 and 26.7.4), which are finite for whole degrees of freedom. Above
    1000 of them it is that of the normal distribution, which differs by less than a twentieth where p is above 1e-3.

    Args:
        t: the statistic.
        freedom: degrees of freedom, 1 or more.
    """
    if math.isnan(t) or freedom < 1:
        return math.nan
    t = abs(t)
    if freedom > 1000:
        return math.erfc(t / math.sqrt(2))
    angle = math.atan(t / math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = freedom % 2
    term, total = (math.cos(angle), 0.0) if odd else (1.0, 0.0)
    for k in range(2 + odd, freedom + 1, 2):  # even: 1 + 1/2 c^2 + 1*3/(2*4) c^4 ..; odd: c + 2/3 c^3 + ..
        total += term
        term *= square * (k - 1) / k
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return max(0.0, 1.0 - inside)


def _cluster_sums(residuals: np.ndarray, clusters: Any) -> tuple[np.ndarray, int]:
    if clusters is not None:
        clusters = np.asarray(clusters)
        if clusters.shape != residuals.shape:
            raise DataError(f"there are {len(residuals)} values and clusters of shape {clusters.shape}; give one each")
        _, where = np.unique(clusters, return_inverse=True)
        groups = int(where.max()) + 1
        if groups >= LEAST_CLUSTERS:
            return np.bincount(where, weights=residuals), groups
    return residuals, len(residuals)


def _binomial_p(wins: int, losses: int) -> float:
    """Two-sided: the probability that a fair coin is at least as uneven over wins + losses throws."""
    n = wins + losses
    if n == 0:
        return 1.0
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2) for k in range(n + 1)]
    return min(1.0, 2 * math.fsum(map(math.exp, logs[: min(wins, losses) + 1])))

"""FPCS: the fast progressive combining search for scales and zero points of AdaLog (arXiv:2407.12951, section 3.3).

A uniform quantizer has a scale and a zero point, a logarithmic one a scale and a base. Trying every pair of a fine grid
is out of reach where a try means a product with all calibration data. FPCS tries a coarse grid of 128 pairs, keeps the
best k, and puts 128 / k new scales around each; p times, with ever finer spacing:

    d <- spacing of the coarse scales
    repeat p - 1 times:  each kept scale s becomes  s + d (t - 1/2),  t = 0 .. 1 in m = 128 / k places;  keep k
                         d <- d / (m - 1/2)

Zero points and bases that are kept stay what they are. In the last round one pair is kept. Nothing says that it is the
best one ever tried: with an even m a kept scale is not among its own successors. ``best=True`` returns the best pair
of all rounds instead, at no cost; the published figures are without.

Searches for many slices (rows of a weight, heads, channels) run together: each has its own pairs, and one call of
``evaluate`` tells the losses of all. What is searched here is a handful of numbers, so this is NumPy on the host; the
products are behind ``evaluate`` (`qjax.passes.fpcs_losses`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from qjax.errors import RecipeError

Q_FIRST, Q_LAST = 10, 137
"""The bases 2**(q/37) that AdaLog tries."""

SMALLEST_INPUT_SCALE = 1e-4

_LEAST = 1e-30  # no scale is 0, however constant a slice


@dataclasses.dataclass(frozen=True)
class Search:
    """Settings of the search; the defaults are those of the authors' configurations.

    Args:
        candidates: pairs tried in a round.
        kept: pairs kept after a round of a uniform quantizer.
        steps: rounds, p; the paper says 4, the configurations 6. 1 is the plain grid.
        zero_points: the most zero points tried.
        kept_log: pairs kept after a round of a logarithmic quantizer.
        bases, log_scales: of a logarithmic quantizer, how many of each the first round combines.
        quantile: where the scales of the coarse grid begin; 1 - quantile at the lower end.
        best: return the best pair ever tried, not the best of the last round.
    """

    candidates: int = 128
    kept: int = 16
    steps: int = 6
    zero_points: int = 16
    kept_log: int = 32
    bases: int = 8
    log_scales: int = 16
    quantile: float = 0.9
    best: bool = False

    def __post_init__(self) -> None:
        for name in ("candidates", "kept", "steps", "zero_points", "kept_log", "bases", "log_scales"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RecipeError(f"FPCS: {name}={value!r}; a whole number, 1 or more")
        for name in ("kept", "kept_log", "bases"):
            if self.candidates % getattr(self, name):
                raise RecipeError(
                    f"FPCS: {name}={getattr(self, name)} does not divide the {self.candidates} candidates of a round"
                )
        if self.bases * self.log_scales != self.candidates:
            raise RecipeError(
                f"FPCS: {self.bases} bases and {self.log_scales} scales are not {self.candidates} candidates"
            )
        if not isinstance(self.quantile, float) or not 0.5 < self.quantile <= 1:
            raise RecipeError(f"FPCS: quantile={self.quantile!r}; above 0.5, at most 1")


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """Scales and zero points (or bases) of slices, with what was measured.

    Attributes:
        scale: float32 [S].
        other: the zero point, or q, [S], whole numbers as float32.
        loss: float64 [S].
        evaluations: calls of ``evaluate`` times candidates.
    """

    scale: np.ndarray
    other: np.ndarray
    loss: np.ndarray
    evaluations: int


Evaluate = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""From scales and zero points, float32 [S, C] each, to losses [S, C]."""


def zero_points(bits: int, inputs: bool, search: Search) -> np.ndarray:
    """Return the zero points that are tried, consecutive whole numbers around the middle code, float32 [n_z].

    ``min(16, L)`` of them for weights and the operands of products of activations and ``min(16, 2 L)`` for the inputs
    of linear layers, L = 2**(bits - 1). From 6 bits on that is a narrow window: where a range reaches much farther to
    one side of 0 than to the other, scales of the data's own range cut its longer end off.
    """
    half = 2 ** (bits - 1)
    count = min(search.zero_points, 2 * half if inputs else half, search.candidates)
    count = max(c for c in range(1, count + 1) if search.candidates % c == 0)
    return np.arange(half - count // 2, half - count // 2 + count, dtype=np.float32)


def uniform_grid(slices: np.ndarray, bits: int, inputs: bool, search: Search) -> tuple[np.ndarray, np.ndarray]:
    """Return the coarse grid: scales and zero points, float32 [S, candidates], the scale varying fastest.

    Scales go from the inner range of a slice to the whole of it, divided by the last code. The authors' grid is that
    and no more: a slice that lies so far on one side of 0 that its nearest number is beyond the last code of all pairs
    (numbers near 5 with a spread of 0.1, and constant ones) would become a single wrong number. So for such slices
    alone it goes on to the scale that reaches the farthest number.

    Args:
        slices: float [S, M], what each scale serves.
        bits: of the codes.
        inputs: whether it is the input of a linear layer: twice the zero points, and scales of at least 1e-4.
        search: settings.
    """
    top, zeros = 2**bits - 1, zero_points(bits, inputs, search)
    quantiles = np.quantile(slices, [1 - search.quantile, search.quantile], axis=1).astype(np.float64)
    low, high = slices.min(axis=1).astype(np.float64), slices.max(axis=1).astype(np.float64)
    above, below = (max(float(codes), 1.0) for codes in (top - zeros[0], zeros[-1]))  # most codes on each side of 0
    near, far = np.maximum(low, -high), np.maximum(high, -low)  # near < 0: on both sides
    codes = np.where(low > 0, above, below)
    whole = high - low
    beyond = (near > 0) & (near * top >= codes * whole)
    whole = np.where(beyond, far / codes * top, whole)
    return grid_of(quantiles[1] - quantiles[0], whole, top, bits, inputs, search)


def grid_of(
    inner: np.ndarray, whole: np.ndarray, top: int, bits: int, inputs: bool, search: Search
) -> tuple[np.ndarray, np.ndarray]:
    """`uniform_grid` from the widths of the inner and of the whole range of each slice, [S]."""
    zeros = zero_points(bits, inputs, search)
    count = search.candidates // len(zeros)
    least = SMALLEST_INPUT_SCALE if inputs else _LEAST
    t = np.linspace(0.0, 1.0, count) if count > 1 else np.ones(1)
    scales = np.maximum((inner[:, None] * (1 - t) + whole[:, None] * t) / top, least)
    grid = np.tile(scales, (1, len(zeros)))
    return grid.astype(np.float32), np.broadcast_to(np.repeat(zeros, count), grid.shape).astype(np.float32)


def search_uniform(
    evaluate: Evaluate, scales: np.ndarray, zeros: np.ndarray, search: Search, least: float = _LEAST
) -> Pairs:
    """Search scale and zero point of every slice.

    Args:
        evaluate: see `Evaluate`; called ``search.steps`` times.
        scales, zeros: the coarse grid, from `uniform_grid`.
        search: settings.
        least: no scale goes below.
    """
    count = len(np.unique(zeros[0]))
    spacing = _spacing(scales[:, : scales.shape[1] // count])
    return _refine(evaluate, scales, zeros, spacing, search.kept, search, least)


def _spacing(scales: np.ndarray) -> np.ndarray:
    """The distance between neighbours of an even grid [S, n]: float64 [S]; 0 for a single scale."""
    if scales.shape[1] < 2:
        return np.zeros(len(scales))
    return (scales[:, -1].astype(np.float64) - scales[:, 0]) / (scales.shape[1] - 1)


def _refine(
    evaluate: Evaluate,
    scales: np.ndarray,
    others: np.ndarray,
    spacing: np.ndarray,
    kept: int,
    search: Search,
    least: float,
) -> Pairs:
    m = search.candidates // kept
    t = (np.linspace(0.0, 1.0, m) if m > 1 else np.full(1, 0.5)) - 0.5
    best: Pairs | None = None
    evaluations = 0
    for step in range(search.steps):
        loss = _measured(evaluate, scales, others)
        evaluations += loss.shape[1]
        order = np.argsort(loss, axis=1, kind="stable")
        first = order[:, :1]
        scale, other, least_loss = (np.take_along_axis(a, first, 1)[:, 0] for a in (scales, others, loss))
        found = Pairs(scale, other, least_loss, evaluations)
        best = found if best is None or not search.best else better(best, found)
        if step + 1 == search.steps:
            break
        top = order[:, :kept]
        around = np.take_along_axis(scales, top, 1)[..., None] + spacing[:, None, None] * t
        scales = np.maximum(around, least).astype(np.float32).reshape(len(scales), -1)
        others = np.repeat(np.take_along_axis(others, top, 1), m, axis=1)
        spacing = spacing / (m - 0.5)
    assert best is not None
    return dataclasses.replace(best, evaluations=evaluations)


def _measured(evaluate: Evaluate, scales: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Losses, NaN (which an overflow may be) counting as the worst."""
    loss = np.asarray(evaluate(scales, others), np.float64)
    return np.where(np.isnan(loss), np.inf, loss)


def better(one: Pairs, two: Pairs) -> Pairs:
    """Return the pair of less loss, slice by slice."""
    take = two.loss < one.loss
    return Pairs(
        np.where(take, two.scale, one.scale),
        np.where(take, two.other, one.other),
        np.where(take, two.loss, one.loss),
        two.evaluations,
    )


def positive_ends(values: np.ndarray, quantile: float) -> tuple[float, float]:
    """Return a quantile and the maximum of the positive ones of ``values``: elements of rank ceil(count p) - 1.

    Where nothing is positive: 0 and 0.
    """
    positive = values[values > 0]
    if not positive.size:
        return 0.0, 0.0
    rank = max(0, math.ceil(positive.size * quantile) - 1)
    return float(np.partition(positive, rank)[rank]), float(positive.max())


def log_start(ends: tuple[float, float], shift: float, search: Search) -> float:
    """The scale before the first round: the one below the top of as many as there are candidates."""
    n = search.candidates
    return float(np.linspace(*ends, n)[max(0, n - 2)] + shift)


def search_log(
    evaluate: Evaluate,
    ends: tuple[float, float],
    shift: float,
    start: float,
    search: Search,
    least: float = 1e-6,
    only: float | None = None,
) -> Pairs:
    """Search base and scale of one logarithmic quantizer: first q with the scale as it is, then both.

    Args:
        evaluate: from scales and q, [1, C] each, to losses [1, C]; called ``search.steps + 1`` times.
        ends: from `positive_ends`.
        shift: what is added before the logarithm, and so to every scale.
        start: the scale that q is first tried with.
        search: settings.
        least: no scale goes below.
        only: the one base that there is, as q; then only scales are searched, as many in the coarse grid as candidates.

    Returns:
        Pairs of one slice; ``other`` is q.
    """
    if only is not None:
        coarse = np.maximum(np.linspace(*ends, search.candidates) + shift, least)[None]
        others = np.full(coarse.shape, only, np.float32)
        return _refine(evaluate, coarse.astype(np.float32), others, _spacing(coarse), search.kept_log, search, least)
    every = np.arange(Q_FIRST, Q_LAST + 1, dtype=np.float32)[None]
    loss = _measured(evaluate, np.full_like(every, start), every)
    q = every[0, np.argsort(loss[0], kind="stable")[: search.bases]]
    coarse = np.maximum(np.linspace(*ends, search.log_scales) + shift, least)[None]
    scales = np.tile(coarse, (1, len(q))).astype(np.float32)
    others = np.repeat(q, search.log_scales)[None]
    found = _refine(evaluate, scales, others, _spacing(coarse), search.kept_log, search, least)
    if search.best and loss.min() < found.loss[0]:
        at = int(loss[0].argmin())
        found = Pairs(np.full(1, start, np.float32), every[:, at], loss[:, at], found.evaluations)
    return dataclasses.replace(found, evaluations=found.evaluations + every.size)


def search_base(evaluate: Evaluate, scale: float = 1.0) -> Pairs:
    """Try every q from 10 to 137 with one scale; for probabilities, whose scale is 1."""
    every = np.arange(Q_FIRST, Q_LAST + 1, dtype=np.float32)[None]
    loss = _measured(evaluate, np.full_like(every, scale), every)
    at = int(loss[0].argmin())
    return Pairs(np.full(1, scale, np.float32), every[:, at], loss[:, at], every.size)

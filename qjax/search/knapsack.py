"""The multiple-choice knapsack: one choice for each group, least loss within a budget, exactly.

    minimise   sum of loss[g, c(g)]     subject to   sum of cost[g, c(g)] <= budget

A Lagrangian sweep gives all assignments that minimise loss + lambda cost for some lambda: the lower convex hull of
what can be had. Between two of its points lie better assignments, which only a search finds. This one goes through
the groups one by one and keeps the partial assignments that no other beats in both cost and loss (Nemhauser and
Ullmann 1969). A partial one is dropped if it leaves too little for the rest, or if even the linear relaxation of the
rest, which is the sweep's curve, leads to no better loss than the best assignment known. With these bounds few stay:
the relaxation leaves at most one group undecided.

All arithmetic is NumPy in float64; equal numbers are told apart by the order of the choices, earlier ones first.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from qjax.errors import SearchError

MOST_STATES = 2_000_000
"""Partial assignments that are kept at most. Beyond that the worst bounds are dropped, and the result says so."""


@dataclasses.dataclass(frozen=True)
class Solution:
    """A choice for each group.

    Attributes:
        choice: int [groups].
        cost, loss: sums.
        bound: no assignment within the budget has less loss than this.
        exact: whether the loss is known to be the least.
    """

    choice: np.ndarray
    cost: float
    loss: float
    bound: float
    exact: bool


def solve(cost: np.ndarray, loss: np.ndarray, budget: float) -> Solution:
    """Find the assignment of least loss within a budget; of equal losses the one of least cost.

    Args:
        cost: float [groups, choices], not negative; a choice that a group does not have is infinite.
        loss: float [groups, choices].
        budget: what the costs may sum to.

    Raises:
        SearchError: arrays that cannot be, or a budget below the least cost.
    """
    cost, loss = _checked(cost, loss)
    groups = len(cost)
    least = float(cost.min(axis=1).sum()) if groups else 0.0
    if not budget >= least - _slack(least):
        raise SearchError(f"a budget of {budget:g} is below the least possible cost, {least:g}")
    budget += _slack(budget)
    if not groups:
        return Solution(np.zeros(0, int), 0.0, 0.0, 0.0, True)
    # The groups with the most at stake first: bounds of what is left are then soon tight.
    stake = np.where(np.isfinite(cost), loss, -math.inf).max(axis=1) - loss.min(axis=1)
    order = np.argsort(-stake, kind="stable")
    curves = _suffix_curves(cost[order], loss[order])
    best = _rounded_down(cost, loss, budget)
    bound = curves[0].at(budget)
    found, exact = _search(cost[order], loss[order], budget, curves, (best.loss, best.cost))
    if found is not None:
        choice = np.zeros(groups, int)
        choice[order] = found
        best = _solution(cost, loss, choice)
    return dataclasses.replace(best, bound=best.loss if exact else min(bound, best.loss), exact=exact)


def sweep(cost: np.ndarray, loss: np.ndarray) -> list[Solution]:
    """Return the assignments on the lower convex hull, by rising cost and falling loss.

    Args:
        cost, loss: as for `solve`.
    """
    cost, loss = _checked(cost, loss)
    hulls = [_hull(cost[g], loss[g]) for g in range(len(cost))]
    choice = np.array([hull[0] for hull in hulls], int)
    steps = [
        (_slope(cost[g], loss[g], a, b), g, n)
        for g, hull in enumerate(hulls)
        for n, (a, b) in enumerate(zip(hull, hull[1:], strict=False))
    ]
    out = [_solution(cost, loss, choice)]
    for _, g, n in sorted(steps):
        choice = choice.copy()
        choice[g] = hulls[g][n + 1]
        out.append(_solution(cost, loss, choice))
    return out


def _checked(cost: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    cost, loss = np.asarray(cost, np.float64), np.asarray(loss, np.float64)
    if cost.ndim != 2 or cost.shape != loss.shape:
        raise SearchError(f"costs {cost.shape} and losses {loss.shape} have to be [groups, choices] both")
    there = np.isfinite(cost)
    if np.isnan(cost).any() or (cost[there] < 0).any() or not there.any(axis=1).all():
        raise SearchError("costs are not negative numbers, and every group needs a choice of finite cost")
    if not np.isfinite(loss[there]).all():
        raise SearchError("a loss is NaN or infinite; look at the sensitivities")
    return cost, np.where(there, loss, math.inf)


def _slack(value: float) -> float:
    """Room for the rounding of sums."""
    return 1e-12 * abs(value)


def _solution(cost: np.ndarray, loss: np.ndarray, choice: np.ndarray) -> Solution:
    rows = np.arange(len(choice))
    total = float(loss[rows, choice].sum())
    return Solution(choice, float(cost[rows, choice].sum()), total, total, False)


def _hull(cost: np.ndarray, loss: np.ndarray) -> list[int]:
    """Choices on the lower convex hull of one group, by rising cost and falling loss."""
    kept: list[int] = []
    for c in sorted(range(len(cost)), key=lambda c: (cost[c], loss[c], c)):
        if not math.isfinite(cost[c]) or (kept and loss[c] >= loss[kept[-1]]):
            continue
        while len(kept) > 1 and _slope(cost, loss, kept[-2], kept[-1]) >= _slope(cost, loss, kept[-1], c):
            kept.pop()
        if kept and cost[kept[-1]] == cost[c]:
            kept.pop()
        kept.append(c)
    return kept


def _slope(cost: np.ndarray, loss: np.ndarray, a: int, b: int) -> float:
    rise = cost[b] - cost[a]
    return -math.inf if rise == 0 else float((loss[b] - loss[a]) / rise)


@dataclasses.dataclass(frozen=True)
class _Curve:
    """The least loss of some groups by the linear relaxation: piecewise linear in what they may cost."""

    cost: np.ndarray
    loss: np.ndarray

    @property
    def least(self) -> float:
        return float(self.cost[0])

    def at(self, budget: np.ndarray | float) -> np.ndarray | float:
        return np.interp(budget, self.cost, self.loss)


def _suffix_curves(cost: np.ndarray, loss: np.ndarray) -> list[_Curve]:
    """The curves of groups g, g + 1, ..., for every g, and of no group."""
    groups = len(cost)
    slopes, gains, rises = np.zeros(0), np.zeros(0), np.zeros(0)
    start = np.zeros(2)
    out = [_Curve(np.zeros(1), np.zeros(1))]
    for g in reversed(range(groups)):
        hull = _hull(cost[g], loss[g])
        start = start + (cost[g, hull[0]], loss[g, hull[0]])
        more_rise, more_gain = np.diff(cost[g, hull]), np.diff(loss[g, hull])
        rises, gains = np.append(rises, more_rise), np.append(gains, more_gain)
        slopes = np.append(slopes, more_gain / more_rise)
        order = np.argsort(slopes, kind="stable")
        slopes, gains, rises = slopes[order], gains[order], rises[order]
        out.append(_Curve(start[0] + np.append(0, np.cumsum(rises)), start[1] + np.append(0, np.cumsum(gains))))
    return out[::-1]


def _rounded_down(cost: np.ndarray, loss: np.ndarray, budget: float) -> Solution:
    """A good assignment to begin with: the steps of the sweep, steepest first, each taken where it still fits."""
    hulls = [_hull(cost[g], loss[g]) for g in range(len(cost))]
    at = np.zeros(len(hulls), int)
    total = sum(cost[g, hull[0]] for g, hull in enumerate(hulls))
    steps = sorted(
        (_slope(cost[g], loss[g], a, b), g, n)
        for g, hull in enumerate(hulls)
        for n, (a, b) in enumerate(zip(hull, hull[1:], strict=False))
    )
    for _, g, n in steps:
        more = cost[g, hulls[g][n + 1]] - cost[g, hulls[g][at[g]]]
        if total + more <= budget:
            total, at[g] = total + more, n + 1
    return _solution(cost, loss, np.array([hull[at[g]] for g, hull in enumerate(hulls)], int))


def _search(
    cost: np.ndarray, loss: np.ndarray, budget: float, curves: list[_Curve], best: tuple[float, float]
) -> tuple[np.ndarray | None, bool]:
    """Go through the groups with the undominated partial assignments.

    Returns:
        The best assignment that is better than ``best`` (loss, then cost), or None, and whether nothing was dropped
        that might have been better.
    """
    costs, losses = np.zeros(1), np.zeros(1)
    history: list[tuple[np.ndarray, np.ndarray]] = []  # for each group: the partial assignment gone on from, the choice
    exact = True
    room = 1e-12 * max(1.0, abs(best[0]))
    for g in range(len(cost)):
        there = np.flatnonzero(np.isfinite(cost[g]))
        new_cost = (costs[:, None] + cost[g, there]).reshape(-1)
        new_loss = (losses[:, None] + loss[g, there]).reshape(-1)
        parent = np.repeat(np.arange(len(costs)), len(there))
        chosen = np.tile(there, len(costs))
        rest = curves[g + 1]
        left = budget - new_cost
        fits = left >= rest.least - _slack(budget)
        reach = new_loss + rest.at(left)
        keep = np.flatnonzero(fits & (reach <= best[0] + room))
        # By cost, then loss, then order of appearance; of those, whoever has less loss than all before.
        keep = keep[np.lexsort((keep, new_loss[keep], new_cost[keep]))]
        if not len(keep):
            return None, exact
        before = np.minimum.accumulate(new_loss[keep])
        better = np.append(True, before[1:] < before[:-1])
        keep = keep[better]
        if len(keep) > MOST_STATES:
            exact = False
            keep = np.sort(keep[np.argsort(reach[keep], kind="stable")[:MOST_STATES]])
            keep = keep[np.lexsort((new_loss[keep], new_cost[keep]))]
        costs, losses = new_cost[keep], new_loss[keep]
        history.append((parent[keep], chosen[keep]))
    state = int(np.lexsort((costs, losses))[0])
    if (losses[state], costs[state]) >= best:
        return None, exact
    choice = np.zeros(len(cost), int)
    for g in reversed(range(len(cost))):
        parent, chosen = history[g]
        choice[g], state = chosen[state], parent[state]
    return choice, exact

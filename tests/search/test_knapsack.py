"""The exact knapsack against enumeration and against scipy's integer programming."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.errors import SearchError
from qjax.search import solve, sweep


def everything(cost, loss):
    """All assignments as (cost, loss, choice)."""
    rows = np.arange(len(cost))
    for choice in itertools.product(range(cost.shape[1]), repeat=len(cost)):
        yield float(cost[rows, choice].sum()), float(loss[rows, choice].sum()), choice


numbers = st.integers(0, 12)


@given(data=st.data(), groups=st.integers(1, 5), choices=st.integers(1, 4))
@settings(max_examples=80)
def test_least_loss_by_enumeration(data, groups, choices):
    """Whole numbers, so that ties are many: of equal losses the cheapest."""
    shape = (groups, choices)
    draw = lambda: np.array(data.draw(st.lists(numbers, min_size=groups * choices, max_size=groups * choices)))  # noqa: E731
    cost, loss = draw().reshape(shape).astype(float), draw().reshape(shape).astype(float)
    least = cost.min(axis=1).sum()
    budget = float(least + data.draw(st.integers(0, 30)))
    found = solve(cost, loss, budget)
    best = min((lo, c) for c, lo, _ in everything(cost, loss) if c <= budget)
    assert (found.loss, found.cost) == best and found.exact and found.bound == found.loss
    rows = np.arange(groups)
    assert cost[rows, found.choice].sum() == found.cost and loss[rows, found.choice].sum() == found.loss


@given(seed=st.integers(0, 10_000))
@settings(max_examples=30)
def test_the_sweep_is_the_lower_convex_hull(seed):
    rng = np.random.default_rng(seed)
    cost, loss = rng.uniform(1, 9, (4, 3)), rng.uniform(0, 5, (4, 3))
    points = sweep(cost, loss)
    costs, losses = [p.cost for p in points], [p.loss for p in points]
    assert costs == sorted(costs) and losses == sorted(losses, reverse=True)
    slopes = np.diff(losses) / np.diff(costs)
    assert (np.diff(slopes) >= -1e-9).all()
    for c, lo, _ in everything(cost, loss):
        if c >= costs[0]:
            assert lo >= np.interp(c, costs, losses) - 1e-9


@pytest.mark.parametrize(("groups", "choices"), [(20, 3), (60, 4)])
@pytest.mark.parametrize("same_costs", [False, True])
def test_against_integer_programming(groups, choices, same_costs):
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(groups)
    sizes = rng.choice([1, 2, 3, 7], groups) * 1000.0
    bits = np.linspace(4, 16, choices) if same_costs else np.sort(rng.uniform(2, 16, (groups, choices)), 1)
    cost = sizes[:, None] * bits
    loss = rng.lognormal(0, 2, (groups, 1)) * np.exp2(-cost / sizes[:, None])
    for share in (0.1, 0.4, 0.8):
        budget = cost.min(1).sum() + share * (cost.max(1).sum() - cost.min(1).sum())
        one = np.kron(np.eye(groups), np.ones(choices))
        made = optimize.milp(
            loss.ravel(),
            constraints=[
                optimize.LinearConstraint(one, 1, 1),
                optimize.LinearConstraint(cost.ravel(), -np.inf, budget),
            ],
            integrality=np.ones(loss.size),
            bounds=optimize.Bounds(0, 1),
            options={"mip_rel_gap": 0},
        )
        found = solve(cost, loss, budget)
        assert found.exact and found.cost <= budget * (1 + 1e-9)
        assert found.loss <= made.fun * (1 + 1e-9), "the other one stops at a tolerance"
        assert found.loss >= made.fun * (1 - 1e-3)


def test_more_budget_is_never_worse():
    rng = np.random.default_rng(0)
    cost, loss = rng.uniform(1, 9, (12, 3)), rng.uniform(0, 5, (12, 3))
    losses = [solve(cost, loss, b).loss for b in np.linspace(cost.min(1).sum(), cost.max(1).sum(), 15)]
    assert losses == sorted(losses, reverse=True) and losses[-1] == pytest.approx(loss.min(1).sum())


def test_a_choice_that_a_group_has_not():
    cost = np.array([[1.0, math.inf], [1.0, 2.0]])
    loss = np.array([[5.0, math.nan], [5.0, 0.0]])
    assert solve(cost, loss, 10).choice.tolist() == [0, 1]


def test_equal_choices_are_taken_in_order():
    assert solve(np.ones((3, 2)), np.ones((3, 2)), 3).choice.tolist() == [0, 0, 0]


def test_nothing_to_choose():
    assert solve(np.zeros((0, 2)), np.zeros((0, 2)), 0).loss == 0


def test_the_number_of_states_is_bounded(monkeypatch):
    from qjax.search import knapsack

    monkeypatch.setattr(knapsack, "MOST_STATES", 2)
    rng = np.random.default_rng(1)
    cost, loss = rng.uniform(1, 9, (30, 4)), rng.uniform(0, 5, (30, 4))
    found = solve(cost, loss, cost.min(1).sum() * 1.7)
    assert found.cost <= cost.min(1).sum() * 1.7 and found.bound <= found.loss
    assert not found.exact


@pytest.mark.parametrize(
    ("cost", "loss", "budget", "says"),
    [
        ([[1.0, 2.0]], [[1.0, 0.0]], 0.5, "below the least possible cost, 1"),
        ([[1.0, 2.0]], [[1.0, 0.0]], math.nan, "below the least"),
        ([[-1.0]], [[0.0]], 1, "not negative"),
        ([[math.inf]], [[0.0]], 1, "needs a choice of finite cost"),
        ([[1.0]], [[math.nan]], 1, "NaN or infinite"),
        ([1.0], [1.0], 1, "groups, choices"),
        ([[1.0]], [[1.0, 2.0]], 1, "groups, choices"),
    ],
)
def test_what_cannot_be(cost, loss, budget, says):
    with pytest.raises(SearchError, match=says):
        solve(np.array(cost), np.array(loss), budget)

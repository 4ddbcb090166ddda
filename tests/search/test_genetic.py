"""The genetic search against enumeration, its windows, and its first population against counting."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.errors import CheckpointError, SearchError
from qjax.search import Genetic, Windows, average_bits, evolve_best
from qjax.search.windows import draw_valid, drawing, tilted, violations

LAYERS, BITS = 6, np.array([2, 3, 4, 6])
RNG = np.random.default_rng(0)
SIZES = np.array([0, 3, 5, 2, 7, 0])  # the first and last layer do not count
ALLOWED = np.ones((2 * LAYERS, 4), bool)
ALLOWED[[0, 5, 6, 11], :3] = False  # they have the most bits
GAINS = RNG.random((2 * LAYERS, 4)).cumsum(axis=1)
WEIGHTS, INPUTS = average_bits(SIZES, BITS, 3.5, pad=LAYERS), average_bits(SIZES[::-1], BITS, 4.0)
WINDOWS = Windows(
    np.concatenate([WEIGHTS.costs, np.concatenate([np.zeros((1, LAYERS, 4)), INPUTS.costs], axis=1)]),
    np.array([3.0, 3.5]),
    np.array([3.5, 4.0]),
    ("bits of weights", "bits of inputs"),
)


def score(genomes):
    """An additive predictor."""
    return jnp.asarray(GAINS, jnp.float32)[jnp.arange(2 * LAYERS), genomes].sum(axis=-1)


@pytest.fixture(scope="module")
def best():
    every = np.array(list(itertools.product(*(np.flatnonzero(a) for a in ALLOWED))))
    fine = WINDOWS.hold(every)
    return every[fine], GAINS[np.arange(2 * LAYERS), every[fine]].sum(axis=1).max()


def test_matches_exhaustive_search(best):
    valid, most = best
    log, how, traces = [], Genetic(generations=25), []

    def traced(genomes):
        traces.append(genomes.shape)
        return score(genomes)

    made = evolve_best(traced, ALLOWED, WINDOWS, how, progress=lambda n, p: log.append(p))
    assert len(traces) == 2, "the first population, and one compiled generation for all"
    assert -made.values[0, 0] == pytest.approx(most, rel=1e-6)
    scores = [float(-p.values[0, 0]) for p in log]
    assert scores == sorted(scores) and len(scores) == 26, "the best score never falls"
    legal = set(map(tuple, valid.tolist()))
    for population in log:
        assert set(map(tuple, np.asarray(population.genomes).tolist())) <= legal
        assert len(population.genomes) == 25


def test_as_many_are_scored_as_the_paper_says_and_a_killed_search_ends_as_one_that_was_not(tmp_path):
    seen, how = [], Genetic(generations=4)

    def counted(genomes):
        seen.append(len(genomes))
        assert WINDOWS.hold(genomes).all()
        return score(genomes)

    whole = evolve_best(counted, ALLOWED, WINDOWS, how, compiled=False)
    assert seen == [100] * 5

    def stop(number, population):
        if number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evolve_best(score, ALLOWED, WINDOWS, how, compiled=False, resume=tmp_path / "job", progress=stop)
    again = evolve_best(score, ALLOWED, WINDOWS, how, compiled=False, resume=tmp_path / "job")
    for a, b in zip(whole, again, strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(CheckpointError, match="mutation differ"):
        evolve_best(score, ALLOWED, WINDOWS, Genetic(mutation=0.3), resume=tmp_path / "job")


def test_seeds_are_kept(best):
    valid, most = best
    top = valid[GAINS[np.arange(2 * LAYERS), valid].sum(axis=1).argmax()]
    made = evolve_best(score, ALLOWED, WINDOWS, Genetic(generations=0), seeds=top[None])
    assert made.genomes[0].tolist() == top.tolist()
    with pytest.raises(SearchError, match="seed 0 is outside"):
        evolve_best(score, ALLOWED, WINDOWS, seeds=np.where(ALLOWED[:, 0], 0, 3)[None])


@given(seed=st.integers(0, 1000), share=st.floats(0.05, 0.95))
@settings(max_examples=30, deadline=None)
def test_first_draws_have_the_costs_that_are_wanted(seed, share):
    rng = np.random.default_rng(seed)
    costs, allowed = rng.random((2, 5, 4)), rng.random((5, 4)) < 0.7
    allowed[:, 0] = True
    costs[1] = 0.5 * costs[0] + costs[1] * 0.01  # nearly the same budget twice
    least, most = (f(np.where(allowed, costs[0], v), 1).sum() for f, v in ((np.min, np.inf), (np.max, -np.inf)))
    if most - least < 0.1:
        return
    target = least + share * (most - least)
    one = Windows(costs[:1], np.array([least - 1]), np.array([most + 1]))
    p = tilted(one, allowed, np.array([target]))
    assert (p * costs[0]).sum() == pytest.approx(target, rel=1e-6) and (p[~allowed] == 0).all()
    np.testing.assert_allclose(p.sum(axis=1), 1)


def test_first_draws_are_as_those_that_are_counted():
    """P(bits of a layer | average) of all assignments near an average, and the tilted distribution of it."""
    layers = 8
    sizes = np.array([1, 2, 3, 2, 1, 3, 2, 2])
    every = np.array(list(itertools.product(range(4), repeat=layers)))
    average = (sizes * BITS[every]).sum(axis=1) / sizes.sum()
    for target in (2.8, 3.4, 4.6):
        near = every[abs(average - target) < 0.1]
        counted = np.stack([np.bincount(near[:, layer], minlength=4) for layer in range(layers)]) / len(near)
        window = average_bits(sizes, BITS, target + 0.1, 0.2)
        assert abs(tilted(window, np.ones((layers, 4), bool)) - counted).max() < 0.05


@pytest.mark.parametrize(("bits", "share"), [(3.0, 0.15), (3.0, 0.3), (6.0, 0.4), (4.5, 0.6), (None, 0.3)], ids=str)
def test_draws_within_several_budgets_are_as_all_that_are_valid(bits, share):
    """Average bits without the ends, and bytes with them: nearly collinear, and one of them binds."""
    sizes, of = np.array([30, 48, 96, 120, 25]), np.array([2.0, 4.0, 8.0])
    inner = sizes * np.array([0, 1, 1, 1, 0]) / sizes[1:4].sum()
    costs = np.stack([inner[:, None] * of, sizes[:, None] * of + 3])
    most = costs[1].min(1).sum() + share * (costs[1].max(1).sum() - costs[1].min(1).sum())
    some = [1] if bits is None else [0, 1]
    windows = Windows(costs[some], np.full(2, -np.inf)[some], np.array([bits or 0, most])[some])
    allowed = np.ones((5, 3), bool)
    every = np.array(list(itertools.product(range(3), repeat=5)), np.int32)
    valid = every[windows.hold(every)]
    drawn, fine = map(np.asarray, drawing(windows, allowed, 4000, 0)(jax.random.key(0)))
    drawn = drawn[fine]
    assert len(drawn) > 800, "most draws are near the budgets"
    for gene in range(5):
        there, here = (np.bincount(a[:, gene], minlength=3) / len(a) for a in (valid, drawn))
        assert abs(there - here).max() < 0.25 and (here >= 0.25 * there).all()
    assert len(draw_valid(0, allowed, windows, 1000)) == len(valid), "all of them are found"


def test_budgets_that_share_no_gene_are_met_each_by_itself():
    costs = np.zeros((2, 6, 4))
    costs[0, :3], costs[1, 3:] = BITS / 3, BITS / 3
    p = tilted(Windows(costs, np.full(2, -np.inf), np.array([5.0, 3.0])), np.ones((6, 4), bool))
    np.testing.assert_allclose((p * costs).sum((1, 2)), [2 + 0.9 * 3, 2 + 0.9], rtol=1e-6)


def test_windows_that_are_hit_by_nothing_say_what_comes_near():
    windows = average_bits(np.array([0, 5, 5, 0]), BITS, 2.4, width=0.3)
    with pytest.raises(SearchError, match=r"none of 200,000 .*average bits [23][.0-9]* \(above 2.1 and up to 2.4"):
        evolve_best(lambda g: g.sum(1), np.ones((4, 4), bool), windows)


def test_violations_are_zero_inside_alone():
    genomes = np.random.default_rng(1).integers(0, 4, (500, 2 * LAYERS))
    tables = (jnp.asarray(a, jnp.float32) for a in (WINDOWS.costs, WINDOWS.low, WINDOWS.high))
    found = np.asarray(jax.jit(violations)(genomes, *tables)) <= 0
    costs = WINDOWS.of(genomes)
    np.testing.assert_allclose(costs[:, 0], (SIZES * BITS[genomes[:, :LAYERS]]).sum(1) / SIZES.sum())
    np.testing.assert_array_equal(found, WINDOWS.hold(genomes))
    np.testing.assert_array_equal(
        found, ((costs > [3.0 + 1e-5, 3.5 + 1e-5]) & (costs <= [3.5 + 1e-5, 4 + 1e-5])).all(1)
    )
    assert found.any() and not found.all()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Genetic(parents=200), "cannot be more"),
        (lambda: Genetic(mutation=-1), "probability"),
        (lambda: average_bits(np.zeros(3), BITS, 3), "one of them counts"),
        (lambda: Windows(np.zeros((1, 2, 3)), np.ones(1), np.ones(1)), "lower end is not below"),
        (lambda: Windows(np.zeros((2, 3)), np.ones(2), np.ones(2)), r"\[budgets, genes, choices\]"),
        (
            lambda: evolve_best(score, ALLOWED, average_bits(SIZES, BITS, 1.9, pad=LAYERS)),
            "above 1.4 and up to 1.9; 2 to 6 can be reached",
        ),
        (lambda: evolve_best(score, ALLOWED[:3], WINDOWS), "do not fit"),
        (
            lambda: evolve_best(score, ALLOWED, average_bits(SIZES, BITS, 3.0, 1e-9, pad=LAYERS), Genetic(retries=1)),
            "widen the windows",
        ),
        (lambda: evolve_best(lambda g: g[:, 0] * jnp.nan, ALLOWED, WINDOWS, Genetic(generations=0)), "is a number"),
    ],
)
def test_what_cannot_be(call, says):
    with pytest.raises(SearchError, match=says):
        call()

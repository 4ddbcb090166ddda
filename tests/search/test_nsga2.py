"""NSGA-II against its definitions in NumPy, enumeration of small spaces, and the exact knapsack."""

from __future__ import annotations

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.errors import CheckpointError, SearchError
from qjax.search import NSGA2, evolve_front, front, hypervolume, solve, sweep
from qjax.search.nsga2 import Population, best_first, copies, cross, crowding, draw, mutate, ranks

GENES, CHOICES, SIZE = 6, 4, 24
ALLOWED = np.random.default_rng(1).random((GENES, CHOICES)) < 0.7
ALLOWED[:, 0] = True
ALLOWED[2] = [False, True, False, False]  # one choice alone
COST = np.random.default_rng(2).integers(1, 9, (GENES, CHOICES)).astype(float)
LOSS = np.random.default_rng(3).integers(0, 40, (GENES, CHOICES)).astype(float)


def sums(genomes):
    rows = jnp.arange(GENES)
    values = jnp.stack([jnp.asarray(t, jnp.float32)[rows, genomes].sum(-1) for t in (COST, LOSS)], -1)
    return values, jnp.maximum(values[:, 0] - 30, 0)


def everything():
    every = np.array(list(itertools.product(*(np.flatnonzero(a) for a in ALLOWED))))
    rows = np.arange(GENES)
    return COST[rows, every].sum(1), LOSS[rows, every].sum(1)


# -- Definitions -------------------------------------------------------------------------------------------------------


def ranks_by_hand(values, violation):
    def better(i, j):
        if violation[i] != violation[j]:
            return violation[i] < violation[j]
        return (values[i] <= values[j]).all() and (values[i] < values[j]).any()

    left, out, level = set(range(len(values))), np.zeros(len(values), int), 0
    while left:
        free = {j for j in left if not any(better(i, j) for i in left)}
        out[list(free)], left, level = level, left - free, level + 1
    return out


def room_by_hand(values, rank):
    out = np.zeros(len(values))
    for level in set(rank):
        members = np.flatnonzero(rank == level)
        for m in range(values.shape[1]):
            order = members[np.argsort(values[members, m], kind="stable")]
            width = values[order[-1], m] - values[order[0], m]
            out[order[[0, -1]]] = np.inf
            for before, at, after in zip(order, order[1:], order[2:], strict=False):
                out[at] += (values[after, m] - values[before, m]) / width if width else 0
    return out


@given(seed=st.integers(0, 10_000), grid=st.sampled_from([3, 50]), objectives=st.sampled_from([2, 3]))
@settings(max_examples=25, deadline=None)
def test_fronts_and_room(seed, grid, objectives):
    """On a coarse grid ties are many: then only ranks are compared, for room depends on the order of equals."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, grid, (SIZE, objectives)).astype(np.float32)
    violation = np.where(rng.random(SIZE) < 0.3, rng.integers(0, 3, SIZE), 0).astype(np.float32)
    rank = np.asarray(jax.jit(ranks)(values, violation))
    np.testing.assert_array_equal(rank, ranks_by_hand(values, violation))
    apart = rng.permuted(np.arange(SIZE * objectives)).reshape(SIZE, objectives).astype(np.float32)
    rank = ranks_by_hand(apart, violation)
    np.testing.assert_allclose(jax.jit(crowding)(apart, rank), room_by_hand(apart, rank), rtol=1e-5)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_operators_keep_to_the_choices_that_there_are(seed):
    key = jax.random.key(seed)
    allowed = jnp.asarray(ALLOWED)
    genomes = jax.jit(draw, static_argnums=2)(key, allowed, SIZE)
    changed = jax.jit(mutate)(key, genomes, allowed, 1.0)
    for some in (genomes, changed):
        assert ALLOWED[np.arange(GENES), np.asarray(some)].all()
    several = ALLOWED.sum(1) > 1
    assert ((np.asarray(genomes) != np.asarray(changed)) == several).all(), "another choice wherever there is one"
    one, two = cross(jax.random.bernoulli(key, 0.5, genomes.shape), genomes, changed)
    np.testing.assert_array_equal(np.sort([one, two], axis=0), np.sort([genomes, changed], axis=0))


def test_every_choice_is_drawn_alike():
    allowed = jnp.asarray(ALLOWED)
    drawn = np.asarray(draw(jax.random.key(0), allowed, 6000))
    again = np.asarray(mutate(jax.random.key(1), jnp.zeros((6000, GENES), jnp.int32), allowed, 1.0))
    for gene in range(GENES):
        has = np.flatnonzero(ALLOWED[gene])
        for some, of in ((drawn, has), (again, has[has != 0])):
            if len(of) > 1 and ALLOWED[gene, 0]:
                share = np.bincount(some[:, gene], minlength=CHOICES)[of] / 6000
                assert abs(share - 1 / len(of)).max() < 0.03


def test_copies_and_numbers_that_are_none_stand_last():
    genomes = jnp.asarray([[1, 2], [0, 0], [1, 2], [3, 1], [1, 2]], jnp.int32)
    assert copies(genomes).tolist() == [False, False, True, False, True]
    values = jnp.asarray([[1, 1], [jnp.nan, 0], [1, 1], [2, 0], [1, 1]], jnp.float32)
    ordered, rank, _ = jax.jit(best_first)(Population(genomes, values, jnp.zeros(5)))
    assert sorted(map(tuple, ordered.genomes[:2].tolist())) == [(1, 2), (3, 1)]
    assert ordered.genomes[2].tolist() == [0, 0] and rank.tolist() == [0, 0, 1, 5, 5]


# -- Against what is known ---------------------------------------------------------------------------------------------


def test_the_whole_front_of_a_small_space():
    cost, loss = everything()
    fine = cost <= 30
    want = {
        (c, lo)
        for c, lo in zip(cost[fine], loss[fine], strict=True)
        if not ((cost[fine] <= c) & (loss[fine] <= lo) & ((cost[fine] < c) | (loss[fine] < lo))).any()
    }
    made = evolve_front(sums, ALLOWED, NSGA2(population=SIZE * 2, generations=60))
    found = np.asarray(made.values)[front(made)]
    assert {tuple(v) for v in found.tolist()} == want
    assert found[:, 1].min() == solve(np.where(ALLOWED, COST, np.inf), LOSS, 30).loss


def test_seeds_are_not_lost_and_the_front_lies_between_hull_and_optimum():
    cost = np.where(ALLOWED, COST, np.inf)
    hull = sweep(cost, LOSS)
    seeds = np.stack([s.choice for s in hull if s.cost <= 30])
    log = []
    made = evolve_front(
        sums,
        ALLOWED,
        NSGA2(population=SIZE * 2, generations=10),
        seeds=seeds,
        progress=lambda n, p: log.append(hypervolume(np.asarray(p.values)[front(p)], np.array([31.0, 200.0]))),
    )
    assert log == sorted(log) and len(log) == 11, "this front fits into the population, so nothing of it is lost"
    found = np.asarray(made.values)[front(made)]
    start = hypervolume(np.array([(s.cost, s.loss) for s in hull]), np.array([31.0, 200.0]))
    every = [solve(cost, LOSS, b) for b in np.arange(cost.min(1).sum(), 31)]
    best = hypervolume(np.array([(s.cost, s.loss) for s in every]), np.array([31.0, 200.0]))
    assert start <= hypervolume(found, np.array([31.0, 200.0])) <= best


def test_hypervolume():
    assert hypervolume(np.array([[1, 3], [2, 1], [3, 3], [9, 0]]), np.array([4, 4])) == 3 * 1 + 2 * 2
    assert hypervolume(np.zeros((0, 2)), np.array([4, 4])) == 0
    with pytest.raises(SearchError, match=r"\[n, 2\]"):
        hypervolume(np.zeros((3, 3)), np.zeros(3))


def test_as_good_as_pymoo():
    """The same number of evaluations, three seeds each; a third party's implementation as the measure."""
    pytest.importorskip("pymoo")
    from pymoo.algorithms.moo.nsga2 import NSGA2 as Theirs
    from pymoo.core.problem import Problem
    from pymoo.operators.crossover.ux import UX
    from pymoo.operators.mutation.pm import PM
    from pymoo.operators.repair.rounding import RoundingRepair
    from pymoo.operators.sampling.rnd import IntegerRandomSampling
    from pymoo.optimize import minimize

    rng = np.random.default_rng(0)
    genes = 40
    sizes = rng.choice([1, 2, 3, 7], genes) * 1.0
    cost = sizes[:, None] * np.array([2, 4, 6, 8.0]) / sizes.sum()
    loss = rng.lognormal(0, 1, (genes, 1)) * np.exp2(-np.array([2, 4, 6, 8.0]))
    reference, rows = np.array([8.01, loss[:, 0].sum()]), np.arange(genes)

    class Bits(Problem):
        def __init__(self):
            super().__init__(n_var=genes, n_obj=2, xl=0, xu=3, vtype=int)

        def _evaluate(self, x, out, *args, **kwargs):
            x = x.astype(int)
            out["F"] = np.stack([cost[rows, x].sum(1), loss[rows, x].sum(1)], 1)

    def ours(genomes):
        both = [jnp.asarray(t, jnp.float32)[jnp.arange(genes), genomes].sum(-1) for t in (cost, loss)]
        return jnp.stack(both, -1), jnp.zeros(len(genomes))

    def theirs(seed):
        change = PM(eta=3.0, vtype=float, repair=RoundingRepair())  # how its manual has integers
        how = Theirs(pop_size=60, sampling=IntegerRandomSampling(), crossover=UX(prob=0.9), mutation=change)
        return minimize(Bits(), how, ("n_gen", 151), seed=seed).F

    made = [evolve_front(ours, np.ones((genes, 4), bool), NSGA2(60, 150), seed=s) for s in range(3)]
    mine = [hypervolume(np.asarray(p.values), reference) for p in made]
    other = [hypervolume(theirs(s), reference) for s in range(3)]
    print(f"hypervolume: {np.median(mine):.4f}, pymoo {np.median(other):.4f}")
    assert np.median(mine) >= 0.99 * np.median(other)


# -- Going on, and how it is run ---------------------------------------------------------------------------------------


def test_a_killed_search_ends_as_one_that_was_not(tmp_path):
    how = NSGA2(population=SIZE, generations=6)
    whole = evolve_front(sums, ALLOWED, how, seed=4)

    class Killed(Exception):
        pass

    def killer(at):
        def progress(number, population):
            if number == at:
                raise Killed

        return progress

    for at in (0, 3):
        with pytest.raises(Killed):
            evolve_front(sums, ALLOWED, how, seed=4, resume=tmp_path / "job", progress=killer(at))
    seen = []
    said = {"resume": tmp_path / "job", "progress": lambda n, p: seen.append(n)}
    again = evolve_front(lambda g: sums(g), ALLOWED, how, seed=4, compiled=False, **said)  # and called as it is
    assert seen[0] == 3 and seen[-1] == 6
    for a, b in zip(whole, again, strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(CheckpointError, match="seed differ"):
        evolve_front(sums, ALLOWED, how, seed=5, resume=tmp_path / "job")
    with pytest.raises(CheckpointError, match="allowed differ"):
        evolve_front(sums, np.ones_like(ALLOWED), how, seed=4, resume=tmp_path / "job")
    file = tmp_path / "job/population.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "generation": 2}))
    with pytest.raises(CheckpointError, match="damaged"):
        evolve_front(sums, ALLOWED, how, seed=4, resume=tmp_path / "job")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").touch()
    with pytest.raises(CheckpointError, match="holds other things"):
        evolve_front(sums, ALLOWED, how, resume=tmp_path / "other")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: NSGA2(population=5), "even number"),
        (lambda: NSGA2(population=2), "4 or more"),
        (lambda: NSGA2(mutation=1.5), "probability"),
        (lambda: evolve_front(sums, np.ones((3, 1), bool)), "nothing to search"),
        (lambda: evolve_front(sums, np.eye(3, 2, dtype=bool)), "gene 2 has no choice"),
        (lambda: evolve_front(sums, np.ones(3, bool)), r"\[genes, choices\]"),
        (lambda: evolve_front(sums, ALLOWED, seeds=np.zeros((2, 3), int)), r"\[any, 6\]"),
        (lambda: evolve_front(sums, ALLOWED, seeds=np.zeros((2, GENES), int)), "seed 0 has choice 0 for gene 2"),
    ],
)
def test_what_cannot_be(call, says):
    with pytest.raises(SearchError, match=says):
        call()

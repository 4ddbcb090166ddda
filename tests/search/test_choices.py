"""Direct evaluation, budgets of bytes, time and energy, and fronts of subnets, on scores that are formulas."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.errors import SearchError
from qjax.hardware import Accelerator, cost
from qjax.search import NSGA2, Genes, Genetic, SiteCosts, choice_front, search_choice, site_costs
from qjax.search.genes import VALUES
from qjax.supernet import Space

SITES = ("stem", "a", "b", "c", "head")
DOMAIN = Space((2, 4, 8), (4, 8), (True,), (True,), (True,)).domain(SITES)
WEIGHTS, INPUTS = [9, 30, 10, 40, 9], [50, 8, 8, 4, 1]
MINDS = np.array([0, 0.3, 0.1, 0.2, 0])
FEW = Genetic(population=8, parents=4, mutants=6, crossed=6, generations=6)


def accuracy(choices):
    """Less with few bits."""
    lost = np.exp2(-np.asarray(choices, float)[..., 0]) + 0.5 * np.exp2(-np.asarray(choices, float)[..., 1])
    return 0.9 - (lost * MINDS).sum(-1)


def every():
    """All choices."""
    inner = np.array(list(itertools.product(itertools.product((2, 4, 8), (4, 8)), repeat=3)))
    out = np.ones((len(inner), 5, 5), np.int32)
    out[:, :, :2] = 8
    out[:, 1:4, :2] = inner
    return out


@pytest.mark.slow
def test_subnets_that_are_run_are_run_once_and_a_killed_search_ends_as_one_that_was_not(tmp_path):
    asked = []

    def run(most):
        def scores(choices):
            if len(asked) == most:
                raise KeyboardInterrupt
            assert choices.shape == (3, 5, 5)
            asked.append(choices)
            return accuracy(choices)

        return scores

    how = {"width": 1.0, "settings": FEW, "block": 3, "job": "a formula"}

    def search(most, folder):
        return search_choice(run(most), DOMAIN, WEIGHTS, INPUTS, (4.5, 6.5), resume=folder, **how)

    whole = search(None, None)
    alone = len(asked)
    assert whole.evaluations == 8 + 6 * 12 and 3.5 < whole.average[0] <= 4.5
    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        search(alone // 2, tmp_path / "job")
    again = search(None, tmp_path / "job")
    assert len(asked) == alone, "no more than the block that the kill cut"
    np.testing.assert_array_equal(again.choice, whole.choice)
    assert again.score == whole.score == np.float32(accuracy(whole.choice))


def together(w, a):
    """A cost that does not add up: the slower of two."""
    bits = np.array([*VALUES[:-1], 16], float)
    return np.maximum(bits[:, None] * w, bits[None] * a)


@pytest.mark.slow
def test_a_budget_that_does_not_add_up_has_genes_of_pairs():
    table = np.stack([together(w, a) for w, a in zip(WEIGHTS, [40, 8, 8, 4, 1], strict=True)]) * 1e-6
    time = SiteCosts("seconds", table, 1e-5)
    np.testing.assert_allclose(time.of(every()[:3]), [
        1e-5 + 1e-6 * sum(max(w * b[0], a * b[1]) for w, a, b in zip(WEIGHTS, [40, 8, 8, 4, 1], c, strict=True))
        for c in every()[:3]
    ])  # fmt: skip
    genes = Genes(DOMAIN)
    assert not genes.additive(table)
    with pytest.raises(SearchError, match="paired=True"):
        genes.costs(table)
    pairs = Genes(DOMAIN, paired=True)
    np.testing.assert_array_equal(pairs.choice(pairs.genomes(every())), every())
    seen = []
    found = search_choice(
        lambda c: accuracy(seen.append(c) or c), DOMAIN, WEIGHTS, INPUTS, "800 us", costs=[time], settings=FEW, block=4,
        baselines=True,
    )  # fmt: skip
    fits = every()[time.of(every()) <= 800e-6]
    assert all(time.of(c).max() <= 800e-6 * (1 + 1e-6) for c in seen)
    assert found.score == pytest.approx(accuracy(fits).max(), abs=1e-6), "the best of all that fit"
    assert found.costs == {"seconds": pytest.approx(float(time.of(found.choice)))} and found.genes.paired
    assert found.baselines.count == min(len(fits), found.evaluations) and "µs" in repr(found)
    with pytest.raises(SearchError, match=r"as little as 100 µs; .* to .* can be reached"):
        search_choice(accuracy, DOMAIN, WEIGHTS, INPUTS, "100 us", costs=[time])
    with pytest.raises(SearchError, match=r"needs costs=\[site_costs\(..., kind='bytes'\)\]"):
        search_choice(accuracy, DOMAIN, WEIGHTS, INPUTS, ["4 bits", "1 kB"], costs=[time])


def test_the_front_of_subnets_is_the_one_of_all_choices():
    table = np.stack([together(w, a) for w, a in zip(WEIGHTS, [40, 8, 8, 4, 1], strict=True)])
    time = SiteCosts("bytes", table, 7.0)
    seen = choice_front(accuracy, DOMAIN, WEIGHTS, INPUTS, time, most=900.0, settings=NSGA2(24, 12), block=4)
    costs, scores = time.of(every()), accuracy(every())
    true = [n for n in np.lexsort((-scores, costs)) if costs[n] <= 900]
    true = [n for i, n in enumerate(true) if all(scores[m] < scores[n] for m in true[:i])]
    got = seen.curves["NSGA-II"]
    np.testing.assert_allclose([p.cost for p in got], costs[true])
    np.testing.assert_allclose([p.score for p in got], scores[true], rtol=1e-6)
    lagrange = seen.curves["Lagrangian"]
    assert lagrange and all(any(q.cost <= p.cost and q.score >= p.score - 1e-6 for q in got) for p in lagrange)
    assert seen.best(700.0).cost <= 700 and seen.best().score == max(p.score for p in got)
    assert "Lagrangian" in str(seen) and repr(seen).startswith("SubnetFront(score over bytes: ")


def test_costs_that_add_up_are_split():
    rng = np.random.default_rng(0)
    weights, inputs = rng.random((5, 8, 1)), rng.random((5, 1, 8))
    genes = Genes(Space(tied=(("a", "c"),)).domain(SITES))
    for table in (weights + inputs, weights + 0 * inputs, 0 * weights + inputs):
        of_genes = genes.costs(table)
        choice = np.asarray(genes.choice(np.where(genes.allowed[:, 3], 3, 6)))
        genome = genes.genomes(choice)
        assert of_genes[np.arange(len(genome)), genome].sum() == pytest.approx(
            float(SiteCosts("bytes", table).of(choice))
        )
    assert (genes.costs(0 * weights + inputs)[:4] == 0).all() and (genes.costs(weights + 0 * inputs)[4:] == 0).all()


def test_bytes_are_those_of_the_packed_model_and_time_that_of_the_cost_model():
    def network(p, x):
        return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]

    p = {"a": jnp.ones((6, 16)), "b": jnp.ones((16, 16)), "c": jnp.ones((16, 3)), "more": jnp.ones(5)}
    x = jnp.ones((4, 6))
    t = qjax.elastic(network, Space((2, 3, 8), (0, 4), (True,), (True,), (True,), ends=None))
    state = jax.tree.map(lambda a: jnp.full(a.shape, 0.1), jax.eval_shape(t.init, p, x))
    stored = site_costs(t, p, state, x, kind="bytes")
    domain = t.domain(p, x)
    for bits in ((2, 0), (3, 4)):
        choice = domain.uniform(*bits)
        choice[1, 0] = 8
        assert stored.of(choice) == t.convert(p, state, choice, x).report.stored_bytes
    for kind, on in (("seconds", "h200"), ("joules", Accelerator())):
        found = site_costs(t, p, state, x, kind=kind, on=on)
        want = sum(
            cost(shape, 4, qjax.Int(3), qjax.Int(4, per="tensor", symmetric=False), on=on)[kind]
            for shape in ((16, 6), (16, 16), (3, 16))
        )
        assert float(found.of(domain.uniform(3, 4))) == pytest.approx(want, rel=0.1)
    with pytest.raises(SearchError, match="needs the device"):
        site_costs(t, p, state, x, kind="seconds")

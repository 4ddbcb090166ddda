"""The predictor, its data, and the search over choices of a supernet, on a network whose accuracy is a formula."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.errors import CheckpointError, DataError, SearchError
from qjax.search import (
    CQAP,
    Genes,
    Genetic,
    agreement,
    collect_subnets,
    draw_choices,
    fit_predictor,
    init_predictor,
    predict,
    search_choice,
)
from qjax.supernet import At, Space, encode_choice

SITES = ("stem/kernel", "a/kernel", "b/kernel", "c/kernel", "d/kernel", "head/kernel")
WEIGHTS, INPUTS = [9, 30, 10, 40, 20, 9], [50, 8, 8, 4, 2, 1]
DOMAIN = Space(tied=(("c/**", "d/**"),), at=(At("b/**", weight_bits=(4, 8)),)).domain(SITES)
MINDS = np.array([0, 0.3, 0.1, 0.2, 0.05, 0])


def accuracy(choices):
    """Less with few bits, with one scale for the tensor, and where weights and activations both have few."""
    few = jnp.exp2(-choices[..., :2].astype(jnp.float32))
    lost = (few[..., 0] + 0.5 * few[..., 1]) * MINDS
    return 0.9 - lost.sum(-1) * (1.2 - 0.2 * choices[..., 1:5, 2].mean(-1))


def test_genomes_are_choices():
    genes = Genes(DOMAIN, (False, True, False))
    assert genes.allowed.shape == (10, 8) and genes.allowed[2].nonzero()[0].tolist() == [2, 6]
    choice = np.asarray(genes.choice(np.where(genes.allowed[:, 3], 3, 6)))
    assert DOMAIN.check(choice)[:, 0].tolist() == [8, 5, 8, 5, 5, 8] and (choice[:, 2:] == [0, 1, 0]).all()
    np.testing.assert_array_equal(genes.genomes(choice), np.where(genes.allowed[:, 3], 3, 6))
    windows = genes.windows(WEIGHTS, INPUTS, (5.5, 5))
    np.testing.assert_allclose(windows.of(genes.genomes(choice)[None]), [[(30 * 5 + 10 * 8 + 60 * 5) / 100, 5]])
    alone = Genes(Space(act_bits=(0,), act_symmetric=(True,)).domain(SITES)).windows(WEIGHTS, INPUTS, 4)
    assert alone.names == ("average bits of weights",)
    with pytest.raises(SearchError, match="6 sites are needed"):
        genes.windows([1, 2], INPUTS, 4)


def test_subnets_are_spread_and_collecting_goes_on(tmp_path):
    choices, forms = draw_choices(0, DOMAIN, WEIGHTS, INPUTS, 240)
    for choice in choices[:16]:
        DOMAIN.check(choice)
    assert len(np.unique(forms, axis=0)) == 8 and (np.bincount(forms @ [4, 2, 1]) == 30).all()
    np.testing.assert_array_equal(choices[7:9], draw_choices(0, DOMAIN, WEIGHTS, INPUTS, 2, first=7)[0])
    average = (choices[:, 1:5, 0] * WEIGHTS[1:5]).sum(1) / 100
    assert average.min() < 3.2 and average.max() > 7.2 and abs(np.median(average) - 5.1) < 0.5
    asked = []

    def measured(some):
        asked.append(len(some))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return accuracy(some)

    with pytest.raises(KeyboardInterrupt):
        collect_subnets(measured, DOMAIN, WEIGHTS, INPUTS, 30, resume=tmp_path / "job", job={"images": 5})
    file = tmp_path / "job/subnets.jsonl"
    file.write_text(file.read_text()[:-9])  # a line is cut
    found = collect_subnets(measured, DOMAIN, WEIGHTS, INPUTS, 30, resume=tmp_path / "job", job={"images": 5})
    assert asked == [8] * 5, "15 of 30 were there"
    np.testing.assert_array_equal(found.choices, choices[:30])
    np.testing.assert_allclose(found.scores, accuracy(choices[:30]), rtol=1e-6)
    np.testing.assert_array_equal(found.encoded, encode_choice(choices[:30], forms[:30]))
    with pytest.raises(CheckpointError, match="of differ"):
        collect_subnets(accuracy, DOMAIN, WEIGHTS, INPUTS, 30, resume=tmp_path / "job", job={"images": 6})
    with pytest.raises(CheckpointError, match="space differ"):
        other = Space(weight_bits=(2, 4, 8)).domain(SITES)
        collect_subnets(accuracy, other, WEIGHTS, INPUTS, 30, resume=tmp_path / "job", job={"images": 5})
    with pytest.raises(SearchError, match="subnet 0 has the score nan"):
        collect_subnets(lambda c: np.full(len(c), np.nan), DOMAIN, WEIGHTS, INPUTS, 1)


def test_a_fitted_predictor_and_the_search_with_it():
    """Rank correlations above the paper's, and the best of the search is the best of all choices but for a little."""
    choices, forms = draw_choices(0, DOMAIN, WEIGHTS, INPUTS, 400)
    encoded = encode_choice(choices, forms)
    fitted = fit_predictor(encoded, accuracy(choices), CQAP(epochs=100, hidden=64, layers=3, batch=64, rate=1e-3))
    assert fitted.held.pearson > 0.95 and fitted.held.kendall > 0.8 and fitted.held.count == 80
    assert fitted.rmse[fitted.epoch] == fitted.rmse.min() == pytest.approx(fitted.held.rmse, rel=1e-5)
    form = (True, True, True)

    def predicted(choices):
        return predict(fitted.params, encode_choice(choices, jnp.asarray(form)))

    found = search_choice(predicted, DOMAIN, WEIGHTS, INPUTS, 4.0, form=form, settings=Genetic(generations=20))
    assert all(3.5 < v <= 4.0 + 1e-5 for v in found.average)
    genes = found.genes
    windows = genes.windows(WEIGHTS, INPUTS, 4.0)
    free = [np.flatnonzero(row) for row in genes.allowed]
    halves = [np.array(list(itertools.product(*free[:5]))), np.array(list(itertools.product(*free[5:])))]
    fine = [h[(c > 3.5 + 1e-6) & (c <= 4 + 1e-6)] for h, c in zip(halves, costs(halves, windows), strict=True)]
    draws = np.random.default_rng(0).integers(0, [[len(f)] for f in fine], (2, 3000))
    every = np.concatenate([f[d] for f, d in zip(fine, draws, strict=True)], axis=1)
    assert windows.hold(every).all()
    scores = np.asarray(jax.jit(lambda g: predicted(genes.choice(g)))(every))
    assert found.score >= scores.max() - 1e-6, "better than 3,000 random valid ones of its own score"
    truth = np.asarray(accuracy(genes.choice(every)))
    assert float(accuracy(found.choice)) >= np.quantile(truth, 0.95), "and among the best in truth"
    with pytest.raises(SearchError, match="average bits of weights above 1 and up to 1.5"):
        search_choice(predicted, DOMAIN, WEIGHTS, INPUTS, 1.5)


def costs(halves, windows):
    """Costs of the weights' half and of the activations' half."""
    for n, half in enumerate(halves):
        yield windows.costs[n, np.arange(5 * n, 5 * n + 5), half].sum(axis=1)


def test_the_network_is_the_equation():
    params = init_predictor(jax.random.key(0), 6 + 14 * 21)
    assert [k.shape for k in params["kernels"]] == [(300, 200)] + [(200, 200)] * 6 and params["out"].shape == (200,)
    x = np.random.default_rng(0).random((3, 300))
    want = x
    for kernel, bias in zip(params["kernels"], params["biases"], strict=True):
        want = np.maximum(want @ np.asarray(kernel, np.float64) + np.asarray(bias, np.float64), 0)
    np.testing.assert_allclose(predict(params, x), want @ np.asarray(params["out"], np.float64), rtol=1e-4, atol=1e-6)


@given(seed=st.integers(0, 1000), levels=st.sampled_from([3, 1000]))
@settings(max_examples=25, deadline=None)
def test_correlations_are_those_of_scipy(seed, levels):
    stats = pytest.importorskip("scipy.stats")
    a, b = np.random.default_rng(seed).integers(0, levels, (2, 30)).astype(float)
    b += a
    found = agreement(a, b)
    assert found.pearson == pytest.approx(stats.pearsonr(a, b).statistic)
    assert found.spearman == pytest.approx(stats.spearmanr(a, b).statistic)
    assert found.kendall == pytest.approx(stats.kendalltau(a, b).statistic)
    assert found.rmse == pytest.approx(np.sqrt(np.mean((a - b) ** 2)))


def test_what_cannot_be_fitted():
    with pytest.raises(DataError, match="from 10 on"):
        fit_predictor(np.zeros((3, 20)), np.zeros(3))
    with pytest.raises(DataError, match="subnet 4 has a value that is no number"):
        fit_predictor(np.zeros((20, 20)), np.where(np.arange(20) == 4, np.nan, 0.5))
    with pytest.raises(SearchError, match="hidden=0"):
        CQAP(hidden=0)
    assert np.isnan(agreement(np.zeros(4), np.arange(4)).kendall)
    with pytest.raises(DataError, match="two or more"):
        agreement([1.0], [1.0])

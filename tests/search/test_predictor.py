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
    best_as_run,
    collect_subnets,
    draw_choices,
    fit_predictor,
    init_predictor,
    predict,
    random_choices,
    search_choice,
    uniform_choices,
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
        return {"score": accuracy(some), "bits": some[:, 1, 0]}

    with pytest.raises(KeyboardInterrupt):
        collect_subnets(measured, DOMAIN, WEIGHTS, INPUTS, 30, resume=tmp_path / "job", job={"images": 5})
    file = tmp_path / "job/subnets.jsonl"
    file.write_text(file.read_text()[:-9])  # a line is cut
    found = collect_subnets(measured, DOMAIN, WEIGHTS, INPUTS, 30, resume=tmp_path / "job", job={"images": 5})
    assert asked == [8] * 5, "15 of 30 were there"
    np.testing.assert_array_equal(found.choices, choices[:30])
    np.testing.assert_allclose(found.scores, accuracy(choices[:30]), rtol=1e-6)
    np.testing.assert_array_equal(found.also["bits"], choices[:30, 1, 0])
    assert repr(found).startswith("Subnets(30 of 6 sites, score ") and repr(found).endswith(", bits)")
    np.testing.assert_array_equal(found.encoded, encode_choice(choices[:30], forms[:30]))
    with pytest.raises(CheckpointError, match="job differ"):
        collect_subnets(accuracy, DOMAIN, WEIGHTS, INPUTS, 30, resume=tmp_path / "job", job={"images": 6})
    with pytest.raises(CheckpointError, match="space differ"):
        other = Space(weight_bits=(2, 4, 8)).domain(SITES)
        collect_subnets(accuracy, other, WEIGHTS, INPUTS, 30, resume=tmp_path / "job", job={"images": 5})
    with pytest.raises(SearchError, match="subnet 0 has the score nan"):
        collect_subnets(lambda c: np.full(len(c), np.nan), DOMAIN, WEIGHTS, INPUTS, 1)


def test_kept_scores_of_something_else_are_refused_without_a_description(tmp_path):
    calls = []

    def counted(some):
        calls.append(len(some))
        return accuracy(some)

    collect_subnets(counted, DOMAIN, WEIGHTS, INPUTS, 12, block=4, resume=tmp_path / "job")
    found = collect_subnets(counted, DOMAIN, WEIGHTS, INPUTS, 20, block=4, resume=tmp_path / "job")
    assert calls == [4] * 3 + [4] * 3 and len(found.scores) == 20, "one block again, and two new ones"
    with pytest.raises(CheckpointError, match="scores of something else"):
        collect_subnets(lambda c: accuracy(c) - 0.1, DOMAIN, WEIGHTS, INPUTS, 20, resume=tmp_path / "job")
    how = dict(settings=Genetic(8, 2, 4, 4, 1), block=4, resume=tmp_path / "direct")
    first = search_choice(accuracy, DOMAIN, WEIGHTS, INPUTS, 4.0, **how)
    assert search_choice(accuracy, DOMAIN, WEIGHTS, INPUTS, 4.0, **how).score == first.score
    with pytest.raises(CheckpointError, match="scores of something else"):
        search_choice(lambda c: 0.5 * accuracy(c), DOMAIN, WEIGHTS, INPUTS, 4.5, **how)


def test_ends_with_bits_to_choose_are_counted_and_encoded():
    free = Space((2, 4), (4, 8), (True,), (True,), (True,), ends=None).domain(SITES)
    assert free.free_ends and not DOMAIN.free_ends
    windows = Genes(free).windows(WEIGHTS, INPUTS, 4)
    spent = windows.of(Genes(free).genomes(free.uniform(2, 8))[None])[0]
    np.testing.assert_allclose(spent, [2, 8])
    one = free.uniform(2, 8)
    one[0, 0] = 4
    spent = windows.of(Genes(free).genomes(one)[None])[0]
    np.testing.assert_allclose(spent, [2 + 2 * WEIGHTS[0] / sum(WEIGHTS), 8])
    found = collect_subnets(accuracy, free, WEIGHTS, INPUTS, 16)
    ends = found.encoded[:, 6:].reshape(16, 2, 6, 7)[:, :, [0, -1]]
    assert (ends.sum(-1) == 1).all() and len(np.unique(ends[:, 0, 0], axis=0)) == 2
    assert (collect_subnets(accuracy, DOMAIN, WEIGHTS, INPUTS, 8).encoded[:, 6:13] == 0).all()


def test_uniform_bits_are_run_beside_what_a_predictor_prefers():
    """A predictor that is wrong: uniform bits measure best, and are what is returned."""
    wrong = lambda some: -accuracy(some)  # noqa: E731
    found = search_choice(wrong, DOMAIN, WEIGHTS, INPUTS, 4.0, settings=Genetic(generations=3))
    genes = found.genes
    uniform = np.array(list(uniform_choices(genes, genes.windows(WEIGHTS, INPUTS, 4.0)).values()))
    assert not any((uniform[0] == c).all() for c in found.ranked[:8])
    best, measured = best_as_run(found, accuracy, wrong, WEIGHTS, INPUTS, also=uniform)
    np.testing.assert_array_equal(best.choice, uniform[0])
    assert measured == pytest.approx(float(accuracy(uniform)[0]), rel=1e-6) and len(best.ranked) == 8 + len(uniform)
    assert (np.diff(np.asarray(accuracy(best.ranked))) <= 0).all()


@pytest.mark.slow
def test_a_fitted_predictor_and_the_search_with_it():
    """Rank correlations above the paper's, and the best of the search is the best of all choices but for a little."""
    choices, forms = draw_choices(0, DOMAIN, WEIGHTS, INPUTS, 400)
    encoded = encode_choice(choices, forms)
    fitted = fit_predictor(encoded, accuracy(choices), CQAP(epochs=100, hidden=64, layers=3, batch=64, rate=1e-3))
    assert fitted.held.pearson > 0.95 and fitted.held.kendall > 0.8 and fitted.held.count == 80
    assert fitted.rmse[fitted.epoch] == fitted.rmse.min() == pytest.approx(fitted.held.rmse, rel=1e-5)
    assert repr(fitted) == f"Fitted({fitted.held}; epoch {fitted.epoch + 1} of 100)"
    form = (True, True, True)

    def predicted(choices):
        return predict(fitted.params, encode_choice(choices, jnp.asarray(form)))

    found = search_choice(
        predicted, DOMAIN, WEIGHTS, INPUTS, 4.0, form=form, settings=Genetic(generations=20), baselines=True
    )
    against = found.baselines
    assert found.evaluations == 100 + 20 * 100 and against.count == 10 * 35, "no more are valid, so these are all"
    assert found.score == pytest.approx(against.random, abs=1e-6) and found.score >= against.uniform
    assert against.uniform_bits == (4, 4) and against.uniform_choice[:, :2].tolist() == [[8, 8], *[[4, 4]] * 4, [8, 8]]
    assert float(predicted(against.random_choice)) == pytest.approx(against.random)
    assert str(found).count("per channel, symmetric, symmetric") == 6 and "best of 350 random valid" in str(found)
    assert (
        repr(found)
        == f"Found(score {found.score:.4g}, {' / '.join(f'{v:.2f}' for v in found.average)} average bits, 6 sites)"
    )
    assert all(3.5 < v <= 4.0 + 1e-5 for v in found.average)
    np.testing.assert_array_equal(found.ranked[0], found.choice)
    ranked = np.asarray(predicted(found.ranked))
    assert 10 < len(found.ranked) == len(np.unique(found.ranked, axis=0)) and (np.diff(ranked) <= 1e-6).all()
    seen = []

    def run(some):
        seen.append(len(some))
        return np.where((some == found.ranked[3]).all(axis=(1, 2)), 1.0, np.nan)

    best, measured = best_as_run(found, run, predicted, WEIGHTS, INPUTS, block=5)
    assert measured == 1 and seen == [5] and best.score == pytest.approx(ranked[3]) and len(best.average) == 2
    np.testing.assert_array_equal(best.choice, found.ranked[3])
    again, measured = best_as_run(found, lambda some: -np.arange(len(some)), predicted, WEIGHTS, INPUTS)
    assert measured == 0 and again.score == pytest.approx(found.score) and again.average == found.average
    with pytest.raises(SearchError, match="no choice has a score that is a number"):
        best_as_run(found, lambda some: np.full(len(some), np.nan), predicted, WEIGHTS, INPUTS)
    genes = found.genes
    windows = genes.windows(WEIGHTS, INPUTS, 4.0)
    free = [np.flatnonzero(row) for row in genes.allowed]
    halves = [np.array(list(itertools.product(*free[:5]))), np.array(list(itertools.product(*free[5:])))]
    fine = [h[(c > 3.5 + 1e-6) & (c <= 4 + 1e-6)] for h, c in zip(halves, costs(halves, windows), strict=True)]
    assert [len(f) for f in fine] == [10, 35]
    every = np.concatenate([np.repeat(fine[0], 35, axis=0), np.tile(fine[1], (10, 1))], axis=1)
    assert windows.hold(every).all()
    truth = np.asarray(accuracy(genes.choice(every)))
    assert float(accuracy(found.choice)) >= np.quantile(truth, 0.95), "and among the best in truth"
    with pytest.raises(SearchError, match="average bits of weights above 1 and up to 1.5"):
        search_choice(predicted, DOMAIN, WEIGHTS, INPUTS, 1.5)


@pytest.mark.slow
def test_groups_are_read_by_the_predictor_and_a_search_has_one_of_them(tmp_path):
    space = Space((2, 4, 8), (0,), (True,), (True,), (True,), groups=(16, 32), at=(At("b/**", groups=(32,)),))
    domain = space.domain(SITES)

    def run(choices):  # short groups are better
        return 0.9 - np.exp2(-np.asarray(choices)[..., 0]).sum(-1) * 0.2 - 0.1 * np.asarray(choices)[..., 5].mean(-1)

    found = collect_subnets(run, domain, WEIGHTS, INPUTS, 16, resume=tmp_path / "job")
    assert found.groups == 2 and (found.choices[:, 2, 5] == 1).all(), "b has no groups of 16"
    assert (found.choices[::2, [0, 1, 3, 4, 5], 5] == 0).all() and (found.choices[1::2, :, 5] == 1).all()
    assert found.encoded.shape == (16, 6 + (14 + 2) * 6)
    np.testing.assert_array_equal(found.encoded[:, :90], encode_choice(found.choices, found.forms))
    tail = found.encoded[:, 90:].reshape(16, 6, 2)
    np.testing.assert_array_equal(tail, np.eye(2)[found.choices[..., 5]])
    with pytest.raises(SearchError, match="no column of groups"):
        encode_choice(found.choices[..., :5], found.forms, 2)
    for group, place in ((None, 0), (32, 1)):
        few = Genetic(10, 5, 5, 5, generations=2)
        best = search_choice(
            run, domain, WEIGHTS, INPUTS, 4.0, group=group, settings=few, baselines=True, compiled=False
        )
        assert best.choice[:, 5].tolist() == [place, place, 1, place, place, place]
        assert (best.baselines.uniform_choice[:, 5] == best.choice[:, 5]).all()
        assert (best.baselines.random_choice[:, 5] == best.choice[:, 5]).all()
    with pytest.raises(SearchError, match="16, 32"):
        search_choice(run, domain, WEIGHTS, INPUTS, 4.0, group=64)


def test_random_choices_are_valid_and_all_different():
    genes = Genes(DOMAIN)
    windows = genes.windows(WEIGHTS, INPUTS, (5.0, 5.0))
    some = random_choices(0, genes, windows, 600)
    for choice in some[:20]:
        DOMAIN.check(choice)
    assert windows.hold(genes.genomes(some)).all() and len(np.unique(some, axis=0)) == 600
    np.testing.assert_array_equal(some[:9], random_choices(0, genes, windows, 9))
    assert (random_choices(1, genes, windows, 9) != some[:9]).any()
    few = Genes(Space((2, 4), (0,), (True,), (True,), (True,)).domain(SITES))
    known = few.windows(WEIGHTS, INPUTS, 3.1, 0.8)
    every = np.array(list(itertools.product((0, 2), repeat=4)))
    count = known.hold(np.pad(every, ((0, 0), (1, 7)), constant_values=((0, 0), (6, 7)))).sum()
    assert len(random_choices(0, few, known, 100)) == count, "all there are, and then an end"
    assert list(uniform_choices(few, known)) == [(2, 0)]
    pairs = uniform_choices(genes, genes.windows(WEIGHTS, INPUTS, (3.5, 6.2)))
    assert list(pairs) == [(3, 6)], "b has 4 or 8 bits, so 4 bits everywhere are 4, and 3 are 3.1"


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

"""Standard errors and paired tests against sums written out in NumPy."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjax.errors import DataError
from qjax.evaluate import estimate, paired_test
from qjax.evaluate.paired import student_p


def t_tail(t, freedom):
    """Two-sided p-value by the trapezoidal rule over Student's density, the far tail by substitution x = t / u."""
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    density = lambda x: constant * (1 + x * x / freedom) ** (-(freedom + 1) / 2)  # noqa: E731
    x = np.linspace(0, abs(t), 200_001)
    return 1 - 2 * float(np.trapezoid(density(x), x))


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 10, 61, 200, 999])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, -1.96, 3.5])
def test_student_is_the_integral_of_its_density(t, freedom):
    assert student_p(t, freedom) == pytest.approx(t_tail(t, freedom), abs=1e-9)


def test_student_at_its_ends():
    assert student_p(1.5, 1001) == pytest.approx(student_p(1.5, 1000), rel=4e-3)
    assert student_p(0.0, 5) == 1 and student_p(1e9, 5) < 1e-12 and math.isnan(student_p(math.nan, 5))
    assert student_p(12.706204736, 1) == pytest.approx(0.05, abs=1e-9)  # the tables' 5 % points
    assert student_p(2.228138852, 10) == pytest.approx(0.05, abs=1e-9)


@given(st.integers(0, 2**31), st.integers(2, 80))
def test_units_alone_have_the_usual_error(seed, n):
    v = np.random.default_rng(seed).normal(size=n)
    found = estimate(v)
    assert found.mean == pytest.approx(v.mean()) and found.count == found.clusters == n
    assert found.stderr == pytest.approx(v.std(ddof=1) / math.sqrt(n))


@given(st.integers(0, 2**31), st.integers(10, 30))
def test_clustered_errors_are_those_of_sums(seed, groups):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 9, groups)
    cluster = np.repeat(rng.permutation(groups), sizes)
    v = rng.normal(size=len(cluster)) + rng.normal(size=groups)[cluster]
    total = 0.0
    for g in range(groups):
        total += (v[cluster == g] - v.mean()).sum() ** 2
    found = estimate(v, cluster)
    assert found.clusters == groups
    assert found.stderr == pytest.approx(math.sqrt(groups / (groups - 1) * total) / len(v))
    assert estimate(v, np.arange(len(v))).stderr == pytest.approx(estimate(v).stderr)


def test_units_that_repeat_within_clusters_count_once():
    v = np.random.default_rng(0).normal(size=40)
    assert estimate(np.repeat(v, 25), np.repeat(np.arange(40), 25)).stderr == pytest.approx(estimate(v).stderr)
    assert estimate(np.repeat(v, 25), np.repeat(np.arange(40) // 8, 25)).clusters == 1000  # too few to judge by


def test_a_paired_test_sees_what_two_means_do_not():
    rng = np.random.default_rng(1)
    hard = rng.gamma(1.0, 3.0, 2000)
    a, b = hard + 0.02 + rng.normal(size=2000) * 0.1, hard + rng.normal(size=2000) * 0.1
    d = a - b
    found = paired_test(a, b)
    t = d.mean() / (d.std(ddof=1) / math.sqrt(len(d)))
    assert (found.difference, found.test) == (pytest.approx(d.mean()), "t")
    assert found.p == pytest.approx(math.erfc(abs(t) / math.sqrt(2))) and found.p < 1e-6
    assert estimate(a).stderr > 3 * abs(found.difference)
    assert paired_test(b, a).p == found.p and paired_test(b, a).difference == -found.difference


def test_equal_and_shifted_models():
    v = np.random.default_rng(2).normal(size=50)
    assert paired_test(v, v).p == 1.0 and paired_test(v, v).difference == 0
    assert paired_test(np.zeros(5) + 0.5, np.zeros(5)).p == 0.0


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_right_and_wrong_are_mcnemars_test(pairs):
    a, b = (np.array(x) for x in zip(*pairs, strict=True))
    wins, losses = sum(x and not y for x, y in pairs), sum(y and not x for x, y in pairs)
    n = wins + losses
    outcomes = [math.comb(n, k) / 2**n for k in range(n + 1)]
    wanted = sum(p for p in outcomes if p <= outcomes[wins] * (1 + 1e-9))  # all that are no likelier than this one
    found = paired_test(a, b)
    assert found.test == "sign" and found.p == pytest.approx(min(1.0, wanted))
    assert found.difference == pytest.approx(a.mean() - b.mean())


def test_bad_units_are_refused():
    with pytest.raises(DataError, match="flat, non-empty"):
        estimate([])
    with pytest.raises(DataError, match="one each"):
        estimate(np.ones(20), np.arange(10))
    with pytest.raises(DataError, match="same units of both"):
        paired_test(np.ones(3), np.ones(4))
    with pytest.raises(DataError, match="same units of both"):
        paired_test(np.ones(3), np.ones(3, bool))
    assert math.isnan(estimate([1.0]).stderr) and math.isnan(estimate([1.0, math.nan]).mean)

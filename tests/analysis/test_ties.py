"""The union-find over signed unknowns, against solving the same equations in logarithms by hand."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.analysis.layout import pieces, reshape, tidy
from qjax.analysis.ties import Ties

PAIR = st.tuples(st.integers(0, 8), st.integers(0, 8), st.sampled_from([1, -1]))


def free_directions(n: int, equations: list[tuple[int, int, int]]) -> np.ndarray:
    """A basis of the logarithms that fulfil ``x_a = s x_b`` (x_0 is 0), as columns."""
    rows = [np.eye(n + 1)[0]]
    for a, b, s in equations:
        rows.append(np.eye(n + 1)[a] - s * np.eye(n + 1)[b])
    _, values, vectors = np.linalg.svd(np.array(rows))
    rank = int((values > 1e-9).sum())
    return vectors[rank:].T


@settings(max_examples=80, deadline=None)
@given(st.lists(PAIR, max_size=12), st.booleans())
def test_against_linear_algebra(equations, at_once):
    ties = Ties()
    codes = np.concatenate([[0], ties.fresh((8,))])
    if at_once and equations:
        a, b, s = np.array(equations).T
        ties.equal(codes[a], codes[b] * s, 7)
    else:
        for a, b, s in equations:
            ties.equal(codes[a : a + 1], codes[b : b + 1] * s, 7)
    basis = free_directions(8, equations)
    roots = ties.resolve(codes)
    assert len(set(np.abs(roots)) - {0}) == basis.shape[1]
    for i in range(9):
        assert (roots[i] == 0) == bool(np.abs(basis[i]).max(initial=0) < 1e-9)
        if roots[i] == 0 and i:
            assert ties.why(codes[i : i + 1]) == 7
        for j in range(9):
            if roots[i]:
                assert (roots[i] == roots[j]) == np.allclose(basis[i], basis[j])
                assert (roots[i] == -roots[j]) == np.allclose(basis[i], -basis[j])


def test_reasons_stay_with_what_they_fixed():
    ties = Ties()
    a, b, c = ties.fresh((3, 1))
    ties.fix(a, 1)
    ties.fix(b, 2)
    ties.equal(a, b, 3)
    ties.equal(b, c, 4)
    assert (ties.why(a), ties.why(b), ties.why(c)) == (1, 2, 2)


def test_many_unknowns():
    ties = Ties()
    codes = ties.fresh((4, 5000))
    ties.equal(codes, codes[:1], 1)
    assert len(np.unique(ties.resolve(codes))) == 5000
    ties.equal(codes[0], codes[0, ::-1], 1)
    assert len(np.unique(ties.resolve(codes))) == 2500


SHAPES = st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4)


@settings(max_examples=80, deadline=None)
@given(SHAPES, st.randoms(use_true_random=False))
def test_reshapes_of_compact_arrays(source, random):
    size = int(np.prod(source))
    factors = [d for n in source for d in ([2, 2] if n == 4 else [n])]
    random.shuffle(factors)
    target = []
    for f in factors:
        if target and random.random() < 0.4:
            target[-1] *= f
        else:
            target.append(f)
    compact = [n if random.random() < 0.5 else 1 for n in source]
    codes = 1 + np.arange(int(np.prod(compact)), dtype=np.int32).reshape(compact)
    full = np.broadcast_to(codes, source).reshape(target)
    got = reshape(codes, source, target)
    assert np.array_equal(np.broadcast_to(got, target), full)
    assert np.array_equal(got, tidy(got))
    ends = pieces(source, target)
    assert sum(len(a) for a, _ in ends) == len(source) and sum(len(b) for _, b in ends) == len(target)
    assert size == full.size

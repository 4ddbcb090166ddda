"""Hadamard matrices and the transform along rows, against dense matrices in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax import ops
from qjax.errors import LayoutError
from qjax.formats import SIGNS, SMOOTH, QArray, concatenate, hadamard, quantize_array
from qjax.formats.integer import Int
from qjax.formats.rotation import kept_as, matrix, prepared, random_signs, restored, rotate, rotate_on_host, unrotate


def test_every_order_is_a_hadamard_matrix():
    """±1 and H Hᵀ = n I, in exact integers."""
    orders = [n for n in range(1, 257) if hadamard.is_order(n)]
    for n in orders:
        h = hadamard.hadamard(n)
        assert h.shape == (n, n) and (np.abs(h) == 1).all()
        np.testing.assert_array_equal(h @ h.T, n * np.eye(n))
    # Sylvester, Paley I over primes and 27 = 3³, Paley II over primes and 9, 25, 49
    assert {1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 44, 48, 52, 60, 64, 72, 76, 84, 100, 108, 128, 148} <= set(orders)
    assert not {3, 6, 10, 14, 172} & set(orders)
    np.testing.assert_array_equal(hadamard.hadamard(344) @ hadamard.hadamard(344).T, 344 * np.eye(344))  # 7³ + 1
    with pytest.raises(ValueError, match="no Hadamard matrix of order 92"):
        hadamard.hadamard(92)


@pytest.mark.parametrize(
    "length", [64, 192, 384, 768, 896, 1536, 2304, 3072, 3584, 4096, 4864, 5120, 5632, 8960, 11008, 13824, 14336, 18944]
)
def test_widths_of_real_models_have_one(length):
    assert hadamard.spreads(length) and hadamard.blocked(length) == length
    assert np.prod(hadamard.factors(length)) == length


def test_widths_that_have_none():
    """The odd part gets a Hartley matrix; beyond `LONGEST` there are blocks."""
    assert hadamard.factors(172) == (4, 43) and not hadamard.spreads(172)
    h = hadamard.exact(43)
    np.testing.assert_allclose(h @ h.T, np.eye(43), atol=1e-12)
    assert np.abs(h).max() <= np.sqrt(2 / 43) + 1e-12
    assert hadamard.blocked(1031 * 4) == 4 and not hadamard.spreads(1031 * 4)
    assert hadamard.blocked(1031) == 1
    with pytest.raises(ValueError, match="above 512"):
        hadamard.factors(1031)


@settings(max_examples=10, deadline=None)
@given(
    width=st.sampled_from([1, 2, 3, 4, 7, 8, 12, 20, 24, 43, 48, 64, 96, 172, 4 * 521]),
    blocks=st.integers(1, 3),
    rows=st.integers(0, 4),
    stack=st.sampled_from([(), (2,), (2, 3)]),
    seed=st.none() | st.integers(0, 2**40),
)
def test_the_transform_is_the_dense_matrix(width, blocks, rows, stack, seed):
    signs = random_signs(width, seed)
    r = matrix(signs)
    np.testing.assert_allclose(r @ r.T, np.eye(width), atol=1e-12)
    x = np.random.default_rng(width).standard_normal((*stack, rows, blocks * width)).astype(np.float32)
    want = (x.astype(np.float64).reshape(*x.shape[:-1], blocks, width) @ r).reshape(x.shape)
    given_signs = np.broadcast_to(signs, (*stack, 1, width))
    got = rotate(x, given_signs)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=2e-6 * np.sqrt(width) + 1e-6)
    np.testing.assert_allclose(rotate_on_host(x.astype(np.float64), signs), want, atol=1e-12 * width)
    np.testing.assert_allclose(unrotate(got, given_signs), x, atol=4e-6 * np.sqrt(width) + 1e-6)


def test_dtypes_and_jit_and_derivatives():
    signs = random_signs(48)
    x = np.random.default_rng(0).standard_normal((5, 48)).astype(np.float32)
    low = rotate(jnp.asarray(x, jnp.bfloat16), signs)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(np.float32), x @ matrix(signs), atol=0.05)
    # of a linear map: its transpose, which is its inverse
    _, back = jax.vjp(jax.jit(lambda x: rotate(x, signs)), jnp.asarray(x))
    np.testing.assert_allclose(back(rotate(x, signs))[0], x, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(lambda x: rotate(x[None], signs)[0])(x), rotate(x, signs), atol=1e-6)


def test_signs_are_balanced_and_depend_on_the_seed():
    for width in (64, 1000, 4096):
        signs = random_signs(width, 3)
        assert signs.dtype == np.int8 and set(np.unique(signs)) == {-1, 1} and abs(signs.mean()) < 5 / np.sqrt(width)
        assert (signs != random_signs(width, 4)).any() and (signs == random_signs(width, 3)).all()
    assert (random_signs(8, None) == 1).all()


def test_outliers_are_spread():
    """One channel a hundred times the others: the largest number of a row falls to a few times their mean square."""
    x = np.random.default_rng(0).standard_normal((256, 384)).astype(np.float32)
    x[:, 7] *= 100
    ratio = lambda a: np.abs(a).max(-1) / np.sqrt((a**2).mean(-1))  # noqa: E731
    turned = np.asarray(rotate(x, random_signs(384)))
    assert np.median(ratio(x)) > 15 and np.median(ratio(turned)) < 3.5


def kept(k: int = 16, n: int = 6, width: int | None = None, smooth: bool = False) -> tuple[QArray, np.ndarray]:
    """A weight [k, n] that is kept rotated, and what it stands for."""
    rng = np.random.default_rng(1)
    w = rng.standard_normal((n, k)).astype(np.float32)
    aux = {SIGNS: random_signs(width or k)[None]}
    if smooth:
        aux[SMOOTH] = np.exp(rng.standard_normal((1, k))).astype(np.float32)
    q = quantize_array(kept_as(w, aux).T, Int(8, group=4), in_axes=0)
    aux = {**q.aux, **{name: jnp.asarray(a) for name, a in aux.items()}}
    return QArray(q.codes, aux, q.fmt, q.layout, q.dtype), w.T


@pytest.mark.parametrize("smooth", [False, True])
def test_what_is_kept_stands_for_the_weight(smooth):
    q, w = kept(smooth=smooth)
    np.testing.assert_allclose(q.dequantize(), w, atol=0.05 if smooth else 0.02)
    # the product with prepared activations is the product with the weight
    x = np.random.default_rng(2).standard_normal((3, 16)).astype(np.float32)
    plain = q.fmt.decode(q.unpacked(), q.aux)
    np.testing.assert_allclose(prepared(x, q.aux) @ plain.T, x @ np.asarray(q.dequantize()), atol=1e-4)
    np.testing.assert_allclose(restored(kept_as(w.T, q.aux), q.aux), w.T, atol=1e-5)


def test_a_product_of_what_is_kept_wants_prepared_activations():
    q, w = kept()
    x = np.random.default_rng(2).standard_normal((3, 16)).astype(np.float32)
    with pytest.raises(LayoutError, match=r"kept rotated \(input.signs\)"):
        ops.q_dot(x, q)
    bare = QArray(q.codes, {k: a for k, a in q.aux.items() if k != SIGNS}, q.fmt, q.layout, q.dtype)
    np.testing.assert_allclose(ops.q_dot(prepared(x, q.canonical().aux), bare), x @ w, atol=0.1)


def test_views_carry_the_signs():
    q, _ = kept()
    near = np.asarray(q.dequantize())
    same = lambda view, want: np.testing.assert_allclose(view.dequantize(), want, atol=1e-6)  # noqa: E731
    same(q.T, near.T)
    same(q.slice_axis(1, 2, 5), near[:, 2:5])
    same(q.take(1, jnp.array([5, 0])), near[:, [5, 0]])
    same(q.reshape(4, 4, 6), near.reshape(4, 4, 6))
    same(q.reshape(16, 2, 3), near.reshape(16, 2, 3))
    with pytest.raises(LayoutError, match="rotated in blocks of 16, which mixes"):
        q.slice_axis(0, 4, 12)
    with pytest.raises(LayoutError, match="rotated by signs of its own"):
        concatenate([q, q], axis=1)
    parts, whole = kept(width=4)[0], np.asarray(kept(width=4)[0].dequantize())
    same(parts.slice_axis(0, 4, 12), whole[4:12])
    with pytest.raises(LayoutError, match="cannot be cut"):
        rotate(np.ones((2, 6)), random_signs(4))

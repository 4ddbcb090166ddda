"""SparseGPT against the algorithm written column by column in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qjax
from qjax.errors import FormatError, RecipeError
from qjax.formats import Sparse24


def inputs(rows: int, k: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, k)) @ rng.standard_normal((k, k)) * np.exp(0.5 * rng.standard_normal(k))


@functools.partial(jax.jit, static_argnums=(2, 3))
def rounded(w, moment, rounding, fmt):
    codes, aux = rounding.round(w, fmt, statistics={"second_moment": moment, "rows": jnp.float32(1)})
    return codes, aux, fmt.decode(codes, aux)


def reference(w: np.ndarray, h: np.ndarray, rounding: qjax.SparseGPT, fmt: Sparse24) -> np.ndarray:
    """Decoded weights: masks four columns at a time, then each column rounded, pruned and its error carried on."""
    n, k = w.shape
    h = h / np.mean(np.diag(h)) + rounding.dampening_frac * np.eye(k)
    group = fmt.group or k
    now, out = w.astype(np.float64).copy(), np.zeros((n, k))
    inverse, left = np.linalg.inv(h), list(range(k))
    scale, keep = np.zeros(n), np.zeros((n, k), bool)
    for i in range(k):
        if i % group == 0:
            scale = np.abs(now[:, i : i + group]).max(1) / 7.5
        if i % 4 == 0:
            four = range(i, min(i + 4, k))
            # [H^-1]_jj of the columns from j on: the inverse of the trailing block of H
            pivots = [np.linalg.inv(h[j:, j:])[0, 0] for j in four]
            worth = now[:, i : i + 4] ** 2 / np.array(pivots)
            for row, best in enumerate(np.argsort(-worth, 1, kind="stable")[:, :2]):
                keep[row, i + best] = True
        value = np.clip(np.rint(now[:, i] / scale), -8, 7) * scale
        out[:, i] = np.where(keep[:, i], value, 0)
        now[:, left] -= np.outer((now[:, i] - out[:, i]) / inverse[0, 0], inverse[0])
        inverse = (inverse - np.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
        left = left[1:]
    return out


@settings(max_examples=15, deadline=None)
@given(group=st.sampled_from([None, 8]), size=st.sampled_from([12, 128]), seed=st.integers(0, 20))
def test_equals_the_algorithm(group, size, seed):
    n, k = 5, 22
    w = np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)
    x = inputs(4 * k, k, seed)
    fmt, rounding = Sparse24(4, group, scale_dtype="float32"), qjax.SparseGPT(block_size=size)
    codes, _, got = map(np.asarray, rounded(w, jnp.asarray(x.T @ x, jnp.float32), rounding, fmt))
    want = reference(w, x.T @ x, rounding, fmt)
    loss = lambda q: np.linalg.norm(x @ (q - w).T) / np.linalg.norm(x @ w.T)  # noqa: E731
    # float32 may take the other code at a tie, after which columns differ; the loss says whether it is as good
    assert np.mean(np.abs(got - want) > 1e-3) < 0.02 or loss(got) < 1.1 * loss(want) + 1e-4
    full = np.pad(codes, ((0, 0), (0, -k % 4))).reshape(n, -1, 4)
    assert ((full != 0).sum(-1) <= 2).all()


def test_two_of_four_are_kept_and_the_product_better_than_by_magnitude():
    k = 64
    w = np.random.default_rng(1).standard_t(4, (24, k)).astype(np.float32)
    x, fmt = inputs(300, k, 2), Sparse24(4, 16)
    loss = lambda q: np.linalg.norm(x @ (np.asarray(q) - w).T)  # noqa: E731
    h = jnp.asarray(x.T @ x, jnp.float32)
    codes, aux, near = rounded(w, h, qjax.SparseGPT(), fmt)
    assert aux["scale"].dtype == jnp.float16
    kept = (np.asarray(codes).reshape(24, -1, 4) != 0).sum(-1)
    assert kept.max() == 2 and kept.mean() > 1.6  # a kept weight may still round to 0
    magnitude = fmt.decode(*qjax.RTN().round(w, fmt))
    assert loss(near) < 0.85 * loss(magnitude)
    eight = rounded(w, h, qjax.SparseGPT(), Sparse24(8, 16))
    assert ((np.asarray(eight[0]).reshape(24, -1, 4) != 0).sum(-1) == 2).mean() > 0.97
    assert loss(eight[2]) < loss(near)


@pytest.mark.every(2)
@pytest.mark.parametrize("fmt", [Sparse24(4, 8), Sparse24(8, None)])
def test_independent_inputs_are_pruned_by_magnitude(fmt):
    w = np.random.default_rng(0).standard_normal((5, 32)).astype(np.float32)
    codes, aux, _ = rounded(w, jnp.eye(32), qjax.SparseGPT(dampening_frac=0.0), fmt)
    want, want_aux = qjax.RTN().round(w, fmt)
    np.testing.assert_array_equal(codes, want)
    np.testing.assert_array_equal(aux["scale"], want_aux["scale"])


def test_dead_inputs_are_pruned_first_and_matrices_without_rank_are_served():
    k, fmt = 24, Sparse24(8, None)
    rng = np.random.default_rng(3)
    w = rng.standard_normal((4, k)).astype(np.float32)
    w[:, 4:6] = 100  # large, and never met by an input
    x = rng.standard_normal((10, k))  # fewer rows than columns
    x[:, 4:6] = 0
    codes, _, near = rounded(w, jnp.asarray(x.T @ x, jnp.float32), qjax.SparseGPT(), fmt)
    assert np.isfinite(near).all() and not np.asarray(codes)[:, 4:6].any()
    nothing = rounded(w, jnp.zeros((k, k)), qjax.SparseGPT(), fmt)
    np.testing.assert_array_equal(nothing[0], qjax.RTN().round(w, fmt)[0])


def test_settings_that_cannot_be():
    for bad in ({"sparsity": "4:8"}, {"dampening_frac": 1.0}, {"block_size": 2}, {"observer": "mse"}):
        with pytest.raises(FormatError, match="SparseGPT"):
            qjax.SparseGPT(**bad)
    moment = {"second_moment": np.eye(32)}
    with pytest.raises(FormatError, match="does not store"):
        qjax.SparseGPT().round(np.ones((2, 32), np.float32), qjax.Int(4), statistics=moment)
    with pytest.raises(FormatError, match="needs statistics"):
        qjax.SparseGPT().round(np.ones((2, 32), np.float32), Sparse24(4, 8))
    with pytest.raises(FormatError, match="group of 6"):
        qjax.SparseGPT().round(np.ones((2, 32), np.float32), Sparse24(4, 6), statistics=moment)
    with pytest.raises(RecipeError, match="group of 6"):  # when the rule is built, and not after the batches have run
        qjax.Rule("**", weights=Sparse24(4, 6), rounding=qjax.SparseGPT())


def test_recipes_survive_toml_and_models_are_pruned():
    rounding = qjax.SparseGPT(block_size=64)
    recipe = qjax.Recipe([qjax.Rule("**", weights=Sparse24(4, 16), rounding=rounding)])
    assert qjax.Recipe.from_dict(recipe.to_dict()).rules[0].rounding == rounding
    x = jnp.asarray(inputs(64, 32, 0), jnp.float32)
    p = {"layers": jnp.asarray(np.random.default_rng(0).standard_normal((2, 32, 32)) / 6, jnp.float32)}

    def fn(p, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"])[0]

    model = qjax.quantize(fn, p, recipe=recipe, batches=[(x,)])
    codes = np.asarray(model.params["layers"].unpacked())
    assert ((codes.reshape(-1, 4) != 0).sum(-1) <= 2).all()
    plain = qjax.quantize(fn, p, x, recipe=qjax.Recipe([qjax.Rule("**", weights=Sparse24(4, 16))]))
    off = lambda m: float(jnp.linalg.norm(m(m.params, x) - fn(p, x)))  # noqa: E731
    assert off(model) < off(plain)

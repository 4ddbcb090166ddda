"""Rounding to 2-bit and 4-bit strips against optimal brain surgery in float64, and what it promises."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import mixed_oracle as oracle
import numpy as np
import pytest

import qjax
from qjax.errors import FormatError
from qjax.formats import MixedBits

N, K = 20, 160
PURE, SPARSE = MixedBits(0, select="global"), MixedBits(outliers=0.01)


def inputs(rows: int, k: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, k)) @ rng.standard_normal((k, k)) * np.exp(0.5 * rng.standard_normal(k))


@functools.partial(jax.jit, static_argnums=(2, 3))
def rounded(w, moment, rounding, fmt):
    return rounding.round(w, fmt, statistics={"second_moment": moment, "rows": jnp.float32(1)})


decoded = jax.jit(lambda codes, aux, fmt: fmt.decode(codes, aux), static_argnums=2)


def moment(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x.T @ x, jnp.float32)


W = np.random.default_rng(0).standard_t(5, (N, K)).astype(np.float32)
X = inputs(400, K, 1)


def loss(q, x=X, w=W) -> float:
    return float(np.linalg.norm(x @ (np.asarray(q) - w).T) / np.linalg.norm(x @ w.T))


def surgery(w, h, scale, zero, top, where, one, dampening=0.01):
    """Each column rounded on a fixed grid, its error carried on through the inverse of H, which then loses it."""
    k = w.shape[1]
    inverse = np.linalg.inv(h / np.mean(np.diag(h)) + dampening * np.eye(k))
    now, out = w.astype(np.float64).copy(), np.zeros(w.shape)
    for i in range(k):
        step = np.where(scale[:, i] > 0, scale[:, i], 1)
        near = (np.clip(np.rint(now[:, i] / step) + zero[:, i], 0, top[i]) - zero[:, i]) * scale[:, i]
        rest = ((now[:, i] - near) / one).astype(np.float16) * one
        out[:, i] = np.where(where[:, i], near + rest, near)
        now[:, i:] -= np.outer((now[:, i] - out[:, i]) / inverse[0, 0], inverse[0])
        inverse = (inverse - np.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    return out


@pytest.mark.every(2)
@pytest.mark.parametrize("fmt", [PURE, SPARSE], ids=lambda f: f.name)
def test_feedback_equals_the_algorithm(fmt):
    codes, aux = rounded(W, moment(X), qjax.TwoBit(), fmt)
    where = np.zeros((N, K), bool)
    if "outlier_row" in aux:
        rows = np.asarray(aux["outlier_row"])[0].astype(int)
        where[np.repeat(np.arange(N), np.diff(rows)), np.asarray(aux["outlier_column"])[0]] = True
    grid = (np.asarray(a, np.float64) for a in jax.jit(lambda aux: fmt.grid(aux, N, K))(aux))
    want = surgery(W, X.T @ X, *grid, where, oracle.unit(W))
    got = np.asarray(decoded(codes, aux, fmt))
    # float32 may take the other code at a tie, after which the rest of the row differs
    assert np.mean(np.abs(got - want) > 1e-3) < 0.02 or loss(got) < 1.02 * loss(want)
    if where.any():
        assert not where[:, np.repeat(np.asarray(fmt.is_wide(aux, K)), 16)[:K]].any()


@pytest.mark.parametrize("sensitivity", ["hessian", "range", "inverse"])
def test_strips_are_chosen_as_the_formulas_say(sensitivity):
    h = X.T @ X
    diagonal = np.diag(h) / np.mean(np.diag(h)) + 0.01
    if sensitivity == "inverse":
        inverse = np.diag(np.linalg.inv(h / np.mean(np.diag(h)) + 0.01 * np.eye(K)))
        scores = (W.astype(np.float64) ** 2 / inverse).sum(0).reshape(-1, 16).sum(1)
    else:
        scores = oracle.sensitivity(W, 16, K // 16, diagonal if sensitivity == "hessian" else None)
    rounding = qjax.TwoBit(sensitivity, feedback=False)
    fmt = MixedBits(0.3, select="global")
    codes, aux = rounded(W, moment(X), rounding, fmt)
    wide = oracle.most_sensitive(scores, 3, K, 16)
    np.testing.assert_array_equal(fmt.is_wide(aux, K), wide)
    np.testing.assert_allclose(decoded(codes, aux, fmt), oracle.quantized(W, wide), atol=1e-5)


def test_independent_inputs_are_rounded_to_nearest():
    codes, aux = rounded(W, jnp.eye(K), qjax.TwoBit(), SPARSE)
    want_codes, want = jax.jit(lambda w: qjax.RTN().round(w, SPARSE))(W)
    np.testing.assert_array_equal(codes, want_codes)
    jax.tree.map(np.testing.assert_array_equal, dict(aux), dict(want))


def test_errors_of_outputs_are_ordered():
    """Feedback helps, and so do 4-bit strips with outliers."""

    def after(fmt, rounding):
        return loss(decoded(*rounded(W, moment(X), rounding, fmt), fmt))

    assert after(SPARSE, qjax.TwoBit()) < 0.9 * after(PURE, qjax.TwoBit())
    assert after(PURE, qjax.TwoBit()) < 0.9 * after(PURE, qjax.TwoBit(feedback=False))


def test_columns_that_are_never_used_and_a_moment_that_is_zero():
    x = X.copy()
    x[:, 5] = 0
    x[:, 7] = x[:, 6]
    for h in (moment(x), jnp.zeros((K, K))):
        for fmt, rounding in ((SPARSE, qjax.TwoBit()), (PURE, qjax.TwoBit(dampening_frac=0.001))):
            near = np.asarray(decoded(*rounded(W, h, rounding, fmt), fmt))
            assert np.isfinite(near).all() and np.abs(near[:, 5] - W[:, 5]).max() < np.abs(W).max()


@pytest.mark.slow
def test_stacked_layers_by_a_recipe():
    """Layers of a scan, each with its own statistics, strips and outliers; told by TOML."""
    rng = np.random.default_rng(0)
    params = {"w": rng.standard_t(4, (2, 80, 80)).astype(np.float32) / 9}

    def fn(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w) + 0.1 * x, None), x, p["w"])[0]

    rule = qjax.Rule("**", weights=MixedBits(outliers=0.01), rounding=qjax.TwoBit("range", block_size=32))
    recipe = qjax.Recipe.from_toml(qjax.Recipe([rule]).to_toml())
    assert recipe.rules[0].rounding == rule.rounding and recipe.rules[0].weights == rule.weights
    batches = [(jnp.asarray(inputs(64, 80, s), jnp.float32),) for s in range(2)]
    model = qjax.quantize(fn, params, recipe=recipe, batches=batches)
    q = model.params["w"]
    assert isinstance(q, qjax.QArray) and q.aux["strips"].shape == (2, 1, 1)
    near = np.asarray(q.dequantize())
    np.testing.assert_allclose(model(model.params, batches[0][0]), fn({"w": near}, batches[0][0]), atol=1e-4)
    assert 0.01 < np.mean((near - params["w"]) ** 2) / np.mean(params["w"] ** 2) < 0.5
    assert model.report.text()


def test_settings_that_cannot_be():
    for bad in ({"sensitivity": "hesian"}, {"feedback": 1}, {"dampening_frac": 1.0}, {"block_size": 0}):
        with pytest.raises(FormatError, match="TwoBit"):
            qjax.TwoBit(**bad)
    statistics = {"second_moment": np.eye(K)}
    with pytest.raises(FormatError, match=r"MixedBits.*use GPTQ"):
        qjax.TwoBit().round(W, qjax.Int(2, group=64), statistics=statistics)
    with pytest.raises(FormatError, match="leave it out"):
        qjax.TwoBit().round(W, SPARSE, observer=qjax.MSE(), statistics=statistics)
    with pytest.raises(FormatError, match="needs statistics"):
        qjax.TwoBit().round(W, SPARSE)
    with pytest.raises(FormatError, match="share more than a scale"):
        qjax.GPTQ().round(W, SPARSE, statistics=statistics)

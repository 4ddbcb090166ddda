"""QoQ's rounding: clipping by brute force on activations, error feedback column by column, both in float64."""

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
from qjax.formats import NF4, Int, Progressive

CHANNEL = Int(4, symmetric=False)


def inputs(rows: int, k: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, k)) @ rng.standard_normal((k, k)) * np.exp(0.5 * rng.standard_normal(k))


@functools.partial(jax.jit, static_argnums=(2, 3))
def rounded(w, x, rounding, fmt):
    h = jnp.matmul(x.T, x, precision="highest")
    codes, aux = rounding.round(w, fmt, statistics={"second_moment": h, "rows": jnp.float32(len(x))})
    return codes, aux, fmt.decode(codes, aux)


def loss(near, w, x) -> np.ndarray:
    """Squared output error of each row."""
    return (((np.asarray(near, np.float64) - w) @ x.T) ** 2).sum(1)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99))
def test_clipping_is_the_best_of_its_candidates(seed):
    w = np.random.default_rng(seed).standard_t(3, (6, 16)).astype(np.float32)
    x = inputs(60, 16, seed).astype(np.float32)
    _, aux, near = rounded(w, x, qjax.QoQ(error_feedback=False), CHANNEL)
    found, tried = loss(near, w, x), []
    for i in range(81):
        alpha = 1 - 0.8 * i / 80
        low, high = alpha * np.minimum(w.min(1), 0).astype(np.float64), alpha * np.maximum(w.max(1), 0)
        scale = ((high - low) / 15)[:, None]
        zero = np.clip(np.rint(-low[:, None] / scale), 0, 15)
        tried.append(loss((np.clip(np.rint(w / scale) + zero, 0, 15) - zero) * scale, w, x))
    assert (found <= np.min(tried, axis=0) * 1.01 + 1e-9).all()
    assert (found <= tried[0] * (1 + 1e-4)).all()  # 1 is among them


def feedback(w, x, aux, encode) -> np.ndarray:
    """Optimal brain surgeon, column by column, with scales that stay: decoded weights."""
    k = w.shape[1]
    h = x.astype(np.float64).T @ x
    h = h / np.mean(np.diag(h)) + 0.01 * np.eye(k)
    now, out, left = w.astype(np.float64).copy(), np.zeros(w.shape), list(range(k))
    inverse = np.linalg.inv(h)
    for i in range(k):
        out[:, i] = encode(now[:, i], i)
        now[:, left] -= np.outer((now[:, i] - out[:, i]) / inverse[0, 0], inverse[0])
        inverse = (inverse - np.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
        left = left[1:]
    return out


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99), loud=st.sampled_from([1.0, 20.0]))
def test_error_feedback_with_scales_that_stay(seed, loud):
    w = np.random.default_rng(seed).standard_normal((5, 20)).astype(np.float32)
    w[:, :8] *= loud
    x = inputs(80, 20, seed).astype(np.float32)
    fmt = Progressive(8, scale_dtype="float32")  # the last group is shorter
    codes, aux, near = rounded(w, x, qjax.QoQ(), fmt)
    jax.tree.map(np.testing.assert_array_equal, dict(aux), dict(jax.jit(fmt.fit)(w)))
    s0, s1, z = (np.asarray(aux[n], np.float64) for n in ("scale", "step", "zero"))

    def encode(column, i):
        w8 = np.clip(column / s0[:, 0], -119, 119)  # what feedback moved out of the protective range comes back
        return (np.clip(np.rint(w8 / s1[:, i // 8]) + z[:, i // 8], 0, 15) - z[:, i // 8]) * s1[:, i // 8] * s0[:, 0]

    want = feedback(w, x, aux, encode)
    # float32 may take the other code at a tie, after which columns differ; the loss says whether it is as good
    same = np.abs(np.asarray(near) - want) < 1e-3 * np.abs(w).max()
    assert same.mean() > 0.95 or loss(near, w, x).sum() < 1.05 * loss(want, w, x).sum()
    numbers = np.asarray(fmt.as_int8(codes, aux)[0], np.int32)
    assert np.abs(numbers).max() <= 127


def test_orders():
    """Groups before channels, feedback before rounding to nearest, clipping before none; by output error."""
    w = np.random.default_rng(1).standard_t(4, (24, 64)).astype(np.float32)
    x = inputs(300, 64, 2).astype(np.float32)
    total = lambda rounding, fmt: loss(rounded(w, x, rounding, fmt)[2], w, x).sum()  # noqa: E731
    group = Progressive(16)
    nearest = qjax.QoQ(clip=False, error_feedback=False)
    assert total(qjax.QoQ(), group) < 0.6 * total(nearest, group)
    assert total(qjax.QoQ(clip=True, error_feedback=False), group) < total(nearest, group)
    assert total(qjax.QoQ(error_feedback=False), CHANNEL) < total(nearest, CHANNEL)
    assert total(qjax.QoQ(), CHANNEL) < total(qjax.QoQ(clip=False), CHANNEL)
    assert total(qjax.QoQ(), group) < total(qjax.QoQ(), CHANNEL)
    plain = qjax.RTN().round(jnp.asarray(w), group)
    jax.tree.map(np.testing.assert_array_equal, plain, rounded(w, x, nearest, group)[:2])


def test_an_observer_goes_before_the_search():
    w = jnp.asarray(np.random.default_rng(0).standard_normal((4, 16)), jnp.float32)
    found = {"second_moment": jnp.eye(16), "rows": jnp.float32(1)}
    run = jax.jit(lambda w: qjax.QoQ().round(w, CHANNEL, observer=qjax.MSE(), statistics=found)[1])
    jax.tree.map(np.testing.assert_array_equal, dict(run(w)), dict(jax.jit(lambda w: qjax.MSE().fit(w, CHANNEL))(w)))


def test_what_it_refuses():
    for bad in ({"clip": "yes"}, {"grid": 0}, {"dampening_frac": 2.0}, {"actorder": "best"}):
        with pytest.raises(FormatError, match=r"QoQ:|GPTQ:"):
            qjax.QoQ(**bad)
    for fmt in (NF4(), Int(4, per="tensor")):
        with pytest.raises(FormatError, match=f"not {fmt.name}"):
            qjax.QoQ().round(np.ones((2, 64), np.float32), fmt, statistics={})
    with pytest.raises(RecipeError, match="not nf4 g64"):
        qjax.Rule("**", weights=NF4(), rounding=qjax.QoQ())
    with pytest.raises(RecipeError, match="not those of int4 per channel"):
        qjax.Rule("**", weights=Int(4), rounding=qjax.DGQ())
    few = {"second_moment": np.eye(8), "rows": np.float32(3)}
    assert "3 rows" in next(qjax.QoQ().doubts(few))[1] and not list(qjax.QoQ(error_feedback=False).doubts(few))
    with pytest.raises(FormatError, match="needs statistics"):
        qjax.QoQ().round(np.ones((2, 64), np.float32), CHANNEL)


@pytest.mark.every(2)
@pytest.mark.parametrize("name", ["W4A8", "DGQ", "QOQ_G128", "QOQ"])
def test_presets(name):
    rng = np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.standard_normal((256, 24)) / 16, jnp.float32)}
    fn = lambda p, x: x @ p["a"]  # noqa: E731
    batches = [(jnp.asarray(inputs(300, 256, s) / 16, jnp.float32),) for s in range(2)]
    recipe = qjax.recipe(name)
    assert qjax.Recipe.from_dict(recipe.to_dict()) == recipe
    given_ = {"batches": batches} if recipe.needs_batches else {}
    model = qjax.quantize(fn, params, *(() if given_ else batches[0]), recipe=recipe, **given_)
    x = batches[0][0]
    want, got = np.asarray(fn(params, x)), np.asarray(model(model.params, x))
    assert np.linalg.norm(got - want) < 0.12 * np.linalg.norm(want)
    assert "int_dot" in str(model.explain("a"))

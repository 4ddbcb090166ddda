"""The formats of the study by its own checks: casts, ranges, roundings and scales per token."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qjax

RNG = np.random.default_rng(0)


def stored(name, w):
    """What a preset stores of a matrix [N, K], and its scales [N, groups]."""
    rule = qjax.recipe(name).rules[-1]
    fmt = rule.weights
    aux = rule.rounding.observer.fit(jnp.asarray(w), fmt) if getattr(rule.rounding, "observer", None) else fmt.fit(w)
    return np.asarray(fmt.decode(fmt.encode(jnp.asarray(w), aux), aux)), np.asarray(aux["scale"])


def test_fp8_weights_are_scaled_by_448_and_cast():
    w = RNG.normal(size=(16, 40)).astype(np.float32)
    q, scale = stored("W8A8_FP", w)
    np.testing.assert_allclose(scale, np.abs(w).max(1, keepdims=True) / 448, rtol=1e-6)
    normal = np.abs(w) >= scale * 2.0**-6  # e4m3's least normal number
    assert (np.abs(q - w)[normal] <= np.abs(w)[normal] * 2.0**-4).all()
    tops = np.argmax(np.abs(w), axis=1)
    np.testing.assert_allclose(q[np.arange(16), tops], w[np.arange(16), tops], rtol=1e-6)  # 448 -> 448
    again, _ = stored("W8A8_FP", q)
    np.testing.assert_allclose(again, q, rtol=1e-6)


def test_int8_weights_are_scaled_by_127():
    w = RNG.normal(size=(16, 40)).astype(np.float32)
    q, scale = stored("W8A8_INT", w)
    np.testing.assert_allclose(scale, np.abs(w).max(1, keepdims=True) / 127, rtol=1e-6)
    assert (np.abs(q - w) <= scale / 2 * (1 + 1e-5)).all()


def test_int4_ranges_are_those_of_an_exhaustive_search():
    """The least sum |w - q|^2.4 over shrinks 1, 0.99 .. 0.81, group by group; never worse than the whole range."""
    w = (RNG.standard_t(3, size=(6, 256))).astype(np.float32)
    q, scale = stored("W4A16_INT", w)
    for row in range(6):
        for g in range(2):
            part = w[row, 128 * g : 128 * (g + 1)].astype(np.float64)
            losses = []
            for p in 1 - np.arange(20) / 100:
                s = p * np.abs(part).max() / 7.5
                losses.append((np.abs(part - np.clip(np.round(part / s), -8, 7) * s) ** 2.4).sum())
            ours = (np.abs(part - q[row, 128 * g : 128 * (g + 1)]) ** 2.4).sum()
            assert ours <= losses[0] * (1 + 1e-5) and ours == pytest.approx(min(losses), rel=1e-3)
            assert 0.8 <= scale[row, g] / (np.abs(part).max() / 7.5) <= 1 + 1e-6


@given(st.integers(-6, 6), st.sampled_from(["W8A8_INT", "W8A8_FP"]))
def test_a_scaled_token_scales_its_outputs_exactly(exponent, name):
    """Scales per token follow the token: powers of two are exact to the bit, and a row of zeros stays zeros."""
    x = np.random.default_rng(1).normal(size=(5, 48)).astype(np.float32)
    x[2] = 0
    factors = np.where(np.arange(5) % 2 == 0, 2.0**exponent, 1.0).astype(np.float32)[:, None]
    outputs = MODELS[name]
    np.testing.assert_array_equal(np.asarray(outputs(x * factors)), np.asarray(outputs(x)) * factors)
    assert not np.asarray(outputs(x))[2].any()


def _model(name):
    rule = qjax.Rule("**", weights=qjax.recipe(name).rules[-1].weights, inputs=qjax.recipe(name).rules[-1].inputs)
    w = {"w": RNG.normal(size=(48, 8)).astype(np.float32)}
    model = qjax.quantize(lambda p, x: x @ p["w"], w, np.zeros((5, 48), np.float32), recipe=qjax.Recipe([rule]))
    return lambda x: model(model.params, x)


MODELS = {name: _model(name) for name in ("W8A8_INT", "W8A8_FP")}

"""HQQ against the turns written out in float64, and what its zero points may be."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.errors import FormatError, RecipeError

FLOAT = qjax.Int(4, group=16, symmetric=False, zero="float")
W = np.random.default_rng(0).standard_t(4, (6, 48)).astype(np.float32)


def reference(w, group, rounding, bits=4):
    """Decoded weights: E and z in turns, each group at its best turn, in units of its range."""
    out, top = np.zeros_like(w, np.float64), 2**bits - 1
    for n in range(w.shape[0]):
        for k in range(0, w.shape[1], group):
            x = w[n, k : k + group].astype(np.float64)
            low, high = min(x.min(), 0), max(x.max(), 0)
            scale, beta, best = (high - low) / top, rounding.beta, np.inf
            zero = float(np.float16(-low / scale))
            for _ in range(rounding.iters):
                q = np.clip(np.round(x / scale + zero), 0, top)
                near = scale * (q - zero)
                error = np.mean((x - near) ** 2)
                if error < best:
                    best, out[n, k : k + group] = error, near
                off = (x - near) / (high - low)
                shrunk = np.maximum(np.abs(off) - np.maximum(np.abs(off), 1e-12) ** (rounding.lp_norm - 1) / beta, 0)
                target = x - np.sign(off) * shrunk * (high - low)
                zero = float(np.float16(np.mean(q - target / scale)))
                if rounding.scales:
                    scale = np.sum(target * (q - zero)) / np.sum((q - zero) ** 2)
                beta *= rounding.kappa
    return out


@pytest.mark.parametrize(
    "rounding", [qjax.HQQ(scales=False), qjax.HQQ(beta=400.0, kappa=1.1, iters=7, scales=False), qjax.HQQ()]
)
def test_equals_the_algorithm(rounding):
    codes, aux = jax.jit(lambda w: rounding.round(w, FLOAT))(W)
    got, want = np.asarray(FLOAT.decode(codes, aux)), reference(W, 16, rounding)
    same = np.abs(got - want) < 1e-3  # float32 may take the other turn where two are as good
    assert same.mean() > 0.9
    loss = lambda q: np.square(q - W).reshape(6, 3, 16).sum(-1)  # noqa: E731
    np.testing.assert_allclose(loss(got), loss(want), rtol=0.02)
    nearest = FLOAT.decode(*qjax.RTN().round(W, FLOAT))
    assert (loss(got) <= loss(nearest) * (1 + 1e-5)).all() and loss(got).sum() < 0.95 * loss(nearest).sum()


def test_scales_and_ranges_help_and_integer_zero_points_are_kept():
    loss = lambda rounding, fmt=FLOAT: float(np.square(fmt.decode(*rounding.round(W, fmt)) - W).sum())  # noqa: E731
    assert loss(qjax.HQQ()) < loss(qjax.HQQ(scales=False)) < loss(qjax.RTN())
    assert loss(qjax.HQQ(observer=qjax.MSE())) < loss(qjax.RTN(qjax.MSE()))
    whole = qjax.Int(4, group=16, symmetric=False)
    codes, aux = qjax.HQQ().round(W, whole)
    assert codes.dtype == aux["zero"].dtype == jnp.uint8
    assert loss(qjax.HQQ(), whole) < loss(qjax.RTN(), whole)


@pytest.mark.every(2)
@pytest.mark.parametrize("fmt", [FLOAT, qjax.Int(3, symmetric=False, zero="float", per="tensor")])
def test_blocks_that_say_nothing(fmt):
    for w in (np.zeros((2, 20), np.float32), np.full((2, 20), 3.0, np.float32), np.full((2, 20), -1e-30, np.float32)):
        codes, aux = qjax.HQQ().round(w, fmt)
        np.testing.assert_allclose(fmt.decode(codes, aux), w, rtol=1e-3, atol=1e-6)
    stacked = np.stack([W, 2 * W])
    got = FLOAT.decode(*qjax.HQQ().round(stacked, FLOAT))
    np.testing.assert_array_equal(got[1], FLOAT.decode(*qjax.HQQ().round(2 * W, FLOAT)))


def test_a_model_with_float_zero_points_is_what_its_weights_say():
    params, x = {"w": jnp.asarray(W.T)}, np.random.default_rng(1).standard_normal((3, 48)).astype(np.float32)
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    recipe = qjax.Recipe([qjax.Rule("**", weights=FLOAT, rounding=qjax.HQQ())])
    model = qjax.quantize(fn, params, x, recipe=recipe)
    np.testing.assert_allclose(model(model.params, x), x @ model.params["w"].dequantize(), rtol=1e-4, atol=1e-4)
    assert qjax.Recipe.from_dict(recipe.to_dict()) == recipe


def test_settings_that_cannot_be():
    for bad in ({"lp_norm": 0}, {"beta": 0}, {"kappa": 0.9}, {"iters": 0}, {"scales": 1}, {"observer": "mse"}):
        with pytest.raises(FormatError, match="HQQ"):
            qjax.HQQ(**bad)
    with pytest.raises(RecipeError, match="int4 g16 has none; use Int"):
        qjax.Rule("**", weights=qjax.Int(4, group=16), rounding=qjax.HQQ())
    with pytest.raises(FormatError, match="zero='float' belongs to asymmetric"):
        qjax.Int(4, zero="float")
    with pytest.raises(FormatError, match="did you mean 'float'"):
        qjax.Int(4, symmetric=False, zero="flaot")
    with pytest.raises(RecipeError, match="for weights only"):
        qjax.Rule("**", weights=qjax.Int(8), inputs=qjax.Int(8, per="token", symmetric=False, zero="float"))

"""LSQ+ values, derivatives and initial steps, against the equations in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.supernet import init_steps, lsq_plus, step_grad_scale


def oracle(x, s, beta, bits, signed, absolute=False):
    """Values of section 2.2 of the spec, and the derivatives of 0.5 sum (out - c)^2 by the same rules."""
    low = -(2 ** (bits - 1)) if signed else 0
    high = low + 2**bits - 1
    step, b = np.abs(s) + 1e-6, np.abs(beta) if absolute else beta
    v = (x - b) / step
    inside = (v >= low) & (v <= high)
    out = np.rint(np.clip(v, low, high)) * step + b
    by_step = np.where(inside, np.rint(v) - v, np.where(v < low, low, high)) * np.sign(s)
    by_offset = np.where(inside, 0.0, 1.0) * (np.sign(beta) if absolute else 1.0)
    return out, inside, by_step, by_offset


def down(g, shape):
    axes = tuple(d for d, n in enumerate(shape) if n == 1 and g.shape[d] != 1)
    return g.sum(axis=axes, keepdims=True)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(2, 8),
    st.booleans(),
    st.booleans(),
    st.sampled_from([(1, 1, 1), (3, 1, 1), (1, 1, 4)]),
)
def test_values_and_derivatives_are_those_of_the_rules(seed, bits, signed, absolute, shape):
    rng = np.random.default_rng(seed)
    x, target = rng.standard_normal((2, 3, 5, 4))
    x = x * 2
    s, beta = rng.choice([-1, 1], shape) * rng.uniform(0.02, 0.6, shape), rng.standard_normal(shape) * 0.3
    gain = 0.37
    with jax.enable_x64(True):

        def loss(x, s, beta, bits):
            out = lsq_plus(x, s, beta, bits, signed=signed, grad_scale=gain, abs_offset=absolute)
            return 0.5 * jnp.sum((out - target) ** 2), out

        grads, out = jax.grad(loss, (0, 1, 2), has_aux=True)(x, s, beta, jnp.asarray(bits))
    want, inside, by_step, by_offset = oracle(x, s, beta, bits, signed, absolute)
    np.testing.assert_allclose(out, want, rtol=1e-12, atol=1e-12)
    g = want - target
    np.testing.assert_allclose(grads[0], g * inside, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(grads[1], down(g * by_step, shape) * gain, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(grads[2], down(g * by_offset, shape) * gain, rtol=1e-9, atol=1e-9)
    assert all(len(np.unique(np.round(row, 9))) <= 2**bits for row in np.asarray(out)[:, :, :1].reshape(3, -1))


def test_bounds_are_inside_and_unselected_columns_get_nothing():
    table = jnp.full((1, 7), 0.5)

    def loss(x, table, bits):
        return jnp.sum(lsq_plus(x, table[:, bits - 2], None, bits))

    step = 0.5 + 1e-6
    x = jnp.asarray([-8.0, -8.5, 7.0, 7.5, jnp.nan]) * step  # code units at 4 bits: lo, beyond, hi, beyond
    dx, dt = jax.jit(jax.grad(loss, (0, 1)))(x, table, 4)
    assert dx.tolist() == [1, 0, 1, 0, 0]
    assert np.flatnonzero(np.asarray(dt)[0]).tolist() == [2]
    once = lsq_plus(x[:4], table[0, 0], 0.1, 4)
    np.testing.assert_allclose(lsq_plus(once, table[0, 0], 0.1, 4), once, rtol=3e-7)
    assert lsq_plus(x.astype(jnp.bfloat16), 0.1, None, 3).dtype == jnp.bfloat16
    np.testing.assert_allclose(step_grad_scale(4, 100), 1 / np.sqrt(7 * 100), rtol=1e-6)
    np.testing.assert_allclose(step_grad_scale(jnp.asarray(2), 9, False, 2.0), 2 / np.sqrt(3 * 9), rtol=1e-6)


def first_steps(rows, symmetric, per_channel, signed):
    """The search of section 2.3 in float64, row by row."""
    scale, offset = np.zeros((2, len(rows), 7))
    for c, row in enumerate(rows):
        for bits in range(2, 9):
            low = -(2 ** (bits - 1)) if signed else 0
            best = np.inf
            for i in range(5 if per_channel and symmetric else 80):
                top = np.abs(row).max() if symmetric else row.max()
                bottom = (-top if symmetric else row.min()) if signed else 0
                s = (top - bottom) * (1 - 0.01 * i) / (2**bits - 1)
                b = 0 if symmetric else (bottom * (1 - 0.01 * i) - s * low if signed else -1e-9)
                step = s + 1e-6
                near = np.rint(np.clip((row - b) / step, low, low + 2**bits - 1)) * step + b
                error = np.mean(np.abs(row - near) ** 2.4)
                if error < best:
                    best, scale[c, bits - 2], offset[c, bits - 2] = error, s, b
    return scale, offset


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("channel_axis", "signed"), [(None, True), (None, False), (1, True)])
def test_initial_steps_are_those_of_the_search(symmetric, channel_axis, signed):
    x = np.random.default_rng(3).standard_normal((4, 3, 41)) * [[[1.0], [0.2], [3.0]]] + 0.1
    x = x if signed else np.maximum(x, 0)
    rows = np.moveaxis(x, channel_axis, 0).reshape(3, -1) if channel_axis else x.reshape(1, -1)
    want = first_steps(rows, symmetric, channel_axis is not None, signed)
    with jax.enable_x64(True):
        got = init_steps(jnp.asarray(x), symmetric=symmetric, channel_axis=channel_axis, signed=signed)
    for a, b in zip(got, want, strict=True):
        assert a.shape == (len(rows), 7)
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    if symmetric is False and channel_axis is None and not signed:  # ReLU data: both forms alike
        like = first_steps(rows, True, False, False)
        np.testing.assert_allclose(want[0], like[0], atol=1e-8)


def test_errors_of_a_uniform_grid():
    x = np.random.default_rng(0).uniform(-1, 1, 40000).astype(np.float32)
    scale, offset = init_steps(x, symmetric=False)
    mse = [float(np.mean((lsq_plus(x, scale[0, b - 2], offset[0, b - 2], b) - x) ** 2)) for b in range(2, 9)]
    np.testing.assert_allclose(mse[-1], float(scale[0, 6]) ** 2 / 12, rtol=0.02)
    ratios = np.asarray(mse[2:-1]) / np.asarray(mse[3:])
    assert ((ratios > 3.7) & (ratios < 4.6)).all()
    zero = init_steps(jnp.zeros((2, 9)), symmetric=True, channel_axis=0)
    assert not np.asarray(zero[0]).any() and not np.asarray(lsq_plus(jnp.zeros(3), zero[0][0, 0], None, 2)).any()


@given(st.integers(0, 10**6), st.integers(2, 8), st.floats(-2, 2), st.booleans())
def test_an_asymmetric_grid_ends_where_the_range_does_and_values_stay(seed, bits, middle, symmetric):
    x = np.random.default_rng(seed).laplace(middle, 1.0, 300)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    with jax.enable_x64(True):
        step = np.ptp(x) / (2**bits - 1)
        ends = lsq_plus(np.array([x.min(), x.max()]), step - 1e-6, x.min() - step * low, bits)
        scale, offset = (t[0, bits - 2] for t in init_steps(jnp.asarray(x), symmetric=symmetric))
        once = np.asarray(lsq_plus(x, scale, offset, bits))
        again = np.asarray(lsq_plus(once, scale, offset, bits))
    np.testing.assert_allclose(ends, [x.min(), x.max()], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(again, once, rtol=1e-14, atol=1e-14)
    codes = (once - float(offset)) / (float(scale) + 1e-6)
    assert len(np.unique(np.rint(codes))) <= 2**bits and low - 1e-6 <= codes.min() and codes.max() <= high + 1e-6


def test_a_step_a_channel_errs_less_than_one_for_all_where_spreads_differ():
    w = np.random.default_rng(5).standard_normal((8, 200)) * np.geomspace(0.05, 2, 8)[:, None]
    own = init_steps(jnp.asarray(w), symmetric=True, channel_axis=0)[0]
    one = init_steps(jnp.asarray(w), symmetric=True)[0]
    for bits in range(4, 9):
        errors = [np.mean((np.asarray(lsq_plus(w, t[:, bits - 2, None], None, bits)) - w) ** 2) for t in (own, one)]
        assert errors[0] <= errors[1], (bits, errors)

"""Scales of 4-bit keys and values against the equations in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.formats.kv4 import kv4_decode, kv4_encode, kv4_scales


@jax.jit
def everything(x):
    scale, zero = kv4_scales(x)
    codes = kv4_encode(x, scale, zero)
    return scale, zero, codes, kv4_decode(codes, scale, zero)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 999), size=st.sampled_from([0.01, 1.0, 300.0]), shift=st.sampled_from([0.0, 1.0, -30.0]))
def test_by_the_equations(seed, size, shift):
    x = np.random.default_rng(seed).standard_normal((3, 2, 16)).astype(np.float32) * size + np.float32(shift)
    scale, zero, codes, near = (np.asarray(a, np.float64) for a in everything(x))
    low, high = x.astype(np.float64).min(-1, keepdims=True), x.astype(np.float64).max(-1, keepdims=True)
    s, z = (high - low) / 15, -15 * low / (high - low)
    np.testing.assert_allclose(scale, s, rtol=2e-3)
    np.testing.assert_allclose(zero, z, rtol=2e-3, atol=1e-3)
    assert codes.min() >= 0 and codes.max() <= 15
    # half a step, and what rounding s and z to float16 does to the numbers
    slack = 2.0**-10 * (np.abs(x) + np.abs(zero * scale)) + 2.0**-10 * 15 * scale
    assert (np.abs(near - x) <= scale / 2 + slack).all()


def test_constant_vectors_are_exact():
    x = jnp.broadcast_to(jnp.float32([0.0, 1.0, -2.5, 640.0])[:, None], (4, 8))
    scale, zero, codes, near = everything(x)
    np.testing.assert_array_equal(near, x)
    assert not np.asarray(codes).any() and (np.asarray(scale) == 1).all()
    assert np.isfinite(np.asarray(zero, np.float32)).all()


def test_a_code_that_would_be_sixteen_is_clipped():
    """The minimum far beyond the range: rounding z to float16 pushes the largest element over."""
    found = 0
    for offset in np.linspace(40, 200, 400, dtype=np.float32):
        x = jnp.asarray(offset + np.linspace(0, 1, 8, dtype=np.float32))[None]
        scale, zero, codes, near = everything(x)
        raw = np.rint(np.asarray(x, np.float64) / np.float64(scale) + np.float64(zero))
        found += int(raw.max() > 15)
        assert int(np.max(codes)) <= 15 and (np.diff(np.asarray(codes, int)[0]) >= 0).all()
    assert found


def test_bits():
    scale, zero, codes, _ = everything(jnp.ones((4, 128)))
    bits = 4 + 8 * (scale.dtype.itemsize + zero.dtype.itemsize) / codes.shape[-1]
    assert bits == 4.25

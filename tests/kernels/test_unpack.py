"""The unpacking of lowerings equals that of the formats, code by code."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjax.formats import MXFP4, NF4, NVFP4, Float8, Int, quantize_array
from qjax.kernels import phases, unpack
from qjax.kernels.order import apart, runtime_zero


def packed(fmt, n, k, seed=0, lead=()):
    w = np.random.default_rng(seed).standard_normal((*lead, n, k))
    return quantize_array(
        jnp.asarray(w, jnp.float32), fmt.clamped(k), in_axes=len(lead) + 1, stack_axes=tuple(range(len(lead)))
    ).canonical()


@pytest.mark.slow
@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    k=st.integers(1, 70),
    large=st.booleans(),
    lead=st.sampled_from([(), (2,)]),
)
def test_codes_are_the_same(bits, symmetric, k, large, lead):
    w = packed(Int(bits, symmetric=symmetric), 5, k, lead=lead)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unpack, "SMALL_ELEMENTS", 0 if large else 1 << 20)
        codes = unpack.unpacked(w)
    assert codes.dtype == w.unpacked().dtype
    np.testing.assert_array_equal(codes, w.unpacked())


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_every_8_bit_float_is_widened_exactly(dtype):
    codes = jax.lax.bitcast_convert_type(jnp.arange(256, dtype=jnp.uint8), dtype)
    np.testing.assert_array_equal(jax.jit(unpack.widened)(codes), np.asarray(codes).astype(np.float32))


@pytest.mark.parametrize(
    "fmt",
    [Int(4), Int(4, group=32), Int(2, group=8, symmetric=False), Int(4, per="tensor"), NF4(), MXFP4(), NVFP4()],
    ids=lambda f: f.name,
)
def test_phases_are_every_pth_column(fmt):
    w = packed(fmt, 6, 128)
    count = phases.phase_count(fmt, 128)
    assert count == 8 // fmt.code_bits
    for p, part in enumerate(phases.decoded_phases(w)):
        np.testing.assert_array_equal(part, w.decode_canonical()[:, p::count])
    x = jnp.arange(256.0).reshape(2, 128)
    np.testing.assert_array_equal(jnp.stack(phases.split_phases(x, count), -1).reshape(2, 128), x)


@pytest.mark.parametrize(
    ("fmt", "k"),
    [(Int(3), 64), (Int(8), 64), (Int(4), 37), (Int(4, group=32), 48), (Int(4, group=3), 6), (Float8(), 8)],
)
def test_rows_that_cannot_be_split_are_not(fmt, k):
    assert phases.phase_count(fmt, k) == 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int8, jnp.float8_e4m3fn, jnp.bool_])
@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf, -np.inf])
def test_the_runtime_zero_is_zero(dtype, value):
    x = jnp.full((2, 3), value).astype(dtype)
    assert jax.jit(runtime_zero)(x) == 0


def test_a_call_apart_stays_one_call():
    inner = jax.jit(lambda x: jnp.where(x > 0, x, 0.0))  # a call of a library: inlined as ever
    step = apart(lambda power, x: inner(x) ** power)
    f = lambda x: step(3, jnp.sin(step(2, x)))  # noqa: E731
    x = jnp.linspace(-1, 1, 7)
    compiled = jax.jit(f).lower(x).compile()
    np.testing.assert_allclose(compiled(x), jnp.sin(jnp.maximum(x, 0) ** 2) ** 3, rtol=1e-6)
    assert compiled.as_text().count(" call(") == 2

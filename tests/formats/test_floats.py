"""Float8, NF4 and the block formats against ml_dtypes and the published definitions."""

from __future__ import annotations

import importlib.util
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qjax.errors import FormatError
from qjax.formats import MXFP4, MXFP8, NF4, NVFP4, Float8, e2m1, quantize_array
from qjax.formats.nf4 import NF4_VALUES, normal_quantiles

RNG = np.random.default_rng(0)
F = np.float32
WIDE = (RNG.standard_normal(20000) * np.exp2(RNG.uniform(-12, 4, 20000))).astype(F)


@pytest.mark.parametrize("element", ["e4m3fn", "e5m2"])
@pytest.mark.parametrize("how", [{}, {"per": "tensor"}, {"per": "token"}, {"group": 24}])
def test_float8_equals_ml_dtypes(element, how, roundtrip):
    dtype = {"e4m3fn": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[element]
    top = {"e4m3fn": 448, "e5m2": 57344}[element]
    x = WIDE[:720].reshape(10, 72)
    fmt = Float8(element, **how)
    blocks = (
        x.reshape(10, 3, 24) if "group" in how else x.reshape(1, 1, 720) if how == {"per": "tensor"} else x[:, None]
    )
    scale = np.abs(blocks).max(-1) * (F(1) / F(top))
    aux, ours, out = jax.tree.map(np.asarray, roundtrip(fmt, x))
    np.testing.assert_array_equal(np.asarray(aux["scale"]), scale.reshape(aux["scale"].shape))
    codes = np.clip(blocks * (F(1) / scale)[..., None], -top, top).astype(dtype)
    assert ours.dtype == dtype
    np.testing.assert_array_equal(ours.view(np.uint8), codes.reshape(10, 72).view(np.uint8))
    np.testing.assert_array_equal(out, (codes.astype(F) * scale[..., None]).reshape(10, 72))


def test_float8_never_stores_nan_or_infinity():
    x = np.array([[np.nan, np.inf, -np.inf, 1.0, 448.0 * 2]], F)
    for element in ("e4m3fn", "e5m2"):
        fmt = Float8(element)
        codes = np.asarray(fmt.encode(x, {"scale": jnp.ones((1, 1))})).astype(F)
        assert np.isfinite(codes).all() and codes[0, 0] == 0 and codes[0, 1] == -codes[0, 2] > 400


def test_nf4_values_are_the_normal_quantiles():
    np.testing.assert_allclose(normal_quantiles(), NF4_VALUES, atol=1e-6)
    assert (np.diff(NF4_VALUES) > 0).all() and NF4_VALUES[7] == 0


def test_nf4_takes_the_nearest_value(roundtrip):
    x = RNG.standard_normal((4, 150)).astype(F)
    aux, codes, decoded = jax.tree.map(np.asarray, roundtrip(NF4(), x))
    assert aux["scale"].shape == (4, 3)
    for g in range(3):
        part = x[:, 64 * g : 64 * (g + 1)]
        scale = np.abs(part).max(-1, keepdims=True)
        distance = np.abs(part[..., None] * (F(1) / scale)[..., None] - NF4_VALUES)
        np.testing.assert_array_equal(codes[:, 64 * g : 64 * (g + 1)], distance.argmin(-1))
        np.testing.assert_array_equal(np.asarray(aux["scale"])[:, g], scale[:, 0])
    np.testing.assert_array_equal(decoded[:, 128:], NF4_VALUES[codes[:, 128:]] * aux["scale"][:, 2:])


def test_e2m1_equals_ml_dtypes_on_every_tie():
    x = np.concatenate([np.arange(-8, 8, 1 / 64), WIDE]).astype(F)
    codes = np.asarray(e2m1.to_e2m1(jnp.asarray(x)))
    expected = np.clip(x, -6, 6).astype(ml_dtypes.float4_e2m1fn)
    np.testing.assert_array_equal(e2m1.from_e2m1(jnp.asarray(codes)), expected.astype(F))
    nonzero = expected.astype(F) != 0
    np.testing.assert_array_equal(codes[nonzero], expected.view(np.uint8)[nonzero] & 15)
    assert np.asarray(e2m1.from_e2m1(jnp.arange(8, dtype=jnp.uint8))).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


MX = {
    "mxfp4": (MXFP4(), ml_dtypes.float4_e2m1fn, 2, 6.0),
    "mxfp8_e4m3fn": (MXFP8(), ml_dtypes.float8_e4m3fn, 8, 448.0),
    "mxfp8_e5m2": (MXFP8("e5m2"), ml_dtypes.float8_e5m2, 15, 57344.0),
}


@pytest.mark.parametrize("name", MX)
def test_mx_is_the_specification(name, roundtrip):
    """OCP MX v1.0, section 6.3, written with exact powers of two in float64."""
    fmt, element, emax, top = MX[name]
    x = np.concatenate([WIDE[: 6 * 80].reshape(6, 80), np.exp2(np.arange(-40.0, 40.0))[None]]).astype(F)
    aux, _, decoded = jax.tree.map(np.asarray, roundtrip(fmt, x))
    assert aux["scale"].dtype == jnp.uint8 and aux["scale"].shape == (7, 3)
    for n in range(7):
        for g in range(3):
            part = x[n, 32 * g : 32 * (g + 1)].astype(np.float64)
            exponent = math.floor(math.log2(np.abs(part).max())) - emax
            assert int(aux["scale"][n, g]) == exponent + 127
            elements = np.clip(part / 2.0**exponent, -top, top).astype(F).astype(element).astype(np.float64)
            np.testing.assert_array_equal(decoded[n, 32 * g : 32 * (g + 1)], elements * 2.0**exponent)


@pytest.mark.parametrize("name", MX)
def test_mx_at_the_ends_of_e8m0(name, roundtrip):
    fmt = MX[name][0]
    x = np.zeros((4, 32), F)
    x[1, 0], x[2, 0], x[3, 0] = 2.0**-126, 3e38, 2.0**-120
    aux, _, decoded = jax.tree.map(np.asarray, roundtrip(fmt, x))
    assert aux["scale"][0, 0] == 0  # a zero block: 2**-127
    assert np.isfinite(decoded).all() and not decoded[0].any()
    assert decoded[1, 0] == x[1, 0] and decoded[3, 0] == x[3, 0]
    assert abs(decoded[2, 0] / 3e38 - 1) < 0.25


def test_nvfp4_is_nvidias_two_levels(roundtrip):
    x = WIDE[: 2 * 3 * 40].reshape(2, 3, 40)
    aux, _, decoded = jax.tree.map(np.asarray, roundtrip(NVFP4(), x))
    assert aux["scale"].dtype == ml_dtypes.float8_e4m3fn and aux["scale"].shape == (2, 3, 3)
    assert aux["global_scale"].shape == (2, 1, 1)
    for s in range(2):
        whole = np.abs(x[s]).max() / (448 * 6)
        np.testing.assert_allclose(aux["global_scale"][s, 0, 0], whole, rtol=2e-7)
        whole = F(aux["global_scale"][s, 0, 0])
        for n in range(3):
            for g in range(3):
                part = x[s, n, 16 * g : 16 * (g + 1)]
                exact = np.abs(part).max() / (6 * whole)
                scale = F(np.asarray(aux["scale"])[s, n, g])
                assert scale == F(np.maximum(F(exact), F(2.0**-9)).astype(ml_dtypes.float8_e4m3fn))
                elements = np.clip(part * (F(1) / (scale * whole)), -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(F)
                np.testing.assert_array_equal(decoded[s, n, 16 * g : 16 * (g + 1)], elements * (scale * whole))


def test_nvfp4_keeps_blocks_far_below_the_largest(roundtrip):
    x = np.full((1, 48), 1e-4, F)
    x[0, 16:32], x[0, 0] = 0, 400.0
    decoded = np.asarray(roundtrip(NVFP4(), x)[2])
    assert abs(decoded[0, 0] - 400) < 1e-3 and not decoded[0, 16:32].any()
    assert abs(decoded[0, 32:] - 1e-4).max() < 5e-5  # block scale 5.6e-5, its subnormal step 2**-9 * global


def test_short_rows_are_short_blocks():
    x = WIDE[:20].reshape(2, 10)
    for fmt in (MXFP4(), MXFP8(), NVFP4()):
        assert fmt.clamped(10) is fmt and fmt.fit(x)["scale"].shape == (2, 1)
    with pytest.raises(FormatError, match="groups of 64"):
        NF4().fit(x)
    assert NF4().clamped(10) == NF4(10)


@pytest.mark.parametrize(
    ("fmt", "bits"),
    [(Float8(), 8 + 32 / 256), (NF4(), 4.5), (MXFP4(), 4.25), (MXFP8(), 8.25), (NVFP4(), 4.5 + 32 / (256 * 8))],
)
def test_bits_per_element(fmt, bits):
    assert quantize_array(np.ones((256, 8), F), fmt, in_axes=0).bits_per_element == bits


@pytest.mark.skipif(importlib.util.find_spec("qwix") is None, reason="qwix is not installed")
@pytest.mark.parametrize(
    ("fmt", "qtype", "tile"),
    [(Float8(), "float8_e4m3fn", None), (Float8("e5m2"), "float8_e5m2", None), (NF4(), "nf4", 64)],
)
def test_numbers_equal_qwix(fmt, qtype, tile):
    from qwix._src.core import qarray

    w = jnp.asarray(WIDE[: 128 * 20].reshape(128, 20))
    qtype = qtype if qtype == "nf4" else jnp.dtype(qtype)
    theirs = qarray.quantize_api(w, qtype, channelwise_axes=(1,), tiled_axes={0: tile} if tile else None)
    np.testing.assert_array_equal(quantize_array(w, fmt, in_axes=0).dequantize(), qarray.dequantize(theirs))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Float8("e4m3"), "did you mean 'e4m3fn'"),
        (lambda: Float8(per="tensor", group=3), "exclude"),
        (lambda: MXFP8("fp8"), "'e4m3fn' or 'e5m2'"),
        (lambda: NF4(0), "1 or more"),
    ],
)
def test_impossible_settings_are_refused(make, words):
    with pytest.raises(FormatError, match=words):
        make()

"""Int against an independent NumPy implementation and against Qwix."""

from __future__ import annotations

import dataclasses
import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.errors import FormatError
from qjax.formats import Int, canonical_matrix, format_from_dict, quantize_array

RNG = np.random.default_rng(0)
F = np.float32
WRONG_TYPE = pytest.mark.skipif(bool(os.environ.get("QJAX_BEARTYPE")), reason="beartype refuses it first")


def blocks_of(x: np.ndarray, group: int | None) -> list[slice]:
    step = group or max(x.shape[-1], 1)
    return [slice(k, min(k + step, x.shape[-1])) for k in range(0, x.shape[-1], step)]


def symmetric_oracle(x: np.ndarray, bits: int, group: int | None, scale: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of [N, K], block by block, in float32 with reciprocals as XLA divides."""
    top = 2 ** (bits - 1) - 1
    bound, low = (top + 0.5, -top - 1) if scale == "half" else (top, -top)
    codes, scales = np.zeros(x.shape, np.int8), []
    for part in blocks_of(x, group):
        size = np.abs(x[:, part]).max(-1, keepdims=True)
        s = np.where(size > 0, size * (F(1) / F(bound)), F(1))
        codes[:, part] = np.clip(np.round(x[:, part] * (F(1) / s)), low, top)
        scales.append(s)
    return codes, np.concatenate(scales, -1)


@pytest.mark.parametrize("scale", ["half", "qmax"])
@pytest.mark.parametrize(("bits", "group"), [(2, None), (3, 16), (4, 128), (5, 43), (8, None), (8, 64)])
def test_symmetric_equals_numpy(bits, group, scale, roundtrip):
    x = RNG.standard_normal((5, 172)).astype(F)
    x[2, :64] = 0
    fmt = Int(bits, scale=scale) if group is None else Int(bits, group=group, scale=scale)
    aux, ours, decoded = roundtrip(fmt, x)
    codes, scales = symmetric_oracle(x, bits, group, scale)
    np.testing.assert_array_equal(aux["scale"], scales)
    np.testing.assert_array_equal(ours, codes)
    wide = np.concatenate(
        [np.repeat(scales[:, [g]], p.stop - p.start, 1) for g, p in enumerate(blocks_of(x, group))], 1
    )
    np.testing.assert_array_equal(decoded, codes.astype(F) * wide)


@settings(max_examples=8)
@given(
    bits=st.integers(2, 8), group=st.sampled_from([1, 7, 24]), length=st.sampled_from([24, 31]), seed=st.integers(0, 99)
)
def test_any_bits_and_groups_equal_numpy(bits, group, length, seed):
    x = np.random.default_rng(seed).standard_t(2, (3, length)).astype(F)
    q = quantize_array(x, Int(bits, group=group), in_axes=1)
    codes, scales = symmetric_oracle(x, bits, group, "half")
    np.testing.assert_array_equal(q.unpacked(), codes)
    np.testing.assert_array_equal(q.aux["scale"], scales)
    assert q.nbytes == 3 * -(-length * bits // 8) + 4 * 3 * -(-length // group)


@pytest.mark.parametrize(("bits", "group"), [(2, 16), (4, 43), (8, None)])
def test_asymmetric_equals_numpy(bits, group, roundtrip):
    x = (RNG.standard_normal((6, 100)) + np.array([[0], [3], [-3], [0], [0], [0]])).astype(F)
    fmt = Int(bits, symmetric=False) if group is None else Int(bits, group=group, symmetric=False)
    aux, codes, decoded = jax.tree.map(np.asarray, roundtrip(fmt, x))
    assert aux["zero"].dtype == jnp.uint8
    top = 2**bits - 1
    assert codes.dtype == np.uint8 and codes.max() <= top
    for g, part in enumerate(blocks_of(x, group)):
        low, high = np.minimum(x[:, part].min(-1), 0), np.maximum(x[:, part].max(-1), 0)
        scale, zero = np.asarray(aux["scale"])[:, g], np.asarray(aux["zero"])[:, g].astype(int)
        np.testing.assert_allclose(scale, (high - low) / top, rtol=3e-7)
        assert (abs(zero - -low / scale) <= 0.5 + 1e-4).all()
        np.testing.assert_array_equal(
            decoded[:, part], (codes[:, part].astype(int) - zero[:, None]).astype(F) * scale[:, None]
        )
        assert (abs(decoded[:, part] - x[:, part]) <= scale[:, None] * 1.001).all()


def test_asymmetric_has_an_exact_zero_and_covers_one_sided_data(roundtrip):
    x = np.array([[0.0, 5.0, 6.0, 7.0], [-1.0, -2.0, -3.0, 0.0]], F)
    aux, _, decoded = roundtrip(Int(4, symmetric=False), x)
    assert aux["zero"].tolist() == [[0], [15]]
    np.testing.assert_allclose(decoded, x, atol=0.24)
    assert decoded[0, 0] == 0


def test_one_scale_for_what_shares_one(roundtrip):
    x = RNG.standard_normal((2, 3, 40)).astype(F)

    def scale(fmt):
        return roundtrip(fmt, x)[0]["scale"]

    shapes = {"tensor": (2, 1, 1), "channel": (2, 3, 1), "token": (2, 3, 1)}
    for per, shape in shapes.items():
        assert scale(Int(4, per=per)).shape == shape
    assert scale(Int(4, group=16)).shape == (2, 3, 3)
    np.testing.assert_array_equal(scale(Int(4, per="token")), scale(Int(4)))
    np.testing.assert_array_equal(scale(Int(4, per="tensor"))[1], scale(Int(4))[1].max(0, keepdims=True))


def test_uneven_tail_is_a_group_of_its_own(roundtrip):
    x = RNG.standard_normal((3, 172)).astype(F)
    whole, tail = roundtrip(Int(4, group=128), x)[0]["scale"], roundtrip(Int(4), x[:, 128:])[0]["scale"]
    assert whole.shape == (3, 2)
    np.testing.assert_array_equal(whole[:, 1:], tail)


def test_a_group_longer_than_the_row_is_refused_unless_clamped():
    x = RNG.standard_normal((3, 40)).astype(F)
    fmt = Int(4, group=128)
    with pytest.raises(FormatError, match="groups of 128 .* rows of 40"):
        fmt.fit(x)
    assert fmt.clamped(40) == Int(4, group=40)
    assert fmt.clamped(128) is fmt and Int(4).clamped(4) == Int(4)
    np.testing.assert_array_equal(fmt.clamped(40).fit(x)["scale"], Int(4).fit(x)["scale"])


@pytest.mark.parametrize("fmt", [Int(4), Int(4, group=8), Int(8, symmetric=False), Int(3, per="tensor")])
def test_zero_and_constant_blocks(fmt, roundtrip):
    aux, _, decoded = roundtrip(fmt, np.zeros((2, 16), F))
    assert (np.asarray(aux["scale"]) == 1).all()
    assert not np.asarray(decoded).any()
    same = np.full((2, 16), -0.7, F)
    aux, _, decoded = jax.tree.map(np.asarray, roundtrip(fmt, same))
    assert (decoded == decoded[0, 0]).all() and abs(decoded - same).max() <= 0.51 * np.asarray(aux["scale"]).max()


@pytest.mark.parametrize("fmt", [Int(2), Int(8), Int(4, group=8), Int(4, symmetric=False)])
def test_the_ends_of_float32(fmt, roundtrip):
    for size, relative in ((1e30, True), (1e-30, True), (3.4e38, False), (1e-45, False)):
        x = (RNG.uniform(-1, 1, (2, 16)) * size).astype(F)
        aux, _, decoded = jax.tree.map(np.asarray, roundtrip(fmt, x))
        assert np.isfinite(decoded).all() and np.isfinite(np.asarray(aux["scale"])).all()
        if relative:
            assert (abs(decoded - x) <= np.asarray(aux["scale"]).max() * 1.001).all()


@pytest.mark.parametrize("fmt", [Int(4, per="tensor"), Int(8, symmetric=False), Int(3, group=4)])
def test_nan_is_zero_and_infinity_saturates(fmt, roundtrip):
    x = np.array([[1.0, np.nan, -2.0, 0.5], [np.inf, 1.0, -np.inf, 0.0], [np.nan] * 4, [np.inf] * 4], F)
    aux, _, decoded = jax.tree.map(np.asarray, roundtrip(fmt, x))
    clean = roundtrip(fmt, np.where(np.isfinite(x), x, 0).astype(F))[0]
    for name in aux:
        np.testing.assert_array_equal(aux[name], clean[name])
    assert np.isfinite(decoded).all() and (decoded[np.isnan(x)] == 0).all()
    assert decoded[1, 0] == decoded[1].max() and decoded[1, 2] == decoded[1].min()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    w = jnp.asarray(RNG.standard_normal((40, 6)), dtype)
    q = quantize_array(w, Int(4, group=20), in_axes=0)
    wide = quantize_array(w.astype(jnp.float32), Int(4, group=20), in_axes=0)
    assert q.dtype == dtype and q.dequantize().dtype == dtype
    np.testing.assert_array_equal(q.codes, wide.codes)
    np.testing.assert_array_equal(q.aux["scale"], wide.aux["scale"])


def test_eager_jit_and_vmap_agree_to_the_bit():
    x = RNG.standard_normal((4, 33, 50)).astype(F)
    for fmt in (Int(5, group=7, symmetric=False),):

        def run(x, fmt=fmt):
            aux = fmt.fit(x)
            return aux, fmt.encode(x, aux)

        eager, jitted, mapped = run(x), jax.jit(run)(x), jax.jit(jax.vmap(run))(x)
        for a, b, c in zip(*map(jax.tree.leaves, (eager, jitted, mapped)), strict=True):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(a, c)


@pytest.mark.every(2)
@pytest.mark.skipif(importlib.util.find_spec("qwix") is None, reason="qwix is not installed")
@pytest.mark.parametrize(("bits", "tile"), [(8, None), (8, 32), (4, None), (4, 32), (3, 32)])
def test_codes_and_scales_equal_qwix(bits, tile):
    from qwix._src.core import qarray

    w = jnp.asarray(RNG.standard_normal((128, 33)), jnp.float32)
    qtype = {8: jnp.int8, 4: jnp.int4, 3: "int3"}[bits]
    theirs = qarray.quantize_api(w, qtype, channelwise_axes=(1,), tiled_axes={0: tile} if tile else None)
    ours = quantize_array(w, Int(bits, group=tile) if tile else Int(bits), in_axes=0)
    np.testing.assert_array_equal(ours.unpacked().T, np.asarray(theirs.qvalue).astype(np.int8))
    np.testing.assert_array_equal(ours.aux["scale"].T, theirs.scale)
    np.testing.assert_array_equal(ours.dequantize(), qarray.dequantize(theirs))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": 1}, "2 to 8"),
        ({"bits": 9}, "2 to 8"),
        pytest.param({"bits": 4.0}, "2 to 8", marks=WRONG_TYPE),
        ({"bits": 4, "per": "chanel"}, "did you mean 'channel'"),
        ({"bits": 4, "per": "tensor", "group": 32}, "exclude each other"),
        ({"bits": 4, "per": "channel", "group": 32}, "exclude each other"),
        ({"bits": 4, "per": "group"}, "needs a length"),
        ({"bits": 4, "group": 0}, "1 or more"),
        ({"bits": 4, "scale": "max"}, "did you mean 'qmax'"),
        ({"bits": 4, "scale": "qmax", "symmetric": False}, "belongs to symmetric"),
        pytest.param({"bits": 4, "symmetric": 1}, "True or False", marks=WRONG_TYPE),
    ],
)
def test_impossible_settings_are_refused_when_made(settings, words):
    with pytest.raises(FormatError, match=words):
        Int(**settings)


def test_value_and_description():
    assert Int(4, group=128) == Int(4, group=128) != Int(4, group=64)
    assert Int(4, group=128).per == "group" and Int(4).per == "channel"
    assert Int(4, per="channel") == Int(4) and hash(Int(4, per="channel")) == hash(Int(4))
    assert dataclasses.replace(Int(4, group=128), bits=3) == Int(3, group=128)
    assert [
        f.name for f in (Int(4, group=128), Int(8, per="token"), Int(3, symmetric=False), Int(8, scale="qmax"))
    ] == [
        "int4 g128",
        "int8 per token",
        "uint3 per channel",
        "int8 per channel qmax",
    ]
    assert format_from_dict({"format": "int", "bits": 4, "group": 128}) == Int(4, group=128)
    x = RNG.standard_normal((6, 4)).astype(F)
    assert canonical_matrix(jnp.asarray(x), 0).shape == (4, 6)

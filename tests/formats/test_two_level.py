"""DualGrained and Progressive against their equations in float64, and the ranges that they promise, exhaustively."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.errors import FormatError
from qjax.formats import DualGrained, Int, Progressive, quantize_array
from qjax.formats.progressive import protective_range
from qjax.formats.two_level import round_up
from qjax.testing import check_format


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("fmt", "allowed"),
    [
        # Codes that would leave int8 are not used, so the nearest number is not always there.
        (DualGrained(8), {"nearest": False}),
        (Progressive(16), {}),
        (Progressive(32, bits=3, scale_dtype="float32"), {}),
        # 0 is zero / step rounded to a code: exact only if the step divides the zero point.
        (Progressive(5, zeros="post"), {"exact_zero": False}),
    ],
    ids=lambda p: p.name if hasattr(p, "name") else "",
)
def test_they_are_formats(fmt, allowed):
    check_format(fmt, examples=5, **allowed)


def weights(n: int, k: int, group: int, loud: float, seed: int) -> np.ndarray:
    """Normal numbers, one group of every row louder than the rest."""
    w = np.random.default_rng(seed).standard_normal((n, k))
    w[:, :group] *= loud
    return w.astype(np.float32)


def blocks(a: np.ndarray, group: int):
    """The groups of rows, the last one as long as it is."""
    return [a[:, i : i + group] for i in range(0, a.shape[1], group)]


@functools.partial(jax.jit, static_argnums=0)
def everything(fmt, w):
    """Aux, codes, decoded numbers, int8 numbers and scales of rows."""
    aux = fmt.fit(w)
    codes = fmt.encode(w, aux)
    return aux, codes, fmt.decode(codes, aux), *fmt.as_int8(codes, aux)


shapes = {
    "shape": st.sampled_from([(4, 23, 8), (1, 16, 16)]),  # N, K, group; each compiles once a format
    "loud": st.sampled_from([1.0, 3.0, 10.0, 1000.0]),
    "seed": st.integers(0, 99),
}


@settings(max_examples=30, deadline=None)
@given(**shapes)
def test_dual_grained_by_its_equations(shape, loud, seed):
    w, group = weights(*shape, loud, seed), shape[-1]
    aux, codes, decoded, *_ = jax.tree.map(np.asarray, everything(DualGrained(group, "float32"), w))
    w = w.astype(np.float64)
    s1 = np.abs(w).max(1) / 127
    np.testing.assert_allclose(aux["scale"][:, 0], s1, rtol=1e-6)
    for i, (part, q) in enumerate(zip(blocks(w, group), blocks(codes, group), strict=True)):
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        fine = (high - low) / 15
        np.testing.assert_allclose(aux["step"][:, i], np.maximum(fine / s1, 1), atol=0.5 + 1e-4)
        step, zero = aux["step"][:, i].astype(int), aux["zero"][:, i].astype(int)
        np.testing.assert_allclose(zero, -low / fine, atol=0.5 + 1e-4)
        m = 127 // step
        raw = part / (step * s1)[:, None] + zero[:, None]
        want = np.clip(raw, np.maximum(zero - m, 0)[:, None], np.minimum(zero + m, 15)[:, None])
        np.testing.assert_allclose(q, want, atol=0.5 + 1e-3)
        near = decoded[:, i * group : (i + 1) * group]
        np.testing.assert_allclose(near, (q.astype(int) - zero[:, None]) * (step * s1)[:, None], rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(**shapes, zeros=st.sampled_from(["pre", "post"]))
def test_progressive_by_its_equations(shape, loud, seed, zeros):
    w, group = weights(*shape, loud, seed), shape[-1]
    fmt = Progressive(group, zeros=zeros, scale_dtype="float32")
    aux, codes, decoded, *_ = jax.tree.map(np.asarray, everything(fmt, w))
    s0 = np.abs(w).max(1).astype(np.float64) / 119
    np.testing.assert_allclose(aux["scale"][:, 0], s0, rtol=1e-6)
    w8 = np.clip(w / s0[:, None], -119, 119)
    for i, (part, q) in enumerate(zip(blocks(w8, group), blocks(codes, group), strict=True)):
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        s1, z = aux["step"][:, i].astype(int), aux["zero"][:, i].astype(int)
        np.testing.assert_allclose(s1, np.maximum((high - low) / 15, 1), atol=0.5 + 1e-4)
        assert s1.min() >= 1 and s1.max() <= 16
        s1, z = s1[:, None], z[:, None]
        near = decoded[:, i * group : (i + 1) * group] / s0[:, None]
        if zeros == "pre":
            np.testing.assert_allclose(z[:, 0], np.clip(-low / s1[:, 0], 0, 15), atol=0.5 + 1e-4)
            np.testing.assert_allclose(q, np.clip(part / s1 + z, 0, 15), atol=0.5 + 1e-3)
            np.testing.assert_allclose(near, (q.astype(int) - z) * s1, atol=1e-3)
        else:
            np.testing.assert_allclose(z[:, 0], -low, atol=0.5 + 1e-4)
            np.testing.assert_allclose(q, np.clip((part + z) / s1, 0, 15), atol=0.5 + 1e-3)
            np.testing.assert_allclose(near, q.astype(int) * s1 - z, atol=1e-3)
        # one rounding only: strictly inside the codes nothing is off by more than half a step
        inside = (q > 0) & (q < 15)
        assert (np.abs(near - part)[inside] <= (s1 / 2 + 1e-3 + 0 * near)[inside]).all()


@settings(max_examples=30, deadline=None)
@given(**shapes, kind=st.sampled_from([DualGrained, Progressive, lambda g: Progressive(g, zeros="post")]))
def test_rows_are_int8_numbers_under_one_scale(shape, loud, seed, kind):
    w = weights(*shape, loud, seed)
    _, _, decoded, numbers, scale = jax.tree.map(np.asarray, everything(kind(shape[-1]), w))
    assert numbers.dtype == np.int8 and scale.shape == (len(w), 1) and scale.dtype == np.float32
    assert np.abs(numbers.astype(int)).max() <= 127
    np.testing.assert_array_equal(numbers.astype(np.float32) * scale, decoded)


@pytest.mark.parametrize("loud", [1.0, 3.0, 10.0, 100.0])
def test_dual_grained_steps_and_range(loud):
    w = weights(32, 512, 128, loud, 0)
    aux, _, _, numbers, _ = jax.tree.map(np.asarray, everything(DualGrained(128), w))
    assert np.abs(numbers.astype(int)).max() <= 127 and 1 <= int(np.min(aux["step"])) and int(np.max(aux["step"])) <= 17


def test_the_guard_keeps_extreme_codes_out():
    fmt = DualGrained(4)
    aux = {"scale": np.ones((1, 1), np.float32), "step": np.int8([[18]]), "zero": np.uint8([[0]])}
    low, high = fmt.code_limits(aux)
    assert (int(low[0, 0]), int(high[0, 0])) == (0, 7)
    x = np.float32([[300, 130, 126, -50]])
    np.testing.assert_array_equal(fmt.encode(x, aux), [[7, 7, 7, 0]])
    middle = {**aux, "zero": np.uint8([[8]])}
    np.testing.assert_array_equal([a[0, 0] for a in fmt.code_limits(middle)], [1, 15])
    # A tighter guard never brings a number nearer.
    w = weights(8, 64, 16, 10.0, 1)
    aux = jax.tree.map(np.asarray, everything(DualGrained(16), w)[0])
    aux["step"] = np.minimum(aux["step"] * 3, 86).astype(np.int8)
    codes = np.asarray(DualGrained(16).encode(w, aux)).astype(int)
    errors = []
    for most in (127, 90, 60, 30):
        low, high = (np.repeat(np.asarray(a), 16, axis=1) for a in DualGrained(16).code_limits(aux, most))
        near = DualGrained(16).decode(np.clip(codes, low, high).astype(np.uint8), aux)
        errors.append(float(np.sum((near - w) ** 2)))
    assert errors == sorted(errors) and errors[0] < errors[-1]


def all_ranges(p: int, bits: int, zeros: str = "pre"):
    """Every integer group range within +-p, and for each the farthest int8 numbers that codes stand for.

    Written out with exact integers and NumPy's rounding; the values of a group are all integers within its range, and
    w8 is real, but its extremes are what reaches farthest.
    """
    top = 2**bits - 1
    low, high = np.meshgrid(-np.arange(p + 1), np.arange(p + 1), indexing="ij")
    s1 = np.maximum(np.rint((high - low) / top), 1)
    reached = []
    for value in (low, high):
        if zeros == "pre":
            z = np.clip(np.rint(-low / s1), 0, top)
            reached.append((np.clip(np.rint(value / s1) + z, 0, top) - z) * s1)
        else:
            reached.append(np.clip(np.rint((value - low) / s1), 0, top) * s1 + low)
    return s1, reached


def test_protective_range_exhaustively():
    s1, (least, most) = all_ranges(119, 4)
    assert s1.max() == 16 and least.min() >= -121 and most.max() <= 121 and 15 * s1.max() <= 255
    assert max(np.abs(r).max() for r in all_ranges(120, 4)[1]) == 128
    assert max(np.abs(r).max() for r in all_ranges(127, 4)[1]) == 132
    assert max(r.max() for r in all_ranges(120, 4, "post")[1]) <= 127  # the later release's range for its zeros
    assert {b: protective_range(b) for b in range(2, 8)} == {2: 95, 3: 111, 4: 119, 5: 123, 6: 125, 7: 126}
    for bits in range(2, 8):
        _, reached = all_ranges(protective_range(bits), bits)
        assert max(np.abs(r).max() for r in reached) <= 127


def test_the_worked_overflow_of_the_paper():
    """Group in [-113, 120], without a protective range: s1 = 16, z = 7, and 120 becomes code 15 and 128."""
    s1, z = round((120 + 113) / 15), round(113 / 16)
    assert (s1, z) == (16, 7) and (round(120 / s1) + z - z) * s1 == 128
    # With it, the same numbers are brought within +-119 first.
    w = np.float32([[-113, 120, 5, 0]])
    numbers = everything(Progressive(4), w)[3]
    assert np.abs(np.asarray(numbers, np.int32)).max() <= 121


def test_packed_multiply_and_add_in_32_bit_words():
    """What a GPU kernel does on four codes at once: one 32-bit multiply by s1, one byte-wise add of -z*s1 mod 256."""
    q = np.arange(16, dtype=np.uint32)
    words = q | (q[::-1] << 8) | (((q + 5) % 16) << 16) | (((q + 11) % 16) << 24)
    codes = words[:, None] >> np.uint32([0, 8, 16, 24]) & 0xFF  # [16, 4]
    seen, as_int8 = 0, jax.jit(Progressive(4).as_int8)
    for s1 in range(1, 17):
        for z in range(16):
            right = (codes.astype(np.int64) - z) * s1
            product = words * np.uint32(s1)  # no carry: every byte is at most 15 * 16 = 240
            bytes_ = product[:, None] >> np.uint32([0, 8, 16, 24]) & 0xFF
            got = ((bytes_ + np.uint32(-(z * s1) % 256)) & 0xFF).astype(np.uint8).view(np.int8)
            fits = (right >= -128) & (right <= 127)
            np.testing.assert_array_equal(got[fits], right[fits])
            aux = {"scale": np.ones((16, 1), np.float32), "step": np.full((16, 1), s1, np.int8)}
            ours, _ = as_int8(codes.astype(np.uint8), {**aux, "zero": np.full((16, 1), z, np.uint8)})
            np.testing.assert_array_equal(np.asarray(ours)[fits], right[fits])
            seen += fits.sum()
    assert seen > 5000


@pytest.mark.parametrize("fmt", [DualGrained(), Progressive()], ids=lambda f: f.name)
def test_storage(fmt):
    n, k = 8, 4096
    q = quantize_array(np.ones((n, k), np.float32), fmt, in_axes=1)
    assert q.bits_per_element == 4 + (8 + 8) / 128 + 16 / k == 4.12890625
    per_channel = quantize_array(np.ones((n, k), np.float32), Int(4, symmetric=False), in_axes=1)
    assert per_channel.bits_per_element == 4 + 40 / k  # QoQ's other format; float32 scale and a byte


def test_groups_of_zeros_constants_and_one_sign():
    w = np.zeros((4, 16), np.float32)
    w[1], w[2, :4], w[3] = 3.0, -2.0, np.linspace(1, 2, 16)
    for fmt in (DualGrained(4, "float32"), Progressive(4, scale_dtype="float32")):
        aux, _, near, *_ = jax.tree.map(np.asarray, everything(fmt, w))
        assert not near[0].any() and not near[2, 4:].any() and aux["scale"][0, 0] == 1
        np.testing.assert_allclose(near[1:], w[1:], atol=0.07 * 3)
        assert (near[3] > 0).all()


@given(x=st.floats(2.0**-14, 65504, width=32))
def test_scales_are_rounded_up(x):
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        up = np.asarray(round_up(np.float32(x), np.dtype(dtype))).astype(np.float64)
        assert x <= up <= x * (1 + 2.0**-7)


def test_settings_that_cannot_be():
    for bad in (
        lambda: DualGrained(None),  # type: ignore[arg-type]
        lambda: DualGrained(0),
        lambda: DualGrained(scale_dtype="half"),
        lambda: Progressive(bits=8),
        lambda: Progressive(zeros="middle"),
    ):
        with pytest.raises(FormatError, match=r"DualGrained:|Progressive:"):
            bad()
    with pytest.raises(FormatError, match="at most 64"):
        DualGrained(128).fit(np.ones((2, 64), np.float32))
    assert DualGrained(128).clamped(64) == DualGrained(64)

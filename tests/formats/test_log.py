"""The logarithmic format against float64 NumPy from the equations (AdaLog, section 3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.errors import FormatError
from qjax.formats import Log, TwinUniform
from qjax.formats.log import bounds, decode_unit
from qjax.testing import check_format

BITS = range(2, 9)
QS = range(10, 138)
F = np.float32


def reference(x: np.ndarray, bits: int, q: int, scale: float, zero: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes and values in float64, by logarithms and powers: what the equations say."""
    n, below = 2**bits, 2 ** (bits + 1) - 2
    u = np.clip(np.float64(x * (F(1) / F(scale))), F(1e-15), 1)
    raw = np.rint(-np.log2(u) * 37 / q).astype(int)
    last = n - 2 if zero == "reserve" else n - 1
    keep = (raw <= last) | (zero == "clamp")
    if zero == "reserve":
        keep &= np.asarray(x) > 0
    c = np.clip(raw, 0, last)
    shift, rest = c * q // 37, c * q % 37
    value = scale * np.ldexp(np.rint(np.exp2(-rest / 37) * below) / below, -shift) * keep
    return np.where(keep, c, last + 1), value


def test_tables_of_every_bit_width_and_base():
    for bits in BITS:
        n, below = 2**bits, 2 ** (bits + 1) - 2
        for q in QS:
            shifts, numerators, d = Log(bits, q, zero="mask").tables()
            assert shifts.dtype == numerators.dtype == np.int32 and shifts.shape == numerators.shape == (n,)
            assert d == below and (np.diff(shifts) >= 0).all()
            assert numerators.min() >= n - 1 and numerators.max() <= below and numerators[0] == below
            # Strictly decreasing, as whole numbers: M / 2**E, brought to one exponent.
            exact = [int(m) << int(shifts[-1] - e) for m, e in zip(numerators, shifts, strict=True)]
            assert bits == 2 or all(a > b for a, b in zip(exact, exact[1:], strict=False))
            ratio = numerators / below * np.exp2(np.arange(n) * q / 37 - shifts)
            assert np.abs(ratio - 1).max() <= 0.5 / (n - 1) * (1 + 1e-9)
    shifts, numerators, below = Log(4, 25, zero="mask").tables()
    assert shifts[:8].tolist() == [0, 0, 1, 2, 2, 3, 4, 4]
    assert numerators[:8].tolist() == [30, 19, 24, 29, 18, 23, 29, 18] and below == 30
    for q, step in ((37, 1), (74, 2)):
        shifts, numerators, below = Log(5, q, zero="clamp").tables()
        assert (shifts == step * np.arange(32)).all() and (numerators == below).all()
    assert Log(4, 25).tables()[1][-1] == 0 and (Log(4, 25).tables()[1][:-1] > 0).all()


def test_bounds_divide_float32_where_the_rounded_logarithm_does():
    for q in (*range(1, 10), *QS, 255):
        found = bounds(q, 64)
        k = np.arange(64)
        found, k = found[found > 1e-30], k[found > 1e-30]
        # In whole numbers: u < 2**(-(2k+1) q / 74) is u**74 * 2**((2k+1) q) < 1.
        for at, code in zip(found, k.tolist(), strict=True):
            for u, below in ((at, False), (np.nextafter(at, F(0)), True)):
                top, bottom = float(u).as_integer_ratio()
                left, right = top**74 << ((2 * code + 1) * q), bottom**74
                tie = left == right
                assert ((left < right) or (tie and code % 2 == 1)) == below, (q, code)


def test_levels_encode_to_themselves_at_every_bit_width_and_base():
    for bits in range(3, 9):
        for zero in ("mask", "reserve", "clamp"):
            for q in QS:
                fmt = Log(bits, q, zero=zero)
                values = fmt.values()[: fmt.levels]
                codes = np.arange(len(values))
                reached = values > 2e-15
                again = (values.astype(F)[:, None] < fmt.bounds()).sum(1)
                np.testing.assert_array_equal(again[reached], codes[reached])


def test_levels_come_back_under_any_scale():
    """Quantizing a dequantized tensor gives its codes, through reciprocals and packing too."""
    for bits, q, scale in ((4, 25, 1.7), (6, 118, 3e-5)):
        fmt = Log(bits, q, zero="mask")
        x = F(scale) * fmt.values()[: 2**bits].astype(F)
        reached = fmt.values()[: 2**bits] > 2e-15
        packed = fmt.quantize(x, scale=scale)
        np.testing.assert_array_equal(np.asarray(packed.unpacked()).ravel()[reached], np.arange(2**bits)[reached])
        np.testing.assert_allclose(packed.dequantize()[reached], x[reached], rtol=3e-7)


def test_bases_two_and_four_are_powers_of_two():
    x = np.append(np.random.default_rng(2).random(200) ** 8, [0.75, 0.9, 0.0]).astype(F)
    for bits in range(3, 9):
        for q, octaves in ((37, 1), (74, 2)):
            fmt = Log(bits, q, zero="mask")
            shifts, numerators, below = fmt.tables()
            assert (shifts == octaves * np.arange(2**bits)).all() and (numerators == below).all()
            if bits != 4:
                continue
            near = np.asarray(fmt.quantize(x, scale=0.75).dequantize())
            code = np.rint(-np.log2(np.clip(x.astype(np.float64) / 0.75, 1e-15, 1)) / octaves).astype(int)
            np.testing.assert_array_equal(near, np.where(code < 2**bits, np.ldexp(0.75, -octaves * code), 0))


@settings(max_examples=10, deadline=None)
@given(
    bits=st.integers(2, 8),
    q=st.sampled_from([10, 19, 25, 37, 74, 118, 137]),
    zero=st.sampled_from(["mask", "reserve", "clamp"]),
    scale=st.sampled_from([1.0, 0.25, 1.7, 3e4]),
    shape=st.sampled_from([(5, 24), (2, 3, 7)]),
    seed=st.integers(0, 99),
)
def test_codes_and_values_are_those_of_the_equations(bits, q, zero, scale, shape, seed):
    rng = np.random.default_rng(seed)
    x = (scale * np.exp2(-rng.exponential(6, shape))).astype(F)
    x.flat[:4] = [0, scale, 2 * scale, -scale]
    x.flat[4:8] = scale * np.exp2(-np.array([1.0, 3.0, 5.0, 0.5]))
    fmt = Log(bits, q, zero=zero)
    packed = fmt.quantize(x, scale=scale)
    codes, values = reference(x, bits, q, scale, zero)
    np.testing.assert_array_equal(np.asarray(packed.unpacked()).reshape(shape), codes)
    np.testing.assert_allclose(packed.dequantize(), values, rtol=3e-7, atol=1e-37)
    per = {8: 16} if zero == "mask" else {}
    stored = per.get(bits, bits + (zero == "mask"))
    rows = x.size // shape[-1]
    assert packed.nbytes == rows * -(-shape[-1] * stored // 8) + 4


def test_division_by_37_is_exact_for_every_code_and_base():
    product = np.arange(2**16, dtype=np.uint32)
    np.testing.assert_array_equal((product * np.uint32(56680)) >> 21, product // 37)
    for bits in (4, 6, 8):
        for q, r in ((10, 37), (74, 37), (137, 37), (1, 2)):
            fmt = Log(bits, q, r=r, zero="mask")
            values = np.asarray(decode_unit(jnp.arange(len(fmt.values()), dtype=jnp.uint16), fmt))
            seen = fmt.values() > 1e-37
            np.testing.assert_array_equal(values[seen], fmt.values().astype(F)[seen])
    root = Log(4, 1, r=2, zero="clamp")
    np.testing.assert_allclose(root.values(), 2.0 ** (-np.arange(16) / 2), rtol=0.5 / 15)
    np.testing.assert_array_equal(bounds(1, 9, 2), bounds(37, 9, 74))


def test_error_law_at_log_uniform_inputs():
    x = np.exp2(-np.random.default_rng(0).uniform(0, 8, 200_000)).astype(F)
    for q, law in ((10, 0.00293), (19, 0.01068), (37, 0.04174), (74, 0.18849)):
        t = np.log(2) * q / 37
        assert np.sinh(t) / t - 4 * np.sinh(t / 2) / t + 1 == pytest.approx(law, rel=2e-3)
        fmt = Log(7, q, zero="mask")
        inside = x > np.exp2(-q / 37 * (np.floor(8 * 37 / q - 0.5) + 0.5))  # whole steps, so that no step is half seen
        near = fmt.values()[(x[:, None] < fmt.bounds()[:60]).sum(1)]
        error = np.mean((near / x - 1)[inside & (x < np.exp2(-q / 74))] ** 2)
        assert error == pytest.approx(law, rel=0.04)


def test_more_bits_lose_no_more_of_probabilities_until_nothing_is_masked():
    rng = np.random.default_rng(3)
    p = np.exp(rng.standard_normal((600, 64)))
    p = (p / p.sum(-1, keepdims=True)).astype(F).ravel()
    power = np.mean(p.astype(np.float64) ** 2)
    for q, law in ((10, 0.00293), (19, 0.01068), (37, 0.04174), (74, 0.18849)):
        formats = [Log(bits, q, zero="mask") for bits in range(3, 9)]
        near = [fmt.values()[(p[:, None] < fmt.bounds()).sum(1)] for fmt in formats]
        errors = [np.mean((a - p) ** 2) for a in near]
        table = [0.29 / (2**fmt.bits - 1) * power**0.5 for fmt in formats]  # root mean square of its rounding
        whole = [(a > 0).all() for a in near]
        assert whole[-1] and (q == 74 or not whole[0])
        for n in range(5):
            assert errors[n + 1] ** 0.5 <= errors[n] ** 0.5 + table[n] + table[n + 1]
            if whole[n]:
                assert errors[n + 1] ** 0.5 == pytest.approx(errors[n] ** 0.5, abs=table[n] + table[n + 1])
        assert errors[-1] == pytest.approx(law * power, rel=0.05)


def test_shift_and_powers_of_two():
    sigma = 0.16997124254703522
    gelu = np.asarray(jax.nn.gelu(jnp.linspace(-4, 4, 97), approximate=False)).reshape(1, -1)
    plain, shifted = Log(4, 25), Log(4, 25, shift=sigma)
    near = np.asarray(shifted.quantize(gelu).dequantize())
    other = np.asarray(plain.quantize(gelu + F(sigma)).dequantize()) - F(sigma)
    np.testing.assert_allclose(near, other, atol=1e-6)
    assert near.max() == pytest.approx(gelu.max(), rel=1e-6)
    x = np.random.default_rng(1).random((3, 40)).astype(F)
    for zero in ("mask", "reserve", "clamp"):
        fmt = Log(4, 25, zero=zero)
        one, eighth = fmt.quantize(x, scale=0.75), fmt.quantize(x / 8, scale=0.75 / 8)
        np.testing.assert_array_equal(one.dequantize() / 8, eighth.dequantize())
    bad = Log(3, 37).quantize(np.array([np.nan, np.inf, -np.inf, 1.0], F), scale=2.0)
    assert np.asarray(bad.dequantize()).tolist() == [0, 2, 0, 1]


@pytest.mark.parametrize(
    "fmt", [Log(4, 25), Log(3, 37, zero="mask", group=16), TwinUniform(4, 3, negative=True)], ids=lambda f: f.name
)
def test_protocol(fmt):
    check_format(fmt, examples=8, nearest=False)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(bits=1), "2 to 8"),
        (dict(bits=9), "2 to 8"),
        (dict(bits=4, q=0), "whole q"),
        (dict(bits=4, q=300), "whole q"),
        (dict(bits=4, zero="maks"), "did you mean 'mask'"),
        (dict(bits=4, shift=-0.1), "not negative"),
    ],
)
def test_impossible_settings(settings, words):
    with pytest.raises(FormatError, match=words):
        Log(**settings)


def test_a_scale_is_positive_and_a_number_has_no_rows():
    with pytest.raises(FormatError, match="positive"):
        Log(4).quantize(np.ones(3, F), scale=0.0)
    with pytest.raises(FormatError, match="at least one axis"):
        Log(4).quantize(F(1))


def test_twin_grids():
    x = np.linspace(-0.3, 1.4, 400, dtype=F).reshape(1, -1)
    aux = {"scale": F([[0.125]])}
    for fmt in (TwinUniform(4, 3), TwinUniform(4, 2, negative=True)):
        step = F(0.125) / 2**fmt.ratio
        coarse = np.clip(np.rint(x / F(0.125)), 0, 7) * F(0.125)
        if fmt.negative:
            want = np.where(x < 0, np.clip(np.rint(x / step), -7, 0) * step, coarse)
        else:
            want = np.where(np.rint(x / step) < 8, np.maximum(np.rint(x / step), 0) * step, coarse)
        np.testing.assert_allclose(fmt.decode(fmt.encode(x, aux), aux), want, atol=1e-7)
    with pytest.raises(FormatError, match="from 0 to 15"):
        TwinUniform(4, 16)

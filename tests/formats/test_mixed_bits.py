"""2-bit and 4-bit strips against the method written strip by strip in float64, and what it says of itself."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import mixed_oracle as oracle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.errors import FormatError
from qjax.formats import Int, MixedBits, format_from_dict, quantize_array
from qjax.formats.mixed_bits import captured
from qjax.testing import check_format

PURE, ALIGNED, SPARSE = MixedBits(0, select="global"), MixedBits(), MixedBits(outliers=0.02)
ANYWHERE = MixedBits(0.3, select="global", wide_group=32, outliers=0.01)


def weights(n: int, k: int, seed: int = 0) -> np.ndarray:
    """Heavy-tailed rows of different sizes."""
    rng = np.random.default_rng(seed)
    return (rng.standard_t(4, (n, k)) * np.exp(0.4 * rng.standard_normal((n, 1)))).astype(np.float32)


@functools.partial(jax.jit, static_argnums=1)
def everything(w, fmt, weight=None):
    aux = fmt.fit(w, weight)
    codes = fmt.encode(w, aux)
    return aux, codes, fmt.decode(codes, aux)


def sparse_of(aux, n, k) -> tuple[np.ndarray, np.ndarray]:
    """Where the corrections of a matrix are, and what they are in units, read from CSR."""
    values, columns, rows = (np.asarray(aux[f"outlier_{name}"])[0] for name in ("value", "column", "row"))
    where, rest = np.zeros((n, k), bool), np.zeros((n, k), np.float16)
    for i in range(n):
        for at in range(rows[i], rows[i + 1]):
            where[i, columns[at]], rest[i, columns[at]] = True, values[at]
    return where, rest


def relative(near, w) -> float:
    return float(np.sum((np.asarray(near) - w) ** 2) / np.sum(w**2))


@pytest.mark.parametrize("fmt", [ALIGNED, MixedBits(0.3, select="global", wide_group=32)], ids=lambda f: f.name)
def test_property_suite(fmt):
    check_format(fmt, examples=4)


@settings(max_examples=8)
@given(
    n=st.sampled_from([1, 16, 21, 40]),
    k=st.sampled_from([7, 40, 64, 100, 192]),
    fmt=st.sampled_from([PURE, ALIGNED, SPARSE, ANYWHERE, MixedBits(1, select="global", wide_group=32)]),
    seed=st.integers(0, 3),
)
def test_equals_the_method_strip_by_strip(n, k, fmt, seed):
    w = weights(n, k, seed)
    aux, codes, near = everything(w, fmt)
    strips = fmt.strips(k)
    scores = oracle.sensitivity(w, fmt.strip, strips.count)
    if fmt.select == "aligned":
        wide = oracle.one_in_four(scores, k, fmt.strip)
    else:
        wide = oracle.most_sensitive(scores, strips.wide, k, fmt.strip)
    np.testing.assert_array_equal(fmt.is_wide(aux, k), wide)
    where = sparse_of(aux, n, k)[0] if "outlier_value" in aux else None
    want = oracle.quantized(w, wide, wide_group=fmt.wide_group, outliers=where)
    # Where float32 falls on the other side of a tie, a code is off by one.
    off = np.abs(np.asarray(near) - want) > 1e-5 * np.abs(w).max()
    assert off.mean() <= 0.01, off.sum()


@pytest.mark.parametrize(("n", "k"), [(32, 256), (20, 100)])
def test_outliers_stand_in_two_bit_strips_and_are_exact(n, k):
    w, fmt = weights(n, k), SPARSE
    aux, codes, near = jax.tree.map(np.asarray, everything(w, fmt))
    wide = np.repeat(np.asarray(fmt.is_wide(aux, k)), fmt.strip)[:k]
    where, rest = sparse_of(aux, n, k)
    assert not where[:, wide].any()
    assert where.sum() == fmt.outlier_count(n, k) <= 0.02 * n * (~wide).sum()
    rows, columns = aux["outlier_row"][0].astype(int), aux["outlier_column"][0].astype(int)
    assert rows[0] == 0 and rows[-1] == where.sum() and (np.diff(rows) >= 0).all()
    assert all((np.diff(columns[a:b]) > 0).all() for a, b in itertools.pairwise(rows))
    # Dense plus sparse is w to FP16 there, and the dense number elsewhere.
    dense = np.asarray(fmt.decode(codes, {name: a for name, a in aux.items() if "outlier" not in name}))
    np.testing.assert_array_equal(near[~where], dense[~where])
    one = oracle.unit(w)
    np.testing.assert_allclose(near[where], w[where], atol=float(np.abs(rest).max()) * one * 2.0**-11)
    np.testing.assert_array_equal(near[where], (dense + rest.astype(np.float32) * np.float32(one))[where])


def test_outliers_are_three_sigma_first_then_the_largest_errors():
    n, k, fmt = 48, 128, MixedBits(0, select="global", outliers=0.01)
    w = weights(n, k, 3)
    h = np.exp(np.random.default_rng(1).standard_normal(k)).astype(np.float32)
    aux, *_ = everything(w, fmt, h)
    where, _ = sparse_of(aux, n, k)
    near = oracle.quantized(w, np.zeros(k // 16, bool))
    score = (near - w) ** 2 * h
    strips = w.reshape(n, k // 16, 16)
    far = np.abs(strips - strips.mean((0, 2))[:, None]) > 3 * strips.std((0, 2))[:, None]
    far = far.reshape(n, k)
    order = sorted(np.ndindex(n, k), key=lambda at: (not far[at], -score[at]))
    want = np.zeros((n, k), bool)
    for at in order[: fmt.outlier_count(n, k)]:
        want[at] = True
    assert (want != where).sum() <= 2  # equal scores up to float32
    assert far.sum() > want.sum()  # all of them are three-sigma
    plenty = MixedBits(0, select="global", outliers=0.05)
    assert (sparse_of(everything(w, plenty, h)[0], n, k)[0] & far).sum() == far.sum() < plenty.outlier_count(n, k)


def test_two_bit_numbers_come_back_exactly():
    rng = np.random.default_rng(0)
    w = np.zeros((48, 192), np.float32)
    for tile, strip in itertools.product(range(3), range(12)):
        rows = np.stack([rng.permutation([0, 1, 2, 3] * 4) for _ in range(16)])
        w[16 * tile : 16 * tile + 16, 16 * strip : 16 * strip + 16] = rows * np.float32(0.01 * (1 + tile + strip))
    aux, _, near = everything(w, PURE)
    np.testing.assert_allclose(near, w, rtol=2.0**-11)
    codes = np.asarray(aux["words"]) >> 6
    offsets = np.asarray(aux["tile_zero"])
    assert not codes.any() and (offsets == (7 | 7 << 4 | 15 << 8)).all()


def test_all_strips_of_four_bits_are_group_quantization():
    w = weights(24, 256)
    fmt = MixedBits(1, select="global", wide_group=128)
    _, codes, near = everything(w, fmt)
    plain = Int(4, group=128, symmetric=False)
    aux = plain.fit(w)
    one = oracle.unit(w)
    scale = (np.asarray(aux["scale"]) / one).astype(np.float16).astype(np.float32) * np.float32(one)
    low = np.minimum(w.reshape(24, 2, 128).min(-1), 0)
    aux = {"scale": scale, "zero": np.clip(np.rint(-low / scale), 0, 15).astype(np.uint8)}
    np.testing.assert_array_equal(codes, plain.encode(w, aux))
    np.testing.assert_allclose(near, plain.decode(codes, aux), rtol=1e-6)


def test_zeros_constants_and_quiet_rows():
    w = weights(32, 128)
    w[3, :16] = 0  # a group
    w[:16, 16:32] = 0  # a tile
    w[7, 32:48] = 0.3
    w[9, 48:64] = -0.3
    w[10] *= 1e-5  # a quiet row in a loud tile
    for fmt in (PURE, ALIGNED, MixedBits(1, select="global", wide_group=16)):
        aux, _, near = jax.tree.map(np.asarray, everything(w, fmt))
        assert np.isfinite(near).all()
        assert not near[3, :16].any() and not near[:16, 16:32].any()
        if fmt is not PURE:
            continue
        # The scales of the quiet row are at least s', but for the strip that is zero.
        scale = np.asarray(fmt.grid(aux, 32, 128)[0])[10].reshape(8, 16)[:, 0]
        least = aux["tile_scale"].astype(np.float32).reshape(2, 9)[0, :8] * oracle.unit(w)
        assert (scale >= least)[[0, *range(2, 8)]].all() and scale[1] == 0
    same = np.full((16, 48), 0.7, np.float32)
    np.testing.assert_allclose(everything(same, PURE)[2], same, rtol=2.0**-10)  # a constant group: 0 and its end
    nothing = everything(np.zeros((16, 64), np.float32), SPARSE)
    assert not np.asarray(nothing[2]).any()
    np.testing.assert_array_equal(np.asarray(nothing[0]["tile_scale"], np.float32), 1)


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e30])
def test_the_unit_of_a_matrix_keeps_float16_in_range(size):
    w = weights(16, 64).astype(np.float64)
    loud = relative(everything(w.astype(np.float32), SPARSE)[2], w)
    got = relative(np.asarray(everything((w * size).astype(np.float32), SPARSE)[2], np.float64), w * size)
    assert got == pytest.approx(loud, rel=0.2)


def test_columns_that_are_not_there_change_nothing():
    """K and N are padded: what is decoded is that of the padded matrix where both choose the same strips."""
    w = weights(21, 90, 5)
    padded = np.zeros((32, 96), np.float32)
    padded[:21, :90] = w
    for fmt in (PURE, MixedBits(1, select="global", wide_group=32)):
        np.testing.assert_array_equal(everything(w, fmt)[2], np.asarray(everything(padded, fmt)[2])[:21, :90])


def test_uniform_groups_have_the_textbook_error():
    """Nearest codes of a uniform distribution: s**2 / 12, with a ratio of 25 between 2 and 4 bits."""
    rng = np.random.default_rng(0)
    w = rng.uniform(-0.5, 0.5, (256, 192)).astype(np.float32)
    w[:, ::16], w[:, 1::16] = -0.5, 0.5
    inner = np.ones(192, bool)
    inner[::16] = inner[1::16] = False
    errors = []
    for bits, fmt in ((2, PURE), (4, MixedBits(1, select="global", wide_group=16))):
        near = np.asarray(everything(w, fmt)[2])
        scale, zero, top = fmt.grid(everything(w, fmt)[0], 256, 192)
        s = float(np.median(np.asarray(scale)))
        assert s == pytest.approx(1 / (2**bits - 1), rel=1e-3)
        # The range is moved by at most half a step so that 0 is a code; numbers in it have the error of the text.
        low, high = -np.asarray(zero) * scale, (np.asarray(top) - np.asarray(zero)) * scale
        there = (w > low - s / 2) & (w < high + s / 2) & inner
        error = float(np.mean((near - w)[there] ** 2))
        assert error == pytest.approx(s**2 / 12, rel=0.03)
        errors.append(error)
    assert errors[0] / errors[1] == pytest.approx(25, rel=0.05)


def test_scales_of_normal_groups():
    w = np.random.default_rng(0).standard_normal((512, 192)).astype(np.float32)
    aux, *_ = everything(w, PURE)
    scale, _, _ = PURE.grid(aux, 512, 192)
    assert float(np.mean(scale)) == pytest.approx(3.53 / 3, rel=0.02)


def mean_error(fmt, seeds=range(4)) -> float:
    return float(np.mean([relative(everything(weights(64, 384, s), fmt)[2], weights(64, 384, s)) for s in seeds]))


@pytest.mark.parametrize(
    "rising",
    [
        [MixedBits(p, select="global") for p in (0, 1 / 8, 1 / 4, 1 / 2, 1)],
        [MixedBits(outliers=r) for r in (0, 0.0025, 0.005, 0.02)],
        [MixedBits(0, select="global", strip=g) for g in (64, 32, 16, 8)],
        [MixedBits(0, select="global", scale_bits=(b, b, b)) for b in (1, 2, 3)],
        [MixedBits(0, select="global", scale_bits=(3, 3, b)) for b in (3, 4)],
    ],
    ids=["share", "outliers", "strip", "scale bits", "scale bits of one"],
)
def test_more_storage_has_less_error(rising):
    errors = [mean_error(f) for f in rising]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0], errors


def test_strips_by_sensitivity_beat_strips_by_chance():
    """In the sum over strips of sensitivity times error."""
    gains = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        w = weights(32, 256, seed) * np.exp(0.7 * np.repeat(rng.standard_normal(16), 16)).astype(np.float32)
        scores = oracle.sensitivity(w, 16, 16)
        best = oracle.one_in_four(scores, 256, 16)
        chance = oracle.one_in_four(rng.random(16), 256, 16)

        def loss(wide, w=w, scores=scores):
            error = ((oracle.quantized(w, wide) - w) ** 2).reshape(32, 16, 16).sum((0, 2))
            return float((error * scores).sum())

        assert loss(np.asarray(ALIGNED.is_wide(everything(w, ALIGNED)[0], 256))) == loss(best)
        gains.append(loss(chance) / loss(best))
        anywhere = MixedBits(select="global")
        assert float(captured(scores, best)) <= 1 + 1e-6
        assert float(captured(scores, anywhere.is_wide(everything(w, anywhere)[0], 256))) == pytest.approx(1)
    assert np.mean(gains) > 1.1


def test_exclusive_outliers_beat_outliers_anywhere():
    """Half a percent of the 2-bit weights, in 2-bit strips only, against half a percent of all weights anywhere."""
    won = []
    for seed in range(4):
        w = weights(64, 256, seed)
        aux, _, near = everything(w, MixedBits(outliers=0.005))
        wide = np.asarray(ALIGNED.is_wide(aux, 256))
        columns = np.repeat(~wide, 16)
        error = (oracle.quantized(w, wide) - w) ** 2
        everywhere = np.abs(w - w.mean()) > 3 * w.std()  # by size alone, in 4-bit strips too
        order = np.argsort(-np.where(everywhere, np.abs(w), 0), axis=None)[: int(0.005 * 64 * columns.sum())]
        where = np.zeros(w.size, bool)
        where[order] = True
        other = oracle.quantized(w, wide, outliers=where.reshape(w.shape))
        squares = lambda q, w=w, c=columns: ((np.asarray(q) - w) ** 2)[:, c].sum()  # noqa: E731
        assert squares(near) < error[:, columns].sum()
        won.append(squares(other) / squares(near))
    assert np.mean(won) > 1


def test_settings_that_cannot_be():
    for bad, words in (
        ({"share": 0.5}, "one strip in four"),
        ({"share": 1.5, "select": "global"}, "share=1.5"),
        ({"select": "alined"}, "aligned"),
        ({"strip": 12}, "8, 16, 32 or 64"),
        ({"tile": 0}, "tile=0"),
        ({"wide_group": 40}, "multiple of the strip"),
        ({"outliers": 0.5}, "outliers=0.5"),
        ({"share": 1, "select": "global", "outliers": 0.01}, "2-bit strips only"),
        ({"scale_bits": (4, 4, 4)}, "10 together"),
    ):
        with pytest.raises(FormatError, match=words):
            MixedBits(**bad)
    with pytest.raises(FormatError, match="not fitted from a range"):
        ALIGNED.from_range(np.zeros((1, 1)), np.ones((1, 1)))
    assert format_from_dict(ANYWHERE.to_dict()) == ANYWHERE
    assert [f.name for f in (PURE, ALIGNED, SPARSE, ANYWHERE)] == [
        "mixed 2/4 0%",
        "mixed 2/4 25%",
        "mixed 2/4/16 25% +2%",
        "mixed 2/4/16 30% global +1%",
    ]


def test_not_a_number_is_no_outlier():
    w = weights(16, 128)
    bad = w.copy()
    bad[2, 5], bad[3, 70] = np.nan, np.inf
    _, _, near = everything(bad, SPARSE)
    clean = np.where(np.isfinite(bad), bad, 0)
    got, want = np.asarray(near), np.asarray(everything(clean, SPARSE)[2])
    assert np.isfinite(got).all() and got[2, 5] == 0 and got[3, 70] >= 0
    np.testing.assert_array_equal(got[np.isfinite(bad)], want[np.isfinite(bad)])


def test_stacks_are_independent():
    w = np.stack([weights(20, 100, s) * 10.0**s for s in range(3)]).astype(np.float32)
    q = quantize_array(w, SPARSE, in_axes=2, stack_axes=0)
    for i in range(3):
        one = quantize_array(w[i], SPARSE, in_axes=1)
        np.testing.assert_array_equal(q[i].dequantize(), one.dequantize())
        jax.tree.map(np.testing.assert_array_equal, dict(q[i].aux), dict(one.aux))
    assert jnp.isfinite(q.dequantize()).all()

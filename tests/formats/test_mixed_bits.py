"""2-bit and 4-bit strips against the method written strip by strip in float64, and what it says of itself."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import jax
import mixed_oracle as oracle
import numpy as np
import pytest

from qjax.errors import FormatError
from qjax.formats import Int, MixedBits, format_from_dict, quantize_array
from qjax.formats.mixed_bits import captured
from qjax.testing import check_format

PURE, ALIGNED, SPARSE = MixedBits(0, select="global"), MixedBits(), MixedBits(outliers=0.02)
FOUR = MixedBits(1, select="global", wide_group=16)
ANYWHERE = MixedBits(0.3, select="global", wide_group=32, outliers=0.01)


def weights(n: int, k: int, seed: int = 0) -> np.ndarray:
    """Heavy-tailed rows of different sizes."""
    rng = np.random.default_rng(seed)
    return (rng.standard_t(4, (n, k)) * np.exp(0.4 * rng.standard_normal((n, 1)))).astype(np.float32)


class Made(NamedTuple):
    """What a format makes of a matrix."""

    aux: dict[str, np.ndarray]
    codes: np.ndarray
    near: np.ndarray
    wide: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    top: np.ndarray


@functools.partial(jax.jit, static_argnums=1)
def _make(w, fmt, weight):
    aux = fmt.fit(w, weight)
    codes = fmt.encode(w, aux)
    return Made(aux, codes, fmt.decode(codes, aux), fmt.is_wide(aux, w.shape[1]), *fmt.grid(aux, *w.shape))


def make(w, fmt, weight=None) -> Made:
    """All of it in one compiled function; most tests share shapes."""
    weight = np.ones((1, w.shape[1]), np.float32) if weight is None else weight
    return jax.tree.map(np.asarray, _make(w, fmt, weight))


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


@pytest.mark.slow
def test_property_suite():
    check_format(ALIGNED, examples=2)


@pytest.mark.slow
def test_property_suite_of_other_shares():
    for fmt in (MixedBits(0.3, select="global", wide_group=32), PURE, MixedBits(1, select="global")):
        check_format(fmt, examples=20)


@pytest.mark.every(3)
@pytest.mark.parametrize(
    ("fmt", "n", "k"),
    [
        (PURE, 48, 192),
        (ALIGNED, 48, 192),
        (ALIGNED, 1, 7),
        (SPARSE, 20, 100),
        (SPARSE, 48, 192),
        (ANYWHERE, 20, 100),
        (FOUR, 20, 100),
    ],
)
def test_equals_the_method_strip_by_strip(fmt, n, k):
    strips = fmt.strips(k)
    for seed in range(3):
        w = weights(n, k, seed)
        made = make(w, fmt)
        scores = oracle.sensitivity(w, fmt.strip, strips.count)
        if fmt.select == "aligned":
            wide = oracle.one_in_four(scores, k, fmt.strip)
        else:
            wide = oracle.most_sensitive(scores, strips.wide, k, fmt.strip)
        np.testing.assert_array_equal(made.wide, wide)
        where = sparse_of(made.aux, n, k)[0] if "outlier_value" in made.aux else None
        want = oracle.quantized(w, wide, wide_group=fmt.wide_group, outliers=where)
        # Where float32 falls on the other side of a tie, a code is off by one.
        off = np.abs(made.near - want) > 1e-5 * np.abs(w).max()
        assert off.mean() <= 0.01, off.sum()


@pytest.mark.every(2)
@pytest.mark.parametrize(("n", "k"), [(48, 192), (20, 100)])
def test_outliers_stand_in_two_bit_strips_and_are_exact(n, k):
    w, fmt = weights(n, k), SPARSE
    made = make(w, fmt)
    aux, codes, near = made[:3]
    wide = np.repeat(made.wide, fmt.strip)[:k]
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
    n, k, fmt = 48, 192, MixedBits(0, select="global", outliers=0.01)
    w = weights(n, k, 3)
    h = np.exp(np.random.default_rng(1).standard_normal(k)).astype(np.float32)
    where, _ = sparse_of(make(w, fmt, h[None]).aux, n, k)
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
    assert (sparse_of(make(w, plenty, h[None]).aux, n, k)[0] & far).sum() == far.sum() < plenty.outlier_count(n, k)


def test_two_bit_numbers_come_back_exactly():
    rng = np.random.default_rng(0)
    w = np.zeros((48, 192), np.float32)
    for tile, strip in itertools.product(range(3), range(12)):
        rows = np.stack([rng.permutation([0, 1, 2, 3] * 4) for _ in range(16)])
        w[16 * tile : 16 * tile + 16, 16 * strip : 16 * strip + 16] = rows * np.float32(0.01 * (1 + tile + strip))
    made = make(w, PURE)
    aux, near = made.aux, made.near
    np.testing.assert_allclose(near, w, rtol=2.0**-11)
    codes = np.asarray(aux["words"]) >> 6
    offsets = np.asarray(aux["tile_zero"])
    assert not codes.any() and (offsets == (7 | 7 << 4 | 15 << 8)).all()


def test_all_strips_of_four_bits_are_group_quantization():
    w = weights(20, 100)
    _, codes, near = make(w, FOUR)[:3]
    plain = Int(4, group=16, symmetric=False)
    aux = plain.fit(w)
    one = oracle.unit(w)
    scale = (np.asarray(aux["scale"]) / one).astype(np.float16).astype(np.float32) * np.float32(one)
    low = np.minimum(np.pad(w, ((0, 0), (0, 12))).reshape(20, 7, 16).min(-1), 0)
    aux = {"scale": scale, "zero": np.clip(np.rint(-low / scale), 0, 15).astype(np.uint8)}
    np.testing.assert_array_equal(codes, plain.encode(w, aux))
    np.testing.assert_allclose(near, plain.decode(codes, aux), rtol=1e-6)


def test_zeros_constants_and_quiet_rows():
    w = weights(48, 192)
    w[3, :16] = 0  # a group
    w[:16, 16:32] = 0  # a tile
    w[7, 32:48] = 0.3
    w[9, 48:64] = -0.3
    w[10] *= 1e-5  # a quiet row in a loud tile
    for fmt in (PURE, ALIGNED):
        made = make(w, fmt)
        assert np.isfinite(made.near).all()
        assert not made.near[3, :16].any() and not made.near[:16, 16:32].any()
    # The scales of the quiet row are at least s', but for the strip that is zero.
    made = make(w, PURE)
    scale = made.scale[10].reshape(12, 16)[:, 0]
    least = made.aux["tile_scale"].astype(np.float32).reshape(3, 12)[0] * oracle.unit(w)
    assert (scale >= least)[[0, *range(2, 12)]].all() and scale[1] == 0
    same = np.full((48, 192), 0.7, np.float32)
    np.testing.assert_allclose(make(same, PURE).near, same, rtol=2.0**-10)  # a constant group: 0 and its end
    nothing = make(np.zeros((48, 192), np.float32), SPARSE)
    assert not nothing.near.any()
    np.testing.assert_array_equal(nothing.aux["tile_scale"].astype(np.float32), 1)


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e30])
def test_the_unit_of_a_matrix_keeps_float16_in_range(size):
    w = weights(48, 192).astype(np.float64)
    loud = relative(make(w.astype(np.float32), SPARSE).near, w)
    got = relative(make((w * size).astype(np.float32), SPARSE).near.astype(np.float64), w * size)
    assert got == pytest.approx(loud, rel=0.2)


def test_columns_that_are_not_there_change_nothing():
    """K and N are padded: what is decoded is that of the padded matrix where both choose the same strips."""
    w = weights(41, 185, 5)
    padded = np.zeros((48, 192), np.float32)
    padded[:41, :185] = w
    np.testing.assert_array_equal(make(w, PURE).near, make(padded, PURE).near[:41, :185])


def test_uniform_groups_have_the_textbook_error():
    """Nearest codes of a uniform distribution: s**2 / 12, with a ratio of 25 between 2 and 4 bits."""
    inner = np.ones(192, bool)
    inner[::16] = inner[1::16] = False
    errors = []
    for bits, fmt in ((2, PURE), (4, FOUR)):
        squares = []
        for seed in range(8):
            w = np.random.default_rng(seed).uniform(-0.5, 0.5, (48, 192)).astype(np.float32)
            w[:, ::16], w[:, 1::16] = -0.5, 0.5
            made = make(w, fmt)
            s = float(np.median(made.scale))
            assert s == pytest.approx(1 / (2**bits - 1), rel=1e-3)
            # The range is moved by at most half a step so that 0 is a code; numbers in it have the error of the text.
            low, high = -made.zero * made.scale, (made.top - made.zero) * made.scale
            there = (w > low - s / 2) & (w < high + s / 2) & inner
            squares.append((made.near - w)[there] ** 2)
        error = float(np.mean(np.concatenate(squares)))
        assert error == pytest.approx(s**2 / 12, rel=0.03)
        errors.append(error)
    assert errors[0] / errors[1] == pytest.approx(25, rel=0.05)


def test_scales_of_normal_groups():
    scales = [
        make(np.random.default_rng(s).standard_normal((48, 192)).astype(np.float32), PURE).scale for s in range(8)
    ]
    assert float(np.mean(scales)) == pytest.approx(3.53 / 3, rel=0.02)


def mean_error(fmt, seeds=range(4)) -> float:
    return float(np.mean([relative(make(weights(48, 192, s), fmt).near, weights(48, 192, s)) for s in seeds]))


@pytest.mark.every(2)
@pytest.mark.parametrize(
    "rising",
    [
        [PURE, MixedBits(1 / 4, select="global"), MixedBits(1 / 2, select="global"), FOUR],
        [ALIGNED, MixedBits(outliers=0.005), SPARSE],
        [MixedBits(0, select="global", strip=g) for g in (64, 32, 16, 8)],
        [MixedBits(0, select="global", scale_bits=b) for b in ((1, 1, 1), (2, 2, 2), (3, 3, 3), (3, 3, 4))],
    ],
    ids=["share", "outliers", "strip", "scale bits"],
)
def test_more_storage_has_less_error(rising):
    errors = [mean_error(f) for f in rising]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0], errors


def test_strips_by_sensitivity_beat_strips_by_chance():
    """In the sum over strips of sensitivity times error."""
    gains, anywhere = [], MixedBits(1 / 4, select="global")
    for seed in range(6):
        rng = np.random.default_rng(seed)
        w = weights(48, 192, seed) * np.exp(0.7 * np.repeat(rng.standard_normal(12), 16)).astype(np.float32)
        scores = oracle.sensitivity(w, 16, 12)
        best = oracle.one_in_four(scores, 192, 16)
        chance = oracle.one_in_four(rng.random(12), 192, 16)

        def loss(wide, w=w, scores=scores):
            error = ((oracle.quantized(w, wide) - w) ** 2).reshape(48, 12, 16).sum((0, 2))
            return float((error * scores).sum())

        np.testing.assert_array_equal(make(w, ALIGNED).wide, best)
        gains.append(loss(chance) / loss(best))
        assert float(captured(scores, best)) <= 1 + 1e-6
        assert float(captured(scores, make(w, anywhere).wide)) == pytest.approx(1)
    assert np.mean(gains) > 1.1


def test_exclusive_outliers_beat_outliers_anywhere():
    """As many outliers in 2-bit strips only, and anywhere: the first have less error in 2-bit strips."""
    won = []
    for seed in range(4):
        w = weights(48, 192, seed)
        made = make(w, MixedBits(outliers=0.005))
        columns = np.repeat(~made.wide, 16)
        error = (oracle.quantized(w, made.wide) - w) ** 2
        count = int(0.005 * 48 * columns.sum())
        where = np.zeros(w.size, bool)
        where[np.argsort(-np.abs(w - w.mean()), axis=None)[:count]] = True  # the largest, in 4-bit strips too
        other = oracle.quantized(w, made.wide, outliers=where.reshape(w.shape))
        squares = lambda q, w=w, c=columns: ((q - w) ** 2)[:, c].sum()  # noqa: E731
        assert squares(made.near) < error[:, columns].sum()
        won.append(squares(other) / squares(made.near))
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
    w = weights(48, 192)
    bad = w.copy()
    bad[2, 5], bad[3, 70] = np.nan, np.inf
    got = make(bad, SPARSE).near
    want = make(np.where(np.isfinite(bad), bad, 0), SPARSE).near
    assert np.isfinite(got).all() and got[2, 5] == 0 and got[3, 70] >= 0
    np.testing.assert_array_equal(got[np.isfinite(bad)], want[np.isfinite(bad)])


def test_stacks_are_independent():
    w = np.stack([weights(20, 100, s) * 10.0**s for s in range(3)]).astype(np.float32)
    fit = jax.jit(lambda x: quantize_array(x, SPARSE, in_axes=2, stack_axes=0).decode_canonical())
    for i, near in enumerate(np.asarray(fit(w))):
        np.testing.assert_array_equal(near, make(w[i], SPARSE).near)

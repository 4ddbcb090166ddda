"""Trit-planes: the checks of PTQTP against the algorithm written in float64, and the bits that are stored."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qjax
from qjax.errors import FormatError
from qjax.formats import TritPlanes, quantize_array, trit_steps
from qjax.formats.trit_planes import TritPacking
from qjax.testing import check_format

# ----------------------------------------------------------------------------------------------------------- the oracle


def scanned(planes: int) -> list[tuple[int, ...]]:
    """All levels in the order in which ties are resolved: fewer nonzero trits first, c and -c one after the other."""
    positive = [c for c in itertools.product((1, 0, -1), repeat=planes) if c > (0,) * planes]
    ordered = sorted(positive, key=lambda c: sum(map(abs, c)))
    return [(0,) * planes, *itertools.chain.from_iterable((c, tuple(-t for t in c)) for c in ordered)]


def choose(w: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Trits [K, G] of one group: a strict "<" while scanning."""
    best, out = np.full(w.shape, np.inf), np.zeros((len(alpha), *w.shape))
    for c in scanned(len(alpha)):
        error = (w - np.dot(c, alpha)) ** 2
        better = error < best
        best = np.where(better, error, best)
        out[:, better] = np.array(c)[:, None]
    return out


def reference(w: np.ndarray, planes: int, rounds: int = 50, eps: float = 1e-4) -> tuple[np.ndarray, np.ndarray, int]:
    """(scales, trits, rounds) of one group in float64, from the sign of w and with a ridge of 1e-8."""
    t = np.tile(np.where(w < 0, -1.0, 1.0), (planes, 1))
    alpha = np.ones(planes)
    count = 0
    while count < rounds:
        count += 1
        a = t @ t.T + 1e-8 * np.eye(planes)
        b = np.array([np.sum(plane * w) for plane in t])  # of equal planes to the bit: a product of matrices differs
        if planes == 2:
            det = a[0, 0] * a[1, 1] - a[0, 1] ** 2
            new = np.array([a[1, 1] * b[0] - a[0, 1] * b[1], a[0, 0] * b[1] - a[0, 1] * b[0]]) / det
        else:
            new = np.linalg.solve(a, b)
        t = choose(w, new)
        stop = np.linalg.norm(new - alpha) < eps
        alpha = new
        if stop:
            break
    return alpha, t, count


@functools.partial(jax.jit, static_argnames=("planes", "init", "tied"))
def fitted(w, planes=2, init="sign", tied=False):
    """Scales refitted to the last planes, their moments, rounds: of groups [M, G]."""
    size = jnp.abs(w.T)
    start = trit_steps.first_moments(size, True, planes, init)
    found = trit_steps.run(size, start, tied=tied, eps=1e-4 * jnp.mean(size, axis=0))
    scales = trit_steps.solve(found.moments, tied)
    return scales, trit_steps.topology(size, scales), found.rounds


def relative(x: np.ndarray, fmt: TritPlanes, init: str = "sign") -> float:
    near = jax.jit(lambda x: fmt.decode(*qjax.PTQTP(init=init).round(x, fmt)))(x)
    return float(np.linalg.norm(near - x) / np.linalg.norm(x))


def normal(rows: int, group: int = 128, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, group)).astype(np.float32)


# ------------------------------------------------------------------------------------------------------ the alternation


def test_comes_to_what_the_algorithm_in_float64_comes_to():
    x = normal(40, 64)
    scales, _, rounds = fitted(x)
    scales = np.asarray(scales)
    got = np.array([np.sum((w - choose(w, a).T @ a) ** 2) for w, a in zip(x.astype(float), scales.T, strict=True)])
    want, counts = [], []
    for w in x.astype(np.float64):
        alpha, t, count = reference(w, 2)
        alpha = np.linalg.lstsq(t.T, w, rcond=None)[0]
        want.append(np.sum((w - choose(w, alpha).T @ alpha) ** 2))
        counts.append(count)
    same = np.isclose(got, want, rtol=1e-3)
    assert same.mean() > 0.9, got[~same] / np.array(want)[~same]  # float32 may fall to the other side of a tie
    assert abs(rounds.mean() - np.mean(counts)) < 1


@functools.partial(jax.jit, static_argnums=0)
def encoded(fmt, w, aux):
    codes = fmt.encode(w, aux)
    return codes, fmt.decode(codes, aux)


@settings(max_examples=15, deadline=None)
@given(
    planes=st.sampled_from([1, 2, 3]),
    kind=st.sampled_from(["normal", "coarse", "equal", "zero"]),
    seed=st.integers(0, 99),
)
def test_the_choice_equals_brute_force(planes, kind, seed):
    rng = np.random.default_rng(seed)
    w, alpha = rng.standard_normal((3, 24)), rng.standard_normal((3, planes))
    if kind == "coarse":  # many ties, all numbers exact
        w, alpha = rng.integers(-8, 9, w.shape) / 4, rng.integers(-4, 5, alpha.shape) / 2
    if kind in ("equal", "zero"):
        w, alpha = rng.integers(-8, 9, w.shape) / 4, np.full_like(alpha, 0.5 if kind == "equal" else 0.0)
    fmt = TritPlanes(planes, 24, scale_dtype="float32")
    aux = {f"scale{k}": jnp.asarray(alpha[:, k : k + 1], jnp.float32) for k in range(planes)}
    w = w.astype(np.float32)
    code, near = map(np.asarray, encoded(fmt, w, aux))
    code = code.astype(int)
    trits = np.stack([code // 3 ** (planes - 1 - k) % 3 - 1 for k in range(planes)], 1)
    for row in range(3):
        want = choose(w[row].astype(np.float64), alpha[row].astype(np.float32).astype(np.float64))
        if kind == "normal":
            np.testing.assert_allclose(near[row], alpha[row] @ want, rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_array_equal(trits[row], want)
    found = jax.jit(trit_steps.topology)(jnp.abs(w.T), jnp.asarray(alpha.T, jnp.float32))
    got = np.stack([trits[r] @ trits[r].T for r in range(3)], -1)
    np.testing.assert_array_equal(found.gram, got)
    np.testing.assert_allclose(found.cross, np.stack([trits[r] @ w[r] for r in range(3)], -1), rtol=1e-5, atol=1e-5)


@pytest.mark.every(3)
@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize("init", ["sign", "residual"])
def test_the_error_never_grows(planes, init):
    x = np.concatenate([normal(30), np.random.default_rng(1).standard_t(3, (30, 128)).astype(np.float32)])
    size = jnp.abs(x.T)
    start = trit_steps.first_moments(size, True, planes, init)
    _, f = jax.jit(trit_steps.trajectory, static_argnums=2)(size, start, 20)
    assert (np.diff(f, axis=0) <= 1e-6 * np.sum(x**2, 1)).all()


@pytest.mark.parametrize("planes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_normal_equations_hold_at_the_end(planes):
    x = normal(50)
    scales, found, _ = fitted(x, planes)
    again = trit_steps.solve(found, False)  # a group may still have been moving by less than eps
    left = found.cross - jnp.einsum("kmg,mg->kg", found.gram, again)
    assert np.abs(left).max() < 1e-3
    assert np.abs(again - scales).max() < 5e-3


def test_scaling_a_weight_scales_the_result_and_signs_do_not_matter():
    x, fmt = normal(8, 256), TritPlanes(2, 128, scale_dtype="float32")
    run = jax.jit(lambda x: qjax.PTQTP().round(x, fmt))
    codes, aux = run(x)
    near = np.asarray(fmt.decode(codes, aux))
    for factor in (2.0**-20, 2.0**30):
        np.testing.assert_array_equal(fmt.decode(*run(x * np.float32(factor))), near * np.float32(factor))
    off = np.asarray(fmt.decode(*run(x * np.float32(0.0123)))) / np.float32(0.0123) - near
    assert np.linalg.norm(off) < 0.02 * np.linalg.norm(near)  # rounding may resolve a tie the other way
    negative, other = run(-x)
    np.testing.assert_array_equal(negative, 8 - np.asarray(codes))
    jax.tree.map(np.testing.assert_array_equal, aux, other)


def test_planted_planes_are_a_fixed_point():
    t = np.random.default_rng(0).integers(-1, 2, (2, 128, 5)).astype(np.float32)
    w = 3 * t[0] + t[1]
    scales, f = trit_steps.trajectory(jnp.abs(w), trit_steps.moments(jnp.asarray(w), list(jnp.asarray(t))), 1)
    np.testing.assert_allclose(scales[0], np.broadcast_to([[3.0], [1.0]], (2, 5)), rtol=1e-5)
    assert np.abs(f).max() < 1e-3


@pytest.mark.every(3)
@pytest.mark.parametrize("planes", [1, 2, 3])
def test_first_scales_in_closed_form(planes):
    x = normal(20)
    size = jnp.abs(x.T)
    scales, _ = trit_steps.trajectory(size, trit_steps.first_moments(size, True, planes, "sign"), 1)
    np.testing.assert_allclose(scales[0], np.broadcast_to(np.abs(x).mean(1) / planes, (planes, 20)), rtol=2e-6)
    for k in range(1, planes):
        np.testing.assert_array_equal(scales[0, k], scales[0, 0])  # to the bit: only the tie rule tells planes apart


def test_error_levels():
    x = normal(3000)
    size = jnp.abs(x.T)
    _, f = jax.jit(trit_steps.trajectory, static_argnums=2)(size, trit_steps.first_moments(size, True, 2, "sign"), 6)
    course = np.sqrt(np.asarray(f).sum(1) / np.sum(x**2))
    np.testing.assert_allclose(course, [0.489, 0.315, 0.252, 0.221, 0.203, 0.192], atol=0.002)
    scales, found, rounds = fitted(x)
    assert abs(rounds.mean() - 14.5) < 0.5 and 25 <= rounds.max() <= 40
    big, small = np.sort(np.abs(scales), axis=0)[::-1]
    assert abs(np.median(big / small) - 2.7) < 0.1
    zeros = 1 - np.sort(np.asarray([found.gram[0, 0], found.gram[1, 1]]), axis=0).mean(1)[::-1] / 128
    assert abs(zeros[0] - 0.36) < 0.02 and abs(zeros[1] - 0.49) < 0.02, zeros


@pytest.mark.parametrize(
    ("kind", "fmt", "init", "error"),
    [
        ("normal", TritPlanes(2, 64), "sign", 0.166),
        ("normal", TritPlanes(2, 128), "sign", 0.168),
        pytest.param("normal", TritPlanes(2, 256), "sign", 0.170, marks=pytest.mark.slow),
        ("normal", TritPlanes(2, 128), "residual", 0.166),
        ("student", TritPlanes(2, 128), "sign", 0.231),
        ("laplace", TritPlanes(2, 128), "sign", 0.226),
        ("uniform", TritPlanes(2, 128), "sign", 0.124),
    ],
)
def test_error_levels_of_distributions(kind, fmt, init, error):
    rng, shape = np.random.default_rng(3), (800, 256)
    draw = {
        "normal": rng.standard_normal,
        "student": lambda s: rng.standard_t(5, s),
        "laplace": lambda s: rng.laplace(size=s),
        "uniform": lambda s: rng.uniform(-1, 1, s),
    }
    assert abs(relative(draw[kind](shape).astype(np.float32), fmt, init) - error) < 0.003


def test_other_numbers_of_planes_and_tied_scales():
    x = normal(800)
    assert 0.425 < relative(x, TritPlanes(1)) < 0.437  # the population's optimum, less what a group's own scale gains
    assert 0.167 < relative(x, TritPlanes(2, tied=True)) < 0.176
    assert 0.060 < relative(x, TritPlanes(3)) < 0.067
    int4, int3 = (quantize_array(x, qjax.Int(b, group=128, scale="qmax"), in_axes=1) for b in (4, 3))
    off = lambda q: np.linalg.norm(np.asarray(q) - x) / np.linalg.norm(x)  # noqa: E731
    assert abs(off(int4) - 0.118) < 0.003 and abs(off(int3) - 0.274) < 0.004


def test_matrices_large_enough_for_several_threads():
    """Sums over 20,000 groups at once; XLA on CPU got some of them wrong."""
    x = normal(20_000, 16)
    size, scales = jnp.abs(x.T), jnp.abs(normal(2, 20_000, seed=1))
    got = jax.jit(trit_steps.topology)(size, scales)
    level = np.stack([a * scales[0] + b * scales[1] for a, b in itertools.product((-1, 0, 1), repeat=2)])
    best = np.argmin(np.abs(np.asarray(size)[None] - level[:, None]), 0)
    t = np.stack([best // 3 - 1, best % 3 - 1])
    np.testing.assert_array_equal(got.gram, (t[:, None] * t[None]).sum(2))
    np.testing.assert_allclose(got.cross, (t * np.asarray(size)).sum(1), rtol=1e-4, atol=1e-4)
    start = jax.jit(lambda s: trit_steps.first_moments(s, True, 2, "residual"))(size)
    eager = trit_steps.first_moments(size, True, 2, "residual")
    np.testing.assert_array_equal(start.gram, eager.gram)


# -------------------------------------------------------------------------------------------------------------- storage


@pytest.mark.parametrize(
    ("fmt", "bits"),
    [
        (TritPlanes(2), 3.45),
        (TritPlanes(2, store="two_bit"), 4.25),
        (TritPlanes(2, store="nibble"), 4.25),
        (TritPlanes(2, store="nibble", tied=True), 4.125),
        (TritPlanes(3), 5.175),
        (TritPlanes(1), 1.725),
        (TritPlanes(2, scale_dtype="float32"), 3.70),
    ],
)
def test_bits_to_the_bit(fmt, bits):
    q = jax.eval_shape(lambda w: quantize_array(w, fmt, in_axes=1), jax.ShapeDtypeStruct((3, 640), jnp.float32))
    assert q.bits_per_element == pytest.approx(bits, abs=1e-12)
    assert round(16 / bits, 2) == {3.45: 4.64, 4.25: 3.76, 4.125: 3.88, 5.175: 3.09}.get(bits, round(16 / bits, 2))


@settings(max_examples=12, deadline=None)
@given(planes=st.sampled_from([1, 2, 3]), store=st.sampled_from(["base3", "two_bit"]), length=st.integers(1, 700))
def test_bytes_of_any_row(planes, store, length):
    fmt = TritPlanes(planes, min(128, length), store=store)
    packing, run = fmt.packing, 5 if store == "base3" else 4
    assert packing.row_bytes(length) == planes * -(-length // run)
    assert 0 <= packing.capacity(packing.row_bytes(length)) - length < run
    q = jax.eval_shape(lambda w: quantize_array(w, fmt, in_axes=1), jax.ShapeDtypeStruct((2, length), jnp.float32))
    assert q.nbytes == 2 * (packing.row_bytes(length) + 2 * planes * -(-length // fmt.group))
    assert q.shape == (2, length)


@pytest.mark.every(3)
@pytest.mark.parametrize("base3", [True, False])
@pytest.mark.parametrize("planes", [1, 2, 3])
def test_layout_is_the_documented_one(planes, base3):
    rng, run = np.random.default_rng(0), 5 if base3 else 4
    packing = TritPacking(planes, base3)
    trits = rng.integers(-1, 2, (3, 17, planes))
    codes = sum(3 ** (planes - 1 - k) * (trits[..., k] + 1) for k in range(planes)).astype(np.uint8)
    packed = np.asarray(packing.pack(codes))
    padded = np.pad(trits, ((0, 0), (0, -17 % run), (0, 0))).reshape(3, -1, run, planes)
    if base3:
        want = ((padded + 1) * 3 ** np.arange(5)[:, None]).sum(2)
    else:
        want = ((padded & 3) << (2 * np.arange(4))[:, None]).sum(2)
    np.testing.assert_array_equal(packed, want.reshape(3, -1))
    np.testing.assert_array_equal(packing.unpack(packed, 17), codes)


def test_every_byte_of_five_trits_comes_back():
    codes = np.array(list(itertools.product(range(3), repeat=5)), np.uint8)
    packed, back = jax.jit(lambda c: (p := TritPacking(1, True).pack(c), TritPacking(1, True).unpack(p, 5)))(codes)
    assert sorted(np.asarray(packed)[:, 0].tolist()) == list(range(243))
    np.testing.assert_array_equal(back, codes)
    pairs = np.tile(np.arange(9, dtype=np.uint8), (1, 3))
    for fmt in (TritPlanes(2), TritPlanes(2, store="two_bit"), TritPlanes(2, store="nibble")):
        back = jax.jit(lambda c, p=fmt.packing: p.unpack(p.pack(c), 27))(pairs)
        np.testing.assert_array_equal(back, pairs)


@pytest.mark.parametrize(
    "fmt",
    [
        TritPlanes(2, 24),
        pytest.param(TritPlanes(3, 24, store="two_bit"), marks=pytest.mark.slow),
        pytest.param(TritPlanes(2, 24, store="nibble", tied=True), marks=pytest.mark.slow),
    ],
)
def test_property_suite(fmt):
    check_format(fmt, examples=2)


@functools.partial(jax.jit, static_argnums=0)
def rounded(fmt, x):
    return qjax.PTQTP().round(x, fmt)


def test_canonical_form_and_edges():
    x = np.zeros((4, 100), np.float32)
    x[1] = -0.5
    x[2, 3] = 7.0
    x[3] = np.random.default_rng(0).standard_normal(100)
    fmt = TritPlanes(2, 64)
    codes, aux = rounded(fmt, x)
    one, two = (np.asarray(aux[name], np.float32) for name in ("scale0", "scale1"))
    assert (one >= two).all() and (two >= 0).all()
    assert not one[0].any() and (np.asarray(codes)[0] == 4).all()
    near = np.asarray(jax.jit(fmt.decode)(codes, aux))
    np.testing.assert_allclose(near[1], -0.5)
    np.testing.assert_allclose(near[2], x[2], rtol=1e-3)
    # a short last group is fitted to its elements alone
    alone = rounded(TritPlanes(2, 36), x[3:, 64:])
    np.testing.assert_array_equal(alone[1]["scale0"][0, 0], aux["scale0"][3, 1])
    bad = x.copy()
    bad[3, 5], bad[3, 6] = np.nan, -np.inf
    code = np.asarray(rounded(fmt, bad)[0])
    assert code[3, 5] == 4 and code[3, 6] == 0
    large = rounded(fmt, x * np.float32(1e9))[1]
    assert np.isfinite(np.asarray(large["scale0"], np.float32)).all()
    assert jax.eval_shape(lambda x: rounded(fmt, x), np.zeros((0, 64), np.float32))[0].shape == (0, 64)


def test_settings_that_cannot_be():
    both: list[dict] = [{"planes": 4}, {"group": 0}, {"store": "bas3"}, {"store": "nibble", "planes": 3}, {"tied": 1}]
    for bad in (*both, {"scale_dtype": "int8"}):
        with pytest.raises(FormatError, match="TritPlanes"):
            TritPlanes(**bad)
    for bad in ({"iterations": 0}, {"eps": -1}, {"init": "signs"}):
        with pytest.raises(FormatError, match="PTQTP"):
            qjax.PTQTP(**bad)
    with pytest.raises(FormatError, match="trit-planes"):
        qjax.PTQTP().round(np.ones((2, 32), np.float32), qjax.Int(4))
    with pytest.raises(FormatError, match="observer"):
        qjax.PTQTP().round(np.ones((2, 128), np.float32), TritPlanes(), observer=qjax.MSE())
    with pytest.raises(FormatError, match="groups of 128"):
        TritPlanes().fit(np.ones((2, 32), np.float32))

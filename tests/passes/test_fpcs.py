"""FPCS and its losses against float64 NumPy, the plain grid and brute force."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.errors import RecipeError
from qjax.formats import Int, Log
from qjax.kernels.cpu import candidates
from qjax.passes import fpcs, fpcs_losses
from qjax.passes.fpcs import Search

F = np.float32
RNG = np.random.default_rng(0)
PRODUCTS = ("float32", "bfloat16") + (() if candidates.available() else ("kernel",))


def rounded(x, scale, zero, bits):
    """Uniform quantization in float64."""
    return (np.clip(np.rint(x / scale) + zero, 0, 2**bits - 1) - zero) * scale


def test_grids_are_those_of_the_specification():
    shapes = {3: (4, 32, 8, 16), 4: (8, 16, 16, 8), 6: (16, 8, 16, 8), 8: (16, 8, 16, 8)}
    x = RNG.standard_normal((3, 500)).astype(F)
    for bits, (wz, ws, iz, is_) in shapes.items():
        for inputs, n_z, n_s in ((False, wz, ws), (True, iz, is_)):
            scales, zeros = fpcs.uniform_grid(x, bits, inputs, Search())
            assert scales.shape == zeros.shape == (3, 128)
            half = 2 ** (bits - 1)
            assert np.unique(zeros).tolist() == list(range(half - n_z // 2, half + n_z // 2))
            one = scales[0, :n_s]  # the scale runs fastest
            np.testing.assert_array_equal(scales[0].reshape(n_z, n_s), np.tile(one, (n_z, 1)))
            top = 2**bits - 1
            inner = np.quantile(x[0], 0.9) - np.quantile(x[0], 0.1)
            np.testing.assert_allclose(one[[0, -1]], np.array([inner, np.ptp(x[0])]) / top, rtol=1e-5)
            np.testing.assert_allclose(np.diff(one), one[1] - one[0], rtol=1e-3)
    scales, _ = fpcs.uniform_grid(np.zeros((1, 9), F), 4, True, Search())
    assert (scales == F(1e-4)).all()


def test_numbers_beyond_all_pairs_are_brought_within_reach():
    rng = np.random.default_rng(5)
    rows = np.stack([np.full(40, 0.25), np.full(40, -3.0), rng.uniform(2, 2.2, 40), -rng.uniform(0, 1, 40) - 5]).astype(
        F
    )
    for bits in (3, 4, 8):
        for inputs in (False, True):
            scales, zeros = fpcs.uniform_grid(rows, bits, inputs, Search())
            found = fpcs.search_uniform(
                lambda s, z, bits=bits: np.stack(
                    [((rounded(rows, s[:, [c]], z[:, [c]], bits) - rows) ** 2).sum(1) for c in range(s.shape[1])], 1
                ),
                scales, zeros, Search(steps=3),
            )  # fmt: skip
            lost = found.loss / (rows.astype(np.float64) ** 2).sum(1)
            assert lost[:2].max() < 1e-6 and lost[2:].max() < {3: 0.05, 4: 0.01, 8: 1e-3}[bits]
            near = np.stack([rng.uniform(0, 1, 40), rng.uniform(0.2, 1, 40), rng.uniform(-1, 1, 40)]).astype(F)
            scales, _ = fpcs.uniform_grid(near, bits, inputs, Search())  # where some are within reach: as the authors
            np.testing.assert_allclose(scales.max(1), np.ptp(near, axis=1) / (2**bits - 1), rtol=1e-6)


@settings(max_examples=6, deadline=None)
@given(bits=st.sampled_from([3, 4, 8]), wide=st.booleans(), seed=st.integers(0, 50))
def test_losses_are_the_squared_errors_of_the_products(bits, wide, seed):
    rng = np.random.default_rng(seed)
    m, n, k = 20, (12 if wide else 5), 7
    x, w = rng.standard_normal((m, k)).astype(F), rng.standard_normal((n, k)).astype(F)
    near_x, near_w = rounded(x, 0.31, 2 ** (bits - 1), bits).astype(F), rounded(w, 0.27, 3, bits).astype(F)
    scales = rng.uniform(0.05, 0.6, (n, 3)).astype(F)
    zeros = rng.integers(0, 2**bits, (n, 3)).astype(F)
    true = x.astype(np.float64) @ w.T.astype(np.float64)

    known = fpcs_losses.moments(x, near_x)
    each = [near_x.astype(np.float64) @ rounded(w, scales[:, [c]], zeros[:, [c]], bits).T for c in range(3)]
    want = np.stack([((e - true) ** 2).sum(0) for e in each], 1)
    for products in PRODUCTS:
        ours = fpcs_losses.weight_uniform(w, known, scales, zeros, bits=bits, products=products)
        tolerance = 2e-4 if products == "float32" else 2e-2
        np.testing.assert_allclose(ours, want, rtol=tolerance, atol=tolerance * want.mean())

    form = fpcs_losses.form_of(x, w, near_w)
    each = [rounded(x, scales[0, c], zeros[0, c], bits) @ near_w.T.astype(np.float64) for c in range(3)]
    for products in PRODUCTS:
        ours = fpcs_losses.input_uniform(x, form, scales[:1], zeros[:1], bits=bits, products=products)
        rtol = 2e-4 if products == "float32" else 2e-2
        np.testing.assert_allclose(ours[0], [((e - true) ** 2).sum() for e in each], rtol=rtol)

    each = [((rounded(w, scales[:, [c]], zeros[:, [c]], bits) - w) ** 2).sum(1) for c in range(3)]
    for products in {PRODUCTS[0], PRODUCTS[-1]}:
        ours = fpcs_losses.own_uniform(w, scales, zeros, bits=bits, products=products)
        np.testing.assert_allclose(ours, np.stack(each, 1), rtol=2e-4, atol=1e-6)

    heads = [np.stack([np.stack([a, a[::-1]]), np.stack([2 * a, a])]) for a in (x, w, near_w)]  # [B, H, .., K]
    form = fpcs_losses.form_of(*heads)
    for products in PRODUCTS:
        ours = fpcs_losses.heads_uniform(heads[0], form, scales[:2], zeros[:2], bits=bits, products=products)
        for h in range(2):
            for c in range(3):
                near = rounded(heads[0][:, h], scales[h, c], zeros[h, c], bits)
                off = np.einsum("bmk,bnk->bmn", near, heads[2][:, h]) - np.einsum(
                    "bmk,bnk->bmn", heads[0][:, h], heads[1][:, h]
                )
                assert ours[h, c] == pytest.approx((off**2).sum(), rel=3e-4 if products == "float32" else 2e-2)


@pytest.mark.parametrize("zero", ["mask", *(pytest.param(z, marks=pytest.mark.slow) for z in ("reserve", "clamp"))])
def test_logarithmic_candidates_are_the_format(zero):
    x = np.append(RNG.random(30000) ** 6, [0.0, 1.0, 2.0]).astype(F).reshape(1, -1)
    for bits, q, scale in ((3, 31, 1.0), (4, 25, 0.7), (6, 10, 1.0), (8, 137, 1.3)):
        near = Log(bits, q, zero=zero).quantize(x, scale=scale).dequantize()
        ours = fpcs_losses.logarithmic(jnp.log2(x), jnp.float32(scale), jnp.float32(q), bits, zero)
        off = np.abs(np.asarray(near) - np.asarray(ours)) > 1e-6 * np.asarray(near) + 1e-14
        assert off.mean() < 1e-4  # two logarithms, at the bounds between codes, by one step
        both = off & (np.asarray(near) > 0) & (np.asarray(ours) > 0)
        apart = np.abs(np.log2(np.asarray(near)[both] / np.asarray(ours)[both]))
        assert (apart < 1.2 * q / 37 + 0.3).all()
    if zero == "mask":
        assert min(fpcs_losses.nearest_half(bits) for bits in range(2, 9)) > 2e-4

    p, v = RNG.random((2, 1, 9, 6)).astype(F) ** 4, RNG.standard_normal((2, 1, 5, 6)).astype(F)
    near_v = (v + 0.1 * RNG.standard_normal(v.shape)).astype(F)
    qs = np.array([[12, 37, 60]], F)
    x = p[0, 0] - F(0.1)
    logs = fpcs_losses.logs_of(p, F(0)), fpcs_losses.logs_of(x, F(0.1))
    forms = fpcs_losses.form_of(p, v, near_v), fpcs_losses.form_of(x, v[0, 0], near_v[0, 0])
    for products in PRODUCTS:
        rel = 1e-3 if products == "float32" else 2e-2
        for bits in (
            (4, 6) if products == "kernel" else (4,)
        ):  # the kernel looks up few entries in registers, and many in memory
            how = dict(bits=bits, zero=zero, products=products)
            ours = fpcs_losses.heads_log(logs[0], forms[0], np.ones_like(qs), qs, **how)
            xs = fpcs_losses.input_log(logs[1], forms[1], np.full_like(qs, 1.2), qs, **how)
            for c, q in enumerate(qs[0]):
                fmt = Log(bits, int(q), zero=zero)
                near = np.asarray(fmt.quantize(p, scale=1.0).dequantize())
                off = np.einsum("bhmk,bhnk->bhmn", near, near_v) - np.einsum("bhmk,bhnk->bhmn", p, v)
                assert ours[0, c] == pytest.approx((off**2).sum(), rel=rel)
                near = np.asarray(fmt.quantize(x + F(0.1), scale=1.2).dequantize()) - F(0.1)
                off = near @ near_v[0, 0].T - x @ v[0, 0].T
                assert xs[0, c] == pytest.approx((off**2).sum(), rel=rel)


def test_fpcs_beats_its_grid_and_comes_near_brute_force():
    x = (RNG.standard_t(4, 4000) + 0.7).astype(F).reshape(1, -1)
    for bits in (3, 4, 6):

        def loss(scales, zeros, bits=bits):
            return np.asarray(fpcs_losses.own_uniform(x, scales, zeros, bits=bits))

        scales, zeros = fpcs.uniform_grid(x, bits, True, Search())
        grid = loss(scales, zeros).min()
        found = fpcs.search_uniform(loss, scales, zeros, Search(), fpcs.SMALLEST_INPUT_SCALE)
        assert found.evaluations == 128 * 6
        near = rounded(x.astype(np.float64), found.scale[0], found.other[0], bits)
        assert found.loss[0] == pytest.approx(((near - x) ** 2).sum(), rel=1e-3)
        dense = np.linspace(scales.min(), scales.max(), 1000, dtype=F)
        every = [loss(dense[None], np.full((1, 1000), z, F)).min() for z in np.unique(zeros)]
        assert found.loss[0] <= grid and found.loss[0] <= 1.01 * min(every)
        best = fpcs.search_uniform(loss, scales, zeros, Search(best=True), fpcs.SMALLEST_INPUT_SCALE)
        assert best.loss[0] <= found.loss[0]


def watched(loss):
    """A loss of pairs [C] as `fpcs.Evaluate`, and the list of the pairs of each of its calls."""
    rounds = []

    def evaluate(scales, others):
        rounds.append((scales[0].astype(np.float64), others[0].astype(np.float64)))
        return loss(*rounds[-1])[None]

    return evaluate, rounds


def successors(loss, scales, others, spacing, kept):
    """The pairs that follow these, as the equations say."""
    m, best = 128 // kept, np.argsort(loss(scales, others), kind="stable")[:kept]
    around = [scales[i] + spacing * (np.arange(m) / (m - 1) - 0.5) for i in best]
    return np.concatenate(around), np.repeat(others[best], m)


def follow(rounds, loss, spacing, kept):
    """Check each round against the one before."""
    for before, after in zip(rounds, rounds[1:], strict=False):
        for ours, want in zip(after, successors(loss, *before, spacing, kept), strict=True):
            np.testing.assert_allclose(ours, want, rtol=2e-7)
        spacing /= 128 // kept - 0.5


def test_rounds_try_the_pairs_that_the_equations_say():
    def loss(scales, others):
        return (scales / 0.317 - 1) ** 2 + ((others - 7.3) / 40) ** 2

    grid = np.tile(np.linspace(0.1, 0.6, 8), 16), np.repeat(np.arange(0.0, 16.0), 8)
    evaluate, rounds = watched(loss)
    found = fpcs.search_uniform(evaluate, *(a[None].astype(F) for a in grid), Search())
    np.testing.assert_allclose(rounds[0], grid, rtol=1e-6)
    follow(rounds, loss, 0.5 / 7, 16)
    at = loss(*rounds[-1]).argmin()
    assert (found.scale[0], found.other[0]) == tuple(F(a[at]) for a in rounds[-1])
    assert len(rounds) == 6 and found.evaluations == 128 * 6 == sum(len(s) for s, _ in rounds)

    def loss(scales, others):
        return (scales / 1.93 - 1) ** 2 + ((others - 41.3) / 70) ** 2

    ends, shift = (0.4, 2.5), 0.17
    start = fpcs.log_start(ends, shift, Search())
    assert start == pytest.approx(0.4 + 2.1 * 126 / 127 + 0.17)  # one below the top of 128
    evaluate, rounds = watched(loss)
    found = fpcs.search_log(evaluate, ends, shift, start, Search())
    every = np.arange(10.0, 138.0)
    np.testing.assert_allclose(rounds[0], (np.full(128, start), every), rtol=1e-6)
    q = every[np.argsort(loss(*rounds[0]), kind="stable")[:8]]
    coarse = 0.4 + 2.1 * np.arange(16) / 15 + 0.17
    np.testing.assert_allclose(rounds[1], (np.tile(coarse, 8), np.repeat(q, 16)), rtol=1e-6)
    follow(rounds[1:], loss, 2.1 / 15, 32)
    at = loss(*rounds[-1]).argmin()
    assert (found.scale[0], found.other[0]) == tuple(F(a[at]) for a in rounds[-1])
    assert len(rounds) == 7 and found.evaluations == 128 * 7
    assert fpcs.positive_ends(F([-3, 0, 5, 1, 4, 2, 3, 6, 7, 8, 9, 10]), 0.9) == (9, 10)
    assert fpcs.positive_ends(F([-3, 0]), 0.9) == (0, 0)


def test_the_base_that_is_found_has_the_least_error_of_the_output():
    rng = np.random.default_rng(4)
    logits = 2 * rng.standard_normal((1, 2, 10, 16))
    p = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).astype(F)
    v = rng.standard_normal((1, 2, 5, 16)).astype(F)
    near_v = rounded(v, 0.35, 8, 4).astype(F)
    logs, form = fpcs_losses.logs_of(p, F(0)), fpcs_losses.form_of(p, v, near_v)
    found = fpcs.search_base(lambda s, q: np.asarray(fpcs_losses.heads_log(logs, form, s, q, bits=4, zero="mask")))
    errors = {}
    for q in range(10, 138):
        code = np.rint(-np.log2(p.astype(np.float64)) * 37 / q).astype(int)
        level = np.rint(2.0 ** (-(code * q % 37) / 37) * 30) / 30 * 2.0 ** -(code * q // 37) * (code < 16)
        off = level @ near_v.swapaxes(-1, -2) - p.astype(np.float64) @ v.swapaxes(-1, -2)
        errors[q] = (off**2).sum()
    assert errors[int(found.other[0])] <= min(errors.values()) * (1 + 1e-4) and found.scale[0] == 1
    assert found.loss[0] == pytest.approx(min(errors.values()), rel=1e-3) and min(errors.values()) < 0.9 * errors[37]


def test_slices_are_searched_as_if_alone():
    w = (RNG.standard_normal((5, 60)) * np.array([[1], [3], [0.1], [1e-3], [0]])).astype(F)
    w[4] = 0.25

    def loss_of(part):
        return lambda s, z: np.asarray(fpcs_losses.own_uniform(part, s, z, bits=4))

    together = fpcs.search_uniform(loss_of(w), *fpcs.uniform_grid(w, 4, False, Search()), Search())
    for row in (0, 2, 4):
        alone = fpcs.search_uniform(loss_of(w[[row]]), *fpcs.uniform_grid(w[[row]], 4, False, Search()), Search())
        assert together.loss[row] == pytest.approx(alone.loss[0], rel=1e-4, abs=1e-9)
    assert np.isfinite(together.scale).all() and (together.scale > 0).all()
    aux = {"scale": together.scale[:, None], "zero": together.other[:, None].astype(np.uint8)}
    fmt = Int(4, symmetric=False)
    near = np.asarray(fmt.decode(fmt.encode(w, aux), aux))
    np.testing.assert_allclose(((near - w) ** 2).sum(1), together.loss, rtol=1e-3, atol=1e-9)


def test_the_base_that_is_found_falls_with_more_bits_and_is_no_worse_than_base_two():
    logits = RNG.standard_normal((2, 2, 24, 24)) * 3
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    p, v = p.astype(F), RNG.standard_normal((2, 2, 8, 24)).astype(F)
    logs, form = fpcs_losses.logs_of(p, F(0)), fpcs_losses.form_of(p, v, v)
    found = []
    for bits in (3, 4, 6):

        def loss(scales, qs, bits=bits):
            return np.asarray(fpcs_losses.heads_log(logs, form, scales, qs, bits=bits, zero="mask"))

        best = fpcs.search_base(loss)
        assert best.evaluations == 128
        assert best.loss[0] <= loss(np.ones((1, 1), F), np.full((1, 1), 37, F))[0, 0]
        found.append(int(best.other[0]))
    assert found[0] > found[1] > found[2] >= 10 and found[2] <= 12

    x = np.maximum(RNG.standard_normal((300, 6)), -0.17).astype(F)
    w = RNG.standard_normal((4, 6)).astype(F)
    logs, form = fpcs_losses.logs_of(x, F(0.17)), fpcs_losses.form_of(x, w, w)

    def loss(scales, qs):
        return np.asarray(fpcs_losses.input_log(logs, form, scales, qs, bits=4, zero="mask"))

    ends = fpcs.positive_ends(x, 0.9)
    positive = np.sort(x[x > 0])
    assert ends == (positive[int(np.ceil(0.9 * positive.size)) - 1], positive[-1])
    found = fpcs.search_log(loss, ends, 0.17, fpcs.log_start(ends, 0.17, Search()), Search())
    assert found.evaluations == 128 * 7 and 10 <= found.other[0] <= 137
    assert found.loss[0] <= loss(np.float32([[ends[1] + 0.17]]), np.float32([[37]]))[0, 0]


def test_searches_in_either_precision_reach_the_same_loss():
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((400, 48)) * rng.uniform(0.5, 2, 48) + rng.standard_normal(48)).astype(F)
    for n in (16, 96):  # by the product, and by the quadratic form
        w = rng.standard_normal((n, 48)).astype(F)
        near_w = rounded(w, 0.3, 8, 4).astype(F)
        form, reached = fpcs_losses.form_of(x, w, near_w), {}
        for products in PRODUCTS:

            def loss(scales, zeros, products=products, form=form):
                return np.asarray(fpcs_losses.input_uniform(x, form, scales, zeros, bits=4, products=products))

            grid = fpcs.uniform_grid(x.reshape(1, -1), 4, True, Search())
            found = fpcs.search_uniform(loss, *grid, Search(), fpcs.SMALLEST_INPUT_SCALE)
            near = rounded(x, found.scale[0], found.other[0], 4)
            reached[products] = ((near @ near_w.T.astype(np.float64) - x @ w.T.astype(np.float64)) ** 2).sum()
            assert found.loss[0] == pytest.approx(reached[products], rel=5e-3)
        for products in PRODUCTS[1:]:
            assert reached[products] == pytest.approx(reached["float32"], rel=2e-3)


def test_which_precision_is_chosen(monkeypatch):
    for missing, quick in (("", "kernel"), ("no AMX", "float32")):
        monkeypatch.setattr(candidates, "available", lambda missing=missing: missing)
        assert fpcs_losses.chosen_products(None) == quick
        assert fpcs_losses.chosen_products("float32") == "float32"
        assert fpcs_losses.chosen_products("bfloat16") == ("bfloat16" if missing else "kernel")
    monkeypatch.setattr(fpcs_losses.jax, "default_backend", lambda: "gpu")
    assert fpcs_losses.chosen_products(None) == "bfloat16"


def test_settings_that_cannot_be():
    for wrong, words in (({"kept": 3}, "does not divide"), ({"bases": 4}, "not 128"), ({"steps": 0}, "1 or more")):
        with pytest.raises(RecipeError, match=words):
            Search(**wrong)

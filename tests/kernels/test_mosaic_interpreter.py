"""Tier 1 of the GPU kernels: run by jax's Mosaic GPU interpreter, with its race detector, against float64 NumPy.

It needs jax 0.11. Barriers, copies, shared memory and arithmetic are those of the kernel; asynchronous tensor cores
and registers are not modelled.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import mosaic
import numpy as np
import pytest

from qjax import ops
from qjax._compat import JAX_VERSION
from qjax.formats import Int
from qjax.kernels.dot.codes8 import codes8
from qjax.kernels.dot.hopper import Schedule
from qjax.kernels.dot.words16 import words16

pytestmark = pytest.mark.skipif(JAX_VERSION < (0, 11), reason="the Mosaic GPU interpreter is usable from jax 0.11 on")

UNSIGNED = Int(4, group=64, symmetric=False)


def run(w, x, schedule, out_dtype=jnp.float32, **how):
    p = ops.pack(w)
    count = p.aux["tiles"].shape[0] if p.aux["tiles"].ndim == 3 else 1
    flat = {name: a.reshape(count, -1) for name, a in p.aux.items()}
    how_cut = {"n": w.codes.shape[-2], "out_dtype": out_dtype, "schedule": schedule}
    with mosaic.interpreter(**how) as interpret:
        y = words16(flat, x, planes=p.fmt.planes, interpret=interpret, **how_cut)
        return np.asarray(y, np.float64), mosaic.races_found()


def several(tokens, stages, splits=1, **how):
    return Schedule(tokens, stages, splits, tall=2, **how)


@pytest.mark.parametrize(
    ("fmt", "n", "k", "tokens", "schedule", "dtype"),
    [
        pytest.param(Int(4, group=128), 128, 512, 1, Schedule(8, 2), jnp.bfloat16, id="one token, ring refilled"),
        pytest.param(Int(4, group=32), 128, 256, 7, Schedule(8, 4), jnp.float16, id="groups of 32, 7 tokens"),
        pytest.param(UNSIGNED, 200, 200, 13, Schedule(8, 4), jnp.bfloat16, id="zero points, odd sizes, 13 tokens"),
        pytest.param(Int(4), 130, 384, 3, Schedule(8, 2, 3), jnp.float16, id="a scale per row, K in 3 parts"),
        pytest.param(Int(4, symmetric=False), 64, 40, 17, Schedule(16, 2), jnp.float16, id="a zero per row, short K"),
        pytest.param(Int(4, group=256), 128, 300, 2, Schedule(8, 2), jnp.bfloat16, id="long groups, the last cut"),
        pytest.param(Int(8), 128, 256, 3, Schedule(8, 2), jnp.bfloat16, id="8 bits"),
        pytest.param(Int(8, group=64, symmetric=False), 64, 128, 9, Schedule(16, 2), jnp.float16, id="uint8, groups"),
        pytest.param(Int(4, per="tensor"), 128, 128, 2, Schedule(8, 2), jnp.bfloat16, id="a scale per tensor"),
        pytest.param(Int(4, group=64), 256, 256, 24, Schedule(16, 2, 2), jnp.bfloat16, id="four tiles, K in 2 parts"),
        pytest.param(Int(4, group=128), 512, 512, 3, several(8, 2, deep=2), jnp.bfloat16, id="tall and deep"),
        pytest.param(Int(4, group=32), 256, 512, 9, several(16, 2, 2, deep=2), jnp.float16, id="tall, deep, in parts"),
        pytest.param(UNSIGNED, 200, 256, 5, several(8, 2, rolling=True), jnp.float16, id="tall, rolling"),
        pytest.param(Int(4), 256, 256, 5, several(8, 2, deep=2, rolling=True), jnp.bfloat16, id="one sum of each row"),
    ],
)
def test_against_numpy(fmt, n, k, tokens, schedule, dtype):
    w, numbers = mosaic.weight(fmt, n, k)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, tokens, k)), dtype)
    y, races = run(w, x, schedule)
    want = np.asarray(x, np.float64)[0] @ numbers.T
    terms = np.abs(np.asarray(x, np.float64)[0]) @ np.abs(numbers).T
    assert y.shape == (1, tokens, n)
    assert np.max(np.abs(y[0] - want) / terms) < 1e-6
    assert not races


def test_a_sum_that_rolls_over_quiet_groups():
    """Scales of 0 and far below others, rows of zeros: what the sum is divided by is bounded, and nothing is lost."""
    fmt = Int(4, group=128)
    w, _ = mosaic.weight(fmt, 256, 512)
    scale = np.array(w.aux["scale"])
    scale[0], scale[1, 1:3], scale[2, 0], scale[3, 2], scale[4] = 0, 0, 1e-30, 1e-9, 1e-30
    w = dataclasses.replace(w, aux={"scale": jnp.asarray(scale)})
    numbers = np.asarray(w.unpacked(), np.float64) * np.repeat(scale.astype(np.float64), 128, axis=1)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 3, 512)), jnp.bfloat16)
    y, races = run(w, x, several(8, 2, rolling=True))
    exact = np.asarray(x, np.float64)[0]
    terms = np.abs(exact) @ np.abs(numbers).T
    assert np.max(np.abs(y[0] - exact @ numbers.T) / np.maximum(terms, 1e-38)) < 1e-6 and not races
    assert not y[0, :, 0].any() and y[0, :, 4].any()


def test_stack_of_matrices_and_16_bit_results():
    w, numbers = mosaic.weight(Int(4, group=64), 128, 128, stack=(2,))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 128)), jnp.bfloat16)
    y, races = run(w, x, Schedule(8, 2), jnp.bfloat16)
    want = np.einsum("emk,enk->emn", np.asarray(x, np.float64), numbers)
    assert np.max(np.abs(y - want)) <= 2**-8 * np.max(np.abs(want)) and not races


@pytest.mark.parametrize(
    ("dtype", "tokens", "schedule"),
    [(jnp.int8, 3, Schedule(8, 2)), (jnp.float8_e4m3fn, 13, Schedule(8, 2, 2)), (jnp.int8, 17, Schedule(16, 2))],
)
def test_products_of_codes(dtype, tokens, schedule):
    rng = np.random.default_rng(0)
    n, k = 128, 256

    def codes(*shape):
        if dtype == jnp.int8:
            return jnp.asarray(rng.integers(-128, 128, shape), dtype)
        return jnp.asarray(rng.normal(size=shape), dtype)

    w, x = codes(2, n, k), codes(2, tokens, k)
    w_scale, x_scale = (jnp.asarray(rng.uniform(0.5, 1.5, (2, m)), jnp.float32) for m in (n, tokens))
    x_scale = x_scale.at[0, 1].set(jnp.nan)  # of a token that holds NaN
    with mosaic.interpreter() as interpret:
        y = codes8(w, w_scale, x, x_scale, out_dtype=jnp.float32, schedule=schedule, interpret=interpret)
        y, races = np.asarray(y, np.float64), mosaic.races_found()
    wide = [np.asarray(a, np.float64) for a in (w, w_scale, x, x_scale)]
    want = np.einsum("enk,en,emk,em->emn", *wide)
    np.testing.assert_allclose(y, want, rtol=1e-6, atol=1e-6 * np.nanmax(np.abs(want)))
    assert np.isnan(y[0, 1]).all() and np.isnan(y).sum() == n and not races


def test_nan_and_infinity_stay_in_their_rows():
    w, _ = mosaic.weight(Int(4, group=128), 128, 128)
    x = np.ones((1, 3, 128), np.float32)
    x[0, 1, 5] = np.nan
    x[0, 2] = 60000.0  # the sum is beyond float16
    y, _ = run(w, jnp.asarray(x, jnp.float16), Schedule(8, 2), jnp.float16)
    assert np.isnan(y[0, 1]).all() and np.isfinite(y[0, 0]).all() and not np.isnan(y[0, 2]).any()
    assert np.isinf(y[0, 2]).any()


def test_the_race_detector_sees_a_planted_race(monkeypatch):
    """Without its fences a kernel is refused: otherwise the assertions above would prove nothing."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    monkeypatch.setattr(plgpu, "commit_smem", lambda: None)
    w, _ = mosaic.weight(Int(4, group=128), 128, 128)
    try:
        _, races = run(w, jnp.ones((1, 2, 128), jnp.bfloat16), Schedule(8, 2))
    except jax.errors.JaxRuntimeError as error:  # jax 0.12 stops there
        races = "RACE DETECTED" in str(error)
    assert races


def test_interpreter_is_undone():
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    before = gpu_callbacks.wgmma
    with mosaic.interpreter():
        assert gpu_callbacks.wgmma is not before
    assert gpu_callbacks.wgmma is before and jax.devices()

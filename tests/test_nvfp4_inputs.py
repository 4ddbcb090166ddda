"""NVFP4 activations: scales of blocks as they pass, under one constant that calibration found."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from constructs import CASES, batch, params

import qjax
from qjax.errors import RecipeError

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def rounded(x: np.ndarray, constant: float) -> np.ndarray:
    """Blocks of 16 along the last axis, by the definition of the format."""
    out = np.zeros_like(x)
    for at in range(0, x.shape[-1], 16):
        block = x[:, at : at + 16]
        scale = np.abs(block).max(-1, keepdims=True) / (6 * constant)
        scale = np.clip(scale, 2.0**-9, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * constant
        size = np.abs(block) / scale
        away = np.abs(size[..., None] - E2M1)
        # ties to the even code, as hardware does
        nearest = np.isclose(away, away.min(-1, keepdims=True), rtol=0, atol=1e-7)
        best = np.where(nearest, np.arange(8) % 2, 9).argmin(-1)
        out[:, at : at + 16] = np.sign(block) * E2M1[best] * scale
    return out


def test_one_product_by_the_definition():
    rng = np.random.default_rng(0)
    x, calibration = (rng.standard_normal((6, 48)).astype(np.float32) for _ in range(2))
    w = jnp.asarray(rng.standard_normal((48, 8)), jnp.float32)
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    model = qjax.quantize(fn, {"w": w}, recipe="NVFP4", batches=[jnp.asarray(calibration)])
    constant = np.abs(calibration).max() / (448 * 6)
    assert float(model.params["w"].aux["input.global_scale"].item()) == pytest.approx(constant, rel=1e-6)
    want = rounded(x, constant) @ np.asarray(model.params["w"].dequantize())
    np.testing.assert_allclose(model(model.params, x), want, rtol=1e-4, atol=1e-4)
    assert "static" in model.explain("w")


@pytest.mark.every(6)
@pytest.mark.parametrize("name", CASES)
def test_every_construct(name):
    fn, p, x = CASES[name], params(), batch()
    if name in ("cond", "switch", "associative_scan"):
        pytest.skip("a branch without data, or no weight that can be stored")
    rule = lambda inputs: qjax.Recipe([qjax.Rule("**", weights=qjax.Int(8), inputs=inputs)])  # noqa: E731
    static = qjax.quantize(fn, p, x, recipe=rule(qjax.static(qjax.NVFP4())), batches=[x])
    dynamic = qjax.quantize(fn, p, x, recipe=rule(qjax.NVFP4()))
    outs = [jax.tree.leaves(f(q, x)) for f, q in ((static, static.params), (dynamic, dynamic.params), (fn, p))]
    for a, b, c in zip(*outs, strict=True):
        size = float(jnp.abs(c).max()) + 1e-6
        errors = [float(jnp.abs(v - c).max()) / size for v in (a, b)]
        assert errors[0] < max(0.1, 2 * errors[1]), errors
    planned = qjax.plan(fn, p, x, recipe=static.recipe)
    for a, b in zip(jax.tree.leaves(planned.params), jax.tree.leaves(static.params), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_the_preset_leaves_the_inputs_of_convolutions_and_says_so():
    rng = np.random.default_rng(0)
    p = {"conv": jnp.asarray(rng.standard_normal((3, 3, 16, 8)), jnp.float32), "w": jnp.ones((8, 4))}
    image = jnp.asarray(rng.standard_normal((2, 6, 6, 16)), jnp.float32)

    def fn(p, x):
        y = jax.lax.conv_general_dilated(x, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.tanh(y) @ p["w"]

    model = qjax.quantize(fn, p, recipe="NVFP4", batches=[image])
    assert "windows of a convolution" in model.explain("conv") and "static" in model.explain("w")
    want = fn(p, image)
    assert float(jnp.linalg.norm(model(model.params, image) - want)) < 0.3 * float(jnp.linalg.norm(want))


def test_what_is_refused():
    with pytest.raises(RecipeError, match="does not train"):
        recipe = qjax.Recipe([qjax.Rule("**", weights=qjax.NVFP4(), inputs=qjax.static(qjax.NVFP4()))])
        qjax.fake_quant(lambda p, x: x @ p["w"], recipe).init({"w": jnp.ones((16, 4))}, jnp.ones((2, 16)))
    with pytest.raises(RecipeError, match="an average is kept of one range"):
        qjax.Rule("**", weights=qjax.NVFP4(), inputs=qjax.ema(qjax.NVFP4()))

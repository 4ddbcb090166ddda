"""Fake quantization: the values of the packed model, the derivatives of the float one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from constructs import CASES, batch, params
from jax import lax

import qjax
from qjax.errors import DataError, QjaxError, RecipeError

SKIP = qjax.Rule("**", op="embedding", skip=True, optional=True)
RECIPES = {
    "int8": [SKIP, qjax.Rule("**", weights=qjax.Int(8))],
    "uint3": [SKIP, qjax.Rule("**", weights=qjax.Int(3, symmetric=False))],
    "int4 g4": [SKIP, qjax.Rule("**", weights=qjax.Int(4, group=4))],
    "int4 g3": [SKIP, qjax.Rule("**", weights=qjax.Int(4, group=3))],
    "nvfp4": [SKIP, qjax.Rule("**", weights=qjax.NVFP4())],
    "int8 x int8": [SKIP, qjax.Rule("**", weights=qjax.Int(8), inputs=qjax.Int(8, per="token"))],
    "mse": [SKIP, qjax.Rule("**", weights=qjax.static(qjax.Int(4), qjax.MSE()))],
}


def has_products(name):
    sites = qjax.trace(CASES[name], params(), batch()).sites
    return any(s.op in ("dot", "conv", "ragged_dot") and not s.reason for s in sites)


@pytest.mark.every(6)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["matmul", "transposed", "expert_einsum", "scan", "jit_shared", "switch", "fori"])
def test_values_are_those_of_the_packed_model(name, recipe):
    fn, p, x, recipe = CASES[name], params(), batch(), qjax.Recipe(RECIPES[recipe])
    t = qjax.fake_quant(fn, recipe)
    state = t.init(p, x)
    assert state == {} and jax.eval_shape(t.init, p, x) == {}
    out, state = jax.jit(t.apply)(p, state, x)
    model = t.convert(p, state, x)
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(model(model.params, x)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)
    assert differ(out, fn(p, x)), "nothing was rounded"


def differ(a, b):
    return any((np.asarray(x) != np.asarray(y)).any() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_every_construct(name):
    recipe = qjax.Recipe([SKIP, qjax.Rule("**", weights=qjax.Int(8), optional=True)])
    fn, p, x = CASES[name], params(), batch()
    t = qjax.fake_quant(fn, recipe)
    out, _ = jax.jit(t.apply)(p, {}, x)
    want = jax.jit(fn)(p, x)
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=0.1 * max(1.0, float(jnp.abs(b).max())))
    unrounded = name in ("cond", "embedding_and_head")  # the branch that runs has no product; an embedding stays float
    assert differ(out, want) == (has_products(name) and not unrounded)


@pytest.mark.every(6)
@pytest.mark.parametrize("inputs", [None, qjax.Int(8, per="token")])
@pytest.mark.parametrize("group", [None, 4, 6])
def test_groups_run_over_the_axes_in_the_order_in_which_they_are_stored(group, inputs):
    rng = np.random.default_rng(0)
    shapes = {"conv": (3, 2, 4, 8), "experts": (2, 12, 5), "heads": (3, 4, 6)}
    p = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    image, rows, heads = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, 5, 5, 4), (7, 12), (2, 3, 4)))

    def fn(p, image, rows, heads):
        y = lax.conv_general_dilated(image, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        z = lax.ragged_dot(rows, p["experts"], jnp.array([3, 4]))
        return y, z, jnp.einsum("bhd,hdo->bo", heads, p["heads"])

    weights = qjax.Int(4, group=group) if group else qjax.Int(4)
    t = qjax.fake_quant(fn, qjax.Recipe([qjax.Rule("**", weights=weights, inputs=inputs)]))
    model = t.convert(p, {}, image, rows, heads)
    got, want = t.apply(p, {}, image, rows, heads)[0], model(model.params, image, rows, heads)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("spec", "shape"), [("HWIO", (3, 2, 4, 8)), ("OIHW", (8, 4, 3, 2)), ("OHWI", (8, 3, 2, 4))])
def test_groups_of_a_convolution_run_over_height_width_and_channels(spec, shape):
    rng = np.random.default_rng(0)
    p = {"w": jnp.asarray(rng.standard_normal(shape), jnp.float32)}
    x = jnp.asarray(rng.standard_normal((2, 5, 5, 4)), jnp.float32)

    def fn(p, x):
        return lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", spec, "NHWC"))

    t = qjax.fake_quant(fn, qjax.Recipe([qjax.Rule("**", weights=qjax.Int(4, group=4))]))
    model = t.convert(p, {}, x)
    assert model.params["w"].in_axes == tuple(spec.index(c) for c in "HWI")
    np.testing.assert_allclose(t.apply(p, {}, x)[0], model(model.params, x), rtol=1e-4, atol=1e-4)
    # By hand: four consecutive numbers of a row (H, W, I) share a scale.
    rows = np.transpose(p["w"], [spec.index(c) for c in "OHWI"]).reshape(8, 6, 4)
    scale = np.abs(rows).max(-1) / 7.5
    np.testing.assert_allclose(np.asarray(model.params["w"].aux["scale"]).reshape(8, 6), scale, rtol=1e-6)


def test_derivatives_pass_straight_through():
    p, x = params(), batch()
    fn = lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["s"])[0] @ p["w"]  # noqa: E731
    t = qjax.fake_quant(fn, qjax.Recipe([qjax.Rule("**", weights=qjax.Int(4, group=4))]))
    packed = t.convert(p, {}, x).params
    near = {"w": packed["w"].dequantize(), "s": packed["s"].dequantize()}
    got = jax.grad(lambda p: (t.apply(p, {}, x)[0] ** 2).sum())(p)
    want = jax.grad(lambda p: (fn(p, x) ** 2).sum())(near)  # the float derivative, at the rounded weights
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


def test_it_trains():
    """2-bit weights after some steps are better than the trained float weights rounded to nearest.

    Inputs of four dimensions in sixteen: there are many good weights, and training finds some that survive rounding.
    """
    rng = np.random.default_rng(0)
    target = rng.standard_normal((16, 8)).astype(np.float32)
    x = (rng.standard_normal((256, 4)) @ rng.standard_normal((4, 16)) / 2).astype(np.float32)
    y = np.tanh(x @ target)
    fn = lambda p, x: jnp.tanh(x @ p["w"])  # noqa: E731
    t = qjax.fake_quant(fn, qjax.Recipe([qjax.Rule("w", weights=qjax.Int(2, symmetric=False))]))
    loss = lambda p: ((t.apply(p, {}, x)[0] - y) ** 2).mean()  # noqa: E731
    optimizer = optax.adam(0.01)

    @jax.jit
    def step(p, moments):
        updates, moments = optimizer.update(jax.grad(loss)(p), moments)
        return optax.apply_updates(p, updates), moments

    p = {"w": jnp.asarray(target)}
    moments, before, best = optimizer.init(p), float(loss(p)), p
    for _ in range(300):
        p, moments = step(p, moments)
        best = p if float(loss(p)) < float(loss(best)) else best
    p = best
    model = t.convert(p, {}, x)
    after = float(((model(model.params, x) - y) ** 2).mean())
    assert after < 0.5 * before
    assert after == pytest.approx(float(loss(p)), rel=1e-3)


def test_layers_with_different_formats():
    p, x = params(), batch()
    recipe = qjax.Recipe([qjax.Rule("s/1", skip=True), qjax.Rule("**", weights=qjax.Int(4))])
    t = qjax.fake_quant(lambda p, x: lax.scan(lambda h, w: (h @ w, None), x, p["s"])[0], recipe)
    model = t.convert(p, {}, x)
    np.testing.assert_allclose(t.apply(p, {}, x)[0], model(model.params, x), rtol=1e-4, atol=1e-5)


def test_what_cannot_be():
    p, x = params(), batch()
    with pytest.raises(DataError, match="w has scale and needs none; make it with init"):
        qjax.fake_quant(CASES["matmul"], "W8A16").apply(p, {"w": {"scale": x}}, x)
    embedding = qjax.Recipe([qjax.Rule("**", op="embedding", weights=qjax.Int(8))])
    with pytest.raises(RecipeError, match="quantizes an embedding"):
        qjax.fake_quant(CASES["embedding_and_head"], embedding).init(p, x)
    with pytest.raises(QjaxError):
        qjax.fake_quant(CASES["matmul"], "W4A17")

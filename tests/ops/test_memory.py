"""What is held while a quantized model runs: no float copy of all layers, forward or backward, and packed residuals."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import ops
from qjax.formats import NF4, Float8, Int, quantize_array
from qjax.kernels.dot import xla

LAYERS, WIDTH = 10, 128
ONE = 4 * WIDTH * WIDTH  # bytes of one weight as float32


def weights(fmt):
    w = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)) / WIDTH**0.5
    one = quantize_array(jnp.asarray(w, jnp.float32), fmt, in_axes=0)
    return [jax.tree.map(jnp.copy, one) for _ in range(LAYERS)]


def chain(x, ws, act=None):
    def layer(x, w):
        return jnp.tanh(ops.q_dot(x, w, act=(act, ops.activation_aux(x, act)) if act else None))

    return functools.reduce(layer, ws, x)


def temporary(function, *args):
    return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("fmt", [Int(8), Int(4, group=32), Int(3), NF4(), Float8()], ids=lambda f: f.name)
def test_unrolled_layers_are_unpacked_one_at_a_time(fmt, rows):
    x = jnp.ones((rows, WIDTH))
    assert temporary(chain, x, weights(fmt)) < 3 * ONE
    # The measure means something: without the dependence on x, XLA on CPU unpacks all layers first. (It fuses a single
    # row with the unpacking by itself.)
    plain = lambda x, ws: functools.reduce(lambda x, w: jnp.tanh(x @ w.dequantize()), ws, x)  # noqa: E731
    if rows > 1 and jax.__version__.startswith("0.10."):
        assert temporary(plain, x, weights(fmt)) > (LAYERS - 2) * ONE


@pytest.mark.parametrize("fmt", [Int(8), Int(4, group=32)], ids=lambda f: f.name)
def test_the_backward_pass_too(fmt):
    loss = lambda x, ws: chain(x, ws).sum()  # noqa: E731
    assert temporary(jax.grad(loss), jnp.ones((4, WIDTH)), weights(fmt)) < 4 * ONE


def test_integer_codes_stay_where_they_are():
    assert temporary(functools.partial(chain, act=Int(8, per="token")), jnp.ones((4, WIDTH)), weights(Int(8))) < ONE / 2


def test_integer_products_unpack_one_layer_at_a_time():
    run = functools.partial(chain, act=Int(8, per="token"))
    assert temporary(run, jnp.ones((4, WIDTH)), weights(Int(4))) < ONE  # int8 codes of three layers at most


def test_large_weights_are_unpacked_in_blocks(monkeypatch):
    monkeypatch.setattr(xla, "LOOP_ELEMENTS", WIDTH * WIDTH - 1)
    monkeypatch.setattr(xla, "BLOCK_ELEMENTS", 32 * WIDTH)
    jax.clear_caches()
    try:
        for fmt, act in ((Int(8), None), (Int(4, group=32), None), (Float8(), Float8(per="token"))):
            run = functools.partial(chain, act=act)
            assert temporary(run, jnp.ones((4, WIDTH)), weights(fmt)) < ONE
    finally:
        jax.clear_caches()


def residuals(function, *args):
    """Shapes and dtypes that a backward pass keeps."""
    _, pull = jax.vjp(function, *args)
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(pull) if hasattr(leaf, "shape")]


@pytest.mark.parametrize("act", [None, Int(8, per="token")])
@pytest.mark.parametrize("fmt", [Int(8), Int(4, group=32)], ids=lambda f: f.name)
def test_residuals_are_packed(fmt, act):
    (w, *_) = weights(fmt)
    x = jnp.ones((4, WIDTH))
    run = lambda x: chain(x, [w], act)  # noqa: E731
    kept = residuals(run, x)
    assert not [k for k in kept if k == ((WIDTH, WIDTH), np.float32)]
    assert (w.codes.shape, w.codes.dtype) in kept or all(s[0] != WIDTH for s, _ in kept)


def test_residuals_of_scales_are_packed():
    (w, *_) = weights(Int(4, group=32))
    x = jnp.ones((4, WIDTH))
    kept = residuals(lambda s, x: ops.q_dot(x, dataclasses.replace(w, aux={"scale": s})), w.aux["scale"], x)
    assert not [k for k in kept if np.prod(k[0]) == WIDTH * WIDTH and k[1] != np.uint8]


def test_remat_policies_that_save_dots_save_quantized_ones():
    (w, v, *_) = weights(Int(8))
    x = jnp.ones((4, WIDTH))
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable

    def backward_products(policy):
        f = jax.checkpoint(lambda x: jnp.tanh(ops.q_dot(jnp.tanh(ops.q_dot(x, w)), v)).sum(), policy=policy)
        text = str(jax.make_jaxpr(jax.grad(f))(x))
        return text.count("q_dot[")

    assert backward_products(ops.remat_policy(dots)) == 2
    assert backward_products(None) > 2
    assert ops.remat_policy(dots) is ops.remat_policy(dots)


def test_remat_policies_see_batches_and_convolutions():
    asked = []

    def policy(primitive, *avals, **params):
        asked.append((primitive.name, [a.shape for a in avals], params.get("dimension_numbers")))
        return False

    ws = quantize_array(jnp.ones((2, 8, 4)), Int(8), in_axes=1, stack_axes=0)
    kernel = quantize_array(jnp.ones((3, 3, 4, 8)), Int(8), in_axes=(0, 1, 2))

    def f(x, image):
        y = ops.q_conv(image, kernel, window_strides=(1, 1), padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.sin(ops.q_dot(x, ws)).sum() + jnp.sin(y).sum()

    jax.make_jaxpr(jax.grad(jax.checkpoint(f, policy=ops.remat_policy(policy))))(
        jnp.ones((2, 3, 8)), jnp.ones((1, 5, 5, 4))
    )
    dots = [a for a in asked if a[0] == "dot_general"]
    assert dots and dots[0][1] == [(2, 3, 8), (2, 4, 8)] and dots[0][2] == (((2,), (2,)), ((0,), (0,)))
    assert [a for a in asked if a[0] == "conv_general_dilated"][0][1] == [(1, 5, 5, 4), (3, 3, 4, 8)]

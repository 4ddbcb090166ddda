"""q_dot under every transformation of JAX equals the oracle, or the float product with the dequantized weight."""

from __future__ import annotations

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from qjax import ops
from qjax.errors import LayoutError, QjaxWarning
from qjax.formats import NF4, NVFP4, Float8, Int, quantize_array, stack


def with_scale(w, scale):
    return dataclasses.replace(w, aux={**w.aux, "scale": scale})


def scale_loss(s):
    """A loss of the scales, written in plain jnp."""
    x = s.x
    if s.act:
        aux = ops.activation_aux(x, s.act)
        x = s.act.decode(s.act.encode(x, aux), aux)
    return lambda scale: (x @ s.fmt.decode(s.w.unpacked(), {**s.w.aux, "scale": scale}).T * s.ct).sum()


def test_eager_and_jit(setting, same):
    want = setting.oracle()
    same(setting.q(setting.x, setting.w), want)
    same(jax.jit(setting.q)(setting.x, setting.w), want)


def test_step_by_step_without_jit(same):
    w = quantize_array(jnp.asarray(np.random.default_rng(0).standard_normal((8, 32)), jnp.float32), Int(4), in_axes=1)
    x = jnp.ones((3, 32))
    params = {"w": jnp.eye(32)}
    recipe = qjax.Recipe([qjax.Rule("**", weights=Int(8), inputs=qjax.dynamic(Int(8, per="token")))])
    model = qjax.quantize(lambda p, x: jax.nn.relu(x @ p["w"]), params, x, recipe=recipe)
    with jax.disable_jit():
        product, out = ops.q_dot(x, w), model(model.params, x)
    same(product, ops.q_dot(x, w))
    same(out, model(model.params, x))


def test_gradient_in_x_is_that_of_the_dequantized_weight(setting, same):
    loss = lambda x: (setting.q(x, setting.w) * setting.ct).sum()  # noqa: E731
    want = setting.ct @ setting.dense.T
    same(jax.grad(loss)(setting.x), want)
    same(jax.jit(jax.grad(loss))(setting.x), want)


def test_forward_mode(setting, same):
    f = lambda x: setting.q(x, setting.w)  # noqa: E731
    want = setting.x @ setting.dense
    same(jax.jvp(f, (setting.x,), (setting.x,))[1], want)
    same(jax.linearize(f, setting.x)[1](setting.x), want)
    # Forward over reverse: the product is linear where activations are in float, so its Hessian comes from the square.
    hessian = jax.jvp(jax.grad(lambda x: (f(x) ** 2).sum() / 2), (setting.x,), (setting.x,))[1]
    same(hessian, want @ setting.dense.T, rtol=1e-5)


def test_gradient_in_scales(setting, same):
    scale = setting.w.aux["scale"]
    loss = lambda scale: (setting.q(setting.x, with_scale(setting.w, scale)) * setting.ct).sum()  # noqa: E731
    want = jax.grad(scale_loss(setting))(scale)
    same(jax.jit(jax.grad(loss))(scale), want, rtol=1e-5)
    _, slope = jax.jvp(loss, (scale,), (scale,))
    same(slope, (want * scale).sum(), rtol=1e-4)


def test_gradient_of_a_tree_reaches_scales_and_no_codes(setting):
    loss = lambda w: (setting.q(setting.x, w) ** 2).sum()  # noqa: E731
    grads = jax.grad(loss, allow_int=True)(setting.w)
    if setting.w.codes.dtype == jnp.int8 or setting.w.codes.dtype == jnp.uint8:
        assert grads.codes.dtype == jax.dtypes.float0
    else:
        assert not np.asarray(grads.codes, np.float32).any()
    assert np.asarray(grads.aux["scale"]).any()


def test_only_wide_float_aux_have_a_derivative():
    w = quantize_array(jnp.ones((32, 8)), NVFP4(), in_axes=0)
    g = jax.grad(lambda w: ops.q_dot(jnp.ones((2, 32)), w).sum(), allow_int=True)(w)
    assert not np.asarray(g.aux["scale"], np.float32).any() and np.asarray(g.aux["global_scale"]).any()


def test_learned_activation_scales(same):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((4, 32)), jnp.float32)
    w = quantize_array(jnp.asarray(rng.standard_normal((32, 8)), jnp.float32), Int(8), in_axes=0)
    act = Int(8, per="tensor")
    step = jnp.full((1, 1), 0.02)
    got = jax.grad(lambda s: (ops.q_dot(x, w, act=(act, {"scale": s})) ** 2).sum())(step)
    codes = act.encode(x, {"scale": step}).astype(jnp.float32)
    same(got, jax.grad(lambda s: ((codes * s @ w.dequantize()) ** 2).sum())(step), rtol=1e-5)


def test_vmap_over_activations(setting, same):
    pair = jnp.stack([setting.x, 2 * setting.x])
    want = setting.oracle(2 * setting.x)
    same(jax.vmap(setting.q, (0, None))(pair, setting.w)[1], want)
    same(jax.vmap(setting.q, (2, None), 1)(pair.transpose(1, 2, 0), setting.w)[:, 1], want)
    # No batch of matrices, no loop: one product with one more dimension of rows.
    names = [e.primitive.name for e in jax.make_jaxpr(jax.vmap(setting.q, (0, None)))(pair, setting.w).jaxpr.eqns]
    assert names.count("q_dot") == 1 and "scan" not in names


def test_vmap_over_weights(setting, same):
    weights = stack([setting.w, setting.w])
    want = setting.oracle()
    same(jax.vmap(setting.q, (None, 0))(setting.x, weights)[1], want)
    pair = jnp.stack([2 * setting.x, setting.x])
    same(jax.vmap(setting.q)(pair, weights)[1], want)
    both = jax.vmap(lambda x: jax.vmap(setting.q, (None, 0))(x, weights))(pair)
    same(both[1, 1], want)


def test_vmap_of_grad_and_grad_of_vmap(setting, same):
    want = setting.ct @ setting.dense.T
    rows = lambda x, w: setting.q(x[None], w)[0]  # noqa: E731
    each = jax.vmap(jax.grad(lambda x, c: (rows(x, setting.w) * c).sum()))(setting.x, setting.ct)
    same(each, want)
    same(jax.grad(lambda x: (jax.vmap(rows, (0, None))(x, setting.w) * setting.ct).sum())(setting.x), want)
    scale = setting.w.aux["scale"]
    per_example = jax.vmap(jax.grad(lambda s, x, c: (rows(x, with_scale(setting.w, s)) * c).sum()), (None, 0, 0))
    if not setting.act or setting.act.per != "tensor":  # one scale per example there, one for all in the oracle
        same(per_example(scale, setting.x, setting.ct).sum(0), jax.grad(scale_loss(setting))(scale), rtol=1e-5)


def test_vmap_over_scales_alone(same):
    w = quantize_array(jnp.arange(64.0).reshape(16, 4), Int(8), in_axes=0)
    x = jnp.ones((3, 16))
    scales = jnp.stack([w.aux["scale"], 2 * w.aux["scale"]])
    y = jax.vmap(lambda s: ops.q_dot(x, with_scale(w, s)))(scales)
    same(y[1], 2 * x @ w.dequantize())


def test_scan_over_stacked_weights(setting, same):
    _, ys = lax.scan(lambda c, w: (c, setting.q(setting.x, w)), 0, stack([setting.w, setting.w]))
    same(ys[1], setting.oracle())


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.dots_saveable])
def test_gradient_of_scan_and_remat(policy, same):
    rng = np.random.default_rng(0)
    ws = quantize_array(
        jnp.asarray(rng.standard_normal((3, 32, 32)), jnp.float32), Int(4, group=16), in_axes=1, stack_axes=0
    )
    x = jnp.asarray(rng.standard_normal((4, 32)), jnp.float32)

    def run(product, weights):
        body = jax.checkpoint(lambda c, w: (jnp.tanh(product(c, w)), None), policy=policy and ops.remat_policy(policy))
        return jax.grad(lambda x: lax.scan(body, x, weights)[0].sum())(x)

    same(run(ops.q_dot, ws), run(jnp.dot, ws.dequantize()), rtol=1e-5)


def test_rows_of_any_rank(setting, same):
    x, want = setting.x, setting.oracle()
    same(setting.q(x.reshape(2, 4, 2, -1), setting.w).reshape(want.shape), want)
    same(setting.q(x[0], setting.w), setting.oracle(x[:1])[0]) if not setting.act else None
    assert ops.q_dot(x[:0], setting.w).shape == (0, want.shape[1])


@pytest.mark.parametrize(
    ("dtype", "out"), [("bfloat16", None), ("bfloat16", "float32"), ("float16", "float32"), ("float32", "bfloat16")]
)
def test_dtypes_follow_dot_general(setting, dtype, out):
    x = setting.x.astype(dtype)
    y = setting.q(x, setting.w, out_dtype=out)
    assert y.dtype == (out or dtype)
    assert jax.grad(lambda x: setting.q(x, setting.w, out_dtype=out).astype(jnp.float32).sum())(x).dtype == dtype
    if setting.act is None:
        want = jnp.dot(x, setting.dense.astype(dtype), preferred_element_type=jnp.float32).astype(y.dtype)
        np.testing.assert_allclose(y.astype(jnp.float32), want.astype(jnp.float32), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_what_is_not_finite_in_one_row_stays_there(setting, bad, same):
    y = setting.q(setting.x.at[0, 3].set(bad), setting.w)
    if setting.act is not None and setting.act.per == "tensor":  # a padded row must not spoil the others
        assert np.isfinite(y).all()
    else:
        assert not np.isfinite(y[0]).any()
        same(y[1:], setting.q(setting.x, setting.w)[1:])


def test_weights_of_any_layout_are_viewed_canonically(same):
    w = jax.random.normal(jax.random.key(0), (16, 3, 8))
    q = quantize_array(w, Int(8), in_axes=(0, 2))
    x = jax.random.normal(jax.random.key(1), (5, 16, 8))
    y = ops.q_dot(x.reshape(5, -1), q)
    same(y, jnp.einsum("bik,ijk->bj", x, q.dequantize()), rtol=1e-5)


def test_operands_that_do_not_fit_name_the_site():
    w = quantize_array(jnp.ones((16, 8)), Int(8), in_axes=0)
    with pytest.raises(LayoutError, match=r"layers/3/up: q_dot of activations \(2, 15\).*8 outputs and 16 inputs"):
        ops.q_dot(jnp.ones((2, 15)), w, site="layers/3/up")


def test_a_pair_computed_in_float_warns_once():
    w = quantize_array(jnp.ones((40, 8)), Int(8, group=16), in_axes=0)
    x, act = jnp.ones((2, 40)), Int(8, per="token")
    run = lambda: ops.q_dot(x, w, act=(act, ops.activation_aux(x, act)), site="a/site/of/its/own")  # noqa: E731
    with pytest.warns(QjaxWarning, match="a/site/of/its/own.*in float.*shorter group"):
        run()
    run()


def test_codes_of_a_table_with_integer_activations_are_no_warning():
    w = quantize_array(jnp.ones((64, 8)), NF4(), in_axes=0)
    x, act = jnp.ones((2, 64)), Int(8, per="token")
    ops.q_dot(x, w, act=(act, ops.activation_aux(x, act)))


def test_a_bind_costs_well_below_a_millisecond(setting):
    act = (setting.act, ops.activation_aux(setting.x, setting.act)) if setting.act else None
    square = quantize_array(jnp.ones((128, 128)), setting.fmt, in_axes=0)

    def many(x, w, aux):
        for _ in range(50):
            x = ops.q_dot(x, w, act=(setting.act, aux) if setting.act else None)
        return x

    aux = act[1] if act else {}
    jax.make_jaxpr(many)(setting.x, square, aux)
    least = min(_seconds(lambda: jax.make_jaxpr(many)(setting.x, square, aux)) for _ in range(5))
    assert least / 50 < 1e-3


def _seconds(run):
    start = time.thread_time()
    run()
    return time.thread_time() - start


def test_eager_calls_are_compiled_once():
    w = quantize_array(jnp.ones((32, 8)), Int(3), in_axes=0)
    x = jnp.ones((7, 32))
    ops.q_dot(x, w)
    from qjax.ops import base

    before = base._jitted.cache_info().misses
    for _ in range(3):
        ops.q_dot(x, w)
    assert base._jitted.cache_info().misses == before


def test_a_printed_equation_is_short(setting):
    text = str(jax.make_jaxpr(lambda x, w: ops.q_dot(x, w))(setting.x, setting.w))
    line = next(line for line in text.splitlines() if "q_dot" in line)
    assert len(line) < 120 and setting.fmt.name in line


@pytest.mark.every(4)
@pytest.mark.parametrize("k", [32, 48, 64, 250, 251, 1024])
@pytest.mark.parametrize("rows", [1, 5])
def test_inside_a_loop_over_layers_the_numbers_are_the_same(k, rows):
    # Activations are quantized by fewer loops there, because a small program takes its time to compile for loops.
    x, fmt = jax.random.normal(jax.random.key(k), (rows, k)), Int(8, per="token")
    x = x.at[0, 0].set(jnp.nan) if k == 48 else x
    w = quantize_array(jax.random.normal(jax.random.key(1), (k, 8)), Int(8), in_axes=0)

    @functools.partial(jax.jit, static_argnums=1)
    def run(x, streamed):
        aux = ops.activation_aux(x, fmt, streamed=streamed)
        return aux["scale"], ops.q_dot(x, w, act=(fmt, aux), streamed=streamed)

    for a, b in zip(run(x, False), run(x, True), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("fmt", [Int(8, per="token"), Int(8, per="token", symmetric=False), Float8(per="token")])
@pytest.mark.parametrize("length", [300, 1001, 4096])
def test_nan_in_a_long_row_is_not_forgotten(fmt, length):
    # A maximum of floats forgets it on CPU, from some hundred elements on, and calls the last one -infinity.
    x = jax.random.normal(jax.random.key(0), (4, length))
    x = x.at[1, 5].set(jnp.nan).at[2, -1].set(-jnp.nan)
    for run in (ops.activation_aux, jax.jit(ops.activation_aux, static_argnums=1)):
        scale = np.asarray(run(x, fmt)["scale"])[:, 0]
        np.testing.assert_array_equal(np.isfinite(scale), [True, False, False, True])

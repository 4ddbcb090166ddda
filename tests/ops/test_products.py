"""Quantized products against NumPy written from the equations, and every lowering against the oracle."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import qjax
from qjax import ops
from qjax.errors import LayoutError, LoweringError
from qjax.formats import quantize_array
from qjax.testing import check_lowering

INT8, INT4 = qjax.Int(8), qjax.Int(4, group=8)
TOKEN = qjax.Int(8, per="token")
WEIGHTS = (
    qjax.Int(8),
    qjax.Int(8, symmetric=False),
    qjax.Int(4, group=8),
    qjax.Int(4, group=16, symmetric=False),
    qjax.Int(3),
    qjax.Int(2, group=8),
    qjax.Float8("e4m3fn"),
    qjax.NF4(8),
    qjax.MXFP4(),
    qjax.NVFP4(),
)


def numbers(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def relative(got, want):
    want = np.asarray(want, np.float64)
    return np.abs(np.asarray(got, np.float64) - want).max() / max(np.abs(want).max(), 1e-30)


@pytest.mark.parametrize("fmt", WEIGHTS, ids=lambda f: f.name)
def test_weight_only_products_are_those_of_the_decoded_weight(fmt):
    x, w = numbers(5, 32), numbers(12, 32, seed=1)
    q = quantize_array(w, fmt, in_axes=(1,))
    decoded = np.asarray(q.decode_canonical(), np.float64)
    assert relative(ops.q_dot(x, q), np.asarray(x, np.float64) @ decoded.T) < 1e-6


@pytest.mark.filterwarnings("ignore::qjax.errors.QjaxWarning")  # an uneven last group is computed in float, and said so
@given(
    st.sampled_from([1, 2, 7]),
    st.sampled_from([8, 24, 40]),
    st.sampled_from([None, 8, 16]),
    st.booleans(),
    st.booleans(),
)
def test_integer_products_are_exact(rows, inputs, group, symmetric, symmetric_x):
    fmt = qjax.Int(8, symmetric=symmetric) if group is None else qjax.Int(8, group=group, symmetric=symmetric)
    fmt = fmt.clamped(inputs)
    act = qjax.Int(8, per="token", symmetric=symmetric_x)
    x, w = numbers(rows, inputs, seed=2), numbers(6, inputs, seed=3)
    q = quantize_array(w, fmt, in_axes=(1,))
    aux = ops.activation_aux(x, act)
    # the definition, in integers: sum over groups of s_x s_w (q_x - z_x) . (q_w - z_w)
    qx = np.asarray(act.encode(x, aux), np.int64) - np.asarray(aux.get("zero", 0), np.int64)
    k = np.arange(inputs) // (fmt.group or inputs)
    qw, zero = np.asarray(q.unpacked(), np.int64), np.asarray(q.aux.get("zero", np.zeros((6, k.max() + 1))), np.int64)
    scale = np.asarray(q.aux["scale"], np.float64)
    want = sum(
        (qx[:, k == g] @ (qw[:, k == g] - zero[:, g : g + 1]).T) * scale[:, g] for g in range(k.max() + 1)
    ) * np.asarray(aux["scale"], np.float64)
    assert relative(ops.q_dot(x, q, act=(act, aux)), want) < 1e-6


def test_float8_products_multiply_float8():
    x, w = numbers(4, 32), numbers(8, 32, seed=1)
    act = qjax.Float8("e4m3fn", per="token")
    q = quantize_array(w, qjax.Float8("e4m3fn"), in_axes=(1,))
    aux = ops.activation_aux(x, act)
    decoded = (
        np.asarray(act.decode(act.encode(x, aux), aux), np.float64) @ np.asarray(q.decode_canonical(), np.float64).T
    )
    assert relative(ops.q_dot(x, q, act=(act, aux)), decoded) < 1e-5
    text = jax.jit(lambda x: ops.q_dot(x, q, act=(act, ops.activation_aux(x, act)))).lower(x).as_text()
    assert any("dot_general" in line and line.count("f8E4M3FN") >= 2 for line in text.splitlines())


@pytest.mark.every(6)
@pytest.mark.parametrize(
    ("op", "name", "fmt", "act"),
    [
        ("dot", "dequantize", INT8, None),
        ("dot", "dequantize", INT4, None),
        ("dot", "dequantize", qjax.NF4(8), None),
        ("dot", "dequantize", INT8, TOKEN),
        ("dot", "int_dot", INT8, TOKEN),
        ("dot", "int_dot", INT4, TOKEN),
        ("dot", "int_dot", qjax.Int(8, symmetric=False), qjax.Int(8, per="token", symmetric=False)),
        ("dot", "float8_dot", qjax.Float8("e4m3fn"), qjax.Float8("e4m3fn", per="token")),
        ("ragged_dot", "dequantize", INT8, None),
        ("ragged_dot", "experts", INT8, None),
        ("ragged_dot", "experts", INT8, TOKEN),
    ],
    ids=lambda v: getattr(v, "name", v),
)
def test_every_lowering_agrees_with_the_oracle(op, name, fmt, act):
    check_lowering(op, name, weights=[fmt], acts=[act], examples=4)


def test_large_weights_are_unpacked_in_blocks():
    q = quantize_array(numbers(2048, 1024), qjax.Int(4, group=128), in_axes=(1,))
    x = numbers(2, 1024, seed=1)
    assert (
        relative(ops.q_dot(x, q, implementation="dequantize_blocks"), ops.q_dot(x, q, implementation="reference"))
        < 1e-5
    )


def test_no_dequantized_copy_of_every_layer_is_alive_at_once():
    layers, width = 8, 512
    p = {str(i): numbers(width, width, seed=i) / 20 for i in range(layers)}

    def fn(p, x):
        for i in range(layers):
            x = jnp.tanh(x @ p[str(i)])
        return x

    x = numbers(4, width)
    for recipe in ("W4A16", "W8A16", "NF4"):
        model = qjax.quantize(fn, p, x, recipe=recipe)
        temporary = jax.jit(model).lower(model.params, x).compile().memory_analysis().temp_size_in_bytes
        assert temporary < 3 * width * width * 4, (recipe, temporary)


def test_one_token_pads_to_a_faster_product_and_back():
    q = quantize_array(numbers(16, 32), INT8, in_axes=(1,))
    x = numbers(1, 32)
    aux = ops.activation_aux(x, TOKEN)
    y = ops.q_dot(x, q, act=(TOKEN, aux))
    assert y.shape == (1, 16)
    both = jnp.concatenate([x, x])
    np.testing.assert_allclose(ops.q_dot(both, q, act=(TOKEN, ops.activation_aux(both, TOKEN)))[0], y[0], rtol=1e-6)


def test_residuals_and_second_derivatives():
    q = quantize_array(numbers(16, 32), INT4, in_axes=(1,))
    f = lambda x: jnp.sum(jnp.sin(ops.q_dot(x, q)))  # noqa: E731
    g = lambda x: jnp.sum(jnp.sin(x @ q.decode_canonical().T))  # noqa: E731
    x = numbers(3, 32)
    np.testing.assert_allclose(jax.grad(f)(x), jax.grad(g)(x), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jax.hessian(f)(x[:1]), jax.hessian(g)(x[:1]), rtol=1e-3, atol=1e-4)


def test_scales_have_derivatives():
    q = quantize_array(numbers(16, 32), INT8, in_axes=(1,))
    x = numbers(3, 32)

    def loss(scale, packed):
        w = jax.tree.unflatten(jax.tree.structure(q), [q.codes, scale])
        return jnp.sum(jnp.sin(ops.q_dot(x, w) if packed else x @ w.decode_canonical().T))

    got, want = (jax.grad(loss)(q.aux["scale"], packed) for packed in (True, False))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_in_integers(groups):
    x, w = numbers(2, 7, 7, 4), numbers(3, 3, 4 // groups, 8, seed=1)
    q = quantize_array(w, INT8, in_axes=(0, 1, 2))
    settings = dict(window_strides=(2, 1), padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    act = qjax.Int(8, per="tensor")
    aux = ops.conv_activation_aux(x, act, settings["dimension_numbers"])
    rounded = act.decode(act.encode(x, aux), aux)
    want = lax.conv_general_dilated(rounded, q.dequantize(), **settings, feature_group_count=groups)
    for name in ("int_conv", "dequantize", None):
        got = ops.q_conv(x, q, act=(act, aux), feature_group_count=groups, implementation=name, **settings)
        assert relative(got, want) < 1e-5, name


def test_rows_are_decoded_one_by_one():
    table = numbers(10, 16)
    q = quantize_array(table, INT4, in_axes=(1,))
    rows = jnp.asarray([[3, 0], [9, 3]])
    np.testing.assert_array_equal(ops.q_take(q, 0, rows), np.asarray(q.dequantize())[np.asarray(rows)])


def test_a_named_implementation_runs_or_says_why_not():
    q = quantize_array(numbers(8, 16), qjax.NF4(8), in_axes=(1,))
    with pytest.raises(LoweringError, match="int_dot"):
        ops.q_dot(numbers(2, 16), q, implementation="int_dot")
    with pytest.raises(LoweringError, match="did you mean 'int_dot'"):
        ops.q_dot(numbers(2, 16), q, implementation="intdot")


def test_shapes_that_do_not_fit_are_named():
    q = quantize_array(numbers(8, 16), INT8, in_axes=(1,))
    with pytest.raises(LayoutError, match="layer/w: .*8 outputs and 16 inputs"):
        ops.q_dot(numbers(2, 12), q, site="layer/w")


def test_the_table_prints():
    text = str(ops.lowering_table())
    assert all(name in text for name in ("int_dot", "float8_dot", "dequantize_blocks", "reference", "experts"))

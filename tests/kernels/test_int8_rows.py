"""Products of two-level weights with int8 activations: integers over the whole row, exact before the one scaling."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax import ops
from qjax.formats import DualGrained, Int, Progressive, quantize_array

TOKEN = Int(8, per="token")


@functools.partial(jax.jit, static_argnums=(2, 3))
def computed(x, w, fmt, act):
    """The product, its operands' integers and scales, and what they decode to."""
    w = quantize_array(w, fmt, in_axes=0)
    aux = ops.activation_aux(x, act)
    y = ops.q_dot(x, w, act=(act, aux), implementation="int_dot")
    codes = act.encode(x, aux)
    return y, codes, aux, w.fmt.as_int8(w.unpacked(), w.canonical().aux), act.decode(codes, aux), w.dequantize()


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(  # 24 does not divide the row
        [
            (DualGrained(8), TOKEN, 1),
            (Progressive(16), Int(8, per="tensor"), 2),
            (Progressive(24, zeros="post"), Int(8, per="token", symmetric=False), 5),
            (DualGrained(24), TOKEN, 3),
        ]
    ),
    seed=st.integers(0, 1000),
)
def test_equals_integer_arithmetic(kind, seed):
    fmt, act, rows = kind
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((rows, 64)) + 0.3, jnp.float32)
    w = jnp.asarray(rng.standard_normal((64, 24)), jnp.float32)
    y, codes, aux, (numbers, scale), x_near, w_near = jax.tree.map(np.asarray, computed(x, w, fmt, act))
    exact = (codes.astype(np.int64) - aux.get("zero", np.zeros((1, 1), np.int64))) @ numbers.astype(np.int64).T
    exact = exact.astype(np.int64)
    assert np.abs(numbers.astype(int)).max() <= 127 and np.abs(exact).max() < 2**31
    # Exact before the epilogue: in float64 the product of what both sides decode to is the same integers, scaled.
    scaled = exact * aux["scale"].astype(np.float64) * scale.astype(np.float64).T
    decoded = x_near.astype(np.float64) @ w_near.astype(np.float64)
    np.testing.assert_allclose(decoded, scaled, rtol=1e-6, atol=1e-6 * np.abs(scaled).max())
    # And to the bit: one conversion and two multiplications.
    np.testing.assert_array_equal(y, exact.astype(np.float32) * aux["scale"] * scale.T)


@pytest.mark.parametrize("fmt", [DualGrained(32), Progressive(32)], ids=lambda f: f.name)
def test_the_compiled_product_is_one_of_integers(fmt):
    q = quantize_array(jnp.ones((64, 32)), fmt, in_axes=0)
    run = lambda x, q: ops.q_dot(x, q, act=(TOKEN, ops.activation_aux(x, TOKEN)))  # noqa: E731
    text = jax.jit(run).lower(jnp.ones((4, 64)), q).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert dots and all("xi8>" in line and "xi32>" in line for line in dots)
    assert "while" not in text  # no loop over groups
    assert ops.choose("dot", fmt, TOKEN, (4, 32, 64), "cpu").name == "int_dot"
    assert ops.choose("dot", fmt, TOKEN, (4, 32, 64), "cuda").name == "int_dot"
    assert ops.choose("dot", fmt, None, (4, 32, 64), "cpu").name == "dequantize"


def test_grouped_activations_are_computed_in_float():
    assert ops.choose("dot", DualGrained(32), Int(8, group=32), (4, 32, 64), "cpu").name == "dequantize"


@pytest.mark.parametrize("fmt", [DualGrained(16), Progressive(16)], ids=lambda f: f.name)
def test_sharded_products(fmt):
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((128, 32)).astype(np.float32), rng.standard_normal((4, 128)).astype(np.float32)
    q = quantize_array(w, fmt, in_axes=0)
    run = jax.jit(lambda x, q: ops.q_dot(x, q, act=(TOKEN, ops.activation_aux(x, TOKEN))))
    alone = run(x, q)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    for names in (("x", None), (None, "x")):  # rows of outputs, columns of inputs

        def place(a, names=names):
            split = [n if s > 1 else None for n, s in zip(names, a.shape, strict=True)]
            return jax.device_put(a, jax.NamedSharding(mesh, jax.P(*split)))

        np.testing.assert_allclose(run(x, jax.tree.map(place, q)), alone, rtol=1e-6)

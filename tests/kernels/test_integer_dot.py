"""Integer products against integer arithmetic in NumPy: codes, zero points and scales, to the last bit where exact."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjax import ops
from qjax.formats import NF4, Affine, Int, quantize_array
from qjax.kernels.dot import affine, integer
from qjax.ops.dot import q_dot_op
from qjax.testing import check_lowering


def by_hand(x, w, act, aux):
    """The product in NumPy: float64 sums of exact integers, group by group."""
    q = w.canonical()
    codes_w, codes_x = np.asarray(w.unpacked(), np.int64), np.asarray(act.encode(x, aux), np.int64)
    k = codes_w.shape[-1]

    def blocked(fmt, name, rows, aux):
        a = aux.get(name)
        a = np.zeros((rows, 1)) if a is None else np.asarray(a, np.float64)
        a = np.broadcast_to(a, (rows, a.shape[-1]))
        return np.repeat(a, k // a.shape[1], axis=1)

    n, m = codes_w.shape[0], codes_x.shape[0]
    real_w = (codes_w - blocked(w.fmt, "zero", n, q.aux)) * blocked(w.fmt, "scale", n, q.aux)
    real_x = (codes_x - blocked(act, "zero", m, aux)) * blocked(act, "scale", m, aux)
    return real_x @ real_w.T


@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    group=st.sampled_from([None, 16, 32]),
    act=st.sampled_from(
        [
            Int(8, per="token"),
            Int(8, per="tensor"),
            Int(8, per="token", symmetric=False),
            Int(7, per="tensor", symmetric=False),
            Int(8, group=32),
        ]
    ),
    rows=st.sampled_from([1, 2, 5]),
    seed=st.integers(0, 1000),
)
def test_equals_integer_arithmetic(bits, symmetric, group, act, rows, seed):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((rows, 64)) + 0.3, jnp.float32)
    fmt = Int(bits, symmetric=symmetric, **({"group": group} if group else {}))
    w = quantize_array(jnp.asarray(rng.standard_normal((64, 24)), jnp.float32), fmt, in_axes=0)
    aux = ops.activation_aux(x, act)
    matches = not act.group or act.group == group
    name = "int_dot" if matches else "dequantize"
    y = ops.q_dot(x, w, act=(act, aux), implementation=name)
    want = by_hand(x, w, act, aux)
    np.testing.assert_allclose(y, want, rtol=0, atol=3e-6 * np.abs(want).max() + 1e-30)


@pytest.mark.every(6)
@pytest.mark.parametrize("act", [Int(8, per="token"), Int(8, per="token", symmetric=False), Int(8, group=32)])
@pytest.mark.parametrize("fmt", [Int(8), Int(4, symmetric=False), Int(4, group=32), Int(8, group=32, symmetric=False)])
@pytest.mark.parametrize("stack", [(), (2,)])
def test_whole_array_form_equals_the_one_for_one_device(fmt, act, stack):
    if act.group and act.group != fmt.group:
        pytest.skip("groups that do not match are no integer product")
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((*stack, 3, 2, 64)) + 0.3, jnp.float32)
    w = jnp.asarray(rng.standard_normal((*stack, 64, 24)), jnp.float32)
    q = quantize_array(w, fmt, in_axes=len(stack), stack_axes=tuple(range(len(stack)))).canonical()
    aux = ops.activation_aux(x, act, stack_ndim=len(stack))
    spec = ops.Spec(out_dtype=np.dtype(np.float32), act=act)
    operands = ops.Operands(x, aux, q)
    problem = q_dot_op.definition.problem(spec, operands, "cpu", 1)
    one, many = (
        jax.jit(lambda x, q, aux, p=p: integer.int_dot(p, x, q, (act, aux)))(x, q, aux)
        for p in (problem, dataclasses.replace(problem, devices=2))
    )
    np.testing.assert_allclose(one, many, rtol=2e-6, atol=2e-5)


def test_extreme_codes_do_not_overflow():
    k = 4096
    x, w = jnp.full((2, k), -1.0), jnp.full((k, 3), -1.0)
    q = quantize_array(w, Int(8, scale="qmax"), in_axes=0)
    act = Int(8, per="token", scale="qmax")
    y = ops.q_dot(x, q, act=(act, ops.activation_aux(x, act)), implementation="int_dot")
    np.testing.assert_allclose(y, k, rtol=1e-5)


def test_the_compiled_product_is_of_integers():
    q = quantize_array(jnp.ones((64, 32)), Int(4, group=32), in_axes=0)
    act = Int(8, per="token")
    text = jax.jit(lambda x, q: ops.q_dot(x, q, act=(act, ops.activation_aux(x, act)))).lower(jnp.ones((4, 64)), q)
    dots = [line for line in text.as_text().splitlines() if "dot_general" in line]
    assert dots and all("xi8>" in line and "xi32>" in line for line in dots)


def test_a_sum_that_may_overflow_is_left_to_floats():
    choice = ops.choose("dot", Int(8), Int(8, per="token"), (4, 8, integer.LARGEST_SUM + 1), "cpu")
    assert choice.name.startswith("dequantize")
    grouped = ops.choose("dot", Int(8, group=128), Int(8, per="token"), (4, 8, 2**18), "cpu").name
    assert grouped in ("int_dot", "native")  # the latter where it was compiled, on processors that it is fast on


AFFINE_ACTS = [Affine(8, per="tensor", signed=False), Affine(5, per="token"), Int(8, per="token", symmetric=False),
               Int(8, per="tensor"), Affine(8, per="tensor")]  # fmt: skip
AFFINE_WEIGHTS = [Affine(8), Affine(2, per="tensor"), Int(4, symmetric=False), Affine(5, signed=False), Int(8)]


@pytest.mark.every(3)
@pytest.mark.parametrize("n", range(5))
@pytest.mark.parametrize("rows", [1, 3])
def test_offsets_are_exact_on_codes(n, rows):
    act, fmt = AFFINE_ACTS[n], AFFINE_WEIGHTS[n]
    act = act if isinstance(act, Affine) or isinstance(fmt, Affine) else Affine(8, per="token")
    rng = np.random.default_rng(n)
    x = rng.standard_normal((rows, 40)).astype(np.float32) + 1
    w = quantize_array(jnp.asarray(rng.standard_normal((40, 24)) + 0.5, jnp.float32), fmt, in_axes=0)
    aux = ops.activation_aux(jnp.asarray(x), act)

    def numbers(codes, fmt, aux):
        zero = np.asarray(fmt.zero_of(aux), np.float64) if "zero" in aux else 0
        shift = np.asarray(aux["offset"], np.float64) if "offset" in aux else 0
        return (np.asarray(codes, np.float64) - zero) * np.asarray(aux["scale"], np.float64) + shift

    want = numbers(act.encode(x, aux), act, aux) @ numbers(w.canonical().unpacked(), fmt, w.canonical().aux).T
    run = jax.jit(lambda x, w, aux: ops.q_dot(x, w, act=(act, aux)))
    np.testing.assert_allclose(run(x, w, aux), want, rtol=0, atol=2e-6 * np.abs(want).max())
    text = run.lower(x, w, aux).as_text()
    assert (
        "xi8>" in text and "xi32>" in text and ops.choose("dot", fmt, act, (rows, 24, 40), "cpu").name == "affine_dot"
    )


@pytest.mark.slow
def test_offsets_keep_the_promises_of_lowerings():
    check_lowering("dot", "affine_dot", weights=AFFINE_WEIGHTS, acts=AFFINE_ACTS, examples=15)


def test_offsets_over_devices_are_those_on_one():
    rng = np.random.default_rng(0)
    act, fmt = Affine(8, per="token", signed=False), Affine(4)
    x = jnp.asarray(rng.standard_normal((2, 3, 2, 64)) + 1, jnp.float32)
    q = quantize_array(jnp.asarray(rng.standard_normal((2, 64, 24)), jnp.float32), fmt, in_axes=1, stack_axes=0)
    aux = ops.activation_aux(x, act, stack_ndim=1)
    problem = q_dot_op.definition.problem(
        ops.Spec(out_dtype=np.dtype(np.float32), act=act), ops.Operands(x, aux, q.canonical()), "cpu", 1
    )
    one, many = (
        jax.jit(lambda x, q, aux, p=p: affine.affine_dot(p, x, q, (act, aux)))(x, q.canonical(), aux)
        for p in (problem, dataclasses.replace(problem, devices=2))
    )
    np.testing.assert_allclose(one, many, rtol=2e-6, atol=2e-5)
    for act, fmt, why in ((None, Affine(8), "not quantized"), (Int(8), Affine(8, group=8), "scale per group"),
                          (Int(8), Int(8), "neither operand"), (Affine(8), NF4(), "no integers")):  # fmt: skip
        assert why in str(affine._affine_pair(dataclasses.replace(problem, weight=fmt, act=act)))

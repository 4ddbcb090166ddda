"""Rows of activations quantized in one pass: the kernel in jax's interpreter, its lowering for CUDA, and the op."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import mosaic
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.gpu_parts.acts import exact, operands, wrong
from benchmarks.kernel_cases.acts import ALONE, FLOAT8, GATE, INT8, LAYER_NORM, RMS_NORM
from qjax import ops
from qjax._compat import JAX_VERSION
from qjax.errors import FormatError, LayoutError, LoweringError, QjaxWarning
from qjax.formats import Float8, Int, quantize_array
from qjax.kernels.act.reference import Before
from qjax.kernels.act.rows import is_held, pieces, quantize

interpreted = pytest.mark.skipif(JAX_VERSION < (0, 11), reason="the Mosaic GPU interpreter is usable from jax 0.11 on")

CLOSE = 1e-3


def run(x, extra, fmt, before, held=None):
    with mosaic.interpreter() as interpret:
        codes, scale = quantize(x, extra, fmt=fmt, before=before, held=held, interpret=interpret)
        out = np.asarray(codes), np.asarray(scale, np.float64)[:, None]
        assert not mosaic.races_found()
    return out


@pytest.mark.parametrize("length", [128, 129, 1000, 1001, 1024, 1032, 4544, 11008, 28672])
@pytest.mark.parametrize("bits", [16, 32])
def test_pieces_cover_a_row_once(length, bits):
    seen = np.zeros(length, int)
    for part in pieces(length, bits):
        assert part.length % (128 * part.vector) == 0 and part.start % part.vector == 0 == length % part.vector
        assert part.vector * bits <= 128
        seen[part.start + part.known : part.start + part.length] += 1
    assert (seen == 1).all()


@interpreted
@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from([1, 2, 3, 5, 7]),
    st.one_of(st.integers(128, 700), st.sampled_from([1024, 1032, 1152])),
    st.sampled_from([ALONE, RMS_NORM, LAYER_NORM, GATE]),
    st.sampled_from([INT8, FLOAT8, Int(8, per="token", scale="qmax"), Int(4, per="token")]),
    st.sampled_from(["bfloat16", "float16", "float32"]),
    st.booleans(),
)
def test_against_numpy(rows, length, before, fmt, dtype, held):
    x, extra = operands(before, rows, length, dtype)
    codes, scale = run(x, extra, fmt, before, held)
    assert codes.shape == x.shape and codes.dtype == fmt.code_dtype
    assert wrong(codes, scale, exact(np.asarray(x), [np.asarray(a) for a in extra], before), fmt) < CLOSE


@interpreted
@pytest.mark.parametrize("before", [RMS_NORM, LAYER_NORM])
@pytest.mark.parametrize(("rows", "length", "fmt", "held"), [(3, 257, FLOAT8, None), (2, 1152, INT8, False)])
def test_weights_of_norms_in_float32_behind_rows_of_16_bits(before, rows, length, fmt, held):
    x, extra = operands(before, rows, length, "bfloat16", weights="float32")
    extra = [a * 1.0001 for a in extra]  # no bfloat16 number
    codes, scale = run(x, extra, fmt, before, held)
    assert wrong(codes, scale, exact(np.asarray(x), [np.asarray(a) for a in extra], before), fmt) < 1e-4


@interpreted
@pytest.mark.parametrize("fmt", [INT8, FLOAT8])
def test_alone_it_is_what_xla_computes(fmt):
    """The same codes as `activation_aux` and `encode`, and the same in rows with NaN, infinity and zeros."""
    x = np.random.default_rng(0).normal(size=(6, 300)).astype(np.float32)
    x[1, 5], x[2, 299], x[3], x[4, :100], x[5] = np.nan, -np.inf, 0, -0.0, 1e-40
    x = jnp.asarray(x)
    codes, scale = run(x, [], fmt, ALONE)
    aux = ops.activation_aux(x, fmt)
    finite = np.isfinite(scale)
    np.testing.assert_array_equal(scale[finite], np.asarray(aux["scale"], np.float64)[finite])
    np.testing.assert_array_equal(finite, np.isfinite(aux["scale"]))
    np.testing.assert_array_equal(codes.astype(np.float32), np.asarray(fmt.encode(x, aux)).astype(np.float32))
    assert not codes[1:4].any() and not finite[1:3].any() and scale[3, 0] == 2.0**-126


@interpreted
@pytest.mark.parametrize("before", [RMS_NORM, LAYER_NORM, GATE])
def test_nan_and_zeros_behind_norms_and_gates(before):
    x, extra = operands(before, 3, 256, "float32")
    x = x.at[0, 3].set(jnp.nan).at[1].set(0.0)
    codes, scale = run(x, extra, INT8, before)
    assert np.isnan(scale[0, 0]) and not codes[0].any() and np.isfinite(scale[1:]).all()
    assert codes[2].any() and (codes[1].any() == before.bias)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("before", [ALONE, RMS_NORM, LAYER_NORM, GATE])
@pytest.mark.parametrize("length", [11008, 28672])
def test_long_rows(before, length):
    x, extra = operands(before, 2, length, "bfloat16")
    codes, scale = run(x, extra, INT8, before)
    assert wrong(codes, scale, exact(np.asarray(x), [np.asarray(a) for a in extra], before), INT8) < CLOSE


# The op.


def norm_of(before, extra):
    if before.kind == "rms_norm":
        return {"norm": ops.RMSNorm(extra[0] if extra else None, before.eps)}
    if before.kind == "layer_norm":
        return {"norm": ops.LayerNorm(extra[0], extra[1], before.eps)}
    return {"gate": extra[0]} if extra else {}


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.integers(1, 3), min_size=0, max_size=2),
    st.integers(1, 40),
    st.sampled_from([ALONE, RMS_NORM, LAYER_NORM, GATE]),
    st.sampled_from([INT8, FLOAT8]),
)
def test_the_op_against_numpy(lead, length, before, fmt):
    x, extra = operands(before, int(np.prod(lead)), length, "float32")
    y = exact(np.asarray(x), [np.asarray(a) for a in extra], before).reshape(*lead, length)
    shaped = [a.reshape(*lead, length) if before.kind == "gate" else a for a in extra]
    rows = ops.quantize_rows(x.reshape(*lead, length), fmt, **norm_of(before, shaped))
    assert rows.shape == (*lead, length) and rows.aux["scale"].shape == (*lead, 1) and rows.dtype == jnp.float32
    if y.any():
        assert wrong(np.asarray(rows.codes), np.asarray(rows.aux["scale"], np.float64), y, fmt) < CLOSE
    step = np.abs(y).max(-1, keepdims=True) / (28 if fmt is FLOAT8 else 250)
    assert (np.abs(np.asarray(rows.dequantize()) - y) <= step * 1.01 + 1e-6).all()


@pytest.mark.parametrize(("weights", "act"), [(Int(8), INT8), (Float8(), FLOAT8), (Int(4, group=32), INT8)])
def test_its_codes_go_into_products(weights, act):
    """Once for q, k and v: what `act=` gives, bit by bit."""
    w = quantize_array(jax.random.normal(jax.random.key(0), (48, 64)), weights, in_axes=1)
    x = jax.random.normal(jax.random.key(1), (2, 3, 64), jnp.bfloat16)
    rows = ops.quantize_rows(x, act)
    want = ops.q_dot(x, w, act=(act, ops.activation_aux(x, act)))
    got = jax.jit(ops.q_dot)(rows, w)
    assert got.shape == (2, 3, 48) and got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=2**-7)
    np.testing.assert_array_equal(ops.q_dot(ops.quantize_rows(x[0, 0], act), w), ops.q_dot(rows, w)[0, 0])
    mapped = jax.vmap(lambda x: ops.q_dot(ops.quantize_rows(x, act), w))(x)
    np.testing.assert_allclose(np.asarray(mapped, np.float32), np.asarray(want, np.float32), rtol=2**-7)
    with pytest.raises(LayoutError, match="quantized already.*leave act out"):
        ops.q_dot(rows, w, act=(act, rows.aux))


def test_under_transformations():
    x = jax.random.normal(jax.random.key(0), (4, 3, 32))
    weights = jax.random.normal(jax.random.key(1), (4, 32))

    def one(x, weight):
        rows = ops.quantize_rows(x, INT8, norm=ops.RMSNorm(weight))
        return rows.codes, rows.aux["scale"]

    each = [one(x[i], weights[i]) for i in range(4)]
    for got, want in zip(jax.vmap(one)(x, weights), zip(*each, strict=True), strict=True):
        np.testing.assert_allclose(got, np.stack(want), atol=1)
    shared = jax.jit(jax.vmap(one, in_axes=(1, None), out_axes=1))(x, weights[0])
    np.testing.assert_allclose(shared[1], one(x, weights[0])[1], rtol=1e-6)
    gated = jax.vmap(lambda x, g: ops.quantize_rows(x, INT8, gate=g).aux["scale"], in_axes=(0, None))(x, x[0])
    assert gated.shape == (4, 3, 1)
    with pytest.raises(NotImplementedError, match="no derivative.*act=.*stop_gradient"):
        jax.grad(lambda x: ops.quantize_rows(x, INT8).dequantize().sum())(x)
    slope = jax.grad(lambda x: (ops.quantize_rows(jax.lax.stop_gradient(x), INT8).dequantize() * x).sum())(x)
    assert slope.shape == x.shape
    assert ops.quantize_rows(x[:, :0], INT8).shape == (4, 0, 32)


def test_what_does_not_fit_is_refused():
    x = jnp.ones((2, 64))
    with pytest.raises(FormatError, match="here: quantize_rows to int8 g32.*activation_aux"):
        ops.quantize_rows(x, Int(8, group=32), site="here")
    with pytest.raises(FormatError, match="uint8"):
        ops.quantize_rows(x, Int(8, per="token", symmetric=False))
    with pytest.raises(LayoutError, match="floats"):
        ops.quantize_rows(jnp.ones((2, 4), jnp.int32), INT8)
    with pytest.raises(LayoutError, match=r"weight is \(3,\), for rows of 64"):
        ops.quantize_rows(x, INT8, norm=ops.RMSNorm(jnp.ones(3)))
    with pytest.raises(LayoutError, match="one of them"):
        ops.quantize_rows(x, INT8, norm=ops.RMSNorm(), gate=x)
    with pytest.raises(LayoutError, match="give both alike"):
        ops.quantize_rows(x, INT8, gate=x[0])
    with pytest.raises(LayoutError, match="RMSNorm"):
        ops.quantize_rows(x, INT8, norm=1e-6)
    with pytest.raises(LoweringError, match="mosaic"):
        ops.quantize_rows(x, INT8, implementation="mosaic")
    with pytest.raises(LayoutError, match="last axis"):
        w = quantize_array(jnp.ones((4, 8)), Int(8), in_axes=1)
        ops.q_dot(quantize_array(jnp.ones((8, 4)), INT8, in_axes=0), w)


# Lowering for CUDA.


def lowered(length, dtype, before=ALONE, fmt=INT8, rows=3, how="mosaic", function=None):
    x = jax.ShapeDtypeStruct((rows, length), dtype)
    extra = [x] if before.kind == "gate" else [jax.ShapeDtypeStruct((length,), dtype)] * (before.weight + before.bias)

    def named(x, extra):
        return ops.quantize_rows(x, fmt, implementation=how, **norm_of(before, extra)).codes

    with mosaic.described_gpu():
        return jax.jit(function or named).trace(x, extra).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("length", "dtype", "before", "fmt"),
    [
        (4096, "bfloat16", ALONE, INT8),
        (1001, "float16", LAYER_NORM, FLOAT8),
        (28672, "float32", GATE, INT8),
        (1032, "float32", Before("rms_norm", 1e-6), FLOAT8),
    ],
)
def test_it_lowers_for_cuda_here(length, dtype, before, fmt):
    assert lowered(length, dtype, before, fmt).count("custom_call @mosaic_gpu") == 1


def test_the_kernel_is_left_with_the_reason():
    for length, dtype, why in ((100, "bfloat16", "rows have 100 elements; 128 to"), (40000, "bfloat16", "40000")):
        with pytest.raises(LoweringError, match=why):
            lowered(length, dtype)
    with pytest.raises(LoweringError, match="not fp8_e5m2"):
        lowered(256, "bfloat16", fmt=Float8("e5m2", per="token"))
    with pytest.warns(QjaxWarning, match="rows of 40000 elements, more than the 32768"):
        assert "mosaic_gpu" not in lowered(40000, "bfloat16", how=None)
    assert "mosaic_gpu" not in lowered(4096, "bfloat16", rows=0)


def test_long_rows_are_read_again():
    assert is_held(28672, 16, ALONE) and not is_held(28672, 32, ALONE)
    assert is_held(14336, 16, GATE) and not is_held(28672, 16, GATE) and is_held(16384, 16, RMS_NORM)

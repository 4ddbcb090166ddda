"""Triton kernels for Ampere and Ada: Pallas' interpreter against float64 NumPy, the choice, lowering for CUDA here."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import mosaic
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax import ops
from qjax.errors import LoweringError
from qjax.formats import NF4, Float8, Int
from qjax.kernels import Problem, registry
from qjax.kernels.devices import cuda_capability, cuda_processors
from qjax.kernels.dot import triton_call
from qjax.kernels.dot.rows8 import rows8
from qjax.kernels.dot.rows16 import Cut, rows16
from qjax.kernels.dot.triton import cut_for

AMPERE = (8, 0)
CALL = "__gpu$xla.gpu.triton"
FORMATS = [
    Int(4, group=32),
    Int(4, group=64, symmetric=False),
    Int(4, group=128),
    Int(4, group=96),
    Int(4),
    Int(4, symmetric=False),
    Int(4, per="tensor"),
    Int(8),
    Int(8, group=32, symmetric=False),
    Int(8, per="tensor", symmetric=False),
]


def run(w, x, cut, out_dtype=jnp.float32):
    """By the interpreter; a stack of one matrix, or of several."""
    three = lambda a: None if a is None else a.reshape(-1, *a.shape[-2:])  # noqa: E731
    y = rows16(
        three(w.codes),
        three(w.fmt.scale_of(w.aux)),
        three(w.fmt.zero_of(w.aux)),
        x,
        fmt=w.fmt,
        out_dtype=out_dtype,
        cut=cut,
        interpret=True,
    )
    return np.asarray(y, np.float64)


def columns_for(fmt, k, wanted):
    return next(c for c in (wanted, 32) if fmt.groups(k) == 1 or fmt.group % c == 0)


@settings(max_examples=8)
@given(
    st.sampled_from(FORMATS),
    st.integers(1, 70),
    st.integers(1, 200),
    st.integers(1, 40),
    st.sampled_from([jnp.bfloat16, jnp.float16]),
    st.sampled_from([32, 64]),
)
def test_float_activations_against_numpy(fmt, n, k, tokens, dtype, wanted):
    w, numbers = mosaic.weight(fmt.clamped(k), n, k)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, tokens, k)), dtype)
    columns = columns_for(w.fmt, k, wanted)
    steps = -(-k // columns)
    splits = next(s for s in (3, 2, 1) if steps % s == 0)
    y = run(w, x, Cut(32, 16, columns, splits))
    exact = np.asarray(x, np.float64)[0]
    terms = np.abs(exact) @ np.abs(numbers).T
    assert y.shape == (1, tokens, n)
    assert np.all(np.abs(y[0] - exact @ numbers.T) <= 1e-6 * terms)


def test_many_tiles_of_tokens_go_in_bands_and_stacks_beside_each_other():
    w, numbers = mosaic.weight(Int(4, group=32), 40, 32, stack=(2,))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 170, 32)), jnp.bfloat16)
    y = run(w, x, Cut(16, 16, 32), jnp.bfloat16)
    want = np.einsum("emk,enk->emn", np.asarray(x, np.float64), numbers)
    assert np.max(np.abs(y - want)) <= 2**-8 * np.max(np.abs(want))


def test_nan_and_infinity_stay_in_their_rows():
    w, _ = mosaic.weight(Int(4, group=32), 40, 100)
    x = np.ones((1, 3, 100), np.float32)
    x[0, 1, 5], x[0, 2] = np.nan, 60000.0  # the sum is beyond float16
    y = run(w, jnp.asarray(x, jnp.float16), Cut(32, 16, 32), jnp.float16)
    assert np.isnan(y[0, 1]).all() and np.isfinite(y[0, 0]).all() and not np.isnan(y[0, 2]).any()
    assert np.isinf(y[0, 2]).any()


@settings(max_examples=4)
@given(st.sampled_from([jnp.int8, jnp.float8_e4m3fn]), st.integers(1, 50), st.integers(1, 130), st.integers(1, 35))
def test_products_of_codes_against_numpy(dtype, n, k, tokens):
    rng = np.random.default_rng(0)
    draw = (lambda *s: rng.integers(-128, 128, s)) if dtype == jnp.int8 else (lambda *s: rng.normal(size=s))
    w, x = (jnp.asarray(draw(2, m, k), dtype) for m in (n, tokens))
    scales = [jnp.asarray(rng.uniform(0.5, 1.5, (2, m)), jnp.float32) for m in (n, tokens)]
    scales[1] = scales[1].at[0, 0].set(jnp.nan)  # of a token that holds NaN
    steps = -(-k // 32)
    cut = Cut(32, 16, 32, 2 if steps % 2 == 0 else 1)
    y = np.asarray(rows8(w, scales[0], x, scales[1], out_dtype=jnp.float32, cut=cut, interpret=True), np.float64)
    wide = [np.asarray(a, np.float64) for a in (w, scales[0], x, scales[1])]
    want = np.einsum("enk,en,emk,em->emn", *wide)
    terms = np.einsum("enk,en,emk,em->emn", *map(np.abs, wide))
    assert np.isnan(y[0, 0]).all() and np.isnan(y).sum() == n
    assert np.nanmax(np.abs(y - want) / np.maximum(terms, 1e-30)) < 1e-6


def test_the_longest_sum_of_codes_is_exact():
    k = 131071  # of a whole row of -128, just within int32
    w = jnp.full((1, 16, k), -128, jnp.int8)
    one = jnp.ones((1, 16), jnp.float32)
    y = rows8(w, one, w[:, :1], one[:, :1], out_dtype=jnp.float32, cut=Cut(16, 16, 128, 8), interpret=True)
    np.testing.assert_array_equal(y, np.float32(k * 128 * 128))


# Choosing.


def problem(**changes):
    settled = {
        "op": "dot",
        "platform": "cuda",
        "weight": Int(4, group=128),
        "act": None,
        "rows": 4,
        "n": 256,
        "k": 512,
        "x_dtype": np.dtype(jnp.bfloat16),
        "out_dtype": np.dtype(jnp.bfloat16),
        "capability": AMPERE,
    }
    return Problem(**{**settled, **changes})


def test_it_is_chosen_for_few_tokens_on_ampere_ada_and_hopper():
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0)):
        assert registry.select(problem(capability=capability)).name == "triton"
    tiles = jax.eval_shape(lambda: ops.pack(mosaic.blank(Int(4, group=128), 256, 512))).fmt
    assert registry.select(problem(capability=(9, 0), weight=tiles)).name == "mosaic"
    for change in (
        {"capability": (7, 5)},
        {"capability": None},
        {"capability": (10, 0)},
        {"rows": 4096},
        {"weight": tiles},
        {"devices": 2},
        {"x_dtype": np.dtype(np.float32)},
    ):
        assert registry.select(problem(**change)).name == "dequantize"
    assert registry.select(problem(capability=(10, 0)), "triton").name == "triton"
    token = Int(8, per="token")
    assert registry.select(problem(weight=Int(8), act=token)).name == "int_dot"
    assert registry.select(problem(weight=Int(8), act=token), "triton").name == "triton"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"platform": "cpu", "capability": None}, "it runs on cuda"),
        ({"capability": None}, "not known for which GPU"),
        ({"capability": (7, 5)}, "8.0 .Ampere. or newer, and this device has 7.5"),
        ({"weight": Int(3)}, "no integers of 4 or 8 bits"),
        ({"weight": NF4()}, "it reads Int or Float8 weights"),
        ({"weight": Float8()}, "no integers of 4 or 8 bits"),
        ({"weight": Int(4, group=24)}, "no multiple of 32"),
        ({"weight": Int(4, symmetric=False, zero="float")}, "lie between codes"),
        ({"x_dtype": np.dtype(np.float32)}, "activations are float32; cast them"),
        ({"rows": None}, "rows is not known"),
        ({"devices": 8}, "8 devices; call it inside jax.shard_map"),
        ({"stack": (64,), "n": 65536, "k": 8192}, "more than 2..31 elements"),
        ({"weight": Int(8), "act": Int(8, per="token", symmetric=False)}, "neither int8 x int8, both symmetric"),
        ({"weight": Int(8, group=128), "act": Int(8, per="token")}, "a scale per group"),
        ({"weight": Int(8), "act": Int(8, per="token"), "k": 131072}, "may overflow int32"),
        ({"weight": Float8(), "act": Float8(per="token")}, r"float8 from compute capability 8.9"),
        ({"weight": Float8("e5m2"), "act": Float8(per="token")}, "float8_e4m3fn"),
    ],
)
def test_a_named_kernel_says_why_it_cannot_run(change, why):
    with pytest.raises(LoweringError, match=why):
        registry.select(problem(**change), "triton")


def test_without_the_backend_nothing_is_chosen(monkeypatch):
    def gone():
        raise ImportError("no module named triton")

    monkeypatch.setattr(triton_call, "pallas_triton", gone)
    triton_call.has_triton.cache_clear()
    try:
        assert registry.select(problem()).name == "dequantize"
        with pytest.raises(LoweringError, match="offers no Triton backend"):
            registry.select(problem(), "triton")
    finally:
        triton_call.has_triton.cache_clear()


@given(st.sampled_from(FORMATS), st.integers(1, 40000), st.integers(1, 40000), st.integers(1, 9000))
def test_cuts_are_whole(fmt, n, k, rows):
    fmt = fmt.clamped(k)
    for act in (None, Int(8, per="token")):
        cut = cut_for(fmt, act, n, k, rows)
        assert -(-k // cut.columns) % cut.splits == 0 and cut.tokens >= 16 and cut.columns >= 32
        assert act is not None or fmt.groups(k) == 1 or fmt.group % cut.columns == 0


def test_devices_that_are_described():
    for kind, capability in (("NVIDIA A100-SXM4-80GB", (8, 0)), ("NVIDIA A10", (8, 6)), ("NVIDIA L40S", (8, 9))):
        with mosaic.described_gpu(kind):
            assert cuda_capability() == capability and cuda_processors() == 132
    assert cuda_processors() == 108


# Tier 0.


def lowered(function, *shapes, kind="NVIDIA A100"):
    with mosaic.described_gpu(kind):
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("fmt", "n", "k", "tokens", "dtype"),
    [
        (Int(4, group=128), 256, 4096, 1, jnp.bfloat16),
        (Int(4, group=64, symmetric=False), 200, 200, 7, jnp.float16),
        (Int(4), 33, 77, 64, jnp.bfloat16),
        (Int(8, group=32, symmetric=False), 256, 512, 130, jnp.bfloat16),
        (Int(8), 256, 512, 17, jnp.float16),
    ],
)
def test_it_lowers_for_cuda_here_without_a_warning(fmt, n, k, tokens, dtype):
    w = jax.eval_shape(lambda: mosaic.blank(fmt, n, k))
    x = jax.ShapeDtypeStruct((tokens, k), dtype)
    text = lowered(ops.q_dot, x, w)
    assert text.count(CALL) == 1 and "stablehlo.pad" not in text and "stablehlo.transpose" not in text


def test_it_lowers_under_vmap_and_for_no_rows():
    w = jax.eval_shape(lambda: mosaic.blank(Int(4, group=32), 64, 96, (3,)))
    x = jax.ShapeDtypeStruct((3, 2, 96), jnp.bfloat16)
    assert lowered(ops.q_dot, x, w).count(CALL) == 1
    assert lowered(jax.vmap(ops.q_dot, in_axes=(0, None)), jax.ShapeDtypeStruct((4, *x.shape), x.dtype), w).count(CALL)
    assert CALL not in lowered(ops.q_dot, jax.ShapeDtypeStruct((3, 0, 96), x.dtype), w)


def test_w8a8_lowers_for_cuda_here():
    for fmt, act, kind in (
        (Int(8), Int(8, per="token"), "NVIDIA A100"),
        (Float8(), Float8(per="tensor"), "NVIDIA L40"),
    ):
        w = jax.eval_shape(lambda fmt=fmt: mosaic.blank(fmt, 200, 300))

        def named(x, w, act=act):
            return ops.q_dot(x, w, act=(act, ops.activation_aux(x, act)), implementation="triton")

        text = lowered(named, jax.ShapeDtypeStruct((3, 300), jnp.bfloat16), w, kind=kind)
        assert text.count(CALL) == 1


def test_other_warnings_are_heard():
    def body(x, y):
        warnings.warn("from within a kernel", UserWarning, stacklevel=1)
        y[...] = x[...]

    kernel = triton_call.TritonKernel(body, "copy", jax.ShapeDtypeStruct((16,), jnp.float32), (1,), 4, 1)
    with pytest.warns(UserWarning, match="from within a kernel"):
        assert CALL in lowered(kernel, jax.ShapeDtypeStruct((16,), jnp.float32))

"""log_attention against its equations in float64, under transformations, and where programs have it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import mosaic
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qjax
from benchmarks.gpu_parts.log_attention import exact, operands
from qjax import ops
from qjax._compat import JAX_VERSION
from qjax.errors import FormatError, LayoutError, LoweringError
from qjax.formats import Int, Log
from qjax.kernels.log_attention.hopper import attend, scaled
from qjax.kernels.log_attention.lookup import numbers_of
from qjax.rewriting.log_attention import Kept

F = np.float32
V4 = Int(4, per="tensor", symmetric=False)


@settings(max_examples=4, deadline=None)
@given(
    st.integers(0, 2**16),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 40), st.integers(1, 9)),
    st.integers(2, 8),
    st.integers(10, 137),
    st.sampled_from(["mask", "reserve", "clamp"]),
    st.booleans(),
)
def test_it_is_what_the_equations_say(seed, shape, bits, q, zero, quantized):
    fmt = Log(bits, q, zero=zero)
    scores, v, values = operands(seed, shape, max(bits, 3))
    values = values if quantized else None
    want, off = exact(scores, v, fmt, values)
    for name in ("xla", "lookup") if quantized and bits < 8 else ("xla",):
        got = ops.log_attention(scores, v, fmt, values=values, implementation=name)
        assert got.dtype == F and (np.abs(got - want) <= off).all(), name


def test_it_transforms():
    fmt = Log(4, 25)
    scores, v, values = operands(0, (2, 3, 4, 7, 5))
    scores[0, 0, 1] = -np.inf
    shared = (values[0], {k: a[0, :1] for k, a in values[1].items()})  # [1, 1, 1], for all of a batch
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")

    def run(s, x):
        return ops.log_attention(s, x, fmt, values=values)

    def one(s, x):
        return ops.log_attention(s, x, fmt, values=shared)

    def straight(s, x):  # the derivative of the float function, with rounded operands
        p = jax.nn.softmax(s, axis=-1)
        aux = {"scale": jnp.ones((1, 1, 1, 1))}
        p = p + jax.lax.stop_gradient(fmt.decode(fmt.encode(p, aux), aux) - p)
        x = x + jax.lax.stop_gradient(values[0].decode(values[0].encode(x, values[1]), values[1]) - x)
        return p @ x

    def summed(f, *args):
        return jnp.sum(jnp.sin(f(*args)))

    @jax.jit
    def everything(s, x):
        finite = jnp.maximum(s, -9)
        return {
            "y": run(s, x),
            "mapped": (jax.vmap(one, in_axes=(1, None), out_axes=1)(s.swapaxes(0, 1), x[0])[:, 1], one(s[1], x[0])),
            "half": run(s.astype(jnp.bfloat16), x.astype(jnp.bfloat16)),
            "slopes": [jax.grad(functools.partial(summed, f), (0, 1))(finite, x) for f in (run, straight)],
            "split": (jax.shard_map(run, mesh=mesh, in_specs=(spec, spec), out_specs=spec)(s, x), run(s, x)),
        }

    got = everything(scores, v)
    assert not got["y"][0, 0, 1].any() and np.isfinite(got["y"]).all() and got["half"].dtype == jnp.bfloat16
    np.testing.assert_allclose(run(scores, v), got["y"], rtol=1e-6, atol=1e-6)  # eager
    for pair in (got["mapped"], got["split"], *zip(*got["slopes"], strict=True)):
        np.testing.assert_allclose(*pair, rtol=1e-4, atol=1e-5)


def test_what_it_refuses():
    scores, v, values = operands(0, (2, 4, 7, 5))
    with pytest.raises(FormatError, match="without shift"):
        ops.log_attention(scores, v, Log(4, shift=0.17))
    with pytest.raises(LayoutError, match="give .*M, N. and .*N, D"):
        ops.log_attention(scores, v[:, :3], Log(4))
    with pytest.raises(LayoutError, match="scale of values"):
        ops.log_attention(scores, v, Log(4), values=(V4, {"scale": np.ones((3, 1, 1), F)}))
    with pytest.raises(LoweringError, match="of 8 bits need more"):
        ops.log_attention(scores, v, Log(8), values=values, implementation="lookup")
    with pytest.raises(LoweringError, match="values are not quantized"):
        ops.log_attention(scores, v, Log(4), implementation="lookup")
    assert "lookup" in str(ops.lowering_table("log_attention"))


# ---------------------------------------------------------------------------------------------- on Hopper
@pytest.mark.skipif(JAX_VERSION < (0, 11), reason="the Mosaic GPU interpreter is usable from jax 0.11 on")
@pytest.mark.parametrize(
    ("fmt", "shape", "dtype"),
    [
        (Log(4, 25, zero="mask"), (2, 70, 100, 40), "float32"),
        (Log(3, 37), (1, 5, 49, 32), "bfloat16"),
        (Log(5, 12, zero="clamp"), (1, 64, 129, 72), "float32"),
    ],
    ids=["two blocks", "a window, 16 bits", "5 bits, odd sizes"],
)
def test_the_kernel_in_the_interpreter(fmt, shape, dtype):
    scores, v, (its, aux) = operands(3, shape)
    scores[0, 3] = -np.inf
    scores = np.asarray(jnp.asarray(scores, dtype).astype(F))
    numbers, scale = numbers_of(jnp.asarray(v), (its, aux))
    with mosaic.interpreter() as interpret:
        y = attend(jnp.asarray(scores, dtype), numbers, fmt=fmt, interpret=interpret)
        got = np.asarray(scaled(y, fmt, scale))
        assert not mosaic.races_found()
    shown = np.delete(np.arange(shape[1]), 3)
    want, off = exact(scores[:, shown], v, fmt, (its, aux))
    assert (np.abs(got[:, shown] - want) <= off).all()
    want = np.asarray(ops.log_attention(scores[:, 3:4], v, fmt, values=(its, aux)))  # a row that is wholly hidden
    np.testing.assert_allclose(got[:, 3:4], want, atol=1e-6)


def test_the_kernel_lowers_for_cuda():
    args = jax.ShapeDtypeStruct((2, 3, 197, 197), F), jax.ShapeDtypeStruct((2, 3, 197, 64), F)
    aux = {"scale": np.ones((1, 3, 1, 1), F), "zero": np.full((1, 3, 1, 1), 8, np.uint8)}

    def lowered(name, bits=4, args=args):
        run = lambda s, x: ops.log_attention(s, x, Log(bits, 25), values=(V4, aux), implementation=name)  # noqa: E731
        with mosaic.described_gpu():
            traced = jax.jit(run).trace(*args)
            return traced.lower(lowering_platforms=("cuda",)).as_text()

    assert "mosaic_gpu" in lowered("mosaic") and "mosaic_gpu" not in lowered(None)
    with pytest.raises(LoweringError, match="have 6 bits"):
        lowered("mosaic", 6)
    long = jax.ShapeDtypeStruct((2, 3, 197, 1024), F), jax.ShapeDtypeStruct((2, 3, 1024, 64), F)
    with pytest.raises(LoweringError, match="bytes of shared memory"):
        lowered("mosaic", args=long)


# ------------------------------------------------------------------------------------------------- in programs
B, T, H, C = 2, 6, 2, 4
X = np.random.default_rng(1).standard_normal((B, T, H * C)).astype(F)
W = {n: {k: np.random.default_rng(i + 5 * n).standard_normal((H * C, H * C)).astype(F) / 3
         for i, k in enumerate("qkvo")} for n in range(2)}  # fmt: skip


def heads(w, x):
    return [(x @ w[n]).reshape(*x.shape[:-1], H, C) for n in "qkv"]


def by_einsum(w, x):
    q, k, v = heads(w, x)
    s = jnp.einsum("bthd,bshd->bhts", q, k) / C**0.5
    s = jnp.where(jnp.tri(T, dtype=bool), s, -1e30)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(s, axis=-1).astype(x.dtype), v)


def values_first(w, x):  # v^T p^T, keys in front of queries
    q, k, v = heads(w, x)
    s = k.transpose(0, 2, 1, 3) @ q.transpose(0, 2, 3, 1) / C**0.5
    p = jax.nn.softmax(s, axis=-2)
    return (v.transpose(0, 2, 3, 1) @ p).transpose(0, 3, 1, 2)


def by_jax(w, x):
    return jax.nn.dot_product_attention(*heads(w, x), implementation="xla")


def hidden(w, x):  # the scores never leave the function
    q, k, v = heads(w, x)
    p = jax.jit(lambda q, k: jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k), axis=-1))(q, k)
    return jnp.einsum("bhts,bshd->bthd", p, v)


def twice(attend, shared=True):
    layer = lambda w, x: x + attend(w, x).reshape(x.shape) @ w["o"]  # noqa: E731
    layer = jax.jit(layer) if shared else layer
    return lambda params, x: layer(params[1], layer(params[0], x))


def scanned(attend):
    def fn(params, x):
        stack = jax.tree.map(lambda *a: jnp.stack(a), *params.values())
        return jax.lax.scan(lambda h, w: (h + attend(w, h).reshape(h.shape) @ w["o"], None), x, stack)[0]

    return fn


RULE = qjax.Rule(
    "**",
    op="attention",
    operands={
        "p": qjax.fixed(Log(4, 25, zero="mask"), 1.0),
        "v": qjax.fixed(V4, (0.2, 0.3), (7, 9)),
        "q": qjax.fixed(V4, 0.3, 8),
    },
)


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("fn", "count"),
    [
        (twice(by_einsum), 1),  # in a body that both layers share
        (twice(by_jax, shared=False), 2),
        (twice(values_first, shared=False), 2),
        (scanned(by_einsum), 1),
        (twice(hidden, shared=False), 0),
    ],
    ids=["einsum", "jax", "values first", "scan", "hidden"],
)
def test_programs_have_it(fn, count, monkeypatch):
    model = qjax.quantize(fn, W, X, recipe=qjax.Recipe([RULE]))
    call = lambda x: model(model.params, x)  # noqa: E731
    assert str(jax.make_jaxpr(call)(X)).count("log_attention[") == count
    got = np.asarray(call(X))
    row = next(r for r in model.report.rows if r.op == "attention")
    assert row.lowering.startswith("log_attention by xla") == bool(count)
    assert count or "inside a function" in row.note
    jax.clear_caches()
    monkeypatch.setattr(Kept, "brings_scores", False)
    assert "log_attention[" not in str(jax.make_jaxpr(call)(X))
    want = np.asarray(call(X))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert np.abs(want - fn(W, X)).max() > 1e-3

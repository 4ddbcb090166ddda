"""log_attention against its equations in float64, under transformations, and where programs have it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qjax
from qjax import ops
from qjax.errors import FormatError, LayoutError, LoweringError
from qjax.formats import Int, Log
from qjax.rewriting.log_attention import Kept

F = np.float32
V4 = Int(4, per="tensor", symmetric=False)


def oracle(scores, v, fmt, values):
    """The product [*batch, M, D] in float64, and how far float32 may be off: codes on the edge may fall either way."""
    s = scores.astype(np.float64)
    e = np.exp(s - s.max(-1, keepdims=True))
    u = np.maximum(e / e.sum(-1, keepdims=True), 1e-15 if fmt.zero != "reserve" else 1e-300)
    exact = -np.log2(u) * fmt.r / fmt.q
    n, below = 2**fmt.bits, 2 ** (fmt.bits + 1) - 2

    def level(code):
        at = np.clip(code, 0, n - 1) * fmt.q
        value = np.rint(2.0 ** (-(at % fmt.r) / fmt.r) * below) / below * 2.0 ** -(at // fmt.r)
        last = {"mask": n, "reserve": n - 1, "clamp": np.inf}[fmt.zero]
        return np.where(code < last, value, 0)

    edge = np.abs(exact - np.floor(exact) - 0.5) < 1e-4
    jump = np.where(edge, level(np.floor(exact)) - level(np.ceil(exact)), 0)
    near = v.astype(np.float64)
    if values is not None:
        scale, zero = (np.asarray(values[1][k], np.float64) for k in ("scale", "zero"))
        near = (np.clip(np.rint(near / scale) + zero, 0, 2 ** values[0].bits - 1) - zero) * scale
    p = level(np.rint(exact))
    return p @ near, jump @ np.abs(near) + 2e-6 * (p @ np.abs(near)) + 1e-7


def case(seed, shape, fmt, bits=4, spread=3.0):
    rng = np.random.default_rng(seed)
    *batch, m, n, d = shape
    scores = (spread * rng.standard_normal((*batch, m, n))).astype(F)
    scale = rng.uniform(0.1, 1, (*batch[:-1], batch[-1], 1, 1)).astype(F)
    zero = rng.integers(0, 2**bits, scale.shape).astype(np.uint8)
    v = (rng.integers(-20, 20, (*batch, n, d)) + rng.uniform(-0.4, 0.4, (*batch, n, d))) * scale  # no ties
    return scores, v.astype(F), (Int(bits, per="tensor", symmetric=False), {"scale": scale, "zero": zero})


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
    scores, v, values = case(seed, shape, fmt, max(bits, 3))
    values = values if quantized else None
    want, off = oracle(scores, v, fmt, values)
    for name in ("xla", "lookup") if quantized and bits < 8 else ("xla",):
        got = ops.log_attention(scores, v, fmt, values=values, implementation=name)
        assert got.dtype == F and (np.abs(got - want) <= off).all(), name


def test_it_transforms():
    fmt = Log(4, 25)
    scores, v, values = case(0, (2, 3, 4, 7, 5), fmt)
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
    scores, v, values = case(0, (2, 4, 7, 5), None)
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

"""A bias and a residual of q_dot: added in float32 and rounded once, under every transformation."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from mosaic import weight

from qjax import ops
from qjax.errors import LayoutError
from qjax.formats import Int, QArray
from qjax.formats import stack as stacked
from qjax.kernels import registry

N, K = 24, 64
G32 = Int(4, group=32)


def drawn(*shape, seed=1, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def f64(a):
    return np.asarray(a.astype(jnp.float32), np.float64)


def test_the_sum_is_rounded_once():
    stack = (2,)
    # Whole numbers, whose sums are exact in float32, and terms that bfloat16 would lose one by one.
    w, numbers = weight(G32, N, K, stack)
    one = jax.tree.map(jnp.ones_like, w.aux)
    w, numbers = dataclasses.replace(w, aux=one), np.asarray(w.fmt.decode(w.unpacked(), one), np.float64)
    x = jnp.round(drawn(*stack, 3, 5, K, dtype=jnp.bfloat16) * 16)
    bias, residual = drawn(*stack, N) * 500, drawn(*stack, 3, 5, N, seed=2, dtype=jnp.float16) * 500
    product = np.einsum("...abk,...nk->...abn", f64(x), numbers)
    of_bias = np.asarray(bias, np.float64)[..., None, None, :]
    for terms, more in (
        ({"bias": bias}, of_bias),
        ({"residual": residual}, f64(residual)),
        ({"bias": bias, "residual": residual}, of_bias + f64(residual)),
    ):
        got = ops.q_dot(x, w, **terms)
        want = (product + more).astype(np.float32).astype(ml_dtypes.bfloat16)
        assert got.dtype == jnp.bfloat16 and np.mean(np.asarray(got) == want) > 0.999
        late = np.asarray((product.astype(ml_dtypes.bfloat16).astype(np.float32) + more).astype(ml_dtypes.bfloat16))
        assert np.mean(late == want) < 0.9, "the test sees the rounding between"
    got = ops.q_dot(x, w, bias=bias[0], out_dtype=jnp.float32)  # one bias for the whole stack
    np.testing.assert_allclose(got, product + np.asarray(bias[0], np.float64), rtol=1e-6, atol=1e-4)
    y = ops.q_dot(x[..., 0, 0, :], w, residual=residual[..., 0, 0, :], out_dtype=jnp.float32)  # without rows
    np.testing.assert_allclose(y, product[..., 0, 0, :] + f64(residual)[..., 0, 0, :], rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("act", [None, Int(8, per="token")])
def test_derivatives(act):
    w, _ = weight(Int(8) if act else G32, N, K)
    x, bias, residual, ct = drawn(5, K), drawn(N), drawn(5, N, seed=2), drawn(5, N, seed=3)

    def loss(x, scale, bias, residual):
        q = dataclasses.replace(w, aux={"scale": scale})
        given = (act, ops.activation_aux(x, act)) if act else None
        return (ops.q_dot(x, q, act=given, bias=bias, residual=residual) * ct).sum()

    def plain(x, scale, bias, residual):
        if act:
            aux = ops.activation_aux(x, act)
            x = x + jax.lax.stop_gradient(act.decode(act.encode(x, aux), aux) - x)  # straight through
        return ((x @ w.fmt.decode(w.unpacked(), {"scale": scale}).T + bias + residual) * ct).sum()

    primals = (x, w.aux["scale"], bias, residual)
    every = tuple(range(4))
    got = jax.jit(jax.grad(loss, every))(*primals)
    for a, b in zip(got, jax.grad(plain, every)(*primals), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))
    _, slope = jax.jvp(lambda b, r: loss(x, w.aux["scale"], b, r), (bias, residual), (bias, residual))
    np.testing.assert_allclose(slope, ((bias + residual) * ct).sum(), rtol=1e-5)
    checkpointed = jax.checkpoint(loss, policy=ops.remat_policy(jax.checkpoint_policies.dots_saveable))
    np.testing.assert_allclose(jax.grad(checkpointed, 2)(*primals), ct.sum(0), rtol=1e-6)


def test_vmap():
    w, numbers = weight(G32, N, K)
    x, bias, residual = drawn(2, 3, K), drawn(2, N), drawn(2, 3, N, seed=2)
    run = lambda x, w, b, r: ops.q_dot(x, w, bias=b, residual=r)  # noqa: E731
    pair = stacked([w, dataclasses.replace(w, aux={"scale": 2 * w.aux["scale"]})])
    for xa, wa, ba, ra in ((0, None, None, 0), (0, None, 0, 0), (0, None, None, None), (None, None, 0, None),
                           (None, None, None, 0), (0, 0, 0, 0), (None, 0, None, None), (0, 0, None, 0)):  # fmt: skip
        pick = lambda a, d, i: a[i] if d == 0 else a[0]  # noqa: E731
        of = lambda a, d: a if d == 0 else a[0]  # noqa: E731
        got = jax.vmap(run, (xa, wa, ba, ra))(of(x, xa), pair if wa == 0 else w, of(bias, ba), of(residual, ra))
        for i in range(2):
            want = (1 + i * (wa == 0)) * pick(x, xa, i) @ numbers.T + pick(bias, ba, i) + pick(residual, ra, i)
            np.testing.assert_allclose(got[i], want, rtol=1e-5, atol=2e-4)
    # One product where terms fit it; nothing is multiplied twice where they alone are mapped.
    rows = lambda r: run(x[0], w, bias[0], r)  # noqa: E731
    eqns = jax.make_jaxpr(jax.vmap(rows))(residual).jaxpr.eqns
    assert [e.outvars[0].aval.shape for e in eqns if e.primitive.name == "q_dot"] == [(3, N)]


@pytest.mark.parametrize("explicit", [False, True])
def test_shards_that_the_user_cuts(explicit_mesh, explicit):
    w, numbers = weight(Int(8), N, K)
    x, bias, residual = drawn(8, K), drawn(N), drawn(8, N, seed=2)
    want = np.asarray(x, np.float64) @ numbers.T + np.asarray(bias, np.float64) + np.asarray(residual, np.float64)

    def run(x, w, b, r):
        return ops.q_dot(x, w, bias=b, residual=r)

    along = lambda a: P("d") if a.shape[0] == N else P()  # noqa: E731
    specs = (P(), jax.tree.map(along, w), P("d"), P(None, "d"))
    with jax.set_mesh(explicit_mesh):
        place = lambda a, s: jax.device_put(a, jax.NamedSharding(explicit_mesh, s))  # noqa: E731
        operands = jax.tree.map(place, (x, w, bias, residual), specs)
        run = jax.jit(run if explicit else jax.shard_map(run, in_specs=specs, out_specs=P(None, "d")))
        y, pull = jax.vjp(lambda b, r: run(operands[0], operands[1], b, r), *operands[2:])
        of_bias, of_residual = pull(y)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-2)
    np.testing.assert_allclose(of_bias, np.asarray(y).sum(0), rtol=1e-5, atol=1e-3)
    np.testing.assert_array_equal(of_residual, y)


def test_what_does_not_fit_is_refused_with_its_shapes():
    w, _ = weight(G32, N, K, (2,))
    x = drawn(2, 3, K)
    with pytest.raises(LayoutError, match=r"up: q_dot with a bias of float32 \[23\]; floats of \[24\] or \[2, 24\]"):
        ops.q_dot(x, w, bias=drawn(23), site="up")
    with pytest.raises(LayoutError, match=r"residual of float32 \[3, 24\]; floats of \[2, 3, 24\]"):
        ops.q_dot(x, w, residual=drawn(3, N))
    with pytest.raises(LayoutError, match=r"residual of int32"):
        ops.q_dot(x, w, residual=jnp.zeros((2, 3, N), jnp.int32))


@pytest.mark.parametrize("adds", [True, False, "some"])
def test_a_lowering_adds_them_itself_or_is_asked_for_float32(monkeypatch, adds):
    monkeypatch.setattr(registry, "_TABLE", {op: list(rows) for op, rows in registry._TABLE.items()})
    seen = []

    def lowering(problem, x, w, act, **terms):
        seen.append((problem.out_dtype.name, sorted(terms), problem.terms))
        y = x.astype(jnp.float32) @ w.fmt.decode(w.unpacked(), w.aux).T
        return (y + sum(terms.values())).astype(problem.out_dtype)

    condition = (lambda p: p.terms == ("bias",)) if adds == "some" else adds
    registry.register_lowering("dot", Int, "cpu", name="ours", adds=condition)(lowering)
    w, numbers = weight(G32, N, K)
    x, bias, residual = drawn(3, K, dtype=jnp.bfloat16), drawn(N), drawn(3, N, seed=2)
    y = ops.q_dot(x, w, bias=bias, residual=residual)
    want = f64(x) @ numbers.T + np.asarray(bias, np.float64) + np.asarray(residual, np.float64)
    np.testing.assert_allclose(f64(y), want, rtol=1e-2)
    whole = ("bfloat16", ["bias", "residual"], ("bias", "residual"))
    assert seen == [whole if adds is True else ("float32", [], ())]
    ops.q_dot(x, w, bias=bias)
    assert seen[1] == (("bfloat16", ["bias"], ("bias",)) if adds else ("float32", [], ()))
    line = next(line for line in str(ops.lowering_table("dot", "cpu")).splitlines() if " ours " in line)
    assert {True: " in it", False: " after it", "some": " some in it"}[adds] in line
    jax.clear_caches()


def test_one_equation_that_says_what_is_added_and_survives_export():
    w, numbers = weight(Int(8), N, K)
    run = lambda x, w, b, r: ops.q_dot(x, w, bias=b, residual=r)  # noqa: E731
    x, bias, residual = drawn(3, K), drawn(N), drawn(3, N, seed=2)
    jaxpr = jax.make_jaxpr(run)(x, w, bias, residual)
    assert [e.primitive.name for e in jaxpr.eqns] == ["q_dot"] and "+ bias + residual" in str(jaxpr)
    (rows,) = jax.export.symbolic_shape("rows")
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    codes = lambda c, s: QArray(c, {"scale": s}, w.fmt, w.layout, w.dtype)  # noqa: E731
    exported = jax.export.export(jax.jit(lambda x, c, s, b, r: run(x, codes(c, s), b, r)))(
        of(rows, K), w.codes, w.aux["scale"], bias, of(rows, N)
    )
    y = jax.export.deserialize(exported.serialize()).call(x, w.codes, w.aux["scale"], bias, residual)
    np.testing.assert_allclose(y, np.asarray(x) @ numbers.T + bias + residual, rtol=1e-5, atol=1e-2)

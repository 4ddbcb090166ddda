"""The flat view of a level."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from qjax import _compat
from qjax.composites import constants, find_composites, inlined
from qjax.composites.axes import Axis, leaves, regroup


def at_path(jaxpr, path):
    """Follow a path as the rest of qjax writes it."""
    inner = _compat.open_jaxpr(jaxpr)
    for step in path[:-1]:
        if isinstance(step, int):
            eqn = inner.eqns[step]
        else:
            (inner,) = (_compat.open_jaxpr(sub) for key, sub in _compat.sub_jaxprs(eqn.params) if key == step)
    return inner.eqns[path[-1]]


def model(x, w):
    @jax.checkpoint
    def block(x, w):
        return jax.nn.softmax(jax.nn.silu(x @ w)) + jnp.where(x > 0, x, 1.0)

    y = jax.jit(block)(x, w)
    return jax.jit(block)(y, w) + jax.nn.relu(x)


def test_paths_lead_to_the_equations(rand):
    closed = jax.make_jaxpr(model)(rand(3, 4), rand(4, 4))
    level = inlined(closed)
    assert len({node.path for node in level.nodes}) == len(level.nodes)
    for node in level.nodes:
        assert at_path(closed, node.path) is node.eqn
        assert level.node_at(node.path) is node
        assert node.name not in ("jit", "pjit", "remat2", "checkpoint", "custom_jvp_call")
    with pytest.raises(KeyError):
        level.node_at((99,))


def test_operands_come_before_their_users(rand):
    level = inlined(jax.make_jaxpr(model)(rand(3, 4), rand(4, 4)))
    for node in level.nodes:
        assert all(v.node is None or v.node.index < node.index for v in node.inputs)
        assert all(node in v.users for v in node.inputs)
        assert [v.node for v in node.outputs] == [node] * len(node.outputs)
    assert [v.shape for v in level.inputs] == [(3, 4), (4, 4)]


def test_a_shared_body_gives_separate_values(rand):
    closed = jax.make_jaxpr(model)(rand(3, 4), rand(4, 4))
    dots = list(inlined(closed).named("dot_general"))
    assert len(dots) == 2 and dots[0].eqn is dots[1].eqn
    assert dots[0].output is not dots[1].output and dots[0].inputs[1] is dots[1].inputs[1]


def test_control_flow_and_authors_units_stay_closed(rand):
    @jax.custom_vjp
    def unit(x):
        return jax.nn.softmax(x @ x)

    unit.defvjp(lambda x: (unit(x), x), lambda x, g: (g,))

    def fn(x):
        x = lax.scan(lambda c, _: (jnp.sin(c), None), x, None, length=3)[0]
        return unit(lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x))

    closed = jax.make_jaxpr(fn)(rand(4, 4))
    level = inlined(closed)
    assert {"scan", "cond", "custom_vjp_call"} <= {n.name for n in level.nodes}
    (inner,) = level.units
    assert all(at_path(closed, node.path) is node.eqn for node in inner.nodes)
    (match,) = find_composites(closed)
    assert at_path(closed, match.output_path).primitive.name == "div"


def test_constants_of_nested_bodies_are_known(rand):
    mask = np.tril(np.ones((5, 5), bool))

    @jax.jit
    def fn(x):
        return jnp.where(jnp.asarray(mask), x, 0.0)

    for jaxpr, consts in ((jax.make_jaxpr(fn)(rand(5, 5)), ()), (jax.make_jaxpr(lambda x: fn(x))(rand(5, 5)), ())):
        (select,) = inlined(jaxpr, consts).named("select_n")
        index = np.indices((5, 5))
        np.testing.assert_array_equal(constants.at(select.inputs[0], list(index)), mask)


def test_open_jaxprs_take_their_constants_apart(rand):
    table = jnp.arange(4.0)
    closed = jax.make_jaxpr(lambda x: x + table * 2)(rand(4))
    known = inlined(_compat.open_jaxpr(closed), _compat.consts_of(closed))
    (product,) = known.named("mul")
    assert product.output.fixed
    np.testing.assert_array_equal(constants.at(product.output, [np.arange(4)]), [0, 2, 4, 6])


FIXED = {
    "tril": lambda: jnp.tril(jnp.ones((5, 7), bool), 1),
    "reshape": lambda: (jnp.arange(24).reshape(2, 3, 4).transpose(2, 0, 1) * 3 - 5).reshape(8, 3),
    "slice": lambda: jnp.arange(20)[::-1].reshape(4, 5)[1:4, ::2],
    "division": lambda: (jnp.arange(-6, 6) // 4) + jnp.arange(-6, 6) % 5,
    "select": lambda: jnp.where(jnp.arange(6)[:, None] > jnp.arange(4), -jnp.inf, 0.5 ** jnp.arange(4)),
    "casts": lambda: (jnp.arange(300) * 1.37).astype(jnp.int8).astype(jnp.bfloat16),
    "squeeze": lambda: jnp.arange(12.0).reshape(1, 12, 1).squeeze((0, 2))[None] + jnp.ones((3, 1)),
    "scalar": lambda: jnp.sqrt(2.0 / jnp.pi) * jnp.float32(3),
}


@pytest.mark.parametrize("name", FIXED)
def test_fixed_values_are_evaluated_as_jax_does(name):
    level = inlined(jax.make_jaxpr(FIXED[name])())
    (out,) = level.outputs
    expected = np.asarray(FIXED[name]())
    assert out.fixed
    found = np.broadcast_to(constants.at(out, list(np.indices(out.shape))), out.shape)
    np.testing.assert_allclose(found.astype(np.float64), expected.astype(np.float64), rtol=1e-6)
    number = constants.uniform(out)
    assert number is None if expected.size > 1 else np.isclose(number, float(expected))


def test_regroup_splits_axes_for_everyone():
    merged = Axis(12)
    other = [(merged,)]
    assert regroup([(Axis(2),), (merged,)], (2, 3, 4)) is not None
    assert [a.size for a in leaves(other)] == [3, 4]
    assert regroup([(Axis(6),)], (4, 2)) is None
    assert regroup([(Axis(6),), (Axis(4),)], (3, 8)) is not None
    assert regroup([(Axis(6),), (Axis(5),)], (5, 6)) is None
    assert regroup([(Axis(0),)], (0,)) is None
    batch, one, tokens = Axis(2), Axis(1), Axis(3)
    assert regroup([(batch,), (one,), (tokens,)], (2, 1, 3)) == [(batch,), (one,), (tokens,)]


LONG = 3000


def long_products(x):
    y = jnp.float32(1.0)
    for _ in range(LONG):
        y = y * 0.999
        x = x * 0.999
    return jax.nn.softmax(x * y)


def doubling(x):
    """Sums of sums: 2**40 ways from the last to the first."""
    m = jnp.arange(4) < 3
    for _ in range(40):
        x = x * 0.5 + x * 0.25
        m = m & ~m[::-1]
    return jax.nn.softmax(jnp.where(m, x, -1e9)) @ x


def long_statistics(x):
    s = (x * x).mean(-1, keepdims=True)
    for _ in range(LONG):
        s = s * 1.001
    return x * lax.rsqrt(s - s.sum() - s.sum())


def long_reshapes(x):
    for _ in range(LONG):
        x = x.T
    return jax.nn.softmax(x) @ jax.nn.gelu(x)


@pytest.mark.parametrize("fn", [long_products, doubling, long_statistics, long_reshapes])
def test_programs_that_are_deep_or_branch_take_no_time(fn, rand):
    closed = jax.make_jaxpr(fn)(rand(4, 4))
    start = time.process_time()
    find_composites(closed)
    assert time.process_time() - start < 1.0


def test_constants_may_be_tracers_or_keys(rand):
    key = jax.random.key(0)

    @jax.jit
    def outer(mask, x):
        closed = jax.make_jaxpr(lambda x: jnp.where(mask, x, -1e9) + jax.random.normal(key, x.shape))(x)
        found = find_composites(closed, _compat.consts_of(closed))
        assert found == []
        return x

    outer(jnp.ones((4, 4), bool), rand(4, 4))


def llama(params, tokens):
    """Unrolled, grouped heads, rotary embedding, causal."""

    def norm(x, w):
        return x * lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * w

    def rope(x):
        angle = jnp.arange(x.shape[1])[:, None] / 1e4 ** (jnp.arange(4) / 4)
        c, s = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([a * c - b * s, b * c + a * s], axis=-1)

    x = params["embed"][tokens]
    for p in params["layers"]:
        h = norm(x, p["n1"])
        q, k, v = (h @ p[n] for n in "qkv")
        q, k, v = (a.reshape(*a.shape[:2], -1, 8) for a in (q, k, v))
        h = jax.nn.dot_product_attention(rope(q), rope(k), v, is_causal=True, implementation="xla")
        x = x + h.reshape(*x.shape[:2], 32) @ p["o"]
        h = norm(x, p["n2"])
        x = x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]
    return norm(x, params["norm"]) @ params["embed"].T


def abstract_llama(layers):
    def a(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    shapes = {"q": (32, 32), "k": (32, 16), "v": (32, 16), "o": (32, 32), "n1": (32,), "n2": (32,)}
    shapes |= {"gate": (32, 64), "up": (32, 64), "down": (64, 32)}
    layer = {name: a(*shape) for name, shape in shapes.items()}
    return {"embed": a(50, 32), "norm": a(32), "layers": [layer] * layers}


def test_a_deep_model_is_matched_whole_and_fast():
    closed = jax.make_jaxpr(llama)(abstract_llama(32), jax.ShapeDtypeStruct((2, 16), jnp.int32))
    took = []
    for _ in range(5):
        start = time.process_time()
        found = find_composites(closed)
        took.append(time.process_time() - start)
    kinds = [c.kind for c in found]
    assert {k: kinds.count(k) for k in set(kinds)} == {"attention": 32, "softmax": 32, "silu": 32, "rms_norm": 65}
    assert all(c.causal and c.groups == 2 for c in found if c.op == "attention")
    assert min(took) < 0.15

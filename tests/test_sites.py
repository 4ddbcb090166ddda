"""Sites: what is found, how it is named, and what is said of what cannot be quantized."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from constructs import CASES, batch, params
from jax import lax

import qjax
from qjax.errors import TraceError

LAYERS, D, F = 4, 8, 16


def stacked(axis: int = 0):
    """A small decoder's parameters, layers stacked along ``axis``."""
    rng = np.random.default_rng(0)

    def leaf(*shape):
        return jnp.moveaxis(jnp.asarray(rng.standard_normal((LAYERS, *shape)), jnp.float32), 0, axis)

    layers = {
        "attn": {n: leaf(D, D) for n in "qkvo"},
        "mlp": {"up": leaf(D, F), "down": leaf(F, D)},
        "norm": jnp.ones((LAYERS, D)),
    }
    return {"emb": jnp.ones((10, D)), "head": jnp.ones((D, 10)), "layers": layers}


def block(x, p):
    h = x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * p["norm"]
    q, k, v = (h @ p["attn"][n] for n in "qkv")
    x = x + jax.nn.softmax(q @ k.swapaxes(-1, -2) * 0.3, -1) @ v @ p["attn"]["o"]
    return x + jax.nn.gelu(x @ p["mlp"]["up"]) @ p["mlp"]["down"]


def at(p, i):
    return jax.tree.map(lambda a: a[i], p["layers"])


def scanned(p, t):
    return lax.scan(lambda c, q: (jax.checkpoint(block)(c, q), None), p["emb"][t], p["layers"])[0] @ p["head"]


def unrolled(p, t):
    x = p["emb"][t]
    for i in range(LAYERS):
        x = block(x, at(p, i))
    return x @ p["head"]


def counted(p, t):
    return lax.fori_loop(0, LAYERS, lambda i, x: block(x, at(p, i)), p["emb"][t]) @ p["head"]


def counted_down(p, t):
    return lax.fori_loop(0, LAYERS, lambda i, x: block(x, at(p, LAYERS - 1 - i)), p["emb"][t]) @ p["head"]


def conditional(p, t):
    def body(c):
        return c[0] + 1, block(c[1], at(p, c[0]))

    return lax.while_loop(lambda c: c[0] < LAYERS, body, (0, p["emb"][t]))[1] @ p["head"]


def second_axis(p, t):
    layers = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0) if a.ndim == 3 else a, p["layers"])
    return lax.scan(lambda c, q: (block(c, q), None), p["emb"][t], layers)[0] @ p["head"]


TOKENS = jnp.zeros((2, 5), jnp.int32)
EXPECTED = sorted(
    ["emb", "head"]
    + [
        f"layers/{i}/{n}"
        for i in range(LAYERS)
        for n in (
            *("attn/q", "attn/k", "attn/v", "attn/o", "attn/scores", "attn/softmax", "attn/values", "attn/attention"),
            *("mlp/up", "mlp/up/gelu", "mlp/down", "norm/rms_norm"),
        )
    ]
)


@pytest.mark.parametrize("fn", [scanned, unrolled, counted, counted_down, conditional, second_axis])
def test_names_do_not_depend_on_how_the_loop_is_written(fn):
    program = qjax.trace(fn, stacked(1 if fn is second_axis else 0) if fn is not second_axis else _maxtext(), TOKENS)
    assert sorted(s.name for s in program.sites) == EXPECTED


def _maxtext():
    p = stacked()
    return {**p, "layers": jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1) if a.ndim == 3 else a, p["layers"])}


@pytest.mark.parametrize("shape", [(1, 3), (7, 2)])
def test_names_do_not_depend_on_shapes(shape):
    names = [s.name for s in qjax.trace(scanned, stacked(), TOKENS).sites]
    assert names == [s.name for s in qjax.trace(scanned, stacked(), jnp.zeros(shape, jnp.int32)).sites]


def test_two_stacks_looped_over_one_after_the_other_stay_apart():
    p = {
        "enc": {"a": jnp.ones((3, 8, 8)), "b": jnp.ones((3, 8, 8))},
        "dec": {"a": jnp.ones((3, 8, 8)), "b": jnp.ones((3, 8, 8))},
    }

    def fn(p, x):
        for part in ("enc", "dec"):
            for i in range(3):
                x = x @ p[part]["a"][i] @ p[part]["b"][i]
        return x

    names = [s.name for s in qjax.trace(fn, p, jnp.ones((2, 8))).sites]
    assert names == [f"{part}/{i}/{n}" for part in ("enc", "dec") for i in range(3) for n in "ab"]


def test_index_stands_in_front_where_the_leaves_have_nothing_in_common():
    p = {"a": jnp.ones((2, 8, 8)), "b": jnp.ones((2, 8, 8))}
    fn = lambda p, x: lax.scan(lambda c, w: (c @ w["a"] @ w["b"], None), x, p)[0]  # noqa: E731
    assert [s.name for s in qjax.trace(fn, p, jnp.ones((2, 8))).sites] == ["0/a", "1/a", "0/b", "1/b"]


def test_nested_loops_add_an_index_each():
    p = {"net": {"w": jnp.ones((2, 3, 8, 8)), "v": jnp.ones((2, 8, 8))}}

    def outer(x, q):
        return lax.scan(lambda c, w: (c @ w, None), x @ q["v"], q["w"])[0], None

    names = {s.name for s in qjax.trace(lambda p, x: lax.scan(outer, x, p["net"])[0], p, jnp.ones((2, 8))).sites}
    assert names == {f"net/{i}/v" for i in range(2)} | {f"net/{i}/w/{j}" for i in range(2) for j in range(3)}


def test_loops_that_slice_no_parameter_add_nothing():
    program = qjax.trace(CASES["scan_const"], params(), batch())
    assert [(s.name, s.repeats) for s in program.sites] == [("w", 3)]


def test_further_reads_of_a_leaf_are_numbered():
    assert [s.name for s in qjax.trace(CASES["jit_shared"], params(), batch()).sites] == ["w", "w#1"]
    program = qjax.trace(CASES["embedding_and_head"], params(), batch())
    assert [(s.name, s.op) for s in program.sites] == [("w", "embedding"), ("w#1", "dot")]


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("associative_scan",)])
def test_every_product_is_a_site_that_knows_its_leaf(name):
    program = qjax.trace(CASES[name], params(), batch())
    linear = [s for s in program.sites if s.op in ("dot", "embedding")]
    assert linear and all(s.leaf in ("w", "s") for s in linear), program
    for s in linear:
        assert s.weight_shape and s.bytes == int(np.prod(s.weight_shape)) * 4
        assert s.op == "embedding" or s.flops > 0


def test_flops_count_every_repeat():
    program = qjax.trace(CASES["scan"], params(), batch())
    assert [s.flops for s in program.sites] == [2 * 4 * 8 * 8] * 3
    assert qjax.trace(CASES["scan_const"], params(), batch()).sites[0].flops == 3 * 2 * 4 * 8 * 8


def reasons(fn, p, *args):
    return {s.name: s.reason for s in qjax.trace(fn, p, *args).sites if s.reason}


def test_a_computed_weight_is_reported():
    p = {"dense": {"g": jnp.ones(8), "v": jnp.ones((8, 8))}}
    found = reasons(lambda p, x: x @ (p["dense"]["v"] * p["dense"]["g"] / jnp.linalg.norm(p["dense"]["v"])), p, batch())
    assert (
        list(found) == ["dense/computed"]
        and "dense/g" in found["dense/computed"]
        and "dense/v" in found["dense/computed"]
    )


def test_a_lora_sum_is_reported():
    p = {"q": {"kernel": jnp.ones((8, 8)), "a": jnp.ones((8, 2)), "b": jnp.ones((2, 8))}}
    found = reasons(lambda p, x: x @ (p["q"]["kernel"] + p["q"]["a"] @ p["q"]["b"]), p, batch())
    assert set(found) == {"q/computed", "q/computed#1"}


def test_a_captured_constant_is_reported():
    constant = jnp.ones((8, 8))
    found = reasons(lambda p, x: (x @ p["w"]) @ constant, params(), batch())
    assert list(found) == ["w/captured"] and "params" in found["w/captured"]


def test_a_weight_inside_an_opaque_call_is_reported():
    def fn(p, x):
        return jax.pure_callback(
            lambda a, b: np.asarray(a) @ np.asarray(b), jax.ShapeDtypeStruct((4, 8), x.dtype), x, p["w"]
        )

    found = reasons(fn, params(), batch())
    assert found == {"w": "read inside an opaque pure_callback, which qjax cannot rewrite"}
    report = qjax.quantize(
        fn, params(), batch(), recipe=qjax.Recipe([qjax.Rule("**", weights=qjax.Int(8), optional=True)])
    ).report
    assert [(r.name, r.reason) for r in report.rows] == [("w", found["w"])]


def test_keyword_and_static_arguments():
    def fn(p, x, *, mode, scale=1.0, flag=False):
        y = x @ p["w"] * scale
        return jnp.tanh(y) if mode == "tanh" and flag else y

    model = qjax.quantize(fn, params(), batch(), mode="tanh", flag=True, recipe="W8A16")
    y = model(model.params, batch(), mode="tanh", flag=True)
    np.testing.assert_allclose(y, fn(params(), batch(), mode="tanh", flag=True), atol=0.02)
    assert not np.allclose(y, model(model.params, batch(), mode="plain"))


def test_params_may_hold_what_is_no_array():
    p = {"w": params()["w"], "name": "dense", "act": jnp.tanh, "n": None}
    fn = lambda p, x: p["act"](x @ p["w"])  # noqa: E731
    model = qjax.quantize(fn, p, batch(), recipe="W8A16")
    assert model.params["name"] == "dense" and model.params["n"] is None
    np.testing.assert_allclose(model(model.params, batch()), fn(p, batch()), atol=0.02)


def test_abstract_arguments_are_enough_to_trace():
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (stacked(), TOKENS))
    assert sorted(s.name for s in qjax.trace(scanned, *abstract).sites) == EXPECTED


def test_missing_arguments_are_named():
    with pytest.raises(TraceError, match=r"no example arguments: missing .*'t'.*jax.ShapeDtypeStruct"):
        qjax.quantize(scanned, stacked(), recipe="W8A16")
    with pytest.raises(TraceError, match=r"1 argument: missing .*'y'"):
        qjax.trace(lambda p, x, y: x @ p, np.ones((2, 2), np.float32), np.ones(2, np.float32))
    with pytest.raises(TraceError, match=r"no example arguments: .*missing 1 required"):  # an adapter passes them on
        qjax.trace(lambda p, *args: (lambda x: x @ p)(*args), np.ones((2, 2), np.float32))
    with pytest.raises(TypeError, match="unsupported operand"):
        qjax.trace(lambda p: p + None, np.ones((2, 2), np.float32))


def test_a_site_that_is_not_there_offers_the_nearest():
    with pytest.raises(TraceError, match="did you mean 'layers/2/mlp/up'"):
        qjax.trace(scanned, stacked(), TOKENS).site("layers/2/mlp/upp")


def test_the_table_groups_equal_layers():
    text = str(qjax.trace(scanned, stacked(), TOKENS))
    assert "layers/{0..3}/mlp/up " in text and "float32[8×16]" in text and len(text.splitlines()) < 20


def test_a_single_token_is_a_lookup():
    p = {"emb": jnp.ones((10, 8)), "up": jnp.ones((8, 8))}
    fn = lambda p, t: jnp.tanh(p["emb"][t]) @ p["up"] @ p["emb"].T  # noqa: E731
    program = qjax.trace(fn, p, jnp.int32(3))
    assert [(s.name, s.op) for s in program.sites] == [("emb", "embedding"), ("up", "dot"), ("emb#1", "dot")]

    def decode(p, t):  # the token is loop state
        return lax.while_loop(
            lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.argmax(fn(p, c[1])).astype(jnp.int32)), (0, t)
        )

    assert [s.name for s in qjax.trace(decode, p, jnp.int32(3)).sites] == ["emb", "up", "emb#1"]
    recipe = qjax.Recipe([qjax.Rule("**", weights=qjax.Int(8)), qjax.Rule("**", op="embedding", weights=qjax.Int(8))])
    model = qjax.quantize(fn, p, jnp.int32(3), recipe=recipe)
    assert not model.report.notes
    np.testing.assert_allclose(model(model.params, jnp.int32(7)), fn(p, jnp.int32(7)), rtol=0.05)

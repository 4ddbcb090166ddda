"""Low-rank adapters: against the formula in plain jnp, through control flow, trained, merged, and refused."""

from __future__ import annotations

import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from constructs import CASES, batch, params
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import qjax
from qjax.errors import DataError, QjaxError, RecipeError
from qjax.formats import is_quantized, quantize_array

FORMATS = {
    "float": None,
    "int4 g4": qjax.Int(4, group=4),
    "uint3": qjax.Int(3, symmetric=False),
    "nf4": qjax.NF4(),
    "nvfp4": qjax.NVFP4(),
}
# Not reached: a derivative rule of its own, a part of the weight on each device, no parameter's product, a tied table.
REFUSED = {
    "custom_vjp": "a derivative rule of its own",
    "custom_jvp": "a derivative rule of its own",
    "shard_map_rows": "inside shard_map",
    "shard_map_columns": "inside shard_map",
    "shard_map_psum": "inside shard_map",
    "associative_scan": "matches no site that can be adapted",
    "embedding_and_head": "would not see the adapter",
    "linear_solve": "read outside of products",
}
ADAPTED = [name for name in CASES if name not in REFUSED]
# The value is the same op by op; under jit XLA folds these two products into what stands around them.
REORDERED = ("weight_on_the_left", "bfloat16")


def packed(fn, p, x, fmt):
    """A model of this format, or the function and its parameters where it is None."""
    if fmt is None:
        return fn, p
    skip = qjax.Rule("**", op="embedding", skip=True, optional=True)
    model = qjax.quantize(fn, p, x, recipe=qjax.Recipe([skip, qjax.Rule("**", weights=fmt, clamp_group=True)]))
    return model, model.params


def dense(tree):
    return jax.tree.map(lambda a: a.dequantize() if is_quantized(a) else a, tree, is_leaf=is_quantized)


def noise(state, seed=0, size=0.3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(size * rng.standard_normal(a.shape), a.dtype), state)


def close(got, want, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, want)


def total(tree):
    return sum(jnp.sum(jnp.asarray(leaf, jnp.float32) ** 2) for leaf in jax.tree.leaves(tree))


@settings(max_examples=5)  # every shape is compiled anew
@given(
    rows=st.integers(1, 5),
    k=st.integers(1, 9),
    n=st.integers(1, 9),
    r=st.integers(1, 4),
    alpha=st.sampled_from([None, 0.5, 8.0]),
    fmt=st.sampled_from(list(FORMATS)),
)
def test_values_and_derivatives_are_those_of_the_formula(rows, k, n, r, alpha, fmt):
    rng = np.random.default_rng(k + 10 * n)
    p = {"w": jnp.asarray(rng.standard_normal((k, n)), jnp.float32)}
    x = jnp.asarray(rng.standard_normal((rows, k)), jnp.float32)
    q = p if fmt == "float" else {"w": quantize_array(p["w"], FORMATS[fmt].clamped(k), in_axes=0)}
    t = qjax.lora(lambda p, x: jnp.tanh(x @ p["w"]), {"w": r}, alpha=alpha)
    state = noise(t.init(q, x))
    assert {name: a.shape for name, a in state["w"].items()} == {"a": (k, r), "b": (r, n)}

    def oracle(state, x):
        a, b = state["w"]["a"], state["w"]["b"]
        return jnp.tanh(x @ dense(q)["w"] + (1 if alpha is None else alpha / r) * (x @ a) @ b)

    mine = lambda state, x: t.apply(q, state, x)[0]  # noqa: E731
    close(mine(state, x), oracle(state, x))
    got, want = (jax.grad(lambda s, x: total(f(s, x)), argnums=(0, 1))(state, x) for f in (mine, oracle))  # noqa: B023
    close(got, want, 1e-4)


WHOLE = (
    "jit_shared while while_carries_params fori fori_backwards scan scan_const scan_of_scan scan_by_index scan_remat "
    "scan_reversed"
).split()
"""Constructs whose bodies XLA compiles as a whole, even where the function itself runs op by op."""


def same(name, got, want, whole=False):
    """Equal to the bit; where XLA compiles a body as a whole, but for its last bits (jax 0.12 fuses tanh otherwise)."""
    loose = name in WHOLE or whole
    tolerance = dict(rtol=5e-6, atol=2e-7) if loose else dict(rtol=0, atol=0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, want)


@pytest.mark.every(6)
@pytest.mark.parametrize("fmt", ["float", "int4 g4"])
@pytest.mark.parametrize("name", ADAPTED)
def test_every_construct(name, fmt):
    """At first the frozen function; then the function of the weights W + s A B, however it is written.

    At first it is equal to the bit, but for what XLA rounds otherwise where it compiles a body as a whole.
    """
    fn, p, x = CASES[name], params(), batch()
    base, q = packed(fn, p, x, FORMATS[fmt])
    t = qjax.lora(base, 2, alpha=3.0)
    state = jax.eval_shape(t.init, q, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32")}
    state = t.init(q, x)
    frozen = base.rewritten._run if fmt != "float" else None
    if name != "debug_print":
        want = fn(q, x) if frozen is None else frozen(*qjax.program.Signature.of(q, (x,), {}))
        same(name, t.apply(q, state, x)[0], want)
    if name not in REORDERED:
        same(name, jax.jit(t.apply)(q, state, x)[0], jax.jit(base)(q, x), whole=name == "python_loop")
    state = noise(state)
    out, kept = jax.jit(t.apply)(q, state, x)
    jax.tree.map(np.testing.assert_array_equal, kept, state)
    merged = qjax.lora(fn, 2, alpha=3.0).merge(dense(q), state, x)
    close(out, fn(merged, x), 3e-2 if name == "bfloat16" else 2e-5)
    assert any((np.asarray(merged[k]) != np.asarray(dense(q)[k])).any() for k in merged)


@pytest.mark.every(6)
@pytest.mark.parametrize("name", [n for n in ADAPTED if n not in ("while", "while_carries_params", "pure_callback")])
def test_derivatives_through_every_construct(name):
    """d/dA and d/dB are those of the merged weights, by the chain rule of W + s A B."""
    fn, p, x = CASES[name], params(), batch()
    base, q = packed(fn, p, x, qjax.Int(4, group=4))
    t = qjax.lora(base, 2, alpha=3.0)
    state = noise(t.init(q, x))
    got, of_x = jax.jit(jax.grad(lambda s, x: total(t.apply(q, s, x)[0]), argnums=(0, 1)))(state, x)
    plain = qjax.lora(fn, 2, alpha=3.0)
    program, _, slots = plain._traced(dense(q), (x,), {})

    def merged_loss(state, x):
        leaves = jax.tree.leaves(dense(q))
        for slot in slots:
            leaves[slot.leaf] = leaves[slot.leaf].at[slot.index].add(slot.delta(state[slot.site]))
        return total(fn(jax.tree.unflatten(jax.tree.structure(q, is_leaf=is_quantized), leaves), x))

    want = jax.grad(merged_loss, argnums=(0, 1))(state, x)
    tolerance = 0.2 if name == "bfloat16" else 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), (got, of_x), want)


def test_scanned_layers_are_unrolled_layers():
    p, x = params(), batch()
    p["s"] = jnp.concatenate([p["s"], 0.5 * p["s"]])
    _, q = packed(CASES["scan"], p, x, qjax.Int(4, group=4))
    scans = qjax.lora(CASES["scan"], 2), qjax.lora(_unrolled, 2)
    states = [t.init(q, x) for t in scans]
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert list(states[0]) == [f"s/{i}" for i in range(6)]
    state = noise(states[0])
    got, want = (jax.jit(jax.value_and_grad(lambda s: total(t.apply(q, s, x)[0])))(state) for t in scans)  # noqa: B023
    close(got, want, 1e-5)


def _unrolled(p, x):
    for i in range(p["s"].shape[0]):
        x = jnp.tanh(x @ p["s"][i])
    return x


def test_factors_enter_a_scan_as_rows():
    """One scan, forward and backward, whose adapters are xs and ys, not constants with a sum over all layers."""
    p, x = params(), batch()
    t = qjax.lora(CASES["scan"], {"**": 2})
    state = t.init(p, x)
    jaxpr = jax.make_jaxpr(jax.grad(lambda s: total(t.apply(p, s, x)[0])))(state)
    scans = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    assert len(scans) == 2
    for eqn in scans:
        n, m = qjax._compat.scan_arity(eqn.params)
        assert (3, 8, 2) in [v.aval.shape for v in eqn.invars[n + m :]]
        assert (3, 8, 2) not in [v.aval.shape for v in eqn.invars[: n + m]]


@pytest.mark.slow
def test_layers_with_different_ranks_or_none():
    p, x = params(), batch()
    for targets in ({"s/1": None, "**": 2}, {"s/0": 1, "s/*": 3}):
        t = qjax.lora(CASES["scan"], targets)
        state = noise(t.init(p, x))
        close(t.apply(p, state, x)[0], CASES["scan"](t.merge(p, state, x), x))
        grad = jax.grad(lambda s: total(t.apply(p, s, x)[0]))(state)  # noqa: B023
        assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grad))


@pytest.mark.slow
def test_two_stacked_loops_and_formats_that_differ():
    rng = np.random.default_rng(0)
    p = {"w": jnp.asarray(rng.standard_normal((2, 3, 8, 8)), jnp.float32) / 3}
    x = batch()

    def fn(p, x):
        inner = lambda c, w: (jnp.tanh(c @ w), None)  # noqa: E731
        return lax.scan(lambda c, w: lax.scan(inner, c, w, reverse=True), x, p["w"])[0]

    recipe = qjax.Recipe([qjax.Rule("w/1/*", weights=qjax.Int(8)), qjax.Rule("**", weights=qjax.Int(4))])
    model = qjax.quantize(fn, p, x, recipe=recipe)
    t = qjax.lora(model, {"w/*/1": 3, "**": 2})
    state = noise(t.init(model.params, x))
    plain = qjax.lora(fn, {"w/*/1": 3, "**": 2})
    want = fn(plain.merge(dense(model.params), state, x), x)
    close(jax.jit(t.apply)(model.params, state, x)[0], want)
    merged = t.convert(model.params, state, x)
    close(merged(merged.params, x), want, 0.5)
    assert jax.tree.structure(merged.params) == jax.tree.structure(model.params)


def test_experts_have_adapters_of_their_own():
    rng = np.random.default_rng(0)
    p = {"e": jnp.asarray(rng.standard_normal((2, 12, 5)), jnp.float32)}
    x, sizes = jnp.asarray(rng.standard_normal((7, 12)), jnp.float32), jnp.array([3, 4])
    fn = lambda p, x, sizes: lax.ragged_dot(x, p["e"], sizes)  # noqa: E731
    for fmt in (None, qjax.Int(8)):
        base, q = fn, p
        if fmt is not None:
            base = qjax.quantize(fn, p, x, sizes, recipe=qjax.Recipe([qjax.Rule("**", weights=fmt)]))
            q = base.params
        t = qjax.lora(base, 3)
        state = noise(t.init(q, x, sizes))
        assert state["e"]["a"].shape == (2, 12, 3) and state["e"]["b"].shape == (2, 3, 5)
        w = dense(q)["e"] + state["e"]["a"] @ state["e"]["b"]
        want = jnp.concatenate([x[:3] @ w[0], x[3:] @ w[1]])
        close(t.apply(q, state, x, sizes)[0], want, 1e-4)
        grad = jax.grad(lambda s: total(t.apply(q, s, x, sizes)[0]))(state)  # noqa: B023
        assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(grad))


def test_parts_of_one_weight_and_readers_of_the_same():
    p, x = params(), batch()
    fused = qjax.lora(CASES["fused_split"], 2)  # two halves of a kernel are two adapters
    assert list(fused.init(p, x)) == ["w", "w#1"]
    both = lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T  # noqa: E731  (read twice, once transposed: one adapter)
    t = qjax.lora(both, 2)
    state = noise(t.init(p, x))
    assert list(state) == ["w"]
    close(t.apply(p, state, x)[0], both(t.merge(p, state, x), x))


def test_a_step_keeps_packed_codes_and_no_float_weight():
    width, layers = 64, 4
    rng = np.random.default_rng(0)
    p = {"w": jnp.asarray(rng.standard_normal((layers, width, width)), jnp.float32) / 8}
    x = jnp.ones((3, width))
    for fn in (
        lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0],
        lambda p, x: lax.scan(jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), None)), x, p["w"])[0],
        lambda p, x: _unrolled({"s": p["w"]}, x),
    ):
        model = qjax.quantize(fn, p, x, recipe=qjax.Recipe([qjax.Rule("**", weights=qjax.Int(4, group=32))]))
        t = qjax.lora(model, 2)
        state = t.init(model.params, x)
        _, pull = jax.vjp(lambda s: t.apply(model.params, s, x)[0], state)  # noqa: B023
        kept = [(a.shape, a.dtype) for a in jax.tree.leaves(pull) if hasattr(a, "shape")]
        assert not [k for k in kept if k[0][-2:] == (width, width) and jnp.issubdtype(k[1], jnp.floating)], kept
        assert [k for k in kept if k[1] == jnp.uint8 and k[0][-1] == width // 2], kept


@pytest.mark.every(5)
@pytest.mark.parametrize("fmt", FORMATS)
def test_merging(fmt):
    p, x = params(), batch()
    fn = lambda p, x: CASES["scan"](p, x) @ p["w"]  # noqa: E731
    base, q = packed(fn, p, x, FORMATS[fmt])
    t = qjax.lora(base, {"w": 2, "s/1": 3}, alpha=4.0)
    state = t.init(q, x)
    same = t.merge(q, state, x)  # B is zero
    jax.tree.map(np.testing.assert_array_equal, same, q)
    state = noise(state)
    merged = jax.jit(t.merge)(q, state, x)
    close(dense(merged), dense(t.merge(q, state, x)), 1e-6)
    assert jax.tree.structure(merged) == jax.tree.structure(q)
    sums = dense(q)
    sums["w"] = sums["w"] + 2.0 * state["w"]["a"] @ state["w"]["b"]
    sums["s"] = sums["s"].at[1].add(4 / 3 * state["s/1"]["a"] @ state["s/1"]["b"])
    if fmt == "float":
        close(merged, sums, 1e-6)
        return
    want = packed(fn, sums, x, FORMATS[fmt])[1]
    close(dense(merged)["w"], dense(want)["w"], 1e-6)  # the sum, rounded in the format that it had
    close(dense(merged)["s"][1], dense(want)["s"][1], 1e-6)
    for i in (0, 2):  # layers without an adapter keep their codes
        np.testing.assert_array_equal(dense(merged)["s"][i], dense(q)["s"][i])
    model = t.convert(q, state, x)
    close(model(model.params, x), base(merged, x))
    assert "adapters are merged" in model.report.notes[-1]
    other = t.convert(q, state, x, recipe="W8A16")
    close(dense(other.params), sums, 0.02)


def test_quantized_activations_stay_quantized():
    p, x = params(), batch()
    recipe = qjax.Recipe([qjax.Rule("**", weights=qjax.Int(8), inputs=qjax.Int(8, per="token"))])
    model = qjax.quantize(CASES["scan"], p, x, recipe=recipe)
    t = qjax.lora(model, 2)
    state = t.init(model.params, x)
    np.testing.assert_array_equal(t.apply(model.params, state, x)[0], model(model.params, x))
    without = qjax.lora(CASES["scan"], 2).apply(model.params, state, x)[0]  # a bare function knows of no recipe
    assert (t.apply(model.params, state, x)[0] != without).any()
    merged = t.convert(model.params, noise(state), x)
    assert {r.inputs for r in merged.report.quantized} == {"int8 per token dynamic"}


def test_constant_activation_scales_stay_with_the_weight():
    p, x = params(), batch()
    act = qjax.static(qjax.Int(8, per="tensor"))
    recipe = qjax.Recipe([qjax.Rule("**", weights=qjax.Int(8), inputs=act)])
    model = qjax.quantize(CASES["scan"], p, x, recipe=recipe, batches=[x])
    t = qjax.lora(model, 2)
    state = t.init(model.params, x)
    np.testing.assert_array_equal(t.apply(model.params, state, x)[0], model(model.params, x))
    merged = t.convert(model.params, noise(state, size=0.1), x)
    np.testing.assert_array_equal(merged.params["s"].aux["input.scale"], model.params["s"].aux["input.scale"])
    close(merged(merged.params, x), t.apply(model.params, noise(state, size=0.1), x)[0], 0.1)


def test_a_jitted_layer_is_still_compiled_once():
    p, x = params(), batch()
    layer = jax.jit(lambda x, w: jnp.tanh(x @ w))
    fn = lambda p, x: layer(layer(layer(x, p["s"][0]), p["s"][1]), p["s"][2])  # noqa: E731
    t = qjax.lora(fn, 2)
    state = noise(t.init(p, x))
    calls = [eqn for eqn in jax.make_jaxpr(t.apply)(p, state, x).eqns if eqn.params.get("name") == "<lambda>"]
    assert len(calls) == 3 and len({id(eqn.params["jaxpr"]) for eqn in calls}) == 1
    close(t.apply(p, state, x)[0], fn(t.merge(p, state, x), x))


def test_under_vmap():
    p, x = params(), batch()
    _, q = packed(CASES["scan"], p, x, qjax.Int(4))
    t = qjax.lora(CASES["scan"], 2)
    states = [noise(t.init(q, x), seed) for seed in range(3)]  # a population of adapters on one base
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *states)
    got = jax.vmap(lambda s: t.apply(q, s, x)[0])(stacked)
    close(got, jnp.stack([t.apply(q, s, x)[0] for s in states]))


def test_on_a_mesh():
    mesh = jax.make_mesh((2, 4), ("d", "m"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    place = lambda *spec: jax.NamedSharding(mesh, jax.P(*spec))  # noqa: E731
    p, x = params(), batch()
    base, q = packed(CASES["scan"], p, x, qjax.Int(4))
    t = qjax.lora(base, 2)
    state = noise(t.init(q, x))
    want = jax.jit(jax.grad(lambda s: total(t.apply(q, s, x)[0])))(state)
    plan = qjax.plan(CASES["scan"], p, x, recipe=base.recipe)
    sharded = jax.device_put(q, plan.shardings({"w": place(), "s": place(None, None, "m")}))
    x = jax.device_put(x, place("d"))
    got = jax.jit(jax.grad(lambda s, q, x: total(t.apply(q, s, x)[0])))(state, sharded, x)
    close(got, want, 1e-4)


def test_it_trains():
    """Adapters of rank 2 on 4-bit weights find a change of rank 2 that the base was not made for."""
    rng = np.random.default_rng(0)
    p = {"w": jnp.asarray(rng.standard_normal((32, 16)), jnp.float32) / 6}
    change = jnp.asarray(rng.standard_normal((32, 2)) @ rng.standard_normal((2, 16)), jnp.float32) / 6
    x = jnp.asarray(rng.standard_normal((256, 32)), jnp.float32)
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    model = qjax.quantize(fn, p, x, recipe=qjax.Recipe([qjax.Rule("w", weights=qjax.Int(4, group=8))]))
    y = x @ (model.params["w"].dequantize() + change)
    t = qjax.lora(model, {"w": 2}, key=jax.random.key(1))
    loss = lambda s: ((t.apply(model.params, s, x)[0] - y) ** 2).mean()  # noqa: E731
    state, optimizer = t.init(model.params, x), optax.adam(0.03)
    qjax.check_trainable(state)

    @jax.jit
    def step(state, moments):
        updates, moments = optimizer.update(jax.grad(loss)(state), moments)
        return optax.apply_updates(state, updates), moments

    moments, before = optimizer.init(state), float(loss(state))
    for _ in range(300):
        state, moments = step(state, moments)
    assert float(loss(state)) < 1e-3 * before


def test_what_is_drawn():
    p, x = {"w": jnp.zeros((400, 8)), "v": jnp.zeros((400, 8))}, jnp.zeros((1, 400))
    fn = lambda p, x: x @ p["w"] + x @ p["v"]  # noqa: E731
    state = qjax.lora(fn, 16, key=jax.random.key(3)).init(p, x)
    assert float(state["w"]["a"].std()) == pytest.approx(400**-0.5, rel=0.05)
    assert not state["w"]["b"].any()
    assert np.abs(state["w"]["a"] - state["v"]["a"]).max() > 0, "sites draw apart"
    again = qjax.lora(fn, {"w": 16}, key=jax.random.key(3)).init(p, x)
    np.testing.assert_array_equal(again["w"]["a"], state["w"]["a"])  # whatever else is adapted
    other = qjax.lora(fn, {"w": 16}, key=jax.random.key(4)).init(p, x)
    assert np.abs(other["w"]["a"] - state["w"]["a"]).max() > 0


def test_a_bare_rank_leaves_heads_and_tables_alone(root):
    fn, p, _ = qjax.models.load(root / "examples" / "assets" / "books-6m")
    state = jax.eval_shape(qjax.lora(fn, 4).init, p, jnp.zeros((1, 8), jnp.int32))
    assert len(state) == 6 * 7 and not [site for site in state if "embed" in site]
    head = {"embed": {"embedding": jnp.ones((5, 4))}, "lm_head": {"kernel": jnp.ones((4, 5))}, "up": jnp.ones((4, 4))}
    fn = lambda p, i: p["embed"]["embedding"][i] @ p["up"] @ p["lm_head"]["kernel"]  # noqa: E731
    assert list(qjax.lora(fn, 2).init(head, jnp.array([1, 2]))) == ["up"]
    assert list(qjax.lora(fn, {"**/lm_head/**": 2}).init(head, jnp.array([1, 2]))) == ["lm_head/kernel"]


@pytest.mark.parametrize("name", REFUSED)
def test_sites_that_cannot_be_adapted_say_why(name):
    fn, p, x = CASES[name], params(), batch()
    with pytest.raises(RecipeError, match=REFUSED[name]):
        qjax.lora(fn, {"**": 2}).init(p, x)
    with pytest.raises(RecipeError, match="no product of this function can have an adapter"):
        qjax.lora(fn, 2).init(p, x)


def test_bad_targets():
    fn, p, x = CASES["scan"], params(), batch()
    for bad in (0, -1, True, 1.5, "8"):
        with pytest.raises(RecipeError, match="lora"):
            qjax.lora(fn, bad)
        with pytest.raises(RecipeError, match=r"the rank of '\*\*' is an integer of 1 or more"):
            qjax.lora(fn, {"**": bad, "s": 1})
    for bad in ({}, {"**": None}):
        with pytest.raises(RecipeError, match="no pattern has a rank"):
            qjax.lora(fn, bad)
    for bad in (0, -2.0, float("nan"), "1"):
        with pytest.raises(RecipeError, match="alpha is a number above 0"):
            qjax.lora(fn, 2, alpha=bad)
    with pytest.raises(QjaxError, match="needs a function"):
        qjax.lora(p, 2)
    with pytest.raises(RecipeError, match=r"'z/\*' matches no site; sites are named like 's/0'"):
        qjax.lora(fn, {"z/*": 2}).init(p, x)
    named = {"layers": {"attn": {"kernel": p["w"]}}}
    with pytest.raises(RecipeError, match="did you mean 'attn'"):
        qjax.lora(lambda p, x: x @ p["layers"]["attn"]["kernel"], {"**/atn/**": 2}).init(named, x)
    with pytest.raises(RecipeError, match=r"'s/1' never decides: earlier patterns take its 1 sites"):
        qjax.lora(fn, {"**": 2, "s/1": None}).init(p, x)
    image = jnp.ones((1, 4, 4, 3))
    conv = lambda p, x: lax.conv_general_dilated(x, p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))  # noqa: E731
    with pytest.raises(RecipeError, match="its op is conv"):
        qjax.lora(conv, {"k": 2}).init({"k": jnp.ones((3, 3, 3, 2))}, image)
    twice = lambda p, x: (x @ p["w"]) @ p["w"]  # noqa: E731
    with pytest.raises(RecipeError, match="w#1, which is to have rank 3; products share one adapter"):
        qjax.lora(twice, {"w": 2, "**": 3}).init(p, x)
    by_data = lambda p, x: x @ p["s"][jnp.argmax(x[0]) % 3]  # noqa: E731
    with pytest.raises(RecipeError, match="known at run time only"):
        qjax.lora(by_data, {"**": 2}).init(p, x)


def test_bad_states():
    fn, p, x = CASES["scan"], params(), batch()
    t = qjax.lora(fn, 2)
    state = t.init(p, x)
    less = {k: v for k, v in state.items() if k != "s/1"}
    with pytest.raises(DataError, match=r"no adapter for s/1 \(1 of 3 sites are missing\)"):
        t.apply(p, less, x)
    with pytest.raises(DataError, match=r"an adapter for 'w', which is no site"):
        t.apply(p, {**state, "w": state["s/0"]}, x)
    with pytest.raises(
        DataError, match=r"s/0: 'a' has shape \(8, 2\), and an adapter of rank 4 of this weight has \(8, 4\)"
    ):
        qjax.lora(fn, 4).apply(p, state, x)
    with pytest.raises(DataError, match="s/2: an adapter has the arrays 'a' and 'b'"):
        t.merge(p, {**state, "s/2": {"a": state["s/2"]["a"]}}, x)
    with pytest.raises(DataError, match="s/2: 'b' is a float array"):
        t.apply(p, {**state, "s/2": {**state["s/2"], "b": jnp.zeros((2, 8), jnp.int8)}}, x)
    with pytest.raises(DataError, match="a dictionary by site"):
        t.apply(p, None, x)
    with pytest.raises(DataError, match="s/1: its adapter holds NaN"):
        t.merge(p, {**state, "s/1": {"a": state["s/1"]["a"], "b": jnp.full((2, 8), jnp.nan)}}, x)
    with pytest.raises(RecipeError, match="give recipe="):
        t.convert(p, state, x)


@pytest.mark.slow
def test_the_example(root, monkeypatch, capsys):
    """QLoRA in miniature: the loss falls as it does on float weights, with a third of the parameter memory."""
    spec = importlib.util.spec_from_file_location("qlora", root / "examples" / "qlora.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    sizes = "--batch 2 --context 16 --test-rows 2 --steps 8 --bases float W4A16"
    text = ["--text", str(root / "examples" / "assets" / "passage.txt")]
    monkeypatch.setattr(sys, "argv", ["qlora", *text, *sizes.split()])
    results = {}
    compare = script.compare
    monkeypatch.setattr(script, "compare", lambda o: results.update(compare(o)) or results)
    script.main()
    plain, packed = results["float"], results["W4A16"]
    assert packed["after"] == pytest.approx(plain["after"], rel=0.01)
    assert packed["after"] < packed["before"] - 0.02
    assert plain["merged"] == pytest.approx(plain["after"], abs=1e-4)
    assert packed["base"] + packed["adapters"] < 0.5 * (plain["base"] + plain["adapters"])
    assert "W4A16" in capsys.readouterr().out


def test_an_optimizer_applied_to_codes():
    p, x = params(), batch()
    model, q = packed(CASES["scan"], p, x, qjax.Int(4))
    with pytest.raises(QjaxError, match=r"^s is packed .*int4.*codes are integers.*qjax.partition.*qjax.lora"):
        qjax.check_trainable(q)
    with pytest.raises(QjaxError, match="n is int32, not float"):
        qjax.check_trainable({"n": jnp.arange(3)})
    with pytest.raises(TypeError, match="uint8"):  # what jax itself says
        jax.grad(lambda q: model(q, x).sum())(q)
    train, frozen = qjax.partition(q)
    qjax.check_trainable(train)
    moments = optax.adam(1e-3).init(train)
    assert all(jnp.issubdtype(m.dtype, jnp.floating) for m in jax.tree.leaves(moments) if m.ndim)
    grads = jax.grad(lambda train: (model(qjax.combine(train, frozen), x) @ qjax.combine(train, frozen)["w"]).sum())(
        train
    )
    assert jax.tree.structure(grads) == jax.tree.structure(train)
    half = qjax.astype(q, jnp.bfloat16)
    assert half["s"].dtype == half["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(half["s"].codes, q["s"].codes)
    assert half["s"].aux["scale"].dtype == jnp.float32

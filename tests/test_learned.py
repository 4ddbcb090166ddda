"""Scales that training finds: learned steps, averaged and constant ranges, in and out of control flow."""

from __future__ import annotations

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
from qjax.errors import DataError, RecipeError

SKIP = qjax.Rule("**", op="embedding", skip=True, optional=True)
Q8 = qjax.Int(8, per="tensor")
RULES = {
    "channel": dict(weights=qjax.learned(qjax.Int(3))),
    "tensor": dict(weights=qjax.learned(qjax.Int(4, per="tensor"))),
    "group": dict(weights=qjax.learned(qjax.Int(3, group=4))),
    "uneven group": dict(weights=qjax.learned(qjax.Int(3, group=3), qjax.MSE())),
    "both learned": dict(weights=qjax.learned(qjax.Int(4)), inputs=qjax.learned(Q8)),
    "pact": dict(
        weights=qjax.learned(qjax.Int(4)),
        inputs=qjax.learned(qjax.Int(4, per="tensor", symmetric=False), method="pact"),
    ),
    "averaged": dict(weights=qjax.Int(4), inputs=qjax.ema(Q8)),
    "averaged range": dict(weights=qjax.Int(4), inputs=qjax.ema(qjax.Int(8, per="tensor", symmetric=False), decay=0.5)),
    "constant": dict(weights=qjax.learned(qjax.Int(4)), inputs=qjax.static(Q8)),
}


def recipe(name):
    return qjax.Recipe([SKIP, qjax.Rule("**", **RULES[name], optional=True)])


def shaken(state):
    """A state that training might have arrived at."""
    keys = iter(jax.random.split(jax.random.key(0), 1000))
    return jax.tree.map(lambda a: a * jax.random.uniform(next(keys), a.shape, minval=0.7, maxval=1.4), state)


@pytest.mark.every(6)
@pytest.mark.parametrize(
    ("name", "rule"),
    [(name, rule) for name in ("matmul", "scan", "jit_shared") for rule in RULES]
    + [(name, "both learned") for name in ("transposed", "expert_einsum", "switch", "scan_by_index", "scan_remat")]
    + [
        ("transposed", "uneven group"),
        ("remat_policy", "averaged"),
        ("while", "constant"),
        ("switch", "averaged"),
    ],
)
def test_values_are_those_of_the_packed_model(name, rule):
    fn, p, x = CASES[name], params(), batch()
    t = qjax.fake_quant(fn, recipe(rule))
    state = shaken(t.init(p, x))
    assert state
    out, after = jax.jit(t.apply)(p, state, x)
    model = t.convert(p, after, x)
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(model(model.params, x)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.structure(jax.eval_shape(t.init, p, x)) == jax.tree.structure(state)


def lsq_by_hand(w, scale, low, high, factor, cotangent):
    """Esser et al. 2020, equations 1 to 3, in NumPy float64: the rounded numbers and both derivatives."""
    ratio = w / scale
    codes = np.clip(np.rint(ratio), low, high)
    inside = (ratio > low) & (ratio < high)
    d_scale = np.where(inside, codes - ratio, codes)
    return codes * scale, cotangent * inside, (cotangent * d_scale).sum(-1, keepdims=True) * factor


@pytest.mark.slow
@settings(max_examples=20)
@given(
    bits=st.integers(2, 8),
    k=st.integers(1, 24),
    n=st.integers(1, 5),
    group=st.sampled_from([None, 1, 4, 5]),
    seed=st.integers(0, 1000),
)
def test_steps_have_the_derivative_of_the_paper(bits, k, n, group, seed):
    rng = np.random.default_rng(seed)
    w, g = (rng.standard_normal((k, n)).astype(np.float32) for _ in range(2))
    group = group and min(group, k)
    fmt = qjax.Int(bits, group=group) if group else qjax.Int(bits)
    t = qjax.fake_quant(lambda p, x: x @ p["w"], qjax.Recipe([qjax.Rule("**", weights=qjax.learned(fmt))]))
    x = np.eye(k, dtype=np.float32)  # so that the result is the rounded weight
    state = shaken(t.init({"w": w}, x))
    out, pull = jax.vjp(lambda p, s: t.apply(p, s, x)[0], {"w": jnp.asarray(w)}, state)
    d_w, d_state = pull(jnp.asarray(g))
    scale = np.asarray(state["w"]["weight.scale"], np.float64)  # [N, blocks]
    low, high = fmt.code_range
    size = group or k
    for block in range(scale.shape[1]):
        at = slice(block * size, min((block + 1) * size, k))
        near, want_w, want_s = lsq_by_hand(
            w[at].T.astype(np.float64), scale[:, block : block + 1], low, high, 1 / np.sqrt(size * high), g[at].T
        )
        ratio = w[at].T / scale[:, block : block + 1]
        edges = np.abs(ratio[..., None] - np.array([low, high])).min() < 1e-4
        ties = np.abs(ratio - np.floor(ratio) - 0.5).min() < 1e-4
        if edges or ties:  # float32 and float64 may fall on different sides
            continue
        np.testing.assert_allclose(np.asarray(out)[at].T, near, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(np.asarray(d_w["w"])[at].T, want_w, rtol=1e-4, atol=1e-5)
        got = np.asarray(d_state["w"]["weight.scale"])[:, block : block + 1]
        np.testing.assert_allclose(got, want_s, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("start", [1e-30, 0.0, -0.05])
def test_a_step_that_fell_to_nothing_comes_back(start):
    """A large learning rate may take a step to 0 or below: derivatives stay finite, and a later one brings it back."""
    p, x = {"w": jnp.linspace(0.5, 1.5, 8).reshape(4, 2)}, jnp.eye(4)
    t = qjax.fake_quant(lambda p, x: x @ p["w"], qjax.Recipe([qjax.Rule("**", weights=qjax.learned(qjax.Int(3)))]))
    state = {"w": {"weight.scale": jnp.array([[start], [0.5]])}}
    loss = lambda p, s: ((t.apply(p, s, x)[0] - p["w"]) ** 2).mean()  # noqa: E731
    first = float(loss(p, state))
    for _ in range(60):
        d_p, d_s = jax.grad(loss, argnums=(0, 1))(p, state)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves((d_p, d_s)))
        state = jax.tree.map(lambda s, g: s - 0.1 * g, state, d_s)
    assert float(state["w"]["weight.scale"][0, 0]) > 0.1 and float(loss(p, state)) < 0.1 * first


def test_clipping_levels_have_the_derivative_of_pact():
    source = qjax.learned(qjax.Int(4, per="tensor", symmetric=False), method="pact")
    t = qjax.fake_quant(lambda p, x: x @ p["w"], qjax.Recipe([qjax.Rule("**", weights=qjax.Int(8), inputs=source)]))
    x, p = jnp.array([[-1.0, 0.21, 0.43, 0.9, 3.0, 5.0]]), {"w": jnp.ones((6, 1))}
    state = {"w": {"input.scale": jnp.full((1, 1), 2.0 / 15)}}  # the level is 2
    out, pull = jax.vjp(lambda x, s: t.apply(p, s, x)[0].sum(), x, state)
    d_x, d_state = pull(1.0)
    assert out == pytest.approx(np.rint(np.clip(x, 0, 2) * 7.5).sum() / 7.5, rel=1e-2)  # the weight is 1 within 8 bits
    w = 255 / 256 * out / out  # derivatives pass through the rounded weight
    np.testing.assert_allclose(d_x[0], np.array([0, 1, 1, 1, 0, 0]) * float(jnp.mean(w)), rtol=2e-2)
    np.testing.assert_allclose(
        d_state["w"]["input.scale"], [[2 * 15]], rtol=2e-2
    )  # two numbers above, d level / d scale


def test_a_scan_trains_as_its_unrolled_layers():
    p, x = params(), batch()
    scanned = lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["s"])[0]  # noqa: E731
    unrolled = lambda p, x: [x := jnp.tanh(x @ p["s"][i]) for i in range(len(p["s"]))][-1]  # noqa: E731
    r = qjax.Recipe([qjax.Rule("**", weights=qjax.learned(qjax.Int(3)), inputs=qjax.learned(Q8))])
    found = []
    for fn in (scanned, unrolled):
        t = qjax.fake_quant(fn, r)
        state = t.init(p, x)
        assert sorted(state) == [f"s/{i}" for i in range(len(p["s"]))]
        found.append((state, jax.grad(lambda p, s, t=t: (t.apply(p, s, x)[0] ** 2).sum(), argnums=(0, 1))(p, state)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), *found)


def test_averages_follow_the_activations():
    fn, p = CASES["scan"], params()
    t = qjax.fake_quant(fn, qjax.Recipe([qjax.Rule("**", weights=qjax.Int(8), inputs=qjax.ema(Q8, decay=0.75))]))
    x = batch()
    state = t.init(p, x)
    first = next(iter(state))
    assert float(state[first]["input.high"][0, 0]) == pytest.approx(max(float(x.max()), 0))
    _, after = jax.jit(t.apply)(p, state, 3 * x)
    for field, end in (("input.low", np.minimum(3 * np.min(x), 0)), ("input.high", np.maximum(3 * np.max(x), 0))):
        want = 0.75 * float(state[first][field][0, 0]) + 0.25 * end
        assert float(after[first][field][0, 0]) == pytest.approx(want, rel=1e-5)
    grads = jax.grad(lambda s: t.apply(p, s, x)[0][0].sum())(state)
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(grads))


def test_a_site_that_does_not_run_keeps_its_average():
    fn = lambda p, x, yes: lax.cond(yes, lambda: x @ p["w"], lambda: x @ p["v"])  # noqa: E731
    p = {"w": jnp.ones((4, 3)), "v": jnp.ones((4, 3))}
    rule = qjax.Rule("**", weights=qjax.Int(8), inputs=qjax.ema(Q8, decay=0.5))
    t, x = qjax.fake_quant(fn, qjax.Recipe([rule])), jnp.ones((2, 4))
    assert float(t.init(p, x, True)["v"]["input.high"][0, 0]) == 1  # every branch starts with what it would have seen
    one = {"input.low": jnp.zeros((1, 1)), "input.high": jnp.ones((1, 1))}
    _, after = jax.jit(t.apply)(p, {"w": one, "v": one}, 5 * x, True)
    assert float(after["w"]["input.high"][0, 0]) == 3 and float(after["v"]["input.high"][0, 0]) == 1


def test_ranges_may_come_from_calibration():
    p, x = params(), batch()
    r = qjax.Recipe([qjax.Rule("**", weights=qjax.Int(8), inputs=qjax.static(Q8, qjax.Percentile(90.0)))])
    observed = qjax.calibrate(CASES["matmul"], p, [x, 2 * x], recipe=r)
    t = qjax.fake_quant(CASES["matmul"], r)
    state = t.init(p, x, observed=observed)
    got = t.convert(p, state, x)
    want = qjax.quantize(CASES["matmul"], p, x, recipe=r, state=observed)
    jax.tree.map(np.testing.assert_array_equal, got.params, want.params)
    with pytest.raises(DataError, match="observed has no state for it"):
        t.init(p, x, observed={})


def test_readers_of_one_weight_share_its_scales():
    fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"]  # noqa: E731
    p, x = {"w": jax.random.normal(jax.random.key(0), (6, 6))}, jax.random.normal(jax.random.key(1), (3, 6))
    t = qjax.fake_quant(fn, qjax.Recipe([qjax.Rule("**", weights=qjax.learned(qjax.Int(4)), inputs=qjax.static(Q8))]))
    state = shaken(t.init(p, x))
    assert [sorted(f) for f in state.values()] == [
        ["input.high", "input.low", "weight.scale"],
        ["input.high", "input.low"],
    ]
    model = t.convert(p, state, x)
    np.testing.assert_allclose(t.apply(p, state, x)[0], model(model.params, x), rtol=1e-4, atol=1e-4)


def test_steps_are_learned():
    """At 2 bits learned steps reach what the ranges of the moment do not, and are what the packed model has."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((64, 8)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((256, 64)), jnp.float32)
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    error = lambda t, s: ((t.apply({"w": w}, s, x)[0] - x @ w) ** 2).mean()  # noqa: E731
    t = qjax.fake_quant(fn, qjax.Recipe([qjax.Rule("w", weights=qjax.learned(qjax.Int(2)))]))
    state, optimizer = jax.tree.map(lambda a: 3 * a, t.init({"w": w}, x)), optax.adam(0.05)  # from far off
    moments = optimizer.init(state)
    step = jax.jit(jax.value_and_grad(lambda s: error(t, s)))
    first = last = float(error(t, state))
    for _ in range(200):
        last, grads = step(state)
        updates, moments = optimizer.update(grads, moments)
        state = optax.apply_updates(state, updates)
    moment = qjax.fake_quant(fn, qjax.Recipe([qjax.Rule("w", weights=qjax.Int(2))]))
    assert float(last) < 0.5 * first and float(last) < 0.8 * float(error(moment, {}))
    model = t.convert({"w": w}, state, x)
    assert float(((model(model.params, x) - x @ w) ** 2).mean()) == pytest.approx(float(error(t, state)), rel=1e-3)


def test_sharded_training_averages_over_devices():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    p, x = {"w": jax.random.normal(jax.random.key(0), (6, 5))}, jax.random.normal(jax.random.key(1), (8, 6))
    rule = qjax.Rule("**", weights=qjax.learned(qjax.Int(4)), inputs=qjax.ema(Q8))
    t = qjax.fake_quant(lambda p, x: x @ p["w"], qjax.Recipe([rule]))
    state = t.init(p, x)
    spread = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
    for a, b in zip(
        jax.tree.leaves(jax.jit(t.apply)(p, state, spread)), jax.tree.leaves(t.apply(p, state, x)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_what_cannot_be():
    p, x = params(), batch()
    with pytest.raises(RecipeError, match="steps are learned for Int"):
        qjax.Rule("**", weights=qjax.learned(qjax.NF4()))
    with pytest.raises(RecipeError, match="'lsq' or 'pact'"):
        qjax.Rule("**", weights=qjax.learned(qjax.Int(4), method="dorefa"))
    with pytest.raises(RecipeError, match="is for symmetric integers"):
        qjax.Rule("**", weights=qjax.learned(qjax.Int(4, symmetric=False)))
    with pytest.raises(RecipeError, match="inputs that are not negative"):
        qjax.Rule("**", weights=qjax.Int(4), inputs=qjax.learned(Q8, method="pact"))
    with pytest.raises(RecipeError, match="nothing is averaged"):
        qjax.Rule("**", weights=qjax.ema(qjax.Int(4)))
    with pytest.raises(RecipeError, match="from 0 to below 1"):
        qjax.Rule("**", weights=qjax.Int(4), inputs=qjax.ema(Q8, decay=1.0))
    with pytest.raises(RecipeError, match="a constant scale serves the whole tensor"):
        qjax.Rule("**", weights=qjax.Int(4), inputs=qjax.learned(qjax.Int(8, per="token")))
    t = qjax.fake_quant(CASES["matmul"], recipe("both learned"))
    with pytest.raises(DataError, match=r"w has none and needs input.scale, weight.scale; make it with init"):
        t.apply(p, {}, x)
    with pytest.raises(DataError, match="NaN or infinity among its inputs"):
        t.init(p, x.at[0, 0].set(jnp.nan))
    whole = qjax.fake_quant(
        lambda p, x: jnp.einsum("bi,lij->blj", x, p["s"]) + lax.scan(lambda h, w: (h @ w, None), x, p["s"])[0][:, None],
        recipe("channel"),
    )
    with pytest.raises(RecipeError, match="read different slices of s"):
        whole.init(p, x)


@pytest.mark.parametrize("rule", RULES)
def test_recipes_survive_toml(rule):
    r = recipe(rule)
    assert qjax.Recipe.from_toml(r.to_toml()) == r

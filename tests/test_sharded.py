"""Training, adapters and packed models over eight devices: the numbers of one device, wherever the arrays lie."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax.errors import LayoutError
from qjax.formats import is_quantized

Q8 = qjax.Int(8, per="tensor")
RECIPES = {
    "learned steps": dict(weights=qjax.learned(qjax.Int(4, group=8))),
    "W4A8": dict(weights=qjax.Int(4, group=8), inputs=qjax.dynamic(qjax.Int(8, per="token"))),
    "averaged": dict(weights=qjax.learned(qjax.Int(4)), inputs=qjax.ema(Q8, decay=0.5)),
}
LAYOUTS = ("weights", "batches", "both")
KINDS = (AxisType.Auto, AxisType.Explicit)
WIDTH, HIDDEN, LAYERS, BATCH = 16, 32, 2, 8

SPECS = {
    "layers": {"gate": P(None, None, "model"), "up": P(None, None, "model"), "down": P(None, "model", None)},
    "head": P(None, "model"),
}


@pytest.fixture(autouse=True)
def float64():
    """Sums over devices round elsewhere; in float64 that is too little to move a number to the next code."""
    with jax.enable_x64(True):
        yield


def recipe(name):
    return qjax.Recipe([qjax.Rule("**", **RECIPES[name])], name=name)


def weights():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape) / shape[-2] ** 0.5, jnp.float64)  # noqa: E731
    layers = {
        "gate": draw(LAYERS, WIDTH, HIDDEN),
        "up": draw(LAYERS, WIDTH, HIDDEN),
        "down": draw(LAYERS, HIDDEN, WIDTH),
    }
    return {"layers": layers, "head": draw(WIDTH, 8)}


def data():
    rng = np.random.default_rng(1)
    return [jnp.asarray(rng.standard_normal((BATCH, n)), jnp.float64) for n in (WIDTH, 8)]


def network(p, x, out=None):
    """A scan over gated layers and a head; ``out`` says where the sums over a split axis go on an explicit mesh."""

    def layer(h, w):
        inner = jax.nn.silu(h @ w["gate"]) * (h @ w["up"])
        return h + jnp.einsum("bi,io->bo", inner, w["down"], out_sharding=out), None

    return lax.scan(layer, x, p["layers"])[0] @ p["head"]


class Laid:
    """The function, its parameters and a batch, laid out over a mesh in one of the ways."""

    def __init__(self, kind, layout):
        self.mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
        self.place = functools.partial(NamedSharding, self.mesh)
        split = layout in ("weights", "both")
        self.rows = P("data") if layout in ("batches", "both") else P()
        self.specs = SPECS if split else jax.tree.map(lambda _: P(), SPECS, is_leaf=lambda s: isinstance(s, P))
        self.shardings = jax.tree.map(self.place, self.specs, is_leaf=lambda s: isinstance(s, P))
        self.split = split
        out = P(*self.rows, None) if kind is AxisType.Explicit else None
        self.fn = functools.partial(network, out=out)

    def put(self, params, *batch):
        return jax.device_put(params, self.shardings), *(jax.device_put(b, self.place(self.rows)) for b in batch)


def error(out, y):
    return jnp.mean((out - y) ** 2)


def train(loss, trained, steps=3):
    """``loss(trained) -> (value, averages)``: what three steps of gradient descent with momentum make of it."""
    optimizer = optax.sgd(0.05, momentum=0.9)

    @jax.jit
    def step(trained, moments):
        (value, averages), grads = jax.value_and_grad(loss, has_aux=True)(trained)
        updates, moments = optimizer.update(grads, moments, trained)
        return averages(optax.apply_updates(trained, updates)), moments, value

    moments, values = optimizer.init(trained), []
    for _ in range(steps):
        trained, moments, value = step(trained, moments)
        values.append(value)
    return trained, jnp.stack(values)


def close(got, want, tolerance=1e-5):
    got, want = jax.device_get((got, want))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, want)


def trained(fn, rules, params, x, y):
    t = qjax.fake_quant(fn, rules)
    state = t.init(params, x)

    def loss(both):
        out, after = t.apply(*both, x)
        ranges = {
            s: {f: a for f, a in fields.items() if f in ("input.low", "input.high")} for s, fields in after.items()
        }
        return error(out, y), jax.tree_util.Partial(_with_ranges, ranges)

    (params, state), values = train(loss, (params, state))
    return t, params, state, values


def _with_ranges(ranges, both):
    params, state = both
    return params, {site: fields | ranges[site] for site, fields in state.items()}


@functools.cache
def alone(name):
    return trained(network, recipe(name), weights(), *data())


@pytest.mark.every(11)
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_training_what_will_be_stored(kind, layout, name):
    laid = Laid(kind, layout)
    t, *want = alone(name)
    x = data()[0]
    expected = t.convert(*want[:2], x)
    with jax.set_mesh(laid.mesh):
        params, *batch = laid.put(weights(), *data())
        t, *got = trained(laid.fn, recipe(name), params, *batch)
        close(got, want)
        model = t.convert(*got[:2], batch[0])
        close(model(model.params, batch[0]), expected(expected.params, x), 1e-4)
    check_shards(model.params, laid)


def check_shards(params, laid):
    leaves = jax.tree.leaves(params, is_leaf=is_quantized)
    assert all(map(is_quantized, leaves))
    for q in leaves:
        assert q.codes.sharding.is_fully_replicated != laid.split, q.codes.sharding


def adapted(fn, params, x, y):
    base = qjax.quantize(fn, params, x, recipe=qjax.Recipe([qjax.Rule("**", weights=qjax.Int(4, group=8))]))
    t = qjax.lora(base, {"layers/**": 2, "**": None}, key=jax.random.key(2))
    loss = lambda state: (error(t.apply(base.params, state, x)[0], y), jax.tree_util.Partial(lambda s: s))  # noqa: E731
    return t, base, *train(loss, t.init(base.params, x))


@functools.cache
def adapted_alone():
    return adapted(network, weights(), *data())


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_low_rank_adapters(kind, layout):
    laid = Laid(kind, layout)
    t, base, *want = adapted_alone()
    x = data()[0]
    expected = t.convert(base.params, want[0], x)
    with jax.set_mesh(laid.mesh):
        params, *batch = laid.put(weights(), *data())
        t, base, *got = adapted(laid.fn, params, *batch)
        close(got, want)
        model = t.convert(base.params, got[0], batch[0])
        close(model(model.params, batch[0]), expected(expected.params, x), 1e-4)
    check_shards(model.params, laid)


@pytest.mark.every(4)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
@pytest.mark.parametrize("inputs", [None, qjax.dynamic(qjax.Int(8, per="token"))], ids=["W4A16", "W4A8"])
def test_packed_parameters_are_placed_by_the_plan(kind, layout, inputs):
    """Quantized on one device, then laid out as the float parameters would be."""
    laid, rules = Laid(kind, layout), qjax.Recipe([qjax.Rule("**", weights=qjax.Int(4, group=8), inputs=inputs)])
    x = data()[0]
    model = qjax.quantize(network, weights(), x, recipe=rules)
    shardings = qjax.plan(network, weights(), x, recipe=rules).shardings(laid.shardings)
    with jax.set_mesh(laid.mesh):
        packed = jax.device_put(model.params, shardings)
        close(model.bind(laid.fn)(packed, *laid.put(weights(), x)[1:]), model(model.params, x), 1e-4)
    check_shards(packed, laid)


@pytest.mark.parametrize("group", [5, 12])
def test_groups_that_an_explicit_mesh_would_cut(group):
    """On an automatic mesh XLA moves what has to be moved; an explicit one has no type for it."""
    rules = qjax.Recipe([qjax.Rule("layers/*/down", weights=qjax.Int(4, group=group)), qjax.Rule("**", skip=True)])
    for kind in KINDS:
        laid = Laid(kind, "both")
        with jax.set_mesh(laid.mesh):
            params, x = laid.put(weights(), data()[0])
            if kind is AxisType.Auto:
                model = qjax.quantize(laid.fn, params, x, recipe=rules)
                alone = qjax.quantize(network, weights(), data()[0], recipe=rules)
                close(model(model.params, x), alone(alone.params, data()[0]))
                continue
            refused = rf"^layers/down: 2 shards of the 32 .* or a group of {group}; axis 1"
            with pytest.raises(LayoutError, match=refused):
                qjax.quantize(laid.fn, params, x, recipe=rules)
            with pytest.raises(LayoutError, match=refused):
                qjax.fake_quant(laid.fn, rules).apply(params, {}, x)


def test_one_group_may_be_split():
    laid = Laid(AxisType.Explicit, "both")
    rules = qjax.Recipe([qjax.Rule("**", weights=qjax.Int(4, group=128), clamp_group=True)])
    alone = qjax.quantize(network, weights(), data()[0], recipe=rules)
    shardings = qjax.plan(network, weights(), data()[0], recipe=rules).shardings(laid.shardings)
    assert shardings["layers"]["down"].codes.spec == P(None, None, "model")
    with jax.set_mesh(laid.mesh):
        packed, (params, x) = jax.device_put(alone.params, shardings), laid.put(weights(), data()[0])
        model = qjax.quantize(laid.fn, params, x, recipe=rules)
        for stored in (packed, model.params):
            close(model(stored, x), alone(alone.params, data()[0]))


@pytest.mark.slow
def test_a_llama():
    """A decoder of ours on an automatic mesh: heads and hidden units over devices, and rows of tokens.

    Its norms and softmax are in float32 whatever the parameters are, so activations stay float here.
    """
    config = qjax.models.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
    )  # fmt: skip
    fn, params = qjax.from_nnx(qjax.models.Llama(config, scan_layers=True, rngs=nnx.Rngs(0)))
    params = qjax.astype(params, jnp.float64)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def spec(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        columns, rows = (any(n in name for n in names) for names in (("q_", "k_", "v_", "gate", "up"), ("o_", "down")))
        return NamedSharding(mesh, P(None, None, "model") if columns else P(None, "model") if rows else P())

    shardings = jax.tree_util.tree_map_with_path(spec, params)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 32, (8, 6)))
    targets = jax.nn.one_hot(tokens, 32, dtype=jnp.float64)
    rules = qjax.Recipe(
        [
            qjax.Rule("embed/**", skip=True),
            qjax.Rule("**/attn/**", weights=qjax.learned(qjax.Int(4))),
            qjax.Rule("**", weights=qjax.Int(4, group=8)),
        ]
    )
    found = []
    for placed in (params, jax.device_put(params, shardings)):
        rows = NamedSharding(mesh, P("data")) if placed is not params else None
        batch = jax.device_put((tokens, targets), rows)
        t, *after = trained(fn, rules, placed, *batch)
        model = t.convert(*after[:2], batch[0])
        found.append((after, model(model.params, batch[0])))
    close(found[1], found[0], 1e-4)
    attn = model.params["layers"]["attn"]
    assert not any(attn[n]["kernel"].get_value().codes.sharding.is_fully_replicated for n in ("q_proj", "o_proj"))

"""Observing a program, calibration, and constant activation scales."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from constructs import CASES, batch, params
from jax import lax

import qjax
from qjax.errors import CheckpointError, DataError, QjaxError, QjaxWarning, RecipeError
from qjax.statistics import ChannelRange, Samples, SecondMoment

INT8 = qjax.Int(8, per="tensor")


def only(name: str, inputs) -> qjax.Recipe:
    return qjax.Recipe([qjax.Rule(name.replace("[", "?"), weights=qjax.Int(8), inputs=inputs)])


def sites_of(name: str):
    program = qjax.trace(CASES[name], params(), batch())
    return [s for s in program.sites if s.op in ("dot", "conv", "ragged_dot") and not s.reason]


@pytest.mark.every(6)
@pytest.mark.parametrize("name", CASES)
def test_a_constant_from_one_batch_is_the_scale_of_that_batch(name):
    """With one site quantized at a time, what reaches it is float: the calibrated constant is the dynamic scale."""
    fn, p, x = CASES[name], params(), batch()
    tried = 0
    for site in sites_of(name)[:4]:
        every = qjax.trace(fn, p, x).sites
        readers = [s for s in every if (s.leaf, s.slice) == (site.leaf, site.slice)]
        if site.repeats != 1 or len(readers) > 1 or name == "linear_solve":  # whose solver runs it many times
            tried += name == "linear_solve"
            continue
        recipe = only(site.name, qjax.static(INT8))
        state = qjax.calibrate(fn, p, [x], recipe=recipe)
        if not state[site.name]["absmax"].any():
            assert name in ("cond", "switch"), "only a branch can be left out"
            tried += 1
            continue
        static = qjax.quantize(fn, p, x, recipe=recipe, state=state)
        dynamic = qjax.quantize(fn, p, x, recipe=only(site.name, qjax.dynamic(INT8)))
        got, want = (jax.tree.leaves(m(m.params, x)) for m in (static, dynamic))
        for a, b in zip(got, want, strict=True):
            if site.batch_axes:  # one constant for all of a batch axis, where dynamic scales are one for each
                np.testing.assert_allclose(a, b, atol=0.05)
            else:
                np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
        assert static.report.row(site.name).inputs == "int8 per tensor static"
        tried += 1
    assert tried or not sites_of(name) or name in SEVERAL_READERS or sites_of(name)[0].repeats != 1


SEVERAL_READERS = ("grad_inside", "fused_split", "jit_shared", "embedding_and_head")


EVERYWHERE = qjax.Recipe([qjax.Rule("**", weights=qjax.Int(8), inputs=qjax.static(INT8))])


@pytest.mark.parametrize("name", CASES)
def test_observing_changes_nothing_and_sees_every_site(name):
    fn, p, x = CASES[name], params(), batch()
    sites = sites_of(name)
    if not sites:
        with pytest.raises(QjaxError):
            qjax.observe(fn, EVERYWHERE).init(p, x)
        return
    t = qjax.observe(fn, EVERYWHERE)
    state = t.init(p, x)
    assert set(state) == {s.name for s in sites}
    assert jax.tree.structure(jax.eval_shape(t.init, p, x)) == jax.tree.structure(state)
    out, seen = jax.jit(t.apply)(p, state, x)
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(jax.jit(fn)(p, x)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert jax.tree.structure(seen) == jax.tree.structure(state)
    for site in sites:
        assert float(seen[site.name]["absmax"].max()) > 0 or name in ("cond", "switch"), site.name
        assert float(seen[site.name]["nonfinite"]) == 0


def absmax(a):
    return float(np.abs(np.asarray(a)).max())


def test_scan_gives_each_layer_its_own_state():
    p, x = params(), batch()
    fn = lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["s"])[0]  # noqa: E731
    state = qjax.calibrate(fn, p, [x], recipe=EVERYWHERE)
    h = x
    for layer in range(3):
        assert float(state[f"s/{layer}"]["absmax"].item()) == pytest.approx(absmax(h), rel=1e-6)
        h = jnp.tanh(h @ p["s"][layer])


@pytest.mark.parametrize("reverse", [False, True])
def test_nested_and_reversed_scans(reverse):
    rng = np.random.default_rng(0)
    p = {"w": jnp.asarray(rng.standard_normal((2, 3, 4, 4)), jnp.float32)}

    def fn(p, x):
        inner = lambda h, w: (jnp.tanh(h @ w), None)  # noqa: E731
        outer = lambda h, ws: (lax.scan(inner, h, ws)[0] * 1.5, None)  # noqa: E731
        return lax.scan(outer, x, p["w"], reverse=reverse)[0]

    x = jnp.asarray(rng.standard_normal((5, 4)), jnp.float32)
    state = qjax.calibrate(fn, p, [x], recipe=EVERYWHERE)
    h = x
    for i in reversed(range(2)) if reverse else range(2):
        for j in range(3):
            assert state[f"w/{i}/{j}"]["absmax"].item() == pytest.approx(absmax(h), rel=1e-5)
            h = jnp.tanh(h @ p["w"][i, j])
        h = h * 1.5
    assert len(state) == 6


def test_time_steps_are_merged():
    p, xs = params(), jnp.asarray(np.random.default_rng(0).standard_normal((6, 4, 8)), jnp.float32)
    fn = lambda p, xs: lax.scan(lambda h, x: (jnp.tanh(x @ p["w"] + h), None), jnp.zeros((4, 8)), xs)[0]  # noqa: E731
    assert qjax.calibrate(fn, p, [xs], recipe=EVERYWHERE)["w"]["absmax"].item() == absmax(xs)


def test_while_loops_merge_their_iterations():
    p, x = params(), batch()

    def fn(p, x):
        return lax.while_loop(lambda c: c[0] < 5, lambda c: (c[0] + 1, 3 * jnp.sin(c[1] @ p["w"])), (0, x))[1]

    largest, h = 0.0, x
    for _ in range(5):
        largest, h = max(largest, absmax(h)), 3 * jnp.sin(h @ p["w"])
    assert qjax.calibrate(fn, p, [x], recipe=EVERYWHERE)["w"]["absmax"].item() == pytest.approx(largest, rel=1e-6)


def test_a_branch_that_never_runs_is_reported():
    p, x = params(), batch()

    def fn(p, x):
        return lax.cond(x.sum() > 1e9, lambda: x @ p["w"], lambda: x @ p["s"][0])

    state = qjax.calibrate(fn, p, [x], recipe=EVERYWHERE)
    assert state["w"]["absmax"].item() == 0
    with pytest.raises(DataError, match=r"^w: no batch reached it"):
        qjax.quantize(fn, p, x, recipe=EVERYWHERE, state=state)


def test_shards_are_merged(auto_mesh_4):
    p, x = params(), batch()
    spec = jax.sharding.PartitionSpec

    def fn(p, x):
        product = jax.shard_map(lambda x, w: x @ w, mesh=auto_mesh_4, in_specs=(spec("d"), spec()), out_specs=spec("d"))
        return product(x, p["w"])

    for observer in (qjax.AbsMax(), qjax.Percentile(99.0)):
        recipe = only("w", qjax.static(INT8, observer))
        whole = qjax.calibrate(CASES["matmul"], p, [x], recipe=recipe)
        parts = qjax.calibrate(fn, p, [x], recipe=recipe)
        jax.tree.map(np.testing.assert_array_equal, whole, parts)


@pytest.fixture
def auto_mesh_4():
    return jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])


@pytest.mark.every(4)
@pytest.mark.parametrize("observer", [qjax.AbsMax(), qjax.MinMax(), qjax.Percentile(99.0), qjax.MSE()])
@pytest.mark.parametrize("fmt", [INT8, qjax.Int(8, per="tensor", symmetric=False), qjax.Float8(per="tensor")])
def test_batches_are_merged_like_one(fmt, observer):
    p, xs = params(), [batch(seed) for seed in range(3)]
    recipe = only("w", qjax.static(fmt, observer))
    fn = CASES["matmul"]
    one, many = (qjax.calibrate(fn, p, b, recipe=recipe) for b in ([jnp.concatenate(xs)], xs))
    jax.tree.map(np.testing.assert_array_equal, one, many)
    model = qjax.quantize(fn, p, xs[0], recipe=recipe, state=many)
    y, want = model(model.params, xs[0]), fn(p, xs[0])
    assert float(jnp.linalg.norm(y - want) / jnp.linalg.norm(want)) < 0.05
    # The constant is what the observer's range gives, whatever the activations of the call.
    name = "input.scale"
    assert float(model.params["w"].aux[name].reshape(())) > 0
    doubled = model(model.params, 100 * xs[0])
    assert float(jnp.abs(doubled).max()) < 50 * float(jnp.abs(want).max()), "larger activations saturate"


def test_the_scale_is_the_observed_range():
    p, x = params(), batch()
    model = qjax.quantize(CASES["matmul"], p, recipe=EVERYWHERE, batches=[x])  # the first batch is the example
    scale = np.asarray(model.params["w"].aux["input.scale"])
    np.testing.assert_allclose(scale.item(), absmax(x) / 127.5, rtol=1e-6)
    assert model.params["w"].nbytes == 8 * 8 + 8 * 4 + 4


def test_layers_with_different_formats_in_one_scan():
    p, x = params(), batch()
    fn = lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["s"])[0]  # noqa: E731
    recipe = qjax.Recipe(
        [
            qjax.Rule("s/1", weights=qjax.Int(4), inputs=qjax.static(qjax.Float8(per="tensor"))),
            qjax.Rule("**", weights=qjax.Int(8), inputs=qjax.static(INT8)),
        ]
    )
    model = qjax.quantize(fn, p, x, recipe=recipe, batches=[x])
    unrolled = {"a": p["s"][0], "b": p["s"][1], "c": p["s"][2]}
    again = qjax.Recipe([qjax.Rule("b", **_said(recipe.rules[0])), qjax.Rule("**", **_said(recipe.rules[1]))])

    def loop(p, x):
        for name in "abc":
            x = jnp.tanh(x @ p[name])
        return x

    flat = qjax.quantize(loop, unrolled, x, recipe=again, batches=[x])
    np.testing.assert_allclose(model(model.params, x), flat(flat.params, x), rtol=1e-5, atol=1e-6)
    for layer in range(3):
        assert model.report.row(f"s/{layer}").inputs.endswith("static")


def _said(rule):
    return {"weights": rule.weights, "inputs": rule.inputs}


def test_two_readers_have_scales_of_their_own():
    p, x = params(), batch()
    fn = lambda p, x: (x @ p["w"], (100 * x) @ p["w"])  # noqa: E731
    model = qjax.quantize(fn, p, x, recipe=EVERYWHERE, batches=[x])
    aux = model.params["w"].aux
    assert float(aux["input#1.scale"].item()) == pytest.approx(100 * float(aux["input.scale"].item()), rel=1e-5)
    for got, want in zip(model(model.params, x), fn(p, x), strict=True):
        assert float(jnp.abs(got - want).max()) < 0.02 * absmax(want)


def test_the_model_is_a_function_like_any_other(tmp_path):
    p, x = params(), batch()
    fn = lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["s"])[0]  # noqa: E731
    model = qjax.quantize(fn, p, x, recipe=EVERYWHERE, batches=[x])
    want = model(model.params, x)
    np.testing.assert_allclose(jax.jit(model)(model.params, x), want, rtol=1e-6)
    np.testing.assert_allclose(model(model.params, x[:2]), want[:2], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(lambda row: model(model.params, row))(x), want, rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda x: model(model.params, x).sum())(x)
    float_gradient = jax.grad(lambda x: fn(p, x).sum())(x)
    assert float(jnp.abs(gradient - float_gradient).max()) < 0.1 * absmax(float_gradient)
    qjax.save(tmp_path / "m", model)
    again = qjax.load(tmp_path / "m", fn, like=p)
    np.testing.assert_array_equal(again(again.params, x), want)
    planned = qjax.plan(fn, p, x, recipe=EVERYWHERE)
    assert jax.tree.structure(planned.params) == jax.tree.structure(model.params)
    for a, b in zip(jax.tree.leaves(planned.params), jax.tree.leaves(model.params), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert planned.stored_bytes == model.report.stored_bytes


def test_a_convolution_and_experts():
    rng = np.random.default_rng(0)
    p = {
        "conv": jnp.asarray(rng.standard_normal((3, 3, 4, 8)) / 6, jnp.float32),
        "experts": jnp.asarray(rng.standard_normal((2, 8, 5)), jnp.float32),
    }

    def fn(p, image):
        y = lax.conv_general_dilated(image, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        rows = jnp.tanh(y).reshape(-1, 8)
        return lax.ragged_dot(rows, p["experts"], jnp.array([10, rows.shape[0] - 10]))

    image = jnp.asarray(rng.standard_normal((2, 4, 4, 4)), jnp.float32)
    model = qjax.quantize(fn, p, image, recipe=EVERYWHERE, batches=[image])
    want = fn(p, image)
    assert float(jnp.linalg.norm(model(model.params, image) - want) / jnp.linalg.norm(want)) < 0.02
    assert model.params["experts"].aux["input.scale"].shape == (2, 1, 1)


# ------------------------------------------------------------------------------------------------------- bad input


def test_bad_batches():
    p, x, fn = params(), batch(), CASES["matmul"]
    with pytest.raises(DataError, match="generator, which can be gone through only once"):
        qjax.quantize(fn, p, x, recipe=EVERYWHERE, batches=(x for _ in range(2)))
    with pytest.raises(DataError, match="there are no calibration batches"):
        qjax.quantize(fn, p, x, recipe=EVERYWHERE, batches=[])
    with pytest.raises(DataError, match=r"batch 1 is float32\[3d\], but batch 0 is float32\[2d\]"):
        qjax.calibrate(fn, p, [x, x[None]], recipe=EVERYWHERE)
    with pytest.raises(DataError, match=r"batch 1: NaN or infinity among the inputs of w;"):
        qjax.calibrate(fn, p, [x, x.at[0, 0].set(jnp.nan)], recipe=EVERYWHERE)
    with pytest.raises(DataError, match="batches is a int"):
        qjax.calibrate(fn, p, 3, recipe=EVERYWHERE)
    with pytest.raises(DataError, match=r"batches is a ArrayImpl; give a list of argument tuples"):
        qjax.calibrate(fn, p, x, recipe=EVERYWHERE)
    with pytest.raises(DataError, match="batch 0 is a list"):
        qjax.calibrate(fn, p, [[x]], recipe=EVERYWHERE)
    with pytest.raises(TypeError) as caught:
        qjax.calibrate(fn, p, [x, x[:, :3]], recipe=EVERYWHERE)
    assert any("calibration batch 1" in note for note in caught.value.__notes__)
    with pytest.warns(QjaxWarning, match="batches are not looked at") as told:
        qjax.quantize(fn, p, recipe="W8A16", batches=[x])
    assert told[0].filename == __file__
    state = qjax.calibrate(fn, p, [x], recipe=EVERYWHERE)
    with pytest.raises(QjaxError, match="give one of them"):
        qjax.quantize(fn, p, x, recipe=EVERYWHERE, batches=[x], state=state)


def test_what_is_static_in_a_tree_stays_static():
    p, x = {**params(), "activation": jnp.tanh, "name": "a model"}, batch()
    fn = lambda p, x: p["activation"](x @ p["w"])  # noqa: E731
    model = qjax.quantize(fn, p, recipe=EVERYWHERE, batches=[x, x])
    assert float(jnp.abs(model(model.params, x) - fn(p, x)).max()) < 0.05


def test_states_of_two_hosts_are_merged():
    p, xs, fn = params(), [batch(1), batch(2)], CASES["matmul"]
    t = qjax.observe(fn, EVERYWHERE)
    parts = [qjax.calibrate(fn, p, [x], recipe=EVERYWHERE) for x in xs]
    jax.tree.map(np.testing.assert_array_equal, t.merge(*parts, p, xs[0]), qjax.calibrate(fn, p, xs, recipe=EVERYWHERE))


@pytest.mark.parametrize("mode", [None, "fill", "clip"])
def test_experts_picked_at_run_time(mode):
    p, x = params(), batch()
    fn = lambda p, x, i: x @ jnp.take(p["s"], i, axis=0, mode=mode)  # noqa: E731
    model = qjax.quantize(fn, p, recipe=EVERYWHERE, batches=[(x, jnp.int32(1)), (x, jnp.int32(2))])
    assert not model.report.notes
    for i in (0, 2, -1):
        want = fn(p, x, jnp.int32(i))
        assert float(jnp.abs(model(model.params, x, jnp.int32(i)) - want).max()) < 0.05
    outside = model(model.params, x, jnp.int32(7))
    assert bool(jnp.isnan(outside).all()) == (mode != "clip")


def test_states_of_something_else():
    p, x, fn = params(), batch(), CASES["matmul"]
    state = qjax.calibrate(fn, p, [x], recipe=EVERYWHERE)
    with pytest.raises(DataError, match="the state is a NoneType"):
        qjax.quantize(fn, p, x, recipe=EVERYWHERE, state={"w": None})
    with pytest.raises(DataError, match="no state for s"):
        qjax.quantize(lambda p, x: x @ p["s"][0] @ p["w"], p, x, recipe=EVERYWHERE, state=state)
    other = only("w", qjax.static(INT8, qjax.Percentile()))
    with pytest.raises(DataError, match=r"w: the state holds absmax .* Percentile"):
        qjax.quantize(fn, p, x, recipe=other, state=state)
    with pytest.raises(DataError, match="the state does not belong"):
        qjax.observe(lambda p, x: x @ p["s"][0], EVERYWHERE).apply(p, state, x)


def test_recipes_that_cannot_be_static():
    p, x, fn = params(), batch(), CASES["matmul"]
    with pytest.raises(RecipeError, match='give the format per="tensor"'):
        only("w", qjax.static(qjax.Int(8, per="token")))
    with pytest.raises(RecipeError, match="braces are no pattern"):
        qjax.Rule("layers/{1,2}/**", skip=True)
    floating = qjax.Recipe([qjax.Rule("w", inputs=qjax.static(INT8))])
    with pytest.raises(RecipeError, match="constant scales are kept with a quantized weight"):
        qjax.quantize(fn, p, x, recipe=floating, batches=[x])
    with pytest.raises(RecipeError, match="the recipe observes nothing"):
        qjax.calibrate(fn, p, [x], recipe="W8A16")
    with pytest.raises(RecipeError, match="pass calibration data"):
        qjax.quantize(fn, p, x, recipe=EVERYWHERE)


# ------------------------------------------------------------------------------------------- more than ranges, resumed


def layered(p, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["s"])[0]


@pytest.mark.slow
def test_other_statistics_beside_those_of_a_recipe():
    p, xs = params(), [batch(), 2 * batch()]
    more = {"s/1": SecondMoment(), "**": (ChannelRange(), Samples(count=3))}
    state = qjax.calibrate(layered, p, xs, recipe=EVERYWHERE, statistics=more)
    assert "second_moment" in state["s/1"] and "second_moment" not in state["s/0"]
    hidden = [layered({"s": p["s"][:1]}, x) for x in xs]
    want = sum(h.T @ h for h in hidden)
    np.testing.assert_allclose(state["s/1"]["second_moment"], want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state["s/0"]["channel_above"], np.maximum(np.concatenate(xs).max(0), 0), rtol=1e-6)
    assert state["s/2"]["sample"].shape == (3, 8)
    t = qjax.observe(layered, EVERYWHERE, more)
    model = t.convert(p, state, xs[0])
    want_model = qjax.quantize(layered, p, recipe=EVERYWHERE, batches=xs)
    for a, b in zip(jax.tree.leaves(model.params), jax.tree.leaves(want_model.params), strict=True):
        np.testing.assert_array_equal(a, b)
    alone = qjax.calibrate(layered, p, xs, statistics={"s/1": SecondMoment()})
    assert list(alone) == ["s/1"]
    with pytest.raises(RecipeError, match="names no product with a parameter .did you mean"):
        qjax.calibrate(layered, p, xs, statistics={"s/7": SecondMoment()})
    with pytest.raises(RecipeError, match="one of qjax.statistics"):
        qjax.observe(layered, statistics={"**": "moments"})
    with pytest.raises(RecipeError, match="belong to no recipe"):
        qjax.observe(layered, statistics={"**": SecondMoment()}).convert(p, alone, xs[0])


class Killed(Exception):
    pass


class Stopping:
    """Batches of which one run sees only the first few."""

    def __init__(self, batches, stop):
        self.batches, self.stop = batches, stop

    def __iter__(self):
        for n, b in enumerate(self.batches):
            if n == self.stop:
                raise Killed
            yield b


@pytest.mark.slow
def test_a_killed_calibration_goes_on_to_the_same_state(tmp_path, monkeypatch):
    monkeypatch.setattr("qjax.checkpoint.folded.SHARE", 1e9)  # keep the state after every batch
    rng = np.random.default_rng(0)
    xs = [jnp.asarray(rng.standard_normal((4, 8)), jnp.float32) for _ in range(7)]
    p, more = params(), {"**": (SecondMoment(), Samples(count=3))}
    recipe = qjax.Recipe([qjax.Rule("**", weights=qjax.Int(8), inputs=qjax.static(INT8, qjax.Percentile(99.0)))])
    run = lambda xs, folder: qjax.calibrate(layered, p, xs, recipe=recipe, statistics=more, resume=folder)  # noqa: E731
    want = run(xs, None)
    for stop in (1, 2, 5, 6):
        folder = tmp_path / str(stop)
        with pytest.raises(Killed):
            run(Stopping(xs, stop), folder)
        jax.tree.map(np.testing.assert_array_equal, run(xs, folder), want)
        jax.tree.map(np.testing.assert_array_equal, run(xs, folder), want)  # once more: nothing is left to do
    with pytest.raises(CheckpointError, match="begun with other batches"):
        run(xs[1:] + xs[:1], tmp_path / "2")
    with pytest.raises(CheckpointError, match="parameters differ"):
        qjax.calibrate(layered, {**p, "s": 2 * p["s"]}, xs, recipe=recipe, statistics=more, resume=tmp_path / "2")
    with pytest.raises(CheckpointError, match="recipe, statistics differ"):
        qjax.calibrate(layered, p, xs, recipe=EVERYWHERE, resume=tmp_path / "2")


# -------------------------------------------------------------------------------------------------------- many devices

LAYOUTS = [("batches", None), ("weights", None), *(("both", o) for o in (None, qjax.MinMax(), qjax.Percentile(99.0)))]


@pytest.mark.every(4)
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize(("what", "observer"), LAYOUTS)
def test_sharded_calibration_equals_that_on_one_device(kind, what, observer):
    recipe = qjax.Recipe([qjax.Rule("**", weights=qjax.Int(8), inputs=qjax.static(INT8, observer))])
    axis = getattr(jax.sharding.AxisType, kind)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis,) * 2)
    spec, place = jax.sharding.PartitionSpec, jax.sharding.NamedSharding
    rng = np.random.default_rng(0)
    p = {"up": rng.standard_normal((2, 16, 32)).astype(np.float32), "down": rng.standard_normal((2, 32, 16)) / 6}
    p = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), p)
    xs = [jnp.asarray(rng.standard_normal((8, 16)), jnp.float32) for _ in range(2)]

    def fn(p, x):
        def layer(h, w):
            up = jnp.einsum("bi,io->bo", h, w["up"])
            return jnp.einsum("bi,io->bo", jnp.tanh(up), w["down"], out_sharding=out), None

        return lax.scan(layer, x, p)[0]

    out = None
    state = qjax.calibrate(fn, p, xs, recipe=recipe)
    model = qjax.quantize(fn, p, xs[0], recipe=recipe, state=state)
    want = model(model.params, xs[0])

    sharded, rows = p, xs
    if what in ("weights", "both"):
        specs = {"up": spec(None, None, "model"), "down": spec(None, "model", None)}
        sharded = {name: jax.device_put(p[name], place(mesh, specs[name])) for name in p}
    if what in ("batches", "both"):
        rows = [jax.device_put(x, place(mesh, spec("data"))) for x in xs]
    if kind == "Explicit":
        sharded = jax.tree.map(lambda a: jax.device_put(a, place(mesh, spec())) if sharded is p else a, sharded)
        rows = [jax.device_put(x, place(mesh, spec())) if rows is xs else x for x in rows]
        out = spec("data" if what != "weights" else None, None)
    with jax.set_mesh(mesh):
        again = qjax.calibrate(fn, sharded, rows, recipe=recipe)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state, again)
        spread = qjax.quantize(fn, sharded, rows[0], recipe=recipe, state=again)
        np.testing.assert_allclose(spread(spread.params, rows[0]), want, rtol=1e-3, atol=2e-2)

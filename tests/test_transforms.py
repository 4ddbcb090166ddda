"""A quantized model under jax's transformations, and what a recipe may and may not ask for."""

from __future__ import annotations

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from constructs import CASES, batch, params
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import qjax
from qjax.errors import QjaxError, RecipeError
from qjax.formats import QArray, QStack, is_quantized

W8 = qjax.Recipe([qjax.Rule("**", weights=qjax.Int(8))])
W4 = qjax.Recipe([qjax.Rule("**", weights=qjax.Int(4, group=4))])
W8A8 = qjax.Recipe([qjax.Rule("**", weights=qjax.Int(8), inputs=qjax.dynamic(qjax.Int(8, per="token")))])


def dequantized(tree):
    return jax.tree.map(lambda q: q.dequantize() if is_quantized(q) else q, tree, is_leaf=is_quantized)


def net(p, x):
    x = lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["s"])[0]
    return jnp.einsum("bi,io->bo", x, p["w"])


def close(a, b, tolerance=2e-5):
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=tolerance, atol=tolerance), a, b)


@pytest.fixture(scope="module")
def model():
    return qjax.quantize(net, params(), batch(), recipe=W4)


def test_jit_and_eager_agree(model):
    close(jax.jit(model)(model.params, batch()), model(model.params, batch()))


def test_other_batch_sizes(model):
    for rows in (1, 3, 64):
        x = jnp.ones((rows, 8)) / 3
        close(model(model.params, x), net(dequantized(model.params), x))


def test_eager_calls_are_traced_once():
    calls = []

    def fn(p, x):
        calls.append(x.shape)
        return net(p, x)

    model = qjax.quantize(fn, params(), batch(), recipe=W4)
    before = len(calls)
    for _ in range(5):
        model(model.params, batch())
    once = len(calls)
    assert once - before == 1
    model(model.params, batch() * 2)
    assert len(calls) == once
    model(model.params, jnp.ones((2, 8)))
    assert len(calls) == once + 1


def test_vmap_over_inputs(model):
    xs = jnp.stack([batch(1), batch(2), batch(3)])
    close(jax.vmap(lambda x: model(model.params, x))(xs), jnp.stack([net(dequantized(model.params), x) for x in xs]))


def test_vmap_over_an_ensemble_of_quantized_models():
    models = [qjax.quantize(net, params(seed), batch(), recipe=W4) for seed in range(3)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *(m.params for m in models))
    got = jax.vmap(models[0], in_axes=(0, None))(stacked, batch())
    close(got, jnp.stack([m(m.params, batch()) for m in models]))


@pytest.mark.parametrize("recipe", [W8, W4], ids=["int8", "int4"])
def test_gradients_with_respect_to_inputs(recipe):
    model = qjax.quantize(net, params(), batch(), recipe=recipe)
    want = jax.grad(lambda x: net(dequantized(model.params), x).sum())(batch())
    close(jax.grad(lambda x: model(model.params, x).sum())(batch()), want)
    close(jax.jit(jax.grad(lambda x: model(model.params, x).sum()))(batch()), want)


def test_jvp_and_linearize(model):
    x, t = batch(), batch(5)
    want = jax.jvp(lambda x: net(dequantized(model.params), x), (x,), (t,))
    close(jax.jvp(lambda x: model(model.params, x), (x,), (t,)), want)
    close(jax.linearize(lambda x: model(model.params, x), x)[1](t), want[1])


def test_gradients_with_respect_to_the_float_leaves():
    fn = lambda p, x: (x @ p["w"] + p["b"]) * p["g"]  # noqa: E731
    p = {"w": params()["w"], "b": jnp.zeros(8), "g": jnp.ones(8)}
    model = qjax.quantize(fn, p, batch(), recipe=W8)
    train, frozen = qjax.partition(model.params)
    assert train["w"] is None and frozen["b"] is None
    grads = jax.grad(lambda t: jnp.sum(model(qjax.combine(t, frozen), batch()) ** 2))(train)
    want = jax.grad(lambda p: jnp.sum(fn(p, batch()) ** 2))(dequantized(model.params))
    close(grads["b"], want["b"], 1e-4)
    close(grads["g"], want["g"], 1e-4)


def test_residuals_of_the_backward_pass_are_packed():
    fn = lambda p, x: jnp.tanh(x @ p["w"])  # noqa: E731
    p = {"w": jnp.ones((256, 512))}
    model = qjax.quantize(
        fn, p, jnp.ones((2, 256)), recipe=qjax.Recipe([qjax.Rule("**", weights=qjax.Int(4, group=64))])
    )
    _, pull = jax.vjp(lambda x: model(model.params, x), jnp.ones((2, 256)))
    saved = sum(leaf.nbytes for leaf in jax.tree.leaves(pull))
    assert saved < 256 * 512  # the float weight has four times as many bytes, the codes half as many


def test_activations_are_straight_through():
    model = qjax.quantize(net, params(), batch(), recipe=W8A8)
    want = jax.grad(lambda x: net(dequantized(model.params), x).sum())(batch())
    got = jax.grad(lambda x: model(model.params, x).sum())(batch())
    assert np.corrcoef(np.ravel(want), np.ravel(got))[0, 1] > 0.99


def test_integer_products_are_integer():
    model = qjax.quantize(lambda p, x: x @ p["w"], params(), batch(), recipe=W8A8)
    text = jax.jit(model).lower(model.params, batch()).as_text()
    assert "xi8>" in text and "xi32>" in text and "dot_general" in text


def test_dynamic_scales_are_those_of_each_token():
    model = qjax.quantize(lambda p, x: x @ p["w"], params(), batch(), recipe=W8A8)
    y = model(model.params, batch())
    scaled = model(model.params, batch() * jnp.asarray([[1.0], [2.0], [4.0], [1024.0]]))
    close(scaled, y * jnp.asarray([[1.0], [2.0], [4.0], [1024.0]]), 1e-6)


def test_per_tensor_scales_are_mapped_by_vmap():
    recipe = qjax.Recipe([qjax.Rule("**", weights=qjax.Int(8), inputs=qjax.Int(8, per="tensor"))])
    model = qjax.quantize(lambda p, x: x @ p["w"], params(), batch(), recipe=recipe)
    xs = jnp.stack([batch(), batch() * 1000])
    close(jax.vmap(lambda x: model(model.params, x))(xs), jnp.stack([model(model.params, x) for x in xs]), 1e-5)


def test_scan_over_calls_of_the_model(model):
    want = batch()
    for _ in range(3):
        want = net(dequantized(model.params), want)
    close(lax.scan(lambda c, _: (model(model.params, c), None), batch(), None, length=3)[0], want)


def test_shard_map_over_the_whole_model(model):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    f = jax.shard_map(model, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec("d")), out_specs=PartitionSpec("d"))
    close(f(model.params, batch()), net(dequantized(model.params), batch()))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_parameters_give_the_same_result(kind):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))
    fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]  # noqa: E731
    rng = np.random.default_rng(0)
    p = {
        "up": jnp.asarray(rng.standard_normal((16, 32)), jnp.float32),
        "down": jnp.asarray(rng.standard_normal((32, 16)), jnp.float32),
    }
    x = jnp.asarray(rng.standard_normal((4, 16)), jnp.float32)
    recipe = qjax.Recipe([qjax.Rule("**", weights=qjax.Int(4, group=8))])
    model = qjax.quantize(fn, p, x, recipe=recipe)
    want = model(model.params, x)
    specs = {"up": PartitionSpec(None, "model"), "down": PartitionSpec("model", None)}
    if kind is AxisType.Explicit:
        specs["down"] = PartitionSpec(None, "model")  # a contracted sharded axis needs an out_sharding, as in jnp.dot
        fn = lambda p, x: jnp.tanh(jax.sharding.reshard(x @ p["up"], PartitionSpec("data", None))) @ p["down"]  # noqa: E731
        with jax.set_mesh(mesh):
            model = qjax.quantize(fn, p, x, recipe=recipe)
    shardings = qjax.plan(
        fn if kind is AxisType.Auto else lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], p, x, recipe=recipe
    ).shardings(jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, PartitionSpec)))
    placed = jax.tree.map(jax.device_put, model.params, shardings)
    assert placed["up"].codes.sharding.spec == PartitionSpec("model", None)
    with jax.set_mesh(mesh):
        xs = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data", None)))
        close(jax.jit(model)(placed, xs), want, 1e-4)


def test_shardings_that_would_cut_a_group_are_refused():
    mesh = jax.make_mesh((8,), ("m",), axis_types=(AxisType.Auto,))
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    plan = qjax.plan(fn, params(), batch(), recipe=W4)
    with pytest.raises(QjaxError, match=r"^w: 8 shards of the 8 numbers of a row would cut a byte.*into 2 shards"):
        plan.shardings({"w": PartitionSpec("m", None), "s": PartitionSpec()}, mesh)
    plan = qjax.plan(fn, {"w": jnp.zeros((48, 8))}, jnp.zeros((2, 48)), recipe=W4)
    with pytest.raises(QjaxError, match=r"cut a byte or a group of 4; axis 0 can be cut into 2, 3, 4, 6 or 12 shards"):
        plan.shardings({"w": PartitionSpec("m", None)}, mesh)
    heads = lambda p, x: jnp.einsum("bhd,hdo->bo", x, p["w"])  # noqa: E731
    plan = qjax.plan(heads, {"w": jnp.zeros((4, 8, 8))}, jnp.zeros((2, 4, 8)), recipe=W4)
    with pytest.raises(QjaxError, match=r"^w: .* can be sharded along the first, 0, and the spec .* names axis 1"):
        plan.shardings({"w": PartitionSpec(None, "m")}, mesh)


def test_export_round_trip(model):
    exported = jax.export.export(jax.jit(model))(model.params, batch())
    loaded = jax.export.deserialize(exported.serialize())
    close(loaded.call(model.params, batch()), model(model.params, batch()))


def test_bind_runs_another_function_over_the_same_parameters(model):
    tail = model.bind(lambda p, x: x @ p["w"])
    close(tail(model.params, batch()), batch() @ dequantized(model.params)["w"])


def test_plan_is_what_quantize_does(model):
    plan = qjax.plan(net, *jax.eval_shape(lambda: (params(), batch())), recipe=W4)
    assert jax.tree.structure(plan.params) == jax.tree.structure(model.params)
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), plan.params, model.params)
    assert all(jax.tree.leaves(same))
    assert plan.stored_bytes == model.report.stored_bytes


def test_remat_policies_see_the_quantized_product_as_a_dot():
    def loss(policy):
        fn = lambda p, x: jnp.sin(jax.checkpoint(lambda x: jnp.sin(x @ p["w"]), policy=policy)(x))  # noqa: E731
        model = qjax.quantize(fn, params(), batch(), recipe=W8)
        return str(jax.make_jaxpr(jax.grad(lambda x: model(model.params, x).sum()))(batch()))

    count = lambda text: text.count(" = q_dot[")  # noqa: E731
    assert (
        count(loss(jax.checkpoint_policies.nothing_saveable)) == count(loss(jax.checkpoint_policies.dots_saveable)) + 1
    )


# ------------------------------------------------------------------------------------------------ several formats


MIXED = qjax.Recipe(
    [
        qjax.Rule("s/0", weights=qjax.Int(8)),
        qjax.Rule("s/1", skip=True),
        qjax.Rule("**", weights=qjax.Int(4, group=4)),
    ]
)


@pytest.mark.every(4)
@pytest.mark.parametrize("max_runs", [4, 1], ids=["split", "select"])
@pytest.mark.parametrize(
    "name",
    ["scan", "scan_reversed", "scan_remat", "fori", "fori_backwards", "python_loop", "scan_by_index", "scan_of_scan"],
)
def test_formats_may_differ_between_iterations(name, max_runs):
    fn = CASES[name]
    recipe = qjax.Recipe([*MIXED.rules[:2], qjax.Rule("**", weights=qjax.Int(4, group=4))])
    model = qjax.quantize(fn, params(), batch(), recipe=recipe, max_runs=max_runs)
    assert isinstance(model.params["s"], QStack) and model.params["s"].nbytes == (8 * 8 + 8 * 4) + 256 + (32 + 64)
    close(model(model.params, batch()), fn(dequantized(model.params), batch()))
    formats = {r.name: r.format for r in model.report.rows}
    assert formats == {"s/0": "int8 per channel", "s/1": "float32", "s/2": "int4 g4"}
    if name.startswith("scan") and name != "scan_by_index":
        assert any("3 scans" in n if max_runs == 4 else "selects" in n for n in model.report.notes)


@pytest.mark.parametrize("max_runs", [4, 1], ids=["split", "select"])
def test_activations_may_differ_between_iterations(max_runs):
    rules = [
        qjax.Rule("re:s/[12]", weights=qjax.Int(8)),
        qjax.Rule("**", weights=qjax.Int(8), inputs=qjax.dynamic(qjax.Int(3, per="token"))),
    ]
    fn = CASES["scan"]
    model = qjax.quantize(fn, params(), batch(), recipe=qjax.Recipe(rules), max_runs=max_runs)
    assert isinstance(model.params["s"], QArray)
    p = model.params["s"]
    x = batch()
    for i, act in enumerate((True, False, False)):
        recipe = qjax.Recipe([rules[1] if act else qjax.Rule("**", weights=qjax.Int(8))])
        one = qjax.quantize(lambda q, x: jnp.tanh(x @ q["w"]), {"w": params()["s"][i]}, x, recipe=recipe)
        x = one({"w": p.index_stack(0, i)}, x)
    close(model(model.params, batch()), x)


# ------------------------------------------------------------------------------------------------------------- refusals


def test_skip_by_any_reader_keeps_a_leaf_float():
    fn = CASES["embedding_and_head"]
    recipe = qjax.Recipe([qjax.Rule("w", op="embedding", skip=True), qjax.Rule("**", weights=qjax.Int(8))])
    model = qjax.quantize(fn, params(), batch(), recipe=recipe)
    assert not is_quantized(model.params["w"])
    assert {r.name: bool(r.reason) for r in model.report.rows} == {"w": True, "w#1": True}


def test_two_formats_for_one_leaf_name_both_sites():
    recipe = qjax.Recipe([qjax.Rule("w#1", weights=qjax.Int(8)), qjax.Rule("**", weights=qjax.Int(4))])
    with pytest.raises(RecipeError, match="w and w#1 read the same weight.*int4.*int8"):
        qjax.quantize(CASES["jit_shared"], params(), batch(), recipe=recipe)


def test_a_group_longer_than_the_axis():
    with pytest.raises(RecipeError, match="w: a group of 128 is longer than the 8 numbers"):
        qjax.quantize(
            CASES["matmul"], params(), batch(), recipe=qjax.Recipe([qjax.Rule("**", weights=qjax.Int(4, group=128))])
        )
    report = qjax.quantize(CASES["matmul"], params(), batch(), recipe="W4A16").report
    assert "one group" in report.rows[0].note


def test_a_group_that_does_not_divide_the_axis_is_said_with_its_bits():
    fn, x = lambda p, x: x @ p["w"], jnp.ones((2, 100))
    recipe = qjax.Recipe([qjax.Rule("**", weights=qjax.Int(4, group=96))])
    row = qjax.quantize(fn, {"w": jnp.ones((100, 8))}, x, recipe=recipe).report.rows[0]
    assert row.note.startswith("groups of 96 do not divide the axis of 100: the last one holds 4 weights")
    assert "costs 0.31 bits a weight" in row.note and row.bits_per_element == 4 + 32 * 2 / 100
    assert not qjax.quantize(fn, {"w": jnp.ones((192, 8))}, jnp.ones((2, 192)), recipe=recipe).report.rows[0].note


def test_nan_in_a_weight_is_named():
    p = params()
    p["w"] = p["w"].at[0, 0].set(jnp.nan)
    with pytest.raises(QjaxError, match="w: 1 of its 64 numbers are NaN or infinite"):
        qjax.quantize(CASES["matmul"], p, batch(), recipe=W8)


def test_integer_weights_are_named():
    p = {"w": jnp.ones((8, 8), jnp.int32)}
    with pytest.raises(RecipeError, match="w has dtype int32"):
        qjax.quantize(lambda p, x: x @ p["w"], p, jnp.ones((2, 8), jnp.int32), recipe=W8)


@pytest.mark.parametrize("per", ["tensor", "token"])
@pytest.mark.parametrize("fmt", [qjax.Int(8), qjax.Int(8, symmetric=False), qjax.Float8()], ids=lambda f: f.name)
def test_activations_of_a_batched_product(fmt, per):
    inputs = qjax.dynamic(dataclasses.replace(fmt, per=per))
    recipe = qjax.Recipe([qjax.Rule("**", weights=qjax.Int(8), inputs=inputs)])
    model = qjax.quantize(CASES["expert_einsum"], params(), batch(), recipe=recipe)
    got, want = model(model.params, batch()), CASES["expert_einsum"](params(), batch())
    assert float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want)) < 0.05


def test_numbers_that_are_equal_and_not_the_same_are_told_apart():
    def fn(params, x, power):
        return (x @ params["w"]) ** power if isinstance(power, bool) else x @ params["w"] + jnp.asarray(power)

    params, x = {"w": jnp.ones((4, 4))}, jnp.ones((2, 4), jnp.bfloat16)
    model = qjax.quantize(fn, params, x, 1, recipe=qjax.Recipe([qjax.Rule("**", weights=qjax.Int(8))]))
    for power in (1, 1.0, True):
        np.testing.assert_array_equal(model(params, x, power), fn(params, x, power))


def test_static_activations_need_calibration():
    recipe = qjax.Recipe([qjax.Rule("**", weights=qjax.Int(8), inputs=qjax.static(qjax.Int(8, per="tensor")))])
    with pytest.raises(RecipeError, match="batches="):
        qjax.quantize(CASES["matmul"], params(), batch(), recipe=recipe)


def test_composites_cannot_be_quantized_yet():
    recipe = qjax.Recipe([qjax.Rule("**", op="activation", inputs=qjax.Int(8, per="tensor"))])
    with pytest.raises(RecipeError, match="gelu.*cannot do yet"):
        qjax.quantize(lambda p, x: jax.nn.gelu(x @ p["w"]), params(), batch(), recipe=recipe)


def test_quantizing_twice_is_refused(model):
    with pytest.raises(QjaxError, match="quantized already"):
        qjax.quantize(net, model.params, batch(), recipe=W4)


def test_unknown_presets_offer_the_nearest():
    with pytest.raises(RecipeError, match="W4A16"):
        qjax.quantize(CASES["matmul"], params(), batch(), recipe="W4A61")


def test_donated_leaves_are_freed():
    p = jax.tree.map(jnp.copy, params())
    model = qjax.quantize(net, p, batch(), recipe=W4, donate=True)
    assert p["w"].is_deleted() and p["s"].is_deleted()
    assert np.isfinite(model(model.params, batch())).all()


def test_explain_says_what_was_stored_and_why_not(model):
    text = model.explain("w")
    assert "int4 g4" in text and "SQNR" in text and "runs as" in text
    left = qjax.quantize(net, params(), batch(), recipe=MIXED).explain("s/1")
    assert "left in float32" in left and "skipped by rule" in left


def test_bytes_are_counted_as_stored(model):
    report = model.report
    assert report.float_bytes == 4 * (64 + 192)
    assert report.stored_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    assert sum(r.bytes_after for r in report.rows) + report.other_bytes == report.stored_bytes


def test_no_warning_in_ordinary_use():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = qjax.quantize(net, params(), batch(), recipe="W8A8")
        model(model.params, batch())


def test_formats_may_differ_along_two_stacked_axes():
    p = {"net": {"w": jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 8, 8)), jnp.float32) / 3}}

    def fn(p, x):
        inner = lambda c, w: (jnp.tanh(c @ w), None)  # noqa: E731
        return lax.scan(lambda c, q: (lax.scan(inner, c, q["w"])[0], None), x, p["net"])[0]

    recipe = qjax.Recipe([qjax.Rule("net/w/1/2", weights=qjax.Int(8)), qjax.Rule("**", weights=qjax.Int(4))])
    model = qjax.quantize(fn, p, batch(), recipe=recipe)
    assert {r.name: r.format[:4] for r in model.report.rows} == {
        f"net/w/{i}/{j}": "int8" if (i, j) == (1, 2) else "int4" for i in range(2) for j in range(3)
    }
    assert model.report.stored_bytes == 5 * (32 + 32) + (64 + 32)
    assert jax.tree.structure(model.params) == jax.tree.structure(qjax.plan(fn, p, batch(), recipe=recipe).params)
    close(model(model.params, batch()), fn(dequantized(model.params), batch()))


def test_a_rounding_runs_on_every_matrix_of_a_stack():
    recipe = qjax.Recipe([qjax.Rule("**", weights=qjax.static(qjax.Int(4, group=4), qjax.MSE()))])
    plain, ranged = (qjax.quantize(net, params(), batch(), recipe=r) for r in (W4, recipe))
    worse = [r.sqnr_db for r in plain.report.rows]
    better = [r.sqnr_db for r in ranged.report.rows]
    assert all(b >= w - 1e-6 for b, w in zip(better, worse, strict=True)) and sum(better) > sum(worse)


def test_a_jit_body_that_was_shared_stays_shared():
    @jax.jit
    def layer(x, w):
        return jnp.tanh(x @ w)

    def fn(p, x):
        for i in range(6):
            x = layer(x, p[f"layer_{i}"])
        return x

    p = {f"layer_{i}": params(i)["w"] for i in range(6)}
    model = qjax.quantize(fn, p, batch(), recipe="W8A8")
    bodies = {
        id(e.params["jaxpr"])
        for e in _calls(jax.make_jaxpr(model)(model.params, batch()).jaxpr)
        if e.params["name"] == "layer"
    }
    assert len(bodies) == 1
    assert jax.jit(model).lower(model.params, batch()).as_text().count("func.func private @layer") == 1


def _calls(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "jit":
            yield eqn
            yield from _calls(eqn.params["jaxpr"].jaxpr)


def test_named_scopes_are_kept(model):
    fn = CASES["named_scope"]
    quantized = qjax.quantize(fn, params(), batch(), recipe=W8)
    text = quantized.rewritten.rewritten_jaxpr(quantized.params, batch()).pretty_print(name_stack=True)
    assert any("q_dot" in line and "outer/inner" in line for line in text.splitlines()) or "outer/inner" in text
    hlo = jax.jit(quantized).lower(quantized.params, batch()).compile().as_text()
    assert "outer/inner" in hlo


def test_experts_picked_by_data_stay_packed():
    p = {"up": jnp.asarray(np.random.default_rng(0).standard_normal((3, 8, 8)), jnp.float32)}
    chosen = jnp.asarray([2, 0, 1, 2])
    for fn in (
        lambda p, x, i: jnp.einsum("bd,bdf->bf", x, p["up"][i]),
        lambda p, x, i: jax.vmap(lambda r, e: r @ p["up"][e])(x, i),
        lambda p, x, i: jax.vmap(lambda r, e: r @ lax.dynamic_index_in_dim(p["up"], e, 0, False))(x, i),
    ):
        model = qjax.quantize(fn, p, batch(), chosen, recipe=W8)
        assert isinstance(model.params["up"], QArray) and not model.report.notes
        close(model(model.params, batch(), chosen), fn(dequantized(model.params), batch(), chosen))


def test_a_weight_chosen_by_a_condition_is_reported():
    p = {"a": params()["w"], "b": params(1)["w"]}
    for fn in (
        lambda p, x: x @ jnp.where(x[0, 0] > 0, p["a"], p["b"]),
        lambda p, x: x @ lax.cond(x[0, 0] > 0, lambda: p["a"], lambda: p["b"]),
    ):
        (site,) = qjax.trace(fn, p, batch()).sites
        assert site.op == "dot" and "a, b" in site.reason


def test_export_with_symbolic_batch_size(model):
    (rows,) = jax.export.symbolic_shape("rows")
    exported = jax.export.export(jax.jit(model))(model.params, jax.ShapeDtypeStruct((rows, 8), jnp.float32))
    close(exported.call(model.params, batch()), model(model.params, batch()))

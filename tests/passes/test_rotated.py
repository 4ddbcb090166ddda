"""Roundings of rotated weights: every kind of product, statistics, constants, checkpoints, meshes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from constructs import CASES, batch, params
from jax import lax

import qjax
from qjax.errors import FormatError, RecipeError
from qjax.formats import SIGNS, SMOOTH, QArray, is_quantized
from qjax.formats.rotation import matrix, random_signs
from qjax.statistics import ChannelRange, Samples, SecondMoment

INT8 = qjax.Int(8, per="tensor")


def rotated(weights=None, inputs=None, **settings) -> qjax.Recipe:
    rounding = qjax.Rotated(**settings)
    return qjax.Recipe([qjax.Rule("**", weights=weights or qjax.Int(8), inputs=inputs, rounding=rounding)])


def product(p, x):
    return x @ p["w"]


@pytest.mark.every(3)
@pytest.mark.parametrize("inputs", [None, "dynamic", "static"])
@pytest.mark.parametrize("block", [None, 8])
def test_one_product_by_the_equations(inputs, block):
    """Rounding to nearest of W R and x R, in NumPy and float64."""
    rng = np.random.default_rng(0)
    k, n, rows = 24, 10, 16
    x, w = rng.standard_normal((rows, k)).astype(np.float32), rng.standard_normal((k, n)).astype(np.float32)
    x[:, 5] *= 40
    source = {"dynamic": qjax.dynamic(qjax.Int(8, per="token")), "static": qjax.static(INT8), None: None}[inputs]
    recipe = rotated(qjax.Int(8), source, block=block)
    model = qjax.quantize(product, {"w": jnp.asarray(w)}, x, recipe=recipe, batches=[x] if inputs == "static" else None)

    r = np.kron(np.eye(k // (block or k)), matrix(random_signs(block or k)))
    x_r, w_r = x @ r, r.T @ w
    step = np.abs(w_r).max(0) / 127.5
    near = r.T @ np.asarray(model.params["w"].dequantize(), np.float64)
    assert (np.abs(near - w_r) <= 0.5001 * step + 1e-6).all()
    np.testing.assert_allclose(near / step, np.rint(near / step), atol=1e-3)
    if inputs is not None:
        top = np.abs(x_r).max(-1, keepdims=True) if inputs == "dynamic" else np.abs(x_r).max()
        x_r = np.clip(np.rint(x_r / (top / 127.5)), -128, 127) * (top / 127.5)
    got = np.asarray(model(model.params, x))
    slack = 1e-4 if inputs is None else 1.01 * np.abs(x @ r).max() / 127.5 * np.abs(w_r).max()  # ties may go either way
    np.testing.assert_allclose(got, x_r @ near, atol=slack)
    assert np.linalg.norm(got - x_r @ near) < 0.01 * np.linalg.norm(x @ w)
    assert model.params["w"].aux[SIGNS].shape == (1, block or k)
    assert "rotated by a Hadamard matrix of order" in model.explain("w")
    planned = qjax.plan(product, {"w": jnp.asarray(w)}, x, recipe=recipe)
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(planned.params)] == [
        (a.shape, a.dtype) for a in jax.tree.leaves(model.params)
    ]


@pytest.mark.every(6)
@pytest.mark.parametrize("name", CASES)
def test_every_construct(name):
    """A rotation changes no function by more than rounding does, and what is packed stands for the float weight."""
    fn, p, x = CASES[name], params(), batch()
    if name == "associative_scan":
        pytest.skip("its weight is computed: no recipe fits it")
    recipe = rotated(inputs=qjax.dynamic(qjax.Int(8, per="token")))
    model = qjax.quantize(fn, p, x, recipe=recipe)
    for want, got in zip(*(jax.tree.leaves(f) for f in (fn(p, x), model(model.params, x))), strict=True):
        assert float(jnp.abs(got - want).max()) < 0.06 * float(jnp.abs(want).max()) + 1e-6
    for was, q in zip(jax.tree.leaves(p), jax.tree.leaves(model.params, is_leaf=is_quantized), strict=True):
        if isinstance(q, QArray):
            assert float(jnp.abs(q.dequantize() - was).max()) < 0.02 * float(jnp.abs(was).max())
    planned = qjax.plan(fn, p, x, recipe=recipe)
    assert jax.tree.structure(planned.params) == jax.tree.structure(model.params)


@pytest.mark.parametrize("part", [SecondMoment(), Samples(8)])
def test_statistics_turn_as_the_activations_do(part):
    """What was gathered and rotated is what would have been gathered of rotated activations."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 24)).astype(np.float32)
    signs = random_signs(24)[None]
    turned = part.rotated(part.see(jnp.asarray(x)), signs)
    r = matrix(signs)
    if isinstance(part, SecondMoment):
        np.testing.assert_allclose(turned["second_moment"], r.T @ (x.T @ x).astype(np.float64) @ r, atol=1e-4)
        np.testing.assert_allclose(
            turned["second_moment"], part.see(jnp.asarray(x @ r, jnp.float32))["second_moment"], atol=1e-4
        )
        assert turned["rows"] == 8
    else:
        order = np.argsort(np.asarray(part.see(jnp.asarray(x))["sample"])[:, 0])
        np.testing.assert_allclose(np.asarray(turned["sample"])[order], (x @ r)[np.argsort(x[:, 0])], atol=1e-5)
    with pytest.raises(NotImplementedError, match="ChannelRange has to define rotated"):
        ChannelRange().rotated({}, signs)


def test_gptq_of_a_rotated_weight_is_gptq_of_rotated_data():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((64, 24)) * np.exp(rng.standard_normal(24))).astype(np.float32)
    w = rng.standard_normal((24, 10)).astype(np.float32)
    fmt = qjax.Int(4, group=8)
    model = qjax.quantize(product, {"w": jnp.asarray(w)}, x, recipe=rotated(fmt, inner=qjax.GPTQ()), batches=[x])
    r = matrix(random_signs(24)).astype(np.float32)
    plain = qjax.Recipe([qjax.Rule("**", weights=fmt, rounding=qjax.GPTQ())])
    other = qjax.quantize(product, {"w": jnp.asarray(r.T @ w)}, x @ r, recipe=plain, batches=[x @ r])
    same = np.asarray(model.params["w"].unpacked()) == np.asarray(other.params["w"].unpacked())
    assert same.mean() > 0.97  # a number halfway between two codes may take either
    error = [float(np.linalg.norm(m(m.params, v) - x @ w)) for m, v in ((model, x), (other, x @ r))]
    assert abs(error[0] / error[1] - 1) < 0.05


def test_outliers_in_four_bits():
    """Planted outlier channels: int4 activations per token lose most of the others; rotated they do not."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((128, 192)).astype(np.float32)
    x[:, [3, 50, 101]] *= 50
    w = rng.standard_normal((192, 64)).astype(np.float32)
    w[[3, 50, 101]] /= 50  # the outliers carry no more of the result than others do
    error = {}
    for rounding in (None, qjax.Rotated()):
        rule = qjax.Rule("**", weights=qjax.Int(8), inputs=qjax.Int(4, per="token"), rounding=rounding)
        model = qjax.quantize(product, {"w": jnp.asarray(w)}, x, recipe=qjax.Recipe([rule]))
        error[rounding] = float(np.linalg.norm(model(model.params, x) - x @ w) / np.linalg.norm(x @ w))
    assert error[qjax.Rotated()] < 0.6 * error[None], error


@pytest.mark.slow
def test_experts_and_layers():
    rng = np.random.default_rng(0)
    p = {"e": jnp.asarray(rng.standard_normal((4, 24, 10)) / 5, jnp.float32)}
    x, sizes = jnp.asarray(rng.standard_normal((12, 24)), jnp.float32), jnp.array([3, 0, 7, 2], jnp.int32)
    fn = lambda p, x, sizes: lax.ragged_dot(x, p["e"], sizes)  # noqa: E731
    for inner, inputs in ((qjax.RTN(), None), (qjax.GPTQ(), qjax.static(INT8)), (qjax.RTN(), qjax.Int(8, per="token"))):
        batches = [(x, sizes)] if inner == qjax.GPTQ() else None
        model = qjax.quantize(fn, p, x, sizes, recipe=rotated(inputs=inputs, inner=inner), batches=batches)
        assert model.params["e"].aux[SIGNS].shape == (4, 1, 24)
        want = fn(p, x, sizes)
        assert float(jnp.abs(model(model.params, x, sizes) - want).max()) < 0.05 * float(jnp.abs(want).max())

    s = {"s": jnp.asarray(rng.standard_normal((3, 8, 8)) / 3, jnp.float32)}
    x = jnp.asarray(rng.standard_normal((16, 8)), jnp.float32)
    fn = lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w) * 3, None), x, p["s"])[0]  # noqa: E731
    model = qjax.quantize(fn, s, x, recipe=rotated(inner=qjax.GPTQ(), inputs=qjax.static(INT8)), batches=[x])
    assert model.params["s"].aux[SIGNS].shape == (3, 1, 8)
    want = fn(s, x)
    assert float(jnp.linalg.norm(model(model.params, x) - want)) < 0.05 * float(jnp.linalg.norm(want))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("inputs", [None, "static"])
def test_convolutions_rotate_their_channels(groups, inputs):
    if groups > 1 and inputs:
        pytest.skip("patches of grouped convolutions are not gathered")
    rng = np.random.default_rng(0)
    p = {"conv": jnp.asarray(rng.standard_normal((3, 3, 4, 8)) / 6, jnp.float32)}
    image = rng.standard_normal((2, 5, 5, 4 * groups)).astype(np.float32)
    image[..., 1] *= 20
    fn = lambda p, x: lax.conv_general_dilated(  # noqa: E731
        x, p["conv"], (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )
    recipe = rotated(inputs=qjax.static(INT8) if inputs else None)
    model = qjax.quantize(fn, p, image, recipe=recipe, batches=[image] if inputs else None)
    assert model.params["conv"].aux[SIGNS].size == 4 and "along the channels of the image" in model.explain("conv")
    want = fn(p, image)
    assert float(jnp.abs(model(model.params, image) - want).max()) < 0.03 * float(jnp.abs(want).max())
    np.testing.assert_allclose(model.params["conv"].dequantize(), p["conv"], atol=0.02)


def test_saved_sharded_exported_and_differentiated(tmp_path):
    rng = np.random.default_rng(0)
    p, x = (
        {"w": jnp.asarray(rng.standard_normal((32, 12)), jnp.float32)},
        jnp.asarray(rng.standard_normal((8, 32)), jnp.float32),
    )
    model = qjax.quantize(product, p, x, recipe=rotated(qjax.Int(4, group=8), block=8))
    want = model(model.params, x)
    qjax.save(tmp_path / "m", model)
    again = qjax.load(tmp_path / "m", product, like=p)
    np.testing.assert_array_equal(again(again.params, x), want)
    assert qjax.Recipe.from_dict(model.recipe.to_dict()).hash == model.recipe.hash

    mesh = jax.make_mesh((4,), ("m",), axis_types=(jax.sharding.AxisType.Auto,))
    for spec in (jax.P("m"), jax.P(None, "m")):
        specs = qjax.plan(product, p, x, recipe=model.recipe).shardings({"w": spec}, mesh)
        assert specs["w"].aux[SIGNS] == jax.P(None, None)
        is_spec = lambda s: isinstance(s, jax.P)  # noqa: E731
        place = jax.tree.map(lambda s: jax.sharding.NamedSharding(mesh, s), specs, is_leaf=is_spec)
        np.testing.assert_allclose(model(jax.device_put(model.params, place), x), want, rtol=1e-5, atol=1e-4)
    gradient = jax.grad(lambda x: model(model.params, x).sum())(x)
    np.testing.assert_allclose(gradient, jnp.broadcast_to(model.params["w"].dequantize().sum(1), x.shape), atol=1e-4)
    rows = jax.vmap(lambda x: model(model.params, x))(x[:, None])[:, 0]
    np.testing.assert_allclose(rows, want, atol=1e-4)
    exported = jax.export.deserialize(jax.export.export(jax.jit(model))(model.params, x).serialize())
    np.testing.assert_allclose(exported.call(model.params, x), want, atol=1e-5)


@pytest.mark.parametrize("block, cut", [(8, False), (None, True)])
def test_shard_map_over_the_channels(block, cut):
    """Blocks that a device holds whole are rotated there; a rotation of all channels is undone, and said to be."""
    rng = np.random.default_rng(0)
    mesh = jax.make_mesh((4,), ("m",), axis_types=(jax.sharding.AxisType.Auto,))
    p, x = (
        {"w": jnp.asarray(rng.standard_normal((32, 12)), jnp.float32)},
        jnp.asarray(rng.standard_normal((8, 32)), jnp.float32),
    )

    def fn(p, x):
        body = lambda w, x: lax.psum(x @ w, "m")  # noqa: E731
        return jax.shard_map(body, mesh=mesh, in_specs=(jax.P("m"), jax.P(None, "m")), out_specs=jax.P())(p["w"], x)

    model = qjax.quantize(fn, p, x, recipe=rotated(block=block))
    np.testing.assert_allclose(model(model.params, x), fn(p, x), atol=0.1)
    assert any("rotation mixes 32 at a time" in note for note in model.report.notes) == cut


def test_adapters_merge_into_what_is_kept():
    """A rotated weight with a change added is rotated again."""
    from qjax.applying.low_rank import merged_leaf

    rng = np.random.default_rng(0)
    p, x = (
        {"w": jnp.asarray(rng.standard_normal((24, 8)), jnp.float32)},
        jnp.asarray(rng.standard_normal((8, 24)), jnp.float32),
    )
    delta = jnp.asarray(rng.standard_normal((24, 8)), jnp.float32)
    static = qjax.static(INT8, smooth=0.5)
    smooth = qjax.Recipe([qjax.Rule("**", weights=qjax.Int(8), inputs=static)])
    for recipe, name in ((rotated(), SIGNS), (smooth, SMOOTH)):
        batches = [x] if recipe is smooth else None
        q = qjax.quantize(product, p, x, recipe=recipe, batches=batches).params["w"]
        assert name in q.aux
        np.testing.assert_allclose(merged_leaf(q, delta).dequantize(), q.dequantize() + delta, atol=0.05)
        np.testing.assert_array_equal(merged_leaf(q, 0 * delta).codes, q.codes)


def test_a_tied_table_is_read_as_what_it_stands_for():
    rng = np.random.default_rng(0)
    p = {"table": jnp.asarray(rng.standard_normal((32, 16)), jnp.float32)}
    fn = lambda p, ids: (jnp.take(p["table"], ids, axis=0) ** 3) @ p["table"].T  # noqa: E731
    ids = jnp.asarray(rng.integers(0, 32, (4, 8)))
    recipe = qjax.Recipe(
        [qjax.Rule("**", op=op, weights=qjax.Int(8), rounding=qjax.Rotated()) for op in ("linear", "embedding")]
    )
    model = qjax.quantize(fn, p, ids, recipe=recipe)
    want = fn(p, ids)
    assert float(jnp.abs(model(model.params, ids) - want).max()) < 0.03 * float(jnp.abs(want).max())


def test_what_cannot_be_rotated():
    p, x = {"w": jnp.ones((12, 4))}, jnp.ones((2, 12))
    with pytest.raises(RecipeError, match=r"w: Rotated\(block=8\) does not divide the 12"):
        qjax.quantize(product, p, x, recipe=rotated(block=8))
    with pytest.raises(RecipeError, match="leave out smooth="):
        rotated(inputs=qjax.static(INT8, smooth=0.5))
    for bad in ({"block": 1}, {"block": True}, {"seed": 0.5}, {"inner": 3}, {"inner": qjax.Rotated()}):
        with pytest.raises(FormatError, match="Rotated: "):
            qjax.Rotated(**bad)
    with pytest.raises(FormatError, match="leave one of the two out"):
        qjax.Rotated(qjax.AWQ())
    with pytest.raises(FormatError, match="does not say what it is of rotated activations"):
        qjax.Rotated(qjax.AWQ(scale=False))
    with pytest.raises(RecipeError, match="GPTQ rounds columns one by one"):
        rotated(qjax.MXFP4(), inner=qjax.GPTQ())
    with pytest.raises(FormatError, match="fold the rotation instead"):
        qjax.Rotated(qjax.AutoRound())
    with pytest.raises(FormatError, match="takes no weight="):
        qjax.Rotated().round(jnp.ones((4, 4)), qjax.Int(8), weight=jnp.ones((4, 4)))
    with pytest.raises(FormatError, match="needs statistics"):
        qjax.Rotated(qjax.GPTQ()).round(jnp.ones((4, 4)), qjax.Int(8))
    with pytest.raises(RecipeError, match="rounds with Rotated"):
        qjax.fake_quant(product, rotated()).init(p, x)


@pytest.mark.parametrize("shape", [(0, 4), (12, 0), (1, 3)])
def test_empty_and_tiny_weights(shape):
    p, x = {"w": jnp.ones(shape)}, jnp.ones((2, shape[0]))
    model = qjax.quantize(product, p, x, recipe=rotated())
    np.testing.assert_allclose(model(model.params, x), product(p, x), atol=0.02)

"""Static inputs smoothed by constants per channel, which are kept with the weight."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from constructs import CASES, batch, params
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import qjax
from qjax.errors import LayoutError, RecipeError
from qjax.formats import SMOOTH, QArray, concatenate, is_quantized

INT8 = qjax.Int(8, per="tensor")


def smoothed(strength: float = 0.8, weights=None) -> qjax.Recipe:
    weights = weights or qjax.Int(8)
    return qjax.Recipe([qjax.Rule("**", weights=weights, inputs=qjax.static(INT8, smooth=strength))])


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 9),
    k=st.integers(1, 24),
    n=st.integers(1, 9),
    strength=st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0]),
    seed=st.integers(0, 99),
)
def test_one_product_by_the_equations(rows, k, n, strength, seed):
    """Equation 4 of SmoothQuant and rounding to nearest, in NumPy."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows, k)) * np.exp(2 * rng.standard_normal(k))).astype(np.float32)
    w = rng.standard_normal((k, n)).astype(np.float32)
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    model = qjax.quantize(fn, {"w": jnp.asarray(w)}, x, recipe=smoothed(strength), batches=[x])

    s = np.abs(x).max(0) ** strength / np.abs(w).max(1) ** (1 - strength)
    x_s, w_s = x / s, w * s[:, None]
    step_x, step_w = np.abs(x_s).max() / 127.5, np.abs(w_s).max(0) / 127.5
    codes_x, codes_w = np.clip(np.rint(x_s / step_x), -128, 127), np.clip(np.rint(w_s / step_w), -128, 127)
    want = (codes_x * step_x) @ (codes_w * step_w)
    got = np.asarray(model(model.params, x))
    # a number that lies halfway between two codes may take either
    slack = 1.01 * (step_x * np.abs(w_s).max() * (k > 0) + np.abs(x_s).max() * step_w.max())
    np.testing.assert_allclose(got, want, atol=slack)
    assert np.linalg.norm(got - want) <= 0.01 * np.linalg.norm(x @ w) + slack
    # what the weight stands for is itself, to half a step of its column
    near = np.asarray(model.params["w"].dequantize())
    assert (np.abs(near - w) <= 0.5001 * step_w / s[:, None] + 1e-7).all()


def test_channels_with_outliers_no_longer_take_the_range():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 32)).astype(np.float32)
    x[:, 3] *= 300
    w = jnp.asarray(rng.standard_normal((32, 16)), jnp.float32)
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    error = {}
    for strength in (None, 0.5, 0.8):
        rule = qjax.Rule("**", weights=qjax.Int(8), inputs=qjax.static(INT8, smooth=strength))
        model = qjax.quantize(fn, {"w": w}, x, recipe=qjax.Recipe([rule]), batches=[x])
        error[strength] = float(jnp.linalg.norm(model(model.params, x) - x @ w))
    assert error[0.5] < error[None] / 2 and error[0.8] < error[None] / 2, error


@pytest.mark.every(6)
@pytest.mark.parametrize("name", CASES)
def test_every_construct(name):
    """Smoothing changes no function by more than rounding does, and what is packed stands for the float weight."""
    fn, p, x = CASES[name], params(), batch()
    plain = qjax.Recipe([qjax.Rule("**", weights=qjax.Int(8), inputs=qjax.static(INT8))])
    if name in ("cond", "switch"):
        pytest.skip("a branch that no batch reaches has no range")
    if name == "associative_scan":
        pytest.skip("its weight is computed: no static recipe fits it")
    if name == "shard_map_psum":
        with pytest.raises(RecipeError, match="each device sees 4 of its 8 input channels"):
            qjax.quantize(fn, p, x, recipe=smoothed(), batches=[x])
        return
    models = [qjax.quantize(fn, p, x, recipe=r, batches=[x]) for r in (plain, smoothed())]
    want = jax.tree.leaves(fn(p, x))
    outs = [jax.tree.leaves(m(m.params, x)) for m in models]
    for reference, a, b in zip(want, *outs, strict=True):
        scale = float(jnp.abs(reference).max()) + 1e-6
        errors = [float(jnp.abs(v - reference).max()) / scale for v in (a, b)]
        assert errors[1] < max(0.06, 2 * errors[0]), errors
    leaves = jax.tree.leaves(models[1].params, is_leaf=is_quantized)
    for was, q in zip(jax.tree.leaves(p), leaves, strict=True):
        if isinstance(q, QArray):
            assert float(jnp.abs(q.dequantize() - was).max()) < 0.05 * float(jnp.abs(was).max())
    planned = qjax.plan(fn, p, x, recipe=smoothed())
    assert jax.tree.structure(planned.params) == jax.tree.structure(models[1].params)
    for a, b in zip(jax.tree.leaves(planned.params), jax.tree.leaves(models[1].params), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def packed() -> tuple[QArray, np.ndarray]:
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((8, 16)) * np.exp(rng.standard_normal(16))).astype(np.float32)
    w = rng.standard_normal((16, 6)).astype(np.float32)
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    model = qjax.quantize(fn, {"w": jnp.asarray(w)}, x, recipe=smoothed(weights=qjax.Int(8, group=4)), batches=[x])
    return model.params["w"], x


def test_views_carry_the_constants():
    q, _ = packed()
    near = np.asarray(q.dequantize())
    assert q.aux[SMOOTH].shape == (1, 16)
    np.testing.assert_array_equal(q.T.dequantize(), near.T)
    np.testing.assert_array_equal(q.slice_axis(0, 4, 12).dequantize(), near[4:12])
    np.testing.assert_array_equal(q.slice_axis(1, 2, 5).dequantize(), near[:, 2:5])
    np.testing.assert_array_equal(q.take(1, jnp.array([5, 0])).dequantize(), near[:, [5, 0]])
    np.testing.assert_array_equal(q.reshape(4, 4, 6).dequantize(), near.reshape(4, 4, 6))
    np.testing.assert_array_equal(q.reshape(16, 2, 3).dequantize(), near.reshape(16, 2, 3))
    with pytest.raises(LayoutError, match="smoothed by constants of its own"):
        concatenate([q, q], axis=1)


def test_a_tied_table_is_read_as_what_it_stands_for():
    """The head is smoothed; looking up rows of the same table gives the rows, not what is multiplied."""
    rng = np.random.default_rng(0)
    p = {"table": jnp.asarray(rng.standard_normal((32, 16)), jnp.float32)}
    fn = lambda p, ids: (jnp.take(p["table"], ids, axis=0) ** 3) @ p["table"].T  # noqa: E731
    ids = jnp.asarray(rng.integers(0, 32, (4, 8)))
    recipe = qjax.Recipe([qjax.Rule("**", weights=qjax.Int(8), inputs=qjax.static(INT8, smooth=0.8)),
                          qjax.Rule("**", op="embedding", weights=qjax.Int(8))])  # fmt: skip
    model = qjax.quantize(fn, p, ids, recipe=recipe, batches=[ids])
    want = fn(p, ids)
    assert float(jnp.abs(model(model.params, ids) - want).max()) < 0.03 * float(jnp.abs(want).max())
    assert not any("dequantized" in note for note in model.report.notes)


def test_sharded_saved_and_differentiated(tmp_path):
    mesh = jax.make_mesh((4,), ("m",), axis_types=(jax.sharding.AxisType.Auto,))
    q, x = packed()
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    p = {"w": jnp.asarray(np.asarray(q.dequantize()))}
    model = qjax.quantize(fn, p, x, recipe=smoothed(weights=qjax.Int(8, group=4)), batches=[x])
    want = model(model.params, x)
    specs = qjax.plan(fn, p, x, recipe=model.recipe).shardings({"w": jax.sharding.PartitionSpec("m")}, mesh)
    place = jax.tree.map(
        lambda s: jax.sharding.NamedSharding(mesh, s),
        specs,
        is_leaf=lambda s: isinstance(s, jax.sharding.PartitionSpec),
    )
    assert specs["w"].aux[SMOOTH] == jax.sharding.PartitionSpec(None, "m")
    spread = jax.device_put(model.params, place)
    np.testing.assert_allclose(model(spread, x), want, rtol=1e-5, atol=1e-4)
    qjax.save(tmp_path / "m", model)
    again = qjax.load(tmp_path / "m", fn, like=p)
    np.testing.assert_array_equal(again(again.params, x), want)
    gradient = jax.grad(lambda x: model(model.params, x).sum())(jnp.asarray(x))
    np.testing.assert_allclose(gradient, jax.grad(lambda x: fn(p, x).sum())(jnp.asarray(x)), rtol=0.1, atol=0.05)


def test_layers_of_a_scan_have_constants_of_their_own():
    rng = np.random.default_rng(0)
    p = {"s": jnp.asarray(rng.standard_normal((3, 8, 8)) / 3, jnp.float32)}
    x = jnp.asarray(rng.standard_normal((16, 8)) * np.array([50.0] + [1.0] * 7), jnp.float32)
    fn = lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w) * 3, None), x, p["s"])[0]  # noqa: E731
    model = qjax.quantize(fn, p, x, recipe=smoothed(), batches=[x])
    constants = np.asarray(model.params["s"].aux[SMOOTH])
    assert constants.shape == (3, 1, 8) and constants[0, 0, 0] > 4 * np.median(constants[0]) and constants[1].std() > 0
    want = fn(p, x)
    assert float(jnp.abs(model(model.params, x) - want).max()) < 0.1 * float(jnp.abs(want).max())


def test_convolutions_say_that_they_are_not_smoothed():
    rng = np.random.default_rng(0)
    p = {"conv": jnp.asarray(rng.standard_normal((3, 3, 4, 8)) / 6, jnp.float32)}
    image = jnp.asarray(rng.standard_normal((2, 4, 4, 4)), jnp.float32)
    fn = lambda p, x: lax.conv_general_dilated(x, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))  # noqa: E731
    model = qjax.quantize(fn, p, image, recipe=smoothed(), batches=[image])
    assert SMOOTH not in model.params["conv"].aux
    assert "not smoothed" in model.explain("conv")


def test_what_cannot_be_smoothed():
    for bad in (-0.1, 1.5, True, "much"):
        with pytest.raises(RecipeError, match="from 0 to 1"):
            smoothed(bad)
    with pytest.raises(RecipeError, match="drop one of the two"):
        qjax.Rule("**", weights=qjax.Int(8), inputs=qjax.static(INT8, qjax.MSE(), smooth=0.5))
    with pytest.raises(RecipeError, match="not for weights"):
        qjax.Rule("**", weights=qjax.static(qjax.Int(8), smooth=0.5))
    with pytest.raises(RecipeError, match="training moves scales|smooth"):
        t = qjax.fake_quant(lambda p, x: x @ p["w"], smoothed())
        t.init({"w": jnp.ones((4, 4))}, jnp.ones((2, 4)))


def test_recipes_survive_toml(tmp_path):
    recipe = smoothed(0.65)
    assert qjax.Recipe.from_dict(recipe.to_dict()).hash == recipe.hash
    assert "smooth" in str(recipe.to_dict())

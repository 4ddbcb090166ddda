"""Products with trit-planes: jit, derivatives, vmap, scans, slices, checkpoints, and shards at legal cuts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import qjax
from qjax.errors import FormatError, LayoutError
from qjax.formats import TritPlanes, quantize_array

FMT = TritPlanes(2, 16)


def fn(p, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"])[0] @ p["out"]


@pytest.fixture(scope="module")
def made():
    rng = np.random.default_rng(0)
    p = {"layers": rng.standard_normal((2, 80, 80)) / 9, "out": rng.standard_normal((80, 7))}
    p = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), p)
    x = jnp.asarray(rng.standard_normal((3, 80)), jnp.float32)
    model = qjax.quantize(fn, p, x, recipe=qjax.Recipe([qjax.Rule("**", weights=FMT, rounding=qjax.PTQTP())]))
    dense = jax.tree.map(lambda a: a.dequantize(), model.params, is_leaf=lambda a: hasattr(a, "dequantize"))
    return model, dense, x


def test_products_equal_those_with_the_dequantized_weight(made):
    model, dense, x = made
    assert model.params["layers"].bits_per_element == 3.2 + 2 * 16 / 16
    np.testing.assert_allclose(jax.jit(model)(model.params, x), fn(dense, x), rtol=1e-5, atol=1e-5)
    loss = lambda f, p: lambda x: jnp.sum(f(p, x) ** 2)  # noqa: E731
    got, want = jax.jit(jax.grad(loss(model, model.params)))(x), jax.grad(loss(fn, dense))(x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    over = jax.vmap(model, in_axes=(None, 0))(model.params, x[:, None])
    np.testing.assert_allclose(over[:, 0], fn(dense, x), rtol=1e-5, atol=1e-5)


def test_slices_and_checkpoints(made, tmp_path):
    model, dense, x = made
    q = model.params["layers"]
    np.testing.assert_array_equal(q[1].dequantize(), q.dequantize()[1])
    wide = quantize_array(jnp.tile(dense["out"].T, (1, 2)), FMT, in_axes=1)  # [7, 160]
    np.testing.assert_array_equal(wide.slice_axis(1, 80, 160).dequantize(), wide.dequantize()[:, 80:])
    for start in (16, 40):  # inside a run of five, inside a group
        with pytest.raises(LayoutError, match="starts inside"):
            wide.slice_axis(1, start, 160)
    qjax.save(tmp_path / "model", model)
    again = qjax.load(tmp_path / "model", fn)
    np.testing.assert_array_equal(again(again.params, x), model(model.params, x))


def test_shards(made):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    w, x = {"w": jnp.ones((160, 8))}, jnp.ones((4, 160))
    dot = lambda p, x: x @ p["w"]  # noqa: E731
    recipe = qjax.Recipe([qjax.Rule("**", weights=FMT)])
    plan = qjax.plan(dot, w, x, recipe=recipe)
    rows = plan.shardings({"w": P(None, "x")}, mesh=mesh)["w"]
    assert rows.codes == P("x", None) and rows.aux["scale1"] == P("x", None)
    columns = plan.shardings({"w": P("x", None)}, mesh=mesh)["w"]  # 80 elements: 16 runs of five, 5 groups
    assert columns.codes == P(None, "x") and columns.aux["scale0"] == P(None, "x")
    with pytest.raises(LayoutError, match="shards"):
        qjax.plan(dot, {"w": jnp.ones((96, 8))}, x[:, :96], recipe=recipe).shardings({"w": P("x", None)}, mesh=mesh)


def test_activations_are_refused():
    with pytest.raises((FormatError, qjax.errors.RecipeError), match="trits2|weights"):
        qjax.Recipe([qjax.Rule("**", weights=FMT, inputs=qjax.dynamic(FMT))])


@pytest.mark.slow
def test_order_on_a_language_model(root):
    """Check 8: int4, two planes, int3 in this order; three planes at int4 or better."""
    folder = root / "examples/assets/books-6m"
    net, params, _ = qjax.models.load(folder)
    ids = qjax.models.tokenizer(folder).encode((root / "examples/assets/passage.txt").read_text(encoding="utf-8"))
    tokens = np.asarray(ids[: len(ids) // 128 * 128], np.int32).reshape(-1, 128)
    kl = {}
    for fmt in (qjax.Int(4, group=128), TritPlanes(3), TritPlanes(2), qjax.Int(3, group=128)):
        keep = [qjax.Rule(match, skip=True, optional=True) for match in ("**/lm_head/**", "**/embed*/**")]
        model = qjax.quantize(net, params, tokens, recipe=qjax.Recipe([*keep, qjax.Rule("**", weights=fmt)]))
        kl[fmt.name] = qjax.evaluate.divergence(net, params, model, model.params, tokens, show=False).kl
    assert kl["int4 g128"] < kl["trits2 g128"] < kl["int3 g128"], kl
    assert kl["trits3 g128"] < 1.2 * kl["int4 g128"], kl


def test_the_report_says_what_the_weights_lost():
    w = jnp.asarray(np.random.default_rng(0).standard_normal((256, 64)), jnp.float32)
    recipe = qjax.Recipe([qjax.Rule("**", weights=TritPlanes(group=64))])
    model = qjax.quantize(lambda p, x: x @ p["w"], {"w": w}, jnp.ones((2, 256)), recipe=recipe)
    near = np.asarray(model.params["w"].dequantize(), np.float64)
    want = 10 * np.log10(np.sum(np.square(w, dtype=np.float64)) / np.sum((np.asarray(w, np.float64) - near) ** 2))
    assert abs(model.report.quantized[0].sqnr_db - want) < 0.01

"""Spellings that a newcomer tries first: what is stored, and that it computes what its dequantized weights do."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax.formats import is_quantized
from qjax.recipe import Recipe, Rule

INT8 = Recipe([Rule("**", weights=qjax.Int(8))])
D, E, F = 8, 4, 16


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) * 0.3


def stored(tree):
    """Names of the quantized leaves."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_quantized)[0]
    return {jax.tree_util.keystr(p, simple=True, separator="/") for p, x in leaves if is_quantized(x)}


def agrees(fn, params, *args, recipe=INT8, others=()):
    """Quantize, compare with the dequantized float model at several batch sizes, and return the model."""
    model = qjax.quantize(fn, params, *args, recipe=recipe)
    plain = jax.tree.map(lambda q: q.dequantize() if is_quantized(q) else q, model.params, is_leaf=is_quantized)
    for a in (args, *others):
        want, got = jax.jit(fn)(plain, *a), model(model.params, *a)
        jax.tree.map(lambda w, g: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5), want, got)
    return model


# ------------------------------------------------------------------------------------------- mixture of experts
MOE = {"router": normal(1, D, E), "up": normal(2, E, D, F), "down": normal(3, E, F, D)}


def two_experts(p, x, last):
    gate, chosen = lax.top_k(jax.nn.softmax(x @ p["router"]), 2)
    h = jax.nn.silu(jnp.einsum("td,tkdf->tkf", x, p["up"][chosen])) * gate[..., None]
    return jnp.einsum(last, h, p["down"][chosen])


@pytest.mark.parametrize("last", ["tkf,tkfd->tkd", "tkf,tkfd->td"])
def test_the_two_experts_of_each_token(last):
    model = agrees(lambda p, x: two_experts(p, x, last), MOE, normal(0, 6, D), others=[(normal(4, 3, D),)])
    assert stored(model.params) == {"router", "up", "down"}


def test_a_mix_of_whole_experts_is_reported():
    def fn(p, x):
        gate, chosen = lax.top_k(x @ p["router"], 2)
        return jnp.einsum("td,tdf->tf", x, jnp.einsum("tk,tkdf->tdf", gate, p["up"][chosen]))

    model = qjax.quantize(fn, MOE, normal(0, 6, D), recipe="W8A16")
    assert stored(model.params) == set()
    assert "mixes whole matrices" in model.explain("up") and "skipped by rule" in model.explain("router")


# ------------------------------------------------------------------------------------------- stacks
def test_a_jitted_lookup_of_layers_with_several_formats():
    params = {"layers": {"up": normal(1, D, 3, F), "down": normal(2, F, 3, D)}}  # stacked along axis 1

    def fn(p, x):
        def layer(i, x):
            up, down = (lax.dynamic_index_in_dim(p["layers"][k], i, 1, False) for k in ("up", "down"))
            return x + jax.nn.silu(x @ up) @ down

        return lax.fori_loop(0, 3, layer, x)

    rules = [Rule("layers/1/**", skip=True), Rule("layers/0/up", weights=qjax.Int(3, group=8)), *INT8.rules]
    model = agrees(fn, params, normal(0, 5, D), recipe=Recipe(rules))
    assert stored(model.params) == {"layers/up", "layers/down"}


# ------------------------------------------------------------------------------------------- explicit sharding
@pytest.fixture
def mesh():
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        yield mesh


def split_by_mesh(mesh):
    specs = {"up": P(None, "model"), "down": P("model", None)}
    params = {"up": normal(1, D, F), "down": normal(2, F, D)}
    put = {k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in params.items()}
    return specs, put, jax.device_put(normal(0, 4, D), NamedSharding(mesh, P("data")))


def test_a_sum_over_a_sharded_axis_goes_where_out_sharding_says(mesh):
    _, params, x = split_by_mesh(mesh)

    def fn(p, x):
        h = jnp.einsum("bd,df->bf", x, p["up"], out_sharding=P("data", "model"))
        return jnp.einsum("bf,fd->bd", h, p["down"], out_sharding=P("data", None))

    model = agrees(fn, params, x)
    assert jax.typeof(model(model.params, x)) == jax.typeof(fn(params, x))
    assert stored(model.params) == {"up", "down"}


def test_shard_map_over_explicit_axes(mesh):
    specs, params, x = split_by_mesh(mesh)

    @jax.shard_map(in_specs=(specs, P("data")), out_specs=P("data"))
    def fn(p, x):
        return lax.psum(jnp.tanh(x @ p["up"]) @ p["down"], "model")

    assert stored(agrees(fn, params, x).params) == {"up", "down"}


# ------------------------------------------------------------------------------------------- modules
def test_a_call_of_an_nnx_function_leaves_its_parameters_alone():
    net = nnx.Sequential(nnx.Linear(D, D, rngs=nnx.Rngs(0)), nnx.BatchNorm(D, rngs=nnx.Rngs(0)))
    net.layers.append(nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    fn, params = qjax.from_nnx(net)
    before = jax.tree.map(lambda a: a + 0 if jnp.issubdtype(a.dtype, jnp.number) else a, params)
    first, second = fn(params, normal(0, 5, D)), fn(params, normal(0, 5, D))
    np.testing.assert_array_equal(first, second)
    for want, got in zip(jax.tree.leaves(before), jax.tree.leaves(params), strict=True):
        assert (want == got).all()


# ------------------------------------------------------------------------------------------- formats
@pytest.mark.parametrize("fmt", [qjax.MXFP4(), qjax.NVFP4()], ids=str)
def test_a_short_row_is_a_short_block(fmt):
    agrees(lambda p, x: x @ p["w"], {"w": normal(1, D, D)}, normal(0, 5, D), recipe=Recipe([Rule("**", weights=fmt)]))


# ------------------------------------------------------------------------------------------- errors
def test_a_rule_that_finds_only_computed_weights_says_so():
    with pytest.raises(qjax.errors.RecipeError, match="the weight is computed from w: store the computed weight"):
        qjax.quantize(lambda p, x: x @ (p["w"] * 2), {"w": normal(1, D, D)}, normal(0, 5, D), recipe=INT8)


# ------------------------------------------------------------------------------------------- reports
def test_leaves_named_by_one_letter_do_not_disturb_the_words_of_a_report():
    rules = [Rule("e", skip=True), Rule("**", weights=qjax.Int(4, group=128), clamp_group=True)]
    params = {"a": normal(1, D, D), "e": normal(2, D, D)}
    model = qjax.quantize(lambda p, x: x @ p["a"] @ p["e"], params, normal(0, 5, D), recipe=Recipe(rules))
    text = " ".join(str(model.report).split())
    assert "skipped by rule 0 ('e')" in text and "one group: the axis has 8 elements" in text

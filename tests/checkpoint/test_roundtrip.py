"""What is saved comes back: bits, structure, dtypes, shardings, recipe and report."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from saved_models import X, apply, make_params, same

import qjax
from qjax.checkpoint import read_metadata
from qjax.errors import CheckpointError
from qjax.formats import quantize_array, stack_slices
from qjax.recipe import Recipe, Rule
from qjax.report import Report
from qjax.transforms import Model, Rewritten

RECIPE = Recipe([Rule("**", weights=qjax.Int(8), optional=True)], name="mine")


def model_of(params, fn=apply, recipe=RECIPE, **options) -> Model:
    """A model of these parameters as they are, quantized or not."""
    return Model(fn, params, recipe, Report(model="made", stored_bytes=1), Rewritten(fn, recipe, **options))


def weights(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def round_trip(tmp_path, params, **kwargs):
    qjax.save(tmp_path / "m", model_of(params))
    return qjax.load(tmp_path / "m", apply, **kwargs).params


# -- A model -----------------------------------------------------------------------------------------------------------


def test_a_loaded_model_is_the_saved_one(models, saved):
    like = jax.eval_shape(lambda: make_params())
    for loaded in (qjax.load(saved, apply, like=like), qjax.load(saved, apply, make_params()), qjax.load(saved, apply)):
        same(loaded.params, models[0].params)
        assert loaded.recipe == models[0].recipe and loaded.report == models[0].report
        assert jnp.array_equal(loaded(loaded.params, X), models[0](models[0].params, X))
        assert loaded.explain("layers/0/w") == models[0].explain("layers/0/w")
    assert not jax.tree.leaves(loaded.params)[0].committed  # free to meet arrays of any device, as before


@pytest.mark.slow
def test_every_preset(tmp_path):
    recipes = [qjax.recipe(name) for name in qjax.recipes()]
    params = {r.name: quantize_array(weights(8, 32), r.rules[-1].weights.clamped(32), in_axes=1) for r in recipes}
    for recipe in recipes:  # every recipe, and the formats of all of them
        qjax.save(tmp_path / "m", model_of(params, recipe=recipe))
        assert qjax.load(tmp_path / "m", apply).recipe == recipe
    assert len({leaf.fmt for leaf in params.values()}) > 5
    same(qjax.load(tmp_path / "m", apply).params, params)


def test_options_come_back(tmp_path):
    qjax.save(tmp_path / "m", model_of({"w": weights(4, 4)}, max_runs=7, implementation="dequantize"))
    rewritten = qjax.load(tmp_path / "m", apply).rewritten
    assert (rewritten.max_runs, rewritten.implementation) == (7, "dequantize")
    assert rewritten.recipe == RECIPE


def test_metadata(models, tmp_path):
    source = tmp_path / "source"
    (source / ".git").mkdir(parents=True)
    (source / "config.json").write_text("{}")
    (source / ".git" / "index").write_text("not of interest")
    qjax.save(tmp_path / "m", models[0], source=source)
    data = read_metadata(tmp_path / "m")
    assert data["qjax"] == qjax.__version__ and data["jax"] == jax.__version__ and data["format"] == 1
    assert data["recipe"]["hash"] == models[0].recipe.hash and data["created"].endswith("+00:00")
    assert list(data["source"]["files"]) == ["config.json"] and len(data["source"]["sha256"]) == 64
    assert data["report"]["model"] == "tiny 1"
    first = data["leaves"][0]
    assert (first["name"], first["shape"], first["dtype"]) == ("layers/0/b", [16], "float32")
    assert data["leaves"][1]["stored"]["format"]["bits"] == 8
    json.dumps(data, allow_nan=False)
    with pytest.raises(CheckpointError, match="no file or folder"):
        qjax.save(tmp_path / "m", models[0], source=tmp_path / "nowhere")


# -- Leaves ------------------------------------------------------------------------------------------------------------

DTYPES = (
    "bool int8 int32 uint8 uint16 int4 uint4 int2 float16 bfloat16 float32 complex64 "
    "float8_e4m3fn float8_e5m2 float8_e8m0fnu float4_e2m1fn"
).split()


def test_dtypes_scalars_and_empty_arrays(tmp_path):
    params = {}
    for dtype in DTYPES:
        ones = np.ones((2, 3), jnp.dtype(dtype))
        params[dtype] = {"matrix": ones, "scalar": ones[0, 0], "empty": ones[:0]}
    loaded = round_trip(tmp_path, params)
    same(loaded, params)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(loaded))


def test_only_empty_arrays(tmp_path):
    params = {"a": jnp.zeros((0, 3)), "b": jnp.zeros((2, 0), jnp.int8)}
    same(round_trip(tmp_path, params), params)
    same(round_trip(tmp_path, {}), {})


def test_64_bits_are_kept(tmp_path):
    params = {
        "i": np.array([2**40, -1]),
        "f": np.array([1 + 2**-40]),
        "n": np.float32(3),
        "be": np.arange(3, dtype=">i4"),
    }
    loaded = round_trip(tmp_path, params)
    assert loaded["i"].dtype == np.int64 and loaded["f"].dtype == np.float64 and isinstance(loaded["f"], np.ndarray)
    assert loaded["i"][0] == 2**40 and loaded["f"][0] == 1 + 2**-40
    assert loaded["n"].shape == () and loaded["be"].tolist() == [0, 1, 2]


def test_prng_keys(tmp_path):
    params = {"key": jax.random.key(3), "keys": jax.random.split(jax.random.key(1, impl="rbg"), 2), "w": weights(2, 2)}
    like = jax.eval_shape(lambda: params)
    for loaded in (round_trip(tmp_path, params), round_trip(tmp_path, params, like=like)):
        same(loaded, jax.tree.map(jnp.asarray, params))
        assert jax.random.key_impl(loaded["keys"]) == "rbg"
    with pytest.raises(CheckpointError, match=r"keys is key<rbg>\[2\] in the checkpoint and key<fry>\[2\] in like"):
        qjax.load(tmp_path / "m", apply, like={**like, "keys": jax.random.split(jax.random.key(1), 2)})


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_layouts(tmp_path, bits):
    w = weights(3, 5, 7, 11)
    params = {
        "conv": quantize_array(w, qjax.Int(bits, symmetric=False), in_axes=(0, 1, 2)),
        "stack": quantize_array(w, qjax.Int(bits, group=3), in_axes=1, stack_axes=(0, 2)).transpose(2, 0, 1, 3),
        "bf16": quantize_array(w.astype(ml_dtypes.bfloat16), qjax.Int(bits, per="tensor"), in_axes=3),
    }
    loaded = round_trip(tmp_path, params)
    same(loaded, params)
    assert loaded["stack"].layout == params["stack"].layout and loaded["bf16"].dtype == jnp.bfloat16


def test_stacks_of_several_formats(tmp_path):
    w = weights(4, 32, 8)
    formats = (qjax.Int(4, group=8), None, qjax.NVFP4(), qjax.Int(4, group=8))
    mixed = stack_slices([w[i] if f is None else quantize_array(w[i], f, in_axes=0) for i, f in enumerate(formats)])
    loaded = round_trip(tmp_path, {"w": mixed}, like={"w": jax.ShapeDtypeStruct((4, 32, 8), jnp.float32)})
    same(loaded, {"w": mixed})
    assert loaded["w"].assign == mixed.assign and loaded["w"].runs()[0][:2] == (0, 1)


def test_leaves_that_cannot_be_saved(tmp_path):
    deleted = jnp.ones(3) + 0
    deleted.delete()
    for leaf, says in (
        (deleted, "deleted or donated"),
        (jax.ShapeDtypeStruct((2,), jnp.float32), "ShapeDtypeStruct without numbers"),
        (np.array(["a"]), "dtype str"),
        (np.array([object()]), "dtype object"),
        (np.array(["2020"], "datetime64[Y]"), "parameters are numbers"),
    ):
        with pytest.raises(CheckpointError, match=f"layers/bad.*{says}"):
            qjax.save(tmp_path / "m", model_of({"layers": {"bad": leaf}}))
    with pytest.raises(CheckpointError, match="outside jit"):
        jax.jit(lambda w: qjax.save(tmp_path / "m", model_of({"w": w})))(jnp.ones(3))
    assert not (tmp_path / "m").exists()


def test_awkward_names(tmp_path):
    params = {
        "a/b": weights(2),
        "a": {"b": weights(3), "": weights(1)},
        "..": weights(2),
        "ü λ" * 90: weights(1),
        "x.codes": weights(4),
        "x": quantize_array(weights(4, 4), qjax.Int(8), in_axes=0),
        7: weights(2),
    }
    params = {"str": {k: v for k, v in params.items() if k != 7}, "int": {7: params[7], 10: weights(2)}}
    same(round_trip(tmp_path, params), jax.tree.map(jnp.asarray, params))
    same(round_trip(tmp_path, params, like=params), jax.tree.map(jnp.asarray, params))


# -- Trees -------------------------------------------------------------------------------------------------------------


def test_plain_containers_and_static_leaves_come_back_without_like(tmp_path):
    params = {"list": [weights(2), (weights(1), None)], "act": "gelu", "eps": 1e-6, "n": 3, "on": True, "none": None}
    same(
        round_trip(tmp_path, params), jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, params)
    )
    bare = round_trip(tmp_path, weights(3))
    assert isinstance(bare, jax.Array)


def test_other_containers_come_back_as_nested_dicts(tmp_path):
    params = {"layers": [{"w": jnp.ones(2), "act": jax.nn.relu}], "norm": jnp.ones(1)}
    loaded = round_trip(tmp_path, params)
    same(loaded, {"layers": {"0": {"w": jnp.ones(2)}}, "norm": jnp.ones(1)})
    with pytest.raises(CheckpointError, match="pass the float parameter tree as like="):
        round_trip(tmp_path, {"a/b": jnp.ones(1), "a": {"b": {"c": jnp.ones(1)}}, "f": jax.nn.relu})


def test_nnx_state(tmp_path):
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(16, 16, rngs=rngs) for _ in range(2)])
            self.norm = nnx.BatchNorm(16, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs, deterministic=True)

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return self.drop(self.norm(x, use_running_average=True))

    fn, params = qjax.from_nnx(Net(nnx.Rngs(0)))
    model = qjax.quantize(fn, params, X, recipe="W8A16")
    qjax.save(tmp_path / "m", model)
    abstract = nnx.split(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))[1]
    loaded = qjax.load(tmp_path / "m", fn, like=abstract)
    same(loaded.params, model.params)
    assert jnp.array_equal(loaded(loaded.params, X), model(model.params, X))
    by_name = qjax.load(tmp_path / "m", fn).params
    assert by_name["layers"]["0"]["kernel"].shape == (16, 16)


def test_equinox_module(tmp_path):
    eqx = pytest.importorskip("equinox")
    net = eqx.nn.MLP(16, 4, 8, 1, activation=jax.nn.gelu, key=jax.random.key(0))
    fn, params = qjax.from_equinox(net)
    model = qjax.quantize(fn, params, X[0], recipe="W8A16")
    qjax.save(tmp_path / "m", model)
    abstract = eqx.filter_eval_shape(eqx.nn.MLP, 16, 4, 8, 1, activation=jax.nn.gelu, key=jax.random.key(0))
    loaded = qjax.load(tmp_path / "m", fn, like=abstract)
    same(loaded.params, model.params)
    assert jnp.array_equal(loaded(loaded.params, X[0]), model(model.params, X[0]))


# -- Shardings ---------------------------------------------------------------------------------------------------------

P = jax.sharding.PartitionSpec


@pytest.fixture(scope="module")
def mesh():
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    return jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))


def test_sharded(tmp_path, mesh):
    def fn(p, x):
        return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]

    params = {"w": weights(32, 16), "b": weights(16), "v": weights(16, 8)}
    specs = {"w": P(None, "d"), "b": P("d"), "v": None}
    named = {k: jax.sharding.NamedSharding(mesh, s) if s is not None else None for k, s in specs.items()}
    x = np.ones((2, 32), np.float32)
    model = qjax.quantize(fn, params, x, recipe="W4A16")
    shardings = qjax.plan(fn, params, x, recipe="W4A16").shardings(named)
    place = lambda v, s: v if s is None else jax.device_put(v, s)  # noqa: E731
    placed = {"w": place(model.params["w"], shardings["w"]), "b": place(model.params["b"], named["b"])}
    qjax.save(tmp_path / "m", dataclasses.replace(model, params={**model.params, **placed}))

    for given in (shardings, named):  # of the quantized tree, or of the float tree
        loaded = qjax.load(tmp_path / "m", fn, params, shardings=given)
        same(loaded.params, model.params)
        assert loaded.params["w"].codes.sharding == placed["w"].codes.sharding
        assert loaded.params["w"].codes.sharding.num_devices == 8 and loaded.params["b"].sharding == named["b"]
        assert jnp.allclose(loaded(loaded.params, x), model(model.params, x), atol=1e-5)
    alone = qjax.load(tmp_path / "m", fn, params)
    same(alone.params, model.params)
    assert alone.params["w"].codes.sharding.num_devices == 1
    everywhere = qjax.load(tmp_path / "m", fn, shardings=jax.sharding.NamedSharding(mesh, P()))
    assert all(a.sharding.num_devices == 8 for a in jax.tree.leaves(everywhere.params))


def test_sharded_stacks_keys_and_empty_arrays(tmp_path, mesh):
    w = weights(2, 32, 16)
    mixed = stack_slices([quantize_array(w[0], qjax.Int(4), in_axes=0), w[1]])
    params = {
        "w": mixed,
        "keys": jax.random.split(jax.random.key(0), 8),
        "none": jnp.zeros((0, 8)),
        "n": jnp.ones((2,), jnp.int4),
    }
    named = jax.sharding.NamedSharding(mesh, P())
    shardings = {
        "w": jax.sharding.NamedSharding(mesh, P(None, None, "d")),
        "keys": jax.sharding.NamedSharding(mesh, P("d")),
        "n": named,
    }
    loaded = round_trip(tmp_path, params, shardings=shardings)
    same(loaded, jax.tree.map(jnp.asarray, params))
    assert (
        loaded["w"].parts[1].sharding.spec == P(None, None, "d")
        and loaded["w"].parts[0].codes.sharding.num_devices == 8
    )
    assert loaded["keys"].sharding.num_devices == 8 and loaded["n"].sharding == named


def test_shardings_that_do_not_fit(tmp_path, mesh):
    qjax.save(
        tmp_path / "m", model_of({"w": quantize_array(weights(16, 12), qjax.Int(8), in_axes=0), "b": weights(12)})
    )
    on = lambda *spec: jax.sharding.NamedSharding(mesh, P(*spec))  # noqa: E731
    for given, says in (
        ({"w": on(None, "d")}, "w cannot be restored so"),
        ({"b": on("d")}, "b cannot be restored so"),
        ({"b": P("d")}, "build NamedSharding"),
        ({"b": on(None, "d")}, "b cannot be restored so"),
        ({"c": on()}, "leaves that the checkpoint lacks: c"),
    ):
        with pytest.raises(CheckpointError, match=says):
            qjax.load(tmp_path / "m", apply, shardings=given)

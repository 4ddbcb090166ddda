"""Models of every library, quantized whole: Flax NNX and Linen, Equinox, mixtures of experts, convolutions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from qjax.errors import TraceError
from qjax.formats import QArray, is_quantized

W8 = qjax.Recipe(
    [
        qjax.Rule("**", weights=qjax.Int(8), optional=True),
        qjax.Rule("**", op="embedding", weights=qjax.Int(8), optional=True),
    ]
)
W8A8 = qjax.Recipe([qjax.Rule("**", weights=qjax.Int(8), inputs=qjax.dynamic(qjax.Int(8, per="token")))])


def dequantized(tree):
    return jax.tree.map(lambda q: q.dequantize() if is_quantized(q) else q, tree, is_leaf=is_quantized)


def check(fn, params, *args, recipe=W8, tolerance=2e-5):
    """Quantize, compare with the dequantized float model, and return the model."""
    model = qjax.quantize(fn, params, *args, recipe=recipe)
    want, got = fn(dequantized(model.params), *args), model(model.params, *args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), want, got)
    assert not [n for n in model.report.notes if "dequantized" in n], model.report.notes
    return model


def rows(model):
    return {r.name: r for r in model.report.rows}


X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 16)), jnp.float32)


def test_linen_scan_over_remat_blocks():
    import flax.linen as nn

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            x = x + nn.MultiHeadDotProductAttention(2, name="attn")(nn.LayerNorm(name="norm")(x))
            return x + nn.Dense(16, name="down")(nn.gelu(nn.Dense(32, name="up")(x))), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return nn.Dense(4, name="head")(scan(name="layers")(x, None)[0])

    net = Net()
    fn, params = qjax.from_linen(net, net.init(jax.random.key(0), X))
    model = check(fn, params, X)
    names = {r.name for r in model.report.quantized}
    assert names == {"params/head/kernel"} | {
        f"params/layers/{i}/{n}/kernel"
        for i in range(3)
        for n in ("attn/query", "attn/key", "attn/value", "attn/out", "up", "down")
    }
    assert {"params/layers/1/attn/attention", "params/layers/2/norm/layer_norm"} <= {r.name for r in model.report.left}
    kernel = model.params["params"]["layers"]["attn"]["query"]["kernel"]
    assert kernel.shape == (3, 16, 2, 8) and kernel.nbytes == 3 * 16 * 16 + 3 * 16 * 4


def test_linen_batch_statistics_are_returned():
    import flax.linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool):
            x = nn.Conv(8, (3, 3), name="conv")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, name="bn")(x))
            x = nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x)
            return nn.Dense(4, name="head")(x.mean((1, 2)))

    net = Net()
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 3)), jnp.float32)
    variables = net.init(jax.random.key(0), x, train=False)
    fn, params = qjax.from_linen(net, variables, mutable=["batch_stats"])
    model = qjax.quantize(fn, params, x, train=True, recipe=W8)
    out, changed = model(model.params, x, train=True)
    want, expected = fn(dequantized(model.params), x, train=True)
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), changed, expected)
    found = rows(model)
    assert found["params/conv/kernel"].op == "conv" and found["params/depthwise/kernel"].format == "int8 per channel"
    assert isinstance(model.params["params"]["depthwise"]["kernel"], QArray)


def test_nnx_modules_in_a_list():
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(10, 16, rngs=rngs)
            self.blocks = nnx.List([nnx.Linear(16, 16, rngs=rngs) for _ in range(2)])
            self.norm = nnx.RMSNorm(16, rngs=rngs)

        def __call__(self, tokens):
            x = self.embed(tokens)
            for block in self.blocks:
                x = self.norm(jax.nn.silu(block(x)))
            return self.embed.attend(x)

    fn, params = qjax.from_nnx(Net(nnx.Rngs(0)))
    tokens = jnp.ones((2, 3), jnp.int32)
    model = check(fn, params, tokens)
    found = rows(model)
    assert {"embed/embedding", "blocks/0/kernel", "blocks/1/kernel", "embed/embedding#1"} <= set(found)
    assert found["embed/embedding"].bytes_after and not found["embed/embedding#1"].bytes_after  # counted once


def test_nnx_scan_over_layers():
    from flax import nnx

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(rngs):
        return nnx.Linear(16, 16, rngs=rngs)

    graph, params = nnx.split(make(nnx.Rngs(0)))

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x, layer):
        return nnx.relu(layer(x))

    fn = lambda params, x: forward(x, nnx.merge(graph, params))  # noqa: E731
    model = check(fn, params, X)
    assert {r.name for r in model.report.quantized} == {"0/kernel", "1/kernel", "2/kernel"}


@pytest.mark.slow
def test_equinox_module_with_static_leaves():
    eqx = pytest.importorskip("equinox")
    mlp = eqx.nn.MLP(16, 4, 32, depth=2, activation=jax.nn.gelu, key=jax.random.key(0))
    fn, params = qjax.from_equinox(mlp)
    model = check(fn, params, X[0, 0])
    assert [r.name for r in model.report.quantized] == [f"layers/{i}/weight" for i in range(3)]
    batched = jax.vmap(model, in_axes=(None, 0))(model.params, X[0])
    np.testing.assert_allclose(
        batched, jax.vmap(fn, in_axes=(None, 0))(dequantized(model.params), X[0]), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("recipe", [W8, W8A8], ids=["w8", "w8a8"])
def test_mixture_of_experts_by_einsum(recipe):
    rng = np.random.default_rng(0)
    params = {
        "experts": {"up": rng.standard_normal((4, 16, 32)), "down": rng.standard_normal((4, 32, 16))},
        "router": rng.standard_normal((16, 4)),
    }
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)

    def fn(p, x):
        gates = jax.nn.softmax(x @ p["router"])
        hidden = jax.nn.silu(jnp.einsum("btd,edf->ebtf", x, p["experts"]["up"]))
        return jnp.einsum("ebtf,efd,bte->btd", hidden, p["experts"]["down"], gates)

    model = qjax.quantize(fn, params, X, recipe=recipe)
    want = fn(dequantized(model.params), X)
    scale = float(jnp.abs(want).max())
    np.testing.assert_allclose(model(model.params, X) / scale, want / scale, atol=2e-5 if recipe is W8 else 3e-2)
    assert isinstance(model.params["experts"]["up"], QArray)


def test_mixture_of_experts_by_ragged_dot():
    rng = np.random.default_rng(0)
    params = {"up": jnp.asarray(rng.standard_normal((3, 16, 8)), jnp.float32)}
    fn = lambda p, x, sizes: lax.ragged_dot(x, p["up"], sizes)  # noqa: E731
    args = X.reshape(10, 16), jnp.asarray([3, 0, 7], jnp.int32)
    model = check(fn, params, *args)
    assert rows(model)["up"].op == "ragged_dot" and model.params["up"].nbytes == 3 * 16 * 8 + 3 * 8 * 4
    quantized = qjax.quantize(fn, params, *args, recipe=W8A8)
    want = fn(params, *args)
    assert float(jnp.abs(quantized(quantized.params, *args) - want).max() / jnp.abs(want).max()) < 0.03


@pytest.mark.every(3)
@pytest.mark.parametrize("recipe", [W8, W8A8], ids=["w8", "w8a8"])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_convolutions(groups, recipe):
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.standard_normal((3, 3, 8 // groups, 16)), jnp.float32)}
    x = jnp.asarray(rng.standard_normal((2, 9, 9, 8)), jnp.float32)

    def fn(p, x):
        return lax.conv_general_dilated(
            x,
            p["kernel"],
            (2, 1),
            "SAME",
            rhs_dilation=(1, 2),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    if recipe is W8A8:
        recipe = qjax.Recipe([qjax.Rule("**", weights=qjax.Int(8), inputs=qjax.Int(8, per="tensor"))])
    model = qjax.quantize(fn, params, x, recipe=recipe)
    want = fn(dequantized(model.params), x)
    scale = float(jnp.abs(want).max())
    np.testing.assert_allclose(model(model.params, x) / scale, want / scale, atol=1e-5 if recipe is W8 else 3e-2)
    assert model.params["kernel"].nbytes == params["kernel"].size + 16 * 4


def test_4_bit_convolutions_group_over_flattened_pixels_and_channels():
    params = {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal((3, 3, 6, 4)), jnp.float32)}
    x = jnp.ones((1, 5, 5, 6))
    fn = lambda p, x: lax.conv_general_dilated(  # noqa: E731
        x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )  # noqa: E731
    model = check(fn, params, x, recipe=qjax.Recipe([qjax.Rule("**", weights=qjax.Int(4, group=32))]))
    assert model.params["kernel"].nbytes == 4 * (54 // 2) + 4 * 2 * 4  # 54 numbers a channel, groups of 32 and 22


def test_adapters_refuse_what_is_no_module():
    for adapter in (qjax.from_nnx, qjax.from_linen, qjax.from_equinox):
        with pytest.raises(TraceError, match="needs a"):
            adapter({"w": 1})

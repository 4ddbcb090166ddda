"""The same numbers as Qwix 0.1.8: codes and scales bit for bit, outputs to the order of summation.

The models are of the kinds that Qwix shows itself on: an image network and a small transformer, in Linen and in NNX.
Every scheme is one Qwix rule and one qjax rule. What differs by design is pinned at the end of the file:

- a kernel with two contracted axes (attention's output projection): Qwix tiles the last one and shares its scales
  over the others, qjax groups over all of them, so its scales are finer;
- bfloat16 weights: Qwix computes scales in bfloat16, qjax in float32;
- blocks of numbers below 1e-17: Qwix stores zeros, qjax stores the numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.formats import QArray, is_quantized, quantize_array

qwix = pytest.importorskip("qwix", reason="Qwix is not installed; it comes with qjax[test] on Python 3.11")
WithAux = pytest.importorskip("qwix._src.providers.ptq").WithAux

pytestmark = [
    pytest.mark.skipif(
        importlib.metadata.version("qwix") != "0.1.8",
        reason="parity is pinned to Qwix 0.1.8; another version is installed",
    ),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:flax", "ignore:'VariableState' was removed"),
]

# ------------------------------------------------------------------------------------------------ models

WIDTH, HEADS, TILE, VOCAB = 64, 2, 32, 50


class LinenCNN(nn.Module):
    @nn.compact
    def __call__(self, x):  # [B, 8, 8, 3]
        x = nn.avg_pool(nn.relu(nn.Conv(16, (3, 3), name="conv1")(x)), (2, 2), strides=(2, 2))
        x = nn.avg_pool(nn.relu(nn.Conv(32, (3, 3), name="conv2")(x)), (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(64, name="dense1")(x.reshape(x.shape[0], -1)))
        return nn.Dense(10, name="dense2")(x)


class NnxCNN(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(3, 16, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), strides=(2, 2), rngs=rngs)
        self.dense1 = nnx.Linear(512, 64, rngs=rngs)
        self.dense2 = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):  # [B, 8, 8, 3]
        x = nnx.relu(self.conv2(nnx.relu(self.conv1(x))))
        return self.dense2(nnx.relu(self.dense1(x.reshape(x.shape[0], -1))))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(name="norm1")(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS, name="attn")(y, y)
        y = nn.Dense(4 * WIDTH, name="up")(nn.LayerNorm(name="norm2")(x))
        return x + nn.Dense(WIDTH, name="down")(nn.gelu(y))


class LinenTransformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):  # [B, T]
        x = nn.Embed(VOCAB, WIDTH, name="embed")(tokens)
        for i in range(2):
            x = LinenBlock(name=f"block{i}")(x)
        return nn.Dense(VOCAB, use_bias=False, name="head")(nn.LayerNorm(name="norm")(x))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm1 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class NnxTransformer(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCAB, use_bias=False, rngs=rngs)

    def __call__(self, tokens):  # [B, T]
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def images():
    return jax.random.normal(jax.random.key(0), (2, 8, 8, 3))


def tokens():
    return jax.random.randint(jax.random.key(0), (2, 7), 0, VOCAB)


MODELS = {
    "linen cnn": (LinenCNN, images),
    "nnx cnn": (NnxCNN, images),
    "linen transformer": (LinenTransformer, tokens),
    "nnx transformer": (NnxTransformer, tokens),
}

# ------------------------------------------------------------------------------------------------ schemes


@dataclasses.dataclass(frozen=True)
class Scheme:
    """One scheme in the words of both.

    Attributes:
        qtype, act, tile: of the Qwix rule.
        weights, inputs: of the qjax rule.
        ops: what both quantize; Qwix has no weight-only convolutions, and attention's einsums stay float.
        coarse: kernels that are stored per channel instead: where Qwix's tiles are not qjax's groups.
    """

    qtype: object
    weights: object
    act: object = None
    inputs: object = None
    tile: int | None = None
    ops: tuple[str, ...] = ("dot",)
    coarse: bool = False


SCHEMES = {
    "int8": Scheme(jnp.int8, qjax.Int(8)),
    "int4": Scheme(jnp.int4, qjax.Int(4)),
    "int4 tiled": Scheme(jnp.int4, qjax.Int(4, group=TILE), tile=TILE, coarse=True),
    "int8 dynamic int8": Scheme(
        jnp.int8, qjax.Int(8), jnp.int8, qjax.dynamic(qjax.Int(8, per="token")), ops=("dot", "conv")
    ),
}
QWIX_OPS = {"dot": "dot_general", "conv": "conv_general_dilated"}


def qwix_rules(scheme):
    ops = [QWIX_OPS[op] for op in scheme.ops]
    whole = dict(op_names=ops, weight_qtype=scheme.qtype, act_qtype=scheme.act)
    coarse = [qwix.QuantizationRule(module_path=".*attn/out", **whole)] if scheme.coarse else []
    return qwix.PtqProvider([*coarse, qwix.QuantizationRule(module_path=".*", tile_size=scheme.tile, **whole)])


def qjax_recipe(scheme):
    per_channel = qjax.Int(scheme.weights.bits)
    coarse = qjax.Rule("**/attn/out/**", weights=per_channel, optional=True)
    rule = qjax.Rule("**", op=scheme.ops, weights=scheme.weights, inputs=scheme.inputs)
    return qjax.Recipe([coarse, rule] if scheme.coarse else [rule])


# ------------------------------------------------------------------------------------------------ both


@functools.cache
def float_model(name):
    """The function, its parameters, the module (and Linen's variables), and an input."""
    make, inputs = MODELS[name]
    x = inputs()
    if issubclass(make, nn.Module):
        module = make()
        variables = module.init(jax.random.key(1), x)
        return *qjax.from_linen(module, variables), module, variables, x
    module = make(nnx.Rngs(1))
    return *qjax.from_nnx(module), module, None, x


def by_qwix(name, provider, inputs=None):
    """Quantized kernels by path, and the output of the quantized model."""
    _, _, module, variables, x = float_model(name)
    x = x if inputs is None else inputs
    if variables is None:
        model = qwix.quantize_model(module, provider, x)
        kernels = {
            "/".join(map(str, (*path, leaf))): value
            for path, sub in nnx.iter_modules(model)
            for leaf, value in vars(sub).items()
            if isinstance(value, WithAux)
        }
        return kernels, nnx.jit(lambda m, x: m(x))(model, x)
    model = qwix.quantize_model(module, provider)
    abstract = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    params = qwix.quantize_params(variables["params"], abstract)
    flat = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda a: isinstance(a, WithAux))
    kernels = {
        "params/" + jax.tree_util.keystr(path, simple=True, separator="/"): value
        for path, value in flat
        if isinstance(value, WithAux)
    }
    return kernels, jax.jit(model.apply)({"params": params}, x)


def by_qjax(name, recipe):
    fn, params, _, _, x = float_model(name)
    model = qjax.quantize(fn, params, x, recipe=recipe)
    flat = jax.tree_util.tree_leaves_with_path(model.params, is_leaf=is_quantized)
    kernels = {
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"): value
        for path, value in flat
        if is_quantized(value)
    }
    return kernels, model(model.params, x)


def codes_and_scales(q):
    """Codes and scales of every element, in the layout of the weight."""
    if isinstance(q, QArray):
        with_scale = lambda codes, scale: np.asarray(  # noqa: E731
            dataclasses.replace(q, codes=codes, aux={"scale": scale}).dequantize(jnp.float32)
        )
        ones = quantize_array(
            jnp.ones(q.shape), dataclasses.replace(q.fmt, scale="qmax"), in_axes=q.in_axes, stack_axes=q.stack_axes
        )
        top = np.float32(q.fmt.code_range[1])  # the code of 1.0 everywhere, so scale * top
        codes = with_scale(q.codes, jnp.ones_like(q.aux["scale"]))
        return codes, with_scale(ones.codes, q.aux["scale"]), top
    value, scale = np.asarray(jnp.asarray(q.array.qvalue[...]).astype(jnp.int8)), np.asarray(q.array.scale[...])
    for axis, (n, blocks) in enumerate(zip(value.shape, scale.shape, strict=True)):
        scale = np.repeat(scale, n // blocks, axis=axis)
    return value.astype(np.float32), scale


def assert_same_kernel(name, ours, theirs):
    our_codes, our_scaled, top = codes_and_scales(ours)
    codes, scale = codes_and_scales(theirs)
    assert our_codes.shape == codes.shape, name
    np.testing.assert_array_equal(our_codes, codes, err_msg=f"{name}: codes")
    np.testing.assert_array_equal(our_scaled, scale * top, err_msg=f"{name}: scales")


# ------------------------------------------------------------------------------------------------ the same


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_codes_scales_and_outputs(name, scheme):
    chosen = SCHEMES[scheme]
    theirs, their_output = by_qwix(name, qwix_rules(chosen))
    ours, our_output = by_qjax(name, qjax_recipe(chosen))
    assert ours.keys() == theirs.keys()
    assert len(ours) >= 2
    for path in ours:
        assert_same_kernel(path, ours[path], theirs[path])
    difference = np.linalg.norm(our_output - their_output) / np.linalg.norm(their_output)
    print(name, scheme, "relative difference", difference)
    assert difference < 1e-5

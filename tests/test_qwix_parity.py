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
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Qwix 0.1.8 calls what this Flax deprecates
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
        x = LinenBlock(name="block")(x)
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
        self.block = NnxBlock(rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCAB, use_bias=False, rngs=rngs)

    def __call__(self, tokens):  # [B, T]
        return self.head(self.norm(self.block(self.embed(tokens))))


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
        variables = jax.jit(module.init)(jax.random.key(1), x)
        return *qjax.from_linen(module, variables), module, variables, x
    module = make(nnx.Rngs(1))
    return *qjax.from_nnx(module), module, None, x


def by_qwix(name, provider):
    """Quantized kernels by path, and the output of the quantized model."""
    _, _, module, variables, x = float_model(name)
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
    params = jax.jit(lambda p: qwix.quantize_params(p, abstract))(variables["params"])
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


@jax.jit
def in_layout_of_weight(q):
    """Codes, and the scale of every element, of a qjax array."""
    ones = dataclasses.replace(q, aux={"scale": jnp.ones_like(q.aux["scale"])})
    unit = dataclasses.replace(q.fmt, scale="qmax")  # 1.0 has the largest code everywhere: scales come out times that
    unit = quantize_array(jnp.ones(q.shape), unit, in_axes=q.in_axes, stack_axes=q.stack_axes)
    scales = dataclasses.replace(q, codes=unit.codes).dequantize(jnp.float32)
    return ones.dequantize(jnp.float32), scales


def codes_and_scales(q):
    """Codes and scales of every element, the scales times the largest code."""
    if isinstance(q, QArray):
        codes, scales = in_layout_of_weight(q)
        return np.asarray(codes), np.asarray(scales)
    value, scale = (np.asarray(a[...] if isinstance(a, nnx.Variable) else a) for a in (q.array.qvalue, q.array.scale))
    for axis, (n, blocks) in enumerate(zip(value.shape, scale.shape, strict=True)):
        scale = np.repeat(scale, n // blocks, axis=axis)
    return value.astype(np.float32), scale * np.float32(jnp.iinfo(value.dtype).max)


def assert_same_kernel(name, ours, theirs):
    our_codes, our_scales = codes_and_scales(ours)
    codes, scales = codes_and_scales(theirs)
    assert our_codes.shape == codes.shape, name
    np.testing.assert_array_equal(our_codes, codes, err_msg=f"{name}: codes")
    np.testing.assert_array_equal(our_scales, scales, err_msg=f"{name}: scales")


# ------------------------------------------------------------------------------------------------ the same


# A scheme on every kind of model, and every scheme on one model.
PAIRS = [("linen transformer", scheme) for scheme in SCHEMES]
PAIRS += [("linen cnn", "int8"), ("nnx transformer", "int4 tiled")]
PAIRS += [(name, "int8 dynamic int8") for name in MODELS if name != "linen transformer"]


@pytest.mark.every(7)
@pytest.mark.parametrize(("name", "scheme"), PAIRS, ids=[" ".join(pair) for pair in PAIRS])
def test_codes_scales_and_outputs(name, scheme):
    chosen = SCHEMES[scheme]
    theirs, their_output = by_qwix(name, qwix_rules(chosen))
    ours, our_output = by_qjax(name, qjax_recipe(chosen))
    assert ours.keys() == theirs.keys()
    for path in ours:
        assert_same_kernel(path, ours[path], theirs[path])
    fn, params, _, _, x = float_model(name)
    lost = distance(our_output, jax.jit(fn)(params, x))
    assert lost > 1e-3, "the model was not quantized"
    # Measured 0 on most pairs and 2e-7 on the rest: the same products of codes, scaled in another order.
    assert distance(our_output, their_output) < 2e-6


def distance(a, b):
    """Relative difference of two outputs."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


WEIGHTS = {
    "gaussian": lambda key: jax.random.normal(key, (256, 96)),
    "heavy-tailed": lambda key: jax.random.t(key, 3.0, (256, 96)),
    "ties": lambda key: jnp.round(jax.random.normal(key, (256, 96)) * 8) / 8,
    "one sign": lambda key: jnp.abs(jax.random.normal(key, (256, 96))),
    "zeros in between": lambda key: jax.random.normal(key, (256, 96)) * (jnp.arange(96) % 3 > 0),
    "huge": lambda key: jax.random.normal(key, (256, 96)) * 1e30,
    "small": lambda key: jax.random.normal(key, (256, 96)) * 1e-14,
}


@functools.cache
def one_weight(bits, tile, jitted):
    """Both ways to quantize one weight [256, 96] along its first axis."""
    qtype, fmt = {8: jnp.int8, 4: jnp.int4}[bits], qjax.Int(bits, group=tile) if tile else qjax.Int(bits)
    theirs = functools.partial(qwix.quantize, qtype=qtype, channelwise_axes=[1], tiled_axes={0: tile} if tile else {})
    ours = functools.partial(quantize_array, fmt=fmt, in_axes=(0,))
    return (jax.jit(ours), jax.jit(theirs)) if jitted else (ours, theirs)


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_one_weight(kind, jitted):
    w = WEIGHTS[kind](jax.random.key(3))
    for bits, tile in ((8, None), (4, None), (4, 64), (8, 32)):
        ours, theirs = one_weight(bits, tile, jitted)
        assert_same_kernel(f"{kind} int{bits} tile {tile}", ours(w), Bare(theirs(w)))


@dataclasses.dataclass
class Bare:
    """A quantized array of Qwix outside a model, in the place of its ``WithAux``."""

    array: object


# ------------------------------------------------------------------------------------------------ what differs


@pytest.mark.parametrize("name", ["linen transformer", "nnx transformer"])
def test_two_contracted_axes_are_grouped_together(name):
    """Qwix's scale of a tile of the output projection is the largest of qjax's scales over the heads, exactly."""
    tiled = SCHEMES["int4 tiled"]
    theirs, _ = by_qwix(name, qwix_rules(dataclasses.replace(tiled, coarse=False)))
    ours, _ = by_qjax(name, qjax_recipe(dataclasses.replace(tiled, coarse=False)))
    (path,) = [p for p in ours if p.endswith("attn/out/kernel")]
    scale = np.asarray(theirs[path].array.scale[...])  # [1, head size / tile, width]
    groups = np.asarray(ours[path].aux["scale"])  # [width, 1, heads * head size / tile]
    per_head = groups.reshape(WIDTH, HEADS, -1).transpose(1, 2, 0)
    np.testing.assert_array_equal(per_head.max(axis=0, keepdims=True), scale)
    assert (per_head < scale).any()


def test_bfloat16_weights_keep_a_float32_scale():
    """Qwix rounds the scale to bfloat16; its codes then differ by at most one, and its error is the larger one."""
    w = jax.random.normal(jax.random.key(5), (256, 96)).astype(jnp.bfloat16)
    theirs = qwix.quantize(w, jnp.int8, channelwise_axes=[1])
    ours = quantize_array(w, qjax.Int(8), in_axes=(0,))
    their_scale = np.asarray(theirs.scale, np.float32)[0]
    our_scale = np.asarray(ours.aux["scale"])[:, 0]
    np.testing.assert_allclose(their_scale, our_scale, rtol=2.0**-8)
    codes = codes_and_scales(ours)[0]
    assert np.abs(codes - np.asarray(theirs.qvalue, np.float32)).max() <= 1
    exact = np.asarray(w, np.float32)
    error = np.linalg.norm(ours.dequantize(jnp.float32) - exact)
    assert error < np.linalg.norm(np.asarray(qwix.dequantize(theirs), np.float32) - exact)


def test_tiny_numbers_are_kept():
    """Below a scale of 1e-19 Qwix stores zeros."""
    w = jax.random.normal(jax.random.key(6), (256, 96)) * 1e-20
    assert not np.asarray(qwix.quantize(w, jnp.int8, channelwise_axes=[1]).qvalue).any()
    kept = quantize_array(w, qjax.Int(8), in_axes=(0,)).dequantize()
    assert distance(kept, w) < 0.02

"""A decoder as large training code writes it: Linen, scanned, layers on axis 1, remat, names for partitioning."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import RECIPES, Foreign, check_recipe, check_trace, dense, distance
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import qjax
from qjax.formats import QStack

EMBED, HEADS, KV, HEAD, MLP, VOCABULARY, LAYERS = 32, 4, 2, 8, 64, 40, 2


class DenseGeneral(nn.Module):
    """A product over the last axes with a kernel that has names for its axes."""

    features: tuple[int, ...]
    axis: tuple[int, ...]
    names: tuple[str, ...]

    @nn.compact
    def __call__(self, x):
        axis = tuple(a % x.ndim for a in self.axis)
        shape = tuple(x.shape[a] for a in axis) + self.features
        init = nn.initializers.variance_scaling(
            1.0, "fan_in", "normal", in_axis=tuple(range(len(axis))), out_axis=tuple(range(len(axis), len(shape)))
        )
        kernel = self.param("kernel", nn.with_logical_partitioning(init, self.names), shape, jnp.float32)
        kernel = jnp.asarray(kernel, x.dtype)
        return lax.dot_general(x, kernel, ((axis, tuple(range(len(axis)))), ((), ())))


class RMSNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        wide = jnp.asarray(x, jnp.float32)
        y = wide * lax.rsqrt(jnp.mean(lax.square(wide), axis=-1, keepdims=True) + 1e-6)
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, ("norm",)), (x.shape[-1],))
        return jnp.asarray(y, x.dtype) * scale


def rotary(x, positions):  # [B, T, H, D], [B, T]
    half = x.shape[-1] // 2
    angle = positions[..., None, None] / 10_000 ** (jnp.arange(half) / half)
    first, second = jnp.split(x, 2, axis=-1)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x, positions, segments):
        project = lambda heads, name: DenseGeneral((heads, HEAD), (-1,), ("embed", name, "kv"), name=name)(x)  # noqa: E731
        q, k, v = project(HEADS, "query"), project(KV, "key"), project(KV, "value")
        q, k = rotary(q, positions) / HEAD**0.5, rotary(k, positions)
        q = nn.with_logical_constraint(checkpoint_name(q, "query_proj"), ("batch", "length", "heads", "kv"))
        q = q.reshape(*q.shape[:2], KV, HEADS // KV, HEAD)
        scores = jnp.einsum("btkgd,bskd->bkgts", q, k)
        seen = (positions[:, :, None] >= positions[:, None, :]) & (segments[:, :, None] == segments[:, None, :])
        weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -1e9).astype(jnp.float32), axis=-1)
        out = jnp.einsum("bkgts,bskd->btkgd", weights.astype(x.dtype), v).reshape(*x.shape[:2], HEADS, HEAD)
        out = nn.with_logical_constraint(out, ("batch", "length", "heads", "kv"))
        return DenseGeneral((EMBED,), (-2, -1), ("heads", "kv", "embed"), name="out")(out)


class DecoderLayer(nn.Module):
    @nn.compact
    def __call__(self, x, positions, segments):
        x = nn.with_logical_constraint(checkpoint_name(x, "decoder_layer_input"), ("batch", "length", "embed"))
        x = x + Attention(name="self_attention")(RMSNorm(name="pre_self_attention_layer_norm")(x), positions, segments)
        y = RMSNorm(name="post_self_attention_layer_norm")(x)
        gate, up = (DenseGeneral((MLP,), (-1,), ("embed", "mlp"), name=f"wi_{i}")(y) for i in range(2))
        y = checkpoint_name(nn.silu(gate) * up, "mlpwi")
        return x + DenseGeneral((EMBED,), (-1,), ("mlp", "embed"), name="wo")(y), None


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, tokens, positions, segments):
        table = self.param(
            "token_embedder", nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed")),
            (VOCABULARY, EMBED),
        )  # fmt: skip
        x = jnp.asarray(table, jnp.float32)[tokens]
        policy = jax.checkpoint_policies.save_only_these_names("query_proj", "mlpwi")
        layer = nn.remat(DecoderLayer, prevent_cse=False, policy=policy)
        scan = nn.scan(
            layer,
            variable_axes={"params": 1},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=LAYERS,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = scan(name="layers")(x, positions, segments)
        x = RMSNorm(name="decoder_norm")(x)
        return DenseGeneral((VOCABULARY,), (-1,), ("embed", "vocab"), name="logits_dense")(x)


def rows(seed, batch):
    tokens = jnp.asarray(np.random.default_rng(seed).integers(0, VOCABULARY, (batch, 9)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(9), tokens.shape)
    return tokens, positions, (positions >= 5).astype(jnp.int32)


LAYER = [f"self_attention/{n}" for n in ("query", "key", "value", "out")] + ["wi_0", "wi_1", "wo"]


@pytest.fixture(scope="module")
def variables():
    """As Linen gives them: each leaf in a box with the names of its axes."""
    made = jax.jit(Decoder().init)(jax.random.key(0), *rows(0, 1))
    assert isinstance(made["params"]["logits_dense"]["kernel"], nn.LogicallyPartitioned)
    return made


@pytest.fixture(scope="module")
def model(variables):
    dots = {f"params/layers/{i}/{n}/kernel" for i in range(LAYERS) for n in LAYER} | {"params/logits_dense/kernel"}
    fn, params = qjax.from_linen(Decoder(), nn.unbox(variables))
    return Foreign(fn, params, rows, {"dot": dots, "embedding": {"params/token_embedder"}})


def check_layout(kernel):
    assert kernel.shape == (HEADS, LAYERS, HEAD, EMBED), "the layers stay on axis 1"


def test_sites(model):
    check_trace(model)


@pytest.mark.every(4)
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes(model, recipe):
    packed = check_recipe(model, recipe)
    check_layout(packed.params["params"]["layers"]["self_attention"]["out"]["kernel"])


@pytest.mark.slow
def test_leaves_may_stay_in_their_boxes(model, variables):
    boxed = dataclasses.replace(model, params=variables)
    check_trace(boxed)
    packed = check_recipe(boxed, "W4A16")
    box = packed.params["params"]["layers"]["self_attention"]["out"]["kernel"]
    assert box.names == ("heads", "layers", "kv", "embed")
    check_layout(box.value)


@pytest.mark.slow
def test_layers_of_one_scan_in_several_formats(model):
    rule = lambda name, fmt: qjax.Rule(name, weights=fmt, clamp_group=True)  # noqa: E731
    recipe = qjax.Recipe(
        [
            qjax.Rule("params/layers/1/self_attention/out/*", skip=True),
            rule("params/layers/0/**", qjax.Int(8)),
            rule("**", qjax.NF4(16)),
        ]
    )
    args = rows(0, 2)
    packed = qjax.quantize(model.fn, model.params, *args, recipe=recipe)
    assert packed.report.notes == ("a scan of 2 steps runs as 2 scans, since its layers have different formats",)
    out = packed.params["params"]["layers"]["self_attention"]["out"]["kernel"]
    assert isinstance(out, QStack) and out.axis == 1
    want, _ = model.derivative(qjax.partition(packed.params)[0], dense(packed.params), args)
    assert distance(packed(packed.params, *args), want) < 1e-5

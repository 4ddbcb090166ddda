"""Flax Linen as in its examples: a convolutional classifier and a language model with its own attention."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import RECIPES, Foreign, check_recipe, check_trace

import qjax


class CNN(nn.Module):
    """The classifier for digits, with the names that Linen gives."""

    @nn.compact
    def __call__(self, x):
        for features in (8, 16):
            x = nn.Conv(features=features, kernel_size=(3, 3))(x)
            x = nn.relu(x)
            x = nn.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = x.reshape((x.shape[0], -1))
        x = nn.relu(nn.Dense(features=32)(x))
        return nn.Dense(features=10)(x)


class Block(nn.Module):
    heads: int = 2
    rate: float = 0.1

    @nn.compact
    def __call__(self, x, mask, train: bool):
        y = nn.LayerNorm()(x)
        y = nn.MultiHeadDotProductAttention(num_heads=self.heads, dropout_rate=self.rate, deterministic=not train)(
            y, y, mask=mask
        )
        x = x + nn.Dropout(self.rate, deterministic=not train)(y)
        y = nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x)))
        return x + nn.Dropout(self.rate, deterministic=not train)(nn.Dense(x.shape[-1])(y))


class LanguageModel(nn.Module):
    vocabulary: int = 40
    width: int = 32
    depth: int = 1

    @nn.compact
    def __call__(self, tokens, train: bool = False):
        embed = nn.Embed(self.vocabulary, self.width)
        position = self.param("position", nn.initializers.normal(0.1), (1, 16, self.width))
        x = embed(tokens) + position[:, : tokens.shape[1]]
        mask = nn.combine_masks(nn.make_causal_mask(tokens), nn.make_attention_mask(tokens > 0, tokens > 0))
        for _ in range(self.depth):
            x = Block()(x, mask, train)
        return embed.attend(nn.LayerNorm()(x))


def images(seed, batch):
    return (jnp.asarray(np.random.default_rng(seed).standard_normal((batch, 12, 12, 1)), jnp.float32),)


def tokens(seed, batch):
    return (jnp.asarray(np.random.default_rng(seed).integers(1, 40, (batch, 10)), jnp.int32).at[0, -2:].set(0),)


def classifier():
    net = CNN()
    fn, params = qjax.from_linen(net, jax.jit(net.init)(jax.random.key(0), *images(0, 1)))
    sites = {
        "conv": {f"params/Conv_{i}/kernel" for i in range(2)},
        "dot": {f"params/Dense_{i}/kernel" for i in range(2)},
    }
    return Foreign(fn, params, images, sites)


def language_model():
    net = LanguageModel()
    fn, params = qjax.from_linen(net, jax.jit(net.init)(jax.random.key(0), *tokens(0, 1)))
    block = [f"MultiHeadDotProductAttention_0/{n}/kernel" for n in ("query", "key", "value", "out")]
    block += ["Dense_0/kernel", "Dense_1/kernel"]
    dots = {f"params/Block_{i}/{n}" for i in range(1) for n in block} | {"params/Embed_0/embedding#1"}
    return Foreign(fn, params, tokens, {"dot": dots, "embedding": {"params/Embed_0/embedding"}})


MODELS = {"classifier": classifier, "language model": language_model}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


def test_sites(model):
    check_trace(model)


@pytest.mark.every(4)
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes(model, recipe):
    check_recipe(model, recipe)

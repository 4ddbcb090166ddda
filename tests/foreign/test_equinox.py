"""Equinox as its users write it: modules for one example, mapped over the batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import RECIPES, Foreign, check_recipe, check_trace

eqx = pytest.importorskip("equinox")

WIDTH, PATCH, SIZE = 16, 4, 8
TOKENS = (SIZE // PATCH) ** 2 + 1


class Block(eqx.Module):
    norm1: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    norm2: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP
    dropout: eqx.nn.Dropout

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.norm1, self.norm2 = eqx.nn.LayerNorm(WIDTH), eqx.nn.LayerNorm(WIDTH)
        self.attention = eqx.nn.MultiheadAttention(2, WIDTH, use_output_bias=True, key=first)
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, 4 * WIDTH, depth=1, activation=jax.nn.gelu, key=second)
        self.dropout = eqx.nn.Dropout(0.1, inference=True)

    def __call__(self, x):
        y = jax.vmap(self.norm1)(x)
        x = x + self.dropout(self.attention(y, y, y))
        return x + self.dropout(jax.vmap(self.mlp)(jax.vmap(self.norm2)(x)))


class VisionTransformer(eqx.Module):
    patches: eqx.nn.Conv2d
    token: jax.Array
    position: jax.Array
    blocks: list
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 6)
        self.patches = eqx.nn.Conv2d(3, WIDTH, PATCH, stride=PATCH, key=keys[0])
        self.token = jax.random.normal(keys[1], (1, WIDTH))
        self.position = 0.1 * jax.random.normal(keys[2], (TOKENS, WIDTH))
        self.blocks = [Block(k) for k in keys[3:5]]
        self.norm = eqx.nn.LayerNorm(WIDTH)
        self.head = eqx.nn.Linear(WIDTH, 5, key=keys[5])

    def __call__(self, image):  # [C, H, W]
        x = self.patches(image).reshape(WIDTH, -1).T
        x = jnp.concatenate([self.token, x]) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[0]))


def images(seed, batch):
    return (jnp.asarray(np.random.default_rng(seed).standard_normal((batch, 3, SIZE, SIZE)), jnp.float32),)


BLOCK = [f"attention/{n}_proj/weight" for n in ("query", "key", "value", "output")]
BLOCK += ["mlp/layers/0/weight", "mlp/layers/1/weight"]


@pytest.fixture(scope="module")
def model():
    dots = {f"blocks/{i}/{n}" for i in range(2) for n in BLOCK} | {"head/weight"}
    net = VisionTransformer(jax.random.key(0))
    return Foreign(lambda net, x: jax.vmap(net)(x), net, images, {"conv": {"patches/weight"}, "dot": dots}, error=0.06)


def test_sites(model):
    check_trace(model)


@pytest.mark.every(4)
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes(model, recipe):
    packed = check_recipe(model, recipe)
    assert isinstance(packed.params, VisionTransformer)

"""An MLP-Mixer in plain jnp: products over tokens as well as over channels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import RECIPES, Foreign, check_recipe, check_trace

PATCH, SIZE, WIDTH, TOKENS, LAYERS = 4, 16, 32, 16, 2


def init(seed):
    rng = np.random.default_rng(seed)

    def dense(inputs, outputs):
        w = rng.standard_normal((inputs, outputs)) / inputs**0.5
        return {"w": jnp.asarray(w, jnp.float32), "b": jnp.zeros(outputs)}

    def norm():
        return {"scale": jnp.ones(WIDTH), "bias": jnp.zeros(WIDTH)}

    def block():
        return {
            "norm1": norm(),
            "tokens": [dense(TOKENS, 24), dense(24, TOKENS)],
            "norm2": norm(),
            "channels": [dense(WIDTH, 64), dense(64, WIDTH)],
        }

    blocks = [block() for _ in range(LAYERS)]
    return {"patches": dense(3 * PATCH * PATCH, WIDTH), "blocks": blocks, "norm": norm(), "head": dense(WIDTH, 10)}


def dense(p, x):
    return x @ p["w"] + p["b"]


def norm(p, x):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(var + 1e-6) * p["scale"] + p["bias"]


def mlp(p, x):
    return dense(p[1], jax.nn.gelu(dense(p[0], x)))


def mixer(p, images):
    n, side = images.shape[0], SIZE // PATCH
    x = images.reshape(n, side, PATCH, side, PATCH, 3).transpose(0, 1, 3, 2, 4, 5).reshape(n, side * side, -1)
    x = dense(p["patches"], x)
    for block in p["blocks"]:
        x = x + jnp.swapaxes(mlp(block["tokens"], jnp.swapaxes(norm(block["norm1"], x), 1, 2)), 1, 2)
        x = x + mlp(block["channels"], norm(block["norm2"], x))
    return dense(p["head"], norm(p["norm"], x).mean(1))


def images(seed, batch):
    return (jnp.asarray(np.random.default_rng(seed).standard_normal((batch, SIZE, SIZE, 3)), jnp.float32),)


@pytest.fixture(scope="module")
def model():
    dots = {f"blocks/{i}/{part}/{j}/w" for i in range(LAYERS) for part in ("tokens", "channels") for j in range(2)}
    return Foreign(mixer, init(0), images, {"dot": dots | {"patches/w", "head/w"}}, error=0.06)


def test_sites(model):
    check_trace(model)


@pytest.mark.every(2)
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes(model, recipe):
    check_recipe(model, recipe)

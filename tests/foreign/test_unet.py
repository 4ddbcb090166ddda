"""A small diffusion U-Net in plain jnp, channels last."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import RECIPES, Foreign, check_recipe, check_trace
from jax import lax

WIDTH, TIME, SIZE = 8, 16, 8


def init(seed):
    rng = np.random.default_rng(seed)

    def draw(*shape, fan):
        return jnp.asarray(rng.standard_normal(shape) / fan**0.5, jnp.float32)

    def conv(size, inputs, outputs):
        return {"kernel": draw(size, size, inputs, outputs, fan=size * size * inputs), "bias": jnp.zeros(outputs)}

    def dense(inputs, outputs):
        return {"kernel": draw(inputs, outputs, fan=inputs), "bias": jnp.zeros(outputs)}

    def norm(size):
        return {"scale": jnp.ones(size), "bias": jnp.zeros(size)}

    def residual(inputs, outputs):
        block = {"norm1": norm(inputs), "conv1": conv(3, inputs, outputs), "time": dense(TIME, outputs)}
        block |= {"norm2": norm(outputs), "conv2": conv(3, outputs, outputs)}
        return block | ({"skip": conv(1, inputs, outputs)} if inputs != outputs else {})

    return {
        "time": {"in": dense(TIME, TIME), "out": dense(TIME, TIME)},
        "stem": conv(3, 3, WIDTH),
        "down": {"block": residual(WIDTH, WIDTH), "sample": conv(3, WIDTH, 2 * WIDTH)},
        "middle": {
            "block": residual(2 * WIDTH, 2 * WIDTH),
            "norm": norm(2 * WIDTH),
            "qkv": dense(2 * WIDTH, 6 * WIDTH),
            "out": dense(2 * WIDTH, 2 * WIDTH),
        },
        "up": {"sample": conv(3, 2 * WIDTH, WIDTH), "block": residual(2 * WIDTH, WIDTH)},
        "norm": norm(WIDTH),
        "head": conv(3, WIDTH, 3),
    }


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def conv(p, x, stride=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, p["kernel"], (stride, stride), "SAME", dimension_numbers=numbers) + p["bias"]


def group_norm(p, x, groups=4):
    y = x.reshape(*x.shape[:-1], groups, -1)
    mean = y.mean((1, 2, 4), keepdims=True)
    var = ((y - mean) ** 2).mean((1, 2, 4), keepdims=True)
    return ((y - mean) * lax.rsqrt(var + 1e-5)).reshape(x.shape) * p["scale"] + p["bias"]


def residual(p, x, time):
    y = conv(p["conv1"], jax.nn.silu(group_norm(p["norm1"], x)))
    y = y + dense(p["time"], jax.nn.silu(time))[:, None, None, :]
    y = conv(p["conv2"], jax.nn.silu(group_norm(p["norm2"], y)))
    return y + (conv(p["skip"], x) if "skip" in p else x)


def attention(p, x):
    b, h, w, c = x.shape
    q, k, v = jnp.split(dense(p["qkv"], group_norm(p["norm"], x).reshape(b, h * w, c)), 3, axis=-1)
    weights = jax.nn.softmax(jnp.einsum("bic,bjc->bij", q, k) * c**-0.5, axis=-1)
    return x + dense(p["out"], jnp.einsum("bij,bjc->bic", weights, v)).reshape(x.shape)


def unet(p, x, steps):
    half = TIME // 2
    angle = steps[:, None] * jnp.exp(-jnp.log(1e4) * jnp.arange(half) / half)
    time = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    time = dense(p["time"]["out"], jax.nn.silu(dense(p["time"]["in"], time)))
    x = conv(p["stem"], x)
    kept = residual(p["down"]["block"], x, time)
    x = conv(p["down"]["sample"], kept, stride=2)
    x = attention(p["middle"], residual(p["middle"]["block"], x, time))
    x = jax.image.resize(x, (x.shape[0], SIZE, SIZE, x.shape[-1]), "nearest")
    x = jnp.concatenate([conv(p["up"]["sample"], x), kept], axis=-1)
    return conv(p["head"], jax.nn.silu(group_norm(p["norm"], residual(p["up"]["block"], x, time))))


def noisy(seed, batch):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((batch, SIZE, SIZE, 3)), jnp.float32), jnp.asarray(
        rng.uniform(0, 1000, batch), jnp.float32
    )


@pytest.fixture(scope="module")
def model():
    blocks = ("down/block", "middle/block", "up/block")
    convs = {"stem", "down/sample", "up/sample", "head", "up/block/skip"}
    convs |= {f"{b}/{n}" for b in blocks for n in ("conv1", "conv2")}
    dots = {"time/in", "time/out", "middle/qkv", "middle/out"} | {f"{b}/time" for b in blocks}
    sites = {op: {f"{n}/kernel" for n in names} for op, names in (("conv", convs), ("dot", dots))}
    return Foreign(unet, init(0), noisy, sites, error=0.1)


def test_sites(model):
    check_trace(model)


@pytest.mark.every(4)
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes(model, recipe):
    check_recipe(model, recipe)

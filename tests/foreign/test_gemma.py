"""A decoder in einsums: fused and grouped projections, soft caps, stacked gates, a scaled and tied embedding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import RECIPES, Foreign, check_recipe, check_trace

EMBED, HEADS, KV, HEAD, HIDDEN, VOCABULARY, LAYERS, CAP = 32, 4, 2, 8, 64, 48, 2, 30.0


def init(seed, grouped):
    rng = np.random.default_rng(seed)
    draw = lambda *shape, fan: jnp.asarray(rng.standard_normal(shape) / fan**0.5, jnp.float32)  # noqa: E731

    def layer():
        attn = {"attn_vec_einsum": {"w": draw(HEADS, HEAD, EMBED, fan=HEADS * HEAD)}}
        if grouped:
            attn["q_einsum"] = {"w": draw(HEADS, EMBED, HEAD, fan=EMBED)}
            attn["kv_einsum"] = {"w": draw(2, KV, EMBED, HEAD, fan=EMBED)}
        else:
            attn["qkv_einsum"] = {"w": draw(3, HEADS, EMBED, HEAD, fan=EMBED)}
        mlp = {"gating_einsum": draw(2, EMBED, HIDDEN, fan=EMBED), "linear": draw(HIDDEN, EMBED, fan=HIDDEN)}
        norms = {name: {"scale": draw(EMBED, fan=100)} for name in ("pre_attention_norm", "pre_ffw_norm")}
        return {"attn": attn, "mlp": mlp, **norms}

    return {
        "embedder": {"input_embedding": draw(VOCABULARY, EMBED, fan=EMBED)},
        **{f"layer_{i}": layer() for i in range(LAYERS)},
        "final_norm": {"scale": draw(EMBED, fan=100)},
    }


def norm(p, x):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6) * (1 + p["scale"])


def rope(x, positions):  # [B, T, N, H]
    half = x.shape[-1] // 2
    angle = positions[None, :, None, None] / 10_000 ** (2 * jnp.arange(half) / x.shape[-1])
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate(
        [first * jnp.cos(angle) - second * jnp.sin(angle), second * jnp.cos(angle) + first * jnp.sin(angle)], axis=-1
    )


def attention(p, x):
    positions = jnp.arange(x.shape[1])
    if "qkv_einsum" in p:
        q, k, v = jnp.einsum("BTD,SNDH->SBTNH", x, p["qkv_einsum"]["w"])
    else:
        q = jnp.einsum("BTD,NDH->BTNH", x, p["q_einsum"]["w"])
        k, v = jnp.einsum("BSD,CKDH->CBSKH", x, p["kv_einsum"]["w"])
    q, k = rope(q, positions) * HEAD**-0.5, rope(k, positions)
    b, t, n, h = q.shape
    kv = k.shape[2]
    logits = jnp.einsum("BTKGH,BSKH->BTKGS", q.reshape(b, t, kv, n // kv, h), k)
    logits = jnp.tanh(logits / CAP) * CAP
    seen = positions[:, None] >= positions[None, :]
    probabilities = jax.nn.softmax(jnp.where(seen[None, :, None, None], logits, -2.3819763e38), axis=-1)
    encoded = jnp.einsum("BTKGS,BSKH->BTKGH", probabilities, v).reshape(b, t, n, h)
    return jnp.einsum("BTNH,NHD->BTD", encoded, p["attn_vec_einsum"]["w"])


def feed_forward(p, x):
    gate = jax.nn.gelu(jnp.dot(x, p["gating_einsum"][0]))
    return jnp.dot(gate * jnp.dot(x, p["gating_einsum"][1]), p["linear"])


def decoder(p, tokens):
    table = p["embedder"]["input_embedding"]
    x = table[tokens] * jnp.sqrt(EMBED).astype(table.dtype)
    for i in range(LAYERS):
        layer = p[f"layer_{i}"]
        x = x + attention(layer["attn"], norm(layer["pre_attention_norm"], x))
        x = x + feed_forward(layer["mlp"], norm(layer["pre_ffw_norm"], x))
    logits = jnp.dot(norm(p["final_norm"], x), table.T)
    return jnp.tanh(logits / CAP) * CAP


def tokens(seed, batch):
    return (jnp.asarray(np.random.default_rng(seed).integers(0, VOCABULARY, (batch, 8)), jnp.int32),)


def model(grouped):
    layer = ["attn/q_einsum/w", "attn/kv_einsum/w"] if grouped else ["attn/qkv_einsum/w"]
    layer += ["attn/attn_vec_einsum/w", "mlp/gating_einsum/0", "mlp/gating_einsum/1", "mlp/linear"]
    dots = {f"layer_{i}/{n}" for i in range(LAYERS) for n in layer} | {"embedder/input_embedding#1"}
    return Foreign(decoder, init(0, grouped), tokens, {"dot": dots, "embedding": {"embedder/input_embedding"}})


@pytest.fixture(scope="module")
def gemma():
    return model(grouped=True)


def test_sites(gemma):
    check_trace(gemma)


@pytest.mark.every(2)
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes(gemma, recipe):
    packed = check_recipe(gemma, recipe)
    assert packed.params["layer_1"]["mlp"]["gating_einsum"].shape == (2, EMBED, HIDDEN)


@pytest.mark.slow
def test_one_leaf_for_queries_keys_and_values():
    fused = model(grouped=False)
    check_trace(fused)
    check_recipe(fused, "W4A16")

"""Llama-family decoders in Flax NNX: Llama 2 and 3, Mistral, Qwen2, Qwen3.

One module serves all of them, because they differ only in switches of :class:`LlamaConfig` (biases of q, k, v; a norm
on queries and keys; a sliding window; how rotary frequencies are stretched; tied embeddings). The walk over the layers
and the cache are those of every :class:`~qjax.models.decoder.Decoder`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.models.activations import ACTIVATIONS
from qjax.models.config import FAMILIES, LlamaConfig
from qjax.models.decoder import Decoder, Embed, attention, linear
from qjax.models.family import Family
from qjax.models.language import LanguageModel
from qjax.models.rope import cos_sin, rotate


class RMSNorm(nnx.Module):
    """``x / sqrt(mean(x²) + eps) * scale`` over the last axis, in float32 inside."""

    def __init__(self, size: int, eps: float) -> None:
        self.scale = nnx.Param(jnp.ones((size,)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise x [..., size]; dtype is kept."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * self.scale[...]


class Attention(nnx.Module):
    """Causal attention with grouped key/value heads and rotary positions; fused, q, k and v are one product."""

    def __init__(self, config: LlamaConfig, dot_general: Callable, rngs: nnx.Rngs, fused: bool = False) -> None:
        c = config
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        if fused:
            self.qkv_proj = linear(c.hidden_size, queries + 2 * keys, c.qkv_bias, dot_general, rngs)
        else:
            self.q_proj = linear(c.hidden_size, queries, c.qkv_bias, dot_general, rngs)
            self.k_proj = linear(c.hidden_size, keys, c.qkv_bias, dot_general, rngs)
            self.v_proj = linear(c.hidden_size, keys, c.qkv_bias, dot_general, rngs)
        gain = 1 / (2 * max(c.num_hidden_layers, 1))  # keeps the residual stream's variance flat over depth
        self.o_proj = linear(queries, c.hidden_size, c.o_bias, dot_general, rngs, gain)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
            self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
        self.config, self.fused = c, fused

    def __call__(
        self,
        x: jax.Array,  # [B, T, hidden]
        cos: jax.Array,  # [T, 1, head_dim/2]
        sin: jax.Array,  # [T, 1, head_dim/2]
        mask: jax.Array | None,  # bool [1, 1, T, S]; None is causal over the T tokens given
        store: Callable[..., jax.Array] | None = None,
    ) -> jax.Array:
        """Attend; ``store`` attends over a cache, into which it puts the new keys and values first."""
        c = self.config
        heads = (*x.shape[:-1], -1, c.head_dim)
        if self.fused:
            queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
            parts = jnp.split(self.qkv_proj(x), (queries, queries + keys), axis=-1)
        else:
            parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (part.reshape(heads) for part in parts)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = attention(q, k, v, mask, store)
        return self.o_proj(out.reshape(*x.shape[:-1], -1))


class MLP(nnx.Module):
    """``down(act(gate(x)) * up(x))``; fused, gate and up are one product."""

    def __init__(self, config: LlamaConfig, dot_general: Callable, rngs: nnx.Rngs, fused: bool = False) -> None:
        c, self.fused = config, fused
        if fused:
            self.gate_up = linear(c.hidden_size, 2 * c.intermediate_size, c.mlp_bias, dot_general, rngs)
        else:
            self.gate = linear(c.hidden_size, c.intermediate_size, c.mlp_bias, dot_general, rngs)
            self.up = linear(c.hidden_size, c.intermediate_size, c.mlp_bias, dot_general, rngs)
        gain = 1 / (2 * max(c.num_hidden_layers, 1))
        self.down = linear(c.intermediate_size, c.hidden_size, c.mlp_bias, dot_general, rngs, gain)
        self.act = ACTIVATIONS[c.hidden_act]

    def __call__(self, x: jax.Array) -> jax.Array:
        """X [..., hidden] to the same shape."""
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1) if self.fused else (self.gate(x), self.up(x))
        return self.down(self.act(gate) * up)


class Layer(nnx.Module):
    """One decoder layer: attention and MLP, each behind a norm and beside the residual stream."""

    def __init__(
        self,
        config: Any,
        dot_general: Callable,
        rngs: nnx.Rngs,
        mlp: Callable[..., Any] = MLP,
        fused: bool = False,
    ) -> None:
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config, dot_general, rngs, fused)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, dot_general, rngs, fused) if mlp is MLP else mlp(config, dot_general, rngs)

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array, mask: Any, store: Any = None) -> jax.Array:
        """Arguments as :class:`Attention`'s."""
        x = x + self.attn(self.attn_norm(x), cos, sin, mask, store)
        return x + self.mlp(self.mlp_norm(x))


class Llama(Decoder):
    """A decoder of the Llama family; arguments as :class:`~qjax.models.decoder.Decoder`'s.

    Args:
        fused: what reads the same activations is one matrix, one product and, on a GPU, one kernel: ``attn/qkv_proj``
            in place of ``q_proj``, ``k_proj`` and ``v_proj``, ``mlp/gate_up`` in place of ``gate`` and ``up``.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        scan_layers: bool = False,
        fused: bool = False,
        dot_general: Callable = jax.lax.dot_general,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        self.dot_general = dot_general
        self.fused = fused
        self.embed = Embed(config.vocab_size, config.hidden_size, rngs)
        layers = [self._layer(i, dot_general, rngs) for i in range(config.num_hidden_layers)]
        self._set_layers(layers, scan_layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = linear(config.hidden_size, config.vocab_size, False, dot_general, rngs)

    def _layer(self, index: int, dot_general: Callable, rngs: nnx.Rngs) -> Layer:
        return Layer(self.config, dot_general, rngs, fused=self.fused)

    def _begin(self, tokens: jax.Array, positions: jax.Array, length: Any) -> tuple[jax.Array, tuple]:
        c = self.config
        return self.embed(tokens), cos_sin(positions, c.head_dim, c.rope_theta, c.rope_scaling, length)

    def _end(self, x: jax.Array) -> jax.Array:
        x = self.norm(x)
        return self._tied_logits(x, self.embed) if self.config.tie_word_embeddings else self.lm_head(x)


NAMES = {
    "embed": ("model.embed_tokens",),
    "norm": ("model.norm",),
    "lm_head": ("lm_head",),
    "layers/*/attn": ("model.layers.{0}.self_attn",),
    "layers/*/attn_norm": ("model.layers.{0}.input_layernorm",),
    "layers/*/mlp_norm": ("model.layers.{0}.post_attention_layernorm",),
    "layers/*/mlp/gate": ("model.layers.{0}.mlp.gate_proj",),
    "layers/*/mlp/up": ("model.layers.{0}.mlp.up_proj",),
    "layers/*/mlp/down": ("model.layers.{0}.mlp.down_proj",),
}

FAMILY = Family(
    architectures=FAMILIES,
    config=LlamaConfig.from_hf,
    function=LanguageModel,
    names=lambda config: NAMES,
    ignored=r"rotary_emb\.inv_freq$",
)

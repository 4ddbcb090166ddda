"""Llama-family decoders in Flax NNX: Llama 2 and 3, Mistral, Qwen2, Qwen3.

One module serves all of them, because they differ only in switches of :class:`LlamaConfig` (biases of q, k, v; a norm
on queries and keys; a sliding window; how rotary frequencies are stretched; tied embeddings). It comes in two forms
with the same mathematics:

- unrolled: ``layers`` is a list; parameters are named ``layers/3/attn/q_proj/kernel``.
- scanned (``scan_layers=True``): ``layers`` is one layer whose leaves are stacked, ``[L, ...]``, and ``jax.lax.scan``
  runs over them; parameters are named ``layers/attn/q_proj/kernel``. Traces and compiles in the time of one layer.

The key/value cache is a value: it goes in and a new one comes out, nothing is mutated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer

from qjax.models.config import ACTIVATIONS, LlamaConfig
from qjax.models.rope import cos_sin, rotate

Cache = dict[str, Any]


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


class Embed(nnx.Module):
    """A table of rows, looked up by token and read once more by a tied output projection; its dtype is the model's."""

    def __init__(self, count: int, size: int, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (count, size), jnp.float32))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Rows of tokens [B, T]: [B, T, size]."""
        return jnp.take(self.embedding[...], tokens, axis=0)


def _linear(ins: int, outs: int, bias: bool, dot_general: Callable, rngs: nnx.Rngs, gain: float = 1.0) -> nnx.Linear:
    init = nnx.initializers.variance_scaling(gain, "fan_in", "normal")
    return nnx.Linear(ins, outs, use_bias=bias, kernel_init=init, dot_general=dot_general, rngs=rngs)


class Attention(nnx.Module):
    """Causal attention with grouped key/value heads and rotary positions."""

    def __init__(self, config: LlamaConfig, dot_general: Callable, rngs: nnx.Rngs) -> None:
        c = config
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = _linear(c.hidden_size, queries, c.qkv_bias, dot_general, rngs)
        self.k_proj = _linear(c.hidden_size, keys, c.qkv_bias, dot_general, rngs)
        self.v_proj = _linear(c.hidden_size, keys, c.qkv_bias, dot_general, rngs)
        gain = 1 / (2 * max(c.num_hidden_layers, 1))  # keeps the residual stream's variance flat over depth
        self.o_proj = _linear(queries, c.hidden_size, c.o_bias, dot_general, rngs, gain)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
            self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
        self.config = c

    def __call__(
        self,
        x: jax.Array,  # [B, T, hidden]
        cos: jax.Array,  # [T, 1, head_dim/2]
        sin: jax.Array,  # [T, 1, head_dim/2]
        mask: jax.Array | None,  # bool [1, 1, T, S]; None is causal over the T tokens given
        store: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]] | None = None,
    ) -> jax.Array:
        """Attend; ``store`` puts the new keys and values [B, T, KV, D] into a cache and returns all of it."""
        c = self.config
        heads = (*x.shape[:-1], -1, c.head_dim)
        q, k, v = self.q_proj(x).reshape(heads), self.k_proj(x).reshape(heads), self.v_proj(x).reshape(heads)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if store is not None:
            k, v = store(k, v)
        out = jax.nn.dot_product_attention(q, k.astype(q.dtype), v.astype(q.dtype), mask=mask, is_causal=mask is None)
        return self.o_proj(out.reshape(*x.shape[:-1], -1))


class MLP(nnx.Module):
    """``down(act(gate(x)) * up(x))``."""

    def __init__(self, config: LlamaConfig, dot_general: Callable, rngs: nnx.Rngs) -> None:
        c = config
        self.gate = _linear(c.hidden_size, c.intermediate_size, c.mlp_bias, dot_general, rngs)
        self.up = _linear(c.hidden_size, c.intermediate_size, c.mlp_bias, dot_general, rngs)
        gain = 1 / (2 * max(c.num_hidden_layers, 1))
        self.down = _linear(c.intermediate_size, c.hidden_size, c.mlp_bias, dot_general, rngs, gain)
        self.act = ACTIVATIONS[c.hidden_act]

    def __call__(self, x: jax.Array) -> jax.Array:
        """X [..., hidden] to the same shape."""
        return self.down(self.act(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    """One decoder layer: attention and MLP, each behind a norm and beside the residual stream."""

    def __init__(self, config: LlamaConfig, dot_general: Callable, rngs: nnx.Rngs) -> None:
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config, dot_general, rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, dot_general, rngs)

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array, mask: Any, store: Any = None) -> jax.Array:
        """Arguments as :class:`Attention`'s."""
        x = x + self.attn(self.attn_norm(x), cos, sin, mask, store)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nnx.Module):
    """A decoder: tokens in, logits out.

    Args:
        config: sizes and switches.
        scan_layers: stack the layers and scan over them (see the module's docstring).
        dot_general: the product used by the linears, ``jax.lax.dot_general`` unless a trainer brings its own.
        rngs: where initial weights come from; ``nnx.Rngs(0)``.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        scan_layers: bool = False,
        dot_general: Callable = jax.lax.dot_general,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        self.scan_layers = scan_layers
        self.embed = Embed(config.vocab_size, config.hidden_size, rngs)
        layers = [Layer(config, dot_general, rngs) for _ in range(config.num_hidden_layers)]
        if scan_layers:
            states = [nnx.state(layer) for layer in layers]
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
            self.layers = nnx.merge(nnx.graphdef(layers[0]), stacked)
        else:
            self.layers = nnx.List(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dot_general = dot_general
        if not config.tie_word_embeddings:
            self.lm_head = _linear(config.hidden_size, config.vocab_size, False, dot_general, rngs)

    def __call__(self, tokens: jax.Array, cache: Cache | None = None) -> Any:
        """Logits of the next token at each position.

        Args:
            tokens: int32 [B, T].
            cache: from :func:`init_cache`; the tokens then follow those that it holds.

        Returns:
            float [B, T, vocab]; with a cache, that and the new cache.
        """
        c = self.config
        length = tokens.shape[1]
        x = self.embed(tokens)
        start = 0 if cache is None else cache["length"]
        positions = start + jnp.arange(length, dtype=jnp.int32)
        cos, sin = cos_sin(positions, c.head_dim, c.rope_theta, c.rope_scaling, start + length)
        if cache is None:
            x = self._forward(x, cos, sin)
        else:
            x, layers = self._extend(x, cos, sin, positions, cache)
            cache = {"layers": layers, "length": cache["length"] + length}
        x = self.norm(x)
        if c.tie_word_embeddings:
            table = self.embed.embedding[...]
            logits = self.dot_general(x, table.astype(x.dtype), (((2,), (1,)), ((), ())))
        else:
            logits = self.lm_head(x)
        return logits if cache is None else (logits, cache)

    def _forward(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        positions = jnp.arange(x.shape[1], dtype=jnp.int32)
        if not self.scan_layers:
            for i, layer in enumerate(self.layers):
                x = layer(x, cos, sin, self._mask(positions, x.shape[1], self.config.window(i)))
            return x
        graph, weights = nnx.split(self.layers)

        def body(x: jax.Array, xs: tuple) -> tuple[jax.Array, None]:
            state, window = xs
            return nnx.merge(graph, state)(x, cos, sin, self._mask(positions, x.shape[1], window)), None

        return jax.lax.scan(body, x, (weights, self._scanned_windows()), length=self.config.num_hidden_layers)[0]

    def _extend(
        self, x: jax.Array, cos: jax.Array, sin: jax.Array, positions: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Any]:
        old, start = cache["layers"], cache["length"]
        if not self.scan_layers:
            new = []
            for i, (layer, kept) in enumerate(zip(self.layers, old, strict=True)):
                filled: dict[str, jax.Array] = {}

                def store(k: jax.Array, v: jax.Array, kept: Any = kept, filled: Any = filled) -> Any:
                    filled["k"] = jax.lax.dynamic_update_slice(kept["k"], k.astype(kept["k"].dtype), (0, start, 0, 0))
                    filled["v"] = jax.lax.dynamic_update_slice(kept["v"], v.astype(kept["v"].dtype), (0, start, 0, 0))
                    return filled["k"], filled["v"]

                mask = self._mask(positions, kept["k"].shape[1], self.config.window(i), cached=True)
                x = layer(x, cos, sin, mask, store)
                new.append(filled)
            return x, new
        graph, weights = nnx.split(self.layers)

        # The cache is a carry and each step writes its own rows: as xs and ys, all of it would be copied every step.
        def body(carry: tuple, xs: tuple) -> tuple[tuple, None]:
            x, kept, i = carry
            state, window = xs
            filled: dict[str, jax.Array] = {}

            def store(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
                for name, value in (("k", k), ("v", v)):
                    rows = value.astype(kept[name].dtype)[None]
                    filled[name] = jax.lax.dynamic_update_slice(kept[name], rows, (i, 0, start, 0, 0))
                return (
                    jax.lax.dynamic_index_in_dim(filled["k"], i, keepdims=False),
                    jax.lax.dynamic_index_in_dim(filled["v"], i, keepdims=False),
                )

            mask = self._mask(positions, kept["k"].shape[2], window, cached=True)
            x = nnx.merge(graph, state)(x, cos, sin, mask, store)
            return (x, filled, i + 1), None

        xs = (weights, self._scanned_windows())
        carry, _ = jax.lax.scan(body, (x, old, jnp.int32(0)), xs, length=self.config.num_hidden_layers)
        return carry[0], carry[1]

    def _scanned_windows(self) -> jax.Array | None:
        """Windows as an int32 [L] scanned beside the weights; no window is one wider than any position."""
        widest = jnp.iinfo(jnp.int32).max
        windows = [widest if w is None else w for w in self.config.windows]
        return jnp.asarray(windows, jnp.int32) if windows else None

    @staticmethod
    def _mask(positions: jax.Array, keys: int, window: Any, cached: bool = False) -> jax.Array | None:
        """Which keys a query sees, bool [1, 1, T, S]; None where plain causality says it."""
        if window is None and not cached:
            return None
        behind = positions[:, None] - jnp.arange(keys, dtype=jnp.int32)[None, :]
        seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
        return seen[None, None]


def init_cache(
    config: LlamaConfig, batch: int, length: int, dtype: Any = jnp.float32, scan_layers: bool = False
) -> Cache:
    """An empty key/value cache.

    Args:
        config: of the model.
        batch: number of sequences, all of the same length.
        length: most positions it can ever hold; writing beyond it overwrites the last ones.
        dtype: of the stored keys and values.
        scan_layers: which form of the model it is for.

    Returns:
        ``{"layers": [{"k": [batch, length, kv_heads, head_dim], "v": ...}, ...], "length": int32 0}``; stacked
        ``{"layers": {"k": [layers, batch, ...], "v": ...}, ...}`` for the scanned form.
    """
    shape = (batch, length, config.num_key_value_heads, config.head_dim)
    if scan_layers:
        stacked = (config.num_hidden_layers, *shape)
        layers: Any = {"k": jnp.zeros(stacked, dtype), "v": jnp.zeros(stacked, dtype)}
    else:
        layers = [{"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)} for _ in range(config.num_hidden_layers)]
    return {"layers": layers, "length": jnp.int32(0)}


def cache_room(cache: Any) -> int | None:
    """How many more tokens a cache of :func:`init_cache` can take; None for a cache of another make."""
    if not isinstance(cache, dict) or set(cache) != {"layers", "length"} or isinstance(cache["length"], Tracer):
        return None
    layers = cache["layers"]
    first = layers[0] if isinstance(layers, list) else layers
    return first["k"].shape[-3] - int(cache["length"])

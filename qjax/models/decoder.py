"""What all decoders share: the walk over their layers, in two forms with the same mathematics, and the cache.

- unrolled: ``layers`` is a list; parameters are named ``layers/3/attn/q_proj/kernel``.
- scanned (``scan_layers=True``): ``layers`` is one layer whose leaves are stacked, ``[L, ...]``, and ``jax.lax.scan``
  runs over them; parameters are named ``layers/attn/q_proj/kernel``. Traces and compiles in the time of one layer.

The key/value cache is a value: it goes in and a new one comes out, nothing is mutated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer

from qjax.errors import ModelError, near
from qjax.models.activations import ACTIVATIONS

Cache = dict[str, Any]


@runtime_checkable
class DecoderConfig(Protocol):
    """What the configuration of any decoder says."""

    @property
    def vocab_size(self) -> int:
        """Tokens."""
        ...

    @property
    def num_hidden_layers(self) -> int:
        """Layers."""
        ...

    @property
    def num_key_value_heads(self) -> int:
        """Heads of keys and values."""
        ...

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        ...

    @property
    def max_position_embeddings(self) -> int:
        """Most tokens that it was made for."""
        ...

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Per layer the number of positions that a query sees, itself included; None sees all. Empty: all None."""
        ...

    @property
    def decoder(self) -> type[Decoder]:
        """The Flax NNX module that it configures."""
        ...


@runtime_checkable
class OwnCache(Protocol):
    """Keys and values of a layer, or of stacked layers, that are kept in a form of their own and attended over in it.

    It may stand in a cache where :func:`init_cache` has ``{"k": ..., "v": ...}``; `qjax.quantize_cache` makes such.
    """

    @property
    def room(self) -> int:
        """Positions that there is room for."""
        ...

    def written(self, k: jax.Array, v: jax.Array, start: Any, layer: Any = None) -> OwnCache:
        """It with new keys and values [B, T, KV, D] from position ``start`` on; ``layer`` says where in a stack."""
        ...

    def attend(
        self, q: jax.Array, length: Any, *, window: Any = None, layer: Any = None, scale: Any = None
    ) -> jax.Array:
        """Causal attention of queries [B, T, H, D], which stand at the last of ``length`` positions."""
        ...


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, store: Callable | None, scale: float | None = None
) -> jax.Array:
    """Attend, over the tokens given or over a cache.

    Args:
        q: float [B, T, H, D].
        k: float [B, T, KV, D].
        v: likewise.
        mask: bool [1, 1, T, S], or None: causal over the T tokens.
        store: what :class:`Decoder` gives to its layers, or None.
        scale: factor on products of queries and keys, by default ``D ** -0.5``.
    """
    if store is not None:
        return store(q, k, v, mask, scale)
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=mask is None, scale=scale)


class Embed(nnx.Module):
    """A table of rows, looked up by token and read once more by a tied output projection; its dtype is the model's."""

    def __init__(self, count: int, size: int, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (count, size), jnp.float32))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Rows of int tokens [...]: [..., size]."""
        return jnp.take(self.embedding[...], tokens, axis=0)


def linear(ins: int, outs: int, bias: bool, dot_general: Callable, rngs: nnx.Rngs, gain: float = 1.0) -> nnx.Linear:
    """A linear [ins, outs] whose outputs have ``gain`` times the variance of its inputs."""
    init = nnx.initializers.variance_scaling(gain, "fan_in", "normal")
    return nnx.Linear(ins, outs, use_bias=bias, kernel_init=init, dot_general=dot_general, rngs=rngs)


def positions_of(table: Embed, positions: jax.Array, longest: int, offset: int = 0) -> jax.Array:
    """Learned vectors [T, size] of int positions [T], the first of which stands ``offset`` rows down the table.

    Raises:
        ModelError: more positions at once than there are.
    """
    if positions.shape[0] > longest:
        raise ModelError(f"a text of {positions.shape[0]} tokens is longer than the {longest} that this model reads.")
    return table(positions + offset)


def check_sizes(config: Any) -> None:
    """Refuse sizes that no transformer without grouped heads can have.

    Raises:
        ModelError: a size that is not positive, heads that do not divide the hidden size, or an unknown activation.
    """
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings"):
        value = getattr(config, name)
        if not isinstance(value, int) or value <= 0:
            raise ModelError(f"{name} is {value!r}, but must be a positive integer; mend config.json.")
    if config.hidden_size % config.num_attention_heads:
        raise ModelError(
            f"hidden_size ({config.hidden_size}) is not a multiple of num_attention_heads "
            f"({config.num_attention_heads}); mend config.json."
        )
    if config.hidden_act not in ACTIVATIONS:
        hint = near(config.hidden_act, ACTIVATIONS)
        raise ModelError(f"hidden_act {config.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}{hint}.")


class Decoder(nnx.Module):
    """A decoder: tokens in, logits out. An architecture adds ``_begin``, ``_end`` and its layers.

    A layer is called as ``layer(x, *context, mask, store)``: ``context`` is what ``_begin`` made for all layers,
    ``mask`` bool [1, 1, T, S] or None (causal over the T tokens given), and ``store`` puts new keys and values into a
    cache and attends over all of it, or is None: :func:`attention` takes it.

    Args:
        config: sizes and switches.
        scan_layers: stack the layers and scan over them (see the module's docstring).
        dot_general: the product used by the linears, ``jax.lax.dot_general`` unless a trainer brings its own.
        rngs: where initial weights come from; ``nnx.Rngs(0)``.
    """

    config: Any
    dot_general: Callable

    def __init__(
        self,
        config: Any,
        *,
        scan_layers: bool = False,
        dot_general: Callable = jax.lax.dot_general,
        rngs: nnx.Rngs,
    ) -> None:
        raise NotImplementedError

    def _begin(self, tokens: jax.Array, positions: jax.Array, length: Any) -> tuple[jax.Array, tuple]:
        """Vectors of tokens [B, T] at positions [T] of ``length`` in all, and what each layer is given besides."""
        raise NotImplementedError

    def _end(self, x: jax.Array) -> jax.Array:
        """Logits [B, T, vocab] of what the last layer gave."""
        raise NotImplementedError

    def _set_layers(self, layers: Sequence[nnx.Module], scan_layers: bool) -> None:
        self.scan_layers = scan_layers
        if not scan_layers:
            self.layers = nnx.List(layers)
            return
        states = [nnx.state(layer) for layer in layers]
        if len({jax.tree.structure(state) for state in states}) > 1:
            raise ModelError("the layers of this model differ in kind and only equal ones can be scanned; unroll them.")
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        self.layers = nnx.merge(nnx.graphdef(layers[0]), stacked)

    def _tied_logits(self, x: jax.Array, embed: Embed) -> jax.Array:
        table = embed.embedding[...]
        return self.dot_general(x, table.astype(x.dtype), (((2,), (1,)), ((), ())))

    def __call__(self, tokens: jax.Array, cache: Cache | None = None) -> Any:
        """Logits of the next token at each position.

        Args:
            tokens: int32 [B, T].
            cache: from :func:`init_cache`; the tokens then follow those that it holds.

        Returns:
            float [B, T, vocab]; with a cache, that and the new cache.
        """
        length = tokens.shape[1]
        start = 0 if cache is None else cache["length"]
        positions = start + jnp.arange(length, dtype=jnp.int32)
        x, context = self._begin(tokens, positions, start + length)
        if cache is None:
            return self._end(self._forward(x, context))
        x, layers = self._extend(x, context, positions, cache)
        return self._end(x), {"layers": layers, "length": cache["length"] + length}

    def _forward(self, x: jax.Array, context: tuple) -> jax.Array:
        positions = jnp.arange(x.shape[1], dtype=jnp.int32)
        if not self.scan_layers:
            for i, layer in enumerate(self.layers):
                x = layer(x, *context, _mask(positions, x.shape[1], self._window(i)), None)
            return x
        graph, weights = nnx.split(self.layers)

        def body(x: jax.Array, xs: tuple) -> tuple[jax.Array, None]:
            state, window = xs
            return nnx.merge(graph, state)(x, *context, _mask(positions, x.shape[1], window), None), None

        return jax.lax.scan(body, x, (weights, self._scanned_windows()), length=self.config.num_hidden_layers)[0]

    def _extend(self, x: jax.Array, context: tuple, positions: jax.Array, cache: Cache) -> tuple[jax.Array, Any]:
        old, start = cache["layers"], cache["length"]
        if not self.scan_layers:
            new = []
            for i, (layer, kept) in enumerate(zip(self.layers, old, strict=True)):
                filled: list[Any] = []
                window = self._window(i)
                store = functools.partial(_store, kept, filled, start, None, window)
                x = layer(x, *context, _mask(positions, _room(kept), window, cached=True), store)
                new += filled
            return x, new
        graph, weights = nnx.split(self.layers)

        # The cache is a carry and each step writes its own rows: as xs and ys, all of it would be copied every step.
        def body(carry: tuple, xs: tuple) -> tuple[tuple, None]:
            x, kept, i = carry
            state, window = xs
            filled: list[Any] = []
            store = functools.partial(_store, kept, filled, start, i, window)
            mask = _mask(positions, _room(kept), window, cached=True)
            x = nnx.merge(graph, state)(x, *context, mask, store)
            return (x, filled[0], i + 1), None

        xs = (weights, self._scanned_windows())
        carry, _ = jax.lax.scan(body, (x, old, jnp.int32(0)), xs, length=self.config.num_hidden_layers)
        return carry[0], carry[1]

    def _window(self, layer: int) -> int | None:
        return self.config.windows[layer] if self.config.windows else None

    def _scanned_windows(self) -> jax.Array | None:
        """Windows as an int32 [L] scanned beside the weights; no window is one wider than any position."""
        widest = jnp.iinfo(jnp.int32).max
        windows = [widest if w is None else w for w in self.config.windows]
        return jnp.asarray(windows, jnp.int32) if windows else None


def _store(
    kept: Any,
    filled: list[Any],
    start: Any,
    layer: Any,
    window: Any,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    scale: float | None,
) -> jax.Array:
    """Attend over a layer's cache and the new keys and values; what it is afterwards is added to ``filled``."""
    if isinstance(kept, OwnCache):
        filled.append(kept.written(k, v, start, layer))
        return filled[-1].attend(q, start + q.shape[1], window=window, layer=layer, scale=scale)
    stacked: dict[str, jax.Array] = {}
    for name, value in (("k", k), ("v", v)):
        rows = jnp.swapaxes(value, 1, 2).astype(kept[name].dtype)
        rows, at = (rows, ()) if layer is None else (rows[None], (layer,))
        stacked[name] = jax.lax.dynamic_update_slice(kept[name], rows, (*at, 0, 0, start, 0))
    filled.append(stacked)
    own = [
        stacked[n] if layer is None else jax.lax.dynamic_index_in_dim(stacked[n], layer, keepdims=False) for n in "kv"
    ]
    k, v = (jnp.swapaxes(a, 1, 2) for a in own)
    return attention(q, k, v, mask, None, scale)


def _room(kept: Any) -> int:
    """How many positions a layer's cache, or that of stacked layers, holds."""
    return kept.room if isinstance(kept, OwnCache) else kept["k"].shape[-2]


def _mask(positions: jax.Array, keys: int, window: Any, cached: bool = False) -> jax.Array | None:
    """Which keys a query sees, bool [1, 1, T, S]; None where plain causality says it."""
    if window is None and not cached:
        return None
    behind = positions[:, None] - jnp.arange(keys, dtype=jnp.int32)[None, :]
    seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
    return seen[None, None]


def init_cache(
    config: DecoderConfig, batch: int, length: int, dtype: Any = jnp.float32, scan_layers: bool = False
) -> Cache:
    """An empty key/value cache.

    Heads stand in front of positions, as the products of attention read them: in the order of the activations XLA on
    GPUs brings the whole cache into this one at each step, and back.

    Args:
        config: of the model.
        batch: number of sequences, all of the same length.
        length: most positions it can ever hold; writing beyond it overwrites the last ones.
        dtype: of the stored keys and values.
        scan_layers: which form of the model it is for.

    Returns:
        ``{"layers": [{"k": [batch, kv_heads, length, head_dim], "v": ...}, ...], "length": int32 0}``; stacked
        ``{"layers": {"k": [layers, batch, ...], "v": ...}, ...}`` for the scanned form.
    """
    shape = (batch, config.num_key_value_heads, length, config.head_dim)
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
    return _room(first) - int(cache["length"])

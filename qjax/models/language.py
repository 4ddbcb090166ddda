"""A language model as pure functions of its parameters, and text generation with any such functions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import ModelError
from qjax.models import functional
from qjax.models.decoder import Cache, Decoder, DecoderConfig, cache_room, init_cache

Extend = Callable[[Any, jax.Array, Cache], tuple[jax.Array, Cache]]


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A decoder as functions of ``params``: ``fn(params, tokens)``, ``fn.prefill`` and ``fn.decode_step``.

    Attributes:
        config: sizes and switches; its ``decoder`` is the module.
        scan_layers: ``params`` are stacked and the layers are scanned.
        fused: Llama family only: ``params`` are those of `qjax.models.fuse`, with q, k and v in one matrix.
    """

    config: DecoderConfig
    scan_layers: bool = False
    fused: bool = False

    def __post_init__(self) -> None:
        from qjax.models.llama import Llama  # which imports this module

        if self.fused and not issubclass(self.config.decoder, Llama):
            name = self.config.decoder.__name__
            raise ModelError(f"fused is for decoders of the Llama family, and this is a {name}; leave it out.")

    def __call__(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Logits of the next token at each position: int32 [B, T] to float [B, T, vocab]."""
        return self._bind(params)(tokens)

    def prefill(self, params: Any, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Read tokens, int32 [B, T], behind those in the cache: logits [B, T, vocab] and the new cache."""
        return self._bind(params)(tokens, cache)

    def decode_step(self, params: Any, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Read one token per sequence, int32 [B]: logits of the next one, [B, vocab], and the new cache."""
        logits, cache = self._bind(params)(tokens[:, None], cache)
        return logits[:, 0], cache

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32) -> Cache:
        """An empty cache for ``batch`` sequences of at most ``length`` tokens (see :func:`decoder.init_cache`)."""
        return init_cache(self.config, batch, length, dtype, self.scan_layers)

    def init(self, seed: int = 0) -> Any:
        """Random parameters."""
        return functional.init_params(self.config.decoder, self.config, seed, **self._options)

    def abstract_params(self, dtype: Any = jnp.float32) -> Any:
        """Shapes of the parameters."""
        return functional.abstract_params(self.config.decoder, self.config, dtype, **self._options)

    def module(self, params: Any) -> Decoder:
        """The Flax NNX module with these parameters in it."""
        return self._bind(params)

    def generate(
        self, params: Any, prompt: Any, max_new_tokens: int, *, cache: Cache | None = None, **settings: Any
    ) -> np.ndarray:
        """:func:`generate` with this model's own functions and, unless one is given, a cache of the right size."""
        prompt = _as_prompt(prompt)
        cache = self.init_cache(prompt.shape[0], prompt.shape[1] + max_new_tokens) if cache is None else cache
        functions = {"prefill": self.prefill, "decode_step": self.decode_step}
        return generate(params, prompt, max_new_tokens, cache=cache, **functions, **settings)

    def _bind(self, params: Any) -> Decoder:
        return functional.bind(self.config.decoder, self.config, params, **self._options)

    @property
    def _options(self) -> dict[str, Any]:
        return {"scan_layers": self.scan_layers, **({"fused": True} if self.fused else {})}


@functools.lru_cache(maxsize=16)
def _jitted(function: Callable, donate: bool) -> Callable:
    return jax.jit(function, donate_argnums=(2,) if donate else ())


@jax.jit
def _sample(logits: jax.Array, temperature: jax.Array, key: jax.Array) -> jax.Array:
    greedy = jnp.argmax(logits, axis=-1)
    drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, drawn, greedy).astype(jnp.int32)


def _as_prompt(prompt: Any) -> np.ndarray:
    prompt = np.asarray(prompt, np.int32)
    prompt = prompt[None] if prompt.ndim == 1 else prompt
    if prompt.ndim != 2 or prompt.size == 0:
        raise ModelError(f"a prompt is token ids, [T] or [B, T] with T >= 1, but its shape is {prompt.shape}.")
    return prompt


def stream(
    params: Any,
    prompt: Any,
    max_new_tokens: int,
    *,
    prefill: Extend,
    decode_step: Extend,
    cache: Cache,
    temperature: float = 0.0,
    key: jax.Array | None = None,
) -> Iterator[np.ndarray]:
    """Yield the new tokens one at a time, int32 [B].

    Args:
        params: first argument of the two functions; float or quantized, they only pass through.
        prompt: int [T] or [B, T].
        max_new_tokens: how many to yield.
        prefill: ``(params, tokens [B, T], cache) -> (logits [B, T, vocab], cache)``.
        decode_step: ``(params, tokens [B], cache) -> (logits [B, vocab], cache)``.
        cache: empty, with room for ``T + max_new_tokens - 1`` tokens; it is not changed.
        temperature: 0 takes the most probable token, else one is drawn from ``softmax(logits / temperature)``.
        key: PRNG key of the draws; needed when the temperature is not 0.

    Raises:
        ModelError: a prompt that is empty, a temperature without key, or a cache that is too small.
    """
    prompt = _as_prompt(prompt)
    if temperature > 0 and key is None:
        raise ModelError(f"temperature {temperature} needs a key, such as jax.random.key(0); or use temperature=0.")
    needed, room = prompt.shape[1] + max_new_tokens - 1, cache_room(cache)
    if room is not None and room < needed:
        raise ModelError(
            f"the cache has room for {room} tokens, but {prompt.shape[1]} of prompt and {max_new_tokens} new ones need "
            f"{needed}; make it with init_cache(batch, {needed}) or more."
        )
    key = jax.random.key(0) if key is None else key
    temperature = jnp.float32(temperature)
    if max_new_tokens <= 0:
        return
    logits, cache = _jitted(prefill, donate=False)(params, jnp.asarray(prompt), cache)
    logits = logits[:, -1]
    step = _jitted(decode_step, donate=True)  # the caches made here are nobody else's: update them in place
    for i in range(max_new_tokens):
        tokens = _sample(logits, temperature, jax.random.fold_in(key, i))
        yield np.asarray(tokens)
        if i + 1 < max_new_tokens:
            logits, cache = step(params, tokens, cache)


def generate(
    params: Any,
    prompt: Any,
    max_new_tokens: int,
    *,
    prefill: Extend,
    decode_step: Extend,
    cache: Cache,
    temperature: float = 0.0,
    key: jax.Array | None = None,
    stop: tuple[int, ...] = (),
) -> np.ndarray:
    """Prompt and continuation, int32 [B, T + new]; arguments as in :func:`stream`.

    ``stop`` names tokens that end a sequence: generation ends once every sequence has met one, and what a sequence
    holds behind its first is to be ignored.
    """
    rows = [_as_prompt(prompt)]
    ended = np.zeros(rows[0].shape[0], bool)
    functions = {"prefill": prefill, "decode_step": decode_step, "cache": cache}
    for tokens in stream(params, rows[0], max_new_tokens, temperature=temperature, key=key, **functions):
        rows.append(tokens[:, None])
        ended |= np.isin(tokens, stop)
        if ended.all():
            break
    return np.concatenate(rows, axis=1)

"""A cache of quantized keys and values: rounded as they are written, read by `q_attention` without being unpacked.

It stands in the place of a layer of a float cache (`qjax.models.init_cache`): the decoders of `qjax.models` write to it
and attend over it, in a loop over layers or a scan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from qjax.errors import FormatError, LayoutError
from qjax.formats import Format, QArray, quantize_array
from qjax.ops.attention import q_attention


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class KVCache:
    """Keys and values of one layer, or of a stack of layers, quantized with scales for each position and head.

    A value: `written` gives a new one. Made by `quantize_cache`. As a pytree its children are codes and scales, so that
    functions that qjax traces take it for what it is: a quantized array among arguments stands for floats there.

    Attributes:
        k: keys [B, KV, S, D], or [layers, B, KV, S, D].
        v: values likewise.
        implementation: the lowering of `q_attention` by name, or None to choose.
    """

    k: QArray
    v: QArray
    implementation: str | None = None

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        """Return codes and aux of keys and values, and what is static."""
        key = jax.tree_util.GetAttrKey
        children = (
            (key("k"), self.k.codes),
            (key("k_aux"), self.k.aux),
            (key("v"), self.v.codes),
            (key("v_aux"), self.v.aux),
        )
        return children, (*((a.fmt, a.layout, a.dtype) for a in (self.k, self.v)), self.implementation)

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> KVCache:
        """Return the cache from what `tree_flatten_with_keys` gave."""
        keys, values, implementation = static
        return cls(QArray(*children[:2], *keys), QArray(*children[2:], *values), implementation)

    @property
    def room(self) -> int:
        """Positions that there is room for."""
        return self.k.codes.shape[-2]

    def written(self, k: Array, v: Array, start: ArrayLike, layer: ArrayLike | None = None) -> KVCache:
        """Return the cache with new positions.

        Args:
            k: float [B, T, KV, D].
            v: float [B, T, KV, channels of values].
            start: int [], the position of the first.
            layer: int [], where there is an axis of layers.
        """
        new = {name: _written(getattr(self, name), a, start, layer) for name, a in (("k", k), ("v", v))}
        return dataclasses.replace(self, **new)

    def attend(
        self,
        q: Array,
        length: ArrayLike,
        *,
        window: ArrayLike | None = None,
        layer: ArrayLike | None = None,
        scale: float | None = None,
    ) -> Array:
        """Return attention of queries [B, T, H, D], the last of ``length`` positions: see `q_attention`."""
        how: dict[str, Any] = {"window": window, "layer": layer, "scale": scale}
        return q_attention(q, self.k, self.v, length, implementation=self.implementation, **how)


def _written(cache: QArray, x: Array, start: ArrayLike, layer: ArrayLike | None) -> QArray:
    if (layer is not None) != (cache.stack_ndim == 3):
        raise LayoutError(f"a cache of shape {tuple(cache.shape)} is written with layer={layer!r}")
    rows = jnp.swapaxes(x, 1, 2).astype(jnp.float32)  # [B, KV, T, D]
    aux = cache.fmt.fit(rows)
    codes = cache.fmt.packing.pack(cache.fmt.encode(rows, aux))
    front = () if layer is None else (layer,)

    def put(into: Array, new: Array) -> Array:
        new = new.astype(into.dtype)
        return lax.dynamic_update_slice(into, new[None] if front else new, (*front, 0, 0, start, 0))

    kept = {name: put(a, jnp.asarray(aux[name])) for name, a in cache.aux.items()}
    return dataclasses.replace(cache, codes=put(cache.codes, codes), aux=kept)


def quantize_cache(
    cache: Mapping[str, Any], keys: Format, values: Format | None = None, *, implementation: str | None = None
) -> dict[str, Any]:
    """Quantize a cache of `qjax.models`, empty or not: what is written to it later is rounded to the same formats.

    Each vector of a head is rounded by itself when it is written, and never again. A prompt attends over rounded keys
    and values too, as later tokens do.

    Args:
        cache: ``{"layers": ..., "length": ...}`` as `init_cache` of a language model makes it.
        keys: the format of keys: ``Int(8, per="token")``, ``Int(4, per="token", symmetric=False)``, ``KV4()``, or any
            other whose scales belong to one vector.
        values: the format of values, by default that of keys.
        implementation: the lowering of attention by name, or None to choose.

    Returns:
        The same with a `KVCache` for each layer, or one for a stack of layers.

    Raises:
        FormatError: for a format with a scale for the whole tensor, or that does not fit the channels.
        LayoutError: for a cache of another make.
    """
    formats = {"k": keys, "v": keys if values is None else values}

    def layer(kept: Any) -> KVCache:
        if not isinstance(kept, Mapping) or set(kept) != {"k", "v"}:
            raise LayoutError(f"quantize_cache of a layer {type(kept).__name__}; it takes caches that init_cache made")
        return KVCache(_quantized(kept["k"], formats["k"]), _quantized(kept["v"], formats["v"]), implementation)

    if not isinstance(cache, Mapping) or set(cache) != {"layers", "length"}:
        raise LayoutError(f"quantize_cache of {type(cache).__name__}; it takes a cache that init_cache made")
    layers = cache["layers"]
    return {**cache, "layers": [layer(a) for a in layers] if isinstance(layers, list) else layer(layers)}


def _quantized(x: Array, fmt: Format) -> QArray:
    out = quantize_array(x, fmt, in_axes=x.ndim - 1, stack_axes=tuple(range(x.ndim - 2)))
    shared = [name for name, a in out.aux.items() if a.shape[-2] != x.shape[-2]]
    if shared or fmt.whole_matrix:
        raise FormatError(
            f"quantize_cache to {fmt.name}, whose scales are shared by positions; a cache is written one position at a "
            'time and takes formats with scales for each vector, such as Int(8, per="token") or KV4()'
        )
    return out

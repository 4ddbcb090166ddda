"""From a Flax NNX module to a pure function of a plain parameter tree, and back.

``params`` is nested dicts, with a list where the module has a list, so that
``keystr(path, simple=True, separator='/')`` reads ``layers/3/attn/q_proj/kernel``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.errors import ModelError

Params = Any


def _keys(path: tuple) -> tuple:
    """Keys of a leaf of an nnx.State, without the attribute that holds a Variable's value."""
    return tuple(k.key if hasattr(k, "key") else k.idx for k in path if not isinstance(k, jax.tree_util.GetAttrKey))


@functools.lru_cache(maxsize=32)
def _skeleton(cls: Callable[..., Any], config: Any, options: tuple[tuple[str, Any], ...]) -> tuple[Any, Any]:
    module = nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0), **dict(options)))
    return nnx.split(module)


def to_params(state: Any) -> Params:
    """The plain tree of an ``nnx.State`` (or of a module's state): dicts, and lists for numbered children."""
    tree: dict = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        *parents, last = _keys(path)
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf

    def with_lists(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        children = {k: with_lists(v) for k, v in node.items()}
        return [children[i] for i in sorted(children)] if all(isinstance(k, int) for k in children) else children

    return with_lists(tree)


def abstract_params(cls: Callable[..., Any], config: Any, dtype: Any = jnp.float32, **options: Any) -> Params:
    """Shapes of the parameters of ``cls(config, **options)`` as a tree of ``jax.ShapeDtypeStruct``."""
    state = _skeleton(cls, config, tuple(sorted(options.items())))[1]
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), to_params(state))


def init_params(cls: Callable[..., Any], config: Any, seed: int = 0, **options: Any) -> Params:
    """Fresh random parameters."""
    return to_params(nnx.state(cls(config, rngs=nnx.Rngs(seed), **options)))


def bind(cls: Callable[..., Any], config: Any, params: Params, **options: Any) -> Any:
    """The module with these parameters in it.

    Raises:
        ModelError: ``params`` lacks a leaf of the module.
    """
    graph, state = _skeleton(cls, config, tuple(sorted(options.items())))

    def pick(path: tuple, _: Any) -> Any:
        node = params
        for key in _keys(path):
            try:
                node = node[key]
            except (KeyError, IndexError, TypeError):
                name = "/".join(map(str, _keys(path)))
                raise ModelError(
                    f"params have no {name!r}; pass the tree that qjax.models.load returned with this function."
                ) from None
        return node

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(pick, state))


def stack_layers(params: Params, stack: Callable[[tuple[Any, ...]], Any] = jnp.stack) -> Params:
    """From the unrolled form (``layers`` a list) to the scanned one (leaves stacked, ``[L, ...]``)."""
    if not isinstance(params["layers"], list):
        raise ModelError("these params are in the scanned form already; stack_layers takes a list of layers.")
    if len({jax.tree.structure(layer) for layer in params["layers"]}) > 1:
        raise ModelError("the layers of this model differ in kind and only equal ones can be stacked; unroll them.")
    return {**params, "layers": jax.tree.map(lambda *leaves: stack(leaves), *params["layers"])}


def unstack_layers(params: Params) -> Params:
    """From the scanned form (leaves stacked, ``[L, ...]``) to the unrolled one (``layers`` a list)."""
    if isinstance(params["layers"], list):
        raise ModelError("these params are in the unrolled form already; unstack_layers takes stacked layers.")
    count = jax.tree.leaves(params["layers"])[0].shape[0]
    return {**params, "layers": [jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(count)]}


_FUSED = {"attn": ("qkv_proj", ("q_proj", "k_proj", "v_proj")), "mlp": ("gate_up", ("gate", "up"))}


def fuse(params: Params) -> Params:
    """From a Llama's projections to the fused ones that ``LanguageModel(config, fused=True)`` reads.

    ``attn/{q,k,v}_proj`` become ``attn/qkv_proj`` and ``mlp/{gate,up}`` become ``mlp/gate_up``, outputs behind one
    another, in layers that are a list or stacked. Experts stay as they are. Each output keeps its own weights, so
    rounding output by output gives the same codes and scales.

    Raises:
        ModelError: layers of another architecture.
    """

    def layer(node: Any) -> Any:
        if not isinstance(node, dict) or not set(_FUSED["attn"][1]) <= set(node.get("attn", ())):
            raise ModelError("these layers have no attn/q_proj, k_proj and v_proj; fuse takes the params of a Llama.")
        out = dict(node)
        for part, (name, parts) in _FUSED.items():
            own = node[part]
            if set(parts) <= set(own):
                joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-1), *(own[p] for p in parts))
                out[part] = {**{k: v for k, v in own.items() if k not in parts}, name: joined}
        return out

    layers = params["layers"]
    return {**params, "layers": [layer(node) for node in layers] if isinstance(layers, list) else layer(layers)}

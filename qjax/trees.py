"""Trees with quantized leaves: splitting off what trains, and changing float dtypes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import QjaxError
from qjax.formats import is_quantized
from qjax.lazy import Lazy


def partition(tree: Any, trainable: Callable[[Any], bool] | None = None) -> tuple[Any, Any]:
    """Split a tree into what trains and what is frozen, each with None where the other has a leaf.

    Args:
        tree: any pytree; quantized leaves are leaves.
        trainable: which leaves train; by default float arrays, so that QArrays are frozen.
    """
    choose = trainable or _is_float
    train = jax.tree.map(lambda x: x if choose(x) else None, tree, is_leaf=is_quantized)
    frozen = jax.tree.map(lambda x: None if choose(x) else x, tree, is_leaf=is_quantized)
    return train, frozen


def combine(train: Any, frozen: Any) -> Any:
    """Inverse of `partition`."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, train, frozen, is_leaf=lambda x: x is None or is_quantized(x)
    )


def check_trainable(tree: Any) -> None:
    """Refuse a tree that an optimizer cannot train: one with packed or integer leaves.

    ``jax.grad`` and optax look at the arrays inside a `QArray`. The first refuses its codes as an integer input without
    naming a leaf; ``optax.adam(...).init`` makes moments for codes without a word. Call this before.

    Args:
        tree: what is to be differentiated or handed to an optimizer; None stands for nothing, as `partition` leaves it.

    Raises:
        QjaxError: a leaf is quantized, an integer array, or no array; the message names it and says what to do.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_quantized):
        if _is_float(leaf):
            continue
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "the tree"
        if is_quantized(leaf):
            what = f"is packed ({leaf!r}): codes are integers and have no derivative"
        else:
            what = f"is {leaf.dtype.name}, not float" if hasattr(leaf, "dtype") else f"is a {type(leaf).__name__}"
        raise QjaxError(
            f"{name} {what}, so no optimizer can train it; train the float leaves, train, frozen = "
            "qjax.partition(tree), or adapters on the frozen weights, qjax.lora"
        )


def astype(tree: Any, dtype: Any) -> Any:
    """Cast float leaves; quantized leaves keep codes and scales and take the dtype as the one they stand for."""

    def cast(x: Any) -> Any:
        if is_quantized(x) or _is_float(x):
            return x.astype(dtype)
        return x

    return jax.tree.map(cast, tree, is_leaf=is_quantized)


def replace_arrays(tree: Any, arrays: Sequence[Any]) -> Any:
    """The tree with its array leaves (quantized ones too) replaced in order; other leaves stay."""
    flat, treedef = jax.tree.flatten(tree, is_leaf=is_quantized)
    it = iter(arrays)
    return jax.tree.unflatten(treedef, [next(it) if is_array(x) else x for x in flat])


def is_array(x: Any) -> bool:
    """Whether a leaf is traced: arrays, tracers, abstract arrays and quantized leaves; anything else is static."""
    return isinstance(x, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct, Lazy)) or is_quantized(x)


def _is_float(x: Any) -> bool:
    return not is_quantized(x) and hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)

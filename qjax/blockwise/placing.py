"""Where a slice of a leaf lies: in the leaf, and on devices."""

from __future__ import annotations

from typing import Any

import jax

from qjax.applying.storage import LeafPlan
from qjax.errors import LayoutError
from qjax.formats import is_quantized
from qjax.rewriting.sharding import quantized_specs


def where(plan: LeafPlan, key: tuple[int, ...], ndim: int) -> tuple[Any, ...]:
    """An index that takes a slice of a leaf and keeps its key axes."""
    at = dict(zip(plan.key_axes, key, strict=True))
    return tuple(slice(at[a], at[a] + 1) if a in at else slice(None) for a in range(ndim))


def placed(piece: Any, value: Any) -> Any:
    """A quantized slice on the devices as its float form is, where its groups allow it."""
    sharding = getattr(value, "sharding", None)
    if not isinstance(sharding, jax.sharding.NamedSharding) or not any(sharding.spec) or not is_quantized(piece):
        return piece
    try:
        specs = quantized_specs(piece, sharding.spec, sharding.mesh)
    except LayoutError:  # shards would cut a group: it stays as the rounding left it
        return piece
    is_spec = lambda s: isinstance(s, jax.sharding.PartitionSpec)  # noqa: E731
    places = jax.tree.map(lambda s: jax.sharding.NamedSharding(sharding.mesh, s), specs, is_leaf=is_spec)
    return jax.device_put(piece, places)

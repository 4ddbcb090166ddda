"""Partition specs of quantized weights.

A float weight's spec names a mesh axis per dimension. Its codes and scales hold the same dimensions in stored order,
the in axes flattened into the last one, so the spec follows: stack and out axes one to one, the first in axis to the
last stored axis. An in axis can be sharded only where every shard starts on a byte and on a group; shape-one entries
of the scales are replicated.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jax.sharding import PartitionSpec

from qjax.errors import LayoutError
from qjax.formats import QArray


def quantized_specs(q: QArray, spec: Any, mesh: Any) -> QArray:
    """The specs of a QArray's children, as a QArray of specs.

    Args:
        q: the quantized weight (arrays or abstract arrays).
        spec: PartitionSpec of the float weight, in the user's layout.
        mesh: the mesh, for the number of shards.

    Returns:
        A QArray whose children are PartitionSpecs.

    Raises:
        LayoutError: shards of an in axis would cut a byte or a group, or an inner in axis is sharded.
    """
    by_axis = tuple(spec) + (None,) * (q.ndim - len(tuple(spec)))
    stored: list[Any] = [None] * q.codes.ndim
    for k, axis in enumerate((*q.stack_axes, *q.out_axes)):
        stored[k] = by_axis[axis]
    first, *inner = q.in_axes
    if any(by_axis[a] is not None for a in inner):
        raise LayoutError(f"only the first in axis {first} of a quantized weight {q.shape} can be sharded, not {inner}")
    if by_axis[first] is not None:
        shards = _shards(by_axis[first], mesh)
        rows = q.length // shards
        group = q.fmt.group if q.fmt.per == "group" else None
        aligned = q.length % shards == 0 and rows * q.fmt.code_bits % 8 == 0 and (not group or rows % group == 0)
        if not aligned or q.layout.pad:
            raise LayoutError(
                f"{shards} shards of the {q.length} numbers of a row would cut a byte or a group of {group}; "
                "shard the out axis, or choose a group that divides the shard"
            )
        stored[-1] = by_axis[first]

    def child(a: Any) -> PartitionSpec:
        return PartitionSpec(*(s if n != 1 else None for s, n in zip(stored, a.shape, strict=True)))

    return dataclasses.replace(q, codes=child(q.codes), aux={k: child(a) for k, a in q.aux.items()})


def _shards(names: Any, mesh: Any) -> int:
    return math.prod(mesh.shape[n] for n in (names if isinstance(names, tuple) else (names,)))

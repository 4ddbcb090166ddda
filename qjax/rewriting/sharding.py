"""Partition specs of quantized weights.

A float weight's spec names a mesh axis per dimension. Its codes and scales hold the same dimensions in stored order,
the in axes flattened into the last one, so the spec follows: stack and out axes one to one, the first in axis to the
last stored axis. An in axis can be sharded only where every shard starts on a byte and on a group (or one group is all
of a row); shape-one entries of the scales are replicated.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jax.sharding import PartitionSpec

from qjax.errors import LayoutError
from qjax.formats import SIGNS, QArray
from qjax.formats.parts import TiledParts


def quantized_specs(q: QArray, spec: Any, mesh: Any, where: str = "", apart: bool = False) -> QArray:
    """The specs of a QArray's children, as a QArray of specs.

    Args:
        q: the quantized weight (arrays or abstract arrays).
        spec: PartitionSpec of the float weight, in the user's layout.
        mesh: the mesh, for the number of shards.
        where: the leaf's name, for errors; "" where the caller adds it.
        apart: whether each device multiplies its shard by itself, as in shard_map.

    Returns:
        A QArray whose children are PartitionSpecs.

    Raises:
        LayoutError: shards of an in axis would cut a byte or a group (or, apart, what a rotation mixes), or an inner
            in axis is sharded.
    """
    by_axis = tuple(spec) + (None,) * (q.ndim - len(tuple(spec)))
    stored: list[Any] = [None] * q.codes.ndim
    for k, axis in enumerate((*q.stack_axes, *q.out_axes)):
        stored[k] = by_axis[axis]
    first, *inner = q.in_axes
    where = f"{where}: " if where else ""
    if any(by_axis[a] is not None for a in inner):
        raise LayoutError(
            f"{where}of the axes that a product sums over, a quantized weight {q.shape} can be sharded along the "
            f"first, {first}, and the spec {spec} names axis {next(a for a in inner if by_axis[a] is not None)}"
        )
    if isinstance(q.fmt, TiledParts):
        return _of_parts(q, [*stored[:-1], by_axis[first]], mesh, where)
    if q.fmt.whole_matrix and any(by_axis[a] is not None for a in (first, *q.out_axes)):
        raise LayoutError(
            f"{where}{q.fmt.name} has scales and corrections of whole matrices, so a weight {q.shape} can be sharded "
            f"along its stack axes only ({q.stack_axes or 'there are none'}), and the spec is {spec}; replicate it, "
            "or choose another format"
        )
    if by_axis[first] is not None:
        shards = _shards(by_axis[first], mesh)
        if not _aligned(q, shards):
            allowed = [str(n) for n in range(2, q.length + 1) if _aligned(q, n)]
            group = q.fmt.group if q.fmt.per == "group" else None
            raise LayoutError(
                f"{where}{shards} shards of the {q.length} numbers of a row would cut a byte"
                + (f" or a group of {group}" if group else "")
                + f"; axis {first} can be cut into {_among(allowed)} shards; shard another axis, or choose a group "
                "that divides a shard"
            )
        width = q.aux[SIGNS].shape[-1] if SIGNS in q.aux else 1
        if apart and (q.length // shards) % width:
            raise LayoutError(
                f"{where}{shards} shards of the {q.length} numbers of a row, of which a rotation mixes {width} at a "
                f"time; shard another axis, or quantize with Rotated(block=...) of a length that divides a shard"
            )
        stored[-1] = by_axis[first]

    def child(a: Any, name: str = "") -> PartitionSpec:
        along = [*stored[:-1], None] if name == SIGNS else stored  # of a block: the same for all blocks of a row
        return PartitionSpec(*(s if n != 1 else None for s, n in zip(along, a.shape, strict=True)))

    return dataclasses.replace(q, codes=child(q.codes), aux={k: child(a, k) for k, a in q.aux.items()})


def _of_parts(q: QArray, along: list[Any], mesh: Any, where: str) -> QArray:
    """The specs of a weight that is packed in parts: shards are whole parts."""
    rows, columns = next(iter(q.aux.values())).shape[q.stack_ndim], q.codes.shape[-1]
    for names, parts in ((along[q.stack_ndim], rows), (along[-1], columns)):
        if names is not None and parts % _shards(names, mesh):
            raise LayoutError(
                f"{where}{_shards(names, mesh)} shards of a weight packed in {rows} x {columns} parts along outputs "
                f"and inputs; pack it for this mesh (qjax.ops.pack_tree(tree, specs=..., mesh=...)), or replicate it"
            )
    cut = lambda a: PartitionSpec(*(s if n != 1 else None for s, n in zip(along, a.shape, strict=True)))  # noqa: E731
    return dataclasses.replace(q, codes=cut(q.codes), aux={name: cut(a) for name, a in q.aux.items()})


def _aligned(q: QArray, shards: int) -> bool:
    """Whether every shard of the in axis starts on a byte, and on a group where a row has several."""
    rows = q.length // shards
    group = q.fmt.group if q.fmt.per == "group" else None
    whole = q.length % shards == 0 and q.shape[q.in_axes[0]] % shards == 0 and not q.layout.pad
    return whole and q.fmt.packing.offset(rows) is not None and (not group or q.length <= group or rows % group == 0)


def _among(ways: list[str]) -> str:
    return f"{', '.join(ways[:-1])} or {ways[-1]}" if len(ways) > 1 else ways[0] if ways else "no"


def _shards(names: Any, mesh: Any) -> int:
    return math.prod(mesh.shape[n] for n in (names if isinstance(names, tuple) else (names,)))

"""The order in which a platform's kernel reads a weight: made once, at quantization or load, never per call."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from qjax.errors import LayoutError, near
from qjax.formats import Aux, Format, QArray
from qjax.formats.code_tiles import CodeTiles
from qjax.formats.mixed_tiles import MixedTiles
from qjax.formats.numerics import AnyArray
from qjax.formats.packing import row_pad
from qjax.formats.parts import TiledParts, cannot_cut
from qjax.formats.tiles import Tiled
from qjax.formats.trit_tiles import TritTiles
from qjax.formats.word_tiles import WordTiles

TILED: dict[str, tuple[type[Tiled], ...]] = {
    "mosaic": (WordTiles, TritTiles, MixedTiles, CodeTiles),
    "mosaic_int8": (CodeTiles,),
}
"""By target, the orders that there are; of those that take a format the first is made.

"mosaic_int8" is for products with int8 activations; formats that are for such products alone have it in both.
"""

TARGETS = tuple(TILED)


def _beside(name: str) -> bool:
    """Whether an array of aux says what is done to activations (``input.scale``, signs): those stay as they are."""
    return "." in name


def tiled_format(fmt: Format, length: int, target: str = "mosaic") -> Tiled | str:
    """Return the order in which a target's kernel reads weights of a format with rows of ``length``, or why none."""
    kinds = [kind for kind in TILED[target] if isinstance(fmt, kind.takes)]
    reasons = []
    for kind in kinds:
        why = kind.cannot(fmt, length)
        if why is None:
            return kind(fmt, length)  # pyright: ignore[reportCallIssue] (a dataclass with like and length)
        reasons.append(why)
    known = dict.fromkeys(k.__name__ for kind in TILED[target] for k in kind.takes)
    return "; ".join(dict.fromkeys(reasons)) or f"{fmt.name} weights have none, there is one for {', '.join(known)}"


def pack(w: QArray, target: str = "mosaic", *, parts: tuple[int, int] = (1, 1)) -> QArray:
    """Return a weight in the order that a kernel reads; what it stands for, its shape and its view stay the same.

    It is padded to whole tiles here. A packed weight is sliced along stack axes only, and runs everywhere: where the
    kernel cannot, it is dequantized. Save weights before packing, or `neutral` ones.

    Args:
        w: a weight of a format that has an order (`TILED`): ``Int`` of 2, 4 or 8 bits with integer zero points,
            ``Float8``, ``NF4``, ``MXFP4``, ``NVFP4``, ``TritPlanes``, ``MixedBits``, ``DualGrained``, ``Progressive``;
            groups are multiples of 32, or one scale per row. One that is packed for another target is packed anew.
        target: for the tensor cores of NVIDIA's Hopper: "mosaic", for the activations that a format is made for,
            16-bit floats with ``Int`` (`qjax.formats.word_tiles`), int8 with ``DualGrained`` and ``Progressive``;
            "mosaic_int8", for int8 activations with ``Int(4, ...)`` too (`qjax.formats.code_tiles`).
        parts: into how many equal parts the matrix is cut along (outputs, inputs) before each is packed by itself, so
            that as many devices can share it (`qjax.formats.parts`). ``MixedBits`` has one: scales of the whole matrix.

    Raises:
        LayoutError: for another target, or a format that has no such order, or parts that would not be equal or cut a
            group, with the reason.
    """
    _check_target(target, "pack")
    like, whole = w.fmt.like if isinstance(w.fmt, Tiled) else w.fmt, tuple(parts) == (1, 1)
    why = None if whole else cannot_cut(like, w.codes.shape[w.stack_ndim], w.length, parts)
    fmt = why or tiled_format(like, w.length // parts[1], target)
    if isinstance(fmt, str):
        raise LayoutError(f"pack: {w!r} has no order for {target}: {fmt}; leave it as it is")
    fmt = fmt if whole else TiledParts(fmt)
    if whole and fmt == w.fmt:
        return w
    w = neutral(w)
    packed = _retold(w, fmt, *_tiled(w, fmt, parts[0]))
    return dataclasses.replace(packed, layout=dataclasses.replace(w.layout, pad=0))


def _check_target(target: Any, function: str) -> None:
    if target not in TARGETS:
        raise LayoutError(f"{function}: target={target!r}{near(str(target), TARGETS)}; there is {', '.join(TARGETS)}")


def _order_for(w: QArray, target: str) -> Tiled | str:
    return tiled_format(w.fmt.like if isinstance(w.fmt, Tiled) else w.fmt, w.length, target)


def pack_tree(tree: Any, target: str = "mosaic", *, specs: Any = None, mesh: Any = None) -> Any:
    """Return a tree in which every weight that has an order for the target is packed, and all else is as it was.

    Args:
        tree: any pytree, such as ``model.params``; the packed one is called in its place: ``model(tree, *args)``.
        target: as in `pack`: "mosaic" for models whose activations stay in float, "mosaic_int8" for those with int8
            activations (8-bit weights stay in neutral order then, which their kernel reads).
        specs: for a mesh: the same tree with the `PartitionSpec` of the float weight, in the user's layout, in place of
            each weight. Weights are packed in one part for each device and placed there.
        mesh: of the specs.

    Raises:
        LayoutError: another target; specs without a mesh, or one that would not cut a weight evenly, with its path.
    """
    _check_target(target, "pack_tree")
    if (specs is None) != (mesh is None):
        raise LayoutError("pack_tree: specs and mesh go together; give both, or none")

    def able(leaf: Any) -> bool:
        done = isinstance(leaf, QArray) and isinstance(leaf.fmt, TiledParts) and specs is None
        return not done and isinstance(leaf, QArray) and isinstance(_order_for(leaf, target), Tiled)

    is_weight = lambda leaf: isinstance(leaf, QArray)  # noqa: E731
    if specs is None:
        return jax.tree.map(lambda leaf: pack(leaf, target) if able(leaf) else leaf, tree, is_leaf=is_weight)

    def placed(path: Any, leaf: Any, spec: Any) -> Any:
        if not able(leaf):
            return leaf
        along = _along(leaf, spec, jax.tree_util.keystr(path, simple=True, separator="/"))
        counts = [math.prod(mesh.shape[a] for a in _names(entry)) for entry in along]
        outs, ins = leaf.stack_ndim, leaf.codes.ndim - 1
        try:
            packed = pack(leaf, target, parts=(counts[outs], counts[ins]))
        except LayoutError as e:
            raise LayoutError(f"{jax.tree_util.keystr(path, simple=True, separator='/')}: {e}") from e
        cut = lambda a: jax.P(*(s if n > 1 else None for s, n in zip(along, a.shape, strict=True)))  # noqa: E731
        return jax.tree.map(lambda a: jax.device_put(a, jax.NamedSharding(mesh, cut(a))), packed)

    return jax.tree_util.tree_map_with_path(placed, tree, specs, is_leaf=is_weight)


def _names(entry: Any) -> tuple[str, ...]:
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _along(w: QArray, spec: Any, where: str) -> list[Any]:
    """The entry of a spec for each stored axis of a weight, if the weight can be cut so."""
    spec = spec.spec if isinstance(spec, jax.NamedSharding) else spec
    entries = (*spec, *[None] * (w.ndim - len(spec)))
    along: list[Any] = [None] * w.codes.ndim
    for k, axis in enumerate((*w.stack_axes, *w.out_axes)):
        along[k] = entries[axis]
    along[-1] = entries[w.in_axes[0]]
    inner = [*along[w.stack_ndim + 1 : w.stack_ndim + len(w.out_axes)], *(entries[a] for a in w.in_axes[1:])]
    if any(inner):
        raise LayoutError(f"{where}: {spec} cuts {w!r} along an axis that is not the first of its outputs or inputs")
    return along


def neutral(w: QArray) -> QArray:
    """Return a packed weight in the neutral order of rows, as it was before `pack`; others as they are."""
    if not isinstance(w.fmt, Tiled):
        return w
    fmt = w.fmt.like
    layout = dataclasses.replace(w.layout, pad=row_pad(fmt.packing, w.length))
    return dataclasses.replace(_retold(w, fmt, *_untiled(w, w.fmt)), layout=layout)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _tiled(w: QArray, fmt: Tiled, rows: int = 1) -> tuple[Array, Aux]:
    c = w.canonical()
    codes, aux = c.unpacked(), {k: a for k, a in c.aux.items() if not _beside(k)}
    return fmt.packing.pack(codes), fmt.cut(codes, aux, rows) if isinstance(fmt, TiledParts) else fmt.tiled(codes, aux)


@functools.partial(jax.jit, static_argnums=1)
def _untiled(w: QArray, fmt: Tiled) -> tuple[Array, Aux]:
    c = w.canonical()
    columns = (c.codes.shape[-1],) if isinstance(fmt, TiledParts) else ()
    codes, aux = fmt.untiled(c.aux, c.codes.shape[-2], *columns)
    return fmt.like.packing.pack(codes), aux


def _retold(w: QArray, fmt: Format, codes: Array, aux: Aux) -> QArray:
    """Put canonical codes and aux, [*stack, N or 1, anything], in the places of the weight's own axes."""
    stacks, ins = w.stack_ndim, w.view.count("i")
    outs = w.codes.shape[stacks : w.codes.ndim - ins]

    def place(a: AnyArray, whole: bool) -> Array:
        own = outs if whole else (a.shape[-2], *(1,) * (len(outs) - 1))  # parts stand along the first of the outs
        return jnp.reshape(a, (*w.codes.shape[:stacks], *own, *(1,) * (ins - 1), a.shape[-1]))

    rows = math.prod(outs)
    of_matrix = fmt.row_aux if isinstance(fmt, Tiled) else ()
    placed = {k: place(a, a.shape[-2] == rows and k not in of_matrix) for k, a in aux.items()}
    kept = {k: a for k, a in w.aux.items() if _beside(k)}
    return dataclasses.replace(w, codes=place(codes, True), aux={**placed, **kept}, fmt=fmt)

"""Layout: how a user's dimensions map to stored ones.

Codes are stored in one canonical order, [*stack, *out, 1.., K]: the stack axes (layers, experts), the axes that a
product keeps, and the axes that it sums over, flattened into the last one and packed; size-1 axes stand in for the
others so that the rank equals the weight's. The user sees the dimensions in any other order.

A `Layout` holds only what slicing, vmap and sharding leave alone. Sizes come from the arrays. Stack axes that a scan
or a vmap took away, or added in front, show in the rank of the codes: `Layout.present` accounts for them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

from qjax.errors import LayoutError

Label = tuple[str, int]
"""A user's dimension: ("s", k) stack axis k, ("o", k) out axis k, ("i", k) in axis k, ("u", 0) a unit dimension."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The static part of a view on packed codes.

    Attributes:
        order: a label for each of the user's dimensions.
        in_tail: sizes of the in axes after the first, whose size follows from the codes.
        pad: places of padding in the last byte of a row of codes.
    """

    order: tuple[Label, ...]
    in_tail: tuple[int, ...] = ()
    pad: int = 0

    def count(self, kind: str) -> int:
        """Return how many dimensions have this kind of label."""
        return sum(k == kind for k, _ in self.order)

    def axes(self, kind: str) -> tuple[int, ...]:
        """Return the user's axes of this kind, in storage order."""
        return tuple(a for _, a in sorted((k, a) for a, (name, k) in enumerate(self.order) if name == kind))

    def present(self, rank: int) -> Layout:
        """Return the layout as it is for codes of this rank: outer stack axes dropped, or new ones in front."""
        named = self.count("s")
        stacks = rank - self.count("o") - self.count("i")
        if stacks == named:
            return self
        if stacks < 0:
            raise LayoutError(
                f"a quantized array with {self.count('o')} out and {self.count('i')} in axes has codes of rank {rank}; "
                "something sliced or mapped away an axis that is no stack axis; dequantize it first"
            )
        shift = stacks - named
        kept = [(n, k + shift) if n == "s" else (n, k) for n, k in self.order if n != "s" or k + shift >= 0]
        front = [("s", k) for k in range(shift)] if shift > 0 else []
        return dataclasses.replace(self, order=tuple(front + kept))

    def without(self, axis: int) -> Layout:
        """Return the layout with a user's dimension gone and the labels behind it renumbered."""
        kind, number = self.order[axis]
        kept = self.order[:axis] + self.order[axis + 1 :]
        if kind != "u":
            kept = tuple((n, k - 1) if n == kind and k > number else (n, k) for n, k in kept)
        return dataclasses.replace(self, order=kept)

    def split(self, axis: int, count: int) -> Layout:
        """Return the layout with a stack or out dimension replaced by ``count`` dimensions of the same kind."""
        kind, number = self.order[axis]
        moved = [(n, k + count - 1) if n == kind and k > number else (n, k) for n, k in self.order]
        moved[axis : axis + 1] = [(kind, number + k) for k in range(count)]
        return dataclasses.replace(self, order=tuple(moved))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able description."""
        return {"order": [f"{n}{k}" for n, k in self.order], "in_tail": list(self.in_tail), "pad": self.pad}

    @classmethod
    def from_dict(cls, spec: Mapping[str, Any]) -> Self:
        """Read back what `to_dict` wrote."""
        try:
            order = tuple((label[0], int(label[1:])) for label in spec["order"])
            if any(kind not in "soiu" for kind, _ in order):
                raise ValueError
            return cls(order, tuple(int(n) for n in spec["in_tail"]), int(spec["pad"]))
        except (KeyError, TypeError, ValueError, IndexError):
            raise LayoutError(
                f"not a layout: {spec!r}; expected order, in_tail and pad as Layout.to_dict writes them"
            ) from None


def axis_index(axis: int, ndim: int) -> int:
    """Return a non-negative axis, or raise `LayoutError`."""
    if not -ndim <= axis < ndim:
        raise LayoutError(f"axis {axis} of an array with {ndim} dimensions")
    return axis % ndim


def weight_layout(ndim: int, in_axes: int | Sequence[int], stack_axes: int | Sequence[int]) -> Layout:
    """Return the layout of a weight that is about to be quantized, padding not yet known.

    Args:
        ndim: rank of the weight.
        in_axes: the axes that a product sums over, in the order in which they are flattened; at least one.
        stack_axes: the axes of the stack, outermost first.
    """
    ins = [in_axes] if isinstance(in_axes, int) else list(in_axes)
    stacks = [stack_axes] if isinstance(stack_axes, int) else list(stack_axes)
    ins, stacks = [axis_index(a, ndim) for a in ins], [axis_index(a, ndim) for a in stacks]
    if not ins:
        raise LayoutError("quantizing needs at least one in axis (the axis that a product sums over); in_axes is empty")
    if len(set(ins + stacks)) != len(ins + stacks):
        raise LayoutError(f"in_axes={tuple(ins)} and stack_axes={tuple(stacks)} name an axis twice")
    outs = [a for a in range(ndim) if a not in ins and a not in stacks]
    label = {a: ("s", k) for k, a in enumerate(stacks)}
    label |= {a: ("o", k) for k, a in enumerate(outs)}
    label |= {a: ("i", k) for k, a in enumerate(ins)}
    return Layout(tuple(label[a] for a in range(ndim)))


def in_sizes(layout: Layout, length: int) -> tuple[int, ...]:
    """Return the sizes of the in axes whose product is ``length``."""
    tail = math.prod(layout.in_tail)
    return (length // tail if tail else 0, *layout.in_tail)


def resolve_shape(shape: Sequence[int], size: int) -> tuple[int, ...]:
    """Replace one -1 in a shape and check that the size is kept."""
    shape = tuple(int(n) for n in shape)
    known = math.prod(n for n in shape if n != -1)
    if shape.count(-1) == 1 and known and size % known == 0:
        shape = tuple(size // known if n == -1 else n for n in shape)
    if any(n < 0 for n in shape) or math.prod(shape) != size:
        raise LayoutError(f"an array of {size} elements cannot be reshaped to {shape}")
    return shape


def pair_dimensions(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Pair dimensions of two shapes of the same size into the shortest groups of equal products.

    Dimensions of size 1 without a partner form groups of their own, with an empty other side.
    """
    pairs: list[tuple[list[int], list[int]]] = []
    a = b = 0
    while a < len(old) or b < len(new):
        if a < len(old) and b < len(new) and old[a] == new[b]:
            pairs.append(([a], [b]))
            a, b = a + 1, b + 1
        elif b < len(new) and new[b] == 1:
            pairs.append(([], [b]))
            b += 1
        elif a < len(old) and old[a] == 1:
            pairs.append(([a], []))
            a += 1
        elif a == len(old) or b == len(new) or 0 in old or 0 in new:
            raise LayoutError(f"a reshape from {tuple(old)} to {tuple(new)} does not keep dimensions apart")
        else:
            left, right = [a], [b]
            p, q = old[a], new[b]
            a, b = a + 1, b + 1
            while p != q:
                if p < q:
                    p *= old[a]
                    left.append(a)
                    a += 1
                else:
                    q *= new[b]
                    right.append(b)
                    b += 1
            pairs.append((left, right))
    return pairs

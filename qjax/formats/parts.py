"""A weight cut into equal parts, each in the order of a kernel by itself: what several devices share.

Tiles of a matrix cannot be cut where a mesh cuts the matrix: columns lie apart, and scales of a block stand behind one
another for all rows. So the matrix [N, K] is cut first, into R x C parts of N/R rows and K/C columns, and each part is
laid out and padded as a matrix of its own:

    codes  int8  [*stack, N, C]      nothing but a shape: one byte for each row and part along K
    aux          [*stack, R, C x]    every array [*stack, 1, x] that the order of one part has, part after part

Both axes are cut along parts by any number of devices that divides R or C, and every cut is contiguous. With one part
for each device, a device holds exactly an ordinary packed weight. `qjax.ops.pack` makes it; made for a mesh, a weight
still runs on fewer devices, part by part.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from qjax.errors import FormatError
from qjax.formats.base import Aux, Format
from qjax.formats.integer import Int
from qjax.formats.numerics import AnyArray
from qjax.formats.registry import register_format
from qjax.formats.tiles import Elsewhere, Tiled


@dataclasses.dataclass(frozen=True)
class PartsElsewhere(Elsewhere):
    """Codes that stand in aux, with a byte for each part of ``length`` columns."""

    def row_bytes(self, length: int) -> int:
        return length // self.length

    def capacity(self, nbytes: int) -> int:
        return nbytes * self.length

    def pack(self, codes: ArrayLike) -> Array:
        *rest, length = jnp.shape(codes)
        return jnp.zeros((*rest, length // self.length), jnp.int8)


@register_format("tiled_parts")
@dataclasses.dataclass(frozen=True)
class TiledParts(Tiled):
    """Parts of a weight, each in the order ``part``; the numbers are exactly those of ``part.like``.

    Made by ``qjax.ops.pack(w, parts=...)``, not by rounding. How many parts there are follows from the arrays.

    Args:
        part: the order of one part, whose ``length`` is the columns of a part.
    """

    part: Tiled

    takes: ClassVar[tuple[type[Format], ...]] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.part, Tiled) or isinstance(self.part, TiledParts):
            raise FormatError(f"TiledParts: a part is in the order of a kernel, and {self.part!r} is none")

    @property
    def like(self) -> Format:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The format of the weight that was packed."""
        return self.part.like

    @property
    def length(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Columns of one part."""
        return self.part.length

    @property
    def row_aux(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As in ``part``."""
        return tuple(self.part.row_aux)

    @property
    def for_codes(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As in ``part``."""
        return self.part.for_codes

    @property
    def name(self) -> str:
        """For example ``int4 g128 tiles in parts``."""
        return f"{self.part.name} in parts"

    @property
    def packing(self) -> PartsElsewhere:
        """Codes stand in aux."""
        return PartsElsewhere(self.length)

    def cut(self, codes: AnyArray, aux: Aux, rows: int) -> Aux:
        """Return aux of this format in ``rows`` parts along N, from codes [*stack, N, K] and aux of ``like``."""
        *stack, n, k = codes.shape
        groups, columns = self.like.groups(k), k // self.length
        own: Aux = {
            name: _cut(a, rows if a.shape[-2] == n else 1, columns if a.shape[-1] == groups > 1 else 1)
            for name, a in aux.items()
        }
        own = {name: jnp.broadcast_to(a, (*stack, rows, columns, *a.shape[-2:])) for name, a in own.items()}
        parts = self.part.tiled(_cut(codes, rows, columns), own)
        return {name: a.reshape(*stack, rows, -1) for name, a in parts.items()}

    def tiled(self, codes: AnyArray, aux: Aux) -> Aux:
        return self.cut(codes, aux, 1)

    def pieces(self, aux: Aux, columns: int) -> Aux:
        """Return aux of ``part``, with the parts as two more stack axes: [*stack, R, C, 1, x]."""
        own = {name: a for name, a in aux.items() if name in self.row_aux}
        return {name: a.reshape(*a.shape[:-1], columns, 1, a.shape[-1] // columns) for name, a in own.items()}

    def untiled(self, aux: Aux, n: int, columns: int = 1) -> tuple[Array, Aux]:
        """Return codes [*stack, N, K] and aux as ``like`` has them; ``columns`` parts stand side by side."""
        pieces = self.pieces(aux, columns)
        rows = next(iter(pieces.values())).shape[-4]
        codes, own = self.part.untiled(pieces, n // rows)
        several = self.like.groups(self.length * columns) > 1
        out: Aux = {}
        for name, a in own.items():
            if self.per == "tensor" or a.shape[-2] != n // rows:  # the same for all rows
                a = a[..., :1, :, :, :]
            if not several or a.shape[-1] != self.like.groups(self.length):  # the same for all columns
                a = a[..., :1, :, :]
            out[name] = _joined(a)
        return _joined(codes), out

    def decode(self, codes: AnyArray, aux: Aux) -> Array:
        """Return what ``like`` decodes to, float32; only the shape of ``codes`` is looked at."""
        return self.like.decode(*self.untiled(aux, codes.shape[-2], codes.shape[-1] // self.length))


def _cut(a: AnyArray, rows: int, columns: int) -> Array:
    """[*stack, n, k] as [*stack, rows, columns, n / rows, k / columns]."""
    *stack, n, k = a.shape
    return jnp.swapaxes(jnp.reshape(a, (*stack, rows, n // rows, columns, k // columns)), -3, -2)


def _joined(a: AnyArray) -> Array:
    """[*stack, rows, columns, n, k] as [*stack, rows n, columns k]."""
    *stack, rows, columns, n, k = a.shape
    return jnp.swapaxes(a, -3, -2).reshape(*stack, rows * n, columns * k)


def cannot_cut(like: Format, n: int, k: int, parts: tuple[int, int]) -> str | None:
    """Return why a weight [N, K] cannot be cut into ``(along N, along K)`` parts; None if it can."""
    for name, size, count in (("N", n, parts[0]), ("K", k, parts[1])):
        if count < 1 or size % count:
            return f"{name} = {size} is not cut evenly into {count} parts"
    if like.whole_matrix:
        return f"scales of {like.name} belong to the whole matrix, which is packed in one piece"
    if parts[1] > 1 and like.groups(k) > 1 and (like.groups(k) % parts[1] or k % (like.group or 1)):
        return f"{parts[1]} parts of K = {k} would cut a group of {like.group}"
    if parts[1] > 1 and not isinstance(like, Int) and like.groups(k) == parts[1]:
        return f"a part of K would hold one group of {like.group}, which {like.name} does not tell from one per row"
    return None

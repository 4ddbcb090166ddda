"""What orders for kernels share, and integers of 8 bits in the order in which a GPU's tensor cores read them.

What is on disk is neutral: rows of bits. A kernel on the GPU reads the weight in tiles, and an order that is made once,
when a model is put on its device, costs nothing per call. `IntTiles` is that order; `qjax.ops.pack` makes it and
`qjax.ops.neutral` undoes it. With N and K the sizes of one matrix,

    N' = N rounded up to 128, K' = K rounded up to 128, B = 64 columns, or 32 where groups are no multiple of 64
    tiles  int8     [*stack, 1, N' K']  as [N'/64, K'/B, 64, B]: tiles of 64 rows and B columns, tile after tile
    scale  float32  [*stack, 1, G N']   as [G, N']: one number per block and row; rows of padding have 0
    zero   bfloat16 [*stack, 1, G N']   likewise, for codes with a zero point

A block is 32, 64 or 128 columns, the largest that divides the group (longer groups repeat their number), or all of K
where a row has one scale. Codes with a zero point are stored less 128, as signed ones, and so is the zero point: signed
integers are what is widened without converting number by number. Padding is code 0.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from qjax.errors import FormatError
from qjax.formats.base import Aux, Format
from qjax.formats.integer import Int
from qjax.formats.numerics import AnyArray
from qjax.formats.registry import register_format

ROWS = 64
"""Rows of a tile."""

MULTIPLE = 128
"""N and K are padded to a multiple of this."""

OFFSET = 128
"""What is taken from unsigned codes of `IntTiles` to make them signed."""


@dataclasses.dataclass(frozen=True)
class Elsewhere:
    """Codes of rows of ``length`` that stand in aux: the array of codes itself has no bytes."""

    length: int

    def row_bytes(self, length: int) -> int:
        return 0

    def capacity(self, nbytes: int) -> int:
        return self.length

    def offset(self, element: int) -> int | None:
        return None

    def pack(self, codes: ArrayLike) -> Array:
        return jnp.zeros((*jnp.shape(codes)[:-1], 0), jnp.int8)

    def unpack(self, packed: ArrayLike, length: int) -> Array:
        return jnp.zeros((*jnp.shape(packed)[:-1], length), jnp.int8)


class Tiled(Format):
    """Base of the formats that `qjax.ops.pack` makes: a weight in the order of a kernel, all of it in aux.

    Subclasses are dataclasses with ``like``, the format of the weight that was packed, and ``length``, K without
    padding. They define `cannot`, `tiled` and `untiled`, name their arrays in ``row_aux``, and stand in the table of
    `qjax.kernels.pack`. Made by packing, not by rounding; sliced along stack axes only.
    """

    takes: ClassVar[tuple[type[Format], ...]]
    """Kinds of formats of which some have this order."""

    for_codes: ClassVar[bool] = False
    """Whether its kernel multiplies with the codes of quantized activations, rather than with 16-bit floats."""

    weights_only = True
    whole_matrix = True

    like: Format
    length: int

    def __post_init__(self) -> None:
        why = self.cannot(self.like, self.length)
        if why:
            raise FormatError(f"{type(self).__name__}: {why}")

    @classmethod
    def cannot(cls, fmt: Format, length: int) -> str | None:
        """Return why a weight of this format, with rows of ``length``, does not have this order; None if it has."""
        raise NotImplementedError(f"{cls.__name__} has to define cannot")

    def tiled(self, codes: AnyArray, aux: Aux) -> Aux:
        """Return aux of this format, [*stack, 1, anything] each, from codes [*stack, N, K] and aux of ``like``."""
        raise NotImplementedError(f"{type(self).__name__} has to define tiled")

    def untiled(self, aux: Aux, n: int) -> tuple[Array, Aux]:
        """Return codes [*stack, N, K] and aux as ``like`` has them; undoes `tiled`."""
        raise NotImplementedError(f"{type(self).__name__} has to define untiled")

    @property
    def name(self) -> str:
        """For example ``int4 g128 tiles``."""
        return f"{self.like.name} tiles"

    @property
    def per(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As in ``like``."""
        return self.like.per

    @property
    def group(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As in ``like``."""
        return self.like.group

    @property
    def symmetric(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As in ``like``."""
        return self.like.symmetric

    @property
    def code_bits(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As in ``like``."""
        return self.like.code_bits

    @property
    def code_dtype(self) -> np.dtype:
        """int8: one unpacked code."""
        return np.dtype(np.int8)

    @property
    def packing(self) -> Elsewhere:
        """Codes stand in aux."""
        return Elsewhere(self.length)

    @property
    def padded_length(self) -> int:
        """K'."""
        return rounded_up(self.length)

    def fit(self, x: AnyArray, weight: AnyArray | None = None) -> Aux:
        raise FormatError(f"{self.name}: weights are rounded to {self.like.name}, then packed by qjax.ops.pack")

    def encode(self, x: AnyArray, aux: Aux) -> Array:
        raise FormatError(f"{self.name}: weights are rounded to {self.like.name}, then packed by qjax.ops.pack")

    def decode(self, codes: AnyArray, aux: Aux) -> Array:
        """Return what ``like`` decodes to, float32; only the shape of ``codes`` is looked at."""
        return self.like.decode(*self.untiled(aux, codes.shape[-2]))


class Blocked(Tiled):
    """Base of orders in which numbers of groups stand by block, [*stack, 1, G N'] as [G, N'], 0 in rows of padding."""

    @property
    def block(self) -> int | None:
        """Columns that share one stored scale: 16, 32, 64, 128, or None for all of K."""
        if self.like.groups(self.length) == 1:
            return None
        return next(b for b in (128, 64, 32, 16) if self.like.group % b == 0)  # type: ignore[operator]

    @property
    def columns(self) -> int:
        """B, the columns of a tile."""
        return min(self.block or ROWS, ROWS)

    @property
    def blocks(self) -> int:
        """G, the stored scales of a row."""
        return self.padded_length // self.block if self.block else 1

    def by_block(self, a: AnyArray, n: int) -> Array:
        """[*stack, N or 1, groups] as [*stack, 1, G N']."""
        a = jnp.asarray(a)
        a = jnp.broadcast_to(a, (*a.shape[:-2], n, a.shape[-1]))
        if self.block:
            a = jnp.repeat(a, self.like.group // self.block, axis=-1)[..., : self.blocks]  # type: ignore[operator]
        padding = [(0, 0)] * (a.ndim - 2) + [(0, rounded_up(n) - n), (0, self.blocks - a.shape[-1])]
        return jnp.swapaxes(jnp.pad(a, padding), -1, -2).reshape(*a.shape[:-2], 1, -1)

    def by_row(self, a: AnyArray, n: int) -> Array:
        """[*stack, 1, G N'] as [*stack, N, groups]."""
        a = jnp.asarray(a)
        a = jnp.swapaxes(a.reshape(*a.shape[:-2], self.blocks, rounded_up(n)), -1, -2)[..., :n, :]
        step = self.like.group // self.block if self.block else 1  # type: ignore[operator]
        return a[..., ::step][..., : self.like.groups(self.length)]


@register_format("int_tiles")
@dataclasses.dataclass(frozen=True)
class IntTiles(Blocked):
    """``Int(8, ...)`` codes in tiles; the numbers they stand for are exactly those of ``like``.

    Made by `qjax.ops.pack`, not by rounding. Sliced along stack axes only.

    Args:
        like: the format of the weight that was packed.
        length: K, the columns of the matrix without padding.

    Raises:
        FormatError: where ``like`` has no such layout, with the reason.
    """

    like: Int
    length: int

    takes: ClassVar[tuple[type[Format], ...]] = (Int,)
    row_aux: ClassVar[tuple[str, ...]] = ("tiles", "scale", "zero")

    @classmethod
    def cannot(cls, fmt: Format, length: int) -> str | None:
        if not isinstance(fmt, Int) or fmt.bits != 8:
            return f"codes of {fmt.name} weights are no integers of 8 bits"
        if fmt.zero == "float":
            return f"zero points of {fmt.name} lie between codes, where bfloat16 would round them"
        if length < 1:
            return "rows are empty"
        if fmt.groups(length) > 1 and fmt.group % 32:  # type: ignore[operator]
            return f"groups of {fmt.group} columns are no multiple of 32"
        return None

    def tiled(self, codes: AnyArray, aux: Aux) -> Aux:
        """Return aux of this format from codes [*stack, N, K] and aux of ``like``."""
        *stack, n, k = codes.shape
        padding = [(0, 0)] * len(stack) + [(0, rounded_up(n) - n), (0, self.padded_length - k)]
        codes = jnp.asarray(codes)
        codes = codes if self.symmetric else codes.astype(jnp.int32) - OFFSET
        codes = jnp.pad(codes.astype(jnp.int8), padding)
        codes = codes.reshape(*stack, rounded_up(n) // ROWS, ROWS, self.padded_length // self.columns, self.columns)
        out: Aux = {
            "tiles": jnp.swapaxes(codes, -3, -2).reshape(*stack, 1, -1),
            "scale": self.by_block(aux["scale"], n).astype(jnp.float32),
        }
        if not self.symmetric:
            zero = self.by_block(aux["zero"].astype(jnp.float32) - OFFSET, n)
            out["zero"] = zero.astype(jnp.bfloat16)  # 8 bits, exactly
        return out

    def untiled(self, aux: Aux, n: int) -> tuple[Array, Aux]:
        """Return codes [*stack, N, K] and aux as ``like`` has them; undoes `tiled`."""
        stack = aux["tiles"].shape[:-2]
        tiles = aux["tiles"].reshape(*stack, rounded_up(n) // ROWS, -1, ROWS, self.columns)
        codes = jnp.swapaxes(tiles, -3, -2).reshape(*stack, rounded_up(n), self.padded_length)
        codes = codes[..., :n, : self.length]
        out: Aux = {"scale": self.by_row(aux["scale"], n)}
        if not self.symmetric:
            codes = (codes.astype(jnp.int32) + OFFSET).astype(jnp.uint8)
            out["zero"] = (self.by_row(aux["zero"].astype(jnp.float32), n) + OFFSET).astype(jnp.uint8)
        return codes, {k: a[..., :1, :] for k, a in out.items()} if self.per == "tensor" else out


def rounded_up(size: int) -> int:
    """Return the size with padding."""
    return -(-size // MULTIPLE) * MULTIPLE

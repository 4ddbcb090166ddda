"""What the orders have in common in which kernels read weights.

What is on disk is neutral: rows of bits. A kernel on the GPU reads a weight in tiles, and an order that is made once,
when a model is put on its device, costs nothing per call. `qjax.ops.pack` makes it and `qjax.ops.neutral` undoes it.
N and K, the sizes of one matrix, are rounded up to multiples of 128, N' and K'.

A block is 16, 32, 64 or 128 columns, the largest that divides the group (longer groups repeat their number), or all of
K where a row has one scale.
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
from qjax.formats.numerics import AnyArray

ROWS = 64
"""Rows of a tile."""

MULTIPLE = 128
"""N and K are padded to a multiple of this."""


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


def rounded_up(size: int) -> int:
    """Return the size with padding."""
    return -(-size // MULTIPLE) * MULTIPLE

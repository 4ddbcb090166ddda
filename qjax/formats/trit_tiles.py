"""Trit-planes in tiles of words: each plane a matrix of 2-bit codes of its own, with its own scales."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax.formats import words
from qjax.formats.base import Aux, Format
from qjax.formats.numerics import AnyArray
from qjax.formats.registry import register_format
from qjax.formats.tiles import rounded_up
from qjax.formats.trit_planes import TritPlanes
from qjax.formats.trit_steps import trits_of
from qjax.formats.word_tiles import Plane, Planes, from_words, no_words, padded_rows, to_words


@register_format("trit_tiles")
@dataclasses.dataclass(frozen=True)
class TritTiles(Planes):
    """Trit-planes in tiles; the numbers they stand for are exactly those of ``like``.

    Whatever ``like`` stores, a plane has 2 bits a weight here: five trits in a byte take three instructions each to
    read, more than a kernel has for a weight in the time in which its bits arrive, so base 3 saves memory on disk and
    none here. Two tied planes are one number from -4 to 4 under one scale: 4 bits and one product. Scales keep their
    dtype.

    Args:
        like: the format of the weight that was packed.
        length: K, the columns of the matrix without padding.

    Raises:
        FormatError: where ``like`` has no such layout, with the reason.
    """

    like: TritPlanes
    length: int

    takes: ClassVar[tuple[type[Format], ...]] = (TritPlanes,)
    row_aux: ClassVar[tuple[str, ...]] = ("tiles0", "tiles1", "tiles2", "scale0", "scale1", "scale2")

    @classmethod
    def cannot(cls, fmt: Format, length: int) -> str | None:
        return no_words(fmt, length) if isinstance(fmt, TritPlanes) else f"{fmt.name} weights are no trit-planes"

    @property
    def symmetric(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """True: no plane has a zero point."""
        return True

    @property
    def joined(self) -> bool:
        """Whether two tied planes are one number."""
        return self.like.tied and self.like.planes == 2

    @property
    def block(self) -> int | None:
        """Columns that share one stored scale: 32, 64 or 128; where all of K has one, 128 if planes are summed."""
        if super().block is None and not self.joined and self.like.planes > 1:
            return 128
        return super().block

    @property
    def planes(self) -> tuple[Plane, ...]:
        if self.joined:
            return (Plane(words.four_bits(4), "tiles0", "scale0", self.block),)
        decoder = words.two_bits(1)
        return tuple(Plane(decoder, f"tiles{k}", f"scale{k}", self.block) for k in range(self.like.planes))

    def tiled(self, codes: AnyArray, aux: Aux) -> Aux:
        """Return aux of this format from codes [*stack, N, K] and aux of ``like``."""
        codes = jnp.minimum(jnp.asarray(codes), jnp.uint8(3**self.like.planes - 1))
        if self.joined:
            digits, scales = [codes], [aux["scale"]]
        else:
            digits = trits_of(codes, self.like.planes)
            scales = list(self.like.scales(aux)) if self.like.tied else [aux[f"scale{k}"] for k in range(len(digits))]
        out: Aux = {}
        for k, (plane, digit, scale) in enumerate(zip(self.planes, digits, scales, strict=True)):
            out |= {f"tiles{k}": to_words(digit, plane.decoder), f"scale{k}": self.by_block(scale, codes.shape[-2])}
        return out

    def untiled(self, aux: Aux, n: int) -> tuple[Array, Aux]:
        """Return codes [*stack, N, K] and aux of ``like``; undoes `tiled`."""
        planes = self.planes
        digits = [from_words(aux[plane.tiles], plane.decoder, n, self.length) for plane in planes]
        codes = functools.reduce(lambda code, digit: code * np.uint8(3) + digit, digits)
        scales = [self.by_row(aux[plane.scale], n) for plane in planes]
        if self.like.tied:
            return codes, {"scale": scales[-1].astype(self.like.scale_dtype)}
        return codes, {f"scale{k}": scale for k, scale in enumerate(scales)}

    def by_block(self, a: AnyArray, n: int) -> Array:
        """As of `Blocked`; one scale of a whole row is repeated where there are blocks."""
        if self.like.groups(self.length) > 1 or self.block is None:
            return super().by_block(a, n)
        a = jnp.asarray(a)
        return padded_rows(jnp.broadcast_to(a, (*a.shape[:-1], self.blocks)), n)

    def by_row(self, a: AnyArray, n: int) -> Array:
        """Undoes `by_block`."""
        if self.like.groups(self.length) > 1 or self.block is None:
            return super().by_row(a, n)
        a = jnp.asarray(a)
        return jnp.swapaxes(a.reshape(*a.shape[:-2], self.blocks, rounded_up(n)), -1, -2)[..., :n, :1]

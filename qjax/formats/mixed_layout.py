"""Where the codes of a matrix of 2-bit and 4-bit strips lie: their order in a row, and its bytes.

A strip is ``strip`` (16) adjacent columns of a matrix [N, K]; each is 2-bit or 4-bit, the same for all rows.

    aligned   of every four strips (a quad of 64 columns) one is 4-bit
    global    floor(share * strips) of the whole matrix are

Codes of a row stand sorted by width: first those of the 2-bit strips, in the order of their columns, then those of the
4-bit strips. Which strips these are is data of the matrix, a map beside its codes; how many there are follows from K
alone, so that packing needs no map. Columns beyond K count as 2-bit codes and strips at the end:

    aligned   of an incomplete quad the first strip is the 4-bit one
    global    an incomplete strip is 2-bit, unless all are 4-bit

Bytes of a row, with words of ``strip / 4`` bytes (32 bits for strips of 16), each the little-endian bit stream of
`qjax.formats.packing`:

    main      a 2-bit strip is one word; of a 4-bit strip the first half of its codes is one
              aligned: quad by quad, [2-bit][2-bit][2-bit][first half of the 4-bit]: one 128-bit load
              global: all 2-bit strips, then the first halves of the 4-bit ones
    tail      the second halves of the 4-bit strips, behind all main words of the row

In words of 32 bits, quad q of an aligned row of Q quads is words 4q .. 4q + 3 and word 4Q + q.
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from qjax.formats.numerics import AnyArray
from qjax.formats.packing import pack_bits, unpack_bits


@dataclasses.dataclass(frozen=True)
class StripRule:
    """How many strips of a row are 4-bit.

    Attributes:
        strip: columns of a strip, a multiple of 8.
        share: the part of the strips that is 4-bit.
        aligned: whether it is one in every four.
    """

    strip: int
    share: float
    aligned: bool

    def of(self, length: int) -> Strips:
        """Return what follows for rows of ``length``."""
        return _strips(self, length)

    def wide_of(self, strips: int) -> int:
        """Return how many of so many strips are 4-bit."""
        return strips // 4 if self.aligned else int(self.share * strips + 1e-9)


@dataclasses.dataclass(frozen=True)
class Strips:
    """The strips of rows of one length.

    Attributes:
        length: K.
        strip: columns of a strip.
        narrow: number of 2-bit strips, strips of padding included.
        wide: number of 4-bit strips.
        narrow_columns: columns of the K that are 2-bit.
        forced: the strip that is 4-bit whatever the data, or None.
    """

    length: int
    strip: int
    narrow: int
    wide: int
    narrow_columns: int
    forced: int | None

    @property
    def count(self) -> int:
        """Number of strips, padding included."""
        return self.narrow + self.wide

    @property
    def triples(self) -> int:
        """Number of threes of 2-bit strips, each of which has a word of scales per row; the last may be incomplete."""
        return -(-self.narrow // 3)

    def split(self, x: AnyArray) -> Array:
        """Return [..., K] as strips [..., count, strip], zeros in the padding."""
        x = jnp.asarray(x)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, self.count * self.strip - self.length)])
        return x.reshape(*x.shape[:-1], self.count, self.strip)

    def join(self, strips: AnyArray) -> Array:
        """Return strips [..., count, strip] as [..., K]."""
        return jnp.asarray(strips).reshape(*strips.shape[:-2], self.count * self.strip)[..., : self.length]

    def sorted_codes(self, strips: AnyArray, is_wide: AnyArray) -> Array:
        """Return codes as they stand in a row, [..., K], from strips in the order of columns, [..., count, strip]."""
        ordered = picked(strips, order_of(is_wide), axis=-2)
        two = ordered[..., : self.narrow, :].reshape(*strips.shape[:-2], self.narrow * self.strip)
        four = ordered[..., self.narrow :, :].reshape(*strips.shape[:-2], self.wide * self.strip)
        return jnp.concatenate(
            [two[..., : self.narrow_columns], four[..., : self.length - self.narrow_columns]], axis=-1
        )

    def sections(self, codes: AnyArray) -> tuple[Array, Array]:
        """Return the 2-bit strips [..., narrow, strip] and the 4-bit strips [..., wide, strip] of codes [..., K]."""
        parts = []
        for part, count in (
            (codes[..., : self.narrow_columns], self.narrow),
            (codes[..., self.narrow_columns :], self.wide),
        ):
            there = count * self.strip - part.shape[-1]
            part = jnp.pad(part, [(0, 0)] * (part.ndim - 1) + [(0, there)])
            parts.append(part.reshape(*part.shape[:-1], count, self.strip))
        return parts[0], parts[1]

    def strips_of(self, codes: AnyArray, is_wide: AnyArray) -> Array:
        """Return strips in the order of columns from codes as they stand in a row: `sorted_codes` backwards."""
        return picked(jnp.concatenate(self.sections(jnp.asarray(codes)), axis=-2), places_of(is_wide), axis=-2)


@functools.lru_cache(maxsize=1024)
def _strips(rule: StripRule, length: int) -> Strips:
    strip = rule.strip
    if rule.aligned:
        quads = -(-length // (4 * strip))
        rest = length - length // (4 * strip) * 4 * strip
        wide_columns = length // (4 * strip) * strip + min(rest, strip)
        return Strips(length, strip, 3 * quads, quads, length - wide_columns, 4 * (quads - 1) if rest else None)
    count = -(-length // strip)
    wide = rule.wide_of(count)
    return Strips(length, strip, count - wide, wide, length - min(length, wide * strip), None)


def places_of(is_wide: AnyArray) -> Array:
    """Return where each strip stands once they are sorted by width: int32, of the shape of ``is_wide`` [strips].

    Strips are few: counting them all against all is one small sum, where a running sum would be many steps to compile.
    """
    is_wide = jnp.asarray(is_wide)
    count = is_wide.shape[-1]
    earlier = np.tril(np.ones((count, count), bool), -1)  # [i, j]: j is before i
    before = jnp.sum(is_wide[None, :] & earlier, axis=-1, dtype=jnp.int32)
    narrow = count - jnp.sum(is_wide, dtype=jnp.int32)
    return jnp.where(is_wide, narrow + before, np.arange(count, dtype=np.int32) - before)


def order_of(is_wide: AnyArray) -> Array:
    """Return the strips in the order in which they stand: `places_of` backwards."""
    own = np.arange(is_wide.shape[-1], dtype=np.int32)
    return jnp.sum(jnp.where(places_of(is_wide)[None, :] == own[:, None], own, 0), axis=-1, dtype=jnp.int32)


def picked(x: AnyArray, where: AnyArray, axis: int) -> Array:
    """Return strips by their numbers, which are known to be there: `jnp.take` without a check of bounds."""
    index = (slice(None),) * (axis % x.ndim)
    return jnp.asarray(x).at[(*index, where)].get(mode="promise_in_bounds", unique_indices=True)


def pack_map(is_wide: AnyArray, rule: StripRule) -> Array:
    """Return the map of a matrix as bytes, uint8 [bytes]: 2 bits per quad (which of its four), or 1 bit per strip."""
    is_wide = jnp.asarray(is_wide)
    if rule.aligned:
        return pack_bits(jnp.argmax(is_wide.reshape(-1, 4), axis=-1).astype(jnp.uint8), 2)
    return pack_bits(is_wide.astype(jnp.uint8), 1)


def unpack_map(packed: AnyArray | None, rule: StripRule, strips: Strips) -> Array:
    """Return which strips are 4-bit, bool [strips]. ``packed`` may be None where all strips have one width."""
    if packed is None:
        return jnp.full(strips.count, strips.wide > 0)
    if rule.aligned:
        which = unpack_bits(packed, 2, strips.count // 4, signed=False)
        return (which[:, None] == jnp.arange(4, dtype=jnp.uint8)).reshape(-1)
    return unpack_bits(packed, 1, strips.count, signed=False) == 1


@dataclasses.dataclass(frozen=True)
class MixedPacking:
    """A row's codes in bytes, as the top of this module says."""

    rule: StripRule

    @property
    def word(self) -> int:
        """Bytes of a word: a 2-bit strip, or half of a 4-bit one."""
        return self.rule.strip // 4

    def row_bytes(self, length: int) -> int:
        strips = self.rule.of(length)
        return (strips.count + strips.wide) * self.word

    def capacity(self, nbytes: int) -> int:
        words = nbytes // self.word
        if self.rule.aligned:
            return words // 5 * 4 * self.rule.strip
        count = words
        while count + self.rule.wide_of(count) > words:  # a step at least halves what is over
            count -= max(1, (count + self.rule.wide_of(count) - words) // 2)
        return count * self.rule.strip

    def offset(self, element: int) -> int | None:
        return 0 if element == 0 else None

    def pack(self, codes: ArrayLike) -> Array:
        codes = jnp.asarray(codes)
        strips = self.rule.of(codes.shape[-1])
        two, four = strips.sections(codes)
        lead, word = codes.shape[:-1], self.word
        two = pack_bits(two, 2)
        halves = pack_bits(four, 4).reshape(*lead, strips.wide, 2, word)
        head, tail = halves[..., 0, :], halves[..., 1, :]
        if self.rule.aligned:
            quads = [two.reshape(*lead, strips.wide, 3, word), head[..., None, :]]
            main = jnp.concatenate(quads, axis=-2).reshape(*lead, strips.count, word)
        else:
            main = jnp.concatenate([two, head], axis=-2)
        rows = jnp.concatenate([main, tail], axis=-2)
        return rows.reshape(*lead, rows.shape[-2] * word)

    def unpack(self, packed: ArrayLike, length: int) -> Array:
        packed = jnp.asarray(packed)
        strips, lead, word = self.rule.of(length), packed.shape[:-1], self.word
        words = packed.reshape(*lead, strips.count + strips.wide, word)
        main, tail = words[..., : strips.count, :], words[..., strips.count :, :]
        if self.rule.aligned:
            quads = main.reshape(*lead, strips.wide, 4, word)
            two, head = quads[..., :3, :].reshape(*lead, strips.narrow, word), quads[..., 3, :]
        else:
            two, head = main[..., : strips.narrow, :], main[..., strips.narrow :, :]
        four = jnp.concatenate([head, tail], axis=-1)
        parts = [
            unpack_bits(rows, bits, strips.strip, signed=False).reshape(*lead, rows.shape[-2] * strips.strip)
            for rows, bits in ((two, 2), (four, 4))
        ]
        wide_columns = length - strips.narrow_columns
        return jnp.concatenate([parts[0][..., : strips.narrow_columns], parts[1][..., :wide_columns]], axis=-1)

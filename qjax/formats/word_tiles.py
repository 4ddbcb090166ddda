"""Codes of 2, 4 and 8 bits in tiles of words, each the codes of one thread of a GPU that multiplies.

As in `qjax.formats.tiles`, with N' and K' rounded up to 128, the order is made once, by `qjax.ops.pack`:

    tiles  int32  [*stack, 1, N' K' b / 32]  as [N'/64, K'/128, b/2, 128, 4]: tiles of 64 rows and 128 columns; in a
                  tile, for each of the 128 threads of a warpgroup, 2 b words, four at a time

Word i of thread 32 w + 4 r + c holds columns 8 t + 2 c + v of row 16 w + 8 h + r, from column (i // 2) 128 / b,
for h = i mod 2, v = 0, 1 and t below 16 / b. Where in a word they stand, a decoder of `qjax.formats.words` says.
So threads read 16 bytes each that lie side by side, and find the numbers there that `wgmma` wants them to have.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array, lax

from qjax.formats import words
from qjax.formats.base import Aux, Format
from qjax.formats.float8 import Float8
from qjax.formats.integer import Int
from qjax.formats.mx import MXFP4
from qjax.formats.nf4 import NF4
from qjax.formats.numerics import AnyArray
from qjax.formats.nvfp4 import NVFP4
from qjax.formats.registry import register_format
from qjax.formats.tiles import ROWS, Blocked, rounded_up
from qjax.formats.words import Decoder

COLUMNS = 128
"""Columns of a tile."""

WORDS_OF_A_ROW = 256
"""A tile is read as rows of so many words, one for each bit of a code."""


def to_words(codes: Any, decoder: Decoder, padding: int = 0) -> Array:
    """Return tiles, int32 [*stack, 1, words], of unsigned codes [*stack, N, K]; padding as given."""
    *stack, n, k = codes.shape
    more = [(0, 0)] * len(stack) + [(0, rounded_up(n) - n), (0, rounded_up(k) - k)]
    codes = jnp.pad(jnp.asarray(codes).astype(jnp.uint8), more, constant_values=padding)
    b, s = decoder.bits, len(stack)
    codes = codes.reshape(*stack, -1, 4, 2, 8, rounded_up(k) // COLUMNS, b, decoder.pairs, 4, 2)
    # [rows, w, h, r, columns, cell, t, c, v] -> [rows, columns, cell, h, w, r, c, t, v]
    codes = codes.transpose(*range(s), *(s + i for i in (0, 4, 5, 2, 1, 3, 7, 6, 8)))
    stored = decoder.stored(codes)
    stored = stored.reshape(*stored.shape[: s + 2], b // 2, 4, 128)
    stored = jnp.swapaxes(stored, -1, -2).reshape(*stack, 1, -1)
    return lax.bitcast_convert_type(stored, jnp.int32)


def from_words(tiles: Any, decoder: Decoder, n: int, k: int) -> Array:
    """Return codes, uint8 [*stack, N, K]; undoes `to_words`."""
    stack = tiles.shape[:-2]
    rows, columns, s = rounded_up(n) // ROWS, rounded_up(k) // COLUMNS, len(stack)
    stored = lax.bitcast_convert_type(jnp.asarray(tiles), jnp.uint32)
    stored = stored.reshape(*stack, rows, columns, decoder.bits // 2, 128, 4)
    stored = jnp.swapaxes(stored, -1, -2).reshape(*stack, rows, columns, decoder.bits, 2, 4, 8, 4)
    codes = decoder.read(stored)
    # [rows, columns, cell, h, w, r, c, t, v] -> [rows, w, h, r, columns, cell, t, c, v]
    codes = codes.transpose(*range(s), *(s + i for i in (0, 4, 3, 5, 1, 2, 7, 6, 8)))
    return codes.reshape(*stack, rows * ROWS, columns * COLUMNS)[..., :n, :k]


def matrix_of(numbers: Array) -> Array:
    """Return a tile's numbers, [words, pairs, 2] in the order of its words, as [64, 128]."""
    words, pairs, _ = numbers.shape
    bits = words // 256
    parts = numbers.reshape(bits // 2, 4, 8, 4, 2, 2, pairs, 2)  # four at a time: [q, w, r, c, cell of two, h, t, v]
    return parts.transpose(1, 5, 2, 0, 4, 6, 3, 7).reshape(ROWS, COLUMNS)


def words_of(n: int, k: int, bits: int) -> int:
    """Return the words of a matrix [n, k]."""
    return rounded_up(n) * rounded_up(k) * bits // 32


@dataclasses.dataclass(frozen=True)
class Plane:
    """One of the matrices of codes whose products are summed, each scaled by its own numbers.

    Attributes:
        decoder: of its codes.
        tiles, scale: names in aux; scales are [*stack, 1, G N'] as [G, N'], of any float dtype.
        block: columns that share a scale: 32, 64 or 128, or None for one of each row.
        zero: name of the zero points, likewise, or None.
        factor: name of further scales, one for each 16 columns of a row, with which numbers are multiplied before the
            product, exactly; or None.
    """

    decoder: Decoder
    tiles: str = "tiles"
    scale: str = "scale"
    block: int | None = None
    zero: str | None = None
    factor: str | None = None


class Planes(Blocked):
    """Base of the orders that the kernel of `qjax.kernels.dot.words16` reads."""

    @property
    def planes(self) -> tuple[Plane, ...]:
        """The planes, of which there is at least one."""
        raise NotImplementedError(f"{type(self).__name__} has to define planes")


def no_words(fmt: Format, length: int, *, multiple: int = 32) -> str | None:
    """Return why groups of this format, in rows of ``length``, do not fit in tiles; None if they do."""
    if length < 1:
        return "rows are empty"
    if fmt.groups(length) > 1 and fmt.group % multiple:  # type: ignore[operator]
        return f"groups of {fmt.group} columns are no multiple of {multiple}"
    return None


@register_format("word_tiles")
@dataclasses.dataclass(frozen=True)
class WordTiles(Planes):
    """8-bit and 4-bit floats, NF4, integers of 8, 4 and 2 bits in tiles; they stand for what ``like`` says.

    Scales: float32 of Float8, NF4 and Int; of MXFP4 bfloat16, which holds its powers of two; of NVFP4 bfloat16 for each
    block of 16 and float32 for each row, that of the matrix. Bits per weight with groups of 128: Float8 and Int(8)
    8.25, Int(4) 4.25, Int(2) 2.25; NF4 with groups of 64 4.5, MXFP4 4.5, NVFP4 5.

    Args:
        like: the format of the weight that was packed.
        length: K, the columns of the matrix without padding.

    Raises:
        FormatError: where ``like`` has no such layout, with the reason.
    """

    like: Float8 | NF4 | MXFP4 | NVFP4 | Int
    length: int

    takes: ClassVar[tuple[type[Format], ...]] = (Float8, NF4, MXFP4, NVFP4, Int)
    row_aux: ClassVar[tuple[str, ...]] = ("tiles", "scale", "zero", "factor")

    @classmethod
    def cannot(cls, fmt: Format, length: int) -> str | None:
        if isinstance(fmt, Float8) and fmt.element != "e4m3fn":
            return f"codes of {fmt.name} weights have two mantissa bits; only float8_e4m3fn is widened"
        if isinstance(fmt, Int) and fmt.bits not in (2, 4, 8):
            return f"codes of {fmt.name} weights are no integers of 2, 4 or 8 bits"
        if isinstance(fmt, Int) and fmt.zero == "float":
            return f"zero points of {fmt.name} lie between codes, where bfloat16 would round them"
        if not isinstance(fmt, cls.takes):
            return f"{fmt.name} weights have no words"
        return no_words(fmt, length, multiple=16 if isinstance(fmt, NVFP4) else 32)

    @property
    def decoder(self) -> Decoder:
        """Of its codes."""
        if isinstance(self.like, Int):
            if self.like.bits == 4:
                return words.four_bits(8 if self.symmetric else None)
            offset = self._offset if self.symmetric else 0
            return words.two_bits(offset) if self.like.bits == 2 else words.Bytes(offset)
        return {Float8: words.E4M3, NF4: words.NF4}.get(type(self.like), words.E2M1)

    @property
    def _offset(self) -> int:
        """What is added to signed codes to make them unsigned."""
        return 1 << (self.code_bits - 1)

    @property
    def planes(self) -> tuple[Plane, ...]:
        if isinstance(self.like, NVFP4):
            return (Plane(self.decoder, factor="factor"),)
        zero = None if self.symmetric else "zero"
        return (Plane(self.decoder, block=self.block, zero=zero),)

    def tiled(self, codes: AnyArray, aux: Aux) -> Aux:
        """Return aux of this format from codes [*stack, N, K] and aux of ``like``."""
        n = codes.shape[-2]
        codes = jnp.asarray(codes)
        if isinstance(self.like, Int) and self.symmetric:
            codes = codes.astype(jnp.int32) + self._offset
        elif isinstance(self.like, Float8):
            codes = lax.bitcast_convert_type(codes, jnp.uint8)
        out: Aux = {"tiles": to_words(codes, self.decoder)}
        if isinstance(self.like, NVFP4):
            rows = jnp.broadcast_to(jnp.asarray(aux["global_scale"], jnp.float32), (*codes.shape[:-1], 1))
            factor = by_16(jnp.asarray(aux["scale"]).astype(jnp.bfloat16), n, self.padded_length)
            return out | {"factor": factor, "scale": padded_rows(rows, n)}
        scale = _powers(aux["scale"]) if isinstance(self.like, MXFP4) else jnp.asarray(aux["scale"], jnp.float32)
        out["scale"] = self.by_block(scale, n)
        if not self.symmetric:
            out["zero"] = self.by_block(jnp.asarray(aux["zero"]).astype(jnp.bfloat16), n)
        return out

    def untiled(self, aux: Aux, n: int) -> tuple[Array, Aux]:
        """Return codes [*stack, N, K] and aux of ``like``; undoes `tiled`."""
        codes = from_words(aux["tiles"], self.decoder, n, self.length)
        if isinstance(self.like, NVFP4):
            scale = jnp.asarray(aux["scale"])[..., None, :1].reshape(*aux["scale"].shape[:-2], 1, 1)
            blocks = from_16(aux["factor"], n, self.padded_length)[..., : self.like.groups(self.length)]
            return codes, {"scale": blocks.astype(jnp.float8_e4m3fn), "global_scale": scale}
        if isinstance(self.like, Int) and self.symmetric:
            codes = (codes.astype(jnp.int32) - self._offset).astype(jnp.int8)
        elif isinstance(self.like, Float8):
            codes = lax.bitcast_convert_type(codes, jnp.float8_e4m3fn)
        scale = self.by_row(aux["scale"], n)
        out: Aux = {"scale": _exponents(scale) if isinstance(self.like, MXFP4) else scale}
        if not self.symmetric:
            out["zero"] = self.by_row(aux["zero"], n).astype(jnp.uint8)
        return codes, {k: a[..., :1, :] for k, a in out.items()} if self.per == "tensor" else out


def _powers(exponents: AnyArray) -> Array:
    """bfloat16 2**(exponent - 127), by bits: 2**-127 is no normal number."""
    bits = jnp.asarray(exponents).astype(jnp.uint16)
    return lax.bitcast_convert_type(jnp.where(bits == 0, jnp.uint16(0x40), bits << 7), jnp.bfloat16)


def _exponents(powers: AnyArray) -> Array:
    """Undoes `_powers`."""
    return (lax.bitcast_convert_type(jnp.asarray(powers), jnp.uint16) >> 7).astype(jnp.uint8)


def padded_rows(a: Array, n: int) -> Array:
    """[*stack, N, G] as [*stack, 1, G N']."""
    a = jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, rounded_up(n) - n), (0, 0)])
    return jnp.swapaxes(a, -1, -2).reshape(*a.shape[:-2], 1, -1)


def by_16(a: Array, n: int, length: int) -> Array:
    """[*stack, N, blocks of 16] as [*stack, 1, K'/16 N']."""
    a = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, length // 16 - a.shape[-1])])
    return padded_rows(a, n)


def from_16(a: AnyArray, n: int, length: int) -> Array:
    """Undoes `by_16`, but for the padding of columns."""
    a = jnp.asarray(a).reshape(*a.shape[:-2], length // 16, rounded_up(n))
    return jnp.swapaxes(a, -1, -2)[..., :n, :]

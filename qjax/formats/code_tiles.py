"""4-bit weights in the order in which a GPU's tensor cores multiply them with int8 activations.

`CodeTiles` is for products of codes, as `qjax.formats.word_tiles` is for products with 16-bit floats: made once by
 `qjax.ops.pack`, undone by `qjax.ops.neutral`. A kernel expands the codes to int8 in registers,

    number[n, k] = (code[n, k] - zero[n, g]) * step[n, g]        integers; `DualGrained`, `Progressive`
    number[n, k] = code[n, k] * step[n, g] - zero[n, g]          `Progressive` with zeros="post"
    number[n, k] = code[n, k] - zero[n, g], or code[n, k]        `Int`

four numbers to a 32-bit word: with bytes c0..c3 of codes, the word

    word(c) * step + word(128 - offset)      offset = zero * step, or zero; word(a) = a0 + 2^8 a1 + 2^16 a2 + 2^24 a3

is the sum of (number_j + 128) 2^(8j) modulo 2^32. Bytes of the product alone may overflow into their neighbours; but
number_j + 128 lies in 0..255, and there is one way to write an integer with such digits, so the bytes are right and
the sign bits remain to be turned. All that is asked for is numbers within int8: the guard of DGQ and the protective
range of QoQ (`qjax.formats.dual_grained`, `progressive`).

With N and K the sizes of one matrix, N' and K' rounded up to 128:

    tiles   int32    [*stack, 1, N' K'/8] as [N'/64, K'/128, 8, 128]: tiles of 64 rows and 128 columns. Word 512 h + 4 t
                                          + b of a tile is thread t = 32 w + 4 r + c's, of row 16 w + 8 h + r: nibble
                                          2 j holds column 32 b + 4 c + j, nibble 2 j + 1 column 32 b + 16 + 4 c + j
    levels  int16    [*stack, 1, G N']    as [G, N']: step + 256 zero; of symmetric `Int` there are none
    scale   float32  [*stack, 1, S N']    as [S, N']: one per row (S = 1), or one per block (S = G)

So a thread reads the codes of one row in 16 bytes, finds in each word one instruction's share of the left operand of
`wgmma`, and takes it out by a shift and two masks. A block is 32, 64 or 128 columns, the largest that divides the
group (longer groups repeat their number), or all of K. Float scales per group need blocks of 64 or 128: sums of blocks
are scaled one by one. Signed codes lie in two's complement: a nibble in the upper half of a byte is 16 times the code.
Codes of padding are 0.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax import Array, lax

from qjax.formats.base import Aux, Format
from qjax.formats.dual_grained import DualGrained
from qjax.formats.integer import Int
from qjax.formats.numerics import AnyArray
from qjax.formats.progressive import Progressive
from qjax.formats.registry import register_format
from qjax.formats.tiles import ROWS, Tiled, rounded_up
from qjax.formats.two_level import SCALE_DTYPES, TwoLevel

COLUMNS = 128
"""Columns of a tile."""


@register_format("code_tiles")
@dataclasses.dataclass(frozen=True)
class CodeTiles(Tiled):
    """4-bit codes in tiles for products with int8 codes; the numbers they stand for are exactly those of ``like``.

    Args:
        like: ``DualGrained``, ``Progressive`` of 4 bits or ``Int(4, ...)``: the format of the weight that was packed.
        length: K, the columns of the matrix without padding.

    Raises:
        FormatError: where ``like`` has no such layout, with the reason.
    """

    like: Format
    length: int

    takes: ClassVar[tuple[type[Format], ...]] = (DualGrained, Progressive, Int)
    for_codes: ClassVar[bool] = True
    row_aux: ClassVar[tuple[str, ...]] = ("tiles", "levels", "scale")

    @classmethod
    def cannot(cls, fmt: Format, length: int) -> str | None:
        if not isinstance(fmt, cls.takes) or fmt.code_bits != 4:
            return f"codes of {fmt.name} weights are no integers of 4 bits"
        if isinstance(fmt, Int) and fmt.zero == "float":
            return f"zero points of {fmt.name} lie between codes, and its numbers are no integers"
        if length < 1:
            return "rows are empty"
        if fmt.groups(length) > 1:
            least = 32 if fmt.int8_rows else 64
            if fmt.group % least:  # type: ignore[operator]
                return f"groups of {fmt.group} columns are no multiple of {least}"
        return None

    @property
    def int8_rows(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As in ``like``."""
        return self.like.int8_rows

    @property
    def whole_rows(self) -> bool:
        """Whether a row has one scale, so that its product is one sum of integers."""
        return self.int8_rows or self.like.groups(self.length) == 1

    @property
    def post(self) -> bool:
        """Whether zeros are subtracted after the step is multiplied."""
        return isinstance(self.like, Progressive) and self.like.zeros == "post"

    @property
    def leveled(self) -> bool:
        """Whether there is a zero point (and a step) for each block."""
        return not self.symmetric

    @property
    def block(self) -> int | None:
        """Columns that share one stored level or scale: 32, 64, 128, or None for all of K."""
        if self.like.groups(self.length) == 1:
            return None
        return next(b for b in (128, 64, 32) if self.like.group % b == 0)  # type: ignore[operator]

    @property
    def blocks(self) -> int:
        """G."""
        return self.padded_length // self.block if self.block else 1

    def as_int8(self, codes: AnyArray, aux: Aux) -> tuple[Array, Array]:
        """As `Format.as_int8`; only the shape of ``codes`` is looked at."""
        return self.like.as_int8(*self.untiled(aux, codes.shape[-2]))

    def tiled(self, codes: AnyArray, aux: Aux) -> Aux:
        """Return aux of this format from codes [*stack, N, K] and aux of ``like``."""
        *stack, n, k = codes.shape
        codes = jnp.pad(
            jnp.asarray(codes).astype(jnp.int32) & 15,
            [(0, 0)] * len(stack) + [(0, rounded_up(n) - n), (0, self.padded_length - k)],
        )
        out: Aux = {"tiles": to_words(codes).reshape(*stack, 1, -1)}
        if self.leveled:
            zero = aux["zero"].astype(jnp.int32)
            step = aux["step"].astype(jnp.int32) if "step" in aux else jnp.ones_like(zero)
            out["levels"] = self._by_block(step + 256 * zero, n, self.block).astype(jnp.int16)
        of_blocks = None if self.whole_rows else self.block
        return {**out, "scale": self._by_block(aux["scale"].astype(jnp.float32), n, of_blocks)}

    def untiled(self, aux: Aux, n: int) -> tuple[Array, Aux]:
        """Return codes [*stack, N, K] and aux as ``like`` has them; undoes `tiled`."""
        stack = aux["tiles"].shape[:-2]
        codes = from_words(aux["tiles"].reshape(*stack, rounded_up(n) // ROWS, -1, 8, 128))
        codes = codes[..., :n, : self.length]
        codes = ((codes ^ 8) - 8 if self.like.signed else codes).astype(self.like.code_dtype)
        out: Aux = {"scale": self._by_row(aux["scale"], n, None if self.whole_rows else self.block)}
        if isinstance(self.like, TwoLevel):
            out["scale"] = out["scale"].astype(SCALE_DTYPES[self.like.scale_dtype])
        if self.leveled:
            levels = self._by_row(aux["levels"], n, self.block).astype(jnp.int32)
            out["zero"] = (levels >> 8 & 0xFF).astype(jnp.uint8)
            if self.int8_rows:
                out["step"] = (levels & 0xFF).astype(jnp.int8)
        return codes, {k: a[..., :1, :] for k, a in out.items()} if self.per == "tensor" else out

    def _by_block(self, a: AnyArray, n: int, block: int | None) -> Array:
        """[*stack, N or 1, groups or 1] as [*stack, 1, blocks N']."""
        a = jnp.broadcast_to(jnp.asarray(a), (*a.shape[:-2], n, a.shape[-1]))
        if block:
            a = jnp.repeat(a, self.like.group // block, axis=-1)[..., : self.blocks]  # type: ignore[operator]
        more = self.blocks - a.shape[-1] if block else 0
        a = jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, rounded_up(n) - n), (0, more)])
        return jnp.swapaxes(a, -1, -2).reshape(*a.shape[:-2], 1, -1)

    def _by_row(self, a: AnyArray, n: int, block: int | None) -> Array:
        """[*stack, 1, blocks N'] as [*stack, N, groups or 1]."""
        a = jnp.swapaxes(a.reshape(*a.shape[:-2], -1, rounded_up(n)), -1, -2)[..., :n, :]
        step = self.like.group // block if block else 1  # type: ignore[operator]
        return a[..., ::step][..., : self.like.groups(self.length) if block else 1]


def to_words(codes: AnyArray) -> Array:
    """Return int32 words [..., N/64, K/128, 8, 128] from codes 0..15, int32 [..., N, K], N and K multiples of those."""
    *stack, n, k = codes.shape
    # [w, h, r] of a row; [b, half, c, j] of a column
    parts = codes.reshape(*stack, n // ROWS, 4, 2, 8, k // COLUMNS, 4, 2, 4, 4)
    first = len(stack)
    order = (0, 4, 2, 1, 3, 7, 5, 8, 6)  # tile of rows, tile of columns, h, w, r, c, b, j, half
    parts = jnp.transpose(parts, (*range(first), *(first + i for i in order)))
    nibbles = parts.reshape(*stack, n // ROWS, k // COLUMNS, 8, 128, 8)
    word = nibbles[..., 0]
    for i in range(1, 8):
        word = word | nibbles[..., i] << 4 * i
    return word


def from_words(words: AnyArray) -> Array:
    """Return codes 0..15, int32 [..., N, K], from words; undoes `to_words`."""
    *stack, rows, columns, _, _ = words.shape
    nibbles = jnp.stack([lax.shift_right_logical(words, jnp.int32(4 * i)) & 15 for i in range(8)], axis=-1)
    parts = nibbles.reshape(*stack, rows, columns, 2, 4, 8, 4, 4, 4, 2)
    first = len(stack)
    order = (0, 3, 2, 4, 1, 6, 8, 5, 7)  # tile of rows, w, h, r, tile of columns, b, half, c, j
    parts = jnp.transpose(parts, (*range(first), *(first + i for i in order)))
    return parts.reshape(*stack, rows * ROWS, columns * COLUMNS)

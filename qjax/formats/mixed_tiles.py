"""2-bit and 4-bit strips in one matrix, in the order in which a kernel on NVIDIA's Hopper reads them.

Made once, by `qjax.ops.pack`, of weights that have one 4-bit strip in every four. With N' = N rounded up to 128 and S
the number of stretches of 256 columns, four quads of strips each,

    tiles      int32    [*stack, 1, N' S 24]  as [N'/64, S, 24, 64]: tiles of 64 rows and 256 columns, 3 bits a weight
    unit       float32  [*stack, 1, N']       the unit of the matrix, for every row
    which      uint8    [*stack, 1, 4 S]      which strip of each quad is 4-bit
    exponent   int8                           of the unit, likewise
    outlier_*                                 corrections: float16 values, columns, and the row of each

Thread 32 w + 4 r + c of the 128 that multiply a tile has quad c of the four, and of it rows 16 w + r and 16 w + 8 + r:
so it needs the scales of its own three 2-bit strips and of its 4-bit strip, and no other. A tile is, in 32-bit words,

    0 to 1023      codes, eight words a thread, four at a time: of 2-bit strip g and row h (0 or 1) word 2g + h, then
                   the first halves of the 4-bit strip in row 0 and 1
    1024 to 1407   one word a thread three times: the second halves of the 4-bit strip in row 0 and 1; then what both
                   rows store of their 2-bit strips (zero points and scale codes, as on disk), row 0 in the low half
    1408 to 1471   a word a row: float16 scale of its 4-bit strips, and their zero point in the high half
    1472 to 1535   of warp w and quad c, strip g, word 16 w + 4 c + g: s' and z' - 1024, float16 both; the fourth is 0

That is 2.5 bits of codes, and of scales 0.25, 0.125 and 0.125, where the format on disk has 2.85 bits in all: each
tile is one block that is fetched at once. Columns of a thread are adjacent in the matrix, and spread over the tensor
core's: pair t of part g is columns 2t and 2t + 1 of strip g, at 64 g + 8 t + 2 c. Activations are brought into that
order, strip by strip (`in_order`), in front of the product.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qjax.formats import words
from qjax.formats.base import Aux, Format
from qjax.formats.mixed_bits import MixedBits
from qjax.formats.mixed_outliers import column_dtype
from qjax.formats.mixed_words import BIAS
from qjax.formats.numerics import AnyArray, power_of_two
from qjax.formats.packing import pack_bits, unpack_bits
from qjax.formats.registry import register_format
from qjax.formats.tiles import ROWS, Tiled, rounded_up

COLUMNS = 256
"""Columns of a tile: four quads of strips of 16."""

STRIP, QUAD, QUADS = 16, 64, 4

TILE = (24, 64)
"""Words of a tile."""

TWO, FOUR = words.two_bits(0), words.four_bits(0)


@register_format("mixed_tiles")
@dataclasses.dataclass(frozen=True)
class MixedTiles(Tiled):
    """`MixedBits` weights in tiles; the numbers they stand for are exactly those of ``like``.

    Args:
        like: the format of the weight that was packed.
        length: K, the columns of the matrix without padding.

    Raises:
        FormatError: where ``like`` has no such layout, with the reason.
    """

    like: MixedBits
    length: int

    takes: ClassVar[tuple[type[Format], ...]] = (MixedBits,)
    row_aux: ClassVar[tuple[str, ...]] = (
        "tiles",
        "unit",
        "which",
        "exponent",
        "outlier_value",
        "outlier_column",
        "outlier_at",
    )

    @classmethod
    def cannot(cls, fmt: Format, length: int) -> str | None:
        if not isinstance(fmt, MixedBits):
            return f"{fmt.name} weights have no strips of 2 and 4 bits"
        if length < 1:
            return "rows are empty"
        if not fmt.rule.aligned:
            return f"{fmt.name} does not have one 4-bit strip in every four (select='aligned')"
        if fmt.strip != STRIP:
            return f"strips have {fmt.strip} columns, not {STRIP}"
        if fmt.tile % 16:
            return f"second scales are of {fmt.tile} rows, no multiple of 16"
        if fmt.wide_group % QUAD:
            return f"scales of 4-bit strips are of {fmt.wide_group} columns, no multiple of {QUAD}"
        return None

    @property
    def padded_length(self) -> int:
        """K', a multiple of 256."""
        return -(-self.length // COLUMNS) * COLUMNS

    def tiled(self, codes: AnyArray, aux: Aux) -> Aux:
        """Return aux of this format from codes [*stack, N, K], as they stand in rows, and aux of ``like``."""
        *stack, n, k = codes.shape
        strips, stretches = self.like.strips(k), self.padded_length // COLUMNS
        quads = stretches * QUADS

        def cut(a: Array, *rest: int) -> Array:
            """[*stack, N, quads of K, anything] as [*stack, N'/64, w, h, r, stretches, c, *rest]."""
            more = [(0, rounded_up(n) - n), (0, quads - a.shape[-2]), (0, 0)]
            a = jnp.pad(a, [(0, 0)] * len(stack) + more)
            return a.reshape(*stack, -1, 4, 2, 8, stretches, QUADS, *rest)

        def by_thread(a: Array, *moves: int) -> Array:
            """[*stack, R, w, (h,) r, S, c, more] as [*stack, R, S, more and h in the order of moves, threads]."""
            first = len(stack)
            a = a.transpose(*range(first), *(first + m for m in moves))
            return a.reshape(*a.shape[: first + 2], -1, 128)

        two, four = (jnp.asarray(part).astype(jnp.uint8) for part in strips.sections(codes))
        two = TWO.stored(cut(two.reshape(*stack, n, -1, 3 * STRIP), 3, 8, 2))  # [R, w, h, r, S, c, g]
        four = FOUR.stored(cut(four, 2, 4, 2))  # [R, w, h, r, S, c, half]
        two, four = (by_thread(a, 0, 4, 6, 2, 1, 3, 5) for a in (two, four))
        fields = cut(jnp.asarray(aux["words"])[..., None].astype(jnp.uint32), 1)[..., 0]  # [R, w, h, r, S, c]
        first = len(stack) + 2
        pairs = jnp.take(fields, 0, axis=first) | jnp.take(fields, 1, axis=first) << np.uint32(16)
        pairs = by_thread(pairs, 0, 3, 1, 2, 4)
        eight = jnp.concatenate([two, four[..., :2, :]], axis=-2).reshape(*two.shape[:-2], 2, 4, 128)
        parts = [jnp.swapaxes(eight, -1, -2), four[..., 2:, :], pairs, self._of_rows(aux, n), self._of_tiles(aux, n)]
        flat = jnp.concatenate([a.reshape(*two.shape[:-2], -1) for a in parts], axis=-1)
        which = unpack_bits(aux["strips"], 2, strips.wide, signed=False)
        unit = power_of_two(jnp.asarray(aux["exponent"]).astype(jnp.int32))
        out: Aux = {
            "tiles": lax.bitcast_convert_type(flat.reshape(*stack, 1, -1), jnp.int32),
            "unit": jnp.broadcast_to(unit, (*stack, 1, rounded_up(n))).astype(jnp.float32),
            "which": jnp.pad(which, [(0, 0)] * (which.ndim - 1) + [(0, quads - strips.wide)]),
            "exponent": aux["exponent"],
        }
        if "outlier_value" in aux:
            out |= {name: aux[name] for name in ("outlier_value", "outlier_column")}
            count = aux["outlier_value"].shape[-1]
            ends = jnp.asarray(aux["outlier_row"])[..., 1:].astype(jnp.int32)
            out["outlier_at"] = _searched(ends, jnp.arange(count), "right").astype(column_dtype(n))
        return out

    def _of_rows(self, aux: Aux, n: int) -> Array:
        """Words of rows, [*stack, N'/64, S, 64]."""
        scale = lax.bitcast_convert_type(jnp.asarray(aux["wide_scale"]), jnp.uint16).astype(jnp.uint32)
        zero = unpack_bits(aux["wide_zero"], 4, scale.shape[-1], signed=False).astype(jnp.uint32)
        word = jnp.repeat(scale | zero << np.uint32(16), self.like.wide_group // QUAD, axis=-1)
        stretches = self.padded_length // COLUMNS
        word = word[..., :stretches]
        more = [(0, rounded_up(n) - n), (0, stretches - word.shape[-1])]
        word = jnp.pad(word, [(0, 0)] * (word.ndim - 2) + more)
        return jnp.swapaxes(word.reshape(*word.shape[:-2], -1, ROWS, stretches), -1, -2)

    def _of_tiles(self, aux: Aux, n: int) -> Array:
        """Words of second scales, [*stack, N'/64, S, 64]."""
        quads, stretches = self.like.strips(self.length).triples, self.padded_length // COLUMNS
        step = lax.bitcast_convert_type(jnp.asarray(aux["tile_scale"]), jnp.uint16).astype(jnp.uint32)
        step = step.reshape(*step.shape[:-2], -1, quads, 3)
        zero = jnp.asarray(aux["tile_zero"]).reshape(*step.shape[:-1])
        zero = (zero[..., None] >> np.array([0, 4, 8], np.uint16)) & np.uint16(15)
        less = lax.bitcast_convert_type((zero.astype(jnp.float32) - BIAS).astype(jnp.float16), jnp.uint16)
        word = step | less.astype(jnp.uint32) << np.uint32(16)
        word = jnp.repeat(word, self.like.tile // 16, axis=-3)[..., : rounded_up(n) // 16, :, :]
        more = [(0, rounded_up(n) // 16 - word.shape[-3]), (0, stretches * QUADS - quads), (0, 1)]
        word = jnp.pad(word, [(0, 0)] * (word.ndim - 3) + more)
        word = word.reshape(*word.shape[:-3], -1, 4, stretches, QUADS, 4)  # [R, w, S, c, g]
        return jnp.swapaxes(word, -4, -3).reshape(*word.shape[:-5], -1, stretches, 64)

    def untiled(self, aux: Aux, n: int) -> tuple[Array, Aux]:
        """Return codes [*stack, N, K] and aux as ``like`` has them; undoes `tiled`."""
        stack = aux["tiles"].shape[:-2]
        strips, stretches, s = self.like.strips(self.length), self.padded_length // COLUMNS, len(aux["tiles"].shape) - 2
        quads = strips.wide
        flat = lax.bitcast_convert_type(jnp.asarray(aux["tiles"]), jnp.uint32)
        flat = flat.reshape(*stack, rounded_up(n) // ROWS, stretches, TILE[0] * TILE[1])
        eight = jnp.swapaxes(flat[..., :1024].reshape(*flat.shape[:-1], 2, 128, 4), -1, -2)
        eight = eight.reshape(*flat.shape[:-1], 8, 128)
        more = flat[..., 1024:1408].reshape(*flat.shape[:-1], 3, 128)

        def by_row(a: Array, count: int) -> Array:
            """[*stack, R, S, count h, threads] as [*stack, N', quads, count]."""
            a = a.reshape(*stack, -1, stretches, count, 2, 4, 8, 4)  # [R, S, g, h, w, r, c]
            a = a.transpose(*range(s), *(s + m for m in (0, 4, 3, 5, 1, 6, 2)))
            return a.reshape(*stack, rounded_up(n), stretches * QUADS, count)[..., :n, :quads, :]

        two = TWO.read(by_row(eight[..., :6, :], 3))  # [N, quads, 3, 8, 2]
        four = FOUR.read(by_row(jnp.concatenate([eight[..., 6:, :], more[..., :2, :]], axis=-2), 2))
        narrow = two.reshape(*stack, n, -1)[..., : strips.narrow_columns]
        wide = four.reshape(*stack, n, -1)[..., : self.length - strips.narrow_columns]
        both = jnp.stack([more[..., 2, :] & np.uint32(0xFFFF), more[..., 2, :] >> np.uint32(16)], axis=-2)
        of_rows = jnp.swapaxes(flat[..., 1408:1472], -1, -2).reshape(*stack, -1, stretches)[..., :n, :]
        of_rows = of_rows[..., :: self.like.wide_group // QUAD]
        of_tiles = flat[..., 1472:].reshape(*stack, -1, stretches, 4, QUADS, 4)  # [R, S, w, c, g]
        of_tiles = jnp.swapaxes(of_tiles, -4, -3).reshape(*stack, -1, stretches * QUADS, 4)
        of_tiles = of_tiles[..., : -(-n // 16) : self.like.tile // 16, :quads, :3]
        half = lambda a, dtype: lax.bitcast_convert_type(a.astype(jnp.uint16), dtype)  # noqa: E731
        zero = (half(of_tiles >> np.uint32(16), jnp.float16).astype(jnp.float32) + BIAS).astype(jnp.uint16)
        out: Aux = {
            "exponent": aux["exponent"],
            "words": by_row(both, 1)[..., 0].astype(jnp.uint16),
            "tile_scale": half(of_tiles & np.uint32(0xFFFF), jnp.float16).reshape(*stack, 1, -1),
            "tile_zero": (zero[..., 0] | zero[..., 1] << 4 | zero[..., 2] << 8).reshape(*stack, 1, -1),
            "wide_scale": half(of_rows & np.uint32(0xFFFF), jnp.float16),
            "wide_zero": pack_bits((of_rows >> np.uint32(16)).astype(jnp.uint8), 4),
            "strips": pack_bits(aux["which"][..., :quads], 2),
        }
        if "outlier_value" in aux:
            out |= {name: aux[name] for name in ("outlier_value", "outlier_column")}
            out["outlier_row"] = _searched(aux["outlier_at"], jnp.arange(n + 1), "left").astype(jnp.uint32)
        return jnp.concatenate([narrow, wide], axis=-1), out


def _searched(rising: AnyArray, values: Array, side: Any) -> Array:
    """Where values would stand in each row of ``rising`` [*stack, 1, count]: int32 [*stack, 1, values]."""
    rising = jnp.asarray(rising)
    flat = rising.reshape(-1, rising.shape[-1])
    found = [jnp.searchsorted(row.astype(jnp.int32), values, side=side) for row in flat]
    return jnp.stack(found).reshape(*rising.shape[:-1], -1).astype(jnp.int32)


def in_order(x: Array, which: Array) -> Array:
    """Return activations in the order of the columns of tiles.

    Args:
        x: [E, M, K'], K' a multiple of 256.
        which: of each matrix and quad, which strip is 4-bit, int [E, K'/64].
    """
    count, tokens, length = x.shape
    quads = x.reshape(count, tokens, -1, 4, STRIP)
    which = which.astype(jnp.int32).reshape(count, 1, -1, 1)
    strips = [quads[..., i, :] for i in range(4)]
    out = [jnp.where(which <= g, strips[g + 1], strips[g]) for g in range(3)]
    wide = strips[0]
    for i in range(1, 4):
        wide = jnp.where(which == i, strips[i], wide)
    parts = jnp.stack([*out, wide], axis=3).reshape(count, tokens, -1, QUADS, 4, 8, 2)  # [S, c, g, t, v]
    return parts.transpose(0, 1, 2, 4, 5, 3, 6).reshape(count, tokens, length)

"""2-bit and 4-bit strips in one matrix, in the order in which a kernel on NVIDIA's Hopper reads them.

Made once, by `qjax.ops.pack`. Codes stand sorted by the width of their strips, as on disk
(`qjax.formats.mixed_layout`), and are cut into stretches that are read at once: 12 of the 2-bit strips, or 4 of the
4-bit ones, of 16 columns each. Where one strip in every four has 4 bits, a stretch is one of both, four quads of the
matrix. With N' = N rounded up to 128,

    tiles           int32    [*stack, 1, N' S words / 64]  as [N'/64, S, words / 64, 64]: a tile for each stretch and 64
                                      rows, 15 x 64 words of 2-bit strips and then 9 x 64 words of 4-bit strips
    narrow_tiles    int32    likewise, 2-bit strips alone, where strips are chosen over the whole matrix
    wide_tiles      int32    likewise, 4-bit strips alone
    unit            float32  [*stack, 1, N']  the unit of the matrix, for every row
    order           int32    [*stack, 1, strips of a matrix]  in which its strips stand
    exponent        int8     [*stack, 1, 1]  of the unit
    outlier_*                corrections: float16 values, columns, and the row of each

Thread 32 w + 4 r + c of the 128 that multiply a tile has rows 16 w + r and 16 w + 8 + r, which are row 0 and 1 here,
and of a stretch the 2-bit strips 3 c, 3 c + 1 and 3 c + 2, whose scales stand together, and the 4-bit strip c. So it
needs the scales of its own strips and no other. In words of 32 bits, of 2-bit strips

    0 to 511      codes, four words a thread: of strip g and row h word 2g + h
    512 to 767    two words a thread, of strip 2
    768 to 895    one word a thread: what both rows store of the three strips (zero points and scale codes, as on disk),
                  row 0 in the low half
    896 to 959    of warp w and thread c, strip g, word 16 w + 4 c + g: s' and z' - 1024, float16 both; the fourth is 0

and of 4-bit strips

    0 to 511      codes, four words a thread: the first half of the strip in row 0 and 1, then the second
    512 to 575    a word a row: float16 scale, and the zero point in the high half

That is 2.5 bits for a 2-bit weight and 4.5 for a 4-bit one; 3 with one strip in four, where the format on disk has
2.85. Columns of a thread are adjacent in the matrix, and spread over the tensor core's: pair t of strip g (of the
4-bit one, g = 3) is columns 2t and 2t + 1, at 64 g + 8 t + 2 c. Activations are brought into that order, strip by
strip (`in_order`), in front of the product.
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
from qjax.formats.mixed_layout import Strips, order_of, pack_map
from qjax.formats.mixed_outliers import column_dtype
from qjax.formats.mixed_words import BIAS
from qjax.formats.numerics import AnyArray, power_of_two
from qjax.formats.packing import pack_bits, unpack_bits
from qjax.formats.registry import register_format
from qjax.formats.tiles import ROWS, Tiled, rounded_up

STRIP = 16

PART = 64
"""Columns of the strips that four threads have at once."""

TWO, FOUR = words.two_bits(0), words.four_bits(0)


@dataclasses.dataclass(frozen=True)
class Stretch:
    """What stands in a tile.

    Attributes:
        tiles: name in aux.
        narrow, wide: whether there are 2-bit strips, and 4-bit strips.
        count: stretches of a matrix.
    """

    tiles: str
    narrow: bool
    wide: bool
    count: int

    @property
    def parts(self) -> int:
        """Parts of 64 columns: strips of a thread."""
        return 3 * self.narrow + self.wide

    @property
    def columns(self) -> int:
        """Columns of a tile."""
        return PART * self.parts

    @property
    def words(self) -> tuple[int, int]:
        """Words of a tile, in rows of 64."""
        return 15 * self.narrow + 9 * self.wide, 64


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
        "narrow_tiles",
        "wide_tiles",
        "unit",
        "order",
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
        if fmt.strip != STRIP:
            return f"strips have {fmt.strip} columns, not {STRIP}"
        if fmt.tile % 16:
            return f"second scales are of {fmt.tile} rows, no multiple of 16"
        if fmt.wide_group % PART and fmt.share:
            return f"scales of 4-bit strips are of {fmt.wide_group} columns, no multiple of {PART}"
        return None

    @property
    def strips(self) -> Strips:
        """How rows are cut into strips."""
        return self.like.strips(self.length)

    @property
    def stretches(self) -> tuple[Stretch, ...]:
        """One kind for 2-bit and 4-bit strips, or one of both."""
        narrow, wide = -(-self.strips.triples // 4), -(-self.strips.wide // 4)
        if self.like.rule.aligned:
            return (Stretch("tiles", True, True, wide),)
        kinds = (Stretch("narrow_tiles", True, False, narrow), Stretch("wide_tiles", False, True, wide))
        return tuple(kind for kind in kinds if kind.count)

    @property
    def padded_length(self) -> int:
        """K'."""
        return sum(kind.columns * kind.count for kind in self.stretches)

    def tiled(self, codes: AnyArray, aux: Aux) -> Aux:
        """Return aux of this format from codes [*stack, N, K], as they stand in rows, and aux of ``like``."""
        *stack, n, _ = codes.shape
        strips = self.strips
        two, four = (jnp.asarray(part).astype(jnp.uint8) for part in strips.sections(codes))
        out: Aux = {}
        for kind in self.stretches:
            blocks = [self._narrow(two, aux, n, kind.count)] if kind.narrow else []
            blocks += [self._wide(four, aux, n, kind.count)] if kind.wide else []
            tiles = jnp.concatenate(blocks, axis=-1).reshape(*stack, 1, -1)
            out[kind.tiles] = lax.bitcast_convert_type(tiles, jnp.int32)
        unit = power_of_two(jnp.asarray(aux["exponent"]).astype(jnp.int32))
        out |= {
            "unit": jnp.broadcast_to(unit, (*stack, 1, rounded_up(n))).astype(jnp.float32),
            "order": self._order(aux, tuple(stack)),
            "exponent": aux["exponent"],
        }
        if "outlier_value" in aux:
            out |= {name: aux[name] for name in ("outlier_value", "outlier_column")}
            ends, every = jnp.asarray(aux["outlier_row"])[..., 1:], jnp.arange(aux["outlier_value"].shape[-1])
            out["outlier_at"] = _searched(ends, every, "right").astype(column_dtype(n))
        return out

    def _order(self, aux: Aux, stack: tuple[int, ...]) -> Array:
        """The strips of a matrix in the order in which they stand, int32 [*stack, 1, strips]."""
        strips = self.strips
        if "strips" not in aux:
            return jnp.broadcast_to(jnp.arange(strips.count, dtype=jnp.int32), (*stack, 1, strips.count))
        one = lambda packed: order_of(self.like.is_wide({"strips": packed[None]}, self.length))  # noqa: E731
        packed = jnp.asarray(aux["strips"])
        return jnp.stack([one(a) for a in packed.reshape(-1, packed.shape[-1])]).reshape(*stack, 1, strips.count)

    def _narrow(self, codes: Array, aux: Aux, n: int, count: int) -> Array:
        """Words of 2-bit strips [*stack, N, strips, 16], uint32 [*stack, N'/64, S, 960]."""
        codes = _padded(codes, -2, 3 * self.strips.triples).reshape(*codes.shape[:-2], -1, 3 * STRIP)
        stored = TWO.stored(_cut(codes, n, count, 3, 8, 2))  # [R, w, h, r, S, c, g]
        six = _by_thread(stored, 0, 4, 6, 2, 1, 3, 5)
        fields = _cut(jnp.asarray(aux["words"])[..., None].astype(jnp.uint32), n, count, 1)[..., 0]
        axis = fields.ndim - 4
        both = jnp.take(fields, 0, axis=axis) | jnp.take(fields, 1, axis=axis) << np.uint32(16)
        fours, twos = (jnp.swapaxes(a, -1, -2) for a in (six[..., :4, :], six[..., 4:, :]))
        return _joined(fours, twos, _by_thread(both, 0, 3, 1, 2, 4), self._of_tiles(aux, n, count))

    def _wide(self, codes: Array, aux: Aux, n: int, count: int) -> Array:
        """Words of 4-bit strips [*stack, N, strips, 16], uint32 [*stack, N'/64, S, 576]."""
        stored = FOUR.stored(_cut(codes, n, count, 2, 4, 2))  # [R, w, h, r, S, c, half]
        fours = jnp.swapaxes(_by_thread(stored, 0, 4, 6, 2, 1, 3, 5), -1, -2)
        scale = lax.bitcast_convert_type(jnp.asarray(aux["wide_scale"]), jnp.uint16).astype(jnp.uint32)
        zero = unpack_bits(aux["wide_zero"], 4, scale.shape[-1], signed=False).astype(jnp.uint32)
        word = jnp.repeat(scale | zero << np.uint32(16), self.like.wide_group // PART, axis=-1)[..., :count]
        word = _padded(_padded(word, -1, count), -2, rounded_up(n))
        word = jnp.swapaxes(word.reshape(*word.shape[:-2], -1, ROWS, count), -1, -2)
        return _joined(fours, word)

    def _of_tiles(self, aux: Aux, n: int, count: int) -> Array:
        """Words of second scales, [*stack, N'/64, S, 64]."""
        triples = self.strips.triples
        step = lax.bitcast_convert_type(jnp.asarray(aux["tile_scale"]), jnp.uint16).astype(jnp.uint32)
        step = step.reshape(*step.shape[:-2], -1, triples, 3)
        zero = jnp.asarray(aux["tile_zero"]).reshape(*step.shape[:-1])
        zero = (zero[..., None] >> np.array([0, 4, 8], np.uint16)) & np.uint16(15)
        less = lax.bitcast_convert_type((zero.astype(jnp.float32) - BIAS).astype(jnp.float16), jnp.uint16)
        word = step | less.astype(jnp.uint32) << np.uint32(16)
        word = jnp.repeat(word, self.like.tile // 16, axis=-3)[..., : rounded_up(n) // 16, :, :]
        word = _padded(_padded(_padded(word, -3, rounded_up(n) // 16), -2, 4 * count), -1, 4)
        word = word.reshape(*word.shape[:-3], -1, 4, count, 4, 4)  # [R, w, S, c, g]
        return jnp.swapaxes(word, -4, -3).reshape(*word.shape[:-5], -1, count, 64)

    def untiled(self, aux: Aux, n: int) -> tuple[Array, Aux]:
        """Return codes [*stack, N, K] and aux as ``like`` has them; undoes `tiled`."""
        strips, out = self.strips, {"exponent": aux["exponent"]}
        stack = aux["exponent"].shape[:-2]
        codes = []
        for kind in self.stretches:
            flat = lax.bitcast_convert_type(jnp.asarray(aux[kind.tiles]), jnp.uint32)
            flat = flat.reshape(*stack, rounded_up(n) // ROWS, kind.count, kind.words[0] * 64)
            if kind.narrow:
                two, scales = self._un_narrow(flat[..., :960], n)
                codes.append(two[..., : strips.narrow_columns])
                out |= scales
            if kind.wide:
                four, scales = self._un_wide(flat[..., -576:], n)
                codes.append(four[..., : self.length - strips.narrow_columns])
                out |= scales
        if 0 < strips.wide < strips.count:
            order = aux["order"][..., strips.narrow :]
            is_wide = jnp.any(order[..., None] == jnp.arange(strips.count), axis=-2)
            packed = [pack_map(row, self.like.rule) for row in is_wide.reshape(-1, strips.count)]
            out["strips"] = jnp.stack(packed).reshape(*stack, 1, -1)
        if "outlier_value" in aux:
            out |= {name: aux[name] for name in ("outlier_value", "outlier_column")}
            out["outlier_row"] = _searched(aux["outlier_at"], jnp.arange(n + 1), "left").astype(jnp.uint32)
        return jnp.concatenate(codes, axis=-1), out

    def _un_narrow(self, flat: Array, n: int) -> tuple[Array, Aux]:
        triples = self.strips.triples
        fours, twos = (
            jnp.swapaxes(flat[..., first : first + size].reshape(*flat.shape[:-1], 128, -1), -1, -2)
            for first, size in ((0, 512), (512, 256))
        )
        codes = TWO.read(_by_row(jnp.concatenate([fours, twos], axis=-2), n, triples))  # [N, triples, 3, 8, 2]
        both = flat[..., 768:896]
        both = jnp.stack([both & np.uint32(0xFFFF), both >> np.uint32(16)], axis=-2)
        of_tiles = flat[..., 896:].reshape(*flat.shape[:-1], 4, 4, 4)  # [R, S, w, c, g]
        of_tiles = jnp.swapaxes(of_tiles, -4, -3).reshape(*flat.shape[:-3], -1, 4 * flat.shape[-2], 4)
        of_tiles = of_tiles[..., : -(-n // 16) : self.like.tile // 16, :triples, :3]
        zero = (_half(of_tiles >> np.uint32(16)).astype(jnp.float32) + BIAS).astype(jnp.uint16)
        flatly = lambda a: a.reshape(*flat.shape[:-3], 1, -1)  # noqa: E731
        return codes.reshape(*flat.shape[:-3], n, -1), {
            "words": _by_row(both, n, triples)[..., 0].astype(jnp.uint16),
            "tile_scale": flatly(_half(of_tiles & np.uint32(0xFFFF))),
            "tile_zero": flatly(zero[..., 0] | zero[..., 1] << 4 | zero[..., 2] << 8),
        }

    def _un_wide(self, flat: Array, n: int) -> tuple[Array, Aux]:
        fours = jnp.swapaxes(flat[..., :512].reshape(*flat.shape[:-1], 128, 4), -1, -2)
        codes = FOUR.read(_by_row(fours, n, self.strips.wide))
        of_rows = jnp.swapaxes(flat[..., 512:], -1, -2).reshape(*flat.shape[:-3], -1, flat.shape[-2])[..., :n, :]
        of_rows = of_rows[..., :: self.like.wide_group // PART]
        return codes.reshape(*flat.shape[:-3], n, -1), {
            "wide_scale": _half(of_rows & np.uint32(0xFFFF)),
            "wide_zero": pack_bits((of_rows >> np.uint32(16)).astype(jnp.uint8), 4),
        }


def _padded(a: Array, axis: int, size: int) -> Array:
    """Zeros behind an axis, up to a size."""
    more = [(0, 0)] * a.ndim
    more[axis] = (0, size - a.shape[axis])
    return jnp.pad(a, more)


def _cut(a: Array, n: int, count: int, *rest: int) -> Array:
    """[*stack, N, strips of a thread, anything] as [*stack, N'/64, w, h, r, S, c, *rest]."""
    a = _padded(_padded(a, -3, rounded_up(n)), -2, 4 * count)
    return a.reshape(*a.shape[:-3], -1, 4, 2, 8, count, 4, *rest)


def _by_thread(a: Array, *moves: int) -> Array:
    """Axes moved: [*stack, R, S, words of a thread, threads], the last four of them w, r and c."""
    first = a.ndim - len(moves)
    a = a.transpose(*range(first), *(first + m for m in moves))
    return a.reshape(*a.shape[: first + 2], -1, 128)


def _by_row(a: Array, n: int, strips: int) -> Array:
    """[*stack, R, S, words and h, threads] as [*stack, N, strips, words]."""
    *stack, _, count, several, _ = a.shape
    s = len(stack)
    a = a.reshape(*stack, -1, count, several // 2, 2, 4, 8, 4)  # [R, S, words, h, w, r, c]
    a = a.transpose(*range(s), *(s + m for m in (0, 4, 3, 5, 1, 6, 2)))
    return a.reshape(*stack, rounded_up(n), 4 * count, several // 2)[..., :n, :strips, :]


def _joined(*parts: Array) -> Array:
    """Words of a tile, [*stack, R, S, words]; the last part has one axis less."""
    lead = parts[-1].shape[:-1]
    return jnp.concatenate([a.reshape(*lead, -1) for a in parts], axis=-1)


def _half(words: Array) -> Array:
    """float16 numbers, of their bits."""
    return lax.bitcast_convert_type(words.astype(jnp.uint16), jnp.float16)


def _searched(rising: AnyArray, values: Array, side: Any) -> Array:
    """Where values would stand in each row of ``rising`` [*stack, 1, count]: int32 [*stack, 1, values]."""
    rising = jnp.asarray(rising)
    flat = rising.reshape(-1, rising.shape[-1])
    found = [jnp.searchsorted(row.astype(jnp.int32), values, side=side) for row in flat]
    return jnp.stack(found).reshape(*rising.shape[:-1], -1).astype(jnp.int32)


def in_order(x: Array, order: Array, fmt: MixedTiles) -> tuple[Array, ...]:
    """Return activations in the order of the columns of tiles, for each kind of stretch.

    Args:
        x: [E, M, K].
        order: of the strips of each matrix, int32 [E, strips].
        fmt: of the weight.

    Returns:
        [E, M, stretches times columns of a stretch] each.
    """
    count, tokens, _ = x.shape
    strips = _padded(x, -1, fmt.strips.count * STRIP).reshape(count, tokens, -1, STRIP)
    if fmt.like.rule.aligned:
        return (_by_quads(strips, order[:, fmt.strips.narrow :]),)
    if 0 < fmt.strips.wide < fmt.strips.count:
        strips = jnp.take_along_axis(strips, order[:, None, :, None], axis=2)
    out, first = [], 0
    for kind in fmt.stretches:
        size = fmt.strips.narrow if kind.narrow else fmt.strips.wide
        own = _padded(strips[:, :, first : first + size], 2, 4 * kind.count * kind.parts)
        out.append(_spread(own.reshape(count, tokens, kind.count, 4, kind.parts, 8, 2)))
        first += size
    return tuple(out)


def _by_quads(strips: Array, wide: Array) -> Array:
    """Of each quad its three 2-bit strips and the 4-bit one, as selects: XLA fuses them, other than a gather."""
    count, tokens, several, _ = strips.shape
    strips = _padded(strips, 2, -(-several // 16) * 16)
    which = _padded(wide % 4, -1, strips.shape[2] // 4).reshape(count, 1, -1, 1)
    four = [strips.reshape(count, tokens, -1, 4, STRIP)[..., i, :] for i in range(4)]
    out = [jnp.where(which <= g, four[g + 1], four[g]) for g in range(3)]
    last = four[0]
    for i in range(1, 4):
        last = jnp.where(which == i, four[i], last)
    return _spread(jnp.stack([*out, last], axis=3).reshape(count, tokens, -1, 4, 4, 8, 2))


def _spread(strips: Array) -> Array:
    """[E, M, S, c, g, t, v] as [E, M, columns], a thread's columns spread as the tensor core wants them."""
    return strips.transpose(0, 1, 2, 4, 5, 3, 6).reshape(*strips.shape[:2], -1)

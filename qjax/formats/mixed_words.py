"""Words of 2-bit and 4-bit strips become numbers of 16 bits, scales of both orders included.

What `qjax.formats.mixed_tiles` puts beside each other for one thread of a GPU, as words of 32 bits: codes, and what the
scales of its strips are made of. In pairs of 16-bit numbers, one in each half of a word,

    s = float16((c + z') * s')                        of a 2-bit strip, for two rows at once
    number = dtype((code - zero) * dtype(s))          code - zero is exact

so a weight is rounded as it is where it is dequantized for activations of that dtype, and its scale before it. As in
`qjax.formats.words` the instructions are written once and run on arrays (`Emulated`) and on registers of a kernel.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.formats.words import BFLOAT16, FLOAT16

ROOM = {BFLOAT16: 6, FLOAT16: 10}
"""Last bits of a number among which a 2-bit code may stand: the even ones below."""

BIAS = 1024
"""z' is stored as the float16 z' - 1024: c in the last bits of 1024 then needs one addition."""


class Machine(Protocol):
    """Instructions on words that hold two numbers of 16 bits; operands may be constants."""

    def masked(self, word: Any, mask: int, rest: int) -> Any:
        """``word & mask | rest``."""
        ...

    def fma(self, pair: Any, factor: Any, added: Any, dtype: Any) -> Any:
        """``pair * factor + added`` in both halves, rounded once."""
        ...

    def splat(self, word: Any, half: int) -> Any:
        """One half of a word in both."""
        ...

    def narrowed(self, word: Any, half: int) -> Any:
        """The float16 in one half of a word, in both as bfloat16."""
        ...


class Emulated:
    """The instructions on NumPy's and jax's arrays of words, uint32. float32 holds all products and sums that there
    are, so that each is rounded once.
    """

    def masked(self, word: Any, mask: int, rest: int) -> Any:
        return word & np.uint32(mask) | np.uint32(rest)

    def fma(self, pair: Any, factor: Any, added: Any, dtype: Any) -> Any:
        a, b, c = (_halves(word, dtype) for word in (pair, factor, added))
        low, high = (bits_of((x * y + z).astype(dtype)) for x, y, z in zip(a, b, c, strict=True))
        return low | high << np.uint32(16)

    def splat(self, word: Any, half: int) -> Any:
        return (word >> np.uint32(16 * half) & np.uint32(0xFFFF)) * np.uint32(0x10001)

    def narrowed(self, word: Any, half: int) -> Any:
        return bits_of(_halves(word, FLOAT16)[half].astype(BFLOAT16)) * np.uint32(0x10001)


def bits_of(number: Any) -> Any:
    """The bits of 16-bit numbers as words."""
    if isinstance(number, jax.Array):
        return lax.bitcast_convert_type(number, jnp.uint16).astype(jnp.uint32)
    return np.asarray(number).view(np.uint16).astype(np.uint32)


def of_bits(words: Any, dtype: Any) -> Any:
    """The 16-bit numbers in the low halves of words."""
    low = (words & np.uint32(0xFFFF)).astype(np.uint16)
    return lax.bitcast_convert_type(low, dtype) if isinstance(low, jax.Array) else np.asarray(low).view(dtype)


def _halves(word: Any, dtype: Any) -> tuple[Any, Any]:
    """Both numbers of a word as float32."""
    word = np.uint32(word) if isinstance(word, int) else word
    low, high = (of_bits(half, dtype).astype(np.float32) for half in (word, word >> np.uint32(16)))
    return low, high


def constant(value: float, dtype: Any) -> int:
    """A word with a number twice."""
    return int(np.asarray(value, dtype).view(np.uint16)) * 0x10001


def narrow(
    codes: list[Any], words: Any, steps: list[Any], bits: tuple[int, ...], dtype: Any, machine: Machine
) -> list[list[list[Any]]]:
    """Return the numbers of one thread in three 2-bit strips, by strip, row and pair: [3][2][8] words.

    Args:
        codes: six words: of strip g and row h word 2g + h.
        words: what the rows store of the three strips, row 0 in the low half.
        steps: of each strip s' and in the high half z' - 1024, float16.
        bits: of the scale codes of the three strips.
        dtype: bfloat16 or float16.
        machine: what runs it.
    """
    dtype, one, splat = _kind(dtype, machine)
    out, at = [], 6
    for g, width in enumerate(bits):
        code = machine.masked(words >> np.uint32(at), ((1 << width) - 1) * 0x10001, constant(BIAS, FLOAT16))
        at += width
        whole = machine.fma(code, constant(1, FLOAT16), machine.splat(steps[g], 1), FLOAT16)
        scale = machine.fma(whole, machine.splat(steps[g], 0), constant(-0.0, FLOAT16), FLOAT16)
        zero = machine.masked(words >> np.uint32(2 * g) if g else words, 0x00030003, constant(-one, dtype))
        part = []
        for h in range(2):
            factor = splat(scale, h)
            offsets = {0: machine.splat(zero, h)}  # -(one + zero)
            for up in range(2, ROOM[dtype], 2):
                rest = constant(one - one * 2.0**-up, dtype)
                offsets[up] = machine.fma(offsets[0], constant(1, dtype), rest, dtype)
            pairs, word = [], codes[2 * g + h]
            for t in range(8):
                far, up = divmod(2 * t, ROOM[dtype])
                moved = word >> np.uint32(far * ROOM[dtype]) if far else word
                number = machine.masked(moved, (3 << up) * 0x10001, constant(one, dtype))
                number = machine.fma(number, constant(2.0**-up, dtype), offsets[up], dtype)
                pairs.append(machine.fma(number, factor, constant(-0.0, dtype), dtype))
            part.append(pairs)
        out.append(part)
    return out


def wide(codes: list[Any], rows: list[Any], dtype: Any, machine: Machine) -> list[list[list[Any]]]:
    """Return the numbers of one thread in a 4-bit strip, by row and pair: [1][2][8] words.

    Args:
        codes: four words: the first half of the strip in row h in word h, the other in 2 + h.
        rows: of each row the scale, float16, and in the high half the zero point.
        dtype: bfloat16 or float16.
        machine: what runs it.
    """
    dtype, one, splat = _kind(dtype, machine)
    part = []
    for h in range(2):
        less = machine.masked(machine.splat(rows[h], 1), 0x000F000F, constant(-one, dtype))  # -(one + zero)
        factor, pairs = splat(rows[h], 0), []
        for t in range(8):
            word = codes[2 * (t // 4) + h]
            moved = word >> np.uint32(4 * (t % 4)) if t % 4 else word
            number = machine.masked(moved, 0x000F000F, constant(one, dtype))
            number = machine.fma(number, constant(1, dtype), less, dtype)
            pairs.append(machine.fma(number, factor, constant(-0.0, dtype), dtype))
        part.append(pairs)
    return [part]


def _kind(dtype: Any, machine: Machine) -> tuple[np.dtype, float, Any]:
    """The dtype, its number that has 1 in the last bit, and how half a word of float16 becomes two of it."""
    dtype = np.dtype(dtype)
    return (dtype, 128.0, machine.narrowed) if dtype == BFLOAT16 else (dtype, 1024.0, machine.splat)

"""Codes of 2, 4 and 8 bits become numbers of 16 bits within a word, by moves of bits and permutations of bytes.

A word of 32 bits holds the codes of one thread, `Decoder.codes` of them: those of the left half and those of the right
half of pairs, because what the tensor cores of a GPU read are registers with two numbers each. A decoder says where the
codes stand in a word, and takes the pairs out of it in a few instructions that do both halves at once.

The instructions are written once, with the operators of Python, and run on anything that has these: on NumPy's and
jax's arrays of words (tests go through all codes; jax's interpreter of kernels runs the same lines) and on registers
of a kernel (`qjax.kernels.dot.widen`). There are three kinds:

    Moved       bits of a code go to their places in a bfloat16 or float16 number, and a multiplication and addition
                of exact numbers makes the value: 8-bit and 4-bit floats, whose exponents are cut off otherwise, and
                small integers, as last bits of 128 (1024)
    Looked      a table of sixteen numbers: two byte permutations each pick from eight bytes
    Bytes       integers of 8 bits, more than the last bits of a bfloat16 number hold: two halves, put together exactly
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from qjax.formats.nf4 import NF4_VALUES

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16 = np.dtype(np.float16)
WIDE = (BFLOAT16, FLOAT16)
"""What codes are widened to."""


class Decoder:
    """How codes of one kind stand in words, and how they become pairs of numbers.

    Attributes:
        bits: of a code.
        stretch: by dtype, how many times the values that codes stand for the numbers are.
        base: by dtype, what the numbers are larger than the codes, for zero points to take away.
    """

    bits: int
    stretch: dict[Any, float] = dict.fromkeys(WIDE, 1.0)
    base: dict[Any, float] = dict.fromkeys(WIDE, 0.0)

    @property
    def codes(self) -> int:
        """Codes in a word."""
        return 32 // self.bits

    @property
    def pairs(self) -> int:
        """Pairs in a word."""
        return 16 // self.bits

    def stored(self, codes: Any) -> Any:
        """Return words, uint32 [...], of codes, unsigned [..., pairs, 2]."""
        raise NotImplementedError

    def read(self, words: Any) -> Any:
        """Return codes, uint8 [..., pairs, 2], of words; undoes `stored`."""
        raise NotImplementedError

    def numbers(self, word: Any, dtype: Any) -> list[Any]:
        """Return the pairs of a word, a word each, the left number in its low half.

        Args:
            word: uint32 array of NumPy or jax, or a register.
            dtype: bfloat16 or float16.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Moved(Decoder):
    """Codes whose bits are moved.

    Args:
        bits: of a code.
        places: for each pair, where bit j of a code stands in its half of the word: 0 to 15, or 16 more for the other
            half.
        to: by dtype, for each pair, where these bits go.
        ored: by dtype, bits of every number besides.
        factor: by dtype, for each pair, what numbers are multiplied by; all products are exact.
        added: likewise, what is added to the product.
        base: as in `Decoder`.
    """

    bits: int
    places: tuple[tuple[int, ...], ...]
    to: dict[Any, tuple[tuple[int, ...], ...]] = dataclasses.field(hash=False)
    ored: dict[Any, int] = dataclasses.field(hash=False)
    factor: dict[Any, tuple[float, ...]] = dataclasses.field(hash=False)
    added: dict[Any, tuple[float, ...]] = dataclasses.field(hash=False)
    base: dict[Any, float] = dataclasses.field(hash=False, default_factory=lambda: dict.fromkeys(WIDE, 0.0))

    def stored(self, codes: Any) -> Any:
        codes = jnp.asarray(codes).astype(jnp.uint32)
        word = jnp.zeros(codes.shape[:-2], jnp.uint32)
        for (t, v, j), at in self._bits():
            word = word | ((codes[..., t, v] >> np.uint32(j)) & np.uint32(1)) << np.uint32(at)
        return word

    def read(self, words: Any) -> Any:
        codes = [[jnp.zeros(words.shape, jnp.uint32)] * 2 for _ in range(self.pairs)]
        for (t, v, j), at in self._bits():
            codes[t][v] = codes[t][v] | ((words >> np.uint32(at)) & np.uint32(1)) << np.uint32(j)
        return jnp.stack([jnp.stack(pair, axis=-1) for pair in codes], axis=-2).astype(jnp.uint8)

    def _bits(self) -> list[tuple[tuple[int, int, int], int]]:
        """(pair, half, bit of the code) and its place in the word."""
        every = [(t, v, j) for t in range(self.pairs) for v in range(2) for j in range(self.bits)]
        return [((t, v, j), (16 * v + self.places[t][j]) % 32) for t, v, j in every]

    def numbers(self, word: Any, dtype: Any) -> list[Any]:
        dtype = np.dtype(dtype)
        out = []
        for t, (places, to) in enumerate(zip(self.places, self.to[dtype], strict=True)):
            masks: dict[int, int] = {}  # by how far to the right bits go
            for place, target in zip(places, to, strict=True):
                masks[place - target] = masks.get(place - target, 0) | (1 << target) * 0x10001
            around = max(places) > 15
            pair: Any = self.ored[dtype] * 0x10001
            for far, mask in masks.items():
                pair = masked(_moved(word, far, around), mask, pair)
            out.append(fma(pair, self.factor[dtype][t], self.added[dtype][t], dtype))
        return out


def _moved(word: Any, far: int, around: bool) -> Any:
    """Bits shifted to the right, or left, or to the right and around."""
    if far <= 0:
        return word << np.uint32(-far) if far else word
    right = word >> np.uint32(far)
    return right | word << np.uint32(32 - far) if around else right


@dataclasses.dataclass(frozen=True)
class Looked(Decoder):
    """Codes of 4 bits that are places in a table.

    A byte permutation picks four of eight bytes by the three low bits of four nibbles; where the fourth bit is set, it
    repeats the top bit of the byte that it picked. With the two halves of the table in ``left`` and ``right`` stored so
    that these repeated bits cancel, the exclusive or of two permutations is a table of sixteen bytes. That asks for
    equal top bits of entries j and j + 8, in the low bytes and in the high ones: codes are renumbered to that end
    (``order``), when they are packed.

    Args:
        order: the code of each entry.
        tables: by dtype, the words of the low and of the high bytes: four each, entries 0 to 7 and 8 to 15.
        stretch: by dtype, how many times the values the numbers are.
    """

    order: tuple[int, ...]
    tables: dict[Any, tuple[tuple[int, ...], tuple[int, ...]]] = dataclasses.field(hash=False)
    stretch: dict[Any, float] = dataclasses.field(hash=False)
    bits: int = 4

    def stored(self, codes: Any) -> Any:
        entries = jnp.asarray(np.argsort(self.order), jnp.uint32)[jnp.asarray(codes).astype(jnp.int32)]
        shifts = np.arange(8, dtype=np.uint32).reshape(4, 2) * 4
        return jnp.sum(entries << shifts, axis=(-2, -1), dtype=jnp.uint32)

    def read(self, words: Any) -> Any:
        shifts = np.arange(8, dtype=np.uint32).reshape(4, 2) * 4
        entries = (jnp.asarray(words)[..., None, None] >> shifts) & np.uint32(15)
        return jnp.asarray(self.order, jnp.uint8)[entries.astype(jnp.int32)]

    def numbers(self, word: Any, dtype: Any) -> list[Any]:
        turned = word ^ np.uint32(0x88888888)
        out = []
        for half in (0, 16):
            near, far = (w >> np.uint32(half) if half else w for w in (word, turned))
            low, high = (permuted(a, b, near) ^ permuted(c, d, far) for a, b, c, d in self.tables[np.dtype(dtype)])
            out += [permuted(low, high, 0x5140), permuted(low, high, 0x7362)]
        return out


@dataclasses.dataclass(frozen=True)
class Bytes(Decoder):
    """Integers of 8 bits, less an offset of 0 or 128.

    A bfloat16 number has 8 bits, and 128 + 15 is the largest whose last four are a half of a code. So a code is made of
    16 (high - offset') + (128 + low), which is exact, as one instruction rounds once; float16 holds 1024 + code.

    Args:
        offset: what is taken away.
    """

    offset: int
    bits: int = 8

    def stored(self, codes: Any) -> Any:
        return jnp.sum(jnp.asarray(codes).astype(jnp.uint32) << self._shifts, axis=(-2, -1), dtype=jnp.uint32)

    def read(self, words: Any) -> Any:
        return ((jnp.asarray(words)[..., None, None] >> self._shifts) & np.uint32(0xFF)).astype(jnp.uint8)

    @property
    def _shifts(self) -> np.ndarray:
        """Of a code: byte t of the left half of the word, and of the right."""
        return np.array([[0, 16], [8, 24]], np.uint32)

    def numbers(self, word: Any, dtype: Any) -> list[Any]:
        out = []
        for t in range(2):
            here = _moved(word, 8 * t, False)
            if np.dtype(dtype) == FLOAT16:
                number = masked(here, 0x00FF00FF, 0x64006400)
                out.append(fma(number, 1.0, -1024.0 - self.offset, dtype))
                continue
            low, high = (masked(half, 0x000F000F, 0x43004300) for half in (here, _moved(word, 8 * t + 4, False)))
            out.append(fma(fma(high, 1.0, -136.0 - self.offset / 16, dtype), 16.0, low, dtype))
        return out


# Instructions that are no operators.


def masked(word: Any, mask: int, rest: Any) -> Any:
    """Return ``word & mask | rest``, which is one instruction; ``rest`` a word, or an integer."""
    if machine := getattr(word, "masked", None):
        return machine(mask, rest)
    part = word & np.uint32(mask)
    return part if isinstance(rest, int) and not rest else part | (np.uint32(rest) if isinstance(rest, int) else rest)


def permuted(low: Any, high: Any, selector: Any) -> Any:
    """Return ``prmt(low, high, selector)``: byte i is the one of the eight that nibble i of the selector says.

    The low three bits of a nibble choose; the fourth asks for the chosen byte's top bit in all eight places.
    """
    if machine := getattr(selector if hasattr(selector, "permuted") else low, "permuted", None):
        return machine(low, high, selector)
    parts = [np.uint32(a) if isinstance(a, int) else a for a in (low, high)]
    selector = np.uint32(selector) if isinstance(selector, int) else selector
    word = None
    for i in range(4):
        nibble = selector >> np.uint32(4 * i)
        where = (nibble & np.uint32(3)) << np.uint32(3)
        first, second = ((part >> where) & np.uint32(0xFF) for part in parts)
        upper = (nibble >> np.uint32(2)) & np.uint32(1)
        byte = first * (np.uint32(1) - upper) + second * upper
        signs = (nibble >> np.uint32(3)) & np.uint32(1)
        byte = byte * (np.uint32(1) - signs) + (byte >> np.uint32(7)) * np.uint32(0xFF) * signs
        byte = byte << np.uint32(8 * i)
        word = byte if word is None else word | byte
    return word


def fma(pair: Any, factor: float, added: Any, dtype: Any) -> Any:
    """Return factor * number + added of both numbers of a word, rounded once to the dtype; factor a power of two.

    What is added is one number for both, or a word of normal numbers.
    """
    if isinstance(added, (int, float)) and factor == 1 and not added:
        return pair
    if machine := getattr(pair, "fma", None):
        return machine(factor, added, dtype)
    return functools.reduce(lambda a, b: a | b, [_fma_half(pair, v, factor, added, dtype) for v in range(2)])


def _fma_half(pair: Any, v: int, factor: float, added: Any, dtype: Any) -> Any:
    """`fma` of one half of a word, in its place."""
    of = jnp if isinstance(pair, jax.Array) else np

    def seen(bits: Any, as_dtype: Any) -> Any:
        return lax.bitcast_convert_type(bits, as_dtype) if of is jnp else bits.view(as_dtype)

    half = (pair >> np.uint32(16 * v)) & np.uint32(0xFFFF)
    digits, bias = (7, 127) if np.dtype(dtype) == BFLOAT16 else (10, 15)
    exponent = (half >> np.uint32(digits)) & np.uint32((1 << (15 - digits)) - 1)
    normal = (exponent > 0).astype(np.uint32)
    whole = (half & np.uint32((1 << digits) - 1)) | normal << np.uint32(digits)
    # Put together from integers: float32 arithmetic on CPU takes subnormal numbers for 0, and bfloat16 has the same.
    power = int(np.log2(factor)) + 127 - bias - digits + 1
    unit = seen((exponent - normal + np.uint32(power % (1 << 32))) << np.uint32(23), jnp.float32)
    sign = np.float32(1) - np.float32(2) * (half >> np.uint32(15)).astype(np.float32)
    if not isinstance(added, (int, float)):
        added = seen(((added >> np.uint32(16 * v)) & np.uint32(0xFFFF)).astype(np.uint16), dtype).astype(np.float32)
    # One rounding: the product is exact in float32, and so are the sums of those that there are.
    number = (sign * (whole.astype(np.float32) * unit) + of.asarray(added, np.float32)).astype(dtype)
    return seen(number, jnp.uint16).astype(np.uint32) << np.uint32(16 * v)


# The decoders.


def _both(bfloat16: Any, float16: Any) -> dict[Any, Any]:
    return {BFLOAT16: bfloat16, FLOAT16: float16}


def _floats(bits: int, places: Any, bfloat16: tuple[int, ...], float16: tuple[int, ...], powers: Any) -> Moved:
    """Small floats: sign, exponent and mantissa in their places make the number but for a power of two."""
    pairs = 16 // bits
    return Moved(
        bits,
        places,
        _both((bfloat16,) * pairs, (float16,) * pairs),
        _both(0, 0),
        _both(*((2.0**power,) * pairs for power in powers)),
        _both((0.0,) * pairs, (0.0,) * pairs),
    )


E4M3 = _floats(8, ((*range(8),), (*range(8, 16),)), (*range(4, 11), 15), (*range(7, 14), 15), (120, 8))
"""float8_e4m3fn, subnormal numbers included; the two codes of NaN become 480 and -480."""

E2M1 = _floats(
    4, ((6, 7, 8, 15), (10, 11, 12, 16 + 3), (0, 1, 2, 9), (4, 5, 14, 13)), (6, 7, 8, 15), (9, 10, 11, 15), (126, 14)
)
"""The 4-bit float of MXFP4 and NVFP4. In bfloat16 the first pair is where it is needed, the next two are one shift
away, the last one two."""


@functools.cache
def two_bits(offset: int) -> Moved:
    """Codes 0 to 3, less an offset.

    They are last bits of 128 (bfloat16) or 1024 (float16), several places up where that saves a shift.
    """

    def parts(one: float, room: int) -> tuple[Any, Any, Any]:
        up = [2 * t % room for t in range(8)]
        to = tuple((place, place + 1) for place in up)
        return to, tuple(2.0**-place for place in up), tuple(-one * 2.0**-place - offset for place in up)

    to, factor, added = (_both(*pair) for pair in zip(parts(128, 6), parts(1024, 10), strict=True))
    places = tuple((2 * t, 2 * t + 1) for t in range(8))
    return Moved(2, places, to, _both(0x4300, 0x6400), factor, added)


@functools.cache
def four_bits(offset: int | None) -> Moved:
    """Codes 0 to 15, less an offset; without one, last bits of 128 (bfloat16) or 1024 (float16) as they are."""
    places = tuple(tuple(range(4 * t, 4 * t + 4)) for t in range(4))
    to, one = ((0, 1, 2, 3),) * 4, (1.0,) * 4
    base = _both(128.0, 1024.0)
    added = {dtype: (0.0 if offset is None else -least - offset,) * 4 for dtype, least in base.items()}
    kept = base if offset is None else dict.fromkeys(WIDE, 0.0)
    return Moved(4, places, _both(to, to), _both(0x4300, 0x6400), _both(one, one), added, kept)


def looked(values: np.ndarray, bfloat16: float, float16: float) -> Looked:
    """Return the decoder of a table of sixteen numbers.

    Args:
        values: ascending; one is 0, and may become -0.
        bfloat16, float16: what the numbers are multiplied by before they are rounded to these dtypes. It decides how
            large the errors are, and which entries can be paired.

    Raises:
        ValueError: where the top bits of bytes cannot be paired.
    """
    stretch = _both(bfloat16, float16)
    bits = {d: (values.astype(np.float64) * f).astype(d).view(np.uint16).copy() for d, f in stretch.items()}
    for d in bits:
        bits[d][values == 0] = 0x8000
    alike: dict[tuple[int, ...], list[int]] = {}
    for code in range(16):
        alike.setdefault(tuple(int(b[code]) & 0x8080 for b in bits.values()), []).append(code)
    if any(len(codes) % 2 for codes in alike.values()):
        raise ValueError("top bits of the bytes cannot be paired; multiply the table by another number")
    ordered = [code for codes in alike.values() for code in codes]
    order = (*ordered[0::2], *ordered[1::2])

    def table(b: np.ndarray, shift: int) -> tuple[int, ...]:
        byte = ((b >> shift) & 0xFF)[list(order)].astype(np.uint8)
        # Of two entries with a top bit, one is stored inverted and without it: the other's repeated bit turns it back.
        byte[:8] ^= np.where(byte[:8] & 0x80, 0xFF, 0).astype(np.uint8)
        return tuple(int(w) for w in byte.view("<u4"))

    return Looked(order, {d: (table(b, 0), table(b, 8)) for d, b in bits.items()}, stretch)


NF4 = looked(NF4_VALUES, 1.1888, 1.8868)
"""The table is rounded to within 0.16 % (bfloat16) and 0.024 % (float16) of each number; as it is, 0.31 % in bfloat16.
The two factors were found by going through those from 1 to 4."""

"""Unpacking codes in order, in the form that compiles fastest or runs fastest.

`qjax.formats.packing.unpack_bits` interleaves the codes of a unit by stacking them. That loop runs well and compiles
slowly on CPU, the more so the more codes a unit has (measured per product: 5 ms for 4 bits, 15 to 19 ms for 3, 5 and
7, where the float product takes 2). For small weights, of which a model has hundreds, the codes are read by a shift
that varies along the row instead: 4 to 8 ms.

8-bit floats are widened by moving their bits into a float16, which has room for both kinds and which processors
convert; XLA's own conversion works bit by bit and takes more than twice as long.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qjax.formats import QArray
from qjax.formats.packing import BitStream

SMALL_ELEMENTS = 1 << 20
"""Weights of fewer elements are small: compiling them takes longer than a few hundred runs."""


def unpacked(w: QArray, dtype: np.dtype | None = None) -> Array:
    """Return the codes of a canonical weight [*stack, N, K]; equal to ``w.unpacked()``.

    Args:
        w: the weight.
        dtype: ``fmt.code_dtype``, or float32 where the codes are wanted as numbers.
    """
    bits, codes = w.fmt.code_bits, w.codes
    dtype = dtype or w.fmt.code_dtype
    plain = isinstance(w.fmt.packing, BitStream)
    if not plain or math.prod(codes.shape[-2:-1]) * w.length >= SMALL_ELEMENTS or not w.length:
        return w.unpacked().astype(dtype)
    if 8 % bits == 0:
        return _aligned(codes, bits, w.fmt.signed, dtype)[..., : w.length]
    code = _spanning(codes, bits, w.length)[..., : w.length]
    if w.fmt.signed:
        half = 1 << (bits - 1)  # two's complement of few bits: flip the sign bit, then subtract its weight
        code = (code ^ jnp.uint8(half)).astype(jnp.int8) - jnp.int8(half)
    return code.astype(dtype)


def widened(a: Array) -> Array:
    """Return float8_e4m3fn or float8_e5m2 numbers as float32, exactly; other arrays as they are."""
    if a.dtype not in (jnp.float8_e4m3fn, jnp.float8_e5m2):
        return a
    bits = lax.bitcast_convert_type(a, jnp.uint8).astype(jnp.uint16)
    if a.dtype == jnp.float8_e5m2:  # the upper half of a float16
        return lax.bitcast_convert_type(bits << 8, jnp.float16).astype(jnp.float32)
    rest = bits & jnp.uint16(0x7F)
    half = ((bits & jnp.uint16(0x80)) << 8) | (rest << 7)  # exponents are 8 less than in a float16
    half = jnp.where(rest == 0x7F, jnp.uint16(0x7E00), half)
    return lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32) * jnp.float32(256)


def floats(w: QArray) -> Array:
    """Return a canonical weight as float32 [*stack, N, K]; equal to ``w.decode_canonical()``."""
    codes = unpacked(w, np.dtype(np.float32) if w.fmt.is_integer else None)
    return w.fmt.decode(widened(codes), {name: widened(a) for name, a in w.aux.items()})


def _aligned(packed: Array, bits: int, signed: bool, dtype: np.dtype) -> Array:
    """Codes that never straddle bytes: repeat each byte, shift each repetition by its own amount.

    XLA's own 4-bit integers are the shortest way to say what a code's sign is. They exist only between two conversions:
    in the XLA of jax 0.10 on CPU, `lax.bitcast_convert_type(packed, jnp.int4)` gives wrong numbers where the dot that
    follows contracts the other axis.
    """
    count = 8 // bits
    shape = (*packed.shape, count)
    codes = lax.broadcast_in_dim(packed, shape, tuple(range(packed.ndim))) >> (np.arange(count, dtype=np.uint8) * bits)
    if bits == 4:
        codes = codes.astype(jnp.int4 if signed else jnp.uint4)
    else:
        codes = codes & jnp.uint8(2**bits - 1)
        if signed:
            half = 1 << (bits - 1)
            codes = (codes ^ jnp.uint8(half)).astype(jnp.int8) - jnp.int8(half)
    return codes.astype(dtype).reshape(*packed.shape[:-1], packed.shape[-1] * count)


def _spanning(packed: Array, bits: int, length: int) -> Array:
    """Codes that straddle bytes: gather the bytes of at most 32 bits of codes in a word, then shift as above."""
    span = math.lcm(bits, 8)
    unit, count = span // 8, span // bits
    tail = -packed.shape[-1] % unit
    if tail:
        packed = jnp.pad(packed, [(0, 0)] * (packed.ndim - 1) + [(0, tail)])
    rows = packed.reshape(*packed.shape[:-1], packed.shape[-1] // unit, unit)

    def word(first: int, stop: int) -> Array:
        parts = [rows[..., j].astype(jnp.uint32) << np.uint32(8 * (j - first)) for j in range(first, stop)]
        return sum(parts[1:], parts[0])

    if span <= 32:
        words, shifts = word(0, unit)[..., None], np.arange(count) * bits
    else:  # eight codes of 5 or 7 bits: two words of four
        middle = 4 * bits // 8
        words = jnp.stack([word(0, -(-4 * bits // 8)), word(middle, unit)], axis=-1)[..., None]
        shifts = np.arange(4) * bits + np.array([[0], [4 * bits - 8 * middle]])
    codes = (words >> shifts.astype(np.uint32)) & jnp.uint32(2**bits - 1)
    return codes.astype(jnp.uint8).reshape(*packed.shape[:-1], rows.shape[-2] * count)

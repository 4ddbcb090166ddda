"""Bit packing: how codes of 1 to 7 bits lie in bytes.

A row of K codes of b bits is one little-endian bit stream, padded with zero bits to whole bytes:

    bit j of code k is bit (k * b + j) of the stream,
    bit i of the stream is bit (i mod 8), counted from the least significant one, of byte (i // 8).

So a row takes ceil(K * b / 8) bytes, for 3 bits as well (eight codes in three bytes), and the oracle is
``np.unpackbits(row, bitorder="little")`` read b bits at a time. Signed codes are stored in two's complement, cut to
b bits. An example with b = 3 and the codes 1, 2, 3, 4, 5, 6, 7, 0 (low bit first: 100 010 110 001 101 011 111 000):

    byte 0 = 0b11_010_001   code 2 (low two bits), code 1, code 0      = 0xd1
    byte 1 = 0b0_101_100_0  code 5 (low bit), code 4, code 3, code 2   = 0x58
    byte 2 = 0b000_111_11   code 7, code 6, code 5                     = 0x1f

Both directions treat a row as units of ``lcm(b, 8)`` bits, the shortest run in which codes and bytes end together:
8 codes in 3 bytes for b = 3, 2 codes in 1 byte for b = 4. Within a unit every shift is a constant, so the code
below is a handful of shifts and ors on uint8 arrays that XLA fuses into one loop.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from qjax.errors import FormatError


class Packing(Protocol):
    """How the codes of one row lie in its bytes. A format's `packing`; most have a `BitStream`.

    Formats with a layout of their own (five trits in a byte, words that mix widths) give an object with these methods,
    hashable and comparable, since it is looked at while functions are traced.
    """

    def row_bytes(self, length: int) -> int:
        """Return the bytes that a row of ``length`` codes takes."""
        ...

    def capacity(self, nbytes: int) -> int:
        """Return the codes that fit in a row of ``nbytes`` bytes, places of padding included."""
        ...

    def offset(self, element: int) -> int | None:
        """Return the byte at which this element of a row begins, or None if a row cannot be cut there."""
        ...

    def pack(self, codes: ArrayLike) -> Array:
        """Return uint8 [..., row_bytes(K)] from codes [..., K]."""
        ...

    def unpack(self, packed: ArrayLike, length: int) -> Array:
        """Return the codes [..., length] from uint8 [..., row_bytes(length)]."""
        ...


@dataclasses.dataclass(frozen=True)
class BitStream:
    """Codes of equal width, one after the other: see the top of this module.

    Args:
        bits: 1 to 7.
        signed: whether codes are two's complement.
    """

    bits: int
    signed: bool

    def row_bytes(self, length: int) -> int:
        return packed_bytes(length, self.bits)

    def capacity(self, nbytes: int) -> int:
        return unpacked_length(nbytes, self.bits)

    def offset(self, element: int) -> int | None:
        return None if element * self.bits % 8 else element * self.bits // 8

    def pack(self, codes: ArrayLike) -> Array:
        return pack_bits(codes, self.bits)

    def unpack(self, packed: ArrayLike, length: int) -> Array:
        return unpack_bits(packed, self.bits, length, self.signed)


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Codes of eight bits, which are stored as they are, in their own dtype."""

    def row_bytes(self, length: int) -> int:
        return length

    def capacity(self, nbytes: int) -> int:
        return nbytes

    def offset(self, element: int) -> int | None:
        return element

    def pack(self, codes: ArrayLike) -> Array:
        return jnp.asarray(codes)

    def unpack(self, packed: ArrayLike, length: int) -> Array:
        return jnp.asarray(packed)


@dataclasses.dataclass(frozen=True)
class TwoBytes:
    """Codes of nine to sixteen bits, uint16, the low byte first."""

    def row_bytes(self, length: int) -> int:
        return 2 * length

    def capacity(self, nbytes: int) -> int:
        return nbytes // 2

    def offset(self, element: int) -> int | None:
        return 2 * element

    def pack(self, codes: ArrayLike) -> Array:
        codes = jnp.asarray(codes).astype(jnp.uint16)
        halves = jnp.stack([codes & jnp.uint16(255), codes >> jnp.uint16(8)], axis=-1).astype(jnp.uint8)
        return halves.reshape(*codes.shape[:-1], 2 * codes.shape[-1])

    def unpack(self, packed: ArrayLike, length: int) -> Array:
        packed = jnp.asarray(packed)[..., : 2 * length]
        halves = packed.reshape(*packed.shape[:-1], length, 2).astype(jnp.uint16)
        return halves[..., 0] | (halves[..., 1] << jnp.uint16(8))


def row_pad(packing: Packing, length: int) -> int:
    """Return how many codes more than ``length`` would fit in the bytes of its row."""
    return packing.capacity(packing.row_bytes(length)) - length


def packed_bytes(length: int, bits: int) -> int:
    """Return the bytes that a row of ``length`` codes of ``bits`` bits takes."""
    return -(-length * bits // 8)


def unpacked_length(nbytes: int, bits: int, pad: int = 0) -> int:
    """Return the codes in a row of ``nbytes`` bytes whose last ``pad`` places are padding."""
    return nbytes * 8 // bits - pad


def _unit(bits: int) -> tuple[int, int]:
    """Return (codes, bytes) of the shortest run in which codes and bytes end together."""
    if not 1 <= bits <= 8:
        raise FormatError(f"packing: codes of {bits} bits were asked for; 1 to 8 are possible")
    span = math.lcm(bits, 8)
    return span // bits, span // 8


def _pad_last(x: Array, multiple: int) -> Array:
    tail = -x.shape[-1] % multiple
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, tail)]) if tail else x


def pack_bits(codes: ArrayLike, bits: int) -> Array:
    """Pack integer codes along the last axis.

    Args:
        codes: [..., K] of any integer dtype; only the low ``bits`` bits of each code are kept.
        bits: 1 to 8.

    Returns:
        uint8 [..., ceil(K * bits / 8)].
    """
    per_unit, unit_bytes = _unit(bits)
    codes = jnp.asarray(codes)
    if not jnp.issubdtype(codes.dtype, jnp.integer):
        raise FormatError(f"packing: integer codes are packed, {codes.dtype} was given")
    nbytes = packed_bytes(codes.shape[-1], bits)
    low = codes.astype(jnp.uint8) & jnp.uint8(2**bits - 1)
    if bits == 8:
        return low
    low = _pad_last(low, per_unit)
    low = low.reshape(*low.shape[:-1], low.shape[-1] // per_unit, per_unit)
    columns = []
    for byte in range(unit_bytes):
        column = None
        for k in range(8 * byte // bits, (8 * byte + 7) // bits + 1):
            shift = k * bits - 8 * byte
            code = low[..., k]
            part = code << shift if shift >= 0 else code >> -shift
            column = part if column is None else column | part
        columns.append(column)
    packed = jnp.stack(columns, axis=-1)
    return packed.reshape(*packed.shape[:-2], packed.shape[-2] * unit_bytes)[..., :nbytes]


def unpack_bits(packed: ArrayLike, bits: int, length: int, signed: bool) -> Array:
    """Read codes back from `pack_bits`.

    Args:
        packed: uint8 [..., at least ceil(length * bits / 8)].
        bits: 1 to 8.
        length: K, the number of codes in a row.
        signed: whether the codes are two's complement.

    Returns:
        int8 (signed) or uint8 [..., K].
    """
    per_unit, unit_bytes = _unit(bits)
    packed = jnp.asarray(packed)
    if packed.shape[-1] < packed_bytes(length, bits):
        raise FormatError(
            f"packing: {length} codes of {bits} bits need {packed_bytes(length, bits)} bytes, "
            f"the row has {packed.shape[-1]}"
        )
    dtype = jnp.int8 if signed else jnp.uint8
    if bits == 8:
        return jax.lax.bitcast_convert_type(packed[..., :length], dtype)
    rows = _pad_last(packed[..., : packed_bytes(length, bits)], unit_bytes)
    rows = rows.reshape(*rows.shape[:-1], rows.shape[-1] // unit_bytes, unit_bytes)
    columns = []
    for k in range(per_unit):
        byte, shift = divmod(k * bits, 8)
        # Move the code to the top of a byte; shifting back down then spreads the sign, or fills with zeros.
        if shift + bits <= 8:
            top = rows[..., byte] << (8 - bits - shift)
        else:
            top = ((rows[..., byte] >> shift) | (rows[..., byte + 1] << (8 - shift))) << (8 - bits)
        columns.append(jax.lax.bitcast_convert_type(top, dtype) >> (8 - bits))
    codes = jnp.stack(columns, axis=-1)
    return codes.reshape(*codes.shape[:-2], codes.shape[-2] * per_unit)[..., :length]

"""Bit packing against NumPy's own bit order."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjax.errors import FormatError
from qjax.formats.packing import BitStream, pack_bits, packed_bytes, row_pad, unpack_bits, unpacked_length

LENGTHS = (0, 13, 24)

pack = jax.jit(pack_bits, static_argnums=1)
unpack = jax.jit(unpack_bits, static_argnums=(1, 2, 3))


def oracle(codes: np.ndarray, bits: int) -> np.ndarray:
    """The documented layout, written with np.packbits."""
    stream = (codes.astype(np.uint8)[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(stream.reshape(*codes.shape[:-1], codes.shape[-1] * bits), axis=-1, bitorder="little")


def unpack_oracle(packed: np.ndarray, bits: int, length: int, signed: bool) -> np.ndarray:
    stream = np.unpackbits(packed, axis=-1, bitorder="little")[..., : length * bits]
    codes = (stream.reshape(*packed.shape[:-1], length, bits) << np.arange(bits)).sum(-1).astype(np.int32)
    if signed:
        codes = np.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes)
    return codes


@pytest.mark.every(4)
@pytest.mark.parametrize("bits", range(1, 9))
def test_layout_is_the_documented_bit_stream(bits):
    rng = np.random.default_rng(bits)
    for length in LENGTHS:
        codes = rng.integers(0, 2**bits, (2, 2, length)).astype(np.uint8)
        packed = np.asarray(pack(codes, bits))
        np.testing.assert_array_equal(packed, oracle(codes, bits))
        np.testing.assert_array_equal(unpack(packed, bits, length, False), unpack_oracle(packed, bits, length, False))
        signed = codes.astype(np.int32) - 2 ** (bits - 1)
        packed = np.asarray(pack(signed.astype(np.int8), bits))
        back = np.asarray(unpack(packed, bits, length, True))
        assert back.dtype == np.int8
        np.testing.assert_array_equal(back, signed)
        np.testing.assert_array_equal(unpack_oracle(packed, bits, length, True), signed)


@given(bits=st.integers(1, 7), length=st.sampled_from(LENGTHS), seed=st.integers(0, 2**32 - 1))
def test_any_codes_come_back(bits, length, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (2, 2, length)).astype(np.uint8)
    packed = pack(codes, bits)
    assert packed.shape[-1] == packed_bytes(length, bits) == -(-length * bits // 8)
    np.testing.assert_array_equal(unpack(packed, bits, length, False), codes)


def test_worked_example_of_the_docs():
    packed = np.asarray(pack_bits(np.array([1, 2, 3, 4, 5, 6, 7, 0]), 3))
    assert [hex(b) for b in packed] == ["0xd1", "0x58", "0x1f"]


@given(bits=st.integers(1, 8), length=st.integers(0, 200))
def test_lengths_follow_from_bytes(bits, length):
    nbytes, pad = packed_bytes(length, bits), row_pad(BitStream(bits, False), length)
    assert pad >= 0
    assert unpacked_length(nbytes, bits, pad) == length


def test_unused_bits_are_zero():
    packed = np.asarray(pack_bits(np.full((1, 5), -1, np.int8), 3))
    assert packed.tolist() == [[0xFF, 0x7F]]


def test_refusals_name_the_numbers():
    with pytest.raises(FormatError, match="9 bits"):
        pack_bits(np.zeros(3, np.uint8), 9)
    with pytest.raises(FormatError, match="float32"):
        pack_bits(np.zeros(3, np.float32), 4)
    with pytest.raises(FormatError, match="4 bytes, the row has 3"):
        unpack_bits(np.zeros(3, np.uint8), 4, 8, True)

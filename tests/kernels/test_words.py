"""Weights in words for Hopper: the decoders over all codes, the order of words, lowering, and tier 1 against NumPy."""

from __future__ import annotations

import importlib

import jax
import jax.numpy as jnp
import ml_dtypes
import mosaic
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.gpu_parts.lookup import MAGNITUDES, numbers, weight
from qjax import ops
from qjax._compat import JAX_VERSION
from qjax.errors import FormatError, LayoutError
from qjax.formats import MXFP4, NF4, NVFP4, Float8, Int, TritPlanes, WordTiles, quantize_array
from qjax.formats import words as decoders
from qjax.formats.nf4 import NF4_VALUES
from qjax.formats.word_tiles import matrix_of, to_words
from qjax.kernels.dot.hopper import Schedule
from qjax.kernels.dot.words16 import words16

FORMATS = [
    Float8(),
    Float8(per="tensor"),
    Float8(group=64),
    NF4(),
    MXFP4(),
    NVFP4(),
    Int(2, group=64),
    Int(2, symmetric=False),
    Int(2, group=32, symmetric=False),
    TritPlanes(),
    TritPlanes(tied=True, store="nibble"),
    TritPlanes(planes=3, tied=True, group=64),
    TritPlanes(planes=1, store="two_bit", scale_dtype="bfloat16"),
]
KINDS = {
    "e4m3": (decoders.E4M3, np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)),
    "e2m1": (decoders.E2M1, np.concatenate([MAGNITUDES, -MAGNITUDES])),
    "nf4": (decoders.NF4, NF4_VALUES.astype(np.float64)),
    "int2": (decoders.two_bits(2), np.arange(-2.0, 2)),
    "uint2": (decoders.two_bits(0), np.arange(4.0)),
    "trits": (decoders.two_bits(1), np.arange(-1.0, 3)),
    "int4": (decoders.four_bits(8), np.arange(-8.0, 8)),
    "uint4": (decoders.four_bits(None), np.arange(16.0)),
    "int8": (decoders.Bytes(128), np.arange(-128.0, 128)),
    "uint8": (decoders.Bytes(0), np.arange(256.0)),
    "nibbles": (decoders.four_bits(4), np.arange(-4.0, 12)),
}


@pytest.mark.parametrize("dtype", decoders.WIDE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_decoders_over_all_codes(kind, dtype):
    """The instructions that a kernel runs, on NumPy's words: every code in every place, beside every other code."""
    decoder, values = KINDS[kind]
    n = 1 << decoder.bits
    both = np.stack(np.meshgrid(np.arange(n), np.arange(n)), axis=-1).reshape(-1, 2)  # neighbours of a pair
    rng = np.random.default_rng(0)
    codes = np.stack([both[rng.permutation(len(both))] for _ in range(decoder.pairs)], axis=-2).astype(np.uint8)
    stored = np.asarray(decoder.stored(codes))
    np.testing.assert_array_equal(decoder.read(stored), codes)

    def found(words):
        pairs = np.stack([np.asarray(p) for p in decoder.numbers(words, dtype)], axis=-1)
        return np.stack([pairs & 0xFFFF, pairs >> 16], axis=-1).astype(np.uint16).view(dtype).astype(np.float64)

    want = values[codes] + decoder.base[dtype]
    there = ~np.isnan(want)
    got = found(stored)
    if kind == "nf4":
        stretch = decoder.stretch[dtype]
        table = (values * stretch).astype(dtype).astype(np.float64)
        np.testing.assert_array_equal(got, table[codes])
        close = 0.0016 if dtype == decoders.BFLOAT16 else 0.00024
        np.testing.assert_allclose(table / stretch, values, rtol=close, atol=0)
    else:
        np.testing.assert_array_equal(got[there], want[there])
        np.testing.assert_array_equal(np.abs(got[~there]), 480)
    np.testing.assert_array_equal(found(jnp.asarray(stored)), got)  # as the interpreter runs it


def test_tables_that_cannot_be_paired():
    with pytest.raises(ValueError, match="multiply the table"):
        decoders.looked(NF4_VALUES, 1.0, 1.0)


@pytest.mark.parametrize("kind", ["e4m3", "int8", "int4", "int2"])
def test_words_are_those_of_the_threads_operand(kind):
    """What the inlined code does with registers, on layouts as jax defines them, which the interpreter does not run."""
    mgpu = importlib.import_module("jax.experimental.mosaic.gpu")
    decoder = KINDS[kind][0]
    codes = np.random.default_rng(0).integers(0, 1 << decoder.bits, (64, 128)).astype(np.uint8)
    tile = np.asarray(to_words(codes, decoder)).view(np.uint32).reshape(-1)[: decoder.bits * 256]
    threads = tile.reshape(decoder.bits // 2, 128, 4)  # as a strided load of vectors of 4 gives them
    own = np.swapaxes(threads, 0, 1).reshape(4, 32, 2 * decoder.bits)  # [warp, lane, word]
    pairs = np.asarray(decoder.read(own)).reshape(4, 32, decoder.bits, 2, decoder.pairs, 2)  # cell, half, pair
    operand = mosaic.in_threads(mgpu.WGMMA_LAYOUT, codes).reshape(4, 32, 16, 2, 2)  # 8 columns, half, pair
    np.testing.assert_array_equal(np.moveaxis(pairs, 3, 4).reshape(operand.shape), operand)
    np.testing.assert_array_equal(matrix_of(decoder.read(tile)), codes)


@settings(max_examples=4)
@given(st.sampled_from(FORMATS), st.integers(1, 150), st.integers(1, 300), st.sampled_from([(), (2,)]))
def test_packing_changes_no_number_and_is_undone(fmt, n, k, stack):
    floats = np.random.default_rng(n).normal(size=(*stack, n, k)).astype(np.float32)
    axes = {"in_axes": len(stack) + 1, "stack_axes": tuple(range(len(stack)))}
    w = quantize_array(jnp.asarray(floats), fmt.clamped(k), **axes)
    packed = ops.pack(w)
    np.testing.assert_array_equal(packed.dequantize(), w.dequantize())
    back = ops.neutral(packed)
    assert back.fmt == w.fmt and back.layout == w.layout
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(w), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_bits_of_a_packed_weight():
    for fmt, bits in ((Float8(group=128), 8.25), (NF4(), 4.5), (MXFP4(), 4.5), (Int(2, group=128), 2.25)):
        packed = jax.eval_shape(lambda fmt=fmt: ops.pack(quantize_array(jnp.zeros((256, 256)), fmt, in_axes=1)))
        assert packed.bits_per_element == bits


def test_what_cannot_be_packed_is_refused_with_the_reason():
    ones = jnp.ones((64, 96))
    for fmt, why in [
        (Float8("e5m2"), "only float8_e4m3fn is widened"),
        (NF4(group=24), "no multiple of 32"),
        (Int(2, group=24), "no multiple of 32"),
        (Int(2, symmetric=False, zero="float"), "lie between codes"),
        (TritPlanes(group=24), "no multiple of 32"),
    ]:
        with pytest.raises(LayoutError, match=why):
            ops.pack(quantize_array(ones, fmt, in_axes=1))
    with pytest.raises(FormatError, match="no integers of 2, 4 or 8 bits"):
        WordTiles(Int(5), 64)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize(("tokens", "dtype"), [(3, jnp.bfloat16), (130, jnp.float16)])
def test_it_lowers_for_cuda_here(fmt, tokens, dtype):
    w = jax.eval_shape(lambda: ops.pack(mosaic.blank(fmt.clamped(200), 200, 200)))
    x = jax.ShapeDtypeStruct((tokens, 200), dtype)
    with mosaic.described_gpu():
        text = jax.jit(ops.q_dot).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1 and "stablehlo.transpose" not in text


@pytest.mark.skipif(JAX_VERSION < (0, 11), reason="the Mosaic GPU interpreter is usable from jax 0.11 on")
@pytest.mark.parametrize("i", range(len(FORMATS)), ids=lambda i: FORMATS[i].name)
def test_against_numpy(i):
    fmt, dtype, n, k, tokens = FORMATS[i], (jnp.bfloat16, jnp.float16)[i % 2], 130, 200, (5, 13)[i // 2 % 2]
    w = weight(fmt, n, k)
    packed = ops.pack(w)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, tokens, k)), dtype)
    aux = {name: a.reshape(1, -1) for name, a in packed.aux.items()}
    alone = len(packed.fmt.planes) == 1
    schedule = Schedule(8, 2, 1 + i % 2) if i % 3 else Schedule(8, 2, tall=2, rolling=alone)
    how = {"planes": packed.fmt.planes, "n": n, "out_dtype": jnp.float32, "schedule": schedule}
    with mosaic.interpreter() as interpret:
        y, races = np.asarray(words16(aux, x, **how, interpret=interpret), np.float64), mosaic.races_found()
    exact, inputs = numbers(w, np.dtype(dtype)), np.asarray(x, np.float64)[0]
    assert np.max(np.abs(y[0] - inputs @ exact.T) / (np.abs(inputs) @ np.abs(exact).T)) < 1e-6
    assert not races

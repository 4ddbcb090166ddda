"""Strips of 2 and 4 bits for Hopper: order and decoder against NumPy, lowering, corrections, tier 1."""

from __future__ import annotations

import importlib

import jax
import jax.numpy as jnp
import mosaic
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks.gpu_parts.mixed import numbers, weight
from qjax import ops
from qjax._compat import JAX_VERSION
from qjax.errors import LayoutError, LoweringError
from qjax.formats import MixedBits, stack
from qjax.formats.mixed_tiles import MixedTiles, in_order
from qjax.formats.mixed_words import Emulated
from qjax.formats.words import WIDE
from qjax.kernels.dot.hopper import Schedule
from qjax.kernels.dot.mixed import corrections
from qjax.kernels.dot.mixed16 import by_warp, emulated, mixed16, of_thread, pieces

FORMATS = [
    MixedBits(),
    MixedBits(outliers=0.01),
    MixedBits(tile=32, wide_group=64, scale_bits=(2, 4, 4)),
    MixedBits(tile=48, wide_group=256, scale_bits=(4, 1, 2)),
    MixedBits(1 / 8, select="global", outliers=0.01),
    MixedBits(0, select="global"),
    MixedBits(1, select="global"),
]


@pytest.mark.slow
@settings(max_examples=1)
@given(st.sampled_from(FORMATS), st.integers(1, 150), st.integers(1, 600), st.sampled_from(WIDE))
@example(FORMATS[1], 40, 300, WIDE[0])
@example(FORMATS[4], 40, 300, WIDE[1])
def test_packing_changes_no_number_and_is_undone(fmt, n, k, dtype):
    """Two layers; and what threads of a kernel make of each tile, by the same instructions, is as the equations say."""
    both = [weight(fmt, n, k, seed=s) for s in range(2)]
    w = stack(both)
    packed = ops.pack(w)
    back = ops.neutral(packed)
    assert back.fmt == w.fmt and back.layout == w.layout
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(w), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    order = packed.fmt
    here = packed.aux["order"][1]
    in_tiles = lambda a: in_order(jnp.asarray(a, jnp.float32)[None], here, order)  # noqa: E731
    there, want = in_tiles(np.ones((1, k))), in_tiles(numbers(both[1], dtype, sparse=False) * 2.0**17)
    for kind, where, exact in zip(order.stretches, there, want, strict=True):
        tiles = np.asarray(packed.aux[kind.tiles][1]).view(np.uint32).reshape(-1, kind.count, *kind.words)
        made = [
            [np.concatenate(emulated(pieces(t, kind), kind, fmt.scale_bits, dtype), axis=-1) for t in row]
            for row in tiles
        ]
        found = np.concatenate([np.concatenate(row, axis=-1) for row in made])[:n].astype(np.float64)
        np.testing.assert_array_equal(np.where(where[0] > 0, found, 0), exact[0])
        assert np.all(np.isfinite(found))  # columns of padding meet zeros


def test_heads_and_their_dimensions():
    """Two axes of outputs: what is stored for every row stands along both."""
    w = weight(FORMATS[1], 40, 300, outs=(8, 5))
    packed = ops.pack(w)
    back = ops.neutral(packed)
    assert packed.shape == w.shape == (8, 5, 300) and jax.tree.structure(back) == jax.tree.structure(w)
    jax.tree.map(np.testing.assert_array_equal, back, w)


def test_the_oracle_is_the_format():
    """Both read the same bits; neither shares a line."""
    w = weight(FORMATS[1], 40, 300)
    np.testing.assert_allclose(numbers(w), np.asarray(w.dequantize(), np.float64), rtol=1e-5, atol=1e-9)


def test_threads_find_what_is_theirs():
    """What the inlined code does with registers, on layouts as jax defines them, which the interpreter does not run."""
    mgpu = importlib.import_module("jax.experimental.mosaic.gpu.fragmented_array")
    tile = np.random.default_rng(0).integers(0, 1 << 31, (24, 64)).astype(np.uint32) & np.uint32(0x3FFF3FFF)
    (kind,) = MixedTiles(FORMATS[0], 256).stretches
    *strided, steps, fours, rows = pieces(tile, kind)
    words = []
    for a, several in zip((*strided, fours), (4, 2, 1, 4), strict=True):  # vectors, thread after thread
        words.append(a.reshape(4, 8, 4, several))
    words.insert(3, mosaic.in_threads(mgpu.TiledLayout(**by_warp()), steps).reshape(4, 8, 4, 4))
    words.append(mosaic.in_threads(mgpu.WGMMA_ROW_LAYOUT, rows).reshape(4, 8, 4, 2))
    each = [[a[..., i] for i in range(a.shape[-1])] for a in words]
    parts = of_thread(each, kind, (3, 3, 4), WIDE[0], Emulated())
    for part, matrix in zip(parts, emulated(pieces(tile, kind), kind, (3, 3, 4), WIDE[0]), strict=True):
        own = mosaic.in_threads(mgpu.WGMMA_LAYOUT, matrix.view(np.uint16)).reshape(4, 8, 4, 8, 2, 2)
        for h in range(2):
            for t in range(8):
                pair = part[h][t]
                np.testing.assert_array_equal(np.stack([pair & 0xFFFF, pair >> 16], axis=-1), own[..., t, h, :])


def test_bits_of_a_packed_weight():
    bits = lambda fmt: jax.eval_shape(lambda: ops.pack(mosaic.blank(fmt, 256, 4096))).bits_per_element  # noqa: E731
    assert 3 < bits(MixedBits()) < 3.02  # besides the tiles: a unit a row, the order
    assert 2.5 < bits(MixedBits(0, select="global")) < 2.6  # 4096 columns fill 22 stretches
    assert bits(MixedBits(outliers=0.005)) - bits(MixedBits()) == pytest.approx(0.75 * 0.005 * 48, rel=0.01)


def test_what_cannot_be_packed_is_refused_with_the_reason():
    for fmt, why in [
        (MixedBits(strip=8), "strips have 8 columns, not 16"),
        (MixedBits(tile=8), "second scales are of 8 rows"),
        (MixedBits(wide_group=16), "of 16 columns, no multiple of 64"),
    ]:
        with pytest.raises(LayoutError, match=why):
            ops.pack(jax.eval_shape(lambda fmt=fmt: mosaic.blank(fmt, 64, 128)))
    with pytest.raises(LayoutError, match="belong to the whole matrix"):
        ops.pack(weight(FORMATS[0], 64, 128), parts=(2, 1))


def lowered(fmt, tokens, dtype, implementation=None):
    w = jax.eval_shape(lambda: ops.pack(mosaic.blank(fmt, 200, 300)))
    x = jax.ShapeDtypeStruct((tokens, 300), dtype)
    product = jax.jit(lambda x, w: ops.q_dot(x, w, implementation=implementation))
    with mosaic.described_gpu():
        return product.trace(x, w).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("fmt", "tokens", "dtype"),
    [(FORMATS[0], 3, jnp.bfloat16), (FORMATS[1], 64, jnp.float16), (FORMATS[4], 130, jnp.bfloat16)],
)
def test_it_lowers_for_cuda_here(fmt, tokens, dtype):
    text = lowered(fmt, tokens, dtype)
    assert text.count("custom_call @mosaic_gpu") == (1 if fmt.rule.aligned else 2)
    assert ("stablehlo.scatter" in text) == bool(fmt.outliers)


def test_what_the_kernel_does_not_take():
    with pytest.raises(LoweringError, match="cast them to bfloat16 or float16"):
        lowered(FORMATS[0], 2, jnp.float32, "mosaic")


@pytest.mark.parametrize("tokens", [3, 65])
def test_corrections_are_a_sparse_product(tokens):
    w = weight(FORMATS[1], 40, 300)
    aux = {name: a.reshape(1, -1) for name, a in ops.pack(w).aux.items()}
    x = np.random.default_rng(0).normal(size=(1, tokens, 300)).astype(np.float32)
    sparse = numbers(w) - numbers(w, sparse=False)
    assert np.count_nonzero(sparse)
    np.testing.assert_allclose(corrections(aux, jnp.asarray(x), 40)[0], x[0] @ sparse.T, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(JAX_VERSION < (0, 11), reason="the Mosaic GPU interpreter is usable from jax 0.11 on")
@pytest.mark.parametrize(
    ("fmt", "count", "k", "tokens", "dtype"), [(FORMATS[0], 1, 300, 5, WIDE[0]), (FORMATS[4], 2, 200, 13, WIDE[1])]
)
def test_against_numpy(fmt, count, k, tokens, dtype):
    """Once K is cut, once there are two matrices, and strips of a width stand apart."""
    n, dtype = 130, np.dtype(dtype)
    many = [weight(fmt, n, k, seed) for seed in range(count)]
    packed = ops.pack(stack(many))
    aux = {name: a.reshape(count, -1) for name, a in packed.aux.items()}
    x = jnp.asarray(np.random.default_rng(1).normal(size=(count, tokens, k)), dtype)
    how = {"fmt": packed.fmt, "n": n, "out_dtype": jnp.float32, "schedule": Schedule(8, 2, 2, count, 2)}
    with mosaic.interpreter() as interpret:
        y, races = np.asarray(mixed16(aux, x, **how, interpret=interpret), np.float64), mosaic.races_found()
    for got, w, inputs in zip(y, many, np.asarray(x, np.float64), strict=True):
        exact = numbers(w, dtype, sparse=False)
        terms = np.abs(inputs) @ np.abs(exact).T
        assert np.max(np.abs(got - inputs @ exact.T) / terms) < 1e-6
        once = 2.0**-8 if dtype == WIDE[0] else 2.0**-11  # the most that a rounding to this dtype is
        assert np.max(np.abs(got - inputs @ numbers(w, sparse=False).T) / terms) < 2.2 * once
    assert not races

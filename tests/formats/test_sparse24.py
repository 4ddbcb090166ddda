"""2:4 codes against the documented bytes, and the bits that they take."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qjax
from qjax.errors import FormatError, LayoutError
from qjax.formats import Sparse24, TritPlanes, quantize_array
from qjax.formats.sparse24 import SparsePacking
from qjax.testing import check_format


def sparse_codes(rows: int, length: int, bits: int, seed: int) -> np.ndarray:
    """Codes of which any number up to two in four are not 0."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, -(-length // 4), 4))
    keep = np.argsort(rng.random(codes.shape), -1) < rng.integers(0, 3, codes.shape[:2])[..., None]
    return (codes * keep).reshape(rows, -1)[:, :length].astype(np.int8)


def stored(codes: np.ndarray, bits: int) -> list[int]:
    """The bytes of one row, from the words of the docstring."""
    row, out = list(codes) + [0] * (-len(codes) % 8), []
    for start in range(0, len(row), 8):
        places, values = [], []
        for quad in (row[start : start + 4], row[start + 4 : start + 8]):
            full = [j for j in range(4) if quad[j]]
            chosen = sorted((full + [j for j in range(4) if not quad[j]])[:2])
            places += chosen
            values.append([int(quad[j]) for j in chosen])
        if bits == 4:
            out += [(a & 15) | (b & 15) << 4 for a, b in values]
        else:
            out += [v & 255 for pair in values for v in pair]
        out.append(sum(p << 2 * i for i, p in enumerate(places)))
    return out


@functools.partial(jax.jit, static_argnums=(1, 2))
def there_and_back(codes, bits, length):
    packing = SparsePacking(bits)
    packed = packing.pack(codes)
    return packed, packing.unpack(packed, length)


@settings(max_examples=20, deadline=None)
@given(bits=st.sampled_from([4, 8]), length=st.sampled_from([1, 4, 8, 30, 64]), seed=st.integers(0, 1000))
def test_layout_is_the_documented_one(bits, length, seed):
    codes = sparse_codes(3, length, bits, seed)
    packed, back = there_and_back(codes, bits, length)
    np.testing.assert_array_equal(packed, [stored(row, bits) for row in codes])
    np.testing.assert_array_equal(back, codes)
    packing = SparsePacking(bits)
    assert packing.row_bytes(length) == packed.shape[-1]
    assert 0 <= packing.capacity(packed.shape[-1]) - length < 8


def test_every_mask_and_every_code_comes_back():
    quads = [np.zeros(4)]
    for a, b in itertools.combinations(range(4), 2):
        for x, y in itertools.product((-8, -1, 0, 7), repeat=2):
            quad = np.zeros(4)
            quad[a], quad[b] = x, y
            quads.append(quad)
    codes = np.concatenate(quads)[None].astype(np.int8)
    packed, back = there_and_back(codes, 4, codes.shape[1])
    np.testing.assert_array_equal(back, codes)
    assert packed[0, 2] & 15 == 0b0100  # an all-zero quad has the places 0 and 1
    np.testing.assert_array_equal(packed[0], stored(codes[0], 4))


@pytest.mark.parametrize(
    ("fmt", "bits"),
    [(Sparse24(), 3.125), (Sparse24(scale_dtype="float32"), 3.25), (Sparse24(8), 5.125), (Sparse24(4, None), 3.015625)],
)
def test_bits_to_the_bit(fmt, bits):
    q = jax.eval_shape(lambda w: quantize_array(w, fmt, in_axes=1), jax.ShapeDtypeStruct((3, 1024), jnp.float32))
    assert q.bits_per_element == bits
    odd = jax.eval_shape(lambda w: quantize_array(w, fmt, in_axes=1), jax.ShapeDtypeStruct((3, 1021), jnp.float32))
    assert odd.nbytes == q.nbytes and odd.shape == (3, 1021)


@pytest.mark.every(2)
@pytest.mark.parametrize("fmt", [Sparse24(4, 24), Sparse24(8, None)])
def test_property_suite(fmt):
    check_format(fmt, examples=3, nearest=False)


@pytest.mark.parametrize("length", [61])
def test_the_two_largest_of_four_are_kept(length):
    x = np.random.default_rng(0).standard_normal((5, length)).astype(np.float32)
    fmt = Sparse24(4, 16, scale_dtype="float32")
    aux = jax.jit(fmt.fit)(x)
    codes, dense = (np.asarray(jax.jit(f.encode)(x, aux)) for f in (fmt, qjax.Int(4, group=16)))
    for row in range(5):
        for start in range(0, length, 4):
            quad = slice(start, min(start + 4, length))
            kept = np.argsort(-np.abs(x[row, quad]), kind="stable")[:2]
            want = np.zeros(len(codes[row, quad]))
            want[kept] = dense[row, quad][kept]
            np.testing.assert_array_equal(codes[row, quad], want)
    equal = np.full((1, 4), 0.7, np.float32)
    assert np.asarray(fmt.encode(equal, Sparse24(4, 4).fit(equal)))[0].astype(bool).tolist() == [1, 1, 0, 0]


def test_products_and_slices():
    w = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
    x = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    for inputs in (None, qjax.dynamic(qjax.Int(8, per="token"))):
        recipe = qjax.Recipe([qjax.Rule("**", weights=Sparse24(4, 16), inputs=inputs)])
        model = qjax.quantize(lambda p, x: x @ p["w"], {"w": jnp.asarray(w)}, x, recipe=recipe)
        near = np.asarray(model.params["w"])
        want = x @ near
        off = np.abs(np.asarray(model(model.params, x)) - want).max()
        assert off < (1e-4 if inputs is None else 0.02 * np.abs(want).max()), inputs
    q = model.params["w"]
    np.testing.assert_array_equal(q.slice_axis(0, 16, 48).dequantize(), near[16:48])
    with pytest.raises(LayoutError, match="starts inside"):
        q.slice_axis(0, 4, 48)


@pytest.mark.parametrize("fmt", [Sparse24(4, 16), TritPlanes(2, 16)])
def test_training_passes_straight_through(fmt):
    """Masks and scales are chosen anew in each step, and no derivative goes through how they are found."""
    w, x = jax.random.normal(jax.random.key(0), (32, 4)), jax.random.normal(jax.random.key(1), (3, 32))
    t = qjax.fake_quant(lambda p, x: x @ p["w"], qjax.Recipe([qjax.Rule("**", weights=fmt)]))
    state = t.init({"w": w}, x)
    loss, slope = jax.jit(jax.value_and_grad(lambda p: jnp.sum(t.apply(p, state, x)[0])))({"w": w})
    near = quantize_array(w, fmt, in_axes=0).dequantize()
    np.testing.assert_allclose(loss, jnp.sum(x @ near), rtol=1e-4)
    np.testing.assert_allclose(slope["w"], jnp.broadcast_to(x.sum(0)[:, None], w.shape), rtol=1e-5)


def test_settings_that_cannot_be():
    for bad in ({"bits": 3}, {"group": -1}, {"scale_dtype": "float64"}):
        with pytest.raises(FormatError, match="Sparse24"):
            Sparse24(**bad)

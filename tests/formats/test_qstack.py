"""QStack: one array, several formats."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import LayoutError
from qjax.formats import Float8, Int, QArray, QStack, is_quantized, quantize_array, stack_slices

RNG = np.random.default_rng(0)
FORMATS = (Int(4), Int(4), Float8(), None, Int(4))
W = RNG.standard_normal((5, 16, 6)).astype(np.float32)


def pieces():
    return [quantize_array(w, f, in_axes=0) if f else jnp.asarray(w) for w, f in zip(W, FORMATS, strict=True)]


def value(x):
    return np.asarray(x.dequantize() if is_quantized(x) else x)


@pytest.mark.parametrize("axis", [0, 1])
def test_it_is_the_stack_of_its_slices(axis):
    slices = pieces()
    q = stack_slices(slices, axis)
    expected = np.stack([value(s) for s in slices], axis)
    assert (q.shape, q.ndim, q.size, q.dtype) == (expected.shape, 3, expected.size, np.float32)
    assert q.nbytes == sum(s.nbytes for s in slices) and q.bits_per_element == 8 * q.nbytes / q.size
    assert len(q.parts) == 3 and q.assign == ((0, 0), (0, 1), (1, 0), (2, 0), (0, 2))
    np.testing.assert_array_equal(q.dequantize(), expected)
    at = jax.jit(lambda q, i: q.dequantize_at(i))
    for i, s in enumerate(slices):
        np.testing.assert_array_equal(value(q.index_stack(axis, i)), value(s))
        np.testing.assert_array_equal(at(q, i), value(s))
    runs = q.runs()
    assert [(a, b) for a, b, _ in runs] == [(0, 2), (2, 3), (3, 4), (4, 5)]
    for a, b, part in runs:
        np.testing.assert_array_equal(value(part), expected.take(range(a, b), axis))


def test_pytree_and_types():
    q = stack_slices(pieces())
    again = jax.tree.map(lambda a: a, q)
    assert isinstance(again, QStack) and again.assign == q.assign and isinstance(again.parts[0], QArray)
    assert is_quantized(q) and is_quantized(q.parts[0]) and not is_quantized(q.parts[2])
    assert q.astype(jnp.bfloat16).dequantize().dtype == jnp.bfloat16
    jax.tree.unflatten(jax.tree.structure(q), [object()] * len(jax.tree.leaves(q)))


def test_an_inner_stack_axis_slices_every_part():
    w = RNG.standard_normal((3, 2, 16, 4)).astype(np.float32)
    formats = (Int(4), Int(8), Int(4))
    q = stack_slices([quantize_array(x, f, in_axes=1, stack_axes=0) for x, f in zip(w, formats, strict=True)])
    inner = q.index_stack(1, 1)
    assert isinstance(inner, QStack) and inner.axis == 0
    np.testing.assert_array_equal(inner.dequantize(), q.dequantize()[:, 1])


def test_refusals():
    q = stack_slices(pieces())
    with pytest.raises(LayoutError, match="dequantize_at"):
        jax.jit(lambda i: q.index_stack(0, i).dequantize())(0)
    with pytest.raises(IndexError):
        q[5]
    with pytest.raises(LayoutError, match="one shape"):
        stack_slices([jnp.asarray(W[0]), jnp.asarray(W[0, :3])])

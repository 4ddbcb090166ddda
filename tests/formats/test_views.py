"""Views on packed codes equal the same views on the decoded array, or are refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjax.errors import LayoutError
from qjax.formats import Int, concatenate, quantize_array, stack

RNG = np.random.default_rng(0)


def make(shape, in_axes, stack_axes=(), fmt=None):
    w = RNG.standard_normal(shape).astype(np.float32)
    return quantize_array(w, fmt or Int(4, group=8), in_axes=in_axes, stack_axes=stack_axes)


def floats(q):
    return np.asarray(q.dequantize())


def same(view, expected):
    assert view.shape == expected.shape
    np.testing.assert_array_equal(floats(view), expected)


STACKED = make((2, 3, 16, 4, 6), (2,), (0, 1))  # two stack axes, K, two out axes
PROJECTION = make((2, 8, 5, 6), (0, 1))  # two in axes, two out axes
WHOLE = {id(q): floats(q) for q in (STACKED, PROJECTION)}


@given(perm=st.permutations(range(5)))
def test_any_transpose(perm):
    q = STACKED.transpose(perm)
    assert q.codes is STACKED.codes
    assert q.shape == tuple(STACKED.shape[a] for a in perm)
    back = q.transpose(np.argsort(perm).tolist())
    assert back.layout == STACKED.layout


def test_transposes_decode():
    same(STACKED.transpose(3, 0, 2, 4, 1), WHOLE[id(STACKED)].transpose(3, 0, 2, 4, 1))
    same(PROJECTION.T, WHOLE[id(PROJECTION)].T)
    with pytest.raises(LayoutError, match="transpose"):
        PROJECTION.transpose(0, 0, 1, 2)


def test_indices_static_and_traced():
    w = WHOLE[id(STACKED)]
    same(STACKED.index_stack(0, 1), w[1])
    same(STACKED.index_stack(1, -1), w[:, -1])
    same(STACKED[1][2], w[1, 2])
    traced = jax.jit(lambda q, i: q.index_stack(1, i).dequantize())
    np.testing.assert_array_equal(traced(STACKED, 2), w[:, 2])
    looped = jax.lax.fori_loop(0, 3, lambda i, s: s + STACKED.index_stack(1, i).dequantize(), jnp.zeros(w[:, 0].shape))
    np.testing.assert_allclose(looped, w.sum(1), rtol=1e-5, atol=1e-6)
    same(STACKED.slice_stack(1, 1, 2), w[:, 1:3])
    same(STACKED[0:1], w[0:1])
    assert [layer.shape for layer in STACKED] == [w.shape[1:]] * 2
    with pytest.raises(IndexError):
        STACKED[2]
    with pytest.raises(LayoutError, match="an in axis"):
        STACKED.index_stack(2, 0)
    with pytest.raises(LayoutError, match="an out axis"):
        STACKED.index_stack(3, 0)


def test_out_axes_are_indexed_and_sliced():
    q = STACKED[0][0].transpose(1, 0, 2)  # [4, 16, 6]
    w = WHOLE[id(STACKED)][0, 0].transpose(1, 0, 2)
    same(q[2], w[2])
    same(q[1:3], w[1:3])
    same(q.slice_axis(2, 4, 6), w[:, :, 4:6])
    tensor = make((16, 6), 0, fmt=Int(8, per="tensor"))
    same(tensor.slice_axis(1, 2, 5), floats(tensor)[:, 2:5])
    with pytest.raises(LayoutError, match="steps of 1"):
        q[::2]
    with pytest.raises(LayoutError, match="slice 0:7"):
        q.slice_axis(2, 0, 7)


def test_in_axes_are_sliced_on_bytes_and_groups_only():
    q = make((32, 3), 0)
    w = floats(q)
    same(q.slice_axis(0, 8, 24), w[8:24])
    same(q.slice_axis(0, 16, 19), w[16:19])
    with pytest.raises(LayoutError, match="inside a byte"):
        q.slice_axis(0, 3, 8)
    with pytest.raises(LayoutError, match="group"):
        q.slice_axis(0, 4, 8)
    same(PROJECTION.slice_axis(0, 1, 2), WHOLE[id(PROJECTION)][1:2])
    with pytest.raises(LayoutError, match="in axis"):
        PROJECTION.slice_axis(1, 0, 4)
    free = make((32, 3), 0, fmt=Int(3))
    same(free.slice_axis(0, 8, 13), floats(free)[8:13])


def test_rows_are_gathered():
    table = make((7, 16), 1)
    w = floats(table)
    ids = jnp.array([[3, 0, 3], [6, 6, 1]])
    same(table.take(0, ids), w[np.asarray(ids)])
    np.testing.assert_array_equal(jax.jit(lambda q, i: q.take(0, i).dequantize())(table, ids), w[np.asarray(ids)])
    same(table.take(0, jnp.int32(4)), w[4])
    same(STACKED.take(1, jnp.array([2, 0])), WHOLE[id(STACKED)][:, [2, 0]])
    shared = make((7, 16), 1, fmt=Int(8, per="tensor"))
    same(shared.take(0, ids), floats(shared)[np.asarray(ids)])
    with pytest.raises(LayoutError, match="gather"):
        table.take(1, ids)
    with pytest.raises(LayoutError, match="mode"):
        table.take(0, ids, mode="fill")


@pytest.mark.parametrize(
    ("shape", "new"),
    [
        ("stacked", (6, 16, 24)),
        ("stacked", (2, 3, 16, 2, 2, 6)),
        ("stacked", (2, 3, 1, 16, 4, 6)),
        ("stacked", (6, 2, 8, -1)),
        ("projection", (16, 30)),
        ("projection", (4, 4, 5, 6)),
        ("projection", (2, 8, 30, 1)),
    ],
)
def test_reshapes(shape, new):
    q = {"stacked": STACKED, "projection": PROJECTION}[shape]
    same(q.reshape(new), WHOLE[id(q)].reshape(new))


def test_reshapes_after_transposes():
    q, w = STACKED[0][0], WHOLE[id(STACKED)][0, 0]  # [16, 4, 6]
    same(q.transpose(0, 2, 1).reshape(16, 24), w.transpose(0, 2, 1).reshape(16, 24))
    same(q.transpose(2, 0, 1).reshape(3, 2, 16, 4), w.transpose(2, 0, 1).reshape(3, 2, 16, 4))
    same(q.reshape(16, 24).T.reshape(4, 6, 16), w.reshape(16, 24).T.reshape(4, 6, 16))
    same(q.reshape(16, 1, 4, 6).reshape(16, 24), w.reshape(16, 24))


@pytest.mark.parametrize(
    ("view", "new"),
    [
        (lambda: STACKED, (2, 48, 4, 6)),  # stack with in
        (lambda: STACKED, (2, 3, 64, 6)),  # in with out
        (lambda: PROJECTION.transpose(1, 0, 2, 3), (16, 5, 6)),  # in axes out of order
        (lambda: STACKED.transpose(1, 0, 2, 3, 4), (6, 16, 4, 6)),  # stack axes out of order
        (lambda: PROJECTION, (2, 8, 31)),
        (lambda: PROJECTION, (-1, -1)),
    ],
)
def test_reshapes_that_would_not_be_exact(view, new):
    with pytest.raises(LayoutError):
        view().reshape(new)


def test_units_come_and_go():
    q = make((16, 1, 6), 0)
    w = floats(q)
    same(q.squeeze(1), w[:, 0])
    same(q.squeeze(1).expand_dims((0, 3)), w[:, 0][None, :, :, None])
    same(q.expand_dims(0).squeeze(), w[:, 0])
    lone = make((1, 8, 5), (0, 1))
    same(lone.squeeze(0), floats(lone)[0])
    same(lone.reshape(8, 5), floats(lone)[0])
    with pytest.raises(LayoutError, match="size 16"):
        q.squeeze(0)
    with pytest.raises(LayoutError, match="only in axis"):
        make((1, 5), 0, fmt=Int(4)).squeeze(0)


def test_concatenation():
    a, b = make((16, 4), 0), make((16, 6), 0)
    same(concatenate([a, b], 1), np.concatenate([floats(a), floats(b)], 1))
    s, t = make((2, 16, 4), 1, 0), make((3, 16, 4), 1, 0)
    same(concatenate([s, t], 0), np.concatenate([floats(s), floats(t)]))
    # Scales of whole tensors are repeated over their parts.
    c, d = (make((16, n), 0, fmt=Int(8, per="tensor")) for n in (4, 6))
    same(concatenate([c, d], 1), np.concatenate([floats(c), floats(d)], 1))
    same(stack([a, a, a]), np.stack([floats(a)] * 3))
    same(stack([s, s]), np.stack([floats(s)] * 2))
    with pytest.raises(LayoutError, match="in axis"):
        concatenate([a, b], 0)
    with pytest.raises(LayoutError, match="differ in format"):
        concatenate([a, make((16, 6), 0, fmt=Int(4))], 1)
    with pytest.raises(LayoutError, match="differ elsewhere"):
        stack([a, b])


@given(data=st.data())
def test_shapes_of_chains_of_views(data):
    """Shapes alone, which is fast: any chain of views has the shape that NumPy gives it."""
    q, w = STACKED, np.broadcast_to(np.float32(0), STACKED.shape)
    for _ in range(4):
        step = data.draw(st.sampled_from(["transpose", "expand", "index", "merge"]))
        if step == "transpose":
            perm = data.draw(st.permutations(range(q.ndim)))
            q, w = q.transpose(perm), w.transpose(perm)
        elif step == "expand":
            axis = data.draw(st.integers(0, q.ndim))
            q, w = q.expand_dims(axis), np.expand_dims(w, axis)
        elif step == "index" and q.stack_axes:
            axis = q.stack_axes[0]
            q, w = jax.eval_shape(lambda q, axis=axis: q.index_stack(axis, 0), q), w.take(0, axis)
        elif step == "merge":
            new = (*w.shape, 1)
            q, w = jax.eval_shape(lambda q, new=new: q.reshape(new), q), w.reshape(new)
        assert q.shape == w.shape

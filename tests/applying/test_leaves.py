"""Leaves are stored as `quantize_array` would store them, whatever order they lie in; their SQNR is NumPy's."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.applying import leaves as module
from qjax.applying.leaves import quantize_leaves
from qjax.applying.storage import LeafPlan, Stored
from qjax.errors import QjaxError
from qjax.formats import quantize_array

FORMATS = [
    qjax.Int(8),
    qjax.Int(4),
    qjax.Int(3, symmetric=False),
    qjax.Int(8, per="tensor"),
    qjax.Int(4, group=8),
    qjax.Int(6, scale="qmax"),
    qjax.Float8("e4m3fn"),
    qjax.NF4(group=8),
]
# Shape, in axes, stack axes, key axes.
LAYOUTS = {
    "dense": ((24, 10), (0,), (), ()),
    "rows of the output first": ((10, 24), (1,), (), ()),
    "heads": ((2, 12, 10), (0, 1), (), ()),
    "convolution": ((2, 2, 6, 10), (0, 1, 2), (), ()),
    "scanned": ((3, 24, 10), (1,), (0,), (0,)),
    "stacked in the middle": ((24, 3, 10), (0,), (1,), (1,)),
    "experts in layers": ((3, 2, 24, 10), (2,), (0, 1), (0,)),
    "layers inside experts": ((2, 3, 24, 10), (2,), (1, 0), (1,)),
}


def plan(fmt, shape, in_axes, stack_axes, key_axes, dtype=jnp.float32):
    keys = itertools.product(*(range(shape[a]) for a in key_axes))
    return LeafPlan(0, "w", shape, np.dtype(dtype), in_axes, stack_axes, key_axes, {k: Stored(fmt) for k in keys})


@pytest.mark.every(4)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_quantize_array(layout):
    shape, in_axes, stack_axes, key_axes = LAYOUTS[layout]
    w = jax.random.t(jax.random.key(0), 4.0, shape)
    # every format as a plain weight, one with a scale per row and one with groups in every layout
    for fmt in FORMATS if layout == "dense" else (qjax.Int(5), qjax.Int(4, group=8)):
        q = quantize_array(w, fmt, in_axes=in_axes, stack_axes=stack_axes)
        (got,), finish = quantize_leaves({0: plan(fmt, *LAYOUTS[layout])}, [w])
        jax.tree.map(np.testing.assert_array_equal, got, q)
        assert jax.tree.structure(got) == jax.tree.structure(q)
        near = np.asarray(q.dequantize(), np.float64)
        for key, decibel in finish()[0].items():
            at = tuple(key[key_axes.index(a)] if a in key_axes else slice(None) for a in range(len(shape)))
            part, error = np.asarray(w, np.float64)[at], (w - near)[at]
            assert decibel == pytest.approx(10 * np.log10((part**2).sum() / (error**2).sum()), abs=1e-3)


def test_bfloat16_is_remembered():
    w = jax.random.normal(jax.random.key(0), (24, 10), jnp.bfloat16)
    (got,), finish = quantize_leaves({0: plan(qjax.Int(8), (24, 10), (0,), (), (), jnp.bfloat16)}, [w])
    assert got.dtype == jnp.bfloat16 and 40 < finish()[0][()] < 50


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_numbers_are_counted(bad):
    w = jnp.ones((24, 10)).at[3, 4].set(bad)
    _, finish = quantize_leaves({0: plan(qjax.Int(8), (24, 10), (0,), (), ())}, [w])
    with pytest.raises(QjaxError, match="w: 1 of its 240 numbers"):
        finish()


def test_huge_and_zero_weights_are_not_bad():
    for w in (jnp.full((24, 10), 1e30), jnp.zeros((24, 10))):
        (got,), finish = quantize_leaves({0: plan(qjax.Int(8), (24, 10), (0,), (), ())}, [w])
        finish()
        np.testing.assert_allclose(got.dequantize(), w, rtol=1e-2)


def test_leaves_are_waited_for_when_many_are_begun(monkeypatch):
    monkeypatch.setattr(module, "IN_FLIGHT", 24 * 10 * 4)
    plans = {i: plan(qjax.Int(8), (24, 10), (0,), (), ()) for i in range(4)}
    done = []
    leaves = [jnp.ones((24, 10)) for _ in plans]
    stored, finish = quantize_leaves(plans, leaves, progress=lambda i, n, name: done.append((i, n, name)))
    assert done == [(1, 4, "w"), (2, 4, "w"), (3, 4, "w")] and leaves == [None] * 4 and len(stored) == 4
    assert sorted(finish()) == [0, 1, 2, 3] and len(done) == 4


def test_donated_leaves_are_deleted_one_by_one():
    leaves = [jnp.ones((24, 10)), jnp.zeros((24, 10))]
    kept = list(leaves)
    _, finish = quantize_leaves({i: plan(qjax.Int(8), (24, 10), (0,), (), ()) for i in range(2)}, leaves, donate=True)
    assert all(a.is_deleted() for a in kept)
    finish()

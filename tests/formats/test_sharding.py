"""Quantizing and decoding keep to the shards, on meshes of both kinds and inside shard_map."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from qjax.calibration import MSE
from qjax.formats import NF4, DualGrained, Int, Sparse24, TritPlanes, quantize_array

W = np.random.default_rng(0).standard_normal((128, 32)).astype(np.float32)  # [K, N]
FORMATS = [
    *(Int(4, group=16, symmetric=False), NF4(16), DualGrained(16)),
    *(TritPlanes(2, 16, store="two_bit"), Sparse24(4, 16)),
]


def specs(q, axis):
    """Shard the codes' rows ("out") or columns ("in"), and aux with them."""
    along = lambda a: P(None, "x") if a.shape[-1] > 1 else P()  # noqa: E731 (rows that share a scale keep it)
    return jax.tree.map(lambda a: P("x", None) if axis == "out" else along(a), q)


@pytest.mark.every(4)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_meshes(fmt, kind):
    whole = quantize_array(W, fmt, in_axes=0)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        for axis, spec in (("out", P(None, "x")), ("in", P("x", None))):
            placed = jax.tree.map(lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), whole, specs(whole, axis))
            decoded = jax.jit(lambda q: q.dequantize())(placed)
            np.testing.assert_array_equal(decoded, whole.dequantize())
            assert decoded.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
            made = quantize_array(jax.device_put(W, NamedSharding(mesh, spec)), fmt, in_axes=0)
            np.testing.assert_array_equal(made.codes, whole.codes)
            assert made.codes.sharding.is_equivalent_to(placed.codes.sharding, 2)


@pytest.mark.parametrize("axis", ["out", "in"])
def test_shard_map_sees_smaller_arrays(axis):
    fmt = FORMATS[0]
    whole = quantize_array(W, fmt, in_axes=0)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    out = P(None, "x") if axis == "out" else P("x", None)

    def local(q):
        assert q.shape == ((128, 4) if axis == "out" else (16, 32))
        return q.dequantize()

    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(specs(whole, axis),), out_specs=out))
    np.testing.assert_array_equal(run(whole), whole.dequantize())


def test_searches_run_inside_shard_map():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    fit = jax.shard_map(lambda w: MSE().fit(w, FORMATS[0])["scale"], mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    np.testing.assert_array_equal(jax.jit(fit)(W.T), jax.jit(lambda w: MSE().fit(w, FORMATS[0])["scale"])(W.T))

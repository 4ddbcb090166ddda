"""QArray: layouts of all kinds of weights, and the pytree it is."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from qjax.errors import FormatError, LayoutError
from qjax.formats import NVFP4, Float8, Int, Layout, QArray, assemble, canonical_matrix, quantize_array

RNG = np.random.default_rng(0)

# name: shape, in axes, stack axes, stored shape of 4-bit codes
WEIGHTS = {
    "dense [K, N]": ((16, 6), (0,), (), (6, 8)),
    "dense [N, K]": ((6, 16), (1,), (), (6, 8)),
    "odd K": ((13, 3), (0,), (), (3, 7)),
    "DenseGeneral [D, H, Dh]": ((16, 2, 3), (0,), (), (2, 3, 8)),
    "out projection [H, Dh, D]": ((2, 8, 5), (0, 1), (), (5, 1, 8)),
    "convolution HWIO": ((3, 3, 4, 5), (0, 1, 2), (), (5, 1, 1, 18)),
    "depthwise HWIO": ((3, 3, 1, 5), (0, 1, 2), (), (5, 1, 1, 5)),
    "scanned [L, K, N]": ((3, 16, 6), (1,), (0,), (3, 6, 8)),
    "MaxText [K, L, N]": ((16, 3, 6), (0,), (1,), (3, 6, 8)),
    "experts [E, K, N]": ((4, 16, 6), (1,), (0,), (4, 6, 8)),
    "layers of experts [L, E, K, N]": ((2, 4, 16, 3), (2,), (0, 1), (2, 4, 3, 8)),
    "inner stack first [E, L, K, N]": ((4, 2, 16, 3), (2,), (1, 0), (2, 4, 3, 8)),
    "vector [K]": ((16,), (0,), (), (8,)),
    "stacked vectors [L, K]": ((3, 16), (1,), (0,), (3, 8)),
    "in axes out of order": ((2, 8, 5), (1, 0), (), (5, 1, 8)),
}


def weight(shape):
    return RNG.standard_normal(shape).astype(np.float32)


def canonical(w, in_axes, stack_axes):
    rest = [a for a in range(w.ndim) if a not in in_axes + stack_axes]
    x = w.transpose([*stack_axes, *rest, *in_axes])
    stacks = x.shape[: len(stack_axes)]
    return x.reshape(*stacks, int(np.prod([w.shape[a] for a in rest])), -1)


@pytest.mark.every(4)
@pytest.mark.parametrize("name", WEIGHTS)
def test_layouts(name):
    shape, in_axes, stack_axes, stored = WEIGHTS[name]
    w = weight(shape)
    q = quantize_array(w, Int(4, group=8), in_axes=in_axes, stack_axes=stack_axes)
    assert (q.shape, q.ndim, q.size, q.dtype) == (shape, w.ndim, w.size, np.float32)
    assert q.codes.shape == stored and q.codes.dtype == jnp.uint8
    groups = -(-int(np.prod([shape[a] for a in in_axes])) // 8)
    assert q.aux["scale"].shape == (*stored[:-1], groups)
    assert q.nbytes == q.codes.size + 4 * q.aux["scale"].size
    assert q.bits_per_element == 8 * q.nbytes / w.size
    assert (q.in_axes, q.stack_axes) == (in_axes, stack_axes)
    # The numbers, block by block, in NumPy.
    x = canonical(w, in_axes, stack_axes)
    expected = np.zeros_like(x)
    for g in range(groups):
        part = x[..., 8 * g : 8 * g + 8]
        scale = np.abs(part).max(-1, keepdims=True) * (np.float32(1) / np.float32(7.5))
        expected[..., 8 * g : 8 * g + 8] = np.clip(np.round(part * (np.float32(1) / scale)), -8, 7) * scale
    np.testing.assert_array_equal(canonical(np.asarray(q.dequantize()), in_axes, stack_axes), expected)
    np.testing.assert_array_equal(q.decode_canonical(), expected)
    np.testing.assert_array_equal(canonical_matrix(jnp.asarray(w), in_axes, stack_axes), x)
    one = q.canonical()
    assert one.shape == x.shape and one.codes.ndim == x.ndim
    assert one.unpacked().shape == x.shape and one.unpacked().dtype == jnp.int8


def test_per_tensor_scales_are_one_per_slice():
    q = quantize_array(weight((3, 16, 2, 3)), Int(8, per="tensor"), in_axes=1, stack_axes=0)
    assert q.aux["scale"].shape == (3, 1, 1, 1) and q.codes.shape == (3, 2, 3, 16) and q.codes.dtype == jnp.int8
    np.testing.assert_array_equal(q[1].dequantize(), q.dequantize()[1])


def test_the_axes_have_to_make_sense():
    w = jnp.asarray(weight((4, 6)))
    for axes, words in (
        ({"in_axes": ()}, "at least one"),
        ({"in_axes": (0, 0)}, "twice"),
        ({"in_axes": 0, "stack_axes": 0}, "twice"),
        ({"in_axes": 2}, "axis 2"),
    ):
        with pytest.raises(LayoutError, match=words):
            quantize_array(w, Int(4), **axes)
    with pytest.raises(FormatError, match="int32"):
        quantize_array(jnp.ones((3, 4), jnp.int32), Int(4), in_axes=0)
    with pytest.raises(LayoutError, match="empty along an in axis"):
        quantize_array(jnp.ones((3, 0, 2)), Int(4), in_axes=(0, 1))
    assert quantize_array(w, Int(4), in_axes=-2).in_axes == (0,)


@pytest.mark.parametrize("shape", [(0, 6), (16, 0), (0, 0)])
@pytest.mark.parametrize("fmt", [Int(4), Int(4, group=8), Int(8, per="tensor"), NVFP4()])
def test_empty_weights(fmt, shape):
    q = quantize_array(jnp.zeros(shape), fmt, in_axes=0)
    assert q.shape == shape and q.dequantize().shape == shape and q.bits_per_element == 0


def test_pytree_paths_and_placeholders():
    q = quantize_array(weight((3, 16, 6)), Int(4, group=8, symmetric=False), in_axes=1, stack_axes=0)
    paths = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree_util.tree_leaves_with_path(q)]
    assert paths == ["codes", "aux/scale", "aux/zero"]
    leaves, tree = jax.tree.flatten(q)
    for stand_in in (object(), None, True, PartitionSpec("x")):
        made = jax.tree.unflatten(tree, [stand_in] * len(leaves))
        assert isinstance(made, QArray) and made.codes is stand_in and "QArray" in repr(made)
    specs = jax.tree.map(lambda a: PartitionSpec(*[None] * a.ndim), q)
    assert isinstance(specs, QArray) and jax.tree.structure(q) == jax.tree.structure(specs)
    assert jax.tree.structure(q) != jax.tree.structure(q.astype(jnp.bfloat16))
    abstract = jax.eval_shape(lambda w: quantize_array(w, q.fmt, in_axes=1, stack_axes=0), q.dequantize())
    assert isinstance(abstract.codes, jax.ShapeDtypeStruct)
    assert (abstract.shape, abstract.nbytes) == (q.shape, q.nbytes)


def test_jit_vmap_and_scan_slice_it():
    w = weight((3, 16, 6))
    q = quantize_array(w, Int(4, group=8), in_axes=1, stack_axes=0)
    whole = np.asarray(q.dequantize())

    def body(carry, layer):
        assert layer.shape == (16, 6) and layer.stack_axes == ()
        return carry, layer.dequantize()

    np.testing.assert_array_equal(jax.lax.scan(body, 0, q)[1], whole)
    np.testing.assert_array_equal(jax.vmap(lambda layer: layer.dequantize())(q), whole)
    np.testing.assert_array_equal(jax.jit(lambda q: q)(q).dequantize(), whole)
    np.testing.assert_array_equal(jax.tree.map(lambda a: a[1], q).dequantize(), whole[1])
    # Quantizing under vmap gives the stack back: the axis in front shows in the rank of the codes alone.
    mapped = jax.vmap(lambda w: quantize_array(w, Int(4, group=8), in_axes=0))(w)
    assert mapped.shape == w.shape and mapped.stack_axes == (0,)
    np.testing.assert_array_equal(mapped.codes, q.codes)
    np.testing.assert_array_equal(mapped.dequantize(), whole)
    # Outer stack axes that are sliced away take their labels along, wherever the user has them.
    double = quantize_array(weight((16, 2, 3, 5)), Int(4), in_axes=0, stack_axes=(2, 1))
    inner = jax.tree.map(lambda a: a[0], double)
    assert inner.shape == (16, 2, 5) and inner.stack_axes == (1,)
    np.testing.assert_array_equal(inner.dequantize(), double.dequantize()[:, :, 0])


def test_an_axis_that_is_no_stack_axis_cannot_vanish():
    q = quantize_array(weight((16, 6)), Int(4), in_axes=0)
    with pytest.raises(LayoutError, match="no stack axis"):
        _ = jax.tree.map(lambda a: a[0, 0], q).shape


def test_dtype_is_remembered_and_changed():
    q = quantize_array(jnp.asarray(weight((16, 6)), jnp.bfloat16), Float8(), in_axes=0)
    assert q.dequantize().dtype == jnp.bfloat16 and q.dequantize(jnp.float32).dtype == jnp.float32
    other = q.astype(jnp.float16)
    assert other.dequantize().dtype == jnp.float16 and other.codes is q.codes
    with pytest.raises(FormatError, match="int8"):
        q.astype(jnp.int8)


def test_spec_goes_through_json():
    q = quantize_array(weight((2, 8, 5)), Int(3, group=4), in_axes=(0, 1))
    spec = json.loads(json.dumps(q.spec()))
    again = QArray.from_spec(spec, np.asarray(q.codes), {k: np.asarray(a) for k, a in q.aux.items()})
    assert (again.fmt, again.layout, again.dtype) == (q.fmt, q.layout, q.dtype)
    np.testing.assert_array_equal(again.dequantize(), q.dequantize())
    assert Layout.from_dict(q.layout.to_dict()) == q.layout and hash(q.layout) == hash(again.layout)
    with pytest.raises(LayoutError, match="not a layout"):
        Layout.from_dict({"order": ["x0"], "in_tail": [], "pad": 0})


def test_codes_from_elsewhere_are_assembled():
    w = weight((3, 16, 6))
    fmt = Int(4, group=8)
    x = canonical_matrix(jnp.asarray(w), 1, 0)
    aux = fmt.fit(x)
    q = assemble(fmt.encode(x, aux), aux, fmt, shape=w.shape, in_axes=1, stack_axes=0)
    np.testing.assert_array_equal(q.codes, quantize_array(w, fmt, in_axes=1, stack_axes=0).codes)
    known = quantize_array(w, fmt, in_axes=1, stack_axes=0, aux={"scale": aux["scale"] * 2})
    np.testing.assert_array_equal(known.aux["scale"], aux["scale"] * 2)
    with pytest.raises(LayoutError, match="do not fit"):
        assemble(fmt.encode(x, aux), aux, fmt, shape=(3, 6, 16), in_axes=1, stack_axes=0)
    with pytest.raises(FormatError, match="aux 'scale'"):
        assemble(fmt.encode(x, aux), {"scale": aux["scale"][:, 0]}, fmt, shape=w.shape, in_axes=1, stack_axes=0)


def test_numpy_sees_the_numbers():
    q = quantize_array(weight((16, 6)), Int(4), in_axes=0)
    assert np.asarray(q).dtype == np.float32 and np.asarray(q, np.float64).dtype == np.float64
    np.testing.assert_array_equal(np.asarray(q), q.dequantize())

"""Attention over quantized caches: the oracle and the compiled kernel against the equations in float64."""

import dataclasses

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from qjax import ops
from qjax.errors import LayoutError, LoweringError
from qjax.formats import KV4, NF4, Int, QArray, quantize_array
from qjax.formats.layout import weight_layout
from qjax.formats.packing import row_pad
from qjax.kernels.cpu import attention as kernel
from qjax.kernels.cpu import library

FORMATS = [
    Int(8, per="token"),
    Int(4, per="token"),
    Int(8, per="token", symmetric=False),
    Int(4, per="token", symmetric=False),
    Int(4, per="token", symmetric=False, zero="float"),
    KV4(),
]
FOREVER = 2**31 - 1


def stored(rng, shape, fmt, offset=0.0):
    """Keys or values [B, KV, S, D], or with layers in front, made of NumPy, and the numbers that they stand for."""
    low, high = (
        (0, 2**fmt.code_bits - 1) if not fmt.signed else (-(2 ** (fmt.code_bits - 1)), 2 ** (fmt.code_bits - 1) - 1)
    )
    codes = rng.integers(low, high + 1, shape)
    scale = (rng.uniform(0.5, 1.5, (*shape[:-1], 1)) * 4 / (high - low)).astype(
        np.float16 if fmt == KV4() else np.float32
    )
    aux = {"scale": scale}
    if not fmt.symmetric:
        whole = fmt != KV4() and fmt.zero == "integer"
        zero = rng.integers(0, high + 1, scale.shape) if whole else rng.uniform(0, high, scale.shape)
        aux["zero"] = zero.astype(np.uint8 if whole else np.float16)
    if fmt.code_bits == 8:
        kept = codes.astype(fmt.code_dtype)
    else:
        halves = np.pad(codes & 15, [(0, 0)] * (len(shape) - 1) + [(0, shape[-1] % 2)])
        kept = (halves[..., ::2] | halves[..., 1::2] << 4).astype(np.uint8)
    stacks = tuple(range(len(shape) - 2))
    layout = dataclasses.replace(weight_layout(len(shape), len(shape) - 1, stacks), pad=row_pad(fmt.packing, shape[-1]))
    exact = (codes - aux.get("zero", np.zeros(1)).astype(np.float64)) * scale.astype(np.float64)
    return QArray(kept, aux, fmt, layout, np.dtype(np.float32)), exact


def by_hand(q, keys, values, lengths, window, scale):
    """One token after the other: q [B, T, H, D]; keys and values float64 [B, KV, S, D]."""
    (batch, tokens, heads, _), (room, group) = q.shape, (keys.shape[2], q.shape[2] // keys.shape[1])
    y = np.zeros((batch, tokens, heads, values.shape[-1]))
    for b, t, h in np.ndindex(batch, tokens, heads):
        last = min(int(lengths[b]), room) - tokens + t
        seen = [j for j in range(max(last - window + 1, 0), last + 1)]
        if seen:
            s = scale * (keys[b, h // group][seen] @ q[b, t, h].astype(np.float64))
            p = np.exp(s - s.max())
            y[b, t, h] = p @ values[b, h // group][seen] / p.sum()
    return y


def close(y, expected, values):
    """Within float32's rounding of sums of numbers as large as the values."""
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, atol=2e-5 * max(np.abs(values).max(), 1), rtol=1e-4)


PROBLEMS = {
    "keys": st.sampled_from(FORMATS),
    "values": st.sampled_from(FORMATS),
    "sizes": st.sampled_from(
        [(1, 1, 1, 1, 1), (2, 1, 2, 8, 300), (3, 4, 1, 3, 77), (1, 9, 2, 2, 513), (2, 1, 1, 1, 256)]
    ),
    "dims": st.sampled_from([(32, 32), (64, 64), (33, 20), (128, 96), (7, 130)]),
    "window": st.sampled_from([FOREVER, FOREVER, 1, 40, 300]),
    "seed": st.integers(0, 1000),
}


def check(native, keys, values, sizes, dims, window, seed):
    """Heads that share keys, odd sizes, lengths from none to more than there is room for, every instruction set."""
    rng = np.random.default_rng(seed)
    batch, tokens, heads, group, room = sizes
    k, exact_k = stored(rng, (batch, heads, room, dims[0]), keys)
    v, exact_v = stored(rng, (batch, heads, room, dims[1]), values)
    q = rng.standard_normal((batch, tokens, heads * group, dims[0])).astype(np.float32)
    lengths = np.asarray([rng.integers(0, room + 1), room + 3, 0][:batch], np.int32)
    expected = by_hand(q, exact_k, exact_v, lengths, window, 0.2)
    attend = jax.jit(lambda *a: ops.q_attention(*a, window=window, scale=0.2, implementation="reference"))
    close(attend(q, k, v, lengths), expected, exact_v)
    grouped = q.reshape(batch, tokens, heads, group, -1).transpose(0, 2, 1, 3, 4)
    windows = np.full(batch, window, np.int32)
    for name in native.instruction_sets():
        y = kernel.attend(grouped, k, v, lengths, windows, np.int32(0), scale=0.2, instructions=name)
        y = np.asarray(y).transpose(0, 2, 1, 3, 4).reshape(expected.shape)
        close(y, expected, exact_v)


@settings(deadline=None, max_examples=4)
@given(**PROBLEMS)
def test_by_the_equations(native, **problem):
    check(native, **problem)


@pytest.mark.slow
@settings(deadline=None, max_examples=80)
@given(**PROBLEMS)
def test_by_the_equations_at_length(native, **problem):
    check(native, **problem)


@pytest.fixture(scope="module")
def cache(native):
    """Two layers of keys and values for four sequences, queries, and attention by name."""
    rng = np.random.default_rng(0)
    k, v = (stored(rng, (2, 4, 2, 300, 32), fmt)[0] for fmt in (KV4(), Int(8, per="token")))
    k, v = jax.tree.map(jnp.asarray, (k, v))
    q = jnp.asarray(rng.standard_normal((4, 2, 8, 32)), jnp.float32)
    lengths = jnp.asarray([300, 17, 2, 256], jnp.int32)

    def run(q, k, v, lengths, implementation="native", **how):
        return ops.q_attention(q, k, v, lengths, implementation=implementation, **how)

    return q, k, v, lengths, run


def test_layers_are_read_where_they_lie(cache):
    """In a scan over a stack of layers no layer is copied, and the numbers are those of the layer by itself."""
    q, k, v, lengths, run = cache

    def steps(k, v):
        return jax.lax.scan(lambda q, i: (run(q, k, v, lengths, layer=i), None), q, jnp.arange(2))[0]

    compiled = jax.jit(steps).lower(k, v).compile()
    assert "u8[1,4,2,300,16]" not in compiled.as_text() and "u8[4,2,300,16]" not in compiled.as_text()
    expected = q
    for i in range(2):
        expected = run(expected, k.index_stack(0, i), v.index_stack(0, i), lengths, "reference")
    np.testing.assert_allclose(compiled(k, v), expected, atol=2e-5)


def test_maps_and_meshes(cache):
    """vmap is one larger batch; over a mesh each device has its sequences and heads; all of it the same bits."""
    q, k, v, lengths, run = cache
    k, v = k.index_stack(0, 0), v.index_stack(0, 0)
    alone = np.asarray(run(q, k, v, lengths))

    def both(q, k, v, lengths):
        # One more than the mapped dimension, of which the other is every sequence by itself.
        return jax.vmap(lambda q, k, v, n: run(q[None], k, v, n[None])[0])(q, k, v, lengths)

    front = jax.tree.map(lambda a: a[:, None], (k, v))
    np.testing.assert_array_equal(jax.jit(both)(q, *front, lengths), alone)
    queries = jax.vmap(run, in_axes=(1, None, None, None))(jnp.stack([q, 2 * q], 1), k, v, lengths)
    np.testing.assert_allclose(queries[0], alone, atol=1e-6)

    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    heads = jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, P("data", "model"))), (k, v))
    q_there = jax.device_put(q, NamedSharding(mesh, P("data", None, "model")))
    whole = jax.jit(run).lower(q_there, *heads, lengths).compile()
    assert "qjax_attention" in whole.as_text() and "all-gather" not in whole.as_text()
    np.testing.assert_array_equal(whole(q_there, *heads, lengths), alone)
    specs = (P("data", None, "model"), P("data", "model"), P("data", "model"), P("data"))
    inside = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=specs[0])
    np.testing.assert_array_equal(jax.jit(inside)(q, k, v, lengths), alone)


def test_what_is_chosen_and_why(cache, monkeypatch):
    q, k, v, lengths, run = cache
    k, v = k.index_stack(0, 0), v.index_stack(0, 0)
    assert "native" in str(ops.lowering_table("attention", "cpu"))
    choosing = jax.jit(lambda *a: run(*a, None))
    assert "qjax_attention" not in choosing.lower(q, k, v, lengths).as_text()  # a small cache
    monkeypatch.setattr(kernel, "SMALLEST", 1)
    jax.clear_caches()
    choosing = jax.jit(lambda *a: run(*a, None))
    if kernel.FAST in library.instruction_sets():
        assert "qjax_attention" in choosing.lower(q, k, v, lengths).as_text()
    assert "qjax_attention" not in jax.export.export(choosing)(q, k, v, lengths).mlir_module()
    nf4 = quantize_array(jnp.ones(k.shape), NF4(group=32), in_axes=3, stack_axes=(0, 1))
    with pytest.raises(LoweringError, match="it reads Int or KV4 weights"):
        run(q, nf4, v, lengths)
    with pytest.raises(LoweringError, match="over kv4 per token keys and nf4 g32 values, 8 x 300 .*have no kernel"):
        run(q, k, nf4, lengths)
    with pytest.raises(LayoutError, match="KV divides H"):
        run(q[:, :, :3], k, v, lengths)
    with pytest.raises(LayoutError, match="axis of layers"):
        run(q, k, v, lengths, layer=0)
    with pytest.raises(LayoutError, match="have to be a QArray"):
        run(q, k.dequantize(), v, lengths)


def test_dtypes_and_derivatives(cache):
    q, k, v, lengths, run = cache
    k, v = k.index_stack(0, 0), v.index_stack(0, 0)
    y = run(q.astype(jnp.bfloat16), k, v, lengths)
    assert y.dtype == jnp.bfloat16
    near = run(q.astype(jnp.bfloat16).astype(jnp.float32), k, v, lengths)
    np.testing.assert_array_equal(y, near.astype(jnp.bfloat16))
    loss = lambda q, how: jnp.sum(jnp.sin(run(q, k, v, lengths, how)))  # noqa: E731
    slopes = [jax.jit(jax.grad(loss), static_argnums=1)(q, how) for how in ("native", "reference")]
    np.testing.assert_allclose(*slopes, atol=1e-5)
    assert np.abs(slopes[0]).max() > 1e-3
    # A token that is not a number spoils its own row; what nobody sees spoils nothing.
    spoiled = q.at[0, 1, 3, 5].set(jnp.nan)
    bad = np.isnan(np.asarray(run(spoiled, k, v, lengths)))
    assert bad[0, 1, 3].all() and bad.sum() == bad[0, 1, 3].size
    hidden = {name: a.at[1, :, 17:].set(jnp.nan) for name, a in k.aux.items()}
    for how in ("native", "reference"):
        y = run(q, dataclasses.replace(k, aux=hidden), v, lengths, how)
        np.testing.assert_allclose(y, run(q, k, v, lengths), atol=2e-5)


def test_wrong_operands_are_errors(native):
    """A program that somebody else wrote must not crash the process."""
    q, n = jnp.zeros((1, 2, 1, 2, 32)), jnp.ones((1,), jnp.int32)
    layer, w = jnp.int32(0), jnp.full((1,), 9, jnp.int32)
    codes, scale, none = jnp.zeros((1, 1, 2, 8, 16), jnp.uint8), jnp.ones((1, 1, 2, 8, 1)), jnp.zeros(0, jnp.uint8)
    good = [q, n, w, layer, codes, scale, none, codes, scale, none]
    settings = {"k_bits": 4, "k_signed": 0, "v_bits": 4, "v_signed": 1, "isa": -1}

    def call(changed=None, out=((1, 2, 1, 2, 32), jnp.float32), **other):
        operands = [changed[i] if changed and i in changed else a for i, a in enumerate(good)]
        attributes = {k: np.int64(v) for k, v in {**settings, **other}.items()}
        return jax.ffi.ffi_call(library.ATTENTION, jax.ShapeDtypeStruct(*out))(
            *operands, scale=np.float32(1), **attributes
        )

    assert call().shape == (1, 2, 1, 2, 32)
    wrong = [
        (lambda: call({0: q.astype(jnp.bfloat16)}), "queries have to be float32"),
        (lambda: call({0: q[0]}), "queries have to be float32"),
        (lambda: call(out=((1, 2, 1, 3, 32), jnp.float32)), "the result has to be"),
        (lambda: call(out=((1, 2, 1, 2, 32), jnp.int32)), "the result has to be"),
        (lambda: call(out=((1, 2, 1, 2, 34), jnp.float32)), r"values have to be bytes .* 17\]"),
        (lambda: call({1: n.astype(jnp.float32)}), "lengths and windows"),
        (lambda: call({2: jnp.zeros(2, jnp.int32)}), "lengths and windows"),
        (lambda: call({3: n}), "layer"),
        (lambda: call({4: codes[0]}), "keys have to be bytes"),
        (lambda: call({4: codes.astype(jnp.int32)}), "keys have to be bytes"),
        (lambda: call({4: codes[..., :15]}), "keys have to be bytes"),
        (lambda: call({7: codes[:, :, :, :7]}), "values have to be bytes"),
        (lambda: call({5: scale[..., 0]}), "scales of keys"),
        (lambda: call({8: scale.astype(jnp.bfloat16)}), "scales of values"),
        (lambda: call({6: scale[:, :, :1]}), "zero points of keys"),
        (lambda: call({9: scale.astype(jnp.int32)}), "zero points of values"),
        (lambda: call(k_bits=3), "keys of 3 bits"),
        (lambda: call(isa=17), "no unknown"),
    ]
    for run, says in wrong:
        with pytest.raises(Exception, match=says):
            run().block_until_ready()

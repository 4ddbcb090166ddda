"""The compiled CPU kernels against integer arithmetic in NumPy, to the last bit, by every instruction set there is."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax import ops
from qjax.errors import LayoutError, LoweringError, QjaxWarning
from qjax.formats import DualGrained, Int, MixedBits, Progressive, TritPlanes, quantize_array
from qjax.kernels.cpu import build, candidates, instruction_sets, library, operands
from qjax.kernels.cpu.dot import float_product, product
from qjax.rewrite import Rewriter
from qjax.testing import check_lowering

TOKEN = Int(8, per="token")


def packed(codes, bits):
    """[n, k] integers as rows of a little-endian bit stream."""
    low = (codes.astype(np.int64) & (2**bits - 1)).astype(np.uint8)
    stream = np.unpackbits(low[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(stream.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")


def by_hand(x, sx, codes, scale, zero, group):
    """What `src/problem.h` says: exact sums of groups, scaled and added in float32 in the order of groups."""
    k = codes.shape[1]
    with np.errstate(all="ignore"):
        steps = x * (np.float32(1) / sx)
        q = np.where(np.isnan(steps), 0, np.clip(np.round(steps), -128, 127)).astype(np.int64)
        total = np.zeros((len(x), len(codes)), np.float32)
        for g in range(-(-k // group)):
            part = slice(g * group, (g + 1) * group)
            sums = (q[:, part] @ (codes[:, part] - zero[:, g, None]).T).astype(np.float32)
            if group >= k:
                return sums * sx * scale[:, 0]
            total += sums * scale[:, g]
        return total * sx


@given(
    bits=st.sampled_from([2, 4, 4, 8]),
    signed=st.booleans(),
    group=st.sampled_from([None, None, 32, 64, 128, 40, 256]),
    m=st.sampled_from([1, 2, 3, 11, 16, 37]),
    n=st.sampled_from([1, 16, 33, 70]),
    k=st.sampled_from([1, 63, 130, 256, 384, 500]),
    values=st.sampled_from(["normal", "nan", "infinite", "largest codes"]),
    seed=st.integers(0, 1000),
)
def test_equals_integer_arithmetic_to_the_bit(native, bits, signed, group, m, n, k, values, seed):
    rng = np.random.default_rng(seed)
    low = -(2 ** (bits - 1)) if signed else 0
    codes = rng.integers(low, low + 2**bits, (n, k))
    x = rng.standard_normal((m, k)).astype(np.float32)
    if values == "largest codes":
        codes[:], x[:] = (low if signed else low + 2**bits - 1), -100
    elif values != "normal":
        x[-1, 0] = np.nan if values == "nan" else np.inf
    width = min(group or k, k)
    groups = -(-k // width)
    scale = rng.uniform(0.01, 1, (n, groups)).astype(np.float32)
    zero = np.zeros((n, groups), np.int64) if signed else rng.integers(0, 2**bits, (n, groups))
    sx = (np.abs(x).max(axis=1, keepdims=True) / np.float32(127.5)).astype(np.float32)
    fmt = Int(bits, symmetric=signed, **({"group": group} if group else {}))
    stored = packed(codes, bits)
    expected = by_hand(x, sx, codes, scale, zero, width)
    zeros = jnp.zeros((1, 0, 0), jnp.uint8) if signed else jnp.asarray(zero, jnp.uint8)[None]
    real = (codes - np.repeat(zero, width, axis=1)[:, :k]) * np.repeat(np.float64(scale), width, axis=1)[:, :k]
    with np.errstate(all="ignore"):
        floats, terms = x @ real.T, np.abs(x) @ np.abs(real).T
    names = {"portable", "avx512_vnni", "neon", *(["amx"] if library.has_bf16_tiles() else [])}  # for floats
    for name in set(native.instruction_sets()) & names:
        y = float_product(x[None], stored[None], scale[None], zeros, weight=fmt, instructions=name)
        with np.errstate(all="ignore"):
            off = np.abs(np.asarray(y)[0] - floats) / np.maximum(terms, 1e-30)
        assert np.all((off < 1e-5) | ~np.isfinite(floats)), f"{name} {fmt.name}, floats: {off.max()}"
        assert np.array_equal(np.isfinite(y)[0], np.isfinite(floats)), f"{name} {fmt.name}, floats"
    for name in native.instruction_sets():
        y = product(x[None], sx[None], stored[None], scale[None], zeros, weight=fmt, act=TOKEN, instructions=name)
        np.testing.assert_array_equal(np.asarray(y)[0], expected, err_msg=f"{name} {fmt.name}")


def test_is_a_lowering(native):
    """Dtypes, rows in several axes, stacks, empty shapes, vmap and scan, as the exported suite draws them."""
    acts = [TOKEN, None, Int(8, per="tensor"), Int(6, per="token", scale="qmax")]
    check_lowering("dot", "native", weights=[Int(8), Int(4, group=32), Int(4, symmetric=False)], acts=acts, examples=3)


def test_scales_of_tokens_are_fitted_inside(native, monkeypatch):
    """By the rule of the format, to the last bit; and XLA computes none."""
    rng = np.random.default_rng(0)
    w = quantize_array(jnp.asarray(rng.standard_normal((16, 70)), jnp.float32), Int(4), in_axes=1)
    x = (rng.standard_normal((9, 70)) * 10.0 ** np.arange(-43, 38, 9)[:, None]).astype(np.float32)
    x[1], x[2, 5], x[3, 7], x[4] = 0, np.nan, -np.inf, 1e-41
    for act in (TOKEN, Int(6, per="token", scale="qmax")):
        run = jax.jit(lambda x, a, act=act: ops.q_dot(x, w, act=(act, a) if a else act, implementation="native"))
        y = np.asarray(run(x, None))
        np.testing.assert_array_equal(y, np.asarray(run(x, ops.activation_aux(x, act))))
        assert np.array_equal(np.isnan(y).all(axis=1), np.arange(9) // 2 == 1)
    monkeypatch.setattr(operands, "SMALLEST", 1)
    params = {"w": jnp.ones((64, 8))}
    recipe = qjax.Recipe([qjax.Rule("**", weights=Int(8), inputs=qjax.dynamic(TOKEN))])
    model = qjax.quantize(lambda params, x: x @ params["w"], params, x[:, :64], recipe=recipe)
    compiled = jax.jit(model).lower(model.params, x[:, :64]).compile().as_text()
    assert "qjax_dot" in compiled and " reduce(" not in compiled


def test_a_token_does_not_depend_on_the_others(native):
    rng = np.random.default_rng(0)
    w = quantize_array(jnp.asarray(rng.standard_normal((96, 256)), jnp.float32), Int(4, group=64), in_axes=1)
    x = jnp.asarray(rng.standard_normal((40, 256)), jnp.float32)
    run = jax.jit(lambda x: ops.q_dot(x, w, act=(TOKEN, ops.activation_aux(x, TOKEN)), implementation="native"))
    together = np.asarray(run(x))
    for rows in (slice(3, 4), slice(7, 12), slice(8, 40)):
        np.testing.assert_array_equal(np.asarray(run(x[rows])), together[rows])


@pytest.mark.parametrize(("dtype", "parts"), [("bfloat16", 1), ("float16", 2), ("float32", 3)])
@given(
    fmt=st.sampled_from([Int(8), Int(4, group=32), Int(4, symmetric=False, group=96), Int(2), Int(8, symmetric=False)]),
    m=st.sampled_from([1, 16, 17, 33, 300]),
    n=st.sampled_from([1, 16, 37, 70]),
    k=st.sampled_from([96, 130, 1000]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=10, deadline=None)
def test_parts_of_floats_lose_nothing(native, dtype, parts, fmt, m, n, k, seed):
    """Tiles of bfloat16 are as near to the exact product as float32 gets, from tiny numbers to the largest."""
    if not library.has_bf16_tiles():
        pytest.skip("no AMX with bfloat16")
    rng = np.random.default_rng(seed)
    w = quantize_array(jnp.asarray(rng.standard_normal((n, k)), jnp.float32), fmt, in_axes=1)
    most = 4 if dtype == "float16" else 30
    x = rng.standard_normal((m, k)) * 10.0 ** rng.integers(-4 if dtype == "float16" else -30, most, (m, 1))
    x = np.asarray(jnp.asarray(x, dtype), np.float32)
    y = float_product(x[None], *operands.integers(w), weight=fmt, instructions="amx", parts=parts)
    real = np.asarray(w.dequantize(), np.float64)
    exact, terms = np.float64(x) @ real.T, np.abs(np.float64(x)) @ np.abs(real).T
    assert (np.abs(np.asarray(y[0], np.float64) - exact) <= 1e-6 * terms).all()
    alone = float_product(x[None, -1:], *operands.integers(w), weight=fmt, instructions="amx", parts=parts)
    np.testing.assert_array_equal(alone[0, 0], y[0, -1], "a row does not depend on the others")


def test_many_rows_of_floats_take_tiles_where_there_are_some(native):
    w = {g: quantize_array(jnp.ones((128, 160)), Int(4, group=g), in_axes=1) for g in (32, 40)}
    x = jnp.ones((200, 160))
    taken = {g: str(ops.lowerings(lambda x, w=w: ops.q_dot(x, w), x)) for g, w in w.items()}
    assert ("native" in taken[32]) == library.has_bf16_tiles() and "native" not in taken[40]


@pytest.fixture(scope="module")
def layer(native):
    """A weight, activations and a product by name, with what it gives on one device."""
    rng = np.random.default_rng(0)
    w = quantize_array(jnp.asarray(rng.standard_normal((64, 256)), jnp.float32), Int(4, group=32), in_axes=1)
    x = jnp.asarray(rng.standard_normal((16, 256)), jnp.float32)

    def run(x, w, implementation="native"):
        return ops.q_dot(x, w, act=(TOKEN, ops.activation_aux(x, TOKEN)), implementation=implementation)

    return w.canonical(), x, run, np.asarray(jax.jit(run)(x, w))


def test_over_a_mesh_each_device_runs_it_on_what_it_holds(layer):
    w, x, run, alone = layer
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    rows, outputs = NamedSharding(mesh, P("data")), NamedSharding(mesh, P("model"))
    placed = jax.tree.map(lambda a: jax.device_put(a, outputs), w)
    whole = jax.jit(run).lower(jax.device_put(x, rows), placed).compile()
    assert "all-gather" not in whole.as_text() and "qjax_dot" in whole.as_text()
    y = whole(jax.device_put(x, rows), placed)
    np.testing.assert_array_equal(np.asarray(y), alone)
    assert y.sharding.spec == P("data", "model")
    columns = NamedSharding(mesh, P(None, "model"))  # a device has a part of each token, whose scale is the whole one's
    fitting = jax.jit(lambda x, w: ops.q_dot(x, w, act=TOKEN, implementation="native"))
    y = fitting(jax.device_put(x, columns), jax.tree.map(lambda a: jax.device_put(a, columns), w))
    np.testing.assert_allclose(np.asarray(y), alone, rtol=1e-5, atol=1e-5)
    inside = jax.shard_map(run, mesh=mesh, in_specs=(P("data"), P("model")), out_specs=P("data", "model"))
    np.testing.assert_array_equal(np.asarray(jax.jit(inside)(x, w)), alone)


def layers(fmt):
    """A model that scans over five layers, the last two partly of another format, its parameters and input.

    Behind them the same layers unrolled.
    """
    rng = np.random.default_rng(0)
    shapes = {"up": (5, 64, 32), "down": (5, 32, 64), "heads": (5, 64, 4, 16)}
    params = {name: jnp.asarray(rng.standard_normal(s) / 8, jnp.float32) for name, s in shapes.items()}

    def step(x, p):
        x = x + jnp.einsum("bd,dhk->bhk", x, p["heads"]).reshape(x.shape)  # a view of the weight, inside a jit
        return x + jnp.tanh(x @ p["up"]) @ p["down"], x[:, 0]

    def model(params, x):
        return jax.lax.scan(step, x, params, reverse=True)

    def unrolled(params, x):
        firsts = []
        for i in reversed(range(5)):
            x, first = step(x, {name: a[i] for name, a in params.items()})
            firsts.append(first)
        return x, jnp.stack(firsts[::-1])

    x = jnp.asarray(rng.standard_normal((3, 64)), jnp.float32)
    int8 = [qjax.Rule(f"{i}/up", weights=Int(8), inputs=qjax.dynamic(TOKEN)) for i in (3, 4)]
    rest = qjax.Rule("**", weights=fmt, inputs=qjax.dynamic(TOKEN))
    quantized = qjax.quantize(model, params, x, recipe=qjax.Recipe([*int8, rest]))
    return quantized, x, quantized.bind(unrolled)


def experts(fmt):
    """The same for a mixture of experts, five layers of three."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.standard_normal((5, 3, 32, 32)) / 6, jnp.float32)}
    x, sizes = jnp.asarray(rng.standard_normal((7, 32)), jnp.float32), jnp.asarray([2, 0, 5])

    def step(x, p):
        return jnp.tanh(jax.lax.ragged_dot(x, p["w"], sizes)), x[:, 0]

    def unrolled(params, x):
        firsts = []
        for i in range(5):
            x, first = step(x, {"w": params["w"][i]})
            firsts.append(first)
        return x, jnp.stack(firsts)

    recipe = qjax.Recipe([qjax.Rule("**", weights=fmt, inputs=qjax.dynamic(TOKEN))])
    model = qjax.quantize(lambda params, x: jax.lax.scan(step, x, params), params, x, recipe=recipe)
    return model, x, model.bind(unrolled)


IN_PLACE = {
    "integers": (layers, Int(4, group=32), 6),  # two scans of three products
    "dual-grained": (layers, DualGrained(32), 6),
    "progressive": (layers, Progressive(32, zeros="post"), 6),
    "trits": (layers, TritPlanes(group=32), 6),
    "strips": (layers, MixedBits(outliers=0.01), 6),
    "experts": (experts, Int(4, group=32, symmetric=False), 1),
}
"""Models, formats, and how many products are compiled."""


IN_SHORT = [(kind, "values") for kind in ("integers", "dual-grained", "experts")]
AT_LENGTH = [*((kind, "values") for kind in ("progressive", "trits", "strips"))]
AT_LENGTH += [(kind, "slopes of a batch") for kind in ("integers", "trits", "experts")]


@pytest.mark.parametrize("kind, what", [*IN_SHORT, *(pytest.param(*c, marks=pytest.mark.slow) for c in AT_LENGTH)])
def test_a_scan_reads_layers_where_they_lie(native, monkeypatch, kind, what):
    """No layer is copied; values are those of unrolled layers, and of layers that are; so are slopes of a batch."""
    monkeypatch.setattr(operands, "SMALLEST", 1)
    if operands.FAST not in instruction_sets():
        pytest.skip(f"this processor has no {operands.FAST}")
    made, fmt, products = IN_PLACE[kind]
    model, x, unrolled = made(fmt)

    def slope(params, x):
        return jax.vmap(jax.grad(lambda x: model(params, x)[0].sum()))(x[:, None] if made is layers else x[None])

    copies = re.compile(r"= [us](?:8|16)\[\S* (?:copy|fusion|dynamic-slice)\(")
    run = jax.jit(model if what == "values" else slope).lower(model.params, x).compile()
    if what == "values":
        calls = re.findall(r'custom_call_target="qjax_(\w+)"', run.as_text())
        assert len(calls) == products and len(set(calls)) == 1 + (made is layers and not isinstance(fmt, Int))
        assert not copies.search(run.as_text())
        jax.tree.map(np.testing.assert_array_equal, run(model.params, x), jax.jit(unrolled)(model.params, x))
        if kind != "integers":
            return
    monkeypatch.setattr(Rewriter, "reads_in_place", lambda self, weight: False)
    jax.clear_caches()
    cut = jax.jit(model if what == "values" else slope).lower(model.params, x).compile()
    assert copies.search(cut.as_text())
    jax.tree.map(np.testing.assert_array_equal, run(model.params, x), cut(model.params, x))


def test_a_product_with_one_of_a_stack(layer):
    """The layer is clamped, may be batched, and what cannot read it in place cuts it out."""
    w, x, run, alone = layer
    whole = jax.tree.map(lambda a: jnp.stack([a[::-1], a, a]), w)
    whole = dataclasses.replace(whole, layout=dataclasses.replace(w.layout, order=(("s", 0), *w.layout.order)))

    def one(x, i, implementation="native"):
        return ops.q_dot(x, whole, act=TOKEN, layer=i, implementation=implementation)

    numbers = jnp.asarray([-7, 0, 1, 2, 99])
    ys = np.asarray(jax.jit(jax.vmap(one, (None, 0)))(x, numbers))
    for y, i in zip(ys, numbers, strict=True):
        np.testing.assert_array_equal(y, alone[:, ::-1] if i <= 0 else alone)
        np.testing.assert_array_equal(np.asarray(one(x, i)), y)
    several = np.asarray(jax.vmap(one, (0, None))(jnp.stack([x, x]), 1))
    np.testing.assert_array_equal(several, np.stack([alone, alone]))
    for i, y in ((1, alone), (-1, alone[:, ::-1]), (3, alone)):
        np.testing.assert_allclose(np.asarray(one(x, i, "reference")), y, rtol=1e-4, atol=1e-4)
    with pytest.raises(LayoutError, match="layer has to be a scalar"):
        one(x, numbers)


def test_threads_of_python_may_call_it_at_once(layer):
    w, x, run, alone = layer
    compiled = jax.jit(run)
    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(lambda _: np.asarray(compiled(x, w)), range(40)):
            np.testing.assert_array_equal(y, alone)


@pytest.mark.slow
def test_processes_forked_before_the_backend_starts(native):
    """The library was loaded and handed to XLA by the parent; both compute, each with threads of its own."""
    program = (
        "import os, sys, jax, jax.numpy as jnp; from qjax import Int, ops; from qjax.formats import quantize_array\n"
        "from qjax.kernels import cpu; print(cpu.status(), flush=True)\n"
        "child = os.fork()\n"
        "w = quantize_array(jnp.ones((256, 1024)), Int(8), in_axes=1)\n"
        "y = ops.q_dot(jnp.ones((4, 1024)), w, act=Int(8, per='token'), implementation='native')\n"
        "right = bool(abs(y - 1024 * (127 / 127.5) ** 2).max() < 0.01)\n"
        "if not child: os._exit(0 if right else 7)\n"
        "print('right' if right and os.waitpid(child, 0)[1] == 0 else 'wrong')"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "CPU kernels: there" in run.stdout and run.stdout.endswith("right\n"), run.stdout + run.stderr


def test_the_default_for_large_weights_but_not_for_export(layer, monkeypatch):
    w, x, run, alone = layer
    if operands.FAST not in instruction_sets():
        pytest.skip(f"this processor has no {operands.FAST}")
    monkeypatch.setattr(operands, "SMALLEST", w.shape[0] * w.shape[1] + 1)
    assert ops.choose("dot", w.fmt, TOKEN, (16, *w.shape), "cpu").name == "int_dot"
    monkeypatch.setattr(operands, "SMALLEST", 1)
    assert ops.choose("dot", w.fmt, TOKEN, (16, *w.shape), "cpu").name == "native"
    choosing = jax.jit(lambda x, w: run(x, w, None))
    exported = jax.export.export(choosing)(x, w)
    assert "qjax_dot" not in exported.mlir_module()
    assert "qjax_dot" in choosing.lower(x, w).as_text()
    allowed = [jax.export.DisabledSafetyCheck.custom_call("qjax_dot")]  # for those who know where it will run
    exported = jax.export.export(jax.jit(run), disabled_checks=allowed)(x, w)
    np.testing.assert_array_equal(np.asarray(exported.call(x, w)), alone)


def test_a_product_that_would_have_had_it_says_so_once(layer, monkeypatch):
    w, _, _, _ = layer
    monkeypatch.setattr(operands, "SMALLEST", 1)
    monkeypatch.setattr(operands, "library", lambda: "none is made")
    monkeypatch.setattr(library, "library", lambda: "none is made")
    library.say_once.cache_clear()
    with pytest.warns(QjaxWarning, match="without its CPU kernels, on XLA alone: none is made"):
        assert ops.choose("dot", w.fmt, TOKEN, (16, *w.shape), "cpu").name == "int_dot"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.choose("dot", w.fmt, TOKEN, (16, *w.shape), "cpu")


def test_wrong_operands_are_errors(native):
    """A program that somebody else wrote must not crash the process."""
    x, sx = jnp.zeros((1, 3, 64)), jnp.ones((1, 3, 1))
    w, s = jnp.zeros((1, 8, 32), jnp.uint8), jnp.ones((1, 8, 2))
    no, at = jnp.zeros((1, 0, 0), jnp.uint8), jnp.zeros((0,), jnp.int32)
    own = {"bits": 4, "group": 32, "is_signed": 1, "low": -128, "high": 127, "unit": 0, "isa": -1}

    def call(*operands, out=((1, 3, 8), jnp.float32), at=at, **changed):
        attributes = {k: (np.float32 if k == "unit" else np.int64)(v) for k, v in {**own, **changed}.items()}
        return jax.ffi.ffi_call(library.DOT, jax.ShapeDtypeStruct(*out))(*operands, at, **attributes)

    def floats(*operands, out=((1, 3, 8), jnp.float32), parts=3):
        attributes = {k: np.int64(own[k]) for k in ("bits", "group", "is_signed", "isa")} | {"parts": np.int64(parts)}
        return jax.ffi.ffi_call(library.FLOAT_DOT, jax.ShapeDtypeStruct(*out))(*operands, at, **attributes)

    assert call(x, sx, w, s, no).shape == floats(x, w, s, no).shape == (1, 3, 8)
    wrong = [
        (lambda: call(x.astype(jnp.float16), sx, w, s, no), "float32 or int8"),
        (lambda: call(x[0], sx, w, s, no), r"\[3, 64\]"),
        (lambda: floats(x, w, s, no, parts=4), "cut in 1 to 3 parts, not 4"),
        (lambda: call(x, sx[:, :2], w, s, no), "scales of activations"),
        (lambda: call(x, sx[:, :0, :0], w, s, no), "scales are fitted to floats"),
        (lambda: call(x.astype(jnp.int8), sx[:, :0, :0], w, s, no, unit=1), "scales are fitted to floats"),
        (lambda: call(x, sx, w, s, no, at=jnp.zeros((2,), jnp.int32)), "layer has to be int32"),
        (lambda: call(x, sx, w, s, no, at=jnp.zeros((1,))), "layer has to be int32"),
        (lambda: call(x, sx, w[:0], s[:0], no[:0], at=jnp.zeros((1,), jnp.int32)), "weight has to be bytes"),
        (lambda: call(x, sx, jnp.concatenate([w, w]), s, no, at=jnp.zeros((1,), jnp.int32)), "scales have to be"),
        (lambda: call(x, sx, w[:, :, :31], s, no), "rows of 31 bytes"),
        (lambda: call(x, sx, w.astype(jnp.int32), s, no), "weight has to be bytes"),
        (lambda: call(x, sx, jnp.concatenate([w, w]), s, no), "weight has to be bytes"),
        (lambda: call(x, sx, w, s[:, :7], no), "scales have to be"),
        (lambda: call(x, sx, w, s.astype(jnp.float16), no), "scales have to be"),
        (lambda: call(x, sx, w, s, jnp.zeros((1, 3, 2), jnp.uint8)), "zero points"),
        (lambda: call(x, sx, w, s, no, out=((1, 3, 9), jnp.float32)), "result"),
        (lambda: call(x, sx, w, s, no, out=((1, 3, 8), jnp.int32)), "result"),
        (lambda: call(x, sx, w, s, no, bits=3), "codes of 3 bits"),
        (lambda: call(x, sx, w, s, no, group=31), "begin with a byte"),
        (lambda: call(x, sx, w, s, no, isa=17), "no unknown"),
        (lambda: call(x, sx, w, s, no, low=-300), "int8"),
        (lambda: floats(x.astype(jnp.int8), w, s, no), "activations have to be float32"),
        (lambda: floats(x, w, s[:, :, :1], no, out=((1, 2, 8), jnp.float32)), "result"),
        (lambda: floats(x, w[:, :, :31], s, no), "rows of 31 bytes"),
    ]
    for run, says in wrong:
        with pytest.raises(Exception, match=says):
            run().block_until_ready()


def test_a_named_kernel_says_why_it_cannot(native):
    w = quantize_array(jnp.ones((8, 32)), Int(3), in_axes=1)
    act = Int(8, per="token", symmetric=False)
    aux = ops.activation_aux(jnp.ones((2, 32)), act)
    with pytest.raises(LoweringError, match="uint8 per token activations have no kernel"):
        ops.q_dot(jnp.ones((2, 32)), w, act=(act, aux), implementation="native")
    with pytest.raises(LoweringError, match="int3 per channel weights have no kernel"):
        ops.q_dot(
            jnp.ones((2, 32)), w, act=(TOKEN, ops.activation_aux(jnp.ones((2, 32)), TOKEN)), implementation="native"
        )


def test_which_library_is_taken(native, tmp_path):
    """None that is newer than jaxlib, which XLA would not start with; none of other sources; none that is broken."""
    major, minor = build.interface(build.headers())
    assert "none is made" in library.find(tmp_path)
    (tmp_path / build.file_name((major, minor + 1))).write_bytes(b"")
    assert "takes none newer" in library.find(tmp_path)
    (tmp_path / build.file_name((major, minor))).write_bytes(b"no library")
    assert "cannot be loaded" in library.find(tmp_path)
    for made in build.HERE.glob("native-*.so"):
        (tmp_path / made.name).write_bytes(made.read_bytes())
    assert not isinstance(library.find(tmp_path), str)


def test_a_library_of_other_sources_is_not_taken(native, monkeypatch):
    monkeypatch.setattr(build, "digest", lambda: "of other sources")
    found = library.find(build.HERE)
    assert isinstance(found, str) and "other sources" in found


def test_without_a_compiler_the_build_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "/nowhere/c++ -O9")
    with pytest.raises(build.BuildError, match="/nowhere/c.. could not be started"):
        build.build(tmp_path)
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(build.BuildError, match="failed with exit code 1"):
        build.build(tmp_path)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(build.BuildError, match="no C.. compiler was found"):
        build.build(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["", "/nowhere/c++"])
def test_installing(root, tmp_path, compiler):
    """``pip wheel .`` with and without a compiler: the package is made either way, and works."""
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "*.so", "tests", "benchmarks", "docs")
    shutil.copytree(root, source, ignore=ignored, symlinks=True)
    environment = {**os.environ, "CXX": compiler} if compiler else {k: v for k, v in os.environ.items() if k != "CXX"}
    wheel = [sys.executable, "-m", "pip", "wheel", "--disable-pip-version-check", "--no-deps", "-w", str(tmp_path)]
    run = subprocess.run([*wheel, str(source)], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    (made,) = tmp_path.glob("*.whl")
    shutil.unpack_archive(made, tmp_path / "there", "zip")
    program = (
        "import jax.numpy as jnp, qjax; from qjax import ops; from qjax.kernels import cpu\n"
        "w = qjax.formats.quantize_array(jnp.ones((8, 64)), qjax.Int(8), in_axes=1)\n"
        "act = qjax.Int(8, per='token'); x = jnp.ones((4, 64))\n"
        "y = ops.q_dot(x, w, act=(act, ops.activation_aux(x, act)))\n"
        "print(cpu.status(), float(y[0, 0]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "there")}
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=tmp_path / "there"
    )
    assert run.returncode == 0, run.stderr
    assert ("not there" if compiler else "portable") in run.stdout and " 63.49" in run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["-O3", "-O1 -fsanitize=address,undefined", "-O1 -fsanitize=thread"])
def test_random_problems_without_xla(native, root, tmp_path, flags):
    """Arrays that end at forbidden pages, several threads, sanitizers: ``tests/native/driver.cc``."""
    sources = [str(p) for p in build.sources() if not p.name.startswith("ffi")]
    command = [*build.compiler(), *build.FLAGS, "-g", "-fno-sanitize-recover=all", *flags.split()]
    command += ["-I", str(build.SOURCES), str(root / "tests" / "native" / "driver.cc"), *sources]
    made = subprocess.run([*command, "-o", str(tmp_path / "driver")], capture_output=True, text=True)
    if made.returncode and "cannot find" in made.stderr:
        pytest.skip(f"the compiler has no library for {flags}")
    assert made.returncode == 0, made.stderr
    run = subprocess.run([str(tmp_path / "driver"), "20"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(run.stdout.split()[0]) >= 5
    expected = [*instruction_sets(), *([] if candidates.available() else ["bf16_tiles"])]
    assert run.stdout.partition("instruction sets:")[2].split() == expected

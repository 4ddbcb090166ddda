"""4-bit weights for int8 activations on Hopper: order, choice of the kernel, lowering for CUDA, interpreter."""

from __future__ import annotations

import functools
import importlib

import jax
import jax.numpy as jnp
import mosaic
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qjax
from qjax import ops
from qjax._compat import JAX_VERSION
from qjax.errors import FormatError, LayoutError, LoweringError
from qjax.formats import CodeTiles, DualGrained, Int, Progressive, QArray, WordTiles, assemble
from qjax.formats.code_tiles import from_words, to_words
from qjax.kernels import Problem, registry
from qjax.kernels.dot import codes4x8 as kernel
from qjax.kernels.dot.hopper import Schedule

TOKEN = Int(8, per="token")
POST = Progressive(group=32, zeros="post")
FORMATS = [
    DualGrained(group=128),
    DualGrained(group=32),
    Progressive(group=64),
    POST,
    Int(4),
    Int(4, per="tensor"),
    Int(4, symmetric=False),
    Int(4, group=128),
    Int(4, group=64, symmetric=False),
    Int(4, group=256),
]


def weight(fmt, n, k, stack=(), seed=0):
    """A weight of random codes, all that the format allows, with the integers that they stand for and its scales."""
    if isinstance(fmt, Int):
        w, numbers = mosaic.weight(fmt, n, k, stack, seed)
        return w, numbers
    rng = np.random.default_rng(seed)
    groups = fmt.groups(k)
    spread = lambda a: np.repeat(a, fmt.group, axis=-1)[..., :k].astype(np.int64)  # noqa: E731
    post = isinstance(fmt, Progressive) and fmt.zeros == "post"
    step = rng.integers(1, (18 if isinstance(fmt, Progressive) else 128), (*stack, n, groups))
    zero = rng.integers(0, 128 if post else 16, (*stack, n, groups))
    codes = rng.integers(0, 16, (*stack, n, k))
    if post:  # within int8 whatever the draw
        low, high = -((128 - spread(zero)) // spread(step)), (127 + spread(zero)) // spread(step)
        codes = np.clip(codes, np.maximum(low, 0), np.minimum(high, 15))
        integers = codes * spread(step) - spread(zero)
    else:
        reach = 127 // spread(step)
        codes = np.clip(codes, np.maximum(spread(zero) - reach, 0), np.minimum(spread(zero) + reach, 15))
        integers = (codes - spread(zero)) * spread(step)
    assert np.all(np.abs(integers) <= 128)
    scale = rng.uniform(0.5, 1.5, (*stack, n, 1)).astype(jnp.bfloat16)
    aux = {"scale": jnp.asarray(scale), "step": jnp.asarray(step, jnp.int8), "zero": jnp.asarray(zero, jnp.uint8)}
    places = {"in_axes": len(stack) + 1, "stack_axes": tuple(range(len(stack)))}
    w = assemble(jnp.asarray(codes, jnp.uint8), aux, fmt, shape=(*stack, n, k), **places)
    return w, integers * scale.astype(np.float64)


def packed(w: QArray) -> QArray:
    return ops.pack(w, "mosaic_int8")


# Order.


@settings(max_examples=4)
@given(st.sampled_from(FORMATS), st.integers(1, 150), st.integers(1, 300), st.sampled_from([(), (2,)]))
def test_packing_changes_no_number_and_is_undone(fmt, n, k, stack):
    w, numbers = weight(fmt.clamped(k), n, k, stack)
    if CodeTiles.cannot(w.fmt, k):  # a group over the whole row is always possible
        return
    p = packed(w)
    assert p.shape == w.shape and packed(p) is p
    np.testing.assert_allclose(np.asarray(p.dequantize(), np.float64), numbers, rtol=1e-6, atol=0)
    back = ops.neutral(p)
    assert back.fmt == w.fmt and back.layout == w.layout
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(w), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_order_of_tiles():
    """Element by element, as `qjax.formats.code_tiles` says it."""
    w, _ = weight(DualGrained(group=64), 130, 200)
    p = packed(w)
    words = np.asarray(p.aux["tiles"]).reshape(4, 2, 1024).view(np.uint32)
    levels = np.asarray(p.aux["levels"]).reshape(4, 256).view(np.uint16)
    codes = np.asarray(w.unpacked())
    for row, column in [(0, 0), (1, 33), (63, 127), (64, 0), (129, 199), (77, 150)]:
        n, k = row % 64, column % 128
        thread = 32 * (n // 16) + 4 * (n % 8) + k % 16 // 4
        word = words[row // 64, column // 128, 512 * (n // 8 % 2) + 4 * thread + k // 32]
        assert word >> 4 * (2 * (k % 4) + k // 16 % 2) & 15 == codes[row, column]
        level = levels[column // 64, row]
        assert (level & 255, level >> 8) == tuple(int(w.aux[a][row, column // 64]) for a in ("step", "zero"))
    assert not words[3].any() and not levels[:, 130:].any()


def test_words_are_undone():
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 16, (2, 128, 256)), jnp.int32)
    np.testing.assert_array_equal(from_words(to_words(codes)), codes)


def test_every_number_is_made_four_at_a_time():
    """All codes, zeros and steps of which the number is an int8 one, beside neighbours that wrap most."""
    codes, zero, step = (a.reshape(-1) for a in np.mgrid[0:16, 0:16, 1:128])
    number = (codes - zero) * step
    inside = (number >= -128) & (number <= 127)
    codes, zero, step, number = (a[inside] for a in (codes, zero, step, number))
    reach = 127 // step
    for other in (np.maximum(zero - reach, 0), np.minimum(zero + reach, 15)):
        word = (codes | other << 8 | codes << 16 | other << 24).astype(np.uint32).view(np.int32)
        more = (np.uint32(0x80808080) - (zero * step).astype(np.uint32) * np.uint32(0x01010101)).view(np.int32)
        made = kernel._bytes(jnp.asarray(word), 0, jnp.asarray(step, jnp.int32), jnp.asarray(more))
        made = np.asarray(made).view(np.int8).reshape(-1, 4)
        want = np.stack([number, (other - zero) * step] * 2, axis=1)
        np.testing.assert_array_equal(made, want)


def test_registers_are_those_of_the_operand():
    """Words of a thread and registers of the left operand, on layouts as jax defines them."""
    mgpu = importlib.import_module("jax.experimental.mosaic.gpu")
    columns = np.arange(64 * 128).reshape(64, 128)
    # Word [h, t, b] with nibble 2 j + half, of the place of each code.
    places = np.empty((2, 128, 4, 4, 2), int)
    for n in range(64):
        for k in range(128):
            thread = 32 * (n // 16) + 4 * (n % 8) + k % 16 // 4
            places[n // 8 % 2, thread, k // 32, k % 4, k // 16 % 2] = columns[n, k]
    operand = mosaic.in_threads(mgpu.WGMMA_LAYOUT_8BIT, columns)  # [warp, lane, registers, four]
    operand = operand.reshape(128, 4, 2, 2, 4)  # thread, b, half of 32 columns, h, j
    np.testing.assert_array_equal(np.transpose(places, (1, 2, 4, 0, 3)), operand)
    assert mgpu.WGMMA_LAYOUT_8BIT.registers_shape((64, 128))[:5] == (1, 8, 1, 1, 2)


def test_targets():
    w, _ = weight(Int(4, group=64), 128, 128)
    floats = ops.pack(w)
    assert isinstance(floats.fmt, WordTiles) and isinstance(packed(floats).fmt, CodeTiles)
    np.testing.assert_array_equal(ops.pack(packed(w)).aux["tiles"], floats.aux["tiles"])
    dual, _ = weight(DualGrained(group=64), 128, 128)
    assert ops.pack(dual).fmt == packed(dual).fmt and ops.pack_tree({"w": dual}, "mosaic_int8")["w"].fmt.for_codes
    eight, _ = mosaic.weight(Int(8), 64, 64)
    assert ops.pack_tree([eight], "mosaic_int8")[0] is eight
    with pytest.raises(LayoutError, match="no integers of 4 bits"):
        packed(eight)
    with pytest.raises(LayoutError, match="groups of 32 columns are no multiple of 64"):
        packed(mosaic.weight(Int(4, group=32), 64, 128)[0])
    with pytest.raises(FormatError, match="no integers of 4 bits"):
        CodeTiles(Progressive(bits=5), 256)


def test_elsewhere_products_are_those_of_integers():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 200)), jnp.float32)
    w, _ = weight(DualGrained(group=64), 40, 200)
    act = (TOKEN, ops.activation_aux(x, TOKEN))
    assert ops.choose("dot", packed(w).fmt, TOKEN, (3, 40, 200), "cpu").name == "int_dot"
    np.testing.assert_array_equal(ops.q_dot(x, packed(w), act=act), ops.q_dot(x, w, act=act))


# Choosing.


def problem(**changes):
    settled = {
        "op": "dot",
        "platform": "cuda",
        "weight": CodeTiles(DualGrained(), 512),
        "act": TOKEN,
        "rows": 4,
        "n": 256,
        "k": 512,
        "x_dtype": np.dtype(jnp.bfloat16),
        "out_dtype": np.dtype(jnp.bfloat16),
        "capability": (9, 0),
    }
    return Problem(**{**settled, **changes})


def test_it_is_chosen_on_hopper():
    for change in ({}, {"act": Int(8, per="tensor")}, {"weight": CodeTiles(Int(4, group=64), 512)}):
        assert registry.select(problem(**change)).name == "mosaic"
    assert registry.select(problem(capability=(8, 0))).name == "int_dot"
    assert registry.select(problem(weight=DualGrained())).name == "int_dot"
    assert registry.select(problem(act=None)).name == "dequantize"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"weight": DualGrained()}, r"neutral order; qjax.ops.pack\(w, 'mosaic'\)"),
        ({"weight": Progressive(bits=3)}, "no integers of 4 bits"),
        ({"weight": Int(4, group=64)}, r"qjax.ops.pack\(w, 'mosaic_int8'\)"),
        ({"weight": WordTiles(Int(4, group=64), 512)}, r"16-bit floats; qjax.ops.pack\(w, 'mosaic_int8'\)"),
        ({"act": None}, "takes int8 ones"),
        ({"act": Int(8, per="token", symmetric=False)}, "no symmetric int8"),
        ({"act": Int(8, group=64)}, "a scale per group"),
        ({"k": 131072}, "may overflow int32"),
        ({"capability": (8, 6)}, "this device has 8.6"),
        ({"devices": 2}, "inside jax.shard_map"),
    ],
)
def test_a_named_kernel_says_why_it_cannot_run(change, why):
    with pytest.raises(LoweringError, match=why):
        registry.select(problem(**change), "mosaic")


# Lowering for CUDA, and the interpreter.


def named(x, w, act=TOKEN):
    return ops.q_dot(x, w, act=(act, ops.activation_aux(x, act)), implementation="mosaic")


@pytest.mark.parametrize(
    ("fmt", "n", "k", "tokens", "act"),
    [
        (DualGrained(), 256, 4096, 1, TOKEN),
        (POST, 200, 200, 130, Int(8, per="tensor")),
        (Int(4), 256, 4096, 16, TOKEN),
        (Int(4, group=64, symmetric=False), 256, 512, 5, TOKEN),
        (Int(4, group=128), 32768, 1024, 257, TOKEN),
    ],
)
def test_it_lowers_for_cuda_here(fmt, n, k, tokens, act):
    w = jax.eval_shape(lambda: packed(mosaic.blank(fmt, n, k)))
    x = jax.ShapeDtypeStruct((tokens, k), jnp.bfloat16)
    with mosaic.described_gpu():
        run = jax.jit(functools.partial(named, act=act))
        text = run.trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1 and "stablehlo.transpose" not in text


interpreted = pytest.mark.skipif(JAX_VERSION < (0, 11), reason="the interpreter is usable from jax 0.11 on")


def run(w, x, x_scale, schedule, out_dtype):
    p = packed(w)
    count = x.shape[0]
    flat = {name: a.reshape(count, -1) for name, a in p.aux.items()}
    with mosaic.interpreter() as interpret:
        how = {"fmt": p.fmt, "n": w.codes.shape[-2], "out_dtype": out_dtype}
        operands = (flat["tiles"], flat.get("levels"), flat["scale"], jnp.asarray(x, jnp.int8), jnp.asarray(x_scale))
        y = kernel.codes4x8(*operands, **how, schedule=schedule, interpret=interpret)
        return np.asarray(y), mosaic.races_found()


@interpreted
@pytest.mark.parametrize(
    ("fmt", "n", "k", "tokens", "schedule"),
    [
        pytest.param(DualGrained(group=128), 128, 256, 1, Schedule(8, 2), id="dual-grained, one token"),
        pytest.param(DualGrained(group=32), 200, 200, 13, Schedule(8, 2), id="groups of 32, odd sizes, 13 tokens"),
        pytest.param(Progressive(group=64), 128, 512, 9, Schedule(16, 2, 2), id="progressive, K in 2 parts"),
        pytest.param(POST, 64, 40, 3, Schedule(8, 2), id="zeros after steps, short K"),
        pytest.param(Int(4, symmetric=False), 128, 256, 3, Schedule(8, 2), id="a zero point per row"),
        pytest.param(DualGrained(group=64), 512, 512, 3, Schedule(8, 2, tall=2, deep=2), id="tall and deep"),
    ],
)
def test_sums_of_whole_rows_are_exact(fmt, n, k, tokens, schedule):
    w, _ = weight(fmt.clamped(k), n, k)
    rng = np.random.default_rng(1)
    x, x_scale = rng.integers(-128, 128, (1, tokens, k)), rng.uniform(0.5, 1.5, (1, tokens)).astype(np.float32)
    scale = np.asarray(w.aux["scale"], np.float64)
    integers = np.rint(np.asarray(w.dequantize(), np.float64) / scale).astype(np.int64)
    exact, races = run(w, x, x_scale, schedule, jnp.int32)
    np.testing.assert_array_equal(exact[0], x[0] @ integers.T)
    assert not races
    y, races = run(w, x, x_scale, schedule, jnp.float32)
    np.testing.assert_allclose(y[0], exact[0] * scale.T * x_scale.T, rtol=1e-6)
    assert not races


@interpreted
@pytest.mark.parametrize(
    ("fmt", "n", "k", "tokens", "schedule"),
    [
        pytest.param(Int(4), 130, 256, 3, Schedule(8, 2), id="a scale per row"),
        pytest.param(Int(4, group=64), 128, 256, 7, Schedule(8, 2), id="groups of 64, 7 tokens"),
        pytest.param(Int(4, group=128, symmetric=False), 128, 512, 17, Schedule(16, 2, 2), id="zeros, K in 2 parts"),
        pytest.param(Int(4, group=256), 64, 300, 2, Schedule(8, 2), id="long groups, the last cut"),
        pytest.param(Int(4, group=64), 256, 512, 9, Schedule(16, 2, 2, tall=2, deep=2), id="tall, deep, in parts"),
    ],
)
def test_float_scales_against_numpy(fmt, n, k, tokens, schedule):
    w, numbers = weight(fmt, n, k)
    rng = np.random.default_rng(1)
    x, x_scale = rng.integers(-128, 128, (1, tokens, k)), rng.uniform(0.5, 1.5, (1, tokens)).astype(np.float32)
    y, races = run(w, x, x_scale, schedule, jnp.float32)
    wide = x[0] * x_scale.astype(np.float64).T
    assert np.max(np.abs(y[0] - wide @ numbers.T) / (np.abs(wide) @ np.abs(numbers).T)) < 1e-6 and not races


@interpreted
def test_a_stack_of_matrices_and_nan_in_its_row():
    w, numbers = weight(DualGrained(group=64), 128, 128, (2,))
    x = np.random.default_rng(1).integers(-128, 128, (2, 3, 128))
    x_scale = np.ones((2, 3), np.float32)
    x_scale[1, 1] = np.nan
    y, races = run(w, x, x_scale, Schedule(8, 2), jnp.bfloat16)
    want = np.einsum("emk,enk->emn", x, numbers)
    assert np.isnan(y[1, 1].astype(np.float32)).all() and not races
    y, want = (np.delete(a.reshape(6, 128), 4, axis=0).astype(np.float64) for a in (y, want))
    assert np.max(np.abs(y - want)) <= 2**-8 * np.max(np.abs(want))


@pytest.mark.parametrize(
    ("weights", "act"),
    [(DualGrained(group=64), qjax.dynamic(TOKEN)), (Int(4, group=64), qjax.static(Int(8, per="tensor")))],
)
def test_a_model_is_on_the_kernel(weights, act):
    """Every product of a rewritten function, a scan over layers included; scales of activations dynamic and static."""
    keys = jax.random.split(jax.random.key(0))
    params = {"layers": jax.random.normal(keys[0], (2, 128, 128)), "head": jax.random.normal(keys[1], (128, 256))}

    def fn(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])[0] @ params["head"]

    x = jnp.ones((3, 128))
    recipe = qjax.Recipe([qjax.Rule("**", weights=weights, inputs=act)])
    batches = {"batches": [(x,)]} if act.fmt.per == "tensor" else {}
    model = qjax.quantize(fn, params, x, recipe=recipe, **batches)
    tree = ops.pack_tree(model.params, "mosaic_int8")
    assert all(isinstance(w.fmt, CodeTiles) for w in tree.values())
    np.testing.assert_allclose(model(tree, x), model(model.params, x), rtol=1e-5, atol=1e-5)
    with mosaic.described_gpu():
        text = jax.jit(lambda p, x: model(p, x)).trace(tree, x).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 2

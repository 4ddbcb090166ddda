"""Weights packed for Hopper, the choice of the kernel, and tier 0: compiling for CUDA on a machine without a GPU."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import mosaic
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qjax
from qjax import ops
from qjax.errors import DeviceError, LayoutError, LoweringError, QjaxWarning
from qjax.formats import MXFP8, NF4, Float8, Int, WordTiles, quantize_array
from qjax.formats.tiles import rounded_up
from qjax.kernels import Problem, registry
from qjax.kernels.devices import KINDS, cuda_capability, cuda_processors, described, device_kind, platform_here
from qjax.kernels.dot.hopper import STEP, TOKENS, Schedule
from qjax.kernels.dot.mixed16 import FOOTPRINT as MIXED
from qjax.kernels.dot.mosaic import CODES8
from qjax.kernels.dot.schedules import schedule_for
from qjax.kernels.dot.words import footprint as words_footprint
from qjax.models import LanguageModel
from qjax.models.llama import LlamaConfig

HOPPER = (9, 0)
FORMATS = [
    Int(4, group=128),
    Int(4, group=64, symmetric=False),
    Int(4, group=32),
    Int(4),
    Int(4, symmetric=False),
    Int(4, per="tensor"),
    Int(4, group=96),
    Int(4, group=256, symmetric=False),
    Int(8),
    Int(8, group=128, symmetric=False),
]


# Packing.


@settings(max_examples=4)
@given(st.sampled_from(FORMATS), st.integers(1, 150), st.integers(1, 300), st.sampled_from([(), (2,), (2, 1)]))
def test_packing_changes_no_number_and_is_undone(fmt, n, k, stack):
    fmt = fmt.clamped(k)
    w, numbers = mosaic.weight(fmt, n, k, stack)
    packed = ops.pack(w)
    assert packed.shape == w.shape and packed.dtype == w.dtype and ops.pack(packed) is packed
    np.testing.assert_allclose(np.asarray(packed.dequantize(), np.float64), numbers, rtol=1e-6, atol=0)
    np.testing.assert_array_equal(packed.dequantize(), w.dequantize())
    back = ops.neutral(packed)
    assert back.fmt == w.fmt and back.layout == w.layout and ops.neutral(w) is w
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(w), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_views_of_a_packed_weight():
    kernel = quantize_array(jnp.ones((2, 64, 3, 16)), Int(4, group=32), in_axes=1, stack_axes=0)
    packed = ops.pack(kernel)
    np.testing.assert_array_equal(packed[1].dequantize(), kernel[1].dequantize())
    np.testing.assert_array_equal(packed.canonical().dequantize(), kernel.canonical().dequantize())
    with pytest.raises(LayoutError, match="whole matrices"):
        packed.slice_axis(3, 0, 8)
    w = ops.pack(quantize_array(jnp.ones((1024, 1024)), Int(4, group=128), in_axes=1))
    assert w.bits_per_element == 4.25


def test_what_cannot_be_packed_is_refused_with_the_reason():
    ones = jnp.ones((64, 96))
    cases = [
        (quantize_array(ones, MXFP8(), in_axes=1), "mxfp8.* weights have none, there is one for Float8"),
        (quantize_array(ones, Int(3), in_axes=1), "no integers of 2, 4 or 8 bits"),
        (quantize_array(ones, Int(4, group=24), in_axes=1), "no multiple of 32"),
        (quantize_array(ones, Int(4, symmetric=False, zero="float"), in_axes=1), "lie between codes"),
    ]
    for w, why in cases:
        with pytest.raises(LayoutError, match=why):
            ops.pack(w)
    for function in (ops.pack, ops.pack_tree):
        with pytest.raises(LayoutError, match="did you mean 'mosaic'"):
            function(cases[0][0], "mosiac")


def test_a_packed_model_gives_the_same_numbers_elsewhere():
    keys = jax.random.split(jax.random.key(0))
    params = {"up": jax.random.normal(keys[0], (64, 96)), "down": jax.random.normal(keys[1], (96, 64))}

    def fn(params, x):
        return jnp.tanh(x @ params["up"]) @ params["down"]

    x = jnp.ones((3, 64))
    model = qjax.quantize(fn, params, x, recipe=qjax.Recipe([qjax.Rule("**", weights=Int(4, group=32))]))
    packed = ops.pack_tree(model.params)
    assert all(isinstance(packed[name].fmt, WordTiles) for name in packed)
    np.testing.assert_allclose(model(packed, x), model(model.params, x), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(lambda x: model(packed, x).sum())(x).shape, x.shape)


def test_what_is_on_disk_is_neutral(tmp_path):
    params = {"w": jnp.ones((64, 32)), "bias": jnp.ones(32)}
    recipe = qjax.Recipe([qjax.Rule("**", weights=Int(4, group=32))])
    model = qjax.quantize(lambda p, x: x @ p["w"] + p["bias"], params, jnp.ones((2, 64)), recipe=recipe)
    packed = dataclasses.replace(model, params=ops.pack_tree(model.params))
    qjax.save(tmp_path / "model", packed)
    loaded = qjax.load(tmp_path / "model", model.fn, like=params)
    assert loaded.params["w"].fmt == Int(4, group=32)
    np.testing.assert_array_equal(loaded.params["w"].codes, model.params["w"].codes)


# Choosing.


def test_a_packed_weight_without_its_kernel_on_a_gpu_is_warned_of():
    w = jax.eval_shape(lambda: ops.pack(mosaic.blank(Int(4, group=128), 128, 128)))
    x = jax.ShapeDtypeStruct((2, 128), jnp.float32)
    with (
        mosaic.described_gpu(),
        pytest.warns(QjaxWarning, match="int4 g128 tiles weights.*dequantized.*activations are float32; cast them"),
    ):
        text = jax.jit(ops.q_dot).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" not in text


def test_a_packed_weight_with_quantized_activations_is_warned_of_once():
    w = ops.pack(quantize_array(jnp.ones((128, 128)), Int(8), in_axes=1))
    token, x = Int(8, per="token"), jnp.ones((2, 128))
    with pytest.warns(QjaxWarning, match="here: .*packed for the kernel of 16-bit activations.*qjax.ops.neutral"):
        y = ops.q_dot(x, w, act=(token, ops.activation_aux(x, token)), site="here")
    np.testing.assert_allclose(y, 128, rtol=1e-2)


def problem(**changes):
    w, _ = mosaic.weight(Int(4, group=128), 256, 512)
    settled = {
        "op": "dot",
        "platform": "cuda",
        "weight": ops.pack(w).fmt,
        "act": None,
        "rows": 4,
        "n": 256,
        "k": 512,
        "x_dtype": np.dtype(jnp.bfloat16),
        "out_dtype": np.dtype(jnp.bfloat16),
        "capability": HOPPER,
    }
    return Problem(**{**settled, **changes})


def test_it_is_chosen_on_hopper_and_nowhere_else():
    assert registry.select(problem()).name == "mosaic"
    assert registry.select(problem(x_dtype=np.dtype(jnp.float16))).name == "mosaic"
    for change in (
        {"platform": "cpu", "capability": None},
        {"capability": (8, 0)},
        {"capability": None},
        {"x_dtype": np.dtype(np.float32)},
        {"devices": 2},
    ):
        assert registry.select(problem(**change)).name == "dequantize"
    assert registry.select(problem(weight=Int(4, group=128))).name == "triton"  # which reads the neutral order
    for weight, act in ((Int(8), Int(8, per="token")), (Float8(), Float8(per="tensor"))):  # not measured: if named
        assert registry.select(problem(weight=weight, act=act)).name in ("int_dot", "float8_dot")
        assert registry.select(problem(weight=weight, act=act), "mosaic").name == "mosaic"
    assert "mosaic" in str(ops.lowering_table("dot", "cuda")) and "mosaic" not in str(ops.lowering_table("dot", "cpu"))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"platform": "cpu", "capability": None}, "it runs on cuda"),
        ({"capability": None}, "not known for which GPU"),
        ({"capability": (8, 6)}, "this device has 8.6"),
        ({"capability": (10, 0)}, "wgmma exists on compute capability 9.0"),
        ({"weight": Int(4, group=128)}, r"neutral order; qjax.ops.pack\(w, 'mosaic'\)"),
        ({"weight": Int(3)}, "no integers of 2, 4 or 8 bits"),
        ({"weight": NF4(), "act": None}, "neutral order; qjax.ops.pack"),
        ({"weight": Float8()}, "neutral order; qjax.ops.pack"),
        ({"weight": Int(8), "act": Int(8, per="token", symmetric=False)}, "neither int8 x int8, both symmetric"),
        ({"weight": Int(8), "act": Float8(per="token")}, "neither int8 x int8"),
        ({"weight": Int(8, group=128), "act": Int(8, per="token")}, "a scale per group"),
        ({"weight": Int(8), "act": Int(8, per="token"), "k": 131072}, "may overflow int32"),
        ({"weight": Int(8), "act": Int(8, per="token"), "n": 200}, "multiples of 128"),
        ({"weight": Float8("e5m2"), "act": Float8(per="token")}, "float8_e4m3fn"),
        ({"x_dtype": np.dtype(np.float32)}, "activations are float32; cast them"),
        ({"rows": None}, "rows is not known"),
        ({"devices": 8}, "8 devices; call it inside jax.shard_map"),
        ({"act": Int(8, per="token")}, "a weight in tiles takes 16-bit floats"),
    ],
)
def test_a_named_kernel_says_why_it_cannot_run(change, why):
    with pytest.raises(LoweringError, match=why):
        registry.select(problem(**change), "mosaic")


def test_on_this_machine_a_call_by_name_says_why_not():
    w, _ = mosaic.weight(Int(4, group=128), 128, 128)
    with pytest.raises(LoweringError, match="it runs on cuda"):
        ops.q_dot(jnp.ones((1, 128), jnp.bfloat16), ops.pack(w), implementation="mosaic")


def test_a_described_device_counts_for_calls_by_name(monkeypatch):
    w, _ = mosaic.weight(Int(4, group=128), 128, 128)
    x = jax.ShapeDtypeStruct((1, 128), jnp.bfloat16)
    with mosaic.described_gpu():
        named = jax.jit(lambda x: ops.q_dot(x, ops.pack(w), implementation="mosaic"))
        assert "custom_call @mosaic_gpu" in named.trace(x).lower(lowering_platforms=("cuda",)).as_text()
    # A real one calls its platform "gpu".
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert platform_here() == "cuda"
    device = SimpleNamespace(compute_capability="9.0", client=SimpleNamespace(platform_version="cuda 13000"))
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert (platform_here(), cuda_capability()) == ("cuda", (9, 0))
    device.client.platform_version = "rocm 70000"
    assert platform_here() == "rocm"


def test_the_device_is_the_one_that_is_described():
    assert cuda_capability() is None and platform_here() == "cpu"
    for kind, capability in (("NVIDIA H200", (9, 0)), ("NVIDIA H100 80GB HBM3", (9, 0)), ("NVIDIA Unheard Of", None)):
        with mosaic.described_gpu(kind):
            assert cuda_capability() == capability


FOOTPRINTS = [
    CODES8,
    words_footprint(ops.pack(mosaic.blank(Int(8, group=64, symmetric=False), 8, 64)).fmt),
    words_footprint(ops.pack(mosaic.blank(Int(4, group=32, symmetric=False), 8, 64)).fmt),
    MIXED,
    words_footprint(ops.pack(mosaic.blank(Int(4), 8, 64)).fmt),
    words_footprint(ops.pack(mosaic.blank(Int(4, group=128), 8, 256)).fmt),
]


def test_devices_by_their_short_names():
    for name, (kind, cores) in KINDS.items():
        with described(name):
            assert cuda_capability() is not None and (device_kind(), cuda_processors()) == (kind, cores)
    with pytest.raises(DeviceError, match="did you mean 'h200'.*there is a100"):
        ops.lowerings(lambda x: x, jnp.ones(1), device="h20o")
    assert str(ops.lowerings(lambda x: x, jnp.ones(1), device="H200")) == "no quantized products"
    for wrong in (("dott", None), ("dot", "h200")):
        with pytest.raises(LoweringError, match=r"lowering_table: .*there is"):
            ops.lowering_table(*wrong)


@given(
    st.integers(1, 40000),
    st.integers(1, 40000),
    st.integers(1, 9000),
    st.sampled_from(FOOTPRINTS),
    st.sampled_from([2, 4]),
)
def test_schedules_are_whole(n, k, rows, footprint, out_bytes):
    s = schedule_for(n, k, rows, footprint=footprint, out_bytes=out_bytes)
    assert s.tokens in TOKENS and s.fits(rounded_up(n), footprint.padded(k))
    assert s.stages >= 2 or s.stages == footprint.padded(k) // STEP // s.splits // s.deep
    assert footprint.refuses(s, out_bytes) is None


def test_large_layers_are_cut_tall_and_small_ones_in_parts():
    cut = lambda *size: dataclasses.replace(schedule_for(*size, footprint=FOOTPRINTS[-1]), stages=0)  # noqa: E731
    assert cut(57344, 8192, 1) == Schedule(8, 0, tall=2, deep=2)
    assert cut(28672, 4096, 64) == Schedule(64, 0, tall=2)
    assert cut(28672, 4096, 4096) == Schedule(128, 0, tall=2, rolling=True)
    assert cut(4096, 4096, 16) == Schedule(16, 0, 4, deep=2)
    assert schedule_for(57344, 8192, 16, footprint=CODES8).tall == 1


# Tier 0.


def lowered(fmt, n, k, tokens, dtype, stack=(), function=None):
    w = jax.eval_shape(lambda: ops.pack(mosaic.blank(fmt, n, k, stack)))
    x = jax.ShapeDtypeStruct((*stack, tokens, k), dtype)
    with mosaic.described_gpu():
        return jax.jit(function or ops.q_dot).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("fmt", "n", "k", "tokens", "dtype"),
    [
        (Int(4, group=128), 256, 4096, 1, jnp.bfloat16),
        (Int(4, group=128), 200, 200, 7, jnp.float16),
        (Int(4, group=64, symmetric=False), 256, 512, 13, jnp.bfloat16),
        (Int(4, group=32), 256, 512, 32, jnp.float16),
        (Int(4, symmetric=False), 256, 96, 64, jnp.float16),
        (Int(4), 32768, 1024, 257, jnp.bfloat16),
        (Int(8, group=128), 256, 512, 5, jnp.bfloat16),
        (Int(8, symmetric=False), 256, 512, 300, jnp.float16),
        (Int(4, group=128, symmetric=False), 32768, 1024, 1024, jnp.bfloat16),
    ],
)
def test_it_lowers_for_cuda_here(fmt, n, k, tokens, dtype):
    text = lowered(fmt, n, k, tokens, dtype)
    assert text.count("custom_call @mosaic_gpu") == 1
    # The weight is read where it lies: it is nowhere converted, transposed or copied.
    codes = "xi32>" if fmt.bits == 4 else "xi8>"
    on_codes = [line.strip() for line in text.splitlines() if codes in line and line.strip().startswith("%")]
    assert {line.split()[2] for line in on_codes} <= {"stablehlo.reshape", "stablehlo.custom_call"}
    assert "stablehlo.transpose" not in text


def test_it_lowers_under_transformations():
    text = lowered(Int(4, group=128), 128, 256, 4, jnp.bfloat16, stack=(3,))
    assert text.count("custom_call @mosaic_gpu") == 1
    batched = jax.vmap(ops.q_dot, in_axes=(0, None))
    text = lowered(Int(4, group=128), 128, 256, 4, jnp.bfloat16, function=lambda x, w: batched(x[None], w))
    assert text.count("custom_call @mosaic_gpu") == 1

    def slope(x, w):
        return jax.grad(lambda x: ops.q_dot(x, w).astype(jnp.float32).sum())(x)

    text = lowered(Int(4, group=128), 128, 256, 4, jnp.bfloat16, function=slope)
    assert "mosaic_gpu" not in text  # the product itself is not needed, its transpose is dequantized


@pytest.mark.parametrize("scan", [False, True])
def test_a_whole_language_model_is_on_the_kernel(scan):
    """Every quantized product of a decode step, through the rewritten graph; two layers of seven, and the head."""
    sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    fn = LanguageModel(config, scan_layers=scan)
    params = fn.abstract_params(jnp.bfloat16)
    weights = qjax.Recipe([qjax.Rule("layers/**", weights=Int(4, group=128)), qjax.Rule("lm_head/**", weights=Int(8))])
    tokens = jax.ShapeDtypeStruct((1,), jnp.int32)
    cache = jax.eval_shape(lambda: fn.init_cache(1, 8, jnp.bfloat16))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), params)
    model = qjax.quantize(fn, zeros, jnp.zeros((1, 4), jnp.int32), recipe=weights)
    decode = model.bind(fn.decode_step)
    with mosaic.described_gpu():
        traced = jax.jit(lambda p, t, c: decode(p, t, c)).trace(ops.pack_tree(model.params), tokens, cache)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        others = ops.lowerings(decode, model.params, tokens, cache)
    taken = ops.lowerings(decode, ops.pack_tree(model.params), tokens, cache, device="h200")
    assert text.count("custom_call @mosaic_gpu") == (8 if scan else 15)
    assert {t.lowering for t in taken} == {"mosaic"} and sum(t.repeats for t in taken) == 15
    first = "layers/attn/q_proj/kernel (2 times)" if scan else "layers/0/attn/q_proj/kernel"
    assert str(taken).splitlines()[0] == str(taken[0]) == f"{first}: mosaic" and taken[-1].name == "lm_head/kernel"
    assert {t.lowering for t in others} == {"triton"}
    assert {t.lowering for t in ops.lowerings(decode, ops.pack_tree(model.params), tokens, cache)} == {"dequantize"}


def test_why_a_packed_weight_is_dequantized():
    """In a cond and a while loop, of a function that gives the kernel float32; platform by name."""
    w = ops.pack(mosaic.blank(Int(4, group=128), 256, 256))
    x = jax.ShapeDtypeStruct((3, 256), jnp.float32)

    def branched(x, w, deep):
        one = jax.lax.cond(deep, lambda x: ops.q_dot(x, w), lambda x: x, x)
        return jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: ops.q_dot(x, w), one)

    with mosaic.described_gpu():
        found = ops.lowerings(branched, x, w, True, platform="cuda")
    assert len(found) == 2 and {t.lowering for t in found} == {"dequantize"}
    assert {t.name for t in found} == {"1"}
    assert "activations are float32" in found[0].instead and "activations are float32" in str(found[1])


@pytest.mark.parametrize(("fmt", "act"), [(Int(8), Int(8, per="token")), (Float8(), Float8(per="tensor"))])
def test_w8a8_lowers_for_cuda_here(fmt, act):
    w = jax.eval_shape(lambda: mosaic.blank(fmt, 256, 512))

    def named(x, w):
        return ops.q_dot(x, w, act=(act, ops.activation_aux(x, act)), implementation="mosaic")

    for tokens, dtype in ((3, jnp.bfloat16), (130, jnp.float32)):
        x = jax.ShapeDtypeStruct((tokens, 512), dtype)
        with mosaic.described_gpu():
            text = jax.jit(named).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("custom_call @mosaic_gpu") == 1


def test_it_lowers_inside_shard_map():
    spec = jax.sharding.PartitionSpec("d")
    w = jax.eval_shape(lambda: ops.pack(mosaic.blank(Int(4, group=128), 256, 256, (2,))))
    x = jax.ShapeDtypeStruct((2, 4, 256), jnp.bfloat16)
    with mosaic.described_gpu(d=2):
        inside = jax.shard_map(ops.q_dot, in_specs=(spec, jax.tree.map(lambda _: spec, w)), out_specs=spec)
        text = jax.jit(inside).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1


def test_no_rows_and_no_columns():
    assert "mosaic_gpu" not in lowered(Int(4, group=128), 128, 256, 0, jnp.bfloat16)
    w, _ = mosaic.weight(Int(4, group=128), 128, 256)
    assert ops.q_dot(jnp.ones((0, 256), jnp.bfloat16), ops.pack(w)).shape == (0, 128)


def test_all_tiles_of_tokens_fit_in_shared_memory():
    """Lowering raises where a kernel takes more than a block may have, so it is enough to lower the largest."""
    for tokens in TOKENS:
        lowered(Int(4, group=128, symmetric=False), 65536, 1024, tokens, jnp.bfloat16)

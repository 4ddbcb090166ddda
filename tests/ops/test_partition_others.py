"""Ragged products and convolutions that run by a kernel, over eight devices; as `test_partition` for plain products."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from mosaic import described_gpu, weight
from partitions import SUM, compiled

from qjax import ops
from qjax.formats import Int, WordTiles, quantize_array
from qjax.formats.parts import TiledParts
from qjax.kernels import registry
from qjax.kernels.conv.reference import conv_reference
from qjax.kernels.dot import parts
from qjax.kernels.ragged_dot.reference import ragged_dot_reference

G, N, K = 8, 32, 128
TOKENS = 32
SIZES = {"spread": [5, 0, 9, 1, 0, 6, 2, 3], "one": [0, 0, 0, 32, 0, 0, 0, 0], "none": [0] * 8}
"""Rows of each expert; the first leaves six rows to none."""


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


@pytest.fixture
def seen(monkeypatch):
    """What the stand-in of a kernel was asked for on a device: experts, N, K, tokens; of a convolution N."""
    monkeypatch.setattr(registry, "_TABLE", {op: list(rows) for op, rows in registry._TABLE.items()})
    found = []

    def alone(problem):
        return problem.devices == 1 or "it runs on one device"

    @registry.register_lowering("ragged_dot", (WordTiles, Int), "cpu", when=alone, name="mosaic", priority=90)
    def ragged(problem, x, w, act, sizes):
        found.append((*problem.stack, problem.n, problem.k, problem.rows))
        return ragged_dot_reference(problem, x, w, act, sizes)

    for_parts = registry.register_lowering(
        "ragged_dot", TiledParts, "cpu", when=parts._runs, name="mosaic", priority=90
    )
    for_parts(parts.parts)

    @registry.register_lowering("conv", Int, "cpu", when=alone, name="mosaic", priority=90)
    def conv(problem, x, w, act):
        found.append((problem.n, x.shape))
        return conv_reference(problem, x, w, act)

    yield found
    jax.clear_caches()


def placed(w, mesh, *spec):
    """Arrays of a canonical weight by the same axes, where they have more than one of something."""
    cut = lambda a: P(*(s if d > 1 else None for s, d in zip(spec, a.shape, strict=True)))  # noqa: E731
    return jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, cut(a))), w)


def wanted(x, numbers, sizes):
    """Row by row in float64."""
    out = np.zeros((x.shape[0], numbers.shape[1]))
    for row, group in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        out[row] = numbers[group] @ x[row].astype(np.float64)
    return out


CASES = {
    "experts, packed": (True, ("model", None, None), P(), SUM, (2, N, K, TOKENS), P()),
    "experts of both axes": (True, (("data", "model"), None, None), P(), SUM, (1, N, K, TOKENS), P()),
    "experts and tokens": (True, ("model", None, None), P("data"), SUM, (2, N, K, TOKENS // 2), P("data")),
    "tokens": (True, (None, None, None), P("data"), {}, (8, N, K, TOKENS // 2), P("data")),
    "outputs": (False, (None, "model", None), P(), {}, (8, N // 4, K, TOKENS), P(None, "model")),
    "inputs": (False, (None, None, "model"), P(None, "model"), SUM, (8, N, K // 4, TOKENS), P()),
    "experts and inputs": (False, ("data", None, "model"), P(), SUM, (4, N, K // 4, TOKENS), P()),
    "experts, outputs": (False, ("model", "data", None), P(), SUM, (2, N // 2, K, TOKENS), P(None, "data")),
}


@pytest.mark.parametrize("case", CASES)
def test_experts_stay_on_the_kernel(seen, mesh, case):
    packed, spec, of_x, collectives, local, result = CASES[case]
    w, numbers = weight(Int(4, group=32), N, K, (G,))
    w = placed(ops.pack(w) if packed else w, mesh, *spec)
    x = np.random.default_rng(0).standard_normal((TOKENS, K)).astype(np.float32)
    run = jax.jit(ops.q_ragged_dot)
    arguments = (jax.device_put(x, NamedSharding(mesh, of_x)), w)
    for sizes in SIZES.values():
        y = run(*arguments, jnp.asarray(sizes, jnp.int32))
        np.testing.assert_allclose(y, wanted(x, numbers, sizes), rtol=1e-5, atol=2e-4)
        assert y.sharding.is_equivalent_to(NamedSharding(mesh, result), 2)
    _, found = compiled(ops.q_ragged_dot, *arguments, jnp.asarray(SIZES["spread"], jnp.int32))
    assert found == collectives and set(seen) == {local}


def test_scales_of_tokens_go_with_them_and_so_does_nan(seen, mesh):
    w, _ = weight(Int(8), N, K, (G,))
    act, sizes = Int(8, per="token"), jnp.asarray(SIZES["spread"], jnp.int32)
    x = np.random.default_rng(0).standard_normal((TOKENS, K)).astype(np.float32)
    x *= np.geomspace(1, 1e3, TOKENS)[:, None]
    x[3, 7] = np.nan
    function = lambda x, w: ops.q_ragged_dot(x, w, sizes, act=(act, ops.activation_aux(x, act)))  # noqa: E731
    want = np.asarray(function(x, w))
    seen.clear()
    got, _ = compiled(function, jax.device_put(x, NamedSharding(mesh, P("data"))), placed(w, mesh, "model", None, None))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert np.isnan(want[3]).all() and np.isfinite(np.delete(want, 3, 0)).all()
    assert seen == [(2, N, K, TOKENS // 2)]


def test_the_lowering_of_one_cpu_runs_on_each_of_several(mesh):
    """No stand-in here: what computes experts on one CPU device refuses several, and computes on each its own."""
    w, numbers = weight(Int(4, group=32), N, K, (G,))
    x = np.random.default_rng(0).standard_normal((TOKENS, K)).astype(np.float32)
    sizes = jnp.asarray(SIZES["spread"], jnp.int32)
    y, found = compiled(ops.q_ragged_dot, x, placed(w, mesh, "model", None, None), sizes)
    np.testing.assert_allclose(y, wanted(x, numbers, SIZES["spread"]), rtol=1e-5, atol=2e-4)
    assert found == SUM


def test_experts_are_packed_and_placed_for_a_mesh(seen, mesh):
    """Experts over one axis, their outputs or inputs over the other, by the specs of the float weight."""
    w, numbers = weight(Int(4, group=32), N, K, (G,))
    specs = {"up": P("model", "data", None), "down": P("data", None, "model")}
    made = ops.pack_tree({"up": w, "down": w}, specs=specs, mesh=mesh)
    x = np.random.default_rng(0).standard_normal((TOKENS, K)).astype(np.float32)
    sizes = jnp.asarray(SIZES["spread"], jnp.int32)
    for one in made.values():
        y, found = compiled(ops.q_ragged_dot, x, one, sizes)
        np.testing.assert_allclose(y, wanted(x, numbers, SIZES["spread"]), rtol=1e-5, atol=2e-4)
        assert found == SUM
    assert set(seen) == {(2, N // 2, K, TOKENS), (4, N, K // 4, TOKENS)}


LAYOUTS = {"NHWC": ("NHWC", "HWIO", "NHWC"), "NCHW": ("NCHW", "OIHW", "NCHW")}


@pytest.mark.parametrize(("layout", "act"), [("NHWC", None), ("NCHW", Int(8, per="token"))])
def test_convolutions_stay_on_the_kernel(seen, mesh, layout, act):
    numbers = LAYOUTS[layout]
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.standard_normal([{"H": 3, "W": 3, "I": 4, "O": 16}[c] for c in numbers[1]]), jnp.float32)
    ins = tuple(numbers[1].index(c) for c in "HWI")
    w = quantize_array(kernel, Int(8), in_axes=ins)
    x = jnp.asarray(rng.standard_normal([{"N": 8, "H": 6, "W": 6, "C": 4}[c] for c in numbers[0]]), jnp.float32)

    def function(x, w):
        given = act and (act, ops.conv_activation_aux(x, act, numbers))
        settings = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": numbers}
        return ops.q_conv(x, w, act=given, **settings)

    want = np.asarray(function(x, w))
    seen.clear()
    cut = jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, P("model" if a.shape[0] == 16 else None))), w)
    y, found = compiled(function, jax.device_put(x, NamedSharding(mesh, P("data"))), cut)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-3)
    assert found == {} and [(n, shape[0]) for n, shape in seen] == [(4, 4)]
    spec = ["data", None, None, None]
    spec[numbers[2].index("C")] = "model"
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, P(*spec)), 4)


def test_channels_in_groups_are_cut_over_examples_alone(seen, mesh):
    w = quantize_array(jnp.ones((3, 3, 1, 8)), Int(8), in_axes=(0, 1, 2))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 6, 6, 8)), jnp.float32)
    settings = {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 8}
    settings["dimension_numbers"] = LAYOUTS["NHWC"]
    function = lambda x, w: ops.q_conv(x, w, **settings)  # noqa: E731
    want = np.asarray(function(x, w))
    seen.clear()
    y, _ = compiled(
        function, jax.device_put(x, NamedSharding(mesh, P("data"))), placed(w, mesh, None, None, None, None)
    )
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    assert [(n, shape[0]) for n, shape in seen] == [(8, 4)]


def test_cuda_is_lowered_for_several_described_gpus():
    w, _ = weight(Int(4, group=128), 128, 128, (8,))
    w = ops.pack(w)
    with described_gpu(model=4):
        mesh = jax.sharding.get_abstract_mesh()
        shaped = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, P("model")))  # noqa: E731
        arguments = (jax.ShapeDtypeStruct((16, 128), jnp.bfloat16), jax.tree.map(shaped, w))
        traced = jax.jit(ops.q_ragged_dot).trace(*arguments, jax.ShapeDtypeStruct((8,), jnp.int32))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "@CustomSPMDPartitioning" in text and "sdy.sharding_rule" in text

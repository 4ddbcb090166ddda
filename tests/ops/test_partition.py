"""Products that run by a kernel, over eight devices: the numbers of one, the collectives that it takes and no others.

The kernel is a stand-in (the reference, where the compiler may not partition), because CUDA cannot run here; what is
partitioned, and what the kernel is given on each device, is real.
"""

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
from qjax.errors import LayoutError
from qjax.formats import Int, WordTiles
from qjax.formats.parts import TiledParts
from qjax.kernels import registry
from qjax.kernels.dot import parts as dot_parts
from qjax.kernels.dot.reference import dot_reference

N, K = 96, 256
G32 = Int(4, group=32)


@pytest.fixture
def seen(monkeypatch):
    """What the stand-in was asked to compute on a device: (N, K, tokens)."""
    monkeypatch.setattr(registry, "_TABLE", {op: list(rows) for op, rows in registry._TABLE.items()})
    found = []

    def alone(problem):
        return problem.devices == 1 or "it runs on one device"

    @registry.register_lowering("dot", (WordTiles, Int), "cpu", when=alone, name="mosaic", priority=90)
    def stand_in(problem, x, w, act):
        found.append((problem.n, problem.k, problem.rows))
        return dot_reference(problem, x, w, act)

    registry.register_lowering("dot", TiledParts, "cpu", when=dot_parts._runs, name="mosaic", priority=90)(
        dot_parts.parts
    )
    yield found
    jax.clear_caches()  # what was compiled by the stand-in


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def placed(w, mesh, n=None, k=None):
    """A canonical weight, sharded along N and K."""
    along = lambda a: (*(None,) * (a.ndim - 2), n, k)  # noqa: E731
    cut = lambda a: P(*(s if d > 1 else None for s, d in zip(along(a), a.shape, strict=True)))  # noqa: E731
    return jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, cut(a))), w)


CASES = {
    "outputs": ((4, 1), "model", None, P(), {}, (24, 256, 16), P(None, "model")),
    "outputs and tokens": ((4, 1), "model", None, P("data"), {}, (24, 256, 8), P("data", "model")),
    "inputs": ((1, 4), None, "model", P(None, "model"), SUM, (96, 64, 16), P()),
    "inputs of whole activations": ((1, 4), None, "model", P(), SUM, (96, 64, 16), P()),
    "inputs and tokens": ((1, 4), None, "model", P("data", "model"), SUM, (96, 64, 8), P("data")),
    "both": ((2, 4), "data", "model", P(), SUM, (48, 64, 16), P(None, "data")),
    "tokens": ((1, 1), None, None, P("data"), {}, (96, 256, 8), P("data")),
    "two parts a device": ((8, 1), "model", None, P(), {}, (12, 256, 16), P(None, "model")),
}


@pytest.mark.parametrize("case", CASES)
def test_tensor_parallel_weights_in_parts_stay_on_the_kernel(seen, mesh, case):
    parts, n, k, of_x, collectives, local, spec = CASES[case]
    w, numbers = weight(G32, N, K)
    x = np.random.default_rng(0).standard_normal((16, K)).astype(np.float32)
    w = placed(ops.pack(w, parts=parts), mesh, n, k)
    y, found = compiled(ops.q_dot, jax.device_put(x, NamedSharding(mesh, of_x)), w)
    np.testing.assert_allclose(y, x @ numbers.T, rtol=1e-5, atol=2e-4)
    assert found == collectives and set(seen) == {local}
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)


@pytest.mark.parametrize("case", ["outputs and tokens", "both"])
def test_bias_and_residual_are_cut_with_the_result_and_added_once(seen, mesh, case):
    parts, n, k, of_x, collectives, local, spec = CASES[case]
    w, numbers = weight(G32, N, K)
    rng = np.random.default_rng(0)
    x, bias, residual = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, K), (N,), (16, N)))
    w = placed(ops.pack(w, parts=parts), mesh, n, k)
    place = lambda a, *s: jax.device_put(a, NamedSharding(mesh, P(*s)))  # noqa: E731
    operands = place(x, *of_x), w, place(bias, n), place(residual, *spec)
    y, found = compiled(lambda x, w, b, r: ops.q_dot(x, w, bias=b, residual=r), *operands)
    np.testing.assert_allclose(y, x @ numbers.T + bias + residual, rtol=1e-5, atol=2e-4)
    assert found == collectives and set(seen) == {local}
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)


@pytest.mark.parametrize(("n", "k", "collectives"), [("model", None, {}), (None, "model", SUM)])
def test_weights_in_neutral_order_too(seen, mesh, n, k, collectives):
    w, numbers = weight(Int(8, group=32), N, K)
    x = np.random.default_rng(0).standard_normal((16, K)).astype(np.float32)
    y, found = compiled(ops.q_dot, jax.device_put(x, NamedSharding(mesh, P(None, k))), placed(w, mesh, n, k))
    np.testing.assert_allclose(y, x @ numbers.T, rtol=1e-5, atol=2e-3)
    assert found == collectives and len(seen) == 1


@pytest.mark.parametrize("k", [None, "model"])
def test_quantized_activations_keep_their_scales(seen, mesh, k):
    w, numbers = weight(Int(8), N, K)
    act = Int(8, per="token")
    x = jnp.asarray(np.random.default_rng(0).standard_normal((16, K)), jnp.float32)
    function = lambda x, w: ops.q_dot(x, w, act=(act, ops.activation_aux(x, act)), implementation="mosaic")  # noqa: E731
    want = function(x, w)
    seen.clear()
    w = placed(w, mesh, None if k else "model", k)
    y, _ = compiled(function, jax.device_put(x, NamedSharding(mesh, P("data", k))), w)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-3)
    assert seen == [(N, K // 4, 8) if k else (N // 4, K, 8)]


def test_under_vmap_and_with_stacks(seen, mesh):
    w, numbers = weight(G32, N, K, (4,))
    w = placed(ops.pack(w, parts=(4, 1)), mesh, "model")
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 8, K)), jnp.float32)
    y, found = compiled(lambda x, w: jax.vmap(ops.q_dot, (0, None))(x, w), x, w)
    np.testing.assert_allclose(y, np.einsum("bsrk,snk->bsrn", x, numbers), rtol=1e-5, atol=2e-4)
    assert found == {} and len(seen) == 1
    y, found = compiled(jax.vmap(ops.q_dot), x[0], w)
    np.testing.assert_allclose(y, np.einsum("srk,snk->srn", x[0], numbers), rtol=1e-5, atol=2e-4)
    assert found == {}


def test_a_stack_in_tiles_is_cut_matrix_by_matrix(seen, mesh):
    w, numbers = weight(G32, N, K, (4,))
    cut = lambda a: jax.device_put(a, NamedSharding(mesh, P("model")))  # noqa: E731
    x = np.random.default_rng(0).standard_normal((4, 8, K)).astype(np.float32)
    y, found = compiled(ops.q_dot, x, jax.tree.map(cut, ops.pack(w)))
    np.testing.assert_allclose(y, np.einsum("srk,snk->srn", x, numbers), rtol=1e-5, atol=2e-4)
    assert found == {} and set(seen) == {(N, K, 8)} and y.sharding.spec == P("model")


@pytest.mark.parametrize(("parts", "n", "k"), [((4, 1), "model", None), ((1, 4), None, "model")])
def test_the_gradient_is_that_of_one_device_and_gathers_no_weight(seen, mesh, parts, n, k):
    w, numbers = weight(G32, N, K)
    x = np.random.default_rng(0).standard_normal((16, K)).astype(np.float32)
    w = placed(ops.pack(w, parts=parts), mesh, n, k)
    gradient = jax.grad(lambda x, w: jnp.sum(jnp.sin(ops.q_dot(x, w))))
    y, found = compiled(gradient, jax.device_put(x, NamedSharding(mesh, P(None, k))), w)
    np.testing.assert_allclose(y, np.cos(x @ numbers.T) @ numbers, rtol=1e-3, atol=2e-2)
    assert found.get("all-gather", 0) == 0, found


def test_in_the_manual_body_of_shard_map(seen, mesh):
    w, numbers = weight(G32, N, K)
    w = placed(ops.pack(w, parts=(1, 4)), mesh, None, "model")
    specs = jax.tree.map(lambda a: a.sharding.spec, w)
    body = jax.shard_map(
        lambda x, w: jax.lax.psum(ops.q_dot(x, w), "model"),
        mesh=mesh,
        in_specs=(P("data", "model"), specs),
        out_specs=P("data"),
    )
    x = jnp.asarray(np.random.default_rng(0).standard_normal((16, K)), jnp.float32)
    y, found = compiled(body, x, w)
    np.testing.assert_allclose(y, x @ numbers.T, rtol=1e-5, atol=2e-4)
    assert found == SUM and set(seen) == {(96, 64, 8)}


def test_pack_tree_places_weights_for_a_mesh(seen, mesh):
    w, numbers = weight(G32, N, K)
    tree = {"up": w, "down": w, "bias": jnp.ones(3)}
    specs = {"up": P("model", None), "down": P(None, ("data", "model")), "bias": P()}
    made = ops.pack_tree(tree, specs=specs, mesh=mesh)
    assert made["up"].aux["tiles"].sharding.spec == P("model", None) and made["up"].aux["tiles"].shape[-2] == 4
    assert made["down"].codes.sharding.spec == P(None, ("data", "model")) and made["down"].codes.shape == (N, 8)
    assert made["bias"] is tree["bias"]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, K)), jnp.float32)
    for name in ("up", "down"):
        np.testing.assert_allclose(jax.jit(ops.q_dot)(x, made[name]), x @ numbers.T, rtol=1e-5, atol=2e-4)
    assert set(seen) == {(24, 256, 4), (96, 32, 4)}


def test_parts_that_would_not_be_equal_or_cut_a_group_are_refused(mesh):
    w, _ = weight(G32, N, K)
    with pytest.raises(LayoutError, match="N = 96 is not cut evenly into 5 parts"):
        ops.pack(w, parts=(5, 1))
    with pytest.raises(LayoutError, match="cut a group of 32"):
        ops.pack(w, parts=(1, 16))
    with pytest.raises(LayoutError, match="specs and mesh"):
        ops.pack_tree({"w": w}, specs={"w": P()})
    with pytest.raises(LayoutError, match="^up: pack"):
        ops.pack_tree({"up": w}, specs={"up": P(None, "x")}, mesh=jax.sharding.AbstractMesh((16,), ("x",)))


@pytest.mark.parametrize("stack", [(), (2,)])
@pytest.mark.parametrize("fmt", [G32, Int(4), Int(8, per="tensor"), Int(4, group=32, symmetric=False)], ids=str)
def test_parts_stand_for_the_same_numbers_and_are_undone(fmt, stack):
    w, numbers = weight(fmt, N, K, stack)
    for parts in ((2, 1), (1, 2), (4, 2), (1, 8)):
        packed = ops.pack(w, parts=parts)
        assert packed.shape == w.shape
        np.testing.assert_allclose(packed.decode_canonical(), numbers, rtol=1e-6)
        back = ops.neutral(packed)
        assert back.layout == w.layout and back.fmt == w.fmt
        for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(w), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("axes", [{"model": 4}, {"data": 2, "model": 4}])
def test_cuda_is_lowered_for_several_described_gpus(axes):
    w, _ = weight(Int(4, group=128), 512, 512)
    w = ops.pack(w, parts=(4, 1))
    x = jax.ShapeDtypeStruct((16, 512), jnp.bfloat16)
    with described_gpu(**axes):
        mesh = jax.sharding.get_abstract_mesh()
        cut = lambda a: P(*(None,) * (a.ndim - 2), "model" if a.shape[-2] > 1 else None, None)  # noqa: E731
        shaped = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, cut(a)))  # noqa: E731
        lowered = jax.jit(ops.q_dot).trace(x, jax.tree.map(shaped, w)).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert "@CustomSPMDPartitioning" in text and "sdy.sharding_rule" in text

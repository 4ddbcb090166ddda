"""Ragged products on Hopper: the table of tiles, the choice of the kernel, lowering, and the interpreter."""

from __future__ import annotations

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
from qjax.errors import LoweringError, QjaxWarning
from qjax.formats import MXFP4, Int
from qjax.formats.tiles import rounded_up
from qjax.kernels import Problem, registry
from qjax.kernels.dot.hopper import TOKENS, Schedule
from qjax.kernels.dot.schedules import ragged_schedule_for
from qjax.kernels.dot.words import footprint
from qjax.kernels.ragged_dot.experts import experts16
from qjax.kernels.ragged_dot.placing import NO_MATRIX, most_tiles, placed
from qjax.models import LanguageModel
from qjax.models.moe import MoeConfig

G128 = Int(4, group=128)
FOOTPRINT = footprint(ops.pack(mosaic.blank(G128, 8, 256)).fmt)
interpreted = pytest.mark.skipif(JAX_VERSION < (0, 11), reason="the Mosaic GPU interpreter is usable from jax 0.11 on")


# The table of tiles.


def owners(sizes, rows, tile):
    """The matrix of each row, as the table has it; every row has to be owned once."""
    table = np.asarray(placed(jnp.asarray(sizes, jnp.int32), rows, tile))
    assert table.shape == (most_tiles(rows, len(sizes), tile), 4)
    out = np.full(rows, -2)
    for matrix, cell, begin, end in table:
        if begin < end:
            assert 8 * cell <= begin and end <= min(rows, 8 * cell + tile)
            assert (out[begin:end] == -2).all()
            out[begin:end] = matrix
    assert (out != -2).all()
    return out


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.one_of(st.just(0), st.integers(0, 40)), min_size=1, max_size=9),
    st.integers(0, 20),
    st.sampled_from(TOKENS),
)
def test_every_row_is_owned_by_the_tile_of_its_group(sizes, behind, tile):
    rows = max(1, sum(sizes) + behind)
    want = np.full(rows, NO_MATRIX)
    want[: sum(sizes)] = np.repeat(np.arange(len(sizes)), sizes)
    np.testing.assert_array_equal(owners(sizes, rows, tile), want)


def test_a_group_of_few_rows_is_one_tile():
    table = np.asarray(placed(jnp.asarray([3, 9, 0, 9], jnp.int32), 21, 16))
    assert table[:3].tolist() == [[0, 0, 0, 3], [1, 0, 3, 12], [3, 1, 12, 21]]
    assert (table[3:, 2] == table[3:, 3]).all()
    assert most_tiles(2, 8, 8) == 2  # one token of a model with two experts a token reads two experts


def test_sizes_beyond_the_rows_are_cut_off():
    assert owners([3, 9, 4], 8, 8).tolist() == [0] * 3 + [1] * 5


@given(st.integers(1, 20000), st.integers(1, 20000), st.integers(1, 9000), st.integers(1, 128))
def test_schedules_are_whole(n, k, rows, groups):
    s = ragged_schedule_for(n, k, rows, groups, footprint=FOOTPRINT)
    assert s.tokens in TOKENS and s.fits(rounded_up(n), rounded_up(k)) and FOOTPRINT.refuses(s, 2) is None


# Choosing.


def problem(**changes):
    w = jax.eval_shape(lambda: ops.pack(mosaic.blank(G128, 256, 512, (4,))))
    settled = {"op": "ragged_dot", "platform": "cuda", "weight": w.fmt, "act": None, "rows": 4, "n": 256, "k": 512}
    settled |= {"stack": (4,), "x_dtype": np.dtype(jnp.bfloat16), "capability": (9, 0)}
    return Problem(**{**settled, **changes})


def test_it_is_chosen_on_hopper_and_nowhere_else():
    assert registry.select(problem()).name == "mosaic"
    for change in ({"capability": (8, 0)}, {"x_dtype": np.dtype(np.float32)}, {"weight": G128}, {"devices": 2}):
        assert registry.select(problem(**change)).name == "dequantize"
    assert registry.select(problem(platform="cpu", capability=None)).name == "experts"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"capability": (10, 0)}, "wgmma exists on compute capability 9.0"),
        ({"weight": G128}, "it reads WordTiles or TritTiles"),
        ({"x_dtype": np.dtype(np.float32)}, "activations are float32; cast them"),
        ({"act": Int(8, per="token")}, "a weight in tiles takes 16-bit floats"),
        ({"devices": 8}, "8 devices; call it inside jax.shard_map"),
    ],
)
def test_a_named_kernel_says_why_it_cannot_run(change, why):
    with pytest.raises(LoweringError, match=why):
        registry.select(problem(**change), "mosaic")


# Lowering.


def lowered(fmt, groups, n, k, rows, dtype):
    w = jax.eval_shape(lambda: ops.pack(mosaic.blank(fmt, n, k, (groups,))))
    x, sizes = jax.ShapeDtypeStruct((rows, k), dtype), jax.ShapeDtypeStruct((groups,), jnp.int32)
    with mosaic.described_gpu():
        return jax.jit(ops.q_ragged_dot).trace(x, w, sizes).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("fmt", "groups", "n", "k", "rows", "dtype"),
    [
        (G128, 8, 1024, 1024, 2, jnp.bfloat16),
        (Int(4, group=64, symmetric=False), 4, 200, 200, 37, jnp.float16),
        (Int(8), 3, 256, 256, 512, jnp.bfloat16),
        (MXFP4(), 4, 65536, 256, 4096, jnp.bfloat16),
    ],
)
def test_it_lowers_for_cuda_here(fmt, groups, n, k, rows, dtype):
    text = lowered(fmt, groups, n, k, rows, dtype)
    assert text.count("custom_call @mosaic_gpu") == 1 and "stablehlo.transpose" not in text


def test_no_rows():
    assert "mosaic_gpu" not in lowered(G128, 2, 128, 128, 0, jnp.bfloat16)


def test_packed_experts_without_the_kernel_on_a_gpu_are_warned_of():
    with pytest.warns(QjaxWarning, match="ragged_dot of int4 g128 tiles.*dequantized.*activations are float32"):
        assert "mosaic_gpu" not in lowered(G128, 2, 128, 128, 4, jnp.float32)


def test_packed_experts_give_the_same_numbers_elsewhere():
    w, _ = mosaic.weight(G128, 128, 256, (3,))
    x, sizes = jnp.asarray(np.random.default_rng(0).normal(size=(6, 256)), jnp.float32), jnp.asarray([2, 0, 3])
    np.testing.assert_allclose(
        ops.q_ragged_dot(x, ops.pack(w), sizes), ops.q_ragged_dot(x, w, sizes), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("scan", [False, True])
def test_a_mixtral_is_on_the_kernel(scan):
    """Attention, the experts' three products and no weight unpacked: through the rewritten graph."""
    sizes = {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    fn = LanguageModel(MoeConfig(**sizes, **heads, **experts), scan_layers=scan)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), fn.abstract_params(jnp.bfloat16))
    recipe = qjax.Recipe([qjax.Rule("**/experts/**", weights=G128)])
    model = qjax.quantize(fn, zeros, jnp.zeros((1, 4), jnp.int32), recipe=recipe)
    packed = jax.eval_shape(lambda: ops.pack_tree(model.params))
    with mosaic.described_gpu():
        traced = jax.jit(lambda p, t: model(p, t)).trace(packed, jax.ShapeDtypeStruct((1, 4), jnp.int32))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == (3 if scan else 6)


# Interpreter.


@interpreted
@pytest.mark.parametrize(
    ("fmt", "n", "k", "sizes", "rows", "schedule", "dtype"),
    [
        pytest.param(G128, 128, 256, [0, 1, 0], 1, Schedule(8, 2), jnp.bfloat16, id="one token"),
        pytest.param(G128, 128, 512, [1, 0, 1], 3, Schedule(8, 2, 2), jnp.bfloat16, id="one of no group, K in parts"),
        pytest.param(Int(4, group=64, symmetric=False), 200, 200, [3, 0, 21, 4], 37, Schedule(16, 2), jnp.float16),
        pytest.param(Int(8), 128, 128, [0, 20, 0], 20, Schedule(16, 2), jnp.bfloat16, id="one has all"),
        pytest.param(
            G128, 256, 256, [3, 0, 9], 13, Schedule(8, 2, tall=2, rolling=True), jnp.bfloat16, id="tall, rolling"
        ),
        pytest.param(Int(4), 64, 40, [2, 5, 0], 9, Schedule(8, 2), jnp.float16, id="a border within 8 rows"),
    ],
)
def test_against_numpy(fmt, n, k, sizes, rows, schedule, dtype):
    w, numbers = mosaic.weight(fmt, n, k, (len(sizes),))
    aux = {name: a.reshape(len(sizes), -1) for name, a in ops.pack(w).aux.items()}
    x = np.random.default_rng(1).normal(size=(rows, k))
    x[0, 0] = np.nan
    x = jnp.asarray(x, dtype)
    how = {"fmt": ops.pack(w).fmt, "n": n, "out_dtype": jnp.float32, "schedule": schedule}
    with mosaic.interpreter() as interpret:
        y = np.asarray(experts16(aux, x, jnp.asarray(sizes), **how, interpret=interpret), np.float64)
        assert not mosaic.races_found()
    exact, groups = np.asarray(x, np.float64), np.repeat(np.arange(len(sizes)), sizes)
    want = np.einsum("mk,mnk->mn", exact[: len(groups)], numbers[groups])
    terms = np.einsum("mk,mnk->mn", np.abs(exact[: len(groups)]), np.abs(numbers[groups]))
    assert np.isnan(y[0]).all() and not y[len(groups) :].any()
    assert np.max(np.abs(y[1 : len(groups)] - want[1:]) / terms[1:], initial=0) < 1e-6

"""What DGQ and QoQ do to channels: the equations, and that folded into parameters they leave the function as it is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gauge_models import case
from gauges import distance
from hypothesis import given
from hypothesis import strategies as st

import qjax
from qjax.errors import FormatError, RecipeError
from qjax.passes import DGQSmooth, Reorder, SmoothAttention, SmoothOutputs
from qjax.passes.channel_factors import (
    activation_order,
    attention_factors,
    dgq_smoothing,
    output_factors,
    tied_maxima,
)
from qjax.passes.leaves import Leaves
from qjax.passes.prepare import lay_over, verified
from qjax.trees import is_array, replace_arrays


@pytest.mark.parametrize(("channels", "rank"), [(4096, 21), (11008, 56), (100, 2), (3, 1), (1, 1)])
def test_percentile_smoothing(channels, rank):
    a = np.random.default_rng(channels).permutation(np.arange(1, channels + 1)).astype(np.float32)
    s = dgq_smoothing(a)
    t = np.sort(a)[-rank]
    assert ((a / s) <= t * (1 + 1e-6)).all() and (s > 1).sum() == rank - 1  # none is above, outliers are at t
    np.testing.assert_allclose((a / s)[a > t], t, rtol=1e-6)
    assert (s[a <= t] == 1).all()


def test_percentile_smoothing_of_what_is_not_there():
    np.testing.assert_array_equal(dgq_smoothing(np.full(400, 5e-5)), 1)
    np.testing.assert_array_equal(dgq_smoothing(np.zeros(400)), 1)
    np.testing.assert_array_equal(dgq_smoothing(np.ones(400)), 1)
    with pytest.raises(FormatError, match=r"shape \(2, 2\)"):
        dgq_smoothing(np.ones((2, 2)))


def rotated(x: np.ndarray, positions: np.ndarray, pairs: str) -> np.ndarray:
    """Rotary positions in float64: x [T, D]."""
    d = x.shape[-1]
    angle = positions[:, None] / 10000 ** (np.arange(d // 2) / (d // 2))
    first, second = (x[:, : d // 2], x[:, d // 2 :]) if pairs == "half" else (x[:, ::2], x[:, 1::2])
    a, b = first * np.cos(angle) - second * np.sin(angle), first * np.sin(angle) + second * np.cos(angle)
    return np.concatenate([a, b], 1) if pairs == "half" else np.stack([a, b], 2).reshape(x.shape)


@pytest.mark.parametrize("pairs", ["half", "interleaved"])
def test_factors_of_keys_commute_with_rotary_positions_only_if_tied(pairs):
    r = np.random.default_rng(0)
    k, q, positions = r.standard_normal((9, 16)), r.standard_normal((9, 16)), np.arange(9.0)
    turn = lambda x: rotated(x, positions, pairs)  # noqa: E731
    want = turn(q) @ turn(k).T
    factors = attention_factors(np.abs(turn(k)).max(0)[None], alpha=0.5, pairs=pairs)[0].astype(np.float64)
    np.testing.assert_allclose(turn(q * factors) @ turn(k / factors).T, want, rtol=1e-9, atol=1e-9)
    loose = np.exp(r.standard_normal(16))
    assert np.abs(turn(q * loose) @ turn(k / loose).T - want).max() > 0.1
    other = attention_factors(np.abs(k).max(0)[None], pairs="interleaved" if pairs == "half" else "half")[0]
    assert np.abs(turn(q * other) @ turn(k / other).T - want).max() > 1e-3


def test_factors_of_keys():
    r = np.random.default_rng(1)
    k, q = np.abs(r.standard_normal((2, 8))), np.abs(r.standard_normal((6, 8)))
    k[1, 3] = k[1, 7] = 0
    got = attention_factors(k)
    want = np.sqrt(np.maximum(k, np.roll(k, 4, axis=1)))
    want[1, [3, 7]] = 1
    np.testing.assert_allclose(got, want, rtol=1e-6)
    both = attention_factors(k, q, alpha=0.3, beta=0.7)
    shared = np.maximum(q[0:3].max(0), np.roll(q[0:3].max(0), 4))  # three query heads for each key head
    np.testing.assert_allclose(both[0], np.maximum(k[0], np.roll(k[0], 4)) ** 0.3 / shared**0.7, rtol=1e-6)
    np.testing.assert_array_equal(tied_maxima(k, None), k)
    with pytest.raises(FormatError, match="queries are needed"):
        attention_factors(k, beta=0.5)
    with pytest.raises(FormatError, match="'half', 'interleaved' or None"):
        tied_maxima(k, "quarter")


def test_factors_of_outputs():
    x, w = np.array([4.0, 0.0, 9.0, 1.0]), np.array([2.0, 5.0, 0.0, np.inf])
    np.testing.assert_allclose(output_factors(x, w, 0.5), [2 / np.sqrt(2), 1, 1, 1])
    np.testing.assert_allclose(output_factors(x, w, 0.0), [0.5, 0.2, 1, 1])


@given(data=st.data(), count=st.integers(1, 40))
def test_order(data, count):
    a = np.array(data.draw(st.lists(st.integers(0, 5), min_size=count, max_size=count)), np.float32)
    blocks = np.array(data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count)))
    np.testing.assert_array_equal(activation_order(a), np.argsort(a, kind="stable"))
    order = activation_order(a, blocks)
    np.testing.assert_array_equal(np.sort(order), np.arange(count))
    np.testing.assert_array_equal(blocks[order], blocks)
    for b in np.unique(blocks):
        assert (np.diff(a[order][blocks == b]) >= 0).all()


def states_of(model, step, seed=0):
    """States as calibration might have found them: what a pass makes of them has to be exact, whatever they are."""
    r = np.random.default_rng(seed)
    out = {}
    for name in model.linear:
        site = model.program.by_name[name]
        shape = model.program.leaf_avals[model.program.leaf_names.index(site.leaf)].shape
        k = int(np.prod([shape[a] for a in site.in_axes]))
        if isinstance(step, SmoothAttention):
            keys = np.where(np.arange(8) < 6, np.arange(8), 0xFFFFFFFF).astype(np.uint32)
            out[name] = {"sample": r.standard_normal((8, k)).astype(np.float32), "sample_key": keys}
        else:
            out[name] = {f"channel_{side}": np.exp(2 * r.standard_normal(k)) for side in ("below", "above")}
    return out


def edited(model, step, seed=0):
    """The parameters after a pass, and its notes."""
    program = model.program
    leaves = Leaves(program.leaf_names, [x for x in jax.tree.leaves(model.params) if is_array(x)])
    edits = step.edit(program, leaves, model.linear, states_of(model, step, seed))
    lay_over(leaves, verified(step, program, edits))
    return replace_arrays(model.params, [leaves[name] for name in program.leaf_names]), edits


PASSES = [DGQSmooth(0.1), SmoothOutputs(0.3), Reorder(), SmoothAttention()]


@pytest.mark.every(4)
@pytest.mark.parametrize("step", PASSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("name", ["llama", "scanned", "moe"])
def test_logits_are_unchanged(name, step):
    model = case(name)
    params, edits = edited(model, step)
    changed = {leaf for leaf, _ in edits.slices}
    assert changed, edits.notes
    assert distance(model(params), model.want) < 1e-4
    if isinstance(step, SmoothAttention):
        assert all("k_proj" in leaf or "q_proj" in leaf for leaf in changed)
    if isinstance(step, SmoothOutputs | Reorder):
        assert all(any(part in leaf for part in ("v_proj", "o_proj", "gate", "up", "down")) for leaf in changed)


def test_what_the_passes_name():
    model = case("llama")
    _, edits = edited(model, Reorder())
    assert any(n.startswith("layers/0/attn/o_proj/kernel: 16 channels sorted within 2 blocks") for n in edits.notes)
    assert any(n.startswith("layers/1/mlp/down/kernel: 48 channels sorted within 1 block") for n in edits.notes)
    _, edits = edited(case("qk-norm"), SmoothAttention())
    assert any("keys not smoothed, because" in n and "k_norm" in n for n in edits.notes)
    with pytest.raises(RecipeError, match="pattern for the projections to keys"):
        edited(model, SmoothAttention(match="**/keys/**"))
    with pytest.raises(RecipeError, match="alpha=2"):
        SmoothAttention(alpha=2)
    with pytest.raises(RecipeError, match="fraction=-1"):
        DGQSmooth(fraction=-1)
    with pytest.raises(RecipeError, match="did you mean 'skip'"):
        DGQSmooth(unfolded="skipp")


def test_channels_are_sorted_by_what_was_seen():
    model, step = case("llama"), Reorder(match="**/down/**")
    params, _ = edited(model, step)
    state = states_of(model, step)["layers/0/mlp/down/kernel"]
    reach = np.maximum(state["channel_below"], state["channel_above"])
    old, new = (dict(zip(model.program.leaf_names, jax.tree.leaves(p), strict=False)) for p in (model.params, params))
    name = "layers/0/mlp/down/kernel"
    np.testing.assert_array_equal(new[name], np.asarray(old[name])[np.argsort(reach, kind="stable")])


def test_longest_keys_of_each_pair_and_head():
    """The factors by hand, for a head of 8 channels turned in halves, biases included."""
    model, step = case("tied"), SmoothAttention(alpha=1.0)
    params, _ = edited(model, step)
    names = model.program.leaf_names
    old, new = (
        dict(zip(names, [x for x in jax.tree.leaves(p) if is_array(x)], strict=True)) for p in (model.params, params)
    )
    at = "layers/0/attn/k_proj/"
    sample = states_of(model, step)[at + "kernel"]["sample"][:6]
    keys = sample @ np.asarray(old[at + "kernel"]) + np.asarray(old[at + "bias"])
    pairs = keys.reshape(6, 2, 2, 4)  # rows, key heads, halves, pairs
    length = np.sqrt((pairs**2).sum(2)).max(0)
    by = np.broadcast_to(length[:, None], (2, 2, 4)).reshape(16)
    np.testing.assert_allclose(new[at + "kernel"], np.asarray(old[at + "kernel"]) / by, rtol=1e-4)
    np.testing.assert_allclose(new[at + "bias"], np.asarray(old[at + "bias"]) / by, rtol=1e-4)
    queries = np.broadcast_to(length[:, None, None], (2, 2, 2, 4)).reshape(32)  # two heads for each of keys
    q = "layers/0/attn/q_proj/kernel"
    np.testing.assert_allclose(new[q], np.asarray(old[q]) * queries, rtol=1e-4)


@pytest.mark.slow
def test_in_a_recipe_with_data():
    """All of QoQ on a scanned model: smoothed, reordered, rounded, and near the float one."""
    model = case("scanned")
    rules = [
        qjax.Rule("**/lm_head/**", skip=True, optional=True),
        qjax.Rule("**", weights=qjax.Int(8), inputs=qjax.Int(8, per="token")),
    ]
    steps = [SmoothAttention(), SmoothOutputs(0.3), Reorder()]
    recipe = qjax.Recipe(rules, prepare=steps)
    assert qjax.Recipe.from_dict(recipe.to_dict()).prepare == tuple(steps)
    quantized = qjax.quantize(model.fn, model.params, recipe=recipe, batches=[model.args])
    notes = [note for note in quantized.report.notes if note.split(":")[0] in ("Reorder", "SmoothAttention")]
    assert sum("sorted within" in n for n in notes) == 4 and sum("keys divided" in n for n in notes) == 2, notes
    got = jax.tree.leaves(quantized(quantized.params, *model.args))[0]
    want = jax.tree.leaves(model.want)[0]
    assert float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want)) < 0.1

"""The residual stream mixed by an orthogonal matrix: scales folded first, then every leaf that writes or reads it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from gauge_models import case
from gauges import Case, distance, refused, written

from qjax.analysis.channels import ChannelGroup, Refusal, channel_group, stream_group
from qjax.analysis.turning import folded, keeping_ones, overlaid, rotated
from qjax.errors import QjaxError


def orthogonal(size: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]


def stream(model: Case) -> ChannelGroup:
    group = stream_group(model.program)
    assert isinstance(group, ChannelGroup), str(group)
    return group


def turn(model: Case, group: ChannelGroup, matrix: np.ndarray) -> float:
    """How far the function moves when scales are folded and channels mixed."""
    new = folded(group, model.read)
    assert distance(model(written(model.params, new)), model.want) < 1e-4
    new |= rotated(group, matrix, overlaid(new, model.read))
    return distance(model(written(model.params, new)), model.want)


@pytest.mark.parametrize("name", ["llama", "scanned", "qk-norm", "moe"])
def test_rms_norms_let_any_rotation_through(name):
    model = case(name)
    group = stream(model)
    assert group.size == 32 and not group.keeps_ones and not group.untie
    assert len(group.folds) == 5 and {f.leaf.split("/")[-2] for f in group.folds} == {"attn_norm", "mlp_norm", "norm"}
    assert turn(model, group, orthogonal(32)) < 1e-4
    assert {"embed/embedding", "lm_head/kernel"} <= set(group.leaves)


def test_nothing_in_it_can_be_left_out():
    model = case("llama")
    group = stream(model)
    matrix = orthogonal(32)
    new = folded(group, model.read)
    for n in range(len(group.touches)):
        part = dataclasses.replace(group, touches=group.touches[:n] + group.touches[n + 1 :])
        some = new | rotated(part, matrix, overlaid(new, model.read))
        assert distance(model(written(model.params, some)), model.want) > 1e-3
    unfolded = rotated(group, matrix, model.read)
    assert distance(model(written(model.params, unfolded)), model.want) > 1e-3


def test_a_layer_norm_asks_for_the_vector_of_ones():
    model = case("vit")
    group = stream(model)
    assert "layers/0/attn_norm/layer_norm" in group.keeps_ones
    assert turn(model, group, keeping_ones(orthogonal(31))) < 1e-4
    with pytest.raises(QjaxError, match="leave the vector of ones as it is, because of layers/0/attn_norm"):
        rotated(group, orthogonal(32), model.read)
    loose = dataclasses.replace(group, keeps_ones=())
    assert turn(model, loose, orthogonal(32)) > 1e-3


@pytest.mark.parametrize("name", ["tied", "gpt2"])
def test_a_tied_table_has_to_be_stored_twice(name):
    model = case(name)
    group = stream(model)
    assert group.untie == ("embed/embedding",)
    with pytest.raises(QjaxError, match="norm/scale cannot be folded into its readers: embed/embedding is read"):
        folded(group, model.read)


def test_a_scale_of_equal_numbers_is_in_nobodys_way():
    """With the last scale even, a tied table is rotated once for both of its readers."""
    base = case("tied")
    params = written(base.params, {("norm/scale", ()): np.full(32, 1.5, np.float32)})
    model = Case(base.fn, base.params, base.args)
    model.params, model.want = params, model(params)
    assert turn(model, stream(model), orthogonal(32)) < 1e-4


def test_post_norm_is_refused():
    said = stream_group(case("bert").program)
    assert isinstance(said, Refusal) and said.kind in ("result", "equation")


@pytest.mark.parametrize("name", ["llama", "tied", "bert", "vit"])
def test_values_within_heads(name):
    """Between values and the output projection each head can have a rotation of its own."""
    model = case(name)
    group = channel_group(model.program, "layers/0/attn/o_proj/kernel", "rotate")
    assert isinstance(group, ChannelGroup) and not group.folds and not group.keeps_ones
    heads = group.size // 8
    assert np.array_equal(group.blocks, np.repeat(np.arange(heads), 8))
    full = np.zeros((group.size, group.size))
    for h in range(heads):
        full[h * 8 : h * 8 + 8, h * 8 : h * 8 + 8] = orthogonal(8, h)
    for matrix in (full, orthogonal(8)):
        new = rotated(group, matrix, model.read)
        assert distance(model(written(model.params, new)), model.want) < 1e-4
    with pytest.raises(QjaxError, match="mixes channels of different blocks"):
        rotated(group, orthogonal(group.size), model.read)


def test_activations_stop_rotations():
    assert "gelu" in refused(case("gpt2"), "layers/0/mlp/down/kernel", "rotate")
    assert "relu" in refused(case("opt"), "layers/0/mlp/down/kernel", "rotate")
    refused(case("llama"), "layers/0/mlp/down/kernel", "rotate")
    refused(case("llama"), "layers/0/attn/k_proj/kernel", "rotate", of="output")
    group = channel_group(case("opt").program, "layers/0/attn/k_proj/kernel", "rotate", of="output")
    assert isinstance(group, ChannelGroup)  # without rotary positions


def test_bad_matrices():
    model = case("llama")
    group = stream(model)
    with pytest.raises(QjaxError, match="a matrix of 32 x 32 is needed .blocks of .32. channels., not .31, 31."):
        rotated(group, orthogonal(31), model.read)
    with pytest.raises(QjaxError, match="not orthogonal"):
        rotated(group, np.ones((32, 32)), model.read)
    scale = channel_group(model.program, "layers/0/mlp/down/kernel")
    assert isinstance(scale, ChannelGroup)
    with pytest.raises(QjaxError, match="kind 'rotate' is needed, not 'scale'"):
        rotated(scale, orthogonal(48), model.read)


def test_a_zero_in_a_scale():
    """Its channel is lost to the readers; a bias there has nowhere to go."""
    base = case("llama")
    scale = np.array(base.read("layers/0/attn_norm/scale", ()))
    scale[3] = 0
    model = Case(base.fn, base.params, base.args)
    model.params = written(base.params, {("layers/0/attn_norm/scale", ()): scale})
    model.want = model(model.params)
    assert turn(model, stream(model), orthogonal(32)) < 1e-4
    other = case("vit")
    holed = overlaid({("layers/0/attn_norm/scale", ()): scale}, other.read)
    with pytest.raises(QjaxError, match="layers/0/attn_norm/scale has a zero where layers/0/attn_norm/bias has none"):
        folded(stream(other), holed)


@pytest.mark.parametrize("size", [2, 3, 16])
def test_keeping_ones(size):
    matrix = keeping_ones(orthogonal(size - 1))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-12)
    np.testing.assert_allclose(np.ones(size) @ matrix, np.ones(size), atol=1e-12)
    if size > 2:
        assert np.abs(matrix - np.eye(size)).max() > 0.1

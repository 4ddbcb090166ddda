"""Channel groups of the models that come with qjax: changing them leaves the function as it is."""

from __future__ import annotations

import numpy as np
import pytest
from gauge_models import case
from gauges import change, check, distance, refused, touched, written

from qjax.analysis.channels import ChannelGroup, Refusal, channel_group, permuted, scaled
from qjax.errors import QjaxError


def test_what_follows_a_norm():
    group = check(case("llama"), "layers/0/attn/q_proj/kernel")
    readers = {(f"layers/0/attn/{n}_proj/kernel", (0,), -1) for n in "qkv"}
    assert touched(group) == readers | {("layers/0/attn_norm/scale", (0,), 1)}
    assert group.size == 32 and np.array_equal(group.channels, np.arange(32))
    assert set(group.sites) == {f"layers/0/attn/{n}_proj/kernel" for n in "qkv"} and not group.divided
    assert touched(check(case("llama"), "layers/0/mlp/up/kernel")) == {
        ("layers/0/mlp_norm/scale", (0,), 1),
        ("layers/0/mlp/gate/kernel", (0,), -1),
        ("layers/0/mlp/up/kernel", (0,), -1),
    }
    assert touched(check(case("llama"), "lm_head/kernel")) == {("norm/scale", (0,), 1), ("lm_head/kernel", (0,), -1)}


def test_values_are_tied_over_the_heads_that_share_them():
    group = check(case("llama"), "layers/0/attn/o_proj/kernel")
    assert touched(group) == {("layers/0/attn/v_proj/kernel", (1,), 1), ("layers/0/attn/o_proj/kernel", (0,), -1)}
    heads = group.channels.reshape(2, 2, 8)  # two heads for each of the two keys
    assert group.size == 16 and np.array_equal(heads[:, 0], heads[:, 1])


def test_up_carries_the_factors_of_a_gated_mlp():
    group = check(case("llama"), "layers/0/mlp/down/kernel")
    assert touched(group) == {("layers/0/mlp/up/kernel", (1,), 1), ("layers/0/mlp/down/kernel", (0,), -1)}
    said = refused(case("llama"), "layers/0/mlp/gate/kernel", of="output")
    assert "layers/0/mlp/gate/kernel/silu" in said


def test_keys_and_queries_behind_rotary_positions():
    group = check(case("tied"), "layers/1/attn/k_proj/kernel", of="output")
    assert touched(group) == {
        ("layers/1/attn/k_proj/kernel", (1,), 1),
        ("layers/1/attn/k_proj/bias", (0,), 1),
        ("layers/1/attn/q_proj/kernel", (1,), -1),
        ("layers/1/attn/q_proj/bias", (0,), -1),
    }
    halves = group.channels.reshape(2, 2, 4)
    assert group.size == 8 and np.array_equal(halves[:, 0], halves[:, 1])
    without = check(case("opt"), "layers/1/attn/k_proj/kernel", of="output")
    assert without.size == 32  # no rotary positions: each channel by itself
    said = refused(case("qk-norm"), "layers/0/attn/k_proj/kernel", of="output")
    assert "layers/0/attn/k_norm/scale/rms_norm" in said


@pytest.mark.parametrize("site", ["attn/o_proj", "mlp/down"])
def test_a_wrong_tie_changes_the_function(site):
    """Factors of their own for what is tied, or for one more leaf, are seen."""
    model = case("llama")
    group = channel_group(model.program, f"layers/0/{site}/kernel")
    assert isinstance(group, ChannelGroup)
    new = change(group, model.read)
    place = ("layers/0/attn/v_proj/kernel" if "attn" in site else "layers/0/mlp/gate/kernel", ())
    by = np.exp(np.random.default_rng(1).standard_normal(new.get(place, model.read(*place)).shape[1]))
    new[place] = new.get(place, model.read(*place)) * by.astype(np.float32)
    assert distance(model(written(model.params, new)), model.want) > 1e-3


@pytest.mark.parametrize("name", ["gpt2", "vit", "bert"])
def test_gelu_lets_no_factor_through(name):
    said = refused(case(name), "layers/0/mlp/down/kernel")
    assert said.startswith("layers/0/mlp/down/kernel: its input passes through layers/0/mlp/up/kernel/gelu (")


def test_relu_lets_positive_factors_through():
    group = check(case("opt"), "layers/0/mlp/down/kernel")
    assert touched(group) == {
        ("layers/0/mlp/up/kernel", (1,), 1),
        ("layers/0/mlp/up/bias", (0,), 1),
        ("layers/0/mlp/down/kernel", (0,), -1),
    }


def test_part_of_a_fused_leaf():
    group = check(case("gpt2"), "layers/0/attn/o_proj/kernel")
    fused = next(t for t in group.touches if t.leaf == "layers/0/attn/qkv/kernel")
    assert fused.axes == (1,) and np.array_equal(fused.index[0], [-1] * 64 + list(range(32)))
    everything = check(case("gpt2"), "layers/0/attn/qkv/kernel", of="output")
    assert everything.size == 64  # queries and keys have theirs in common
    assert touched(check(case("gpt2"), "layers/0/attn/qkv/kernel")) == {
        ("layers/0/attn/qkv/kernel", (0,), -1),
        ("layers/0/attn_norm/scale", (0,), 1),
        ("layers/0/attn_norm/bias", (0,), 1),
    }


def test_stacked_layers_are_touched_slice_by_slice():
    group = check(case("scanned"), "layers/1/attn/q_proj/kernel")
    readers = {(f"layers/attn/{n}_proj/kernel[0:1]", (1,), -1) for n in "qkv"}
    assert touched(group) == readers | {("layers/attn_norm/scale[0:1]", (1,), 1)}
    check(case("scanned"), "layers/0/mlp/down/kernel")
    check(case("scanned"), "layers/1/attn/o_proj/kernel")
    check(case("scanned"), "layers/1/attn/k_proj/kernel", of="output")


def test_experts_and_router_read_one_norm():
    group = check(case("moe"), "layers/0/mlp/experts/up/kernel")
    mlp = "layers/0/mlp"
    assert touched(group) == {
        ("layers/0/mlp_norm/scale", (0,), 1),
        (f"{mlp}/router/kernel", (0,), -1),
        (f"{mlp}/experts/gate/kernel", (1,), -1),
        (f"{mlp}/experts/up/kernel", (1,), -1),
        (f"{mlp}/shared/gate/kernel", (0,), -1),
        (f"{mlp}/shared/up/kernel", (0,), -1),
        (f"{mlp}/shared_gate/kernel", (0,), -1),
    }
    inside = check(case("moe"), "layers/1/mlp/experts/down/kernel")
    assert touched(inside) == {
        ("layers/1/mlp/experts/up/kernel", (2,), 1),
        ("layers/1/mlp/experts/down/kernel", (1,), -1),
    }
    assert "softmax" in refused(case("moe"), "layers/0/mlp/router/kernel", of="output")


def test_a_norm_behind_the_residual_sum_is_read_by_the_next_one():
    """BERT: what the norm gives is read by q, k, v and added to what comes after them, which the next norm reads."""
    assert "layers/0/attn_norm" in refused(case("bert"), "layers/0/attn/q_proj/kernel")
    check(case("bert"), "layers/0/attn/o_proj/kernel")


def test_convolutions():
    group = check(case("resnet"), "stage1/0/conv2/kernel")
    assert touched(group) == {
        ("stage1/0/conv1/kernel", (3,), 1),
        ("stage1/0/bn1/mean", (0,), 1),
        ("stage1/0/bn1/bias", (0,), 1),
        ("stage1/0/conv2/kernel", (2,), -1),
    }
    assert np.array_equal(group.channels.reshape(9, -1)[0], group.channels.reshape(9, -1)[8])  # K is H, W, I
    assert "argument" in refused(case("resnet"), "conv1/kernel")
    assert "result" in refused(case("resnet"), "linear/kernel", of="output")


@pytest.mark.parametrize(
    ("name", "site", "blocks"),
    [
        ("llama", "layers/0/mlp/down/kernel", [48]),
        ("llama", "layers/0/attn/o_proj/kernel", [8, 8]),
        ("llama", "layers/0/attn/q_proj/kernel", [32]),
        ("scanned", "layers/1/attn/o_proj/kernel", [8, 8]),
        ("scanned", "layers/1/mlp/up/kernel", [32]),
        ("tied", "layers/0/attn/q_proj/kernel", [32]),
        ("gpt2", "layers/0/mlp/down/kernel", [48]),
        ("gpt2", "layers/0/attn/o_proj/kernel", [8, 8, 8, 8]),
        ("gpt2", "layers/1/attn/qkv/kernel", [32]),
        ("opt", "layers/1/mlp/down/kernel", [48]),
        ("vit", "layers/1/attn/q_proj/kernel", [32]),
        ("vit", "layers/1/mlp/down/kernel", [48]),
        ("bert", "layers/1/attn/o_proj/kernel", [8, 8, 8, 8]),
        ("moe", "layers/0/mlp/experts/down/kernel", [24]),
        ("moe", "layers/0/mlp/experts/up/kernel", [32]),
        ("resnet", "stage1/0/conv2/kernel", [4]),
    ],
)
def test_orders(name, site, blocks):
    group = check(case(name), site, "permute")
    assert np.bincount(group.blocks).tolist() == blocks


def test_a_permutation_across_heads_is_refused():
    model = case("llama")
    group = channel_group(model.program, "layers/0/attn/o_proj/kernel", "permute")
    assert isinstance(group, ChannelGroup)
    order = np.arange(16)
    order[[0, 8]] = 8, 0
    with pytest.raises(QjaxError, match=r"channel 8 \(block 1\) cannot move to place 0 \(block 0\)"):
        permuted(group, order, model.read)
    loose = ChannelGroup(**{**group.__dict__, "blocks": np.zeros(16, np.int32)})
    assert distance(model(written(model.params, permuted(loose, order, model.read))), model.want) > 1e-3


def test_rotary_positions_fix_the_order_of_keys():
    said = refused(case("llama"), "layers/0/attn/k_proj/kernel", "permute", of="output")
    assert "no two channels of its output may change places" in said
    check(case("opt"), "layers/0/attn/k_proj/kernel", "permute", of="output")


def test_bad_requests():
    program = case("llama").program
    with pytest.raises(QjaxError, match="no site is named 'layers/0/mlp/dwn/kernel' .did you mean"):
        channel_group(program, "layers/0/mlp/dwn/kernel")
    with pytest.raises(QjaxError, match="without a weight of its own"):
        channel_group(program, next(s.name for s in program.sites if s.op == "softmax"))
    group = channel_group(program, "layers/0/mlp/down/kernel")
    assert isinstance(group, ChannelGroup)
    with pytest.raises(QjaxError, match="48 factors for a group of kind 'scale' are needed, not \\[47\\]"):
        scaled(group, np.ones(47), case("llama").read)
    with pytest.raises(QjaxError, match="kind 'permute'"):
        permuted(group, np.arange(48), case("llama").read)


def test_every_site_has_an_answer():
    for name in ("llama", "gpt2", "moe", "resnet"):
        program = case(name).program
        for site in case(name).linear:
            for kind in ("scale", "permute"):
                found = channel_group(program, site, kind)
                assert isinstance(found, ChannelGroup) or (
                    isinstance(found, Refusal) and "not followed" not in str(found)
                )

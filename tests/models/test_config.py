"""Reading config.json: both dialects of transformers, defaults of the families, refusals."""

from __future__ import annotations

import pytest

from qjax.errors import ModelError
from qjax.models import LlamaConfig, RopeScaling, SwinConfig, VitConfig

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def test_both_dialects_of_rope():
    spec = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    old = LlamaConfig.from_hf({**BASE, "rope_theta": 5e5, "rope_scaling": spec})
    older = LlamaConfig.from_hf({**BASE, "rope_theta": 5e5, "rope_scaling": {**spec, "type": spec["rope_type"]}})
    new = LlamaConfig.from_hf({**BASE, "rope_parameters": {**spec, "rope_theta": 5e5}})
    assert old == older == new
    assert new.rope_theta == 5e5 and new.rope_scaling.kind == "llama3"


def test_defaults():
    config = LlamaConfig.from_hf(BASE)
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (4, 16, 10000.0)
    assert config.rope_scaling == RopeScaling()
    assert hash(config) == hash(LlamaConfig.from_hf(BASE))


def test_families_differ():
    def of(name, **more):
        return LlamaConfig.from_hf({**BASE, "architectures": [name], **more})

    assert of("Qwen2ForCausalLM").qkv_bias and not of("Qwen2ForCausalLM").o_bias
    assert of("Qwen3ForCausalLM").qk_norm and of("Qwen3ForCausalLM").head_dim == 128
    assert of("MistralForCausalLM", num_key_value_heads=2).windows == (4096,) * 3
    assert of("MistralForCausalLM", num_key_value_heads=2, sliding_window=None).windows == ()
    assert of("Qwen2ForCausalLM", sliding_window=8).windows == ()
    half = of("Qwen2ForCausalLM", sliding_window=8, use_sliding_window=True, max_window_layers=2)
    assert half.windows == (None, None, 8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"rope_type": "yarm", "factor": 2.0}}, "did you mean 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.0}}, "positive"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 7}, "even"),
        ({"hidden_act": "silo"}, "did you mean 'silu'"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"architectures": ["LlamaForCausalLMs"]}, "did you mean 'LlamaForCausalLM'"),
    ],
)
def test_refusals(change, words):
    with pytest.raises(ModelError, match=words):
        LlamaConfig.from_hf({**BASE, **change})


def test_vit_refusals():
    base = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    assert VitConfig.from_hf(base).num_labels == 2
    with pytest.raises(ModelError, match="num_attention_heads"):
        VitConfig.from_hf({**base, "num_attention_heads": 3})
    with pytest.raises(ModelError, match="hidden_size"):
        VitConfig.from_hf({"architectures": ["ViTForImageClassification"]})
    with pytest.raises(ModelError, match="hidden_act"):
        VitConfig.from_hf({**base, "hidden_act": "swoosh"})


def test_swin_refusals():
    base = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "image_size": 32}
    assert SwinConfig.from_hf(base).grids == [(8, 8), (4, 4)]
    for change, words in (
        ({"num_heads": [2]}, "one number for each stage"),
        ({"num_heads": [3, 4]}, "not a multiple of its 3 heads"),
        ({"hidden_act": "swoosh"}, "hidden_act"),
        ({"image_size": 28}, "stage 1 has 4 by 4 tokens, fewer than a window of 5"),
        ({"depths": None}, "lacks depths"),
    ):
        with pytest.raises(ModelError, match=words):
            SwinConfig.from_hf({**base, **({"window_size": 5} if "image_size" in change else {}), **change})

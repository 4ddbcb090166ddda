"""Logits against transformers with torch on random configurations, through a folder that transformers wrote."""

from __future__ import annotations

import importlib
import warnings

import jax
import numpy as np
import pytest

from qjax import models

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

SIZES = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # logits far from zero, attention far from uniform
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
ROPE = {
    "linear": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 500.0,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0},
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 300.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
        "truncate": False,
        "beta_fast": 4.0,
        "beta_slow": 0.5,
    },
}
QWEN_MOE = {
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 28,
}
DECODERS = {
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "llama-gqa-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-head-dim": ("Llama", {"head_dim": 16, "num_key_value_heads": 1}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "llama-linear": ("Llama", {"rope_parameters": ROPE["linear"]}),
    "llama-dynamic": ("Llama", {"rope_parameters": ROPE["dynamic"], "max_position_embeddings": 16}),
    "llama3": ("Llama", {"rope_parameters": ROPE["llama3"]}),
    "llama-yarn": ("Llama", {"rope_parameters": ROPE["yarn"]}),
    "llama-yarn-mscale": ("Llama", {"rope_parameters": ROPE["yarn-mscale"]}),
    "mistral": ("Mistral", {"sliding_window": 7, "head_dim": 12}),
    "mistral-no-window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-bias": ("Qwen3", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral-window": ("Mixtral", {"num_local_experts": 3, "sliding_window": 6, "tie_word_embeddings": True}),
    "qwen2-moe": ("Qwen2Moe", QWEN_MOE),
    "qwen2-moe-dense": ("Qwen2Moe", {**QWEN_MOE, "decoder_sparse_step": 2, "norm_topk_prob": True, "qkv_bias": False}),
    "qwen2-moe-windows": ("Qwen2Moe", {**QWEN_MOE, "use_sliding_window": True, "sliding_window": 5}),
    "qwen3-moe": ("Qwen3Moe", {**QWEN_MOE, "norm_topk_prob": True, "head_dim": 16}),
    "qwen3-moe-dense": ("Qwen3Moe", {**QWEN_MOE, "mlp_only_layers": [0], "attention_bias": True}),
    "qwen3-moe-window": ("Qwen3Moe", {**QWEN_MOE, "use_sliding_window": True, "sliding_window": 5}),
}


def write(transformers, family, suffix, settings, folder):
    """A randomly initialised torch model, biases and norms included, saved into ``folder``."""
    torch = importlib.import_module("torch")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(transformers, f"{family.removesuffix('LMHead')}Config")(**settings)
        config._attn_implementation = "eager"
        model = getattr(transformers, f"{family}{suffix}")(config).eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith(".gate.weight"):  # transformers starts some routers at zero
                    p.copy_(torch.randn_like(p))
                elif p.ndim == 1:
                    p.copy_(torch.randn_like(p) * 0.3 + (1.0 if "norm" in name and "weight" in name else 0.0))
                elif "token" in name and "embed_tokens" not in name:
                    p.copy_(torch.randn_like(p) * 0.3)
        model.save_pretrained(folder)
    return torch, model


def close(ours, theirs, relative=1e-4):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= relative * np.abs(theirs).max()
    assert np.abs(theirs).max() > 0.1, "logits near zero would prove nothing"


@pytest.mark.every(6)
@pytest.mark.parametrize("case", DECODERS)
def test_decoder(case, tmp_path, transformers):
    family, settings = DECODERS[case]
    torch, model = write(transformers, family, "ForCausalLM", {**SIZES, **settings}, tmp_path)
    tokens = np.random.default_rng(1).integers(0, 67, (2, 24))
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)).logits.numpy()
    fn, params, config = models.load(tmp_path)
    close(jax.jit(fn)(params, tokens), theirs)
    assert type(config).from_hf(config.to_hf()) == config


def test_greedy_text_is_the_same(tmp_path, transformers):
    torch, model = write(transformers, "Qwen3", "ForCausalLM", {**SIZES, "head_dim": 16}, tmp_path)
    prompt = [[5, 6, 7]]
    theirs = model.generate(torch.tensor(prompt), max_new_tokens=12, do_sample=False, eos_token_id=None)
    fn, params, _ = models.load(tmp_path)
    np.testing.assert_array_equal(fn.generate(params, prompt, 12), theirs.numpy())


GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 67, "initializer_range": 0.3}
OPT = {
    "hidden_size": 32,
    "ffn_dim": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "vocab_size": 67,
    "init_std": 0.3,
}
LEARNED_POSITIONS = {
    "gpt2": ("GPT2LMHead", "Model", GPT2),
    "gpt2-untied": ("GPT2LMHead", "Model", {**GPT2, "n_inner": 40, "tie_word_embeddings": False, "n_head": 2}),
    "gpt2-unscaled": ("GPT2LMHead", "Model", {**GPT2, "scale_attn_weights": False, "activation_function": "relu"}),
    "opt": ("OPT", "ForCausalLM", OPT),
    "opt-norm-after": ("OPT", "ForCausalLM", {**OPT, "do_layer_norm_before": False, "tie_word_embeddings": False}),
    "opt-bare": ("OPT", "ForCausalLM", {**OPT, "enable_bias": False, "layer_norm_elementwise_affine": False}),
}


@pytest.mark.slow
@pytest.mark.every(3)
@pytest.mark.parametrize("case", LEARNED_POSITIONS)
def test_decoder_with_learned_positions(case, tmp_path, transformers):
    family, suffix, settings = LEARNED_POSITIONS[case]
    torch, model = write(transformers, family, suffix, settings, tmp_path)
    tokens = np.random.default_rng(1).integers(3, 67, (2, 24))  # 1 is the padding of OPT
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)).logits.numpy()
    fn, params, _ = models.load(tmp_path)
    close(jax.jit(fn)(params, tokens), theirs)
    logits, cache = fn.prefill(params, tokens[:, :20], fn.init_cache(2, 24))
    close(logits, theirs[:, :20])
    scanned, stacked, _ = models.load(tmp_path, scan_layers=True)
    close(scanned(stacked, tokens), theirs)
    for position in range(20, 24):
        logits, cache = fn.decode_step(params, tokens[:, position], cache)
        close(logits, theirs[:, position])


CLASSIFIERS = {
    "vit": ("ViT", "ForImageClassification", {}),
    "vit-no-bias": ("ViT", "ForImageClassification", {"qkv_bias": False, "image_size": [16, 24]}),
    "deit": ("DeiT", "ForImageClassification", {"hidden_act": "gelu_pytorch_tanh"}),
    "deit-teacher": ("DeiT", "ForImageClassificationWithTeacher", {"patch_size": 6}),
}


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_classifier(case, tmp_path, transformers):
    family, suffix, settings = CLASSIFIERS[case]
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
    sizes |= {"image_size": 16, "patch_size": 8, "num_labels": 5, "initializer_range": 0.3}
    torch, model = write(transformers, family, suffix, {**sizes, **settings}, tmp_path)
    fn, params, config = models.load(tmp_path)
    pixels = np.random.default_rng(2).normal(size=(3, *config.image_size, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2))).logits.numpy()
    close(jax.jit(fn)(params, pixels), theirs)


SWINS = {
    "swin": {},
    "swin-odd": {"image_size": [50, 59], "depths": [1, 2, 1], "num_heads": [1, 2, 4], "qkv_bias": False},
    "swin-positions": {"use_absolute_embeddings": True, "hidden_act": "gelu_pytorch_tanh", "window_size": 4},
}


@pytest.mark.parametrize("case", SWINS)
def test_classifier_in_windows(case, tmp_path, transformers):
    sizes = {"embed_dim": 12, "depths": [2, 2], "num_heads": [2, 3], "window_size": 3, "image_size": 32}
    sizes |= {"patch_size": 4, "num_labels": 5, "initializer_range": 0.3}
    torch, model = write(transformers, "Swin", "ForImageClassification", {**sizes, **SWINS[case]}, tmp_path)
    with torch.no_grad():  # they begin as zeros
        for name, value in model.named_parameters():
            if "relative_position_bias_table" in name:
                value.normal_()
    model.save_pretrained(tmp_path)
    fn, params, config = models.load(tmp_path)
    pixels = np.random.default_rng(2).normal(size=(3, *config.image_size, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2))).logits.numpy()
    close(jax.jit(fn)(params, pixels), theirs)


def test_registry_names_exist_in_transformers(transformers):
    for name in models.hf.REGISTRY.keys() - {"CifarResNet"}:  # which is no model of transformers
        assert hasattr(transformers, name), name

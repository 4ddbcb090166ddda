"""Small models of the families in qjax.models, as cases for analysing channels."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gauges import Case

from qjax.models import LanguageModel, LlamaConfig, MoeConfig, VitConfig, stack_layers
from qjax.models.bert import BertConfig, TextEncoder
from qjax.models.gpt2 import Gpt2Config
from qjax.models.opt import OptConfig
from qjax.models.resnet import CifarClassifier, CifarResNetConfig
from qjax.models.vit import ImageClassifier

SIZES = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
LLAMA = dict(SIZES, num_key_value_heads=2, head_dim=8, max_position_embeddings=64)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 9)), jnp.int32)
IMAGES = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 3)), jnp.float32)


def drawn(fn: Any) -> Any:
    """Random parameters of a model, in a fraction of the time that its own initialization takes."""
    rng = np.random.default_rng(1)

    def draw(path: Any, leaf: Any) -> jax.Array:
        if leaf.ndim > 1:
            values = rng.standard_normal(leaf.shape) / np.prod(leaf.shape[:-1]) ** 0.5
        elif path[-1].key in ("scale", "var"):
            values = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            values = 0.6 * rng.standard_normal(leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, fn.abstract_params())


@functools.lru_cache
def case(name: str) -> Case:
    """A traced model."""
    if name in ("vit", "resnet"):
        if name == "vit":
            fn = ImageClassifier(VitConfig(32, 48, 2, 4, (8, 8), (4, 4), 3, 5))
        else:
            fn = CifarClassifier(CifarResNetConfig(1, (4, 8, 8), 5, (8, 8)))
        return Case(fn, drawn(fn), (IMAGES,))
    if name == "bert":
        encoder = TextEncoder(BertConfig(**SIZES, max_position_embeddings=16))
        return Case(encoder, drawn(encoder), (TOKENS,))
    config = {
        "llama": lambda: LlamaConfig(**LLAMA),
        "scanned": lambda: LlamaConfig(**LLAMA),
        "tied": lambda: LlamaConfig(**LLAMA, tie_word_embeddings=True, qkv_bias=True),
        "qk-norm": lambda: LlamaConfig(**LLAMA, qk_norm=True),
        "gpt2": lambda: Gpt2Config(**SIZES, max_position_embeddings=16),
        "opt": lambda: OptConfig(**SIZES, max_position_embeddings=16),
        "moe": lambda: MoeConfig(
            **LLAMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, shared_intermediate_size=16
        ),
    }[name]()
    if name == "scanned":
        fn = LanguageModel(config, scan_layers=True)
        return Case(fn, stack_layers(drawn(LanguageModel(config))), (TOKENS,))
    fn = LanguageModel(config)
    return Case(fn, drawn(fn), (TOKENS,))


NAMES = ("llama", "scanned", "tied", "qk-norm", "gpt2", "opt", "moe", "vit", "bert", "resnet")

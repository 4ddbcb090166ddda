"""OPT in Flax NNX: learned positions that begin at 2, ReLU, LayerNorm before (350M: after) attention and MLP."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from qjax.errors import ModelError
from qjax.models.activations import ACTIVATIONS
from qjax.models.decoder import Decoder, Embed, attention, check_sizes, linear, positions_of
from qjax.models.family import Family
from qjax.models.language import LanguageModel

ARCHITECTURE = "OPTForCausalLM"
OFFSET = 2
"""Rows of the table of positions that stand before that of the first token; none is ever read."""


@dataclasses.dataclass(frozen=True)
class OptConfig:
    """Sizes and switches of an OPT; names are those of the other decoders, ``config.json`` has some of its own.

    Attributes:
        vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: sizes.
        max_position_embeddings: most tokens; positions are learned, so that there are no more.
        do_layer_norm_before: norms stand before attention and MLP, and one behind the last layer; else after each.
        bias: whether linears have a bias.
        norm_affine: whether norms have a scale and a bias.
        tie_word_embeddings: the output projection is the embedding, transposed.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 2048
    hidden_act: str = "relu"
    do_layer_norm_before: bool = True
    bias: bool = True
    norm_affine: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    architecture: str = ARCHITECTURE

    def __post_init__(self) -> None:
        check_sizes(self)

    @property
    def num_key_value_heads(self) -> int:
        """Every head has its own keys and values."""
        return self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Every layer sees all positions."""
        return ()

    @property
    def decoder(self) -> type[Decoder]:
        """The Flax NNX module that it configures."""
        return Opt

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> OptConfig:
        """Read a parsed ``config.json``.

        Raises:
            ModelError: sizes are missing or contradict each other, or embeddings of another size than the layers.
        """
        given = {k: v for k, v in config.items() if v is not None}
        needed = ("vocab_size", "hidden_size", "ffn_dim", "num_hidden_layers", "num_attention_heads")
        missing = [k for k in needed if not isinstance(given.get(k), int)]
        if missing:
            raise ModelError(
                f"config.json of a {ARCHITECTURE} lacks {', '.join(missing)}; take the one of the checkpoint."
            )
        projected = given.get("word_embed_proj_dim", given["hidden_size"])
        if projected != given["hidden_size"]:
            raise ModelError(
                f"word_embed_proj_dim is {projected} and hidden_size is {given['hidden_size']}, but only OPT models "
                "with equal ones are supported (all but opt-350m)."
            )
        eos = given.get("eos_token_id")
        return cls(
            vocab_size=given["vocab_size"],
            hidden_size=given["hidden_size"],
            intermediate_size=given["ffn_dim"],
            num_hidden_layers=given["num_hidden_layers"],
            num_attention_heads=given["num_attention_heads"],
            max_position_embeddings=given.get("max_position_embeddings", 2048),
            hidden_act=given.get("activation_function", "relu"),
            do_layer_norm_before=bool(given.get("do_layer_norm_before", True)),
            bias=bool(given.get("enable_bias", True)),
            norm_affine=bool(given.get("layer_norm_elementwise_affine", True)),
            tie_word_embeddings=bool(given.get("tie_word_embeddings", True)),
            bos_token_id=given.get("bos_token_id"),
            eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
        )


def _norm(config: OptConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    affine = config.norm_affine
    return nnx.LayerNorm(
        config.hidden_size, epsilon=1e-5, use_scale=affine, use_bias=affine, use_fast_variance=False, rngs=rngs
    )


class Attention(nnx.Module):
    """Causal attention."""

    def __init__(self, config: OptConfig, dot_general: Callable, rngs: nnx.Rngs) -> None:
        size, bias = config.hidden_size, config.bias
        self.q_proj = linear(size, size, bias, dot_general, rngs)
        self.k_proj = linear(size, size, bias, dot_general, rngs)
        self.v_proj = linear(size, size, bias, dot_general, rngs)
        gain = 1 / (2 * max(config.num_hidden_layers, 1))
        self.o_proj = linear(size, size, bias, dot_general, rngs, gain)
        self.head_dim = config.head_dim

    def __call__(self, x: jax.Array, mask: jax.Array | None, store: Any = None) -> jax.Array:
        """X [B, T, hidden] to the same shape; ``mask`` and ``store`` as a :class:`Decoder`'s layers have them."""
        heads = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = self.q_proj(x).reshape(heads), self.k_proj(x).reshape(heads), self.v_proj(x).reshape(heads)
        return self.o_proj(attention(q, k, v, mask, store).reshape(x.shape))


class MLP(nnx.Module):
    """``down(act(up(x)))``."""

    def __init__(self, config: OptConfig, dot_general: Callable, rngs: nnx.Rngs) -> None:
        self.up = linear(config.hidden_size, config.intermediate_size, config.bias, dot_general, rngs)
        gain = 1 / (2 * max(config.num_hidden_layers, 1))
        self.down = linear(config.intermediate_size, config.hidden_size, config.bias, dot_general, rngs, gain)
        self.act = ACTIVATIONS[config.hidden_act]

    def __call__(self, x: jax.Array) -> jax.Array:
        """X [..., hidden] to the same shape."""
        return self.down(self.act(self.up(x)))


class Layer(nnx.Module):
    """Attention and MLP beside the residual stream, with a LayerNorm before each or on each sum."""

    def __init__(self, config: OptConfig, dot_general: Callable, rngs: nnx.Rngs) -> None:
        self.attn_norm = _norm(config, rngs)
        self.attn = Attention(config, dot_general, rngs)
        self.mlp_norm = _norm(config, rngs)
        self.mlp = MLP(config, dot_general, rngs)
        self.before = config.do_layer_norm_before

    def __call__(self, x: jax.Array, mask: jax.Array | None, store: Any = None) -> jax.Array:
        """Arguments as :class:`Attention`'s."""
        if self.before:
            x = x + self.attn(self.attn_norm(x), mask, store)
            return x + self.mlp(self.mlp_norm(x))
        x = self.attn_norm(x + self.attn(x, mask, store))
        return self.mlp_norm(x + self.mlp(x))


class Opt(Decoder):
    """An OPT; arguments as :class:`~qjax.models.decoder.Decoder`'s."""

    def __init__(
        self,
        config: OptConfig,
        *,
        scan_layers: bool = False,
        dot_general: Callable = jax.lax.dot_general,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        self.dot_general = dot_general
        self.embed = Embed(config.vocab_size, config.hidden_size, rngs)
        self.position = Embed(config.max_position_embeddings + OFFSET, config.hidden_size, rngs)
        self._set_layers([Layer(config, dot_general, rngs) for _ in range(config.num_hidden_layers)], scan_layers)
        if config.do_layer_norm_before:
            self.norm = _norm(config, rngs)
        if not config.tie_word_embeddings:
            self.lm_head = linear(config.hidden_size, config.vocab_size, False, dot_general, rngs)

    def _begin(self, tokens: jax.Array, positions: jax.Array, length: Any) -> tuple[jax.Array, tuple]:
        longest = self.config.max_position_embeddings
        return self.embed(tokens) + positions_of(self.position, positions, longest, OFFSET), ()

    def _end(self, x: jax.Array) -> jax.Array:
        if self.config.do_layer_norm_before:
            x = self.norm(x)
        return self._tied_logits(x, self.embed) if self.config.tie_word_embeddings else self.lm_head(x)


def names(config: OptConfig) -> dict[str, tuple[str, ...]]:
    """Our names to those of checkpoints; the first published ones have no ``model.`` in front."""
    table = {
        "embed": "decoder.embed_tokens",
        "position": "decoder.embed_positions",
        "norm": "decoder.final_layer_norm",
        "layers/*/attn_norm": "decoder.layers.{0}.self_attn_layer_norm",
        "layers/*/attn/o_proj": "decoder.layers.{0}.self_attn.out_proj",
        "layers/*/attn": "decoder.layers.{0}.self_attn",
        "layers/*/mlp_norm": "decoder.layers.{0}.final_layer_norm",
        "layers/*/mlp/up": "decoder.layers.{0}.fc1",
        "layers/*/mlp/down": "decoder.layers.{0}.fc2",
    }
    return {ours: (f"model.{theirs}", theirs) for ours, theirs in table.items()} | {"lm_head": ("lm_head",)}


FAMILY = Family(architectures={ARCHITECTURE: "opt"}, config=OptConfig.from_hf, function=LanguageModel, names=names)

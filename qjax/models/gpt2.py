"""GPT-2 in Flax NNX: learned positions, LayerNorm before attention and MLP, one linear for q, k and v.

Checkpoints keep its linears as [in, out], as ours are, and the linear of q, k and v is one tensor, which is read as
one: ``layers/3/attn/qkv/kernel`` [hidden, 3 * hidden].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.errors import ModelError
from qjax.models.activations import ACTIVATIONS
from qjax.models.decoder import Decoder, Embed, attention, check_sizes, linear, positions_of
from qjax.models.family import Family
from qjax.models.language import LanguageModel

ARCHITECTURE = "GPT2LMHeadModel"
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}


@dataclasses.dataclass(frozen=True)
class Gpt2Config:
    """Sizes of a GPT-2; names are those of the other decoders, ``config.json`` has its own.

    Attributes:
        vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: sizes.
        max_position_embeddings: most tokens; positions are learned, so that there are no more.
        scale_attn_weights: divide scores by the root of the head's size.
        tie_word_embeddings: the output projection is the embedding, transposed.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 1024
    hidden_act: str = "gelu_new"
    layer_norm_eps: float = 1e-5
    scale_attn_weights: bool = True
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
        return Gpt2

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Gpt2Config:
        """Read a parsed ``config.json``.

        Raises:
            ModelError: sizes are missing or contradict each other, or a setting that is not supported.
        """
        given = {k: v for k, v in config.items() if v is not None}
        # Old checkpoints say n_ctx for n_positions; both dialects of the other names are in use.
        sizes: dict[str, Any] = {ours: given.get(theirs, given.get(ours)) for ours, theirs in _SIZES.items()}
        sizes["max_position_embeddings"] = sizes["max_position_embeddings"] or given.get("n_ctx", 1024)
        missing = [_SIZES[k] for k, v in sizes.items() if not isinstance(v, int)]
        if missing:
            raise ModelError(
                f"config.json of a {ARCHITECTURE} lacks {', '.join(missing)}; take the one of the checkpoint."
            )
        for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
            if given.get(name):
                raise ModelError(f"{name} is {given[name]!r}, but of GPT-2 only models with False are supported.")
        eos = given.get("eos_token_id")
        return cls(
            **sizes,
            intermediate_size=given.get("n_inner", 4 * sizes["hidden_size"]),
            hidden_act=given.get("activation_function", "gelu_new"),
            layer_norm_eps=float(given.get("layer_norm_epsilon", 1e-5)),
            scale_attn_weights=bool(given.get("scale_attn_weights", True)),
            tie_word_embeddings=bool(given.get("tie_word_embeddings", True)),
            bos_token_id=given.get("bos_token_id"),
            eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
        )


def _norm(config: Gpt2Config, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, use_fast_variance=False, rngs=rngs)


class Attention(nnx.Module):
    """Causal attention; q, k and v come from one linear."""

    def __init__(self, config: Gpt2Config, dot_general: Callable, rngs: nnx.Rngs) -> None:
        size = config.hidden_size
        self.qkv = linear(size, 3 * size, True, dot_general, rngs)
        gain = 1 / (2 * max(config.num_hidden_layers, 1))
        self.o_proj = linear(size, size, True, dot_general, rngs, gain)
        self.head_dim = config.head_dim
        self.scale = None if config.scale_attn_weights else 1.0

    def __call__(self, x: jax.Array, mask: jax.Array | None, store: Any = None) -> jax.Array:
        """X [B, T, hidden] to the same shape; ``mask`` and ``store`` as a :class:`Decoder`'s layers have them."""
        q, k, v = (part.reshape(*x.shape[:-1], -1, self.head_dim) for part in jnp.split(self.qkv(x), 3, axis=-1))
        return self.o_proj(attention(q, k, v, mask, store, self.scale).reshape(x.shape))


class MLP(nnx.Module):
    """``down(act(up(x)))``."""

    def __init__(self, config: Gpt2Config, dot_general: Callable, rngs: nnx.Rngs) -> None:
        self.up = linear(config.hidden_size, config.intermediate_size, True, dot_general, rngs)
        gain = 1 / (2 * max(config.num_hidden_layers, 1))
        self.down = linear(config.intermediate_size, config.hidden_size, True, dot_general, rngs, gain)
        self.act = ACTIVATIONS[config.hidden_act]

    def __call__(self, x: jax.Array) -> jax.Array:
        """X [..., hidden] to the same shape."""
        return self.down(self.act(self.up(x)))


class Layer(nnx.Module):
    """Attention and MLP, each behind a LayerNorm and beside the residual stream."""

    def __init__(self, config: Gpt2Config, dot_general: Callable, rngs: nnx.Rngs) -> None:
        self.attn_norm = _norm(config, rngs)
        self.attn = Attention(config, dot_general, rngs)
        self.mlp_norm = _norm(config, rngs)
        self.mlp = MLP(config, dot_general, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None, store: Any = None) -> jax.Array:
        """Arguments as :class:`Attention`'s."""
        x = x + self.attn(self.attn_norm(x), mask, store)
        return x + self.mlp(self.mlp_norm(x))


class Gpt2(Decoder):
    """A GPT-2; arguments as :class:`~qjax.models.decoder.Decoder`'s."""

    def __init__(
        self,
        config: Gpt2Config,
        *,
        scan_layers: bool = False,
        dot_general: Callable = jax.lax.dot_general,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        self.dot_general = dot_general
        self.embed = Embed(config.vocab_size, config.hidden_size, rngs)
        self.position = Embed(config.max_position_embeddings, config.hidden_size, rngs)
        self._set_layers([Layer(config, dot_general, rngs) for _ in range(config.num_hidden_layers)], scan_layers)
        self.norm = _norm(config, rngs)
        if not config.tie_word_embeddings:
            self.lm_head = linear(config.hidden_size, config.vocab_size, False, dot_general, rngs)

    def _begin(self, tokens: jax.Array, positions: jax.Array, length: Any) -> tuple[jax.Array, tuple]:
        return self.embed(tokens) + positions_of(self.position, positions, self.config.max_position_embeddings), ()

    def _end(self, x: jax.Array) -> jax.Array:
        x = self.norm(x)
        return self._tied_logits(x, self.embed) if self.config.tie_word_embeddings else self.lm_head(x)


def names(config: Gpt2Config) -> dict[str, tuple[str, ...]]:
    """Our names to those of checkpoints; the first published ones have no ``transformer.`` in front."""
    table = {
        "embed": "wte",
        "position": "wpe",
        "norm": "ln_f",
        "layers/*/attn_norm": "h.{0}.ln_1",
        "layers/*/attn/qkv": "h.{0}.attn.c_attn",
        "layers/*/attn/o_proj": "h.{0}.attn.c_proj",
        "layers/*/mlp_norm": "h.{0}.ln_2",
        "layers/*/mlp/up": "h.{0}.mlp.c_fc",
        "layers/*/mlp/down": "h.{0}.mlp.c_proj",
    }
    return {ours: (f"transformer.{theirs}", theirs) for ours, theirs in table.items()} | {"lm_head": ("lm_head",)}


FAMILY = Family(
    architectures={ARCHITECTURE: "gpt2"},
    config=Gpt2Config.from_hf,
    function=LanguageModel,
    names=names,
    ignored=r"\.attn\.(masked_)?bias$",  # the causal mask, which old checkpoints carry
    as_stored=r"^layers/",
)

"""BERT encoders in Flax NNX, and sentence vectors from them (all-MiniLM-L6-v2 and its kin).

Words, learned positions and segments are added and normalised; layers are post-norm: ``norm(x + attn(x))``,
``norm(x + down(gelu(up(x))))``. Names follow the Llama module: ``layers/3/attn/q_proj/kernel``,
``layers/3/mlp/up/kernel``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.errors import ModelError
from qjax.models import functional
from qjax.models.activations import ACTIVATIONS
from qjax.models.decoder import Embed, check_sizes
from qjax.models.family import LEAVES, Family

ARCHITECTURE = "BertModel"


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes of an encoder; names follow Hugging Face's ``config.json``.

    Attributes:
        vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: sizes.
        max_position_embeddings: most tokens of a text.
        type_vocab_size: kinds of segments.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    architecture: str = ARCHITECTURE

    def __post_init__(self) -> None:
        check_sizes(self)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> BertConfig:
        """Read a parsed ``config.json``.

        Raises:
            ModelError: sizes are missing or contradict each other, or it is a decoder or has relative positions.
        """
        given = {k: v for k, v in config.items() if v is not None}
        needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        missing = [k for k in needed if not isinstance(given.get(k), int)]
        if missing:
            raise ModelError(
                f"config.json of a {ARCHITECTURE} lacks {', '.join(missing)}; take the one of the checkpoint."
            )
        for name, wanted in (("is_decoder", False), ("position_embedding_type", "absolute")):
            if given.get(name, wanted) != wanted:
                raise ModelError(f"{name} is {given[name]!r}, but of BERT only encoders with {wanted!r} are supported.")
        return cls(
            **{k: given[k] for k in needed},
            max_position_embeddings=given.get("max_position_embeddings", 512),
            type_vocab_size=given.get("type_vocab_size", 2),
            hidden_act=given.get("hidden_act", "gelu"),
            layer_norm_eps=float(given.get("layer_norm_eps", 1e-12)),
        )


def _norm(config: BertConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, use_fast_variance=False, rngs=rngs)


class Attention(nnx.Module):
    """Attention over all tokens of a text that the mask does not hide."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs) -> None:
        size = config.hidden_size
        self.q_proj = nnx.Linear(size, size, rngs=rngs)
        self.k_proj = nnx.Linear(size, size, rngs=rngs)
        self.v_proj = nnx.Linear(size, size, rngs=rngs)
        self.o_proj = nnx.Linear(size, size, rngs=rngs)
        self.heads = config.num_attention_heads

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """X [B, T, hidden] to the same shape; mask bool [B, 1, 1, T], False hides a key."""
        split = (*x.shape[:-1], self.heads, -1)
        q, k, v = self.q_proj(x).reshape(split), self.k_proj(x).reshape(split), self.v_proj(x).reshape(split)
        return self.o_proj(jax.nn.dot_product_attention(q, k, v, mask=mask).reshape(x.shape))


class MLP(nnx.Module):
    """``down(act(up(x)))``."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.down = nnx.Linear(config.intermediate_size, config.hidden_size, rngs=rngs)
        self.act = ACTIVATIONS[config.hidden_act]

    def __call__(self, x: jax.Array) -> jax.Array:
        """X [..., hidden] to the same shape."""
        return self.down(self.act(self.up(x)))


class Layer(nnx.Module):
    """Attention and MLP, each beside the residual stream, with a LayerNorm on their sum."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs) -> None:
        self.attn = Attention(config, rngs)
        self.attn_norm = _norm(config, rngs)
        self.mlp = MLP(config, rngs)
        self.mlp_norm = _norm(config, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """X [B, T, hidden] to the same shape."""
        x = self.attn_norm(x + self.attn(x, mask))
        return self.mlp_norm(x + self.mlp(x))


class Embeddings(nnx.Module):
    """Tokens to vectors: word, position and segment, added and normalised."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs) -> None:
        self.word = Embed(config.vocab_size, config.hidden_size, rngs)
        self.position = Embed(config.max_position_embeddings, config.hidden_size, rngs)
        self.segment = Embed(config.type_vocab_size, config.hidden_size, rngs)
        self.norm = _norm(config, rngs)
        self.longest = config.max_position_embeddings

    def __call__(self, tokens: jax.Array, segments: jax.Array | None) -> jax.Array:
        """Tokens and segments, int [B, T], to [B, T, hidden]."""
        if tokens.ndim != 2 or tokens.shape[1] > self.longest:
            raise ModelError(
                f"tokens have shape {tuple(tokens.shape)}, but this model takes [B, T] with T up to {self.longest}; "
                "cut the texts."
            )
        x = self.word(tokens) + self.position(jnp.arange(tokens.shape[1], dtype=jnp.int32))
        return self.norm(x + self.segment(jnp.zeros_like(tokens) if segments is None else segments))


class Bert(nnx.Module):
    """An encoder.

    Args:
        config: sizes.
        rngs: where initial weights come from; ``nnx.Rngs(0)``.
    """

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embeddings = Embeddings(config, rngs)
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config.num_hidden_layers)])

    def __call__(
        self, tokens: jax.Array, attention_mask: jax.Array | None = None, token_type_ids: jax.Array | None = None
    ) -> jax.Array:
        """Hidden states; arguments as :class:`TextEncoder`'s."""
        x = self.embeddings(tokens, token_type_ids)
        mask = None if attention_mask is None else (jnp.asarray(attention_mask) != 0)[:, None, None, :]
        for layer in self.layers:
            x = layer(x, mask)
        return x


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """An encoder as a function of its parameters: ``fn(params, tokens [B, T]) -> hidden states [B, T, hidden]``.

    Attributes:
        config: sizes.
    """

    config: BertConfig

    def __call__(
        self,
        params: Any,
        tokens: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states of the last layer.

        Args:
            params: the parameters.
            tokens: int32 [B, T].
            attention_mask: [B, T], bool or numbers; 0 where a token is padding and is not looked at. None: all count.
            token_type_ids: int32 [B, T], the segment of each token; None: all 0.

        Returns:
            float [B, T, hidden]; positions of padding hold values of no meaning.

        Raises:
            ModelError: a text longer than the model reads.
        """
        return functional.bind(Bert, self.config, params)(tokens, attention_mask, token_type_ids)

    def sentence_embedding(self, params: Any, tokens: jax.Array, attention_mask: jax.Array | None = None) -> jax.Array:
        """:func:`sentence_embedding` of the hidden states: int32 [B, T] to unit vectors, float32 [B, hidden]."""
        return sentence_embedding(self(params, tokens, attention_mask), attention_mask)

    def init(self, seed: int = 0) -> Any:
        """Random parameters."""
        return functional.init_params(Bert, self.config, seed)

    def abstract_params(self, dtype: Any = jnp.float32) -> Any:
        """Shapes of the parameters."""
        return functional.abstract_params(Bert, self.config, dtype)

    def module(self, params: Any) -> Bert:
        """The Flax NNX module with these parameters in it."""
        return functional.bind(Bert, self.config, params)


def sentence_embedding(hidden: jax.Array, attention_mask: jax.Array | None = None) -> jax.Array:
    """One vector of length 1 for each text: the mean of its tokens' hidden states, normalised.

    Args:
        hidden: float [B, T, hidden], an encoder's output, quantized or not.
        attention_mask: [B, T]; 0 where a token is padding. None: all tokens count.

    Returns:
        float32 [B, hidden]; cosines of texts are inner products of their vectors. A text without tokens gives zeros.
    """
    hidden = hidden.astype(jnp.float32)
    weights = jnp.ones(hidden.shape[:2]) if attention_mask is None else jnp.asarray(attention_mask) != 0
    weights = weights.astype(jnp.float32)[..., None]
    mean = jnp.sum(hidden * weights, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), 1.0)
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


def names(config: BertConfig) -> dict[str, tuple[str, ...]]:
    """Our names to those of checkpoints; models that hold the encoder under a head say ``bert.`` in front."""
    table = {
        "embeddings/word": "embeddings.word_embeddings",
        "embeddings/position": "embeddings.position_embeddings",
        "embeddings/segment": "embeddings.token_type_embeddings",
        "embeddings/norm": "embeddings.LayerNorm",
        "layers/*/attn/q_proj": "encoder.layer.{0}.attention.self.query",
        "layers/*/attn/k_proj": "encoder.layer.{0}.attention.self.key",
        "layers/*/attn/v_proj": "encoder.layer.{0}.attention.self.value",
        "layers/*/attn/o_proj": "encoder.layer.{0}.attention.output.dense",
        "layers/*/attn_norm": "encoder.layer.{0}.attention.output.LayerNorm",
        "layers/*/mlp/up": "encoder.layer.{0}.intermediate.dense",
        "layers/*/mlp/down": "encoder.layer.{0}.output.dense",
        "layers/*/mlp_norm": "encoder.layer.{0}.output.LayerNorm",
    }
    return {ours: (theirs, f"bert.{theirs}") for ours, theirs in table.items()}


FAMILY = Family(
    architectures={ARCHITECTURE: "bert"},
    config=BertConfig.from_hf,
    function=TextEncoder,
    names=names,
    leaves={**LEAVES, "scale": (".weight", ".gamma"), "bias": (".bias", ".beta")},  # as TensorFlow called them
    ignored=r"(^|\.)pooler\.|\.position_ids$",  # the function gives hidden states, which the pooler stands behind
)

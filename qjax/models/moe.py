"""Decoders with a mixture of experts: Mixtral, Qwen2-MoE, Qwen3-MoE. Attention is that of the Llama family.

A linear, the router, gives each token probabilities of experts; the most probable ones compute an MLP of it each, and
their outputs are added by those weights. Rows are sorted by expert, so that all experts compute in three
``jax.lax.ragged_dot``: the weights of a layer's experts are one leaf, ``layers/3/mlp/experts/up/kernel``
[experts, hidden, intermediate], and no row is computed that is not used. Qwen2-MoE adds an MLP that sees every token,
behind a gate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.errors import ModelError, near
from qjax.models.activations import ACTIVATIONS
from qjax.models.config import LlamaConfig
from qjax.models.decoder import Decoder, linear
from qjax.models.family import Family
from qjax.models.language import LanguageModel
from qjax.models.llama import MLP, NAMES, Layer, Llama
from qjax.models.rope import RopeScaling  # noqa: F401 (the type of an inherited field, looked up here when it is checked)

ARCHITECTURES = {
    "MixtralForCausalLM": "mixtral",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
# Whose attention each has.
_DENSE = {"mixtral": "MistralForCausalLM", "qwen2_moe": "Qwen2ForCausalLM", "qwen3_moe": "Qwen3ForCausalLM"}


@dataclasses.dataclass(frozen=True)
class MoeConfig(LlamaConfig):
    """What :class:`LlamaConfig` says, and the experts.

    Attributes:
        num_experts, num_experts_per_tok: how many there are, and how many compute each token.
        moe_intermediate_size: inner size of an expert.
        shared_intermediate_size: inner size of the MLP that sees every token; 0 where there is none.
        norm_topk_prob: scale the weights of the chosen experts to a sum of one.
        dense_layers: layers with one MLP, of ``intermediate_size``, in place of experts.
    """

    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 0
    shared_intermediate_size: int = 0
    norm_topk_prob: bool = True
    dense_layers: tuple[int, ...] = ()
    architecture: str = "MixtralForCausalLM"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value <= 0:
                raise ModelError(f"{name} is {value!r}, but must be a positive integer; mend config.json.")
        if self.num_experts_per_tok > self.num_experts:
            raise ModelError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) is more than num_experts ({self.num_experts}); "
                "mend config.json."
            )

    @property
    def decoder(self) -> type[Decoder]:
        """The Flax NNX module that it configures."""
        return Moe

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> MoeConfig:
        """Read a parsed ``config.json``.

        Raises:
            ModelError: an architecture that is not one of these, sizes that are missing, or that contradict each other.
        """
        name = (config.get("architectures") or ["MixtralForCausalLM"])[0]
        if name not in ARCHITECTURES:
            hint = near(name, ARCHITECTURES)
            raise ModelError(f"architecture {name!r} is not one of {', '.join(ARCHITECTURES)}{hint}.")
        kind = ARCHITECTURES[name]
        given = {k: v for k, v in config.items() if v is not None}
        if "num_local_experts" in given:  # Mixtral's word, and that of transformers 5 for Qwen3-MoE
            given["num_experts"] = given["num_local_experts"]
        needed = ["num_hidden_layers", "num_experts", "num_experts_per_tok"]
        needed += [] if kind == "mixtral" else ["moe_intermediate_size"]
        needed += ["shared_expert_intermediate_size"] if kind == "qwen2_moe" else []
        missing = [k for k in needed if not isinstance(given.get(k), int)]
        if missing:
            raise ModelError(f"config.json of a {name} lacks {', '.join(missing)}; take the one of the checkpoint.")
        dense = LlamaConfig.from_hf({**_attention(kind, given), "architectures": [_DENSE[kind]]})
        same = {field.name: getattr(dense, field.name) for field in dataclasses.fields(LlamaConfig)}
        if kind == "mixtral":
            experts: dict[str, Any] = {
                "num_experts": given["num_experts"],
                "moe_intermediate_size": dense.intermediate_size,
                "norm_topk_prob": True,
            }
        else:
            every, only = given.get("decoder_sparse_step", 1), given.get("mlp_only_layers", ())
            layers = range(dense.num_hidden_layers)
            experts = {
                "num_experts": given["num_experts"],
                "moe_intermediate_size": given["moe_intermediate_size"],
                "shared_intermediate_size": given["shared_expert_intermediate_size"] if kind == "qwen2_moe" else 0,
                "norm_topk_prob": bool(given.get("norm_topk_prob", False)),
                "dense_layers": tuple(i for i in layers if i in only or (i + 1) % every),
                "qkv_bias": bool(given.get("qkv_bias", True)) if kind == "qwen2_moe" else dense.qkv_bias,
            }
        experts |= {"num_experts_per_tok": given["num_experts_per_tok"], "architecture": name}
        return cls(**{**same, **experts})

    def to_hf(self) -> dict[str, Any]:
        """What :meth:`from_hf` reads back."""
        kind = ARCHITECTURES[self.architecture]
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(LlamaConfig)}
        given = LlamaConfig(**{**fields, "architecture": _DENSE[kind]}).to_hf()
        given |= {"architectures": [self.architecture], "model_type": kind}
        given["num_experts_per_tok"] = self.num_experts_per_tok
        if kind == "mixtral":
            return given | {"num_local_experts": self.num_experts}
        if kind == "qwen2_moe":
            given |= {"shared_expert_intermediate_size": self.shared_intermediate_size, "qkv_bias": self.qkv_bias}
        return given | {
            "num_experts": self.num_experts,
            "moe_intermediate_size": self.moe_intermediate_size,
            "norm_topk_prob": self.norm_topk_prob,
            "mlp_only_layers": list(self.dense_layers),
        }


def _attention(kind: str, given: dict[str, Any]) -> dict[str, Any]:
    """config.json in the words of the family whose attention it is, with the defaults that differ from theirs."""
    layers = range(given["num_hidden_layers"])
    if kind == "mixtral":
        return {"rms_norm_eps": 1e-5, **given, "sliding_window": given.get("sliding_window")}
    if kind == "qwen3_moe":  # one width in every layer
        width = given.get("hidden_size", 0) // max(given.get("num_attention_heads", 1), 1)
        return {"head_dim": width, "sliding_window": 4096, **given, "layer_types": ["sliding_attention"] * len(layers)}
    upto = given.get("max_window_layers", 28)
    kinds = ["sliding_attention" if i % 2 == 0 and i < upto else "full_attention" for i in layers]
    return {"layer_types": kinds, "sliding_window": 4096, **given}


class Stack(nnx.Module):
    """One linear for each expert, without bias: a kernel [experts, ins, outs]."""

    def __init__(self, count: int, ins: int, outs: int, rngs: nnx.Rngs, gain: float = 1.0) -> None:
        init = nnx.initializers.variance_scaling(gain, "fan_in", "normal", batch_axis=0)
        self.kernel = nnx.Param(init(rngs.params(), (count, ins, outs), jnp.float32))

    def __call__(self, rows: jax.Array, sizes: jax.Array) -> jax.Array:
        """Rows [M, ins], sorted by expert, of which each has so many, int32 [experts]: [M, outs]."""
        return jax.lax.ragged_dot(rows, self.kernel[...].astype(rows.dtype), sizes)


class Experts(nnx.Module):
    """``down(act(gate(x)) * up(x))`` with the weights of each row's own expert."""

    def __init__(self, config: MoeConfig, rngs: nnx.Rngs) -> None:
        c = config
        count, inner = c.num_experts, c.moe_intermediate_size
        self.gate = Stack(count, c.hidden_size, inner, rngs)
        self.up = Stack(count, c.hidden_size, inner, rngs)
        self.down = Stack(count, inner, c.hidden_size, rngs, 1 / (2 * max(c.num_hidden_layers, 1)))
        self.act = ACTIVATIONS[c.hidden_act]

    def __call__(self, rows: jax.Array, sizes: jax.Array) -> jax.Array:
        """Rows [M, hidden], sorted by expert, to the same shape; arguments as :class:`Stack`'s."""
        return self.down(self.act(self.gate(rows, sizes)) * self.up(rows, sizes), sizes)


class Mixture(nnx.Module):
    """A router and its experts, and where there is one the MLP that sees every token."""

    def __init__(self, config: MoeConfig, dot_general: Callable, rngs: nnx.Rngs) -> None:
        c = config
        self.router = linear(c.hidden_size, c.num_experts, False, dot_general, rngs)
        self.experts = Experts(c, rngs)
        if c.shared_intermediate_size:
            shared = dataclasses.replace(c, intermediate_size=c.shared_intermediate_size)
            self.shared = MLP(shared, dot_general, rngs)
            self.shared_gate = linear(c.hidden_size, 1, False, dot_general, rngs)
        self.config = c

    def __call__(self, x: jax.Array) -> jax.Array:
        """X [B, T, hidden] to the same shape."""
        c = self.config
        tokens = x.reshape(-1, x.shape[-1])
        chances = jax.nn.softmax(self.router(tokens).astype(jnp.float32), axis=-1)
        weights, chosen = jax.lax.top_k(chances, c.num_experts_per_tok)  # [N, k]
        if c.norm_topk_prob:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        owner = chosen.reshape(-1)
        order = jnp.argsort(owner)  # sorted row -> token * k + choice
        sizes = jnp.bincount(owner, length=c.num_experts).astype(jnp.int32)
        rows = self.experts(tokens[order // c.num_experts_per_tok], sizes)
        rows = rows[jnp.argsort(order)].reshape(*chosen.shape, -1)  # back to [N, k, hidden]
        out = jnp.sum(rows * weights[..., None].astype(rows.dtype), axis=1)
        if c.shared_intermediate_size:
            out = out + jax.nn.sigmoid(self.shared_gate(tokens)) * self.shared(tokens)
        return out.reshape(x.shape)


class Moe(Llama):
    """A decoder with a mixture of experts; arguments as :class:`~qjax.models.decoder.Decoder`'s."""

    config: MoeConfig

    def _layer(self, index: int, dot_general: Callable, rngs: nnx.Rngs) -> Layer:
        dense = index in self.config.dense_layers
        return Layer(self.config, dot_general, rngs, MLP if dense else Mixture, self.fused)


def names(config: MoeConfig) -> dict[str, tuple[str, ...]]:
    """Our names to those of checkpoints, which keep each expert's linears apart."""
    mixtral = config.architecture.startswith("Mixtral")
    mlp = "model.layers.{0}.block_sparse_moe." if mixtral else "model.layers.{0}.mlp."
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    return NAMES | {
        "layers/*/mlp/router": (f"{mlp}gate",),
        "layers/*/mlp/experts/gate": (f"{mlp}experts.{{{{e}}}}.{gate}",),
        "layers/*/mlp/experts/up": (f"{mlp}experts.{{{{e}}}}.{up}",),
        "layers/*/mlp/experts/down": (f"{mlp}experts.{{{{e}}}}.{down}",),
        "layers/*/mlp/shared/gate": (f"{mlp}shared_expert.gate_proj",),
        "layers/*/mlp/shared/up": (f"{mlp}shared_expert.up_proj",),
        "layers/*/mlp/shared/down": (f"{mlp}shared_expert.down_proj",),
        "layers/*/mlp/shared_gate": (f"{mlp}shared_expert_gate",),
    }


FAMILY = Family(
    architectures=ARCHITECTURES,
    config=MoeConfig.from_hf,
    function=LanguageModel,
    names=names,
    ignored=r"rotary_emb\.inv_freq$",
)

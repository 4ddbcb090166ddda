"""What ``config.json`` of a Llama-family checkpoint says, in one frozen dataclass."""

from __future__ import annotations

import dataclasses
from typing import Any

from qjax.errors import ModelError, near
from qjax.models.activations import ACTIVATIONS
from qjax.models.decoder import Decoder
from qjax.models.rope import RopeScaling

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}

# What transformers assumes where config.json is silent, and the families disagree.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 32000, "max_position_embeddings": 2048},
    "mistral": {
        "vocab_size": 32000,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {"vocab_size": 151936, "max_position_embeddings": 32768},
    "qwen3": {"vocab_size": 151936, "max_position_embeddings": 32768, "head_dim": 128},
}

# Fields that config.json knows by the same name.
_SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
    "bos_token_id",
)


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and switches of a decoder; names follow Hugging Face's ``config.json``.

    Attributes:
        vocab_size, hidden_size, intermediate_size, num_hidden_layers: sizes.
        num_attention_heads, num_key_value_heads, head_dim: query heads share key/value heads in equal groups.
        windows: per layer the number of positions that a query sees, itself included; None sees all. Empty: all None.
        qkv_bias, o_bias, mlp_bias: whether those linears have a bias.
        qk_norm: RMS normalisation of each head of q and k before the rotation (Qwen3).
        rope_theta, rope_scaling: rotary embedding.
        tie_word_embeddings: the output projection is the embedding, transposed.
        architecture: the Hugging Face name, for reports and for export.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    tie_word_embeddings: bool = False
    windows: tuple[int | None, ...] = ()
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    architecture: str = "LlamaForCausalLM"

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        for name in (*sizes, "head_dim"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) <= 0:
                value = getattr(self, name)
                raise ModelError(f"{name} is {value!r}, but must be a positive integer; mend config.json.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ModelError(
                f"num_attention_heads ({self.num_attention_heads}) is not a multiple of num_key_value_heads "
                f"({self.num_key_value_heads}); mend config.json."
            )
        if self.head_dim % 2:
            raise ModelError(f"head_dim is {self.head_dim}, but rotary embedding needs an even one; mend config.json.")
        if self.hidden_act not in ACTIVATIONS:
            hint = near(self.hidden_act, ACTIVATIONS)
            raise ModelError(f"hidden_act {self.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}{hint}.")
        if self.windows and len(self.windows) != self.num_hidden_layers:
            raise ModelError(
                f"layer_types names {len(self.windows)} layers, but num_hidden_layers is {self.num_hidden_layers}; "
                "mend config.json."
            )

    @property
    def decoder(self) -> type[Decoder]:
        """The Flax NNX module that it configures."""
        from qjax.models.llama import Llama  # which imports this module

        return Llama

    def window(self, layer: int) -> int | None:
        """Width of the sliding window of a layer, or None."""
        return self.windows[layer] if self.windows else None

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> LlamaConfig:
        """Read a parsed ``config.json`` in the dialect of transformers 4 or 5.

        Raises:
            ModelError: an architecture that is not of this family, or settings that contradict each other.
        """
        name = (config.get("architectures") or ["LlamaForCausalLM"])[0]
        if name not in FAMILIES:
            raise ModelError(f"architecture {name!r} is not one of {', '.join(FAMILIES)}{near(name, FAMILIES)}.")
        family = FAMILIES[name]
        given = {**_DEFAULTS[family], **{k: v for k, v in config.items() if v is not None}}
        if family == "mistral" and "sliding_window" in config:  # null there means: no window
            given["sliding_window"] = config["sliding_window"]
        missing = [
            k
            for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
            if not isinstance(given.get(k), int)
        ]
        if missing:
            raise ModelError(f"config.json of a {name} lacks {', '.join(missing)}; take the one of the checkpoint.")
        heads, layers = given["num_attention_heads"], given["num_hidden_layers"]
        rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
        theta = given.get("rope_theta", rope.get("rope_theta", 10000.0))
        eos = given.get("eos_token_id")
        bias = bool(given.get("attention_bias", False))
        return cls(
            vocab_size=given["vocab_size"],
            hidden_size=given["hidden_size"],
            intermediate_size=given["intermediate_size"],
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=given.get("num_key_value_heads", heads),
            head_dim=given.get("head_dim", given["hidden_size"] // heads),
            max_position_embeddings=given["max_position_embeddings"],
            hidden_act=given.get("hidden_act", "silu"),
            rms_norm_eps=float(given.get("rms_norm_eps", 1e-6)),
            rope_theta=float(theta),
            rope_scaling=RopeScaling.from_hf(rope, given["max_position_embeddings"]),
            tie_word_embeddings=bool(given.get("tie_word_embeddings", False)),
            windows=_windows(family, given, layers),
            qkv_bias=family == "qwen2" or bias,
            o_bias=family in ("llama", "qwen3") and bias,
            mlp_bias=family == "llama" and bool(given.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            bos_token_id=given.get("bos_token_id"),
            eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
            architecture=name,
        )

    def to_hf(self) -> dict[str, Any]:
        """What :meth:`from_hf` reads back, in words that transformers 4 and 5 both understand."""
        family = FAMILIES[self.architecture]
        given = {
            "architectures": [self.architecture],
            "model_type": family,
            **{name: getattr(self, name) for name in _SAME},
            "attention_bias": self.o_bias,
            "rope_scaling": self.rope_scaling.to_hf(),
            "eos_token_id": list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id,
        }
        if family == "llama":
            given["mlp_bias"] = self.mlp_bias
        elif family == "mistral":
            given["sliding_window"] = self.window(0)
        elif self.windows:
            kinds = ["full_attention" if w is None else "sliding_attention" for w in self.windows]
            width = next(w for w in self.windows if w is not None)
            given |= {"use_sliding_window": True, "sliding_window": width, "layer_types": kinds}
        return given


def _windows(family: str, given: dict[str, Any], layers: int) -> tuple[int | None, ...]:
    """Sliding window per layer, as the families of transformers decide it."""
    width = given.get("sliding_window")
    if width is None or family == "llama" or (family != "mistral" and not given.get("use_sliding_window", False)):
        return ()
    if family == "mistral":
        return (width,) * layers
    start = given.get("max_window_layers", 28)
    kinds = given.get("layer_types") or ["sliding_attention" if i >= start else "full_attention" for i in range(layers)]
    windows = tuple(width if kind == "sliding_attention" else None for kind in kinds)
    return windows if any(w is not None for w in windows) else ()

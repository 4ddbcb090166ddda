"""How large a decoder is: what a cost model has to know of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from qjax.errors import DeviceError, ModelError

# Leaves that every preset leaves in 16 bits: tables of embeddings, the head, and what chooses experts.
_KEPT = ("lm_head", "embed", "router", "shared_gate", "wte", "wpe")


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """Sizes of a decoder.

    Attributes:
        name: for tables.
        params: all parameters.
        layers, kv_heads, head_dim: of attention; they make the cache.
        kept: parameters that stay in 16 bits (embeddings, head, norms).
        active: parameters that compute one token; those of a mixture of experts are fewer. None: all.
        experts, experts_per_token: of a mixture of experts; 1 and 1 where there are none.
        context: most tokens of a sequence, prompt and output; None where it is not known.
    """

    params: float
    layers: int
    kv_heads: int
    head_dim: int
    kept: float = 0.0
    active: float | None = None
    experts: int = 1
    experts_per_token: int = 1
    name: str = "model"
    context: int | None = None

    def __post_init__(self) -> None:
        for field in ("params", "layers", "kv_heads", "head_dim", "experts", "experts_per_token"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise DeviceError(f"{self.name}: {field} is {value!r}; a positive number is needed")
        if not 0 <= self.kept <= self.params:
            raise DeviceError(f"{self.name}: {self.kept:,} of {self.params:,} parameters cannot stay in 16 bits")
        if self.active is not None and not 0 < self.active <= self.params:
            raise DeviceError(f"{self.name}: {self.active:,} of {self.params:,} parameters cannot be active")
        if self.context is not None and not 0 < self.context < float("inf"):
            raise DeviceError(f"{self.name}: context is {self.context!r}; a positive number of tokens is needed")
        if self.experts_per_token > self.experts:
            raise DeviceError(f"{self.name}: {self.experts_per_token} of {self.experts} experts compute a token")
        if self.experts == self.experts_per_token and self.active not in (None, self.params):
            raise DeviceError(
                f"{self.name}: with {self.active:,} of {self.params:,} parameters active, give experts and "
                "experts_per_token, which say how many are read at larger batches"
            )

    @property
    def computing(self) -> float:
        """Parameters that compute one token."""
        return self.params if self.active is None else self.active

    @property
    def kv_token_bytes(self) -> float:
        """Bytes of one token in a 16-bit cache: keys and values of all layers."""
        return 2.0 * 2 * self.layers * self.kv_heads * self.head_dim

    def weight_bytes(self, weight_bits: float) -> float:
        """Return bytes of the parameters with quantized layers at ``weight_bits`` each."""
        return (self.params - self.kept) * weight_bits / 8 + self.kept * 2

    def read_share(self, tokens: float) -> float:
        """Return the share of all parameters that a step of so many tokens reads.

        Each token takes k of E experts. With experts drawn evenly, 1 - (1 - k/E)^tokens of them are read.
        """
        if self.experts == self.experts_per_token:
            return 1.0
        share = self.experts_per_token / self.experts
        of_experts = (self.params - self.computing) / (1 - share)
        return (self.params - of_experts + of_experts * (1 - (1 - share) ** tokens)) / self.params


def size_of(folder: str | Path) -> ModelSize:
    """Read sizes from the ``config.json`` of a Hugging Face folder; weights are not read and need not be there.

    Raises:
        ModelError: the folder cannot be used, or holds no decoder.
    """
    import jax

    from qjax import models

    _, params, config = models.abstract(folder)
    layers, heads = getattr(config, "num_hidden_layers", None), getattr(config, "num_attention_heads", None)
    if not hasattr(config, "vocab_size") or not hasattr(config, "decoder"):
        raise ModelError(
            f"{folder} holds a {config.architecture}, which does not decode tokens one by one; the advisor is for "
            "decoders"
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = experts = 0
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        total += leaf.size
        if leaf.ndim < 2 or any(part.startswith(_KEPT) for part in name.split("/")):
            kept += leaf.size
        elif "experts" in name.split("/"):
            experts += leaf.size
    count: Any = getattr(config, "num_experts", 1)
    used: Any = getattr(config, "num_experts_per_tok", 1) if count > 1 else 1
    return ModelSize(
        params=total,
        layers=int(layers or 0),
        kv_heads=getattr(config, "num_key_value_heads", None) or int(heads or 0),
        head_dim=head_dim,
        kept=kept,
        active=total - experts * (1 - used / count) if count > used else None,
        experts=count if count > used else 1,
        experts_per_token=used if count > used else 1,
        name=Path(folder).resolve().name,
        context=getattr(config, "max_position_embeddings", None),
    )

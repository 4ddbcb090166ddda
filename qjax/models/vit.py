"""Vision transformers in Flax NNX: ViT and DeiT image classifiers.

Patches are embedded by a strided convolution, a class token (DeiT: and a distillation token) is put in front, learned
positions are added, and the layers are pre-norm: ``x + attn(norm(x))``, ``x + down(gelu(up(norm(x))))`` with the exact
GELU. Names follow the Llama module: ``layers/3/attn/q_proj/kernel``, ``layers/3/mlp/up/kernel``, ``classifier/kernel``.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.errors import ModelError, near
from qjax.models.activations import ACTIVATIONS
from qjax.models.classifier import Classifier
from qjax.models.family import Family

ARCHITECTURES = ("ViTForImageClassification", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher")


def pair(value: Any) -> tuple[int, int]:
    """(height, width) of a setting that is one number where they are equal."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


@dataclasses.dataclass(frozen=True)
class VitConfig:
    """Sizes of an image classifier; names follow Hugging Face's ``config.json``.

    Attributes:
        image_size, patch_size: (height, width) in pixels; patches that do not fit are cut off.
        num_labels: classes.
        labels: their names, or empty.
        architecture: ViT, DeiT (a second token that is not read) or DeiT with teacher (mean of two classifiers).
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] = (16, 16)
    num_channels: int = 3
    num_labels: int = 1000
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    qkv_bias: bool = True
    labels: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    architecture: str = "ViTForImageClassification"

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            hint = near(self.architecture, ARCHITECTURES)
            raise ModelError(f"architecture {self.architecture!r} is not one of {', '.join(ARCHITECTURES)}{hint}.")
        if self.hidden_size % self.num_attention_heads:
            raise ModelError(
                f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads "
                f"({self.num_attention_heads}); mend config.json."
            )
        if self.hidden_act not in ACTIVATIONS:
            hint = near(self.hidden_act, ACTIVATIONS)
            raise ModelError(f"hidden_act {self.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}{hint}.")

    @property
    def distilled(self) -> bool:
        """Whether there is a distillation token (DeiT)."""
        return self.architecture.startswith("DeiT")

    @property
    def teacher(self) -> bool:
        """Whether the distillation token has a classifier of its own."""
        return self.architecture.endswith("WithTeacher")

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> VitConfig:
        """Read a parsed ``config.json``.

        Raises:
            ModelError: sizes are missing or contradict each other.
        """
        given = {k: v for k, v in config.items() if v is not None}
        name = (given.get("architectures") or [ARCHITECTURES[0]])[0]
        needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        missing = [k for k in needed if not isinstance(given.get(k), int)]
        if missing:
            raise ModelError(f"config.json of a {name} lacks {', '.join(missing)}; take the one of the checkpoint.")
        labels = given.get("id2label") or {}
        return cls(
            **{k: given[k] for k in needed},
            image_size=pair(given.get("image_size", 224)),
            patch_size=pair(given.get("patch_size", 16)),
            num_channels=given.get("num_channels", 3),
            num_labels=len(labels) or given.get("num_labels", 2),
            hidden_act=given.get("hidden_act", "gelu"),
            layer_norm_eps=float(given.get("layer_norm_eps", 1e-12)),
            qkv_bias=bool(given.get("qkv_bias", True)),
            labels=tuple(labels[k] for k in sorted(labels, key=int)),
            architecture=name,
        )


class Attention(nnx.Module):
    """Full attention over all tokens of an image."""

    def __init__(self, config: VitConfig, rngs: nnx.Rngs) -> None:
        size = config.hidden_size
        self.q_proj = nnx.Linear(size, size, use_bias=config.qkv_bias, rngs=rngs)
        self.k_proj = nnx.Linear(size, size, use_bias=config.qkv_bias, rngs=rngs)
        self.v_proj = nnx.Linear(size, size, use_bias=config.qkv_bias, rngs=rngs)
        self.o_proj = nnx.Linear(size, size, rngs=rngs)
        self.heads = config.num_attention_heads

    def __call__(self, x: jax.Array) -> jax.Array:
        """X [B, T, hidden] to the same shape."""
        split = (*x.shape[:-1], self.heads, -1)
        q, k, v = self.q_proj(x).reshape(split), self.k_proj(x).reshape(split), self.v_proj(x).reshape(split)
        return self.o_proj(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))


class MLP(nnx.Module):
    """``down(act(up(x)))``."""

    def __init__(self, size: int, inner: int, act: str, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(size, inner, rngs=rngs)
        self.down = nnx.Linear(inner, size, rngs=rngs)
        self.act = ACTIVATIONS[act]

    def __call__(self, x: jax.Array) -> jax.Array:
        """X [..., hidden] to the same shape."""
        return self.down(self.act(self.up(x)))


class Layer(nnx.Module):
    """Attention and MLP, each behind a LayerNorm and beside the residual stream."""

    def __init__(self, config: VitConfig, rngs: nnx.Rngs) -> None:
        norm = {"epsilon": config.layer_norm_eps, "use_fast_variance": False, "rngs": rngs}
        self.attn_norm = nnx.LayerNorm(config.hidden_size, **norm)
        self.attn = Attention(config, rngs)
        self.mlp_norm = nnx.LayerNorm(config.hidden_size, **norm)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_act, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """X [B, T, hidden] to the same shape."""
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Embeddings(nnx.Module):
    """Pixels to tokens: patches, class token, distillation token, positions."""

    def __init__(self, config: VitConfig, rngs: nnx.Rngs) -> None:
        size, patch = config.hidden_size, config.patch_size
        extra = 2 if config.distilled else 1
        count = extra + (config.image_size[0] // patch[0]) * (config.image_size[1] // patch[1])
        init = nnx.initializers.normal(0.02)
        self.patch = nnx.Conv(config.num_channels, size, patch, strides=patch, padding="VALID", rngs=rngs)
        self.cls_token = nnx.Param(init(rngs.params(), (1, 1, size)))
        if config.distilled:
            self.distillation_token = nnx.Param(init(rngs.params(), (1, 1, size)))
        self.position = nnx.Param(init(rngs.params(), (1, count, size)))
        self.config = config

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Pixels [B, H, W, channels] to tokens [B, T, hidden]."""
        c = self.config
        if pixels.ndim != 4 or pixels.shape[1:] != (*c.image_size, c.num_channels):
            wanted = f"[B, {c.image_size[0]}, {c.image_size[1]}, {c.num_channels}]"
            raise ModelError(f"pixels have shape {tuple(pixels.shape)}, but this model takes {wanted}; resize them.")
        patches = self.patch(pixels)
        patches = patches.reshape(patches.shape[0], -1, c.hidden_size)
        front = [self.cls_token[...]] + ([self.distillation_token[...]] if c.distilled else [])
        front = [jnp.broadcast_to(t, (patches.shape[0], 1, c.hidden_size)).astype(patches.dtype) for t in front]
        return jnp.concatenate([*front, patches], axis=1) + self.position[...].astype(patches.dtype)


class Vit(nnx.Module):
    """An image classifier.

    Args:
        config: sizes.
        rngs: where initial weights come from; ``nnx.Rngs(0)``.
    """

    def __init__(self, config: VitConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embeddings = Embeddings(config, rngs)
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config.num_hidden_layers)])
        self.norm = nnx.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, use_fast_variance=False, rngs=rngs)
        self.classifier = nnx.Linear(config.hidden_size, config.num_labels, rngs=rngs)
        if config.teacher:
            self.distillation_classifier = nnx.Linear(config.hidden_size, config.num_labels, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Class logits: pixels [B, H, W, channels] (already normalised) to [B, num_labels]."""
        x = self.embeddings(pixels)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        logits = self.classifier(x[:, 0])
        return (logits + self.distillation_classifier(x[:, 1])) / 2 if self.config.teacher else logits


@dataclasses.dataclass(frozen=True)
class ImageClassifier(Classifier):
    """A classifier as a function of its parameters: ``fn(params, pixels [B, H, W, 3]) -> logits [B, classes]``."""

    config: VitConfig
    network: ClassVar[Any] = Vit


def names(config: VitConfig) -> dict[str, tuple[str, ...]]:
    """Our names to those of checkpoints: transformers 4 writes the first dialect, transformers 5 the second."""
    p = "deit" if config.distilled else "vit"
    layers = (f"{p}.encoder.layer.{{0}}.", f"{p}.layers.{{0}}.")
    own = {
        "embeddings/patch": (f"{p}.embeddings.patch_embeddings.projection",),
        "embeddings/cls_token": (f"{p}.embeddings.cls_token",),
        "embeddings/distillation_token": (f"{p}.embeddings.distillation_token",),
        "embeddings/position": (f"{p}.embeddings.position_embeddings",),
        "norm": (f"{p}.layernorm",),
        "classifier": ("cls_classifier" if config.teacher else "classifier",),
        "distillation_classifier": ("distillation_classifier",),
    }
    per_layer = {
        "attn_norm": ("layernorm_before", "layernorm_before"),
        "mlp_norm": ("layernorm_after", "layernorm_after"),
        "attn/q_proj": ("attention.attention.query", "attention.q_proj"),
        "attn/k_proj": ("attention.attention.key", "attention.k_proj"),
        "attn/v_proj": ("attention.attention.value", "attention.v_proj"),
        "attn/o_proj": ("attention.output.dense", "attention.o_proj"),
        "mlp/up": ("intermediate.dense", "mlp.fc1"),
        "mlp/down": ("output.dense", "mlp.fc2"),
    }
    return own | {f"layers/*/{k}": tuple(a + b for a, b in zip(layers, v, strict=True)) for k, v in per_layer.items()}


FAMILY = Family(
    architectures={
        "ViTForImageClassification": "vit",
        "DeiTForImageClassification": "deit",
        "DeiTForImageClassificationWithTeacher": "deit",
    },
    config=VitConfig.from_hf,
    function=ImageClassifier,
    names=names,
    ignored=r"\.pooler\.|\.mask_token$|\.position_ids$",
)

"""Swin transformers in Flax NNX: image classifiers with attention in windows (Liu et al. 2021, arXiv:2103.14030).

Patches are embedded by a strided convolution. A stage is a list of pre-norm layers, whose attention runs in windows of
the feature map; every second layer shifts the map by half a window first, and tokens that the shift made neighbours do
not see each other. Between two stages, two by two tokens become one of twice the width (`Merging`). Names follow the
ViT module: ``stages/1/layers/0/attn/q_proj/kernel``, ``stages/0/merging/reduction/kernel``, ``classifier/kernel``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qjax.errors import ModelError, near
from qjax.models.activations import ACTIVATIONS
from qjax.models.classifier import Classifier
from qjax.models.family import Family
from qjax.models.vit import MLP, pair

ARCHITECTURE = "SwinForImageClassification"

BLOCKED = -100.0
"""Added to the scores of tokens that do not see each other, as in the published code."""


@dataclasses.dataclass(frozen=True)
class SwinConfig:
    """Sizes of a classifier; names follow Hugging Face's ``config.json``.

    Attributes:
        embed_dim: channels of the first stage; each later one has twice as many.
        depths, num_heads: layers and attention heads of each stage.
        window_size: side of a window, in tokens.
        mlp_ratio: inner width of an MLP over its outer one.
        image_size, patch_size: (height, width) in pixels; images are padded to whole patches.
        use_absolute_embeddings: learned positions beside those of windows.
        num_labels: classes. labels: their names, or empty.
    """

    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window_size: int = 7
    mlp_ratio: float = 4.0
    image_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] = (4, 4)
    num_channels: int = 3
    num_labels: int = 1000
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    qkv_bias: bool = True
    use_absolute_embeddings: bool = False
    labels: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    architecture: str = ARCHITECTURE

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.num_heads) or not self.depths:
            raise ModelError(
                f"depths {list(self.depths)} and num_heads {list(self.num_heads)} have one number for each stage; mend "
                "config.json."
            )
        for stage, heads in enumerate(self.num_heads):
            if heads < 1 or (self.embed_dim << stage) % heads:
                raise ModelError(
                    f"stage {stage} has {self.embed_dim << stage} channels, not a multiple of its {heads} heads "
                    "(embed_dim, num_heads); mend config.json."
                )
        if self.hidden_act not in ACTIVATIONS:
            hint = near(self.hidden_act, ACTIVATIONS)
            raise ModelError(f"hidden_act {self.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}{hint}.")
        for stage, grid in enumerate(self.grids):
            if min(grid) < self.window_size:
                raise ModelError(
                    f"stage {stage} has {grid[0]} by {grid[1]} tokens, fewer than a window of {self.window_size}; take "
                    "larger images (image_size) or fewer stages."
                )

    @property
    def grids(self) -> list[tuple[int, int]]:
        """(height, width) of the tokens of each stage."""
        height, width = (-(-n // p) for n, p in zip(self.image_size, self.patch_size, strict=True))
        return [(-(-height >> s), -(-width >> s)) for s in range(len(self.depths))]

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> SwinConfig:
        """Read a parsed ``config.json``.

        Raises:
            ModelError: sizes are missing or contradict each other.
        """
        given = {k: v for k, v in config.items() if v is not None}
        missing = [k for k in ("embed_dim", "depths", "num_heads") if k not in given]
        if missing:
            raise ModelError(f"config.json of a {ARCHITECTURE} lacks {', '.join(missing)}; take the checkpoint's own.")
        labels = given.get("id2label") or {}
        plain = ("window_size", "mlp_ratio", "num_channels", "hidden_act", "layer_norm_eps", "qkv_bias")
        return cls(
            embed_dim=given["embed_dim"],
            depths=tuple(given["depths"]),
            num_heads=tuple(given["num_heads"]),
            **{k: given[k] for k in plain if k in given},
            image_size=pair(given.get("image_size", 224)),
            patch_size=pair(given.get("patch_size", 4)),
            use_absolute_embeddings=bool(given.get("use_absolute_embeddings", False)),
            num_labels=len(labels) or given.get("num_labels", 2),
            labels=tuple(labels[k] for k in sorted(labels, key=int)),
        )


@functools.lru_cache(maxsize=32)
def _relative(window: int) -> np.ndarray:
    """Row of the table of positions for each pair of tokens of a window, [tokens, tokens]."""
    rows, columns = (a.ravel() for a in np.mgrid[:window, :window])
    down, right = (a[:, None] - a[None, :] + window - 1 for a in (rows, columns))
    return down * (2 * window - 1) + right


@functools.lru_cache(maxsize=32)
def _blocked(grid: tuple[int, int], window: int, shift: int) -> np.ndarray:
    """Which pairs of tokens do not see each other after a shift, [windows, tokens, tokens] of a padded grid."""
    parts = [np.searchsorted([n - window, n - shift], np.arange(n), side="right") for n in grid]
    region = parts[0][:, None] * 3 + parts[1][None, :]
    ids = _split(region[None, :, :, None], window)[..., 0]
    return ids[:, :, None] != ids[:, None, :]


def _split(x: Any, window: int) -> Any:
    """[B, H, W, C] to windows [B * windows, tokens, C]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // window, window, w // window, window, c).swapaxes(2, 3)
    return x.reshape(-1, window * window, c)


def _join(x: Any, window: int, grid: tuple[int, int]) -> Any:
    """Windows back to [B, H, W, C]."""
    h, w = grid
    x = x.reshape(-1, h // window, w // window, window, window, x.shape[-1]).swapaxes(2, 3)
    return x.reshape(-1, h, w, x.shape[-1])


class Attention(nnx.Module):
    """Attention in windows, with a learned score for each relative position."""

    def __init__(self, config: SwinConfig, size: int, heads: int, rngs: nnx.Rngs) -> None:
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, nnx.Linear(size, size, use_bias=config.qkv_bias, rngs=rngs))
        self.o_proj = nnx.Linear(size, size, rngs=rngs)
        count = (2 * config.window_size - 1) ** 2
        self.positions = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (count, heads)))
        self.heads, self.window = heads, config.window_size

    def __call__(self, x: jax.Array, blocked: np.ndarray | None) -> jax.Array:
        """X [B * windows, tokens, size] to the same shape; ``blocked`` [windows, tokens, tokens]."""
        split = (*x.shape[:-1], self.heads, -1)
        q, k, v = (getattr(self, name)(x).reshape(split) for name in ("q_proj", "k_proj", "v_proj"))
        bias = self.positions[...][_relative(self.window)].transpose(2, 0, 1)[None].astype(x.dtype)
        if blocked is not None:
            bias = bias + jnp.asarray(np.where(blocked, BLOCKED, 0.0)[:, None], x.dtype)
            images = x.shape[0] // blocked.shape[0]
            bias = jnp.broadcast_to(bias[None], (images, *bias.shape)).reshape(-1, *bias.shape[1:])
        return self.o_proj(jax.nn.dot_product_attention(q, k, v, bias=bias).reshape(x.shape))


class Layer(nnx.Module):
    """Attention and MLP, each behind a LayerNorm and beside the residual stream."""

    def __init__(self, config: SwinConfig, stage: int, shifted: bool, rngs: nnx.Rngs) -> None:
        size, self.grid, self.window = config.embed_dim << stage, config.grids[stage], config.window_size
        norm = {"epsilon": config.layer_norm_eps, "use_fast_variance": False, "rngs": rngs}
        self.attn_norm = nnx.LayerNorm(size, **norm)
        self.attn = Attention(config, size, config.num_heads[stage], rngs)
        self.mlp_norm = nnx.LayerNorm(size, **norm)
        self.mlp = MLP(size, int(config.mlp_ratio * size), config.hidden_act, rngs)
        self.shift = self.window // 2 if shifted and min(self.grid) > self.window else 0

    def __call__(self, x: jax.Array) -> jax.Array:
        """X [B, H, W, size] to the same shape."""
        h, w = self.grid
        y = jnp.pad(self.attn_norm(x), ((0, 0), (0, -h % self.window), (0, -w % self.window), (0, 0)))
        padded, blocked = (y.shape[1], y.shape[2]), None
        if self.shift:
            y = jnp.roll(y, (-self.shift, -self.shift), (1, 2))
            blocked = _blocked(padded, self.window, self.shift)
        y = _join(self.attn(_split(y, self.window), blocked), self.window, padded)
        if self.shift:
            y = jnp.roll(y, (self.shift, self.shift), (1, 2))
        x = x + y[:, :h, :w]
        return x + self.mlp(self.mlp_norm(x))


class Merging(nnx.Module):
    """Two by two tokens to one of twice the width."""

    def __init__(self, size: int, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(4 * size, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.reduction = nnx.Linear(4 * size, 2 * size, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """X [B, H, W, size] to [B, H / 2, W / 2, 2 size], rounded up."""
        x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
        parts = [x[:, row::2, column::2] for column in range(2) for row in range(2)]
        return self.reduction(self.norm(jnp.concatenate(parts, axis=-1)))


class Stage(nnx.Module):
    """Layers of one width, and what leads to the next one."""

    def __init__(self, config: SwinConfig, stage: int, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([Layer(config, stage, bool(n % 2), rngs) for n in range(config.depths[stage])])
        self.last = stage + 1 == len(config.depths)
        if not self.last:
            self.merging = Merging(config.embed_dim << stage, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """X [B, H, W, size] to the next stage's [B, H, W, size]."""
        for layer in self.layers:
            x = layer(x)
        return x if self.last else self.merging(x)


class Embeddings(nnx.Module):
    """Pixels to tokens."""

    def __init__(self, config: SwinConfig, rngs: nnx.Rngs) -> None:
        patch, size = config.patch_size, config.embed_dim
        self.patch = nnx.Conv(config.num_channels, size, patch, strides=patch, padding="VALID", rngs=rngs)
        self.norm = nnx.LayerNorm(size, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        if config.use_absolute_embeddings:
            count = math.prod(n // p for n, p in zip(config.image_size, patch, strict=True))
            self.position = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (1, count, size)))
        self.config = config

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Pixels [B, H, W, channels] to tokens [B, H, W, size]."""
        c = self.config
        if pixels.ndim != 4 or pixels.shape[1:] != (*c.image_size, c.num_channels):
            wanted = f"[B, {c.image_size[0]}, {c.image_size[1]}, {c.num_channels}]"
            raise ModelError(f"pixels have shape {tuple(pixels.shape)}, but this model takes {wanted}; resize them.")
        fill = [(0, -n % p) for n, p in zip(c.image_size, c.patch_size, strict=True)]
        x = self.norm(self.patch(jnp.pad(pixels, ((0, 0), *fill, (0, 0)))))
        return x + self.position[...].reshape(1, *x.shape[1:]).astype(x.dtype) if c.use_absolute_embeddings else x


class Swin(nnx.Module):
    """An image classifier.

    Args:
        config: sizes.
        rngs: where initial weights come from; ``nnx.Rngs(0)``.
    """

    def __init__(self, config: SwinConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embeddings = Embeddings(config, rngs)
        self.stages = nnx.List([Stage(config, n, rngs) for n in range(len(config.depths))])
        size = config.embed_dim << (len(config.depths) - 1)
        self.norm = nnx.LayerNorm(size, epsilon=config.layer_norm_eps, use_fast_variance=False, rngs=rngs)
        self.classifier = nnx.Linear(size, config.num_labels, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Class logits: pixels [B, H, W, channels] (already normalised) to [B, num_labels]."""
        x = self.embeddings(pixels)
        for stage in self.stages:
            x = stage(x)
        return self.classifier(jnp.mean(self.norm(x), axis=(1, 2)))


@dataclasses.dataclass(frozen=True)
class SwinClassifier(Classifier):
    """A classifier as a function of its parameters: ``fn(params, pixels [B, H, W, 3]) -> logits [B, classes]``."""

    config: SwinConfig
    network: ClassVar[Any] = Swin


def names(config: SwinConfig) -> dict[str, tuple[str, ...]]:
    """Our names to those of checkpoints: transformers 4 writes the first dialect, transformers 5 the second."""
    stage, layer = "swin.encoder.layers.{0}.", "swin.encoder.layers.{0}.blocks.{1}."
    own = {
        "embeddings/patch": ("swin.embeddings.patch_embeddings.projection",),
        "embeddings/norm": ("swin.embeddings.norm",),
        "embeddings/position": ("swin.embeddings.position_embeddings",),
        "norm": ("swin.layernorm",),
        "classifier": ("classifier",),
        "stages/*/merging": (f"{stage}downsample",),
    }
    per_layer = {
        "attn_norm": ("layernorm_before", "layernorm_before"),
        "mlp_norm": ("layernorm_after", "layernorm_after"),
        "attn/q_proj": ("attention.self.query", "attention.q_proj"),
        "attn/k_proj": ("attention.self.key", "attention.k_proj"),
        "attn/v_proj": ("attention.self.value", "attention.v_proj"),
        "attn/o_proj": ("attention.output.dense", "attention.o_proj"),
        "attn/positions": (
            "attention.self.relative_position_bias_table",
            "attention.relative_position_bias.relative_position_bias_table",
        ),
        "mlp/up": ("intermediate.dense", "mlp.fc1"),
        "mlp/down": ("output.dense", "mlp.fc2"),
    }
    return own | {f"stages/*/layers/*/{k}": tuple(layer + name for name in v) for k, v in per_layer.items()}


FAMILY = Family(
    architectures={ARCHITECTURE: "swin"},
    config=SwinConfig.from_hf,
    function=SwinClassifier,
    names=names,
    ignored=r"relative_position_index$|\.pooler\.|\.mask_token$",
)

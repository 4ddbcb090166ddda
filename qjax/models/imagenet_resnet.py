"""Residual networks for ImageNet in Flax NNX: ResNet-18 to ResNet-152 of He et al. (2015), table 1.

A 7x7 convolution and a maximum, four stages of basic or bottleneck blocks, global average pooling and a linear. Where a
block changes the shape, its shortcut is a 1x1 convolution. A bottleneck strides in its 3x3 convolution ("v1.5", as
torchvision and timm have it) unless the configuration says otherwise. Names: ``stages/1/blocks/0/convs/2/conv/kernel``.

Folders of transformers, and weights named as by torchvision and timm, are read (`names`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.errors import ModelError, near
from qjax.models.activations import ACTIVATIONS
from qjax.models.convolutional import LEAVES, ConvClassifier, ConvNorm, check_pixels
from qjax.models.family import Family

ARCHITECTURE = "ResNetForImageClassification"
KINDS = ("basic", "bottleneck")


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """Sizes of a residual network; names follow Hugging Face's ``config.json``.

    Attributes:
        embedding_size: channels behind the first convolution.
        hidden_sizes, depths: channels and blocks of each stage.
        layer_type: "basic" (two 3x3 convolutions) or "bottleneck" (1x1, 3x3 at a quarter of the width, 1x1).
        downsample_in_first_stage: whether the first stage halves the image too.
        downsample_in_bottleneck: whether a bottleneck strides in its first convolution.
        num_labels: classes. labels: their names, or empty.
    """

    embedding_size: int = 64
    hidden_sizes: tuple[int, ...] = (256, 512, 1024, 2048)
    depths: tuple[int, ...] = (3, 4, 6, 3)
    layer_type: str = "bottleneck"
    hidden_act: str = "relu"
    downsample_in_first_stage: bool = False
    downsample_in_bottleneck: bool = False
    num_channels: int = 3
    num_labels: int = 1000
    labels: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    architecture: str = ARCHITECTURE

    def __post_init__(self) -> None:
        if self.layer_type not in KINDS:
            raise ModelError(f"layer_type {self.layer_type!r}: {' or '.join(KINDS)}{near(self.layer_type, KINDS)}.")
        if len(self.hidden_sizes) != len(self.depths) or not self.depths or min(self.depths) < 1:
            raise ModelError(
                f"hidden_sizes {list(self.hidden_sizes)} and depths {list(self.depths)} have one number, 1 or "
                "more, for each stage; mend config.json."
            )
        if self.hidden_act not in ACTIVATIONS:
            hint = near(self.hidden_act, ACTIVATIONS)
            raise ModelError(f"hidden_act {self.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}{hint}.")

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> ResNetConfig:
        """Read a parsed ``config.json``.

        Raises:
            ModelError: sizes contradict each other.
        """
        known = {f.name for f in dataclasses.fields(cls)} - {"labels", "architecture", "num_labels"}
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in known and v is not None}
        return cls(**given, **classes(config))


def classes(config: dict[str, Any]) -> dict[str, Any]:
    """Number and names of the classes of a ``config.json``."""
    labels = config.get("id2label") or {}
    names = tuple(labels[k] for k in sorted(labels, key=int))
    return {"num_labels": len(names) or config.get("num_labels", 2), "labels": names}


class Block(nnx.Module):
    """``act(shortcut(x) + convs(x))``."""

    def __init__(self, config: ResNetConfig, ins: int, outs: int, stride: int, rngs: nnx.Rngs) -> None:
        act = ACTIVATIONS[config.hidden_act]
        if config.layer_type == "basic":
            plan = [(ins, outs, 3, stride), (outs, outs, 3, 1)]
        else:
            strides, inner = (stride, 1) if config.downsample_in_bottleneck else (1, stride), outs // 4
            plan = [(ins, inner, 1, strides[0]), (inner, inner, 3, strides[1]), (inner, outs, 1, 1)]
        # transformers gives every inner convolution a ReLU, whatever hidden_act says
        last = len(plan) - 1
        self.convs = nnx.List(
            [
                ConvNorm(i, o, size, rngs, stride=s, act=None if n == last else jax.nn.relu)
                for n, (i, o, size, s) in enumerate(plan)
            ]
        )
        self.shortcut = ConvNorm(ins, outs, 1, rngs, stride=stride) if ins != outs or stride != 1 else None
        self.act = act

    def __call__(self, x: jax.Array, momentum: float | None = None) -> jax.Array:
        """X [B, H, W, ins] to [B, H / stride, W / stride, outs]."""
        y = x
        for conv in self.convs:
            y = conv(y, momentum)
        return self.act(y + (x if self.shortcut is None else self.shortcut(x, momentum)))


class Stage(nnx.Module):
    """Blocks of one width, the first of which may stride."""

    def __init__(self, config: ResNetConfig, number: int, ins: int, rngs: nnx.Rngs) -> None:
        outs, depth = config.hidden_sizes[number], config.depths[number]
        stride = 2 if number or config.downsample_in_first_stage else 1
        self.blocks = nnx.List(
            [Block(config, outs if n else ins, outs, 1 if n else stride, rngs) for n in range(depth)]
        )

    def __call__(self, x: jax.Array, momentum: float | None = None) -> jax.Array:
        """X [B, H, W, ins] to [B, H / stride, W / stride, outs]."""
        for block in self.blocks:
            x = block(x, momentum)
        return x


class ResNet(nnx.Module):
    """An image classifier.

    Args:
        config: sizes.
        rngs: where initial weights come from; ``nnx.Rngs(0)``.
    """

    def __init__(self, config: ResNetConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        act = ACTIVATIONS[config.hidden_act]
        self.stem = ConvNorm(config.num_channels, config.embedding_size, 7, rngs, stride=2, act=act)
        sizes = (config.embedding_size, *config.hidden_sizes)
        self.stages = nnx.List([Stage(config, n, sizes[n], rngs) for n in range(len(config.depths))])
        self.classifier = nnx.Linear(sizes[-1], config.num_labels, rngs=rngs)

    def __call__(self, pixels: jax.Array, momentum: float | None = None) -> jax.Array:
        """Class logits: normalised pixels [B, H, W, channels] to [B, num_labels]; ``momentum`` as BatchNorm's."""
        check_pixels(pixels, self.config.num_channels)
        around: Any = ((1, 1), (1, 1))  # not SAME, which pads one side of an even image
        x = nnx.max_pool(self.stem(pixels, momentum), (3, 3), strides=(2, 2), padding=around)
        for stage in self.stages:
            x = stage(x, momentum)
        return self.classifier(jnp.mean(x, axis=(1, 2)))


@dataclasses.dataclass(frozen=True)
class ResNetClassifier(ConvClassifier):
    """A residual network as a function of its parameters: ``fn(params, pixels [B, H, W, 3]) -> logits [B, classes]``.

    Attributes:
        config: sizes.
    """

    config: ResNetConfig
    network: ClassVar[Any] = ResNet


def names(config: ResNetConfig) -> dict[str, tuple[str, ...]]:
    """Our names to those of checkpoints: transformers, then torchvision and timm, which agree."""
    out = {
        "stem/conv": ("resnet.embedder.embedder.convolution", "conv1"),
        "stem/norm": ("resnet.embedder.embedder.normalization", "bn1"),
        "classifier": ("classifier.1", "fc"),
    }
    convs = 2 if config.layer_type == "basic" else 3
    for stage, depth in enumerate(config.depths):
        for block in range(depth):
            ours = f"stages/{stage}/blocks/{block}"
            theirs, old = f"resnet.encoder.stages.{stage}.layers.{block}", f"layer{stage + 1}.{block}"
            for n in range(convs):
                out[f"{ours}/convs/{n}/conv"] = (f"{theirs}.layer.{n}.convolution", f"{old}.conv{n + 1}")
                out[f"{ours}/convs/{n}/norm"] = (f"{theirs}.layer.{n}.normalization", f"{old}.bn{n + 1}")
            out[f"{ours}/shortcut/conv"] = (f"{theirs}.shortcut.convolution", f"{old}.downsample.0")
            out[f"{ours}/shortcut/norm"] = (f"{theirs}.shortcut.normalization", f"{old}.downsample.1")
    return out


_BASIC = {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512]}

FAMILY = Family(
    architectures={ARCHITECTURE: "resnet"},
    config=ResNetConfig.from_hf,
    function=ResNetClassifier,
    names=names,
    leaves=LEAVES,
    ignored=r"\.num_batches_tracked$",
    timm={
        "resnet18": {**_BASIC, "depths": [2, 2, 2, 2]},
        "resnet34": {**_BASIC, "depths": [3, 4, 6, 3]},
        "resnet50": {"depths": [3, 4, 6, 3]},
        "resnet101": {"depths": [3, 4, 23, 3]},
        "resnet152": {"depths": [3, 8, 36, 3]},
    },
)

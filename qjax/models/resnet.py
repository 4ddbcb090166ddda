"""Residual networks for CIFAR in Flax NNX: ResNet-20 to ResNet-110 of He et al. (2015), section 4.2.

A 3x3 convolution, three stages of basic blocks (the second and third begin with stride 2), global average pooling and
a linear. Shortcuts are option A, without parameters: where a block halves the image, the shortcut takes every second
pixel and fills the new channels with zeros, a half of them on each side.

Convolutions are NHWC, and batch normalisation is in its inference form unless asked: running mean and variance are
leaves of ``params`` (``stage1/0/bn1/mean``), used as constants. The training form normalises with the statistics of
the batch and returns the moved ones; nothing is kept aside.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.errors import ModelError
from qjax.models.convolutional import LEAVES, BatchNorm, ConvClassifier
from qjax.models.family import Family

ARCHITECTURE = "CifarResNet"


@dataclasses.dataclass(frozen=True)
class CifarResNetConfig:
    """Sizes of a residual network; names follow its ``config.json``.

    Attributes:
        blocks_per_stage: basic blocks of each stage; depth is six times as many and two.
        widths: channels of the stages.
        num_classes: outputs.
        image_size: (height, width) in pixels.
        batch_norm_eps: added to variances.
        labels: names of the classes, or empty.
    """

    blocks_per_stage: int = 3
    widths: tuple[int, ...] = (16, 32, 64)
    num_classes: int = 10
    image_size: tuple[int, int] = (32, 32)
    num_channels: int = 3
    batch_norm_eps: float = 1e-5
    labels: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    architecture: str = ARCHITECTURE

    def __post_init__(self) -> None:
        for name in ("blocks_per_stage", "num_classes", "num_channels"):
            value = getattr(self, name)
            if not isinstance(value, int) or value <= 0:
                raise ModelError(f"{name} is {value!r}, but must be a positive integer; mend config.json.")
        if not self.widths or not all(isinstance(w, int) and w > 0 for w in self.widths):
            raise ModelError(f"widths is {list(self.widths)!r}, but must list positive integers; mend config.json.")
        for before, after in zip(self.widths, self.widths[1:], strict=False):
            if after < before or (after - before) % 2:
                raise ModelError(
                    f"widths go from {before} to {after}, but a shortcut pads evenly on both sides, so that they must "
                    "grow by even numbers; mend config.json."
                )

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> CifarResNetConfig:
        """Read a parsed ``config.json`` of model_type ``cifar_resnet``.

        Raises:
            ModelError: ``blocks_per_stage`` is missing, ``depth`` contradicts it, or the shortcuts are not option A.
        """
        given = {k: v for k, v in config.items() if v is not None}
        if "blocks_per_stage" not in given:
            raise ModelError(f"config.json of a {ARCHITECTURE} lacks blocks_per_stage; take the one of the checkpoint.")
        shortcut = str(given.get("shortcut", "A"))
        if not shortcut.startswith("A"):
            raise ModelError(f"shortcut is {shortcut!r}, but only A (without parameters) is supported.")
        widths, size = tuple(given.get("widths", (16, 32, 64))), given.get("image_size", 32)
        blocks = given["blocks_per_stage"]
        depth = given.get("depth")
        if depth is not None and depth != 2 * len(widths) * blocks + 2:
            raise ModelError(
                f"depth is {depth}, but {len(widths)} stages of {blocks} blocks make {2 * len(widths) * blocks + 2}; "
                "mend config.json."
            )
        return cls(
            blocks_per_stage=blocks,
            widths=widths,
            num_classes=given.get("num_classes", 10),
            image_size=(size, size) if isinstance(size, int) else (int(size[0]), int(size[1])),
            num_channels=given.get("num_channels", 3),
            batch_norm_eps=float(given.get("batch_norm_eps", 1e-5)),
            labels=tuple(given.get("classes", ())),
        )


def _conv(ins: int, outs: int, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
    init = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")
    padding = ((1, 1), (1, 1))  # not SAME: with stride 2 that pads one side only
    return nnx.Conv(ins, outs, (3, 3), strides=stride, padding=padding, use_bias=False, kernel_init=init, rngs=rngs)


class Block(nnx.Module):
    """``relu(shortcut(x) + bn2(conv2(relu(bn1(conv1(x))))))``."""

    def __init__(self, ins: int, outs: int, stride: int, eps: float, rngs: nnx.Rngs) -> None:
        self.conv1 = _conv(ins, outs, stride, rngs)
        self.bn1 = BatchNorm(outs, eps)
        self.conv2 = _conv(outs, outs, 1, rngs)
        self.bn2 = BatchNorm(outs, eps)
        self.stride = stride
        self.padding = (outs - ins) // 2

    def __call__(self, x: jax.Array, momentum: float | None = None) -> jax.Array:
        """X [B, H, W, ins] to [B, H / stride, W / stride, outs]."""
        y = jax.nn.relu(self.bn1(self.conv1(x), momentum))
        y = self.bn2(self.conv2(y), momentum)
        x = x[:, :: self.stride, :: self.stride]
        return jax.nn.relu(jnp.pad(x, ((0, 0), (0, 0), (0, 0), (self.padding, self.padding))) + y)


class CifarResNet(nnx.Module):
    """An image classifier.

    Args:
        config: sizes.
        rngs: where initial weights come from; ``nnx.Rngs(0)``.
    """

    def __init__(self, config: CifarResNetConfig, *, rngs: nnx.Rngs) -> None:
        c = config
        self.config = c
        self.conv1 = _conv(c.num_channels, c.widths[0], 1, rngs)
        self.bn1 = BatchNorm(c.widths[0], c.batch_norm_eps)
        ins = c.widths[0]
        for number, width in enumerate(c.widths):
            strides = [2 if number else 1] + [1] * (c.blocks_per_stage - 1)
            sizes = [ins] + [width] * (c.blocks_per_stage - 1)
            blocks = [Block(i, width, s, c.batch_norm_eps, rngs) for i, s in zip(sizes, strides, strict=True)]
            setattr(self, f"stage{number + 1}", nnx.List(blocks))
            ins = width
        self.linear = nnx.Linear(ins, c.num_classes, rngs=rngs)

    def __call__(self, pixels: jax.Array, momentum: float | None = None) -> jax.Array:
        """Class logits: normalised pixels [B, H, W, channels] to [B, num_classes]; ``momentum`` as BatchNorm's."""
        c = self.config
        if pixels.ndim != 4 or pixels.shape[1:] != (*c.image_size, c.num_channels):
            wanted = f"[B, {c.image_size[0]}, {c.image_size[1]}, {c.num_channels}]"
            raise ModelError(f"pixels have shape {tuple(pixels.shape)}, but this model takes {wanted}; resize them.")
        x = jax.nn.relu(self.bn1(self.conv1(pixels), momentum))
        for number in range(len(c.widths)):
            for block in getattr(self, f"stage{number + 1}"):
                x = block(x, momentum)
        return self.linear(jnp.mean(x, axis=(1, 2)))


@dataclasses.dataclass(frozen=True)
class CifarClassifier(ConvClassifier):
    """A residual network as a function of its parameters: ``fn(params, pixels [B, H, W, 3]) -> logits [B, classes]``.

    Attributes:
        config: sizes.
    """

    config: CifarResNetConfig
    network: ClassVar[Any] = CifarResNet


def names(config: CifarResNetConfig) -> dict[str, tuple[str, ...]]:
    """Our names to those of checkpoints."""
    stages = {f"stage{i}/*": (f"layer{i}.{{0}}",) for i in range(1, len(config.widths) + 1)}
    return {"conv1": ("conv1",), "bn1": ("bn1",), "linear": ("linear",), **stages}


FAMILY = Family(
    architectures={ARCHITECTURE: "cifar_resnet"},
    config=CifarResNetConfig.from_hf,
    function=CifarClassifier,
    names=names,
    leaves=LEAVES,
    ignored=r"\.num_batches_tracked$",
)

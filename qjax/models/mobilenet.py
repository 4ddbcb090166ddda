"""MobileNetV2 in Flax NNX (Sandler et al. 2018, arXiv:1801.04381).

Inverted residual blocks: a 1x1 convolution widens, a depthwise 3x3 one filters, a 1x1 one narrows without activation;
where a block keeps the shape, its input is added. ReLU6 everywhere else. Folders of transformers, and weights named as
by torchvision and timm, are read (`names`); the two latter pad on both sides (``tf_padding`` false) and have
``layer_norm_eps`` 1e-5. Names: ``layers/3/depthwise/conv/kernel``.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.errors import ModelError, near
from qjax.models.activations import ACTIVATIONS
from qjax.models.convolutional import LEAVES, ConvClassifier, ConvNorm, Padding, check_pixels
from qjax.models.family import Family
from qjax.models.imagenet_resnet import classes

ARCHITECTURE = "MobileNetV2ForImageClassification"

STAGES = ((16, 1, 1), (24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))
"""(channels, blocks, stride) of each stage; the only block of the first one does not widen."""


def rounded(channels: float, divisor: int, least: int) -> int:
    """The multiple of ``divisor`` that is nearest, not below ``least``, and not more than a tenth below."""
    near_ = max(least, int(channels + divisor / 2) // divisor * divisor)
    return near_ + divisor if near_ < 0.9 * channels else near_


@dataclasses.dataclass(frozen=True)
class MobileNetV2Config:
    """Sizes of a MobileNetV2; names follow Hugging Face's ``config.json``.

    Attributes:
        depth_multiplier: factor on all numbers of channels, which are multiples of ``depth_divisible_by`` and at least
            ``min_depth``.
        expand_ratio: inner width of a block over its input's.
        finegrained_output: keep 1280 channels before the classifier with multipliers below 1.
        tf_padding: pad as TensorFlow does: with a stride the odd pixel goes behind.
        layer_norm_eps: added to variances.
        num_labels: classes. labels: their names, or empty.
    """

    depth_multiplier: float = 1.0
    depth_divisible_by: int = 8
    min_depth: int = 8
    expand_ratio: float = 6.0
    finegrained_output: bool = True
    tf_padding: bool = True
    layer_norm_eps: float = 0.001
    hidden_act: str = "relu6"
    num_channels: int = 3
    num_labels: int = 1001
    labels: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    architecture: str = ARCHITECTURE

    def __post_init__(self) -> None:
        if not self.depth_multiplier > 0:
            raise ModelError(f"depth_multiplier is {self.depth_multiplier!r}, but must be above 0; mend config.json.")
        if self.hidden_act not in ACTIVATIONS:
            hint = near(self.hidden_act, ACTIVATIONS)
            raise ModelError(f"hidden_act {self.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}{hint}.")

    def channels(self, count: float) -> int:
        """A number of channels of the paper, with the multiplier."""
        return rounded(round(count * self.depth_multiplier), self.depth_divisible_by, self.min_depth)

    def inner(self, ins: int) -> int:
        """The width inside a block of this many input channels."""
        return rounded(round(ins * self.expand_ratio), self.depth_divisible_by, self.min_depth)

    @property
    def head(self) -> int:
        """Channels before the classifier."""
        return 1280 if self.finegrained_output and self.depth_multiplier < 1 else self.channels(1280)

    def blocks(self) -> list[tuple[int, int, int, int, int]]:
        """(stage, number in it, input channels, output channels, stride) of all blocks."""
        out, ins = [], self.channels(32)
        for stage, (outs, depth, stride) in enumerate(STAGES):
            for n in range(depth):
                out.append((stage, n, ins, self.channels(outs), 1 if n else stride))
                ins = self.channels(outs)
        return out

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> MobileNetV2Config:
        """Read a parsed ``config.json``.

        Raises:
            ModelError: settings that are not supported (dilated convolutions, a stem that widens by itself).
        """
        if config.get("output_stride") not in (None, 32):
            raise ModelError(f"output_stride is {config['output_stride']!r}, and only 32 (no dilation) is supported.")
        if not config.get("first_layer_is_expansion", True):
            raise ModelError("first_layer_is_expansion is false, and only true is supported.")
        known = {f.name for f in dataclasses.fields(cls)} - {"labels", "architecture", "num_labels"}
        return cls(**{k: v for k, v in config.items() if k in known and v is not None}, **classes(config))


class Block(nnx.Module):
    """Widen, filter, narrow; with the input added where the shape stays."""

    def __init__(
        self, config: MobileNetV2Config, ins: int, outs: int, stride: int, widen: bool, rngs: nnx.Rngs
    ) -> None:
        eps, act = config.layer_norm_eps, ACTIVATIONS[config.hidden_act]
        inner = config.inner(ins) if widen else ins
        self.expand = ConvNorm(ins, inner, 1, rngs, act=act, eps=eps) if widen else None
        self.depthwise = ConvNorm(inner, inner, 3, rngs, stride=stride, padding="SAME" if config.tf_padding else None,
                                  depthwise=True, act=act, eps=eps)  # fmt: skip
        self.project = ConvNorm(inner, outs, 1, rngs, eps=eps)
        self.adds = widen and stride == 1 and ins == outs

    def __call__(self, x: jax.Array, momentum: float | None = None) -> jax.Array:
        """X [B, H, W, ins] to [B, H / stride, W / stride, outs]."""
        y = x if self.expand is None else self.expand(x, momentum)
        y = self.project(self.depthwise(y, momentum), momentum)
        return x + y if self.adds else y


class MobileNetV2(nnx.Module):
    """An image classifier.

    Args:
        config: sizes.
        rngs: where initial weights come from; ``nnx.Rngs(0)``.
    """

    def __init__(self, config: MobileNetV2Config, *, rngs: nnx.Rngs) -> None:
        self.config = config
        eps, act = config.layer_norm_eps, ACTIVATIONS[config.hidden_act]
        padding: Padding | None = "SAME" if config.tf_padding else None
        self.stem = ConvNorm(config.num_channels, config.channels(32), 3, rngs, stride=2, padding=padding, act=act,
                             eps=eps)  # fmt: skip
        self.layers = nnx.List(
            [Block(config, ins, outs, stride, stage > 0, rngs) for stage, _, ins, outs, stride in config.blocks()]
        )
        self.top = ConvNorm(config.blocks()[-1][3], config.head, 1, rngs, act=act, eps=eps)
        self.classifier = nnx.Linear(config.head, config.num_labels, rngs=rngs)

    def __call__(self, pixels: jax.Array, momentum: float | None = None) -> jax.Array:
        """Class logits: normalised pixels [B, H, W, channels] to [B, num_labels]; ``momentum`` as BatchNorm's."""
        check_pixels(pixels, self.config.num_channels)
        x = self.stem(pixels, momentum)
        for layer in self.layers:
            x = layer(x, momentum)
        return self.classifier(jnp.mean(self.top(x, momentum), axis=(1, 2)))


@dataclasses.dataclass(frozen=True)
class MobileNetV2Classifier(ConvClassifier):
    """A MobileNetV2 as a function of its parameters: ``fn(params, pixels [B, H, W, 3]) -> logits [B, classes]``.

    Attributes:
        config: sizes.
    """

    config: MobileNetV2Config
    network: ClassVar[Any] = MobileNetV2


def names(config: MobileNetV2Config) -> dict[str, tuple[str, ...]]:
    """Our names to those of checkpoints: transformers, torchvision, timm."""
    own, last = "mobilenet_v2.", len(config.blocks()) + 1
    out = {
        "stem/conv": (f"{own}conv_stem.first_conv.convolution", "features.0.0", "conv_stem"),
        "stem/norm": (f"{own}conv_stem.first_conv.normalization", "features.0.1", "bn1"),
        "top/conv": (f"{own}conv_1x1.convolution", f"features.{last}.0", "conv_head"),
        "top/norm": (f"{own}conv_1x1.normalization", f"features.{last}.1", "bn2"),
        "classifier": ("classifier", "classifier.1"),
    }
    for number, (stage, n, *_) in enumerate(config.blocks()):
        hf = f"{own}layer.{number - 1}" if number else f"{own}conv_stem"
        vision, timm = f"features.{number + 1}.conv", f"blocks.{stage}.{n}"
        parts = [("depthwise", "conv_3x3", "conv_dw"), ("project", "reduce_1x1", "conv_pwl" if stage else "conv_pw")]
        if stage:
            parts.insert(0, ("expand", "expand_1x1", "conv_pw"))
        for k, (part, theirs, old) in enumerate(parts):
            ours, narrow = f"layers/{number}/{part}", part == "project"
            conv, norm = (f"{k}", f"{k + 1}") if narrow else (f"{k}.0", f"{k}.1")
            out[f"{ours}/conv"] = (f"{hf}.{theirs}.convolution", f"{vision}.{conv}", f"{timm}.{old}")
            out[f"{ours}/norm"] = (f"{hf}.{theirs}.normalization", f"{vision}.{norm}", f"{timm}.bn{k + 1}")
    return out


_TORCH = {"tf_padding": False, "layer_norm_eps": 1e-5}

FAMILY = Family(
    architectures={ARCHITECTURE: "mobilenet_v2"},
    config=MobileNetV2Config.from_hf,
    function=MobileNetV2Classifier,
    names=names,
    leaves=LEAVES,
    ignored=r"\.num_batches_tracked$",
    timm={"mobilenetv2_100": _TORCH, "mobilenetv2_140": {**_TORCH, "depth_multiplier": 1.4}},
)

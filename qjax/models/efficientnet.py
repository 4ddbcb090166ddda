"""EfficientNet in Flax NNX (Tan and Le 2019, arXiv:1905.11946): B0 and its larger kin.

MobileNetV2's blocks with kernels of 3 or 5, SiLU, and a squeeze-and-excitation between the depthwise and the narrowing
convolution: channels are scaled by a small network of their means. Folders of transformers, and weights of B0 named as
by torchvision and timm, are read (`names`); the two latter pad on both sides (``symmetric_padding``) and have
``batch_norm_eps`` 1e-5. Names: ``blocks/3/excite/reduce/kernel``.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.errors import ModelError, near
from qjax.models.activations import ACTIVATIONS
from qjax.models.convolutional import LEAVES, ConvClassifier, ConvNorm, check_pixels
from qjax.models.family import Family
from qjax.models.imagenet_resnet import classes
from qjax.models.mobilenet import rounded

ARCHITECTURE = "EfficientNetForImageClassification"
_LISTS = ("kernel_sizes", "in_channels", "out_channels", "strides", "num_block_repeats", "expand_ratios")


@dataclasses.dataclass(frozen=True)
class EfficientNetConfig:
    """Sizes of an EfficientNet; names follow Hugging Face's ``config.json``, whose defaults are B7's; these are B0's.

    Attributes:
        width_coefficient, depth_coefficient: factors on channels (multiples of ``depth_divisor``) and on blocks.
        kernel_sizes, in_channels, out_channels, strides, num_block_repeats, expand_ratios: of each stage.
        depthwise_padding: numbers of blocks that pad on both sides where they stride.
        symmetric_padding: every convolution pads on both sides, as in torchvision and timm.
        squeeze_expansion_ratio: inner width of a squeeze-and-excitation over the block's input.
        hidden_dim: channels before the classifier.
        num_labels: classes. labels: their names, or empty.
    """

    width_coefficient: float = 1.0
    depth_coefficient: float = 1.0
    depth_divisor: int = 8
    kernel_sizes: tuple[int, ...] = (3, 3, 5, 3, 5, 5, 3)
    in_channels: tuple[int, ...] = (32, 16, 24, 40, 80, 112, 192)
    out_channels: tuple[int, ...] = (16, 24, 40, 80, 112, 192, 320)
    strides: tuple[int, ...] = (1, 2, 2, 2, 1, 2, 1)
    num_block_repeats: tuple[int, ...] = (1, 2, 2, 3, 3, 4, 1)
    expand_ratios: tuple[int, ...] = (1, 6, 6, 6, 6, 6, 6)
    depthwise_padding: tuple[int, ...] = ()
    symmetric_padding: bool = False
    squeeze_expansion_ratio: float = 0.25
    hidden_act: str = "swish"
    hidden_dim: int = 1280
    batch_norm_eps: float = 0.001
    num_channels: int = 3
    num_labels: int = 1000
    labels: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    architecture: str = ARCHITECTURE

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in _LISTS}
        if len(set(lengths.values())) > 1 or not self.strides:
            said = ", ".join(f"{name} {count}" for name, count in lengths.items())
            raise ModelError(f"these have one number for each stage, and differ: {said}; mend config.json.")
        if self.channels(1280) != self.hidden_dim:
            raise ModelError(
                f"hidden_dim is {self.hidden_dim}, and width_coefficient {self.width_coefficient} makes it "
                f"{self.channels(1280)}; mend config.json."
            )
        if self.hidden_act not in ACTIVATIONS:
            hint = near(self.hidden_act, ACTIVATIONS)
            raise ModelError(f"hidden_act {self.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}{hint}.")

    def channels(self, count: int) -> int:
        """A number of channels of the paper, with the coefficient."""
        return rounded(count * self.width_coefficient, self.depth_divisor, self.depth_divisor)

    def blocks(self) -> list[tuple[int, int, int, int, int]]:
        """(stage, number in it, input channels, output channels, stride) of all blocks."""
        out = []
        for stage, repeats in enumerate(self.num_block_repeats):
            ins, outs = self.channels(self.in_channels[stage]), self.channels(self.out_channels[stage])
            for n in range(math.ceil(self.depth_coefficient * repeats)):
                out.append((stage, n, outs if n else ins, outs, 1 if n else self.strides[stage]))
        return out

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> EfficientNetConfig:
        """Read a parsed ``config.json``.

        Raises:
            ModelError: sizes are missing or contradict each other, or another pooling.
        """
        if config.get("pooling_type", "mean") != "mean":
            raise ModelError(f"pooling_type is {config['pooling_type']!r}, and only 'mean' is supported.")
        known = {f.name for f in dataclasses.fields(cls)} - {"labels", "architecture", "num_labels"}
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in known and v is not None}
        if "width_coefficient" not in given:
            raise ModelError(f"config.json of an {ARCHITECTURE} lacks width_coefficient; take the checkpoint's own.")
        return cls(**given, **classes(config))


class Excite(nnx.Module):
    """Squeeze and excitation: channels scaled by a small network of their means."""

    def __init__(self, config: EfficientNetConfig, size: int, inner: int, rngs: nnx.Rngs) -> None:
        self.reduce = nnx.Conv(size, inner, (1, 1), rngs=rngs)
        self.expand = nnx.Conv(inner, size, (1, 1), rngs=rngs)
        self.act = ACTIVATIONS[config.hidden_act]

    def __call__(self, x: jax.Array) -> jax.Array:
        """X [B, H, W, size] to the same shape."""
        y = jnp.mean(x, axis=(1, 2), keepdims=True)
        return x * jax.nn.sigmoid(self.expand(self.act(self.reduce(y))))


class Block(nnx.Module):
    """Widen, filter, excite, narrow; with the input added where the shape stays."""

    def __init__(self, config: EfficientNetConfig, number: int, rngs: nnx.Rngs) -> None:
        stage, n, ins, outs, stride = config.blocks()[number]
        eps, act = config.batch_norm_eps, ACTIVATIONS[config.hidden_act]
        ratio, size = config.expand_ratios[stage], config.kernel_sizes[stage]
        inner = ins * ratio
        half, padding = size // 2, None
        if stride == 2 and not (config.symmetric_padding or number in config.depthwise_padding):
            padding = ((half - 1, half), (half - 1, half))
        self.expand = ConvNorm(ins, inner, 1, rngs, act=act, eps=eps) if ratio != 1 else None
        self.depthwise = ConvNorm(inner, inner, size, rngs, stride=stride, padding=padding, depthwise=True, act=act,
                                  eps=eps)  # fmt: skip
        self.excite = Excite(config, inner, max(1, int(ins * config.squeeze_expansion_ratio)), rngs)
        self.project = ConvNorm(inner, outs, 1, rngs, eps=eps)
        self.adds = n > 0

    def __call__(self, x: jax.Array, momentum: float | None = None) -> jax.Array:
        """X [B, H, W, ins] to [B, H / stride, W / stride, outs]."""
        y = x if self.expand is None else self.expand(x, momentum)
        y = self.project(self.excite(self.depthwise(y, momentum)), momentum)
        return x + y if self.adds else y


class EfficientNet(nnx.Module):
    """An image classifier.

    Args:
        config: sizes.
        rngs: where initial weights come from; ``nnx.Rngs(0)``.
    """

    def __init__(self, config: EfficientNetConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        eps, act = config.batch_norm_eps, ACTIVATIONS[config.hidden_act]
        behind = None if config.symmetric_padding else ((0, 1), (0, 1))
        self.stem = ConvNorm(config.num_channels, config.channels(32), 3, rngs, stride=2, padding=behind, act=act,
                             eps=eps)  # fmt: skip
        self.blocks = nnx.List([Block(config, n, rngs) for n in range(len(config.blocks()))])
        self.top = ConvNorm(config.blocks()[-1][3], config.hidden_dim, 1, rngs, act=act, eps=eps)
        self.classifier = nnx.Linear(config.hidden_dim, config.num_labels, rngs=rngs)

    def __call__(self, pixels: jax.Array, momentum: float | None = None) -> jax.Array:
        """Class logits: normalised pixels [B, H, W, channels] to [B, num_labels]; ``momentum`` as BatchNorm's."""
        check_pixels(pixels, self.config.num_channels)
        x = self.stem(pixels, momentum)
        for block in self.blocks:
            x = block(x, momentum)
        return self.classifier(jnp.mean(self.top(x, momentum), axis=(1, 2)))


@dataclasses.dataclass(frozen=True)
class EfficientNetClassifier(ConvClassifier):
    """An EfficientNet as a function of its parameters: ``fn(params, pixels [B, H, W, 3]) -> logits [B, classes]``.

    Attributes:
        config: sizes.
    """

    config: EfficientNetConfig
    network: ClassVar[Any] = EfficientNet


def names(config: EfficientNetConfig) -> dict[str, tuple[str, ...]]:
    """Our names to those of checkpoints: transformers, torchvision, timm."""
    own, last = "efficientnet.", len(config.strides) + 1
    out = {
        "stem/conv": (f"{own}embeddings.convolution", "features.0.0", "conv_stem"),
        "stem/norm": (f"{own}embeddings.batchnorm", "features.0.1", "bn1"),
        "top/conv": (f"{own}encoder.top_conv", f"features.{last}.0", "conv_head"),
        "top/norm": (f"{own}encoder.top_bn", f"features.{last}.1", "bn2"),
        "classifier": ("classifier", "classifier.1"),
    }
    for number, (stage, n, *_) in enumerate(config.blocks()):
        hf, ours = f"{own}encoder.blocks.{number}", f"blocks/{number}"
        vision, timm, wide = f"features.{stage + 1}.{n}.block", f"blocks.{stage}.{n}", config.expand_ratios[stage] != 1
        first = int(wide)  # torchvision counts what is there
        pieces = {
            "depthwise": ("depthwise_conv.depthwise_conv", "depthwise_conv.depthwise_norm", first, "conv_dw"),
            "project": (
                "projection.project_conv",
                "projection.project_bn",
                first + 2,
                "conv_pwl" if wide else "conv_pw",
            ),
        }
        if wide:
            pieces["expand"] = ("expansion.expand_conv", "expansion.expand_bn", 0, "conv_pw")
        for part, (conv, norm, at, old) in pieces.items():
            bn = {"expand": 1, "depthwise": first + 1, "project": first + 2}[part]
            out[f"{ours}/{part}/conv"] = (f"{hf}.{conv}", f"{vision}.{at}.0", f"{timm}.{old}")
            out[f"{ours}/{part}/norm"] = (f"{hf}.{norm}", f"{vision}.{at}.1", f"{timm}.bn{bn}")
        for k, part in enumerate(("reduce", "expand"), 1):
            theirs = (f"{hf}.squeeze_excite.{part}", f"{vision}.{first + 1}.fc{k}", f"{timm}.se.conv_{part}")
            out[f"{ours}/excite/{part}"] = theirs
    return out


_TORCH = {"width_coefficient": 1.0, "symmetric_padding": True, "batch_norm_eps": 1e-5}

FAMILY = Family(
    architectures={ARCHITECTURE: "efficientnet"},
    config=EfficientNetConfig.from_hf,
    function=EfficientNetClassifier,
    names=names,
    leaves=LEAVES,
    ignored=r"\.num_batches_tracked$",
    timm={"efficientnet_b0": _TORCH},
)

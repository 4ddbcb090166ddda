"""What convolutional image classifiers share: batch normalisation in two forms, and the function of their parameters.

Convolutions are NHWC, and batch normalisation is in its inference form unless asked: running mean and variance are
leaves of ``params`` (``.../norm/mean``), used as constants. The training form normalises with the statistics of the
batch and returns the moved ones; nothing is kept aside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.errors import ModelError
from qjax.models import family, functional
from qjax.models.classifier import Classifier

LEAVES = {**family.LEAVES, "mean": (".running_mean",), "var": (".running_var",)}
"""How the leaves of such a network end in checkpoints."""

Padding = str | tuple[tuple[int, int], tuple[int, int]]
"""(before, after) for height and width, or "SAME" as TensorFlow counts it: with a stride the odd pixel goes behind."""


class BatchNorm(nnx.Module):
    """``(x - mean) / sqrt(var + eps) * scale + bias`` for each channel."""

    def __init__(self, size: int, eps: float) -> None:
        self.scale = nnx.Param(jnp.ones((size,)))
        self.bias = nnx.Param(jnp.zeros((size,)))
        self.mean = nnx.BatchStat(jnp.zeros((size,)))
        self.var = nnx.BatchStat(jnp.ones((size,)))
        self.eps = eps

    def __call__(self, x: jax.Array, momentum: float | None = None) -> jax.Array:
        """X [B, H, W, size] to the same shape, computed in float32; dtype is kept.

        With ``momentum``, by the statistics of the batch, and this module's move towards them: by so much, as torch
        counts it, the variance as an unbiased estimate. The module is a value made for this one call.
        """
        wide = x.astype(jnp.float32)
        if momentum is None:
            mean, var = self.mean[...], self.var[...]
        else:
            mean = jnp.mean(wide, axis=(0, 1, 2))
            var = jnp.mean(jnp.square(wide - mean), axis=(0, 1, 2))
            count = x.size // x.shape[-1]
            self._move(self.mean, mean, momentum)
            self._move(self.var, var * (count / max(count - 1, 1)), momentum)
        wide = (wide - mean) * jax.lax.rsqrt(var + self.eps)
        return (wide * self.scale[...] + self.bias[...]).astype(x.dtype)

    @staticmethod
    def _move(statistic: nnx.BatchStat, seen: jax.Array, momentum: float) -> None:
        old = statistic[...]
        statistic[...] = jax.lax.stop_gradient(old + momentum * (seen - old).astype(old.dtype))


class ConvNorm(nnx.Module):
    """``act(norm(conv(x)))``: a convolution without bias behind which a batch normalisation stands.

    Args:
        ins, outs: channels. size: of the square kernel. stride: of both directions.
        padding: None is half the kernel on each side, as torch has it.
        depthwise: every channel has a kernel of its own; ``outs`` is ``ins`` then.
        act: behind it; None for none. eps: added to variances.
    """

    def __init__(
        self,
        ins: int,
        outs: int,
        size: int,
        rngs: nnx.Rngs,
        *,
        stride: int = 1,
        padding: Padding | None = None,
        depthwise: bool = False,
        act: Callable[[jax.Array], jax.Array] | None = None,
        eps: float = 1e-5,
    ) -> None:
        init = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
        half = (size // 2, size // 2)
        groups = ins if depthwise else 1
        self.conv = nnx.Conv(
            ins, outs, (size, size), strides=stride, padding=padding or (half, half), feature_group_count=groups,
            use_bias=False, kernel_init=init, rngs=rngs,
        )  # fmt: skip
        self.norm = BatchNorm(outs, eps)
        self.act = act

    def __call__(self, x: jax.Array, momentum: float | None = None) -> jax.Array:
        """X [B, H, W, ins] to [B, H / stride, W / stride, outs]; ``momentum`` as BatchNorm's."""
        x = self.norm(self.conv(x), momentum)
        return x if self.act is None else self.act(x)


def check_pixels(pixels: jax.Array, channels: int) -> None:
    """Refuse what is no batch of images.

    Raises:
        ModelError: not [B, H, W, channels].
    """
    if pixels.ndim != 4 or pixels.shape[-1] != channels:
        raise ModelError(f"pixels have shape {tuple(pixels.shape)}, but this model takes [B, H, W, {channels}].")


@dataclasses.dataclass(frozen=True)
class ConvClassifier(Classifier):
    """A `Classifier` with batch norms, whose network takes a momentum too, as `BatchNorm` does."""

    def train_step_stats(self, params: Any, pixels: jax.Array, *, momentum: float = 0.1) -> tuple[jax.Array, Any]:
        """The training form: normalise with the statistics of this batch.

        Args:
            params: weights and running statistics; they are not changed.
            pixels: float [B, H, W, channels].
            momentum: how far running statistics move towards those of the batch, 0 to 1.

        Returns:
            Logits [B, classes], and ``params`` with the moved statistics in place of the old ones (weights as they
            were). No gradient flows through the statistics that are returned, so that this is the ``has_aux`` of a
            loss: ``jax.value_and_grad(loss, has_aux=True)``; the gradients of statistics are zeros.

        Raises:
            ModelError: pixels of another shape.
        """
        module = self.module(params)
        logits = module(pixels, momentum)
        return logits, functional.to_params(nnx.state(module))

"""An image classifier as a function of its parameters."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from qjax.models import functional


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A classifier as a function of its parameters: ``fn(params, pixels [B, H, W, 3]) -> logits [B, classes]``.

    Attributes:
        config: sizes.
        network: the Flax NNX module, made of a config and called with pixels.
    """

    config: Any
    network: ClassVar[Any] = None

    def __call__(self, params: Any, pixels: jax.Array) -> jax.Array:
        """Class logits of normalised pixels."""
        return self.module(params)(pixels)

    def init(self, seed: int = 0) -> Any:
        """Random parameters; running means of zero and variances of one."""
        return functional.init_params(self.network, self.config, seed)

    def abstract_params(self, dtype: Any = jnp.float32) -> Any:
        """Shapes of the parameters."""
        return functional.abstract_params(self.network, self.config, dtype)

    def module(self, params: Any) -> Any:
        """The Flax NNX module with these parameters in it."""
        return functional.bind(self.network, self.config, params)

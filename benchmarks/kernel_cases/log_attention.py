"""Attention with log-coded probabilities: ViT's 197 tokens, Swin's windows, long rows, and each kind of scores."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.formats import Log
from qjax.kernels.log_attention.hopper import attend


@dataclasses.dataclass(frozen=True)
class Case:
    """One compiled kernel."""

    fmt: Log
    tokens: int
    channels: int
    dtype: str = "float32"

    multiplies = "HGMMA"

    @property
    def name(self) -> str:
        """As the table calls it."""
        size = f"{self.tokens} tokens, {self.channels} channels"
        return f"log attention {self.fmt.bits} bits {self.fmt.zero}, {self.dtype}, {size}"

    def function(self) -> Any:
        """The kernel, and the shapes of its arguments."""
        scores = jax.ShapeDtypeStruct((12, self.tokens, self.tokens), np.dtype(self.dtype))
        numbers = jax.ShapeDtypeStruct((12, self.tokens, self.channels), jnp.bfloat16)
        return functools.partial(attend, fmt=self.fmt), (scores, numbers)


def cases() -> list[Case]:
    """The presets' formats at the sizes of ViT and DeiT; windows of Swin; the longest rows; scores in 16 bits."""
    out = [Case(Log(bits, 25, zero="mask"), 197, 64) for bits in (3, 4, 5)]
    out += [Case(Log(4, 25), 49, 32), Case(Log(4, 25), 512, 64), Case(Log(4, 25), 768, 64, "bfloat16")]
    return [*out, Case(Log(4, 25, zero="clamp"), 197, 64, "float16"), Case(Log(4, 25), 256, 128)]

"""NF4: sixteen quantiles of the normal distribution (QLoRA, Dettmers et al. 2023, section 3)."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax.errors import FormatError
from qjax.formats.base import Aux, Format
from qjax.formats.numerics import AnyArray, saturate, scale_for
from qjax.formats.registry import register_format

NF4_VALUES = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
"""The published table (QLoRA, appendix E), which is what checkpoints mean by NF4; equals `normal_quantiles` to 1e-6."""


def normal_quantiles(offset: float = 0.9677083) -> np.ndarray:
    """Return the sixteen values from their definition: float64 [16], ascending.

    The quantiles of the normal distribution at eight evenly spaced probabilities above one half and at seven below,
    and 0, divided by the largest. ``offset`` is the outermost probability, the mean of 1 - 1/30 and 1 - 1/32.
    """
    quantile = statistics.NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    values = np.sort(np.array([*below, 0.0, *above]))
    return values / values.max()


@register_format("nf4")
@dataclasses.dataclass(frozen=True)
class NF4(Format):
    """4-bit NormalFloat: ``value = table[code] * scale``, scale = absmax of the block.

    Codes are indices 0 .. 15 into `NF4_VALUES`; code 7 is exactly 0. An element midway between two values takes the
    lower one. Scales are plain float32: QLoRA's second quantization of the scales is not applied.

    Args:
        group: length of a block along the contracted axis; 64 in the paper.
    """

    group: int = 64

    code_bits = 4
    per = "group"
    weights_only = True

    def __post_init__(self) -> None:
        if isinstance(self.group, bool) or not isinstance(self.group, int) or self.group < 1:
            raise FormatError(
                f"NF4: group={self.group!r}; a group is a number of elements, 1 or more (64 in the paper)"
            )

    @property
    def name(self) -> str:
        """For example ``nf4 g64``."""
        return f"nf4 g{self.group}"

    @property
    def code_dtype(self) -> np.dtype:
        """uint8 indices."""
        return np.dtype(np.uint8)

    def from_range(self, low: AnyArray, high: AnyArray, shared: Mapping[str, AnyArray] | None = None) -> Aux:
        """Return {"scale": float32}, blocked."""
        return {"scale": scale_for(jnp.maximum(high, -low), 1.0, 1.0)}

    def encode(self, x: AnyArray, aux: Aux) -> Array:
        """Return uint8 indices of the nearest values."""
        inverse = self.spread(1.0 / aux["scale"], x.shape[-1])
        y = saturate(jnp.asarray(x, jnp.float32) * inverse, -1.0, 1.0)
        # The number of midpoints below y: fifteen comparisons fuse into one loop, a search or a table of distances
        # would not.
        middles = (NF4_VALUES[1:] + NF4_VALUES[:-1]) * np.float32(0.5)
        code = jnp.zeros(y.shape, jnp.uint8)
        for middle in middles:
            code += (y > middle).astype(jnp.uint8)
        return code

    def decode(self, codes: AnyArray, aux: Aux) -> Array:
        """Return table[code] * scale in float32."""
        return lookup(codes, NF4_VALUES) * self.spread(aux["scale"], codes.shape[-1])


def lookup(codes: AnyArray, table: np.ndarray) -> Array:
    """Return float32 table[codes] for a constant table of 2**n values.

    By bisection, which is elementwise: a gather would be no faster, and under explicit sharding it would have to be
    told how its result is laid out.
    """
    bits = [(codes >> k) & 1 != 0 for k in range(len(table).bit_length() - 1)]

    def pick(values: np.ndarray) -> Array:
        if len(values) == 1:
            return jnp.float32(values[0])
        half = len(values) // 2
        return jnp.where(bits[half.bit_length() - 1], pick(values[half:]), pick(values[:half]))

    return pick(table)

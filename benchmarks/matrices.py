"""Heavy-tailed weights and correlated activations for `benchmarks.roundings_peers`; NumPy only, alike for all tools.

What real layers have, in few words: weights from Student's t with 7 degrees of freedom, rows and input channels of
different size; activations that are combinations of few directions with falling strength, plus noise, with one channel
in a hundred 8 times as large. Half of the rows calibrate, the other half, which no tool sees, is what errors are
measured on.
"""

from __future__ import annotations

import dataclasses
import zlib

import numpy as np

SHAPES = ((1024, 1024), (1024, 4096), (4096, 1024))
"""Inputs x outputs."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """One matrix and what passes it.

    Attributes:
        w: float32 [N, K].
        calibration: float32 [T, K], what roundings may look at.
        held_out: float32 [T, K], what errors are measured on.
    """

    w: np.ndarray
    calibration: np.ndarray
    held_out: np.ndarray

    def error(self, q: np.ndarray) -> float:
        """Return how far the outputs move on held-out rows: |X (W - Q)ᵀ| / |X Wᵀ|."""
        x, w = self.held_out.astype(np.float32), self.w
        moved = np.linalg.norm(x @ (w - np.asarray(q, np.float32)).T)
        return float(moved / np.linalg.norm(x @ w.T))


def layer(inputs: int, outputs: int, rows: int = 4096, seed: int = 0) -> Layer:
    """Return the layer of a shape.

    Args:
        inputs: K. outputs: N.
        rows: of calibration, and as many held out.
        seed: another seed is another layer.
    """
    rng = np.random.default_rng([seed, zlib.crc32(f"{inputs}x{outputs}".encode())])
    w = rng.standard_t(7, (outputs, inputs)) * 0.02
    w *= np.exp(0.2 * rng.standard_normal((outputs, 1))) * np.exp(0.1 * rng.standard_normal((1, inputs)))
    rank = inputs // 4
    mix = rng.standard_normal((rank, inputs)) * (1 + np.arange(rank)[:, None] / 16) ** -0.5
    x = rng.standard_normal((2 * rows, rank)) @ mix / np.sqrt(rank) + 0.08 * rng.standard_normal((2 * rows, inputs))
    size = np.exp(0.4 * rng.standard_normal(inputs))
    size[rng.permutation(inputs)[: inputs // 100]] *= 8
    x = (x * size).astype(np.float32)
    return Layer(w.astype(np.float32), x[:rows], x[rows:])

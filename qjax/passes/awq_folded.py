"""AWQ across sites: factors that q, k and v share, folded into the norm in front.

As a rounding, `AWQ` scales each weight by itself and keeps the factors beside it. As a prepare pass it searches one row
of factors for all weights that read the same activations, and folds the reciprocals into what is in front
(`qjax.passes.folding`), so that nothing is left to do as activations pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibration import State
from qjax.passes.folding import Shared, shared_inputs, smoothed, weight_matrix
from qjax.passes.leaves import Leaves
from qjax.passes.prepare import Edits
from qjax.program import Program

Search = Any
"""``search(weights, mean, h, fmt, duo_scaling) -> s``, of `qjax.passes.awq`."""


def folded_scales(
    search: Search,
    duo_scaling: Any,
    match: str,
    unfolded: str,
    program: Program,
    leaves: Leaves,
    chosen: Sequence[str],
    states: Mapping[str, State],
) -> Edits:
    """The edits of a block.

    Args:
        search: finds factors [K] of weights that read the same activations.
        duo_scaling: whether factors look at weights too; not where several channels have one factor.
        match, unfolded: as in `SmoothQuant`.
        program, leaves, chosen, states: as a prepare pass gets them; states of `SecondMoment` and `MeanMagnitude`.
    """
    shared = shared_inputs(program, leaves, chosen, match)

    def factors(one: Shared) -> np.ndarray:
        first = one.sites[0]
        channels = one.channels[first]
        alike = [n for n in one.sites if np.array_equal(one.channels[n], channels)]
        mean, h = _moments(states[first])
        if channels.ndim > 1 or mean.shape[-1] != channels.shape[-1]:
            return np.ones(one.size, np.float32)
        tied = len(np.unique(channels)) < len(channels)
        if tied:  # channels of one factor: their mean
            mean = _by_factor(mean, channels, one.size)[channels]
        weights = [w.reshape(-1, w.shape[-1]) for w in (weight_matrix(program, leaves, n) for n in alike)]
        s = search([jnp.asarray(w, jnp.float32) for w in weights], mean, h, leaves.formats[first],
                   duo_scaling=False if tied else duo_scaling)  # fmt: skip
        return _by_factor(np.asarray(s), channels, one.size)

    return smoothed("AWQ", program, shared, factors, leaves, unfolded)


def _moments(state: State) -> tuple[np.ndarray, jax.Array]:
    """Mean magnitudes [K] and the second moment [K, K], of all matrices of a stack together."""
    magnitude, rows, h = (jnp.asarray(state[k]) for k in ("magnitude", "magnitude_rows", "second_moment"))
    while h.ndim > 2:
        magnitude, rows, h = magnitude.sum(0), rows.sum(0), h.sum(0)
    return np.asarray(magnitude / jnp.maximum(rows, 1)), h


def _by_factor(numbers: np.ndarray, channels: np.ndarray, size: int) -> np.ndarray:
    """The mean of the numbers of the channels of each factor, float32 [size]."""
    total = np.bincount(channels, weights=numbers, minlength=size)
    return (total / np.maximum(np.bincount(channels, minlength=size), 1)).astype(np.float32)

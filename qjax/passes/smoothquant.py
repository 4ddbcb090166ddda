"""SmoothQuant: the range of outlier channels of activations is moved into the weights.

Xiao et al. 2023 (arXiv:2211.10438), section 4.2, equation 4: activations are divided by

    s_k = max|x_k|^a / max|W_k|^(1 - a)

channel by channel, and the weights multiplied. The reciprocals go into what is in front: the norm of the paper, or
whatever else the equations show to take them up (a projection through a ReLU, values through an attention).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from qjax.calibration import State
from qjax.errors import RecipeError, near
from qjax.passes.folding import UNFOLDED, Shared, gathered, shared_inputs, smoothed, weight_matrix, within_reach
from qjax.passes.leaves import Leaves
from qjax.passes.prepare import Edits
from qjax.patterns import compile_pattern
from qjax.program import Program
from qjax.statistics import ChannelRange, Statistic


@dataclasses.dataclass(frozen=True)
class SmoothQuant:
    """Divide the input channels of products by factors that are folded into what comes before. Needs calibration data.

    Factors are scaled so that their geometric mean is 1, which changes no product and keeps norms near where they were;
    a channel that was never seen keeps the factor 1. Factors of a convolution are folded or there are none.

    Args:
        strength: a, from 0 (weights alone decide) to 1 (activations alone).
        match: pattern for the names of the sites.
        unfolded: what becomes of sites where nothing takes the factors up: "beside" keeps them beside the weight
            (a division as the activations pass), "skip" leaves the site alone, "error" refuses. The report says why
            each could not be folded.
    """

    strength: float = 0.5
    match: str = "**"
    unfolded: str = "beside"

    needs_batches: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    statistics: ClassVar[tuple[Statistic, ...]] = (ChannelRange(),)

    def __post_init__(self) -> None:
        if isinstance(self.strength, bool) or not isinstance(self.strength, int | float) or not 0 <= self.strength <= 1:
            raise RecipeError(f"SmoothQuant: strength={self.strength!r}; a number from 0 to 1, such as 0.5")
        if self.unfolded not in UNFOLDED:
            raise RecipeError(
                f"SmoothQuant: unfolded={self.unfolded!r}{near(str(self.unfolded), UNFOLDED)}; one of "
                f"{', '.join(UNFOLDED)}"
            )
        compile_pattern(self.match)

    def misplaced(self, decisions: Mapping[str, Any]) -> str:
        """What to warn of where smoothing does no good; "" where it may.

        Args:
            decisions: what the recipe decides for each linear site whose weight it quantizes.
        """
        matches = compile_pattern(self.match).fullmatch
        idle = [name for name, d in decisions.items() if d.inputs is None and matches(name + "/")]
        if not idle or not self.strength:
            return ""
        more = f" and {len(idle) - 1} more" if len(idle) > 1 else ""
        return (
            f"SmoothQuant moves range from activations into weights, and the activations of {idle[0]}{more} stay "
            "float: the weights become harder to round and nothing becomes easier; give the rule inputs=, leave such "
            "sites out by match=, or take qjax.AWQ(), which scales for the sake of weights"
        )

    def edit(self, program: Program, leaves: Leaves, chosen: Sequence[str], states: Mapping[str, State]) -> Edits:
        """Return the edits for a block: see `PreparePass`."""
        shared = shared_inputs(program, leaves, chosen, self.match)

        def factors(one: Shared) -> np.ndarray:
            x = np.zeros(one.size, np.float32)
            w = np.zeros(one.size, np.float32)
            for name in one.sites:
                state, channels = states[name], one.channels[name]
                reach = np.maximum(state["channel_below"], state["channel_above"])
                x = np.maximum(x, gathered(reach, channels, one.size))
                top = weight_reach(weight_matrix(program, leaves, name), channels)
                w = np.maximum(w, gathered(top, channels, one.size))
            return smoothing_factors(x, w, self.strength)

        return smoothed("SmoothQuant", program, shared, factors, leaves, self.unfolded)


def smoothing_factors(x: np.ndarray, w: np.ndarray, strength: float) -> np.ndarray:
    """Equation 4, scaled to a geometric mean of 1.

    Args:
        x: the largest magnitude of each channel of the activations, [K].
        w: that of the weights, [K].
        strength: a.

    Returns:
        float32 [K]; 1 where a channel or its weights are 0.
    """
    good = (x > 0) & (w > 0)
    s = np.ones(x.shape, np.float64)
    s[good] = x[good].astype(np.float64) ** strength / w[good].astype(np.float64) ** (1 - strength)
    return within_reach(s, good)


def weight_reach(matrix: Any, channels: np.ndarray) -> np.ndarray:
    """The largest magnitude of each input channel of a weight [*stack, N, K], of the shape of ``channels``."""
    top = jnp.max(jnp.abs(matrix.astype(jnp.float32)), axis=-2)  # [*stack, K]
    lead = top.ndim - channels.ndim
    return np.asarray(jnp.max(top, axis=tuple(range(lead))) if lead > 0 else top)

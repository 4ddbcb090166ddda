"""Bias correction: what rounding a weight shifts a channel by on average, added to the bias that follows.

Nagel et al. 2019 (arXiv:1906.04721), section 4.2. A weight W that became Q shifts the mean of each output by

    E[W x] - E[Q x] = (W - Q) E[x]

which a bias can take up exactly. E[x] is the mean over the calibration batches (the empirical form of its appendix D),
of every position of a token or, for a convolution, of every place of its window.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from qjax.analysis.biases import Bias, bias_of
from qjax.analysis.naming import Site
from qjax.calibration import State
from qjax.passes.leaves import Leaves
from qjax.passes.prepare import Edits
from qjax.program import Program
from qjax.statistics import Mean, Statistic


@dataclasses.dataclass(frozen=True)
class BiasCorrection:
    """A finishing pass, ``Recipe(rules, finish=[BiasCorrection()])``: biases take up the mean error of their site.

    For products and convolutions, stacked (scanned) layers, and experts that a batched product runs over. The bias is
    found on the program (`qjax.analysis.biases`); the report lists the sites that have none, or whose bias cannot be
    changed, with the reason. Later blocks see the corrected ones.
    """

    needs_batches: ClassVar[bool] = True
    sequential: ClassVar[bool] = True
    statistics: ClassVar[tuple[Statistic, ...]] = (Mean(),)

    def after(self, program: Program, leaves: Leaves, site: Site, error: Any, state: State) -> Edits | str:
        """Return the changed bias of a site whose weight was rounded, or why there is none: see `FinishPass.after`."""
        bias = bias_of(program, site.name)
        if isinstance(bias, str):
            return bias
        if not leaves.editable(bias.leaf, bias.key):
            return "its bias is read by other blocks too"
        old = jnp.asarray(leaves.slice(bias.leaf, bias.key))
        shift = along(mean_shift(site, error, state), site, bias)
        if shift.size != old.size:
            return f"{bias.leaf} does not run along all of its output channels"
        new = (old.astype(jnp.float32) + shift.reshape(old.shape)).astype(old.dtype)
        return Edits(slices={(bias.leaf, bias.key): new}) if bias.key else Edits({bias.leaf: new})


def mean_shift(site: Site, error: Any, state: State) -> Array:
    """Return (W - Q) E[x], float32, its axes those that the product runs over in parallel, then those that it keeps.

    Args:
        site: the site.
        error: W - Q, in the axes of the weight leaf but those that the site's slice drops.
        state: of `Mean`: [*parallel, K] and [*parallel].
    """
    dropped = {axis for axis, _ in site.slice}
    left = [a for a in range(error.ndim + len(dropped)) if a not in dropped]
    at = {axis: n for n, axis in enumerate(left)}
    parallel, kept, summed = (
        [at[a] for a in axes if a in at] for axes in (site.batch_axes, site.out_axes, site.in_axes)
    )
    moved = jnp.transpose(jnp.asarray(error, jnp.float32), (*parallel, *kept, *summed))
    lead, outs = [error.shape[a] for a in parallel], [error.shape[a] for a in kept]
    matrix = moved.reshape(*lead, math.prod(outs), math.prod(error.shape[a] for a in summed))
    mean = state["mean_sum"] / jnp.maximum(state["mean_rows"], 1.0)[..., None]
    mean = mean.reshape(*lead, mean.shape[-1])
    return jnp.einsum("...nk,...k->...n", matrix, mean, precision="highest").reshape(*lead, *outs)


def along(shift: Array, site: Site, bias: Bias) -> Array:
    """The shift with its axes in the order of the bias."""
    dropped = {axis for axis, _ in site.slice}
    axes = [a for a in (*site.batch_axes, *site.out_axes) if a not in dropped]
    order = [axes.index(a) for a in bias.axes if a is not None]
    rest = [n for n in range(len(axes)) if n not in order]  # of size 1
    return jnp.transpose(shift, (*order, *rest))

"""Prepare passes of DGQ and QoQ: smoothing by percentile, of keys and of block outputs, and reordering.

Each folds what `qjax.passes.channel_factors` computes into the parameters that the equations show to take it up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from qjax.analysis.channels import ChannelGroup, channel_group, permuted, scaled
from qjax.calibration import State
from qjax.errors import RecipeError, near
from qjax.passes.channel_factors import activation_order, dgq_smoothing, output_factors, sound
from qjax.passes.folding import UNFOLDED, Shared, gathered, shared_inputs, smoothed, weight_matrix
from qjax.passes.leaves import Leaves
from qjax.passes.prepare import Edits
from qjax.passes.smoothquant import weight_reach
from qjax.patterns import compile_pattern
from qjax.program import Program
from qjax.statistics import ChannelRange, Samples, Statistic

EMPTY = np.iinfo(np.uint32).max
"""The key of places in a sample that no row has taken."""

LINEAR = ("dot", "conv", "ragged_dot")
KEYS = r"re:(.*/)?(k_proj|key|key_proj|wk|k)(/.*)?"
"""Names that projections to keys have in common models."""


def _reach(state: State) -> np.ndarray:
    return np.maximum(state["channel_below"], state["channel_above"])


def _reach_of(one: Shared, states: Mapping[str, State]) -> np.ndarray:
    """The largest magnitude of the activations behind each factor."""
    out = np.zeros(one.size, np.float32)
    for name in one.sites:
        out = np.maximum(out, gathered(_reach(states[name]), one.channels[name], one.size))
    return out


def _check_fraction(who: str, name: str, value: Any, top: float = 1.0) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= top:
        raise RecipeError(f"{who}: {name}={value!r}; a number from 0 to {top:g}")


@dataclasses.dataclass(frozen=True)
class DGQSmooth:
    """Bring the few largest input channels down to the rest, by factors folded into what comes before.

    Of C channels about 0.5 % are divided by what they exceed the threshold by (`dgq_smoothing`); the others and their
    weights stay, bit for bit. Needs calibration data. The released code smooths inputs of query, key, value, gate, up
    and down projections and leaves those of the output projection alone; here all that can be folded are, and ``match``
    narrows them down.

    Args:
        fraction: of the channels above the threshold.
        match: pattern for the names of the sites.
        unfolded: what becomes of sites where nothing takes the factors up: "skip", "beside" or "error", as in
            `SmoothQuant`.
    """

    fraction: float = 0.005
    match: str = "**"
    unfolded: str = "skip"

    needs_batches: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    statistics: ClassVar[tuple[Statistic, ...]] = (ChannelRange(),)

    def __post_init__(self) -> None:
        _check_fraction("DGQSmooth", "fraction", self.fraction)
        if self.unfolded not in UNFOLDED:
            raise RecipeError(
                f"DGQSmooth: unfolded={self.unfolded!r}{near(str(self.unfolded), UNFOLDED)}; one of "
                f"{', '.join(UNFOLDED)}"
            )
        compile_pattern(self.match)

    def edit(self, program: Program, leaves: Leaves, chosen: Sequence[str], states: Mapping[str, State]) -> Edits:
        """Return the edits for a block: see `PreparePass`."""
        shared = shared_inputs(program, leaves, chosen, self.match)

        def factors(one: Shared) -> np.ndarray:
            return dgq_smoothing(_reach_of(one, states), self.fraction)

        return smoothed("DGQSmooth", program, shared, factors, leaves, self.unfolded)


@dataclasses.dataclass(frozen=True)
class SmoothOutputs:
    """Smooth the inputs of products that another product feeds: those after attention, and inside an MLP.

    QoQ's block-output smoothing (`output_factors`): the factors go into the projection before (values, up). Inputs that
    come from a norm are left to a rotation. Needs calibration data.

    Args:
        strength: alpha; near 0. 0 for one scale per channel and 0.3 for groups in the recipes for Llama-2-7B.
        match: pattern for the names of the sites.
    """

    strength: float = 0.3
    match: str = "**"

    needs_batches: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    statistics: ClassVar[tuple[Statistic, ...]] = (ChannelRange(),)

    def __post_init__(self) -> None:
        _check_fraction("SmoothOutputs", "strength", self.strength)
        compile_pattern(self.match)

    def edit(self, program: Program, leaves: Leaves, chosen: Sequence[str], states: Mapping[str, State]) -> Edits:
        """Return the edits for a block: see `PreparePass`."""
        products = {site.leaf for site in program.sites if site.op in LINEAR}

        def fed_by_a_product(one: Shared) -> bool:
            return one.group is None or any(t.power > 0 and t.leaf in products for t in one.group.touches)

        shared = [one for one in shared_inputs(program, leaves, chosen, self.match) if fed_by_a_product(one)]

        def factors(one: Shared) -> np.ndarray:
            w = np.zeros(one.size, np.float32)
            for name in one.sites:
                top = weight_reach(weight_matrix(program, leaves, name), one.channels[name])
                w = np.maximum(w, gathered(top, one.channels[name], one.size))
            return output_factors(_reach_of(one, states), w, self.strength)

        return smoothed("SmoothOutputs", program, shared, factors, leaves, "skip")


@dataclasses.dataclass(frozen=True)
class Reorder:
    """Sort the channels that one product alone sums over by rising magnitude, so that groups hold equals.

    QoQ's activation-aware reordering (`activation_order`), for what comes out of attention (within each head, alike
    for heads that share keys and values) and inside an MLP (anywhere). The residual stream, which many products read,
    stays. Exact: the projections before and after are permuted. Needs calibration data.

    Args:
        match: pattern for the names of the sites.
    """

    match: str = "**"

    needs_batches: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    statistics: ClassVar[tuple[Statistic, ...]] = (ChannelRange(),)

    def __post_init__(self) -> None:
        compile_pattern(self.match)

    def edit(self, program: Program, leaves: Leaves, chosen: Sequence[str], states: Mapping[str, State]) -> Edits:
        """Return the edits for a block: see `PreparePass`."""
        matches, slices, notes = compile_pattern(self.match).fullmatch, {}, []

        def read(leaf: str, key: Any) -> Any:
            return slices[leaf, key] if (leaf, key) in slices else leaves.slice(leaf, key)

        for name in chosen:
            if not matches(name + "/") or program.by_name[name].op not in LINEAR:
                continue
            group = channel_group(program, name, kind="permute")
            if not isinstance(group, ChannelGroup):
                notes.append(f"{name}: not reordered, because {group.reason}")
                continue
            if set(group.sites) != {name}:
                continue
            locked = next((t for t in group.touches if not leaves.editable(t.leaf, t.slice)), None)
            if locked is not None:
                notes.append(f"{name}: not reordered, because {locked.leaf} is read by other blocks too")
                continue
            reach = gathered(_reach(states[name]), group.channels, group.size)
            order = activation_order(reach, group.blocks)
            slices |= permuted(group, order, read)
            blocks = len(np.unique(group.blocks))
            notes.append(f"{name}: {group.size} channels sorted within {blocks} block{'s' if blocks > 1 else ''}")
        return Edits(slices=slices, notes=tuple(notes))


@dataclasses.dataclass(frozen=True)
class SmoothAttention:
    """Level the channels of keys: the projection to keys is divided by factors, that to queries multiplied.

    For caches with 4-bit keys (QoQ, `attention_factors` with beta = 0): lambda = m^alpha. The paper takes m over keys
    after rotary positions. Here it is the largest length, over a sample of tokens, of what positions turn together
    (channels i and i + D/2): positions do not change it, and it is what a channel of a pair comes to as they turn.
    Which channels those are follows from the equations, as does which heads share keys. Needs calibration data.

    Args:
        alpha: 0.5 in the paper.
        match: pattern for the names of projections to keys.
        rows: how many tokens are sampled.
    """

    alpha: float = 0.5
    match: str = KEYS
    rows: int = 512

    needs_batches: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_fraction("SmoothAttention", "alpha", self.alpha)
        compile_pattern(self.match)
        Samples(self.rows)  # which checks it

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """A sample of the inputs."""
        return (Samples(self.rows),)

    def edit(self, program: Program, leaves: Leaves, chosen: Sequence[str], states: Mapping[str, State]) -> Edits:
        """Return the edits for a block: see `PreparePass`.

        Raises:
            RecipeError: no product of the program has a name that matches.
        """
        matches = compile_pattern(self.match).fullmatch
        linear = [site.name for site in program.sites if site.op in LINEAR and site.leaf is not None]
        if not any(matches(name + "/") for name in linear):
            raise RecipeError(
                f"SmoothAttention: match={self.match!r} is the name of none of {', '.join(linear[:6])}, ..; give a "
                "pattern for the projections to keys"
            )
        slices, notes = {}, []

        def read(leaf: str, key: Any) -> Any:
            return slices[leaf, key] if (leaf, key) in slices else leaves.slice(leaf, key)

        for name in chosen:
            if not matches(name + "/"):
                continue
            group = channel_group(program, name, of="output")
            if not isinstance(group, ChannelGroup):
                notes.append(f"{name}: keys not smoothed, because {group.reason}")
                continue
            locked = next((t for t in group.touches if not leaves.editable(t.leaf, t.slice)), None)
            if locked is not None:
                notes.append(f"{name}: keys not smoothed, because {locked.leaf} is read by other blocks too")
                continue
            keys = self._keys(program, leaves, name, group, states[name])
            length = np.zeros(group.size, np.float64)
            channels = np.broadcast_to(group.channels, keys.shape[-1:])
            for row in keys.astype(np.float64) ** 2:
                turned = np.bincount(channels[channels >= 0], row[channels >= 0], group.size)
                length = np.maximum(length, turned)
            factors = sound(np.sqrt(length) ** self.alpha)
            slices |= scaled(group, 1.0 / factors, read)
            into = ", ".join(dict.fromkeys(t.leaf for t in group.touches if t.power < 0))
            notes.append(f"{name}: keys divided by {factors.min():.3g} to {factors.max():.3g}, folded into {into}")
        return Edits(slices=slices, notes=tuple(notes))

    def _keys(self, program: Program, leaves: Leaves, name: str, group: ChannelGroup, state: State) -> np.ndarray:
        """Keys of the sampled tokens, before positions: float32 [rows, N]."""
        sample = np.asarray(state["sample"], np.float32)[np.asarray(state["sample_key"]) < EMPTY]
        weight = weight_matrix(program, leaves, name)
        keys = np.asarray(jnp.matmul(sample, jnp.asarray(weight, jnp.float32).reshape(-1, weight.shape[-1]).T))
        leaf = program.by_name[name].leaf
        for touch in group.touches:  # a bias takes the same factors, channel by channel
            if touch.power > 0 and touch.leaf != leaf and np.array_equal(touch.index.ravel(), group.channels.ravel()):
                keys = keys + np.asarray(leaves.slice(touch.leaf, touch.slice), np.float32).ravel()
        return keys

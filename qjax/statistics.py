"""Statistics of activations: what is gathered of the numbers that pass a site, batch by batch.

A statistic is a monoid over streams, as an observer is: `init` is the state before any data, `see` the state of one
batch, `merge` that of two streams, and it does not matter how a stream is cut or in which order the pieces come (up
to float32 summation). So states are carried out of loops, added up over devices and hosts, and kept in checkpoints.

    ranges          `Range`              what an observer needs for one format
    per channel     `ChannelRange`       the least and the largest number of each input channel
    means           `Mean`               of each input channel, for the correction of biases
    mean sizes      `MeanMagnitude`      the mean of |x| of each input channel
    second moments  `SecondMoment`       XᵀX, what GPTQ and its relatives minimise over
    samples         `Samples`            a bounded number of rows, drawn from all batches alike

Activations are matrices [*stack, rows, K], stack being the axes that a product runs over in parallel (experts).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qjax._compat import varying_axes
from qjax.calibration import Observer, State
from qjax.errors import FormatError
from qjax.formats.rotation import rotate

__all__ = ["ChannelRange", "Mean", "MeanMagnitude", "Range", "Samples", "SecondMoment", "Statistic", "merge_statistics"]


_SLAB = 2048
"""Rows of a second moment that are computed at a time, where it has many."""


class Statistic:
    """Base of statistics. Subclasses are frozen dataclasses and define `init` and `see`, or more.

    Attributes:
        collective: "max" or "sum", how the arrays of two states merge.
        stacked: whether each element of a product's stack axes has a state of its own; if not, they count as rows.
    """

    collective: ClassVar[str] = "max"
    stacked: ClassVar[bool] = False

    def init(self, shape: Sequence[int]) -> State:
        """Return the state before any data, for activations of this shape [*stack, rows, K]."""
        raise NotImplementedError(f"{type(self).__name__} has to define init")

    def see(self, x: Any) -> State:
        """Return the state of one batch, float [*stack, rows, K]."""
        raise NotImplementedError(f"{type(self).__name__} has to define see")

    def add(self, state: State, x: Any) -> State:
        """Return a state after one more batch."""
        return self.merge(state, self.see(x))

    def merge(self, a: State, b: State) -> State:
        """Return the state of both streams together."""
        return jax.tree.map(jnp.maximum if self.collective == "max" else jnp.add, a, b)

    def merged(self, rows: State) -> State:
        """Return the state of all streams of a leading axis."""
        reduce = jnp.max if self.collective == "max" else jnp.sum
        return jax.tree.map(lambda a: reduce(a, axis=0), rows)

    def over_devices(self, state: State, axes: tuple[str, ...]) -> State:
        """Return the state of all devices along mesh axes, inside shard_map."""
        collect = lax.pmax if self.collective == "max" else lax.psum

        def one(a: Any) -> Any:
            varying = varying_axes(a, axes)
            return collect(a, varying) if varying else a

        return jax.tree.map(one, state)

    def scaled(self, state: State, factor: Any) -> State:
        """Return its fields of a state as if channel k had been multiplied by factor [.., 1, K], which is positive."""
        raise NotImplementedError(f"{type(self).__name__} has to define scaled to be used with smoothed inputs")

    def rotated(self, state: State, signs: Any) -> State:
        """Return its fields of a state as if each row had been rotated (`qjax.formats.rotation`) with these signs."""
        raise NotImplementedError(f"{type(self).__name__} has to define rotated to be used by Rotated(...)")

    def nbytes(self, shape: Sequence[int]) -> int:
        """Return the bytes of a state for activations of this shape."""
        return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.eval_shape(lambda: self.init(shape)).values())


@dataclasses.dataclass(frozen=True)
class Range(Statistic):
    """The range of the numbers, as an observer sees it for a format.

    Args:
        observer: an observer.
        fmt: the format that the range is for.
    """

    observer: Observer
    fmt: Any

    def init(self, shape: Sequence[int]) -> State:
        return self.observer.init(self.fmt, shape)

    def see(self, x: Any) -> State:
        shape = x.shape if x.size else (*x.shape[:-2], 1, 1)
        return self.observer.update(self.observer.init(self.fmt, shape), x if x.size else jnp.zeros(shape), self.fmt)

    @property
    def collective(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """That of the observer."""
        return self.observer.collective

    def merge(self, a: State, b: State) -> State:
        return self.observer.merge(a, b)


@dataclasses.dataclass(frozen=True)
class ChannelRange(Statistic):
    """How far the finite numbers of each input channel reach on both sides of 0.

    The state is {"channel_below", "channel_above"}, float32 [K] each, not negative.
    """

    def init(self, shape: Sequence[int]) -> State:
        zeros = jnp.zeros(shape[-1], jnp.float32)
        return {"channel_below": zeros, "channel_above": zeros}

    def see(self, x: Any) -> State:
        x = x.astype(jnp.float32).reshape(-1, x.shape[-1])
        x = jnp.where(jnp.isfinite(x), x, 0.0)
        return {
            "channel_below": jnp.max(-x, axis=0, initial=0.0),
            "channel_above": jnp.max(x, axis=0, initial=0.0),
        }

    def scaled(self, state: State, factor: Any) -> State:
        return {name: state[name] * factor[..., 0, :] for name in ("channel_below", "channel_above")}


@dataclasses.dataclass(frozen=True)
class MeanMagnitude(Statistic):
    """The sum of the magnitudes of each input channel, and how many rows there were: what makes their mean.

    The state is {"magnitude": float32 [*stack, K], "magnitude_rows": float32 [*stack]}. Rows that are zero, such as
    those of experts that a router passed over, add nothing and are not counted; NaN and infinity count as 0.
    """

    collective = "sum"
    stacked = True

    def init(self, shape: Sequence[int]) -> State:
        stack, k = tuple(shape[:-2]), shape[-1]
        return {"magnitude": jnp.zeros((*stack, k), jnp.float32), "magnitude_rows": jnp.zeros(stack, jnp.float32)}

    def see(self, x: Any) -> State:
        x = jnp.abs(x.astype(jnp.float32))
        x = jnp.where(jnp.isfinite(x), x, 0.0)
        rows = jnp.sum(jnp.any(x != 0, axis=-1), axis=-1).astype(jnp.float32)
        return {"magnitude": jnp.sum(x, axis=-2), "magnitude_rows": rows}

    def scaled(self, state: State, factor: Any) -> State:
        return {"magnitude": state["magnitude"] * factor[..., 0, :], "magnitude_rows": state["magnitude_rows"]}


@dataclasses.dataclass(frozen=True)
class Mean(Statistic):
    """The sum of all rows, and how many there were.

    The state is {"mean_sum": float32 [*stack, K], "mean_rows": float32 [*stack]}. Where a product runs over a stack
    (experts), rows that are zero are places that no token took, and are not counted.
    """

    collective = "sum"
    stacked = True

    def init(self, shape: Sequence[int]) -> State:
        stack, k = tuple(shape[:-2]), shape[-1]
        return {"mean_sum": jnp.zeros((*stack, k), jnp.float32), "mean_rows": jnp.zeros(stack, jnp.float32)}

    def see(self, x: Any) -> State:
        x = x.astype(jnp.float32)
        x = jnp.where(jnp.isfinite(x), x, 0.0)
        count = jnp.sum(jnp.any(x != 0, axis=-1), axis=-1) if x.ndim > 2 else jnp.asarray(x.shape[-2])
        return {"mean_sum": jnp.sum(x, axis=-2), "mean_rows": count.astype(jnp.float32)}

    def scaled(self, state: State, factor: Any) -> State:
        return {"mean_sum": state["mean_sum"] * factor[..., 0, :], "mean_rows": state["mean_rows"]}


@dataclasses.dataclass(frozen=True)
class SecondMoment(Statistic):
    """The sum of the outer products of all rows, XᵀX, and how many rows there were.

    The state is {"second_moment": float32 [*stack, K, K], "rows": float32 [*stack]}. Rows that are zero, such as those
    of experts that a router passed over, add nothing to the sum and are not counted.
    """

    collective = "sum"
    stacked = True

    def init(self, shape: Sequence[int]) -> State:
        stack, k = tuple(shape[:-2]), shape[-1]
        return {"second_moment": jnp.zeros((*stack, k, k), jnp.float32), "rows": jnp.zeros(stack, jnp.float32)}

    def see(self, x: Any) -> State:
        x = x.astype(jnp.float32)
        x = jnp.where(jnp.isfinite(x), x, 0.0)
        moment = jnp.einsum("...rk,...rl->...kl", x, x, precision=lax.Precision.HIGHEST)
        return {"second_moment": moment, "rows": jnp.sum(jnp.any(x != 0, axis=-1), axis=-1).astype(jnp.float32)}

    def add(self, state: State, x: Any) -> State:
        """Return the sum with x's, of many channels slab by slab: a second array of that size is never there."""
        k = x.shape[-1]
        slab = max((d for d in range(1, _SLAB + 1) if k % d == 0), default=1)
        if x.ndim != 2 or k < 2 * _SLAB or slab < _SLAB // 8:
            return self.merge(state, self.see(x))
        x = x.astype(jnp.float32)
        x = jnp.where(jnp.isfinite(x), x, 0.0)

        def one(i: Array, moment: Array) -> Array:
            columns = lax.dynamic_slice_in_dim(x, i * slab, slab, axis=1)
            more = jnp.matmul(columns.T, x, precision=lax.Precision.HIGHEST)
            here = lax.dynamic_slice_in_dim(moment, i * slab, slab, axis=0)
            return lax.dynamic_update_slice_in_dim(moment, here + more, i * slab, axis=0)

        moment = lax.fori_loop(0, k // slab, one, state["second_moment"])
        return {"second_moment": moment, "rows": state["rows"] + jnp.sum(jnp.any(x != 0, axis=-1))}

    def scaled(self, state: State, factor: Any) -> State:
        moment = state["second_moment"] * factor * jnp.swapaxes(factor, -1, -2)
        return {"second_moment": moment, "rows": state["rows"]}

    def rotated(self, state: State, signs: Any) -> State:
        half = rotate(state["second_moment"], signs)  # H R, and Rᵀ H R as the rotated rows of its transpose
        return {"second_moment": rotate(jnp.swapaxes(half, -1, -2), signs), "rows": state["rows"]}


_EMPTY = np.uint32(0xFFFFFFFF)


@dataclasses.dataclass(frozen=True)
class Samples(Statistic):
    """A bounded sample of the rows, each row of the whole stream as likely as any other.

    Every row gets a random 32-bit key, computed from its own bits and the seed, and the rows with the smallest keys
    stay: the sample of two streams is what is smallest in both samples, so cutting and order do not matter. Equal rows
    have equal keys and are drawn or left together.

    The state is {"sample": float32 [count, K], "sample_key": uint32 [count]}; places that no row has taken have the
    largest key.

    Args:
        count: rows to keep, 1 or more.
        seed: another seed draws another sample.
    """

    count: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1:
            raise FormatError(f"Samples: count={self.count!r}; a number of rows, 1 or more")

    def init(self, shape: Sequence[int]) -> State:
        return {
            "sample": jnp.zeros((self.count, shape[-1]), jnp.float32),
            "sample_key": jnp.full(self.count, _EMPTY, jnp.uint32),
        }

    def see(self, x: Any) -> State:
        x = x.astype(jnp.float32).reshape(-1, x.shape[-1])
        x = jnp.where(jnp.isfinite(x), x, 0.0)
        more = max(0, self.count - x.shape[0])
        keys = jnp.pad(jnp.minimum(_hash(x, self.seed), _EMPTY - 1), (0, more), constant_values=_EMPTY)
        return self._smallest({"sample": jnp.pad(x, ((0, more), (0, 0))), "sample_key": keys})

    def merge(self, a: State, b: State) -> State:
        return self._smallest(jax.tree.map(lambda p, q: jnp.concatenate([p, q]), a, b))

    def merged(self, rows: State) -> State:
        return self._smallest(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), rows))

    def over_devices(self, state: State, axes: tuple[str, ...]) -> State:
        for axis in axes:
            if varying_axes(state["sample"], (axis,)):
                state = self.merged(jax.tree.map(lambda a, axis=axis: _gathered(a, axis), state))
        return state

    def scaled(self, state: State, factor: Any) -> State:
        return {"sample": state["sample"] * factor, "sample_key": state["sample_key"]}

    def rotated(self, state: State, signs: Any) -> State:
        return {"sample": rotate(state["sample"], signs), "sample_key": state["sample_key"]}

    def _smallest(self, state: State) -> State:
        order = jnp.argsort(state["sample_key"], stable=True)[: self.count]
        return {name: jnp.take(a, order, axis=0) for name, a in state.items()}


def _gathered(a: Array, axis: str) -> Array:
    """The arrays of all devices of a mesh axis, on each of them: by a sum, whose result is known to be the same."""
    n = lax.axis_size(axis)
    mine = jnp.zeros((n, *a.shape), a.dtype).at[lax.axis_index(axis)].set(a)
    return lax.psum(mine, axis)


def _hash(x: Array, seed: int) -> Array:
    """A 32-bit hash of each row [rows, K]: its bits times odd numbers that depend on the column, then mixed."""
    bits = lax.bitcast_convert_type(x + 0.0, jnp.uint32)  # -0.0 becomes 0.0, which is the same number
    column = _mixed(jnp.arange(x.shape[-1], dtype=jnp.uint32) + np.uint32(seed * 0x9E3779B9 & 0xFFFFFFFF)) | 1
    return _mixed(jnp.sum(_mixed(bits + np.uint32(0x9E3779B9)) * column, axis=-1, dtype=jnp.uint32))


def _mixed(h: Array) -> Array:
    """Spread the bits of 32-bit numbers (the finalizer of MurmurHash3)."""
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def merge_statistics(statistics: Sequence[Statistic], a: State, b: State) -> State:
    """The state of both streams, where several statistics share one dictionary."""
    out: State = {}
    for part in statistics:
        names = jax.eval_shape(lambda part=part: part.init((1, 1)))
        out |= part.merge({n: a[n] for n in names}, {n: b[n] for n in names})
    return out

"""Observers: how the range of the numbers in a block is chosen.

A format turns a range into scales; an observer chooses the range. Two ways lead to it.

At once, for a weight or a sample that is there in full:

    aux = observer.fit(x, fmt)

In a stream, for activations that pass by batch by batch, on many devices, inside loops:

    state = observer.init(fmt, x.shape)
    state = observer.update(state, x, fmt)          # as often as there are batches
    aux = fmt.from_range(*observer.range(state, fmt))

States form a monoid: `init` is neutral, `merge` is associative and commutative, and ``update(s, x)`` is
``merge(s, update(init, x))``. `merge` is the elementwise maximum or sum of the arrays, which `Observer.collective`
names, so the same state merges over devices by ``jax.lax.pmax`` or ``psum``, over a scan as a carry, and over hosts by
any reduction. Only finite elements count.

`AbsMax` and `MinMax` keep one or two numbers per block. `Percentile` and `MSE` need the distribution: a stream is
condensed into a histogram of magnitudes whose 4080 bins are the leading twelve bits of float32 (sixteen bins an
octave, from zero to the largest number, the same for all data, which is what makes states of different batches
addable); all the data at once is judged exactly.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qjax._compat import explicit_sharding
from qjax.errors import FormatError
from qjax.formats.base import Aux, Format
from qjax.formats.blocks import grouped, in_chunks
from qjax.formats.numerics import AnyArray, finite_part

__all__ = ["MSE", "AbsMax", "MaxMin", "MinMax", "Observer", "Percentile"]

State = dict[str, Array]

_SHIFT = 19  # of the 31 bits of a magnitude, the 12 leading ones number its bin
_BINS = 0x7F800000 >> _SHIFT  # the bins below infinity
_EDGES = np.minimum((np.arange(_BINS + 1, dtype=np.uint32) << _SHIFT).view(np.float32), np.finfo(np.float32).max)


class Observer:
    """Base of observers. Subclasses are frozen dataclasses and define `init`, `update` and `range`, or more.

    Attributes:
        collective: "max" or "sum", how states merge.
        by_channel: whether the last axis of a state runs along the channels of the activations.
    """

    collective: ClassVar[str] = "max"
    by_channel: ClassVar[bool] = False

    def init(self, fmt: Format, shape: Sequence[int]) -> State:
        """Return the state before any data, for x of this shape [*stack, N, K]."""
        raise NotImplementedError(f"{type(self).__name__} has to define init")

    def update(self, state: State, x: AnyArray, fmt: Format) -> State:
        """Return the state after another x [*stack, N, K] of any float dtype."""
        raise NotImplementedError(f"{type(self).__name__} has to define update")

    def range(self, state: State, fmt: Format) -> tuple[Array, Array]:
        """Return (low, high), float32 blocked arrays with low <= 0 <= high, for ``fmt.from_range``."""
        raise NotImplementedError(f"{type(self).__name__} has to define range")

    def merge(self, a: State, b: State) -> State:
        """Return the state of both streams together."""
        return jax.tree.map(jnp.maximum if self.collective == "max" else jnp.add, a, b)

    def fit(self, x: AnyArray, fmt: Format, weight: AnyArray | None = None) -> Aux:
        """Return aux for x [*stack, N, K], all of it at once.

        Args:
            x: float32.
            fmt: the format.
            weight: importance per element, broadcastable to x; used by observers that weigh errors.
        """
        return fmt.from_range(*self.range(self.update(self.init(fmt, x.shape), x, fmt), fmt))


def _blocked_shape(fmt: Format, shape: Sequence[int]) -> tuple[int, ...]:
    spec = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
    return jax.eval_shape(lambda x: fmt.reduce(x, jnp.sum), spec).shape


@dataclasses.dataclass(frozen=True)
class AbsMax(Observer):
    """The largest magnitude, on both sides."""

    def init(self, fmt: Format, shape: Sequence[int]) -> State:
        """Return {"absmax": zeros}."""
        return {"absmax": jnp.zeros(_blocked_shape(fmt, shape), jnp.float32)}

    def update(self, state: State, x: AnyArray, fmt: Format) -> State:
        """Take the maximum with x's."""
        low, high = fmt.range_of(x)
        return {"absmax": jnp.maximum(state["absmax"], jnp.maximum(high, -low))}

    def range(self, state: State, fmt: Format) -> tuple[Array, Array]:
        """Return (-absmax, absmax)."""
        return -state["absmax"], state["absmax"]


@dataclasses.dataclass(frozen=True)
class MinMax(Observer):
    """The smallest and the largest element, with 0 between them: what formats do without an observer."""

    def init(self, fmt: Format, shape: Sequence[int]) -> State:
        """Return {"below": zeros, "above": zeros}: how far the range reaches on each side of 0."""
        zeros = jnp.zeros(_blocked_shape(fmt, shape), jnp.float32)
        return {"below": zeros, "above": zeros}

    def update(self, state: State, x: AnyArray, fmt: Format) -> State:
        """Take the maxima with x's."""
        low, high = fmt.range_of(x)
        return {"below": jnp.maximum(state["below"], -low), "above": jnp.maximum(state["above"], high)}

    def range(self, state: State, fmt: Format) -> tuple[Array, Array]:
        """Return (-below, above)."""
        return -state["below"], state["above"]


@dataclasses.dataclass(frozen=True)
class MaxMin(Observer):
    """The largest over channels of the smallest over batches of each channel's largest magnitude: clips rare outliers.

    DGQ's constant scale of activations (arXiv:2310.04836, released code): a channel counts as what it reaches in every
    batch. Unlike those of other observers its range depends on how data is cut into batches, and a batch is what one
    device sees in one call of the program; with one batch it is `AbsMax`. For activations with a scale per tensor.
    """

    by_channel = True

    def init(self, fmt: Format, shape: Sequence[int]) -> State:
        """Return {"inverse_absmax": zeros [K]}: the larger it is, the less the quietest batch had of a channel.

        Raises:
            FormatError: for formats with more than one scale.
        """
        if fmt.per != "tensor":
            raise FormatError(f"{fmt.name}: MaxMin looks at all activations of a site; use a format per='tensor'")
        return {"inverse_absmax": jnp.zeros(shape[-1], jnp.float32)}

    def update(self, state: State, x: AnyArray, fmt: Format) -> State:
        """Take x for one batch."""
        x = jnp.abs(finite_part(jnp.asarray(x, jnp.float32)))
        top = jnp.max(x, axis=tuple(range(x.ndim - 1)), initial=0.0)
        return {"inverse_absmax": jnp.maximum(state["inverse_absmax"], 1.0 / jnp.maximum(top, 1e-30))}

    def range(self, state: State, fmt: Format) -> tuple[Array, Array]:
        """Return (-A, A), [1, 1]; 0 before any data."""
        inverse = state["inverse_absmax"]
        # 1e-30 stands for channels that were zero in some batch.
        least = jnp.where((inverse > 0) & (inverse < 1e30), 1.0 / jnp.maximum(inverse, 1e-38), 0.0)
        top = jnp.max(least, keepdims=True)[None]
        return -top, top

    def fit(self, x: AnyArray, fmt: Format, weight: AnyArray | None = None) -> Aux:
        """Refuse: a weight has no batches.

        Raises:
            FormatError: always.
        """
        raise FormatError("MaxMin compares batches of activations; for weights use AbsMax or MSE")


class _Distribution(Observer):
    """What `Percentile` and `MSE` share: a histogram of magnitudes per block and side."""

    collective = "sum"

    def init(self, fmt: Format, shape: Sequence[int]) -> State:
        """Return {"below": counts, "above": counts}, float32 [*blocked, 4080]; one entry if the format is symmetric.

        Raises:
            FormatError: for formats with groups, whose histograms would outgrow the data.
        """
        if fmt.per == "group":
            raise FormatError(
                f"{fmt.name}: {type(self).__name__} keeps a histogram per scale, too much for groups in a stream; "
                "use AbsMax or MinMax, or a format per tensor or channel (weights are fitted at once, in any format)"
            )
        empty = jnp.zeros((*_blocked_shape(fmt, shape), _BINS), jnp.float32)
        return {"above": empty} if fmt.symmetric else {"below": empty, "above": empty}

    def update(self, state: State, x: AnyArray, fmt: Format) -> State:
        """Add x's counts."""

        def count(x: Array) -> State:
            blocks, valid = _blocks(x.astype(jnp.float32), fmt)
            sides = (
                {"above": valid} if fmt.symmetric else {"below": valid & (blocks < 0), "above": valid & (blocks >= 0)}
            )
            return {name: _histogram(jnp.abs(blocks), side) for name, side in sides.items()}

        sharding = explicit_sharding(x)
        if sharding is not None:  # scattered counts have no type there: the partitioner finds how to add them up
            whole: Any = jax.sharding.auto_axes(count, out_sharding=jax.NamedSharding(sharding.mesh, jax.P()))
            seen = whole(x)
        else:
            seen = count(jnp.asarray(x))
        return {name: state[name] + a for name, a in seen.items()}


def _blocks(x: AnyArray, fmt: Format) -> tuple[Array, Array]:
    """Return the elements of each block, [*blocked, n], and which of them are finite and no padding."""
    x = jnp.asarray(x)
    if fmt.per == "group" and fmt.group is not None:
        real = grouped(jnp.ones(x.shape, bool), fmt.group)
        x = grouped(x, fmt.group)
        return x, real & jnp.isfinite(x)
    x = x.reshape(*x.shape[:-2], 1, 1, -1) if fmt.per == "tensor" else x[..., None, :]
    return x, jnp.isfinite(x)


def _histogram(size: AnyArray, valid: Array) -> Array:
    """Count magnitudes per block: [*blocked, n] -> float32 [*blocked, 4080]."""
    blocks, n = math.prod(size.shape[:-1]), size.shape[-1]
    bins = lax.bitcast_convert_type(size, jnp.uint32).astype(jnp.int32) >> _SHIFT
    bins = jnp.where(valid, bins, _BINS).reshape(blocks, n)
    rows = jnp.broadcast_to(jnp.arange(blocks)[:, None], bins.shape)
    # Counted in integers, which are exact; sums of many batches are then floats, whose error does not matter.
    counts = jnp.zeros((blocks, _BINS), jnp.int32).at[rows, bins].add(1, mode="drop")
    return counts.astype(jnp.float32).reshape(*size.shape[:-1], _BINS)


@dataclasses.dataclass(frozen=True)
class Percentile(_Distribution):
    """A percentile of the magnitudes, so that a few outliers do not set the scale.

    Symmetric formats: of |x|, on both sides. Others: ``percentile`` of the elements lie below the upper end, and as
    many above the lower end. From a stream the percentile is interpolated within a bin, a sixteenth of an octave.

    Args:
        percentile: over 50, up to 100 (which is the range itself; from a stream, to the edge of its bin).
    """

    percentile: float = 99.99

    def __post_init__(self) -> None:
        if isinstance(self.percentile, bool) or not 50 < self.percentile <= 100:
            raise FormatError(f"Percentile: percentile={self.percentile!r}; above 50 and up to 100, such as 99.99")

    def range(self, state: State, fmt: Format) -> tuple[Array, Array]:
        """Return the range from counts."""
        share = self.percentile / 100
        above = state["above"].sum(-1)
        if fmt.symmetric:
            high = _ranked(state["above"], share * (above - 1))
            return -high, high
        below = state["below"].sum(-1)
        rank = share * (above + below - 1)
        return -_ranked(state["below"], rank - above), _ranked(state["above"], rank - below)

    def fit(self, x: AnyArray, fmt: Format, weight: AnyArray | None = None) -> Aux:
        """Return aux from the exact percentile (linear between neighbours, as `numpy.percentile`)."""
        blocks, valid = _blocks(x.astype(jnp.float32), fmt)
        if blocks.shape[-1] == 0:
            return fmt.fit(x)
        share = self.percentile / 100
        values = jnp.where(valid, jnp.abs(blocks) if fmt.symmetric else blocks, jnp.nan)
        high = jnp.maximum(jnp.nan_to_num(jnp.nanquantile(values, share, axis=-1)), 0.0)
        if fmt.symmetric:
            return fmt.from_range(-high, high)
        low = jnp.minimum(jnp.nan_to_num(jnp.nanquantile(values, 1 - share, axis=-1)), 0.0)
        return fmt.from_range(low, high)


def _ranked(counts: Array, rank: Array) -> Array:
    """Return the magnitude at a fractional rank, counted from 0: [*blocked, 4080], [*blocked] -> [*blocked].

    The elements of a bin are taken to be evenly spaced, the last at its upper edge; a negative rank gives 0.
    """
    upto = jnp.cumsum(counts, axis=-1)
    edges = jnp.asarray(_EDGES)

    def element(k: Array) -> Array:
        index = jnp.minimum(jnp.sum(upto <= k[..., None], axis=-1), _BINS - 1)
        here, until = (jnp.take_along_axis(a, index[..., None], axis=-1)[..., 0] for a in (counts, upto))
        inside = jnp.clip((k + 1 - (until - here)) / jnp.maximum(here, 1.0), 0.0, 1.0)
        return edges[index] + inside * (edges[index + 1] - edges[index])

    top = upto[..., -1] - 1
    rank = jnp.minimum(rank, top)
    first = jnp.floor(rank)
    low, high = element(jnp.maximum(first, 0.0)), element(jnp.clip(first + 1, 0.0, jnp.maximum(top, 0.0)))
    return jnp.where(rank >= 0, low + (rank - first) * (high - low), 0.0)


@dataclasses.dataclass(frozen=True)
class MSE(_Distribution):
    """The range, shrunk by the factor that gives the least rounding error.

    Candidates are 1, 1 - 1/grid, .. above 1 - maxshrink; the error of a block is the sum of |x - decoded|**norm, each
    element times its importance where one is given. The settings are those of llm-compressor's MSE observer, which
    stops when no block at all has become better in ``patience`` candidates; here each block counts for itself, so that
    its range does not depend on its neighbours, and by default none stops: the whole grid is cheap, and never worse.
    What all blocks share (NVFP4's global scale) stays that of the whole range. From a stream, bins stand for their
    elements.

    Args:
        maxshrink: how far the range may shrink, above 0 and below 1.
        grid: candidates per unit of shrinkage, 1 or more.
        norm: the exponent, above 0.
        patience: candidates without a better one after which a block keeps what it has; None tries all.
    """

    maxshrink: float = 0.2
    grid: int = 100
    norm: float = 2.4
    patience: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.maxshrink < 1:
            raise FormatError(f"MSE: maxshrink={self.maxshrink!r}; above 0 and below 1, such as 0.2")
        if isinstance(self.grid, bool) or not isinstance(self.grid, int) or self.grid < 1:
            raise FormatError(f"MSE: grid={self.grid!r}; a number of steps, 1 or more")
        if not self.norm > 0:
            raise FormatError(f"MSE: norm={self.norm!r}; above 0, such as 2.4")
        if self.patience is not None and (not isinstance(self.patience, int) or self.patience < 1):
            raise FormatError(f"MSE: patience={self.patience!r}; a number of candidates, 1 or more, or None for all")

    @property
    def shrinks(self) -> np.ndarray:
        """The candidate factors, float32, 1 first."""
        steps = max(1, round(self.maxshrink * self.grid))
        return (1 - np.arange(steps) / self.grid).astype(np.float32)

    def fit(self, x: AnyArray, fmt: Format, weight: AnyArray | None = None) -> Aux:
        """Return aux for the best factor of each block."""
        low, high = fmt.range_of(x)
        shared = fmt.shared_aux(low, high)
        x = finite_part(x.astype(jnp.float32))
        if not shared and explicit_sharding(x) is None and _one_block_a_row(fmt, x.shape[-1]):
            rows = lambda a: jnp.broadcast_to(jnp.asarray(a), x.shape).reshape(-1, x.size // low.size)  # noqa: E731
            factor = self._of_rows(
                (rows(x), None if weight is None else rows(weight), low.reshape(-1, 1), high.reshape(-1, 1)),
                fmt.ungrouped(),
            ).reshape(low.shape)
        else:
            factor = self._search(x, weight, low, high, fmt, shared, lambda errors: fmt.reduce(errors, _lane_sum))
        return fmt.from_range(low * factor, high * factor, shared)

    def _of_rows(self, of: tuple[Array, Array | None, Array, Array], fmt: Format) -> Array:
        """Return the best factors [rows, 1] of rows that are a block each.

        Args:
            of: the rows [rows, n], their importance or None, and their ranges [rows, 1].
            fmt: a format with a scale per row.
        """

        def one(x: Array, weight: Array | None, low: Array, high: Array) -> Array:
            return self._search(x, weight, low, high, fmt, {}, lambda errors: fmt.reduce(errors, _lane_sum))

        return in_chunks(one, of, _CHUNK)

    def range(self, state: State, fmt: Format) -> tuple[Array, Array]:
        """Return the shrunk range, judged on the middles of the bins."""
        middles = jnp.asarray((_EDGES[:-1] * 0.5 + _EDGES[1:] * 0.5).astype(np.float32))
        high = _ranked(state["above"], jnp.sum(state["above"], -1) - 1)
        if fmt.symmetric:
            points, counts, low = middles, state["above"], -high
        else:
            points = jnp.concatenate([-middles, middles])
            counts = jnp.concatenate([state["below"], state["above"]], axis=-1)
            low = -_ranked(state["below"], jnp.sum(state["below"], -1) - 1)
        # One row of points per block, which `per` tensor, channel and token all read as one block a row.
        rows = counts[..., 0, :]
        points = jnp.where(rows > 0, jnp.broadcast_to(points, rows.shape), 0.0)
        total = lambda errors: jnp.sum(errors, axis=-1, keepdims=True)  # noqa: E731
        factor = self._search(points, rows, low, high, fmt, {}, total)
        return low * factor, high * factor

    def _search(
        self,
        x: AnyArray,  # [*stack, N, K]
        weight: AnyArray | None,
        low: AnyArray,  # blocked
        high: AnyArray,  # blocked
        fmt: Format,
        shared: Aux,
        total: Callable[[Array], Array],  # sums errors of elements over blocks
    ) -> Array:
        """Return the best factor of each block."""
        # Errors relative to the range: powers of very large or small ones would overflow or vanish.
        size = jnp.maximum(high, -low)
        unit = fmt.spread(jnp.where(size > 0, 1.0 / size, 0.0), x.shape[-1])

        def error(shrink: Array) -> Array:
            aux = fmt.from_range(low * shrink, high * shrink, shared)
            off = jnp.abs(x - fmt.decode(fmt.encode(x, aux), aux)) * unit
            off = jnp.square(off) if self.norm == 2 else jnp.exp(self.norm * jnp.log(off))
            return total(off if weight is None else off * weight)

        def step(best: tuple[Array, Array, Array], shrink: Array) -> tuple[tuple[Array, Array, Array], None]:
            least, factor, since = best
            here = error(shrink)
            better = here < least
            if self.patience is not None:
                better = better & (since < self.patience)
                since = jnp.where(better, 0, since + 1)
            return (jnp.where(better, here, least), jnp.where(better, shrink, factor), since), None

        # size * 0 + 1 rather than ones: inside shard_map the carry has to vary over devices as the errors do.
        first = (error(jnp.float32(1.0)), size * 0 + 1, (size * 0).astype(jnp.int32))
        (_, factor, _), _ = lax.scan(step, first, jnp.asarray(self.shrinks[1:]))
        return jnp.asarray(factor)


_CHUNK = 1 << 16
"""Numbers that are searched together on a CPU: they and what is computed of them stay in its cache."""


def _one_block_a_row(fmt: Format, length: int) -> bool:
    """Whether the blocks of rows of a length can be rows of their own, each rounded by itself."""
    if not fmt.elementwise or length == 0:
        return False
    return fmt.per in ("channel", "token") or (fmt.per == "group" and bool(fmt.group) and length % fmt.group == 0)


def _lane_sum(x: Array, axis: Any, keepdims: bool) -> Array:
    """`jnp.sum`; along the last axis in 16 sums that run beside each other, which a CPU can and may not on its own."""
    if axis != -1 or x.shape[-1] % 16 or x.shape[-1] == 0 or explicit_sharding(x) is not None:
        return jnp.sum(x, axis=axis, keepdims=keepdims)
    return jnp.sum(jnp.sum(x.reshape(*x.shape[:-1], -1, 16), axis=-2), axis=-1, keepdims=keepdims)

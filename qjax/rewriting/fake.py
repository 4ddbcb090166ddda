"""Fake quantization: a program in which weights and activations are rounded to their formats, and stay float.

Each product whose site a recipe quantizes gets operands that have passed through their format and back. Derivatives
pass straight through the rounding (Bengio et al. 2013, arXiv:1308.3432), so the function can be trained as it will be
stored. Ranges are those of the moment (of the weight as it is now, of the activations as they pass), averaged over
steps, constant, or learned.

A weight is rounded where it is used and as it lies: reshaped into its groups, not transposed, which would cost more
than the rounding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax._compat import bind, varying_axes
from qjax.calibration import Observer
from qjax.errors import RecipeError
from qjax.formats import Format
from qjax.formats.numerics import SMALLEST_SCALE
from qjax.rewriting.emit import Act, operand_axes, rounded
from qjax.rewriting.given import Fields, Giver
from qjax.rewriting.taps import NONFINITE, Collector
from qjax.sources import Dynamic, Ema, Learned, Static

WEIGHT_SCALE, INPUT_SCALE, INPUT_LOW, INPUT_HIGH = "weight.scale", "input.scale", "input.low", "input.high"
"""Fields of a site's state."""

REACHED = "reached"
"""Field of a contribution: 1 where the site ran."""


@dataclasses.dataclass(frozen=True)
class Faked:
    """What is rounded at a site.

    Attributes:
        weights: the weight's format, or None for float.
        observer: how the weight's range is chosen, or where its scales start.
        learned: whether the weight's scales are given, to be trained.
        inputs: where the activations' scale comes from, or None for float.
    """

    weights: Format | None = None
    observer: Observer | None = None
    learned: bool = False
    inputs: Dynamic | Static | None = None

    @property
    def carries(self) -> bool:
        """Whether the site has a state."""
        return self.learned or isinstance(self.inputs, Static)


class Ranges:
    """What a site contributes to its state: ranges and scales, of which the widest counts."""

    def init(self, shapes: Mapping[str, tuple[int, ...]]) -> Fields:
        """What contributes nothing."""
        return {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}

    def merge(self, a: Fields, b: Fields) -> Fields:
        """Both."""
        return {k: (jnp.minimum if k == INPUT_LOW else jnp.maximum)(a[k], b[k]) for k in a}

    def merged(self, stacked: Fields) -> Fields:
        """All rows of a leading axis."""
        return {k: (jnp.min if k == INPUT_LOW else jnp.max)(a, axis=0) for k, a in stacked.items()}

    def over_devices(self, fields: Fields, axes: tuple[str, ...]) -> Fields:
        """All devices along mesh axes."""

        def one(k: str, a: Any) -> Any:
            varying = varying_axes(a, axes)
            return (lax.pmin if k == INPUT_LOW else lax.pmax)(a, varying) if varying else a

        return {k: one(k, a) for k, a in fields.items()}


_RANGES: Any = Ranges()

_LEAST_LEARNED = np.float32(1e-15)
"""Learned scales count as this at least: the derivative of a quotient has their square below the line."""


class FakeRewriter(Giver, Collector):
    """Replays a program with rounded operands in the products that have a `Faked`.

    Args:
        program: the trace.
        faked: site name -> what is rounded.
        fields: site name -> its state; of sites that carry one.
        start: contribute the states that training starts from, and round nothing.
    """

    def __init__(
        self, program: Any, faked: Mapping[str, Faked], fields: Mapping[str, Fields] | None = None, start: bool = False
    ):
        averaged = {n for n, f in faked.items() if isinstance(f.inputs, Ema)}
        contribute = {n for n, f in faked.items() if f.carries} if start else averaged
        super().__init__(program, faked)  # type: ignore[arg-type]
        self.taps = dict.fromkeys(contribute, _RANGES)
        self.start = start
        self.hold(fields or {})

    @property
    def observing(self) -> bool:
        """Whether some site contributes."""
        return bool(self.taps)

    @property
    def every_branch(self) -> bool:
        """Where training starts: a weight has a scale to start from, whatever branch the first batch takes."""
        return self.start

    def product(
        self, emit: Callable[..., Any], number: int | None, acts: Any, eqn: Any, values: list[Any], context: Any
    ) -> list[Any]:
        """Emit a product of rounded operands."""
        where = self.where(number)
        distinct = list(dict.fromkeys(act for _, act in acts))
        if number is None or distinct == [None]:
            return bind(eqn, values)
        if len(distinct) > 1:
            raise RecipeError(
                f"{where}: its format changes with a loop index that only the run knows; fake quantization needs one "
                "format for all steps of such a loop"
            )
        faked: Faked = distinct[0]
        at = self.weight_side(number, eqn)
        stacks, outs, sums = self.weight_axes(number, eqn, values[at].ndim)
        if self.start:
            if faked.carries:
                self._contribute(number, _start(faked, values[at], values[1 - at], (stacks, outs, sums)))
            return bind(eqn, values)
        fields = self.given(number) if faked.carries else {}
        if fields is None:
            raise RecipeError(
                f"{where}: which slice of its weight is read is only known when the program runs, so it cannot be "
                "given a scale of its own; use scan in place of a while loop, or leave out learned, averaged and "
                "static scales here"
            )
        values = list(values)
        if faked.weights is not None and faked.learned:
            values[at] = learned_weight(values[at], fields[WEIGHT_SCALE], faked.weights, sums, outs, stacks)
        elif faked.weights is not None:
            values[at] = straight_through(values[at], faked.weights, sums, stacks, faked.observer)
        if faked.inputs is not None:
            values[1 - at] = self._input(number, faked.inputs, values[1 - at], fields, operand_axes(eqn, 1 - at)[0])
        return bind(eqn, values)

    def _input(self, number: int, source: Any, x: Any, fields: Fields, sums: tuple[int, ...]) -> Any:
        if isinstance(source, Dynamic):
            return rounded(x, Act(source.fmt), sums)
        if isinstance(source, Learned):
            return learned_input(x, fields[INPUT_SCALE], source)
        low, high = fields[INPUT_LOW], fields[INPUT_HIGH]
        if isinstance(source, Ema):
            seen = _range_of(x)
            self._contribute(number, {**seen, REACHED: jnp.ones((), jnp.float32)})
            low, high = (averaged(old, seen[k], source.decay) for old, k in ((low, INPUT_LOW), (high, INPUT_HIGH)))
        return within_range(x, source.fmt, low, high)

    def _contribute(self, number: int, fields: Fields) -> None:
        self.tap_of[number] = _RANGES
        self.shapes[number] = {k: a.shape for k, a in fields.items()}  # type: ignore[assignment]
        self.deposit({(number, ()): {k: lax.stop_gradient(a) for k, a in fields.items()}})


def averaged(old: Any, seen: Any, decay: float) -> Any:
    """One step of a moving average."""
    return decay * lax.stop_gradient(old) + (1 - decay) * lax.stop_gradient(seen)


def _range_of(x: Any) -> Fields:
    """The range of activations, [1, 1] each, with 0 in it."""
    x = lax.stop_gradient(x).astype(jnp.float32)
    return {
        INPUT_LOW: jnp.min(x, initial=0.0).reshape(1, 1),
        INPUT_HIGH: jnp.max(x, initial=0.0).reshape(1, 1),
    }


def _start(faked: Faked, w: Any, x: Any, axes: Sequence[tuple[int, ...]]) -> Fields:
    """The fields that a site's training starts from."""
    fields: Fields = {REACHED: jnp.ones((), jnp.float32)}
    if faked.learned and faked.weights is not None:
        matrix = _canonical(lax.stop_gradient(w), *axes)
        fields[WEIGHT_SCALE] = _first_scale(matrix, faked.weights, faked.observer)
    if isinstance(faked.inputs, Static):
        fields |= _range_of(x)
        fields[NONFINITE] = jnp.sum(~jnp.isfinite(x)).astype(jnp.float32)
    return fields


def _first_scale(matrix: Any, fmt: Format, observer: Observer | None) -> Any:
    """Where learned scales of a weight start: the observer's, or LSQ's 2 E|w| / sqrt(largest code)."""
    if observer is not None:
        return observer.fit(matrix, fmt)["scale"]
    size = jnp.abs(matrix)
    total, count = (fmt.reduce(a, jnp.sum) for a in (size, jnp.ones_like(size)))
    mean = total / jnp.maximum(count, 1)
    return jnp.where(mean > 0, 2 * mean / math.sqrt(_code_range(fmt)[1]), 1.0)


def _code_range(fmt: Any) -> tuple[int, int]:
    return fmt.code_range


def _canonical(w: Any, stacks: tuple[int, ...], outs: tuple[int, ...], sums: tuple[int, ...]) -> Any:
    """[*stacks, N, K] in float32."""
    sizes = [math.prod(w.shape[d] for d in axes) for axes in (outs, sums)]
    moved = lax.transpose(w, (*stacks, *outs, *sums))
    return moved.reshape(*(w.shape[d] for d in stacks), *sizes).astype(jnp.float32)


# ------------------------------------------------------------------------------------------------------------- rounding


def straight_through(
    w: Any, fmt: Format, sums: tuple[int, ...], stacks: tuple[int, ...] = (), observer: Observer | None = None
) -> Any:
    """Round a weight to a format and back; the derivative is that of the identity.

    Args:
        w: float, any shape.
        fmt: the format.
        sums: axes that a product sums over, in the order in which groups run through them.
        stacks: axes of independent matrices.
        observer: how the range is chosen; None takes all of it.

    Returns:
        The rounded weight, of the shape and dtype of w.
    """
    stop = lax.stop_gradient(w)
    outs = tuple(d for d in range(w.ndim) if d not in sums and d not in stacks)
    plain = observer is None and type(fmt).fit is Format.fit and type(fmt).shared_aux is Format.shared_aux
    whole = fmt.per in ("channel", "token")
    even = fmt.per == "group" and len(sums) == 1 and w.shape[sums[0]] % (fmt.group or 1) == 0
    if plain and fmt.elementwise and (whole or even):
        near = _as_it_lies(stop, fmt, sums, fmt.group if even else None)
    else:
        order = (*stacks, *outs, *sums)
        matrix = _canonical(stop, stacks, outs, sums)
        aux = fmt.fit(matrix) if observer is None else observer.fit(matrix, fmt)
        flat = fmt.decode(fmt.encode(matrix, aux), aux).reshape([w.shape[d] for d in order])
        near = lax.transpose(flat, tuple(order.index(d) for d in range(w.ndim)))
    return w + lax.stop_gradient(near.astype(w.dtype) - w)


def _as_it_lies(w: Any, fmt: Format, sums: tuple[int, ...], group: int | None) -> Any:
    """Round with a scale per output channel or group, in the layout of w; scales broadcast along sums."""
    shape, w = w.shape, w.astype(jnp.float32)
    if group is not None:
        (axis,) = sums
        w = _grouped(w, axis, group)
        sums = (axis + 1,)
    low, high = (f(w, axis=sums, keepdims=True, initial=0.0) for f in (jnp.min, jnp.max))
    # Formats broadcast numbers per block along the last axis: an axis of one element behind all others stands for it.
    aux = fmt.from_range(low[..., None], high[..., None])
    return fmt.decode(fmt.encode(w[..., None], aux), aux)[..., 0].reshape(shape)


def _grouped(w: Any, axis: int, group: int) -> Any:
    return w.reshape(*w.shape[:axis], w.shape[axis] // group, group, *w.shape[axis + 1 :])


def learned_weight(
    w: Any, scale: Any, fmt: Any, sums: tuple[int, ...], outs: tuple[int, ...], stacks: tuple[int, ...]
) -> Any:
    """Round a weight by scales that have a derivative (LSQ, Esser et al. 2020, equations 1 to 3).

    Args:
        w: float, any shape.
        scale: float32 [*stacks, N, blocks], canonical.
        fmt: symmetric `Int`.
        sums: axes that a product sums over, in the order in which groups run through them.
        outs: its other axes, in the order of N.
        stacks: axes of independent matrices.

    Returns:
        The rounded weight, of the shape and dtype of w.
    """
    blocks = scale.shape[-1]
    group = fmt.group if fmt.per == "group" and blocks > 1 else None
    if group is not None and (len(sums) != 1 or w.shape[sums[0]] % group):
        order = (*stacks, *outs, *sums)
        matrix = _canonical(w, stacks, outs, sums)
        spread = fmt.spread(lsq_scale(scale, group, fmt), matrix.shape[-1])
        near = _lsq(matrix, spread, fmt).reshape([w.shape[d] for d in order])
        return lax.transpose(near, tuple(order.index(d) for d in range(w.ndim))).astype(w.dtype)
    length = math.prod(w.shape[d] for d in sums)
    members = group or length * (math.prod(w.shape[d] for d in outs) if fmt.per == "tensor" else 1)
    scale = lsq_scale(scale, members, fmt)
    # [*stacks, N, blocks] -> the layout of w, of size 1 (or the number of groups) along sums
    there = (*stacks, *outs, *sums)
    rows = [1] * len(outs) if fmt.per == "tensor" else [w.shape[d] for d in outs]
    scale = scale.reshape(*(w.shape[d] for d in stacks), *rows, *(blocks if i == 0 else 1 for i in range(len(sums))))
    scale = lax.transpose(scale, tuple(there.index(d) for d in range(w.ndim)))
    wide = w.astype(jnp.float32)
    if group is not None:
        wide, scale = _grouped(wide, sums[0], group), jnp.expand_dims(scale, sums[0] + 1)
    return _lsq(wide, scale, fmt).reshape(w.shape).astype(w.dtype)


def lsq_scale(scale: Any, members: int, fmt: Any) -> Any:
    """A learned scale, kept positive, with its derivative divided by sqrt(members * largest code) (section 2.2).

    A scale that a step took to 0 or below has its derivative still, so that later steps can bring it back.
    """
    factor = np.float32(1 / math.sqrt(max(members, 1) * _code_range(fmt)[1]))
    still = lax.stop_gradient(scale)
    return jnp.maximum(still, _LEAST_LEARNED) + factor * (scale - still)


def _lsq(x: Any, scale: Any, fmt: Any) -> Any:
    """Numbers rounded to codes times scale, which broadcasts against them.

    The derivative in x is 1 within the range and 0 outside; in the scale code - x / scale within, and the outermost
    code outside.
    """
    low, high = _code_range(fmt)
    clipped = jnp.clip(x * (1.0 / scale), low, high)
    codes = clipped + lax.stop_gradient(_rounded_codes(x, scale, fmt) - clipped)
    return codes * scale


def _rounded_codes(x: Any, scale: Any, fmt: Any) -> Any:
    """The codes of the format, as float32, by the arithmetic of the format."""
    aux = {"scale": lax.stop_gradient(scale)[..., None]}
    if not fmt.symmetric:
        aux["zero"] = jnp.zeros_like(aux["scale"], jnp.uint8)
    # A block of the format is one number here: an axis of one element behind all others stands for its row.
    plain = dataclasses.replace(fmt, group=None, per="channel") if fmt.per == "group" else fmt
    return plain.encode(lax.stop_gradient(x)[..., None], aux)[..., 0].astype(jnp.float32)


def learned_input(x: Any, scale: Any, source: Learned) -> Any:
    """Round activations by a scale that has a derivative.

    "lsq" as for weights, its derivative divided by the root of the elements of an example (all but the first axis)
    times the largest code. "pact" (Choi et al. 2018, equations 1 to 3): codes 0 .. 2^b - 1 up to the level
    alpha = (2^b - 1) * scale, whose derivative is 1 where activations are above it and 0 elsewhere.

    Args:
        x: float, any shape.
        scale: float32 [1, 1].
        source: the method and the format.
    """
    wide, scale = x.astype(jnp.float32), scale.reshape((1,) * x.ndim)
    if source.method == "lsq":
        members = math.prod(x.shape[1:]) if x.ndim > 1 else x.size
        return _lsq(wide, lsq_scale(scale, members, source.fmt), source.fmt).astype(x.dtype)
    scale = jnp.maximum(scale, SMALLEST_SCALE)
    clipped = jnp.minimum(jnp.maximum(wide, 0.0), scale * _code_range(source.fmt)[1])
    near = _rounded_codes(wide, scale, source.fmt) * lax.stop_gradient(scale)
    return (clipped + lax.stop_gradient(near - clipped)).astype(x.dtype)


def within_range(x: Any, fmt: Format, low: Any, high: Any) -> Any:
    """Round activations in a fixed range; the derivative is 1 within it and 0 outside.

    Args:
        x: float, any shape.
        fmt: with one scale for the tensor.
        low, high: float32 [1, 1].
    """
    aux = {k: lax.stop_gradient(a) for k, a in fmt.from_range(low, high).items()}
    stop = lax.stop_gradient(x).astype(jnp.float32)
    if fmt.elementwise:  # as it lies: where axes are split over devices they cannot be made one
        aux = {k: a.reshape((1,) * (x.ndim + 1)) for k, a in aux.items()}
        near = fmt.decode(fmt.encode(stop[..., None], aux), aux)[..., 0]
    else:
        near = fmt.decode(fmt.encode(stop.reshape(1, -1), aux), aux).reshape(x.shape)
    bound = jnp.maximum(-low, high) if getattr(fmt, "symmetric", True) else None
    ends = (low, high) if bound is None else (-bound, bound)
    inside = jnp.clip(x.astype(jnp.float32), *(lax.stop_gradient(e.reshape((1,) * x.ndim)) for e in ends))
    return (inside + lax.stop_gradient(near - inside)).astype(x.dtype)

"""Turning float leaves into stored ones, as planned: a few jitted calls per shape and format.

A leaf passes through several programs and not one: into canonical order, into codes and scales, into the sums that its
SQNR is made of, and into packed storage. As one program XLA on CPU fuses the transpose into everything that follows,
reads the weight across its rows again and again and computes the codes anew for each use (measured: five times as
long). Each is begun without waiting for the one before, and the next leaf is begun before the figures of the last are
read.
"""

from __future__ import annotations

import collections
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax._compat import explicit_sharding
from qjax.applying.smoothing import smoothing
from qjax.applying.storage import LeafPlan, Slices, Stored, alike, assignment
from qjax.calibration import State
from qjax.errors import DataError, QjaxError, RecipeError, warn
from qjax.formats import SMOOTH, Aux, Format, QStack, assemble, canonical_matrix
from qjax.formats.numerics import finite_part
from qjax.formats.rotation import SIGNS, unrotate
from qjax.passes import RTN, rounding_statistics
from qjax.statistics import Statistic, merge_statistics

Figures = dict[tuple[int, ...], float]
"""SQNR in dB of each quantized slice, by its key."""


Given = Mapping[tuple[int, ...], Aux]
"""Aux of slices by their keys, [*stack axes that are no key axes, N, blocks] each."""


Seen = Mapping[tuple[int, ...], Mapping[str, State]]
"""What was observed of the activations that slices meet: key -> prefix of the reader -> its state."""


IN_FLIGHT = 1 << 28
"""Bytes of float leaves that may have been begun and not waited for: what keeps a device busy, and no more."""


def quantize_leaves(
    plans: Mapping[int, LeafPlan],
    leaves: list[Any],
    *,
    given: Mapping[int, Given] | None = None,
    seen: Mapping[int, Seen] | None = None,
    donate: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> tuple[list[Any], Callable[[], dict[int, Figures]]]:
    """Begin to store float leaves as planned, one after the other.

    Args:
        plans: position -> how that leaf is stored.
        leaves: all leaves; each that is stored is replaced by None, so that it can be freed.
        given: position -> aux of the slices whose scales are known, which are rounded to nearest.
        seen: position -> what was observed of the activations that the slices meet, for roundings that ask for it.
        donate: free the float leaf itself as well, before the next is begun.
        progress: called as ``progress(done, total, leaf name)`` after each leaf.

    Returns:
        All leaves, a `QArray` (or a `QStack` where slices have different formats) in the place of each that has a
        plan, and a function that waits for them: position -> SQNR of each quantized slice.

    Raises:
        QjaxError: a leaf is abstract, or holds NaN or infinity (here, or when waited for).
    """
    stored = list(leaves)
    found: dict[int, Figures] = {}
    begun: collections.deque[tuple[int, Any, Callable[[], Figures]]] = collections.deque()
    warned: set[str] = set()

    def finish(limit: int = 0) -> dict[int, Figures]:
        while begun and sum(value.nbytes for _, value, _ in begun) > limit:
            position, value, figures = begun.popleft()
            found[position] = figures()
            if donate and isinstance(value, jax.Array):
                jax.block_until_ready(jax.tree.leaves(stored[position]))
                value.delete()
            if progress is not None:
                progress(len(found), len(plans), plans[position].name)
        return found

    for position, plan in plans.items():
        value, leaves[position] = leaves[position], None
        if isinstance(value, jax.ShapeDtypeStruct):
            raise QjaxError(f"{plan.name} is abstract: quantize needs the numbers, qjax.plan does not")
        stored[position], figures = begin_leaf(
            plan, jnp.asarray(value), (given or {}).get(position, {}), (seen or {}).get(position, {}), warned=warned
        )
        begun.append((position, value, figures))
        finish(0 if donate else IN_FLIGHT)
    return stored, finish


def begin_leaf(
    plan: LeafPlan,
    leaf: Any,
    given: Given,
    seen: Seen,
    keys: Sequence[tuple[int, ...]] | None = None,
    smooth: Mapping[tuple[int, ...], Any] | None = None,
    tuned: Mapping[str, Any] | None = None,
    warned: set[str] | None = None,
) -> tuple[Any, Callable[[], Figures]]:
    """Begin to store one float leaf, or some of its slices, as planned.

    Args:
        plan: how.
        leaf: the float array; of ``plan.shape``, or with the slices ``keys`` only.
        given: aux of the slices whose scales are known.
        seen: what was observed of the activations that the slices meet.
        keys: the slices that are there, of one format: a product of positions along the key axes. None: all.
        smooth: factors [K] of the input channels of slices, found by a prepare pass: the slice is multiplied by them
            and they are kept beside it. Statistics are those of the activations as they are, not yet divided.
        tuned: of one slice: what its rounding found when it was trained, canonical; handed to it as statistics.
        warned: what the job has warned of already; each kind of doubt about the data is said once.

    Returns:
        The stored leaf, and a function that waits for it: it returns the SQNR of each quantized slice, or raises
        QjaxError if the leaf holds NaN or infinity.
    """
    slices = plan.slices if keys is None else {key: plan.slices[key] for key in keys}
    positions = {axis: sorted({key[n] for key in slices}) for n, axis in enumerate(plan.key_axes)}
    _warn_of_data(plan, slices, seen, set() if warned is None else warned)
    stored, begun = _part(plan, leaf, slices, plan.key_axes, positions, given, seen, smooth or {}, tuned)

    def figures() -> Figures:
        found: Figures = {}
        for keys, signal, noise in begun:
            signal, noise = (np.asarray(a, np.float64).reshape(-1) for a in (signal, noise))
            if not np.isfinite(signal).all():  # NaN, infinity, or numbers whose squares overflow
                _check_finite(plan.name, leaf)
            found.update(zip(keys, _decibel(signal, noise), strict=True))
        return found

    return stored, figures


def _warn_of_data(plan: LeafPlan, slices: Slices, seen: Seen, warned: set[str]) -> None:
    """Say once, of the first weight that it is true of, what makes its rounding doubt the data that it was given."""
    for key, stored in slices.items():
        doubts = getattr(stored.rounding, "doubts", None)
        if doubts is None or not seen.get(key):
            continue
        where = f"{plan.name}{list(key) or ''}"
        for kind, text in doubts(_merged_readers(stored.rounding, seen[key], where)):
            if kind not in warned:
                warned.add(kind)
                warn(f"{where}: {text} (said of the first such weight only)")


def _check_finite(name: str, leaf: Any) -> None:
    bad = int(jnp.sum(~jnp.isfinite(leaf)))
    if bad:
        raise QjaxError(
            f"{name}: {bad} of its {leaf.size} numbers are NaN or infinite and cannot be quantized; "
            "repair the checkpoint, or add a rule with skip=True for it"
        )


def _decibel(signal: np.ndarray, noise: np.ndarray) -> list[float]:
    """10·log10(signal / noise); inf where nothing is lost."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(noise > 0, signal / noise, np.inf)
        return (10 * np.log10(ratio)).tolist()


_Begun = list[tuple[list[tuple[int, ...]], Any, Any]]
"""Keys of slices that are stored in one array, and the sums of their squares and of their squared errors."""


def _part(
    plan: LeafPlan,
    leaf: Any,
    slices: Slices,
    key_axes: tuple[int, ...],
    positions: dict[int, list[int]],
    given: Given,
    seen: Seen,
    smooth: Mapping[tuple[int, ...], Any],
    tuned: Mapping[str, Any] | None,
) -> tuple[Any, _Begun]:
    """Quantize the part of a leaf whose slices along ``key_axes`` are stored as ``slices`` says.

    Args:
        plan: of the whole leaf.
        leaf: the part.
        slices: how it is stored, keyed by positions along ``key_axes``; along the other key axes it is stored alike.
        key_axes: the key axes along which the part may still differ.
        positions: key axis -> the positions of the whole leaf that the part holds.
        given: aux of the slices whose scales are known: all of those that are stored alike, or none.
        seen: what was observed of the activations that the slices meet.
        smooth: factors of input channels by slice.
        tuned: what training found, where the part is one slice.
    """
    distinct = list(dict.fromkeys(slices.values()))
    if len(distinct) == 1:
        stored = distinct[0]
        if stored.fmt is None:
            return jnp.asarray(leaf), []
        along = tuple(plan.stack_axes.index(a) for a in plan.key_axes)
        keys = list(itertools.product(*(positions[a] for a in plan.key_axes)))
        codes, aux, sums = _codes(plan, leaf, stored, along, keys, positions, given, seen, smooth, tuned)
        # Codes of eight bits are stored as they are: a program would only copy them.
        pack = assemble if stored.fmt.code_bits == 8 else _packed
        where = dict(shape=leaf.shape, in_axes=plan.in_axes, stack_axes=plan.stack_axes, dtype=leaf.dtype)
        return pack(codes, aux, stored.fmt, **where), [(keys, *sums)]
    axis, groups = key_axes[0], alike(slices)
    parts, begun = [], []
    for inner, where in groups:
        rows = jnp.take(jnp.asarray(leaf), jnp.asarray(where), axis=axis)
        at = {**positions, axis: [positions[axis][i] for i in where]}
        part, found = _part(plan, rows, inner, key_axes[1:], at, given, seen, smooth, tuned)
        parts.append(part)
        begun += found
    return QStack(tuple(parts), axis=axis, assign=assignment(groups)), begun


def _codes(
    plan: LeafPlan,
    leaf: Any,
    stored: Stored,
    along: tuple[int, ...],
    keys: list[tuple[int, ...]],
    positions: dict[int, list[int]],
    given: Given,
    seen: Seen,
    factors: Mapping[tuple[int, ...], Any],
    tuned: Mapping[str, Any] | None,
) -> tuple[Any, Aux, tuple[Any, Any]]:
    """Codes and aux of slices that are stored alike, and the sums that their SQNR is made of."""
    fmt, rounding = stored.fmt, stored.rounding or RTN()
    sizes = [len(positions[a]) for a in plan.key_axes]
    if keys and keys[0] in given:
        matrix = _canonical(leaf, plan.in_axes, plan.stack_axes)
        known = [given[key] for key in keys]
        aux: Aux = {k: jnp.stack([a[k] for a in known]).reshape(*sizes, *known[0][k].shape) for k in known[0]}
        codes = _encoded(matrix, aux, fmt)
        return codes, aux, _sums(matrix, codes, aux, fmt, along)
    statistics = rounding_statistics(rounding)
    smoothed = [(prefix, source) for prefix, source in stored.inputs if source.smooth is not None]
    if not statistics and not smoothed and not factors and _as_it_lies(plan, stored):
        codes, aux, sums = _rounded_as_it_lies(leaf, fmt, len(plan.stack_axes), len(plan.in_axes), along)
        return _exchanged(codes), aux, sums
    matrix = _canonical(leaf, plan.in_axes, plan.stack_axes)
    lead = (*sizes, *(1,) * (matrix.ndim - 2 - len(sizes)))
    smooth, constants = None, {}
    if smoothed:
        if factors:
            raise RecipeError(
                f"{plan.name}: a prepare pass smooths its input channels, and so does static(..., smooth=...) of rule "
                f"inputs {smoothed[0][1]!r}; leave one of them out"
            )
        smooth, constants = smoothing(matrix, smoothed, [seen[key] for key in keys], lead)
    elif factors:
        ones = np.ones(matrix.shape[-1], np.float32)
        rows = jnp.stack([jnp.asarray(factors.get(key, ones), jnp.float32) for key in keys])
        smooth = jnp.broadcast_to(rows.reshape(*lead, 1, -1), (*matrix.shape[:-2], 1, matrix.shape[-1]))
    if smooth is not None:
        matrix = _scaled(matrix, smooth)
    if tuned is not None:
        codes, aux = _rounded_by(matrix, dict(tuned), fmt, rounding, stored.observer)
    elif statistics:
        states = [_merged_readers(rounding, seen.get(key, {}), f"{plan.name}{list(key) or ''}") for key in keys]
        found = {
            name: jnp.stack([state[name] for state in states]).reshape(
                *sizes, *(() if stacked else lead[len(sizes) :]), *states[0][name].shape
            )
            for name, stacked in _field_kinds(statistics)
        }
        if smooth is not None:  # they were gathered before the activations are divided
            found = {k: v for part in statistics for k, v in part.scaled(found, 1 / smooth).items()}
        if explicit_sharding(matrix) is not None:  # columns are rounded one after the other, all on each device
            matrix = jax.device_put(matrix, jax.NamedSharding(matrix.sharding.mesh, jax.P()))
        codes, aux = _rounded_by(matrix, found, fmt, rounding, stored.observer)
    else:
        codes, aux = _rounded(matrix, fmt, rounding, stored.observer)
    if SMOOTH in aux:  # factors that the rounding found
        found = aux.pop(SMOOTH)
        matrix, smooth = _scaled(matrix, found), found if smooth is None else smooth * found
    if smooth is None:
        return codes, aux, _sums(matrix, codes, aux, fmt, along)
    sums = _smoothed_sums(matrix, smooth, codes, aux, fmt, along)
    return codes, {**aux, **constants, SMOOTH: smooth}, sums


def _merged_readers(rounding: Any, readers: Mapping[str, State], where: str) -> State:
    """The statistics of all readers of a slice together."""
    names = [name for name, _ in _field_kinds(rounding.statistics)]
    states = [{n: state[n] for n in names} for state in readers.values() if all(n in state for n in names)]
    if not states:
        raise DataError(
            f"{where}: no batch reached it, so {type(rounding).__name__} has nothing to look at; give batches that run "
            "it, or a rule of its own with round-to-nearest weights"
        )
    whole = states[0]
    for more in states[1:]:
        whole = merge_statistics(rounding.statistics, whole, more)
    return whole


def _field_kinds(statistics: Sequence[Statistic]) -> list[tuple[str, bool]]:
    """Fields of statistics, and whether each element of a product's stack has its own."""
    return [(name, part.stacked) for part in statistics for name in jax.eval_shape(lambda p=part: p.init((1, 1)))]


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _rounded_by(matrix: Any, found: Any, fmt: Format, rounding: Any, observer: Any) -> tuple[Any, Aux]:
    """Round each matrix [N, K] of [*stack, N, K] by its statistics, one after the other: they may be large."""
    stack = matrix.shape[:-2]
    if not stack:
        return rounding.round(matrix, fmt, observer=observer, statistics=found)
    flat = lambda a: jnp.broadcast_to(a, (*stack, *a.shape[len(stack) :])).reshape(-1, *a.shape[len(stack) :])  # noqa: E731
    codes, aux = lax.map(
        lambda one: rounding.round(one[0], fmt, observer=observer, statistics=one[1]),
        (flat(matrix), jax.tree.map(flat, found)),
    )
    return jax.tree.map(lambda a: a.reshape(*stack, *a.shape[1:]), (codes, aux))


@jax.jit
def _scaled(matrix: Any, smooth: Any) -> Any:
    return (matrix.astype(jnp.float32) * smooth).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _smoothed_sums(matrix: Any, smooth: Any, codes: Any, aux: Aux, fmt: Format, along: tuple[int, ...]) -> Any:
    """`_sums` of a smoothed weight, as what it stands for."""
    return _squares(matrix / smooth, _decoded(codes, aux, fmt) / smooth, along)


@functools.partial(jax.jit, static_argnums=2)
def _encoded(matrix: Any, aux: Aux, fmt: Format) -> Any:
    return fmt.encode(matrix.astype(jnp.float32), aux)


_canonical = jax.jit(canonical_matrix, static_argnums=(1, 2))
_packed = jax.jit(assemble, static_argnums=2, static_argnames=("shape", "in_axes", "stack_axes", "dtype"))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _rounded(matrix: Any, fmt: Format, rounding: Any, observer: Any) -> tuple[Any, Aux]:
    """Round each matrix [N, K] of a canonical weight [*stack, N, K]: codes and aux.

    Args:
        matrix: the weight.
        fmt: the format.
        rounding: with ``round(matrix [N, K], fmt, observer=...) -> (codes, aux)``.
        observer: how the range is chosen, or None.
    """
    one: Any = functools.partial(rounding.round, fmt=fmt, observer=observer)
    for _ in range(matrix.ndim - 2):
        one = jax.vmap(one)
    return one(matrix)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _sums(matrix: Any, codes: Any, aux: Aux, fmt: Format, along: tuple[int, ...]) -> tuple[Any, Any]:
    """Σw² and Σ(w − q)² over all axes of a canonical weight but the stack axes ``along``, in that order."""
    return _squares(matrix.astype(jnp.float32), _decoded(codes, aux, fmt), along)


def _decoded(codes: Any, aux: Aux, fmt: Format) -> Any:
    """What codes stand for, rotated back where a rounding has rotated the weight."""
    near = fmt.decode(codes, aux)
    return unrotate(near, aux[SIGNS]) if SIGNS in aux else near


def _squares(w: Any, near: Any, along: tuple[int, ...]) -> tuple[Any, Any]:
    error = w - near
    rest = tuple(a for a in range(w.ndim) if a not in along)
    order = [sorted(along).index(a) for a in along]
    return jnp.transpose(jnp.sum(w * w, rest), order), jnp.transpose(jnp.sum(error * error, rest), order)


def _as_it_lies(plan: LeafPlan, stored: Stored) -> bool:
    """Whether a leaf can be rounded before it is transposed, which then moves bytes in the place of floats.

    It can if it lies as [*stack, *in, *out], is rounded to nearest, and elements of its format share nothing but the
    scale of their row: arrays that broadcast along columns then do for rows what others do the other way round.
    """
    fmt = stored.fmt
    lies = (*plan.stack_axes, *plan.in_axes) == tuple(range(len(plan.stack_axes) + len(plan.in_axes)))
    nearest = stored.rounding in (None, RTN()) and stored.observer is None and type(fmt).fit is Format.fit
    return lies and nearest and fmt.elementwise and fmt.per in ("channel", "token")


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _rounded_as_it_lies(
    leaf: Any, fmt: Format, stacks: int, ins: int, along: tuple[int, ...]
) -> tuple[Any, Aux, tuple[Any, Any]]:
    """Codes [*stack, K, N], canonical aux and the sums of `_sums` of a leaf [*stack, *in, *out]."""
    stack, rows = leaf.shape[:stacks], leaf.shape[stacks : stacks + ins]
    w = leaf.astype(jnp.float32).reshape(*stack, math.prod(rows), math.prod(leaf.shape[stacks + ins :]))
    finite = finite_part(w)
    low, high = (f(finite, axis=-2, keepdims=True, initial=0.0) for f in (jnp.min, jnp.max))
    aux = fmt.from_range(_exchange(low), _exchange(high))
    columns = {name: _exchange(a) for name, a in aux.items()}
    codes = fmt.encode(w, columns)
    return codes, aux, _squares(w, fmt.decode(codes, columns), along)


def _exchange(a: Any) -> Any:
    return jnp.swapaxes(a, -1, -2)


_exchanged = jax.jit(_exchange)

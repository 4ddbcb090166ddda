"""Constant activation scales: from observed states to arrays that are kept with the weight they meet.

The scales of a site are stored with its weight, as arrays ``input.scale`` (and ``input.zero``) of the weight's
`QArray`, constant along all but stacked axes. So they are sliced by scans, placed by shardings and saved in checkpoints
as the weight is, and the tree of parameters is the only thing that a model carries.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.applying.storage import LeafPlan, input_prefix, reads_slice
from qjax.calibration import AbsMax, MinMax, Observer, State
from qjax.errors import DataError
from qjax.formats import SMOOTH, Int, QArray, QStack
from qjax.passes import Rotated, rounding_statistics
from qjax.program import Program
from qjax.recipe import Decision
from qjax.rewriting.taps import NONFINITE, Tap
from qjax.sources import Static
from qjax.statistics import ChannelRange

_TENSOR = Int(8, per="tensor")
"""Stands for the whole tensor where an observer is asked for the range of one."""

Constants = Mapping[str, Mapping[str, Any]]
"""Site -> the arrays that its format's ``from_range`` gives, [1, 1] each."""


def observer_of(source: Static) -> Observer:
    """The observer that a static source names; without one, the largest magnitude (the range, if asymmetric)."""
    if source.observer is not None:
        return source.observer
    return AbsMax() if source.fmt.symmetric else MinMax()


def taps_of(decisions: Mapping[str, Decision]) -> dict[str, Tap]:
    """What has to be observed for a recipe: site -> tap."""
    taps = {}
    for name, d in decisions.items():
        if d.skip:
            continue
        statistics = rounding_statistics(d.rounding) if d.weights is not None else ()
        if isinstance(d.inputs, Static) and d.inputs.smooth is not None:
            taps[name] = Tap(statistics=(ChannelRange(), *statistics))
        elif isinstance(d.inputs, Static):
            fmt, observer = _TENSOR if d.inputs.fmt.shares_constant else d.inputs.fmt, observer_of(d.inputs)
            rotated = isinstance(d.rounding, Rotated) and d.weights is not None
            taps[name] = Tap(fmt, d.rounding.seen_by(observer) if rotated else observer, statistics, ordered=rotated)
        elif statistics:
            taps[name] = Tap(statistics=statistics)
    return taps


def constants_of(decisions: Mapping[str, Decision], state: Mapping[str, State]) -> Constants:
    """The arrays of each site with static inputs, from its observed state.

    Args:
        decisions: of the sites that are meant.
        state: site -> what was observed there.

    Raises:
        DataError: the state is that of another recipe or program, or of a site that no batch reached.
    """
    taps = taps_of(decisions)
    if set(state) != set(taps):
        missing, more = sorted(set(taps) - set(state)), sorted(set(state) - set(taps))
        said = f"no state for {missing[0]}" if missing else f"state for {more[0]}, which the recipe does not ask for"
        raise DataError(
            f"the state does not belong to this recipe and program: {said} ({len(missing)} missing, {len(more)} too "
            "many); calibrate with the same recipe and function"
        )
    out = {}
    for name, tap in taps.items():
        if not isinstance(state[name], Mapping):
            raise DataError(f"{name}: the state is a {type(state[name]).__name__}; calibrate with qjax.calibrate")
        found = {k: v for k, v in state[name].items() if k != NONFINITE}
        wanted = {k for k in jax.eval_shape(lambda tap=tap: tap.init((1, 1))) if k != NONFINITE}
        expected = jax.eval_shape(lambda tap=tap: Tap(tap.fmt, tap.observer).init((1, 1)))
        fields = {k: v for k, v in found.items() if k in expected}
        own = tap.observer.by_channel if tap.observer is not None else False
        other = set(found) != wanted or any(_shape(fields[k], own) != _shape(expected[k], own) for k in fields)
        if other:
            raise DataError(
                f"{name}: the state holds {_shapes(found)} and the recipe keeps {', '.join(sorted(wanted))}"
                f"{_kept(tap)}; calibrate with the same recipe"
            )
        if tap.observer is None and not any(isinstance(s, ChannelRange) for s in tap.statistics):
            continue
        if tap.observer is None:
            fields = {k: found[k] for k in ("channel_below", "channel_above")}
        if not any(np.asarray(v).any() for v in fields.values()):
            raise DataError(
                f"{name}: no batch reached it, or all its activations were 0, so there is no range for static "
                f"{tap.fmt.name if tap.fmt is not None else 'smoothed'} inputs; give batches that run it, use "
                "dynamic(...) for it, or skip it"
            )
        if tap.observer is None:  # the scale follows from the weight too: see `qjax.applying.smoothing`
            continue
        aux = decisions[name].inputs.fmt.constant_aux(*tap.observer.range(fields, tap.fmt))  # type: ignore[union-attr]
        out[name] = {k: np.asarray(v) for k, v in aux.items()}
    return out


def _shape(a: Any, by_channel: bool) -> tuple[int, ...]:
    """The shape of an observer's array, but for the channels of the site."""
    return tuple(a.shape[:-1] if by_channel else a.shape)


def _kept(tap: Tap) -> str:
    return f" of {tap.observer!r}" if tap.observer is not None else ""


def _shapes(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {tuple(v.shape)}" for k, v in fields.items()) or "nothing"


def with_constants(
    program: Program,
    plan: LeafPlan,
    value: Any,
    constants: Constants,
    positions: Mapping[int, Sequence[int]] | None = None,
) -> Any:
    """A stored leaf together with the activation scales of its readers.

    Args:
        program: the trace.
        plan: how the leaf is stored.
        value: the leaf as stored, a `QArray` or `QStack`.
        constants: of all sites.
        positions: key axis -> the positions of the leaf that are there; None: all.
    """
    readers = [site for site in program.sites if site.leaf == plan.name and site.name in constants]
    if not readers:
        return value

    def of(key: tuple[int, ...]) -> dict[str, Any]:
        position = dict(zip(plan.key_axes, key, strict=True))
        return {
            f"{input_prefix(site.name)}.{field}": array
            for site in readers
            if reads_slice(site.slice, position)
            for field, array in constants[site.name].items()
        }

    def attach(part: Any, positions: dict[int, list[int]]) -> Any:
        if isinstance(part, QStack):
            axis = part.axis
            members: dict[int, list[int]] = {}
            for at, (number, _) in zip(positions[axis], part.assign, strict=True):
                members.setdefault(number, []).append(at)
            parts = [attach(p, {**positions, axis: members[number]}) for number, p in enumerate(part.parts)]
            return dataclasses.replace(part, parts=tuple(parts))
        if not isinstance(part, QArray):
            return part
        sizes = [len(positions[a]) for a in plan.key_axes]
        found = [of(key) for key in itertools.product(*(positions[a] for a in plan.key_axes))]
        return with_arrays(part, {name: np.stack([f[name].reshape(()) for f in found]) for name in found[0]}, sizes)

    there = positions or {axis: range(plan.shape[axis]) for axis in plan.key_axes}
    return attach(value, {axis: list(where) for axis, where in there.items()})


def with_arrays(q: QArray, arrays: Mapping[str, Any], sizes: list[int]) -> QArray:
    """A weight with further arrays, one number for each position of its leading stack axes.

    Args:
        q: the weight.
        arrays: name -> numbers, as many as the product of ``sizes``.
        sizes: of the leading stack axes along which the numbers differ.
    """
    stack, rank = q.codes.shape[: q.stack_ndim], q.codes.ndim
    aux = dict(q.aux)
    for name, numbers in arrays.items():
        column = jnp.asarray(numbers).reshape(*sizes, *(1,) * (rank - len(sizes)))
        aux[name] = jnp.broadcast_to(column, (*stack, *(1,) * (rank - len(stack))))
    return dataclasses.replace(q, aux=aux)


def abstract_inputs(q: QArray, inputs: tuple[tuple[str, Static], ...], rounding: Any = None) -> QArray:
    """An abstract weight with the activation scales that it is kept with, and what its rounding keeps beside it."""
    stack, rank = q.codes.shape[: q.stack_ndim], q.codes.ndim
    aux = dict(q.aux)
    if any(source.smooth is not None for _, source in inputs):
        aux[SMOOTH] = jax.ShapeDtypeStruct((*stack, *(1,) * (rank - len(stack) - 1), q.length), jnp.dtype("float32"))
    if hasattr(rounding, "kept"):
        for name, a in jax.eval_shape(lambda: rounding.kept(q.length)).items():
            aux[name] = jax.ShapeDtypeStruct((*stack, *(1,) * (rank - len(stack) - 1), a.shape[-1]), a.dtype)
    for prefix, source in inputs:
        arrays = jax.eval_shape(lambda fmt=source.fmt: fmt.constant_aux(jnp.zeros((1, 1)), jnp.ones((1, 1))))
        for field, a in arrays.items():
            aux[f"{prefix}.{field}"] = jax.ShapeDtypeStruct((*stack, *(1,) * (rank - len(stack))), a.dtype)
    return dataclasses.replace(q, aux=aux)

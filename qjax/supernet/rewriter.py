"""A program whose products have elastic operands: what runs a supernet.

Every site carries tables with a column of steps for each of 2 to 8 bits, and its row of the choice, which is an array
like the tables: it travels with them into the bodies of scans and of shared calls, so one compiled program runs every
subnet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax._compat import bind, varying_axes
from qjax.errors import RecipeError
from qjax.rewriting.given import Fields, Giver
from qjax.rewriting.taps import NONFINITE, Collector
from qjax.supernet.quantizer import init_rows, lsq_plus, step_grad_scale
from qjax.supernet.tables import (
    CHANNEL,
    CHOICE,
    INPUT_SIGNED,
    TENSOR,
    Forms,
    group_steps,
    input_names_of,
    input_steps,
    names_of,
    weight_steps,
)

REACHED = "reached"
"""Field of a contribution: 1 where the site ran."""


class FirstSteps:
    """What a site contributes to the state that training starts from; of several runs the one with the widest steps."""

    def init(self, shapes: Mapping[str, tuple[int, ...]]) -> Fields:
        """What contributes nothing."""
        return {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}

    def merge(self, a: Fields, b: Fields) -> Fields:
        """Both."""
        return self.merged({k: jnp.stack([a[k], b[k]]) for k in a})

    def merged(self, stacked: Fields) -> Fields:
        """All rows of a leading axis."""
        widths = jax.vmap(_width)(stacked)
        chosen = jnp.argmax(widths)
        return {
            k: _COMMON[k][0](a, axis=0) if k in _COMMON else lax.dynamic_index_in_dim(a, chosen, keepdims=False)
            for k, a in stacked.items()
        }

    def over_devices(self, fields: Fields, axes: tuple[str, ...]) -> Fields:
        """All devices along mesh axes."""
        width = _width(fields)
        varying = varying_axes(width, axes)
        if not varying:
            return fields
        mine = (width >= lax.pmax(width, varying)).astype(jnp.float32)
        count = lax.psum(mine, varying)

        def one(k: str, a: Any) -> Any:
            own = varying_axes(a, axes)
            if not own:
                return a
            return _COMMON[k][1](a, own) if k in _COMMON else lax.psum(mine * a, varying) / count

        return {k: one(k, a) for k, a in fields.items()}


_COMMON: Mapping[str, Any] = {
    REACHED: (jnp.max, lax.pmax),
    NONFINITE: (jnp.max, lax.pmax),
    INPUT_SIGNED: (jnp.max, lax.pmax),
}
"""Fields that are merged by themselves."""


def _width(fields: Fields) -> Any:
    """How wide the steps of a run are; -1 where the site did not run."""
    scales = [jnp.sum(a) for k, a in fields.items() if ".scale" in k]
    return jnp.where(fields[REACHED] > 0, sum(scales, jnp.zeros(())), -1.0)


_FIRST: Any = FirstSteps()


class ElasticRewriter(Giver, Collector):
    """Replays a program with elastic operands in the products of ``sites``.

    Args:
        program: the trace.
        sites: elastic site -> its row of the choice.
        forms: site -> what its tables hold.
        fields: site -> its tables, and its row of the choice; None to contribute the first ones.
    """

    def __init__(
        self,
        program: Any,
        sites: Mapping[str, Any],
        forms: Mapping[str, Forms],
        fields: Mapping[str, Fields] | None = None,
    ):
        super().__init__(program, {name: forms[name] for name in sites})  # type: ignore[arg-type]
        self.start = fields is None
        self.taps = dict.fromkeys(sites, _FIRST) if self.start else {}
        self.hold(fields if fields is not None else {n: {CHOICE: row} for n, row in sites.items()})

    @property
    def observing(self) -> bool:
        """Whether some site contributes."""
        return self.start

    @property
    def every_branch(self) -> bool:
        """Where training starts: a weight has steps to start from, whatever branch the first batch takes."""
        return self.start

    def product(
        self, emit: Callable[..., Any], number: int | None, acts: Any, eqn: Any, values: list[Any], context: Any
    ) -> list[Any]:
        """Emit a product of elastic operands."""
        distinct = list(dict.fromkeys(act for _, act in acts))
        if number is None or distinct == [None]:
            return bind(eqn, values)
        where = self.where(number)
        fields = self.given(number)
        if len(distinct) > 1 or fields is None:
            raise RecipeError(
                f"{where}: which slice of its weight is read is only known when the program runs, so it cannot have "
                "steps of its own; use scan in place of a while loop, or leave it out: At(pattern, skip=True)"
            )
        forms: Forms = distinct[0]
        at = self.weight_side(number, eqn)
        axes = self.weight_axes(number, eqn, values[at].ndim)
        if forms.roles is not None:
            axes = self._axes_of_the_first(number, forms, where)
        ins = values[at].shape[eqn.params["dimension_numbers"].rhs_spec[1]] if _is_conv(eqn) else None
        values = list(values)
        if self.start:
            tables = first_tables(values[at], values[1 - at], axes, forms)
            self._contribute(number, tables)
            fields = {**tables, CHOICE: fields[CHOICE]}
        values[at] = elastic_weight(values[at], fields, forms, axes, ins)
        values[1 - at] = elastic_input(values[1 - at], fields, forms)
        return bind(eqn, values)

    def _axes_of_the_first(self, number: int, forms: Forms, where: str) -> Axes:
        """The axes of an operand as the first reader of its weight uses them, in the order of the leaf."""
        assert forms.roles is not None
        dims, out = self.program.analysis.reads[number].ref.dims, ([], [], [])
        for d, parts in enumerate(dims):
            axes = {axis for axis, *_ in parts}
            role = next((r for r in range(3) if axes <= set(forms.roles[r])), None)
            if role is None:
                raise RecipeError(
                    f"{where}: it reads its weight in another shape than the first product of it does, so that the "
                    f"weight has no one set of steps; leave it out: At({where!r}, skip=True)"
                )
            out[role].append(d)
        stacks, outs, sums = (tuple(sorted(o, key=lambda d: [(a, -stride) for a, stride, _ in dims[d]])) for o in out)
        return stacks, outs, sums

    def _contribute(self, number: int, fields: Fields) -> None:
        self.tap_of[number] = _FIRST
        self.shapes[number] = {k: a.shape for k, a in fields.items()}  # type: ignore[assignment]
        self.deposit({(number, ()): {k: lax.stop_gradient(a) for k, a in fields.items()}})


def _is_conv(eqn: Any) -> bool:
    return eqn.primitive.name == "conv_general_dilated"


Axes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Axes of a weight as operand: stacks of matrices, kept ones in the order of N, summed ones."""


def elastic_weight(w: Any, fields: Fields, forms: Forms, axes: Axes, ins: int | None = None) -> Any:
    """Round a weight in the form of its row of the choice.

    Args:
        w: float, any shape.
        fields: tables [*stacks, N or 1, 7], or [*stacks, N * groups, 7], and the row.
        forms: what the tables hold.
        axes: of w.
        ins: input channels of a convolution; None is what the product sums over.

    Returns:
        Of the shape and dtype of w.
    """
    if forms.lengths:
        return _grouped_weight(w, fields, forms, axes)
    stacks, outs, sums = axes
    row = fields[CHOICE]
    n, k = (math.prod(w.shape[d] for d in dims) for dims in (outs, sums))
    scale, offset = weight_steps(fields, forms, row, n)
    there = (*stacks, *outs, *sums)

    def laid(a: Any) -> Any:
        """[*stacks, N] -> the layout of w, of size 1 along the axes that are summed."""
        a = a.reshape([w.shape[d] for d in (*stacks, *outs)] + [1] * len(sums))
        return lax.transpose(a, tuple(there.index(d) for d in range(w.ndim)))

    per_channel = step_grad_scale(row[0], n * k / (ins or k), factor=2.0)
    gain = jnp.where(row[2] == 1, per_channel, step_grad_scale(row[0], n * k))
    return lsq_plus(w, laid(scale), laid(offset), row[0], grad_scale=gain, abs_offset=forms.abs_offset)


def _grouped_weight(w: Any, fields: Fields, forms: Forms, axes: Axes) -> Any:
    """`elastic_weight` with a step for each output and group along the contracted axes.

    EQ-Net has no groups. The gain of their derivatives is LSQ's own (Esser et al. 2020, section 2.2), with the numbers
    that share a step: ``1 / sqrt(largest code * length of the group)``.
    """
    row, order = fields[CHOICE], [d for dims in axes for d in dims]
    scale, offset, unit = group_steps(fields, forms, row)
    laid = lax.transpose(w, order)
    runs = laid.reshape(*scale.shape, unit)
    gain = step_grad_scale(row[0], jnp.asarray(forms.groups, jnp.float32)[row[5]])
    near = lsq_plus(runs, scale[..., None], offset[..., None], row[0], grad_scale=gain, abs_offset=forms.abs_offset)
    return lax.transpose(near.reshape(laid.shape), tuple(order.index(d) for d in range(w.ndim)))


def elastic_input(x: Any, fields: Fields, forms: Forms) -> Any:
    """Round activations in the form of their row of the choice; 0 bits leave them.

    Args:
        x: float, any shape.
        fields: tables [1, 7] and the row.
        forms: what the tables hold.
    """
    if not forms.acts:
        return x
    row = fields[CHOICE]
    scale, offset = (a.reshape((1,) * x.ndim) for a in input_steps(fields, forms, row))
    bits, signed = jnp.maximum(row[1], 2), fields[INPUT_SIGNED].reshape(()) > 0
    gain = step_grad_scale(bits, x.size, signed)
    near = lsq_plus(x, scale, offset, bits, signed=signed, grad_scale=gain, abs_offset=forms.abs_offset)
    return jnp.where(row[1] == 0, x, near)


def first_tables(w: Any, x: Any, axes: Axes, forms: Forms) -> Fields:
    """The tables that a site's training starts from.

    Args:
        w, x: the weight and the activations that it meets.
        axes: of w.
        forms: what the tables hold.
    """
    stacks, outs, sums = axes
    order = (*stacks, *outs, *sums)
    n, k = (math.prod(w.shape[d] for d in dims) for dims in (outs, sums))
    lead = [w.shape[d] for d in stacks]
    matrix = lax.stop_gradient(lax.transpose(w, order)).reshape(-1, n, k).astype(jnp.float32)
    fields: dict[str, Any] = {REACHED: jnp.ones((), jnp.float32)}
    for grain, symmetric in forms.weights:
        length = {CHANNEL: k, TENSOR: n * k}[grain] if isinstance(grain, str) else grain
        found = _first(matrix.reshape(-1, length), symmetric, grain == CHANNEL, forms.sample)
        for name, table in zip(names_of(grain, symmetric), found, strict=True):
            if name is not None:
                fields[name] = table.reshape(*lead, table.shape[0] // max(math.prod(lead), 1), table.shape[1])
    if forms.acts:
        x = lax.stop_gradient(x).astype(jnp.float32)
        signed = jnp.min(x, initial=0.0) < -1e-9
        fields[INPUT_SIGNED] = signed.astype(jnp.float32).reshape(1)
        fields[NONFINITE] = jnp.sum(~jnp.isfinite(x)).astype(jnp.float32)
        for symmetric in forms.acts:
            tables = _first(x.reshape(1, -1), symmetric, False, forms.sample, signed)
            for name, table in zip(input_names_of(symmetric), tables, strict=True):
                if name is not None:
                    fields[name] = table
    return fields


def _first(rows: Any, symmetric: bool, channel: bool, sample: int | None, signed: Any = True) -> Any:
    """Initial steps of a matrix; of long rows evenly spaced elements are tried on, and all count for the range."""
    ends = tuple(f(rows, axis=1, keepdims=True, initial=0.0) if not rows.shape[1] else f(rows, axis=1, keepdims=True)
                 for f in (jnp.min, jnp.max))  # fmt: skip
    if sample is not None and rows.shape[1] > sample:
        rows = rows[:, np.linspace(0, rows.shape[1] - 1, sample).astype(np.int64)]
    return _init_rows(rows, signed, ends, symmetric, channel)


def _init(rows: Any, signed: Any, ends: Any, symmetric: bool, channel: bool) -> Any:
    return init_rows(rows, symmetric=symmetric, per_channel=channel, signed=signed, ends=ends)


_init_rows = jax.jit(_init, static_argnums=(3, 4))

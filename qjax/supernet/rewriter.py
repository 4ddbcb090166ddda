"""A program whose products have elastic operands: what runs a supernet.

Every site carries tables with a column of steps for each of 2 to 8 bits, and its row of the choice, which is an array
like the tables: it travels with them into the bodies of scans and of shared calls, so one compiled program runs every
subnet.
"""

from __future__ import annotations

import dataclasses
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

CHOICE = "choice"
"""The row of the choice among the fields of a site."""

INPUT_SIGNED = "input.signed"
"""1 where activations have been negative when training began; float32, with derivative zero."""

REACHED = "reached"
"""Field of a contribution: 1 where the site ran."""

FEW, MANY = 0, 6
"""First and last column of a table."""


@dataclasses.dataclass(frozen=True)
class Forms:
    """What the tables of every site hold: what the space can ask for.

    Attributes:
        weights: (per channel, symmetric) pairs. acts: symmetries of activations; empty where they are float always.
        abs_offset: as in `Space`.
        sample: how many elements of a tensor an initial step is tried on at most; None is all.
    """

    weights: tuple[tuple[bool, bool], ...]
    acts: tuple[bool, ...]
    abs_offset: bool = False
    sample: int | None = None

    def weight_fields(self) -> list[str]:
        """Names of the tables of a weight."""
        out = []
        for channel, symmetric in self.weights:
            scale, offset = names_of(channel, symmetric)
            out += [scale] if offset is None else [scale, offset]
        return out

    def input_fields(self) -> list[str]:
        """Names of the tables of activations."""
        if not self.acts:
            return []
        out = [INPUT_SIGNED]
        for symmetric in self.acts:
            scale, offset = input_names_of(symmetric)
            out += [scale] if offset is None else [scale, offset]
        return out


def names_of(channel: bool, symmetric: bool) -> tuple[str, str | None]:
    """Names of the scale and the offset of a weight in a form."""
    where = "channel" if channel else "tensor"
    if symmetric:
        return f"weight.scale.{where}", None
    return f"weight.scale.{where}.asymmetric", f"weight.offset.{where}"


def input_names_of(symmetric: bool) -> tuple[str, str | None]:
    """Names of the scale and the offset of activations in a form."""
    return ("input.scale", None) if symmetric else ("input.scale.asymmetric", "input.offset")


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
        sites: names of the elastic sites.
        forms: what their tables hold.
        fields: site name -> its tables, and its row of the choice; None to contribute the first ones.
    """

    def __init__(
        self, program: Any, sites: Mapping[str, Any], forms: Forms, fields: Mapping[str, Fields] | None = None
    ):
        super().__init__(program, dict.fromkeys(sites, forms))  # type: ignore[arg-type]
        self.start = fields is None
        self.taps = dict.fromkeys(sites, _FIRST) if self.start else {}
        self.highest = dict(sites)
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
        stacks, outs, sums = self.weight_axes(number, eqn, values[at].ndim)
        ins = values[at].shape[eqn.params["dimension_numbers"].rhs_spec[1]] if _is_conv(eqn) else None
        values = list(values)
        if self.start:
            tables = first_tables(values[at], values[1 - at], (stacks, outs, sums), forms)
            self._contribute(number, tables)
            fields = {**tables, CHOICE: fields[CHOICE]}
        values[at] = elastic_weight(values[at], fields, forms, (stacks, outs, sums), ins)
        values[1 - at] = elastic_input(values[1 - at], fields, forms)
        return bind(eqn, values)

    def _contribute(self, number: int, fields: Fields) -> None:
        self.tap_of[number] = _FIRST
        self.shapes[number] = {k: a.shape for k, a in fields.items()}  # type: ignore[assignment]
        self.deposit({(number, ()): {k: lax.stop_gradient(a) for k, a in fields.items()}})


def _is_conv(eqn: Any) -> bool:
    return eqn.primitive.name == "conv_general_dilated"


Axes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Axes of a weight as operand: stacks of matrices, kept ones in the order of N, summed ones."""


def _column(table: Any, bits: Any) -> Any:
    """The column of a bit width of a table [..., 7]; its derivative in the others is exactly zero."""
    return lax.dynamic_index_in_dim(table, jnp.clip(bits - 2, FEW, MANY), table.ndim - 1, keepdims=False)


def _selected(fields: Fields, names: tuple[str, str | None], bits: Any) -> tuple[Any, Any]:
    """The step and offset of one form."""
    scale = _column(fields[names[0]], bits)
    return scale, jnp.zeros_like(scale) if names[1] is None else _column(fields[names[1]], bits)


def weight_steps(fields: Fields, forms: Forms, row: Any, rows: int) -> tuple[Any, Any]:
    """The steps and offsets of a weight at a choice, [*stacks, rows] each.

    Args:
        fields: tables of the site.
        forms: what they hold.
        row: int32 [5], may be traced.
        rows: N.
    """
    found: Any = None
    for channel, symmetric in forms.weights:
        own = _selected(fields, names_of(channel, symmetric), row[0])
        own = tuple(jnp.broadcast_to(a, (*a.shape[:-1], rows)) for a in own)
        here = (row[2] == int(channel)) & (row[3] == int(symmetric))
        found = own if found is None else tuple(jnp.where(here, a, b) for a, b in zip(own, found, strict=True))
    return found


def input_steps(fields: Fields, forms: Forms, row: Any) -> tuple[Any, Any]:
    """The step and offset of activations at a choice, [1] each."""
    found: Any = None
    for symmetric in forms.acts:
        own = _selected(fields, input_names_of(symmetric), row[1])
        here = row[4] == int(symmetric)
        found = own if found is None else tuple(jnp.where(here, a, b) for a, b in zip(own, found, strict=True))
    return found


def elastic_weight(w: Any, fields: Fields, forms: Forms, axes: Axes, ins: int | None = None) -> Any:
    """Round a weight in the form of its row of the choice.

    Args:
        w: float, any shape.
        fields: tables [*stacks, N or 1, 7] and the row.
        forms: what the tables hold.
        axes: of w.
        ins: input channels of a convolution; None is what the product sums over.

    Returns:
        Of the shape and dtype of w.
    """
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
    bits, signed = jnp.maximum(row[1], 2), fields[INPUT_SIGNED].reshape(()) > 0.5
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
    for channel, symmetric in forms.weights:
        rows = matrix.reshape(-1, k if channel else n * k)
        names = names_of(channel, symmetric)
        for name, table in zip(names, _first(rows, symmetric, channel, forms.sample), strict=True):
            if name is not None:
                fields[name] = table.reshape(*lead, n if channel else 1, table.shape[-1])
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

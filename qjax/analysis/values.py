"""What analysis knows of one value, and how that knowledge passes through loops and joins."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jax.core import Tracer
from jax.extend import core as jex

from qjax._compat import consts_of, constvars_and_invars, open_jaxpr
from qjax.analysis.known import Known
from qjax.analysis.provenance import Index, Ref


@dataclasses.dataclass(frozen=True, slots=True)
class Near:
    """The common ground of the weights just upstream of a value: path segments, and loop indices if all share them."""

    segments: tuple[str, ...]
    index: tuple[Index, ...] | None


@dataclasses.dataclass(frozen=True, slots=True)
class Val:
    """What analysis knows of one value.

    Attributes:
        ref: the leaf view it is, if it is one.
        leaves: the leaves it is computed from (kept only while no run-time data enters).
        data: whether arguments, randomness or loop state enter.
        const: whether it is (a view of) a captured array.
        known: its integer value, if known.
        near: the weights just upstream.
        counter: whether it is a loop counter, or computed from counters and known numbers alone.
    """

    ref: Ref | None = None
    leaves: frozenset[int] = frozenset()
    data: bool = False
    const: bool = False
    known: Known | None = None
    near: Near | None = None
    counter: bool = False


DATA = Val(data=True)


def captured_value(const: Any) -> Val:
    """A closed-over array; short integer ones are known, as they may be indices."""
    array = const if hasattr(const, "dtype") else np.asarray(const)
    if getattr(array, "ndim", 2) <= 1 and getattr(array, "size", 1 << 30) <= 4096:
        try:
            if np.dtype(array.dtype).kind in "iub" and not isinstance(array, Tracer):
                return Val(const=True, known=Known(np.asarray(array)))
        except TypeError:
            pass
    return Val(const=True)


def localized(v: Val, var: Any) -> Val:
    """Inside shard_map a leaf has its local shape; the leaf axes stay the same."""
    if v.ref is None:
        return v
    if any(len(d) > 1 for d in v.ref.dims):
        return dataclasses.replace(v, ref=None)
    shape = var.aval.shape
    dims = tuple(((d[0][0], 1, n),) if d else () for d, n in zip(v.ref.dims, shape, strict=True))
    return dataclasses.replace(v, ref=dataclasses.replace(v.ref, dims=dims))


def carry_in(body: Any, n_consts: int, n_carry: int, carry: list[Val], loop: int, length: int | None) -> list[Val]:
    """What is known of loop state inside the body: invariant slots keep everything, counters keep their values."""
    inner = open_jaxpr(body)
    variables = constvars_and_invars(body)[len(consts_of(body)) + n_consts :][:n_carry]
    steps = {}
    for eqn in inner.eqns:
        if eqn.primitive.name == "add" and isinstance(eqn.invars[1], jex.Literal) and np.ndim(eqn.invars[1].val) == 0:
            steps[eqn.outvars[0]] = (eqn.invars[0], eqn.invars[1].val)
        elif eqn.primitive.name == "sub" and isinstance(eqn.invars[1], jex.Literal) and np.ndim(eqn.invars[1].val) == 0:
            steps[eqn.outvars[0]] = (eqn.invars[0], -eqn.invars[1].val)
    out = []
    for var, init, result in zip(variables, carry, inner.outvars[:n_carry], strict=True):
        if result is var:
            out.append(init)
            continue
        start, step = steps.get(result, (None, 0)) if not isinstance(result, jex.Literal) else (None, 0)
        counter = start is var and float(step).is_integer()
        known = None
        if counter and length is not None and init.known is not None and init.known.loop is None:
            if init.known.value.ndim == 0:
                known = Known(int(init.known.value) + int(step) * np.arange(length), loop)
        out.append(Val(data=True, known=known, near=init.near, counter=counter))
    return out


def carry_out(carry: list[Val], carried: list[Val], outs: list[Val]) -> list[Val]:
    """Loop state after the loop."""
    return [
        init if inside is init else Val(data=True, near=nearest([init, out]))
        for init, inside, out in zip(carry, carried, outs, strict=True)
    ]


def leaving(v: Val) -> Val:
    """A stacked output of a scan."""
    return Val(data=True, near=dataclasses.replace(v.near, index=None) if v.near else None)


def nearest(vals: list[Val]) -> Near | None:
    """The weights just upstream of a value computed from ``vals``; parameters count only where nothing else does."""
    nears = [v.near for v in vals if v.near is not None and v.data] or [v.near for v in vals if v.near is not None]
    if not nears:
        return None
    first = nears[0]
    if all(n is first or n == first for n in nears):
        return first
    same = all(position_of(n.index) == position_of(first.index) for n in nears)
    return Near(common_prefix([n.segments for n in nears]), first.index if same else None)


def position_of(index: tuple[Index, ...] | None) -> Any:
    """What two slices of different leaves have in common if they are the same layer."""
    return None if index is None else tuple((i.values, i.loop) for i in index)


def common_prefix(paths: list[tuple[str, ...]]) -> tuple[str, ...]:
    """The segments that all paths begin with."""
    if not paths:
        return ()
    low, high = min(paths), max(paths)
    n = 0
    while n < len(low) and n < len(high) and low[n] == high[n]:
        n += 1
    return low[:n]


def _ordered(ref: Ref, dims: Any) -> tuple[int, ...]:
    """Leaf axes behind ``dims`` in the leaf's own order (the order in which groups run along them)."""
    return tuple(sorted({a[0] for d in dims for a in ref.dims[d]}))

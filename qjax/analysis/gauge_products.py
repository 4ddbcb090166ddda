"""How factors and orders pass through products: dots, convolutions, grouped products.

A weight takes any factors along its output axis (new unknowns begin there) and the reciprocals of those of its input
along the axes that it contracts. A product of two activations hands on what one of them carries outside the
contraction, and wants reciprocal factors within it (as queries and keys have).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qjax.analysis import layout
from qjax.analysis.flows import Flow, plain
from qjax.analysis.gauge import Gauge, rule


@rule("dot_general")
def _dot(g: Gauge, eqn: Any, ins: list[Flow]) -> list[Flow] | None:
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    sides = [(list(lb), list(lc)), (list(rb), list(rc))]
    weights = [s for s in (0, 1) if ins[s].param is not None]
    shape = tuple(eqn.outvars[0].aval.shape)
    if len(weights) == 1 and lc:
        w = weights[0]
        x, out = _weight(g, ins[1 - w], ins[w], sides[1 - w], sides[w])
        return [_flow(shape, _result(out, x, *sides) if w == 0 else _result(x, out, *sides))]
    a, b = (g.activate(f) for f in ins)
    return _activations(g, a, b, sides, shape)


def _flow(shape: tuple[int, ...], codes: np.ndarray, why: int = 0) -> Flow:
    return Flow(shape, codes, tuple(n == 1 for n in shape), why)


def _free(rank: int, side: tuple[Sequence[int], Sequence[int]]) -> list[int]:
    return [d for d in range(rank) if d not in side[0] and d not in side[1]]


def _result(a: np.ndarray, b: np.ndarray, left: Any, right: Any) -> np.ndarray:
    """Codes of a product whose operands hand on ``a`` and ``b`` (only one of which is not none)."""
    fa, fb = _free(a.ndim, left), _free(b.ndim, right)
    batch = [max(a.shape[i], b.shape[j]) for i, j in zip(left[0], right[0], strict=True)]
    shape_a = [a.shape[i] for i in left[0]] + [a.shape[i] for i in fa] + [1] * len(fb)
    shape_b = [b.shape[i] for i in right[0]] + [1] * len(fa) + [b.shape[i] for i in fb]
    a = layout.first(a, left[1]).transpose([*left[0], *fa, *left[1]]).reshape(shape_a)
    b = layout.first(b, right[1]).transpose([*right[0], *fb, *right[1]]).reshape(shape_b)
    assert len(batch) == len(left[0])
    return a if a.any() else b


def _weight(g: Gauge, x: Flow, w: Flow, own: Any, other: Any) -> tuple[np.ndarray, np.ndarray]:
    """A product of an activation and a weight: what each hands on to the result."""
    batch, contract = own
    free = _free(len(x.shape), own)
    rank = len(w.shape)
    codes = g.ties.resolve(x.codes)
    if layout.varying(codes, free) and layout.varying(codes, contract):
        codes = g.tie(codes, free)
    passing = layout.varying(codes, free)
    inner = layout.none(rank)
    if not passing and codes.any():
        g.separate_dims(codes, batch)
        shape = [1] * rank
        for mine, its in zip((*batch, *contract), (*other[0], *other[1]), strict=True):
            shape[its] = codes.shape[mine]
        order = sorted((*batch, *contract), key=lambda d: (*other[0], *other[1])[(*batch, *contract).index(d)])
        inner = codes.transpose([*order, *free]).reshape(shape)
        inner = inner if g.moves else -inner
    if passing:
        outer = layout.none(rank)
    else:
        kept = [d for d in range(rank) if d not in other[1] and not w.same[d] and d not in gathered(w)]
        outer = g.ties.fresh(tuple(n if d in kept else 1 for d, n in enumerate(w.shape)))
        outer = layout.none(rank) if g.moves and outer.size == 1 else outer  # one channel has no order
        g.separate_dims(outer, other[0])
    placed = g.demand(w, (inner, outer))
    if placed is not None:
        g.note_site(x, w, placed[0], placed[1])
    return (codes if passing else layout.none(len(x.shape))), outer


def gathered(w: Flow) -> list[int]:
    """Dimensions along which matrices of a stack are picked by data."""
    place = w.param.place if w.param is not None else None
    if place is None:
        return []
    return [d for d, dim in enumerate(place.dims) if any(stride == 0 for _, stride, _ in dim)]


def _activations(g: Gauge, a: Flow, b: Flow, sides: Any, shape: tuple[int, ...]) -> list[Flow] | None:
    """A product of two values of which neither is a weight."""
    parts = []
    for flow, side in zip((a, b), sides, strict=True):
        codes = g.ties.resolve(flow.codes)
        free = _free(codes.ndim, side)
        if layout.varying(codes, side[1]):
            codes = g.tie(codes, free)
        g.separate_dims(codes, side[0])
        parts.append(codes)
    ca, cb = parts
    inside = [layout.varying(c, side[1]) for c, side in zip(parts, sides, strict=True)]
    if any(inside):
        left, right = (_inner(c, side) for c, side in zip(parts, sides, strict=True))
        if all(inside):
            g.ties.equal(left, right if g.moves else -right, g.reason)
            return [plain(shape, why=g.reason)]
        at = inside.index(True)
        flow, side = ((a, b)[1 - at]), sides[1 - at]
        if not (g.moves and all(flow.same[d] for d in side[1])):
            g.ties.fix(parts[at], g.reason)
        elif g.turns:
            g.ones.append((parts[at], g.reason))
        parts[at] = layout.none(parts[at].ndim)
        ca, cb = parts
    none_a, none_b = layout.none(ca.ndim), layout.none(cb.ndim)
    if ca.any() and cb.any():
        if g.moves:
            return None
        ra, rb = _result(ca, none_b, *sides), _result(none_a, cb, *sides)
        return [_flow(shape, g.times(ra, rb))]
    codes = _result(ca, cb, *sides)
    return [_flow(shape, codes, 0 if codes.any() else next((f.why for f in (a, b) if f.why), g.reason))]


def _inner(codes: np.ndarray, side: Any) -> np.ndarray:
    free = _free(codes.ndim, side)
    codes = layout.first(codes, free).transpose([*side[0], *side[1], *free])
    return codes.reshape(codes.shape[: codes.ndim - len(free)])


@rule("conv_general_dilated")
def _conv(g: Gauge, eqn: Any, ins: list[Flow]) -> list[Flow] | None:
    x, w, p = ins[0], ins[1], eqn.params
    dn, groups = p["dimension_numbers"], p["feature_group_count"]
    if w.param is None or x.param is not None or p["batch_group_count"] != 1:
        return None
    channel = dn.lhs_spec[1]
    out_dim, in_dim = dn.rhs_spec[:2]
    rank = len(w.shape)
    codes = g.tie(g.ties.resolve(x.codes), [d for d in range(len(x.shape)) if d != channel]).ravel()
    n_out, n_in = w.shape[out_dim], w.shape[in_dim]
    inner, outer = layout.none(rank), g.ties.fresh(_along(rank, {out_dim: n_out}))
    if codes.any():
        if groups == 1 or len(codes) == 1:
            inner = codes.reshape(_along(rank, {in_dim: len(codes)}))
        else:
            group = np.arange(n_out) // (n_out // groups)
            grid = codes[group[:, None] * n_in + np.arange(n_in)[None, :]]
            inner = (grid if out_dim < in_dim else grid.T).reshape(_along(rank, {out_dim: n_out, in_dim: n_in}))
            g.separate(codes, np.arange(len(codes)) // n_in)
        inner = inner if g.moves else -inner
    if groups > 1:
        g.separate(outer.ravel(), np.arange(n_out) // (n_out // groups))
    placed = g.demand(w, (inner, outer))
    if placed is not None:
        g.note_site(x, w, placed[0], placed[1])
    shape = tuple(eqn.outvars[0].aval.shape)
    return [_flow(shape, outer.reshape(_along(len(shape), {dn.out_spec[1]: n_out})))]


def _along(rank: int, sizes: dict[int, int]) -> tuple[int, ...]:
    return tuple(sizes.get(d, 1) for d in range(rank))


@rule("ragged_dot_general")
def _ragged(g: Gauge, eqn: Any, ins: list[Flow]) -> list[Flow] | None:
    x, w, sizes = ins
    dn = eqn.params["ragged_dot_dimension_numbers"]
    (lc, rc), (lb, rb) = dn.dot_dimension_numbers
    groups = list(dn.rhs_group_dimensions)
    if w.param is None or x.param is not None or lb or rb or len(groups) != 1 or sizes.param is not None:
        return None
    rank = len(w.shape)
    codes = g.tie(g.ties.resolve(x.codes), _free(len(x.shape), ((), lc)))
    shape = [1] * rank
    for mine, its in zip(lc, rc, strict=True):
        shape[its] = codes.shape[mine]
    order = sorted(lc, key=lambda d: rc[list(lc).index(d)])
    inner = codes.transpose([*order, *(d for d in range(codes.ndim) if d not in lc)]).reshape(shape)
    kept = [d for d in range(rank) if d not in rc and d not in groups]
    outer = g.ties.fresh(tuple(n if d in kept else 1 for d, n in enumerate(w.shape)))
    placed = g.demand(w, (inner if g.moves else -inner, outer))
    if placed is not None:
        g.note_site(x, w, placed[0], placed[1])
    out = tuple(eqn.outvars[0].aval.shape)
    free = len(x.shape) - len(lc)
    return [_flow(out, outer.reshape([1] * free + [w.shape[d] for d in kept]))]

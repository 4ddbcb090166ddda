"""How factors and orders pass through elementwise equations and reductions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from qjax.analysis import layout
from qjax.analysis.flows import Flow, plain
from qjax.analysis.gauge import Gauge, rule
from qjax.analysis.gauge_moves import same_after
from qjax.analysis.gauge_turns import keep, raised, together, turned
from qjax.composites.constants import ELEMENTWISE

_SUMS = ("add", "add_any", "sub")
_ORDERS = ("max", "min")
_COMPARES = ("gt", "ge", "lt", "le", "eq", "ne")
_MORE = ("sin", "cos", "tan", "asin", "acos", "atan", "atan2", "sinh", "cosh", "cbrt", "erf_inv", "lgamma", "digamma")
_MORE += (
    "nextafter",
    "round",
    "acosh",
    "asinh",
    "atanh",
    "real",
    "imag",
    "complex",
    "conj",
    "shift_left",
    "population_count",
    "clz",
)


@rule(*(set(ELEMENTWISE) - {"convert_element_type", "copy", "copy_p", "stop_gradient", "reduce_precision"}), *_MORE)
def _elementwise(g: Gauge, eqn: Any, ins: list[Flow]) -> list[Flow] | None:
    shape = tuple(eqn.outvars[0].aval.shape)
    if any(f.shape and len(f.shape) != len(shape) for f in ins):
        return None
    same = same_after(eqn, ins, shape)
    if g.turns:
        return turned(g, eqn, ins, shape, same)
    codes = _ordered(g, ins, shape) if g.moves else _scaled(g, eqn, ins)
    if codes is None:
        return None
    why = 0
    if not codes.any() or not g.ties.resolve(codes).any():
        why = next((w for f in ins if (w := _why(g, f))), 0)
    if not g.moves and eqn.primitive.name not in _LINEAR and eqn.primitive.name not in _FACTORS:
        why = why or g.reason
    return [Flow(shape, codes, same, why)]


def _raised(g: Gauge, flow: Flow, shape: tuple[int, ...]) -> Flow:
    """An operand as an array of the result's shape, with unknowns of its own if it is a parameter."""
    return raised(g.activate(flow), shape)


def _why(g: Gauge, flow: Flow) -> int:
    """Why an operand carries nothing; 0 for constants and what is free."""
    fixed = g.ties.why(flow.codes)
    if fixed:
        return fixed
    return flow.why if g.reasons[flow.why].kind != "argument" else 0


# ------------------------------------------------------------------------------------------------- factors
_LINEAR = {"neg", "abs", "mesh_cast", "name", "pbroadcast", "pcast", "pvary", "reshard", "sharding_constraint"}
_LINEAR |= {"real", "imag", *_SUMS, *_ORDERS, "select_n"}
_FACTORS = {"mul", "div"}


def _scaled(g: Gauge, eqn: Any, ins: list[Flow]) -> np.ndarray | None:
    """Codes of an elementwise result, where every channel is multiplied by a positive factor; None: fix them."""
    name, p = eqn.primitive.name, eqn.params
    shape = tuple(eqn.outvars[0].aval.shape)
    none = layout.none(len(shape))
    if name in _FACTORS:
        a, b = (_raised(g, f, shape) for f in ins)
        order = (a, b) if ins[0].param is not None or ins[1].param is None else (b, a)
        if name == "mul":
            return g.times(order[0].codes, order[1].codes)
        return g.times(a.codes, -b.codes) if order[0] is a else g.times(-b.codes, a.codes)
    if name == "select_n":
        if ins[0].codes.any():
            g.ties.fix(ins[0].codes, g.reason)
        return _sum(g, ins[1:], shape)
    if name in _SUMS or name in _ORDERS:
        return _sum(g, ins, shape)
    if name in _LINEAR:
        return g.activate(ins[0]).codes
    if name == "integer_pow" and p["y"] in (1, -1):
        return g.activate(ins[0]).codes * p["y"]
    if name in _COMPARES:  # which of two is larger does not change with a factor common to both
        _sum(g, ins, shape)
        return none
    if name in ("sign", "is_finite") and ins[0].param is None:
        return none
    return None


def _sum(g: Gauge, ins: Sequence[Flow], shape: tuple[int, ...]) -> np.ndarray:
    """What is added, compared or chosen among carries the same; zeros and infinities stay what they are."""
    return g.joined([_raised(g, f, shape) for f in ins]).codes


# ------------------------------------------------------------------------------------------------- orders
def _ordered(g: Gauge, ins: list[Flow], shape: tuple[int, ...]) -> np.ndarray | None:
    """Codes of an elementwise result, where channels are permuted: all operands in the same order."""
    flows = [_raised(g, f, shape) for f in ins]
    carrying = sorted((f for f in flows if f.codes.any()), key=lambda f: -f.codes.size)
    if not carrying:
        return layout.none(len(shape))
    codes = together(g, carrying)
    for flow in flows:
        if not flow.codes.any():
            keep(g, codes, flow)
    return codes


# ------------------------------------------------------------------------------------------------- reductions
@rule("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin")
def _reduce(g: Gauge, eqn: Any, ins: list[Flow]) -> list[Flow] | None:
    flow, axes, name = g.activate(ins[0]), eqn.params["axes"], eqn.primitive.name
    codes = flow.codes
    varying = layout.varying(codes, axes)
    index = name in ("argmax", "argmin")
    if g.turns and codes.any() and name != "reduce_sum":
        return None
    if varying and (index or not g.moves and name == "reduce_prod"):
        return None
    if not g.moves and name in ("reduce_prod",) and codes.any():
        return None
    keep = [d for d in range(len(flow.shape)) if d not in axes]
    if varying and g.moves:
        g.separate_dims(codes, keep)
        if g.turns and not flow.square:
            g.ones.append((codes, g.reason))
        codes = layout.none(len(keep))
    else:
        codes = g.tie(codes, axes)
        codes = codes.reshape([codes.shape[d] for d in keep])
    if index and not g.moves:
        codes = layout.none(len(keep))
    shape = tuple(eqn.outvars[0].aval.shape)
    why = flow.why or (g.reason if varying else 0)
    return [Flow(shape, codes, tuple(flow.same[d] for d in keep), why, square=flow.square and not varying)]


@rule("cumsum", "cummax", "cummin", "cumprod", "cumlogsumexp")
def _cumulative(g: Gauge, eqn: Any, ins: list[Flow]) -> list[Flow] | None:
    flow, axis = g.activate(ins[0]), eqn.params["axis"]
    name = eqn.primitive.name
    if g.turns and name != "cumsum" and flow.codes.any():
        return None
    if layout.varying(flow.codes, (axis,)) or flow.codes.any() and not g.moves and name in ("cumprod", "cumlogsumexp"):
        return None
    return [Flow(flow.shape, flow.codes, tuple(s and d != axis for d, s in enumerate(flow.same)), flow.why)]


@rule("top_k", "approx_top_k")
def _top_k(g: Gauge, eqn: Any, ins: list[Flow]) -> list[Flow] | None:
    flow = g.activate(ins[0])
    if layout.varying(flow.codes, (len(flow.shape) - 1,)) or g.turns and flow.codes.any():
        return None
    shapes = [tuple(v.aval.shape) for v in eqn.outvars]
    codes = flow.codes
    outs = [Flow(shapes[0], codes, tuple(n == 1 for n in shapes[0]), flow.why)]
    return outs + [Flow(s, codes if g.moves else layout.none(len(s)), tuple(n == 1 for n in s)) for s in shapes[1:]]


@rule("reduce_window_sum", "reduce_window_max", "reduce_window_min")
def _window(g: Gauge, eqn: Any, ins: list[Flow]) -> list[Flow] | None:
    flow, p = g.activate(ins[0]), eqn.params
    shape = tuple(eqn.outvars[0].aval.shape)
    looked = [d for d, n in enumerate(p["window_dimensions"]) if n > 1 or shape[d] != flow.shape[d]]
    if layout.varying(flow.codes, looked) or g.turns and flow.codes.any() and eqn.primitive.name[-3:] != "sum":
        return None
    return [Flow(shape, flow.codes, tuple(n == 1 for n in shape), flow.why)]


@rule("clamp")
def _clamp(g: Gauge, eqn: Any, ins: list[Flow]) -> list[Flow] | None:
    low, x, high = ins
    shape = tuple(eqn.outvars[0].aval.shape)
    if g.turns:
        return None
    if g.moves:
        codes = _ordered(g, ins, shape)
        return None if codes is None else [Flow(shape, codes, same_after(eqn, ins, shape), x.why)]
    bounds = {low.number, high.number} <= {0.0, math.inf, -math.inf}
    flow = g.activate(x)
    if flow.codes.any() and not bounds:
        return None
    return [plain(shape, flow.same, flow.why or g.reason) if not bounds else Flow(shape, flow.codes, flow.same)]

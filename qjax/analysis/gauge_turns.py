"""How orders and rotations pass through elementwise equations: what all channels have to undergo alike.

An orthogonal matrix mixes channels, so that it only passes through what is linear and the same for all of them. Two
things more are seen, because norms are made of them. The squares of all channels, summed up, do not change. And where
all channels are summed up as they are, or the same number is added to all (the mean of a LayerNorm), a rotation passes
if it leaves the vector of ones where it is; the group says so (``keeps_ones``). A scale per channel does not let
rotations through: it is noted as to be folded into what reads it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from qjax.analysis import layout
from qjax.analysis.flows import Flow, Place, plain
from qjax.analysis.gauge import Gauge
from qjax.analysis.gauge_moves import backward


def raised(flow: Flow, shape: tuple[int, ...]) -> Flow:
    """An operand as an array of the result's shape."""
    if flow.shape == shape:
        return flow
    codes = flow.codes if flow.shape else flow.codes.reshape((1,) * len(shape))
    same = tuple(s or n != m for s, n, m in zip(flow.same, flow.shape, shape, strict=True)) if flow.shape else None
    return dataclasses.replace(flow, shape=shape, codes=codes, same=(True,) * len(shape) if same is None else same)


def together(g: Gauge, carrying: Sequence[Flow]) -> np.ndarray:
    """The common codes of operands that change together."""
    ordered = sorted(carrying, key=lambda f: -f.codes.size)
    codes = ordered[0].codes
    for other in ordered[1:]:
        missing = [d for d, n in enumerate(other.codes.shape) if n < codes.shape[d]]
        if any(other.same[d] for d in missing):
            keep(g, codes, other)
            g.ties.fix(other.codes, g.reason)
        else:
            g.ties.equal(codes, other.codes, g.reason)
            codes = other.codes if missing else codes
    return codes


def keep(g: Gauge, codes: np.ndarray, other: Flow) -> None:
    """An operand that does not change: channels only mix where all of its elements are equal."""
    support = [d for d, n in enumerate(codes.shape) if n > 1]
    dims = [d for d in support if not other.same[d]]
    if dims == support and dims:
        g.ties.fix(codes, other.why or g.reason)
    else:
        g.separate_dims(codes, dims)


def turned(g: Gauge, eqn: Any, ins: list[Flow], shape: tuple[int, ...], same: tuple[bool, ...]) -> list[Flow] | None:
    """An elementwise equation on values of which some may be rotated; None: it lets none through."""
    name, p = eqn.primitive.name, eqn.params
    if name == "square" or name == "integer_pow" and p["y"] == 2 or name == "mul" and ins[0] is ins[1]:
        flow = ins[0]
        if flow.square or flow.scale is not None or flow.param is not None:
            return None
        return [Flow(shape, flow.codes, same, flow.why, square=bool(flow.codes.any()))]
    if name in ("mul", "div"):
        return _multiplied(g, name, ins, shape, same)
    if name in ("add", "add_any", "sub", "select_n"):
        return _added(g, ins[name == "select_n" :], ins[: name == "select_n"], shape, same)
    if name in ("neg", "mesh_cast", "name", "pbroadcast", "pcast", "pvary", "reshard", "sharding_constraint", "real"):
        return [dataclasses.replace(raised(g.activate(ins[0]), shape), number=None, same=same)]
    if any(f.codes.any() for f in ins):
        return None
    return [plain(shape, same, next((f.why for f in ins if f.why), 0) or g.reason)]


def _added(
    g: Gauge, ins: list[Flow], chooses: list[Flow], shape: tuple[int, ...], same: tuple[bool, ...]
) -> list[Flow] | None:
    if any(f.codes.any() for f in chooses):
        return None
    if not any(f.codes.any() or f.param is not None for f in ins):
        return [plain(shape, same, next((f.why for f in ins if f.why), 0))]
    if not any(f.codes.any() for f in ins):  # a parameter beside data that carries nothing
        return [plain(shape, same, next((f.why for f in ins if f.why), 0) or g.reason)]
    flows = [raised(g.activate(f), shape) for f in ins]
    codes = together(g, [f for f in flows if f.codes.any()])
    for flow in flows:
        if not flow.codes.any() and flow.number != 0.0:
            keep(g, codes, flow)
            g.ones.append((codes, g.reason))
    for flow in chooses:
        keep(g, codes, raised(flow, shape))
    return [Flow(shape, codes, same, next((f.why for f in flows if f.why), 0))]


def _multiplied(
    g: Gauge, name: str, ins: list[Flow], shape: tuple[int, ...], same: tuple[bool, ...]
) -> list[Flow] | None:
    pairs = [(f, raised(f, shape)) for f in ins]
    if name == "mul" and not pairs[0][1].codes.any():
        pairs.reverse()
    (_, a), (given, b) = pairs
    if b.codes.any():
        return None
    if a.codes.any():
        scale = given if given.param is not None else b.scale
        if given.param is not None and all(b.same[d] for d, n in enumerate(a.codes.shape) if n > 1):
            scale = None
        if scale is not None:
            place = where(g, scale)
            if place is None or name == "div":
                return None
            g.folds.append((a.codes, *place))
        if given.param is None:
            keep(g, a.codes, b)
        return [Flow(shape, a.codes, same, a.why, square=a.square)]
    params = [f for f in ins if f.param is not None]
    scales = [f.scale for f in (a, b) if f.scale is not None]
    why = next((f.why for f in ins if f.why), 0)
    if name == "mul" and len(params) + len(scales) == 1:
        scale = params[0] if params else scales[0]
        rest = [f for f in (a, b) if f.param is None]
        flat = tuple(n == 1 or all(f.same[d] for f in rest) for d, n in enumerate(shape))
        return [Flow(shape, layout.none(len(shape)), flat, why, scale=scale)]
    if scales:
        return None
    return [plain(shape, same, why)]


def where(g: Gauge, flow: Flow, offset: float = 0.0) -> tuple[Place, float] | None:
    """The leaf slice behind a scale, and the number that is added to it."""
    if flow.param is None:
        return None
    if flow.param.place is not None:
        return flow.param.place, offset
    if flow.param.eqn is None:
        return None
    back = backward(g, flow, (layout.none(len(flow.shape)),), offset)
    return where(g, back[0][0], back[0][2]) if back is not None and len(back) == 1 else None

"""How factors pass through equations that move elements: views, joins, slices, lookups, updates."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from qjax.analysis import layout
from qjax.analysis.flows import Flow, plain
from qjax.analysis.gauge import WIDE, Gauge, rule
from qjax.composites.constants import ELEMENTWISE

SAME = frozenset(
    {
        "copy",
        "copy_p",
        "device_put",
        "mesh_cast",
        "name",
        "pbroadcast",
        "pcast",
        "pvary",
        "reduce_precision",
        "reshard",
        "sharding_constraint",
        "stop_gradient",
    }
)
"""Primitives whose result is their operand."""


def moved(eqn: Any, codes: np.ndarray, same: Sequence[bool]) -> tuple[np.ndarray, tuple[bool, ...]] | None:
    """Codes and repetitions of a value after an equation that only moves its dimensions; None for another one."""
    name, p = eqn.primitive.name, eqn.params
    source, target = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if name in SAME or name == "convert_element_type":
        return codes, tuple(same)
    if name == "transpose":
        order = p["permutation"]
        return codes.transpose(order), tuple(same[d] for d in order)
    if name == "reshape":
        if p.get("dimensions") is not None:
            return None
        return layout.reshape(codes, source, target), layout.reshape_same(same, source, target)
    if name == "squeeze":
        gone = {d % len(source) for d in p["dimensions"]}
        keep = [d for d in range(len(source)) if d not in gone]
        return codes.reshape([codes.shape[d] for d in keep]), tuple(same[d] for d in keep)
    if name == "expand_dims":
        new = {d % len(target) for d in p["dimensions"]}
        it, its = iter(codes.shape), iter(same)
        shape = [1 if d in new else next(it) for d in range(len(target))]
        return codes.reshape(shape), tuple(d in new or next(its) for d in range(len(target)))
    if name == "broadcast_in_dim":
        to = p["broadcast_dimensions"]
        flags = [True] * len(target)
        for d, t in enumerate(to):
            flags[t] = same[d] or source[d] != target[t]
        return layout.broadcast(codes, to, len(target)), tuple(flags)
    return None


def same_after(eqn: Any, ins: Sequence[Flow], shape: tuple[int, ...]) -> tuple[bool, ...]:
    """Along which dimensions the elements of a result without unknowns repeat."""
    name = eqn.primitive.name
    if ins and len(eqn.outvars) == 1:
        found = moved(eqn, layout.none(len(ins[0].shape)), ins[0].same)
        if found is not None:
            return found[1]
        if name in ELEMENTWISE and all(not f.shape or len(f.shape) == len(shape) for f in ins):
            return tuple(all(not f.shape or f.same[d] or f.shape[d] != n for f in ins) for d, n in enumerate(shape))
    if name == "iota":
        return tuple(d != eqn.params["dimension"] or n == 1 for d, n in enumerate(shape))
    return tuple(n == 1 for n in shape)


Wanted = tuple[Flow, tuple[np.ndarray, ...], float]


def backward(g: Gauge, flow: Flow, terms: Sequence[np.ndarray], offset: float) -> list[Wanted] | None:
    """What a computed parameter value being multiplied by codes wants of what it is computed from.

    Views are undone, sums want it of each summand, and a number added is remembered as an offset (``1 + w``).
    """
    assert flow.param is not None
    eqn, ins = flow.param.eqn, flow.param.ins
    name, p = eqn.primitive.name, eqn.params
    if name in SAME or name == "convert_element_type":
        return [(ins[0], tuple(terms), offset)]
    if name in ("reshape", "squeeze", "expand_dims") and p.get("dimensions" if name == "reshape" else "") is None:
        return [(ins[0], tuple(layout.reshape(t, flow.shape, ins[0].shape) for t in terms), offset)]
    if name == "transpose":
        inverse = np.argsort(p["permutation"])
        return [(ins[0], tuple(t.transpose(inverse) for t in terms), offset)]
    if name == "broadcast_in_dim":
        to, source = p["broadcast_dimensions"], ins[0].shape
        repeated = [d for d in range(len(flow.shape)) if d not in to or source[to.index(d)] != flow.shape[d]]
        back = []
        for codes in terms:
            codes = g.tie(codes, repeated)
            back.append(codes.reshape([codes.shape[d] for d in to]))
        return [(ins[0], tuple(back), offset)]
    if name == "dynamic_slice":  # rows of a table at positions that are no data
        cut = [d for d, (n, size) in enumerate(zip(ins[0].shape, p["slice_sizes"], strict=True)) if n != size]
        return [(ins[0], tuple(g.tie(t, cut) for t in terms), offset)]
    if name == "gather" and ins[0].param is not None and ins[1].param is None:
        dn, sizes = p["dimension_numbers"], p["slice_sizes"]
        batch = [d for d in range(len(flow.shape)) if d not in dn.offset_dims]
        gone = (*dn.collapsed_slice_dims, *dn.operand_batching_dims)
        kept = [d for d in range(len(ins[0].shape)) if d not in gone]
        picked = [o for d, o in zip(kept, dn.offset_dims, strict=True) if sizes[d] != ins[0].shape[d]]
        back = []
        for codes in terms:
            codes = g.tie(codes, [*batch, *picked])
            shape = [1] * len(ins[0].shape)
            for d, o in zip(kept, dn.offset_dims, strict=True):
                shape[d] = codes.shape[o]
            back.append(codes.reshape(shape))
        return [(ins[0], tuple(back), offset)]
    if name not in ELEMENTWISE or any(f.shape and len(f.shape) != len(flow.shape) for f in ins):
        return None
    params = [f for f in ins if f.param is not None]
    others = [f for f in ins if f.param is None]
    if any(f.shape != flow.shape for f in params):
        return None
    if g.moves and not g.turns:  # the same order on all operands, and what is constant has none
        fits = all(f.same[d] for f in others if f.shape for t in terms for d in range(t.ndim) if t.shape[d] > 1)
        return [(f, tuple(terms), 0.0) for f in params] if fits else None
    numbers = [f.number for f in others]
    if name in ("add", "add_any", "sub") and len(params) == 2 and not offset:
        return [(f, tuple(terms), 0.0) for f in params]
    if len(params) != 1:
        return None
    if name in ("add", "add_any") and numbers[0] is not None:
        return [(params[0], tuple(terms), offset + numbers[0])]
    if name == "sub" and numbers[0] is not None and ins[0] is params[0]:
        return [(params[0], tuple(terms), offset - numbers[0])]
    if name == "neg":
        return [(params[0], tuple(terms), -offset)]
    if name in ("mul", "div") and ins[0 if name == "div" else ins.index(params[0])] is params[0]:
        if not offset:
            return [(params[0], tuple(terms), 0.0)]
        if numbers[0]:
            return [(params[0], tuple(terms), offset * numbers[0] if name == "div" else offset / numbers[0])]
    return None


@rule(*SAME, "transpose", "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "convert_element_type")
def _move(g: Gauge, eqn: Any, ins: list[Flow]) -> list[Flow] | None:
    flow = ins[0]
    if eqn.primitive.name == "convert_element_type" and (g.turns or not g.moves):
        if np.dtype(eqn.params["new_dtype"]).kind in "biu" and flow.codes.any():
            return None
    found = moved(eqn, flow.codes, flow.same)
    if found is None:
        return None
    shape = tuple(eqn.outvars[0].aval.shape)
    return [Flow(shape, found[0], found[1], flow.why, flow.number, square=flow.square, scale=flow.scale)]


@rule("optimization_barrier")
def _barrier(g: Gauge, eqn: Any, ins: list[Flow]) -> list[Flow] | None:
    return list(ins)


def _taken(g: Gauge, flow: Flow, d: int, start: int, stop: int, step: int) -> Flow:
    """A part of a dimension."""
    codes, n = flow.codes, flow.shape[d]
    if codes.shape[d] > 1:
        inside = np.zeros(n, np.int64)
        inside[start:stop:step] = 1
        g.separate(codes, inside.reshape([n if i == d else 1 for i in range(codes.ndim)]))
        codes = codes[(slice(None),) * d + (slice(start, stop, step),)]
    size = len(range(start, stop, step))
    shape = tuple(size if i == d else m for i, m in enumerate(flow.shape))
    same = tuple(size == 1 or s if i == d else s for i, s in enumerate(flow.same))
    return dataclasses.replace(flow, shape=shape, codes=codes, same=same)


@rule("slice")
def _slice(g: Gauge, eqn: Any, ins: list[Flow]) -> list[Flow] | None:
    flow, p = ins[0], eqn.params
    steps = p["strides"] or (1,) * len(flow.shape)
    for d, (start, stop, step) in enumerate(zip(p["start_indices"], p["limit_indices"], steps, strict=True)):
        if (start, stop, step) != (0, flow.shape[d], 1):
            flow = _taken(g, flow, d, start, stop, step)
    return [dataclasses.replace(flow, codes=layout.tidy(flow.codes))]


@rule("split")
def _split(g: Gauge, eqn: Any, ins: list[Flow]) -> list[Flow] | None:
    outs, at = [], 0
    for size in eqn.params["sizes"]:
        outs.append(_taken(g, ins[0], eqn.params["axis"], at, at + size, 1))
        at += size
    return outs


@rule("rev")
def _rev(g: Gauge, eqn: Any, ins: list[Flow]) -> list[Flow] | None:
    flow = ins[0]
    codes = np.flip(flow.codes, tuple(eqn.params["dimensions"]))
    return [dataclasses.replace(flow, codes=codes)]


@rule("stack", "concatenate")
def _concatenate(g: Gauge, eqn: Any, ins: list[Flow]) -> list[Flow] | None:
    stack = eqn.primitive.name == "stack"
    d = eqn.params["axis" if stack else "dimension"]
    flows = [_with_unit(g.activate(f), d) if stack else g.activate(f) for f in ins]
    shape = tuple(eqn.outvars[0].aval.shape)
    rest = tuple(all(f.same[i] for f in flows) and i != d for i in range(len(shape)))
    along = any(f.codes.shape[d] > 1 for f in flows) or all(f.shape[d] == 1 for f in flows)
    if not along:
        flow = g.joined(flows)
        return [Flow(shape, flow.codes, rest, flow.why)]
    if not any(f.codes.any() for f in flows):
        return [plain(shape, rest, next((f.why for f in flows if f.why), 0))]
    common = np.broadcast_shapes(*(tuple(1 if i == d else n for i, n in enumerate(f.codes.shape)) for f in flows))
    parts = [np.broadcast_to(f.codes, (*common[:d], f.shape[d], *common[d + 1 :])) for f in flows]
    codes = np.concatenate(parts, axis=d)
    keys = np.repeat(np.arange(len(flows)), [f.shape[d] for f in flows])
    g.separate(codes, keys.reshape([-1 if i == d else 1 for i in range(codes.ndim)]))
    return [Flow(shape, codes, rest, next((f.why for f in flows if f.why), 0))]


def _with_unit(flow: Flow, d: int) -> Flow:
    """A dimension of size one put in."""
    codes = np.expand_dims(flow.codes, d)
    shape, same = (*flow.shape[:d], 1, *flow.shape[d:]), (*flow.same[:d], True, *flow.same[d:])
    return dataclasses.replace(flow, shape=shape, codes=codes, same=same)


@rule("unstack")
def _unstack(g: Gauge, eqn: Any, ins: list[Flow]) -> list[Flow] | None:
    flow, d = g.activate(ins[0]), eqn.params["axis"] % len(ins[0].shape)
    outs = []
    for i in range(flow.shape[d]):
        part = _taken(g, flow, d, i, i + 1, 1)
        shape, same = (*flow.shape[:d], *flow.shape[d + 1 :]), (*flow.same[:d], *flow.same[d + 1 :])
        outs.append(dataclasses.replace(part, shape=shape, codes=layout.tidy(part.codes.squeeze(d)), same=same))
    return outs


@rule("tile")
def _tile(g: Gauge, eqn: Any, ins: list[Flow]) -> list[Flow] | None:
    flow, reps = g.activate(ins[0]), eqn.params["reps"]
    codes = np.tile(flow.codes, [r if n > 1 else 1 for n, r in zip(flow.codes.shape, reps, strict=True)])
    return [dataclasses.replace(flow, shape=tuple(eqn.outvars[0].aval.shape), codes=codes)]


@rule("pad")
def _pad(g: Gauge, eqn: Any, ins: list[Flow]) -> list[Flow] | None:
    flow, fill = g.activate(ins[0]), ins[1]
    config = [tuple(int(n) for n in c) for c in eqn.params["padding_config"]]
    padded = [d for d, c in enumerate(config) if c != (0, 0, 0)]
    codes = flow.codes
    if codes.any():
        if (g.turns or not g.moves) and fill.number != 0.0 or fill.param is not None:
            return None
        for d in padded:
            low, high, inside = config[d]
            if codes.shape[d] > 1:
                if inside or low < 0 or high < 0:
                    return None
                codes = np.pad(codes, [(low, high) if i == d else (0, 0) for i in range(codes.ndim)])
    shape = tuple(eqn.outvars[0].aval.shape)
    return [Flow(shape, codes, tuple(s and d not in padded for d, s in enumerate(flow.same)), flow.why)]


@rule("dynamic_slice")
def _dynamic_slice(g: Gauge, eqn: Any, ins: list[Flow]) -> list[Flow] | None:
    flow, sizes = ins[0], eqn.params["slice_sizes"]
    cut = [d for d, (n, size) in enumerate(zip(flow.shape, sizes, strict=True)) if n != size]
    if flow.param is not None:
        flow = _looked_up(g, eqn, flow, cut)
    elif layout.varying(flow.codes, cut):
        return None
    same = tuple(s or n == 1 for s, n in zip(flow.same, sizes, strict=True))
    return [Flow(tuple(sizes), flow.codes, same, flow.why)]


def _looked_up(g: Gauge, eqn: Any, flow: Flow, picked: Sequence[int]) -> Flow:
    """A table of which rows are read at run-time positions: all of its rows carry the same."""
    shape = tuple(1 if d in picked or s else n for d, (n, s) in enumerate(zip(flow.shape, flow.same, strict=True)))
    if math.prod(shape) > WIDE:
        g.hold(flow)
        return plain(flow.shape, flow.same, g.reason)
    codes = g.ties.fresh(shape)
    placed = g.demand(flow, (codes,))
    if placed is not None:
        g.note_site(None, flow, None, placed[0])
    return Flow(flow.shape, codes, flow.same)


@rule("dynamic_update_slice")
def _dynamic_update_slice(g: Gauge, eqn: Any, ins: list[Flow]) -> list[Flow] | None:
    into, new = g.activate(ins[0]), g.activate(ins[1])
    cut = [d for d, (n, m) in enumerate(zip(into.shape, new.shape, strict=True)) if n != m]
    if layout.varying(into.codes, cut) or layout.varying(new.codes, cut):
        return None
    out = g.joined([into, dataclasses.replace(new, same=into.same)])
    return [Flow(into.shape, out.codes, tuple(n == 1 for n in into.shape), out.why)]


@rule("gather")
def _gather(g: Gauge, eqn: Any, ins: list[Flow]) -> list[Flow] | None:
    flow, p = ins[0], eqn.params
    dn, sizes, shape = p["dimension_numbers"], p["slice_sizes"], tuple(eqn.outvars[0].aval.shape)
    picked = [d for d, (n, s) in enumerate(zip(flow.shape, sizes, strict=True)) if n != s]
    picked += [d for d in dn.collapsed_slice_dims if d not in picked]
    batching = list(dn.operand_batching_dims)
    if flow.param is not None:
        flow = _looked_up(g, eqn, flow, [*picked, *batching])
    elif layout.varying(flow.codes, [*picked, *batching]):
        return None
    kept = [d for d in range(len(flow.shape)) if d not in dn.collapsed_slice_dims and d not in batching]
    out, same = [1] * len(shape), [False] * len(shape)
    for d, o in zip(kept, dn.offset_dims, strict=True):
        out[o] = flow.codes.shape[d] if d not in picked else 1
        same[o] = flow.same[d]
    codes = layout.first(flow.codes, [*picked, *batching]).reshape(out)
    return [Flow(shape, codes, tuple(s or n == 1 for s, n in zip(same, shape, strict=True)), flow.why)]


@rule("scatter", "scatter-add", "scatter_add", "scatter-min", "scatter-max", "scatter_min", "scatter_max")
def _scatter(g: Gauge, eqn: Any, ins: list[Flow]) -> list[Flow] | None:
    into, new = g.activate(ins[0]), g.activate(ins[2])
    if g.turns and eqn.primitive.name not in ("scatter", "scatter-add", "scatter_add"):
        return None
    dn = eqn.params["dimension_numbers"]
    gone = {*dn.inserted_window_dims, *dn.operand_batching_dims}
    kept = [d for d in range(len(into.shape)) if d not in gone]
    window = list(dn.update_window_dims)
    outside = [d for d in range(len(new.shape)) if d not in window]
    whole = [(o, u) for o, u in zip(kept, window, strict=True) if into.shape[o] == new.shape[u]]
    if layout.varying(new.codes, [*outside, *(u for u in window if u not in [w for _, w in whole])]):
        return None
    if layout.varying(into.codes, [d for d in range(len(into.shape)) if d not in [o for o, _ in whole]]):
        return None
    shape = [1] * len(into.shape)
    for o, u in whole:
        shape[o] = new.codes.shape[u]
    update = Flow(into.shape, new.codes.transpose(outside + window).reshape(shape), into.same, new.why, new.number)
    out = g.joined([into, update])
    return [Flow(into.shape, out.codes, tuple(n == 1 for n in into.shape), out.why)]


@rule("sort")
def _sort(g: Gauge, eqn: Any, ins: list[Flow]) -> list[Flow] | None:
    flows = [g.activate(f) for f in ins]
    d = eqn.params["dimension"]
    if any(layout.varying(f.codes, (d,)) for f in flows):
        return None
    if (len(flows) > 1 and g.moves or g.turns) and any(f.codes.any() for f in flows):
        return None
    return [Flow(f.shape, f.codes, tuple(n == 1 for n in f.shape), f.why) for f in flows]


@rule("iota", "random_seed", "random_bits", "random_wrap", "random_unwrap", "random_fold_in", "random_split")
def _made(g: Gauge, eqn: Any, ins: list[Flow]) -> list[Flow] | None:
    if any(f.param is not None or f.codes.any() for f in ins):
        return None
    outs = [tuple(getattr(v.aval, "shape", ())) for v in eqn.outvars]
    return [dataclasses.replace(plain(s, same_after(eqn, ins, s)), data=eqn.primitive.name != "iota") for s in outs]

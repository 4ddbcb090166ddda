"""Which factors (or orders) of channels a program leaves free: one walk over the jaxpr, all layers at once.

Multiply every channel of every value by an unknown factor. Each equation then says how the unknowns of its result
depend on those of its operands: an addition wants them equal, a contraction wants reciprocal ones, an ``exp`` wants
them to be one. A parameter takes any factor: it is stored multiplied by it. What remains free after the walk are the
groups of channels that can be rescaled without changing the function (`qjax.analysis.channels`). The same walk with
"the same permutation" in place of "the same factor" finds what can be reordered, and with "the same rotation" what can
be mixed by an orthogonal matrix.

The walk evaluates the jaxpr like an interpreter, with a `Flow` (codes of `qjax.analysis.ties`, in compact arrays) for
each value; scans over layers are stepped through. Rules per primitive are in ``gauge_moves``, ``gauge_arithmetic``
and ``gauge_products``.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.extend import core as jex

from qjax._compat import consts_of, constvars_and_invars, open_jaxpr, scan_arity, sub_jaxprs
from qjax.analysis import layout
from qjax.analysis.flows import (
    Entry,
    Flow,
    Param,
    Place,
    Reason,
    by_support,
    captured,
    literal,
    plain,
    same_entry,
    step_of,
)
from qjax.analysis.naming import SliceKey
from qjax.analysis.provenance import DYNAMIC, GATHERED, Ref
from qjax.analysis.reads import Path
from qjax.analysis.sites import OPAQUE, views
from qjax.analysis.ties import Ties

if TYPE_CHECKING:
    from qjax.program import Program

STEPPED = 200_000
"""A loop of more equations than this, all steps counted, is not stepped through."""

WIDE = 1 << 20
"""A parameter with more elements than this that is no weight of a product takes no factors (a table of biases)."""


Rule = Callable[["Gauge", Any, list[Flow]], "list[Flow] | None"]
RULES: dict[str, Rule] = {}
"""Primitive name -> its rule; a rule returns None for what it cannot follow."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for primitives."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


class Gauge:
    """The walk.

    Args:
        program: the trace.
        kind: find what can be multiplied (``"scale"``), permuted (``"permute"``) or rotated (``"rotate"``).

    Attributes:
        ties: the unknowns. reasons: why some are fixed, by number.
        entries: ``(leaf, slice)`` to what reads it.
        inputs, outputs: site name to the codes of its input and output channels, as the leaf slice has them.
        separators: ``(codes, keys)``: a permutation or rotation only mixes channels of equal keys.
        folds: for rotations, ``(codes, place, offset)`` of the parameters that have to be folded away first.
        ones: for rotations, ``(codes, reason)`` where all channels are summed up, or the same is added to all.
    """

    def __init__(self, program: Program, kind: str):
        self.program = program
        self.moves, self.turns = kind != "scale", kind == "rotate"
        self.folds: list[tuple[np.ndarray, Place, float]] = []
        self.ones: list[tuple[np.ndarray, int]] = []
        self.demanded: set[int] = set()
        self.ties = Ties()
        self.reasons = [Reason("free")]
        self.entries: dict[tuple[int, SliceKey], list[Entry]] = {}
        self.frozen: dict[int, int] = {}
        self.inputs: dict[str, np.ndarray] = {}
        self.outputs: dict[str, np.ndarray] = {}
        self.separators: list[tuple[np.ndarray, np.ndarray]] = []
        self.pending: list[tuple[np.ndarray, np.ndarray, np.ndarray, int]] = []
        self.origin: dict[str, int] = {}
        self.here: Path = ()
        self.steps: dict[int, int] = {}
        self.name = ""
        self._reason = 0
        self.views = views(program.jaxpr, list(program.leaf_names), [tuple(a.shape) for a in program.leaf_avals])
        self.run()

    def run(self) -> None:
        """Walk the program."""
        n_leaves = len(self.program.leaf_names)
        argument = self.add_reason(Reason("argument"))
        args = []
        for i, aval in enumerate(self.program.jaxpr.in_avals):
            shape = tuple(getattr(aval, "shape", ()))
            flow = plain(shape, why=argument)
            if i < n_leaves:
                flow = dataclasses.replace(flow, param=Param(frozenset((i,))), data=False)
            args.append(flow)
        outs = self.body(self.program.jaxpr, args, ())
        self._reason = self.add_reason(Reason("result"))
        for flow in outs:
            self.hold(flow)
        self.finish()

    # ------------------------------------------------------------------------------------------- reasons
    def add_reason(self, reason: Reason) -> int:
        """Number of a new reason."""
        self.reasons.append(reason)
        return len(self.reasons) - 1

    @property
    def reason(self) -> int:
        """Number of the reason that the present equation is."""
        if not self._reason:
            self._reason = self.add_reason(Reason("equation", self.name, self.here, tuple(self.steps.items())))
        return self._reason

    # ------------------------------------------------------------------------------------------- the walk
    def body(self, jaxpr: Any, args: Sequence[Flow], path: Path) -> list[Flow]:
        """Walk a jaxpr on the flows of its arguments."""
        inner = open_jaxpr(jaxpr)
        env: dict[Any, Flow] = {}
        for var, flow in zip(
            constvars_and_invars(jaxpr), [*(captured(c) for c in consts_of(jaxpr)), *args], strict=True
        ):
            env[var] = self.bound(path, var, flow)
        for i, eqn in enumerate(inner.eqns):
            ins = [literal(a) if isinstance(a, jex.Literal) else env[a] for a in eqn.invars]
            self.here, self.name, self._reason = (*path, i), eqn.primitive.name, 0
            outs = self.equation(eqn, ins, self.here)
            for var, out in zip(eqn.outvars, outs, strict=True):
                env[var] = self.bound(path, var, out)
        return [literal(v) if isinstance(v, jex.Literal) else env[v] for v in inner.outvars]

    def bound(self, path: Path, var: Any, flow: Flow) -> Flow:
        """The flow of a variable, which is a view of a leaf if the analysis of sites says so."""
        ref = self.views.get((path, var))
        if ref is None:
            return flow
        same = flow.same if flow.param is not None else tuple(n == 1 for n in flow.shape)
        param = Param(frozenset((ref.leaf,)), self.place(ref))
        return Flow(flow.shape, layout.none(len(flow.shape)), same, param=param, data=False)

    def place(self, ref: Ref) -> Place:
        """The place of a view at the present steps of the loops."""
        shape = self.program.leaf_avals[ref.leaf].shape
        choices = []
        for index in ref.index:
            if index.loop is None:
                positions: Sequence[int] = index.values[:1]
            elif index.loop == DYNAMIC or index.loop not in self.steps:
                positions = sorted(set(index.values))
            else:
                positions = (index.values[self.steps[index.loop]],)
            choices.append([(index.axis, p) for p in positions])
        gone = {index.axis for index in ref.index}
        axes = tuple(a for a in range(len(shape)) if a not in gone)
        keys = tuple(itertools.product(*choices))
        return Place(ref.leaf, keys, axes, tuple(shape[a] for a in axes), ref.dims, ref.ranges)

    def equation(self, eqn: Any, ins: list[Flow], here: Path) -> list[Flow]:
        """The flows of an equation's results."""
        name = eqn.primitive.name
        control = getattr(self, f"do_{name}", None)
        if control is not None:
            return control(eqn, ins, here)
        subs = sub_jaxprs(eqn.params)
        if subs and name not in OPAQUE and name != "shard_map":
            key, body = subs[0]
            if len(constvars_and_invars(body)) == len(consts_of(body)) + len(ins):
                return self.body(body, ins, (*here, key))
            return self.refuse(eqn, ins)
        if not any(f.data for f in ins) and ins and not name.startswith("random"):
            return self.derived(eqn, ins)
        found = RULES.get(name)
        if self.turns and any(f.square and name not in _SQUARES or f.scale and name not in _SCALES for f in ins):
            found = None
        self.demanded.clear()
        outs = found(self, eqn, ins) if found is not None else None
        if outs is None:
            return self.refuse(eqn, ins)
        for flow in ins:  # who reads a parameter and asks nothing of it wants it as it is
            if flow.param is not None and id(flow) not in self.demanded and not any(flow is out for out in outs):
                self.hold(flow)
        return outs

    def refuse(self, eqn: Any, ins: Sequence[Flow]) -> list[Flow]:
        """An equation through which nothing passes."""
        for flow in ins:
            self.hold(flow)
        return [plain(tuple(getattr(v.aval, "shape", ())), why=self.reason) for v in eqn.outvars]

    def hold(self, flow: Flow) -> None:
        """Whoever reads this value wants it as it is."""
        if flow.param is not None:
            self.demand(flow, (layout.none(len(flow.shape)),))
        else:
            self.ties.fix(flow.codes, self.reason)

    def derived(self, eqn: Any, ins: list[Flow]) -> list[Flow]:
        """Results that depend on parameters and constants alone."""
        from qjax.analysis.gauge_moves import same_after

        leaves = frozenset().union(*(f.param.leaves for f in ins if f.param is not None))
        param = Param(leaves, None, eqn, tuple(ins)) if leaves else None
        outs = []
        for v in eqn.outvars:
            shape = tuple(getattr(v.aval, "shape", ()))
            number = ins[0].number if eqn.primitive.name in _SAME_NUMBER else None
            outs.append(Flow(shape, layout.none(len(shape)), same_after(eqn, ins, shape), 0, number, param, data=False))
        return outs

    # ------------------------------------------------------------------------------------------- parameters
    def activate(self, flow: Flow) -> Flow:
        """A parameter that meets data elementwise: it takes any factors along the dimensions in which it varies."""
        if flow.param is None:
            return flow
        shape = tuple(1 if same else n for n, same in zip(flow.shape, flow.same, strict=True))
        if math.prod(shape) > WIDE or self.moves and math.prod(shape) == 1:
            self.hold(flow)
            return plain(flow.shape, flow.same, self.reason)
        codes = self.ties.fresh(shape)
        self.demand(flow, (codes,))
        return Flow(flow.shape, codes, flow.same)

    def demand(self, flow: Flow, terms: Sequence[np.ndarray], offset: float = 0.0) -> tuple[np.ndarray, ...] | None:
        """Require a parameter value to be stored multiplied by codes.

        Args:
            flow: the value.
            terms: summands of the exponent, compact, of the value's rank.
            offset: a number that is added to the value before it is multiplied.

        Returns:
            The terms as the leaf slice has them, if the value is a view of one leaf.
        """
        from qjax.analysis.gauge_moves import backward

        param = flow.param
        assert param is not None
        self.demanded.add(id(flow))
        if param.place is not None and not (self.turns and offset and any(t.any() for t in terms)):
            return self.register(param.place, terms, offset)
        back = backward(self, flow, terms, offset) if param.eqn is not None else None
        if back is not None:
            for operand, wanted, shift in back:
                self.demand(operand, wanted, shift)
            return None
        for codes in terms:
            self.ties.fix(codes, self.reason)
        for leaf in param.leaves:
            self.frozen.setdefault(leaf, self.reason)
        return None

    def register(self, place: Place, terms: Sequence[np.ndarray], offset: float) -> tuple[np.ndarray, ...]:
        """Note a reading of a leaf slice, which has to agree with the earlier ones."""
        placed = tuple(self.placed(place, codes) for codes in terms)
        entry = Entry(placed, place.ranges, offset, self.here)
        for key in place.keys:
            earlier = self.entries.setdefault((place.leaf, key), [])
            for other in earlier:
                self.agree(other, entry, place.leaf)
            if not any(same_entry(other, entry) for other in earlier):
                earlier.append(entry)
        return placed

    def placed(self, place: Place, codes: np.ndarray) -> np.ndarray:
        """Codes of a view, laid out as the leaf slice."""
        atoms, parts = [], []
        for d, dim in enumerate(place.dims):
            whole = codes.shape[d] > 1
            if whole and any(stride == GATHERED for _, stride, _ in dim):
                self.ties.equal(codes, layout.first(codes, (d,)), self.reason)
                codes, whole = layout.first(codes, (d,)), False
            for axis, stride, size in dim:
                if stride != GATHERED:
                    atoms.append((axis, -stride, size))
                    parts.append(size if whole else 1)
        codes = codes.reshape(parts)
        order = sorted(range(len(atoms)), key=lambda i: atoms[i][:2])
        codes = codes.transpose(order)
        shape: list[int] = []
        at = 0
        for axis in place.axes:
            own = [atoms[i] for i in order if atoms[i][0] == axis]
            dims = range(at, at + len(own))
            if layout.varying(codes, dims):
                codes = layout.spread(codes, {d: own[d - at][2] for d in dims}, dims)  # type: ignore[arg-type]
                shape.append(math.prod(n for _, _, n in own))
            else:
                shape.append(1)
            at += len(own)
        codes = codes.reshape(shape)
        for axis, start, size in place.ranges:
            d = place.axes.index(axis)
            full = np.zeros(tuple(place.sizes[d] if i == d else n for i, n in enumerate(codes.shape)), np.int32)
            full[(slice(None),) * d + (slice(start, start + size),)] = codes
            codes = full
        return codes

    def agree(self, one: Entry, two: Entry, leaf: int) -> None:
        """Two readings of one leaf slice have to want the same of it."""
        apart = any(a == b and (s + n <= t or t + m <= s) for a, s, n in one.ranges for b, t, m in two.ranges)
        if apart:
            return
        reason = self.add_reason(Reason("shared", self.program.leaf_names[leaf], self.here, tuple(self.steps.items())))
        if one.ranges != two.ranges or one.offset != two.offset:
            for codes in (*one.terms, *two.terms):
                self.ties.fix(codes, reason)
            return
        left, right = by_support(one.terms), by_support(two.terms)
        if any(len(side) < sum(bool(t.any()) for t in e.terms) for side, e in ((left, one), (right, two))):
            for codes in (*one.terms, *two.terms):
                self.ties.fix(codes, reason)
            return
        for support in left.keys() | right.keys():
            if support in left and support in right:
                a, b = np.broadcast_arrays(left[support], right[support])
                ra, rb = self.ties.resolve(a), self.ties.resolve(b)
                self.ties.fix(np.where(ra == 0, b, a)[(ra == 0) != (rb == 0)], reason)
                self.ties.equal(a, b, reason)
            else:
                self.ties.fix(left.get(support, right.get(support)), reason)  # type: ignore[arg-type]

    def note_site(self, x: Flow | None, w: Flow, inner: np.ndarray | None, outer: np.ndarray) -> None:
        """Remember what the input and the output of a site carry; arrays as `demand` gave them."""
        number = self.program.read_at.get(self.here)
        if number is None or w.param is None or w.param.place is None:
            return
        for key in w.param.place.keys:
            name = self.program.slices[number].name_of.get(key)
            if name is not None and name not in self.outputs:
                self.outputs[name] = outer
                if inner is not None and x is not None:
                    self.inputs[name], self.origin[name] = inner, self.ties.why(x.codes) or x.why

    # ------------------------------------------------------------------------------------------- unknowns
    def tie(self, codes: np.ndarray, dims: Sequence[int]) -> np.ndarray:
        """Require codes to be the same along dimensions; the codes with these of size one."""
        if not layout.varying(codes, dims):
            return codes
        out = layout.first(codes, dims)
        self.ties.equal(codes, out, self.reason)
        return out

    def separate(self, codes: np.ndarray, keys: np.ndarray) -> None:
        """A permutation only moves channels among those of equal keys."""
        if self.moves and codes.any():
            self.separators.append((codes, keys))

    def separate_dims(self, codes: np.ndarray, dims: Sequence[int]) -> None:
        """A permutation stays within each position of the dimensions."""
        if self.moves and layout.varying(codes, dims):
            shape = [n if d in dims else 1 for d, n in enumerate(codes.shape)]
            self.separate(codes, np.arange(math.prod(shape)).reshape(shape))

    def times(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Codes of a product; where both factors may carry something, ``a`` gives way in the end."""
        ra, rb = self.ties.resolve(a), self.ties.resolve(b)
        if not ra.any():
            return b
        if not rb.any():
            return a
        shape = np.broadcast_shapes(a.shape, b.shape)
        out = self.ties.fresh(shape)
        flat = [np.broadcast_to(c, shape).ravel() for c in (out, a, b)]
        self.pending.append((flat[0], flat[1], flat[2], self.reason))
        return out

    def finish(self) -> None:
        """Settle what was left open."""
        depths: dict[int, set[tuple[int, ...]]] = {}
        for leaf, key in self.entries:
            depths.setdefault(leaf, set()).add(tuple(axis for axis, _ in key))
        for leaf, found in depths.items():
            if len(found) > 1:
                reason = Reason("shared", self.program.leaf_names[leaf])
                self.frozen.setdefault(leaf, self.add_reason(reason))
        for (leaf, _), entries in self.entries.items():
            if leaf in self.frozen:
                for entry in entries:
                    for codes in entry.terms:
                        self.ties.fix(codes, self.frozen[leaf])
        while self.pending:
            self.pending = [left for p in self.pending if (left := self.settle(*p)) is not None]
            sizes = sum(len(p[0]) for p in self.pending)
            again = [left for p in self.pending if (left := self.settle(*p)) is not None]
            if again and sum(len(p[0]) for p in again) == sizes:
                self.ties.fix(again[0][1], again[0][3])
            self.pending = again

    def settle(self, out: np.ndarray, a: np.ndarray, b: np.ndarray, reason: int) -> Any:
        """Use what is known of a product of unknowns; what remains of it."""
        ro, ra, rb = self.ties.resolve(out), self.ties.resolve(a), self.ties.resolve(b)
        by_a, by_b, by_out = ra == 0, rb == 0, ro == 0
        self.ties.equal(out[by_a], b[by_a], reason)
        self.ties.equal(out[by_b], a[by_b], reason)
        self.ties.equal(a[by_out], -b[by_out], reason)
        left = ~(by_a | by_b | by_out)
        return (out[left], a[left], b[left], reason) if left.any() else None

    # ------------------------------------------------------------------------------------------- control flow
    def do_scan(self, eqn: Any, ins: list[Flow], here: Path) -> list[Flow]:
        """Step through a scan."""
        n_consts, n_carry = scan_arity(eqn.params)
        length, body = eqn.params["length"], eqn.params["jaxpr"]
        loop = self.program.loop_at.get(here)
        if loop is None or not isinstance(length, int) or length * _equations(body) > STEPPED or not length:
            return self.refuse(eqn, ins)
        consts, carry, xs = ins[:n_consts], ins[n_consts : n_consts + n_carry], ins[n_consts + n_carry :]
        order = range(length)[::-1] if eqn.params["reverse"] else range(length)
        results: list[list[Flow]] = []
        for t, position in enumerate(order):
            self.steps[loop] = t
            outs = self.body(body, [*consts, *carry, *(step_of(f, position) for f in xs)], (*here, ("jaxpr", 0)))
            carry = outs[:n_carry]
            results.append(outs[n_carry:])
        del self.steps[loop]
        self.here, self.name, self._reason = here, "scan", 0
        if eqn.params["reverse"]:
            results.reverse()
        return [*carry, *(self.stacked(list(ys)) for ys in zip(*results, strict=True))]

    def stacked(self, flows: list[Flow]) -> Flow:
        """What a scan stacks up of its steps' results."""
        shape = (len(flows), *flows[0].shape)
        for flow in flows:
            if flow.param is not None:
                self.hold(flow)
        parts = np.broadcast_arrays(*(f.codes for f in flows))
        return Flow(shape, layout.tidy(np.stack(parts)), (len(flows) == 1, *flows[0].same), flows[0].why)

    def do_while(self, eqn: Any, ins: list[Flow], here: Path) -> list[Flow]:
        """Nothing passes through a loop of unknown length."""
        return self.refuse(eqn, ins)

    def do_cond(self, eqn: Any, ins: list[Flow], here: Path) -> list[Flow]:
        """Whichever branch is taken, the result carries the same."""
        branches = [self.body(b, ins[1:], (*here, ("branches", i))) for i, b in enumerate(eqn.params["branches"])]
        self.here, self.name, self._reason = here, "cond", 0
        return [self.joined([self.activate(f) for f in flows]) for flows in zip(*branches, strict=True)]

    def joined(self, flows: Sequence[Flow]) -> Flow:
        """One value that is each of these: their codes have to be equal, except that zero takes any factor."""
        free = (0.0,) if self.turns else (0.0, math.inf, -math.inf)
        constant = [f.number is not None if self.moves and not self.turns else f.number in free for f in flows]
        carrying = [f for f, c in zip(flows, constant, strict=True) if not c] or list(flows[:1])
        codes = carrying[0].codes
        for other in carrying[1:]:
            self.ties.equal(codes, other.codes, other.why or carrying[0].why or self.reason)
            if other.codes.size < codes.size:
                codes = other.codes  # equal to the wider one, which repeats it
        same = tuple(all(s) for s in zip(*(f.same for f in flows), strict=True))
        number = flows[0].number if all(f.number == flows[0].number for f in flows) else None
        why = next((f.why for f in carrying if f.why), 0)
        return Flow(flows[0].shape, codes, same, why, number)


_SCALES = {"broadcast_in_dim", "convert_element_type", "reshape", "squeeze", "expand_dims", "transpose", "copy"}
_SCALES |= {"mul", "div", "stop_gradient", "sharding_constraint", "reduce_precision"}
_SQUARES = _SCALES | {"reduce_sum"}
"""What scales that are to be folded away, and squares, may pass through."""

_SAME_NUMBER = {"broadcast_in_dim", "convert_element_type", "reshape", "squeeze", "expand_dims", "transpose", "copy"}


def _equations(body: Any) -> int:
    count = 0
    for eqn in open_jaxpr(body).eqns:
        inner = sum(_equations(sub) for _, sub in sub_jaxprs(eqn.params))
        count += 1 + inner * (eqn.params.get("length") or 1 if eqn.primitive.name == "scan" else 1)
    return count

"""Replaying a jaxpr with quantized leaves.

The rewritten function is made anew at each trace: the float function is traced abstractly, analysed, and its jaxpr is
replayed by a `Rewriter` whose environment holds arrays and `QArray`s side by side. Four things happen to an equation:

* a product, convolution or lookup whose weight is a `QArray` becomes the quantized op;
* additions behind a product become part of it, where its kernel makes them (`qjax.rewriting.endings`);
* a view (transpose, reshape, slice, cast) of a `QArray` stays a `QArray`, exactly, on its codes;
* everything else is re-bound as it was, a `QArray` operand being dequantized first. That is always right, though not
  always fast, so it is noted for the report.

Control flow is re-emitted through public functions of jax (`qjax.rewriting.control_flow`), and only where a quantized
value or a decision is inside; otherwise the equation is re-bound untouched, which keeps custom rules, effects and
shardings as they were. Named scopes and tracebacks are replayed for each equation.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex
from jax.extend import source_info_util as siu

from qjax import ops
from qjax._compat import bind, consts_of, constvars_and_invars, open_jaxpr, sub_jaxprs
from qjax.analysis.reads import Path
from qjax.errors import LayoutError, LoweringError
from qjax.formats import Format, QArray, is_quantized
from qjax.kernels import Problem, select
from qjax.kernels.devices import cuda_capability, platform_here
from qjax.program import Program
from qjax.rewriting.control_flow import CONTROL_FLOW
from qjax.rewriting.emit import Act, emit_conv, emit_dot, emit_ragged, has_constants, operand_axes, taken_in
from qjax.rewriting.endings import Addition, Postponed, additions, not_taken
from qjax.rewriting.log_attention import Kept
from qjax.rewriting.selection import Layer, Selected, cut, dense
from qjax.rewriting.steps import Context
from qjax.rewriting.views import VIEWS


class Rewriter(Kept):
    """Replays one program.

    Args:
        program: the trace to replay.
        inputs: site name -> `Act` for the products whose activations are quantized.
        max_runs: how many runs of equal formats a scan is split into before it selects instead.
        implementation: name of the lowering to use everywhere, or None to choose.
        record: note which lowering each product gets, for the report.
    """

    def __init__(
        self,
        program: Program,
        inputs: Mapping[str, Any] | None = None,
        *,
        max_runs: int = 4,
        implementation: str | None = None,
        record: bool = False,
    ):
        self.program = program
        self.inputs = dict(inputs or {})
        self.max_runs = max_runs
        self.implementation = implementation
        self.notes: dict[str, set[str]] = defaultdict(set)
        self.choices: dict[tuple[str, str], ops.Choice] | None = {} if record else None
        self.shared: dict[Any, Any] = {}
        self.kept: dict[int, Any] = {}

    def __call__(self, arrays: Sequence[Any]) -> list[Any]:
        """Run the program on its flattened array leaves (quantized leaves allowed)."""
        jaxpr = self.program.jaxpr
        return [self.dense(v, "the result") for v in self.run(jaxpr, list(arrays), (), {})]

    # ------------------------------------------------------------------------------------------- which decisions
    @functools.cached_property
    def active(self) -> dict[Path, list[tuple[Path, int]]]:
        """Prefix of an address -> the reads below it whose activations are quantized, by relative address."""
        out: dict[Path, list[tuple[Path, int]]] = defaultdict(list)
        for number, read in enumerate(self.program.analysis.reads):
            table = self.program.slices[number]
            if read.composite is None and any(n in self.inputs for n in table.name_of.values()):
                for cut in range(len(read.path)):
                    out[read.path[:cut]].append((read.path[cut:], number))
        return out

    def acts_of(self, number: int, context: Context) -> list[tuple[tuple[int, ...], Act | None]]:
        """The decision of one read for each loop step that the emitted code may run for."""
        table = self.program.slices[number]
        out = []
        for step, key in table.by_step.items():
            if all(loop not in context or s in context[loop].steps for loop, s in zip(table.loops, step, strict=True)):
                out.append((step, self.inputs.get(table.name_of[key])))
        return out

    def varies(self, prefix: Path, loop: int, context: Context) -> list[tuple[Any, ...]] | None:
        """For each step of ``loop``, the decisions below ``prefix`` that depend on it; None if none does."""
        length = self.program.analysis.loops[loop].length
        columns = []
        for _, number in self.active.get(prefix, ()):
            table = self.program.slices[number]
            if loop not in table.loops or length is None:
                continue
            at = table.loops.index(loop)
            by_step: dict[int, set[Any]] = defaultdict(set)
            for step, act in self.acts_of(number, context):
                by_step[step[at]].add((tuple(s for i, s in enumerate(step) if i != at), act))
            columns.append([frozenset(by_step[t]) for t in range(length)])
        return list(zip(*columns, strict=True)) if columns else None

    # What bodies of control flow return beside their results; see `qjax.rewriting.taps`.

    @contextlib.contextmanager
    def collecting(self) -> Iterator[dict[Any, Any]]:
        """Collect what is observed inside: nothing, in a plain replay."""
        yield {}

    def deposit(self, taken: dict[Any, Any]) -> None:
        """Take what a body has collected."""

    @property
    def observing(self) -> bool:
        """Whether something is collected."""
        return False

    @property
    def every_branch(self) -> bool:
        """Whether all branches of a condition run, so that each site is seen once."""
        return False

    # What bodies of control flow are given beside their operands; see `qjax.rewriting.given` and, for calls, `Kept`.

    def brought_rows(self, numbers: Sequence[int], loop: int, order: Sequence[int], context: Context) -> dict[int, Any]:
        """What reads need at the steps ``order`` of a loop, with that axis in front: nothing, in a plain replay."""
        return {}

    def needs(self, eqn: Any, values: Sequence[Any], here: Path) -> bool:
        """Whether a higher-order equation has to be re-emitted: a quantized operand, or a decision inside."""
        if any(is_special(v) for v in values):
            return True
        if not self.active:
            return False
        return any(self.active.get((*here, key)) for key, _ in sub_jaxprs(eqn.params))

    def note(self, where: str, what: str) -> None:
        """Remember something for the report."""
        self.notes[where].add(what)

    def choose(self, op: str, fmt: Any, act: Any, sizes: tuple[int, ...], dtype: Any, where: str) -> None:
        """Note which lowering a product of these sizes gets here."""
        if self.choices is not None:
            self.choices[where, fmt.name] = ops.choose(
                op,
                fmt,
                act.fmt if act is not None else None,
                sizes,
                platform_here(),
                x_dtype=dtype,
                capability=cuda_capability(),
                implementation=self.implementation,
            )

    def dense(self, value: Any, why: str) -> Any:
        """A float array for an equation that has no quantized form."""
        if is_special(value):
            self.note("dequantized", why)
        return dense(value)

    # ------------------------------------------------------------------------------------------- the replay
    def run(self, jaxpr: Any, args: Sequence[Any], path: Path, context: Context) -> list[Any]:
        """Replay one (open or closed) jaxpr on ``args``; results may be quantized."""
        inner = open_jaxpr(jaxpr)
        env: dict[Any, Any] = dict(zip(constvars_and_invars(jaxpr), [*consts_of(jaxpr), *args], strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, jex.Literal) else env[atom]

        wanted = self.wanted.get(path, {})
        self.keep(wanted, list(env), list(env.values()))
        added = additions(inner) if self.takes_in else {}
        postponed: dict[int, Postponed | None] = {}
        for i, eqn in enumerate(inner.eqns):
            later = postponed.get(i)
            if later is None and i in postponed:  # an addition that is made with one behind it
                continue
            stack = siu.current_name_stack() + eqn.source_info.name_stack
            with siu.user_context(eqn.source_info.traceback, name_stack=stack), eqn.ctx.manager:
                if later is not None:
                    arrays = {name: read(one.other) for name, one in later.terms.items()}
                    outs = later.emit({n: self.dense(a, "it is added to a product") for n, a in arrays.items()})
                else:
                    values = [read(a) for a in eqn.invars]
                    mine = not_taken(added.get(i, ()), postponed)
                    if mine and (later := self.postponed(eqn, values, (*path, i), context, mine)):
                        postponed |= {one.at: None for one in later.terms.values()} | {later.last: later}
                        continue
                    outs = self.equation(eqn, values, (*path, i), context)
            env.update(zip(eqn.outvars, outs, strict=True))
            self.keep(wanted, eqn.outvars, outs)
        self.drop(wanted)
        return [read(a) for a in inner.outvars]

    def reads_in_place(self, weight: Any) -> bool:
        """Whether products would read one of a stack of weights where it lies, so that a loop should not slice it.

        In a plain replay, for a weight whose leading axis is that of the stack. What a single row would take decides,
        of floats or quantized as at any site of the program: a product that takes another lowering cuts its layer out.
        """
        if type(self) is not Rewriter or not isinstance(weight, QArray) or weight.view.order[:1] != (("s", 0),):
            return False
        stacks, capability = weight.stack_ndim, cuda_capability()
        n = math.prod(weight.codes.shape[stacks : stacks + weight.view.count("o")])
        acts = dict.fromkeys([None, *(act.fmt for act in self.inputs.values() if act is not None)])

        def picks(op: str, act: Format | None) -> bool:
            problem = Problem(op, platform_here(), weight.fmt, act, 1, n, weight.length, capability=capability)
            try:
                return select(problem, self.implementation).picks
            except LoweringError:  # which the product itself will tell
                return False

        return any(picks(op, act) for op in ("dot", *(("ragged_dot",) if stacks > 1 else ())) for act in acts)

    @property
    def takes_in(self) -> bool:
        """Whether additions may become part of a product: in a plain replay, for GPUs, whose kernels make them."""
        return type(self) is Rewriter and platform_here() == "cuda"

    def postponed(
        self, eqn: Any, values: list[Any], here: Path, context: Context, found: list[Addition]
    ) -> Postponed | None:
        """Return a product that is emitted with the additions behind it, or None where its lowering makes none."""
        number = self.program.read_at.get(here)
        acts = self.acts_of(number, context) if number is not None and self.inputs else []
        distinct = {act for _, act in acts} or {None}
        terms = taken_in(self, eqn, values, next(iter(distinct)), found) if len(distinct) == 1 else {}
        if not terms:
            return None

        def emit(arrays: dict[str, Any]) -> list[Any]:
            return self.product(functools.partial(emit_dot, terms=arrays), number, acts, eqn, values, context)

        return Postponed(emit, terms)

    def equation(self, eqn: Any, values: list[Any], here: Path, context: Context) -> list[Any]:
        """Emit one equation."""
        name = eqn.primitive.name
        product = PRODUCTS.get(name)
        if product is not None:
            number = self.program.read_at.get(here)
            acts = self.acts_of(number, context) if number is not None and self.inputs else []
            if any(act is not None for _, act in acts) or any(is_special(v) for v in values):
                return self.product(product, number, acts, eqn, values, context)
        elif name in CONTROL_FLOW:
            if self.needs(eqn, values, here):
                return CONTROL_FLOW[name](self, eqn, values, here, context)
        elif name == "optimization_barrier":
            plain = iter(lax.optimization_barrier(tuple(v for v in values if not is_special(v))))
            return [v if is_special(v) else next(plain) for v in values]
        elif any(is_special(v) for v in values):
            view = VIEWS.get(name)
            values = values if name in WAITING else [cut(v) for v in values]
            if view is not None and is_special(values[0]):
                try:
                    out = view(eqn, values)
                    return out if isinstance(out, list) else [out]
                except LayoutError as error:
                    self.note("dequantized", f"{name}: {error}")
            values = [self.dense(v, f"{name} has no quantized form") for v in values]
        return bind(eqn, values)

    def product(
        self,
        emit: Callable[..., Any],
        number: int | None,
        acts: list[tuple[tuple[int, ...], Act | None]],
        eqn: Any,
        values: list[Any],
        context: Context,
    ) -> list[Any]:
        """Emit a quantized product, selecting at run time where weights or decisions differ between loop steps."""
        where = self.where(number)
        if eqn.primitive.name not in IN_PLACE or len({act for _, act in acts}) > 1:
            values = [cut(v) for v in values]
        chosen = [v for v in values if isinstance(v, Selected) and not isinstance(v, Layer)]
        distinct = list(dict.fromkeys(act for _, act in acts)) or [None]
        if not chosen and len(distinct) == 1:
            return [emit(self, eqn, values, distinct[0], where)]
        # one case for each pair (part of the selected weight, decision), looked up by the traced step
        table = self.program.slices[number] if number is not None else None
        if len(distinct) > 1:
            assert table is not None
            index = _flat_step(table.loops, acts, context)
            if index is None:
                self.note(where, "formats of the activations differ where only the run knows the step: left in float")
                distinct = [None]
        if chosen:
            selected = chosen[0]

            def branch(part: int) -> Callable[..., Any]:
                def run(position: Any, *dynamic: Any) -> Any:
                    it = iter(dynamic)
                    inner = [selected.part(part, position) if v is selected else next(it) for v in values]
                    inner = [dense(v) if isinstance(v, Selected) else v for v in inner]
                    if len(distinct) == 1:
                        return emit(self, eqn, inner, distinct[0] if has_constants(inner, distinct[0]) else None, where)
                    return _switch_acts(self, emit, eqn, inner, distinct, acts, index, where)

                return run

            others = [v for v in values if v is not selected]
            which, position = selected.which()
            return [lax.switch(which, [branch(p) for p in range(selected.n_parts)], position, *others)]
        return [_switch_acts(self, emit, eqn, values, distinct, acts, index, where)]

    def input_side(self, eqn: Any, where: str) -> int:
        """Which operand of a float product is the activation."""
        site = self.program.by_name.get(where)
        side = self.program.analysis.reads[site.read].side if site is not None else None
        return 1 - side if side is not None else 0

    def weight_side(self, number: int, eqn: Any) -> int:
        """Which operand of a product that a site reads is the weight."""
        side = self.program.analysis.reads[number].side
        return side if side is not None and eqn.primitive.name == "dot_general" else 1

    def weight_axes(self, number: int, eqn: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The axes of the weight of a site in a product: those of the stack, of the outputs, and that are summed over.

        Groups and channels run through the axes of the leaf, in the leaf's order; a product may name them in another.
        """
        sums, stacks = operand_axes(eqn, self.weight_side(number, eqn))
        outs = tuple(d for d in range(rank) if d not in sums and d not in stacks)
        ref = self.program.analysis.reads[number].ref
        if ref is not None and eqn.primitive.name == "dot_general":
            dims = ref.dims
            sums, outs = (
                tuple(sorted(axes, key=lambda d: [(axis, -stride) for axis, stride, _ in dims[d]]))
                for axes in (sums, outs)
            )
        return stacks, outs, sums

    def streamed(self, where: str) -> bool:
        """Whether a site reads what a loop slices from a stack at its step."""
        site = self.program.by_name.get(where)
        return site is not None and bool(self.program.slices[site.read].loops)

    def where(self, number: int | None) -> str:
        """A name for notes and warnings."""
        if number is None:
            return "a product outside any site"
        return next(iter(self.program.slices[number].name_of.values()))


def is_special(value: Any) -> bool:
    """Whether a value of the environment is quantized."""
    return isinstance(value, Selected) or is_quantized(value)


def _flat_step(loops: tuple[int, ...], acts: list[tuple[tuple[int, ...], Any]], context: Context) -> Any:
    """A traced index into ``acts`` for the running step of every loop; None where a step is not known."""
    index: Any = 0
    for at, loop in enumerate(loops):
        steps = sorted({s[at] for s, _ in acts})
        if len(steps) > 1:
            running = context[loop].traced if loop in context else None
            if running is None:
                return None
            position = jnp.searchsorted(jnp.asarray(steps), running)
        else:
            position = 0
        index = index * len(steps) + position
    return index


def _switch_acts(
    rewriter: Rewriter, emit: Any, eqn: Any, values: list[Any], distinct: list[Any], acts: Any, index: Any, where: str
) -> Any:
    which = jnp.asarray([distinct.index(act) for _, act in acts], jnp.int32)[index]

    def branch(act: Any) -> Callable[[list[Any]], Any]:
        # A weight that is stored without the constants of a decision is never met where that decision holds.
        return lambda vs: emit(rewriter, eqn, vs, act if has_constants(vs, act) else None, where)

    return lax.switch(which, [branch(act) for act in distinct], list(values))


WAITING = (
    "convert_element_type",
    "transpose",
    "reshape",
    "squeeze",
    "broadcast_in_dim",
    "copy",
    "copy_p",
    "stop_gradient",
)
"""Views that can wait until a layer is cut out of its stack, or the whole stack is read."""

IN_PLACE = ("dot_general", "ragged_dot_general")
"""Products of which a lowering may read one of a stack of weights where it lies."""

PRODUCTS: dict[str, Callable[..., Any]] = {
    "dot_general": emit_dot,
    "conv_general_dilated": emit_conv,
    "ragged_dot_general": emit_ragged,
}
"""Primitive -> how the quantized product is emitted."""

"""Observing activations: what observers see at each site while a program runs, carried out of its control flow.

Observer states form a monoid, so nothing has to be carried *into* the program: each site contributes the state of what
it saw in this call, and contributions are merged. A body of control flow returns them beside its results:

    jit, remat     as further results; a body shared by several calls contributes at each of them
    scan           stacked, one row a step, where the loop slices a parameter (each step is a site), else merged
    while          merged in a further part of the loop state
    cond           the union over the branches; what a branch does not reach contributes the neutral state
    shard_map      merged over the mesh axes by the observer's collective

Functions with a derivative rule of their own are opened: an observed program is not differentiated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax._compat import bind, explicit_sharding, varying_axes
from qjax.calibration import Observer, State
from qjax.rewrite import Rewriter, is_special
from qjax.rewriting.activations import Rows, activation_matrix
from qjax.statistics import Range, Statistic

Loops = tuple[tuple[int, tuple[int, ...]], ...]
"""Of stacked contributions, outermost first: loop id, and the step that each row of that axis stands for."""

Key = tuple[int, Loops]
"""Number of the read, and the loops that its contribution is stacked over."""

Taken = dict[Key, State]
"""Contributions."""

NONFINITE = "nonfinite"
"""Field of a state: how many elements were NaN or infinite in the worst call."""


@dataclasses.dataclass(frozen=True)
class Tap:
    """What to observe at a site.

    Attributes:
        fmt, observer: the range that a format needs, by an observer; None for no range.
        statistics: what else is gathered. Their fields, and those of the observer, have different names.
        ordered: whether the observer has to see K in the order in which the weight is stored.
    """

    fmt: Any = None
    observer: Observer | None = None
    statistics: tuple[Statistic, ...] = ()
    ordered: bool = False

    @property
    def parts(self) -> tuple[Statistic, ...]:
        """All that is gathered, as statistics."""
        return (*((Range(self.observer, self.fmt),) if self.observer is not None else ()), *self.statistics)

    def init(self, shape: Sequence[int]) -> State:
        """The neutral state, for activations [*stack, rows, K] of this shape."""
        flat = (math.prod(shape[:-1]), shape[-1])
        state: State = {NONFINITE: jnp.zeros((), jnp.float32)}
        for part in self.parts:
            state |= part.init(shape if part.stacked else flat)
        return state

    def see(self, seen: Callable[[Statistic, State | None], State], x: Any, before: State | None = None) -> State:
        """The state of activations, with what was seen before.

        Args:
            seen: gives the state of one statistic, given its state before.
            x: the activations, of any shape.
            before: None for nothing.
        """
        state: State = {NONFINITE: jnp.sum(~jnp.isfinite(x)).astype(jnp.float32)}
        if before is not None:
            state[NONFINITE] = jnp.maximum(state[NONFINITE], before[NONFINITE])
        for part, names in _fields(self):
            state |= seen(part, None if before is None else {name: before[name] for name in names})
        return state

    def merge(self, a: State, b: State) -> State:
        """The state of both."""
        return self._each(lambda part, *states: part.merge(*states), jnp.maximum, a, b)

    def merged(self, stacked: State) -> State:
        """The state of all rows of a leading axis."""
        return self._each(lambda part, state: part.merged(state), lambda a: jnp.max(a, axis=0), stacked)

    def over_devices(self, state: State, axes: tuple[str, ...]) -> State:
        """The state of all devices along the mesh axes."""

        def worst(a: Any) -> Any:
            varying = varying_axes(a, axes)
            return lax.pmax(a, varying) if varying else a

        return self._each(lambda part, state: part.over_devices(state, axes), worst, state)

    def _each(self, one: Callable[..., State], flag: Callable[..., Any], *states: State) -> State:
        """Apply a function to the fields of each part, and one to the flag."""
        out: State = {NONFINITE: flag(*(state[NONFINITE] for state in states))}
        for part, names in _fields(self):
            out |= one(part, *({name: state[name] for name in names} for state in states))
        return out


@functools.lru_cache(maxsize=1024)
def _fields(tap: Tap) -> tuple[tuple[Statistic, tuple[str, ...]], ...]:
    """Each part of a tap with the names of its fields."""
    return tuple((part, tuple(jax.eval_shape(lambda part=part: part.init((1, 1))))) for part in tap.parts)


class Collector(Rewriter):
    """Replays a program unchanged and collects what its taps see.

    Args:
        program: the trace.
        taps: site name -> what to observe there.
        before: site name -> what was seen before, which is continued in place where the product runs once.

    Attributes:
        depth: how many dictionaries deep a product is that no control flow is around; 0 while nobody says so.
        continued: the sites whose contribution holds what was seen before.
    """

    def __init__(self, program: Any, taps: Mapping[str, Tap], before: Mapping[str, State] | None = None):
        super().__init__(program, taps, max_runs=1 << 30)
        self.before, self.continued, self.depth = dict(before or {}), set(), 0
        self.taps = dict(taps)
        self.frames: list[Taken] = []
        self.shapes: dict[int, tuple[int, ...]] = {}
        self.tap_of: dict[int, Tap] = {}

    def observe(self, arrays: Sequence[Any]) -> tuple[list[Any], dict[str, State]]:
        """Run the program on its flattened array leaves: its results, and the state of each site."""
        with self.collecting() as taken:
            outs = self(arrays)
        return outs, self.by_site(taken)

    @contextlib.contextmanager
    def collecting(self) -> Iterator[Taken]:
        """Collect what is observed inside into a dictionary of its own."""
        self.frames.append({})
        try:
            yield self.frames[-1]
        finally:
            self.frames.pop()

    @property
    def observing(self) -> bool:
        """True."""
        return True

    def deposit(self, taken: Taken) -> None:
        """Add contributions to the innermost dictionary."""
        frame = self.frames[-1]
        for key, state in taken.items():
            frame[key] = self.tap_of[key[0]].merge(frame[key], state) if key in frame else state

    def product(
        self, emit: Callable[..., Any], number: int | None, acts: Any, eqn: Any, values: list[Any], context: Any
    ) -> list[Any]:
        """Observe the activations of a product, then emit it as it was."""
        taps = list(dict.fromkeys(act for _, act in acts if act is not None))
        if number is not None and taps:
            side = 1 - self.weight_side(number, eqn)
            x = lax.stop_gradient(self.dense(values[side], "observed activations"))
            self.tap_of[number] = taps[0]
            operands = [x if i == side else v for i, v in enumerate(values)]
            before = self._before(number, context)
            self.deposit({(number, ()): self._seen(taps[0], number, eqn, operands, side, before)})
        if any(is_special(v) for v in values):
            return super().product(emit, number, [], eqn, values, context)
        return bind(eqn, values)

    def _seen(self, tap: Tap, number: int, eqn: Any, values: list[Any], side: int, before: State | None) -> State:
        """The state of the activations of a product, operand ``side``, with what was seen before."""
        if not tap.statistics and not tap.ordered:
            matrix = activation_matrix(eqn, values[side], side)
            self.shapes[number] = matrix.shape
            return tap.see(lambda part, state: part.see(matrix) if state is None else part.add(state, matrix),
                           values[side], before)  # fmt: skip
        sizes = values[2:]  # of the groups of a ragged product

        def see(x: Any, sizes: list[Any], before: State | None) -> State:
            rows = Rows(eqn, [*(x if i == side else None for i in range(2)), *sizes], self.program, number, side)
            self.shapes[number] = rows.shape
            return tap.see(rows.seen, x, before)

        sharding = explicit_sharding(values[side])
        if sharding is not None:  # sums over sharded rows have no type there: the partitioner finds the way
            see = jax.sharding.auto_axes(see, out_sharding=jax.NamedSharding(sharding.mesh, jax.P()))  # type: ignore
        return see(values[side], sizes, before)

    def _before(self, number: int, context: Any) -> State | None:
        """What was seen before at the only site that this product is, where it runs once."""
        if len(self.frames) != self.depth:
            return None
        table = self.program.slices[number]
        names = {
            table.name_of[key]
            for step, key in table.by_step.items()
            if all(context[loop].steps == (t,) for loop, t in zip(table.loops, step, strict=True))
        }
        if len(names) != 1:
            return None
        (name,) = names
        if name not in self.before or name in self.continued:
            return None
        self.continued.add(name)
        return self.before[name]

    # ----------------------------------------------------------------------------------------- out of control flow
    def stacked(self, taken: Taken, loop: int, steps: Sequence[int]) -> Taken:
        """What a scan's body collected, with a leading axis of ``steps``, as contributions of the whole scan."""
        out: Taken = {}
        for (number, loops), state in taken.items():
            if loop in self.program.slices[number].loops:
                out[number, ((loop, tuple(steps)), *loops)] = state
            else:
                out[number, loops] = self.tap_of[number].merged(state)
        return out

    def neutral(self, key: Key) -> State:
        """What contributes nothing, in the shape of a contribution."""
        number, loops = key
        lead = tuple(len(steps) for _, steps in loops)
        tap = self.tap_of[number]
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (*lead, *a.shape)), tap.init(self.shapes[number]))

    def moved(self, taken: Taken, numbers: Mapping[int, int]) -> Taken:
        """The contributions of a shared body, at the reads of another call of it."""
        for old, new in numbers.items():
            if old in self.tap_of:
                self.tap_of[new], self.shapes[new] = self.tap_of[old], self.shapes[old]
        loops = dict(zip(*(self._loops_of(n) for n in ((*numbers,), (*numbers.values(),))), strict=True))
        return {
            (numbers[number], tuple((loops.get(loop, loop), steps) for loop, steps in over)): state
            for (number, over), state in taken.items()
        }

    def _loops_of(self, numbers: Sequence[int]) -> list[int]:
        return list(dict.fromkeys(loop for n in numbers for loop in self.program.slices[n].loops))

    def by_site(self, taken: Taken) -> dict[str, State]:
        """Contributions by the name of the site, each step of a stack apart."""
        parts: dict[str, list[State]] = {}
        tap_of: dict[str, Tap] = {}
        for (number, loops), state in taken.items():
            table = self.program.slices[number]
            for at in itertools.product(*(range(len(steps)) for _, steps in loops)):
                here = {loop: steps[i] for (loop, steps), i in zip(loops, at, strict=True)}
                names = {
                    table.name_of[key]
                    for step, key in table.by_step.items()
                    if all(here.get(loop, s) == s for loop, s in zip(table.loops, step, strict=True))
                }
                for name in sorted(names & set(self.taps)):
                    parts.setdefault(name, []).append(jax.tree.map(lambda a, at=at: a[at], state))
                    tap_of[name] = self.tap_of[number]
        out = {}
        for name in sorted(parts):
            whole, *rest = parts[name]
            for more in rest:
                whole = tap_of[name].merge(whole, more)
            out[name] = whole
        return out

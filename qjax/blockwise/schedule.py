"""Cutting a program into blocks that run one after the other.

A block is what one layer does: in a scan over layers one step of it, in a list of layers the equations that read the
weights of one (``layers/3/...``), or whatever a pattern of the user's says. The equations of a program are put in order
by the last block that they wait for; what waits for none comes first, what reads further weights after the last block
(a head) comes at the end. Equations that hold several blocks (a jit around the model, a scan over layers) are opened;
those that hold one or none stay whole.

The schedule numbers every value of the opened program, so that each block says which values of earlier blocks it
reads, which leaves, or slices of leaves, and what it hands on.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.extend import core as jex

from qjax._compat import consts_of, constvars_and_invars, open_jaxpr, scan_arity, sub_jaxprs
from qjax.analysis.reads import Path
from qjax.errors import RecipeError
from qjax.patterns import compile_pattern
from qjax.program import Program

OPENED = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "remat2": "jaxpr", "checkpoint": "jaxpr"}
"""Primitives that are opened where they hold several blocks, and the parameter that holds their body."""

Value = int
"""A value of the opened program. The first are the program's inputs."""


@dataclasses.dataclass(frozen=True)
class Use:
    """An operand: a value, or the slice ``index`` of its leading axis; or a constant."""

    value: Value = -1
    index: int | None = None
    constant: Any = None


@dataclasses.dataclass(frozen=True)
class Item:
    """One equation, one step of a scan, or the stacking of what the steps of a scan return.

    Attributes:
        eqn: the equation.
        path: its address in the program.
        uses: operands. results: values that it defines.
        step: of a scan: which step, in time; None for a whole equation.
        stack: how many operands (results of steps) are stacked into each result; empty for an equation.
        sliced: the operand is a slice of what the equation was traced with: a cast of one layer of a stack.
    """

    eqn: Any
    path: Path
    uses: tuple[Use, ...]
    results: tuple[Value, ...]
    step: int | None = None
    stack: tuple[int, ...] = ()
    sliced: bool = False


@dataclasses.dataclass(frozen=True)
class Block:
    """What runs together.

    Attributes:
        name: ``layers/3``; what belongs to no block is ``before layers/0`` and ``after layers/31``.
        items: in order.
        reads: the program's inputs that it reads, whole or a slice each.
        takes: values of earlier blocks that it reads.
        gives: values that later blocks read, or results of the program.
        sites: names of the sites in it.
    """

    name: str
    items: tuple[Item, ...]
    reads: tuple[Use, ...]
    takes: tuple[Value, ...]
    gives: tuple[Value, ...]
    sites: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A program in blocks.

    Attributes:
        program: the trace.
        blocks: in the order in which they run.
        outs: the results of the program.
    """

    program: Program
    blocks: tuple[Block, ...]
    outs: tuple[Use, ...]


def blocks_of(program: Program, pattern: str | None = None) -> Schedule:
    """Cut a program into blocks.

    Args:
        program: the trace.
        pattern: which path prefixes are blocks, by segments as in rules (``encoder/*/layer_*``); None takes the path up
            to the first number.

    Raises:
        RecipeError: the pattern matches no site.
    """
    name_of = _namer(pattern)
    flat = _Flat(program, name_of)
    if pattern is not None and not flat.names:
        raise RecipeError(
            f"blocks={pattern!r} matches the beginning of no site name; names are such as "
            f"{', '.join(site.name for site in program.sites[:3])}"
        )
    return flat.schedule()


def _namer(pattern: str | None) -> Callable[[str], str | None]:
    if pattern is None:
        return _up_to_first_number
    matches = compile_pattern(pattern)

    def name_of(site: str) -> str | None:
        parts = site.split("/")
        prefixes = ("/".join(parts[:n]) for n in range(1, len(parts) + 1))
        return next((p for p in prefixes if matches.fullmatch(f"{p}/")), None)

    return name_of


def _up_to_first_number(site: str) -> str | None:
    """``layers/3`` of ``layers/3/mlp/up/kernel``; ``layers_3`` of ``layers_3/mlp``, as Flax Linen names siblings."""
    parts = site.split("/")
    for n, part in enumerate(parts, 1):
        if re.fullmatch(r"(.*_)?\d+", part):
            return "/".join(parts[:n])
    return None


class _Flat:
    """The opened program, being numbered."""

    def __init__(self, program: Program, name_of: Callable[[str], str | None]):
        self.program, self.name_of = program, name_of
        self.names: dict[str, int] = {}  # block -> rank, by first appearance
        self.below: dict[Path, list[int]] = defaultdict(list)  # address -> reads at it or below it
        self.block_of: dict[str, str | None] = {}
        for number, read in enumerate(program.analysis.reads):
            for cut in range(len(read.path) + 1):
                self.below[read.path[:cut]].append(number)
            table = program.slices[number]
            for site in dict.fromkeys(table.name_of[key] for _, key in sorted(table.by_step.items())):  # in time
                block = self.block_of[site] = name_of(site) if program.by_name[site].leaf is not None else None
                if block is not None:
                    self.names.setdefault(block, len(self.names) + 1)
        jaxpr = program.jaxpr
        self.n_inputs = len(open_jaxpr(jaxpr).invars) - (
            len(consts_of(jaxpr)) if len(constvars_and_invars(jaxpr)) == len(open_jaxpr(jaxpr).invars) else 0
        )
        self.count = self.n_inputs
        self.items: list[Item] = []
        self.rank: list[int] = []
        self.home: dict[Value, int] = dict.fromkeys(range(self.n_inputs), 0)
        self.views: dict[Value, tuple[Item, int]] = {}  # result of a view -> its equation, and which result it is
        self.copies: dict[tuple[Value, int | None, int], Value] = {}
        inputs = [Use(v) for v in range(self.n_inputs)]
        outs = self._open(jaxpr, inputs, ())
        self.outs = [self._viewed(u, len(self.names) + 1) for u in outs]

    def _fresh(self, n: int) -> tuple[Value, ...]:
        self.count += n
        return tuple(range(self.count - n, self.count))

    def _open(self, jaxpr: Any, args: Sequence[Use], path: Path) -> list[Use]:
        """Number the equations of a body."""
        inner = open_jaxpr(jaxpr)
        constants = [Use(constant=c) for c in consts_of(jaxpr)]
        env: dict[Any, Use] = dict(zip(constvars_and_invars(jaxpr), [*constants, *args], strict=True))

        def read(atom: Any) -> Use:
            return Use(constant=atom.val) if isinstance(atom, jex.Literal) else env[atom]

        for i, eqn in enumerate(inner.eqns):
            here = (*path, i)
            uses = [read(a) for a in eqn.invars]
            env.update(zip(eqn.outvars, self._equation(eqn, here, uses), strict=True))
        return [read(a) for a in inner.outvars]

    def _equation(self, eqn: Any, here: Path, uses: list[Use]) -> list[Use]:
        several = len(self._blocks_below(here)) > 1
        body = OPENED.get(eqn.primitive.name)
        if several and body is not None:
            return self._open(eqn.params[body], uses, (*here, (body, 0)))
        if several and eqn.primitive.name == "scan" and all(u.index is None for u in uses):
            return self._peel(eqn, here, uses)
        results = self._fresh(len(eqn.outvars))
        self._add(Item(eqn, here, tuple(uses), results), self._blocks_below(here))
        return [Use(v) for v in results]

    def _peel(self, eqn: Any, here: Path, uses: list[Use]) -> list[Use]:
        """Number the steps of a scan one by one."""
        p = eqn.params
        n_consts, n_carry = scan_arity(p)
        consts, carry, xs = uses[:n_consts], uses[n_consts : n_consts + n_carry], uses[n_consts + n_carry :]
        loop = self.program.loop_at[here]
        rows: dict[int, tuple[Value, ...]] = {}
        n_ys = len(eqn.outvars) - n_carry
        for t in range(p["length"]):
            at = p["length"] - 1 - t if p["reverse"] else t
            results = self._fresh(n_carry + n_ys)
            sliced = [dataclasses.replace(x, index=at) for x in xs]
            self._add(Item(eqn, here, (*consts, *carry, *sliced), results, step=t), self._blocks_below(here, (loop, t)))
            carry = [Use(v) for v in results[:n_carry]]
            rows[at] = results[n_carry:]
        stacked = self._fresh(n_ys)
        if n_ys:
            whole = tuple(Use(rows[at][y]) for y in range(n_ys) for at in range(p["length"]))
            self._add(Item(eqn, here, whole, stacked, stack=(p["length"],) * n_ys), ())
        return [*carry, *(Use(v) for v in stacked)]

    def _blocks_below(self, here: Path, step: tuple[int, int] | None = None) -> set[str | None]:
        """The blocks whose weights are read at an address or below it (None stands for weights of no block)."""
        found: set[str | None] = set()
        for site in self._sites_below(here, step):
            if self.program.by_name[site].leaf is not None:
                found.add(self.block_of[site])
        return found

    def _sites_below(self, here: Path, step: tuple[int, int] | None = None) -> list[str]:
        out = []
        for number in self.below.get(here, ()):
            table = self.program.slices[number]
            if step is None or step[0] not in table.loops:
                out += table.name_of.values()
                continue
            at = table.loops.index(step[0])
            out += dict.fromkeys(table.name_of[key] for s, key in table.by_step.items() if s[at] == step[1])
        return out

    def _add(self, item: Item, blocks: Sequence[str | None] | set[str | None]) -> None:
        if not blocks and self._is_view(item):
            for position, v in enumerate(item.results):
                self.views[v] = (item, position)
                self.home[v] = 0
            return
        last = len(self.names)
        waits = max((self.home[u.value] for u in item.uses if u.value >= 0), default=0)
        own = max((self.names[b] for b in blocks if b is not None), default=0)
        rank = max(waits, own)
        if None in blocks and not own and waits == last and last:
            rank = last + 1
        self._place(dataclasses.replace(item, uses=tuple(self._viewed(u, rank) for u in item.uses)), rank)

    def _place(self, item: Item, rank: int) -> None:
        self.items.append(item)
        self.rank.append(rank)
        for v in item.results:
            self.home[v] = rank

    # Equations that only look at parameters (a cast, a transpose) or at constants (a mask) belong where their result is
    # used: run beforehand they would make float copies of all weights at once, or be kept for every batch. Each block
    # has its own.

    def _is_view(self, item: Item) -> bool:
        values = [u.value for u in item.uses if u.value >= 0]
        return all(v < self.program.signature.n_params or v in self.views for v in values)

    def _viewed(self, use: Use, rank: int) -> Use:
        """A use of a view as a use of that view's own copy in a block."""
        if use.value not in self.views:
            return use
        item, position = self.views[use.value]
        # A cast of a stack is the stack of the casts: each block reads its slice only.
        inside = use.index if item.eqn.primitive.name == "convert_element_type" and not item.stack else None
        key = (use.value, inside, rank)
        if key not in self.copies:
            uses = tuple(
                self._viewed(u if inside is None else dataclasses.replace(u, index=inside), rank) for u in item.uses
            )
            results = self._fresh(len(item.results))
            self._place(dataclasses.replace(item, uses=uses, results=results, sliced=inside is not None), rank)
            self.copies[key] = results[position]
        return Use(self.copies[key], None if inside is not None else use.index)

    def _settle(self) -> None:
        """Move equations without weights to the block that reads them, where less is handed on then.

        The norm in front of a layer is computed from what the layer before returns, and would be handed on beside it.
        """
        readers: dict[Value, list[int]] = defaultdict(list)
        for n, item in enumerate(self.items):
            for use in item.uses:
                readers[use.value].append(n)
        results, copies = {use.value for use in self.outs}, set(self.copies.values())
        size = {v: nbytes(a) for item in self.items for v, a in zip(item.results, result_avals(item), strict=True)}
        for n in reversed(range(len(self.items))):
            item = self.items[n]
            users = [self.rank[m] for v in item.results for m in readers[v]]
            if item.step is not None or item.stack or self._blocks_below(item.path) or results & set(item.results):
                continue
            if not users or (target := min(users)) <= self.rank[n]:
                continue
            more = sum(
                size.get(v, 0)  # inputs of the program are at hand everywhere
                for v in {use.value for use in item.uses if use.value >= 0} - copies  # these can follow
                if max((self.rank[m] for m in readers[v] if m != n), default=-1) < target
            )
            if more <= sum(size[v] for v in item.results):
                self.rank[n] = target

    def schedule(self) -> Schedule:
        """Put what has been numbered into blocks."""
        self._settle()
        labels = {0: "the whole function", 1: "its results"}
        if self.names:
            first, *_, last = (*self.names, *self.names)
            labels = {rank: name for name, rank in self.names.items()}
            labels |= {0: f"before {first}", len(self.names) + 1: f"after {last}"}
        groups: dict[int, list[Item]] = defaultdict(list)
        for item, rank in zip(self.items, self.rank, strict=True):
            groups[rank].append(item)
        last_use: dict[Value, int] = {}
        for rank, items in groups.items():
            for item in items:
                for use in item.uses:
                    last_use[use.value] = max(rank, last_use.get(use.value, rank))
        for use in self.outs:
            last_use[use.value] = len(self.names) + 2
        blocks = []
        for rank in sorted(groups):
            items = groups[rank]
            made = {v for item in items for v in item.results}
            used = dict.fromkeys(use for item in items for use in item.uses if use.value >= 0)
            reads = tuple(use for use in used if use.value < self.n_inputs)
            takes = tuple(dict.fromkeys(u.value for u in used if u.value >= self.n_inputs and u.value not in made))
            gives = tuple(v for item in items for v in item.results if last_use.get(v, -1) > rank)
            sites: dict[str, None] = {}
            for item in items:
                if not item.stack:
                    step = None if item.step is None else (self.program.loop_at[item.path], item.step)
                    sites |= dict.fromkeys(self._sites_below(item.path, step))
            blocks.append(Block(labels[rank], tuple(items), reads, takes, gives, tuple(sites)))
        return Schedule(self.program, tuple(blocks), tuple(self.outs))


def sharing(program: Program, taps: Mapping[str, Any]) -> dict[str, str]:
    """Sites that look at the same activations in the same way: each with the first of them, whose statistics serve all.

    Args:
        program: the trace.
        taps: site -> what is gathered there.
    """
    first: dict[Any, str] = {}
    out = {}
    for site in program.sites:
        if site.name not in taps:
            continue
        key: Any = site.name
        read = program.analysis.reads[site.read]
        if site.op == "dot" and read.side is not None:
            eqn = _equation_at(program.jaxpr, site.path)
            axes, batch = eqn.params["dimension_numbers"]
            x = eqn.invars[1 - read.side]
            steps = tuple(i for _, i in site.slice) if program.slices[site.read].loops else ()
            sums = tuple(axes[1 - read.side]), tuple(batch[1 - read.side]), site.in_axes
            key = (site.path[:-1], x if isinstance(x, jex.Var) else id(x), sums, steps, taps[site.name])
        out[site.name] = first.setdefault(key, site.name)
    return out


def _equation_at(jaxpr: Any, path: Path) -> Any:
    """The equation at an address."""
    eqn = None
    for step in path:
        if isinstance(step, tuple):
            assert eqn is not None
            jaxpr = dict(sub_jaxprs(eqn.params))[step]
        else:
            eqn = open_jaxpr(jaxpr).eqns[step]
    return eqn


def result_avals(item: Item) -> list[Any]:
    """The abstract values of an item's results."""
    if item.stack:
        return [v.aval for v in item.eqn.outvars[-len(item.stack) :]]
    return [v.aval for v in (item.eqn if item.step is None else open_jaxpr(item.eqn.params["jaxpr"])).outvars]


def nbytes(aval: Any) -> int:
    """Bytes of an abstract array."""
    return math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 4)

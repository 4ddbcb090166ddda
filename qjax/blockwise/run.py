"""Quantizing a model block by block: gather, round, run on.

For each block in turn: its parameters are read, prepare passes that look at activations edit them, every batch runs
through it and what the recipe asks for is gathered, its weights are rounded, and every batch moves on to the next
block, through the rounded weights where a rounding wants later blocks to see them. Parameters, statistics and
activations of one block are alive at a time, besides what is already packed. Every block is kept on disk where
``resume`` names a folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from qjax.analysis.naming import LINEAR, SliceKey
from qjax.applying.leaves import begin_leaf
from qjax.applying.planning import Plan, plan_program
from qjax.applying.readers import readers_of, seen_states
from qjax.applying.static import constants_of, taps_of, with_constants
from qjax.applying.storage import LeafPlan
from qjax.blockwise.emit import Compiled, emit_block
from qjax.blockwise.finishing import Finisher, finish_block
from qjax.blockwise.join import joined
from qjax.blockwise.placing import placed, where
from qjax.blockwise.preparing import Smooth, own_slices, pass_taps, prepare_block
from qjax.blockwise.progress import Progress
from qjax.blockwise.schedule import Block, Schedule, blocks_of, sharing
from qjax.blockwise.tuning import tune_block
from qjax.calibration import State
from qjax.errors import DataError, QjaxError, warn
from qjax.lazy import Lazy
from qjax.passes import run_passes, split_passes
from qjax.passes.leaves import Leaves
from qjax.program import Program, Signature, trace_flat
from qjax.recipe import Recipe
from qjax.rewrite import Rewriter
from qjax.rewriting.taps import NONFINITE, Collector, Tap

Key = tuple[int, ...]
Pieces = dict[tuple[int, Key], Any]
"""(position of the leaf, positions along its key axes) -> that slice as stored."""

Figures = dict[int, dict[Key, float]]

Wanted = tuple[str, Mapping[str, Tap], Mapping[str, str]]
"""What a run through a block gathers: a word for it, taps by site, and for each site the one that gathers for it."""

HAND_ON: Wanted = ("hand on", {}, {})
"""Nothing: only what the block gives is needed."""


@dataclasses.dataclass(frozen=True, eq=False)
class Shaped:
    """The program for batches of one shape, in blocks."""

    schedule: Schedule
    taps: Mapping[str, Tap]
    quantized: Rewriter
    leaders: Mapping[str, str]

    @property
    def program(self) -> Program:
        """The trace."""
        return self.schedule.program


class BlockQuantizer:
    """One job.

    Args:
        fn: the float function.
        params: its parameters; `qjax.Lazy` leaves are read when their block is due.
        recipe: the recipe.
        batches: re-iterable argument tuples, checked already.
        rewriter: makes the quantized replay of a program.
        blocks: pattern of block names, or None.
        resume: folder for what is done, or None.
        donate: free each float leaf once all of it is packed.
        progress: called as ``progress(done, total, block name)``.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        params: Any,
        recipe: Recipe,
        batches: Callable[[], Iterator[tuple[Any, ...]]],
        rewriter: Callable[[Program], Rewriter],
        *,
        blocks: str | None = None,
        resume: str | Path | None = None,
        donate: bool = False,
        progress: Callable[[int, int, str], None] | None = None,
    ):
        self.fn, self.params, self.recipe, self.batches = fn, params, recipe, batches
        self.make_rewriter, self.pattern, self.progress = rewriter, blocks, progress
        self.resume, self.donate = resume, donate
        self.shaped: dict[Any, Shaped] = {}
        self.compiled = Compiled()
        self.cache: dict[Any, Callable[[Any, Any], Any]] = {}
        self.pieces: Pieces = {}
        self.figures: Figures = {}
        self.states: dict[str, State] = {}  # of weights that a later block reads too
        self.smooth: Smooth = {}
        self.notes: list[str] = []
        self.warned: set[str] = set()  # what the job has warned of

    # ------------------------------------------------------------------------------------------------ the program
    @cached_property
    def first(self) -> tuple[Any, ...]:
        """The first batch, which is the example."""
        batch = next(iter(self.batches()), None)
        if batch is None:
            raise DataError("there are no calibration batches; give at least one")
        return batch

    def shaped_for(self, batch: tuple[Any, ...]) -> tuple[Shaped, list[Any]]:
        """The program for a batch, and the batch's arrays."""
        signature, arrays = Signature.of(self.params, batch, {})
        key = (signature, tuple((a.shape, str(a.dtype)) for a in arrays[signature.n_params :]))
        if key not in self.shaped:
            program = trace_flat(self.fn, signature, arrays)
            schedule = blocks_of(program, self.pattern)
            if self.shaped:
                known = next(iter(self.shaped.values())).schedule
                if [b.name for b in known.blocks] != [b.name for b in schedule.blocks]:
                    raise DataError(
                        "batches of different shapes run different blocks: "
                        f"{[b.name for b in known.blocks]} and {[b.name for b in schedule.blocks]}"
                    )
            taps = taps_of(self.recipe.decide(program.sites, strict=not self.shaped))
            self.shaped[key] = Shaped(schedule, taps, self.make_rewriter(program), sharing(program, taps))
        return self.shaped[key], arrays[signature.n_params :]

    @cached_property
    def plan(self) -> Plan:
        """What becomes of each leaf."""
        return plan_program(self.shaped_for(self.first)[0].program, self.recipe)

    @cached_property
    def passes(self) -> tuple[list[Any], list[Any]]:
        """The recipe's prepare passes: those that look at no activations, and those that do."""
        return split_passes(self.recipe.prepare)

    @cached_property
    def chosen(self) -> list[str]:
        """Names of the sites whose weights are quantized."""
        return [name for name, d in self.plan.decisions.items() if d.weights is not None and not d.skip]

    def chosen_in(self, number: int) -> list[str]:
        """Those of a block that passes can look at and edit: linear products."""
        inside = set(self.shaped_for(self.first)[0].schedule.blocks[number].sites)
        return [n for n in self.chosen if n in inside and self.plan.program.by_name[n].op in LINEAR]

    def own(self, number: int) -> Callable[[str, SliceKey], bool]:
        """Whether a slice of a leaf is read by a block and by no other."""
        return own_slices(self.plan.program, [shaped.schedule for shaped in self.shaped.values()], number)

    def gathered(self, number: int, live: list[dict[int, Any]], what: str, step: Any) -> dict[str, State]:
        """What a pass asks for, at the chosen sites of a block that some batch reached."""
        chosen = self.chosen_in(number)
        taps = pass_taps(step, chosen)
        leaders = sharing(self.plan.program, taps)
        states = self.observe(number, live, (what, taps, leaders))[0]
        return {name: states[leaders[name]] for name in chosen if leaders[name] in states}

    @cached_property
    def leaves(self) -> Leaves:
        """The parameter leaves in program order, after the passes that look at no activations."""
        signature, arrays = Signature.of(self.params, (), {})
        program = self.plan.program
        values, self.notes = run_passes(self.passes[0], program, arrays[: signature.n_params], self.chosen)
        return Leaves(program.leaf_names, values)

    @cached_property
    def due(self) -> list[list[tuple[int, Key]]]:
        """For each block, the slices of leaves whose last reader it is."""
        schedule = self.shaped_for(self.first)[0].schedule
        last = {site: n for n, block in enumerate(schedule.blocks) for site in block.sites}
        when: dict[tuple[int, Key], int] = {}
        names = {site.name: site.name for site in schedule.program.sites}
        for position, slices in seen_states(schedule.program, self.plan.leaves, names).items():
            for key, readers in slices.items():
                when[position, key] = max(last[name] for name in readers.values())
        out: list[list[tuple[int, Key]]] = [[] for _ in schedule.blocks]
        for (position, key), block in when.items():
            if self.plan.leaves[position].slices[key].fmt is not None:
                out[block].append((position, key))
        return out

    # -------------------------------------------------------------------------------------------------- the job
    def run(self) -> tuple[Plan, list[Any], Figures, list[str]]:
        """Quantize all blocks: the plan, the stored leaves, their SQNR, and notes for the report."""
        example, _ = self.shaped_for(self.first)
        blocks = example.schedule.blocks
        self.warn_of_passes()
        done = Progress.open(self.resume, self._job(blocks)) if self.resume is not None else None
        live: list[dict[int, Any]] = [{} for _ in self.batches()]
        exact = [dict(values) for values in live]  # in float throughout, where roundings are trained towards it
        for number, block in enumerate(blocks):
            kept = done.load(number, block.name) if done is not None else None
            # What is handed on in float is computed before passes edit the block, and so alike when a job goes on.
            floats = not self.recipe.sequential and (kept is not None or bool(self.passes[1]))
            after = self.observe(number, live, HAND_ON if self.passes[1] else None, True)[1] if floats else []
            targets = self.observe(number, exact, HAND_ON, True)[1] if self.tunes else []
            if kept is not None:
                pieces, figures, edited, notes = kept
                for (position, key), value in edited.items():
                    self.leaves.put(position, key, value)
            else:
                edited, notes = prepare_block(self, number, live)
                states, outs = self.observe(number, live, hands_on=not self.recipe.sequential and not floats)
                after = after if floats else outs
                finisher = finish_block(self, number, live)
                pieces, figures = self.round(number, states, tune_block(self, number, live, targets), finisher)
                edited, notes = {**edited, **finisher.edited}, notes + finisher.notes()
                if done is not None:
                    done.save(number, block.name, pieces, figures, edited, notes)
            self.pieces |= pieces
            self.notes += notes
            for position, found in figures.items():
                self.figures.setdefault(position, {}).update(found)
            live = self.advance(number, live, after)
            exact = self.handed(number, exact, targets) if self.tunes else exact
            if self.donate:
                self.free(number)
            if self.progress is not None:
                self.progress(number + 1, len(blocks), block.name)
        roundings = {s.rounding for leaf in self.plan.leaves.values() for s in leaf.slices.values() if s.rounding}
        notes = [f"weights rounded by {rounding!r}" for rounding in sorted(roundings, key=repr)]
        notes += [_said_of([block.name for block in blocks]), *self.notes]
        return self.plan, self.stored(), self.figures, notes

    def warn_of_passes(self) -> None:
        """Warn of prepare passes that do no good to the sites that they are given."""
        linear = [name for name in self.chosen if self.plan.program.by_name[name].op in LINEAR]
        for step in self.passes[1]:
            misplaced = getattr(step, "misplaced", None)
            said = misplaced({name: self.plan.decisions[name] for name in linear}) if misplaced is not None else ""
            if said:
                warn(said)

    def _job(self, blocks: Sequence[Block]) -> dict[str, Any]:
        """What a folder of finished blocks belongs to."""
        from qjax.checkpoint.folded import update_digest, update_with_sample

        program = self.shaped_for(self.first)[0].program
        digest, weights = hashlib.sha256(), hashlib.sha256()
        for batch in self.batches():
            update_digest(digest, batch)
        for leaf in self.leaves.values:
            update_with_sample(weights, leaf)
        return {
            "parameters": weights.hexdigest(),
            "recipe": self.recipe.hash,
            "program": hashlib.sha256(str(program.jaxpr).encode()).hexdigest(),
            "batches": digest.hexdigest(),
            "blocks": [block.name for block in blocks],
        }

    def free(self, number: int) -> None:
        """Give up the float leaves that are packed and that no later block reads."""
        blocks = [b for shaped in self.shaped.values() for b in shaped.schedule.blocks[number + 1 :]]
        later = {use.value for block in blocks for use in block.reads}
        for position, plan in self.plan.leaves.items():
            leaf = self.leaves.values[position]
            packed = all((position, key) in self.pieces for key in plan.slices)  # a float slice is still to be copied
            if packed and position not in later and isinstance(leaf, jax.Array) and not leaf.is_deleted():
                jax.block_until_ready([self.pieces[position, key] for key in plan.slices])
                leaf.delete()

    def reads(self, block: Block, arrays: Sequence[Any], cache: dict[Any, Any], quantized: bool = False) -> list[Any]:
        """The inputs of a block: parameters (read once for all batches) and arguments of a batch."""
        n = len(self.leaves)
        out = []
        for use in block.reads:
            if use.value >= n:
                argument = arrays[use.value - n]
                out.append(argument if use.index is None else argument[use.index])
                continue
            key = (use.value, use.index, quantized)
            if key not in cache:
                cache[key] = self.parameter(use.value, use.index, quantized)
            out.append(cache[key])
        return out

    def parameter(self, position: int, index: int | None, quantized: bool) -> Any:
        """A parameter leaf, or a slice of its leading axis: as stored where it is packed already, else in float."""
        plan = self.plan.leaves.get(position)
        if quantized and plan is not None:
            if index is None or plan.key_axes[:1] != (0,):
                keys = list(plan.slices)
            else:
                keys = [key for key in plan.slices if key[0] == index]
            packed = {key: self.pieces[position, key] for key in keys if (position, key) in self.pieces}
            floats = [key for key in keys if plan.slices[key].fmt is None]
            if packed and len(packed) + len(floats) == len(keys):
                for key in floats:
                    packed[key] = self.float_slice(position, plan, key)
                whole = joined(plan, packed)
                return whole if index is None or plan.key_axes[:1] != (0,) else whole.index_stack(0, 0)
            if packed:  # some layers of a stack that is read whole: the rest is still to come
                value = jnp.asarray(self.leaves.at(position))
                for key, piece in packed.items():
                    value = value.at[where(plan, key, value.ndim)].set(piece.dequantize())
                return value if index is None else value[index]
        return jnp.asarray(self.leaves.at(position) if index is None else self.leaves.part(position, ((0, index),)))

    def float_slice(self, position: int, plan: LeafPlan, key: Key) -> Any:
        """A slice of a float leaf, its key axes kept with size 1."""
        at = tuple(zip(plan.key_axes, key, strict=True))
        return jnp.expand_dims(jnp.asarray(self.leaves.part(position, at)), plan.key_axes)

    def observe(
        self,
        number: int,
        live: list[dict[int, Any]],
        wanted: Wanted | None = None,
        hands_on: bool = False,
    ) -> tuple[dict[str, State], list[list[Any]]]:
        """Run every batch through a float block: what was gathered, and what the block gives, by batch.

        Args:
            number: of the block.
            live: what it takes, by batch.
            wanted: what is gathered; None for what the recipe asks for.
            hands_on: whether what the block gives is needed.
        """
        states: dict[str, State] = {}
        after: list[list[Any]] = []
        cache: dict[Any, Any] = {}
        for at, batch in enumerate(self.batches()):
            shaped, arrays = self.shaped_for(batch)
            block = shaped.schedule.blocks[number]
            args = (self.reads(block, arrays, cache), [live[at][v] for v in block.takes])
            what, all_taps, leaders = wanted or ("observe", shaped.taps, shaped.leaders)
            taps = {name: all_taps[name] for name in block.sites if leaders.get(name) == name}
            if not taps and not hands_on:
                after.append([])
                continue

            def observed(
                args: Any,
                states: Any,
                shaped: Shaped = shaped,
                block: Block = block,
                taps: Mapping[str, Tap] = taps,
            ) -> Any:
                collector = Collector(shaped.program, taps, before=states)
                with collector.collecting() as taken:
                    outs = emit_block(collector, block, *args)
                found = collector.by_site(taken)
                apart = (set(found) & set(states)) - collector.continued
                merged = {n: taps[n].merge(states[n], s) if n in apart else s for n, s in found.items()}
                return outs if hands_on else [], {**states, **merged}

            outs, states = self.call(f"{what} {hands_on}", number, shaped, observed, args, states)
            after.append(outs)
            bad = [name for name in block.sites if name in states and float(states[name][NONFINITE])]
            if bad:
                raise DataError(
                    f"batch {at}: NaN or infinity among the inputs of {bad[0]}; look at that batch, or at what comes "
                    "before the site"
                )
        return states, after

    def advance(self, number: int, live: list[dict[int, Any]], after: list[list[Any]]) -> list[dict[int, Any]]:
        """What later blocks take, after this one; ``after`` is what it gives in float, by batch."""
        if not self.recipe.sequential:
            return self.handed(number, live, after)
        cache: dict[Any, Any] = {}
        gives = []
        for at, batch in enumerate(self.batches()):
            shaped, arrays = self.shaped_for(batch)
            block = shaped.schedule.blocks[number]
            args = (self.reads(block, arrays, cache, quantized=True), [live[at][v] for v in block.takes])

            def quantized(args: Any, _: Any, shaped: Shaped = shaped, block: Block = block) -> Any:
                return emit_block(shaped.quantized, block, *args)

            gives.append(self.call("advance", number, shaped, quantized, args))
        return self.handed(number, live, gives)

    def handed(self, number: int, live: list[dict[int, Any]], after: list[list[Any]]) -> list[dict[int, Any]]:
        """The values that later blocks take, by batch, once a block has given its own."""
        out = []
        for at, batch in enumerate(self.batches()):
            blocks = self.shaped_for(batch)[0].schedule.blocks
            block, gives = blocks[number], after[at]
            later = {v for b in blocks[number + 1 :] for v in b.takes}
            values = {**live[at], **dict(zip(block.gives, gives, strict=True))}
            live[at] = {}
            out.append({v: a for v, a in values.items() if v in later})
        return out

    def call(
        self, what: str, number: int, shaped: Shaped, function: Callable[..., Any], args: Any, given_up: Any = ()
    ) -> Any:
        """Call a function of a block, compiled once for all blocks and batches that are alike."""
        key = (what, number, id(shaped), _types((args, given_up)))
        if key not in self.cache:
            self.cache = {k: v for k, v in self.cache.items() if k[1] == number}  # those of earlier blocks are done
            self.cache[key] = self.compiled(function, args, given_up)
        return self.cache[key](args, given_up)

    @cached_property
    def tunes(self) -> bool:
        """Whether some rounding is trained on the outputs of blocks."""
        return any(getattr(rule.rounding, "tunes", False) for rule in self.recipe.rules)

    def round(
        self,
        number: int,
        states: dict[str, State],
        tuned: Mapping[tuple[int, Key], Any],
        finisher: Finisher,
    ) -> tuple[Pieces, Figures]:
        """Round the weights that are due after a block; statistics are given up as soon as they have served."""
        program, plan = self.plan.program, self.plan
        shaped, _ = self.shaped_for(self.first)
        taps, leaders = shaped.taps, shaped.leaders
        self.states |= states
        states.clear()
        left: dict[str, int] = {}  # site -> slices that its statistics are still needed for
        for later in self.due[number:]:
            for position, key in later:
                for name in readers_of(program, plan.leaves[position], key):
                    leader = leaders.get(name, name)
                    left[leader] = left.get(leader, 0) + 1
        pieces: Pieces = {}
        figures: Figures = {}
        for position, key in self.due[number]:
            leaf = plan.leaves[position]
            readers = readers_of(program, plan.leaves[position], key)
            ready = {
                name: self.states[leaders[name]] for name in readers if name in taps and leaders[name] in self.states
            }
            constants = constants_of({name: plan.decisions[name] for name in ready}, ready)
            seen = seen_states(program, {position: leaf}, ready).get(position, {})
            value = self.float_slice(position, leaf, key)
            factors = {key: self.smooth.pop((position, key))} if (position, key) in self.smooth else None
            piece, wait = begin_leaf(leaf, value, {}, seen, [key], factors, tuned.get((position, key)), self.warned)
            self.leaves.forget(position, tuple(zip(leaf.key_axes, key, strict=True)))
            piece = placed(piece, value)
            finisher.rounded(leaf, key, readers, value, piece)
            positions = dict(zip(leaf.key_axes, ([k] for k in key), strict=True))
            pieces[position, key] = with_constants(program, leaf, piece, constants, positions)
            figures.setdefault(position, {}).update(wait())
            for name in readers:
                left[leaders.get(name, name)] -= 1
            del ready, seen
            self.states = {name: state for name, state in self.states.items() if left.get(name)}
        return pieces, figures

    def stored(self) -> list[Any]:
        """All leaves as stored; what the job held of them is given up."""
        out: list[Any] = []
        for position in range(len(self.leaves)):
            plan = self.plan.leaves.get(position)
            if plan is None:
                leaf = self.leaves.at(position)
                out.append(jnp.asarray(leaf) if isinstance(leaf, Lazy) else leaf)
                continue
            keys = list(plan.slices)
            parts = {
                key: self.pieces.pop((position, key))
                if (position, key) in self.pieces
                else self.float_slice(position, plan, key)
                for key in keys
            }
            missing = [key for key in keys if plan.slices[key].fmt is not None and not hasattr(parts[key], "fmt")]
            if missing:
                raise QjaxError(f"{plan.name}{list(missing[0])} was not reached by any block; this is a bug in qjax")
            out.append(joined(plan, parts))
        return out


def _said_of(names: Sequence[str]) -> str:
    """A note on the blocks of a job."""
    if len(names) == 1:
        return f"quantized in one block: {names[0]}"
    shown = [*names[:2], "…", *names[-2:]] if len(names) > 6 else names
    return f"quantized in {len(names)} blocks, one after the other: {', '.join(shown)}"


def _types(args: Any) -> Any:
    leaves, tree = jax.tree.flatten(args)
    return tree, tuple((a.shape, str(a.dtype)) for a in leaves)

"""Running a search over a program: unit after unit, each kept on disk when it is done.

The model stays in float while it is searched, so a unit depends on no other and a killed job goes on where it was. When
all units are done, what was found becomes edits of parameters, scales of weights and inputs, and a recipe with one rule
for each site, from which `qjax.quantize` makes the model as from any other.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax._compat import consts_of
from qjax.applying.storage import check_decisions
from qjax.checkpoint.folded import update_digest, update_with_sample
from qjax.checkpoint.parts import load_part, open_job, save_part
from qjax.errors import DataError, RecipeError
from qjax.lazy import Lazy
from qjax.passes.adalog import Found
from qjax.passes.folding import weight_matrix
from qjax.passes.leaves import Leaves
from qjax.passes.units import AttentionUnit, LinearUnit, find_units
from qjax.program import Program, Signature, trace_flat
from qjax.recipe import Recipe
from qjax.settling.capture import capture, separable, values_of
from qjax.settling.cuts import Block, blocks_of_units
from qjax.settling.reconstruct import check_examples, passed_on, reconstructed
from qjax.settling.results import Outcome, moved_channels, settle_attention, settle_linear

FEWEST = 8
"""Examples below which nothing is searched."""

MEMORY = 1 << 30
"""Bytes of captured activations that are held at a time, where one unit does not need more."""


@dataclasses.dataclass(frozen=True, eq=False)
class Settled:
    """What a search has made of a recipe.

    Attributes:
        leaves: the parameter leaves, edited.
        recipe: with a rule for each site.
        scales: site -> scale and zero point of its weight.
        constants: site -> scale and zero point of its inputs.
        notes: for the report.
    """

    leaves: list[Any]
    recipe: Recipe
    scales: dict[str, Any]
    constants: dict[str, Any]
    notes: tuple[str, ...]


def settle(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[tuple[Any, ...]],
    *,
    recipe: Recipe,
    resume: str | Path | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Settled:
    """Search the formats and scales of a recipe with ``settle``.

    Args:
        fn, params: the function and its float parameters.
        batches: argument tuples, all of one structure; their leading axes are examples.
        recipe: says which sites, how many bits, and which search.
        resume: a folder in which finished units are kept.
        progress: called as ``progress(done, total, name)``.

    Raises:
        RecipeError: a site that the search cannot serve.
        DataError: fewer than 8 examples, NaN among activations, or batches that the function or the search cannot take.
    """
    given = list(batches)
    count = sum(_examples(args) for args in given)
    if count < FEWEST:
        raise DataError(
            f"{count} calibration examples were given, and {type(recipe.settle).__name__} needs {FEWEST} or more "
            "(32 is the usual number): scales would follow single images"
        )
    views = _views(fn, params, given, recipe)
    view_of = {view.key: view for view in views}
    first = views[0]
    leaves = Leaves(first.program.leaf_names, first.leaves)
    if any(isinstance(a, Lazy) for a in first.leaves):
        raise RecipeError(f"{type(recipe.settle).__name__} runs the whole model: read the parameters into memory first")
    kept = None if resume is None else _opened(resume, recipe, first.leaves, given)

    every: list[Found] = []
    blocks, stepped = [], first
    if getattr(recipe.settle, "reconstruct", 0):
        if len(views) > 1:
            raise DataError("reconstruction mixes examples of all batches: give batches of one shape")
        blocks = first.blocks()
        stepped = _stepped(fn, params, given[0], first, min(recipe.settle.batch, count), recipe)
    total = len(first.units) + len(blocks)
    for members in first.groups(MEMORY // max(count // max(first.examples, 1), 1)):
        found = {n: _kept(kept, n, first.units[n].name) for n in members}
        missing = [n for n in members if found[n] is None]
        data = _captured(view_of, given, missing)
        for n in members:
            unit = first.units[n]
            if found[n] is None:
                weights = None
                if isinstance(unit, LinearUnit):
                    matrices = [np.asarray(weight_matrix(first.program, leaves, s), np.float32) for s in unit.sites]
                    weights = np.concatenate(matrices)
                found[n] = recipe.settle.settled(unit, data.pop(n), weights)
                if kept is not None:
                    save_part(kept / "blocks" / f"{n:04d}", dict(found[n] or {}), {"unit": unit.name})
            every.append(found[n] or {})
            if progress is not None:
                progress(n + 1, total, unit.name)
    notes = [
        moved_channels(first.program, leaves, unit, found)
        for unit, found in zip(first.units, every, strict=True)
        if isinstance(unit, LinearUnit)
    ]
    notes += _reconstruct(first, stepped, given, leaves, every, blocks, recipe.settle, kept, progress, total)
    outcomes = [
        _outcome(first.program, leaves, unit, recipe, found) for unit, found in zip(first.units, every, strict=True)
    ]
    for outcome in outcomes:
        for number, key, value in outcome.edits:
            leaves.put(number, key, value)
    skips = [rule for rule in recipe.rules if rule.skip]
    skips = [dataclasses.replace(rule, optional=True) for rule in skips]
    rules = [rule for outcome in outcomes for rule in outcome.rules]
    return Settled(
        [leaves[name] for name in leaves],
        Recipe([*rules, *skips], name=recipe.name),
        {site: aux for outcome in outcomes for site, aux in outcome.scales.items()},
        {site: aux for outcome in outcomes for site, aux in outcome.constants.items()},
        tuple(filter(None, notes)) + first.notes,
    )


def _reconstruct(
    first: _View,
    stepped: _View,
    batches: Sequence[tuple[Any, ...]],
    leaves: Leaves,
    found: list[Found],
    blocks: Sequence[Block],
    settings: Any,
    kept: Path | None,
    progress: Callable[[int, int, str], None] | None,
    total: int,
) -> list[str]:
    """Train the blocks one after the other: ``leaves`` and ``found`` are changed.

    ``first`` is the program at the shapes of the batches, ``stepped`` the same at those of a step of the training.
    """
    if not blocks:
        return []
    notes = [
        "SQNR of weights that reconstruction has trained is against the trained ones, which their codes say exactly: "
        "judge them by what the model puts out"
    ]
    if settings.batch > (count := stepped.examples):
        notes.append(f"reconstruction: batch={settings.batch}, but there are {count} examples; each step takes all")
    arrays = [Signature.of((), args, {})[1] for args in batches]
    values = list(first.leaves)  # the float model, as it was
    carried: list[jax.Array] | None = None  # what the blocks before put out, if that is what a block is trained on
    for n, (block, same) in enumerate(zip(blocks, stepped.blocks(), strict=True)):
        mine = [stepped.units[u] for u in same.units]
        at = len(first.units) + n
        done = None if kept is None else load_part(kept / "blocks" / f"{at:04d}")
        if done is None or done[1]["unit"] != block.name:
            whole = _flowing(first, [*block.inputs, *block.outputs], values, arrays)
            data = carried or whole[: len(block.inputs)], whole[len(block.inputs) :]
            weights, new, losses = reconstructed(
                stepped.program, stepped.level, same, mine, [found[u] for u in same.units], leaves, data,
                stepped.examples, settings,
            )  # fmt: skip
            held = {f"leaf|{name}": value for name, value in weights.items()}
            held |= {f"{u}|{key}": a for u, f in zip(block.units, new, strict=True) for key, a in f.items()}
            said = {"unit": block.name, "losses": [float(x) for x in losses]}
            if kept is not None:
                save_part(kept / "blocks" / f"{at:04d}", held, said)
            done = held, said
        for label, value in done[0].items():
            where, _, key = label.partition("|")
            if where == "leaf":
                number = leaves.number[key]
                leaves.put(number, (), jnp.asarray(np.asarray(value), leaves.values[number].dtype))
            else:
                found[int(where)][key] = np.asarray(value)
        if settings.block_inputs == "quantized":
            if carried is None:  # the first block: the arguments themselves
                carried = _flowing(first, block.inputs, values, arrays)
            state = [found[u] for u in same.units]
            carried = passed_on(
                stepped.program, stepped.level, same, mine, state, leaves, carried, stepped.examples, settings
            )
        before, after = done[1]["losses"]
        notes.append(f"{block.name}: reconstructed, error of its output {before:.3g} before, {after:.3g} after")
        if progress is not None:
            progress(at + 1, total, block.name)
    return notes


def _views(fn: Callable[..., Any], params: Any, batches: Sequence[tuple[Any, ...]], recipe: Recipe) -> list[_View]:
    """A view for each shape among the batches."""
    first, *others = _by_shape(batches)
    views = [_View(fn, params, first, recipe)]
    for args in others:
        try:
            views.append(_View(fn, params, args, recipe))
        except (TypeError, ValueError) as error:
            number = next(n for n, each in enumerate(batches) if _shapes(each) == _shapes(args))
            raise DataError(
                f"batch {number}, of shapes {_said(args)}, cannot be run, and batch 0, of shapes {_said(first)}, can: "
                f"{_line(error)}. Give images of one size, as the model takes them"
            ) from error
    return views


def _stepped(
    fn: Callable[..., Any], params: Any, args: tuple[Any, ...], first: _View, size: int, recipe: Recipe
) -> _View:
    """The view at so many examples as a step of the training has, whose blocks begin with examples."""
    view = first
    if size != first.examples:  # shapes are part of a trace: a step of other size needs one of its own
        resized = _resized(args, size)
        try:
            view = _View(fn, params, resized, recipe)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"a step of reconstruction has {size} examples, arguments of shapes {_said(resized)}, and the function "
                f"cannot be run with them: {_line(error)}. Put examples first in every argument, or leave out "
                "reconstruct"
            ) from error
    for block in view.blocks():
        check_examples(block, (*block.inputs, *block.outputs), size)
    return view


def _said(args: tuple[Any, ...]) -> str:
    return ", ".join(str(list(np.shape(a))) for a in jax.tree.leaves(args))


def _line(error: BaseException) -> str:
    """The first line of what an error says, without its full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _flowing(
    view: _View, wanted: Sequence[Any], leaves: Sequence[Any], batches: Sequence[Sequence[Any]]
) -> list[jax.Array]:
    """Values of the float model, of all examples."""
    flow = jax.jit(lambda *a: values_of(view.program, view.level, list(wanted), a))
    parts = [flow(*leaves, *a) for a in batches]
    return [jnp.concatenate(each) for each in zip(*parts, strict=True)]


class _View:
    """The program at the shapes of one batch, and its units."""

    def __init__(self, fn: Callable[..., Any], params: Any, args: tuple[Any, ...], recipe: Recipe):
        signature, arrays = Signature.of(params, args, {})
        self.key, self.signature = _shapes(args), signature
        self.leaves, self.examples = arrays[: signature.n_params], _examples(args)
        self.program = trace_flat(fn, signature, arrays)
        decisions = recipe.decide(self.program.sites)
        check_decisions(self.program, decisions, settles=True)
        self.level, units = find_units(self.program, decisions)
        notes, self.units = [], []
        for unit in units:
            why = separable(unit) if isinstance(unit, AttentionUnit) else ""
            if why:
                notes.append(f"{unit.name}: its operands stay float: {why}")
                continue
            notes += [f"{unit.name}: {note}" for note in unit.notes]
            self.units.append(unit)
        self.notes = tuple(notes)
        self._jitted: dict[tuple[int, ...], Any] = {}

    def blocks(self) -> list[Block]:
        """The blocks of the program."""
        parameters = len(consts_of(self.program.jaxpr)) + len(self.program.leaf_names)
        return blocks_of_units(self.level, self.units, parameters)

    def groups(self, limit: int) -> list[list[int]]:
        """Units in program order, so many at a time as stay below ``limit`` bytes for one batch."""
        shapes = jax.eval_shape(
            lambda *arrays: capture(self.program, self.level, self.units, arrays), *self.program.jaxpr.in_avals
        )
        out: list[list[int]] = [[]]
        held = 0
        for n, parts in enumerate(shapes):
            size = sum(4 * part.size for part in parts)
            if out[-1] and held + size > limit:
                out.append([])
                held = 0
            out[-1].append(n)
            held += size
        return out

    def capture(self, members: tuple[int, ...], args: tuple[Any, ...]) -> list[tuple[np.ndarray, ...]]:
        """The data of units in one batch."""
        if members not in self._jitted:
            units = [self.units[n] for n in members]
            self._jitted[members] = jax.jit(lambda *arrays: capture(self.program, self.level, units, arrays))
        _, arrays = Signature.of((), args, {})
        got = self._jitted[members](*self.leaves, *arrays)
        return [tuple(np.asarray(a) for a in parts) for parts in got]


def _captured(
    views: dict[Any, _View], batches: Sequence[tuple[Any, ...]], members: Sequence[int]
) -> dict[int, tuple[np.ndarray, ...]]:
    if not members:
        return {}
    rows: list[list[tuple[np.ndarray, ...]]] = [[] for _ in members]
    for number, args in enumerate(batches):
        view = views[_shapes(args)]
        for at, parts in enumerate(view.capture(tuple(members), args)):
            if not all(np.isfinite(a).all() for a in parts):
                raise DataError(
                    f"batch {number}: NaN or infinity among the inputs of {view.units[members[at]].name}; look at that "
                    "batch, or at what comes before the site"
                )
            rows[at].append(parts)
    out = {}
    for n, parts in zip(members, rows, strict=True):
        try:
            out[n] = tuple(np.concatenate(pieces) for pieces in zip(*parts, strict=True))
        except ValueError:
            raise DataError(
                "calibration batches differ in length, and operands of attentions of different lengths cannot be "
                "searched together; give batches of one length"
            ) from None
    return out


def _outcome(program: Program, leaves: Leaves, unit: Any, recipe: Recipe, found: dict[str, np.ndarray]) -> Outcome:
    if isinstance(unit, LinearUnit):
        return settle_linear(program, leaves, unit, found, getattr(recipe.settle, "zero", "mask"))
    return settle_attention(unit, found)


def _kept(folder: Path | None, number: int, name: str) -> dict[str, np.ndarray] | None:
    found = None if folder is None else load_part(folder / "blocks" / f"{number:04d}")
    if found is None or found[1]["unit"] != name:
        return None
    return {key: np.asarray(value) for key, value in found[0].items()}


def _opened(path: str | Path, recipe: Recipe, leaves: Sequence[Any], batches: Sequence[Any]) -> Path:
    weights, data = hashlib.sha256(), hashlib.sha256()
    for leaf in leaves:
        update_with_sample(weights, leaf)
    for batch in batches:
        update_digest(data, batch)
    job = {"recipe": recipe.hash, "parameters": weights.hexdigest(), "batches": data.hexdigest()}
    return open_job(path, job, "quantization")


def _examples(args: tuple[Any, ...]) -> int:
    first = next((a for a in jax.tree.leaves(args) if getattr(a, "ndim", 0)), None)
    return 0 if first is None else int(first.shape[0])


def _shapes(args: tuple[Any, ...]) -> Any:
    leaves, tree = jax.tree.flatten(args)
    return tree, tuple((np.shape(a), str(getattr(a, "dtype", ""))) for a in leaves)


def _resized(args: tuple[Any, ...], size: int) -> tuple[Any, ...]:
    """Arguments of so many examples, for their shapes: those that there are, over and over."""
    count = _examples(args)

    def longer(a: Any) -> Any:
        return np.take(np.asarray(a), np.arange(size) % count, axis=0) if np.shape(a)[:1] == (count,) else a

    return jax.tree.map(longer, args)


def _by_shape(batches: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return list({_shapes(args): args for args in reversed(batches)}.values())[::-1]

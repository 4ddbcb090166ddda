"""How much each group of sites minds each choice, measured.

    kl       KL divergence of the outputs to those of the float model with only this group quantized, in nats a
             prediction (or another score): the model is run once for every group and choice
    fisher   1/2 sum F (w - q)², F the diagonal of the Fisher matrix per prediction: the second order of kl without
             the interplay of weights, in the same units; one pass with gradients in all
    output   error of the group's outputs over their size, sum (w - q) H (w - q)ᵀ / sum w H wᵀ with H the second
             moment of the inputs: one pass in all; says nothing of what comes behind, so it ranks the choices of a
             layer and not layers

A choice with float activations changes weights alone, so the function is compiled once and run with one group's weights
replaced by what the choice stores of them. A choice that quantizes activations makes another program for every group.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.checkpoint.folded import update_digest, update_with_sample
from qjax.checkpoint.lines import add_lines, read_lines
from qjax.checkpoint.parts import open_job
from qjax.errors import DataError, SearchError
from qjax.evaluate import logit_divergence
from qjax.formats import is_quantized
from qjax.formats.qarray import canonical_matrix
from qjax.lazy import Lazy
from qjax.observed import argument_tuples, calibrate
from qjax.program import Program, Signature, trace_flat
from qjax.recipe import Decision, Recipe, Rule
from qjax.search.groups import FLOAT, Group, Slice, find_groups, resolve_choices, rules_of
from qjax.search.sensitivity import MEASURES, Part, Row, Sensitivities
from qjax.sources import Dynamic, Static
from qjax.statistics import SecondMoment
from qjax.transforms import quantize
from qjax.trees import is_array

KEPT_OUTPUTS = 2**30
"""Bytes of float outputs that are kept; beyond that they are computed again for every measurement."""

Score = Callable[[Any, Any], tuple[float, int]]
"""(outputs of the float model, outputs of the quantized one) -> (mean loss, number of predictions)."""


def kl_score(reference: Any, outputs: Any) -> tuple[float, int]:
    """The mean KL divergence of logits [..., classes], in nats, and the number of predictions."""
    found = logit_divergence(reference, outputs)
    return found.kl, found.count


def sensitivities(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    choices: Mapping[str, Any] | Sequence[Any],
    *,
    by: Sequence[str] | str = ("kl",),
    tie: Sequence[Sequence[str]] = (),
    score: Score = kl_score,
    resume: str | Path | None = None,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Sensitivities:
    """Measure how much each group of sites minds each choice.

    Args:
        fn: any JAX function ``fn(params, *args)``.
        params: its float parameters, in memory; with ``by=()`` they may be `qjax.Lazy`.
        batches: argument tuples, as `qjax.calibrate` takes them. Recipes that need data are calibrated on them too.
        choices: recipes by name, or a list of presets. "float" is always a choice, with loss 0.
        by: what to measure, some of "kl", "output", "fisher"; () measures nothing and gives sizes alone.
        tie: sets of segments of site names whose sites share a format, as ``[("q_proj", "k_proj", "v_proj")]``.
        score: what "kl" measures, for functions whose outputs are no logits.
        resume: a folder in which every measurement is kept: a job that was killed goes on from there.
        seed: of the labels that "fisher" draws from the model's own predictions.
        progress: called as ``progress(done, total, what)``.

    Returns:
        Losses and sizes, for `qjax.search.assign`.

    Raises:
        SearchError: nothing to choose, measures that are not known, parameters that are quantized or lazy.
        DataError: batches that cannot be used.
        CheckpointError: ``resume`` is the folder of another job.
    """
    wanted = (by,) if isinstance(by, str) else tuple(by)
    for name in wanted:
        if name not in MEASURES:
            raise SearchError(f"by={name!r}; what can be measured is {', '.join(MEASURES)}")
    if any(is_quantized(leaf) for leaf in jax.tree.leaves(params, is_leaf=is_quantized)):
        raise SearchError("these parameters are quantized already; pass the float parameters")
    if wanted and any(isinstance(leaf, Lazy) for leaf in jax.tree.leaves(params)):
        raise SearchError(
            "these parameters are read from disk when they are needed, and a search runs the whole function for every "
            "group and choice: load them without lazy=True, in dtype=jnp.bfloat16 where float32 is too much for memory "
            "(by=() gives the sizes without running anything)"
        )
    recipes = resolve_choices(choices)
    first = next(argument_tuples(batches), None)
    if first is None:
        raise DataError("there are no batches; give at least one")
    signature, arrays = Signature.of(params, first, {})
    program = trace_flat(fn, signature, arrays)
    groups, decisions = find_groups(program, recipes, tie)
    job = Job(fn, params, batches, recipes, program, groups, decisions, score, seed, progress, wanted)
    kept = _Kept(resume, job) if resume is not None else None
    losses = job.run(kept)
    return _assembled(job, losses)


@dataclasses.dataclass
class Job:
    """What is measured on: a function, its parameters, batches, and what there is to choose."""

    fn: Callable[..., Any]
    params: Any
    batches: Iterable[Any]
    recipes: dict[str, Recipe]
    program: Program
    groups: tuple[Group, ...]
    decisions: dict[str, dict[str, Decision]]
    score: Score
    seed: int
    progress: Callable[[int, int, str], None] | None
    wanted: tuple[str, ...]
    predictions: int = 0

    @functools.cached_property
    def ops(self) -> dict[str, str]:
        return {site.name: site.op for site in self.program.sites}

    @functools.cached_property
    def leaves(self) -> list[Any]:
        return [leaf for leaf in jax.tree.leaves(self.params) if is_array(leaf)]

    def identity(self) -> dict[str, Any]:
        """What is measured, as plain data: another model, other batches and other choices differ."""
        weights, data = hashlib.sha256(), hashlib.sha256()
        for leaf in self.leaves:
            update_with_sample(weights, leaf)
        for args in argument_tuples(self.batches):
            update_digest(data, args)
        return {
            "choices": {name: recipe.hash for name, recipe in self.recipes.items()},
            "groups": [list(group.sites) for group in self.groups],
            "parameters": weights.hexdigest(),
            "batches": data.hexdigest(),
            "score": getattr(self.score, "__qualname__", repr(self.score)),
        }

    def run(self, kept: _Kept | None) -> dict[tuple[str, str, str], float]:
        """Measure everything that is not kept yet: (measure, group, choice) -> loss."""
        found: dict[tuple[str, str, str], float] = dict(kept.found) if kept else {}
        tasks = [(m, g, c) for c in self.recipes for m in self.wanted for g in self.groups if c in g.choices]
        total = len(tasks) + (1 if "kl" in self.wanted else 0)
        done = sum((m, g.name, c) in found for m, g, c in tasks)
        if "kl" in self.wanted:
            self._say(done, total, "float outputs")
            _ = self.reference
        for choice in self.recipes:
            missing = [(m, g) for m, g, c in tasks if c == choice and (m, g.name, c) not in found]
            if not missing:
                continue
            by_weights = self.weights_only(choice)
            need_stored = by_weights or any(m != "kl" for m, _ in missing)
            stored = self.stored_leaves(choice) if need_stored else None
            for measure, group in missing:
                self._say(done, total, f"{choice} {group.name} {measure}")
                value = self._measure(measure, group, choice, stored if by_weights or measure != "kl" else None)
                found[measure, group.name, choice] = value
                if kept:
                    kept.add(measure, group.name, choice, value)
                done += 1
        self._say(total, total, "")
        return found

    def _say(self, done: int, total: int, what: str) -> None:
        if self.progress:
            self.progress(done, total, what)

    def _measure(self, measure: str, group: Group, choice: str, stored: list[Any] | None) -> float:
        if measure == "kl":
            if stored is None:
                return self._replayed(group, choice)
            leaves = list(self.leaves)
            for part in group.slices:
                leaves[part.leaf] = part.put(leaves[part.leaf], part.of(stored[part.leaf]))
            return self._compared(lambda signature, arrays: self._run(signature, [*leaves, *arrays[len(leaves) :]]))
        assert stored is not None
        errors = [(p, part_error(p, self.leaves[p.leaf], stored[p.leaf])) for p in group.slices]
        if measure == "output":
            return self._output_error(errors)
        total = sum(float(jnp.sum(p.of(self.fisher[p.leaf]) * jnp.square(e))) for p, e in errors)
        return 0.5 * total

    # ------------------------------------------------------------------------------------------ the score
    @functools.cached_property
    def _run(self) -> Callable[..., Any]:
        def call(signature: Signature, arrays: Sequence[Any]) -> Any:
            params, args, kwargs = signature.rebuild(arrays)
            return self.fn(params, *args, **kwargs)

        return jax.jit(call, static_argnums=0)

    @functools.cached_property
    def reference(self) -> list[Any] | None:
        """The float outputs of every batch, or None where they are too many to keep."""
        signature, arrays = Signature.of(self.params, next(argument_tuples(self.batches)), {})
        shapes = jax.eval_shape(lambda a: self._run(signature, a), arrays)
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
        count = sum(1 for _ in argument_tuples(self.batches))
        if size * count > KEPT_OUTPUTS:
            return None
        return [self._run(*Signature.of(self.params, args, {})) for args in argument_tuples(self.batches)]

    def _compared(self, run: Callable[[Signature, list[Any]], Any]) -> float:
        """The mean loss over all predictions of all batches."""
        total, count = 0.0, 0
        for number, args in enumerate(argument_tuples(self.batches)):
            signature, arrays = Signature.of(self.params, args, {})
            kept = self.reference
            reference = self._run(signature, arrays) if kept is None else kept[number]
            mean, n = self.score(reference, run(signature, arrays))
            total, count = total + float(mean) * n, count + n
        self.predictions = count
        return total / count

    def _replayed(self, group: Group, choice: str) -> float:
        """The loss with one group quantized as a program of its own."""
        rules = rules_of(group.sites, [self.ops[name] for name in group.sites], self.recipes[choice])
        recipe = Recipe([*rules, Rule("**", skip=True, optional=True)])
        example = next(argument_tuples(self.batches))
        if recipe.needs_batches:
            model = quantize(self.fn, self.params, recipe=recipe, batches=self.batches)
        else:
            model = quantize(self.fn, self.params, *example, recipe=recipe)
        batches = iter(argument_tuples(self.batches))
        return self._compared(lambda signature, arrays: model(model.params, *next(batches)))

    def weights_only(self, choice: str) -> bool:
        said = self.decisions[choice].values()
        return not any(d.inputs is not None or d.outputs is not None or d.operands for d in said if d.quantizes)

    def stored_leaves(self, choice: str) -> list[Any]:
        """The parameter leaves as a choice stores them everywhere, as floats again."""
        recipe = self.recipes[choice]
        if recipe.needs_batches:
            model = quantize(self.fn, self.params, recipe=recipe, batches=self.batches)
        else:
            model = quantize(self.fn, self.params, *next(argument_tuples(self.batches)), recipe=recipe)
        flat = jax.tree.leaves(model.params, is_leaf=is_quantized)
        return [
            leaf.dequantize() if is_quantized(leaf) else leaf for leaf in flat if is_quantized(leaf) or is_array(leaf)
        ]

    # ------------------------------------------------------------------------------------------ proxies
    @functools.cached_property
    def moments(self) -> dict[str, Any]:
        """Site -> the second moment of its inputs."""
        names = [s for g in self.groups for s in g.sites if self.ops[s] != "embedding"]
        state = calibrate(self.fn, self.params, self.batches, statistics={n: SecondMoment() for n in names}, show=False)
        return {name: state[name]["second_moment"] for name in names}

    def _output_error(self, errors: list[tuple[Slice, Any]]) -> float:
        """Error over size of the outputs of all products of a group."""
        error = size = 0.0
        for part, e in errors:
            names = [n for n in part.sites if n in self.moments]
            if not names:
                raise SearchError(f"{part.sites[0]} is no product, so its outputs have no second moment; measure 'kl'")
            moment = functools.reduce(jnp.add, [self.moments[n] for n in names])
            error += quadratic(part, e, moment)
            size += quadratic(part, part.of(self.leaves[part.leaf]), moment)
        return error / size if size else 0.0

    @functools.cached_property
    def fisher(self) -> list[Any]:
        """The diagonal of the Fisher matrix of every leaf, per prediction.

        Labels are drawn from the model's own predictions: the gradient of the sum of their log-probabilities then has
        the diagonal of the Fisher matrix of all predictions as its mean square, since those of different predictions
        are independent and have mean zero. One draw a batch.
        """
        needed = sorted({p.leaf for g in self.groups for p in g.slices})

        def loss(some: list[Any], signature: Signature, arrays: list[Any], key: Any) -> Any:
            leaves = list(arrays)
            for position, leaf in zip(needed, some, strict=True):
                leaves[position] = leaf
            params, args, kwargs = signature.rebuild(leaves)
            logits = self.fn(params, *args, **kwargs)
            if not hasattr(logits, "ndim") or logits.ndim < 2:
                raise SearchError("'fisher' needs a function whose result is logits [..., classes]; measure 'output'")
            drawn = jax.lax.stop_gradient(jax.random.categorical(key, logits))
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[..., None], axis=-1)
            return jnp.sum(chosen)

        gradient = jax.jit(jax.grad(loss), static_argnums=1)
        total = {p: jnp.zeros(self.leaves[p].shape, jnp.float32) for p in needed}
        count, key = 0, jax.random.key(self.seed)
        for number, args in enumerate(argument_tuples(self.batches)):
            signature, arrays = Signature.of(self.params, args, {})
            some = gradient([arrays[p] for p in needed], signature, arrays, jax.random.fold_in(key, number))
            total = {p: total[p] + jnp.square(g.astype(jnp.float32)) for p, g in zip(needed, some, strict=True)}
            out = jax.eval_shape(lambda a, s=signature: self._run(s, a), arrays)
            count += int(np.prod(out.shape[:-1]))
        self.predictions = count
        return [total[p] / count if p in total else None for p in range(len(self.leaves))]


def part_error(part: Slice, leaf: Any, stored: Any) -> Any:
    """W - q of a slice, float32, in the leaf's layout."""
    return part.of(leaf).astype(jnp.float32) - part.of(stored).astype(jnp.float32)


def quadratic(part: Slice, e: Any, moment: Any) -> float:
    """Sum e H eᵀ over the rows of a slice, with H [K, K] or one for each stacked matrix."""
    rows = canonical_matrix(e.astype(jnp.float32), part.plan.in_axes, part.plan.stack_axes)  # [*stack, N, K]
    keyed = len(part.plan.key_axes)
    rows = rows.reshape(rows.shape[keyed:])
    moment = jnp.broadcast_to(moment, (*rows.shape[:-2], *moment.shape[-2:]))
    product = jnp.einsum("...nk,...kl->...nl", rows, moment, precision=jax.lax.Precision.HIGHEST)
    return float(jnp.sum(product * rows))


class _Kept:
    """Measurements in a folder, one line each."""

    def __init__(self, path: str | Path, job: Job):
        self.file = open_job(path, {**job.identity(), "seed": job.seed}, "search") / "measured.jsonl"
        self.found: dict[tuple[str, str, str], float] = {}
        for row in read_lines(self.file):
            try:
                self.found[row["measure"], row["group"], row["choice"]] = float(row["loss"])
                job.predictions = int(row["predictions"])
            except (ValueError, KeyError, TypeError):
                continue
        self.job = job

    def add(self, measure: str, group: str, choice: str, loss: float) -> None:
        row = {"measure": measure, "group": group, "choice": choice, "loss": loss, "predictions": self.job.predictions}
        add_lines(self.file, [row])


def _assembled(job: Job, losses: Mapping[tuple[str, str, str], float]) -> Sensitivities:
    of_groups = sum(part.float_bytes for group in job.groups for part in group.slices)
    total = sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in job.leaves)
    rows = []
    for group in job.groups:
        rows.append(
            Row(
                name=group.name,
                sites=group.sites,
                ops=tuple(job.ops[name] for name in group.sites),
                elements=group.elements,
                parts=tuple(_part(job.program, part) for part in group.slices),
                bytes={choice: group.bytes_of(choice) for choice in group.choices},
                losses={
                    m: {c: 0.0 if c == FLOAT else losses[m, group.name, c] for c in group.choices} for m in job.wanted
                },
                formats={c: _formats(job, group, c) for c in group.choices},
            )
        )
    recipes = {name: recipe.to_dict() for name, recipe in job.recipes.items()}
    return Sensitivities(tuple(rows), recipes, total - of_groups, job.predictions, job.wanted)


def _part(program: Program, part: Slice) -> Part:
    n, k = part.matrix
    site = program.site(part.sites[0])
    flops = site.flops / max(1, 2 * n * k) if site.op != "embedding" else 0
    return Part(n, k, max(1.0, flops))


def _formats(job: Job, group: Group, choice: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    if choice == FLOAT:
        return None, None
    part = group.slices[0]
    source = job.decisions[choice][part.sites[0]].inputs
    act = source.fmt if isinstance(source, Dynamic | Static) else None
    fmt = part.stored[choice].fmt
    return None if fmt is None else fmt.to_dict(), None if act is None else act.to_dict()

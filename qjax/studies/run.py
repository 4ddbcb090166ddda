"""Running a study: one recipe after the other, each result kept on disk as soon as it is complete.

A study's folder holds

    job/              what is studied: model, tasks, calibration data, by their digests
    recipes/NAME-…/   the result of one recipe: figures, and every single unit that was scored
    work/NAME-…/      finished blocks of a recipe that is being applied block by block
    study.md, .json, .html

Killed at any moment, a study goes on with the recipes (and blocks) that are missing, and more recipes can be added to a
finished one. Units are kept because only they allow paired tests between recipes of different runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import qjax
from qjax.checkpoint.parts import load_part, open_job, save_part
from qjax.errors import CheckpointError, DataError, QjaxError, RecipeError
from qjax.evaluate.paired import paired_test
from qjax.evaluate.tasks import Reference, Task, Units, summary, task_recovery
from qjax.recipe import Recipe, resolve_recipe
from qjax.studies.result import Comparison, Outcome, Study
from qjax.transforms import quantize

FLOAT = "float"


@dataclasses.dataclass(frozen=True)
class _Kept:
    """One result as it lies on disk: JSON-able figures, and units by task."""

    said: Mapping[str, Any]
    units: Mapping[str, Units]


def study(
    fn: Callable[..., Any],
    params: Any,
    tasks: Task | Sequence[Task],
    recipes: Iterable[Recipe | str],
    *,
    batches: Any = None,
    out: str | Path | None = None,
    name: str = "",
    digest: str | None = None,
    calibration: str = "",
    progress: Callable[[int, int, str], None] | None = None,
) -> Study:
    """Apply every recipe to a model, and score each beside the float model.

    Args:
        fn: the float function, as for `qjax.quantize`.
        params: its parameters.
        tasks: what to score on, such as `qjax.evaluate.TextTask`; rows of the calibration data must not be in them.
        recipes: recipes, names of presets or ``.toml`` files.
        batches: calibration data for those that need it, as `qjax.quantize` takes them.
        out: folder for results: what is there is not done again, and tables and plots are written to it. None keeps
            everything in memory.
        name: the model's, for tables.
        digest: of the parameters, where it is known already; None hashes them.
        calibration: a sentence on the calibration data, for the page.
        progress: called as ``progress(done, total, recipe)`` after each recipe.

    Returns:
        The tables; `Study.save` writes them, which is done already where ``out`` is given.

    Raises:
        RecipeError: an unknown preset, two recipes of one name, or a recipe that needs data and none is given. A
            recipe that cannot be applied to this model is no error but stands in the table with the reason.
        CheckpointError: the folder belongs to another study, or is damaged.
        DataError: no task, or two of one name.
    """
    tasks = tuple(tasks) if isinstance(tasks, Sequence) else (tasks,)
    chosen = _checked(recipes, batches)
    if not tasks or len({t.name for t in tasks}) < len(tasks):
        raise DataError(f"a study needs tasks with different names, and these are {[t.name for t in tasks]}")
    folder = None
    if out is not None:
        job = {
            "qjax": qjax.__version__,
            "model": digest or _digest(jax.tree.leaves(params)),
            "tasks": {t.name: t.digest() for t in tasks},
            "calibration": None if batches is None else _digest(jax.tree.leaves(list(batches))),
        }
        folder = open_job(out, job, "study")
    references: dict[str, Reference] = {}  # made when the first recipe wants them: a complete study needs none

    def reference(task: Task) -> Reference:
        if task.name not in references:
            references[task.name] = task.reference(fn, params)
        return references[task.name]

    def of_float() -> _Kept:
        size = sum(np.dtype(a.dtype).itemsize * int(np.prod(a.shape)) for a in jax.tree.leaves(params))
        return _Kept({"stored_bytes": size}, {t.name: reference(t).units() for t in tasks})

    def of(recipe: Recipe, work: Path | None) -> _Kept:
        begun = time.monotonic()
        model = quantize(
            fn,
            params,
            *tasks[0].example(),
            recipe=recipe,
            batches=batches if recipe.needs_batches else None,
            resume=work if recipe.rounds_with_data else None,
            name=name,
        )
        jax.block_until_ready(model.params)
        report = model.report
        said = {
            "stored_bytes": report.stored_bytes,
            "bits": report.bits(report.quantized),
            "bits_all": report.bits(),
            "seconds": time.monotonic() - begun,
            "notes": list(report.notes),
        }
        # `rewritten` is the function alone: compiled calls are remembered, and should not keep the weights alive.
        return _Kept(said, {t.name: reference(t).units(model.rewritten, model.params) for t in tasks})

    base = _once(folder, FLOAT, of_float)
    kept: dict[str, _Kept] = {}
    outcomes: list[Outcome] = []
    float_scores = {t.name: summary(t, base.units[t.name]) for t in tasks}
    for number, recipe in enumerate(chosen):
        key = f"{recipe.name}-{recipe.hash[:12]}"
        work = None if folder is None else folder / "work" / key
        try:
            found = _once(folder, key, lambda recipe=recipe, work=work: of(recipe, work))
        except CheckpointError:
            raise
        except QjaxError as error:  # this recipe on this model: the others are not to blame
            outcomes.append(Outcome(recipe.name, recipe.hash, refused=str(error)))
        else:
            kept[recipe.name] = found
            outcomes.append(_outcome(recipe, found, tasks, base))
            if work is not None:
                shutil.rmtree(work, ignore_errors=True)
        if progress is not None:
            progress(number + 1, len(chosen), recipe.name)
    result = Study(
        model=name or "model",
        tasks={t.name: t.score for t in tasks},
        metrics={t.name: t.metrics for t in tasks},
        units={t.name: t.unit for t in tasks},
        counts={t.name: (e.count, e.clusters) for t in tasks for e in [float_scores[t.name][t.metrics[0]]]},
        float_bytes=base.said["stored_bytes"],
        float_scores=float_scores,
        outcomes=tuple(outcomes),
        comparisons=_comparisons(kept, tasks),
        calibration=calibration,
    )
    if folder is not None:
        result.save(folder)
    return result


def _checked(recipes: Iterable[Recipe | str], batches: Any) -> list[Recipe]:
    """The recipes, all known to be possible before the first is applied."""
    chosen: list[Recipe] = []
    for given in recipes:
        recipe = resolve_recipe(given)
        if not recipe.name:
            stem = Path(given).stem if isinstance(given, str) else f"recipe {len(chosen) + 1}"
            recipe = Recipe(recipe.rules, recipe.prepare, stem, finish=recipe.finish)
        chosen.append(recipe)
    if not chosen:
        raise RecipeError("a study needs at least one recipe, such as 'W4A16'")
    names = [r.name for r in chosen]
    double = sorted({n for n in names if names.count(n) > 1})
    if double or FLOAT in names:
        raise RecipeError(f"the recipes of a study have names of their own, and {', '.join(double) or FLOAT} is taken")
    wanting = [r.name for r in chosen if r.needs_batches]
    if wanting and batches is None:
        raise RecipeError(f"{', '.join(wanting)}: recipes that need calibration data, and there is none; give batches")
    return chosen


def _once(folder: Path | None, key: str, make: Callable[[], _Kept]) -> _Kept:
    """A result that is there already, or made and kept."""
    if folder is None:
        return make()
    path = folder / "recipes" / key
    found = load_part(path)
    if found is None:
        made = make()
        leaves = {f"{task}/{field}": a for task, units in made.units.items() for field, a in units.items()}
        save_part(path, leaves, made.said)
        return made
    leaves, said = found
    units: dict[str, Units] = {}
    for name, array in leaves.items():
        task, field = name.rsplit("/", 1)
        units.setdefault(task, {})[field] = np.asarray(array)
    return _Kept(said, units)


def _outcome(recipe: Recipe, found: _Kept, tasks: Sequence[Task], base: _Kept) -> Outcome:
    scores = {t.name: summary(t, found.units[t.name]) for t in tasks}
    found_here = {t.name: task_recovery(t, found.units[t.name], base.units[t.name]) for t in tasks}
    kept = {task: value for task, value in found_here.items() if value is not None}
    said = {**found.said, "notes": tuple(found.said["notes"])}
    return Outcome(recipe.name, recipe.hash, scores=scores, recovery=kept, **said)


def _comparisons(kept: Mapping[str, _Kept], tasks: Sequence[Task]) -> tuple[Comparison, ...]:
    names = list(kept)
    return tuple(
        Comparison(task.name, metric, a, b, paired_test(first[metric], second[metric], first["cluster"]))
        for task in tasks
        for metric in task.metrics[:1]
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        for first, second in [(kept[a].units[task.name], kept[b].units[task.name])]
    )


def _digest(leaves: Iterable[Any]) -> str:
    total = hashlib.sha256()
    for leaf in leaves:
        array = np.asarray(leaf)
        total.update(f"{array.dtype}{array.shape}".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()

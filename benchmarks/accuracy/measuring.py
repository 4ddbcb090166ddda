"""One (model, row) of the accuracy table: quantize, score, keep the result in two files.

``MODEL/ROW.json`` has the figures and ``MODEL/ROW.npz`` every unit that was scored, for paired tests. Both are written
beside their places and moved there, the JSON last, so a row is there or not. Workers share a folder by a lock for each
row that is free again when its holder dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import qjax
from benchmarks.accuracy.models import Case
from benchmarks.accuracy.rows import Row
from qjax.evaluate.tasks import Reference, Units, summary, task_recovery

FLOAT = "float"


class Scorer:
    """The float model of a case on its tasks, scored when it is first wanted."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self._references: dict[str, Reference] = {}
        self._units: dict[str, Units] = {}

    def reference(self, task: Any) -> Reference:
        """The float model on a task."""
        if task.name not in self._references:
            self._references[task.name] = task.reference(self.case.fn, self.case.params)
        return self._references[task.name]

    def float_units(self, task: Any) -> Units:
        """The float model's own units."""
        if task.name not in self._units:
            self._units[task.name] = self.reference(task).units(show=False)
        return self._units[task.name]

    def row(self, row: Row) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Figures and units of a row; a method that refuses the model says so."""
        made = row.make(self.case)
        begun = time.monotonic()
        data = {"batches": self.case.batches} if made.needs_batches else {}
        try:
            model = qjax.quantize(self.case.fn, self.case.params, *self.case.batches[0], recipe=made, **data)
        except qjax.errors.QjaxError as error:
            return {"refused": str(error)}, {}
        jax.block_until_ready(model.params)
        report = model.report
        said = {
            "seconds": round(time.monotonic() - begun, 1),
            "stored_bytes": report.stored_bytes,
            "bits": report.bits(report.quantized),
            "recipe": made.to_dict(),
            "notes": list(report.notes),
        }
        units, scores = {}, {}
        for task in self.case.tasks:
            found = self.reference(task).units(model.rewritten, model.params, show=False)
            scores[task.name] = scored(task, found, self.float_units(task))
            units |= {f"{task.name}/{key}": value for key, value in found.items()}
        return {**said, "scores": scores}, units

    def of_float(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The row of the float model."""
        size = sum(a.size * np.dtype(a.dtype).itemsize for a in jax.tree.leaves(self.case.params))
        units, scores = {}, {}
        for task in self.case.tasks:
            found = self.float_units(task)
            scores[task.name] = scored(task, found, found)
            units |= {f"{task.name}/{key}": value for key, value in found.items()}
        return {"stored_bytes": size, "bits": None, "seconds": 0, "scores": scores, "said": self.case.said}, units


def scored(task: Any, units: Units, of_float: Units) -> dict[str, Any]:
    """A task's figures as JSON."""
    found = summary(task, units)
    kept = task_recovery(task, units, of_float)
    if kept is not None:
        found["recovery"] = kept
    return {k: {"mean": _strict(e.mean), "stderr": _strict(e.stderr), "count": e.count} for k, e in found.items()}


def _strict(value: float) -> float | None:
    return value if math.isfinite(value) else None


def keep(folder: Path, model: str, row: str, said: dict[str, Any], units: dict[str, np.ndarray]) -> None:
    """Write a result."""
    home = folder / model
    home.mkdir(parents=True, exist_ok=True)
    if units:
        with (home / f".{row}.npz.partial").open("wb") as file:
            np.savez_compressed(file, **units)
        (home / f".{row}.npz.partial").replace(home / f"{row}.npz")
    (home / f".{row}.json.partial").write_text(json.dumps({"model": model, "row": row, **said}, indent=1) + "\n")
    (home / f".{row}.json.partial").replace(home / f"{row}.json")


def kept(folder: Path, model: str, row: str) -> dict[str, Any] | None:
    """A result, or None where there is none; one that is damaged is measured again."""
    try:
        found = json.loads((folder / model / f"{row}.json").read_text())
        if "scores" in found:
            with np.load(folder / model / f"{row}.npz") as units:
                assert units.files
        return found
    except (OSError, ValueError, AssertionError):
        return None


def units_of(folder: Path, model: str, row: str, task: str) -> Units:
    """The units of a result on one task."""
    with np.load(folder / model / f"{row}.npz") as found:
        return {key.split("/", 1)[1]: found[key] for key in found.files if key.startswith(f"{task}/")}


@contextlib.contextmanager
def claimed(folder: Path, model: str, row: str) -> Iterator[bool]:
    """Whether this process has the row to itself."""
    home = folder / model
    home.mkdir(parents=True, exist_ok=True)
    with (home / f".{row}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def measure_rows(
    folder: Path,
    model: str,
    scorer: Callable[[], Scorer],
    rows: list[Row],
    say: Callable[[str], None],
    end: float = math.inf,
) -> None:
    """Measure the rows of one model that nobody has measured; its scorer is made when the first of them is due.

    After ``end`` (of `time.monotonic`) no further row is begun.

    A row that breaks down is told with its traceback and left out: the others, and the next run, go on.
    """
    for row in (None, *rows):
        if time.monotonic() > end:
            return
        name = FLOAT if row is None else row.name
        with claimed(folder, model, name) as mine:
            if not mine or kept(folder, model, name) is not None:
                continue
            begun = time.monotonic()
            try:
                said, units = scorer().of_float() if row is None else scorer().row(row)
            except Exception:
                say(f"{model} {name} BROKE DOWN:\n{traceback.format_exc()}")
                continue
            keep(folder, model, name, said, units)
        say(f"{model} {name}: {headline(said, scorer().case)} ({time.monotonic() - begun:.0f} s)")


def headline(said: dict[str, Any], case: Case) -> str:
    """The most sensitive figure of a result."""
    if "refused" in said:
        return said["refused"]
    task = case.tasks[0]
    return f"{task.metrics[0]} {said['scores'][task.name][task.metrics[0]]['mean']:.5g}"

"""From sums of single losses to whole assignments: the exact one and the Lagrangian front begin, NSGA-II goes on.

What groups lose together is not quite the sum of what each loses alone. The search by sums is exact and takes a second;
this one measures whole assignments and takes a run of the batches for each. It begins with what the sums say, so it
ends with nothing worse.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qjax.checkpoint.parts import open_job
from qjax.errors import SearchError
from qjax.hardware import Accelerator, Device
from qjax.search.assigning import Assignment, Budget, Point, assign, cost_table
from qjax.search.evolution import digest, evolve_front
from qjax.search.knapsack import sweep
from qjax.search.nsga2 import NSGA2, Population
from qjax.search.sensitivity import Sensitivities
from qjax.search.whole import Losses, Remembered

Known = Mapping[tuple[int, ...], float]
"""Losses of the assignments that were measured."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a search is.

    Attributes:
        generation, generations: done and to do.
        measured: assignments so far.
        best: the least loss within the budget.
    """

    generation: int
    generations: int
    measured: int
    best: float


@dataclasses.dataclass(frozen=True)
class Within:
    """A search for whole assignments within a budget: what it begins with, and what its measurements say.

    Attributes:
        start: the exact assignment by sums.
        costs: float64 [groups, choices], infinite where a group lacks the choice.
        fixed: what is spent in any case.
        single: losses of one group alone, float64 [groups, choices].
    """

    start: Assignment
    costs: np.ndarray
    fixed: float
    single: np.ndarray

    @staticmethod
    def of(
        sensitivities: Sensitivities,
        budget: str | Budget,
        by: str | None = None,
        on: str | Device | Accelerator | None = None,
        rows: float | None = None,
    ) -> Within:
        """Set it up; the arguments are those of `assign`.

        Raises:
            SearchError: a budget that nothing meets.
        """
        start = assign(sensitivities, budget, by=by, on=on, rows=rows)
        costs, fixed = cost_table(sensitivities, start.budget, on, rows)
        single = [[of.get(name, np.inf) for name in sensitivities.choices] for of in sensitivities.loss(start.by)]
        return Within(start, costs, fixed, np.array(single))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the choices."""
        return self.start.sensitivities.choices

    @property
    def limit(self) -> float:
        """The budget, with room for the rounding of sums."""
        return self.start.budget.amount * (1 + 1e-12)

    def cost(self, genomes: np.ndarray) -> np.ndarray:
        """Costs float64 [any] of genomes [any, groups]."""
        return self.costs[np.arange(len(self.costs)), genomes].sum(axis=1) + self.fixed

    def begin(self, most: int) -> tuple[np.ndarray, np.ndarray]:
        """The exact assignment [1, groups] and the Lagrangian front as far as the budget reaches, ``most`` in all."""
        rows = self.start.sensitivities.rows
        own = np.array([[self.names.index(self.start.choices[row.name]) for row in rows]], np.int32)
        hull = [s.choice for s in sweep(self.costs, self.single) if s.cost + self.fixed <= self.limit]
        if len(hull) >= most:
            hull = [hull[n] for n in np.linspace(0, len(hull) - 1, most - 1).round().astype(int)]
        return own, np.array(hull, np.int32).reshape(-1, len(rows))

    def best(self, known: Known) -> tuple[tuple[int, ...] | None, float]:
        """Of the assignments within the budget the one of least loss, of equals the cheapest."""
        front = self.front(known)
        return (front[-1], known[front[-1]]) if front else (None, float("nan"))

    def front(self, known: Known) -> list[tuple[int, ...]]:
        """Those within the budget that nothing else beats in cost and loss, by rising cost."""
        if not known:
            return []
        genomes, losses = list(known), np.array(list(known.values()))
        costs = self.cost(np.array(genomes))
        out: list[tuple[int, ...]] = []
        least = np.inf
        for n in np.lexsort((losses, costs)):
            if costs[n] <= self.limit and losses[n] < least:  # NaN is not less
                out.append(genomes[n])
                least = losses[n]
        return out

    def point(self, genome: Sequence[int], loss: float) -> Point:
        """An assignment on a curve."""
        taken = [self.names[c] for c in genome]
        counts = {c: taken.count(c) for c in self.names if c in taken}
        return Point(float(self.cost(np.array([genome]))[0]), loss, counts)

    def result(self, known: Known, hull: np.ndarray, name: str) -> Assignment:
        """The best of what was measured, with both curves.

        Raises:
            SearchError: no loss is a number.
        """
        best, whole = self.best(known)
        if best is None:
            raise SearchError("no assignment within the budget has a loss that is a number; look at the sensitivities")
        found, rows = self.start.sensitivities, self.start.sensitivities.rows
        chosen = {row.name: self.names[c] for row, c in zip(rows, best, strict=True)}
        stored = sum(row.bytes[chosen[row.name]] for row in rows)
        measured = [g for g in map(tuple, hull.tolist()) if g in known]
        return dataclasses.replace(
            self.start,
            choices=chosen,
            cost=float(self.cost(np.array([best]))[0]),
            loss=float(self.single[np.arange(len(best)), best].sum()),
            exact=chosen == dict(self.start.choices),
            bits=stored * 8 / found.elements,
            stored_bytes=stored + found.other_bytes,
            whole=whole,
            curves={
                "Lagrangian": tuple(self.point(g, known[g]) for g in measured),
                name: tuple(self.point(g, known[g]) for g in self.front(known)),
            },
        )


def refine(
    sensitivities: Sensitivities,
    losses: Losses,
    budget: str | Budget,
    settings: NSGA2 | None = None,
    *,
    by: str | None = None,
    on: str | Device | Accelerator | None = None,
    rows: float | None = None,
    seed: int = 0,
    resume: str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Assignment:
    """Search for the assignment that loses least as a whole, within a budget.

    Two objectives, cost and loss, so the front below the budget is found with it. The first population has the
    assignment of `assign`, the Lagrangian front as far as the budget reaches, and children of both.

    Args:
        sensitivities: of `qjax.search.sensitivities`.
        losses: `WholeLosses` of the same function, batches, choices and ties; or any function of genomes.
        budget, by, on, rows: as for `assign`.
        settings: of NSGA-II.
        seed: of all draws.
        resume: a folder in which the population and every measurement are kept.
        progress: called after every few measurements.

    Returns:
        The best of all that was measured. Its ``whole`` is its loss, ``curves`` has "Lagrangian" and "NSGA-II", both
        measured, and ``loss`` is still the sum of single losses.

    Raises:
        SearchError: a budget that nothing meets, or no assignment whose loss is a number.
        CheckpointError: ``resume`` is of another search.
    """
    settings = settings or NSGA2(population=32, generations=20)
    within = Within.of(sensitivities, budget, by, on, rows)
    own, hull = within.begin(settings.population // 2)  # the other half is for children
    limit = within.limit
    at = [0]

    def said(measured: int) -> None:
        if progress:
            progress(Progress(at[0], settings.generations, measured, within.best(memory.known)[1]))

    what = {"job": getattr(losses, "identity", None), "choices": list(within.names)}
    folder = None if resume is None else open_job(resume, what, "search of whole assignments")
    memory = Remembered(losses, None if folder is None else folder / "measured.jsonl", progress=said)

    def evaluate(genomes: jax.Array) -> tuple[jax.Array, jax.Array]:
        there = np.asarray(genomes)
        spent = within.cost(there)
        violation = np.maximum(spent - limit, 0) / limit
        values = np.full(len(there), np.inf)
        fine = violation <= 0  # what is beyond the budget is not worth a measurement
        values[fine] = memory(there[fine]) if fine.any() else values[fine]
        return jnp.asarray(np.stack([spent, values], axis=1)), jnp.asarray(violation)

    def generation(number: int, population: Population) -> None:
        at[0] = number
        said(len(memory.known))

    tables = {"costs": digest(within.costs), "losses": digest(within.single)}
    asked = {"budget": limit, **tables, "population": settings.population, **settings.operators, "seed": seed}
    name = f"population-{hashlib.sha256(repr(asked).encode()).hexdigest()[:12]}"
    evolve_front(
        evaluate,
        np.isfinite(within.costs),
        settings,
        seeds=np.concatenate([own, hull]),
        seed=seed,
        compiled=False,
        resume=None if folder is None else folder / name,
        job=asked,
        progress=generation,
    )
    return within.result(memory.known, hull, "NSGA-II")

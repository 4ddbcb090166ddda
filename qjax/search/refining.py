"""From sums of single losses to whole assignments: the exact one and the Lagrangian front begin, NSGA-II goes on.

What groups lose together is not quite the sum of what each loses alone. The search by sums is exact and takes a second;
this one measures whole assignments and takes a run of the batches for each. It begins with what the sums say, so it
ends with nothing worse.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
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
    start = assign(sensitivities, budget, by=by, on=on, rows=rows)
    cost_of, fixed = cost_table(sensitivities, start.budget, on, rows)
    names = sensitivities.choices
    allowed = np.isfinite(cost_of)
    single = np.array([[of.get(name, np.inf) for name in names] for of in sensitivities.loss(start.by)])
    limit = start.budget.amount * (1 + 1e-12)

    def cost(genomes: np.ndarray) -> np.ndarray:
        return cost_of[np.arange(len(cost_of)), genomes].sum(axis=1) + fixed

    hull = np.stack([s.choice for s in sweep(cost_of, single) if s.cost + fixed <= limit])
    own = np.array([[names.index(start.choices[row.name]) for row in sensitivities.rows]])
    most = settings.population // 2  # the other half is for children
    if len(hull) >= most:
        hull = hull[np.linspace(0, len(hull) - 1, most - 1).round().astype(int)]
    seeds = np.concatenate([own, hull])
    at = [0]

    def said(measured: int) -> None:
        if progress:
            progress(Progress(at[0], settings.generations, measured, _best(memory.known, cost, limit)[1]))

    what = {"of": getattr(losses, "identity", None), "choices": list(names)}
    folder = None if resume is None else open_job(resume, what, "search of whole assignments")
    memory = Remembered(losses, None if folder is None else folder / "measured.jsonl", progress=said)

    def evaluate(genomes: jax.Array) -> tuple[jax.Array, jax.Array]:
        there = np.asarray(genomes)
        spent = cost(there)
        violation = np.maximum(spent - limit, 0) / limit
        values = np.full(len(there), np.inf)
        fine = violation <= 0  # what is beyond the budget is not worth a measurement
        values[fine] = memory(there[fine]) if fine.any() else values[fine]
        return jnp.asarray(np.stack([spent, values], axis=1)), jnp.asarray(violation)

    def generation(number: int, population: Population) -> None:
        at[0] = number
        said(len(memory.known))

    tables = {"costs": digest(cost_of), "losses": digest(single)}
    asked = {"budget": limit, **tables, "population": settings.population, **settings.operators, "seed": seed}
    name = f"population-{hashlib.sha256(repr(asked).encode()).hexdigest()[:12]}"
    evolve_front(
        evaluate,
        allowed,
        settings,
        seeds=seeds,
        seed=seed,
        compiled=False,
        resume=None if folder is None else folder / name,
        job=asked,
        progress=generation,
    )
    best, whole = _best(memory.known, cost, limit)
    if best is None:
        raise SearchError("no assignment within the budget has a loss that is a number; look at the sensitivities")

    def point(genome: np.ndarray) -> Point:
        taken = [names[c] for c in genome]
        loss = float(memory(genome[None])[0])
        return Point(float(cost(genome[None])[0]), loss, {c: taken.count(c) for c in names if c in taken})

    chosen = {row.name: names[c] for row, c in zip(sensitivities.rows, best, strict=True)}
    stored = sum(row.bytes[chosen[row.name]] for row in sensitivities.rows)
    return dataclasses.replace(
        start,
        choices=chosen,
        cost=float(cost(np.array([best]))[0]),
        loss=float(single[np.arange(len(single)), best].sum()),
        exact=chosen == dict(start.choices),
        bits=stored * 8 / sensitivities.elements,
        stored_bytes=stored + sensitivities.other_bytes,
        whole=whole,
        curves={
            "Lagrangian": tuple(point(g) for g in hull),
            "NSGA-II": tuple(point(np.array(g)) for g in undominated(memory.known, cost, limit)),
        },
    )


def _best(
    known: Mapping[tuple[int, ...], float], cost: Callable[[np.ndarray], np.ndarray], limit: float
) -> tuple[tuple[int, ...] | None, float]:
    """Of the assignments within the budget the one of least loss, of equals the cheapest."""
    front = undominated(known, cost, limit)
    return (front[-1], known[front[-1]]) if front else (None, float("nan"))


def undominated(
    known: Mapping[tuple[int, ...], float], cost: Callable[[np.ndarray], np.ndarray], limit: float
) -> list[tuple[int, ...]]:
    """Those within the budget that nothing else beats in cost and loss, by rising cost."""
    if not known:
        return []
    genomes, losses = list(known), np.array(list(known.values()))
    costs = cost(np.array(genomes))
    out: list[tuple[int, ...]] = []
    least = np.inf
    for n in np.lexsort((losses, costs)):
        if costs[n] <= limit and losses[n] < least:  # NaN is not less
            out.append(genomes[n])
            least = losses[n]
    return out

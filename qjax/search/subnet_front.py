"""What subnets can be had for what: scores over costs, by sums of single losses and by NSGA-II.

The score of the highest subnet with one gene alone at fewer bits says what this gene loses. If losses added up, the
Lagrangian sweep over them would give the convex front. They do not, quite, so NSGA-II goes on from there, with the
scores of whole subnets. Both curves are scored alike.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.search.assigning import amount
from qjax.search.choices import Scores, direct
from qjax.search.evolution import Progress, digest, evolve_front
from qjax.search.genes import Genes
from qjax.search.knapsack import sweep
from qjax.search.nsga2 import NSGA2, front
from qjax.search.site_costs import SiteCosts, bit_costs
from qjax.search.whole import check_kept
from qjax.supernet import Domain


@dataclasses.dataclass(frozen=True)
class SubnetPoint:
    """One subnet: its cost, its score, and its choice, int32 [N, 5 or 6]."""

    cost: float
    score: float
    choice: np.ndarray

    def __repr__(self) -> str:
        return f"SubnetPoint(cost {self.cost:.5g}, score {self.score:.4g})"


@dataclasses.dataclass(frozen=True)
class SubnetFront:
    """Subnets that no other beats in cost and score. Printed, both curves side by side.

    Attributes:
        kind: of costs: "bits", "bytes", "seconds" or "joules".
        curves: "Lagrangian", what sums of single losses lead to, and "NSGA-II", by rising cost.
        evaluations: scorings; a subnet that was scored twice counts twice.
    """

    kind: str
    curves: Mapping[str, tuple[SubnetPoint, ...]]
    evaluations: int

    def best(self, budget: float | None = None) -> SubnetPoint | None:
        """The point of the best score on either curve, within a cost; None where nothing is."""
        points = [p for curve in self.curves.values() for p in curve if budget is None or p.cost <= budget * (1 + 1e-9)]
        return max(points, key=lambda p: (p.score, -p.cost), default=None)

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(points)} points of {name}" for name, points in self.curves.items())
        return f"SubnetFront(score over {self.kind}: {counts}, {self.evaluations:,} scorings)"

    def __str__(self) -> str:
        lines = [repr(self)]
        for cost, *scores in self.rows():
            lines.append(f"{cost:>12}  " + "  ".join(f"{v:>12}" for v in scores))
        lines.insert(1, f"{'cost':>12}  " + "  ".join(f"{name:>12}" for name in self.curves))
        return "\n".join(lines)

    def rows(self, most: int = 12) -> list[list[str]]:
        """The best score of each curve up to some costs, as a table: cost, then a column for each curve."""
        costs = sorted({p.cost for points in self.curves.values() for p in points})
        if len(costs) > most:
            costs = [costs[n] for n in np.linspace(0, len(costs) - 1, most).round().astype(int)]
        out = []
        for cost in costs:
            best = [max((p.score for p in points if p.cost <= cost), default=None) for points in self.curves.values()]
            out.append([amount(self.kind, cost), *("" if v is None else f"{v:.4g}" for v in best)])
        return out


def choice_front(
    scores: Scores,
    domain: Domain,
    weights: Sequence[float],
    inputs: Sequence[float],
    costs: SiteCosts | None = None,
    *,
    most: float | None = None,
    form: tuple[bool, bool, bool] = (True, True, True),
    group: int | None = None,
    settings: NSGA2 | None = None,
    seed: int = 0,
    compiled: bool = True,
    block: int | None = None,
    resume: str | Path | None = None,
    job: Any = None,
    progress: Progress | None = None,
) -> SubnetFront:
    """Search the front of scores over a cost.

    Args:
        scores: choices int32 [any, N, 5 or 6] -> float [any], the larger the better; with ``block`` those of runs.
        domain: of the supernet.
        weights, inputs: sizes of the sites (`qjax.supernet.sizes`), for average bits.
        costs: from `site_costs`, or a table of your own; None is the average bits of weights and of activations,
            averaged over both where there are both.
        most: the largest cost of interest.
        form: of all sites.
        group: of all sites, where the space has groups; None is its first.
        settings: of NSGA-II.
        seed, compiled, progress: as for `evolve_front`.
        block, resume, job: as for `search_choice`.

    Raises:
        SearchError: costs for other sites.
        CheckpointError: ``resume`` holds another job.
    """
    settings = settings or NSGA2()
    costs = bit_costs(domain, weights, inputs) if costs is None else costs
    genes = Genes(domain, form, group=group)
    if not genes.additive(costs.table):
        genes = dataclasses.replace(genes, paired=True)
    table, limit = genes.costs(costs.table), np.inf if most is None else most
    said = {"job": job, "form": genes.said, "sites": list(domain.sites)}
    score, folder = scores, resume
    if block is not None:
        score, folder, compiled = direct(scores, domain, block, resume, job), None, False
        if resume is not None:
            asked = [said["form"], digest(table), most, settings.population, settings.operators, seed]
            folder = Path(resume) / f"front-{hashlib.sha256(repr(asked).encode()).hexdigest()[:12]}"
    of_genomes = lambda genomes: score(genes.choice(genomes))  # noqa: E731
    now = jax.jit(of_genomes) if compiled else of_genomes
    hull, singles = _lagrangian(lambda g: np.asarray(now(g), np.float64), genes.allowed, table)
    spent = lambda g: table[np.arange(len(table)), g].sum(axis=-1) + costs.fixed  # noqa: E731
    hull = hull[spent(hull) <= limit * (1 + 1e-9)]
    begin = hull
    if len(hull) > settings.population // 2:  # the other half is for children
        begin = hull[np.linspace(0, len(hull) - 1, settings.population // 2).round().astype(int)]
    of_genes = jnp.asarray(table, jnp.float32)

    def evaluate(genomes: jax.Array) -> tuple[jax.Array, jax.Array]:
        cost = of_genes[jnp.arange(len(table)), genomes].sum(axis=-1) + costs.fixed
        over = jnp.zeros_like(cost) if most is None else jnp.maximum(cost / most - 1 - 1e-6, 0)
        return jnp.stack([cost, -jnp.asarray(of_genomes(genomes), jnp.float32)], axis=1), over

    population = evolve_front(
        evaluate,
        genes.allowed,
        settings,
        seeds=begin if len(begin) else None,
        seed=seed,
        compiled=compiled,
        resume=folder,
        job=said | {"most": most},
        progress=progress,
    )
    if resume is not None and job is None and block is None:
        check_kept(Path(resume), -np.asarray(population.values)[:, 1], now(population.genomes))
    ahead = front(population)
    found = np.asarray(population.genomes)[ahead], -np.asarray(population.values, np.float64)[ahead, 1]
    curves = {"Lagrangian": (hull, np.asarray(now(hull), np.float64) if len(hull) else np.zeros(0)), "NSGA-II": found}
    points = {
        name: tuple(
            SubnetPoint(float(c), float(s), np.asarray(choice))
            for c, s, choice in zip(spent(g), s_of, np.asarray(genes.choice(g)), strict=True)
        )
        for name, (g, s_of) in curves.items()
    }
    return SubnetFront(costs.kind, points, singles + len(hull) + settings.population * (settings.generations + 1))


def _lagrangian(scores: Any, allowed: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, int]:
    """Genomes on the convex front of sums of single losses [any, genes], and how many were scored for it."""
    genes, choices = allowed.shape
    base = (choices - 1 - allowed[:, ::-1].argmax(axis=1)).astype(np.int32)
    where = np.argwhere(allowed & (np.arange(choices) != base[:, None]))
    singles = np.repeat(base[None], len(where) + 1, axis=0)
    singles[np.arange(len(where)), where[:, 0]] = where[:, 1]
    found = scores(singles)
    loss = np.where(allowed, 0.0, np.inf)
    lost = found[-1] - found[:-1]
    loss[where[:, 0], where[:, 1]] = np.where(np.isfinite(lost), lost, np.abs(lost[np.isfinite(lost)]).sum() + 1)
    hull = sweep(np.where(allowed, np.maximum(table, 0), np.inf), loss)
    return np.array([s.choice for s in hull], np.int32).reshape(-1, genes), len(singles)

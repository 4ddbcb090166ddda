"""The search for a subnet of a supernet."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qjax.search.baselines import Baselines, compare_baselines
from qjax.search.evolution import Progress
from qjax.search.genes import Genes
from qjax.search.genetic import Genetic, evolve_best
from qjax.supernet import Domain

Scores = Callable[[Any], Any]
"""Choices int32 [any, N, 5 or 6] -> scores float [any], the larger the better."""


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search found. Printed, it is a table of the choice.

    Attributes:
        choice: int32 [N, 5 or 6], for ``convert``.
        score: of it.
        average: average bits of weights and of activations, where there are some.
        genes: what was searched.
        evaluations: choices that were scored on the way.
        baselines: what it is compared with, if that was asked.
    """

    choice: np.ndarray
    score: float
    average: tuple[float, ...]
    genes: Genes
    evaluations: int = 0
    baselines: Baselines | None = None

    def __repr__(self) -> str:
        bits = " / ".join(f"{v:.2f}" for v in self.average)
        return f"Found(score {self.score:.4g}, {bits} average bits, {len(self.choice)} sites)"

    def __str__(self) -> str:
        sites = self.genes.domain.sites
        wide = max(map(len, sites))
        bits = " / ".join(f"{v:.2f}" for v in self.average)
        lines = [
            f"score {self.score:.4g} of {self.evaluations:,} scored, {bits} average bits",
            f"{'':{wide}}  weights  activations  form of weights, of activations",
        ]
        for name, (w, a, channel, symmetric, inputs, *_) in zip(sites, self.choice.tolist(), strict=True):
            form = ["per channel" if channel else "per tensor", *(_SYMMETRIC[bool(s)] for s in (symmetric, inputs))]
            lines.append(f"{name:{wide}}  {w:>7}  {a or 'float':>11}  {', '.join(form)}")
        return "\n".join([*lines, *(self.baselines.lines() if self.baselines else [])])


_SYMMETRIC = {True: "symmetric", False: "asymmetric"}


def search_choice(
    scores: Scores,
    domain: Domain,
    weights: Sequence[float],
    inputs: Sequence[float],
    budget: float | tuple[float, float],
    *,
    form: tuple[bool, bool, bool] = (True, True, True),
    settings: Genetic | None = None,
    width: float = 0.5,
    seeds: np.ndarray | None = None,
    seed: int = 0,
    baselines: bool = False,
    compiled: bool = True,
    resume: str | Path | None = None,
    job: Any = None,
    progress: Progress | None = None,
) -> Found:
    """Search the subnet of the best score within a budget of average bits.

    Args:
        scores: choices int32 [any, N, 5 or 6] -> float [any], the larger the better: a predictor, or the supernet
            itself under `over_population`.
        domain: of the supernet.
        weights, inputs, budget, width: as for `Genes.windows`.
        form: of all sites.
        settings, seed, compiled, resume, progress: as for `evolve_best`.
        seeds: choices int32 [any, N, 5 or 6] within the budget, to begin with.
        baselines: score as many random valid choices as the search scored, and uniform bits, for comparison.
        job: what is scored, JSON-able.

    Raises:
        SearchError: a budget that no choice satisfies, with what can be reached.
        CheckpointError: ``resume`` holds another job.
    """
    settings = settings or Genetic()
    genes = Genes(domain, form)
    windows = genes.windows(weights, inputs, budget, width)
    found = evolve_best(
        lambda genomes: scores(genes.choice(genomes)),
        genes.allowed,
        windows,
        settings,
        seeds=None if seeds is None else genes.genomes(seeds),
        seed=seed,
        compiled=compiled,
        resume=resume,
        job={"of": job, "form": list(form), "sites": list(domain.sites)},
        progress=progress,
    )
    best = np.asarray(found.genomes[0])
    choice = domain.check(np.asarray(genes.choice(best)))
    count = settings.population + settings.generations * (settings.mutants + settings.crossed)
    against = None
    if baselines:
        against = compare_baselines(jax.jit(scores) if compiled else scores, genes, windows, count, seed)
    return Found(choice, -float(found.values[0, 0]), tuple(windows.of(best[None])[0].tolist()), genes, count, against)

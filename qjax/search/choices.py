"""The search for a subnet of a supernet: by a predictor, or by running the subnets themselves."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qjax.checkpoint.parts import open_job
from qjax.errors import SearchError
from qjax.search.assigning import Budget, amount
from qjax.search.baselines import Baselines, compare_baselines
from qjax.search.evolution import Progress
from qjax.search.genes import Genes
from qjax.search.genetic import Genetic, evolve_best
from qjax.search.site_costs import SiteCosts, budget_windows, by_kind
from qjax.search.whole import Remembered, check_kept
from qjax.search.windows import Windows
from qjax.supernet import Domain

Scores = Callable[[Any], Any]
"""Choices int32 [any, N, 5 or 6] -> scores float [any], the larger the better."""
Given = float | tuple[float, float] | str | Budget
"""Average bits of both or of (weights, activations), or budgets such as "4 bits", "60 kB, 2 ms", "5 mJ"."""


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search found. Printed, it is a table of the choice.

    Attributes:
        choice: int32 [N, 5 or 6], for ``convert``.
        score: of it.
        average: average bits of weights and of activations, where there are some.
        genes: what was searched.
        evaluations: scorings on the way; a choice that was scored twice counts twice.
        baselines: what it is compared with, if that was asked.
        costs: what it costs, by kind, of the costs that were given.
        ranked: the different choices that the search ended with, the best first, int32 [any, N, 5 or 6]: a predictor
            errs, so the best few are worth a run.
    """

    choice: np.ndarray
    score: float
    average: tuple[float, ...]
    genes: Genes
    evaluations: int = 0
    baselines: Baselines | None = None
    costs: Mapping[str, float] = dataclasses.field(default_factory=dict)
    ranked: np.ndarray | None = None

    @property
    def spent(self) -> str:
        """What it costs, in words."""
        bits = " / ".join(f"{v:.2f}" for v in self.average)
        return ", ".join([f"{bits} average bits", *(amount(kind, v) for kind, v in self.costs.items())])

    def __repr__(self) -> str:
        return f"Found(score {self.score:.4g}, {self.spent}, {len(self.choice)} sites)"

    def __str__(self) -> str:
        rows = self.rows()
        wide = [max(len(row[c]) for row in [HEADS, *rows]) for c in range(len(HEADS))]
        lines = [f"score {self.score:.4g} after {self.evaluations:,} scorings, {self.spent}"]
        for name, w, a, form in [HEADS, *rows]:
            lines.append(f"{name:{wide[0]}}  {w:>{wide[1]}}  {a:>{wide[2]}}  {form}")
        return "\n".join([*lines, *(self.baselines.lines() if self.baselines else [])])

    def rows(self) -> list[tuple[str, str, str, str]]:
        """The choice as a table, under `HEADS`."""
        return choice_rows(self.genes.domain, self.choice)


HEADS = ("site", "weights", "activations", "form of weights, of activations")
"""Of the columns of `choice_rows`."""


def choice_rows(domain: Domain, choice: np.ndarray) -> list[tuple[str, str, str, str]]:
    """A choice int32 [N, 5 or 6] as a table: site, bits of both, form."""
    out = []
    for name, (w, a, channel, *symmetric) in zip(domain.sites, choice[:, :5].tolist(), strict=True):
        form = ["per channel" if channel else "per tensor", *("symmetric" if s else "asymmetric" for s in symmetric)]
        out.append((name, str(w), str(a or "float"), ", ".join(form)))
    return out


def search_choice(
    scores: Scores,
    domain: Domain,
    weights: Sequence[float],
    inputs: Sequence[float],
    budget: Given | Sequence[Given],
    *,
    costs: SiteCosts | Sequence[SiteCosts] = (),
    form: tuple[bool, bool, bool] = (True, True, True),
    group: int | None = None,
    settings: Genetic | None = None,
    width: float = 0.5,
    seeds: np.ndarray | None = None,
    seed: int = 0,
    baselines: bool = False,
    compiled: bool = True,
    block: int | None = None,
    resume: str | Path | None = None,
    job: Any = None,
    progress: Progress | None = None,
) -> Found:
    """Search the subnet of the best score within a budget, or within several at once.

    Args:
        scores: choices int32 [any, N, 5 or 6] -> float [any], the larger the better: a predictor, or with ``block``
            the supernet itself under `over_population`.
        domain: of the supernet.
        weights, inputs: sizes of the sites (`qjax.supernet.sizes`).
        budget: average bits, as numbers or "4 bits": EQ-Net's window of ``width`` below it, for weights and for
            activations; or "60 kB", "2 ms", "5 mJ" with ``costs`` of these kinds; or several ("4 bits, 60 kB", or
            a list), which are upper ends alone.
        costs: from `site_costs`, or tables of your own; one, or one of each kind.
        form: of all sites.
        group: of all sites, where the space has groups; None is its first.
        settings, seed, compiled, progress: as for `evolve_best`.
        width: of the windows of average bits.
        seeds: choices int32 [any, N, 5 or 6] within the budget, to begin with.
        baselines: score as many random valid choices as the search scored, and uniform bits, for comparison.
        block: evaluate directly: ``scores`` is called with arrays of exactly so many choices, so that it compiles once,
            and no choice is scored twice.
        resume: a folder. The population is kept after every generation, and of a direct evaluation every score, for
            other budgets too: killed at any moment, the search ends with the same result.
        job: what is scored, JSON-able, by which a folder of another job is told. None tells it by the scores: a block
            of the kept ones is measured again.

    Raises:
        SearchError: a budget that no choice satisfies, with what can be reached; or one without its costs.
        CheckpointError: ``resume`` holds another job.
    """
    settings = settings or Genetic()
    known = by_kind(costs, domain)
    genes = Genes(domain, form, group=group)
    if not all(genes.additive(c.table) for c in known.values()):
        genes = dataclasses.replace(genes, paired=True)
    windows = budget_windows(genes, weights, inputs, budgets_of(budget), width, known)
    said = {"job": job, "form": genes.said, "sites": list(domain.sites)}
    if block is None:
        score, folder = scores, resume
    else:
        score, folder = direct(scores, domain, block, resume, job), None
        compiled = False
        if resume is not None:
            how = {k: v for k, v in dataclasses.asdict(settings).items() if k != "generations"}  # more go on
            asked = [said["form"], windows.described(), how, seed, genes.paired]
            folder = Path(resume) / f"population-{hashlib.sha256(repr(asked).encode()).hexdigest()[:12]}"
    found = evolve_best(
        lambda genomes: score(genes.choice(genomes)),
        genes.allowed,
        windows,
        settings,
        seeds=None if seeds is None else genes.genomes(seeds),
        seed=seed,
        compiled=compiled,
        resume=folder,
        job=said,
        progress=progress,
    )
    if resume is not None and job is None and block is None:
        check_kept(Path(resume), -np.asarray(found.values)[:, 0], score(genes.choice(found.genomes)))
    fine = np.isfinite(np.asarray(found.values)[:, 0])
    last = list(dict.fromkeys(map(tuple, np.asarray(found.genomes)[fine].tolist())))
    ranked = np.asarray(genes.choice(np.array(last, np.int32)))
    choice = domain.check(ranked[0])
    count = settings.population + settings.generations * (settings.mutants + settings.crossed)
    against = None
    if baselines:
        against = compare_baselines(jax.jit(score) if compiled else score, genes, windows, count, seed)
    spent = {kind: float(c.of(choice)) for kind, c in known.items()}
    value = -float(found.values[0, 0])
    return Found(choice, value, average_of(genes, weights, inputs, choice), genes, count, against, spent, ranked)


def best_as_run(
    found: Found,
    run: Scores,
    scores: Scores,
    weights: Sequence[float],
    inputs: Sequence[float],
    costs: Sequence[SiteCosts] = (),
    *,
    block: int = 8,
    also: Any = (),
) -> tuple[Found, float]:
    """Run the best few that a search by a predictor ended with, and take the one that is best then.

    Args:
        found: from `search_choice`, or of a choice among its `Found.ranked`.
        run: choices int32 [block, N, 5 or 6] -> measured scores float [block]; always with as many choices.
        scores: the predictor.
        weights, inputs, costs: as for `search_choice`.
        block: how many are run at a time, and of what the search ended with.
        also: others to run, int32 [any, N, 5 or 6], within the budget as well: such as `uniform_choices`, which a
            predictor may rank too low.

    Returns:
        What was found with this choice in place of the first; ``score`` stays what the predictor says, and
        ``ranked`` are those that were run, the best first. And the score as measured.

    Raises:
        SearchError: ``found`` is of no search, or no score is a number.
    """
    if found.ranked is None:
        raise SearchError("best_as_run: this result is of no search; give what search_choice returned")
    few = np.concatenate([found.ranked[:block], np.asarray(also, np.int32).reshape(-1, *found.choice.shape)])
    measured = in_blocks(run, few, block)
    if np.isnan(measured).all():
        raise SearchError("best_as_run: no choice has a score that is a number; look at what scores them")
    at = int(np.nanargmax(measured))
    choice = found.genes.domain.check(few[at])
    spent = {kind: float(c.of(choice)) for kind, c in by_kind(costs, found.genes.domain).items()}
    predicted = float(np.asarray(scores(choice[None]))[0])
    average = average_of(found.genes, weights, inputs, choice)
    ran = few[np.argsort(np.where(np.isnan(measured), np.inf, -measured), kind="stable")]
    best = dataclasses.replace(found, choice=choice, score=predicted, average=average, costs=spent, ranked=ran)
    return best, float(measured[at])


def in_blocks(run: Scores, choices: np.ndarray, block: int) -> np.ndarray:
    """Scores float64 [any] of choices [any, N, 5 or 6] that are run exactly so many at a time."""
    full = np.concatenate([choices, np.repeat(choices[-1:], -len(choices) % block, axis=0)])
    parts = [np.asarray(run(full[at : at + block]), np.float64) for at in range(0, len(full), block)]
    return np.concatenate([np.zeros(0), *parts])[: len(choices)]


def budgets_of(budget: Any) -> list[float | tuple[float, float] | Budget]:
    """What `search_choice` takes as a budget, as a list.

    Raises:
        SearchError: a text that says no budget.
    """
    pair = isinstance(budget, tuple) and len(budget) == 2 and all(isinstance(v, int | float) for v in budget)
    if isinstance(budget, str):
        budget = [part.strip() for part in budget.split(",")]
    many = [budget] if pair or isinstance(budget, Budget | int | float) else list(budget)
    return [Budget.of(one) if isinstance(one, str) else one for one in many]


def average_of(genes: Genes, weights: Sequence[float], inputs: Sequence[float], choice: Any) -> tuple[float, ...]:
    """Average bits of weights and of activations of a choice, where there are some."""
    apart = dataclasses.replace(genes, paired=False)
    every: Windows = apart.windows(weights, inputs, 100.0, 1000.0)
    return tuple(every.of(apart.genomes(choice)[None])[0].tolist())


def direct(scores: Scores, domain: Domain, block: int, resume: str | Path | None, job: Any) -> Scores:
    """Scores that are measured: so many at a time, none twice, and kept in a folder.

    Raises:
        CheckpointError: ``resume`` holds another job.
    """
    file = None
    if resume is not None:
        what = {"job": job, "sites": list(domain.sites), "space": domain.space.to_dict()}
        file = open_job(resume, what, "search of subnets") / "measured.jsonl"

    def losses(flat: np.ndarray) -> np.ndarray:
        found = np.asarray(scores(flat.reshape(-1, *domain.shape)), np.float64)
        if found.shape != (len(flat),):
            raise SearchError(
                f"the scores of a block of {len(flat)} choices are of shape {list(found.shape)}; one for each is "
                f"needed, [{len(flat)}]: map over the choices (qjax.search.over_population, or jax.lax.map)"
            )
        return -found

    memory = Remembered(losses, file, block, check=job is None)
    return lambda choices: -memory(np.asarray(choices).reshape(len(choices), -1))

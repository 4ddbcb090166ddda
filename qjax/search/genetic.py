"""The genetic search of EQ-Net: the assignment of the best score whose costs lie in given windows.

    population    valid assignments, drawn near the middle of the windows
    generation    the best are parents; mutants (each gene drawn anew with some probability) and children of two parents
                  (each gene from either) are made until they are valid, and scored; the best of parents, mutants and
                  children are the next parents

Costs are sums of a table, one for each budget, so a budget may be average bits of weights, of activations, bytes, or
latency and energy of a cost model; where these depend on weights and activations together, a gene is a pair of both.

Decided here, where the paper and its code leave room:

- The first population is drawn as `qjax.search.windows` says.
- A child that is not valid after ``retries`` draws is a copy of a parent. (The code draws without end.)
- Copies of an assignment are no parents; children of the last generation count. (The code scores them and never looks.)

Source: Xu et al., "EQ-Net", ICCV 2023, section 3.4, and its code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import SearchError
from qjax.search.evolution import Kept, Progress, check_genomes, digest
from qjax.search.nsga2 import Population, check_mask, copies, drawn
from qjax.search.windows import Windows, drawing, none_within, outside_of, until_valid

Score = Callable[[jax.Array], jax.Array]
"""Genomes int32 [any, genes] -> scores float [any], the larger the better."""


@dataclasses.dataclass(frozen=True)
class Genetic:
    """Settings; the usual ones are those of EQ-Net's code.

    Attributes:
        population: assignments to begin with.
        parents: of a generation.
        mutants, crossed: made in each generation.
        generations: how many.
        mutation: probability with which a gene of a mutant is drawn anew.
        retries: how often what is not valid is drawn again.
    """

    population: int = 100
    parents: int = 25
    mutants: int = 50
    crossed: int = 50
    generations: int = 500
    mutation: float = 0.1
    retries: int = 100

    def __post_init__(self) -> None:
        for name in ("population", "parents", "mutants", "crossed", "generations", "retries"):
            value, least = getattr(self, name), 0 if name in ("mutants", "crossed", "generations") else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SearchError(f"{name}={value!r}; a whole number of {least} or more is needed")
        if self.parents > self.population:
            raise SearchError(f"parents={self.parents} of a population={self.population}; there cannot be more")
        if not 0 <= self.mutation <= 1:
            raise SearchError(f"mutation={self.mutation!r}; a probability from 0 to 1 is needed")


def offspring(
    key: jax.Array,
    parents: jax.Array,
    allowed: jax.Array,
    outside: Callable[[jax.Array], jax.Array],
    settings: Genetic,
) -> jax.Array:
    """Mutants, then children of two parents: int32 [mutants + crossed, genes], all valid if the parents are."""
    of_mutants, of_crossed, chosen = jax.random.split(key, 3)
    count, genes = parents.shape

    def some(u: jax.Array) -> jax.Array:
        return parents[jnp.floor(u * count).astype(jnp.int32)]

    def mutants(key: jax.Array) -> jax.Array:
        u = jax.random.uniform(key, (settings.mutants, 2 * genes + 1))
        fresh = drawn(u[:, 1 + genes :], allowed)
        return jnp.where(u[:, 1 : 1 + genes] < settings.mutation, fresh, some(u[:, 0]))

    def crossed(key: jax.Array) -> jax.Array:
        u = jax.random.uniform(key, (settings.crossed, genes + 2))
        return jnp.where(u[:, 2:] < 0.5, some(u[:, 0]), some(u[:, 1]))

    made = [until_valid(k, f, outside, settings.retries) for k, f in ((of_mutants, mutants), (of_crossed, crossed))]
    genomes, fine = (jnp.concatenate(part) for part in zip(*made, strict=True))
    instead = some(jax.random.uniform(chosen, (len(genomes),)))
    return jnp.where(fine[:, None], genomes, instead)


def fittest(population: Population, count: int) -> Population:
    """Those of the best score, the best first; invalid ones and copies last, NaN behind all that are valid."""
    value = jnp.where(jnp.isnan(population.values[:, 0]), jnp.inf, population.values[:, 0])
    order = jnp.lexsort((value, copies(population.genomes), population.violation))[:count]
    return Population(population.genomes[order], value[order][:, None], population.violation[order])


def evolve_best(
    score: Score,
    allowed: np.ndarray,
    windows: Windows,
    settings: Genetic | None = None,
    *,
    seeds: np.ndarray | None = None,
    seed: int = 0,
    compiled: bool = True,
    resume: str | Path | None = None,
    job: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Population:
    """Search for the assignment of the best score within windows of cost.

    Args:
        score: genomes int32 [any, genes] -> float [any], the larger the better, such as a predicted accuracy.
        allowed: bool [genes, choices].
        windows: what assignments may cost.
        settings: None takes those of EQ-Net.
        seeds: int32 [any, genes], valid assignments that replace some of the first population.
        seed: of all draws.
        compiled: whether ``score`` may be traced: a generation is then one program.
        resume: a folder in which the parents are kept after every generation.
        job: what is scored, JSON-able: a folder of something else is refused.
        progress: called after every generation with the parents.

    Returns:
        The last parents, the best first, all valid; their values are the negative scores.

    Raises:
        SearchError: windows that nothing reaches or is found in, seeds or a mask that cannot be, scores that are all
            NaN.
        CheckpointError: ``resume`` holds another job, or is damaged.
    """
    settings = settings or Genetic()
    allowed = check_mask(allowed)
    if windows.costs.shape[1:] != allowed.shape:
        raise SearchError(f"costs {windows.costs.shape} do not fit genes and choices {allowed.shape}")
    begin = drawing(windows, allowed, settings.population, 20 * settings.retries)
    given = np.zeros((0, len(allowed)), np.int32) if seeds is None else check_genomes(seeds, allowed)
    if not windows.hold(given).all():
        raise SearchError(f"seed {int(windows.hold(given).argmin())} is outside the windows")
    kept = Kept(
        resume,
        {
            "search": "genetic",
            "seed": seed,
            **{name: value for name, value in dataclasses.asdict(settings).items() if name != "generations"},
            "allowed": digest(allowed),
            "windows": windows.described(),
            "seeds": digest(given),
            "job": dict(job or {}),
        },
    )
    mask, key = jnp.asarray(allowed), jax.random.key(seed)
    outside = outside_of(windows, allowed)

    def scored(genomes: jax.Array) -> Population:
        values = -jnp.asarray(score(genomes), jnp.float32)[:, None]
        return Population(genomes, values, jnp.zeros(len(genomes), jnp.float32))

    def chosen(parents: Population, made: Population) -> Population:
        both = Population(*(jnp.concatenate(pair) for pair in zip(parents, made, strict=True)))
        return fittest(both, len(parents.genomes))

    def step(key: jax.Array, parents: Population) -> Population:
        return chosen(parents, scored(offspring(key, parents.genomes, mask, outside, settings)))

    found = kept.load()
    if found is None:
        genomes, fine = begin(jax.random.fold_in(key, 0))
        there = np.concatenate([given, np.asarray(genomes)[np.asarray(fine)]])[: settings.population]
        if not len(there):
            raise SearchError(none_within(windows, allowed, 20 * settings.retries * settings.population, seed))
        if len(there) < settings.parents:
            raise SearchError(
                f"{len(there)} valid assignments were found in {20 * settings.retries} draws of {settings.population}, "
                f"and {settings.parents} are needed to begin with; widen the windows, or raise retries"
            )
        parents, done = fittest(scored(jnp.asarray(there, jnp.int32)), settings.parents), 0
        kept.save(parents, done)
    else:
        parents, done = found
    if progress:
        progress(done, parents)
    if compiled:
        go_on = jax.jit(step)
    else:
        propose = jax.jit(lambda k, p: offspring(k, p.genomes, mask, outside, settings))
        select = jax.jit(chosen)

        def go_on(k: jax.Array, p: Population) -> Population:
            return select(p, scored(propose(k, p)))

    for number in range(done + 1, settings.generations + 1):
        parents = go_on(jax.random.fold_in(key, number), parents)
        kept.save(parents, number)
        if progress:
            progress(number, parents)
    if not np.isfinite(np.asarray(parents.values)[0, 0]):
        raise SearchError("no assignment has a score that is a number; look at what scores them")
    return parents

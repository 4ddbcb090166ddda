"""NSGA-II over assignments: pure functions on arrays, a whole generation in one compiled program.

A genome is int32 [genes], one choice of ``choices`` for each gene; which choices a gene has is a mask. A population has

    values      float32 [size, objectives], all to be made small
    violation   float32 [size], how far an assignment is beyond the budgets; 0 where it is valid

Of two assignments the valid one is better, of two that are not the one that violates less, of two alike the one that
is nowhere worse and somewhere better (Deb et al. 2002, section VI). A generation takes parents by tournaments of two,
crosses them gene by gene, gives some genes another choice, evaluates the children, and keeps the best of parents and
children: whole fronts of undominated assignments, of the last front those with the most room around them.

Decided here: of equal genomes one counts and copies stand behind all else, so that the front does not fill up with
copies; a value that is NaN makes its assignment worse than any other.

Source: K. Deb, A. Pratap, S. Agarwal, T. Meyarivan, "A fast and elitist multiobjective genetic algorithm: NSGA-II",
IEEE Transactions on Evolutionary Computation 6(2), 2002.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.errors import SearchError

Evaluate = Callable[[jax.Array], tuple[jax.Array, jax.Array]]
"""genomes int32 [any, genes] -> (values float [any, objectives], violation float [any])."""


@dataclasses.dataclass(frozen=True)
class NSGA2:
    """Settings.

    Attributes:
        population: assignments that are kept, even.
        generations: how often as many children are made and evaluated.
        crossover: share of pairs that are crossed; the others are copied before they mutate.
        mutation: probability with which a gene takes another choice; None is one gene of a child on average.
        near: share of those that go to a neighbouring choice; the others go to any. Choices in the order of their bits
            make this worth while.
    """

    population: int = 64
    generations: int = 50
    crossover: float = 0.9
    mutation: float | None = None
    near: float = 0.5

    def __post_init__(self) -> None:
        for name, least in (("population", 4), ("generations", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SearchError(f"{name}={value!r}; a whole number of {least} or more is needed")
        if self.population % 2:
            raise SearchError(f"population={self.population}; an even number is needed, children come in pairs")
        for name in ("crossover", "mutation", "near"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise SearchError(f"{name}={value!r}; a probability from 0 to 1 is needed")

    @property
    def operators(self) -> dict[str, Any]:
        """What `children` takes."""
        return {"crossover": self.crossover, "mutation": self.mutation, "near": self.near}


class Population(NamedTuple):
    """Assignments and what is known of them.

    Attributes:
        genomes: int32 [size, genes].
        values: float32 [size, objectives].
        violation: float32 [size].
    """

    genomes: jax.Array
    values: jax.Array
    violation: jax.Array


# -- Choices of genes --------------------------------------------------------------------------------------------------


def check_mask(allowed: np.ndarray) -> np.ndarray:
    """The mask of choices as bool [genes, choices].

    Raises:
        SearchError: another shape, a gene without a choice, or nothing that could differ.
    """
    allowed = np.asarray(allowed, bool)
    if allowed.ndim != 2 or not allowed.size:
        raise SearchError(
            f"a mask of shape {allowed.shape} says which choices each gene has; [genes, choices] is needed"
        )
    count = allowed.sum(axis=1)
    if not count.all():
        raise SearchError(f"gene {int(count.argmin())} has no choice")
    if (count == 1).all():
        raise SearchError("every gene has one choice alone, so there is one assignment and nothing to search")
    return allowed


def draw(key: jax.Array, allowed: jax.Array, size: int) -> jax.Array:
    """Genomes int32 [size, genes] with every choice that a gene has equally likely."""
    return drawn(jax.random.uniform(key, (size, allowed.shape[0])), allowed)


def drawn(u: jax.Array, allowed: jax.Array) -> jax.Array:
    """Genomes from uniform numbers [..., genes]."""
    return nth_choice(allowed, jnp.floor(u * allowed.sum(axis=1)).astype(jnp.int32))


def nth_choice(allowed: jax.Array, n: jax.Array) -> jax.Array:
    """The n-th (from 0) choice that each gene has: [..., genes] -> [..., genes]."""
    order = jnp.argsort(~allowed, axis=1, stable=True)  # those that there are first
    n = jnp.clip(n, 0, allowed.sum(axis=1) - 1)
    return jnp.take_along_axis(jnp.broadcast_to(order, (*n.shape, order.shape[1])), n[..., None], axis=-1)[
        ..., 0
    ].astype(jnp.int32)


def mutate(
    key: jax.Array, genomes: jax.Array, allowed: jax.Array, probability: float | jax.Array, near: float = 0.0
) -> jax.Array:
    """Give each gene with some probability another of its choices, all others equally likely.

    Args:
        key: of the draws.
        genomes: int32 [size, genes].
        allowed: bool [genes, choices].
        probability: for each gene.
        near: share of the changes that go one choice up or down instead; at an end they go inwards.
    """
    which, other, close, way = jax.random.uniform(key, (4, *genomes.shape))  # one draw compiles sooner than four
    count = allowed.sum(axis=1)
    place = jnp.cumsum(allowed, axis=1) - 1  # of each choice among those of its gene
    now = jnp.take_along_axis(jnp.broadcast_to(place, (*genomes.shape, place.shape[1])), genomes[..., None], axis=-1)[
        ..., 0
    ]
    step = 1 + jnp.floor(other * (count - 1)).astype(jnp.int32)
    fresh = nth_choice(allowed, (now + jnp.minimum(step, jnp.maximum(count - 1, 1))) % count)
    up = jnp.where(now == 0, True, jnp.where(now == count - 1, False, way < 0.5))
    beside = nth_choice(allowed, now + jnp.where(up, 1, -1))
    fresh = jnp.where(close < near, beside, fresh)
    hit = (which < probability) & (count > 1)
    return jnp.where(hit, fresh, genomes)


def cross(swap: jax.Array, first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two children of each pair: genes of the first are the second parent's where ``swap``, the other has the rest."""
    return jnp.where(swap, second, first), jnp.where(swap, first, second)


# -- Who is better -----------------------------------------------------------------------------------------------------


def dominates(values: jax.Array, violation: jax.Array) -> jax.Array:
    """Whether the row's assignment is better than the column's: bool [n, n]."""
    a, b = values[:, None], values[None]
    pareto = (a <= b).all(-1) & (a < b).any(-1)
    va, vb = violation[:, None], violation[None]
    return (va < vb) | ((va == vb) & pareto)


def ranks(values: jax.Array, violation: jax.Array) -> jax.Array:
    """int32 [n]: 0 for assignments that none dominates, 1 for those only dominated by rank 0, and so on."""
    better = dominates(values, violation)

    def peel(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rank, level = state
        left = rank < 0
        free = left & ~(better & left[:, None]).any(axis=0)
        return jnp.where(free, level, rank), level + 1

    start = jnp.full(len(values), -1, jnp.int32), jnp.int32(0)
    return lax.while_loop(lambda s: (s[0] < 0).any(), peel, start)[0]


def crowding(values: jax.Array, rank: jax.Array) -> jax.Array:
    """float32 [n]: how much room an assignment has in its front; infinite at both ends of every objective."""
    n = len(values)
    room = jnp.zeros(n, jnp.float32)
    for column in values.T:
        order = jnp.lexsort((column, rank))
        v, r = column[order], rank[order]
        low = jax.ops.segment_min(v, r, n)[r]
        width = jax.ops.segment_max(v, r, n)[r] - low
        before = jnp.concatenate([v[:1], v[:-1]])
        after = jnp.concatenate([v[1:], v[-1:]])
        changed = r[1:] != r[:-1]
        end = jnp.append(True, changed) | jnp.append(changed, True)
        some = (width > 0) & jnp.isfinite(width)  # values that were not measured are infinite
        gap = jnp.where(some, (after - before) / jnp.where(some, width, 1), 0)
        room = room.at[order].add(jnp.where(end, jnp.inf, gap).astype(jnp.float32))
    return room


def copies(genomes: jax.Array) -> jax.Array:
    """Whether an equal genome stands before it: bool [n].

    Genomes are brought together by 64 bits of hash and compared as they are: none is called a copy that is not. (Of
    two genomes with one hash, which happens once in 10^19 pairs, a copy may be missed.)
    """
    factors = np.random.default_rng(0).integers(0, 2**32, (genomes.shape[1], 2), np.uint32) | np.uint32(1)
    hashes = ((genomes.astype(jnp.uint32)[..., None] + 1) * factors).sum(axis=1)
    order = jnp.lexsort((jnp.arange(len(genomes)), hashes[:, 0], hashes[:, 1]))
    together = genomes[order]
    same = jnp.append(False, (together[1:] == together[:-1]).all(axis=1))
    return jnp.zeros(len(genomes), bool).at[order].set(same)


def best_first(population: Population) -> tuple[Population, jax.Array, jax.Array]:
    """The population in the order of selection, with ranks int32 [n] and room float32 [n]; copies last."""
    bad = jnp.isnan(population.values).any(axis=1) | jnp.isnan(population.violation)
    values = jnp.where(bad[:, None], jnp.inf, population.values)
    violation = jnp.where(bad, jnp.inf, population.violation)
    copy = copies(population.genomes)
    # A copy is equal to its original in everything, so it may be moved without changing the ranks of others.
    rank = jnp.where(copy, len(values), ranks(values, violation))
    room = crowding(values, jnp.minimum(rank, len(values) - 1))
    order = jnp.lexsort((-room, rank))
    return Population(population.genomes[order], values[order], violation[order]), rank[order], room[order]


# -- A generation ------------------------------------------------------------------------------------------------------


def children(
    key: jax.Array,
    genomes: jax.Array,
    allowed: jax.Array,
    *,
    crossover: float = 0.9,
    mutation: float | None = None,
    near: float = 0.0,
) -> jax.Array:
    """As many children as there are parents.

    Args:
        key: of all draws.
        genomes: int32 [even, genes], the best first: of two drawn at random the earlier one is a parent.
        allowed: bool [genes, choices].
        crossover, mutation, near: as in `NSGA2`.
    """
    size, genes = genomes.shape
    drawn, mutated = jax.random.split(key)
    u = jax.random.uniform(drawn, (size // 2, genes + 5))
    parents = jnp.floor(u[:, :4] * size).astype(jnp.int32).reshape(-1, 2, 2).min(axis=2)  # tournaments of the sorted
    first, second = genomes[parents[:, 0]], genomes[parents[:, 1]]
    one, other = cross(u[:, 5:] < 0.5, first, second)
    pair = u[:, 4:5] < crossover
    made = jnp.concatenate([jnp.where(pair, one, first), jnp.where(pair, other, second)])
    return mutate(mutated, made, allowed, 1 / genes if mutation is None else mutation, near)


def survivors(parents: Population, offspring: Population) -> Population:
    """The best of both, as many as there are parents, the best first."""
    both = Population(*(jnp.concatenate(pair) for pair in zip(parents, offspring, strict=True)))
    return Population(*(part[: len(parents.genomes)] for part in best_first(both)[0]))


def evaluated(genomes: jax.Array, evaluate: Evaluate) -> Population:
    """A population of genomes as they stand."""
    values, violation = evaluate(genomes)
    return Population(genomes, values.astype(jnp.float32), violation.astype(jnp.float32))


def generation(
    key: jax.Array, parents: Population, allowed: jax.Array, evaluate: Evaluate, settings: NSGA2
) -> Population:
    """One generation; compiles as a whole where ``evaluate`` does.

    Args:
        key: of this generation.
        parents: the best first, as `survivors` gives them.
        allowed: bool [genes, choices].
        evaluate: of the children.
        settings: how children are made.
    """
    made = children(key, parents.genomes, allowed, **settings.operators)
    return survivors(parents, evaluated(made, evaluate))


def first_genomes(key: jax.Array, allowed: jax.Array, size: int, seeds: jax.Array | np.ndarray | None) -> jax.Array:
    """Seeds, then children of them and random genomes in equal parts, ``size`` in all.

    Args:
        key: of the draws.
        allowed: bool [genes, choices].
        size: of the population.
        seeds: int32 [any, genes]; of more than ``size`` evenly spaced ones are taken.
    """
    fresh, chosen, moved = jax.random.split(key, 3)
    genomes = draw(fresh, allowed, size)
    if seeds is None or not len(seeds):
        return genomes
    seeds = jnp.asarray(seeds, jnp.int32)
    if len(seeds) > size:
        seeds = seeds[np.linspace(0, len(seeds) - 1, size).round().astype(int)]
    near = mutate(moved, seeds[jax.random.randint(chosen, (size,), 0, len(seeds))], allowed, 2 / len(allowed))
    mixed = jnp.where((jnp.arange(size) % 2 == 0)[:, None], near, genomes)
    return jnp.concatenate([seeds, mixed[: size - len(seeds)]])


# -- Fronts ------------------------------------------------------------------------------------------------------------


def front(population: Population) -> np.ndarray:
    """Positions of the valid assignments that none dominates, by the first objective; copies and NaN left out."""
    values, violation = np.asarray(population.values), np.asarray(population.violation)
    where = np.flatnonzero(np.isfinite(values).all(axis=1) & (violation <= 0))
    where = where[np.lexsort((where, *values[where].T[::-1]))]
    kept: list[int] = []
    for n in where:
        if not any((values[k] <= values[n]).all() for k in kept):
            kept.append(int(n))
    return np.array(kept, int)


def hypervolume(values: np.ndarray, reference: np.ndarray) -> float:
    """The area that points with two objectives dominate up to a reference point; larger is better.

    Args:
        values: float [n, 2].
        reference: float [2]; points beyond it add nothing.

    Raises:
        SearchError: not two objectives.
    """
    values, reference = np.asarray(values, np.float64), np.asarray(reference, np.float64)
    if values.ndim != 2 or values.shape[1] != 2 or reference.shape != (2,):
        raise SearchError(f"values {values.shape} and reference {reference.shape}; [n, 2] and [2] are needed")
    values = values[(values < reference).all(axis=1)]
    area, height = 0.0, reference[1]
    for x, y in values[np.lexsort((values[:, 1], values[:, 0]))]:
        if y < height:
            area += (reference[0] - x) * (height - y)
            height = y
    return float(area)

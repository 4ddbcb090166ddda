"""The genetic search of EQ-Net: the assignment of the best score whose costs lie in given windows.

    population    valid assignments, drawn near the middle of the windows
    generation    the best are parents; mutants (each gene drawn anew with some probability) and children of two parents
                  (each gene from either) are made until they are valid, and scored; the best of parents, mutants and
                  children are the next parents

Costs are sums of a table, one for each budget, so a budget may be average bits of weights, of activations, bytes, or
latency and energy of a cost model; where these depend on weights and activations together, a gene is a pair of both.

Decided here, where the paper and its code leave room:

- The first population. The code counts, over 500,000 random assignments, how often a layer has some bits given their
  average, and draws layers by these frequencies. They tend to P(choice) proportional to exp(-lambda cost) with the
  lambda that gives the average (among assignments of one sum all are equally likely under it, as in the count), which
  is computed: it has no empty bins at the ends, and takes any number of budgets.
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
from jax import lax

from qjax.errors import SearchError
from qjax.search.evolution import Kept, Progress, check_genomes, digest
from qjax.search.nsga2 import Population, check_mask, copies, drawn

Score = Callable[[jax.Array], jax.Array]
"""Genomes int32 [any, genes] -> scores float [any], the larger the better."""
SLACK = 1e-6
"""Room at the ends of windows, relative to the upper one, for the rounding of sums; in float32 half of it is used, so
that what is valid there is valid."""


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


@dataclasses.dataclass(frozen=True)
class Windows:
    """What assignments may cost: ``low < cost <= high`` for every budget.

    Attributes:
        costs: float [budgets, genes, choices]; an assignment's cost is the sum over its genes. Choices that a gene
            does not have may be anything.
        low, high: float [budgets].
        names: of the budgets, for messages.
    """

    costs: np.ndarray
    low: np.ndarray
    high: np.ndarray
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("costs", "low", "high"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), np.float64))
        budgets = self.costs.shape[0] if self.costs.ndim == 3 else -1
        if self.low.shape != (budgets,) or self.high.shape != (budgets,) or not budgets:
            raise SearchError(
                f"windows of costs {self.costs.shape}, low {self.low.shape} and high {self.high.shape}; "
                "[budgets, genes, choices], [budgets] and [budgets] are needed"
            )
        if not (self.low < self.high).all():
            raise SearchError(f"windows from {self.low.tolist()} to {self.high.tolist()}: a lower end is not below")

    def name(self, budget: int) -> str:
        """What messages call a budget."""
        return self.names[budget] if self.names else f"budget {budget}"

    def of(self, genomes: Any) -> np.ndarray:
        """Costs float64 [any, budgets]."""
        genomes = np.asarray(genomes)
        return self.costs[:, np.arange(genomes.shape[1]), genomes].sum(axis=-1).T

    def hold(self, genomes: Any) -> np.ndarray:
        """Which assignments are within all windows: bool [any]."""
        costs = self.of(genomes)
        room = SLACK * np.abs(self.high)
        return np.asarray(((costs > self.low + room) & (costs <= self.high + room)).all(axis=1))


def average_bits(sizes: np.ndarray, bits: np.ndarray, budget: float, width: float = 0.5, pad: int = 0) -> Windows:
    """The window of EQ-Net: budget - 0.5 < average bits <= budget.

    Args:
        sizes: numbers in the weights (or inputs) of each gene; 0 for layers that do not count, as the first and last.
        bits: of each choice.
        budget: average bits.
        width: of the window.
        pad: genes behind these that cost nothing here, such as those of activations.
    """
    sizes, bits = np.asarray(sizes, np.float64), np.asarray(bits, np.float64)
    if not sizes.sum() > 0 or (sizes < 0).any():
        raise SearchError("sizes of layers are not negative numbers, and one of them counts")
    table = np.zeros((1, len(sizes) + pad, len(bits)))
    table[0, : len(sizes)] = sizes[:, None] * bits / sizes.sum()
    return Windows(table, np.array([budget - width]), np.array([budget]), ("average bits",))


# -- Drawing -----------------------------------------------------------------------------------------------------------


def tilted(windows: Windows, allowed: np.ndarray, target: np.ndarray | None = None) -> np.ndarray:
    """Probabilities float64 [genes, choices] under which assignments cost ``target`` on average, and else are random.

    Args:
        windows: the costs.
        allowed: bool [genes, choices].
        target: float [budgets]; None takes the middle of what can be reached within the windows.

    Raises:
        SearchError: a window that no assignment reaches; the message says what can be reached.
    """
    costs = np.where(allowed, windows.costs, 0.0)
    least = np.where(allowed, windows.costs, np.inf).min(axis=-1).sum(axis=-1)
    most = np.where(allowed, windows.costs, -np.inf).max(axis=-1).sum(axis=-1)
    for n, (a, b) in enumerate(zip(least, most, strict=True)):
        if a > windows.high[n] * (1 + SLACK) or b <= windows.low[n]:
            raise SearchError(
                f"no assignment has {windows.name(n)} above {windows.low[n]:g} and up to {windows.high[n]:g}; "
                f"{a:g} to {b:g} can be reached"
            )
    low, high = np.maximum(windows.low, least), np.minimum(windows.high, most)
    wanted = (low + high) / 2 if target is None else np.asarray(target, np.float64)
    edge = 1e-3 * (most - least)
    wanted = np.clip(wanted, least + edge, most - edge)
    scale = np.where(most > least, most - least, 1.0)
    costs, wanted = costs / scale[:, None, None], wanted / scale
    free = most > least  # a budget that no choice changes needs no multiplier
    multiplier = np.zeros(len(scale))

    def at(multiplier: np.ndarray) -> tuple[np.ndarray, float]:
        logits = np.where(allowed, -np.tensordot(multiplier, costs, 1), -np.inf)
        top = logits.max(axis=1, keepdims=True)
        weights = np.exp(logits - top)
        total = weights.sum(axis=1, keepdims=True)
        return weights / total, float((np.log(total) + top).sum() + multiplier @ wanted)

    for _ in range(200):  # Newton's method on a convex function of as many variables as there are budgets
        p, value = at(multiplier)
        mean = np.einsum("gc,bgc->bg", p, costs)
        gradient = np.where(free, wanted - mean.sum(axis=1), 0.0)
        if abs(gradient).max() < 1e-9:
            break
        second = np.einsum("gc,agc,bgc->ab", p, costs, costs) - mean @ mean.T
        step = -np.linalg.lstsq(second + 1e-12 * np.eye(len(scale)), gradient, rcond=None)[0]
        size = 1.0
        while size > 1e-8 and at(multiplier + size * step)[1] > value + 1e-4 * size * float(gradient @ step):
            size /= 2
        multiplier = multiplier + size * step
    return at(multiplier)[0]


def violations(genomes: jax.Array, costs: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """How far assignments are outside the windows, in parts of the upper ends, summed: float32 [any]."""
    spent = costs[:, jnp.arange(genomes.shape[1]), genomes].sum(axis=-1)  # [budgets, any]
    room = SLACK * jnp.abs(high)[:, None]
    over = jnp.maximum(spent - high[:, None] - room / 2, 0)
    under = jnp.maximum(low[:, None] + 1.5 * room - spent, 0)
    return ((over + under) / (room / SLACK)).sum(axis=0)


def until_valid(
    key: jax.Array, make: Callable[[jax.Array], jax.Array], outside: Callable[[jax.Array], jax.Array], retries: int
) -> tuple[jax.Array, jax.Array]:
    """Make assignments again where they are not valid, at most so often.

    Args:
        key: of the draws.
        make: key -> genomes.
        outside: genomes -> violation, 0 where they are valid.
        retries: how often more.

    Returns:
        Genomes, and which are valid.
    """

    def again(state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        genomes, fine, n = state
        fresh = make(jax.random.fold_in(key, n))
        return jnp.where(fine[:, None], genomes, fresh), fine | (outside(fresh) <= 0), n + 1

    first = make(jax.random.fold_in(key, 0))
    state = first, outside(first) <= 0, jnp.int32(1)
    return lax.while_loop(lambda s: ~s[1].all() & (s[2] <= retries), again, state)[:2]


# -- The search --------------------------------------------------------------------------------------------------------


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
    chances = tilted(windows, allowed)
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
            "windows": [digest(windows.costs), windows.low.tolist(), windows.high.tolist()],
            "seeds": digest(given),
            "of": dict(job or {}),
        },
    )
    mask, key = jnp.asarray(allowed), jax.random.key(seed)
    logits = jnp.asarray(np.log(np.maximum(chances, 1e-30)) + np.where(allowed, 0, -np.inf), jnp.float32)
    costs, low, high = (jnp.asarray(part, jnp.float32) for part in (windows.costs, windows.low, windows.high))
    costs = jnp.where(mask, costs, 0)

    def outside(genomes: jax.Array) -> jax.Array:
        return violations(genomes, costs, low, high)

    def begin(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        size = (settings.population, len(allowed))
        draws = lambda k: jax.random.categorical(k, logits, shape=size).astype(jnp.int32)  # noqa: E731
        return until_valid(key, draws, outside, 20 * settings.retries)

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
        genomes, fine = jax.jit(begin)(jax.random.fold_in(key, 0))
        there = np.concatenate([given, np.asarray(genomes)[np.asarray(fine)]])[: settings.population]
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

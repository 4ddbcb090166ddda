"""What assignments may cost, and random ones that cost so much.

Costs are sums of a table, one for each budget. EQ-Net's code draws its first population from a count: over 500,000
random assignments, how often a layer has some bits given their average. These frequencies tend to P(choice)
proportional to exp(-lambda cost) with the lambda that gives the average (among assignments of one sum all are equally
likely under it, as in the count). That is computed here: it has no empty bins at the ends, and takes any number of
budgets.

Source: Xu et al., "EQ-Net", ICCV 2023, section 3.4, and its code.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.errors import SearchError
from qjax.search.evolution import digest
from qjax.search.nsga2 import check_mask

SLACK = 1e-6
"""Room at the ends of windows, relative to the upper one, for the rounding of sums; in float32 half of it is used, so
that what is valid there is valid."""


@dataclasses.dataclass(frozen=True)
class Windows:
    """What assignments may cost: ``low < cost <= high`` for every budget; a lower end may be -infinity.

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

    def asked(self, budget: int) -> str:
        """What messages say of its ends."""
        above = f"above {self.low[budget]:.6g} and " if np.isfinite(self.low[budget]) else ""
        return f"{above}up to {self.high[budget]:.6g}"

    def of(self, genomes: Any) -> np.ndarray:
        """Costs float64 [any, budgets]."""
        genomes = np.asarray(genomes)
        return self.costs[:, np.arange(genomes.shape[1]), genomes].sum(axis=-1).T

    def described(self) -> list[Any]:
        """For a job's description: JSON-able, and other windows differ."""
        low = [float(v) if np.isfinite(v) else None for v in self.low]
        return [digest(self.costs), low, self.high.tolist()]

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

    Budgets without a lower end that share genes, such as average bits and bytes, cannot all be near their ends: the
    ones that bind are at their targets, and the others stay below. To hold each at its own target would take from the
    genes that only one of them counts what the other asks of all.

    Args:
        windows: the costs.
        allowed: bool [genes, choices].
        target: float [budgets], which all are held at; None takes the middle of what can be reached within the
            windows, and without a lower end at most nine tenths of the way from the least to the upper one.

    Raises:
        SearchError: a window that no assignment reaches; the message says what can be reached.
    """
    costs = np.where(allowed, windows.costs, 0.0)
    least = np.where(allowed, windows.costs, np.inf).min(axis=-1).sum(axis=-1)
    most = np.where(allowed, windows.costs, -np.inf).max(axis=-1).sum(axis=-1)
    for n, (a, b) in enumerate(zip(least, most, strict=True)):
        if a > windows.high[n] * (1 + SLACK) or b <= windows.low[n]:
            raise SearchError(f"no assignment has {windows.name(n)} {windows.asked(n)}; {a:g} to {b:g} can be reached")
    low, high = np.maximum(windows.low, least), np.minimum(windows.high, most)
    middle = np.where(np.isfinite(windows.low), (low + high) / 2, low + 0.9 * (high - low))
    wanted = middle if target is None else np.asarray(target, np.float64)
    edge = 1e-3 * (most - least)
    wanted = np.clip(wanted, least + edge, most - edge)
    held = np.isfinite(windows.low) if target is None else np.ones(len(wanted), bool)
    scale = np.where(most > least, most - least, 1.0)
    costs, wanted = costs / scale[:, None, None], wanted / scale
    counts = np.where(allowed, costs, -np.inf).max(axis=-1) > np.where(allowed, costs, np.inf).min(axis=-1)
    chances = allowed / allowed.sum(axis=1, keepdims=True)
    for budgets, genes in _apart(counts):
        part, others = costs[np.ix_(budgets, genes)], np.delete(costs[budgets], genes, axis=1)
        left = wanted[budgets] - others.max(axis=-1, initial=-np.inf, where=np.delete(allowed, genes, axis=0)).sum(
            axis=-1
        )
        chances[genes] = _binding(part, allowed[genes], left, held[budgets])
    return chances


def _apart(counts: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Budgets and genes in parts that share none, from which gene counts for which budget, bool [budgets, genes]."""
    left, parts = [n for n in range(len(counts)) if counts[n].any()], []
    while left:
        budgets, genes = [left.pop(0)], counts[0] & False
        for n in budgets:  # grows as it goes
            genes = genes | counts[n]
            near = [m for m in left if (counts[m] & genes).any()]
            budgets += near
            left = [m for m in left if m not in near]
        parts.append((np.array(sorted(budgets)), np.flatnonzero(genes)))
    return parts


def _binding(costs: np.ndarray, allowed: np.ndarray, wanted: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Probabilities with the held budgets at their means, and the fewest others for which all others are below."""
    free = np.flatnonzero(~held)
    for size in range(1, len(free) + 1):
        for some in itertools.combinations(free, size):
            at = np.union1d(np.flatnonzero(held), some)
            chances, multiplier = _at_means(costs[at], allowed, wanted[at])
            means = np.einsum("gc,bgc->b", chances, costs)
            # One alone may be raised to its target; of several, each must be one that is kept down to it.
            kept = size == 1 or (multiplier[np.isin(at, some)] >= 0).all()
            if kept and abs(means - wanted)[at].max() < 1e-6 and (means[free] < wanted[free] + 1e-6).all():
                return chances
    return _at_means(costs, allowed, wanted)[0]


def _at_means(costs: np.ndarray, allowed: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The most random probabilities with these means of all budgets, and their multipliers."""
    multiplier = np.zeros(len(wanted))

    def at(multiplier: np.ndarray) -> tuple[np.ndarray, float]:
        logits = np.where(allowed, -np.tensordot(multiplier, costs, 1), -np.inf)
        top = logits.max(axis=1, keepdims=True)
        weights = np.exp(logits - top)
        total = weights.sum(axis=1, keepdims=True)
        return weights / total, float((np.log(total) + top).sum() + multiplier @ wanted)

    for _ in range(200):  # Newton's method on a convex function of as many variables as there are budgets
        p, value = at(multiplier)
        mean = np.einsum("gc,bgc->bg", p, costs)
        gradient = wanted - mean.sum(axis=1)
        if abs(gradient).max() < 1e-9:
            break
        second = np.einsum("gc,agc,bgc->ab", p, costs, costs) - mean @ mean.T
        step = -np.linalg.lstsq(second + 1e-12 * np.eye(len(wanted)), gradient, rcond=None)[0]
        size = 1.0
        while size > 1e-8 and at(multiplier + size * step)[1] > value + 1e-4 * size * float(gradient @ step):
            size /= 2
        multiplier = multiplier + size * step
    return at(multiplier)[0], multiplier


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


def drawing(
    windows: Windows, allowed: np.ndarray, size: int, retries: int
) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """A function of a key that draws assignments near the middle of the windows, each until it is valid.

    Args:
        windows: what assignments may cost.
        allowed: bool [genes, choices].
        size: how many.
        retries: how often each is drawn again.

    Returns:
        ``draw(key) -> (genomes int32 [size, genes], which of them are valid bool [size])``, compiled.

    Raises:
        SearchError: a window that no assignment reaches.
    """
    chances = tilted(windows, allowed)
    logits = jnp.asarray(np.log(np.maximum(chances, 1e-30)) + np.where(allowed, 0, -np.inf), jnp.float32)
    outside = outside_of(windows, allowed)

    def draws(key: jax.Array) -> jax.Array:
        return jax.random.categorical(key, logits, shape=(size, len(allowed))).astype(jnp.int32)

    return jax.jit(lambda key: until_valid(key, draws, outside, retries))


def outside_of(windows: Windows, allowed: np.ndarray) -> Callable[[jax.Array], jax.Array]:
    """`violations` of given windows, as a function of genomes."""
    costs, low, high = (jnp.asarray(part, jnp.float32) for part in (windows.costs, windows.low, windows.high))
    costs = jnp.where(jnp.asarray(allowed), costs, 0)
    return lambda genomes: violations(genomes, costs, low, high)


def none_within(windows: Windows, allowed: np.ndarray, drawn: int, seed: int = 0) -> str:
    """What a message says where none of so many drawn assignments was valid: how near the nearest of some comes."""
    genomes = np.asarray(drawing(windows, allowed, CHUNK, 0)(jax.random.key(seed))[0])
    spent = windows.of(genomes[[int(np.argmin(np.asarray(outside_of(windows, allowed)(jnp.asarray(genomes)))))]])[0]
    parts = []
    for n, value in enumerate(spent):
        parts.append(f"{windows.name(n)} {value:.6g} ({windows.asked(n)} is asked for)")
    return (
        f"none of {drawn:,} random assignments is within {'all budgets' if len(parts) > 1 else 'the budget'}; "
        f"the nearest has {', '.join(parts)}: change the budget to what can be had, or widen the windows"
    )


CHUNK = 4096
"""Assignments that `draw_valid` draws at a time."""
IDLE = 20
"""Draws of so many without a new one are the end."""


def draw_valid(seed: int, allowed: np.ndarray, windows: Windows, count: int) -> np.ndarray:
    """Random valid assignments, all different, drawn as the first population of `evolve_best` is.

    The first of many are those of few: they depend on the seed and their number alone.

    Args:
        seed: of the draws.
        allowed: bool [genes, choices].
        windows: what assignments may cost.
        count: how many are wanted.

    Returns:
        int32 [count, genes]; fewer where there are no more to be found.

    Raises:
        SearchError: windows that nothing reaches, or a mask that cannot be.
    """
    draw = drawing(windows, check_mask(allowed), CHUNK, 0)
    found: dict[tuple[int, ...], None] = {}
    key, number, idle = jax.random.key(seed), 0, 0
    while len(found) < count and idle < (IDLE if found else 10 * IDLE):
        before = len(found)
        genomes, fine = draw(jax.random.fold_in(key, number))
        found.update(dict.fromkeys(map(tuple, np.asarray(genomes)[np.asarray(fine)].tolist())))
        number, idle = number + 1, 0 if len(found) > before else idle + 1
    return np.array(list(found)[:count], np.int32).reshape(-1, len(allowed))

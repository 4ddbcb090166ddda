"""Trit-planes by alternation: scales in closed form, trits by exhaustive choice (PTQTP, arXiv:2509.16989, section 3).

A group w [G] is to become sum over k of alpha_k t_k with t_k in {-1, 0, 1}. In turn

    scales      alpha = argmin over alpha of |w - S alpha|**2, S = [t_1 .. t_K]: a K x K linear system
    topology    each element takes the level sum over k of alpha_k c_k nearest to it, c in {-1, 0, 1}**K

until the scales stand still. Neither step can make the error larger.

**Only moments are needed.** The levels of a group lie symmetrically around 0: half of them, sorted, are n =
(3**K - 1) / 2 magnitudes 0 < s_1 <= .. <= s_n, and an element takes level i if i of the midpoints between neighbours
lie below its magnitude (4 comparisons for two planes, not 9 distances). The next scale step needs no trits, only the
Gram matrix <t_k, t_l> and the products <t_k, w>; both follow from how many magnitudes lie above each midpoint and what
they add up to. So a round is 2n sums over each group, nothing of the size of the weight is written, and groups go
through the rounds together until the last of them stands still.

**Ties.** An element as near to two levels takes the one that is scanned first: 0, then levels of one nonzero trit, of
two, of three, among these in the order (1, 0, 0), (0, 1, 0), .. (1, 1, 1), (1, 1, -1), ..; a level and its negative
have the same place, so that the trits of -w are those of w negated. The rule matters: from equal scales, where levels
coincide, it is what tells the planes apart.

**Singular systems.** Entries of the Gram matrix are integers. Planes that are empty, or equal up to sign, make it
singular; then the solution of least norm is taken, which is the limit of the paper's ridge as lambda goes to 0. A
determinant below 1e-6 of the product of the diagonal counts as singular; no other ridge is needed, so the objective
never grows.

Arrays here have the elements of a group on the first axis and groups on those behind, [G, ...] and [K, ...], so that
every step runs over groups as vectors. Sums run over the first axis only: the XLA of jax 0.10.2 gives wrong numbers on
CPU for ``sum(b * a, axis=1)`` of a [k, n, m] and b [n, m] from m of about 20,000 on, where the factor that is broadcast
stands first (one of its YNNPACK fusions).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qjax.formats.numerics import AnyArray

INITS = ("residual", "sign")
PLANES = (1, 2, 3)


class Moments(NamedTuple):
    """What the scale step looks at."""

    gram: Array
    """<t_k, t_l>, float32 [K, K, ...]."""
    cross: Array
    """<t_k, w>, float32 [K, ...]."""


class Fitted(NamedTuple):
    """What the rounds came to."""

    scales: Array
    """float32 [K, ...], not in canonical form."""
    moments: Moments
    """Of the planes that are best for these scales."""
    rounds: Array
    """int32 [...], how many rounds the group took; the last one moved its scales by less than eps."""


class Levels(NamedTuple):
    """The levels of groups on the side that is not negative, ascending."""

    middles: Array
    """float32 [n, ...]; a magnitude above the i-th takes level i + 1 or higher."""
    codes: Array
    """int32 [n + 1, ...], sum over k of 3**(K-k) t_k; the first is 0."""


@functools.cache
def _half(planes: int) -> np.ndarray:
    """The nonzero levels up to sign, in the order in which they are scanned: int [n, K]."""
    every = [c for c in itertools.product((1, 0, -1), repeat=planes) if any(c) and next(t for t in c if t) > 0]
    return np.array(sorted(every, key=lambda c: sum(map(abs, c))))


def weighted(scales: AnyArray, trits: np.ndarray) -> Array:
    """Return sum over k of t_k alpha_k, [n, ...], for constant trits [n, K]: in this order, whoever computes it."""
    column = (-1, *[1] * (scales.ndim - 1))
    terms = [jnp.asarray(trits[:, k].reshape(column), jnp.float32) * scales[k] for k in range(len(scales))]
    return functools.reduce(jnp.add, terms)


def levels(scales: Array) -> Levels:
    """Return the levels of scales [K, ...], of any sign and order, with ties resolved as this module says."""
    half = _half(len(scales))
    n, rest = len(half), (1,) * (scales.ndim - 1)
    value = weighted(scales, half)
    size = jnp.abs(value)
    rank = np.arange(n, dtype=np.int32).reshape(n, *rest)
    code = (half @ 3 ** np.arange(len(scales))[::-1]).astype(np.int32).reshape(n, *rest)
    tag = 64 * rank + 32 + jnp.where(value < 0, -code, code)
    # Of levels that coincide the first stands for all; 0 is the first of all.
    same = size[:, None] == size[None]
    tag = jnp.where(size > 0, jnp.min(jnp.where(same, tag[:, None], 64 * n), axis=0), 32 - 64)
    before = (size[:, None] < size[None]) | (same & (rank[:, None] < rank[None]))
    place = jnp.sum(before.astype(jnp.int32), axis=0)
    here = place[:, None] == rank[None]
    size = jnp.sum(jnp.where(here, size[:, None], 0.0), axis=0)
    tag = jnp.sum(jnp.where(here, tag[:, None], 0), axis=0)
    below = jnp.concatenate([jnp.zeros_like(size[:1]), size[:-1]])
    under = jnp.concatenate([jnp.full_like(tag[:1], 32 - 64), tag[:-1]])
    middle = below + 0.5 * (size - below)
    upper_first = (tag >> 6) < (under >> 6)  # then it wins at the midpoint itself
    middle = jnp.where(upper_first, jnp.nextafter(middle, jnp.zeros_like(middle)), middle)
    return Levels(middle, jnp.concatenate([jnp.zeros_like(tag[:1]), (tag & 63) - 32]))


def trits_of(code: AnyArray, planes: int) -> list[Array]:
    """Return t_k + 1 for k = 1 .. K, in the dtype of the code, from codes sum over k of 3**(K-k) (t_k + 1)."""
    # By comparing, not dividing: XLA on CPU (jaxlib 0.10.2) divides uint8 wrongly where that is fused into a sum.
    rest, out = jnp.asarray(code), []
    for k in range(planes - 1):
        unit = 3 ** (planes - 1 - k)
        out.append(sum((rest >= rest.dtype.type(n * unit)).astype(rest.dtype) for n in (1, 2)))
        rest = rest - out[-1] * rest.dtype.type(unit)
    return [*out, rest]


def topology(size: Array, scales: Array) -> Moments:
    """Return the moments of the planes that are best for the scales.

    Args:
        size: float32 [G, ...], the magnitudes of the weights.
        scales: float32 [K, ...].
    """
    planes = len(scales)
    middles, codes = levels(scales)
    trits = [t.astype(jnp.float32) - 1.0 for t in trits_of(codes + (3**planes - 1) // 2, planes)]  # [n + 1, ...]
    count, total = lax.platform_dependent(size, middles, cpu=_above_one_by_one, default=_above)  # [n, ...]
    rise = lambda t: t[1:] - t[:-1]  # noqa: E731 (from one level to the next)
    gram = _symmetric(planes, lambda k, m: jnp.sum(count * rise(trits[k] * trits[m]), axis=0))
    return Moments(gram, jnp.stack([jnp.sum(total * rise(t), axis=0) for t in trits]))


def _symmetric(planes: int, entry: Callable[[int, int], Array]) -> Array:
    """A symmetric matrix [K, K, ...] from its entries k >= m."""
    found = {(k, m): entry(k, m) for k in range(planes) for m in range(k + 1)}
    return jnp.stack([jnp.stack([found[max(k, m), min(k, m)] for m in range(planes)]) for k in range(planes)])


def _above(size: Array, middles: Array) -> tuple[Array, Array]:
    """How many magnitudes lie above each midpoint, and their sums: [n, ...] each."""
    middles = lax.optimization_barrier(middles)  # else they are worked out anew for every element
    above = size[:, None] > middles[None]
    return jnp.sum(above.astype(jnp.float32), axis=0), jnp.sum(jnp.where(above, size[:, None], 0.0), axis=0)


def _above_one_by_one(size: Array, middles: Array) -> tuple[Array, Array]:
    """`_above`, an element of all groups after the other.

    XLA on CPU reduces one group after the other, number by number; this runs over groups as vectors and takes a sixth
    of the time (0.8 against 5 ns an element for two planes).
    """

    def add(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        x = size[i][None]
        above = x > middles
        return sums[0] + above.astype(jnp.float32), sums[1] + jnp.where(above, x, 0.0)

    return lax.fori_loop(0, len(size), add, (jnp.zeros_like(middles), jnp.zeros_like(middles)))


def first_moments(size: Array, there: AnyArray, planes: int, init: str) -> Moments:
    """Return the moments of the planes that the rounds start from.

    Args:
        size: float32 [G, ...], magnitudes, 0 where there is no element.
        there: bool, broadcastable to size: which elements there are. Those that are padding belong to no plane.
        planes: K.
        init: "sign": every plane is the sign of w, that of 0 being 1 (the paper's). "residual": each plane is the sign
            of what the planes before it leave, each at the mean magnitude of what it was taken from.
    """
    there = jnp.asarray(there) & (size >= 0)  # of the shape and sharding of size
    count = jnp.maximum(jnp.sum(there.astype(jnp.float32), axis=0), 1.0)
    rest, sign, trits = size, there.astype(jnp.float32), []  # all relative to the sign of w
    for _ in range(planes):
        trits.append(sign)
        if init == "residual":
            mean = jnp.sum(jnp.where(there, jnp.abs(rest), 0.0), axis=0) / count
            rest = rest - mean * sign
            sign = jnp.where(there, jnp.where(rest < 0, -1.0, 1.0), 0.0)
    return moments(size, trits)


def moments(w: Array, trits: Sequence[Array]) -> Moments:
    """Return the moments of given planes, float32 [G, ...] each, for weights [G, ...]."""
    gram = _symmetric(len(trits), lambda k, m: jnp.sum(trits[k] * trits[m], axis=0))
    return Moments(gram, jnp.stack([jnp.sum(t * w, axis=0) for t in trits]))


def solve(found: Moments, tied: bool) -> Array:
    """The scale step: alpha [K, ...] for planes with these moments.

    Args:
        found: the moments.
        tied: whether alpha_k has to be 3 alpha_(k+1); one number is then free.
    """
    gram, cross = found
    planes = len(cross)
    if tied:
        ratio = [float(3 ** (planes - 1 - k)) for k in range(planes)]
        top = functools.reduce(jnp.add, [r * b for r, b in zip(ratio, cross, strict=True)])
        bottom = _quadratic(gram, ratio)
        last = jnp.where(bottom > 0, top / jnp.where(bottom > 0, bottom, 1.0), 0.0)
        return jnp.stack([r * last for r in ratio])
    a = [[gram[k, m] for m in range(planes)] for k in range(planes)]
    for k in range(planes):  # an empty plane stands apart, with scale 0
        a[k][k] = jnp.where(a[k][k] > 0, a[k][k], 1.0)
    adjugate, det = _adjugate(a)
    if planes > 1:
        singular = det < 1e-6 * functools.reduce(jnp.multiply, [a[k][k] for k in range(planes)])
        ridge = 0.01 / planes * functools.reduce(jnp.add, [a[k][k] for k in range(planes)])
        damped, more = _adjugate([[a[k][m] + ridge * (k == m) for m in range(planes)] for k in range(planes)])
        adjugate = [[jnp.where(singular, damped[k][m], adjugate[k][m]) for m in range(planes)] for k in range(planes)]
        det = jnp.where(singular, more, det)
    alpha = [jnp.zeros_like(det)] * planes
    for _ in range(4 if planes > 1 else 1):  # what is left of the ridge, or was rounded, vanishes by the repetition
        left = [b - _row_times(a[k], alpha, k) for k, b in enumerate(cross)]
        alpha = [alpha[k] + _row_times(adjugate[k], left, k) / det for k in range(planes)]
    return jnp.stack(alpha)


def _adjugate(a: list[list[Array]]) -> tuple[list[list[Array]], Array]:
    """Adjugate and determinant of a symmetric matrix of order 1 to 3, elementwise over groups."""
    if len(a) == 1:
        return [[jnp.ones_like(a[0][0])]], a[0][0]
    if len(a) == 2:
        return [[a[1][1], -a[0][1]], [-a[0][1], a[0][0]]], a[0][0] * a[1][1] - a[0][1] * a[0][1]
    others = [(1, 2), (0, 2), (0, 1)]

    def cofactor(k: int, m: int) -> Array:
        (p, q), (r, s) = others[k], others[m]
        return (a[p][r] * a[q][s] - a[p][s] * a[q][r]) * (-1.0) ** (k + m)

    adjugate = [[cofactor(min(k, m), max(k, m)) for m in range(3)] for k in range(3)]
    return adjugate, _row_times(a[0], adjugate[0], 0)


def _row_times(row: list[Array], x: list[Array], k: int) -> Array:
    """Row k of a matrix times a vector, such that planes that are alike get the same bits: the tie rule asks for it."""
    others = [row[m] * x[m] for m in range(len(row)) if m != k]
    return row[k] * x[k] + functools.reduce(jnp.add, others) if others else row[k] * x[k]


def objective(energy: Array, found: Moments, scales: Array) -> Array:
    """Return |w - S alpha|**2 [...], from |w|**2 [...] and the moments."""
    linear = functools.reduce(jnp.add, [a * b for a, b in zip(scales, found.cross, strict=True)])
    return energy - 2 * linear + _quadratic(found.gram, scales)


def _quadratic(gram: Array, x: Any) -> Array:
    """xᵀ A x."""
    pairs = itertools.product(range(len(gram)), repeat=2)
    return functools.reduce(jnp.add, [x[k] * x[m] * gram[k, m] for k, m in pairs])


def run(
    size: Array, start: Moments, *, tied: bool = False, iterations: int = 50, eps: AnyArray | float = 1e-4
) -> Fitted:
    """Alternate until each group stands still.

    Args:
        size: float32 [G, ...], magnitudes.
        start: the moments of the planes to start from, such as `first_moments`.
        tied: whether scales are in the ratio 3.
        iterations: rounds at most.
        eps: [...] or a number: a group stops once its scales move by less, |alpha_new - alpha_old| < eps.

    Returns:
        Scales and moments after the last round of each group.
    """
    still = start.cross[0] < -jnp.inf  # False, and sharded as groups are
    eps = jnp.asarray(eps, jnp.float32)

    def going(state: tuple) -> Array:
        done, _, _, still, _ = state
        return (done < iterations) & ~jnp.all(still)

    def one(state: tuple) -> tuple:
        done, scales, found, still, rounds = state
        fresh = solve(found, tied)
        stands = jnp.sum(jnp.square(fresh - scales), axis=0) < eps * eps
        fresh = jnp.where(still, scales, fresh)
        return done + 1, fresh, topology(size, fresh), still | stands, rounds + (~still).astype(jnp.int32)

    nowhere = jnp.full_like(start.cross, jnp.inf)  # no group stands still after its first round
    state = (jnp.int32(0), nowhere, start, still, still.astype(jnp.int32))
    _, scales, found, _, rounds = lax.while_loop(going, one, state)
    return Fitted(scales, found, rounds)


def trajectory(size: Array, start: Moments, rounds: int, tied: bool = False) -> tuple[Array, Array]:
    """Return what each of so many rounds came to, for looking at.

    Args:
        size: float32 [G, ...], magnitudes.
        start: the moments to start from.
        rounds: how many.
        tied: whether scales are in the ratio 3.

    Returns:
        Scales [rounds, K, ...] and the squared error after the topology step [rounds, ...].
    """
    energy = jnp.sum(size * size, axis=0)

    def one(found: Moments, _: None) -> tuple[Moments, tuple[Array, Array]]:
        scales = solve(found, tied)
        found = topology(size, scales)
        return found, (scales, objective(energy, found, scales))

    return lax.scan(one, start, length=rounds)[1]

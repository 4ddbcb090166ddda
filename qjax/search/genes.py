"""Choices of a supernet as genomes: bits of weights and of activations for each site, in one form.

One search has one form (granularity and both symmetries), as in EQ-Net; sites that are tied share their genes. A gene
takes 2, 3, ..., 8 bits, or float, which a space may allow for activations; it counts as 16 bits.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import SearchError
from qjax.search.windows import Windows
from qjax.supernet import Domain

VALUES = (2, 3, 4, 5, 6, 7, 8, 0)
"""Bits that a gene's choices stand for; 0 is float."""
COSTS = np.array([2, 3, 4, 5, 6, 7, 8, 16], np.float64)
FORMS = tuple((bool(c), bool(w), bool(a)) for c in (0, 1) for w in (0, 1) for a in (0, 1))
"""All forms: (per channel, weights symmetric, activations symmetric)."""


@dataclasses.dataclass(frozen=True)
class Genes:
    """The genes of a domain in one form: bits of weights of each leading site, then bits of activations.

    Attributes:
        domain: of the supernet.
        form: (per channel, weights symmetric, activations symmetric); a site that may not have it keeps to what it may.
    """

    domain: Domain
    form: tuple[bool, bool, bool] = (True, True, True)

    @functools.cached_property
    def leading(self) -> np.ndarray:
        """Positions of the sites that have genes: those that are tied to none before them."""
        return np.array([n for n, leader in enumerate(self.domain.leaders) if n == leader], int)

    @functools.cached_property
    def allowed(self) -> np.ndarray:
        """The mask of choices, bool [2 x leading sites, 8]."""
        rows = [self.domain.allowed[n][column] for column in (0, 1) for n in self.leading]
        return np.array([[value in row for value in VALUES] for row in rows])

    def choice(self, genomes: Any) -> jax.Array:
        """Choices int32 [..., N, 5 or 6] of genomes [..., genes]; may be traced."""
        base = jnp.asarray(self.domain.uniform(8, 8, self.form))
        place = {int(n): i for i, n in enumerate(self.leading)}
        of = np.array([place[leader] for leader in self.domain.leaders])
        bits = jnp.asarray(VALUES, jnp.int32)[jnp.asarray(genomes)]
        base = jnp.broadcast_to(base, (*bits.shape[:-1], *base.shape))
        return base.at[..., 0].set(bits[..., of]).at[..., 1].set(bits[..., len(self.leading) + of])

    def genomes(self, choice: Any) -> np.ndarray:
        """Genomes int32 [..., genes] of choices [..., N, 5 or 6]; the form is not looked at."""
        choice = np.asarray(choice)[..., self.leading, :2]
        index = np.array([VALUES.index(v) if v in VALUES else -1 for v in range(9)])
        return np.concatenate([index[choice[..., 0]], index[choice[..., 1]]], axis=-1).astype(np.int32)

    def windows(
        self, weights: Sequence[float], inputs: Sequence[float], budget: float | tuple[float, float], width: float = 0.5
    ) -> Windows:
        """The windows of EQ-Net: budget - 0.5 < average bits <= budget, for weights and for activations.

        Args:
            weights, inputs: numbers in the weight, and in the activations of one example, of each site [N]. The first
                and the last site do not count, as in EQ-Net.
            budget: average bits, of both or of each.
            width: of the windows.

        Raises:
            SearchError: other lengths.
        """
        both = (budget, budget) if isinstance(budget, int | float) else budget
        sites, genes = len(self.domain.sites), 2 * len(self.leading)
        tables, low, high, names = [], [], [], []
        for column, (sizes, what) in enumerate(((weights, "weights"), (inputs, "activations"))):
            own = self.allowed[column * genes // 2 : (column + 1) * genes // 2]
            if (own.sum(axis=1) <= 1).all() and own[:, -1].all():
                continue  # float everywhere: there is nothing to keep to
            counted = np.array(sizes, np.float64)
            if counted.shape != (sites,) or (counted < 0).any():
                raise SearchError(f"sizes of {what} {counted.shape}; not negative numbers for {sites} sites are needed")
            counted[[0, -1]] = 0
            if not counted.sum() > 0:
                raise SearchError(f"no site but the first and the last has {what} that count; there is no average")
            of_genes = np.zeros((genes, len(VALUES)))
            for site, leader in enumerate(self.domain.leaders):
                gene = column * genes // 2 + int(np.searchsorted(self.leading, leader))
                of_genes[gene] += counted[site] / counted.sum() * COSTS
            tables.append(of_genes)
            low.append(both[column] - width)
            high.append(both[column])
            names.append(f"average bits of {what}")
        return Windows(np.stack(tables), np.array(low), np.array(high), tuple(names))

"""Choices of a supernet as genomes: bits of weights and of activations for each site, in one form.

One search has one form (granularity and both symmetries), as in EQ-Net; sites that are tied share their genes. Bits
are 2, 3, ..., 8, or float, which a space may allow for activations; it counts as 16 bits. Weights and activations have
genes of their own, or, where a budget does not add up over both (latency: the slower of memory and arithmetic), a site
has one gene for the pair.
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
COUNT = len(VALUES)
FORMS = tuple((bool(c), bool(w), bool(a)) for c in (0, 1) for w in (0, 1) for a in (0, 1))
"""All forms: (per channel, weights symmetric, activations symmetric)."""


@dataclasses.dataclass(frozen=True)
class Genes:
    """The genes of a domain in one form: bits of weights of each leading site, then bits of activations.

    Attributes:
        domain: of the supernet.
        form: (per channel, weights symmetric, activations symmetric); a site that may not have it keeps to what it may.
            One search has one group size too, where the space has groups.
        paired: one gene a site for both, whose choices are 8 x the index of weights and the index of activations.
        group: a length among the groups of the space; None is the first of them.
    """

    domain: Domain
    form: tuple[bool, bool, bool] = (True, True, True)
    paired: bool = False
    group: int | None = None

    @property
    def said(self) -> list[Any]:
        """The form, and the group where one is named, for descriptions of jobs."""
        return [*self.form, *([] if self.group is None else [self.group])]

    @functools.cached_property
    def leading(self) -> np.ndarray:
        """Positions of the sites that have genes: those that are tied to none before them."""
        return np.array([n for n, leader in enumerate(self.domain.leaders) if n == leader], int)

    @functools.cached_property
    def leader(self) -> np.ndarray:
        """For each site [N] the position of its leading site among these."""
        return np.searchsorted(self.leading, np.array(self.domain.leaders, int))

    @functools.cached_property
    def allowed(self) -> np.ndarray:
        """The mask of choices, bool [2 x leading sites, 8], or [leading sites, 64] of pairs."""
        rows = [self.domain.allowed[n][column] for column in (0, 1) for n in self.leading]
        mask = np.array([[value in row for value in VALUES] for row in rows])
        if not self.paired:
            return mask
        weights, inputs = mask.reshape(2, -1, COUNT)
        return (weights[:, :, None] & inputs[:, None, :]).reshape(-1, COUNT * COUNT)

    def choice(self, genomes: Any) -> jax.Array:
        """Choices int32 [..., N, 5 or 6] of genomes [..., genes]; may be traced."""
        base = jnp.asarray(self.domain.uniform(8, 8, self.form, group=self.group))
        genomes = jnp.asarray(genomes)
        if self.paired:
            genomes = jnp.concatenate([genomes // COUNT, genomes % COUNT], axis=-1)
        bits = jnp.asarray(VALUES, jnp.int32)[genomes]
        base = jnp.broadcast_to(base, (*bits.shape[:-1], *base.shape))
        return base.at[..., 0].set(bits[..., self.leader]).at[..., 1].set(bits[..., len(self.leading) + self.leader])

    def genomes(self, choice: Any) -> np.ndarray:
        """Genomes int32 [..., genes] of choices [..., N, 5 or 6]; the form is not looked at."""
        choice = np.asarray(choice)[..., self.leading, :2]
        index = np.array([VALUES.index(v) if v in VALUES else -1 for v in range(9)])
        weights, inputs = index[choice[..., 0]], index[choice[..., 1]]
        parts = [weights * COUNT + inputs] if self.paired else [weights, inputs]
        return np.concatenate(parts, axis=-1).astype(np.int32)

    def costs(self, table: Any) -> np.ndarray:
        """The costs of genes' choices: float64, of the shape of ``allowed``, 0 where that is False.

        Args:
            table: float [N, 8, 8], the cost of each site by indices of `VALUES` of its weights and activations. What
                the domain does not allow is not looked at.

        Raises:
            SearchError: another shape, or a table that does not add up over weights and activations where these have
                genes of their own.
        """
        joint, whole = self._together(table)
        if self.paired:
            return np.where(self.allowed, whole.reshape(self.allowed.shape), 0.0)
        parts = self._apart(joint, whole)
        if parts is None:
            raise SearchError("costs of weights and activations together do not add up; take Genes(..., paired=True)")
        return parts

    def additive(self, table: Any) -> bool:
        """Whether costs [N, 8, 8] are sums of one of the weights and one of the activations."""
        return self._apart(*self._together(table)) is not None

    def _together(self, table: Any) -> tuple[np.ndarray, np.ndarray]:
        """Which pairs leading sites may have, bool [leading, 8, 8], and what these cost with the sites tied to them."""
        table = np.asarray(table, np.float64)
        if table.shape != (len(self.domain.sites), COUNT, COUNT) or not np.isfinite(table).all():
            raise SearchError(
                f"costs {table.shape}; finite numbers [{len(self.domain.sites)}, {COUNT}, {COUNT}] are needed, for "
                "each site by bits of weights and of activations"
            )
        whole = np.zeros((len(self.leading), COUNT, COUNT))
        np.add.at(whole, self.leader, table)
        return dataclasses.replace(self, paired=True).allowed.reshape(whole.shape), whole

    def _apart(self, joint: np.ndarray, whole: np.ndarray) -> np.ndarray | None:
        """Costs of weights, then of activations; None where pairs cost something else than their sums."""
        rows = np.arange(len(whole))
        few = joint.any(axis=2).argmax(axis=1), joint.any(axis=1).argmax(axis=1)  # the fewest bits of both
        base = whole[rows, few[0], few[1]][:, None]
        weights = np.where(joint.any(axis=2), whole[rows, :, few[1]], base)
        inputs = np.where(joint.any(axis=1), whole[rows, few[0], :], base)
        sums = weights[:, :, None] + inputs[:, None, :] - base[..., None]
        if np.abs(np.where(joint, whole - sums, 0)).max() > 1e-9 * np.abs(np.where(joint, whole, 0)).max():
            return None
        # The base is in both, and counted once: with the activations where they make all the difference.
        weights, inputs = (weights - base, inputs) if (weights == base).all() else (weights, inputs - base)
        there = np.concatenate([joint.any(axis=2), joint.any(axis=1)])
        return np.where(there, np.concatenate([weights, inputs]), 0.0)

    def windows(
        self, weights: Sequence[float], inputs: Sequence[float], budget: float | tuple[float, float], width: float = 0.5
    ) -> Windows:
        """The windows of EQ-Net: budget - 0.5 < average bits <= budget, for weights and for activations.

        Args:
            weights, inputs: numbers in the weight, and in the activations of one example, of each site [N]. The first
                and the last site do not count, as in EQ-Net, unless they have bits to choose.
            budget: average bits, of both or of each.
            width: of the windows.

        Raises:
            SearchError: other lengths.
        """
        both = (budget, budget) if isinstance(budget, int | float) else budget
        sites = len(self.domain.sites)
        tables, low, high, names = [], [], [], []
        for column, (sizes, what) in enumerate(((weights, "weights"), (inputs, "activations"))):
            if all(self.domain.allowed[n][column] == (0,) for n in self.leading):
                continue  # float everywhere: there is nothing to keep to
            if not all(isinstance(v, int | float | np.number) for v in np.ravel(np.asarray(sizes, object))):
                raise SearchError(f"sizes of {what} are a {type(sizes).__name__}; give sizes(...).weights and .inputs")
            counted = np.array(sizes, np.float64)
            if counted.shape != (sites,) or (counted < 0).any():
                raise SearchError(f"sizes of {what} {counted.shape}; not negative numbers for {sites} sites are needed")
            if not self.domain.free_ends:
                counted[[0, -1]] = 0
            if not counted.sum() > 0:
                raise SearchError(f"no site but the first and the last has {what} that count; there is no average")
            share = counted / counted.sum()
            of_bits = COSTS[:, None] if column == 0 else COSTS[None]
            tables.append(self.costs(share[:, None, None] * np.broadcast_to(of_bits, (COUNT, COUNT))))
            low.append(both[column] - width)
            high.append(both[column])
            names.append(f"average bits of {what}")
        return Windows(np.stack(tables), np.array(low), np.array(high), tuple(names))

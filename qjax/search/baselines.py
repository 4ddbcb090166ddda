"""What a search has to beat: as many random valid choices as it scored, and the same bits everywhere."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from qjax.search.genes import Genes
from qjax.search.windows import SLACK, Windows, draw_valid

CHUNK = 500
"""Choices that are scored at a time, where the score takes any number."""


@dataclasses.dataclass(frozen=True)
class Baselines:
    """Scores that a search is compared with; all choices are within its budget.

    Attributes:
        count: random valid choices, all different: as many as the search scored, or as many as there are.
        random: the best of their scores, NaN where there are none. random_choice: whose it is, int32 [N, 5 or 6].
        uniform: the best score of the same bits everywhere (of weights, of activations) with as many bits as fit the
            budget; NaN where none fit. uniform_choice: whose it is.
        uniform_bits: of weights and of activations, 0 for float.
    """

    count: int
    random: float
    random_choice: np.ndarray | None
    uniform: float
    uniform_choice: np.ndarray | None
    uniform_bits: tuple[int, int] | None

    def __repr__(self) -> str:
        return f"Baselines({'; '.join(self.lines())})"

    def lines(self) -> list[str]:
        """One line each."""
        out = [f"best of {self.count:,} random valid choices: {self.random:.4g}"]
        if self.uniform_bits is not None:
            weights, inputs = (f"{b} bits" if b else "float" for b in self.uniform_bits)
            out.append(f"weights {weights}, activations {inputs} everywhere: {self.uniform:.4g}")
        return out


def random_choices(seed: int, genes: Genes, windows: Windows, count: int) -> np.ndarray:
    """Random valid choices, all different.

    They are drawn as the first population of a search is, and the first of many are those of few.

    Args:
        seed: of the draws.
        genes: what is searched.
        windows: what choices may cost, from ``genes.windows``.
        count: how many.

    Returns:
        int32 [count, N, 5 or 6]; fewer where there are no more.

    Raises:
        SearchError: windows that nothing reaches.
    """
    return np.asarray(genes.choice(draw_valid(seed, genes.allowed, windows, count)))


def uniform_choices(genes: Genes, windows: Windows) -> dict[tuple[int, int], np.ndarray]:
    """The same bits everywhere, as many as fit: (bits of weights, of activations) -> choice int32 [N, 5 or 6].

    Sites that may not have these bits have the nearest that they may. The lower ends of windows do not count. Of the
    pairs that fit those stay to which nothing can be added.
    """
    rows = genes.domain.allowed
    weights, inputs = ({v for row in rows for v in row[c]} for c in (0, 1))
    fit: dict[tuple[int, int], np.ndarray] = {}
    for w, a in itertools.product(weights, inputs):
        choice = genes.domain.uniform(w, a, genes.form, group=genes.group)
        if (windows.of(genes.genomes(choice)[None])[0] <= windows.high * (1 + SLACK)).all():
            fit[w, a] = choice
    more = {bits: (bits[0], bits[1] or 16) for bits in fit}
    return {
        bits: choice
        for bits, choice in sorted(fit.items())
        if not any(o != bits and more[o][0] >= more[bits][0] and more[o][1] >= more[bits][1] for o in fit)
    }


def compare_baselines(
    scores: Callable[[np.ndarray], Any], genes: Genes, windows: Windows, count: int, seed: int = 0
) -> Baselines:
    """Score what a search is compared with.

    Args:
        scores: choices int32 [any, N, 5 or 6] -> float [any], the larger the better: the score of the search, or
            another one that judges both.
        genes, windows: of the search.
        count: random valid choices to score: as many as the search did.
        seed: of the draws.

    Raises:
        SearchError: windows that nothing reaches.
    """
    drawn = random_choices(seed, genes, windows, count)
    found = _scored(scores, drawn)
    best = int(np.argmax(np.where(np.isnan(found), -np.inf, found))) if len(found) else None
    uniform = uniform_choices(genes, windows)
    of_uniform = _scored(scores, np.array(list(uniform.values()), np.int32).reshape(-1, *genes.domain.shape))
    top = int(np.argmax(np.where(np.isnan(of_uniform), -np.inf, of_uniform))) if uniform else None
    return Baselines(
        len(drawn),
        float("nan") if best is None else float(found[best]),
        None if best is None else drawn[best],
        float("nan") if top is None else float(of_uniform[top]),
        None if top is None else list(uniform.values())[top],
        None if top is None else list(uniform)[top],
    )


def _scored(scores: Callable[[np.ndarray], Any], choices: np.ndarray) -> np.ndarray:
    parts = [choices[at : at + CHUNK] for at in range(0, len(choices), CHUNK)]
    return np.concatenate([np.zeros(0), *(np.asarray(scores(part), np.float64) for part in parts)])

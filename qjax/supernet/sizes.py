"""How large the operands of a supernet's sites are, and what a subnet saves of them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

import qjax.program
from qjax.errors import SearchError
from qjax.supernet.elastic import Supernet


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Numbers of each site, in the order of a choice.

    Attributes:
        weights: of its weight. inputs: of its activations.
    """

    weights: tuple[int, ...]
    inputs: tuple[int, ...]


def sizes(t: Supernet, params: Any, *args: Any, **kwargs: Any) -> Sizes:
    """The sizes of a supernet's sites, for budgets of average bits and for `compression`.

    Args:
        t: from `qjax.elastic`.
        params, *args, **kwargs: as for the function, abstract or not; of one example, as activations are counted.
    """
    program = qjax.program.trace(t.fn, params, *args, **kwargs)
    sites = [program.site(name) for name in t.domain(params, *args, **kwargs).sites]
    return Sizes(tuple(math.prod(s.weight_shape or ()) for s in sites), tuple(math.prod(s.shapes[0]) for s in sites))


def compression(choice: Any, found: Sizes) -> tuple[float, float]:
    """How much smaller than float32 the weights and the activations of a subnet are.

    ``32 sum(P) / sum(bits P)`` over all sites, the first and the last with their own bits (8 in EQ-Net's spaces); float
    activations count as 32 bits. Steps and offsets are not counted. Source: EQ-Net (Xu et al. 2023, arXiv:2308.07650),
    table 2.

    Args:
        choice: int [N, 5 or 6]. found: from `sizes`.

    Raises:
        SearchError: a choice of other sites.
    """
    array = np.asarray(choice)
    if array.ndim != 2 or len(array) != len(found.weights):
        raise SearchError(f"a choice for these {len(found.weights)} sites has as many rows, not shape {array.shape}")
    bits = np.where(array[:, :2] == 0, 32, array[:, :2]).astype(np.float64)
    both = [np.asarray(counts, np.float64) for counts in (found.weights, found.inputs)]
    return tuple(float(32 * p.sum() / (b * p).sum()) for p, b in zip(both, bits.T, strict=True))  # type: ignore[return-value]

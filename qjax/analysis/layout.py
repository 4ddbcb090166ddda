"""Compact arrays through operations that move elements: reshapes, broadcasts, gathers.

A compact array stands for a value of some shape: its rank is the value's, and it has size one along dimensions where
its elements repeat. The functions map such an array forwards (what the result has) or backwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def none(rank: int) -> np.ndarray:
    """Codes of a value that carries no factor."""
    return np.zeros((1,) * rank, np.int32)


def tidy(codes: np.ndarray) -> np.ndarray:
    """Give dimensions of equal codes size one."""
    if not codes.any():
        return none(codes.ndim)
    for d, n in enumerate(codes.shape):
        first = codes[(slice(None),) * d + (slice(0, 1),)]
        if n > 1 and np.array_equal(codes, np.broadcast_to(first, codes.shape)):
            codes = first
    return codes


def spread(codes: np.ndarray, shape: Sequence[int], dims: Sequence[int]) -> np.ndarray:
    """Repeat codes along the dimensions ``dims`` to full size."""
    full = tuple(shape[d] if d in dims else n for d, n in enumerate(codes.shape))
    return np.broadcast_to(codes, full)


def varying(codes: np.ndarray, dims: Sequence[int]) -> bool:
    """Whether codes differ along one of the dimensions."""
    return any(codes.shape[d] > 1 for d in dims)


def first(codes: np.ndarray, dims: Sequence[int]) -> np.ndarray:
    """The codes at position 0 of the dimensions ``dims``, which keep size one."""
    return codes[tuple(slice(0, 1) if d in dims else slice(None) for d in range(codes.ndim))]


def pieces(source: Sequence[int], target: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Split a reshape into independent ones: dimensions of the source and the target with equal products."""
    out: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(source) or j < len(target):
        a, b = ([i] if i < len(source) else []), ([j] if j < len(target) else [])
        i, j = i + len(a), j + len(b)
        left, right = math.prod(source[d] for d in a), math.prod(target[d] for d in b)
        while left != right:
            if left < right:
                a.append(i)
                left, i = left * source[i], i + 1
            else:
                b.append(j)
                right, j = right * target[j], j + 1
        out.append((a, b))
    return out


def reshape(codes: np.ndarray, source: Sequence[int], target: Sequence[int]) -> np.ndarray:
    """Codes of a reshaped value."""
    if 0 in source:
        return none(len(target))
    shape: list[int] = [1] * len(target)
    expand: list[int] = []
    for a, b in pieces(source, target):
        if varying(codes, a):
            expand += a
            for d in b:
                shape[d] = target[d]
    return tidy(spread(codes, source, expand).reshape(shape))


def reshape_same(same: Sequence[bool], source: Sequence[int], target: Sequence[int]) -> tuple[bool, ...]:
    """Along which dimensions of a reshaped value all elements are equal."""
    out = [True] * len(target)
    if 0 not in source:
        for a, b in pieces(source, target):
            for d in b:
                out[d] = all(same[s] for s in a)
    return tuple(out)


def broadcast(codes: np.ndarray, to: Sequence[int], rank: int) -> np.ndarray:
    """Codes after ``broadcast_in_dim``: dimension d of the operand becomes ``to[d]``."""
    shape = [1] * rank
    for d, n in zip(to, codes.shape, strict=True):
        shape[d] = n
    return codes.reshape(shape)

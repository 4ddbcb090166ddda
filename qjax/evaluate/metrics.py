"""Figures of two arrays or two scores."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from qjax.errors import DataError
from qjax.report.data import recovery

__all__ = ["recovery", "sqnr_db"]


def sqnr_db(reference: Any, approximation: Any) -> float:
    """Signal to quantization noise ratio, ``10 log10(sum a^2 / sum (a - b)^2)``, in decibels.

    Args:
        reference: the float array a, any shape and dtype; or anything with ``dequantize()``.
        approximation: the array b of the same shape; likewise.

    Returns:
        Decibels: infinite where both are equal (two zero arrays included), minus infinity where a is zero and b is not,
        NaN where either holds NaN or infinity. Sums are taken in float64.

    Raises:
        DataError: shapes differ.
    """
    a, b = (_float64(x) for x in (reference, approximation))
    if a.shape != b.shape:
        raise DataError(f"SQNR compares arrays of one shape, but they are {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.nan
    # One factor for both sums, so that the squares of huge or tiny weights neither overflow nor vanish.
    top = max(np.abs(a).max(initial=0.0), np.abs(b).max(initial=0.0)) or 1.0
    signal, noise = float(np.square(a / top).sum()), float(np.square((a - b) / top).sum())
    if noise == 0:
        return math.inf
    return -math.inf if signal == 0 else 10.0 * math.log10(signal / noise)


def _float64(x: Any) -> np.ndarray:
    x = x.dequantize() if hasattr(x, "dequantize") else x
    # bfloat16 and float8 arrays become float32 first: NumPy casts extension types to float64 element by element.
    array = np.asarray(x)
    return array.astype(np.float32).astype(np.float64) if array.dtype.kind == "V" else array.astype(np.float64)

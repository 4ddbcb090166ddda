"""2-bit and 4-bit strips in float64 NumPy, one row and strip at a time, from the equations of the method."""

from __future__ import annotations

import numpy as np


def unit(w: np.ndarray) -> float:
    """The power of two in which a matrix is stored: its largest number is 2**12 to 2**13 of it."""
    top = np.abs(w).max(initial=0.0)
    return 2.0 ** (np.floor(np.log2(top)) - 12) if top else 1.0


def first_order(low: float, high: float, top: int) -> float:
    return (high - low) / top


def zero_of(low: float, s: float, top: int) -> float:
    return float(np.clip(np.rint(-low / s), 0, top))


def second_order(scales: np.ndarray, bits: int) -> tuple[np.ndarray, float, int, np.ndarray]:
    """Scales of a tile -> (what they become, s', z', their codes)."""
    levels = 2**bits - 1
    there = scales > 0
    if not there.any():
        return np.zeros_like(scales), 1.0, 0, np.zeros(len(scales), int)
    least, most = scales[there].min(), scales[there].max()
    step = float(np.float16(max(max(most - least, least) / levels, 2.0**-14)))
    zero = int(np.clip(np.rint(least / step), 0, levels))
    codes = np.clip(np.rint(scales / step) - zero, 0, levels).astype(int)
    codes = np.where(there & (codes + zero == 0), 1, codes)
    codes = np.where(there, codes, 0)
    return (codes + zero) * step, step, zero, codes


def quantized(
    w: np.ndarray,  # [N, K]
    wide: np.ndarray,  # bool [strips], strips of padding included
    *,
    strip: int = 16,
    tile: int = 16,
    wide_group: int = 128,
    bits: tuple[int, int, int] = (3, 3, 4),
    outliers: np.ndarray | None = None,  # bool [N, K]
) -> np.ndarray:
    """What w becomes: float64 [N, K], the numbers at ``outliers`` in FP16."""
    n, k = w.shape
    one = unit(w)
    x = np.zeros((n, len(wide) * strip))
    x[:, :k] = w / one
    inside = x.copy()  # what counts for ranges
    if outliers is not None:
        inside[:, :k][outliers] = 0
    out = np.zeros_like(x)
    narrow = [j for j in range(len(wide)) if not wide[j]]
    for number, j in enumerate(narrow):
        at = slice(j * strip, (j + 1) * strip)
        low, high = np.minimum(inside[:, at].min(1), 0), np.maximum(inside[:, at].max(1), 0)
        for first in range(0, n, tile):
            rows = range(first, min(first + tile, n))
            near, *_ = second_order(np.array([first_order(low[i], high[i], 3) for i in rows]), bits[number % 3])
            for i, s in zip(rows, near, strict=True):
                if low[i] == high[i]:
                    continue
                z = zero_of(low[i], s, 3)
                out[i, at] = (np.clip(np.rint(x[i, at] / s) + z, 0, 3) - z) * s
    four = [j for j in range(len(wide)) if wide[j]]
    per = wide_group // strip
    for first in range(0, len(four), per):
        columns = np.concatenate([np.arange(j * strip, (j + 1) * strip) for j in four[first : first + per]])
        for i in range(n):
            low, high = min(inside[i, columns].min(), 0), max(inside[i, columns].max(), 0)
            if low == high:
                continue
            s = float(np.float16(max(first_order(low, high, 15), 2.0**-14)))
            z = zero_of(low, s, 15)
            out[i, columns] = (np.clip(np.rint(x[i, columns] / s) + z, 0, 15) - z) * s
    out = out[:, :k]
    if outliers is not None:
        rest = (x[:, :k] - out).astype(np.float16)
        out = np.where(outliers, out + rest, out)
    return out * one


def sensitivity(w: np.ndarray, strip: int, strips: int, h: np.ndarray | None = None) -> np.ndarray:
    """Sum over rows of the squared range of a strip, times the mean of h over its columns."""
    n, k = w.shape
    h = np.ones(k) if h is None else h
    out = np.zeros(strips)
    for j in range(strips):
        part = w[:, j * strip : (j + 1) * strip]
        if part.shape[1]:
            span = np.maximum(part.max(1), 0) - np.minimum(part.min(1), 0)
            out[j] = (span**2).sum() * h[j * strip : (j + 1) * strip].mean()
    return out


def one_in_four(scores: np.ndarray, columns: int, strip: int) -> np.ndarray:
    """The most sensitive strip of every quad; of a quad that is not whole the first."""
    wide = np.zeros(len(scores), bool)
    for q in range(len(scores) // 4):
        whole = (q + 1) * 4 * strip <= columns
        wide[4 * q + (int(np.argmax(scores[4 * q : 4 * q + 4])) if whole else 0)] = True
    return wide


def most_sensitive(scores: np.ndarray, count: int, columns: int, strip: int) -> np.ndarray:
    """The ``count`` most sensitive strips; one that is not whole is never among them, unless all are."""
    scores = scores.copy()
    if columns % strip and count < len(scores):
        scores[-1] = -1
    wide = np.zeros(len(scores), bool)
    wide[np.argsort(-scores, kind="stable")[:count]] = True
    return wide

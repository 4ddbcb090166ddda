"""What DGQ and QoQ do to channels, as functions of magnitudes: percentile smoothing, keys, block outputs, order.

Pure NumPy on small arrays; the passes that fold the results into parameters are `DGQSmooth`, `SmoothAttention`,
`SmoothOutputs` and `Reorder`.
"""

from __future__ import annotations

import numpy as np

from qjax.errors import FormatError

LEAST_THRESHOLD = 1e-4
"""Thresholds below this are taken for those of inputs that are not there."""


def dgq_smoothing(absmax: np.ndarray, fraction: float = 0.005) -> np.ndarray:
    """Percentile clipping smoothing of DGQ (arXiv:2310.04836; the hyperparameter of the released code).

    With C channels, b = int(fraction C + 1.5) and t the b-th largest maximum (4096 channels: the 21st), channels above
    t are brought down to it and the others stay: s = max(absmax / t, 1).

    Args:
        absmax: the largest magnitude of each channel, [C], not negative.
        fraction: of the channels that lie above the threshold, from 0 to below 1.

    Returns:
        float32 [C]: what activations are divided by; all 1 if t is below 1e-4.
    """
    absmax = np.asarray(absmax, np.float32)
    if absmax.ndim != 1 or not absmax.size:
        raise FormatError(f"dgq_smoothing takes the maxima of channels [C], not an array of shape {absmax.shape}")
    rank = min(int(fraction * absmax.size + 1.5), absmax.size)
    threshold = np.partition(absmax, -rank)[-rank]
    if threshold < LEAST_THRESHOLD:
        return np.ones_like(absmax)
    return np.where(absmax > threshold, absmax / threshold, np.float32(1.0))


def tied_maxima(absmax: np.ndarray, pairs: str | None = "half") -> np.ndarray:
    """The larger of the maxima of channels that rotary positions turn together, at both.

    Args:
        absmax: the largest magnitude of each channel of a head, [.., D].
        pairs: "half" (i with i + D/2), "interleaved" (2i with 2i + 1), or None for heads that are not turned.

    Returns:
        An array of the same shape.
    """
    absmax = np.asarray(absmax)
    if pairs is None:
        return absmax
    d = absmax.shape[-1]
    if pairs not in ("half", "interleaved") or d % 2:
        raise FormatError(f"pairs={pairs!r} of {d} channels; 'half', 'interleaved' or None, and an even number")
    axis = -2 if pairs == "half" else -1
    both = absmax.reshape(*absmax.shape[:-1], *((2, d // 2) if pairs == "half" else (d // 2, 2)))
    return np.broadcast_to(both.max(axis=axis, keepdims=True), both.shape).reshape(absmax.shape)


def attention_factors(
    keys: np.ndarray,
    queries: np.ndarray | None = None,
    *,
    alpha: float = 0.5,
    beta: float = 0.0,
    pairs: str | None = "half",
) -> np.ndarray:
    """SmoothAttention of QoQ (arXiv:2405.04532, section 4.2): what keys are divided and queries multiplied by.

    lambda = max|K|^alpha / max|Q|^beta, the maxima over tokens and over channels that are turned together. Query heads
    that share a key head take its factors.

    Args:
        keys: the largest magnitude of each channel of keys after rotary positions, [key heads, D].
        queries: that of queries, [query heads, D]; needed if beta is not 0.
        alpha: 0.5 in the paper.
        beta: 0 in the paper; 1 - alpha in a variant of the code.
        pairs: which channels are turned together: see `tied_maxima`.

    Returns:
        float32 [key heads, D], positive; 1 where that would be 0 or not finite.
    """
    keys = tied_maxima(np.asarray(keys, np.float64), pairs)
    with np.errstate(divide="ignore", invalid="ignore"):
        factors = keys**alpha
        if beta:
            if queries is None or len(queries) % len(keys):
                raise FormatError("attention_factors: with beta, queries are needed, a multiple of the key heads")
            shared = np.asarray(queries, np.float64).reshape(len(keys), -1, keys.shape[-1]).max(axis=1)
            factors = factors / tied_maxima(shared, pairs) ** beta
    return sound(factors)


def output_factors(x: np.ndarray, w: np.ndarray, alpha: float) -> np.ndarray:
    """Smoothing of block outputs of QoQ (section 4.3.3): lambda = max|X_k|^alpha / max_n|W_nk|^(1 - alpha).

    Args:
        x: the largest magnitude of each input channel, [K].
        w: that of the weights of each, [K].
        alpha: from 0 (weights alone) to 1.

    Returns:
        float32 [K]: what activations are divided by; 1 where that would be 0 or not finite.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return sound(np.asarray(x, np.float64) ** alpha / np.asarray(w, np.float64) ** (1 - alpha))


def sound(factors: np.ndarray) -> np.ndarray:
    """Factors as float32, 1 where they are 0 or not finite."""
    factors = np.asarray(factors, np.float32)
    return np.where(np.isfinite(factors) & (factors > 0), factors, np.float32(1.0))


def activation_order(absmax: np.ndarray, blocks: np.ndarray | None = None) -> np.ndarray:
    """Activation-aware order of QoQ (section 4.3.4): channels by rising magnitude, so that groups hold equals.

    Args:
        absmax: the largest magnitude of each channel, [C].
        blocks: int [C]: a channel stays on the places of its block (a head); None: anywhere.

    Returns:
        int [C]: what stands at place j afterwards stood at place ``order[j]`` before. Equals keep their order.
    """
    absmax = np.asarray(absmax)
    order = np.arange(len(absmax))
    for block in np.unique(np.zeros(len(absmax), np.int32) if blocks is None else blocks):
        places = order if blocks is None else np.flatnonzero(np.asarray(blocks) == block)
        order[places] = places[np.argsort(absmax[places], kind="stable")]
    return order

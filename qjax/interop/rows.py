"""Rows of tokens of any lengths in few shapes, so that few programs are compiled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from qjax.evaluate.language import LOGITS_PER_BATCH, TOKENS_PER_BATCH

SHORTEST = 16
"""Shortest padded length; the others are its doubles, up to the model's own limit."""


def batches(
    rows: Sequence[Sequence[int]], limit: int, vocab_size: int, batch_size: int | None = None
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Pad rows on the right, the longest first: every padded length T has one number of rows B.

    Args:
        rows: at least two ids each and at most ``limit + 1``; the last is only predicted, the first only read.
        limit: most tokens that the model reads.
        vocab_size: of the model; bounds the logits of a batch.
        batch_size: B; None takes what is fast on the platform.

    Yields:
        Which rows, what the model reads and the token after each, the latter two int32 [B, T].
    """
    lengths = [padded(len(row) - 1, limit) for row in rows]
    for length in sorted(set(lengths), reverse=True):
        of_length = [k for k, n in enumerate(lengths) if n == length]
        size = batch_size or fast_batch(length, vocab_size)
        for start in range(0, len(of_length), size):
            members = of_length[start : start + size]
            inputs, targets = np.zeros((2, size, length), np.int32)
            for i, k in enumerate(members):
                n = len(rows[k]) - 1
                inputs[i, :n], targets[i, :n] = rows[k][:-1], rows[k][1:]
            yield members, inputs, targets


def padded(length: int, limit: int) -> int:
    """The smallest of 16, 32, 64, … that holds so many tokens, at most ``limit``."""
    size = SHORTEST
    while size < length:
        size *= 2
    return min(size, limit)


def fast_batch(length: int, vocab_size: int) -> int:
    """How many rows of a length to score at once."""
    tokens = min(TOKENS_PER_BATCH.get(jax.default_backend(), 8192), LOGITS_PER_BATCH // vocab_size)
    return max(1, tokens // length)


def pieces(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    """Cut ids into pieces whose lengths are powers of two: any prompt is read by the same few programs, unpadded."""
    start = 0
    while start < len(ids):
        size = 1 << ((len(ids) - start).bit_length() - 1)
        yield ids[start : start + size]
        start += size

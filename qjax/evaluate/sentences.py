"""Pairs of sentences for text encoders, which have no right answers to be scored on.

A quantized encoder is judged by how far the cosines of sentence vectors move (`qjax.evaluate.SentenceTask`). Any pairs
will do that are like what the encoder sees; some should be close to one another and some far apart.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from qjax.errors import DataError

WORDS = (4, 30)
"""Words of a sentence: shorter ones are mostly headings and exclamations, longer ones often not one sentence."""

_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


def sentence_pairs(text: str, count: int = 256, seed: int | np.random.Generator = 0) -> list[tuple[str, str]]:
    """Return pairs of sentences of a text.

    A text whose lines hold two sentences each, a tab between them, is taken as it is: the first ``count`` pairs. Of any
    other text half the pairs are neighbours and half are drawn at random; sentences have 4 to 30 words.

    Args:
        text: the text.
        count: how many pairs; fewer where the text has fewer sentences than that.
        seed: of the draw.

    Raises:
        DataError: fewer than two sentences, or lines with more or less than one tab among others that have one.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    if any("\t" in line for line in lines):
        pairs = [tuple(part.strip() for part in line.split("\t")) for line in lines]
        for number, pair in enumerate(pairs, 1):
            if len(pair) != 2 or not all(pair):
                raise DataError(
                    f"pair {number} of the text is {lines[number - 1][:60]!r}; in a text with tabs each line holds two "
                    "sentences with a tab between them"
                )
        return [(pair[0], pair[1]) for pair in pairs[:count]]
    found = [s.strip() for s in _END.split(" ".join(text.split()))]
    found = [s for s in found if WORDS[0] <= len(s.split()) <= WORDS[1]]
    count = min(count, len(found) - len(found) % 2)
    if count < 2:
        raise DataError(
            f"the text has {len(found)} sentences of {WORDS[0]} to {WORDS[1]} words, and pairs need two at least; give "
            "a longer text, or lines of two sentences with a tab between them"
        )
    rng = np.random.default_rng(seed)
    near: Any = rng.choice(len(found) - 1, count // 2, replace=False)
    far: Any = rng.choice(len(found), (count - count // 2, 2), replace=False)
    return [(found[i], found[i + 1]) for i in near] + [(found[i], found[j]) for i, j in far]

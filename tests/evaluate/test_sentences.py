"""Pairs of sentences: which are taken, how many, and texts that have none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.errors import DataError
from qjax.evaluate import sentence_pairs

NAMES = [f"Number {i} is what this one says." for i in range(40)]
TEXT = "\n".join(" ".join(NAMES[i : i + 5]) for i in range(0, 40, 5)) + "\n\nOh no! A heading\n"


@settings(max_examples=25, deadline=None)
@given(count=st.integers(2, 60), seed=st.integers(0, 5))
def test_half_are_neighbours_and_half_are_drawn(count, seed):
    pairs = sentence_pairs(TEXT, count, seed)
    assert len(pairs) == min(count, 40) and pairs == sentence_pairs(TEXT, count, seed)
    assert {s for pair in pairs for s in pair} <= set(NAMES), "exclamations and headings are too short"
    half = len(pairs) // 2
    assert all(NAMES.index(b) == NAMES.index(a) + 1 for a, b in pairs[:half])
    drawn = [s for pair in pairs[half:] for s in pair]
    assert len(set(drawn)) == len(drawn) and len(set(pairs[:half])) == half


def test_a_generator_goes_on():
    rng = np.random.default_rng(3)
    first, second = sentence_pairs(TEXT, 10, rng), sentence_pairs(TEXT, 10, rng)
    assert first == sentence_pairs(TEXT, 10, 3) and second != first


def test_pairs_of_ones_own():
    text = "A cat.\tSome cat.\n\nhello \t world\n1\t2\n"
    assert sentence_pairs(text) == [("A cat.", "Some cat."), ("hello", "world"), ("1", "2")]
    assert sentence_pairs(text, 1) == [("A cat.", "Some cat.")]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has 0 sentences"),
        ("Only one sentence is here, alas.", "has 1 sentences"),
        ("a\tb\nno tab\n", "pair 2 of the text is 'no tab'"),
        ("a\tb\tc\n", "pair 1"),
        ("a\t\n", "pair 1"),
    ],
)
def test_texts_without_pairs(text, says):
    with pytest.raises(DataError, match=says):
        sentence_pairs(text)

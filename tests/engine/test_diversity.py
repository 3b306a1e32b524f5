"""Exact: repetition and distinct words, counted by hand."""

import pytest

from onebit.engine.diversity import LEAST_TOKENS, MOST_TOKENS, distinct, repetition


def test_repetition_counts_trigrams_that_were_there_before():
    assert repetition(range(20)) == 0
    assert repetition([1, 2, 3, 4] * 5) == pytest.approx(1 - 4 / 18)
    assert repetition([7] * LEAST_TOKENS) == pytest.approx(1 - 1 / (LEAST_TOKENS - 2))
    assert repetition(range(LEAST_TOKENS - 1)) is None
    # Only the end of a long text counts.
    assert repetition([7] * 5000 + list(range(MOST_TOKENS))) == 0


def test_words_are_compared_without_case_and_marks():
    assert distinct('The dog, the "Dog" ran.') == 3 / 5
    assert distinct("Tom's hat") == 1
    assert distinct(" ... !") is None

"""Many texts in lanes have the logits that each has alone. Kinds: exact, invariant."""

import numpy as np
import pytest

import tiny
from onebit.eval import scoring
from onebit.eval.scoring import Scorer, log_sums
from onebit.llm import LLM


@pytest.fixture(scope="module")
def llm():
    return LLM(tiny.master(), threads=1)


def questions(seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Texts that share beginnings, one of them twice, of many lengths."""
    rng = np.random.default_rng(seed)
    found = []
    for n in (1, 2, 63, 64, 65, 130):
        start = rng.integers(1, 320, n).tolist()
        found += [(start, rng.integers(1, 320, k).tolist()) for k in (1, 1, 5, 60)]
    found.append(found[0])
    return found


def alone(llm: LLM, start: list[int], end: list[int]) -> tuple[np.ndarray, np.ndarray]:
    logits = llm.logits([*start, *end])[len(start) - 1 : -1]
    return logits[np.arange(len(end)), end] - log_sums(logits), logits.argmax(axis=1) == end


@pytest.mark.parametrize(
    "bounds", [{}, {"MAX_STEP_TOKENS": 7}, {"MAX_LOGITS_BYTES": 3 * 4 * 320}, {"MAX_LANES": 1}]
)
def test_scores_are_those_of_each_text_alone(llm, bounds, monkeypatch):
    for name, value in bounds.items():
        monkeypatch.setattr(scoring, name, value)
    scorer = Scorer(llm)
    # Twice: the second time lanes hold the texts of the first.
    for seed in (0, 1):
        texts = questions(seed)
        for (start, end), score in zip(texts, scorer.score(texts), strict=True):
            log_probabilities, is_best = alone(llm, start, end)
            assert (score.log_probabilities == log_probabilities).all()
            assert (score.is_best == is_best).all()


def test_a_question_is_computed_once(llm):
    computed = []
    start = list(range(1, 101))
    texts = [(start, [i, i, i]) for i in range(1, 5)]
    Scorer(llm, computed.append).score(texts)
    # One lane: the question, and of every answer its tokens but the last, with the question's last where it was read.
    assert sum(computed) == 100 + 2 + 3 * 3


def test_log_sums_are_those_of_float64():
    logits = np.random.default_rng(0).standard_normal((21, 1000)).astype(np.float32) * 30 + 100
    exact = np.logaddexp.reduce(logits.astype(np.float64), axis=1)
    assert np.abs(log_sums(logits) - exact).max() < 1e-6


def test_a_text_longer_than_the_context_is_refused(llm):
    with pytest.raises(ValueError, match=r"a text has 193 tokens; expected 1 to 192"):
        Scorer(llm).score([([1] * 193, [1])])
    assert len(Scorer(llm).score([([1] * 192, [1])])) == 1
    assert Scorer(llm).score([]) == []

"""Distance from a reference, whose answers are kept. Kinds: exact, oracle (numpy, in float64), invariant."""

import numpy as np
import pytest

import tiny
from onebit.eval import divergence as distances
from onebit.eval.scoring import Scorer
from onebit.eval.texts import Windows
from onebit.llm import LLM

TEXT = tiny.TEXT[:300]


@pytest.fixture(scope="module")
def models():
    return LLM(tiny.master(seed=0), threads=1), LLM(tiny.master(seed=1), threads=1)


@pytest.fixture(scope="module")
def windows(models):
    return Windows.of(models[0], 192)


def exact(models) -> tuple[np.ndarray, np.ndarray]:
    """Divergence and agreement of every token, over the whole vocabulary."""
    logs = []
    for llm in models:
        x = llm.logits(llm.tokenizer.encode(TEXT))[:-1].astype(np.float64)
        logs.append(x - np.logaddexp.reduce(x, axis=1, keepdims=True))
    p, q = logs
    return (np.exp(p) * (p - q)).sum(axis=1), p.argmax(axis=1) == q.argmax(axis=1)


def compare(models, windows, keep):
    reference = distances.answers(Scorer(models[0]), TEXT, windows, keep)
    return distances.divergence(Scorer(models[1]), TEXT, windows, reference)


def test_all_tokens_kept_give_the_divergence(models, windows):
    kl, same = exact(models)
    found = compare(models, windows, 10**9)
    assert found.kl.value == pytest.approx(kl.mean(), rel=1e-5)
    assert found.top1.value == same.mean()
    assert found.kl.low < found.kl.value < found.kl.high
    assert found.nll_difference.value == pytest.approx(np.mean(found.own.nll - found.reference.nll))


def test_fewer_tokens_kept_never_give_more(models, windows):
    kl, _ = exact(models)
    found = [compare(models, windows, keep).kl.value for keep in (1, 10, 100, 310)]
    assert 0 < found[0] < found[1] < found[2] < found[3] <= kl.mean() * (1 + 1e-6)
    assert found[3] > 0.95 * kl.mean()


@pytest.mark.parametrize("keep", [3, 320])
def test_a_model_is_no_distance_from_itself(models, windows, keep):
    found = compare((models[0], models[0]), windows, keep)
    assert (found.kl.value, found.top1.value, found.nll_difference.value) == (0, 1, 0)


def test_answers_are_kept(models, windows, tmp_path):
    kept = distances.answers(Scorer(models[0]), TEXT, windows, 7)
    path = tmp_path / "deep" / "answers.npz"
    assert distances.read(path) is None
    distances.write(kept, path)
    again = distances.read(path)
    assert all((vars(again)[name] == value).all() for name, value in vars(kept).items())
    path.write_bytes(path.read_bytes()[:-40])
    assert distances.read(path) is None


def test_other_tokens_are_refused(models, windows):
    kept = distances.answers(Scorer(models[0]), TEXT, windows, 7)
    with pytest.raises(ValueError, match="other tokens of the text"):
        distances.divergence(Scorer(models[1]), TEXT + "!", windows, kept)
    with pytest.raises(ValueError, match="keep is 0"):
        distances.answers(Scorer(models[0]), TEXT, windows, 0)

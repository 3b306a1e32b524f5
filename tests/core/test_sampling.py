"""Golden: Philox. Oracle: a plain numpy sampler and the C library's exp. Invariant: the distribution of draws."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebit import _core
from onebit.engine.model import sample

NONE = np.array([], np.int32)
DEFAULTS = {
    "ids": NONE,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "seed": 7,
    "counter": 0,
}


def draw(logits, **changes) -> int:
    (token,) = sample(np.asarray(logits, np.float32)[None], **DEFAULTS | changes)
    return token


def kept(logits, history=(), temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """The numpy twin: ids that survive the filters, best first, and their probabilities in float64."""
    z = np.asarray(logits, np.float32).copy()
    for token in set(history):
        penalty = np.float32(repetition_penalty)
        z[token] = z[token] / penalty if z[token] > 0 else z[token] * penalty
    order = np.lexsort((np.arange(len(z)), -z))
    p = np.exp((z[order].astype(np.float64) - z.max()) / temperature)
    if top_k:
        order, p = order[:top_k], p[:top_k]
    if top_p < 1:
        n = int(np.searchsorted(np.cumsum(p), top_p * p.sum())) + 1
        order, p = order[:n], p[:n]
    order, p = order[p >= min_p], p[p >= min_p]
    return order, p / p.sum()


def uniform(seed: int, counter: int) -> float:
    high, low, *_ = _core.philox(counter, 0, seed)
    return ((high << 32 | low) >> 11) * 2.0**-53


def test_philox_known_answers():
    # Random123 1.14, kat_vectors: philox4x32, 10 rounds.
    assert _core.philox(0, 0, 0) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    ones = 2**64 - 1
    assert _core.philox(ones, ones, ones) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)


def test_exp_equals_the_c_library():
    x = -np.linspace(0, 707, 5003)
    ours = np.array([_core.exp_negative(value) for value in x])
    assert (abs(ours / np.exp(x) - 1) < 1e-15).all()
    assert _core.exp_negative(-709.0) == 0.0


@given(st.integers(0, 2**32), st.data())
def test_draws_equal_plain_numpy(seed, data):
    rng = np.random.default_rng(seed)
    n = data.draw(st.sampled_from([1, 2, 17, 300]))
    # Rounded, so that equal logits occur.
    logits = np.round(rng.normal(0, data.draw(st.sampled_from([0.0, 1.0, 8.0])), n), 1)
    filters = {
        "temperature": data.draw(st.sampled_from([0.3, 1.0, 2.5])),
        "top_k": data.draw(st.sampled_from([0, 1, 3, 40, 10**30])),
        "top_p": data.draw(st.sampled_from([1e-9, 0.137, 0.9, 1.0])),
        "min_p": data.draw(st.sampled_from([0.0, 0.0491, 1.0])),
        "repetition_penalty": data.draw(st.sampled_from([1.0, 1.37, 0.81])),
    }
    history = rng.integers(0, n, 5).astype(np.int32)
    ids, p = kept(logits, history.tolist(), **filters | {"top_k": min(filters["top_k"], n)})
    for counter in range(5):
        token = draw(logits, ids=history, seed=seed, counter=counter, **filters)
        edges = np.cumsum(p)
        u = uniform(seed, counter)
        first, last = (np.searchsorted(edges, u + error, side="right") for error in (-1e-12, 1e-12))
        assert token in ids[first : last + 1]


@pytest.mark.parametrize(
    "filters",
    [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"temperature": 2.0, "top_k": 9, "top_p": 0.9}],
)
def test_draws_follow_the_distribution(filters):
    logits = np.array([0.3, 2.0, -1.0, 1.5, 1.5, 0.0, -2.0, 0.9, 1.1, -0.2, 0.4, 0.8])
    n_draws = 4000
    counts = np.bincount([draw(logits, counter=i, **filters) for i in range(n_draws)], minlength=12)
    ids, p = kept(logits, **filters)
    assert counts[ids].sum() == n_draws
    chi_square = (((counts[ids] - n_draws * p) ** 2) / (n_draws * p)).sum()
    # 99.9 % quantile for 11 degrees of freedom, the most that occur.
    assert chi_square < 31.3


def test_a_draw_depends_on_seed_and_counter_alone():
    logits = np.zeros(1000)
    first = [draw(logits, seed=seed, counter=counter) for seed in range(3) for counter in range(3)]
    again = [draw(logits, seed=seed, counter=counter) for seed in range(3) for counter in range(3)]
    assert first == again
    assert len(set(first)) == 9
    assert draw(logits, seed=2**64 - 1, counter=2**64 - 1) in range(1000)


def test_temperature_zero_takes_the_best_and_the_first_of_equals():
    assert draw([1, 3, 3, 2], temperature=0) == 1
    assert draw([1, 3, 3, 2], temperature=0, ids=np.array([1, 1], np.int32), repetition_penalty=1.1) == 2
    assert draw([-1, -3], temperature=0, ids=np.array([0], np.int32), repetition_penalty=4.0) == 1


def test_a_large_vocabulary_equals_plain_numpy():
    logits = np.random.default_rng(0).normal(0, 1, 128_000).astype(np.float32)
    for filters in ({}, {"top_k": 50_000}, {"top_p": 0.99}, {"temperature": 1e6}):
        ids, p = kept(logits, **filters)
        for counter in range(3):
            rank = np.searchsorted(np.cumsum(p), uniform(7, counter), side="right")
            assert draw(logits, counter=counter, **filters) in ids[rank - 1 : rank + 2]


def test_tokens_of_minus_infinity_are_never_drawn():
    logits = np.full(100, -np.inf)
    logits[[3, 70]] = 0.0, 0.1
    assert {draw(logits, counter=i) for i in range(50)} == {3, 70}
    assert {draw(logits, counter=i, top_k=50) for i in range(50)} == {3, 70}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -0.5}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": float("nan")}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"seed": -1}, "seed is -1; expected 0"),
        ({"seed": 2**64}, "seed is"),
        ({"counter": -1}, "counter is -1"),
        ({"ids": np.array([3], np.int32), "repetition_penalty": 2.0}, r"ids\[0\] is 3; expected 0 to 2"),
        ({"ids": np.array([-1], np.int32), "repetition_penalty": 2.0}, r"ids\[0\] is -1"),
        ({"ids": [0]}, "ids: expected a contiguous int32 array"),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        draw([0, 1, 2], **changes)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        ([0, np.nan], r"logits\[1\] is NaN"),
        ([np.inf, 0], r"logits\[0\] is infinite"),
        ([-np.inf, -np.inf], "all are -infinity"),
        ([], "logits: expected some"),
    ],
)
def test_bad_logits_are_refused(logits, message):
    with pytest.raises(ValueError, match=message):
        draw(logits)

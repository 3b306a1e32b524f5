"""Exact: the limits of every sampling parameter."""

import math

import numpy as np
import pytest

from onebit.engine.sampling import SamplingParams, random_seed


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("max_tokens", [1, np.int64(5)], [0, -1, 1.5, True, "3", 2**31]),
        ("temperature", [0, 0.0, 2, np.float32(0.5)], [-0.1, math.nan, math.inf, 10**400, "1", None, True]),
        ("top_k", [0, 1, 10**6], [-1, 2.0, None]),
        ("top_p", [1e-9, 1, 1.0], [0, 0.0, 1.01, math.nan]),
        ("min_p", [0, 0.5, 1], [-0.1, 1.1, math.nan]),
        ("min_sigma", [0, 2, np.float32(1.5), 100], [-0.1, 101, math.nan, "2", None]),
        ("repetition_penalty", [1e-6, 0.5, 1, 1e6], [0, 1e-7, -1.0, 1e7, math.inf]),
        ("seed", [None, 0, 2**64 - 1], [-1, 2**64, 1.0, "7"]),
        ("stop", ["x", ["x", "y"], (), []], ["", ["x", ""], [1], 3, None]),
        ("logprobs", [None, 0, 20], [-1, True, 1.0]),
        ("prompt_logprobs", [None, 0, 20], [-1, False, "1"]),
        ("presence_penalty", [-2, 0, 2], [-2.1, 3, math.nan, None]),
        ("frequency_penalty", [-2, 0.5, 2], [-2.1, 3, math.inf, None]),
        ("ignore_eos", [True, False, np.True_], ["no", None, 2, []]),
    ],
)
def test_limits(name, good, bad):
    for value in good:
        kept = getattr(SamplingParams(**{name: value}), name)
        assert type(kept) in (int, float, bool, tuple, type(None))
        assert name == "stop" or kept == value
    for value in bad:
        with pytest.raises(ValueError, match=f"^{name} is .*expected") as error:
            SamplingParams(**{name: value})
        assert "\n" not in str(error.value)


def test_limits_of_biases_and_grammars():
    assert SamplingParams(logit_bias={np.int64(3): 100, 4: np.float32(-0.5)}).logit_bias == {
        3: 100.0,
        4: -0.5,
    }
    for bad in ([3], {"3": 1.0}, {-1: 1.0}, {3: 101}, {3: math.nan}, {3: "1"}):
        with pytest.raises(ValueError, match="^logit_bias.*expected"):
            SamplingParams(logit_bias=bad)
    with pytest.raises(ValueError, match="grammar is 'json'; expected an object with mask and accept"):
        SamplingParams(grammar="json")


def test_one_stop_string_is_a_list_of_one():
    assert SamplingParams(stop="\n\n").stop == ("\n\n",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def test_random_seeds_differ_and_are_valid():
    seeds = {random_seed() for _ in range(8)}
    assert len(seeds) > 1
    for seed in seeds:
        SamplingParams(seed=seed)

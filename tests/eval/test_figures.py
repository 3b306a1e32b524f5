"""Errors and intervals. Kinds: exact, and an oracle (numpy on simulated draws)."""

import math

import numpy as np
import pytest

from onebit.eval.figures import bootstrap, mean, over_seeds, proportion, token_mean


def test_wilson_interval_of_a_textbook():
    # Newcombe 1998, table I: 81 of 263.
    figure = proportion([1] * 81 + [0] * 182)
    assert (round(figure.low, 4), round(figure.high, 4)) == (0.2553, 0.3662)
    assert proportion([0] * 10).low == 0 and round(proportion([0] * 10).high, 4) == 0.2775


def test_a_single_item_has_an_interval_and_no_error():
    figure = proportion([1])
    assert math.isnan(figure.stderr) and 0 < figure.low < figure.high == 1


def test_token_mean_knows_that_neighbours_are_alike():
    rng = np.random.default_rng(0)
    errors, means = [], []
    for _ in range(200):
        # Every draw comes eight times in a row.
        x = rng.standard_normal(256).repeat(8)
        figure = token_mean(x)
        errors.append(figure.stderr)
        means.append(figure.value)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.15)
    # A mean of independent values would claim less than half of it.
    assert mean(x).stderr < 0.5 * errors[-1]


def test_token_mean_of_a_few_values():
    assert token_mean([1.0, 2.0, 3.0]).stderr == pytest.approx(mean([1.0, 2.0, 3.0]).stderr)
    assert math.isnan(token_mean([1.0]).stderr)


def test_seeds_widen_the_interval():
    rng = np.random.default_rng(0)
    one = (rng.random(400) < 0.5).astype(float)
    same = over_seeds([one, one, one])
    assert same.stderr == pytest.approx(proportion(one).stderr)
    moved = over_seeds([one, np.ones(400), np.zeros(400)])
    assert moved.stderr > 5 * same.stderr and 0 <= moved.low < moved.high <= 1


def test_bootstrap_agrees_with_the_formula():
    x = np.random.default_rng(0).standard_normal(500).tolist()
    assert bootstrap(x, np.mean).stderr == pytest.approx(mean(x).stderr, rel=0.15)


def test_a_function_of_a_figure_keeps_its_interval():
    figure = mean([1.0, 2.0, 3.0]).through(lambda x: -x)
    assert figure.value == -2 and figure.low < -2 < figure.high

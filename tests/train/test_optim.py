"""Exact: the schedule at the points that define it."""

import pytest

from onebit.train.optim import Schedule
from onebit.train.recipes import build, override


def test_two_stages_of_learning_rate_and_weight_decay():
    schedule = Schedule(lr=8.0, lr_second=4.0, weight_decay=0.1, weight_decay_second=0.0, warmup_steps=4)
    at = [schedule.at(step, 100) for step in range(100)]
    assert at[0] == (8.0 * 0.25, 0.1)
    assert at[3][0] == pytest.approx(8.0 * 0.97)
    assert at[49] == (pytest.approx(8.0 * 0.51), 0.1)
    assert at[50] == (4.0 * 0.5, 0.0)
    assert at[99][0] == pytest.approx(0.04)
    rates = [rate for rate, _ in at]
    assert all(a > b for a, b in zip(rates[3:], rates[4:], strict=False))


def test_no_warmup():
    assert Schedule(lr=1.0, warmup_steps=0).at(0, 10) == (1.0, 0.1)


def test_a_rate_takes_the_second_along():
    rates = [
        build("b1.58", [*settings]).optim for settings in ((), ["optim.lr=4e-3"], ["optim.lr_second=1e-4"])
    ]
    share = rates[0].lr_second / rates[0].lr
    assert 0 < share < 1
    assert (rates[1].lr, rates[1].lr_second) == (4e-3, pytest.approx(4e-3 * share))
    assert (rates[2].lr, rates[2].lr_second) == (rates[0].lr, 1e-4)
    both = build("b1.58", ["optim.lr_second=1e-4", "optim.lr=4e-3"]).optim
    assert (both.lr, both.lr_second) == (4e-3, 1e-4)
    still = build("b1.58", ["optim.lr=0", "optim.lr_second=1e-4"])
    assert override(still, ["optim.lr=1e-3"]).optim.lr_second == 1e-4

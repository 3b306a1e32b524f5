"""Exact: the schedule at the points that define it."""

import pytest

from onebit.train.optim import Schedule


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

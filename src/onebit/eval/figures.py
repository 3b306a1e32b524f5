"""Figures with what chance leaves open: standard error and 95 % interval.

Knows numbers only, nothing of models or texts.

    proportion([1, 0, 1, 1])          # Figure(value=0.75, stderr=0.25, low=0.30, high=0.95, n=4)
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]

# Two-sided 95 % of the normal distribution.
Z = 1.959963984540054

# Neighbouring tokens are alike: so many in a row count as one draw.
RUN_TOKENS = 64
# Fewer runs than this say little of their own spread.
MIN_RUNS = 8


class Figure(NamedTuple):
    """A measured value and its error.

    Args:
        value: what was measured.
        stderr: standard error of the value; nan where one draw is all there is.
        low: lower end of the 95 % interval; likewise high.
        n: how many items or tokens were measured.
    """

    value: float
    stderr: float
    low: float
    high: float
    n: int

    def through(self, f: Callable[[float], float]) -> "Figure":
        """The figure of a monotone function of the value; the error is that of half the new interval."""
        low, high = sorted((f(self.low), f(self.high)))
        return Figure(f(self.value), (high - low) / (2 * Z), low, high, self.n)

    def describe(self, form: str = ".4g") -> str:
        """The figure in words: value and interval."""
        return f"{self.value:{form}} ({self.low:{form}} to {self.high:{form}})"


def mean(values: Sequence[float] | Float64) -> Figure:
    """The mean of independent values.

        stderr = sd / sqrt(n)

    Args:
        values: float64 [n].
    """
    x = np.asarray(values, np.float64)
    stderr = float(x.std(ddof=1)) / math.sqrt(len(x)) if len(x) > 1 else math.nan
    return _normal(float(x.mean()), stderr, len(x))


def token_mean(values: Sequence[float] | Float64) -> Figure:
    """The mean of values of consecutive tokens, which are not independent.

    The error is that of the means of runs of up to RUN_TOKENS tokens (the method of batch means).

    Args:
        values: float64 [n], in the order of the text.
    """
    x = np.asarray(values, np.float64)
    run = max(1, min(RUN_TOKENS, len(x) // MIN_RUNS))
    sums = np.add.reduceat(x, np.arange(0, len(x), run))
    counts = np.minimum(run, len(x) - np.arange(0, len(x), run))
    value, n_runs = float(x.mean()), len(sums)
    if n_runs < 2:
        return _normal(value, math.nan, len(x))
    spread = float(((sums - value * counts) ** 2).sum()) * n_runs / (n_runs - 1)
    return _normal(value, math.sqrt(spread) / len(x), len(x))


def proportion(values: Sequence[float] | Float64) -> Figure:
    """The share of independent items that are 1 and not 0, with the interval of Wilson (1927).

    Args:
        values: float64 [n] of zeros and ones.
    """
    figure = mean(values)
    return _wilson(figure, figure.n)


def over_seeds(values_SN: Sequence[Sequence[float]] | Float64) -> Figure:
    """The share of items that are 1 and not 0, where all were asked once for each seed.

        stderr^2 = var(mean of each item) / N + var(mean of each seed) / S

    The interval is Wilson's for the number of independent items that would have this error.

    Args:
        values_SN: float64 [S, N], seeds by items.
    """
    x = np.asarray(values_SN, np.float64)
    n_seeds, n = x.shape
    of_items = float(x.mean(axis=0).var(ddof=1)) / n if n > 1 else math.nan
    of_seeds = float(x.mean(axis=1).var(ddof=1)) / n_seeds if n_seeds > 1 else 0.0
    p, variance = float(x.mean()), of_items + of_seeds
    return _wilson(_normal(p, math.sqrt(variance), n), p * (1 - p) / variance if variance > 0 else n)


def _wilson(figure: Figure, n: float) -> Figure:
    """The figure of a share with the interval for n independent items."""
    p = figure.value
    centre, scale = p + Z * Z / (2 * n), 1 + Z * Z / n
    half = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    # Rounding must not leave the value itself outside.
    low, high = min((centre - half) / scale, p), max((centre + half) / scale, p)
    return figure._replace(low=max(low, 0.0), high=min(high, 1.0))


def bootstrap(values: Sequence[Any], aggregate: Callable[[Sequence[Any]], float], draws: int = 200) -> Figure:
    """Any statistic of independent items, with the error that items drawn again with replacement show.

    Args:
        values: of the items.
        aggregate: from values to the statistic.
        draws: how often items are drawn again.
    """
    rng = np.random.default_rng(0)
    again = [aggregate([values[i] for i in rng.integers(0, len(values), len(values))]) for _ in range(draws)]
    return _normal(float(aggregate(values)), float(np.std(again, ddof=1)), len(values))


def _normal(value: float, stderr: float, n: int) -> Figure:
    return Figure(value, stderr, value - Z * stderr, value + Z * stderr, n)

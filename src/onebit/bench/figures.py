"""From the values of all rounds to a figure: median, least, most, percentiles, and the ratio to ours."""

from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from onebit.bench.foreign import LIMIT, Usage

# Units, and whether more is better; in the order of the table.
UNITS = {
    "cold_start": ("s", False), "load": ("s", False), "ttft": ("s", False), "inter_token": ("s", False),
    "decode": ("tok/s", True), "prefill": ("tok/s", True), "resident": ("bytes", False),
    "token_bytes": ("bytes", False), "bandwidth": ("bytes/s", True), "bandwidth_share": ("share", True),
    "energy_per_token": ("J", False), "cache_misses_per_token": ("count", False),
}  # fmt: skip


@dataclass(frozen=True)
class Key:
    """What a figure is of.

    Args:
        name: of the figure, a key of UNITS.
        engine: its name.
        settings: of the measurement, sorted by their names.
    """

    name: str
    engine: str
    settings: tuple[tuple[str, Any], ...]


@dataclass
class Series:
    """A figure over all rounds.

    Args:
        values: one for each round, None where it failed.
        samples: of all rounds, where a round has many: of these are the percentiles.
        usages: of the processors by others, as far as known.
        reason: why values are missing.
    """

    values: list[float | None] = field(default_factory=list)
    samples: list[float] = field(default_factory=list)
    usages: list[Usage] = field(default_factory=list)
    reason: str = ""

    @property
    def measured(self) -> list[float]:
        """The values that there are."""
        return [value for value in self.values if value is not None]

    @property
    def foreign(self) -> float | None:
        """Mean share of all processors that others used."""
        return sum(u.foreign for u in self.usages) / len(self.usages) if self.usages else None

    @property
    def is_disturbed(self) -> bool:
        """Whether others used so much that the figure is not to be quoted."""
        return (self.foreign or 0) > LIMIT


def figure(key: Key, series: Series, ours: Series | None = None) -> dict[str, Any]:
    """A figure, ready for JSON: value, low and high are median, least and most of the rounds.

    Where a round has many samples, the value and the percentiles are those of all of them.

    Args:
        key: what it is of.
        series: its values, one at least.
        ours: the same of our model, measured in the same rounds: how many times as good it is, round by round.
    """
    unit, more_is_better = UNITS[key.name]
    values = series.measured
    found: dict[str, Any] = {"engine": key.engine, "unit": unit, "rounds": len(values)}
    found["value"] = rounded(median(series.samples or values))
    found |= {"low": rounded(min(values)), "high": rounded(max(values))}
    if series.samples:
        found |= {f"p{p}": rounded(float(np.percentile(series.samples, p))) for p in (95, 99)}
    if (foreign := series.foreign) is not None:
        found["foreign"] = rounded(foreign)
    pairs = [(a, b) for a, b in zip(ours.values, series.values, strict=False) if a and b] if ours else []
    # Of bytes and shares there is nothing to compare.
    if pairs and key.name not in ("token_bytes", "bandwidth_share"):
        ratios = [a / b if more_is_better else b / a for a, b in pairs]
        middle, low, high = (rounded(pick(ratios)) for pick in (median, min, max))
        found["ratio"] = {"value": middle, "low": low, "high": high}
    return found


def rounded(value: float) -> float:
    """Five digits: more would be noise; counts of bytes stay whole."""
    return value if isinstance(value, int) else float(f"{value:.5g}")

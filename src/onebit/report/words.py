"""What measured things are called, and how their numbers are written.

number(3465288, "bytes")          # Number(shown="3.47 MB", exact="3465288")
"""

import math
from dataclasses import dataclass
from typing import Any

UNKNOWN = "not known"


@dataclass(frozen=True)
class Measure:
    """What a figure is.

    Args:
        title: in words.
        unit: as files have it; empty: none.
        best: "high" or "low"; empty: neither.
    """

    title: str
    unit: str = ""
    best: str = ""


MEASURES = {
    "bits_per_byte": Measure("bits per byte", best="low"),
    "perplexity": Measure("perplexity", best="low"),
    "kl": Measure("KL divergence, nats per token", best="low"),
    "top1": Measure("same likeliest token", "share", "high"),
    "nll_difference": Measure("nats more per token", best="low"),
    "repetition": Measure("3-grams repeated", "share"),
    "distinct_words": Measure("distinct words", "share"),
    "entropy": Measure("entropy, nats"),
    "judge_bits_per_byte": Measure("judge, bits per byte"),
    "decode": Measure("text", "tok/s", "high"),
    "prefill": Measure("prompt", "tok/s", "high"),
    "ttft": Measure("time to the first token", "s", "low"),
    "inter_token": Measure("time between tokens", "s", "low"),
    "load": Measure("loading", "s", "low"),
    "cold_start": Measure("start to first token, cold", "s", "low"),
    "resident": Measure("memory in use", "bytes", "low"),
    "token_bytes": Measure("read for one token", "bytes", "low"),
    "bandwidth": Measure("reading memory", "bytes/s", "high"),
    "bandwidth_share": Measure("share of that in text", "share", "high"),
    "energy_per_token": Measure("energy for one token", "J", "low"),
    "cache_misses_per_token": Measure("cache misses for one token", "count", "low"),
}

# The tables of speed, and what stands in each; what no table names stands in the last.
GROUPS = {
    "Speed": ("decode", "prefill", "bandwidth", "bandwidth_share"),
    "Waiting": ("ttft", "inter_token", "load", "cold_start"),
    "Memory": ("resident", "token_bytes"),
    "Energy": ("energy_per_token", "cache_misses_per_token"),
    "More": (),
}

_SCALES: dict[str, tuple[tuple[float, str], ...]] = {
    "bytes": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")),
    "bytes/s": ((1e9, "GB/s"), (1e6, "MB/s"), (1, "B/s")),
    "s": ((1, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "x": ((1, "times as good"),),
    "J": ((1, "J"), (1e-3, "mJ"), (1e-6, "µJ")),
}
_UNITS = {"tok/s": "tokens/s", "share": "%", "count": ""}


@dataclass(frozen=True)
class Number:
    """A number as readers see it, and as the file has it; both empty: there is none."""

    shown: str
    exact: str


def measure(name: str, unit: str = "") -> Measure:
    """What is known about a figure, by the name that files have for it; of another name, the name."""
    known = MEASURES.get(name, Measure(name.replace("_", " "), unit))
    return known if not unit or known.unit == unit else Measure(known.title, unit, known.best)


def scale(largest: float, unit: str) -> tuple[float, str]:
    """The divisor and the unit in which numbers up to `largest` are easy to read."""
    if unit == "share":
        return 0.01, "%"
    scales = _SCALES.get(unit, ((1, _UNITS.get(unit, unit)),))
    return next((s for s in scales if abs(largest) >= s[0]), scales[-1])


def number(value: float | None, unit: str = "", like: float | None = None, bare: bool = False) -> Number:
    """A number with its unit, in four digits that matter.

    Args:
        value: None is not known.
        unit: as files have it.
        like: the number whose scale is used, so that an interval reads like its figure.
        bare: without the unit, as the one that follows has it.
    """
    if value is None:
        return Number(UNKNOWN, "")
    divisor, name = scale(value if like is None else like, unit)
    shown = digits(value / divisor, None if like is None else like / divisor)
    # A whole number was counted; a measured one keeps its zeros.
    shown = shown if isinstance(value, float) else trim(shown)
    return Number(f"{shown}\N{NO-BREAK SPACE}{name}" if name and not bare else shown, repr(value))


def digits(value: float, like: float | None = None) -> str:
    """Four digits that matter, or as many decimals as another number has; no exponent where people use none."""
    model = value if like is None else like
    if model and not 1e-4 <= abs(model) < 1e12:
        return f"{value:.3g}"
    n_decimals = 0 if not model else max(0, 3 - math.floor(math.log10(abs(model))))
    return f"{value:,.{n_decimals}f}"


def trim(shown: str) -> str:
    """A number without zeros that say nothing."""
    return shown.rstrip("0").rstrip(".") if "." in shown and "e" not in shown else shown


def plain(value: Any) -> str:
    """Any value of JSON in words, its numbers as they are."""
    if value is None:
        return UNKNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(plain(item) for item in value) or "none"
    return value if isinstance(value, str) else repr(value)


def flat(data: dict[str, Any], above: str = "") -> list[tuple[str, str]]:
    """All that an object of JSON holds, as pairs of a name and a value in words."""
    pairs = []
    for key, value in data.items():
        name = f"{above} {key.replace('_', ' ')}".strip()
        if isinstance(value, dict) and value:
            pairs += flat(value, name)
        elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
            pairs += flat({str(i + 1): item for i, item in enumerate(value)}, name)
        else:
            pairs.append((name, "none" if value == {} else plain(value)))
    return pairs


def names(parts: list[str]) -> str:
    """Parts as a sentence lists them: a, b and c."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def count(n: int, noun: str) -> str:
    """A number of things."""
    return f"{n:,} {noun}" + ("" if n == 1 else "s")

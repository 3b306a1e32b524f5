"""Files of `onebit eval` and `onebit bench` as flat lists of figures, which rules can look through.

before, after = read(Path("a.json")), read(Path("b.json"))
for old, new in pairs(before, after): print(old.name, new.value - old.value)
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onebit.eval.figures import Z
from onebit.results import BENCH, EVAL

Json = dict[str, Any]

# Settings that tell where a figure comes from, and not how it was measured.
_ORIGINS = ("data",)


@dataclass(frozen=True)
class Measured:
    """One figure.

    Args:
        kind: "text", "distance", "task" or "speed".
        name: of the text or the task; of a speed what was timed.
        figure: what was measured, as "perplexity", "acc" or "decode".
        engine: which program ran the model; empty: onebit.
        settings: what must be equal for two figures to be compared.
        value: what came out.
        low: lower end of its interval; of speeds the least of all rounds. Likewise high.
        more: what else the file tells with it.
        command: what repeats it.
    """

    kind: str
    name: str
    figure: str
    engine: str
    settings: Json
    value: float
    low: float
    high: float
    more: Json
    command: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What it is of, whatever the settings."""
        return self.kind, self.name, self.figure, self.engine

    def describe(self, form: str = ".4g") -> str:
        """The figure in words: value and interval."""
        return f"{self.value:{form}} ({self.low:{form}} to {self.high:{form}})"


@dataclass(frozen=True)
class Reading:
    """One file of results.

    Args:
        path: of the file.
        kind: EVAL or BENCH.
        model: name, label, kernels, ...
        machine: where it was measured.
        measured: all figures.
        conditions: of a benchmark.
        missing: of a benchmark: what was not measured, and why.
        unfinished: tasks that were begun.
    """

    path: Path
    kind: str
    model: Json
    machine: Json
    measured: list[Measured]
    conditions: Json = field(default_factory=dict)
    missing: Json = field(default_factory=dict)
    unfinished: Json = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the model was called."""
        return str(self.model.get("name", "MODEL"))

    def find(self, kind: str, figure: str, engine: str | None = None) -> list[Measured]:
        """The figures of a kind with a name; of one engine, if it is given."""
        found = (m for m in self.measured if (m.kind, m.figure) == (kind, figure))
        return [m for m in found if engine is None or m.engine == engine]


def read(path: Path) -> Reading:
    """Read a file of results.

    Raises:
        ValueError: it is none, or it is damaged.
        OSError: it cannot be read.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
        kind = data["format"]
        if kind not in (EVAL, BENCH):
            raise ValueError
        measured = [m for result in data["results"] for m in _figures(result)]
        parts = (data.get(name) or {} for name in ("conditions", "missing", "unfinished"))
        found = Reading(path, kind, dict(data["model"]), dict(data["machine"]), measured, *map(dict, parts))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(
            f"{path}: is no file of results; expected one of onebit eval or onebit bench"
        ) from None
    return found


def pairs(before: Reading, after: Reading) -> Iterator[tuple[Measured, Measured]]:
    """The figures that both files have, measured with the same settings."""
    for old in before.measured:
        for new in after.measured:
            if old.key == new.key and _how(old) == _how(new):
                yield old, new


def unlike(before: Reading, after: Reading) -> Iterator[tuple[Measured, list[str]]]:
    """Figures that both files have, but never with the same settings; and which settings differ."""
    compared = {old.key for old, _ in pairs(before, after)}
    for old in (old for old in before.measured if old.key not in compared):
        same = [_how(new) for new in after.measured if new.key == old.key]
        if same:
            found = _how(old)
            yield old, sorted(name for name in {*found, *same[0]} if found.get(name) != same[0].get(name))


def change(old: Measured, new: Measured) -> tuple[float, float]:
    """The difference of two figures with independent errors: new minus old, and half its 95 % interval."""
    errors = ((m.high - m.low) / (2 * Z) for m in (old, new))
    return new.value - old.value, Z * math.hypot(*errors)


def _how(measured: Measured) -> Json:
    return {name: value for name, value in measured.settings.items() if name not in _ORIGINS}


def _figures(result: Json) -> Iterator[Measured]:
    kind, name, settings = str(result["kind"]), str(result["name"]), dict(result["settings"])
    rest = {
        key: value
        for key, value in result.items()
        if key not in ("kind", "name", "settings", "figures", "distance", "command")
    }
    if kind == "speed":
        found = {name: result}
    else:
        found = {**result["figures"], **result.get("distance", {})}
    for figure, values in found.items():
        value, low, high = (values[bound] for bound in ("value", "low", "high"))
        # A figure of one item has no error.
        if all(isinstance(number, int | float) for number in (value, low, high)):
            of = str(result.get("engine", "")), settings, float(value), float(low), float(high)
            yield Measured(kind, name, figure, *of, rest, str(result.get("command", "")))

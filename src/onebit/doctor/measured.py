"""Files of `onebit eval` and `onebit bench` as flat lists of figures, which rules can look through.

before, after = read([Path("a.json"), Path("b.json")])
for old, new in pairs(before, after): print(old.name, new.value - old.value)
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from onebit import readings
from onebit.eval.figures import Z
from onebit.readings import JSON, File

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
    settings: JSON
    value: float
    low: float
    high: float
    more: JSON
    command: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What it is of, whatever the settings."""
        return self.kind, self.name, self.figure, self.engine

    def describe(self, form: str = ".4g") -> str:
        """The figure in words: value and interval."""
        return f"{self.value:{form}} ({self.low:{form}} to {self.high:{form}})"


@dataclass(frozen=True)
class Reading(File):
    """A file of results, figure by figure."""

    @cached_property
    def measured(self) -> list[Measured]:
        """All figures; those without an interval tell nothing that a rule could use."""
        return [
            Measured(
                result.kind, result.name, name, result.engine, result.settings, figure.value, figure.low,
                figure.high, result.rest, result.command,
            )
            for result in self.results
            for name, figure in result.figures.items()
            if figure.value is not None and figure.low is not None and figure.high is not None
        ]  # fmt: skip

    @property
    def model_name(self) -> str:
        """What the model was called."""
        return str(self.model["name"])

    def find(self, kind: str, figure: str, engine: str | None = None) -> list[Measured]:
        """The figures of a kind with a name; of one engine, if it is given."""
        found = (m for m in self.measured if (m.kind, m.figure) == (kind, figure))
        return [m for m in found if engine is None or m.engine == engine]


def read(paths: Sequence[Path]) -> list[Reading]:
    """Read files of results; see `onebit.readings.read`."""
    return [Reading(**vars(file)) for file in readings.read(paths)]


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


def _how(measured: Measured) -> JSON:
    return {name: value for name, value in measured.settings.items() if name not in _ORIGINS}

"""Which models, programs and machines files of results are about, and what they are called on the page.

subjects = Subjects(files)
subjects.model(files[0]).short         # "stories.onebit"
"""

import re
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from onebit.readings import File, Result
from onebit.report import words
from onebit.results import EVAL

OURS = "onebit"
# An engine of this name is the machine itself, which has no model.
MACHINE = "machine"
MAX_SHORT = 26
_T = TypeVar("_T", bound=Hashable)


@dataclass(frozen=True)
class Model:
    """A model as an engine runs it.

    Args:
        name: as files have it.
        short: for pictures; no two models have the same.
        sha256: of its file.
        label: bits of weights, activations and cache.
        n_bytes: of its file; None: no file tells.
        colour: of all its marks, counted from 0.
    """

    name: str
    short: str
    sha256: str
    label: str
    n_bytes: int | None
    colour: int


@dataclass(frozen=True)
class Machine:
    """A machine.

    Args:
        name: its CPU, with a number where two have the same.
        cpu, system, isa: as files have it.
        hardware_threads: likewise.
    """

    name: str
    cpu: str
    system: str
    isa: str
    hardware_threads: str


class Subjects:
    """Names and colours of what files are about; the order of the files decides.

    Args:
        files: as read.
    """

    def __init__(self, files: Iterable[File]) -> None:
        self.files = list(files)
        keys = _unique(_key(file) for file in self.files)
        self._models = {key: self._describe(key, i) for i, key in enumerate(keys)}
        self._engines = _unique(
            (result.engine, engine_label(file, result))
            for file in self.files
            for result in file.results
            if result.engine not in ("", OURS, MACHINE)
        )
        machines = _unique(_machine(file) for file in self.files)
        same = Counter(_cpu(machine[0]) for machine in machines)
        self._machines = {}
        for i, machine in enumerate(machines):
            name = _cpu(machine[0]) + (f" ({i + 1})" if same[_cpu(machine[0])] > 1 else "")
            self._machines[machine] = Machine(name, *machine)

    @property
    def models(self) -> list[Model]:
        """All models."""
        return list(self._models.values())

    @property
    def machines(self) -> list[Machine]:
        """All machines."""
        return list(self._machines.values())

    def model(self, file: File) -> Model:
        """The model of a file."""
        return self._models[_key(file)]

    def machine(self, file: File) -> Machine:
        """The machine of a file."""
        return self._machines[_machine(file)]

    def files_of(self, model: Model, kind: str) -> list[File]:
        """The files of one kind about a model."""
        return [file for file in self.files if file.kind == kind and self.model(file) is model]

    def runner(self, file: File, result: Result) -> tuple[str, int]:
        """Who a result is about, for pictures: a model, or another engine; and its colour."""
        if result.engine == MACHINE:
            return "the machine", len(self._models) + len(self._engines)
        engine = (result.engine, engine_label(file, result))
        if engine in self._engines:
            return shorten(result.engine), len(self._models) + self._engines.index(engine)
        model = self.model(file)
        return model.short, model.colour

    def _describe(self, key: tuple[str, str], colour: int) -> Model:
        files = [file for file in self.files if _key(file) == key]
        name = str(files[0].model["name"])
        # Keys with the same short name need more than it.
        namesakes = [other for other in self.files if _tail(other) == _tail(files[0]) and _key(other) != key]
        short = _tail(files[0])
        if namesakes:
            labels_tell = all(other.label != key[1] for other in namesakes)
            short += f" {key[1]}" if labels_tell else f" {key[0][:6]}"
        return Model(name, short, *key, next(filter(None, map(_n_bytes, files)), None), colour)


def engine_label(file: File, result: Result) -> str:
    """The label under which a result was measured; of the machine itself, which has none, "none"."""
    if result.engine == MACHINE:
        return "none"
    if result.engine in ("", OURS):
        return file.label
    return words.plain(file.engines.get(result.engine, {}).get("label"))


def shorten(text: str, length: int = MAX_SHORT) -> str:
    """A text that fits into a picture."""
    return text if len(text) <= length else text[: length - 1] + "…"


def _unique(items: Iterable[_T]) -> list[_T]:
    return list(dict.fromkeys(items))


def _key(file: File) -> tuple[str, str]:
    return str(file.model["sha256"]), file.label


def _machine(file: File) -> tuple[str, str, str, str]:
    facts = file.machine
    return (
        str(facts["cpu"]),
        str(facts.get("system", "")),
        str(facts.get("isa", "")),
        str(facts.get("hardware_threads", "")),
    )


def _cpu(name: str) -> str:
    """The name of a CPU without what says nothing."""
    name = re.sub(r"\((?:R|TM)\)|\bCPU\b|\bProcessor\b|\d+-Core\b|@.*", " ", name)
    return shorten(" ".join(name.split()) or "CPU", 36)


def _tail(file: File) -> str:
    return shorten(str(file.model["name"]).rstrip("/").rpartition("/")[2] or "model")


def _n_bytes(file: File) -> int | None:
    if file.kind == EVAL or "bytes" in file.model:
        return file.model.get("bytes")
    found = file.engines.get(OURS, {}).get("file_bytes")
    return found if isinstance(found, int) else None

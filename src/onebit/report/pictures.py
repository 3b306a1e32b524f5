"""Which pictures results give, as plain values; `drawing` draws them.

for picture in pictures(subjects): print(picture.title)
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from onebit.readings import Figure, Result
from onebit.report import words
from onebit.report.subjects import MACHINE, OURS, Machine, Model, Subjects, engine_label, shorten
from onebit.report.tables import common_settings, is_share, of_kind, settings, tail, text_key
from onebit.results import BENCH

MAX_ROWS = 18
MAX_NOTE, MAX_GROUP = 56, 46
_CALL = "onebit bench --out"


class Axis(NamedTuple):
    """What an axis shows: a title, a unit as files have it, and which end is better, if one is."""

    title: str
    unit: str = ""
    best: str = ""


class Mark(NamedTuple):
    """A point: name, place with intervals, colour, and whether the figures may be quoted."""

    name: str
    x: Figure
    y: Figure
    colour: int
    quotable: bool


class Bar(NamedTuple):
    """A row: what it shares with its neighbours, whose it is, a note, how much, colour, and whether to quote it."""

    group: str
    name: str
    note: str
    figure: Figure
    colour: int
    quotable: bool


@dataclass(frozen=True)
class Points:
    """Two figures of each model against each other."""

    title: str
    caption: str
    x: Axis
    y: Axis
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Bars:
    """One figure of several.

    Args:
        title, caption: in words.
        axis: what is measured.
        bars: from above.
        from_zero: whether lengths compare; if not, the places of dots do.
    """

    title: str
    caption: str
    axis: Axis
    bars: tuple[Bar, ...]
    from_zero: bool = True


@dataclass(frozen=True)
class Absent:
    """A picture that the results do not give, and why."""

    title: str
    reason: str


Picture = Points | Bars | Absent


@dataclass(frozen=True)
class Measured:
    """One measure of quality, of all models that it was measured of."""

    name: str
    axis: Axis
    figures: dict[Model, Figure]


def pictures(subjects: Subjects) -> list[Picture]:
    """The pictures of a page, in their order."""
    measures = qualities(subjects)
    return [
        *_against_size(subjects, measures),
        *_against_speed(subjects, measures),
        *_tasks(subjects),
        _bars(subjects, "Speed of text", "decode"),
        _bars(subjects, "Speed of prompts", "prefill"),
        _bars(subjects, "Memory", "resident"),
        _bars(subjects, "Energy", "energy_per_token"),
        _machines(subjects),
    ]


def qualities(subjects: Subjects) -> list[Measured]:
    """What tells how good models are: bits per byte of each text; without texts, each task."""
    texts: dict[str, Measured] = {}
    tasks: dict[str, Measured] = {}
    for file, result in of_kind(subjects, "text"):
        axis = Axis("bits per byte", best="low")
        one = texts.setdefault(text_key(result), Measured(tail(result.name), axis, {}))
        if "bits_per_byte" in result.figures:
            one.figures.setdefault(subjects.model(file), result.figures["bits_per_byte"])
    for file, result in of_kind(subjects, "task"):
        for name, figure in result.figures.items():
            if is_share(name, figure):
                key = repr((result.name, name, result.rest.get("n_items"), result.rest.get("shots")))
                one = tasks.setdefault(key, Measured(result.name, Axis(name, "share", "high"), {}))
                one.figures.setdefault(subjects.model(file), figure)
    found = [
        one for one in (texts or tasks).values() if any(f.value is not None for f in one.figures.values())
    ]
    return found if texts else found[:1]


def fastest(subjects: Subjects, model: Model, machine: Machine) -> tuple[Figure, Result, bool] | None:
    """The best speed of text that onebit reached alone with a model on a machine: figure, result, quotable."""
    found = [
        (file.quotable, result.figures["decode"].value, result)
        for file in subjects.files_of(model, BENCH)
        for result in file.results
        if result.name == "decode" and result.engine in ("", OURS) and subjects.machine(file) is machine
        if result.settings.get("batch") in (None, 1)
    ]
    known = [(quotable, value, result) for quotable, value, result in found if value is not None]
    if not known:
        return None
    quotable, _, result = max(known, key=lambda of: of[:2])
    return result.figures["decode"], result, quotable


def _against_size(subjects: Subjects, measures: list[Measured]) -> Iterable[Picture]:
    title = "Quality against size"
    if not measures:
        yield Absent(title, "No text and no task was measured: onebit eval --text FILE --out FILE.json does.")
    elif all(model.n_bytes is None for model in subjects.models):
        yield Absent(title, "No file tells how large a model is; measure again with this version of onebit.")
    for measured in measures:
        marks = tuple(
            Mark(model.short, Figure(model.n_bytes), figure, model.colour, True)
            for model, figure in measured.figures.items()
            if model.n_bytes is not None and figure.value is not None
        )
        if marks:
            yield Points(title, measured.name, Axis("size of the file", "bytes", "low"), measured.axis, marks)


def _against_speed(subjects: Subjects, measures: list[Measured]) -> Iterable[Picture]:
    title, n_found = "Speed against quality", 0
    for measured in measures:
        marks = []
        for model, figure in measured.figures.items():
            for machine in subjects.machines:
                found = fastest(subjects, model, machine)
                if found and figure.value is not None:
                    several = [
                        (model.short, len(subjects.models) > 1),
                        (machine.name, len(subjects.machines) > 1),
                    ]
                    name = ", ".join(part for part, is_needed in several if is_needed) or model.short
                    marks.append(Mark(shorten(name, 34), found[0], figure, model.colour, found[2]))
        if marks:
            n_found += 1
            axis = Axis("speed of text", "tok/s", "high")
            yield Points(title, measured.name, axis, measured.axis, tuple(marks))
    if not any(file.kind == BENCH for file in subjects.files):
        yield Absent(title, _why(subjects, "decode"))
    elif not n_found:
        both = "the quality and the speed of the same model with the same label"
        yield Absent(title, f"No model has both: this picture needs {both}.")


def _tasks(subjects: Subjects) -> Iterable[Picture]:
    bars = [
        Bar(
            shorten(f"{result.name}, {name}, {words.plain(result.rest.get('n_items'))} items", MAX_GROUP),
            subjects.model(file).short,
            "",
            figure,
            subjects.model(file).colour,
            True,
        )
        for file, result in sorted(of_kind(subjects, "task"), key=lambda of: of[1].name)
        for name, figure in result.figures.items()
        if is_share(name, figure) and figure.value is not None
    ]
    # The metrics of a task follow each other in each file; here those of all files do.
    bars.sort(key=lambda bar: bar.group)
    if bars:
        axis = Axis("share that is right", "share", "high")
        yield Bars("Tasks", _cut(len(bars)), axis, tuple(bars[:MAX_ROWS]), from_zero=False)


def _bars(subjects: Subjects, title: str, name: str) -> Picture:
    found = [
        (file, result)
        for file, result in of_kind(subjects, "speed")
        if result.name == name and result.engine != MACHINE and result.figures[name].value is not None
    ]
    unit = str(found[0][1].rest.get("unit", "")) if found else ""
    measure = words.measure(name, unit)
    # Lengths of another unit are no lengths of this one.
    found = [of for of in found if of[1].rest.get("unit", "") == unit]
    if not found:
        return Absent(title, _why(subjects, name))
    common = common_settings(result for _, result in found)
    order: dict[str, int] = {}
    bars = []
    for file, result in found:
        runner, colour = subjects.runner(file, result)
        own = _settings(result, lambda key: key not in common)
        order.setdefault(own, len(order))
        label = engine_label(file, result)
        notes = [f"label {label}"] if len({engine_label(*of) for of in found}) > 1 else []
        notes += [subjects.machine(file).name] if len(subjects.machines) > 1 else []
        note = shorten(", ".join(notes), MAX_NOTE)
        bar = Bar(shorten(own, MAX_GROUP), runner, note, result.figures[name], colour, file.quotable)
        bars.append((order[own], bar))
    # What was measured alike stands together, the best first.
    sign = -1 if measure.best == "high" else 1
    bars.sort(key=lambda of: (of[0], sign * (of[1].figure.value or 0)))
    caption = [_settings(found[0][1], lambda key: key in common)]
    caption += [subjects.machines[0].name] if len(subjects.machines) == 1 else []
    caption += [_cut(len(bars))]
    axis = Axis(measure.title, measure.unit, measure.best)
    return Bars(title, ", ".join(filter(None, caption)), axis, tuple(bar for _, bar in bars[:MAX_ROWS]))


def _settings(result: Result, wanted: Callable[[str], bool]) -> str:
    return settings({key: value for key, value in result.settings.items() if wanted(key)})


def _machines(subjects: Subjects) -> Picture:
    title = "Machines"
    bars = []
    for model in subjects.models:
        for machine in subjects.machines:
            if found := fastest(subjects, model, machine):
                figure, result, quotable = found
                note = ", ".join([model.short, _settings(result, lambda key: key in ("threads", "context"))])
                bars.append(Bar("", machine.name, shorten(note, MAX_NOTE), figure, model.colour, quotable))
    if len({bar.name for bar in bars}) < 2:
        one = f"Speed was measured on one machine. Another one joins with its file of {_CALL}."
        return Absent(title, one if bars else _why(subjects, "decode"))
    bars.sort(key=lambda bar: -(bar.figure.value or 0))
    axis = Axis("speed of text", "tok/s", "high")
    return Bars(title, f"the fastest setting of each{_cut(len(bars), ', ')}", axis, tuple(bars[:MAX_ROWS]))


def _why(subjects: Subjects, name: str) -> str:
    """Why a figure is not there, in the words of the files."""
    files = [file for file in subjects.files if file.kind == BENCH]
    if not files:
        return f"No file of onebit bench was given: {_CALL} FILE.json measures it."
    # Files name reasons as people do: "cache misses".
    found = [(key.replace(" ", "_"), reason) for file in files for key, reason in file.missing.items()]
    reasons = dict.fromkeys(reason for key, reason in found if name.startswith(key))
    return "; ".join(reasons) if reasons else "Not in the files that were given."


def _cut(n: int, before: str = "") -> str:
    return f"{before}{MAX_ROWS} of {n} rows; the table has all" if n > MAX_ROWS else ""

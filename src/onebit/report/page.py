"""Puts tables and pictures into the one page, which asks for nothing from outside.

html = render(read([Path("docs/results")]), mix=False)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from onebit.readings import Figure, File
from onebit.report import words
from onebit.report.drawing import draw
from onebit.report.pictures import Absent, Bars, Points, fastest, pictures, qualities
from onebit.report.subjects import Model, Subjects, shorten
from onebit.report.tables import quality, speed
from onebit.report.words import Number
from onebit.results import BENCH, EVAL


@dataclass(frozen=True)
class Fact:
    """A line of the card of a model: what, how much, and where or on what."""

    what: str
    number: Number
    of: str


@dataclass(frozen=True)
class Card:
    """A model at a glance."""

    model: Model
    facts: tuple[Fact, ...]


@dataclass(frozen=True)
class Shown:
    """A picture as the page has it."""

    title: str
    caption: str
    svg: str
    is_marked: bool


def render(files: Sequence[File], mix: bool) -> str:
    """The page as HTML.

    Args:
        files: what was measured.
        mix: put results of different labels into one table.

    Raises:
        ValueError: see `tables.quality`.
    """
    subjects = Subjects(files)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found = pictures(subjects)
    drawn = [picture for picture in found if not isinstance(picture, Absent)]
    n_results = sum(len(file.results) for file in files)
    parts = [(len(subjects.models), "model"), (len(subjects.machines), "machine"), (len(files), "file")]
    return environment.get_template("page.html").render(
        summary=", ".join(words.count(n, noun) for n, noun in [(n_results, "result"), *parts]),
        unquotable=[file.name for file in files if not file.quotable],
        cards=[_card(subjects, model) for model in subjects.models],
        pictures=[_shown(picture, f"p{i}") for i, picture in enumerate(drawn)],
        absent=_absent(picture for picture in found if isinstance(picture, Absent)),
        quality=quality(subjects, mix),
        speed=speed(subjects, mix),
        missing=_missing(files),
        subjects=subjects,
        files=files,
        has_eval=any(file.kind == EVAL for file in files),
        has_bench=any(file.kind == BENCH for file in files),
        flat=words.flat,
        number=words.number,
        count=words.count,
    )


def _card(subjects: Subjects, model: Model) -> Card:
    facts = []
    for measured in qualities(subjects)[:1]:
        figure = measured.figures.get(model, Figure(None))
        name = shorten(measured.name, 30)
        facts.append(Fact(measured.axis.title, words.number(figure.value, measured.axis.unit), f"on {name}"))
    facts.append(Fact("size", words.number(model.n_bytes, "bytes"), "of the file"))
    for machine in subjects.machines:
        if found := fastest(subjects, model, machine):
            facts.append(Fact("speed", words.number(found[0].value, "tok/s"), f"of text on {machine.name}"))
    return Card(model, tuple(fact for fact in facts if fact.number.exact))


def _shown(picture: Points | Bars, name: str) -> Shown:
    marks = picture.marks if isinstance(picture, Points) else picture.bars
    return Shown(picture.title, picture.caption, draw(picture, name), any(not m.quotable for m in marks))


def _absent(pictures: Iterable[Absent]) -> list[tuple[str, str]]:
    """What there is no picture of, and why; what has the same reason is named together."""
    titles: dict[str, list[str]] = {}
    for picture in pictures:
        titles.setdefault(picture.reason, []).append(picture.title)
    return [
        (words.names([t[0], *(n[0].lower() + n[1:] for n in t[1:])]), reason) for reason, t in titles.items()
    ]


def _missing(files: Sequence[File]) -> list[tuple[str, str, str]]:
    """What was not measured, why, and in which file it would stand."""
    return [
        (words.measure(name).title, reason, file.name)
        for file in files
        for name, reason in file.missing.items()
    ]

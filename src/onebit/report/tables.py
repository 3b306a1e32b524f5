"""Results as tables: which may share one, and what stands in their cells. Knows nothing of HTML.

for table in quality(subjects, mix=False): print(table.title, table.rows[0].cells[-1].number.shown)
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TypeGuard

from onebit.readings import JSON, Figure, File, Result
from onebit.report import words
from onebit.report.subjects import MACHINE, OURS, Subjects, engine_label
from onebit.report.words import Number

_Of = tuple[File, Result]

# Settings of written texts that may be compared.
_SAMPLES = ("prompts_sha256", "seeds", "max_tokens", "judge_sha256")


@dataclass(frozen=True)
class Cell:
    """What stands in a cell: a text, or a number with its interval.

    Args:
        head: the head of its column.
        text: where it is no number.
        number: where it is one.
        low, high: ends of the interval, if there is one.
        notes: more numbers, each with its name.
        is_label: a label of bits.
    """

    head: str
    text: str = ""
    number: Number | None = None
    low: Number | None = None
    high: Number | None = None
    notes: tuple[tuple[str, Number], ...] = ()
    is_label: bool = False


@dataclass(frozen=True)
class Row:
    """A row, and what is behind it.

    Args:
        group: what it shares with its neighbours; empty: nothing.
        cells: one for each column.
        command: what repeats the measurement.
        more: all that the file tells besides, as pairs of name and value.
        source: the file.
        quotable: whether nothing disturbed the measurement, as far as the file tells.
        warnings: what did.
    """

    group: str
    cells: tuple[Cell, ...]
    command: str
    more: tuple[tuple[str, str], ...]
    source: str
    quotable: bool
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Results that may be compared.

    Args:
        title: what was measured.
        caption: under which conditions all of them were.
        rows: the results.
        notes: what a reader has to know.
    """

    title: str
    caption: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = field(default=())


def quality(subjects: Subjects, mix: bool) -> list[Table]:
    """The tables of texts, distances, texts that were written, and tasks.

    Raises:
        ValueError: models of different labels in one of them, unless `mix`.
    """
    return [
        *_grouped(subjects, mix, "text", text_key, _text_table),
        *_grouped(subjects, mix, "distance", _distance_key, _distance_table),
        *_grouped(subjects, mix, "samples", _samples_key, _samples_table),
        *_grouped(subjects, mix, "task", lambda result: "", _task_table),
    ]


def speed(subjects: Subjects, mix: bool) -> list[Table]:
    """The tables of speed, waiting, memory and energy.

    Raises:
        ValueError: models of different labels in one of them, unless `mix`.
    """
    found = of_kind(subjects, "speed")
    tables = []
    known = {name for names in words.GROUPS.values() for name in names}
    for title, names in words.GROUPS.items():
        some = [of for of in found if of[1].name in names or (not names and of[1].name not in known)]
        if some:
            place = {name: i for i, name in enumerate(names)}
            some.sort(key=lambda of: (place.get(of[1].name, 0), of[1].name))
            tables.append(_speed_table(subjects, title, some, _labels(title, some, mix)))
    return tables


def of_kind(subjects: Subjects, kind: str) -> list[_Of]:
    """All results of a kind, each with its file."""
    return [(file, result) for file in subjects.files for result in file.results if result.kind == kind]


def _grouped(
    subjects: Subjects,
    mix: bool,
    kind: str,
    key: Callable[[Result], str],
    build: Callable[[Subjects, list[_Of]], Table],
) -> list[Table]:
    """A table for each group of results that were measured alike."""
    groups: dict[str, list[_Of]] = {}
    for file, result in of_kind(subjects, kind):
        groups.setdefault(key(result), []).append((file, result))
    tables = []
    for group in groups.values():
        table = build(subjects, group)
        notes = _labels(table.title, group, mix)
        tables.append(Table(table.title, table.caption, table.rows, (*table.notes, *notes)))
    return tables


def _labels(title: str, group: Iterable[_Of], mix: bool) -> tuple[str, ...]:
    """Refuse models of different labels in one table; what one file compares was asked for when it was made."""
    files: dict[str, list[str]] = {}
    for file, _ in group:
        names = files.setdefault(file.label, [])
        if file.name not in names:
            names.append(file.name)
    if len(files) < 2:
        return ()
    if not mix:
        listed = "; ".join(f"{label} in {', '.join(names)}" for label, names in files.items())
        raise ValueError(
            f"{title}: results of different labels would stand in one table ({listed}); report one label, or "
            "give --mix"
        )
    return ("The labels differ: these models do not do the same arithmetic.",)


def text_key(result: Result) -> str:
    """What two measurements on texts have in common if they may be compared: the text, and how it was cut."""
    s = result.settings
    cut = (s.get("window"), s.get("stride"), s.get("halves"), s.get("bos") is None)
    return repr((s.get("sha256"), *cut, result.rest.get("n_bytes")))


def _distance_key(result: Result) -> str:
    return f"{text_key(result)} {result.settings.get('reference_sha256')!r}"


def _text_table(subjects: Subjects, group: list[_Of]) -> Table:
    result = group[0][1]
    rows = tuple(
        _row(
            file,
            r,
            *_model_cells(subjects, file),
            *(_figure(name, r.figures.get(name)) for name in ("bits_per_byte", "perplexity")),
            _number("tokens", r.rest.get("n_scored")),
        )
        for file, r in group
    )
    notes = []
    if len({subjects.model(file) for file, _ in group}) > 1:
        notes.append(
            "Models with other tokenizers compare by bits per byte, not by perplexity, which is per token."
        )
    return Table(f"Text: {tail(result.name)}", _cut(result), rows, tuple(notes))


def _distance_table(subjects: Subjects, group: list[_Of]) -> Table:
    result = group[0][1]
    rows = tuple(
        _row(
            file,
            r,
            *_model_cells(subjects, file),
            *(
                _figure(name, r.figures.get(name))
                for name in ("kl", "top1", "nll_difference", "bits_per_byte")
            ),
        )
        for file, r in group
    )
    reference = words.plain(result.settings.get("reference"))
    return Table(f"Distance from {tail(reference)} on {tail(result.name)}", _cut(result), rows)


def _samples_key(result: Result) -> str:
    return repr([result.settings.get(name) for name in _SAMPLES])


def _samples_table(subjects: Subjects, group: list[_Of]) -> Table:
    result = group[0][1]
    common = common_settings(r for _, r in group) if len(group) > 1 else {}
    skipped = {*common, *_SAMPLES, "judge"}
    figures = dict.fromkeys(name for _, r in group for name in r.figures)
    rows = tuple(
        _row(
            file,
            r,
            *_model_cells(subjects, file),
            Cell("sampling", settings({k: v for k, v in r.settings.items() if k not in skipped})),
            *(_figure(name, r.figures.get(name)) for name in figures),
        )
        for file, r in group
    )
    s = result.settings
    caption = (
        f"up to {words.plain(s.get('max_tokens'))} tokens, {words.plain(s.get('seeds'))} texts of each prompt"
    )
    if s.get("judge") is not None:
        caption += f", judged by {tail(words.plain(s['judge']))}"
    return Table(f"Texts written after {tail(result.name)}", caption, rows)


def _task_table(subjects: Subjects, group: list[_Of]) -> Table:
    rows = []
    for file, result in group:
        n, n_all = result.rest.get("n_items"), result.rest.get("n_all")
        of_all = " of ".join(f"{x:,}" if is_number(x) else words.plain(x) for x in (n, n_all))
        asked = f"{of_all} items, {words.plain(result.rest.get('shots'))} shots"
        for name, figure in result.figures.items():
            unit = "share" if is_share(name, figure) else ""
            cells = *_model_cells(subjects, file), _figure(name, figure, unit, head="result")
            rows.append(_row(file, result, *cells, group=f"{result.name}: {name}, {asked}"))
    rows.sort(key=lambda row: row.group)
    notes = ("Where not all items were asked, the first ones were.",)
    is_part = any(r.rest.get("n_items") != r.rest.get("n_all") for _, r in group)
    return Table("Tasks", "of lm-evaluation-harness", tuple(rows), notes if is_part else ())


def _speed_table(subjects: Subjects, title: str, group: list[_Of], notes: tuple[str, ...]) -> Table:
    common = common_settings(result for _, result in group)
    # What was measured alike stands together, in the order in which files have it.
    alike: dict[tuple[str, str], list[Row]] = {}
    for file, result in group:
        unit = str(result.rest.get("unit", ""))
        figure = result.figures[result.name]
        cell = _figure(result.name, figure, unit, head="median, least and most")
        cells = [
            Cell("engine", result.engine or OURS),
            Cell("model", "none" if result.engine == MACHINE else subjects.model(file).name),
            Cell("label", engine_label(file, result), is_label=True),
            replace(cell, notes=_notes(result, words.measure(result.name, unit), figure)),
            Cell("rounds", words.plain(result.rest.get("rounds"))),
        ]
        cells += [Cell("machine", subjects.machine(file).name)] if len(subjects.machines) > 1 else []
        own = settings({key: value for key, value in result.settings.items() if key not in common})
        head = ": ".join(filter(None, [words.measure(result.name).title, own]))
        alike.setdefault((result.name, own), []).append(_row(file, result, *cells, group=head))
    if any(not file.quotable for file, _ in group):
        notes += (
            "Figures with * are not to be quoted: the machine did other work, or was not set up for measuring.",
        )
    caption = [settings(common)]
    caption += [subjects.machines[0].name] if len(subjects.machines) == 1 else []
    rows = tuple(row for rows in alike.values() for row in rows)
    return Table(title, ", ".join(filter(None, caption)), rows, notes)


def common_settings(results: Iterable[Result]) -> JSON:
    """The settings that all results share."""
    found = [result.settings for result in results]
    return {k: v for k, v in found[0].items() if all(k in other and other[k] == v for other in found)}


def _notes(result: Result, measure: words.Measure, figure: Figure) -> tuple[tuple[str, Number], ...]:
    """The slow ones of many, and how much better onebit is: of engines beside it, the median of the rounds' ratios."""
    tails = [("95 of 100 within", result.rest.get("p95")), ("99 of 100 within", result.rest.get("p99"))]
    found = [(text, words.number(x, measure.unit, figure.value)) for text, x in tails if is_number(x)]
    ratio = result.rest.get("ratio")
    if isinstance(ratio, dict) and is_number(x := ratio.get("value")):
        found.append(("onebit is", words.number(x, "x")))
    return tuple(found)


def settings(found: JSON) -> str:
    """The settings of a measurement of speed in a few words; empty: there are none."""
    texts = [
        words.count(value, "thread")
        if key == "threads" and isinstance(value, int)
        else f"{key} {words.plain(value)}"
        for key, value in found.items()
        if not isinstance(value, dict | list)
    ]
    return ", ".join(texts).replace("_", " ")


def _row(file: File, result: Result, *cells: Cell, group: str = "") -> Row:
    errors = {
        f"{name.replace('_', ' ')}: {key}": words.plain(value)
        for name, figure in result.figures.items()
        for key, value in figure.more.items()
    }
    # What no cell shows of the figures.
    shown = {n.exact for cell in cells for n in (cell.number, cell.low, cell.high) if n}
    for name, figure in result.figures.items():
        for key in ("value", "low", "high"):
            value = getattr(figure, key)
            if value is not None and repr(value) not in shown:
                errors[f"{name.replace('_', ' ')}: {key}"] = words.plain(value)
    more = [*words.flat(result.settings), *errors.items(), *words.flat(result.rest)]
    warnings = file.conditions.get("warnings")
    return Row(
        group=group,
        cells=cells,
        command=result.command,
        more=tuple(more),
        source=file.name,
        quotable=file.quotable,
        warnings=tuple(map(words.plain, warnings)) if isinstance(warnings, list) else (),
    )


def _model_cells(subjects: Subjects, file: File) -> tuple[Cell, Cell]:
    return Cell("model", subjects.model(file).name), Cell("label", file.label, is_label=True)


def _figure(name: str, figure: Figure | None, unit: str = "", head: str = "") -> Cell:
    measure = words.measure(name, unit)
    if figure is None:
        return Cell(head or measure.title, number=words.number(None))
    has_interval = figure.low is not None and figure.high is not None
    return Cell(
        head or measure.title,
        number=words.number(figure.value, measure.unit),
        low=words.number(figure.low, measure.unit, figure.value, bare=True) if has_interval else None,
        high=words.number(figure.high, measure.unit, figure.value) if has_interval else None,
    )


def _number(head: str, value: object) -> Cell:
    return Cell(head, number=words.number(value if is_number(value) else None))


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value of JSON is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_share(name: str, figure: Figure) -> bool:
    """Whether a metric of a task is a part of a whole."""
    return "perplexity" not in name and all(
        x is None or 0 <= x <= 1 for x in (figure.value, figure.low, figure.high)
    )


def tail(name: str) -> str:
    """A name without its folders."""
    return name.rstrip("/").rpartition("/")[2] or name


def _cut(result: Result) -> str:
    """How a text was cut."""
    s = result.settings
    window, stride = words.plain(s.get("window")), words.plain(s.get("stride"))
    step = "in a row, the first half only read" if s.get("halves") else f"stride {stride}"
    bos = "no begin token" if s.get("bos") is None else "a begin token"
    return f"windows of {window} tokens, {step}, {bos}"

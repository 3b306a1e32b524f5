"""Reads files of `onebit eval` and `onebit bench`, and trusts nothing in them. Knows nothing of pages or rules.

files = read([Path("docs/results")])
files[0].results[0].figures["perplexity"].value
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from onebit.results import BENCH, EVAL

JSON = dict[str, Any]

# Far more than any file of results; a larger one is something else.
MAX_BYTES = 64 << 20
MAX_DEPTH = 16
MAX_NUMBER = 1e100
# What no name needs and what could change how a page reads: control characters, lone surrogates, and the
# characters that turn the direction of writing.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
_KINDS = {EVAL: ("text", "distance", "samples", "task"), BENCH: ("speed",)}
_BOUNDS = ("value", "low", "high")


@dataclass(frozen=True)
class Figure:
    """A measured number and its interval; None is not known.

    Args:
        value: what was measured.
        low: lower end of the interval; likewise high.
        more: what else the file tells about it, as stderr or p99.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    more: JSON = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """One measurement.

    Args:
        kind: text, distance, task or speed.
        name: of the text, of the task, or what was timed.
        engine: which program ran the model; empty: onebit.
        settings: what has to be equal for two results to be comparable.
        figures: by name.
        command: what repeats it.
        rest: everything else, as the file has it.
    """

    kind: str
    name: str
    engine: str
    settings: JSON
    figures: dict[str, Figure]
    command: str
    rest: JSON


@dataclass(frozen=True)
class File:
    """One file of results: one model on one machine.

    Args:
        name: of the file; with its folders where several have that name.
        path: of the file.
        kind: EVAL or BENCH.
        model: name, sha256, label, kernels, threads and, in newer files, bytes.
        machine: system, cpu, hardware_threads, isa, load.
        versions: by package.
        results: the measurements.
        conditions: under which they were made; empty where the file does not tell.
        missing: reasons, by name of what was not measured.
        engines: version, label and bytes of the file, by name of the engine.
        unfinished: tasks that were begun and not finished, with the answers that wait for the rest.
    """

    name: str
    path: Path
    kind: str
    model: JSON
    machine: JSON
    versions: JSON
    results: tuple[Result, ...]
    conditions: JSON
    missing: dict[str, str]
    engines: dict[str, JSON]
    unfinished: JSON

    @property
    def quotable(self) -> bool:
        """Whether nothing disturbed the measurement, as far as the file tells."""
        return self.conditions.get("quotable") is not False

    @property
    def label(self) -> str:
        """Bits of the model's weights, activations and cache."""
        return str(self.model["label"])


def read(paths: Sequence[Path]) -> list[File]:
    """Read files of results, and those in folders, in the order given; of a folder in that of their names.

    Raises:
        ValueError: no file, a file that is damaged or none of ours, or one that is there twice.
        OSError: a file cannot be read.
    """
    found: list[tuple[Path, JSON]] = []
    contents: dict[str, Path] = {}
    for path in _files(paths):
        data = _load(path)
        content = json.dumps(data, sort_keys=True)
        if content in contents:
            twice = "is given twice" if contents[content] == path else f"says the same as {contents[content]}"
            raise ValueError(f"{path}: {twice}; give every file once")
        contents[content] = path
        found.append((path, data))
    names = [path.name for path, _ in found]
    return [
        _file(path, data, path.name if names.count(path.name) == 1 else str(path)) for path, data in found
    ]


def _files(paths: Sequence[Path]) -> list[Path]:
    found = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(path.glob("*.json"))
        if not inside:
            raise ValueError(f"{path}: has no .json file; onebit eval and onebit bench make them with --out")
        found += inside
    if not found:
        raise ValueError(
            "nothing to report on: name files of onebit eval or onebit bench, or a folder of them"
        )
    return found


def _load(path: Path) -> JSON:
    """The JSON of a file, with every text made harmless and every number finite."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path}: has {size:,} bytes; files of results have at most {MAX_BYTES:,}")
    try:
        data = _clean(json.loads(path.read_text("utf-8"), parse_constant=_no_number, parse_int=_whole))
    except UnicodeDecodeError:
        raise ValueError(
            f"{path}: is no text in UTF-8; expected JSON of onebit eval or onebit bench"
        ) from None
    except RecursionError:
        raise ValueError(f"{path}: is nested too deep; it is damaged or no file of results") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: is no JSON, or was cut ({error}); measure again") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(data, dict) or data.get("format") not in list(_KINDS):
        raise ValueError(
            f"{path}: is no file of results; expected JSON of onebit eval or onebit bench, whose format is "
            f"{EVAL!r} or {BENCH!r}"
        )
    return data


def _whole(text: str) -> float:
    # Python makes no int of thousands of digits; the infinity of a float is refused as too large.
    return int(text) if len(text) < 1000 else float(text)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"holds {text}, which is no number in JSON; what is not known is null")


def _clean(value: Any, depth: int = 0) -> Any:
    if depth > MAX_DEPTH:
        raise RecursionError
    if isinstance(value, str):
        return _UNSEEN.sub("\N{REPLACEMENT CHARACTER}", value)
    if isinstance(value, int | float) and not abs(value) < MAX_NUMBER:
        raise ValueError("holds a number that is too large to be measured")
    if isinstance(value, list):
        return [_clean(item, depth + 1) for item in value]
    if isinstance(value, dict):
        return {_clean(key): _clean(item, depth + 1) for key, item in value.items()}
    return value


class _Reader:
    """Takes things out of an object of JSON, by key and type."""

    def __init__(self, path: Path, data: Any, where: str) -> None:
        self.path, self.where = path, where
        if not isinstance(data, dict):
            self.fail("is no object")
        self.data: JSON = data

    def fail(self, what: str) -> NoReturn:
        raise ValueError(f"{self.path}: {self.where} {what}; it is damaged, or of another version of onebit")

    def take(self, key: str, kinds: type | tuple[type, ...], default: Any = None) -> Any:
        value = self.data.get(key, default)
        # In Python a bool is an int.
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            self.fail(f"has no usable {key!r}")
        return value

    def inside(self, key: str) -> "_Reader":
        return _Reader(self.path, self.data.get(key), f"{self.where}, {key!r},".lstrip(", "))


def _file(path: Path, data: JSON, name: str) -> File:
    top = _Reader(path, data, "the file")
    model = top.inside("model")
    for key in ("name", "sha256", "label"):
        model.take(key, str)
    if "bytes" in model.data:
        model.take("bytes", int)
    machine = top.inside("machine")
    machine.take("cpu", str)
    conditions = top.take("conditions", dict, {})
    if not isinstance(conditions.get("quotable", True), bool):
        top.fail("has no usable 'quotable'")
    missing = top.take("missing", dict, {})
    engines = top.take("engines", dict, {})
    for engine in engines:
        _Reader(path, engines, "the file").inside(engine)
    results = top.take("results", list)
    return File(
        name=name,
        path=path,
        kind=data["format"],
        model=model.data,
        machine=machine.data,
        versions=top.take("versions", dict),
        results=tuple(
            _result(_Reader(path, result, f"result {i + 1}"), data["format"])
            for i, result in enumerate(results)
        ),
        conditions=conditions,
        missing={key: str(reason) for key, reason in missing.items()},
        engines=engines,
        unfinished=top.take("unfinished", dict, {}),
    )


def _result(result: _Reader, file_kind: str) -> Result:
    kind, name = result.take("kind", str), result.take("name", str)
    if kind not in _KINDS[file_kind]:
        result.fail(f"is of the kind {kind!r}, expected {' or '.join(_KINDS[file_kind])}")
    rest = dict(result.data)
    for key in ("kind", "name", "settings", "command"):
        rest.pop(key, None)
    if kind == "speed":
        rest.pop("engine", None)
        result.take("unit", str)
        figure = _figure(result, {key: rest.pop(key, None) for key in _BOUNDS})
        if any(number is not None and number < 0 for number in (figure.value, figure.low, figure.high)):
            result.fail("has a time, size or speed below 0")
        figures = {name: figure}
    else:
        figures = _figures(result.inside("figures"))
        del rest["figures"]
        if kind == "distance":
            # The distance is what such a result is about; what the model reaches itself stands behind it.
            figures = _figures(result.inside("distance")) | figures
            del rest["distance"]
    return Result(
        kind=kind,
        name=name,
        engine=result.take("engine", str, ""),
        settings=result.take("settings", dict),
        figures=figures,
        command=result.take("command", str),
        rest=rest,
    )


def _figures(found: _Reader) -> dict[str, Figure]:
    return {name: _figure(found, found.inside(name).data) for name in found.data}


def _figure(found: _Reader, data: JSON) -> Figure:
    value, low, high = (data.get(key) for key in _BOUNDS)
    for number in (value, low, high):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int | float)):
            found.fail(f"has {number!r} where a number is expected")
    more = {key: number for key, number in data.items() if key not in _BOUNDS}
    return Figure(value, low, high, more)

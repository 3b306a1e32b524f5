"""Files of measurements as a page: what is read, what is refused, what the page holds. Kinds: exact, invariant."""

import copy
import html.parser
import json
import re
from functools import cache
from pathlib import Path

import pytest

from onebit import readings, report
from onebit.report import drawing, page, pictures, tables, words
from onebit.report.subjects import Subjects

SHA, OTHER_SHA, TEXT_SHA = "a1" * 32, "b2" * 32, "c3" * 32
LABEL, OTHER_LABEL = "W1.58A8KV16", "W1A8KV16"
HOSTILE = "</code><script src=//evil.example>alert(1)</script><img onerror=x> & \"q\" 'q' $\\frac{ {{ 7*7 }} \u202eoof"


def figure(value, spread=0.01, n=1000):
    return {"value": value, "stderr": spread / 2, "low": value - spread, "high": value + spread, "n": n}


def top(kind, name, sha, label, cpu):
    return {
        "format": kind,
        "model": {"name": name, "sha256": sha, "bytes": 3465288, "label": label, "kernels": "avx2", "threads": 2},
        "machine": {
            "system": "Linux-6.1", "cpu": cpu, "hardware_threads": 2, "isa": "avx2", "load": [0.015, 0.025, 0.035],
        },
        "versions": {"onebit": "0.1.0", "python": "3.11.7", "numpy": None, "commit": "d00d"},
        "results": [],
    }  # fmt: skip


def evaluation(name="stories.onebit", sha=SHA, label=LABEL, value=1.1012345, cpu="EPYC One"):
    """A file of `onebit eval`: a text, a distance, written texts under two settings, a task."""
    text = {
        "kind": "text",
        "name": "texts/held-out.txt",
        "settings": {"sha256": TEXT_SHA, "max_tokens": None, "window": 512, "stride": 256, "bos": 0, "halves": False},
        "figures": {"perplexity": figure(19.9187, 0.4), "bits_per_byte": figure(value)},
        "n_scored": 202718, "n_tokens": 202718, "n_bytes": 794375, "n_windows": 791,
        "seconds": 77.25, "computed_tokens": 404992,
        "command": "onebit eval --text texts/held-out.txt --out a.json",
    }  # fmt: skip
    distance = copy.deepcopy(text) | {
        "kind": "distance",
        "distance": {
            "kl": figure(0.0123), "top1": figure(0.9321), "nll_difference": figure(0.0456),
        },
        "reference_figures": {"perplexity": figure(18.7654), "bits_per_byte": figure(1.0543)},
    }  # fmt: skip
    distance["settings"] |= {"reference": "master.onebit", "reference_sha256": "d4" * 32, "keep": 256}
    task = {
        "kind": "task",
        "name": "blimp",
        "settings": {"limit": 10, "shots": 0, "seeds": [1234, 1235], "data": "data"},
        "figures": {"acc": figure(0.5059701, 0.0376), "perplexity": figure(33.5) | {"stderr": None}},
        "n_items": 670, "n_all": 67000, "n_published": 67000, "n_cut": 3, "n_requests": 1340, "shots": 0,
        "seeds": [], "by_seed": [], "tasks": {"blimp_causative": {"acc": 0.6125}},
        "seconds": 4.125, "computed_tokens": 28765, "command": "onebit eval --tasks blimp --limit 10",
    }  # fmt: skip
    plain = {
        "kind": "samples",
        "name": "texts/prompts.txt",
        "settings": {
            "max_tokens": 80, "temperature": 1.0, "min_sigma": 0.0, "prompts_sha256": "e5" * 32, "seeds": 3,
            "judge": "folder/judge.gguf", "judge_sha256": "f6" * 32,
        },
        "figures": {
            "repetition": figure(0.0128), "distinct_words": figure(0.7235), "entropy": figure(2.6772),
            "judge_bits_per_byte": figure(1.5276),
        },
        "n_texts": 72, "n_tokens": 5707, "seconds": 4.0625, "computed_tokens": 12345,
        "command": "onebit eval --generate texts/prompts.txt --sampling temperature=1",
    }  # fmt: skip
    cut = copy.deepcopy(plain) | {
        "command": "onebit eval --generate texts/prompts.txt --sampling min_sigma=2"
    }
    cut["settings"]["min_sigma"] = 2.25
    results = [text, distance, plain, cut, task]
    return top(readings.EVAL, name, sha, label, cpu) | {"results": results, "unfinished": {}}


def speeds(engine, factor, label_of_engine):
    def one(name, value, unit, options, **more):
        return {
            "kind": "speed", "name": name, "engine": engine,
            "settings": {"threads": 2, "kv_cache": "bf16", **options},
            "value": value, "low": value * 0.97, "high": value * 1.02, "rounds": 5, "unit": unit, "foreign": 0.0101,
            **more, "command": "onebit bench --against llama.cpp --out b.json",
        }  # fmt: skip

    ratio = {} if engine == "onebit" else {"ratio": {"value": 3.0625, "low": 2.9375, "high": 3.1875}}
    text = {"context": 0, "batch": 1}
    return [
        one("cold_start", 0.3125 * factor, "s", {}, **ratio),
        one("load", 0.0317 * factor, "s", {}, **ratio),
        one("ttft", 0.0071 * factor, "s", {"prompt": 64}, p95=0.0083 * factor, p99=0.0091 * factor, **ratio),
        one("inter_token", 0.00061 * factor, "s", {"prompt": 64}, p95=0.00072 * factor, p99=0.00081 * factor),
        one("decode", 1613.25 / factor, "tok/s", text, **ratio),
        one("decode", 1411.5 / factor, "tok/s", text | {"context": 256}, **ratio),
        one("decode", 4877.0 / factor, "tok/s", text | {"batch": 8}, **ratio),
        one("prefill", 9123.5 / factor, "tok/s", {"tokens": 512}, **ratio),
        one("resident", 61_234_567 * factor, "bytes", {}, **ratio),
        one("token_bytes", 3_412_345, "bytes", text),
        one("bandwidth_share", 0.2713, "share", text),
    ]


def benchmark(name="stories.onebit", sha=SHA, label=LABEL, cpu="EPYC One", factor=1.0, quotable=True):
    """A file of `onebit bench`: onebit, another engine, the machine."""
    machine = {
        "kind": "speed", "name": "bandwidth", "engine": "machine", "settings": {"threads": 2, "bytes": 3412345},
        "value": 21.17e9, "low": 20.53e9, "high": 21.61e9, "rounds": 5, "unit": "bytes/s", "command": "onebit bench",
    }  # fmt: skip
    return top(readings.BENCH, name, sha, label, cpu) | {
        "results": [*speeds("onebit", factor, LABEL), *speeds("llama.cpp", 3.0 * factor, "TQ2_0"), machine],
        "unfinished": {},
        "conditions": {
            "governor": None, "turbo": True, "load": [0.51, 0.52, 0.53], "pinned": [0, 1], "threads": 2,
            "memory_limit": None, "warnings": [] if quotable else ["other programs used 23%"], "quotable": quotable,
        },
        "missing": {"energy": "no package in sysfs: a virtual machine", "onnxruntime": "not installed"},
        "engines": {
            "onebit": {"version": "onebit 0.1.0", "label": label, "file_bytes": 3465288},
            "llama.cpp": {"version": "llama-cpp-python 0.3.36", "label": None, "file_bytes": 4456789},
        },
    }  # fmt: skip


@pytest.fixture
def write(tmp_path):
    """Write objects as files a.json, b.json, ... and return their paths."""

    def files(*contents):
        paths = [tmp_path / f"{chr(97 + i)}.json" for i in range(len(contents))]
        for path, content in zip(paths, contents, strict=True):
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return paths

    return files


@pytest.fixture
def made(write, tmp_path):
    """Make the page of objects and return its text."""

    def text(*contents, mix=False):
        report.write(write(*contents), tmp_path / "page.html", mix)
        return (tmp_path / "page.html").read_text("utf-8")

    return text


@pytest.fixture(scope="module")
def text_of(tmp_path_factory):
    """The page of one of INPUTS, made once."""

    @cache
    def text(name):
        folder = tmp_path_factory.mktemp("page")
        for i, content in enumerate(INPUTS[name]):
            (folder / f"{i}.json").write_text(json.dumps(content))
        report.write([folder], folder / "page.html")
        return (folder / "page.html").read_text("utf-8")

    return text


INPUTS = {
    "eval": [evaluation()],
    "bench": [benchmark()],
    "both": [evaluation(), benchmark()],
    "two machines": [evaluation(), benchmark(), benchmark(cpu="Core Two", factor=0.5, quotable=False)],
    "two models": [evaluation(), evaluation("other.onebit", OTHER_SHA, value=1.05), benchmark()],
}


def numbers(value):
    """Every number of an object of JSON, but those of tasks that are not finished."""
    if isinstance(value, dict):
        return [n for key, item in value.items() if key != "unfinished" for n in numbers(item)]
    if isinstance(value, list):
        return [n for item in value for n in numbers(item)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def numbers_in(text):
    return set(re.findall(r"(?<![\w.])-?\d[\d.]*(?:e[-+]?\d+)?(?![\w.])", text))


@pytest.mark.parametrize("name", INPUTS)
def test_every_number_is_in_the_page_as_the_file_has_it(name, text_of):
    text = text_of(name)
    wanted = {repr(n) for content in INPUTS[name] for n in numbers(content)}
    assert len(wanted) > 40 and not wanted - numbers_in(text)


@pytest.mark.parametrize("name", INPUTS)
def test_commands_labels_and_reasons_are_in_the_page(name, text_of):
    text = text_of(name)
    for content in INPUTS[name]:
        assert content["model"]["label"] in text and content["model"]["sha256"] in text
        assert all(result["command"] in text for result in content["results"])
        assert all(reason in text for reason in content.get("missing", {}).values())


class Tags(html.parser.HTMLParser):
    """What a browser would see: elements, attributes, text; and whether every element is closed."""

    VOID = {"meta", "br", "path", "use", "rect"}

    def __init__(self, page):
        super().__init__()
        self.names, self.attributes, self.text, self.open = set(), [], "", []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.names.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("name", INPUTS)
def test_the_page_stands_alone(name, text_of):
    """Nothing is asked for from outside, nothing runs, names of elements are unique, links stay in the page."""
    text = text_of(name)
    tags = Tags(text)
    assert not re.search(r"https?:|//\w|@import|url\((?!#)", text)
    assert not tags.names & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    ids = [value for key, value in tags.attributes if key == "id"]
    links = {value for key, value in tags.attributes if key == "href"} | set(
        re.findall(r"url\((#[^)]*)\)", text)
    )
    assert len(set(ids)) == len(ids) and links <= {f"#{i}" for i in ids} and len(links) > 5
    assert not [key for key, _ in tags.attributes if key.startswith("on")]


def test_light_and_dark_and_small(text_of):
    text = text_of("both")
    light, dark = (
        set(re.findall(r"(--\w+):", block)) for block in re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    )
    assert "prefers-color-scheme: dark" in text and light == dark
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    used = {name for drawing in drawings for name in re.findall(r"var\((--\w+)\)", drawing)}
    assert len(drawings) > 4 and "--c0" in used and used <= light
    # Of the rest no ink is seen in the dark: what matplotlib paints without being told.
    assert not re.findall(r"stroke: #\w+", "".join(drawings))
    assert 'name="viewport"' in text and "@media (max-width" in text
    assert all("<text" in drawing and "width=" not in drawing.partition(">")[0] for drawing in drawings)


def test_the_same_files_give_the_same_bytes(write, tmp_path):
    paths = write(*INPUTS["two machines"])
    for name in ("one.html", "two.html"):
        report.write(paths, tmp_path / name)
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def hostile(value):
    """The object with every text in it hostile, and with hostile names where names are free."""
    if isinstance(value, dict):
        free = {"figures", "tasks", "settings", "engines", "missing", "versions"}
        return {
            key: {f"{k} {HOSTILE}": hostile(v) for k, v in item.items()} | item
            if key in free
            else item
            if key in ("format", "kind", "unit", "engine")
            else hostile(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return HOSTILE if isinstance(value, str) else value


def test_hostile_names_are_only_text(made):
    text = made(hostile(evaluation()), hostile(benchmark()))
    tags = Tags(text)
    assert "script" not in tags.names and "img" not in tags.names
    assert not [key for key, _ in tags.attributes if key.startswith("on")]
    assert "<script src=//evil.example>alert(1)" in tags.text and "{{ 7*7 }}" in tags.text
    assert "\u202e" not in text


def test_a_label_that_is_hostile_reaches_pictures_as_text(made):
    text = made(evaluation(name='<b id="x">"><!-- --> $x$ ]]>'), evaluation("two", OTHER_SHA))
    drawing = re.search(r"<svg.*?</svg>", text, re.DOTALL).group()
    assert "&lt;b id=" in drawing and "<b" not in drawing


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('{"format": "onebit eval 1", "model": {', "is no JSON, or was cut"),
        ("[1, 2]", "is no file of results"),
        ('{"a": 1}', "is no file of results"),
        ('{"format": ["onebit eval 1"]}', "is no file of results"),
        ('{"format": "onebit eval 2"}', "is no file of results"),
        ('{"format": "onebit eval 1"}', "'model'"),
        (json.dumps(evaluation()).replace("19.9187", "NaN"), "holds NaN"),
        (json.dumps(evaluation()).replace("19.9187", "-Infinity"), "holds -Infinity"),
        (json.dumps(evaluation()).replace("19.9187", "1e999"), "too large"),
        (json.dumps(evaluation()).replace("19.9187", "9" * 400), "too large"),
        (json.dumps(evaluation()).replace("19.9187", "9" * 5000), "too large"),
        (json.dumps(evaluation()).replace("19.9187", '"19.9187"'), "where a number is expected"),
        (json.dumps(benchmark()).replace("0.3125", "-0.3125"), "a time, size or speed below 0"),
        (json.dumps(evaluation()).replace("19.9187", "true"), "where a number is expected"),
        (json.dumps(evaluation()).replace('"kind": "task"', '"kind": "speed"'), "expected text or distance"),
        (json.dumps(evaluation()).replace('"figures"', '"figure"'), "result 1, 'figures', is no object"),
        (json.dumps(evaluation()).replace('"label"', '"lable"'), "'label'"),
        ("[" * 100_000, "nested too deep"),
        ('{"format": "onebit eval 1", "x": ' + 40 * "[" + 40 * "]" + "}", "nested too deep"),
    ],
)  # fmt: skip
def test_damaged_and_foreign_files_are_refused_by_name(content, why, write, tmp_path):
    with pytest.raises(ValueError, match=r"a\.json") as refused:
        report.write(write(content), tmp_path / "page.html")
    assert why in str(refused.value) and not (tmp_path / "page.html").exists()


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(ValueError, match=r"a\.json: is no text in UTF-8"):
        readings.read([tmp_path / "a.json"])


@pytest.mark.parametrize("path", [(), ("results", 0), ("results", 0, "settings"), ("model",), ("machine",)])
def test_any_part_of_another_type_is_refused_or_read(path, write, monkeypatch):
    """No key of any file, taken away or of another type, ends in anything but a page or a refusal."""
    monkeypatch.setattr("onebit.report.page.draw", lambda picture, name: "")
    for content in (evaluation(), benchmark()):
        place = content
        for key in path:
            place = place[key]
        for key in list(place):
            for other in (None, "text", -1, [], {"a": [1]}, True):
                kept, place[key] = place[key], other
                try:
                    page.render(readings.read(write(content)), False)
                except ValueError as error:
                    assert "a.json" in str(error)
                place[key] = kept


def test_the_same_file_twice_is_refused(write, tmp_path):
    (a,) = write(evaluation())
    with pytest.raises(ValueError, match="is given twice"):
        readings.read([a, a])
    with pytest.raises(ValueError, match="is given twice"):
        readings.read([tmp_path, a])
    (tmp_path / "copy.json").write_text(json.dumps(evaluation(), indent=3))
    with pytest.raises(ValueError, match=r"copy\.json: says the same as .*a\.json"):
        readings.read([tmp_path])


def test_files_and_folders_are_read_in_their_order(write, tmp_path):
    b = write(evaluation(), benchmark())[1]
    assert [file.name for file in readings.read([tmp_path])] == ["a.json", "b.json"]
    b.rename(tmp_path / "0.json")
    assert [file.name for file in readings.read([tmp_path])] == ["0.json", "a.json"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no \.json file"):
        readings.read([tmp_path / "empty"])
    with pytest.raises(FileNotFoundError, match=r"absent\.json"):
        readings.read([tmp_path / "absent.json"])
    with pytest.raises(ValueError, match="nothing to report"):
        readings.read([])
    with pytest.raises(ValueError, match=r"ends in \.html"):
        report.write([tmp_path], tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == evaluation()


def test_labels_are_not_mixed_in_one_table_unasked(made):
    mixed = [evaluation(), evaluation("other.onebit", OTHER_SHA, OTHER_LABEL)]
    with pytest.raises(ValueError, match=rf"{LABEL} in a\.json; {OTHER_LABEL} in b\.json.*--mix"):
        made(*mixed)
    assert "The labels differ" in made(*mixed, mix=True)
    with pytest.raises(ValueError, match="Speed: results of different labels"):
        made(benchmark(), benchmark(label=OTHER_LABEL))
    # Models of one label; and labels that share no table, as one was only timed.
    assert "The labels differ" not in made(*INPUTS["two models"])
    assert "The labels differ" not in made(evaluation(), benchmark("other.onebit", OTHER_SHA, OTHER_LABEL))


def subjects_of(write, *contents):
    return Subjects(readings.read(write(*contents)))


def test_only_what_was_measured_alike_shares_a_table(write):
    other = evaluation("other.onebit", OTHER_SHA)
    for result in other["results"][:2]:
        result["settings"]["stride"] = 512
    found = tables.quality(subjects_of(write, evaluation(), other), False)
    assert [(table.title.partition(" ")[0], len(table.rows)) for table in found] == [
        ("Text:", 1), ("Text:", 1), ("Distance", 1), ("Distance", 1), ("Texts", 4), ("Tasks", 4),
    ]  # fmt: skip


def test_pictures_join_quality_speed_and_size_of_one_model(write):
    some = subjects_of(write, *INPUTS["two models"])
    by_title = {picture.title: picture for picture in pictures.pictures(some)}
    size, speed = by_title["Quality against size"], by_title["Speed against quality"]
    assert [(m.x.value, m.y.value) for m in size.marks] == [(3465288, 1.1012345), (3465288, 1.05)]
    assert [(m.x.value, m.y.value) for m in speed.marks] == [(1613.25, 1.1012345)]
    assert [bar.figure.value for bar in by_title["Speed of prompts"].bars] == [9123.5, 9123.5 / 3]
    assert by_title["Energy"].reason == "no package in sysfs: a virtual machine"
    assert "onebit bench" in by_title["Machines"].reason


@pytest.mark.parametrize("value", [0, -1.5, 1e-30, 1e30, 5])
@pytest.mark.parametrize("ends", [(None, None), (0.5, 1.5), (2.0, 3.0)])
def test_any_figure_can_be_drawn(value, ends):
    one = readings.Figure(value, *(None if end is None else end * value for end in ends))
    axis = pictures.Axis("speed", "tok/s", "high")
    bars = tuple(pictures.Bar("", "name " * 20, "", one, i, i > 0) for i in range(10))
    marks = tuple(pictures.Mark("name", one, one, i, i > 0) for i in range(10))
    for picture in (
        pictures.Bars("a", "b", axis, bars),
        pictures.Bars("a", "b", axis, bars, from_zero=False),
        pictures.Points("a", "b", axis, axis, marks),
        pictures.Points("a", "b", axis, axis, (marks[0], marks[1]._replace(x=readings.Figure(1000.0)))),
    ):
        drawn = drawing.draw(picture, "p")
        assert drawn.count("name") > 1 and "nan" not in drawn


def test_machines_stand_beside_each_other(write, text_of):
    some = subjects_of(write, *INPUTS["two machines"])
    machines = {picture.title: picture for picture in pictures.pictures(some)}["Machines"]
    assert [(bar.name, bar.figure.value, bar.quotable) for bar in machines.bars] == [
        ("Core Two", 3226.5, False), ("EPYC One", 1613.25, True),
    ]  # fmt: skip
    text = text_of("two machines")
    assert text.count("not to be quoted</span>") == 24 and "other programs used 23%" in text


def test_without_files_of_one_kind_the_page_says_what_makes_them(made):
    assert "<code>onebit bench MODEL --out FILE.json</code> makes one" in made(evaluation())
    assert "<code>onebit eval MODEL --text FILE --out FILE.json</code> makes one" in made(benchmark())
    empty = evaluation() | {"results": [], "unfinished": {"key": {"answers": [0.123], "n_cut": 0}}}
    text = made(empty)
    assert "hold no finished result" in text and "1 task unfinished" in text and "0.123" not in text


@pytest.mark.parametrize(
    ("value", "unit", "like", "shown"),
    [
        (3465288, "bytes", None, "3.465 MB"),
        (0.0071, "s", None, "7.100 ms"),
        (1613.25, "tok/s", None, "1,613 tokens/s"),
        (0.5, "share", None, "50.00 %"),
        (0.4936, "share", 0.5055, "49.36 %"),
        (1.11, "", 1.1012, "1.110"),
        (999.5e6, "bytes", 1.01e9, "1.000 GB"),
        (21.17e9, "bytes/s", None, "21.17 GB/s"),
        (0, "s", None, "0 µs"),
        (1e-9, "", None, "1e-09"),
        (None, "s", None, "not known"),
    ],
)
def test_numbers_in_words(value, unit, like, shown):
    found = words.number(value, unit, like)
    assert found.shown.replace("\N{NO-BREAK SPACE}", " ") == shown
    assert found.exact == ("" if value is None else repr(value))


def test_the_projects_own_page_has_every_number_of_its_files():
    folder = Path(__file__).parents[2] / "docs" / "results"
    text = (folder / "report.html").read_text("utf-8")
    wanted = {repr(n) for file in folder.glob("*.json") for n in numbers(json.loads(file.read_text("utf-8")))}
    assert len(wanted) > 40 and not wanted - numbers_in(text)

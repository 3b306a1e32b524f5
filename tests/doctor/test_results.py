"""Rules over files of results, each with results that it speaks of and with others. Kind: exact."""

import copy
import json

import pytest

from onebit.doctor import measured, results, speeds
from onebit.results import BENCH, EVAL

MACHINE = {"cpu": "A", "hardware_threads": 4}


def figure(value, low=None, high=None):
    low, high = (value if low is None else low), (value if high is None else high)
    return {"value": value, "stderr": (high - low) / 3.92, "low": low, "high": high, "n": 100}


def text(perplexity, bits=1.2, **settings):
    figures = {
        "perplexity": figure(perplexity, 0.95 * perplexity, 1.05 * perplexity),
        "bits_per_byte": figure(bits),
    }
    return {
        "kind": "text",
        "name": "a.txt",
        "settings": {"sha256": "1", "window": 512} | settings,
        "figures": figures,
        "command": "onebit eval m --text a.txt",
    }


def task(name, value, error=0.01, **more):
    return {
        "kind": "task",
        "name": name,
        "settings": {"limit": None},
        "figures": {"acc": figure(value, value - error, value + error)},
        "n_requests": 100,
        "n_cut": 0,
        "command": f"onebit eval m --tasks {name}",
    } | more


def distance(top1, nll, kl=0.01):
    return text(10.0) | {
        "kind": "distance",
        "settings": {"reference": "big.gguf"},
        "distance": {
            "kl": figure(kl),
            "top1": figure(top1, top1 - 0.01, top1 + 0.01),
            "nll_difference": figure(nll, nll - 0.01, nll + 0.01),
        },
    }


def speed(name, value, spread=0.02, engine="onebit", more=None, **settings):
    return {
        "kind": "speed",
        "name": name,
        "engine": engine,
        "settings": {"threads": 2, "context": 0, "batch": 1, "kv_cache": "bf16"} | settings,
        "value": value,
        "low": value * (1 - spread),
        "high": value * (1 + spread),
        "rounds": 5,
        "unit": "s",
        "command": "onebit bench m",
    } | (more or {})


@pytest.fixture
def made(tmp_path):
    """From results to what is read of a file of them."""

    def make(found, kind=EVAL, label="W1.58A8KV16", **data):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        model = {"name": "m.onebit", "sha256": "0", "label": label, "kernels": "avx2"}
        whole = {
            "format": kind,
            "model": model,
            "machine": MACHINE,
            "versions": {},
            "results": found,
            "unfinished": {},
        } | data
        path.write_text(json.dumps(whole))
        return measured.read([path])[0]

    return make


def bench(made, *found, **data):
    return made(list(found), BENCH, **data)


SINGLE = [
    (results.worse_than_nothing, [text(300_000, 9.5)], [text(1000, 3.0)], "error"),
    (results.at_chance, [task("arc_easy", 0.255)], [task("arc_easy", 0.4)], "note"),
    (results.at_chance, [task("boolq", 0.40)], [task("lambada", 0.1)], "warning"),
    (results.too_few, [task("piqa", 0.6, 0.08)], [task("piqa", 0.6, 0.02)], "note"),
    (results.cut, [task("triviaqa", 0.1, n_cut=30)], [task("triviaqa", 0.1, n_cut=1)], "warning"),
    (results.far_from_reference, [distance(0.3, 2.0)], [distance(0.95, 0.0)], "warning"),
    (results.same_order_less_sure, [distance(0.96, 0.1)], [distance(0.96, 0.005)], "warning"),
    (results.same_order_less_sure, [distance(0.96, 0.1)], [distance(0.7, 0.1)], "warning"),
]


@pytest.mark.parametrize(("rule", "bad", "good", "severity"), SINGLE)
def test_rules_of_evaluations(made, rule, bad, good, severity):
    found = rule(made(bad))
    assert found.severity == severity
    assert all((found.check, found.what, found.evidence, found.why, found.confirm))
    assert rule(made(good)) is rule(made([])) is None


TTFT = [speed("prefill", 1000.0, tokens=128), speed("prefill", 10.0, tokens=4), speed("decode", 50.0)]
BIG = [speed("token_bytes", 10**9)]

SPEEDS = [
    (speeds.unsteady, [speed("decode", 10.0, 0.3)], [speed("decode", 10.0, 0.05)]),
    (
        speeds.first_token_late,
        [speed("ttft", 0.9, prompt=100, tokens=32), *TTFT],
        [speed("ttft", 0.12, prompt=100, tokens=32), *TTFT],
    ),
    (
        speeds.slow_tail,
        [speed("inter_token", 0.01, more={"p95": 0.02, "p99": 0.09})],
        [speed("inter_token", 0.01, more={"p95": 0.02, "p99": 0.02})],
    ),
    (
        speeds.far_from_memory,
        [speed("bandwidth_share", 0.2), *BIG],
        [speed("bandwidth_share", 0.2), speed("token_bytes", 10**6)],
    ),
    (speeds.far_from_memory, [speed("bandwidth_share", 0.2), *BIG], [speed("bandwidth_share", 0.8), *BIG]),
    (speeds.faster_than_memory, [speed("bandwidth_share", 1.4), *BIG], [speed("bandwidth_share", 1.0), *BIG]),
    (
        speeds.many_misses,
        [speed("cache_misses_per_token", 5e7), *BIG],
        [speed("cache_misses_per_token", 1.6e7), *BIG],
    ),
    (speeds.more_threads_than_cpus, [speed("decode", 10.0, threads=8)], [speed("decode", 10.0, threads=4)]),
    (speeds.much_memory, [speed("resident", 5 * 10**9), *BIG], [speed("resident", 10**9), *BIG]),
    (
        speeds.no_gain_at_once,
        [speed("decode", 10.0), speed("decode", 11.0, batch=8)],
        [speed("decode", 10.0), speed("decode", 40.0, batch=8)],
    ),
]


@pytest.mark.parametrize(("rule", "bad", "good"), SPEEDS)
def test_rules_of_benchmarks(made, rule, bad, good):
    found = rule(bench(made, *bad))
    assert found.severity in ("warning", "note")
    assert all((found.check, found.what, found.evidence, found.why, found.confirm))
    assert rule(bench(made, *good)) is rule(bench(made)) is None


def test_the_first_token_is_compared_with_the_nearest_prompt(made):
    found = speeds.first_token_late(bench(made, speed("ttft", 0.9, prompt=100, tokens=32), *TTFT))
    assert "100 / 1000 + 1 / 50 tokens/s explain 0.120 s" in found.evidence


def test_conditions_and_what_is_missing(made):
    shaky = {"quotable": False, "warnings": ["turbo is on"]}
    assert "turbo is on" in speeds.not_quotable(bench(made, conditions=shaky)).evidence
    assert (
        speeds.not_quotable(bench(made, conditions={"quotable": True, "warnings": ["turbo is on"]})) is None
    )
    assert speeds.not_quotable(bench(made)) is None
    assert "RAPL" in speeds.not_measured(bench(made, missing={"energy": "no RAPL"})).evidence
    assert speeds.not_measured(bench(made)) is None


def test_unfinished_tasks(made):
    found = results.unfinished(made([], unfinished={"x": {"answers": [1, 2, 3], "n_cut": 0}}))
    assert found.severity == "note" and "3 answers" in found.evidence
    assert results.unfinished(made([])) is None


GOOD = [text(10.0), task("hellaswag", 0.6), task("lambada", 0.5)]


@pytest.mark.parametrize(
    ("rule", "after", "silent"),
    [
        # Perplexity rose, tasks did not fall.
        (
            results.unsure_not_ignorant,
            [text(12.0), task("hellaswag", 0.6), task("lambada", 0.5)],
            [[text(10.1), *GOOD[1:]], [text(12.0), task("hellaswag", 0.5), GOOD[2]], [text(12.0)]],
        ),
        # A product of probabilities fell, a likeliest token held.
        (
            results.one_task_down,
            [text(10.0), task("hellaswag", 0.5), task("lambada", 0.5)],
            [GOOD, [text(10.0), task("hellaswag", 0.5), task("lambada", 0.4)]],
        ),
        (
            results.all_tasks_down,
            [text(10.0), task("hellaswag", 0.5), task("lambada", 0.4)],
            [GOOD, [text(10.0), task("hellaswag", 0.5), task("lambada", 0.5)], [text(10.0)]],
        ),
    ],
)
def test_rules_of_two_evaluations(made, rule, after, silent):
    before = made(GOOD)
    found = rule(before, made(after))
    assert found.severity == "warning"
    assert [rule(before, made(other)) for other in silent] == [None] * len(silent)


def test_a_temperature_is_offered_only_where_it_can_help(made):
    before = made(GOOD)
    certainty = results.one_task_down(
        before, made([text(10.0), task("hellaswag", 0.5), task("lambada", 0.5)])
    )
    knowledge = results.one_task_down(
        before, made([text(10.0), task("hellaswag", 0.6), task("lambada", 0.4)])
    )
    assert certainty.check == "calibration" and "onebit doctor m.onebit --text" in certainty.confirm
    assert knowledge.check == "tasks" and "no temperature" in knowledge.what
    unsure = results.unsure_not_ignorant(before, made([text(12.0), *GOOD[1:]]))
    assert unsure.confirm == "onebit doctor m.onebit --text a.txt"
    assert "10 to 12" in unsure.evidence and "hellaswag" in unsure.evidence


def test_other_texts_and_settings_are_not_compared(made):
    before, after = made([text(10.0), task("piqa", 0.6)]), made([text(20.0, window=256), task("piqa", 0.6)])
    found = results.other_settings(before, after)
    assert found.severity == "warning" and "a.txt: other window" in found.evidence
    assert results.unsure_not_ignorant(before, after) is None
    assert results.other_settings(before, copy.deepcopy(before)) is None
    # Of a text that was measured in two ways, one in common suffices.
    assert results.other_settings(made([text(10.0), text(11.0, window=256)]), made([text(10.0)])) is None
    # Where a task's items lay changes nothing.
    elsewhere = made([task("piqa", 0.6, settings={"limit": None, "data": "b"})])
    there = made([task("piqa", 0.6, settings={"limit": None, "data": "a"})])
    assert results.other_settings(there, elsewhere) is None
    assert len(list(measured.pairs(there, elsewhere))) == 1


@pytest.mark.parametrize(
    ("label", "severity", "words"),
    [
        ("W1.58A8KV16", None, ""),
        ("W1.58A8KV8", "note", "cache"),
        ("W1.58A8KV16H16", "note", "head"),
        ("W1.58A8KV16 + int4 shortlist", "note", "head"),
        ("W1A4KV16", "warning", "weights, activations"),
    ],
)
def test_labels_that_differ(made, label, severity, words):
    found = results.labels(made([]), made([], label=label))
    assert (found and found.severity) == severity
    assert found is None or found.what == f"The models differ in {words}"


def test_slower(made):
    before = bench(made, speed("decode", 50.0), speed("prefill", 500.0, tokens=128))
    found = speeds.slower(before, bench(made, speed("decode", 40.0), speed("prefill", 500.0, tokens=128)))
    assert found.severity == "warning" and "-20%" in found.evidence and "1 speeds" in found.what
    assert speeds.slower(before, bench(made, speed("decode", 49.0))) is None
    assert speeds.slower(before, bench(made, speed("decode", 40.0, 0.4))) is None
    # Other threads are another measurement; another machine is no comparison.
    assert speeds.slower(before, bench(made, speed("decode", 40.0, threads=1))) is None
    other = bench(made, speed("decode", 40.0), machine=MACHINE | {"cpu": "B"})
    assert speeds.slower(before, other) is None
    assert "cpu: A and B" in speeds.other_machine(before, other).evidence
    assert speeds.other_machine(before, copy.deepcopy(before)) is None


def test_files_are_compared_with_the_first_of_their_kind(made):
    files = [
        made(GOOD),
        bench(made, speed("decode", 50.0)),
        made([text(12.0), *GOOD[1:]]),
        bench(made, speed("decode", 30.0)),
    ]
    found = results.examine(file.path for file in files)
    assert [finding.check for finding in found] == ["results", "results", "calibration", "slower"]
    assert [finding.severity for finding in found] == ["ok", "ok", "warning", "warning"]


def test_a_file_without_figures(made):
    (found,) = results.examine([made([]).path])
    assert found.severity == "note" and "0 figures of m.onebit" in found.evidence


def test_each_of_several_files_is_named(made):
    files = [made([text(10.0, 9.0)]).path, made([text(11.0, 9.0)]).path]
    assert [f.evidence.partition(":")[0] for f in results.examine(files)] == ["0.json", "1.json"]
    assert results.examine(files[:1])[0].evidence.startswith("a.txt")


def test_figures_without_a_value_are_left_out(made):
    without = text(10.0)
    without["figures"]["perplexity"]["high"] = None
    assert [m.figure for m in made([without]).measured] == ["bits_per_byte"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "other"}', '{"format": "onebit eval 1"}'])
def test_what_is_no_file_of_results(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(
        ValueError,
        match=r"is no file of results; expected JSON of onebit eval or onebit bench|is no JSON|damaged",
    ):
        measured.read([tmp_path / "x.json"])

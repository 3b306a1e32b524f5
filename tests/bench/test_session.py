"""A run keeps its promises: what it measures, compares, refuses and writes. Kinds: exact, invariant."""

import json
import sys
import time
from dataclasses import replace

import pytest

import tiny
from onebit import formats
from onebit.bench import conditions, session
from onebit.bench.counters import Perf, Rapl
from onebit.bench.figures import Key, Series, figure
from onebit.bench.fleet import Fleet
from onebit.bench.foreign import Usage
from onebit.bench.picture import draw
from onebit.bench.session import Plan, Session
from onebit.checkpoint import quantize
from onebit.engine.memory import position_bytes
from onebit.llm import LLM
from onebit.parts import token_bytes
from onebit.results import BENCH, Results, model_facts

QUIET, LOUD = Usage(0.01, 0.0, 0.0), Usage(0.4, 0.1, 0.0)
PLAN = Plan(1, rounds=2, seconds=0, contexts=(0, 16), batches=(2,), prompts=(8,), prompt=8, tokens=4)
DECODE = (("batch", 1), ("context", 0), ("kv_cache", "bf16"), ("threads", 1))


@pytest.fixture
def path(tmp_path):
    formats.write(quantize(tiny.master()), tmp_path / "tiny.onebit")
    return tmp_path / "tiny.onebit"


def new_session(path, plan=PLAN, **more):
    state = conditions.look(plan.threads, None, plan.memory_limit, check=False)
    return Session(path, formats.read(path), plan, state, **more)


def key(name="decode", engine="onebit"):
    return Key(name, engine, DECODE)


def test_a_figure_is_the_median_of_the_rounds():
    found = figure(key(), Series([10.0, None, 30.0, 20.0], usages=[QUIET, LOUD]))
    assert found == {
        "engine": "onebit", "unit": "tok/s", "rounds": 3, "value": 20.0, "low": 10.0, "high": 30.0,
        "foreign": 0.205,
    }  # fmt: skip


def test_percentiles_are_those_of_all_samples():
    samples = [i / 100 for i in range(1, 101)]
    found = figure(key("ttft"), Series([0.25, 0.75], samples))
    assert (found["value"], found["low"], found["high"]) == (0.505, 0.25, 0.75)
    assert (found["p95"], found["p99"]) == (0.9505, 0.9901)


def test_a_ratio_is_made_round_by_round():
    ours = Series([40.0, 50.0, None, 60.0])
    found = figure(key("decode", "torch"), Series([10.0, 25.0, 5.0, 20.0]), ours)
    # 60 / 20, and not the ratio of medians.
    assert found["ratio"] == {"value": 3.0, "low": 2.0, "high": 4.0}
    # Of a time, less is better.
    found = figure(key("load", "torch"), Series([8.0]), Series([2.0]))
    assert found["ratio"]["value"] == 4.0


def test_shares_of_the_memory_are_made_round_by_round(path, monkeypatch):
    monkeypatch.setattr(session, "LEAST_READ", 0)
    run = new_session(path)
    late = (("batch", 1), ("context", 16), ("kv_cache", None), ("threads", 1))
    run.series = {
        Key("bandwidth", "machine", (("bytes", run.token_bytes), ("threads", 1))): Series([1e9, 2e9]),
        Key("decode", "onebit", late): Series([1000.0, 500.0]),
    }
    run._derive()
    n_bytes = token_bytes(run.model) + 16 * position_bytes(run.model.config)
    assert run.series[Key("token_bytes", "onebit", late)].values == [n_bytes]
    shares = run.series[Key("bandwidth_share", "onebit", late)].values
    assert shares == [1000 * n_bytes / 1e9, 500 * n_bytes / 2e9]


@pytest.mark.parametrize(
    ("usages", "rounds", "quotable", "words"),
    [
        ([QUIET], 5, True, None),
        ([LOUD], 5, False, "others used more than 5% of the processors in 1 of 1 figures"),
        ([], 5, False, "does not tell who else"),
        ([QUIET], 2, False, "a look; 5 are a measurement"),
    ],
)
def test_what_may_be_quoted(path, usages, rounds, quotable, words):
    run = new_session(path, replace(PLAN, rounds=rounds))
    run.series = {key(): Series([1.0], usages=usages)}
    run._judge()
    assert run.conditions.quotable is quotable
    assert [words] == [None] if words is None else any(words in w for w in run.conditions.warnings)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rounds": 0}, "--rounds is 0; expected at least 1"),
        ({"seconds": -1.0}, "--seconds is -1.0"),
        ({"seconds": float("nan")}, "--seconds is nan; expected from 0 to 86400"),
        ({"seconds": float("inf")}, "--seconds is inf"),
        ({"time_limit": 0.0}, "--time-limit is 0; expected more than --seconds"),
        ({"time_limit": float("nan")}, "--time-limit is nan"),
        ({"contexts": (-1,)}, "--contexts has -1"),
        ({"contexts": (189,)}, "--contexts has 189; this model takes 188 at most"),
        ({"prompts": (193,)}, "--prompts has 193; this model takes 192 at most"),
        ({"batches": (0,)}, "--batches has 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        replace(PLAN, **changes).check(tiny.CONFIG.max_seq_len)


def test_activations_that_no_model_has(path):
    with pytest.raises(ValueError, match="--activations has 'a5'; expected some of a15, a8, a4.8, a4, a1"):
        new_session(path, activations=("a5",))
    formats.write(quantize(tiny.master(tiny.config(weights="dense", activations="none"))), path)
    with pytest.raises(ValueError, match="this model is dense"):
        new_session(path, activations=("a4",))


def test_a_whole_run_and_its_file(path, tmp_path):
    """One process each, one of them with other activations; the file has the fields that others read."""
    run = new_session(path, activations=("a8", "a4"))
    run.missing |= {"energy": "a reason", "cache misses": "another"}
    # A peer that is not there, and one that cannot hold the model, end nothing.
    run.add_peer("onnxruntime", None, tmp_path)
    shown = []
    run.run(lambda what, share: shown.append(share))
    assert 0 <= min(shown) and max(shown) < 1
    llm = LLM(run.model, 1)
    results = Results(tmp_path / "out.json", model_facts(llm, "tiny", path), BENCH)
    run.save(results)
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["format"] == BENCH and data["model"]["label"] == "W1.58A8KV16"
    assert set(data["conditions"]) == {
        "governor", "turbo", "load", "pinned", "threads", "memory_limit", "warnings", "quotable",
    }  # fmt: skip
    assert data["conditions"]["threads"] == 1 and data["conditions"]["quotable"] is False
    assert data["missing"]["energy"] == "a reason" and "--against" in data["missing"]["onnxruntime"]
    assert {name: facts["label"] for name, facts in data["engines"].items()} == {
        "onebit": "W1.58A8KV16",
        "onebit a4": "W1.58A4KV16",
    }
    assert data["engines"]["onebit"]["file_bytes"] == path.stat().st_size
    assert "memory bandwidth used" in data["missing"]
    found = {
        (r["name"], r["engine"], r["settings"].get("context"), r["settings"].get("batch"))
        for r in data["results"]
    }
    for engine in ("onebit", "onebit a4"):
        for name in ("cold_start", "load", "resident", "ttft", "inter_token", "prefill", "token_bytes"):
            assert (name, engine, 0, 1) in found
        assert {("decode", engine, 0, 1), ("decode", engine, 16, 1), ("decode", engine, 0, 2)} <= found
    assert ("bandwidth", "machine", None, None) in found
    for row in data["results"]:
        assert row["kind"] == "speed" and 0 < row["low"] <= row["high"] and row["value"] > 0
        assert row["rounds"] == (1 if row["name"] == "token_bytes" else 2) and row["command"].startswith(
            "onebit"
        )
        if row["name"] in ("ttft", "inter_token"):
            assert row["value"] <= row["p95"] <= row["p99"]
        if row["engine"] == "onebit a4" and row["name"] != "token_bytes":
            assert row["ratio"]["low"] <= row["ratio"]["value"] <= row["ratio"]["high"]
    starts = {r["engine"]: r["value"] for r in data["results"] if r["name"] == "cold_start"}
    loads = {r["engine"]: r["value"] for r in data["results"] if r["name"] == "load"}
    assert all(starts[engine] > loads[engine] for engine in starts)
    draw(data, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    # The same run again takes the place of the first.
    again = Results(tmp_path / "out.json", model_facts(llm, "tiny", path), BENCH)
    run.save(again)
    assert len(again.data["results"]) == len(data["results"])


def test_energy_and_misses_are_those_of_counted_tokens(path, monkeypatch):
    """Of a machine that takes ten watts, and with an event that every machine has."""
    run = new_session(path, replace(PLAN, rounds=1, seconds=0.01))
    rapl, perf = Rapl(), Perf(event="page-faults")
    rapl.reason = None
    monkeypatch.setattr(rapl, "joules", lambda: 10 * time.perf_counter())
    run._rapl, run._perf = rapl, perf
    turns = list(run._turns())
    assert [name for name, _ in turns if "counters" in name] == ["onebit, counters"]
    fleet = Fleet(run._started)
    run._start(fleet, lambda what, share: None)
    for name, measure in run._turns():
        if "decode" in name or "counters" in name:
            measure(fleet)
    fleet.close()
    found = {key.name: series for key, series in run.series.items()}
    (joules,) = found["energy_per_token"].values
    n = run._counted_tokens["onebit"]
    assert 8 <= n <= tiny.CONFIG.max_seq_len
    # The clock of the text is part of that of the whole call.
    assert 0 < joules * n / 10 < 30
    if perf.reason is None:
        (faults,) = found["cache_misses_per_token"].values
        assert faults >= 0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit address space")
def test_a_limit_that_is_too_small_says_what_it_takes(path):
    run = new_session(path, replace(PLAN, memory_limit=60_000_000))
    with pytest.raises(ValueError, match="--memory-limit 60,000,000 bytes is too little for onebit") as told:
        run.run()
    with pytest.raises(ValueError, match="--memory-limit 0 bytes is too little for onebit"):
        new_session(path, replace(PLAN, memory_limit=0)).run()
    needed = int(str(told.value).split("took ")[1].split(" ")[0].replace(",", ""))
    assert needed > 60_000_000
    # Twice that is enough, and a process really lives within it.
    run = new_session(path, replace(PLAN, memory_limit=2 * needed, rounds=1))
    run.run()
    assert run.conditions.memory_limit == 2 * needed
    assert all(series.measured for series in run.series.values())

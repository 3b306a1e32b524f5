"""The benchmark measures, accounts and reports as it says. Kind: invariant."""

import json
import shutil
import sys
from dataclasses import replace
from statistics import median

import picture
import plan
import pytest
import report
import shapes
import speed
from plan import MACHINE, OURS, task

import tiny
from onebit.bench.foreign import Usage

CONFIG = replace(tiny.CONFIG, d_model=64, d_ff=160, max_seq_len=8192)
QUIET, LOUD = Usage(0.01, 0.0, 0.0), Usage(0.4, 0.1, 0.0)
TQ2 = f"{plan.LLAMA} TQ2_0"


@pytest.fixture
def known():
    return plan.facts("2b4t", shapes.synthetic(CONFIG), "t80", "avx2", 2)


def results(disturbed=()):
    """Three rounds: onebit has 40, 50 and 60 tokens a second, llama.cpp 10, 25 and 20."""
    values = {
        task(MACHINE, "read", 2): [10.0, 10.0, 10.0],
        task(OURS, "decode", 2): [40.0, 50.0, 60.0],
        task(TQ2, "decode", 2): [10.0, 25.0, 20.0],
        task(OURS, "decode", 2, context=8192, kv_cache="int8"): [20.0, 25.0, None],
    }
    return {t: report.Series(v, usages=[LOUD if t in disturbed else QUIET] * 3) for t, v in values.items()}


def find(found, words):
    return next(target for target in found if words in target.name)


def test_a_comparison_is_made_round_by_round(known):
    target = find(report.targets(results(), known), "decode against llama.cpp TQ2_0, 2")
    assert target.values == [4.0, 2.0, 3.0] and target.met
    # 60 / 20, and not the ratio of medians, 50 / 20.
    assert median(target.values) == 3.0


def test_rounds_that_failed_are_left_out(known):
    target = find(report.targets(results(), known), "attention")
    assert target.values == pytest.approx([25.0, 20.0]) and target.met is False
    assert find(report.targets(results(), known), "load").met is None


def test_shares_of_the_limits_count_the_bytes_of_the_model(known):
    target = find(report.targets(results(), known), "whole step, exact head, 2 threads")
    assert target.values[0] == pytest.approx(100 * 40 * known.token_bytes / 10e9)


def test_foreign_load_makes_a_run_not_quotable(known):
    quiet, loud = results(), results(disturbed=[task(TQ2, "decode", 2)])
    assert report.is_quotable(quiet) is True and report.is_quotable(loud) is False
    assert "NOT QUOTABLE" not in report.table(quiet, known, {}, {}, {})
    text = report.table(loud, known, {}, {}, {})
    assert "NOT QUOTABLE" in text
    marked = [line for line in text.splitlines() if line.endswith("*")]
    assert any("decode against" in line for line in marked) and len(marked) == 2
    assert find(report.targets(loud, known), "decode against llama.cpp TQ2_0, 2").met is None
    # A system that tells nothing vouches for nothing.
    unknown = {t: report.Series(s.values) for t, s in quiet.items()}
    assert report.is_quotable(unknown) is None
    assert "nothing here is to be quoted" in report.table(unknown, known, {}, {}, {})


def test_the_table_says_why_a_peer_is_missing(known):
    text = report.table(
        results(), known, {plan.DENSE: "needs about 20.0 GB"}, {OURS: 10**8}, {OURS: {"version": "onebit 9"}}
    )
    assert "(onebit 9)" in text
    assert "torch, bf16 Llama: not run: needs about 20.0 GB" in text
    assert "resident at most 100 MB" in text


def test_json_and_picture_of_a_run(known, tmp_path):
    absent = {plan.DENSE: "no memory"}
    result = report.as_json(results(), known, absent, {OURS: 10**8}, machine={"cpu": "a CPU"})
    again = json.loads(json.dumps(result))
    assert again["quotable"] is True and again["foreign"]["mean"] == 0.01
    row = next(r for r in again["results"] if r["engine"] == TQ2)
    assert (row["median"], row["min"], row["max"], row["unit"]) == (20.0, 10.0, 25.0, "tok/s")
    picture.draw(again, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [
        ("AMD EPYC 9R14 96-Core Processor", "amd-epyc-9r14"),
        ("Intel(R) Core(TM) i7-8550U CPU @ 1.80GHz", "intel-core-i7-8550u"),
        ("Intel(R) Xeon(R) Processor", "intel-xeon-avx2"),
        ("", "cpu-avx2"),
    ],
)
def test_names_of_result_files(cpu, expected):
    assert report.slug(cpu, "avx2") == expected


@pytest.mark.skipif(shutil.which("cc") is None, reason="limits are compiled where they run")
def test_a_quick_run_of_a_tiny_shape(tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(speed.SHAPES, "tiny", CONFIG)
    arguments = [
        "--quick",
        "--no-peers",
        "--rounds",
        "1",
        "--threads",
        "2",
        "--models",
        str(tmp_path / "models"),
    ]
    monkeypatch.setattr(
        sys, "argv", ["speed.py", *arguments, "--shape", "tiny", "--out", str(tmp_path), "--cpu", "test"]
    )
    speed.main()
    out, progress = capfd.readouterr()
    result = json.loads(out.splitlines()[-1])
    (file,) = tmp_path.glob("speed-tiny-quick_test_*.json")
    assert json.loads(file.read_text()) == result and file.with_suffix(".png").exists()
    assert all(row["median"] is not None for row in result["results"]), out
    assert {row["what"] for row in result["results"]} >= {
        "read",
        "decode",
        "linear",
        "batch",
        "footprint",
        "load",
    }
    assert "round 1 of 1" in progress and "target" in out

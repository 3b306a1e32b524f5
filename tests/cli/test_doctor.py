"""`onebit doctor`: what it prints, how it ends, and what it refuses. Kinds: exact, invariant."""

import json
import re
import shlex
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import typer

import tiny
from onebit import formats
from onebit.checkpoint import quantize
from onebit.cli import VERBS
from onebit.cli.doctor import doctor
from onebit.doctor import machine
from onebit.doctor.finding import SEVERITIES


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    # Looking at the machine takes a second, and has tests of its own.
    seen = machine.examine
    monkeypatch.setattr(machine, "examine", lambda token_bytes=None: seen(token_bytes=token_bytes, seconds=0))
    return tmp_path


def findings(capsys):
    return json.loads(capsys.readouterr().out)["findings"]


def test_the_shipped_model_and_this_machine():
    done = subprocess.run([sys.executable, "-m", "onebit", "doctor"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert re.search(r"^ok      All kernels compute rightly", done.stdout, re.MULTILINE)
    assert re.search(r"^ok      Every byte is as it was written", done.stdout, re.MULTILINE)
    assert re.fullmatch(r"0 errors, \d+ warnings?, \d+ notes?, \d+ ok", done.stdout.splitlines()[-1])


def test_errors_come_first_and_are_the_exit_code(folder, capsys):
    packed = quantize(tiny.master())
    dead = packed.tensors | {"layers.0.attn_norm.weight": np.zeros(48, np.float32)}
    formats.write(replace(packed, tensors=dead), folder / "dead.onebit")
    with pytest.raises(typer.Exit) as ended:
        doctor("dead.onebit")
    assert ended.value.exit_code == 1
    shown = capsys.readouterr().out
    assert shown.startswith("error: 1 of 9 norms are zero\n  seen  layers.0.attn_norm.weight\n")
    assert "\n  try   onebit doctor dead.onebit --json\n" in shown


def test_json_has_all_findings(folder, capsys):
    formats.write(quantize(tiny.master()), folder / "tiny.onebit")
    doctor("tiny.onebit", as_json=True)
    whole = json.loads(capsys.readouterr().out)
    assert whole["format"] == "onebit doctor 1" and whole["machine"]["isa"]
    order = [SEVERITIES.index(finding["severity"]) for finding in whole["findings"]]
    assert order == sorted(order)
    assert sum(whole["count"].values()) == len(order)
    assert {"severity", "check", "what", "evidence", "why", "confirm", "advice"} == set(whole["findings"][0])


def test_commands_exist(folder, capsys):
    formats.write(tiny.master(tiny.config(sub_norm=False, activation="silu")), folder / "tiny.gguf", "F32")
    doctor("tiny.gguf", as_json=True)
    commands = [shlex.split(f["confirm"], comments=True) for f in findings(capsys)]
    ours = [words for words in commands if words[0] == "onebit"]
    assert len(ours) > 5 and {words[1] for words in ours} <= set(VERBS)


def test_results_alone_say_nothing_of_the_machine(folder, capsys):
    figure = {"value": 9.0, "stderr": 0.1, "low": 8.8, "high": 9.2, "n": 10}
    result = {"kind": "text", "name": "a.txt", "settings": {}, "figures": {"bits_per_byte": figure}}
    result |= {"command": "onebit eval"}
    model = {"name": "m.onebit", "sha256": "0", "label": "W1A8KV16"}
    about = {"format": "onebit eval 1", "model": model, "machine": {"cpu": "A"}, "versions": {}}
    whole = about | {"results": [result]}
    (folder / "a.json").write_text(json.dumps(whole))
    with pytest.raises(typer.Exit):
        doctor(results=[folder / "a.json"], as_json=True)
    assert [f["check"] for f in findings(capsys)] == ["worse than nothing"]
    formats.write(quantize(tiny.master()), folder / "tiny.onebit")
    with pytest.raises(typer.Exit):
        doctor("tiny.onebit", results=[folder / "a.json"], as_json=True)
    assert {"worse than nothing", "kernels", "zeros"} <= {f["check"] for f in findings(capsys)}


def test_a_text_gives_a_temperature_that_a_model_keeps(folder, capsys):
    formats.write(quantize(tiny.master()), folder / "tiny.onebit")
    (folder / "text.txt").write_text(tiny.TEXT * 2)
    # Of random weights another setting may be the better one.
    with suppress(typer.Exit):
        doctor("tiny.onebit", text=folder / "text.txt", out=folder / "new.onebit", threads=1, as_json=True)
    checks = {f["check"]: f for f in findings(capsys)}
    # Random weights know nothing: any temperature above theirs is better.
    assert checks["calibration"]["severity"] == "warning"
    before, after = (formats.read(folder / name) for name in ("tiny.onebit", "new.onebit"))
    t = after.provenance["head_temperature"]
    assert t > 1
    ratio = before.tensors["norm.weight"] / after.tensors["norm.weight"]
    assert np.allclose(ratio, t, rtol=1e-6)


def test_short_texts_and_models_without_tokenizer(folder, capsys):
    formats.write(quantize(tiny.master()), folder / "tiny.onebit")
    (folder / "text.txt").write_text("Once upon a time")
    with suppress(typer.Exit):
        doctor("tiny.onebit", text=folder / "text.txt", threads=1, as_json=True)
    checks = {f["check"]: f["severity"] for f in findings(capsys)}
    assert "config" in checks and checks.get("calibration", "note") == "note"
    with pytest.raises(ValueError, match="at least 128"):
        doctor("tiny.onebit", text=folder / "text.txt", out=folder / "new.onebit", threads=1)
    formats.write(replace(quantize(tiny.master()), tokenizer=None), folder / "mute.onebit")
    doctor("mute.onebit", text=folder / "text.txt", threads=1, as_json=True)
    checks = {f["check"]: f["severity"] for f in findings(capsys)}
    assert checks["tokenizer"] == "warning" and not {"config", "calibration"} & checks.keys()


def test_escapes_of_a_file_are_not_printed(folder, capsys):
    made = tiny.master(chat_template="{{ raise_exception('\x1b[31mred') }}")
    formats.write(quantize(made), folder / "tiny.onebit")
    doctor("tiny.onebit")
    shown = capsys.readouterr().out
    assert "?[31mred" in shown and "\x1b" not in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": "x.onebit"}, "give --text FILE to fit it on"),
        ({"out": "x.gguf", "text": "text.txt"}, "expected a file name that ends in .onebit"),
    ],
)
def test_what_is_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        doctor(**{name: folder / value for name, value in options.items()})


def test_threads_are_refused_also_where_no_text_is_read():
    with pytest.raises(ValueError, match="threads is 0; expected a whole number from 1 to 1024"):
        doctor(threads=0)

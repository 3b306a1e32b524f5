"""Invariant: whatever stops a run or damages its folder, the last good model stays, and the error says what to do."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import tiny
from onebit.cli import main
from onebit.formats import files, tensors
from onebit.formats import run as run_folder
from onebit.train import build, pictures, recipe, state, train
from onebit.train.state import METRICS, STATE

SMALL = ["data.vocab_size=300", "data.seq_len=32", "model.d_model=48", "model.d_ff=64", "batch_size=4"]
SMALL += ["threads=1", "precision=f32"]
SETTINGS = [*SMALL, "steps=24", "save_every=7", "evaluate_every=24", "health_every=0"]


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory):
    """A run that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(build("tiny", SETTINGS), texts, out)
    return out


@pytest.fixture(scope="module")
def stopped(texts, tmp_path_factory):
    """A run of ten steps that was stopped after its fourth, where it was saved."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    save = state.save

    def save_once(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(state, "save", save_once)
        train(SHORT, texts, out)
    return out


SHORT = build("tiny", [*SMALL, "steps=10", "save_every=4", "evaluate_every=10", "health_every=0"])


@pytest.fixture
def out(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "run")


def records(out):
    found = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    return [{name: value for name, value in r.items() if name != "tok_per_s"} for r in found]


def assert_same_run(a, b):
    assert records(a) == records(b)
    expected = run_folder.read(b).tensors
    assert all(np.array_equal(w, expected[name]) for name, w in run_folder.read(a).tensors.items())


def resume(out, *settings, data=None):
    train(recipe.override(recipe.read(out / "recipe.json"), list(settings)), data, out, resume=True)


def cli(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["onebit", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to catch")
@pytest.mark.parametrize("after", [1, 13])
def test_a_signal_to_end_is_a_pause(after, texts, whole, tmp_path):
    out = tmp_path / "run"
    arguments = ["train", "tiny", "--data", texts, "--out", out, *(f for s in SETTINGS for f in ("--set", s))]
    process = subprocess.Popen(
        [sys.executable, "-m", "onebit", *arguments], stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and (
        not (out / METRICS).exists() or (out / METRICS).read_text().count("\n") < after
    ):
        time.sleep(0.005)
    process.terminate()
    error = process.communicate()[1]
    assert process.returncode == 143
    assert error.splitlines()[-1] == f"onebit: stopped; go on with: onebit train --out {out} --resume"
    assert not list(out.glob(".*.tmp")) and len(records(out)) < 24
    resume(out)
    assert_same_run(out, whole)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("name", [STATE, run_folder.MODEL])
def test_a_kill_in_the_middle_of_a_save(name, texts, whole, tmp_path):
    out = tmp_path / "run"
    program = f"""
import os, signal, sys
from pathlib import Path
from onebit.formats import files
from onebit.train import build, train
replace, seen = os.replace, []
def deadly(source, target):
    seen.append(Path(target).name)
    if seen.count({name!r}) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
files.os.replace = deadly
train(build("tiny", {SETTINGS!r}), Path(sys.argv[1]), Path(sys.argv[2]))
"""
    killed = subprocess.run([sys.executable, "-c", program, texts, out], stderr=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL and len(list(out.glob(".*.tmp"))) == 1
    assert run_folder.read(out).provenance["steps"] == 7
    resume(out)
    assert_same_run(out, whole)


@pytest.mark.parametrize("name", [STATE, run_folder.CONFIG, run_folder.TOKENIZER, run_folder.MODEL])
def test_a_full_disk_at_any_write_of_a_save_leaves_what_was_saved(name, texts, out, monkeypatch, capsys):
    before = {
        n: (out / n).read_bytes() for n in (STATE, run_folder.CONFIG, run_folder.TOKENIZER, run_folder.MODEL)
    }

    def full(path, *mode):
        file = open(path, *mode)
        if path.name.startswith(f".{name}."):
            file.close()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return file

    with monkeypatch.context() as patch:
        patch.setattr(files, "open", full, raising=False)
        code, error = cli(patch, capsys, "train", "--out", out, "--resume")
    assert code == 2
    again = f"onebit train --out {out} --resume"
    assert error.splitlines()[-1] == (
        f"onebit: error: {out / name}: No space left on device; when that is mended, go on with: {again}"
    )
    kept = (n for n in before if n != STATE or name == STATE)
    assert all((out / n).read_bytes() == before[n] for n in kept)
    assert run_folder.read(out).provenance["steps"] == 4 and not list(out.glob(".*.tmp"))
    resume(out)
    assert [r["step"] for r in records(out)] == list(range(10))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_at_the_metrics_is_named(out, monkeypatch):
    def broken(path, steps):
        path.unlink()
        path.symlink_to("/dev/full")
        return []

    monkeypatch.setattr(state, "keep_metrics", broken)
    with pytest.raises(OSError, match="No space left") as raised:
        resume(out)
    assert raised.value.filename == str(out / METRICS)


def test_a_picture_that_cannot_be_drawn_costs_no_run(out, capsys):
    (out / pictures.LOSS).unlink(missing_ok=True)
    (out / pictures.LOSS).mkdir()
    resume(out)
    assert len(records(out)) == 10
    assert "no picture after step 9" in " ".join(capsys.readouterr().err.split())


def test_a_changed_recipe_is_named_field_by_field(out):
    for change, message in (
        (
            "optim.lr=0.001",
            r"run: optim\.lr: 0\.003 in the run, 0\.001 now; optim\.lr_second: .*\. Resume with",
        ),
        ("data.include=*.md", r'data\.include: \["\*"\] in the run, \["\*\.md"\] now'),
        ("model.scale=row", r'model\.scale: "tensor" in the run, "row" now'),
        ("threads=2", "threads: 1 in the run, 2 now"),
    ):
        with pytest.raises(ValueError, match=message):
            resume(out, change)
    with pytest.raises(ValueError, match=r"seed: 1 in the run, 2 now; .*|steps: 10 .*seed: 1"):
        resume(out, "steps=12", "seed=2")
    assert recipe.read(out / "recipe.json") == SHORT


def test_what_changes_no_loss_may_change(texts, out, tmp_path):
    changes = ["save_every=3", "evaluate_every=2", "evaluate_sequences=1", "health_every=3"]
    train(SHORT, texts, tmp_path / "whole")
    resume(out, *changes)
    names = ("step", "loss", "grad_norm")
    found, expected = ([[r[n] for n in names] for r in records(p)] for p in (out, tmp_path / "whole"))
    assert found == expected
    assert recipe.read(out / "recipe.json") == recipe.override(SHORT, changes)


def test_damage_is_named(out, stopped, texts):
    def damaged(name, change, message):
        (out / name).write_bytes(change((out / name).read_bytes()))
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        with pytest.raises(ValueError, match=message):
            resume(out)
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
        shutil.copy(stopped / name, out / name)

    def flip(contents):
        middle = len(contents) // 2
        return contents[:middle] + bytes([contents[middle] ^ 1]) + contents[middle + 1 :]

    def second(line):
        return lambda contents: b"\n".join([contents.split(b"\n")[0], line, *contents.split(b"\n")[2:]])

    damaged(STATE, flip, rf"{STATE}: its checksum is not that of its bytes")
    for name in ("train.npy", "held_out.npy", "tokenizer.json"):
        damaged(f"corpus/{name}", flip, r"corpus is damaged .*; delete it and resume with --data")
        damaged(f"corpus/{name}", lambda _: b"", r"corpus is damaged")
    for line in (b'{"step": 1, "lo', b"[1]", b'{"step": 1}', b"\xff\xfe", b"", b'{"step": 1, "loss": NaN}'):
        damaged(METRICS, second(line), rf"{METRICS}, line 2: not the record of a step; delete the line")
    for text in (b"", b"[]", b"null", b"\xff", b'{"model": 3}'):
        damaged("recipe.json", lambda _, text=text: text, "recipe.json: (not a|the) recipe")
    (out / "corpus" / "train.npy").unlink()
    with pytest.raises(ValueError, match="corpus is damaged"):
        resume(out)


def test_a_damaged_line_may_be_deleted(out, stopped):
    lines = (out / METRICS).read_text().splitlines(keepends=True)
    (out / METRICS).write_text("".join(lines[:1] + lines[2:]))
    resume(out)
    assert [r["step"] for r in records(out)] == [0, *range(2, 10)]


def test_a_corpus_is_made_again_of_the_same_texts_only(out, texts, tmp_path):
    shutil.rmtree(out / "corpus")
    other = shutil.copytree(texts, tmp_path / "other")
    (other / "0.txt").write_text("Something else. " + tiny.TEXT)
    with pytest.raises(
        ValueError, match=r"the data is not that of the run \(corpus_sha256 .* give that back"
    ):
        resume(out, data=other)
    shutil.rmtree(out / "corpus")
    resume(out, data=texts)


def test_a_model_without_its_state_is_not_written_over(out):
    (out / STATE).unlink()
    before = (out / run_folder.MODEL).read_bytes()
    with pytest.raises(ValueError, match=f"holds a model, but no {STATE} to go on from; start another run"):
        resume(out)
    assert (out / run_folder.MODEL).read_bytes() == before


def test_a_folder_that_cannot_be_written_is_found_before_the_work(texts, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file: is a file; --out expects a folder"):
        train(SHORT, texts, tmp_path / "file" / "run")
    # Who tests as root may write anywhere.
    monkeypatch.setattr(state.os, "access", lambda path, mode: path != tmp_path)
    code, error = cli(monkeypatch, capsys, "train", "tiny", "--data", texts, "--out", tmp_path / "run")
    assert (code, error) == (2, f"onebit: error: {tmp_path}: cannot be written; choose another --out\n")
    assert not (tmp_path / "run").exists()


def test_states_without_a_checksum_are_read(out):
    header, contents = tensors.split_header(tensors.map_file(out / STATE))
    arrays = {name: np.array(a) for name, a in tensors.views(header, contents).items()}
    tensors.write(out / STATE, {"step": "4"}, arrays)
    resume(out)
    assert len(records(out)) == 10

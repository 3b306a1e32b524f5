"""What strangers tried. Kind: exact (nothing is lost, nothing reaches the terminal that it would obey)."""

import os
import signal
import subprocess
import sys
import time

import pytest

import tiny
from onebit import convert, formats
from onebit.checkpoint import quantize
from onebit.cli import main
from onebit.formats import gguf, hf

PLAIN = tiny.config(sub_norm=False, activation="silu")


def says(monkeypatch, capsys, *args):
    monkeypatch.setattr("sys.argv", ["onebit", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr()
    return ended.value.code, shown.out, shown.err


def test_a_name_in_a_file_cannot_command_the_terminal(tmp_path, monkeypatch, capsys):
    master = tiny.master(PLAIN)
    master.provenance["source"] = {"name": "a [/red]\x1b[2J\n" + "b" * 5000}
    gguf.write(master, tmp_path / "x.gguf", "F32")
    code, out, _ = says(monkeypatch, capsys, "info", tmp_path / "x.gguf")
    assert code == 0 and "[/red]?[2J?b" in out and "\x1b" not in out and len(out) < 8000


def test_a_folder_is_not_replaced_by_what_is_made_of_it(tmp_path):
    hf.write(tiny.bf16_exact(tiny.master(tiny.BITNET)), tmp_path / "model", "dense")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    with pytest.raises(ValueError, match="is the source too, and would be lost"):
        convert(tmp_path / "model", tmp_path / "model", "packed")
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


def test_a_link_stays_one(tmp_path):
    formats.run.write(tiny.master(), tmp_path / "run")
    (tmp_path / "disk").mkdir()
    for name in ("x.onebit", "folder"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    convert(tmp_path / "run", tmp_path / "x.onebit")
    assert (tmp_path / "x.onebit").is_symlink() and formats.read(tmp_path / "disk" / "x.onebit").is_packed


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with names")
def test_a_pipe_is_no_model(tmp_path, monkeypatch, capsys):
    os.mkfifo(tmp_path / "x.gguf")
    for verb in ("info", "run"):
        args = (verb, tmp_path / "x.gguf") if verb == "info" else (verb, "Once", "-m", tmp_path / "x.gguf")
        code, _, err = says(monkeypatch, capsys, *args)
        assert code == 2 and "neither a file nor a folder" in err
    code, _, err = says(monkeypatch, capsys, "run", "Once", "-m", "")
    assert code == 2 and "is empty" in err


@pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
def test_a_conversion_that_is_ended_leaves_nothing(tmp_path):
    config = tiny.config(vocab_size=65536, d_model=1024, d_ff=1024, n_layers=2)
    formats.write(tiny.synthetic(config), tmp_path / "x.onebit")
    command = [sys.executable, "-m", "onebit", "convert", "x.onebit", "y.gguf", "--encoding", "F32"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    while not [name for name in os.listdir(tmp_path) if name != "x.onebit"]:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert os.listdir(tmp_path) == ["x.onebit"]


def test_a_prompt_can_be_answered_instead_of_continued(tmp_path, monkeypatch, capsys):
    formats.write(quantize(tiny.master(chat_template=tiny.CHAT_TEMPLATE)), tmp_path / "x.onebit")
    args = ("run", "Hello", "-m", tmp_path / "x.onebit", "--temperature", "0", "--max-tokens", "8")
    (_, plain, _), (code, answer, _) = (says(monkeypatch, capsys, *args, *flag) for flag in ((), ("--chat",)))
    from onebit import load

    expected = load(tmp_path / "x.onebit").chat(
        [{"role": "user", "content": "Hello"}], temperature=0, max_tokens=8
    )
    assert code == 0 and answer.rstrip("\n") == expected.text.rstrip("\n") != plain.rstrip("\n")


def test_a_report_is_short_to_look_at(tmp_path):
    formats.run.write(tiny.master(), tmp_path / "run")
    assert len(repr(convert(tmp_path / "run", tmp_path / "x.onebit"))) < 2000


def test_tiny_models_find_a_type_of_codes(tmp_path):
    """Sixty-four inputs fit neither I2_S nor TQ2_0."""
    config = tiny.config(d_model=64, d_ff=128, d_head=16, n_heads=4)
    formats.run.write(tiny.master(config), tmp_path / "run")
    report, _ = convert(tmp_path / "run", tmp_path / "x.gguf", allow_lossy=True)
    assert {change.part: change for change in report.changes}["linear"].made == "Q2_0"

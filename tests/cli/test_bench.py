"""`onebit bench`: what it prints and writes, and what it refuses before it measures. Kinds: exact, invariant."""

import json
import subprocess
import sys

import pytest

import tiny
from onebit import formats
from onebit.checkpoint import quantize
from onebit.cli import bench as cli

FAST = {"rounds": 1, "seconds": 0.0, "threads": 1}


@pytest.fixture
def model(tmp_path):
    formats.write(quantize(tiny.master()), tmp_path / "tiny.onebit")
    return str(tmp_path / "tiny.onebit")


def test_the_table_says_what_was_measured_and_what_not(model, capsys, tmp_path):
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    cli.bench(
        model, ["llama.cpp"], contexts="0,16", prompts="8,32", batches="2", out=out, picture=picture, **FAST
    )
    told = capsys.readouterr()
    text = " ".join(told.out.split())
    for words in (
        "onebit", "W1.58A8KV16", "cold start", "first token after 64", "99 % within",
        "text after 16", "text, 2 at once", "prompt of 32", "memory, resident", "1 round",
        "not measured: llama.cpp: it has no architecture with squared ReLU",
        "not to be quoted", "rounds: 1, which is a look",
    ):  # fmt: skip
        assert words in text, words
    data = json.loads(out.read_text())
    assert data["engines"].keys() == {"onebit"} and picture.stat().st_size > 1000
    if data["conditions"]["governor"] is None:
        assert "onebit: warning: the system shows no governor" in told.err


def test_json_is_the_last_word(model, capsys):
    cli.bench(model, contexts="0", prompts="8", batches="1", as_json=True, governor_check=False, **FAST)
    told = capsys.readouterr()
    data = json.loads(told.out)
    assert data["format"] == "onebit bench 1" and "cold start" in told.err
    assert not any("governor" in warning for warning in data["conditions"]["warnings"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--against", "lama.cpp"], "there is no engine 'lama.cpp'; did you mean 'llama.cpp'?"),
        (["--against", "llama.cpp=none.gguf"], "there is no file 'none.gguf'"),
        (["--threads", "0"], "threads is 0; expected a whole number from 1 to 1024"),
        (["--kv-cache", "int4"], "--kv-cache is 'int4'; expected bf16, int8, fp8"),
        (["--memory-limit", "much"], "--memory-limit is 'much'; expected a size such as 2GiB or 500M"),
        (["--contexts", "0,x"], "--contexts is '0,x'; expected whole numbers with commas"),
        (["--contexts", "600"], "--contexts has 600; this model takes 480 at most"),
        (["--rounds", "0"], "--rounds is 0; expected at least 1"),
        (["--activations", "a5"], "--activations has 'a5'; expected some of a15"),
        (["--out", "nowhere/out.json"], "nowhere"),
        (["--picture", "out.jpg"], "expected a name that ends in .png"),
        (["--picture", "nowhere/out.png"], "nothing can be written to the folder"),
        (["--pin", "x"], "expected auto, or CPUs as in 0,2-3"),
    ],
)
def test_what_is_wrong_is_said_at_once(arguments, words, tmp_path, monkeypatch, capsys):
    from onebit.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["onebit", "bench", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    told = capsys.readouterr()
    assert left.value.code == 2 and words in told.err and told.out == ""
    assert told.err.splitlines()[-1].startswith("onebit: error: ") and not list(tmp_path.glob("*.png"))


def test_an_engine_that_is_not_installed_is_skipped_with_the_command(model, tmp_path):
    code = """
import sys
from onebit.bench import peers
peers.find_spec = lambda package: None
sys.argv = ["onebit", "bench", *sys.argv[1:]]
from onebit.cli import main
main()
"""
    words = [
        model,
        "--against",
        "torch",
        "--rounds",
        "1",
        "--seconds",
        "0",
        "--threads",
        "1",
        "--prompts",
        "8",
    ]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch and transformers not installed: pip install torch" in " ".join(done.stdout.split())

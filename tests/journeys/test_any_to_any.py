"""A model goes through every format and comes back. Kinds: invariant (nothing is lost), exact (texts are the same)."""

from dataclasses import replace

import numpy as np
import pytest

import onebit
import tiny
from onebit import formats
from onebit.checkpoint import quantize
from onebit.cli import main
from onebit.conversion import convert
from onebit.formats import cache, hf
from onebit.formats.compare import compare

WIDE = {"d_model": 256, "d_ff": 512, "d_head": 64}
PLAIN = {"sub_norm": False, "activation": "silu"}
GREEDY = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}

# The formats that a model passes, one after the other; its encoding there.
ROADS = {
    "bitnet": ({}, [("a", "packed"), ("b.onebit", None), ("c.gguf", "I2_S"), ("d.onebit", "r64"), ("e", "packed")]),
    "llama": (PLAIN, [("a", "packed"), ("b.gguf", "TQ2_0"), ("c.onebit", None), ("d.gguf", "TQ1_0"), ("e", "packed")]),
    "llama, Q2_0": (PLAIN, [("a", "packed"), ("b.gguf", "Q2_0"), ("c.onebit", None), ("d.gguf", "I2_S")]),
    "binary": (PLAIN | {"weights": "b1", "scale": 128, "qk_norm": True}, [("a.gguf", "Q1_0"), ("b.onebit", None)]),
    "dense": (
        PLAIN | {"weights": "dense", "activations": "none", "qkv_bias": True},
        [("a", "dense"), ("b.onebit", None), ("c.gguf", "F16"), ("d.gguf", "BF16"), ("e", "dense"), ("f.onebit", None)],
    ),
}  # fmt: skip


def start(folder, flags):
    """A run folder whose numbers every format on its road holds: scales and rows of few bits."""
    config = tiny.config(**WIDE, **flags)
    master = tiny.bf16_exact(tiny.master(config, chat_template=tiny.CHAT_TEMPLATE))
    tensors = {}
    for name, w in master.tensors.items():
        if config.is_linear(name) and config.weights != "dense":
            # Magnitudes of a quarter, in turn with zeros where there are three values: the mean is an eighth.
            signs = np.where(np.random.default_rng(len(name)).random(w.shape) < 0.5, -1, 1).astype(np.float32)
            keep = 1.0 if config.weights == "b1" else np.arange(w.size).reshape(w.shape) % 2
            w = np.float32(0.25) * signs * keep
        elif w.ndim == 2:
            # Without the small numbers that float16 rounds.
            w = np.where(abs(w) < 2**-10, np.float32(0.5), w)
        tensors[name] = w.astype(np.float32)
    formats.run.write(replace(master, tensors=tensors), folder / "run")
    return formats.read(folder / "run")


@pytest.mark.parametrize("road", ROADS)
def test_nothing_is_lost_on_the_way(road, tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.home", lambda: tmp_path / "home")
    flags, stations = ROADS[road]
    first = start(tmp_path, flags)
    prompt = [5, 77, 123, 9, 301]
    expected = onebit.LLM(quantize(first, head="bf16")).generate(prompt, **GREEDY).tokens
    source = tmp_path / "run"
    for name, encoding in stations:
        report, distance = convert(source, tmp_path / name, encoding, verify=True)
        assert not report.losses, [change.describe() for change in report.losses]
        assert source.name == "run" or (distance.largest, distance.n_same) == (0, distance.n_greedy)
        made = onebit.load(tmp_path / name)
        assert made.generate(prompt, **GREEDY).tokens == expected, name
        assert made.tokenizer.encode("Once upon a time, Lily ran.") == tiny_tokens(first)
        assert made.tokenizer.chat_template == tiny.CHAT_TEMPLATE
        source = tmp_path / name
    last = formats.read(source)
    assert not any(change.n_changed for change in compare(quantize(first, head="bf16"), last))
    # Scales that are all equal are one scale.
    assert replace(last.config, scale=first.config.scale) == first.config


def tiny_tokens(checkpoint):
    return onebit.LLM(quantize(checkpoint)).tokenizer.encode("Once upon a time, Lily ran.")


def test_hugging_face_and_back_is_the_same_file(tmp_path):
    master = start(tmp_path, {})
    hf.write(master, tmp_path / "a", "packed")
    convert(tmp_path / "a", tmp_path / "x.onebit")
    convert(tmp_path / "x.onebit", tmp_path / "b", "packed")
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("name", ["x.gguf", "folder"])
def test_the_command_line_runs_models_of_others(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("pathlib.Path.home", lambda: tmp_path / "home")
    start(tmp_path, PLAIN)

    def onebit_says(*args):
        monkeypatch.setattr("sys.argv", ["onebit", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        return capsys.readouterr()

    text = ("Once upon", "--temperature", "0", "--max-tokens", "12", "--ignore-eos")
    onebit_says("convert", tmp_path / "run", tmp_path / "x.onebit", "--head", "bf16")
    expected = onebit_says("run", *text, "-m", tmp_path / "x.onebit").out
    report = onebit_says("convert", tmp_path / "run", tmp_path / name, "--verify").err
    assert "verified" in report and ("TQ2_0" if name == "x.gguf" else "U8") in report
    first = onebit_says("run", *text, "-m", tmp_path / name)
    assert first.out == expected and "converted once, W1.58A8KV16H16" in first.err
    again = onebit_says("run", *text, "-m", tmp_path / name)
    assert again.out == expected and "converted" not in again.err
    assert len(list(cache.folder().glob("*.onebit"))) == 1
    shown = onebit_says("info", tmp_path / name).out
    assert "one for each matrix" in shown and "W1.58A8KV16H16" in shown
    assert "no: holds b1 weights" in shown and "llama" in shown

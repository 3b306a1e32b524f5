"""Engines of others get the same model, or say why not. Kinds: exact, invariant."""

from dataclasses import replace

import pytest

import tiny
from onebit import formats
from onebit.bench import peers
from onebit.checkpoint import quantize

LLAMA = tiny.config(sub_norm=False, activation="silu", d_model=256, d_ff=256, n_heads=4, d_head=64)


def test_names_and_files(tmp_path):
    file = tmp_path / "a=b.gguf"
    file.touch()
    assert peers.parse("torch") == ("torch", None)
    assert peers.parse(f"llama.cpp={file}") == ("llama.cpp", file)
    with pytest.raises(ValueError, match=r"no engine 'lama.cpp'; did you mean 'llama.cpp'\?"):
        peers.parse("lama.cpp")
    with pytest.raises(ValueError, match="engines: llama.cpp, transformers, torch, onnxruntime"):
        peers.parse("vllm")
    with pytest.raises(FileNotFoundError, match="there is no file 'none.gguf'"):
        peers.parse("llama.cpp=none.gguf")


def test_what_is_not_installed_comes_with_its_command(monkeypatch):
    assert peers.missing("llama.cpp") is None
    monkeypatch.setattr(peers, "find_spec", lambda package: None)
    assert peers.missing("llama.cpp") == "llama_cpp not installed: pip install llama-cpp-python"
    assert peers.missing("torch").startswith("torch and transformers not installed: pip install torch")


def test_our_model_for_each_engine(tmp_path):
    model = quantize(tiny.master(LLAMA))
    found = {
        name: peers.prepare(name, None, model, tmp_path, 1) for name in ("llama.cpp", "transformers", "torch")
    }
    assert found["llama.cpp"].label == found["transformers"].label == "W1.58A8KV16H16"
    for name, one in found.items():
        path = tmp_path / one.engine.arguments["path"]
        file = path / "model.safetensors" if path.is_dir() else path
        assert one.file_bytes == file.stat().st_size and one.engine.need > one.file_bytes
        assert one.engine.arguments["engine"] == peers.PEERS[name].engine
    types = formats.read(tmp_path / "model.tq2_0.gguf").provenance["source"]["types"]
    assert types["TQ2_0"] == 7 * LLAMA.n_layers


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("llama.cpp", tiny.CONFIG, "squared ReLU and sub-norms"),
        ("llama.cpp", replace(LLAMA, weights="b1", activations="a8", d_ff=80), "GGUF Q1_0: needs multiples"),
        ("transformers", replace(LLAMA, weights="b1"), "Hugging Face packed: "),
        ("onnxruntime", LLAMA, "--against onnxruntime=model.onnx"),
    ],
)
def test_what_does_not_fit_says_why(name, config, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        peers.prepare(name, None, quantize(tiny.master(config)), tmp_path, 1)


def test_files_of_others_run_as_they_are(tmp_path):
    ours = quantize(tiny.master(LLAMA))
    dense = quantize(tiny.master(replace(LLAMA, weights="dense", activations="none")))
    formats.write(dense, tmp_path / "f16.gguf", "F16")
    (tmp_path / "graph.onnx").write_bytes(b"no graph")
    assert peers.prepare("llama.cpp", tmp_path / "f16.gguf", ours, tmp_path, 1).label == "W16A16KV16"
    found = peers.prepare("onnxruntime", tmp_path / "graph.onnx", ours, tmp_path, 1)
    assert (found.label, found.file_bytes) == (None, 8)

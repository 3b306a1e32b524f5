"""Reading by content, converting. Kinds: exact (kind of file, refusals), invariant (conversions agree)."""

from dataclasses import replace

import numpy as np
import pytest

import tiny
from onebit import formats
from onebit.checkpoint import dequantize, quantize, to_dense
from onebit.packing import from_bf16, to_bf16


@pytest.fixture
def folder(tmp_path):
    formats.run.write(tiny.master(), tmp_path / "run")
    return tmp_path / "run"


def test_convert_equals_quantize(folder, tmp_path):
    converted = formats.convert(folder, tmp_path / "x.onebit").made
    expected = dequantize(quantize(tiny.master()))
    for packed in (converted, formats.read(tmp_path / "x.onebit"), formats.read(str(tmp_path / "x.onebit"))):
        assert packed.label == "W1.58A8KV16" and packed.tokenizer == tiny.tokenizer_json()
        for name, w in dequantize(packed).tensors.items():
            assert np.array_equal(w, expected.tensors[name])


def test_convert_changes_the_layout_in_place(folder, tmp_path):
    path = tmp_path / "x.onebit"
    formats.convert(folder, path)
    t80 = path.read_bytes()
    formats.convert(path, path, "r64")
    assert formats.read(path).tensors["layers.0.q.weight"].encoding == "r64" and path.read_bytes() != t80
    formats.convert(path, path, "t80")
    assert path.read_bytes() == t80


def test_a_file_is_told_by_its_content(folder, tmp_path):
    formats.convert(folder, tmp_path / "x.onebit")
    (tmp_path / "x.onebit").rename(tmp_path / "model.bin")
    assert formats.read(tmp_path / "model.bin").is_packed


def test_unreadable_places_are_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="nothing: no such file or folder; expected a .onebit or GGUF file"
    ):
        formats.read(tmp_path / "nothing")
    with pytest.raises(
        ValueError, match=r"a folder without a model; expected config.json and model.safetensors"
    ):
        formats.read(tmp_path)
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        formats.read("/dev/null")


def test_convert_refuses_before_it_writes(folder, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("buy milk")
    for dst, encoding, message in (
        (tmp_path / "x.gguf", None, "I2_S needs multiples of 128 inputs, and q has 48; this model fits F16"),
        (tmp_path / "x.gguf", "t80", "a GGUF file has TQ2_0, TQ1_0"),
        (tmp_path / "x.bin", None, "nothing is written to a .bin file; expected .onebit, .gguf, or a folder"),
        (tmp_path / "x.onebit", "b128", "expected"),
        (tmp_path / "x.onebit", "TQ2_0", "expected t80 or r64"),
        (tmp_path / "notes", None, "would be lost; choose another folder"),
        (folder, None, "would be lost|holds something else|is a run folder"),
    ):
        with pytest.raises(ValueError, match=message):
            formats.convert(folder, dst, encoding)
    (tmp_path / "notes" / "todo.txt").unlink()
    (tmp_path / "notes").rmdir()
    with pytest.raises(FileNotFoundError, match="make it first"):
        formats.convert(folder, tmp_path / "nowhere" / "x.onebit")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_mixed_weights_stay_ours(tmp_path):
    master = tiny.master(replace(tiny.BITNET, layer_weights=("b1", "b1.58")))
    formats.run.write(master, tmp_path / "run")
    assert formats.read(tmp_path / "run").config == master.config
    report = formats.convert(tmp_path / "run", tmp_path / "x.onebit")
    assert (report.made.config, report.made.label, report.losses) == (master.config, "W1.29A8KV16", [])
    ways = formats.ways_out(report.made)
    assert ways[".onebit"] == "yes"
    for encoding in ("I2_S", "TQ1_0", "TQ2_0", "Q1_0", "Q2_0"):
        assert ways[f"GGUF {encoding}"].startswith(
            "no: holds weights of one scheme, and these mix b1.58 and b1"
        )
    for name, encoding in (("x.gguf", None), ("x.gguf", "Q1_0"), ("folder", None), ("folder", "dense")):
        with pytest.raises(ValueError, match="mix b1.58 and b1|layers with b1.58 and with b1 weights"):
            formats.convert(tmp_path / "x.onebit", tmp_path / name, encoding)
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize("tied_head", [True, False])
@pytest.mark.parametrize(("head", "label"), [(None, "W16A16KV16"), ("q8", "W16A16KV16H8")])
def test_a_dense_twin_is_packed_as_bfloat16(tied_head, head, label, tmp_path):
    config = tiny.config(weights="dense", activations="none", tied_head=tied_head, qkv_bias=True)
    formats.run.write(tiny.master(config), tmp_path / "twin")
    assert formats.read(tmp_path / "twin").label == "W16A16KV16"
    packed = formats.convert(tmp_path / "twin", tmp_path / "x.onebit", head=head).made
    again = formats.read(tmp_path / "x.onebit")
    assert packed.label == again.label == label
    for name, tensor in again.tensors.items():
        if config.is_linear(name):
            assert tensor.encoding == "bf16"
            rows = to_dense(formats.read(tmp_path / "twin").tensors[name])
            assert np.array_equal(to_dense(tensor), from_bf16(to_bf16(rows)))

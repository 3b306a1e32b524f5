"""The container. Kinds: golden (a whole file as literal bytes), oracle (the safetensors package)."""

import numpy as np
import pytest

from onebit.formats import tensors as container

GOLDEN = (
    b"\xb8\x00\x00\x00\x00\x00\x00\x00"
    b'{"__metadata__":{"a":"b"},'
    b'"codes":{"dtype":"U8","shape":[1,1,4],"data_offsets":[0,4]},'
    b'"scale":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}' + b" " * 40 + b"\x01\x02\x03\xff"
    b"\x00\x00\x80\x3f\x00\x00\x00\xc0"
)
TENSORS = {
    "codes": np.array([[[1, 2, 3, 255]]], np.uint8),
    "scale": np.array([1, -2], np.float32),
}


def test_golden_file(tmp_path):
    path = tmp_path / "golden"
    container.write(path, {"a": "b"}, TENSORS)
    assert path.read_bytes() == GOLDEN
    header, data = container.split_header(container.map_file(path))
    assert header["__metadata__"] == {"a": "b"}
    read = container.views(header, data)
    assert list(read) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype and np.array_equal(read[name], tensor)
        assert not read[name].flags.writeable


def test_safetensors_reads_what_we_write_and_we_what_it_writes(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    container.write(ours, {"a": "b"}, TENSORS)
    safetensors.save_file(TENSORS, theirs, {"a": "b"})
    loaded = safetensors.load_file(ours)
    header, data = container.split_header(container.map_file(theirs))
    assert header["__metadata__"] == {"a": "b"}
    for name, tensor in container.views(header, data).items():
        assert np.array_equal(tensor, TENSORS[name]) and np.array_equal(loaded[name], TENSORS[name])


def test_empty_tensors_are_stored(tmp_path):
    container.write(tmp_path / "x", {}, {"a": np.empty(0, np.uint8), "b": np.ones((2, 0), np.float32)})
    header, data = container.split_header(container.map_file(tmp_path / "x"))
    assert {name: t.shape for name, t in container.views(header, data).items()} == {"a": (0,), "b": (2, 0)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\xff{}", "not UTF-8 at byte 0"),
        (b"[]", "not a JSON object"),
        (b'{"a": 1, "b": 2, "a": 3}', "'a' appears twice"),
        (b'{"a": {"b": 1, "b": 1}}', "'b' appears twice"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"a": -Infinity}', "-Infinity is no JSON number"),
        (b'{"a": 1} x', "not valid JSON"),
        (b"", "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
    ],
)
def test_json_is_strict(text, message):
    with pytest.raises(ValueError, match=f"^what is .*{message}"):
        container.parse_json(text, "what")


def test_values_of_unknown_origin_become_short_ascii():
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    for value in ("\n\x1b[31m", "\ud800", "x" * 1000, {"a": [1] * 1000}, nested):
        text = container.shorten(value)
        assert len(text) <= 80 and text.isascii() and text.isprintable()

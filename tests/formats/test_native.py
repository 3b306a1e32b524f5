"""The .onebit file. Kinds: golden (header, hash), oracle (safetensors), invariant (round trip, in place)."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest

import tiny
from onebit.checkpoint import HEADS, Checkpoint, quantize
from onebit.config import ModelConfig, RopeScaling
from onebit.formats import native
from onebit.formats import tensors as container
from onebit.packing import PackedTensor

VARIANTS = [
    {},
    {"scale": "row", "tied_head": False},
    {"scale": 16, "sub_norm": False, "activation": "silu", "eos_tokens": (1, 2), "bos_token": 3},
    {"weights": "b1", "activations": "a1", "rope_scaling": RopeScaling("linear", 2.0)},
    {"layer_weights": ("b1", "b1.58")},
]

# Of the file of golden_checkpoint(). It changes with the format, and with nothing else.
GOLDEN_SHA256 = "ef81bd34ebd3488aa468c36ef4532b5c984f45c39a44e73fdb6f4992bd112b9f"


def arrays(tensor) -> list[np.ndarray]:
    return [tensor.data, tensor.scale] if isinstance(tensor, PackedTensor) else [tensor]


def assert_equal(a: Checkpoint, b: Checkpoint) -> None:
    assert a.config == b.config and a.tokenizer == b.tokenizer and a.chat_template == b.chat_template
    assert a.provenance == b.provenance and list(a.tensors) == list(b.tensors)
    for name, tensor in a.tensors.items():
        for x, y in zip(arrays(tensor), arrays(b.tensors[name]), strict=True):
            assert x.dtype == y.dtype and np.array_equal(x, y)


@pytest.mark.parametrize("changes", VARIANTS)
def test_round_trip(tmp_path, changes):
    packed = quantize(tiny.master(tiny.config(**changes), chat_template=tiny.CHAT_TEMPLATE))
    native.write(packed, tmp_path / "x.onebit")
    assert_equal(native.read(tmp_path / "x.onebit"), packed)
    native.verify(tmp_path / "x.onebit")
    first = (tmp_path / "x.onebit").read_bytes()
    native.write(native.read(tmp_path / "x.onebit"), tmp_path / "x.onebit")
    assert (tmp_path / "x.onebit").read_bytes() == first


@pytest.mark.parametrize("tied_head", [True, False])
def test_round_trip_of_a_bf16_head(tmp_path, tied_head):
    packed = quantize(tiny.master(tiny.config(tied_head=tied_head, vocab_size=323)), head="bf16")
    assert (packed.head, packed.label) == ("bf16", "W1.58A8KV16H16")
    native.write(packed, tmp_path / "x.onebit")
    assert_equal(native.read(tmp_path / "x.onebit"), packed)
    assert quantize(native.read(tmp_path / "x.onebit"), "r64").head == "bf16"
    for name in ("shortlist.weight", "shortlist.bounds"):
        with pytest.raises(ValueError, match=f"tensor {name} is missing"):
            replace(packed, tensors={n: t for n, t in packed.tensors.items() if n != name})
    q8 = quantize(tiny.master())
    with pytest.raises(ValueError, match=r"tensor shortlist.bounds is not part"):
        replace(q8, tensors=q8.tensors | {"shortlist.bounds": packed.tensors["shortlist.bounds"]})


@pytest.mark.parametrize(
    ("changes", "encoding", "label"),
    [
        ({"weights": "b1", "activations": "a15", "scale": 16}, "b128", "W1A15KV16H1"),
        ({"scale": "row", "tied_head": False}, "t80", "W1.58A8KV16H1.58"),
        ({"activations": "a15"}, "r64", "W1.58A15KV16H1.58"),
    ],
)
def test_round_trip_of_coded_rows(tmp_path, changes, encoding, label):
    packed = tiny.coded(tiny.master(tiny.config(vocab_size=323, **changes)), encoding)
    assert (packed.head, packed.label) == (encoding, label)
    native.write(packed, tmp_path / "x.onebit")
    assert_equal(native.read(tmp_path / "x.onebit"), packed)
    native.verify(tmp_path / "x.onebit")
    header, _ = container.split_header(container.map_file(tmp_path / "x.onebit"))
    entries = json.loads(header["__metadata__"]["encodings"])
    expected = {"encoding": encoding, "shape": [323, 48], "scale": packed.config.scale}
    assert entries["embed.weight"] == expected == entries.get("head.weight", expected)


def test_a_bare_model_needs_no_tokenizer(tmp_path):
    packed = replace(quantize(tiny.master()), tokenizer=None, provenance={})
    native.write(packed, tmp_path / "x.onebit")
    assert_equal(native.read(tmp_path / "x.onebit"), packed)


def test_texts_keep_every_character(tmp_path):
    packed = replace(
        quantize(tiny.master()), chat_template="\u00e9\u4e2d\U0001f600\r\n", provenance={"\u00e9": ["\u4e2d"]}
    )
    native.write(packed, tmp_path / "x.onebit")
    assert_equal(native.read(tmp_path / "x.onebit"), packed)


def test_tensors_are_aligned_views_of_one_read_only_map(tmp_path):
    native.write(quantize(tiny.master()), tmp_path / "x.onebit")
    owners = set()
    for tensor in native.read(tmp_path / "x.onebit").tensors.values():
        for array in arrays(tensor):
            assert array.flags.c_contiguous and array.flags.aligned and not array.flags.writeable
            base = array
            while isinstance(base.base, np.ndarray):
                base = base.base
            owners.add(id(base))
            assert np.shares_memory(array, base)
        if isinstance(tensor, PackedTensor):
            assert tensor.data.ctypes.data % 64 == 0
    assert len(owners) == 1


def test_a_replaced_file_does_not_disturb_those_who_read_it(tmp_path):
    native.write(quantize(tiny.master(seed=0)), tmp_path / "x.onebit")
    read = native.read(tmp_path / "x.onebit")
    native.write(quantize(tiny.master(seed=1)), tmp_path / "x.onebit")
    assert_equal(read, quantize(tiny.master(seed=0)))


def test_the_safetensors_package_opens_it(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    packed = quantize(tiny.master(chat_template="{{ x }}"))
    native.write(packed, tmp_path / "x.onebit")
    with safetensors.safe_open(tmp_path / "x.onebit", "numpy") as file:
        metadata = file.metadata()
        assert (
            metadata["format"] == "onebit"
            and metadata["version"] == "1"
            and metadata["label"] == "W1.58A8KV16"
        )
        assert ModelConfig.from_dict(json.loads(metadata["config"])) == packed.config
        entry = json.loads(metadata["encodings"])["layers.0.q.weight"]
        assert entry == {"encoding": "t80", "shape": [64, 48], "scale": "tensor"}
        q = packed.tensors["layers.0.q.weight"]
        assert np.array_equal(file.get_tensor("layers.0.q.weight"), q.data)
        assert np.array_equal(file.get_tensor("layers.0.q.scale"), q.scale)
        assert file.get_tensor("tokenizer.json").tobytes() == packed.tokenizer
        assert file.get_tensor("chat_template.jinja").tobytes() == b"{{ x }}"


def golden_checkpoint() -> Checkpoint:
    """A model whose weights need no random numbers, so that the file has one right hash."""
    config = ModelConfig(3, 4, 1, 1, 1, 2, 5, sub_norm=False)
    tensors = {
        name: (np.arange(np.prod(shape)).reshape(shape) % 5 - 2).astype(np.float32)
        for name, shape in config.tensor_shapes().items()
    }
    return quantize(Checkpoint(config, tensors, b"{}", None, {"data": "none"}))


def test_golden_file(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "__version__", "0.0.0")
    native.write(golden_checkpoint(), tmp_path / "x.onebit")
    contents = (tmp_path / "x.onebit").read_bytes()
    start = 8 + int.from_bytes(contents[:8], "little")
    assert start % 64 == 0
    assert contents[8:].startswith(
        b'{"__metadata__":{"format":"onebit","version":"1","onebit_version":"0.0.0","label":"W1.58A8KV16","config":"{'
        b'\\"activation\\":\\"relu2\\",\\"activations\\":\\"a8\\",\\"bos_token\\":null,\\"d_ff\\":5,\\"d_head\\":2,'
    )
    # The embedding comes first: rows [-2, -1, 0, 1], [2, -2, -1, 0], [1, 2, -2, -1] as bytes 128 + 63.5 w.
    lanes = np.frombuffer(contents[start : start + 12], np.uint8).reshape(3, 4)
    assert lanes.tolist() == [[1, 64, 128, 192], [255, 1, 64, 128], [192, 255, 1, 64]]
    assert hashlib.sha256(contents).hexdigest() == GOLDEN_SHA256


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("changes", [{}, {"tied_head": False}, {"weights": "b1", "scale": 16}])
def test_a_master_is_packed_while_it_is_written(changes, head, tmp_path):
    master = tiny.master(tiny.config(**changes))
    native.write(master, tmp_path / "master.onebit", head=head)
    native.write(quantize(master, head=head), tmp_path / "packed.onebit")
    assert (tmp_path / "master.onebit").read_bytes() == (tmp_path / "packed.onebit").read_bytes()


def test_provenance_must_be_json(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        native.write(
            replace(quantize(tiny.master()), provenance={"loss": float("nan")}), tmp_path / "x.onebit"
        )
    assert not list(tmp_path.iterdir())

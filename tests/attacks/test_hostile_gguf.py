"""Hostile GGUF files: each is refused in one clear line, or is a model; none crashes. Kind: exact (the refusal)."""

import struct
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from onebit.checkpoint import Checkpoint, Stored, codes, rows
from onebit.formats import gguf, vocabulary
from onebit.formats.gguf import container
from onebit.formats.gguf.blocks import BLOCKS

MEMORY = 100_000_000
PLAIN = {"sub_norm": False, "activation": "silu", "n_layers": 1, "eos_tokens": ()}
SMALL = PLAIN | {
    "vocab_size": 16, "d_model": 16, "d_ff": 16, "d_head": 8, "n_heads": 2, "n_kv_heads": 1, "weights": "dense",
    "activations": "none",
}  # fmt: skip
TERNARY = PLAIN | {"vocab_size": 16, "d_model": 256, "d_ff": 256, "d_head": 64, "n_heads": 4, "n_kv_heads": 1}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """A small model of each kind."""
    path = tmp_path_factory.mktemp("valid") / "x.gguf"
    made = {}
    for kind in ("F32", "TQ2_0", "I2_S", "Q2_0_128", "Q1_0"):
        flags = (
            SMALL if kind == "F32" else TERNARY | ({"weights": "b1", "scale": 128} if kind == "Q1_0" else {})
        )
        gguf.write(tiny.master(tiny.config(**flags)), path, kind)
        made[kind] = path.read_bytes()
    return made


def use(path: Path) -> Checkpoint:
    """Read a file, and all that is in it."""
    checkpoint = gguf.read(path)
    for name, tensor in checkpoint.tensors.items():
        assert isinstance(tensor, Stored)
        rows(name, tensor)
        if tensor.codes:
            codes(name, tensor, checkpoint.config)
    return checkpoint


def refusal(path: Path) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(ValueError) as caught:
        use(path)
    return check(path, caught.value)


def check(path: Path, error: ValueError) -> str:
    message = str(error)
    assert "\n" not in message and message.isprintable() and message.isascii()
    assert len(message) < 500 + len(str(path)) and message.count(str(path)) <= 1
    return message


def start_of_data(contents: bytes, path: Path) -> int:
    path.write_bytes(contents)
    return min(place.begin for place in container.read(path).tensors.values())


def test_a_cut_file_is_refused(files, tmp_path):
    path, contents = tmp_path / "x.gguf", files["F32"]
    for n in [*range(0, len(contents), 7), len(contents) - 1]:
        path.write_bytes(contents[:n])
        assert str(path) in refusal(path)


@pytest.mark.parametrize("kind", ["F32", "TQ2_0"])
@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_a_changed_header_is_refused_or_a_model(kind, flip, files, tmp_path):
    path, contents = tmp_path / "x.gguf", bytearray(files[kind])
    end = start_of_data(files[kind], path)
    n_refused = 0
    tracemalloc.start()
    for i in range(end):
        contents[i] ^= flip
        path.write_bytes(contents)
        contents[i] ^= flip
        try:
            use(path)
        except ValueError as error:
            check(path, error)
            n_refused += 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert n_refused > end / 2 and peak < MEMORY


def key(name: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


def info(name: str, sizes: Iterable[int], number: int, offset: int) -> bytes:
    sizes = list(sizes)
    return (
        struct.pack("<Q", len(name)) + name.encode()
        + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, number, offset)
    )  # fmt: skip


def built(pairs: list[bytes], infos: list[bytes], data: bytes = b"", **counts: int) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", counts.get("version", 3), counts.get("tensors", len(infos)),
                                 counts.get("keys", len(pairs)))  # fmt: skip
    head += b"".join([*pairs, *infos])
    return head + bytes(-len(head) % 32) + data


STRING, ARRAY = 8, 9
HUGE = 2**63 - 1
CONTAINERS: list[tuple[bytes, str]] = [
    (b"", "0 bytes"),
    (b"GGUF" + bytes(4), "8 bytes"),
    (b"GGML" + bytes(60), "starts with b'GGML'"),
    (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    (built([], [], version=1), "version 1; onebit reads 2 and 3"),
    (built([], [], version=4), "version 4"),
    (built([], [], keys=HUGE), "claims 9223372036854775807 keys"),
    (built([], [], tensors=HUGE), "claims 9223372036854775807 tensors"),
    (built([key("a", STRING, struct.pack("<Q", HUGE))], []), "key 'a' claims"),
    (built([key("a", STRING, struct.pack("<Q", 500) + b"x")], []), "key 'a' takes 500 bytes"),
    (built([key("a", STRING, struct.pack("<Q", 2) + b"\xff\xfe")], []), "key 'a' is not UTF-8"),
    (built([struct.pack("<Q", 2**40) + bytes(32)], []), "a key claims"),
    (built([key("a", 13, b"")], []), "key 'a' has a value of type 13"),
    (built([key("a", 7, b"\x02")], []), "neither true nor false"),
    (built([key("a", ARRAY, struct.pack("<IQ", STRING, HUGE))], []), "texts in key 'a'"),
    (built([key("a", ARRAY, struct.pack("<IQ", 6, 2**61))], []), "key 'a' takes"),
    (built([key("a", ARRAY, struct.pack("<IQ", ARRAY, 1) * 50_000)], []), "an array of arrays"),
    (built([key("a", 4, bytes(4)), key("a", 4, bytes(4))], []), "key 'a' appears twice"),
    (built([key("general.alignment", 4, struct.pack("<I", 0))], []), "alignment is 0"),
    (built([key("general.alignment", 4, struct.pack("<I", 2**31))], []), "alignment is 2147483648"),
    (built([key("general.alignment", STRING, struct.pack("<Q", 0))], []), "alignment is ''"),
    (built([key("split.count", 2, struct.pack("<H", 3))], []), "one of 3 files of a split model"),
    (built([], [info("t", [4], 0, 0)] * 2, bytes(64)), "tensor 't' appears twice"),
    (built([], [info("t" * 65, [4], 0, 0)], bytes(64)), "name of a tensor claims 65 bytes"),
    (built([], [info("t", [], 0, 0)], bytes(64)), "tensor 't' has 0 dimensions"),
    (built([], [info("t", [1] * 5, 0, 0)], bytes(64)), "tensor 't' has 5 dimensions"),
    (built([], [info("t", [0], 0, 0)], bytes(64)), "tensor 't' has the sizes"),
    (built([], [info("t", [2**62, 2**62], 0, 0)], bytes(64)), "tensor 't' has the sizes"),
    (built([], [info("t", [2**40], 0, 0)], bytes(64)), "tensor 't' ends .* bytes after the file"),
    (built([], [info("t", [4], 0, 2**60)], bytes(64)), "tensor 't' leaves a hole before it"),
    (built([], [info("t", [4], 0, 0), info("u", [4], 0, 0)], bytes(64)), "tensor 'u' overlaps"),
    (built([], [info("t", [4], 0, 0), info("u", [4], 0, 16)], bytes(64)), "tensor 'u' overlaps"),
    (built([], [info("t", [4], 0, 0), info("u", [4], 0, 64)], bytes(128)), "tensor 'u' leaves a hole"),
    (built([], [info("t", [4], 0, 0)], bytes(96)), "64 bytes follow the last tensor"),
    (
        built([], [info("t", [40], 2, 0)], bytes(64)),
        "tensor 't' has 40 inputs; Q4_0 needs a multiple of 32",
    ),
    (built([], [info("t", [4], 999, 0)], bytes(64)), r"tensor 't' has type 999 \(unknown\)"),
    (built([], [info("t", [128, 4], 38, 0)], bytes(160)), r"tensor 't' has type 38 \(TL1"),
    (built([], [info("t", [256, 4], 39, 0)], bytes(160)), r"type 39 \(MXFP4, or in files of BitNet TL2"),
    (built([], [info("t", [256, 4], 16, 0)], bytes(264)), r"type 16 \(IQ2_XXS\)"),
    (
        built([], [info("t", [128, 4], 36, 0)], bytes(288)),
        "tensor 't' takes 288 bytes; I2_S of .* takes 160",
    ),
    (built([], []), "general.architecture is None"),
]


@pytest.mark.parametrize(("contents", "words"), CONTAINERS, ids=[words[:40] for _, words in CONTAINERS])
def test_a_hostile_container_is_refused(contents, words, tmp_path):
    import re

    path = tmp_path / "x.gguf"
    path.write_bytes(contents)
    tracemalloc.start()
    message = refusal(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert re.search(words, message), message
    assert peak < MEMORY


def test_strings_that_claim_to_be_many_are_read_once(tmp_path):
    path = tmp_path / "x.gguf"
    n = 300_000
    path.write_bytes(built([key("a", ARRAY, struct.pack("<IQ", STRING, n) + bytes(8 * n))], []))
    tracemalloc.start()
    assert "general.architecture" in refusal(path)
    assert tracemalloc.get_traced_memory()[1] < MEMORY
    tracemalloc.stop()


def edited(contents: bytes, path: Path, name: str, edit: Callable[[np.ndarray, Any], None]) -> None:
    """Write a file with the bytes of a tensor changed; a type of codes as blocks."""
    path.write_bytes(contents)
    place = container.read(path).tensors[name]
    data = np.frombuffer(contents, np.uint8).copy()
    part = data[place.begin : place.begin + place.n_bytes - place.block.tail]
    edit(part.reshape(-1, place.block.n_bytes), data[place.begin + place.n_bytes - place.block.tail :][:4])
    path.write_bytes(data.tobytes())


Q = "blk.0.attn_v.weight"
SCALES = {"TQ2_0": 64, "Q2_0_128": 0, "Q1_0": 0}


@pytest.mark.parametrize("kind", ["TQ2_0", "I2_S", "Q2_0_128"])
def test_the_code_3_is_refused(kind, files, tmp_path):
    path = tmp_path / "x.gguf"

    def edit(data: np.ndarray, tail: np.ndarray) -> None:
        data[1, 5] = 0xFF

    edited(files[kind], path, Q, edit)
    message = refusal(path)
    first = {"TQ2_0": 256 + 5, "I2_S": 128 + 5, "Q2_0_128": 128 + 12}[kind]
    assert f"tensor {Q}: weight {first} has the code 3" in message and str(path) in message


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0])
def test_an_impossible_scale_is_refused(kind, scale, files, tmp_path):
    path, at = tmp_path / "x.gguf", SCALES[kind]

    def edit(data: np.ndarray, tail: np.ndarray) -> None:
        data[2, at : at + 2] = np.array([scale], "<f2").view(np.uint8)

    edited(files[kind], path, Q, edit)
    assert f"tensor {Q}: block 2 has the scale {np.float32(scale)}" in refusal(path)


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0, 0.0])
def test_an_impossible_scale_of_i2_s_is_refused(scale, files, tmp_path):
    def edit(data: np.ndarray, tail: np.ndarray) -> None:
        tail[:] = np.array([scale], "<f4").view(np.uint8)

    edited(files["I2_S"], tmp_path / "x.gguf", Q, edit)
    assert f"tensor {Q}: the scale {np.float32(scale)} is no positive number" in refusal(tmp_path / "x.gguf")


def test_a_binary_block_without_a_scale_is_refused(files, tmp_path):
    def edit(data: np.ndarray, tail: np.ndarray) -> None:
        data[3, :2] = 0

    edited(files["Q1_0"], tmp_path / "x.gguf", Q, edit)
    assert f"tensor {Q}: block 3 has the scale 0.0" in refusal(tmp_path / "x.gguf")


def test_numbers_that_are_none_are_refused(files, tmp_path):
    def edit(data: np.ndarray, tail: np.ndarray) -> None:
        data[7] = np.array([np.nan], "<f4").view(np.uint8)

    edited(files["F32"], tmp_path / "x.gguf", "token_embd.weight", edit)
    assert "embed.weight holds NaN or infinity" in refusal(tmp_path / "x.gguf")


def rewritten(contents: bytes, path: Path, **keys: Any) -> None:
    """Write a file with other keys."""
    path.write_bytes(contents)
    header = container.read(path)
    specs = {name: (place.shape, place.block) for name, place in header.tensors.items()}
    chunks = [
        (name, contents[place.begin : place.begin + place.n_bytes]) for name, place in header.tensors.items()
    ]
    container.write(path, header.metadata | keys, specs, iter(chunks))


def test_a_vocabulary_of_another_size_is_refused(files, tmp_path):
    words = vocabulary.to_gguf(tiny.tokenizer_json(320), 320, None, (0,), None)
    rewritten(files["F32"], tmp_path / "x.gguf", **words)
    assert "the vocabulary has 320 tokens; the embedding has 16 rows" in refusal(tmp_path / "x.gguf")


@pytest.mark.parametrize("value", ["x", True, 0, -1.5, float("nan"), ["a", "b"], np.zeros(3, np.float32), []])
def test_keys_of_another_kind_are_refused(value, files, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(files["F32"])
    metadata = container.read(path).metadata
    ours = [key for key in metadata if key.startswith(("llama.", "general.arch", "onebit."))]
    for key in [*ours, "llama.hidden_activation", "llama.rope.scaling.type", "llama.rope.scaling.factor",
                "tokenizer.ggml.model", "tokenizer.ggml.tokens", "general.name", "split.count"]:  # fmt: skip
        rewritten(files["F32"], path, **{key: value})
        try:
            use(path)
        except ValueError as error:
            message = check(path, error)
            assert key in message or "rope_scaling: " in message


def test_q2_0_of_either_kind_is_told_by_its_size(files, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(files["Q2_0_128"])
    assert container.read(path).tensors[Q].block == BLOCKS["Q2_0_128"]
    gguf.write(gguf.read(path), path, "Q2_0")
    assert container.read(path).tensors[Q].block == BLOCKS["Q2_0"]
    assert gguf.read(path).tensors["layers.0.v.weight"].codes

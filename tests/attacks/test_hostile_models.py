"""Hostile model files: each is refused in one clear line, and none crashes. Kind: exact (the refusal, by its words).

Every file is a valid one with one thing wrong, built here. Where the header is changed its digest is made right
again, so that the check behind it is reached: an attacker can count too.
"""

import hashlib
import json
import os
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from onebit import formats
from onebit.checkpoint import Checkpoint, quantize
from onebit.formats import native
from onebit.formats import tensors as container
from onebit.packing import PackedTensor

Header = dict[str, Any]

Q = "layers.0.q.weight"
SCALE = "layers.0.q.scale"
NORM = "norm.weight"


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("valid") / "x.onebit"
    native.write(quantize(tiny.master(tiny.config(n_layers=1), chat_template="{{ x }}")), path)
    return path.read_bytes()


def split(contents: bytes) -> tuple[Header, bytes]:
    end = 8 + int.from_bytes(contents[:8], "little")
    return json.loads(contents[8:end]), contents[end:]


def join(header: Header | bytes, data: bytes, align: int = 64) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % align)
    return len(text).to_bytes(8, "little") + text + data


def sign(header: Header) -> Header:
    metadata = {field: text for field, text in header["__metadata__"].items() if field != "digest"}
    text = json.dumps(header | {"__metadata__": metadata}, sort_keys=True, separators=(",", ":"))
    return header | {"__metadata__": metadata | {"digest": hashlib.sha256(text.encode()).hexdigest()}}


def refusal(path: Path, reader: Callable[[Path], Any] = formats.read) -> str:
    """The one line with which a file is refused."""
    with pytest.raises((ValueError, OSError)) as caught:
        reader(path)
    message = str(caught.value)
    assert "\n" not in message and message.isprintable() and len(message) < 400 + len(str(path))
    assert str(path) in message
    return message


def edited(edit: Callable[[Header, bytearray], Any]) -> Callable[[bytes], bytes]:
    """The valid file with its header or data changed and the header signed again."""

    def build(contents: bytes) -> bytes:
        header, data = split(contents)
        data = bytearray(data)
        edit(header, data)
        return join(sign(header), bytes(data))

    return build


def metadata(field: str, value: Any) -> Callable[[bytes], bytes]:
    return edited(lambda header, data: header["__metadata__"].update({field: value}))


def config(**changes: Any) -> Callable[[bytes], bytes]:
    def edit(header: Header, data: bytearray) -> None:
        values = json.loads(header["__metadata__"]["config"]) | changes
        header["__metadata__"]["config"] = json.dumps(values)

    return edited(edit)


def encoding(name: str, **changes: Any) -> Callable[[bytes], bytes]:
    def edit(header: Header, data: bytearray) -> None:
        encodings = json.loads(header["__metadata__"]["encodings"])
        encodings[name] = encodings.get(name, {}) | changes
        header["__metadata__"]["encodings"] = json.dumps(encodings)

    return edited(edit)


def entry(name: str, **changes: Any) -> Callable[[bytes], bytes]:
    return edited(lambda header, data: header[name].update(changes))


def floats(name: str, value: float) -> Callable[[bytes], bytes]:
    def edit(header: Header, data: bytearray) -> None:
        begin = header[name]["data_offsets"][0]
        data[begin : begin + 4] = struct.pack("<f", value)

    return edited(edit)


def removed(name: str) -> Callable[[bytes], bytes]:
    """Without one tensor, and without the hole that it would leave."""

    def edit(header: Header, data: bytearray) -> None:
        begin, end = header.pop(name)["data_offsets"]
        del data[begin:end]
        for other, values in header.items():
            if other != "__metadata__" and values["data_offsets"][0] >= end:
                values["data_offsets"] = [offset - (end - begin) for offset in values["data_offsets"]]

    return edited(edit)


def appended(name: str, dtype: str, shape: list[int], n_bytes: int) -> Callable[[bytes], bytes]:
    def edit(header: Header, data: bytearray) -> None:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + n_bytes]}
        data.extend(bytes(n_bytes))

    return edited(edit)


def swapped(header: Header, data: bytearray) -> None:
    """Norms before the packed data, 4 bytes at the front: packed tensors leave their 64-byte boundaries."""
    size = 4
    begin, _ = header[SCALE]["data_offsets"]
    scale = bytes(data[begin : begin + size])
    del data[begin : begin + size]
    data[:0] = scale
    for name, values in header.items():
        if name != "__metadata__" and values["data_offsets"][0] < begin:
            values["data_offsets"] = [offset + size for offset in values["data_offsets"]]
    header[SCALE]["data_offsets"] = [0, size]


def raw_header(text: bytes) -> Callable[[bytes], bytes]:
    return lambda contents: join(text, split(contents)[1])


def plain_safetensors(contents: bytes) -> bytes:
    header, data = split(contents)
    del header["__metadata__"]
    return join(header, data)


def misaligned(contents: bytes) -> bytes:
    header, data = split(contents)
    text = json.dumps(sign(header)).encode()
    text += b" " * (-(8 + len(text)) % 64 + 4)
    return len(text).to_bytes(8, "little") + text + data


def unsigned(contents: bytes) -> bytes:
    header, data = split(contents)
    header["__metadata__"]["label"] = "W1A1KV1"
    return join(header, data)


HOSTILE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    # The first bytes.
    "empty": (lambda c: b"", "has 0 bytes"),
    "seven bytes": (lambda c: c[:7], "has 7 bytes"),
    "length alone": (lambda c: c[:8], "header claims"),
    "header of 2^63 bytes": (
        lambda c: (2**63).to_bytes(8, "little") + c[8:],
        "header claims 9223372036854775808",
    ),
    "header of 2^64 - 1 bytes": (lambda c: b"\xff" * 8 + c[8:], "header claims"),
    "header larger than the file": (
        lambda c: len(c).to_bytes(8, "little") + c[8:],
        "truncated or is no .onebit",
    ),
    "header of no bytes": (lambda c: bytes(8) + c[8:], "not valid JSON"),
    "gguf": (lambda c: b"GGUF\x03\x00\x00\x00" + c, "this is a GGUF file|it is cut or damaged"),
    "zip": (lambda c: b"PK\x03\x04\x14\x00\x00\x00" + c, "a zip archive, perhaps a PyTorch checkpoint"),
    "pickle": (lambda c: b"\x80\x02}q\x00X\x04\x00" + c, "a Python pickle"),
    "hdf5": (lambda c: b"\x89HDF\r\n\x1a\n" + c, "an HDF5 file"),
    "gzip": (lambda c: b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\x03" + c, "a gzip file"),
    "json": (lambda c: b'{"model_type": "llama"}', "a JSON file"),
    "text": (lambda c: b"Once upon a time", "header claims"),
    "zeros": (lambda c: bytes(4096), "not valid JSON"),
    # The header as JSON.
    "header not UTF-8": (raw_header(b'{"\xff": 1}'), "not UTF-8 at byte 2"),
    "header not JSON": (raw_header(b"{]"), "not valid JSON"),
    "header a list": (raw_header(b"[]"), "not a JSON object"),
    "header a number": (raw_header(b"7"), "not a JSON object"),
    "header with a key twice": (raw_header(b'{"a": 1, "a": 1}'), "'a' appears twice"),
    "header with NaN": (raw_header(b'{"a": NaN}'), "NaN is no JSON number"),
    "header nested deeply": (
        raw_header(b'{"a":' + b"[" * 99999 + b"]" * 99999 + b"}"),
        "nested too deeply|format",
    ),
    "header with a long number": (raw_header(b'{"a": ' + b"1" * 9999 + b"}"), "not valid JSON"),
    "header truncated": (lambda c: c[:8] + c[8:60], "header claims"),
    "metadata not a table": (raw_header(b'{"__metadata__": [1]}'), "not a table of texts"),
    "metadata with a number": (raw_header(b'{"__metadata__": {"format": 1}}'), "not a table of texts"),
    # What the header says of itself.
    "plain safetensors": (plain_safetensors, "a safetensors file, but not a .onebit file"),
    "safetensors of others": (metadata("format", "pt"), "format field is 'pt'"),
    "newer version": (
        metadata("version", "2"),
        "format version 2; this onebit reads version 1: update onebit",
    ),
    "older version": (metadata("version", "0"), "format version 0; .*convert the model again"),
    "version a word": (metadata("version", "one"), "format version is 'one'"),
    "version negative": (metadata("version", "-1"), "format version is '-1'"),
    "version in other digits": (metadata("version", "\u0661"), "format version is"),
    "version of 5000 digits": (metadata("version", "9" * 5000), "format version is '999"),
    "no version": (edited(lambda h, d: h["__metadata__"].pop("version")), "format version is ''"),
    "no config": (edited(lambda h, d: h["__metadata__"].pop("config")), "lacks the field 'config'"),
    "no hashes": (edited(lambda h, d: h["__metadata__"].pop("sha256")), "lacks the field 'sha256'"),
    "digest wrong": (unsigned, "does not match its digest"),
    "digest of another kind": (
        lambda c: join(
            split(c)[0] | {"__metadata__": split(c)[0]["__metadata__"] | {"digest": "0"}}, split(c)[1]
        ),
        "does not match its digest",
    ),
    # The config.
    "config not JSON": (metadata("config", "{"), "config is not valid JSON"),
    "config a list": (metadata("config", "[]"), "config is not a JSON object"),
    "config with a lone surrogate": (metadata("config", '{"\ud800": 1}'), "unknown field"),
    "config empty": (metadata("config", "{}"), "config: .* missing"),
    "config huge": (metadata("config", '{"' + "x" * 70000 + '": 1}'), "longer than 65536 characters"),
    "config with an unknown field": (config(d_modle=3), "did you mean d_model"),
    "config negative": (config(d_model=-48), "d_model is -48"),
    "config of a fraction": (config(n_heads=1.5), "n_heads is 1.5"),
    "config with infinity": (config(rope_theta=1e300), "rope_theta is 1e"),
    "config of 2^24 layers": (config(n_layers=2**24 - 1), "claims 16777215 layers"),
    "config of more layers": (config(n_layers=2), "layers.1.* is missing"),
    "config of another width": (config(d_ff=96), "sub_norm.weight is float32|is described as"),
    "config of a dense model": (
        config(weights="dense", activations="none"),
        "has encoding 't80'; expected bf16",
    ),
    "config of a binary model": (config(weights="b1"), "has encoding 't80'; expected b128"),
    "config with other groups": (config(scale="row"), "is described as"),
    "config with a head": (config(tied_head=False), "head.weight has encoding None"),
    # Encodings and texts.
    "encodings not JSON": (metadata("encodings", "?"), "encodings is not valid JSON"),
    "encoding unknown": (encoding(Q, encoding="t81"), "has encoding 't81'; this onebit reads t80, r64"),
    "encoding not a text": (encoding(Q, encoding=["t80"]), "has encoding"),
    "encoding of another layout": (
        encoding("layers.0.gate.weight", encoding="r64"),
        r"is uint8 \[1, 12, 64\]; expected uint8 \[2, 12, 64\]",
    ),
    "encoding of the embedding": (
        encoding("embed.weight", encoding="t80", scale="tensor"),
        "embed.weight is uint8",
    ),
    "scale of a coded embedding": (encoding("embed.weight", encoding="t80"), "embed.weight is described as"),
    "encoding of a norm": (encoding(NORM, encoding="q8"), "norm.weight' is not part"),
    "encoding of nothing": (encoding("evil\n", encoding="q8"), r"evil\\n' is not part"),
    "encoding with another shape": (encoding(Q, shape=[48, 64]), "is described as"),
    "encoding with another scale": (encoding(Q, scale="row"), "is described as"),
    "provenance a list": (metadata("provenance", "[]"), "provenance is not a JSON object"),
    "template not UTF-8": (
        edited(lambda h, d: d.__setitem__(slice(len(d) - 3, None), b"\xff\xff\xff")),
        "chat_template.jinja is not UTF-8",
    ),
    # Entries and offsets.
    "entry a list": (
        edited(lambda h, d: h.update({Q: [1]})),
        "expected exactly dtype, shape and data_offsets",
    ),
    "entry with more": (entry(Q, extra=1), "expected exactly dtype"),
    "dtype unknown": (entry(Q, dtype="F8"), "has dtype 'F8'; expected F32 or U8"),
    "dtype a list": (entry(Q, dtype=["U8"]), "has dtype"),
    "dtype another": (entry(Q, dtype="F32", shape=[1, 3, 64]), "is float32"),
    "shape negative": (entry(Q, shape=[-1, 12, -64]), "has shape"),
    "shape of fractions": (entry(Q, shape=[1.0, 12, 64]), "has shape"),
    "shape of truths": (entry(Q, shape=[True, 12, 64]), "has shape"),
    "shape a text": (entry(Q, shape="1"), "has shape"),
    "shape that overflows": (entry(Q, shape=[2**62, 2**62, 2**62]), "spans 768 bytes"),
    "shape that wraps to right": (entry(Q, shape=[2**32, 2**32, 768]), "spans 768 bytes"),
    "shape of 2^70": (entry(Q, shape=[2**70]), "has shape"),
    "shape of 1000 dimensions": (entry(Q, shape=[1] * 999 + [768]), "has shape"),
    "shape another": (entry(Q, shape=[12, 64]), r"is uint8 \[12, 64\]"),
    "shape too small": (entry(Q, shape=[1, 11, 64]), "spans 768 bytes; .* needs 704"),
    "offsets negative": (entry(Q, data_offsets=[-768, 0]), "has data_offsets"),
    "offsets reversed": (entry(Q, data_offsets=[768, 0]), "spans -768 bytes"),
    "offsets of three": (entry(Q, data_offsets=[0, 768, 768]), "has data_offsets"),
    "offsets of texts": (entry(Q, data_offsets=["0", "768"]), "has data_offsets"),
    "offsets overlap": (entry(Q, data_offsets=[0, 768]), "overlaps|leaves a hole"),
    "offsets past the end": (entry(Q, data_offsets=[2**40, 2**40 + 768]), "leaves a hole"),
    "offsets of 2^63": (entry(Q, data_offsets=[2**63, 2**63 + 768]), "has data_offsets"),
    "hole": (edited(lambda h, d: h.pop(SCALE)), "leaves a hole before it"),
    "data truncated": (lambda c: c[:-1], "the file is truncated"),
    "data missing": (lambda c: join(*[split(c)[0], b""]), "the file is truncated"),
    "data too long": (lambda c: c + b"\0", "1 bytes follow the last tensor"),
    "data not aligned": (misaligned, "does not start at a multiple of 64"),
    "packed tensor not aligned": (edited(swapped), "embed.weight is not aligned"),
    # Tensors.
    "matrix missing": (removed(Q), f"{Q} is missing"),
    "scale missing": (removed(SCALE), f"{SCALE} is missing"),
    "norm missing": (removed(NORM), f"{NORM} is missing"),
    "tensor too many": (appended("evil\u202e\n", "U8", [3], 3), r"'evil\\u202e\\n' is not part"),
    "tensor without a name": (appended("", "U8", [0], 0), "'' is not part"),
    "tokenizer of floats": (entry("tokenizer.json", dtype="F32"), "needs|is float32"),
    "scale NaN": (floats(SCALE, float("nan")), f"{Q}: a scale is not a positive finite number"),
    "scale infinite": (floats(SCALE, float("inf")), "not a positive finite number"),
    "scale negative": (floats(SCALE, -1.0), "not a positive finite number"),
    "scale zero": (floats(SCALE, 0.0), "not a positive finite number"),
    "embedding scale NaN": (floats("embed.scale", float("nan")), "embed.weight: a scale is not"),
    "norm NaN": (floats(NORM, float("nan")), f"{NORM} holds NaN or infinity"),
    "norm infinite": (floats(NORM, float("-inf")), f"{NORM} holds NaN or infinity"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_refused_in_one_line(name, valid, tmp_path):
    build, message = HOSTILE[name]
    contents = build(valid)
    assert contents != valid
    path = tmp_path / "x.onebit"
    path.write_bytes(contents)
    for reader in (formats.read, native.verify):
        assert re.search(message, refusal(path, reader))
    with pytest.raises((ValueError, OSError)):
        formats.convert(path, tmp_path / "y.onebit", "r64")
    assert [file.name for file in tmp_path.iterdir()] == ["x.onebit"]


KINDS = {
    "q8": lambda weights: quantize(tiny.master(tiny.config(tied_head=False, weights=weights))),
    "bf16": lambda weights: quantize(tiny.master(tiny.config(tied_head=False, weights=weights)), head="bf16"),
    "codes": lambda weights: tiny.coded(tiny.master(tiny.config(tied_head=False, weights=weights))),
}
CASES = [(embed, head, "b1.58", "b1.58") for embed in KINDS for head in KINDS]
CASES += [("codes", "codes", "b1.58", "b1"), ("codes", "codes", "b1", "b1.58")]


@pytest.mark.parametrize(("embed", "head", "rows", "layers"), CASES)
def test_embedding_and_head_are_of_one_kind(embed, head, rows, layers, tmp_path):
    """A file with layers and head of one model and the embedding of another, as no writer of ours makes it."""
    model, other = KINDS[head](layers), KINDS[embed](rows)
    tensors = model.tensors | {"embed.weight": other.tensors["embed.weight"]}
    native.write(model, tmp_path / "model")
    native.write(other, tmp_path / "other")
    (metadata, stored), (donor, given) = (native._open(tmp_path / name) for name in ("model", "other"))
    metadata, donor = metadata["__metadata__"], donor["__metadata__"]
    names = ("embed.weight", "embed.scale")
    stored = {name: given[name] if name in names else stored[name] for name in stored}
    for field in ("encodings", "sha256"):
        ours, theirs = json.loads(metadata[field]), json.loads(donor[field])
        metadata[field] = json.dumps(ours | {name: theirs[name] for name in names if name in ours})
    specs = {name: container.entry_of(tensor) for name, tensor in stored.items()}
    metadata["digest"] = native._digest({"__metadata__": metadata} | container.entries(specs))
    container.write(tmp_path / "x.onebit", metadata, stored)
    if (embed, rows) == (head, layers):
        native.verify(tmp_path / "x.onebit")
        return
    message = r"embed.weight has encoding '\w+'; expected (t80 or r64|\w+), because the head is \w+"
    assert re.search(message, refusal(tmp_path / "x.onebit"))
    with pytest.raises(ValueError, match=message):
        Checkpoint(model.config, tensors)


def test_the_builder_keeps_a_valid_file_valid(valid, tmp_path):
    (tmp_path / "x.onebit").write_bytes(edited(lambda header, data: None)(valid))
    native.verify(tmp_path / "x.onebit")


def test_every_truncation_is_refused(valid, tmp_path):
    path = tmp_path / "x.onebit"
    sizes = random.Random(0).sample(range(len(valid)), 150)
    for size in [*range(16), *sizes, len(valid) - 1]:
        path.write_bytes(valid[:size])
        refusal(path)


def same(a: Checkpoint, b: Checkpoint) -> bool:
    def arrays(tensor: Any) -> list[np.ndarray]:
        return [tensor.data, tensor.scale] if isinstance(tensor, PackedTensor) else [tensor]

    return (a.config, a.tokenizer, a.chat_template, a.provenance) == (
        b.config,
        b.tokenizer,
        b.chat_template,
        b.provenance,
    ) and all(
        np.array_equal(x, y)
        for name, tensor in a.tensors.items()
        for x, y in zip(arrays(tensor), arrays(b.tensors[name]), strict=True)
    )


@pytest.mark.parametrize("part", ["header", "data"])
def test_flipped_bits_never_pass(part, valid, tmp_path):
    """A header is checked on reading, data on verifying; what passes holds what was written."""
    path = tmp_path / "x.onebit"
    path.write_bytes(valid)
    original = formats.read(path)
    end = 8 + int.from_bytes(valid[:8], "little")
    rng = random.Random(0)
    damaged = tmp_path / "damaged.onebit"
    for _ in range(400):
        position = rng.randrange(end) if part == "header" else rng.randrange(end, len(valid))
        contents = bytearray(valid)
        contents[position] ^= 1 << rng.randrange(8)
        damaged.write_bytes(contents)
        try:
            (formats.read if part == "header" else native.verify)(damaged)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error) and str(damaged) in str(error)
        else:
            assert part == "header" and same(formats.read(damaged), original)


def test_damaged_data_is_named_by_verify(valid, tmp_path):
    header, data = split(valid)
    contents = bytearray(data)
    contents[header[Q]["data_offsets"][0]] ^= 1
    path = tmp_path / "x.onebit"
    path.write_bytes(join(header, bytes(contents)))
    formats.read(path)
    assert f"the bytes of {Q} fail their sha256" in refusal(path, native.verify)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "neither a file nor a folder" in refusal(tmp_path / "pipe")


def test_a_loop_of_links_is_refused(tmp_path):
    (tmp_path / "x.onebit").symlink_to(tmp_path / "x.onebit")
    refusal(tmp_path / "x.onebit")


def bf16(contents: bytes) -> bytes:
    header, data = split(contents)
    header[NORM]["dtype"] = "BF16"
    return join(header, data)


def half_a_master(contents: bytes) -> bytes:
    header, data = split(contents)
    for name, values in header.items():
        if name != "__metadata__":
            values["dtype"], values["shape"] = "U8", [values["data_offsets"][1] - values["data_offsets"][0]]
    return join(header, data)


RUN_FILES: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "config not JSON": ("config.json", lambda c: c[:-3], "config is not valid JSON"),
    "config not UTF-8": ("config.json", lambda c: b"\xff" + c, "not UTF-8"),
    "config huge": ("config.json", lambda c: b" " * 70000 + c, "larger than 65536 bytes"),
    "config of 2^24 layers": (
        "config.json",
        lambda c: json.dumps(json.loads(c) | {"n_layers": 2**24 - 1}).encode(),
        "claims 16777215 layers",
    ),
    "config of another model": (
        "config.json",
        lambda c: json.dumps(json.loads(c) | {"tied_head": False}).encode(),
        "head.weight is missing",
    ),
    "weights empty": ("model.safetensors", lambda c: b"", "has 0 bytes"),
    "weights truncated": ("model.safetensors", lambda c: c[:-1], "the file is truncated"),
    "weights a pickle": (
        "model.safetensors",
        lambda c: b"\x80\x04\x95\x00\x01\x00\x00\x00" + c,
        "a Python pickle",
    ),
    "weights in bfloat16": ("model.safetensors", bf16, "has dtype 'BF16'; expected F32"),
    "weights in bytes": ("model.safetensors", half_a_master, "a run folder holds float32"),
    "weights NaN": ("model.safetensors", lambda c: c[:-4] + struct.pack("<f", float("nan")), "holds NaN"),
    "recipe not JSON": ("recipe.json", lambda c: b"steps: 10", "recipe is not valid JSON"),
    "template not UTF-8": ("chat_template.jinja", lambda c: b"\xff", "can't decode"),
}


@pytest.mark.parametrize("name", RUN_FILES)
def test_hostile_run_folder_is_refused_in_one_line(name, tmp_path):
    file, build, message = RUN_FILES[name]
    master = tiny.master(tiny.config(n_layers=1), chat_template="{{ x }}")
    formats.run.write(
        Checkpoint(master.config, master.tensors, master.tokenizer, master.chat_template), tmp_path / "run"
    )
    path = tmp_path / "run" / file
    path.write_bytes(build(path.read_bytes() if path.exists() else b""))
    assert re.search(message, refusal(tmp_path / "run"))

"""The .onebit file: one valid safetensors file, memory-mapped and used in place.

    write(quantize(master), "stories.onebit")
    checkpoint = read("stories.onebit")         # tensors are read-only views of the mapped file
    verify("stories.onebit")                    # hashes every byte of data

docs/format.md specifies it.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onebit import __version__
from onebit.checkpoint import (
    LINEAR_ENCODINGS,
    Checkpoint,
    Plan,
    Tensor,
    check_tensor,
    granularity,
    head_name,
    label,
    packed_tensors,
    plan,
    scale_name,
    scale_shape,
    tensor_shapes,
)
from onebit.config import ModelConfig
from onebit.formats import tensors as container
from onebit.formats.files import new_file
from onebit.formats.tensors import Array, Json, named, shorten
from onebit.packing import TILE_ROWS, PackedTensor, packed_shape

FORMAT = "onebit"
VERSION = 1
# Of linear layers.
ENCODINGS = tuple(encoding for encodings in LINEAR_ENCODINGS.values() for encoding in encodings)

_TOKENIZER = "tokenizer.json"
_CHAT_TEMPLATE = "chat_template.jinja"
_MAX_CONFIG_LENGTH = 65536
_NO_HASH = "0" * 64
_FIELDS = ("version", "onebit_version", "label", "config", "encodings", "provenance", "sha256", "digest")


def write(
    checkpoint: Checkpoint, path: str | os.PathLike[str], encoding: str | None = None, head: str | None = None
) -> None:
    """Write a model as a .onebit file, whole or not at all, one tensor after the other.

    Args:
        checkpoint: any; `onebit.checkpoint.quantize` says how it is packed.
        path: the file to make or to replace.
        encoding: layout of the linear layers; see `quantize`.
        head: how the head is kept; see `quantize`.

    Raises:
        ValueError: an encoding or head that does not fit, or a damaged source.
        OSError: the folder is missing, the disk is full, ...
    """
    planned = plan(checkpoint, encoding, head)
    shapes = tensor_shapes(planned.config, planned.head)
    template = checkpoint.chat_template
    blobs = {
        name: np.frombuffer(text, np.uint8)
        for name, text in (
            (_TOKENIZER, checkpoint.tokenizer),
            (_CHAT_TEMPLATE, None if template is None else template.encode("utf-8")),
        )
        if text is not None
    }
    stored = _stored_entries(planned, shapes) | {
        name: container.entry_of(blob) for name, blob in blobs.items()
    }
    entries = container.entries(stored)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "onebit_version": __version__,
        "label": label(planned.config, planned.head),
        "config": _canonical_json(planned.config.to_dict()),
        "encodings": _canonical_json(
            {
                name: _encoding_entry(name, planned.encodings[name], (shape[0], shape[1]), planned.config)
                for name, shape in shapes.items()
                if name in planned.encodings
            }
        ),
        "provenance": _canonical_json(checkpoint.provenance),
        # Hashes all have one length, so the header keeps its length when the right ones are put in.
        "sha256": _canonical_json(dict.fromkeys(stored, _NO_HASH)),
        "digest": _NO_HASH,
    }
    start = len(container.header_bytes({"__metadata__": metadata} | entries))
    hashes: dict[str, str] = {}
    with new_file(Path(path)) as file:

        def put(name: str, tensor: Array) -> None:
            if container.entry_of(tensor) != stored[name]:
                raise ValueError(
                    f"tensor {name} is {tensor.dtype} {list(tensor.shape)}; planned was {stored[name]}"
                )
            file.seek(start + entries[name]["data_offsets"][0])
            file.write(container.raw(tensor))
            hashes[name] = _sha256(tensor)

        for name, tensor in packed_tensors(checkpoint, planned):
            check_tensor(name, tensor, shapes[name], planned.config, planned.head)
            if isinstance(tensor, PackedTensor):
                put(name, tensor.data)
                put(scale_name(name), tensor.scale)
            else:
                put(name, tensor)
        for name, blob in blobs.items():
            put(name, blob)
        metadata["sha256"] = _canonical_json(hashes)
        metadata["digest"] = _digest({"__metadata__": metadata} | entries)
        file.seek(0)
        file.write(container.header_bytes({"__metadata__": metadata} | entries))


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a .onebit file. Its tensors are views of the mapped file; nothing is copied or repacked.

    The header, all shapes, norms and scales are checked; the packed bytes are not read (see `verify`).

    Raises:
        ValueError: not a .onebit file, another version, or a damaged one; the message says which and where.
        OSError: the file cannot be opened.
    """
    with named(Path(path)):
        header, tensors = _open(Path(path))
        return _checkpoint(header["__metadata__"], tensors)


def verify(path: str | os.PathLike[str]) -> None:
    """Check every byte of a .onebit file against the hashes in its header.

    Raises:
        ValueError: see `read`, or tensors that differ from what was written, named.
        OSError: the file cannot be opened.
    """
    read(path)
    with named(Path(path)):
        header, tensors = _open(Path(path))
        expected = container.parse_json(header["__metadata__"]["sha256"], "sha256")
        damaged = [name for name, tensor in tensors.items() if expected.get(name) != _sha256(tensor)]
        if damaged:
            raise ValueError(f"the bytes of {', '.join(damaged)} fail their sha256; fetch the file again")


def _open(path: Path) -> tuple[Json, dict[str, Array]]:
    """Map a file and check that it is ours, of this version, with an intact header."""
    header, data = container.split_header(container.map_file(path))
    metadata = header["__metadata__"]
    if metadata.get("format") != FORMAT:
        raise ValueError(
            "this is a safetensors file, but not a .onebit file: its format field is "
            f"{shorten(metadata.get('format'))}, not 'onebit'"
        )
    _check_version(metadata.get("version", ""))
    for field in _FIELDS:
        if field not in metadata:
            raise ValueError(f"the header lacks the field {field!r}; the file is damaged")
    if metadata["digest"] != _digest(header):
        raise ValueError("the header does not match its digest; the file is damaged, fetch it again")
    tensors = container.views(header, data)
    if data.size and data.ctypes.data % container.ALIGN:
        raise ValueError("the data does not start at a multiple of 64 bytes; write the file again")
    return header, tensors


def _check_version(text: str) -> None:
    # isascii and the length: int() also takes other digits, and refuses very long numbers in its own words.
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ValueError(f"the format version is {shorten(text)}; expected a number, the file is damaged")
    if int(text) > VERSION:
        raise ValueError(f"format version {text}; this onebit reads version {VERSION}: update onebit")
    if int(text) < VERSION:
        raise ValueError(
            f"format version {text}; this onebit reads version {VERSION}: convert the model again"
        )


def _checkpoint(metadata: dict[str, str], stored: dict[str, Array]) -> Checkpoint:
    if len(metadata["config"]) > _MAX_CONFIG_LENGTH:
        raise ValueError(f"the config is longer than {_MAX_CONFIG_LENGTH} characters; the file is damaged")
    config = ModelConfig.from_dict(container.parse_json(metadata["config"], "config"))
    encodings = container.parse_json(metadata["encodings"], "encodings")
    provenance = container.parse_json(metadata["provenance"], "provenance")
    hashes = container.parse_json(metadata["sha256"], "sha256")
    # Before the names of all layers are listed: a hostile config may claim millions.
    if config.n_layers > len(stored):
        raise ValueError(f"the config claims {config.n_layers} layers; the file has {len(stored)} tensors")
    left = dict(stored)
    tensors: dict[str, Tensor] = {}
    entry = encodings.get(head_name(config))
    head = entry.get("encoding") if isinstance(entry, dict) else None
    for name, shape in tensor_shapes(config, head).items():
        if len(shape) == 2 and name.endswith(".weight"):
            tensors[name] = _take_packed(name, (shape[0], shape[1]), config, encodings, left)
        else:
            tensors[name] = _take(name, "<f4", shape, left)
    tokenizer = _take_bytes(_TOKENIZER, left)
    chat_template = _take_bytes(_CHAT_TEMPLATE, left)
    if left or encodings:
        extra = shorten(next(iter(left or encodings)))
        raise ValueError(f"tensor {extra} is not part of the model that the config describes")
    try:
        template = None if chat_template is None else chat_template.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{_CHAT_TEMPLATE} is not UTF-8; the file is damaged") from None
    return Checkpoint(config, tensors, tokenizer, template, provenance, hashes)


def _take_packed(
    name: str, shape: tuple[int, int], config: ModelConfig, encodings: Json, left: dict[str, Array]
) -> PackedTensor:
    """Take a packed matrix and its scale out of the stored tensors."""
    entry = encodings.pop(name, None)
    encoding = entry.get("encoding") if isinstance(entry, dict) else None
    if not isinstance(encoding, str) or encoding not in TILE_ROWS:
        known = ", ".join(TILE_ROWS)
        raise ValueError(f"tensor {name} has encoding {shorten(encoding)}; this onebit reads {known}")
    expected = _encoding_entry(name, encoding, shape, config)
    if entry != expected:
        raise ValueError(f"tensor {name} is described as {shorten(entry)}; expected {shorten(expected)}")
    data = _take(name, "u1", packed_shape(encoding, shape), left)
    scale = _take(scale_name(name), "<f4", scale_shape(shape, granularity(name, config, encoding)), left)
    return PackedTensor(encoding, shape, data, scale)


def _take(name: str, dtype: str, shape: tuple[int, ...], left: dict[str, Array]) -> npt.NDArray[Any]:
    tensor = left.pop(name, None)
    if tensor is None:
        raise ValueError(f"tensor {name} is missing; the file is damaged")
    if tensor.dtype != np.dtype(dtype) or tensor.shape != shape:
        expected = f"{np.dtype(dtype)} {list(shape)}"
        raise ValueError(f"tensor {name} is {tensor.dtype} {list(tensor.shape)}; expected {expected}")
    if tensor.ctypes.data % (container.ALIGN if dtype == "u1" else 4):
        raise ValueError(f"tensor {name} is not aligned in the file; write the file again")
    return tensor


def _take_bytes(name: str, left: dict[str, Array]) -> bytes | None:
    tensor = left.pop(name, None)
    if tensor is None:
        return None
    if tensor.dtype != np.uint8 or tensor.ndim != 1:
        raise ValueError(f"tensor {name} is {tensor.dtype} {list(tensor.shape)}; expected uint8 [bytes]")
    return tensor.tobytes()


def _stored_entries(
    planned: Plan, shapes: dict[str, tuple[int, ...]]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of all tensors in file order: packed data, whose sizes are multiples of 64, then float32."""
    packed: dict[str, tuple[str, tuple[int, ...]]] = {}
    floats: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if encoding := planned.encodings.get(name):
            n, k = shape
            packed[name] = "U8", packed_shape(encoding, (n, k))
            kind = granularity(name, planned.config, encoding)
            floats[scale_name(name)] = "F32", scale_shape((n, k), kind)
        else:
            floats[name] = "F32", shape
    return packed | floats


def _encoding_entry(name: str, encoding: str, shape: tuple[int, int], config: ModelConfig) -> Json:
    return {"encoding": encoding, "shape": list(shape), "scale": granularity(name, config, encoding)}


def _digest(header: Json) -> str:
    """sha256 of the header as canonical JSON, the digest itself left out."""
    metadata = {field: text for field, text in header["__metadata__"].items() if field != "digest"}
    return hashlib.sha256(_canonical_json(header | {"__metadata__": metadata}).encode()).hexdigest()


def _canonical_json(value: Json) -> str:
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except RecursionError:
        raise ValueError("the header is nested too deeply; the file is damaged") from None


def _sha256(tensor: Array) -> str:
    return hashlib.sha256(container.raw(tensor)).hexdigest()

"""The safetensors container: a JSON header, then the bytes of all tensors; strict, and memory-mapped.

    8 bytes: header length n, little-endian | n bytes: JSON, padded with spaces | data, without holes

Trusts nothing in a file: every length, offset and shape is checked before it is used. Knows the dtypes F32
and U8 alone, and nothing of models.
"""

import json
import mmap
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onebit.formats.files import Buffer, write_file

Array = npt.NDArray[np.float32] | npt.NDArray[np.uint8]
Json = dict[str, Any]

# Data starts at a multiple of this, so that tensors whose sizes are multiples of it all start at one.
ALIGN = 64

_MAX_HEADER_BYTES = 100_000_000
_MAX_RANK = 8
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "U8": np.dtype("u1")}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

# First bytes of files that are often taken for a model of ours.
_FOREIGN = {
    b"GGUF": "a GGUF file",
    b"PK\x03\x04": "a zip archive, perhaps a PyTorch checkpoint",
    b"\x80\x02": "a Python pickle, perhaps a PyTorch checkpoint",
    b"\x80\x04": "a Python pickle, perhaps a PyTorch checkpoint",
    b"\x80\x05": "a Python pickle, perhaps a PyTorch checkpoint",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip file; unpack it first",
    b"{": "a JSON file",
}


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Put the name of the file in front of every ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def map_file(path: Path) -> npt.NDArray[np.uint8]:
    """Map a file into memory, read-only.

    Returns:
        uint8 [file bytes]; views of it keep the map open.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is too short to hold anything.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise ValueError(f"the file has {size} bytes; a model starts with 8 bytes of header length")
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def split_header(contents: npt.NDArray[np.uint8]) -> tuple[Json, npt.NDArray[np.uint8]]:
    """Parse the header of a mapped file.

    Returns:
        The header, a JSON object whose "__metadata__" is a table of texts (empty where the file has none),
        and the data, uint8, that follows.

    Raises:
        ValueError: not this container, a header that does not fit the file, or no strict JSON.
    """
    start = contents[:8].tobytes()
    n_header = int.from_bytes(start, "little")
    if n_header > min(_MAX_HEADER_BYTES, contents.size - 8):
        for magic, kind in _FOREIGN.items():
            if start.startswith(magic):
                raise ValueError(f"this is {kind}; expected a .onebit file")
        raise ValueError(
            f"the header claims {n_header} bytes, but the file has {contents.size} and a header at most "
            f"{_MAX_HEADER_BYTES}; the file is truncated or is no .onebit file"
        )
    header = parse_json(contents[8 : 8 + n_header].tobytes(), "header")
    metadata = header.setdefault("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("header: __metadata__ is not a table of texts; the file is damaged")
    return header, contents[8 + n_header :]


def views(header: Json, data: npt.NDArray[np.uint8]) -> dict[str, Array]:
    """The tensors of a file as views of its data, checked to fill it exactly once.

    Args:
        header: from `split_header`.
        data: uint8, all that follows the header.

    Raises:
        ValueError: a malformed entry, another dtype, or tensors that overlap, leave holes or end elsewhere
            than the file does.
    """
    spans = sorted(
        (_span(name, entry) for name, entry in header.items() if name != "__metadata__"),
        key=lambda span: (span[1], span[2]),
    )
    tensors: dict[str, Array] = {}
    end = 0
    for name, begin, stop, dtype, shape in spans:
        if begin != end:
            problem = "overlaps the tensor before it" if begin < end else "leaves a hole before it"
            raise ValueError(f"tensor {shorten(name)} {problem}: it starts at {begin}, not {end}")
        if stop > data.size:
            raise ValueError(f"tensor {shorten(name)} ends at {stop} of {data.size}; the file is truncated")
        tensors[name] = data[begin:stop].view(dtype).reshape(shape)
        end = stop
    if end != data.size:
        raise ValueError(f"{data.size - end} bytes follow the last tensor; the file is damaged")
    return {name: tensors[name] for name in header if name != "__metadata__"}


def entries(tensors: Mapping[str, Array]) -> Json:
    """Header entries of tensors stored one after the other: {name: {dtype, shape, data_offsets}}."""
    header: Json = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    return header


def write(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Array]) -> None:
    """Write tensors in the given order, whole or not at all; data starts at a multiple of 64 bytes.

    Raises:
        OSError: see `write_file`.
    """
    header = json.dumps({"__metadata__": dict(metadata)} | entries(tensors), separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % ALIGN)

    def chunks() -> Iterator[Buffer]:
        yield len(header).to_bytes(8, "little")
        yield header
        for tensor in tensors.values():
            yield np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data

    write_file(path, chunks())


def parse_json(text: bytes | str, what: str) -> Json:
    """Parse a JSON object strictly: UTF-8, no duplicate keys, no NaN, no trailing text.

    Args:
        text: the JSON, as bytes or decoded.
        what: the name of the text in an error.

    Raises:
        ValueError: anything else.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=_unique_pairs, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not UTF-8 at byte {error.start}; the file is damaged") from None
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply; the file is damaged") from None
    except ValueError as error:
        raise ValueError(f"{what} is not valid JSON ({error}); the file is damaged") from None
    if not isinstance(value, dict):
        raise ValueError(f"{what} is not a JSON object; the file is damaged")
    return value


def shorten(value: object) -> str:
    """A value of unknown origin as a short piece of ASCII, safe in a one-line message."""
    try:
        text = ascii(value)
    except RecursionError:
        return "a deeply nested value"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _span(name: str, entry: object) -> tuple[str, int, int, np.dtype[Any], tuple[int, ...]]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {shorten(name)}: expected exactly dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise ValueError(f"tensor {shorten(name)} has dtype {shorten(entry['dtype'])}; expected F32 or U8")
    if not _is_sizes(shape) or len(shape) > _MAX_RANK:
        raise ValueError(f"tensor {shorten(name)} has shape {shorten(shape)}; expected up to 8 whole numbers")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {shorten(name)} has data_offsets {shorten(offsets)}; expected [begin, end]")
    n_bytes = dtype.itemsize
    for size in shape:
        n_bytes *= size
    begin, stop = offsets
    if stop - begin != n_bytes:
        what = f"{entry['dtype']} {shorten(shape)}"
        raise ValueError(
            f"tensor {shorten(name)} spans {stop - begin} bytes; {what} needs {shorten(n_bytes)}"
        )
    return name, begin, stop, dtype, tuple(shape)


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _unique_pairs(pairs: list[tuple[str, Any]]) -> Json:
    values = dict(pairs)
    if len(values) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {shorten(twice)} appears twice")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")

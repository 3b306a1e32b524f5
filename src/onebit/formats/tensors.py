"""The safetensors container: a JSON header, then the bytes of all tensors; strict, and memory-mapped.

    8 bytes: header length n, little-endian | n bytes: JSON, padded with spaces | data, without holes

Trusts nothing in a file: every length, offset and shape is checked before it is used. Files of ours have the dtypes F32
and U8 alone. Knows nothing of models.
"""

import itertools
import json
import math
import mmap
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from onebit.formats.files import Buffer, write_file

Array = npt.NDArray[np.float32] | npt.NDArray[np.uint8]
Json = dict[str, Any]

# Data starts at a multiple of this, so that tensors whose sizes are multiples of it all start at one.
ALIGN = 64

_MAX_HEADER_BYTES = 100_000_000
_MAX_RANK = 8
# Bytes of one value of the dtypes that models of others come in; 16-bit ones are handled as their bits.
ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}

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


def split_header(
    contents: npt.NDArray[np.uint8], kind: str = ".onebit file"
) -> tuple[Json, npt.NDArray[np.uint8]]:
    """Parse the header of a mapped file.

    Args:
        contents: uint8, all bytes.
        kind: what was expected, for the error.

    Returns:
        The header, a JSON object whose "__metadata__" is a table of texts (empty where the file has none),
        and the data, uint8, that follows.

    Raises:
        ValueError: not this container, a header that does not fit the file, or no strict JSON.
    """
    start = contents[:8].tobytes()
    n_header = int.from_bytes(start, "little")
    if n_header > min(_MAX_HEADER_BYTES, contents.size - 8):
        for magic, what in _FOREIGN.items():
            if start.startswith(magic):
                raise ValueError(f"this is {what}; expected a {kind}")
        raise ValueError(
            f"the header claims {n_header} bytes, but the file has {contents.size} and a header at most "
            f"{_MAX_HEADER_BYTES}; the file is truncated or is no {kind}"
        )
    header = parse_json(contents[8 : 8 + n_header].tobytes(), "header")
    metadata = header.setdefault("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("header: __metadata__ is not a table of texts; the file is damaged")
    return header, contents[8 + n_header :]


class Span(NamedTuple):
    """Where a tensor lies in the data.

    Args:
        name: of the tensor.
        dtype: one of `ITEM_BYTES`.
        shape: its sizes.
        begin: its first byte.
        stop: the byte after its last.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    stop: int


def spans(header: Json, n_data: int, dtypes: Collection[str]) -> dict[str, Span]:
    """The tensors of a file, in the order of the header, checked to fill its data exactly once.

    Args:
        header: from `split_header`.
        n_data: bytes that follow the header.
        dtypes: those that are allowed, of `ITEM_BYTES`.

    Raises:
        ValueError: a malformed entry, another dtype, or tensors that overlap, leave holes or end elsewhere
            than the file does.
    """
    found = {name: _span(name, entry, dtypes) for name, entry in header.items() if name != "__metadata__"}
    end = 0
    for name, _, _, begin, stop in sorted(found.values(), key=lambda span: (span.begin, span.stop)):
        if begin != end:
            problem = "overlaps the tensor before it" if begin < end else "leaves a hole before it"
            raise ValueError(f"tensor {shorten(name)} {problem}: it starts at {begin}, not {end}")
        if stop > n_data:
            raise ValueError(f"tensor {shorten(name)} ends at {stop} of {n_data}; the file is truncated")
        end = stop
    if end != n_data:
        raise ValueError(f"{n_data - end} bytes follow the last tensor; the file is damaged")
    return found


def views(header: Json, data: npt.NDArray[np.uint8]) -> dict[str, Array]:
    """The tensors of a file of ours as views of its data.

    Args:
        header: from `split_header`.
        data: uint8, all that follows the header.

    Raises:
        ValueError: see `spans`.
    """
    return {
        name: data[span.begin : span.stop].view(_DTYPES[span.dtype]).reshape(span.shape)
        for name, span in spans(header, data.size, _DTYPES).items()
    }


def entry_of(tensor: Array) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape of an array, as `header_bytes` takes them."""
    return _DTYPE_NAMES[tensor.dtype], tensor.shape


def entries(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> Json:
    """Header entries of tensors stored one after the other: {name: {dtype, shape, data_offsets}}.

    Args:
        tensors: dtype, one of `ITEM_BYTES`, and shape of each.
    """
    header: Json = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + ITEM_BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    return header


def header_bytes(header: Json) -> bytes:
    """A header with its length before it, padded so that data starts at a multiple of 64 bytes."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)
    return len(text).to_bytes(8, "little") + text


def write(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Array]) -> None:
    """Write tensors in the given order, whole or not at all.

    Raises:
        OSError: see `new_file`.
    """
    specs = {name: entry_of(tensor) for name, tensor in tensors.items()}
    stream(path, metadata, specs, (raw(tensor) for tensor in tensors.values()))


def stream(
    path: Path,
    metadata: Mapping[str, str],
    specs: Mapping[str, tuple[str, tuple[int, ...]]],
    chunks: Iterable[Buffer],
) -> None:
    """Write tensors that come piece by piece, whole or not at all.

    Args:
        path: the file to make or to replace.
        metadata: texts.
        specs: dtype, one of `ITEM_BYTES`, and shape of each tensor, in the order of their bytes.
        chunks: the bytes.

    Raises:
        OSError: see `new_file`.
    """
    header = header_bytes({"__metadata__": dict(metadata)} | entries(specs))
    write_file(path, itertools.chain([header], chunks))


def raw(tensor: npt.NDArray[Any]) -> memoryview:
    """The bytes of an array, in the order of its elements."""
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data


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
    # Arrays are written in several lines.
    text = re.sub(r"\s*\n\s*", " ", text)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _span(name: str, entry: object, dtypes: Collection[str]) -> Span:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {shorten(name)}: expected exactly dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in dtypes:
        expected = " or ".join(dtypes)
        raise ValueError(f"tensor {shorten(name)} has dtype {shorten(dtype)}; expected {expected}")
    if not _is_sizes(shape) or len(shape) > _MAX_RANK:
        raise ValueError(f"tensor {shorten(name)} has shape {shorten(shape)}; expected up to 8 whole numbers")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {shorten(name)} has data_offsets {shorten(offsets)}; expected [begin, end]")
    n_bytes = ITEM_BYTES[dtype] * math.prod(shape)
    begin, stop = offsets
    if stop - begin != n_bytes:
        what = f"{dtype} {shorten(shape)}"
        raise ValueError(
            f"tensor {shorten(name)} spans {stop - begin} bytes; {what} needs {shorten(n_bytes)}"
        )
    return Span(name, dtype, tuple(shape), begin, stop)


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

"""The GGUF container, version 3: keys and values, then the places of all tensors, then their bytes; strict.

    header = read(path)                                 # nothing but the header is read
    header.metadata["general.architecture"], header.tensors["token_embd.weight"].begin
    write(path, metadata, specs, chunks)

Trusts nothing in a file: every count, length and offset is checked before it is used. Knows nothing of models.

Source: ggml, docs/gguf.md.
"""

import math
import mmap
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from onebit.formats.files import Buffer, new_file
from onebit.formats.gguf.blocks import Block, candidates
from onebit.formats.tensors import shorten

MAGIC = b"GGUF"
ALIGN = 32

# Files of real models have headers of some ten megabytes, all in their vocabularies.
_MAX_HEADER_BYTES = 200_000_000
_MAX_NAME_BYTES = 64
_MAX_KEY_BYTES = 65535
_MAX_RANK = 4
_MAX_ALIGN = 2**20

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    _BOOL: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_NUMBERS = {dtype: number for number, dtype in _SCALARS.items()}


class Place(NamedTuple):
    """A tensor in a file.

    Args:
        shape: its sizes, the inputs last.
        block: its type.
        begin: its first byte in the file.
        n_bytes: what it takes there.
    """

    shape: tuple[int, ...]
    block: Block
    begin: int
    n_bytes: int


class Header(NamedTuple):
    """What a file says before its data.

    Args:
        metadata: keys and values: texts, numbers, truth values, lists of texts, numpy arrays.
        tensors: by name, in the order of the file.
    """

    metadata: dict[str, Any]
    tensors: dict[str, Place]


def size(block: Block, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor in the file."""
    return math.prod(shape) // block.weights * block.n_bytes + block.tail


def read(path: Path) -> Header:
    """Read the header of a file.

    Raises:
        ValueError: no GGUF file, another version, a damaged header, or tensors that do not lie one after the other
            up to the end of the file.
        OSError: it cannot be opened.
    """
    with open(path, "rb") as file:
        n_bytes = os.fstat(file.fileno()).st_size
        if n_bytes < 24:
            raise ValueError(f"the file has {n_bytes} bytes; a GGUF file has at least 24")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as contents:
            return _Reader(contents).header()


def write(
    path: Path,
    metadata: Mapping[str, Any],
    specs: Mapping[str, tuple[tuple[int, ...], Block]],
    chunks: Iterable[tuple[str, Buffer]],
) -> None:
    """Write a file, whole or not at all, from tensors that come piece by piece.

    Args:
        path: the file to make or to replace.
        metadata: keys and values, as in `Header`; a whole number becomes uint32, a number float32, and an array keeps
            its dtype.
        specs: shape and type of each tensor, in the order of their bytes.
        chunks: the name of a tensor and some of its bytes, in the order of `specs`.

    Raises:
        OSError: see `new_file`.
    """
    head = [MAGIC, struct.pack("<IQQ", 3, len(specs), len(metadata))]
    head += [part for key, value in metadata.items() for part in (_string(key), _value(value))]
    begins: dict[str, int] = {}
    end = 0
    for name, (shape, block) in specs.items():
        begins[name], end = end, end + _padded(size(block, shape), ALIGN)
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head += [_string(name), sizes, struct.pack("<IQ", block.number, begins[name])]
    start = _padded(sum(map(len, head)), ALIGN)
    filled = dict.fromkeys(specs, 0)
    with new_file(path) as file:
        file.write(b"".join(head))
        for name, chunk in chunks:
            file.seek(start + begins[name] + filled[name])
            file.write(chunk)
            filled[name] += len(chunk)
        assert all(filled[name] == size(block, shape) for name, (shape, block) in specs.items()), filled
        # What pads the last tensor is part of the file.
        file.truncate(start + end)


class _Reader:
    """A place in a header, and how to read on from it."""

    def __init__(self, contents: mmap.mmap) -> None:
        self.contents = contents
        self.end = min(len(contents), _MAX_HEADER_BYTES)
        self.at = 0

    def header(self) -> Header:
        magic, version, n_tensors, n_keys = struct.unpack("<4sIQQ", self.take(24, "the header"))
        if magic != MAGIC:
            raise ValueError(f"the file starts with {shorten(magic)}; expected {shorten(MAGIC)}, a GGUF file")
        if version & 0xFFFF == 0:
            raise ValueError(
                "this is a big-endian GGUF file; onebit reads little-endian ones: convert it again"
            )
        if version not in (2, 3):
            raise ValueError(f"the file is GGUF version {version}; onebit reads 2 and 3: convert it again")
        # A key takes at least 13 bytes, a tensor 33.
        self.expect(n_keys, 13, "keys")
        metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self.string("a key", _MAX_KEY_BYTES)
            if key in metadata:
                raise ValueError(f"key {shorten(key)} appears twice; the file is damaged")
            metadata[key] = self.value(f"key {shorten(key)}")
        align = metadata.get("general.alignment", ALIGN)
        if type(align) is not int or not 8 <= align <= _MAX_ALIGN or align & (align - 1):
            raise ValueError(f"general.alignment is {shorten(align)}; expected a power of two from 8 to 2^20")
        if isinstance(n := metadata.get("split.count", 0), int) and n > 1:
            raise ValueError(
                f"this is one of {n} files of a split model: join them with llama-gguf-split --merge, and read the "
                "result"
            )
        self.expect(n_tensors, 33, "tensors")
        infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(n_tensors):
            name = self.string("the name of a tensor", _MAX_NAME_BYTES)
            if name in infos:
                raise ValueError(f"tensor {shorten(name)} appears twice; the file is damaged")
            infos[name] = self.info(f"tensor {shorten(name)}")
        return Header(metadata, _places(infos, _padded(self.at, align), align, len(self.contents)))

    def take(self, n: int, what: str) -> bytes:
        """The next n bytes."""
        if n > self.end - self.at:
            left = self.end - self.at
            raise ValueError(f"{what} takes {n} bytes, but {left} are left; the file is cut or damaged")
        self.at += n
        return self.contents[self.at - n : self.at]

    def expect(self, n: int, n_bytes: int, what: str) -> None:
        """Refuse a number of things that cannot be in the rest of the header."""
        if n > (self.end - self.at) // n_bytes:
            left = self.end - self.at
            raise ValueError(f"the file claims {n} {what} in {left} bytes; it is cut or damaged")

    def string(self, what: str, longest: int = _MAX_HEADER_BYTES) -> str:
        n = int.from_bytes(self.take(8, what), "little")
        if n > longest:
            raise ValueError(f"{what} claims {n} bytes; expected at most {longest}: the file is damaged")
        try:
            return self.take(n, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{what} is not UTF-8 at byte {error.start}; the file is damaged") from None

    def value(self, what: str) -> Any:
        kind = int.from_bytes(self.take(4, what), "little")
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self.array(what)
        return self.scalars(kind, 1, what)[0].item()

    def array(self, what: str) -> Any:
        kind, n = struct.unpack("<IQ", self.take(12, what))
        if kind == _STRING:
            self.expect(n, 8, f"texts in {what}")
            return [self.string(what) for _ in range(n)]
        if kind == _ARRAY:
            raise ValueError(f"{what} is an array of arrays; no model of a known architecture has one")
        return self.scalars(kind, n, what)

    def scalars(self, kind: int, n: int, what: str) -> npt.NDArray[Any]:
        dtype = _SCALARS.get(kind)
        if dtype is None:
            raise ValueError(
                f"{what} has a value of type {kind}; expected one from 0 to 12: the file is damaged"
            )
        values = np.frombuffer(self.take(n * dtype.itemsize, what), dtype)
        if kind == _BOOL and values.view(np.uint8).max(initial=0) > 1:
            raise ValueError(f"{what} is neither true nor false; the file is damaged")
        return values

    def info(self, what: str) -> tuple[tuple[int, ...], int, int]:
        """Shape, type and offset of a tensor."""
        rank = int.from_bytes(self.take(4, what), "little")
        if not 1 <= rank <= _MAX_RANK:
            raise ValueError(f"{what} has {rank} dimensions; expected 1 to {_MAX_RANK}: the file is damaged")
        *sizes, number, offset = struct.unpack(f"<{rank}QIQ", self.take(8 * rank + 12, what))
        if min(sizes) < 1 or math.prod(sizes) >= 2**60:
            raise ValueError(f"{what} has the sizes {shorten(sizes)}; the file is damaged")
        return tuple(reversed(sizes)), number, offset


def _places(
    infos: dict[str, tuple[tuple[int, ...], int, int]], start: int, align: int, end: int
) -> dict[str, Place]:
    """Where all tensors lie: one after the other, each from a multiple of the alignment, to the end of the file."""
    order = sorted(infos, key=lambda name: infos[name][2])
    rooms = {name: infos[after][2] - infos[name][2] for name, after in zip(order, order[1:], strict=False)}
    places: dict[str, Place] = {}
    expected = 0
    for name in order:
        what = f"tensor {shorten(name)}"
        shape, number, offset = infos[name]
        if offset != expected:
            how = "overlaps the one before it" if offset < expected else "leaves a hole before it"
            raise ValueError(f"{what} {how}: it starts at {offset} of the data, not at {expected}")
        try:
            fitting = candidates(number)
        except ValueError as error:
            raise ValueError(f"{what} {error}") from None
        block = _block(what, shape, fitting, rooms.get(name), max(end - start - offset, 0), align)
        n_bytes = size(block, shape)
        if n_bytes > end - start - offset:
            raise ValueError(
                f"{what} ends {n_bytes - (end - start - offset)} bytes after the file, which was cut"
            )
        places[name] = Place(shape, block, start + offset, n_bytes)
        expected = offset + _padded(n_bytes, align)
    if end - start >= expected + align:
        raise ValueError(f"{end - start - expected} bytes follow the last tensor; the file is damaged")
    return {name: places[name] for name in infos}


def _block(
    what: str, shape: tuple[int, ...], fitting: list[Block], room: int | None, left: int, align: int
) -> Block:
    """The type of a tensor, of those that its id may mean, by the bytes it has.

    Args:
        what: of the error.
        shape: of the tensor.
        fitting: from `candidates`.
        room: bytes up to the next tensor; None for the last one.
        left: bytes up to the end of the file.
        align: of the file.
    """
    whole = [block for block in fitting if shape[-1] % block.weights == 0]
    if not whole:
        block = fitting[0]
        raise ValueError(f"{what} has {shape[-1]} inputs; {block.name} needs a multiple of {block.weights}")
    for block in whole:
        n_bytes = size(block, shape)
        if (room is None and 0 <= left - n_bytes < align) or room == _padded(n_bytes, align):
            return block
    block = whole[0]
    # A cut file is told as such later; what is larger than its type is not of that type.
    if len(whole) == 1 and block.tail and left >= size(block, shape):
        found = left if room is None else room
        raise ValueError(
            f"{what} takes {found} bytes; {block.name} of {list(shape)} takes {size(block, shape)}: it is of another "
            f"type with the id {block.number}; convert the original Hugging Face folder instead"
        )
    return block


def _padded(n: int, align: int) -> int:
    return -(-n // align) * align


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return len(data).to_bytes(8, "little") + data


def _value(value: Any) -> bytes:
    """A value with its type before it."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_string, value))
    if isinstance(value, np.ndarray):
        return struct.pack("<IIQ", _ARRAY, _NUMBERS[value.dtype], len(value)) + value.tobytes()
    kind = "?" if isinstance(value, bool) else "<u4" if isinstance(value, int) else "<f4"
    dtype = np.dtype(kind)
    return struct.pack("<I", _NUMBERS[dtype]) + np.array(value, dtype).tobytes()

"""GGUF files taken apart, changed in one place, and put together again."""

import math
import struct
from dataclasses import dataclass
from random import Random
from typing import Any

from fuzz.odd import FLOATS, INTS, MAX_DATA, TEXTS, bytes_of, fill, some_bytes, some_values, words
from onebit.formats.gguf import container as gguf_file
from onebit.formats.gguf.blocks import BLOCKS, candidates


@dataclass
class Gguf:
    """A file in parts.

    Args:
        head: version, and the claimed numbers of tensors and keys; None for right ones.
        keys: name, type, and bytes; of arrays the type of the elements, their claimed number or None, and all elements.
        tensors: name, sizes, type, offset.
        data: of each tensor.
    """

    head: list[Any]
    keys: list[list[Any]]
    tensors: list[list[Any]]
    data: list[bytes]


_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _ARRAY = 8, 9


def take_gguf(data: bytes) -> Gguf:
    """Take a file apart; whatever raises, it was damaged before."""
    at = 24
    if data[:4] != b"GGUF":
        raise ValueError("no GGUF")
    version, n_tensors, n_keys = struct.unpack_from("<IQQ", data, 4)

    def take(n: int) -> bytes:
        nonlocal at
        if at + n > len(data):
            raise ValueError("cut")
        at += n
        return data[at - n : at]

    def number(n: int) -> int:
        return int.from_bytes(take(n), "little")

    def value(kind: int) -> Any:
        if kind == _TEXT:
            return take(number(8))
        if kind == _ARRAY:
            inner, n = number(4), number(8)
            return [inner, None, [value(inner) for _ in range(min(n, 1 << 12))]]
        return take(_WIDTHS[kind])

    keys = []
    for _ in range(min(n_keys, 1 << 10)):
        name, kind = take(number(8)), number(4)
        keys.append([name, kind, value(kind)])
    tensors = []
    for _ in range(min(n_tensors, 1 << 10)):
        name, rank = take(number(8)), number(4)
        tensors.append([name, [number(8) for _ in range(min(rank, 8))], number(4), number(8)])
    start = at + -at % gguf_file.ALIGN
    ends = sorted({offset for *_, offset in tensors} | {len(data) - start})
    pieces = []
    for *_, offset in tensors:
        stop = next((end for end in ends if end > offset), offset)
        pieces.append(data[start + offset : start + stop])
    return Gguf([version, None, None], keys, tensors, pieces)


def put_gguf(parts: Gguf, relay: bool) -> bytes:
    """Put a file together; with `relay` all tensors get offsets and bytes that fit their types and sizes."""

    def text(data: bytes) -> bytes:
        return len(data).to_bytes(8, "little") + data

    def value(kind: int, what: Any) -> bytes:
        if kind == _TEXT and isinstance(what, bytes):
            return text(what)
        if kind == _ARRAY and isinstance(what, list):
            inner, n, items = what
            count = (len(items) if n is None else n) % 2**64
            return struct.pack("<IQ", inner % 2**32, count) + b"".join(value(inner, item) for item in items)
        return what if isinstance(what, bytes) else b""

    version, n_tensors, n_keys = parts.head
    out = [b"GGUF", struct.pack("<I", version % 2**32)]
    for claimed, found in ((n_tensors, parts.tensors), (n_keys, parts.keys)):
        out.append(((len(found) if claimed is None else claimed) % 2**64).to_bytes(8, "little"))
    for name, kind, what in parts.keys:
        out += [text(name), struct.pack("<I", kind % 2**32), value(kind, what)]
    offset, pieces = 0, []
    for (name, sizes, number, old), data in zip(parts.tensors, parts.data, strict=True):
        if relay:
            try:
                block = candidates(number)[-1 if len(data) % 2 else 0]
                n = gguf_file.size(block, tuple(reversed(sizes)))
            except ValueError:
                n = len(data)
            data = fill(data, min(max(n, 0), MAX_DATA))
            old = offset
        data += bytes(-len(data) % gguf_file.ALIGN)
        offset += len(data)
        pieces.append(data)
        out += [
            text(name),
            struct.pack("<I", len(sizes)),
            *((n % 2**64).to_bytes(8, "little") for n in sizes),
        ]
        out.append(struct.pack("<IQ", number % 2**32, old % 2**64))
    made = b"".join(out)
    return made + bytes(-len(made) % gguf_file.ALIGN) + b"".join(pieces)


def _scalar(random: Random) -> tuple[int, bytes]:
    kind = random.choice(list(_WIDTHS))
    if kind in (6, 12):
        values = (*FLOATS[:-1], math.inf, -math.inf, math.nan)
        return kind, struct.pack(
            "<f" if kind == 6 else "<d", random.choice(values) * random.choice((1, 1, -1))
        )
    number = random.choice((random.choice(INTS), random.randrange(40))) * random.choice((1, 1, 1, -1))
    return kind, (number % 256 ** _WIDTHS[kind]).to_bytes(_WIDTHS[kind], "little")


def _gguf_value(kind: int, what: Any, random: Random) -> tuple[int, Any]:
    if kind == _ARRAY and random.random() < 0.8:
        inner, n, items = what
        match random.randrange(5):
            case 0:
                n = random.choice((*INTS[:-1], len(items) + 1))
            case 1 if items:
                del items[random.randrange(len(items))]
            case 2 if items:
                items.append(random.choice(items))
            case 3:
                inner = random.choice((*_WIDTHS, _TEXT, _ARRAY, 13))
            case _ if items:
                i = random.randrange(len(items))
                items[i] = _gguf_value(inner, items[i], random)[1]
        return kind, [inner, n, items]
    if kind == _TEXT and random.random() < 0.7:
        choices = (random.choice(TEXTS), random.choice(words()), "\u2581a", "a b")
        return kind, random.choice((*map(bytes_of, choices), some_bytes(what, random)))
    if kind in _WIDTHS and random.random() < 0.7:
        width = _WIDTHS[kind]
        number = int.from_bytes(what, "little") + random.choice((1, -1, 2, 1 << 8 * width - 1))
        return kind, random.choice((number % 256**width, random.choice(INTS) % 256**width)).to_bytes(
            width, "little"
        )
    match random.randrange(4):
        case 0:
            return _TEXT, bytes_of(random.choice(words()))
        case 1:
            inner, item = _scalar(random)
            return _ARRAY, [inner, None, [item] * random.choice((0, 1, 2, 24))]
        case 2:
            return _ARRAY, [_TEXT, None, [bytes_of(word) for word in random.choices(words(), k=3)]]
        case _:
            return _scalar(random)


def change_gguf(data: bytes, random: Random) -> bytes:
    parts = take_gguf(data)
    keys, tensors, relay = parts.keys, parts.tensors, random.random() < 0.75
    i = random.randrange(len(tensors)) if tensors else -1
    chance = random.random()
    if keys and chance < 0.5:
        key = random.choice(keys)
        prefix = next((value for name, _, value in keys if name == b"general.architecture"), b"llama")
        known = random.choice(words()).encode()
        match random.randrange(8):
            case 0:
                keys.remove(key)
            case 1:
                keys.insert(random.randrange(len(keys)), [key[0], *_gguf_value(*key[1:], random)])
            case 2:
                name = random.choice(
                    (known, prefix + b"." + known, b"tokenizer.ggml." + known, bytes_of("\n"))
                )
                keys.append([name, *_gguf_value(*key[1:], random)])
            case 3 if isinstance(prefix, bytes):
                # Another architecture, with all keys that go with it.
                new = random.choice((b"llama", b"qwen2", b"qwen3", b"bitnet", b"bitnet-b1.58", b"bitnet-25"))
                for other in keys:
                    if other[0].startswith(prefix + b"."):
                        other[0] = new + other[0][len(prefix) :]
                    elif other[0] == b"general.architecture":
                        other[2] = new
            case _:
                key[1:] = _gguf_value(*key[1:], random)
    elif tensors and chance < 0.9:
        tensor = tensors[i]
        match random.randrange(9):
            case 0:
                tensor[0] = random.choice(
                    (random.choice(words()).encode() + b".weight", some_bytes(tensor[0], random))
                )
            case 1:
                sizes = tensor[1]
                sizes[random.randrange(len(sizes))] = random.choice((*INTS[:-1], random.randrange(300)))
            case 2:
                tensor[1] = random.choice((tensor[1][::-1], tensor[1] + [1], tensor[1][:1], []))
            case 3 | 4:
                tensor[2] = random.choice((*(block.number for block in BLOCKS.values()), 31, 36, 40, 2**31))
            case 5:
                tensor[3] = random.choice((*INTS[:-1], tensor[3] + 1, tensor[3] + 32))
                relay = False
            case 6:
                del tensors[i], parts.data[i]
            case 7:
                tensors.append(list(tensor))
                parts.data.append(parts.data[i])
            case _:
                parts.data[i] = some_values(parts.data[i], random)
    elif chance < 0.93:
        parts.head[random.randrange(3)] = random.choice(INTS[:-1])
    else:
        parts.data = [some_values(piece, random) for piece in parts.data]
    made = put_gguf(parts, relay)
    return made if random.random() < 0.97 else made[: random.randrange(len(made))]

"""Damage that gets past the first check: files are taken apart, changed in one place, and put together again.

    mutate(bundle, Random(7))       # a bundle: some files of a model in one run of bytes

A name says what a file is. What cannot be taken apart, because it was damaged before, is changed byte by byte.
"""

import ast
import hashlib
import json
import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from onebit.formats import native
from onebit.formats import tensors as container
from onebit.formats.gguf import container as gguf_file
from onebit.formats.gguf.blocks import BLOCKS, candidates

FORMATS = Path(native.__file__).parent
NAMES = (
    "config.json", "model.safetensors", "model.safetensors.index.json", "a.safetensors", "b.safetensors",
    "tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "tokenizer.model", "vocab.json", "merges.txt",
    "model.gguf", "model.onebit", "model.bin", "tokenizer.bin", "ranks.tiktoken", "recipe.json",
)  # fmt: skip
# Far beyond what a seed takes: what a change makes larger than this is cut.
MAX_DATA = 1 << 15

# What comes of taking apart a file that was damaged before.
_UNREADABLE = (
    ValueError, LookupError, TypeError, AttributeError, ArithmeticError, struct.error, RecursionError, MemoryError,
)  # fmt: skip
_MARK = re.compile(rb"\n--8<-- ([A-Za-z0-9_.]{1,40})\n")
_INTS = (0, 1, 2, 3, 4, 7, 8, 16, 31, 64, 255, 256, 2**15, 2**24 - 1, 2**24, 2**31 - 1, 2**31, 2**32, 2**53, 2**62,
         2**63 - 1, 2**63, 2**64 - 1, 10**30, 10**400)  # fmt: skip
_FLOATS = (0.0, -0.0, 0.5, 1.0, 1.0000001, -1.5, 3.0, 1e-45, 1e-300, 65504.0, 1e30, 3.4e38, 1e308)
_TEXTS = ("", " ", "a", "ab", "\n", "a\nb", "\x00", "\x1b[2J", "\u2028", "\u202e", "\u00e9", "\u2581", "\ud800",
          "\U0001f600", "%s{}", "../x", "x" * 700, "0", "-1", "1e5", "NaN")  # fmt: skip


@cache
def words() -> tuple[str, ...]:
    """The names that the readers look for: all words in their sources."""
    found: set[str] = set()
    for path in [*sorted(FORMATS.glob("**/*.py")), FORMATS.parent / "config.py"]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 48:
                if re.fullmatch(r"[\w.<>|/-]+", node.value):
                    found.add(node.value)
    return tuple(sorted(found))


def bundle(files: dict[str, bytes]) -> bytes:
    """Files in one run of bytes."""
    return b"".join(b"\n--8<-- " + name.encode() + b"\n" + contents for name, contents in files.items())


def unbundle(data: bytes) -> dict[str, bytes]:
    """The inverse of `bundle`; files of other names are left out."""
    parts = _MARK.split(data)
    files = {name.decode(): contents for name, contents in zip(parts[1::2], parts[2::2], strict=True)}
    return {name: contents for name, contents in files.items() if name in NAMES}


def mutate(data: bytes, random: Random) -> bytes:
    """One to four changes to the files of a bundle."""
    files = unbundle(data)
    if not files:
        return some_bytes(data, random)
    for _ in range(random.choice((1, 1, 1, 2, 2, 3, 4))):
        name = random.choice(list(files) + ["config.json"] * ("config.json" in files))
        chance = random.random()
        if chance < 0.02 and len(files) > 1:
            del files[name]
        elif chance < 0.04:
            files[random.choice(NAMES)] = files[name]
        elif chance < 0.12:
            files[name] = some_bytes(files[name], random)
        elif chance < 0.22 and (resized := _resize(files, random)):
            files = resized
        else:
            files[name] = _mutator(name)(files[name], random)
    return bundle(files)


def some_bytes(data: bytes, random: Random) -> bytes:
    """Bytes that are flipped, put in, taken out, doubled, or become a number that is at an edge."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8))):
        at, n = random.randrange(len(changed) + 1), random.choice((1, 1, 2, 4, 8, 64))
        match random.randrange(6):
            case 0 if at < len(changed):
                changed[at] ^= 1 << random.randrange(8)
            case 1 if at < len(changed):
                changed[at] = random.choice((0, 1, 0x7F, 0x80, 0xFF, 10, random.randrange(256)))
            case 2:
                del changed[at : at + n]
            case 3:
                changed[at:at] = random.randbytes(n)
            case 4:
                changed[at:at] = changed[at : at + n]
            case 5:
                number = random.choice(_INTS) * random.choice((1, 1, -1)) % 2 ** (8 * n)
                changed[at : at + n] = number.to_bytes(n, "little")
    return bytes(changed)


def _mutator(name: str) -> Callable[[bytes, Random], bytes]:
    def careful(data: bytes, random: Random) -> bytes:
        try:
            return change(data, random)
        except _UNREADABLE:
            return some_bytes(data, random)

    kinds: dict[str, Callable[[bytes, Random], bytes]] = {
        "gguf": _gguf, "json": _json, "safetensors": _safetensors, "onebit": _safetensors, "model": _protobuf,
        "bin": _numbers, "txt": _text, "tiktoken": _text, "jinja": _text,
    }  # fmt: skip
    change = kinds[name.rpartition(".")[2]]
    return careful


# JSON: objects are lists of pairs, so that a key can be there twice.


class Pairs(list[list[Any]]):
    """A JSON object."""


class Raw(str):
    """A piece of JSON that is written as it is."""


def load(text: bytes | str) -> Any:
    """Parse JSON into lists, pairs and plain values."""
    text = text.decode("utf-8") if isinstance(text, bytes) else text
    return json.loads(
        text,
        object_pairs_hook=lambda pairs: Pairs([list(pair) for pair in pairs]),
        parse_constant=Raw,
        parse_int=lambda digits: int(digits) if len(digits) < 500 else Raw(digits),
    )


def dump(value: Any) -> str:
    """The inverse of `load`."""
    if isinstance(value, Raw):
        return value
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(str(key))}:{dump(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dump, value)) + "]"
    return json.dumps(value)


def anything(random: Random) -> Any:
    """A JSON value that a reader may not expect."""
    match random.randrange(9):
        case 0:
            return random.choice(_INTS) * random.choice((1, 1, -1))
        case 1:
            return random.choice(_FLOATS) * random.choice((1, 1, -1))
        case 2:
            return random.choice(_TEXTS)
        case 3 | 4:
            return random.choice(words())
        case 5:
            return random.choice((None, True, False))
        case 6:
            return random.choice(([], Pairs(), [[]], [0], ["a", 1], Pairs([["a", Pairs()]]), [None] * 100))
        case 7:
            return Raw(
                random.choice(("NaN", "-Infinity", "1e999", "-0", "9" * 5000, "[" * 3000 + "]" * 3000, ""))
            )
        case _:
            return random.randrange(-4, 300)


def change_value(root: Any, random: Random) -> Any:
    """Change a JSON value in one place."""
    slots: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for i, item in enumerate(node):
            if isinstance(node, Pairs):
                slots.append((item, 1))
                item = item[1]
            else:
                slots.append((node, i))
            if isinstance(item, list):
                walk(item)

    holder = [root]
    walk(holder)
    # The first ones are those near the root, of which there are few.
    where, i = random.choice(slots[: random.choice((8, 40, len(slots)))])
    value = where[i]
    if isinstance(value, str) and value.startswith("{") and random.random() < 0.9:
        where[i] = dump(change_value(load(value), random))
        return holder[0]
    if isinstance(value, Pairs) and value and random.random() < 0.6:
        pair = random.choice(value)
        match random.randrange(5):
            case 0:
                value.remove(pair)
            case 1:
                value.append([pair[0], anything(random)])
            case 2:
                pair[0] = random.choice((random.choice(words()), random.choice(_TEXTS), pair[0] + "x"))
            case 3:
                value.append([random.choice(words()), anything(random)])
            case 4:
                random.shuffle(value)
        return holder[0]
    if isinstance(value, list) and value and random.random() < 0.6:
        j = random.randrange(len(value))
        match random.randrange(3):
            case 0:
                del value[j]
            case 1:
                value.append(value[j])
            case 2:
                value.insert(
                    j, [anything(random), anything(random)] if isinstance(value, Pairs) else anything(random)
                )
        return holder[0]
    if type(value) in (int, float) and random.random() < 0.5:
        choices = (
            value + 1,
            value - 1,
            -value,
            value * 2,
            value // 2,
            float(value),
            str(value),
            [value],
            value * 2**40,
        )
        where[i] = random.choice(choices)
    elif isinstance(value, str) and value and random.random() < 0.4:
        at = random.randrange(len(value))
        where[i] = value[:at] + random.choice((*_TEXTS, value[at:] * 2)) + value[at + 1 :]
    elif random.random() < 0.3:
        other, j = random.choice(slots)
        where[i] = load(dump(other[j]))
    else:
        where[i] = anything(random)
    return holder[0]


def _json(data: bytes, random: Random) -> bytes:
    return dump(change_value(load(data), random)).encode()


# Safetensors, ours and those of others.


def _safetensors(data: bytes, random: Random) -> bytes:
    header, tensors, rest = _take_safetensors(data)
    chance = random.random()
    if chance < 0.6:
        header = change_value(header, random)
    elif chance < 0.8:
        entry = random.choice([value for key, value in header if key != "__metadata__"])
        fields = dict(entry)
        fields[random.choice(("dtype", "shape"))] = random.choice(
            (
                random.choice(list(container.ITEM_BYTES)),
                [random.randrange(20) for _ in range(random.randrange(4))],
            )
        )
        entry[:] = [[key, value] for key, value in fields.items()]
    else:
        name = random.choice(list(tensors))
        tensors[name] = _some_values(tensors[name], random)
    return _put_safetensors(header, tensors, rest, random, relay=random.random() < 0.7)


def _take_safetensors(data: bytes) -> tuple[Any, dict[str, bytes], bytes]:
    """The header, the bytes of each tensor, and all bytes of data."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = load(data[8:end])
    rest = data[end:]
    spans = {key: dict(value)["data_offsets"] for key, value in header if key != "__metadata__"}
    return header, {key: rest[begin:stop] for key, (begin, stop) in spans.items()}, rest


def _put_safetensors(
    header: Any, tensors: dict[str, bytes], rest: bytes, random: Random, relay: bool
) -> bytes:
    """Put a file together; with `relay` all tensors get the bytes that they claim, and hashes that are right."""
    if relay:
        at, pieces, hashes = 0, [], {}
        for key, value in header:
            if key == "__metadata__":
                continue
            fields = dict(value)
            # A product with a text or a list is a very long one.
            if not all(type(size) is int for size in fields["shape"]):
                raise ValueError("no sizes")
            n = container.ITEM_BYTES[fields["dtype"]] * math.prod(fields["shape"])
            piece = _fill(tensors.get(key, b""), min(max(n, 0), MAX_DATA))
            fields["data_offsets"] = [at, at + n]
            value[:] = [[name, field] for name, field in fields.items()]
            hashes[key] = hashlib.sha256(piece).hexdigest()
            pieces.append(piece)
            at += n
        rest = b"".join(pieces)
        metadata = dict(header).get("__metadata__", Pairs())
        for pair in metadata:
            if pair[0] == "sha256" and random.random() < 0.95:
                pair[1] = json.dumps(hashes)
        if "digest" in dict(metadata) and random.random() < 0.98:
            # As a reader sees it, and therefore without what only `Pairs` can hold.
            seen = container.parse_json(dump(header), "header")
            next(pair for pair in metadata if pair[0] == "digest")[1] = native._digest(seen)
    text = dump(header).encode()
    text += b" " * (-(8 + len(text)) % (1 if random.random() < 0.03 else container.ALIGN))
    n = len(text) if random.random() < 0.98 else max(len(text) + random.choice((-1, 1, 8, 2**40)), 0)
    return n.to_bytes(8, "little") + text + rest


def _fill(data: bytes, n: int) -> bytes:
    """Data that is cut, or repeated, to n bytes."""
    return (data or b"\0").ljust(n, b"\0")[:n]


def _some_values(data: bytes, random: Random) -> bytes:
    """Tensor data with some odd numbers in it."""
    if random.random() < 0.3:
        return some_bytes(data, random)[: len(data)].ljust(len(data), b"\0")
    changed, width = bytearray(data), random.choice((1, 2, 2, 4, 4))
    odd = {
        1: (0, 1, 2, 3, 0x55, 0xAA, 0x80, 0xFF),
        2: (0, 1, 0x3C00, 0x7BFF, 0x7C00, 0x7E00, 0x8000, 0xBC00, 0xFC00, 0x3F80, 0x7F7F, 0x7F80, 0x7FC0),
        4: (
            0,
            1,
            0x3F800000,
            0xBF800000,
            0x7F7FFFFF,
            0x7F800000,
            0x7FC00000,
            0x80000000,
            0x00800000,
            0x477FE000,
        ),
    }[width]
    number = random.choice(odd).to_bytes(width, "little")
    n = len(data) // width
    for at in (
        range(n) if random.random() < 0.15 else random.choices(range(max(n, 1)), k=random.choice((1, 3)))
    ):
        changed[at * width : (at + 1) * width] = number
    return bytes(changed[: len(data)])


# GGUF.


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
            data = _fill(data, min(max(n, 0), MAX_DATA))
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
        values = (*_FLOATS[:-1], math.inf, -math.inf, math.nan)
        return kind, struct.pack(
            "<f" if kind == 6 else "<d", random.choice(values) * random.choice((1, 1, -1))
        )
    number = random.choice((random.choice(_INTS), random.randrange(40))) * random.choice((1, 1, 1, -1))
    return kind, (number % 256 ** _WIDTHS[kind]).to_bytes(_WIDTHS[kind], "little")


def _bytes_of(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _gguf_value(kind: int, what: Any, random: Random) -> tuple[int, Any]:
    if kind == _ARRAY and random.random() < 0.8:
        inner, n, items = what
        match random.randrange(5):
            case 0:
                n = random.choice((*_INTS[:-1], len(items) + 1))
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
        choices = (random.choice(_TEXTS), random.choice(words()), "\u2581a", "a b")
        return kind, random.choice((*map(_bytes_of, choices), some_bytes(what, random)))
    if kind in _WIDTHS and random.random() < 0.7:
        width = _WIDTHS[kind]
        number = int.from_bytes(what, "little") + random.choice((1, -1, 2, 1 << 8 * width - 1))
        return kind, random.choice((number % 256**width, random.choice(_INTS) % 256**width)).to_bytes(
            width, "little"
        )
    match random.randrange(4):
        case 0:
            return _TEXT, _bytes_of(random.choice(words()))
        case 1:
            inner, item = _scalar(random)
            return _ARRAY, [inner, None, [item] * random.choice((0, 1, 2, 24))]
        case 2:
            return _ARRAY, [_TEXT, None, [_bytes_of(word) for word in random.choices(words(), k=3)]]
        case _:
            return _scalar(random)


def _gguf(data: bytes, random: Random) -> bytes:
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
                    (known, prefix + b"." + known, b"tokenizer.ggml." + known, _bytes_of("\n"))
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
                sizes[random.randrange(len(sizes))] = random.choice((*_INTS[:-1], random.randrange(300)))
            case 2:
                tensor[1] = random.choice((tensor[1][::-1], tensor[1] + [1], tensor[1][:1], []))
            case 3 | 4:
                tensor[2] = random.choice((*(block.number for block in BLOCKS.values()), 31, 36, 40, 2**31))
            case 5:
                tensor[3] = random.choice((*_INTS[:-1], tensor[3] + 1, tensor[3] + 32))
                relay = False
            case 6:
                del tensors[i], parts.data[i]
            case 7:
                tensors.append(list(tensor))
                parts.data.append(parts.data[i])
            case _:
                parts.data[i] = _some_values(parts.data[i], random)
    elif chance < 0.93:
        parts.head[random.randrange(3)] = random.choice(_INTS[:-1])
    else:
        parts.data = [_some_values(piece, random) for piece in parts.data]
    made = put_gguf(parts, relay)
    return made if random.random() < 0.97 else made[: random.randrange(len(made))]


# Another size everywhere: of the config and of all tensors that have it.


def _resize(files: dict[str, bytes], random: Random) -> dict[str, bytes] | None:
    sizes = [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 64]
    old, new = random.choice(sizes), random.choice((*sizes, 9, 20, 128, 256, 300))

    def swap(node: Any) -> Any:
        if isinstance(node, Pairs):
            return Pairs([[key, swap(value)] for key, value in node])
        if isinstance(node, list):
            return [swap(value) for value in node]
        if isinstance(node, str) and node.startswith("{") and not isinstance(node, Raw):
            return dump(swap(load(node)))
        return new if type(node) is int and node == old else node

    resized = dict(files)
    try:
        for name, contents in files.items():
            if name == "config.json":
                resized[name] = dump(swap(load(contents))).encode()
            elif name.endswith((".safetensors", ".onebit")):
                header, tensors, rest = _take_safetensors(contents)
                resized[name] = _put_safetensors(swap(header), tensors, rest, random, relay=True)
            elif name.endswith(".gguf"):
                parts = take_gguf(contents)
                for key in parts.keys:
                    if key[1] == 4 and int.from_bytes(key[2], "little") == old:
                        key[2] = new.to_bytes(4, "little")
                for tensor in parts.tensors:
                    tensor[1] = [new if size == old else size for size in tensor[1]]
                resized[name] = put_gguf(parts, relay=True)
    except _UNREADABLE:
        return None
    return resized


# Vocabularies.


def _varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + _varint(value >> 7)


def _protobuf(data: bytes, random: Random) -> bytes:
    """A message with a field that is changed, taken out or doubled, also one of a message in it."""
    if data[:64].split(b"\n")[0].endswith(b" 0"):
        return _text(data, random)
    fields: list[list[Any]] = []
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        tag = number()
        n = {0: 0, 1: 8, 2: 0, 5: 4}[tag & 7]
        if tag & 7 == 0:
            fields.append([tag, number()])
            continue
        if tag & 7 == 2:
            n = number()
        fields.append([tag, data[at : at + n]])
        at += n
    field = random.choice(fields)
    chance = random.random()
    if field[0] & 7 == 2 and chance < 0.75:
        inside = field[0] >> 3 in (1, 2, 3) and len(field[1]) > 1 and chance < 0.6
        texts = ("a", "b", "ab", "aba", "\u2581", "\u2581a", "<0x41>", "<unk>", *_TEXTS[:-3])
        try:
            field[1] = _protobuf(field[1], random) if inside else _bytes_of(random.choice(texts))
        except (IndexError, KeyError):
            field[1] = some_bytes(field[1], random)
    elif chance < 0.8 and isinstance(field[1], int):
        field[1] = random.choice((*range(8), *_INTS[:-1]))
    elif chance < 0.85 and field[0] & 7 == 5:
        field[1] = struct.pack("<f", random.choice((0.0, -1.0, -2.0, -3.0, math.nan, math.inf, 3e38)))
    elif chance < 0.9:
        fields.remove(field)
    elif chance < 0.95:
        fields.insert(random.randrange(len(fields)), list(field))
    else:
        field[:] = [random.randrange(1, 40) << 3, random.randrange(8)]
    out = b""
    for tag, value in fields:
        out += _varint(tag) + (_varint(value) if isinstance(value, int) else b"")
        if isinstance(value, bytes):
            out += (_varint(len(value)) if tag & 7 == 2 else b"") + value
    return out


def _numbers(data: bytes, random: Random) -> bytes:
    """A 32-bit number at its place, more often one of the first; and the end of the file."""
    changed = bytearray(data)
    at = 4 * random.randrange(max(random.choice((7, 7, len(data) // 4)), 1))
    old = int.from_bytes(changed[at : at + 4], "little")
    number = random.choice((old + 1, old - 1, -old, old * 2, random.choice(_INTS), random.randrange(40)))
    changed[at : at + 4] = (number % 2**32).to_bytes(4, "little")
    match random.randrange(8):
        case 0:
            del changed[random.randrange(len(changed)) :]
        case 1:
            changed += changed[-random.randrange(1, 65) :]
        case 2:
            return bytes(data[:28]) + _some_values(data[28:], random)
    return bytes(changed)


def _text(data: bytes, random: Random) -> bytes:
    """Lines that are doubled, swapped, taken out or changed."""
    lines = data.split(b"\n")
    i, j = random.randrange(len(lines)), random.randrange(len(lines))
    match random.randrange(5):
        case 0:
            del lines[i]
        case 1:
            lines.insert(j, lines[i])
        case 2:
            lines[i], lines[j] = lines[j], lines[i]
        case 3:
            lines[i] = _bytes_of(random.choice(_TEXTS))
        case 4:
            lines[i] = some_bytes(lines[i], random)
    return b"\n".join(lines)

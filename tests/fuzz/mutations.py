"""Damage that gets past the first check: files are taken apart, changed in one place, and put together again.

    mutate(bundle, Random(7))       # a bundle: some files of a model in one run of bytes

A name says what a file is. What cannot be taken apart, because it was damaged before, is changed byte by byte.
"""

import hashlib
import json
import math
import re
import struct
from collections.abc import Callable
from random import Random
from typing import Any

from fuzz.gguf_parts import change_gguf, put_gguf, take_gguf
from fuzz.odd import FLOATS, INTS, MAX_DATA, TEXTS, UNREADABLE, bytes_of, fill, some_bytes, some_values, words
from onebit.formats import native
from onebit.formats import tensors as container

NAMES = (
    "config.json", "model.safetensors", "model.safetensors.index.json", "a.safetensors", "b.safetensors",
    "tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "tokenizer.model", "vocab.json", "merges.txt",
    "model.gguf", "model.onebit", "model.bin", "tokenizer.bin", "ranks.tiktoken", "recipe.json",
)  # fmt: skip
_MARK = re.compile(rb"\n--8<-- ([A-Za-z0-9_.]{1,40})\n")


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


def _mutator(name: str) -> Callable[[bytes, Random], bytes]:
    def careful(data: bytes, random: Random) -> bytes:
        try:
            return change(data, random)
        except UNREADABLE:
            return some_bytes(data, random)

    kinds: dict[str, Callable[[bytes, Random], bytes]] = {
        "gguf": change_gguf, "json": _json, "safetensors": _safetensors, "onebit": _safetensors, "model": _protobuf,
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
            return random.choice(INTS) * random.choice((1, 1, -1))
        case 1:
            return random.choice(FLOATS) * random.choice((1, 1, -1))
        case 2:
            return random.choice(TEXTS)
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
                pair[0] = random.choice((random.choice(words()), random.choice(TEXTS), pair[0] + "x"))
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
        where[i] = value[:at] + random.choice((*TEXTS, value[at:] * 2)) + value[at + 1 :]
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
        tensors[name] = some_values(tensors[name], random)
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
            piece = fill(tensors.get(key, b""), min(max(n, 0), MAX_DATA))
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
    except UNREADABLE:
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
        texts = ("a", "b", "ab", "aba", "\u2581", "\u2581a", "<0x41>", "<unk>", *TEXTS[:-3])
        try:
            field[1] = _protobuf(field[1], random) if inside else bytes_of(random.choice(texts))
        except (IndexError, KeyError):
            field[1] = some_bytes(field[1], random)
    elif chance < 0.8 and isinstance(field[1], int):
        field[1] = random.choice((*range(8), *INTS[:-1]))
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
    number = random.choice((old + 1, old - 1, -old, old * 2, random.choice(INTS), random.randrange(40)))
    changed[at : at + 4] = (number % 2**32).to_bytes(4, "little")
    match random.randrange(8):
        case 0:
            del changed[random.randrange(len(changed)) :]
        case 1:
            changed += changed[-random.randrange(1, 65) :]
        case 2:
            return bytes(data[:28]) + some_values(data[28:], random)
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
            lines[i] = bytes_of(random.choice(TEXTS))
        case 4:
            lines[i] = some_bytes(lines[i], random)
    return b"\n".join(lines)

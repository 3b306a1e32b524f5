"""SentencePiece's tokenizer.model to a tokenizer.json.

Trusts nothing in the file: it is protobuf, of which the few fields that change tokens are read here; what a
tokenizer.json cannot express is refused. Fields are those of sentencepiece_model.proto.
"""

import base64
import math
import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from onebit.formats.tensors import Json, shorten
from onebit.formats.vocabulary import bpe

_UNIGRAM, _BPE = 1, 2
_MODEL_TYPES = {_UNIGRAM: "unigram", _BPE: "BPE", 3: "word", 4: "character"}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

# Of a map of characters, looked at together.
_PLACES = 4096

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class _Piece(NamedTuple):
    text: str
    score: float
    kind: int


class _Model(NamedTuple):
    pieces: list[_Piece]
    trainer: dict[int, int | bytes]
    normalizer: dict[int, int | bytes]


def from_sentencepiece(model: bytes) -> bytes:
    """The tokenizer.json that encodes as a SentencePiece model does; BPE and unigram models.

    The same tokens, but for three corners of the library that reads the result. A piece that the model calls
    user-defined ends the text before it: where a text begins with a space of its own (`add_dummy_prefix`), one also
    follows such a piece, as in llama.cpp. A map of characters (NFKC) may join rare heaps of combining marks in another
    way. A unigram model may pick another of several equally likely ways.

    Args:
        model: the contents of a tokenizer.model.

    Raises:
        ValueError: a damaged file, or a model that a tokenizer.json cannot express.
    """
    pieces, trainer, normalizer = _parse(model)
    kind = _integer(trainer, 3, _UNIGRAM)
    if kind not in (_UNIGRAM, _BPE):
        name = _MODEL_TYPES.get(kind, shorten(kind))
        raise ValueError(f"the SentencePiece model is of type {name}; expected BPE or unigram")
    if _integer(trainer, 24, 0) or not _integer(normalizer, 5, 1):
        raise ValueError(
            "the SentencePiece model keeps spaces behind words, or as they are; that is not supported"
        )

    # A user-defined piece is searched for in the text itself, where spaces are still spaces.
    texts = [p.text.replace(bpe.SPACE, " ") if p.kind == _USER_DEFINED else p.text for p in pieces]
    vocab = bpe.ids(texts)
    added = {i: p.kind != _USER_DEFINED for i, p in enumerate(pieces) if p.kind in (2, 3, 4)}
    unknown = [i for i, p in enumerate(pieces) if p.kind == _UNKNOWN]
    if len(unknown) != 1:
        raise ValueError(f"the SentencePiece model has {len(unknown)} unknown pieces; expected 1")
    byte_fallback = bool(_integer(trainer, 35, 0))
    prefix = bool(_integer(normalizer, 3, 1))
    if _USER_DEFINED in {p.kind for p in pieces} and _integer(normalizer, 4, 1):
        raise ValueError(
            "the SentencePiece model removes spaces and has user-defined pieces; that is not supported"
        )
    steps = _normalizers(normalizer)

    if kind == _BPE:
        scores = {p.text: p.score for p in pieces if p.kind == _NORMAL}
        merges = bpe.merges_by_score(scores, vocab)
        return bpe.spaced(vocab, merges, added, texts[unknown[0]], byte_fallback, prefix, steps)
    bpe.require_bytes(vocab, byte_fallback)
    # Pieces that are no text take part in tokenizers' search, and its least score sets the price of the unknown.
    worst = min((p.score for p in pieces if p.kind == _NORMAL), default=0.0)
    unigram = {
        "type": "Unigram",
        "unk_id": unknown[0],
        "vocab": [
            [text, p.score if p.kind == _NORMAL else worst] for text, p in zip(texts, pieces, strict=True)
        ],
        "byte_fallback": byte_fallback,
    }
    decoder = bpe.space_decoder(prefix, byte_fallback)
    return bpe.document(unigram, vocab, added, bpe.spaces(prefix, steps), None, decoder)


def _normalizers(spec: dict[int, int | bytes]) -> list[Json]:
    steps: list[Json] = []
    charsmap = spec.get(2, b"")
    if not isinstance(charsmap, bytes):
        raise ValueError(
            "the SentencePiece model has a number for its map of characters; the file is damaged"
        )
    if charsmap:
        _check_characters(charsmap)
        # The library looks up a character and its marks at once; composed, most are one character.
        if b"nfkc" in _message(spec.get(1, b""), "the normalizer's name"):
            steps.append({"type": "NFKC"})
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()})
    if _integer(spec, 4, 1):
        for pattern, content in ((r"\A +", ""), (rf"[ {bpe.SPACE}]+\z", ""), (" {2,}", " ")):
            steps.append({"type": "Replace", "pattern": {"Regex": pattern}, "content": content})
    return steps


def _check_characters(charsmap: bytes) -> None:
    """Refuse a map of characters that leads out of itself: the library follows it unchecked.

    It is the length of a trie, the trie, a double array of uint32, and texts that end with a zero. From a place p the
    byte c leads to the unit p ^ c, if that has the label c; its offset leads on, and to a leaf, which says where a text
    begins.
    """
    n_bytes = int.from_bytes(charsmap[:4], "little")
    if len(charsmap) < 4 or not 4 <= n_bytes <= len(charsmap) - 4:
        raise ValueError("the map of characters ends early; the file is damaged")
    units = np.frombuffer(charsmap, "<u4", n_bytes // 4, 4).astype(np.int64)
    texts = charsmap[4 + 4 * units.size :]
    try:
        texts.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("the map of characters has a text that is not UTF-8; the file is damaged") from None
    is_inside = np.append(np.frombuffer(texts, np.uint8) & 0xC0 == 0x80, False)
    offsets = (units >> 10) << ((units >> 6) & 8)
    labels = np.where(units >> 31, -1, units & 0xFF)
    seen = np.zeros(units.size, bool)
    bytes_ = np.arange(1, 256)
    places = offsets[:1]
    while places.size:
        if ((places | 0xFF) >= units.size).any():
            raise ValueError("the map of characters points outside of itself; the file is damaged")
        seen[places] = True
        found: list[npt.NDArray[np.int64]] = []
        for some in np.split(places, range(_PLACES, places.size, _PLACES)):
            next_units = some[:, None] ^ bytes_
            reached = next_units[labels[next_units] == bytes_]
            found.append(reached ^ offsets[reached])
            leaves = found[-1][units[reached] >> 8 & 1 == 1]
            begins = units[leaves[leaves < units.size]] & 0x7FFFFFFF
            if (leaves >= units.size).any() or (begins > len(texts)).any() or is_inside[begins].any():
                raise ValueError("the map of characters points outside of its texts; the file is damaged")
        places = np.unique(np.concatenate(found))
        places = places[(places >= units.size) | ~seen[np.minimum(places, units.size - 1)]]


def _parse(model: bytes) -> _Model:
    pieces: list[_Piece] = []
    specs: dict[int, dict[int, int | bytes]] = {2: {}, 3: {}}
    for number, value in _fields(model):
        if number == 1:
            pieces.append(_piece(value, len(pieces)))
        elif number in specs:
            specs[number].update(_fields(_message(value, f"field {number}")))
        if len(pieces) > bpe.MAX_TOKENS:
            raise ValueError(f"the SentencePiece model has more than {bpe.MAX_TOKENS} pieces")
    if not pieces:
        raise ValueError("the file has no pieces; expected a SentencePiece model")
    return _Model(pieces, specs[2], specs[3])


def _piece(value: int | bytes, i: int) -> _Piece:
    fields = dict(_fields(_message(value, f"piece {i}")))
    text, score, kind = fields.get(1, b""), fields.get(2, b"\0\0\0\0"), fields.get(3, _NORMAL)
    if (
        not isinstance(text, bytes)
        or not isinstance(score, bytes)
        or len(score) != 4
        or isinstance(kind, bytes)
    ):
        raise ValueError(
            f"piece {i} of the SentencePiece model has a field of another type; the file is damaged"
        )
    try:
        decoded = text.decode()
    except UnicodeDecodeError:
        raise ValueError(f"piece {i} of the SentencePiece model is not UTF-8: {shorten(text)}") from None
    number = struct.unpack("<f", score)[0]
    if not decoded or not math.isfinite(number):
        raise ValueError(f"piece {i} of the SentencePiece model is {shorten(decoded)} with score {number}")
    if kind == _UNUSED or not _NORMAL <= kind <= _BYTE:
        raise ValueError(f"piece {shorten(decoded)} is of type {shorten(kind)}; that is not supported")
    if kind == _BYTE and decoded not in bpe.BYTE_PIECES:
        raise ValueError(f"piece {shorten(decoded)} stands for a byte; expected a name like <0x0A>")
    return _Piece(decoded, number, kind)


def _message(value: int | bytes, what: str) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError(f"{what} of the SentencePiece model is a number; the file is damaged")
    return value


def _integer(fields: dict[int, int | bytes], number: int, default: int) -> int:
    value = fields.get(number, default)
    if isinstance(value, bytes):
        raise ValueError(f"field {number} of the SentencePiece model is no number; the file is damaged")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a protobuf message; fixed-size values as their bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if number == 0 or wire not in (_VARINT, _FIXED64, _BYTES, _FIXED32):
            raise ValueError(f"no protobuf at byte {at}; expected a SentencePiece model")
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        size = {_FIXED64: 8, _FIXED32: 4}.get(wire, 0)
        if wire == _BYTES:
            size, at = _varint(data, at)
        if size > len(data) - at:
            raise ValueError("the SentencePiece model ends inside a field; the file is truncated")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for n in range(10):
        if at + n >= len(data):
            raise ValueError("the SentencePiece model ends inside a number; the file is truncated")
        byte = data[at + n]
        value |= (byte & 0x7F) << (7 * n)
        if byte < 0x80:
            return value, at + n + 1
    raise ValueError(f"a number without end at byte {at}; expected a SentencePiece model")

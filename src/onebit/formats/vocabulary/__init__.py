"""Vocabularies of other formats as a tokenizer.json, and a tokenizer.json as the keys of a GGUF file.

    from_sentencepiece(model)                   # tokenizer.model of SentencePiece
    from_tiktoken(ranks, LLAMA3_SPECIAL_TOKENS, LLAMA3_PATTERN)
    from_gpt2(vocab, merges)                    # vocab.json and merges.txt
    from_llama2c(data, vocab_size)              # tokenizer.bin of llama2.c
    from_gguf(metadata), to_gguf(tokenizer, ...)

In a checkpoint a tokenizer is the bytes of a tokenizer.json, whatever it came as. All input is of unknown origin.
"""

import base64
import binascii
import math
import struct
from collections.abc import Sequence

from onebit.formats.tensors import parse_json, shorten
from onebit.formats.vocabulary import bpe, presplit
from onebit.formats.vocabulary.gguf import Vocabulary, from_gguf, to_gguf
from onebit.formats.vocabulary.sentencepiece import from_sentencepiece

__all__ = [
    "LLAMA3_PATTERN",
    "LLAMA3_SPECIAL_TOKENS",
    "Vocabulary",
    "from_gguf",
    "from_gpt2",
    "from_llama2c",
    "from_sentencepiece",
    "from_tiktoken",
    "to_gguf",
]

_MAX_BYTES = 64 << 20

LLAMA3_PATTERN = presplit.LLAMA3


def _llama3_special_tokens() -> tuple[str, ...]:
    named = {
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        9: "<|eot_id|>",
    }
    reserved = iter(range(256))
    return tuple(named.get(i) or f"<|reserved_special_token_{next(reserved)}|>" for i in range(256))


# The tokens that follow the 128,000 ranks of Llama 3, in order.
LLAMA3_SPECIAL_TOKENS = _llama3_special_tokens()


def from_tiktoken(ranks: bytes, special_tokens: Sequence[str], pattern: str) -> bytes:
    """The tokenizer.json of a tiktoken rank file: byte-level BPE.

    A rank file says in which order tokens are made, not of what. Each is made of one pair only, which is found by
    merging its bytes in that order (`bpe.last_merge`).

    Args:
        ranks: lines of a token in base64 and its rank; the ranks are 0, 1, 2, ...
        special_tokens: take the ids after the last rank.
        pattern: regular expression whose matches are the words of a text.

    Raises:
        ValueError: a damaged file, or one that lacks a byte.
    """
    tokens = _parse_ranks(ranks)
    order = {token: rank for rank, token in enumerate(tokens)}
    for byte in range(256):
        if bytes([byte]) not in order:
            raise ValueError(f"the rank file has no token for byte 0x{byte:02X}; expected all 256")
    pairs = [
        bpe.last_merge(token, lambda left, right: order.get(left + right))
        for token in tokens
        if len(token) > 1
    ]
    merges = [(bpe.spell(pair[0]), bpe.spell(pair[1])) for pair in pairs if pair]
    vocab = bpe.ids([*map(bpe.spell, tokens), *special_tokens])
    added = dict.fromkeys(range(len(tokens), len(vocab)), True)
    split = presplit.to_json((pattern, presplit.BYTES))
    return bpe.byte_level(vocab, merges, added, split, ignore_merges=True)


def from_gpt2(vocab: bytes, merges: bytes) -> bytes:
    """The tokenizer.json of GPT-2's two files: byte-level BPE; <|endoftext|> is special where it is a token.

    Args:
        vocab: vocab.json, a JSON object of tokens and their ids.
        merges: merges.txt, a pair of tokens a line, first to last.

    Raises:
        ValueError: a damaged file, or two that do not fit each other.
    """
    table = parse_json(vocab, "vocab.json")
    if len(table) > bpe.MAX_TOKENS or not table:
        raise ValueError(f"vocab.json has {len(table)} tokens; expected 1 to {bpe.MAX_TOKENS}")
    for token, i in table.items():
        if type(i) is not int or not 0 <= i < bpe.MAX_TOKENS:
            raise ValueError(
                f"vocab.json: token {shorten(token)} has id {shorten(i)}; expected a whole number"
            )
    if len(set(table.values())) != len(table):
        raise ValueError("vocab.json gives one id to several tokens")
    try:
        lines = [line.rstrip("\r") for line in merges.decode().split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"merges.txt is not UTF-8 at byte {error.start}") from None
    if lines and lines[0].startswith("#version"):
        del lines[0]
    pairs = [bpe.pair(line) for line in lines if line]
    added = {table[text]: True for text in ("<|endoftext|>",) if text in table}
    return bpe.byte_level(table, pairs, added, presplit.to_json((presplit.GPT2, presplit.BYTES)))


def from_llama2c(data: bytes, vocab_size: int) -> bytes:
    """The tokenizer.json of llama2.c's tokenizer.bin: SentencePiece BPE that falls back to bytes.

    The file is int32 longest piece, then for each piece float32 score, int32 length, bytes; little-endian. Pieces
    0 to 2 are <unk>, <s>, </s>, and 3 to 258 the bytes. Source: llama2.c, tokenizer.py and run.c.

    Args:
        data: the contents of the file.
        vocab_size: number of its pieces, which the model knows.

    Raises:
        ValueError: a damaged file, or one of another size.
    """
    if not 259 <= vocab_size <= bpe.MAX_TOKENS:
        raise ValueError(f"a tokenizer.bin has 259 to {bpe.MAX_TOKENS} pieces, not {shorten(vocab_size)}")
    texts: list[str] = []
    scores: list[float] = []
    at = 4
    for i in range(vocab_size):
        if len(data) - at < 8:
            raise ValueError(f"tokenizer.bin ends after {i} of {vocab_size} pieces")
        score, length = struct.unpack_from("<fi", data, at)
        at += 8
        if not 0 <= length <= len(data) - at:
            raise ValueError(f"piece {i} of tokenizer.bin claims {length} bytes; {len(data) - at} are left")
        if not math.isfinite(score):
            raise ValueError(f"piece {i} of tokenizer.bin has score {score}")
        try:
            texts.append(data[at : at + length].decode().replace(" ", bpe.SPACE))
        except UnicodeDecodeError:
            raise ValueError(f"piece {i} of tokenizer.bin is not UTF-8") from None
        scores.append(score)
        at += length
    if at != len(data):
        raise ValueError(f"{len(data) - at} bytes follow the {vocab_size} pieces of tokenizer.bin")
    # The file has line breaks around two of these, to print them.
    texts[:3] = ["<unk>", "<s>", "</s>"]
    if tuple(texts[3:259]) != bpe.BYTE_PIECES:
        raise ValueError("pieces 3 to 258 of tokenizer.bin are not the bytes <0x00> to <0xFF>")
    vocab = bpe.ids(texts)
    merges = bpe.merges_by_score(dict(zip(texts[259:], scores[259:], strict=True)), vocab)
    added = dict.fromkeys(range(3), True)
    return bpe.spaced(vocab, merges, added, "<unk>", byte_fallback=True, prefix=True)


def _parse_ranks(ranks: bytes) -> list[bytes]:
    if len(ranks) > _MAX_BYTES:
        raise ValueError(f"the rank file has {len(ranks)} bytes; expected at most {_MAX_BYTES}")
    tokens: dict[int, bytes] = {}
    for number, line in enumerate(ranks.splitlines(), 1):
        if not line:
            continue
        try:
            text, rank = line.split(b" ")
            token, i = base64.b64decode(text, validate=True), int(rank) if rank.isdigit() else -1
        except (ValueError, binascii.Error):
            raise ValueError(
                f"line {number} of the rank file is {shorten(line)}; expected base64 and rank"
            ) from None
        if not 0 < len(token) <= bpe.MAX_LENGTH or i < 0 or i in tokens:
            raise ValueError(
                f"line {number} of the rank file is {shorten(line)}; expected a new token and rank"
            )
        tokens[i] = token
    if not tokens or max(tokens) != len(tokens) - 1:
        raise ValueError(f"the rank file has {len(tokens)} ranks with gaps; expected 0, 1, 2, ...")
    return [tokens[i] for i in range(len(tokens))]

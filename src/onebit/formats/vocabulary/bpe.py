"""tokenizer.json documents of byte-pair encoders, and the merges that other formats leave unsaid.

Knows the JSON that the tokenizers library reads, and no format that it comes from.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from itertools import groupby
from typing import TypeVar

from onebit.formats.tensors import Json, shorten

# Far more than any vocabulary has; what is larger is no vocabulary.
MAX_TOKENS = 4_000_000
MAX_MERGES = 8_000_000
# Twice the longest of real vocabularies. Finding what a token is made of takes the square of its length.
MAX_LENGTH = 256

SPACE = "\u2581"
BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))

_Text = TypeVar("_Text", str, bytes)


def _byte_characters() -> tuple[str, ...]:
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return tuple(chr(byte if byte in visible else next(others)) for byte in range(256))


# Byte-level vocabularies spell each byte as one printable character.
BYTE_CHARACTERS = _byte_characters()


def spell(token: bytes) -> str:
    """A token of bytes as a byte-level vocabulary spells it."""
    return "".join([BYTE_CHARACTERS[byte] for byte in token])


def ids(tokens: Sequence[str]) -> dict[str, int]:
    """The id of each token: its place in the list.

    Raises:
        ValueError: none, too many, or one twice.
    """
    if not 0 < len(tokens) <= MAX_TOKENS:
        raise ValueError(f"the vocabulary has {len(tokens)} tokens; expected 1 to {MAX_TOKENS}")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice, i = next((token, i) for i, token in enumerate(tokens) if vocab[token] != i)
        raise ValueError(f"token {shorten(twice)} is there twice, as {i} and as {vocab[twice]}")
    return vocab


def pair(line: str) -> tuple[str, str]:
    """The two tokens of a merge, which are written with a space between them.

    Raises:
        ValueError: something else.
    """
    left, _, right = line.partition(" ")
    if not left or not right or " " in right:
        raise ValueError(f"the merge {shorten(line)} is not two tokens with a space between them")
    return left, right


def last_merge(token: _Text, rank: Callable[[_Text, _Text], float | None]) -> tuple[_Text, _Text] | None:
    """The pair whose merge makes a token, the only one that ever does.

    What happens between the ends of a token that gets made happens as if it stood alone: a merge across an
    end would have left nothing to make it of.

    Args:
        token: two characters or bytes, or more.
        rank: the order of merging a pair, lowest first and leftmost among equals; None if it is not merged.

    Returns:
        The pair, or None where merging comes to a halt before.

    Raises:
        ValueError: too long a token.
    """
    if len(token) > MAX_LENGTH:
        raise ValueError(f"token {shorten(token)} is {len(token)} long; expected at most {MAX_LENGTH}")

    parts = [token[i : i + 1] for i in range(len(token))]

    def ranked(i: int) -> float:
        value = rank(parts[i], parts[i + 1])
        return math.inf if value is None else value

    ranks = [ranked(i) for i in range(len(parts) - 1)]
    while len(ranks) > 1:
        best = min(ranks)
        if best == math.inf:
            return None
        i = ranks.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        del ranks[i]
        for j in range(max(i - 1, 0), min(i + 1, len(ranks))):
            ranks[j] = ranked(j)
    return parts[0], parts[1]


def merges_by_score(scores: Mapping[str, float], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """The merges of a SentencePiece model: two neighbours become a piece, the one of highest score first.

    Args:
        scores: of the pieces that merging may make.
        vocab: all pieces.

    Raises:
        ValueError: pieces that a list of merges cannot make as SentencePiece does.
    """
    costs = {piece: -score for piece, score in scores.items()}
    found: list[tuple[str, str, float]] = []
    for piece, cost in costs.items():
        if len(piece) < 2:
            continue
        pair = last_merge(piece, lambda left, right: costs.get(left + right))
        if pair is None:
            continue
        for part in pair:
            if part not in vocab:
                raise ValueError(f"piece {shorten(piece)} is made of {shorten(part)}, which is no piece")
        found.append((*pair, cost))
    # The longest of equals first, so that what was begun at the left goes on growing there.
    found.sort(key=lambda merge: (merge[2], -len(merge[0]) - len(merge[1])))
    urgent = {part for left, right, cost in found for part in (left, right) if costs.get(part, cost) > cost}
    for _, group in groupby(found, key=lambda merge: merge[2]):
        _check_ties([(left, right) for left, right, _ in group], urgent)
    return [(left, right) for left, right, _ in found]


def byte_level(
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    added: Mapping[int, bool],
    pre_tokenizer: Json,
    normalizer: Json | None = None,
    ignore_merges: bool = False,
) -> bytes:
    """The tokenizer.json of a byte-level BPE vocabulary, as GPT-2 has.

    Args:
        vocab: ids of the tokens, each byte spelled as one character.
        merges: pairs of tokens, first to last.
        added: ids of tokens that are found in a text as they are written; whether each is special.
        pre_tokenizer: cuts a text into words and spells them.
        normalizer: changes a text before that, or None.
        ignore_merges: a word that is a token is taken whole.

    Raises:
        ValueError: merges of no tokens, or a token that is not valid Unicode.
    """
    model = _model(vocab, merges) | {"ignore_merges": ignore_merges}
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return document(model, vocab, added, normalizer, pre_tokenizer, decoder)


def spaced(
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    added: Mapping[int, bool],
    unknown: str | None,
    byte_fallback: bool,
    prefix: bool,
    normalizers: Sequence[Json] = (),
) -> bytes:
    """The tokenizer.json of a SentencePiece BPE vocabulary, as Llama 2 has.

    Args:
        vocab: ids of the pieces, with U+2581 for a space.
        merges: pairs of pieces, first to last.
        added: ids of pieces that are found in a text as they are written; whether each is special.
        unknown: the piece for characters without one.
        byte_fallback: spell them in bytes instead.
        prefix: put a space before every text.
        normalizers: what changes a text before its spaces are replaced.

    Raises:
        ValueError: merges of no pieces, a missing byte, or a piece that is not valid Unicode.
    """
    require_bytes(vocab, byte_fallback)
    model = _model(vocab, merges) | {
        "unk_token": unknown,
        "fuse_unk": True,
        "byte_fallback": byte_fallback,
        "ignore_merges": False,
    }
    return document(
        model, vocab, added, spaces(prefix, normalizers), None, space_decoder(prefix, byte_fallback)
    )


def require_bytes(vocab: Mapping[str, int], byte_fallback: bool) -> None:
    """Check that a vocabulary that falls back to bytes has a piece for each.

    Raises:
        ValueError: one is missing.
    """
    if byte_fallback:
        for piece in BYTE_PIECES:
            if piece not in vocab:
                raise ValueError(f"the vocabulary spells unknown characters in bytes, but has no {piece}")


def spaces(prefix: bool, normalizers: Sequence[Json] = ()) -> Json:
    """The normalizer of SentencePiece: others first, then a space in front, then U+2581 for spaces."""
    steps = [
        *normalizers,
        *([{"type": "Prepend", "prepend": SPACE}] if prefix else []),
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ]
    return {"type": "Sequence", "normalizers": steps}


def space_decoder(prefix: bool, byte_fallback: bool) -> Json:
    """What undoes `spaces`: U+2581 becomes a space, bytes become characters, the space in front goes."""
    steps = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        *([{"type": "ByteFallback"}] if byte_fallback else []),
        {"type": "Fuse"},
        *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []),
    ]
    return {"type": "Sequence", "decoders": steps}


def document(
    model: Json,
    vocab: Mapping[str, int],
    added: Mapping[int, bool],
    normalizer: Json | None,
    pre_tokenizer: Json | None,
    decoder: Json,
) -> bytes:
    """Assemble a tokenizer.json.

    Raises:
        ValueError: an empty added token, or a token that is not valid Unicode.
    """
    texts = {i: text for text, i in vocab.items() if i in added}
    if "" in texts.values():
        raise ValueError(f"token {vocab['']} is special, but has no text")
    contents = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(i, texts[i], added[i]) for i in sorted(added)],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }
    try:
        return json.dumps(contents, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        around = error.object[max(error.start - 20, 0) : error.start + 20]
        raise ValueError(f"a token is not valid Unicode, near {shorten(around)}") from None


def _added_token(i: int, text: str, special: bool) -> Json:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": text, **plain, "special": special}


def _model(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> Json:
    if len(merges) > MAX_MERGES:
        raise ValueError(f"the vocabulary has {len(merges)} merges; expected at most {MAX_MERGES}")
    for left, right in merges:
        for token in (left, right, left + right):
            if token not in vocab:
                raise ValueError(
                    f"the merge of {shorten(left)} and {shorten(right)} needs {shorten(token)}, which is no token"
                )
    if len(set(merges)) != len(merges):
        (left, right), _ = Counter(merges).most_common(1)[0]
        raise ValueError(f"the merge of {shorten(left)} and {shorten(right)} is there twice")
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": dict(vocab),
        "merges": merges,
    }


def _check_ties(pairs: Sequence[tuple[str, str]], urgent: Container[str]) -> None:
    """Refuse merges of equal score if a list of them is not taken from left to right, as SentencePiece does.

    A pair, and what its left side was made of, has to come before any pair that would take its right side away. And
    none may be urgent, part of a piece of higher score: that is made at once, of whatever stands beside it.
    """
    if len(pairs) == 1:
        return
    ranks = {left + right: rank for rank, (left, right) in enumerate(pairs)}
    latest: dict[str, int] = {}
    for left, right in sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1])):
        made = left + right
        latest[made] = max(ranks[made], latest.get(left, -1), latest.get(right, -1))
    # What takes a piece away, the first two: one of them may be the pair itself.
    takers: dict[str, list[str]] = {}
    for left, right in pairs:
        takers.setdefault(left, []).append(left + right)
        del takers[left][2:]
    for left, right in pairs:
        made = left + right
        last = math.inf if made in urgent else max(ranks[made], latest.get(left, -1))
        for other in list(ranks)[:2] if made in urgent else takers.get(right, ()):
            if other != made and last > ranks[other]:
                raise ValueError(
                    f"pieces {shorten(made)} and {shorten(other)} have the same score, so which is merged first "
                    f"depends on the text; a tokenizer.json cannot say that"
                )

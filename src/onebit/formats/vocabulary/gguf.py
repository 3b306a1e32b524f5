"""The `tokenizer.ggml.*` keys of a GGUF file to a tokenizer.json, and back.

Two kinds are known: "gpt2", byte-level BPE, and "llama", SentencePiece BPE. Files are read as llama.cpp reads them, but
for words that it cuts otherwise than the model's own tokenizer (`falcon`, `deepseek-llm`; `gpt-4o` and `tekken` around
combining marks) and characters that it does not compose (`qwen2`, `olmo`, `mpt`). Source: llama.cpp,
src/llama-vocab.cpp.
"""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from onebit.formats.tensors import Json, parse_json, shorten
from onebit.formats.vocabulary import bpe, presplit

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_NO_VOCABULARY = (None, "no_vocab", "none")

# The keys of tokens that end a text, in the order in which they are written.
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Many files name only the first of several; llama.cpp then ends a text at these too.
_END_TEXTS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>", "<|end_of_text|>", "<|endoftext|>")

_Ids = tuple[int, ...]


class Vocabulary(NamedTuple):
    """What a GGUF file says of its texts.

    Args:
        tokenizer: a tokenizer.json, or None where the file has no vocabulary.
        bos_token: id put before every text, or None.
        eos_tokens: ids that end a text.
        chat_template: jinja2 source, or None.
    """

    tokenizer: bytes | None
    bos_token: int | None
    eos_tokens: tuple[int, ...]
    chat_template: str | None


def from_gguf(metadata: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of a GGUF file.

    Args:
        metadata: keys and values of the file; arrays as sequences or as numpy arrays.

    Raises:
        ValueError: a kind of tokenizer that is not supported, or keys that are missing or do not fit each other.
    """
    template = _get(metadata, "chat_template", str, None, key="tokenizer.chat_template")
    model = _get(metadata, "model", str, None)
    if model in _NO_VOCABULARY:
        return Vocabulary(None, None, (), template)
    if model not in ("gpt2", "llama"):
        raise ValueError(f"tokenizer.ggml.model is {shorten(model)}; expected 'gpt2' or 'llama'")
    tokens = _strings(metadata, "tokens")
    vocab = bpe.ids(tokens)
    types = _types(metadata, len(tokens))
    # llama.cpp's defaults for a SentencePiece model that does not name them.
    bos, eos, unknown = (1, 2, 0) if model == "llama" else (None, None, None)
    bos = _token(metadata, "bos_token_id", len(tokens), bos)
    unknown = _token(metadata, "unknown_token_id", len(tokens), unknown)
    ends = [_token(metadata, key, len(tokens), eos if key == _ENDS[0] else None) for key in _ENDS]
    if ends[1:] == [None, None]:
        ends += [vocab[text] for text in _END_TEXTS if text in vocab and types[vocab[text]] == _CONTROL]
    eos_tokens = tuple(dict.fromkeys(end for end in ends if end is not None))

    specials = (_UNKNOWN, _CONTROL)
    added = {i: kind in specials for i, kind in enumerate(types) if kind in (*specials, _USER_DEFINED)}
    added |= dict.fromkeys((i for i in (bos, *eos_tokens) if i is not None), True)
    if model == "gpt2":
        tokenizer, add_bos = _read_gpt2(metadata, vocab, added)
    else:
        tokenizer, add_bos = _read_llama(metadata, vocab, types, added, unknown), True
    said = _get(metadata, "add_bos_token", bool, None)
    if said and bos is None:
        raise ValueError("tokenizer.ggml.add_bos_token is true, but there is no tokenizer.ggml.bos_token_id")
    return Vocabulary(tokenizer, bos if (add_bos if said is None else said) else None, eos_tokens, template)


def to_gguf(
    tokenizer: bytes,
    vocab_size: int,
    bos_token: int | None,
    eos_tokens: Sequence[int],
    chat_template: str | None,
) -> dict[str, Any]:
    """The `tokenizer.ggml.*` keys with which llama.cpp finds the tokens of a tokenizer.json.

    Args:
        tokenizer: a tokenizer.json.
        vocab_size: of the model; ids without a token become unused ones.
        bos_token: id put before every text, or None.
        eos_tokens: ids that end a text, at most three.
        chat_template: jinja2 source, or None.

    Returns:
        Texts, whole numbers, truth values, lists of texts, and numpy arrays: `scores` is float32, `token_type`
        int32.

    Raises:
        ValueError: no tokenizer.json, or one that GGUF cannot express; the message says why.
    """
    document = parse_json(tokenizer, "tokenizer.json")
    model = document.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else model
        raise _inexpressible(f"its model is {shorten(kind)}, not BPE")
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(field):
            raise _inexpressible(f"it has a {field}")
    tokens, types = _tokens(document, model, vocab_size)
    merges = _merges(model)
    if _kinds(document.get("decoder"), "decoders") == ["ByteLevel"]:
        keys = _write_gpt2(document, model, merges)
    else:
        keys = _write_llama(document, model, tokens, types, merges)
    if len(eos_tokens) > len(_ENDS):
        raise _inexpressible(f"{len(eos_tokens)} tokens end a text, and GGUF names at most {len(_ENDS)}")
    named = {} if bos_token is None else {"bos_token_id": bos_token}
    named |= dict(zip(_ENDS, eos_tokens, strict=False))
    for key, token in named.items():
        if not 0 <= token < vocab_size:
            raise ValueError(f"{key} is {token}; the model has tokens 0 to {vocab_size - 1}")
    keys |= {"tokens": tokens, "token_type": np.array(types, np.int32), **named}
    keys |= {"add_bos_token": bos_token is not None, "add_eos_token": False}
    template = {} if chat_template is None else {"tokenizer.chat_template": chat_template}
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()} | template


def _read_gpt2(
    metadata: Mapping[str, Any], vocab: Mapping[str, int], added: Mapping[int, bool]
) -> tuple[bytes, bool]:
    name = _get(metadata, "pre", str, "default")
    split = presplit.PRESPLITS.get(name)
    if split is None:
        known = ", ".join(presplit.PRESPLITS)
        raise ValueError(f"tokenizer.ggml.pre is {shorten(name)}; expected one of {known}")
    merges = [bpe.pair(line) for line in _strings(metadata, "merges")]
    normalizer = {"type": "NFC"} if split.nfc else None
    steps = presplit.to_json(split.steps)
    return bpe.byte_level(vocab, merges, added, steps, normalizer, split.ignore_merges), split.bos


def _read_llama(
    metadata: Mapping[str, Any],
    vocab: Mapping[str, int],
    types: Sequence[int],
    added: Mapping[int, bool],
    unknown: int | None,
) -> bytes:
    scores = _array(metadata, "scores", len(vocab), np.float32)
    if not np.isfinite(scores).all():
        raise ValueError("tokenizer.ggml.scores has values that are no finite numbers; the file is damaged")
    # Runs of spaces, which some models define themselves, are made by merging too: texts have no such character.
    made = {
        text: float(scores[i])
        for text, i in vocab.items()
        if (types[i] in (_NORMAL, _UNUSED) and i not in added and text not in bpe.BYTE_PIECES)
        or (types[i] == _USER_DEFINED and set(text) == {bpe.SPACE})
    }
    merges = bpe.merges_by_score(made, vocab)
    prefix = _get(metadata, "add_space_prefix", bool, True)
    name = None if unknown is None else next(text for text, i in vocab.items() if i == unknown)
    return bpe.spaced(vocab, merges, added, name, byte_fallback=True, prefix=prefix)


def _write_gpt2(document: Json, model: Json, merges: Sequence[tuple[str, str]]) -> Json:
    steps = presplit.from_json(document.get("pre_tokenizer"))
    normalizer = _kinds(document.get("normalizer"), "normalizers")
    ignore_merges = bool(model.get("ignore_merges"))
    for name, split in presplit.PRESPLITS.items():
        same = split.steps == steps and split.ignore_merges == ignore_merges
        if same and normalizer == (["NFC"] if split.nfc else []):
            lines = [f"{left} {right}" for left, right in merges]
            return {"model": "gpt2", "pre": name, "merges": lines}
    raise _inexpressible(
        f"llama.cpp has no name for its way to cut a text into words ({shorten(steps)}, after {normalizer})"
    )


def _write_llama(
    document: Json, model: Json, tokens: Sequence[str], types: list[int], merges: Sequence[tuple[str, str]]
) -> Json:
    prefix = next((p for p in (True, False) if _same(document.get("normalizer"), bpe.spaces(p))), None)
    if prefix is None or document.get("pre_tokenizer") is not None:
        raise _inexpressible("it is not byte-level, and does not treat spaces as SentencePiece does")
    if not model.get("byte_fallback") or model.get("ignore_merges"):
        raise _inexpressible("it does not spell unknown characters in bytes, or takes words whole")
    vocab = {text: i for i, text in enumerate(tokens)}
    bpe.require_bytes(vocab, True)
    for text in bpe.BYTE_PIECES:
        types[vocab[text]] = _BYTE
    keys: Json = {"model": "llama", "pre": "default", "add_space_prefix": prefix}
    unknown = model.get("unk_token")
    if unknown is not None:
        if unknown not in vocab:
            raise ValueError(f"tokenizer.json: unk_token {shorten(unknown)} is no token")
        types[vocab[unknown]] = _UNKNOWN
        keys["unknown_token_id"] = vocab[unknown]
    return keys | {"scores": _scores(vocab, types, merges)}


def _scores(
    vocab: Mapping[str, int], types: Sequence[int], merges: Sequence[tuple[str, str]]
) -> npt.NDArray[np.float32]:
    """Scores by which llama.cpp makes the merges of a list, in its order.

    It merges any two neighbours that are a token together, so what the list does not make has to be out of reach.
    """
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    pieces = [text for text, i in vocab.items() if len(text) > 1 and types[i] == _NORMAL]
    made = {piece: bpe.last_merge(piece, lambda left, right: ranks.get((left, right))) for piece in pieces}
    # The end of merging is no merge yet: the list has to have it.
    made = {piece: pair if pair in ranks else None for piece, pair in made.items()}
    costs = {piece: ranks[pair] if pair else len(merges) for piece, pair in made.items()}
    for piece, pair in made.items():
        if bpe.last_merge(piece, lambda left, right: costs.get(left + right)) != pair:
            raise _inexpressible(f"scores cannot say of what {shorten(piece)} is made")
    scores = np.full(len(vocab), -len(merges) - 1, np.float32)
    for piece, cost in costs.items():
        scores[vocab[piece]] = -cost
    return scores


def _tokens(document: Json, model: Json, vocab_size: int) -> tuple[list[str], list[int]]:
    """Texts and types of all ids of a tokenizer.json."""
    vocab, added = model.get("vocab"), document.get("added_tokens") or []
    if not isinstance(vocab, dict) or not isinstance(added, list):
        raise ValueError("tokenizer.json: vocab is no table, or added_tokens no list")
    if not 0 < vocab_size <= bpe.MAX_TOKENS:
        raise ValueError(f"the vocabulary has {vocab_size} tokens; expected 1 to {bpe.MAX_TOKENS}")
    texts: dict[int, str] = {}
    types = [_UNUSED] * vocab_size

    def place(text: object, i: object, kind: int) -> None:
        if not isinstance(text, str) or type(i) is not int or not 0 <= i < vocab_size:
            raise ValueError(
                f"tokenizer.json: token {shorten(text)} has id {shorten(i)}; the model has {vocab_size} tokens"
            )
        if texts.setdefault(i, text) != text:
            raise ValueError(f"tokenizer.json: {shorten(text)} and {shorten(texts[i])} have the same id, {i}")
        types[i] = kind

    for text, i in vocab.items():
        place(text, i, _NORMAL)
    for token in added:
        if not isinstance(token, dict):
            raise ValueError(f"tokenizer.json: added token {shorten(token)} is no table")
        if any(token.get(option) for option in ("single_word", "lstrip", "rstrip")):
            raise _inexpressible(
                f"its token {shorten(token.get('content'))} takes spaces or words around it along"
            )
        place(token.get("content"), token.get("id"), _CONTROL if token.get("special") else _USER_DEFINED)
    tokens = [texts.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    bpe.ids(tokens)
    return tokens, types


def _merges(model: Json) -> list[tuple[str, str]]:
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise ValueError("tokenizer.json: merges is no list")
    # Older files have the two tokens in one text, newer ones in a list.
    return [bpe.pair(merge if isinstance(merge, str) else _line(merge)) for merge in merges]


def _line(merge: object) -> str:
    if not isinstance(merge, list) or len(merge) != 2 or not all(isinstance(part, str) for part in merge):
        raise ValueError(f"tokenizer.json: merge {shorten(merge)} is not two tokens")
    return " ".join(merge)


def _kinds(node: object, parts: str) -> list[str]:
    """The types of a step, or of the steps of a sequence; [] for none."""
    if not isinstance(node, dict):
        return []
    inside = node.get(parts)
    if node.get("type") == "Sequence" and isinstance(inside, list):
        return [kind for part in inside for kind in _kinds(part, parts)]
    return [shorten(node.get("type")).strip("'")]


def _same(node: object, steps: Json) -> bool:
    """Whether a normalizer is this sequence, or the only step of it."""
    return node == steps or [node] == steps["normalizers"]


def _inexpressible(reason: str) -> ValueError:
    return ValueError(
        f"this tokenizer cannot be expressed in GGUF: {reason}; keep the model as a .onebit file or a folder"
    )


def _get(metadata: Mapping[str, Any], name: str, kind: type, default: Any, key: str | None = None) -> Any:
    key = key or f"tokenizer.ggml.{name}"
    value = metadata.get(key)
    if value is None:
        return default
    if kind is bool and isinstance(value, np.bool_):
        return bool(value)
    if not isinstance(value, kind):
        raise ValueError(f"{key} is {shorten(value)}; expected a value of type {kind.__name__}")
    return value


def _token(metadata: Mapping[str, Any], name: str, n_tokens: int, default: int | None) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None:
        return default if default is not None and default < n_tokens else None
    if not isinstance(value, Integral) or isinstance(value, bool) or not 0 <= int(value) < n_tokens:
        raise ValueError(
            f"tokenizer.ggml.{name} is {shorten(value)}; expected a token from 0 to {n_tokens - 1}"
        )
    return int(value)


def _strings(metadata: Mapping[str, Any], name: str) -> list[str]:
    values = metadata.get(f"tokenizer.ggml.{name}")
    limit = max(bpe.MAX_TOKENS, bpe.MAX_MERGES)
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) > limit:
        raise ValueError(
            f"tokenizer.ggml.{name} is {shorten(type(values).__name__)}; expected a list of texts"
        )
    for value in values:
        if not isinstance(value, str):
            raise ValueError(f"tokenizer.ggml.{name} has {shorten(value)} in it; expected texts")
    return list(values)


def _array(metadata: Mapping[str, Any], name: str, size: int, dtype: type) -> npt.NDArray[Any]:
    values = metadata.get(f"tokenizer.ggml.{name}")
    try:
        array = np.asarray(values)
    except ValueError:
        array = np.empty(0)
    if array.shape != (size,) or array.dtype.kind not in ("if" if dtype is np.float32 else "iu"):
        raise ValueError(f"tokenizer.ggml.{name} is not a list of {size} numbers, one for each token")
    return array.astype(dtype)


def _types(metadata: Mapping[str, Any], size: int) -> list[int]:
    if metadata.get("tokenizer.ggml.token_type") is None:
        return [_NORMAL] * size
    types: list[int] = _array(metadata, "token_type", size, np.int64).tolist()
    for i, kind in enumerate(types):
        if not 0 <= kind <= _BYTE:
            raise ValueError(f"tokenizer.ggml.token_type of token {i} is {kind}; expected 0 to {_BYTE}")
    # 0 is a type that was never set.
    return [kind or _NORMAL for kind in types]

"""Tokenizer and chat template of a Hugging Face model: many files there, a tokenizer.json and a template here.

    found = read(folder, vocab_size)
    files = build(tokenizer, chat_template, config)     # {"tokenizer.json": b"...", ...}

Trusts nothing in a file. Runs no tokenizer.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from onebit.config import ModelConfig
from onebit.formats import vocabulary
from onebit.formats.hf.shards import read_json, read_small
from onebit.formats.tensors import Json, named, parse_json, shorten

TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
GENERATION = "generation_config.json"


class Found(NamedTuple):
    """What the files of a tokenizer say.

    Args:
        tokenizer: bytes of a tokenizer.json, or None where there is none.
        chat_template: Jinja source, or None.
        adds_bos: whether a text starts with bos_token; None where there is no tokenizer to say so.
        bos_token: id, or None.
        eos_token: the id that the chat template knows by this name, or None.
    """

    tokenizer: bytes | None
    chat_template: str | None
    adds_bos: bool | None
    bos_token: int | None
    eos_token: int | None


def read(folder: Path, vocab_size: int) -> Found:
    """Read tokenizer.json, or what older models have in its place, and what stands beside it.

    Raises:
        ValueError: a damaged file, or a token whose id is not below vocab_size.
        OSError: a file cannot be opened.
    """
    settings = read_json(folder / SETTINGS, "settings") if (folder / SETTINGS).is_file() else {}
    template = _template(folder, settings)
    contents = _tokenizer(folder)
    if contents is None:
        return Found(None, template, None, None, None)
    data, source = contents
    declared = _declared(folder, settings)
    with named(folder / source):
        tokenizer = parse_json(data, "tokenizer")
        vocab = _vocabulary(tokenizer)
        if _add_tokens(tokenizer, vocab, declared):
            data = json.dumps(tokenizer, separators=(",", ":")).encode()
        _check_ids(vocab, vocab_size)
    specials = _specials(folder, settings)
    bos, eos = (vocab.get(text) if text is not None else None for text in specials)
    first = _prepended(tokenizer.get("post_processor"), vocab)
    adds = first is not None
    if source != TOKENIZER:
        # Only where there is no tokenizer.json does transformers look here.
        told = settings.get("add_bos_token")
        adds = told if isinstance(told, bool) else source == "tokenizer.model"
    return Found(data, template, adds, first if first is not None else bos, eos)


def build(tokenizer: bytes | None, chat_template: str | None, config: ModelConfig) -> dict[str, bytes]:
    """The files with which transformers encodes as we do: AutoTokenizer reads them.

    Args:
        tokenizer: bytes of a tokenizer.json, or None.
        chat_template: Jinja source, or None.
        config: of the model, which names the special tokens.

    Raises:
        ValueError: a damaged tokenizer.json, or one that is not of this model.
    """
    eos = list(config.eos_tokens)
    generation: Json = {"bos_token_id": config.bos_token, "eos_token_id": eos[0] if len(eos) == 1 else eos}
    generation = {name: value for name, value in generation.items() if value not in (None, [])}
    files = {GENERATION: _dump(generation)}
    if chat_template is not None:
        files[TEMPLATE] = chat_template.encode("utf-8")
    if tokenizer is None:
        return files
    parsed = parse_json(tokenizer, TOKENIZER)
    vocab = _vocabulary(parsed)
    _check_ids(vocab, config.vocab_size)
    texts = {token: text for text, token in vocab.items()}
    if _prepended(parsed.get("post_processor"), vocab) != config.bos_token:
        parsed["post_processor"] = _prepends(texts, config.bos_token)
        tokenizer = json.dumps(parsed, separators=(",", ":")).encode()
    settings: Json = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_seq_len,
        "clean_up_tokenization_spaces": False,
        "bos_token": texts.get(-1 if config.bos_token is None else config.bos_token),
        "eos_token": texts.get(eos[0]) if eos else None,
    }
    if chat_template is not None:
        # Readers from before 2025 look here alone.
        settings["chat_template"] = chat_template
    settings = {name: value for name, value in settings.items() if value is not None}
    return files | {TOKENIZER: tokenizer, SETTINGS: _dump(settings)}


def _tokenizer(folder: Path) -> tuple[bytes, str] | None:
    """A tokenizer.json, and the file that it was made of."""
    if (folder / TOKENIZER).is_file():
        with named(folder / TOKENIZER):
            return read_small(folder / TOKENIZER), TOKENIZER
    if (folder / "tokenizer.model").is_file():
        with named(folder / "tokenizer.model"):
            model = read_small(folder / "tokenizer.model")
            # Llama 3 has lines of base64 under this name.
            if model[:64].split(b"\n")[0].endswith(b" 0"):
                special, pattern = vocabulary.LLAMA3_SPECIAL_TOKENS, vocabulary.LLAMA3_PATTERN
                return vocabulary.from_tiktoken(model, special, pattern), "tokenizer.model"
            return vocabulary.from_sentencepiece(model), "tokenizer.model"
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        with named(folder / "vocab.json"):
            vocab, merges = read_small(folder / "vocab.json"), read_small(folder / "merges.txt")
            return vocabulary.from_gpt2(vocab, merges), "vocab.json"
    return None


def _template(folder: Path, settings: Json) -> str | None:
    if (folder / TEMPLATE).is_file():
        with named(folder / TEMPLATE):
            try:
                return read_small(folder / TEMPLATE).decode("utf-8")
            except UnicodeDecodeError:
                raise ValueError("the chat template is not UTF-8; the file is damaged") from None
    path = folder / "chat_template.json"
    if path.is_file():
        settings = read_json(path, "template")
    else:
        path = folder / SETTINGS
    template = settings.get("chat_template")
    if isinstance(template, list):
        named_ones = {
            entry["name"]: entry.get("template")
            for entry in template
            if isinstance(entry, dict) and isinstance(entry.get("name"), str)
        }
        template = named_ones.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError(
            f"{path}: chat_template is {shorten(template)}; expected a text, or a list with a default one"
        )
    return template


def _vocabulary(tokenizer: Json) -> dict[str, int]:
    """All tokens of a tokenizer.json and their ids."""
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    # A unigram model lists pieces and scores, in the order of their ids.
    if isinstance(vocab, list) and all(
        isinstance(piece, list) and piece and isinstance(piece[0], str) for piece in vocab
    ):
        vocab = {piece[0]: i for i, piece in enumerate(vocab)}
    if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
        raise ValueError("the tokenizer has no vocabulary of tokens and ids; the file is damaged")
    return vocab | {str(entry["content"]): int(entry["id"]) for entry in _added(tokenizer)}


def _check_ids(vocab: Mapping[str, int], vocab_size: int) -> None:
    if vocab and max(vocab.values()) >= vocab_size:
        token = max(vocab, key=vocab.__getitem__)
        raise ValueError(
            f"token {shorten(token)} has the id {shorten(vocab[token])}, but the model's vocab_size is {vocab_size}; "
            "take tokenizer and model from one place"
        )


def _added(tokenizer: Json) -> list[Json]:
    added = tokenizer.get("added_tokens")
    added = [] if added is None else added
    is_list = isinstance(added, list) and all(
        isinstance(entry, dict) and type(entry.get("id")) is int and isinstance(entry.get("content"), str)
        for entry in added
    )
    if not is_list:
        raise ValueError(f"added_tokens is {shorten(added)}; expected a list of ids and contents")
    return list(added)


def _add_tokens(tokenizer: Json, vocab: dict[str, int], declared: list[tuple[int, str, Json]]) -> bool:
    """Add to a tokenizer, and to its vocabulary, the tokens that other files alone name; whether there were any."""
    added = _added(tokenizer)
    known, last = {entry["id"] for entry in added}, max(vocab.values(), default=-1)
    new: dict[int, Json] = {}
    for token, text, flags in declared:
        if token in known or token in new:
            continue
        if vocab.get(text, token) != token:
            raise ValueError(f"token {shorten(text)} has the id {vocab[text]}, but {token} in {SETTINGS}")
        new[token] = {"id": token, "content": text, **flags}
    for token in sorted(token for token in new if new[token]["content"] not in vocab):
        # The library numbers them itself.
        if token != last + 1:
            raise ValueError(
                f"token {shorten(new[token]['content'])} has the id {token} in {SETTINGS} or added_tokens.json, the "
                f"last before it {last}; expected no gap"
            )
        last = token
    vocab |= {entry["content"]: token for token, entry in new.items()}
    tokenizer["added_tokens"] = sorted([*added, *new.values()], key=lambda entry: int(entry["id"]))
    return bool(new)


def _declared(folder: Path, settings: Json) -> list[tuple[int, str, Json]]:
    """Id, text and flags of the tokens that tokenizer_config.json and added_tokens.json name."""
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    declared: list[tuple[int, str, Json]] = []
    with named(folder / SETTINGS):
        table = settings.get("added_tokens_decoder")
        table = {} if table is None else table
        if not isinstance(table, dict):
            raise ValueError(f"added_tokens_decoder is {shorten(table)}; expected a table")
        for key, entry in table.items():
            text = entry.get("content") if isinstance(entry, dict) else None
            if not isinstance(text, str) or not (key.isascii() and key.isdigit() and len(key) < 9):
                raise ValueError(
                    f"added_tokens_decoder has {shorten(key)}: {shorten(entry)}; expected ids and contents"
                )
            declared.append((int(key), text, {name: entry.get(name) is True for name in names}))
    path = folder / "added_tokens.json"
    table = read_json(path, "added tokens") if path.is_file() else {}
    for text, token in table.items():
        if type(token) is not int or not 0 <= token < 2**24:
            raise ValueError(f"{path}: {shorten(text)} is {shorten(token)}; expected an id")
        declared.append((token, text, dict.fromkeys(names, False) | {"special": True}))
    return declared


def _specials(folder: Path, settings: Json) -> tuple[str | None, str | None]:
    """The texts of bos_token and eos_token."""
    path = folder / "special_tokens_map.json"
    table = (read_json(path, "special tokens") if path.is_file() else {}) | settings

    def text(name: str) -> str | None:
        value = table.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        return value if isinstance(value, str) else None

    return text("bos_token"), text("eos_token")


def _prepended(processor: Any, vocab: dict[str, int]) -> int | None:
    """The id of the token that a post-processor puts before a text."""
    if not isinstance(processor, dict):
        return None
    steps = processor.get("processors") if processor.get("type") == "Sequence" else [processor]
    for step in steps if isinstance(steps, list) else []:
        if not isinstance(step, dict) or step.get("type") != "TemplateProcessing":
            continue
        single = step.get("single")
        first = single[0] if isinstance(single, list) and single else None
        special = first.get("SpecialToken") if isinstance(first, dict) else None
        name = special.get("id") if isinstance(special, dict) else None
        if isinstance(name, str) and name in vocab:
            return vocab[name]
    return None


def _prepends(texts: Mapping[int, str], bos_token: int | None) -> Json | None:
    """The post-processor that puts a token before a text."""
    if bos_token is None:
        return None
    if bos_token not in texts:
        raise ValueError(
            f"the tokenizer has no token {bos_token}, which the config has every text begin with"
        )
    text = texts[bos_token]
    bos, first, second = (
        {"SpecialToken": {"id": text, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"Sequence": {"id": "B", "type_id": 1}},
    )
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, second],
        "special_tokens": {text: {"id": text, "ids": [bos_token], "tokens": [text]}},
    }


def _dump(values: Json) -> bytes:
    return json.dumps(values, indent=2, ensure_ascii=True).encode() + b"\n"

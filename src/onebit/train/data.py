"""From a folder of text to token shards: documents, tokenizer training, memory-mapped arrays, batches.

Reads .txt, .md and .jsonl (field "text"), plain or inside .tar, .gz, .xz and .bz2. Knows nothing of models. A batch
is a pure function of the seed and the step, so a resumed run reads what the killed one would have read.
"""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import groupby
from pathlib import Path
from typing import IO

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from onebit.formats.files import write_file

END_OF_TEXT = "<|endoftext|>"
# Of one file or member, unpacked: a few kilobytes of archive may claim terabytes.
MAX_TEXT_BYTES = 2**32
# Of a document, when it is decided what to hold out: a book is held out in parts, a story whole.
PIECE_CHARACTERS = 4096
# More than any tokenizer that is trained here joins on average.
CHARACTERS_PER_TOKEN = 8
TEXT_SUFFIXES = (".txt", ".md", ".jsonl")
_OPENERS: dict[str, Callable[[Path], IO[bytes]]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}  # type: ignore[dict-item]


@dataclass(frozen=True)
class Corpus:
    """Tokenised text in a folder: one array of training tokens and one of held-out tokens.

    Args:
        train: uint16 or uint32 [n], memory-mapped; documents end with the end-of-text token.
        held_out: the same, of documents that no training token comes from.
        token_bytes: int32 [vocab], UTF-8 bytes that each token stands for.
        sha256: of both arrays and the tokenizer: names the data in a model's provenance.
        tokenizer: the bytes of tokenizer.json.
        end_token: id of the end-of-text token.
    """

    train: np.ndarray
    held_out: np.ndarray
    token_bytes: np.ndarray
    sha256: str
    tokenizer: bytes
    end_token: int


@dataclass(frozen=True)
class Given:
    """A tokenizer that is not trained here, as that of a teacher.

    Args:
        tokenizer: bytes of tokenizer.json.
        begin_token: id put before every document, or None.
        end_token: id put after every document.
    """

    tokenizer: bytes
    begin_token: int | None
    end_token: int


def read_documents(folder: Path, include: tuple[str, ...]) -> Iterator[str]:
    """Yield the texts below a folder, in the order of their paths.

    Args:
        folder: where to look.
        include: glob patterns; one must match "path/in/folder" (less .gz, .xz, .bz2) or
            "path/archive.tar.xz/member".

    Raises:
        ValueError: a damaged archive, a file that is not UTF-8 text or too large, or JSON lines without a "text".
        FileNotFoundError: the folder does not exist.
    """
    check_folder(folder)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        try:
            for member, raw in _open_members(path, name):
                if any(fnmatch(member, pattern) for pattern in include):
                    yield from _split_documents(str(folder / member), raw)
        except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            # bz2 and gzip report damage as an OSError without a number.
            reason = " ".join(str(error).split())
            raise ValueError(f"{path}: cannot be unpacked ({reason}); the file is damaged") from None


def check_folder(folder: Path | None) -> Path:
    """The folder of text, if there is one.

    Raises:
        ValueError: None.
        OSError: the folder does not exist, or is a file.
    """
    if folder is None:
        raise ValueError("no corpus is made yet; name a folder of .txt, .md or .jsonl files with --data")
    if folder.is_file():
        raise NotADirectoryError(f"{folder}: is a file; --data expects the folder that it lies in")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder; --data expects one with .txt, .md or .jsonl files"
        )
    return folder


def _open_members(path: Path, name: str) -> Iterator[tuple[str, IO[bytes]]]:
    if ".tar" in path.suffixes[-2:]:
        with tarfile.open(path) as archive:
            for entry in sorted((e for e in archive if e.isfile()), key=lambda e: e.name):
                raw = archive.extractfile(entry)
                if raw is not None and entry.name.endswith(TEXT_SUFFIXES):
                    yield f"{name}/{entry.name}", raw
    elif path.suffix in _OPENERS and path.stem.endswith(TEXT_SUFFIXES):
        with _OPENERS[path.suffix](path) as raw:
            yield name.removesuffix(path.suffix), raw
    elif path.suffix in TEXT_SUFFIXES:
        with path.open("rb") as raw:
            yield name, raw


def _split_documents(name: str, raw: IO[bytes]) -> Iterator[str]:
    content = raw.read(MAX_TEXT_BYTES + 1)
    if len(content) > MAX_TEXT_BYTES:
        raise ValueError(f"{name}: holds more than {MAX_TEXT_BYTES} bytes; split it or leave it out")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: not UTF-8 text (byte {error.start}); re-encode it or leave it out"
        ) from None
    if "\0" in text:
        # As UTF-16 has in every other place.
        raise ValueError(f"{name}: holds zero bytes, so it is no UTF-8 text; re-encode it or leave it out")
    if Path(name).suffix != ".jsonl":
        yield from (part.strip() for part in text.split(END_OF_TEXT) if part.strip())
        return
    # Not splitlines: JSON strings may hold the other characters that end a line.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
            if not isinstance(document, str):
                raise TypeError
            # An escape may stand for half a character.
            document.encode()
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(
                f'{name}, line {number}: expected a JSON object with a string "text" of valid Unicode'
            ) from None
        if document.strip():
            yield document.strip()


def train_tokenizer(documents: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer; every byte is a token, so no text is unknown.

    Raises:
        ValueError: the text yields fewer tokens than asked for.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"the text yields {tokenizer.get_vocab_size()} tokens, not {vocab_size}; "
            f"give more text or a smaller --set data.vocab_size"
        )
    return tokenizer


def divide(documents: list[str], held_out: float, enough: int) -> dict[str, list[str]]:
    """Divide documents into those to train on and those that are held out.

    Long documents are cut into pieces first, and a piece is held out when the hash of its text is among the smallest:
    the choice depends on nothing but the texts. What is left of a document between held-out pieces stays together.

    Args:
        documents: distinct texts.
        held_out: share of the pieces to hold out.
        enough: characters to hold out at least, up to half of all.

    Returns:
        {"train": texts, "held_out": texts}
    """
    cut = [_cut(text) for text in documents]
    hashes = {piece: hashlib.sha256(piece.encode()).digest()[:4] for pieces in cut for piece in pieces}
    enough = min(enough, sum(map(len, documents)) // 2)
    taken, size = set(), 0
    for piece, first in sorted(hashes.items(), key=lambda item: item[1]):
        if int.from_bytes(first, "big") >= held_out * 2**32 and size >= enough:
            break
        taken.add(piece)
        size += len(piece)
    parts: dict[str, list[str]] = {"train": [], "held_out": []}
    for pieces in cut:
        for is_held_out, run in groupby(pieces, key=taken.__contains__):
            parts["held_out" if is_held_out else "train"].append("".join(run))
    return parts


def _cut(text: str) -> list[str]:
    """Pieces of at most PIECE_CHARACTERS, cut after a line or else a word where there is one."""
    pieces = []
    while len(text) > PIECE_CHARACTERS:
        at = (
            max(
                text.rfind("\n", 0, PIECE_CHARACTERS),
                text.rfind(" ", PIECE_CHARACTERS // 2, PIECE_CHARACTERS),
            )
            + 1
        )
        at = at or PIECE_CHARACTERS
        pieces.append(text[:at])
        text = text[at:]
    return [*pieces, text]


def prepare(
    data: Path | None,
    out: Path,
    include: tuple[str, ...],
    vocab_size: int,
    held_out: float,
    seq_len: int,
    given: Given | None = None,
) -> Corpus:
    """Tokenise a folder into shards below `out`, training the tokenizer first unless it is given, and open them.

    A document is held out when the hash of its text says so; the choice depends on nothing else.

    Args:
        data: folder with text; not needed where the shards are finished.
        out: folder for tokenizer.json, train.npy and held_out.npy; finished ones are reused.
        include: see `read_documents`.
        vocab_size: of a tokenizer that is trained.
        held_out: share of the text that is never trained on; see `divide`.
        seq_len: both parts must hold at least one sequence of this length.
        given: the tokenizer to use, instead of a new one.

    Raises:
        ValueError: no text, too little text, or bad files; nothing is written then. Or damaged shards, or those of
            another tokenizer than the given one.
    """
    if not (out / "corpus.json").exists():
        documents = list(dict.fromkeys(read_documents(check_folder(data), include)))
        if not documents:
            raise ValueError(
                f"{data}: no text found; expected .txt, .md or .jsonl files (plain, .gz, .xz, .bz2 or .tar) "
                f"matching {', '.join(include)} (data.include)"
            )
        texts = divide(documents, held_out, CHARACTERS_PER_TOKEN * (seq_len + 1))
        tokenizer = (
            Tokenizer.from_buffer(given.tokenizer) if given else train_tokenizer(texts["train"], vocab_size)
        )
        raw = given.tokenizer if given else tokenizer.to_str().encode()
        begin, end = (
            (given.begin_token, given.end_token) if given else (None, tokenizer.get_vocab()[END_OF_TEXT])
        )
        parts = {name: _encode(tokenizer, texts[name], begin, end) for name in texts}
        for name, tokens in parts.items():
            if len(tokens) <= seq_len:
                raise ValueError(
                    f"{data}: the {name} part has {len(tokens)} tokens, fewer than one sequence of {seq_len} + 1; "
                    f"give more text or change data.held_out or data.seq_len"
                )
        _write(out, raw, parts, len(documents))
    try:
        corpus = _open(out, given)
    except Exception as error:  # the bindings raise a bare Exception
        if isinstance(error, (OSError, MemoryError)) and not isinstance(error, FileNotFoundError):
            raise
        raise ValueError(
            f"{out}: the corpus is damaged ({error}); delete it and resume with --data to make it again"
        ) from None
    if given and corpus.tokenizer != given.tokenizer:
        raise ValueError(
            f"{out}: the corpus was made with another tokenizer than the given one; delete it, or choose another folder"
        )
    return corpus


def _write(out: Path, tokenizer: bytes, parts: dict[str, np.ndarray], n_documents: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(tokenizer)
    for name, tokens in parts.items():
        digest.update(tokens.data)
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(tokens))
        write_file(out / f"{name}.npy", [header.getvalue(), tokens.data])
    write_file(out / "tokenizer.json", [tokenizer])
    # Written last: its presence says that the other files are whole.
    about = {"sha256": digest.hexdigest(), "documents": n_documents}
    write_file(out / "corpus.json", [json.dumps(about).encode()])


def _encode(tokenizer: Tokenizer, texts: list[str], begin: int | None, end: int) -> np.ndarray:
    # Settings for training on batches of others: they would cut or lengthen a document without a word.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    before = [] if begin is None else [begin]
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    chunks = [np.array([*before, *encoding.ids, end], dtype) for encoding in encodings]
    return np.concatenate(chunks) if chunks else np.empty(0, dtype)


def _open(out: Path, given: Given | None) -> Corpus:
    raw = (out / "tokenizer.json").read_bytes()
    tokenizer = Tokenizer.from_buffer(raw)
    end = given.end_token if given else tokenizer.get_vocab()[END_OF_TEXT]
    train, held_out = (
        np.lib.format.open_memmap(out / f"{name}.npy", mode="r") for name in ("train", "held_out")
    )
    sha256 = json.loads((out / "corpus.json").read_text())["sha256"]
    digest = hashlib.sha256(raw)
    for tokens in (train, held_out):
        digest.update(tokens.data)
    if digest.hexdigest() != sha256:
        raise ValueError("its bytes are not those that were written")
    return Corpus(
        train=train,
        held_out=held_out,
        token_bytes=count_bytes(tokenizer, end),
        sha256=sha256,
        tokenizer=raw,
        end_token=end,
    )


def count_bytes(tokenizer: Tokenizer, end_token: int) -> np.ndarray:
    """UTF-8 bytes of text that each token stands for, so that those of a document sum to its length.

    Special tokens stand for none. What a tokenizer adds to every text, as the space that some put before it, is taken
    off at the end token, of which every document has one.

    Args:
        tokenizer: byte-level, or with the words of SentencePiece.
        end_token: id of the token that ends a document.

    Returns:
        int32 [vocabulary].
    """
    added = tokenizer.get_added_tokens_decoder()
    # In a byte-level vocabulary every character of a token's name stands for one byte.
    is_bytewise = isinstance(tokenizer.decoder, decoders.ByteLevel)
    vocab = tokenizer.get_vocab()
    n_bytes = np.zeros(max(vocab.values()) + 1, np.int32)
    for name, token in vocab.items():
        if token in added:
            n_bytes[token] = 0 if added[token].special else len(added[token].content.encode())
        elif is_bytewise:
            n_bytes[token] = len(name)
        else:
            is_byte = re.fullmatch("<0x[0-9A-Fa-f]{2}>", name)
            n_bytes[token] = 1 if is_byte else len(name.replace("\u2581", " ").encode())
    n_bytes[end_token] = 1 - n_bytes[tokenizer.encode("a", add_special_tokens=False).ids].sum()
    return n_bytes


def batch(tokens: np.ndarray, step: int, batch_size: int, seq_len: int, seed: int) -> np.ndarray:
    """The sequences of one optimiser step, a pure function of its arguments; see `starts`.

    Args:
        tokens: [n], n > seq_len.
        step: number of the batch, from 0.
        batch_size: sequences.
        seq_len: tokens to predict in each.
        seed: of the order.

    Returns:
        int64 [batch_size, seq_len + 1]: inputs and, shifted by one, targets.
    """
    at = starts(len(tokens), step, batch_size, seq_len, seed)
    return np.stack([tokens[start : start + seq_len + 1].astype(np.int64) for start in at])


def starts(
    n_tokens: int, step: int, batch_size: int, seq_len: int, seed: int, shifted: bool = True
) -> list[int]:
    """Where the sequences of one optimiser step begin, a pure function of its arguments.

    Each epoch cuts the tokens into sequences at a random offset and visits them in a random order.

    Args:
        n_tokens: more than seq_len.
        step: number of the batch, from 0.
        batch_size: sequences.
        seq_len: tokens to predict in each.
        seed: of the order.
        shifted: whether the offset is random; else all epochs have the same sequences, from the first token on.
    """
    n_sequences = (n_tokens - 1) // seq_len
    spare = n_tokens - 1 - n_sequences * seq_len if shifted else 0
    found = []
    for index in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(index, n_sequences)
        random = np.random.default_rng((seed, epoch))
        found.append(int(random.integers(spare + 1)) + int(random.permutation(n_sequences)[place]) * seq_len)
    return found

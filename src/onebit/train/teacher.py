"""What a teacher says of a text: computed when it is asked, or once for a corpus and kept on disk.

    teacher = Teacher(checkpoint, "bf16")
    logits_BTV = teacher.logits(tokens_BT)
    said = keep_top_k(folder, teacher, corpus, seq_len=512, k=64, temperature=1.0)

On disk lie, for every position of a corpus that is cut into sequences from its first token on, the K likeliest next
tokens, the logs of their probabilities and the log of what is left for the others: 4 K + 2 bytes (6 K + 2 for a
vocabulary beyond 65,536) instead of 4 for each token of the vocabulary. The teacher runs in PyTorch, whose matrix
products in floating point are several times as fast for whole sequences as the engine's, which keep an order.
"""

import errno
import json
import math
import os
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from onebit.checkpoint import Checkpoint
from onebit.formats.files import write_file
from onebit.nn.transformer import States, Transformer
from onebit.packing import Float32
from onebit.train import ranks
from onebit.train.data import Corpus
from onebit.train.origin import fingerprint
from onebit.train.student import to_master

ABOUT = "about.json"
# Tokens that the teacher reads at once, fewer where their logits would be more than so many numbers, and tokens between
# two notes of how far it has come.
STEP_TOKENS = 2**12
STEP_LOGITS = 2**27
SAVE_TOKENS = 2**17
# The smallest float16 that is a number, rounded: log probabilities stay above it.
_LEAST = np.float32(-6e4)
# Zeros that are written at once.
_PIECE = bytes(2**20)

# Type and shape of an array.
_Kind = tuple[np.dtype[Any], tuple[int, ...]]


class TopK(NamedTuple):
    """A teacher's answers to a corpus, memory-mapped; row p is about the token after place p.

    Args:
        ids: uint16 or uint32 [n, K], likeliest first.
        log_p: logs of their probabilities at the temperature, float16 [n, K].
        log_rest: log of the sum of all other probabilities, float16 [n].
    """

    ids: np.memmap
    log_p: np.memmap
    log_rest: np.memmap


class Teacher:
    """A full-precision model that is asked for all logits of whole sequences.

    Args:
        checkpoint: a dense model in any format.
        precision: "f32" or "bf16", which multiplies in bfloat16.
        device: where it runs.
    """

    def __init__(self, checkpoint: Checkpoint, precision: str, device: torch.device) -> None:
        self.sha256 = fingerprint(checkpoint)
        self.precision = precision
        # In training mode: torch's own order of operations. There is nothing random in it.
        self.model = Transformer.from_checkpoint(to_master(checkpoint)).to(device).train()
        self.model.requires_grad_(False)

    def logits(
        self, tokens_BT: Tensor, layer: int | None = None, states: list[States] | None = None
    ) -> Tensor:
        """Scores of what follows each token, float32 [B, T, V]; layer and states are those of `Transformer`."""
        is_bf16 = self.precision == "bf16"
        with torch.no_grad(), torch.autocast(tokens_BT.device.type, torch.bfloat16, enabled=is_bf16):
            logits: Tensor = self.model(tokens_BT, layer, states)
        return logits.float()


def top_k(logits_NV: Float32, k: int, temperature: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The k likeliest tokens of each row, and the logs of their probabilities and of the sum of the others.

        p = softmax(logits / temperature)

    Args:
        logits_NV: float32 [N, V].
        k: at most V.
        temperature: above 0.

    Returns:
        int64 [N, k], likeliest first; float16 [N, k]; float16 [N], -60000 where nothing is left.
    """
    scaled = logits_NV / np.float32(temperature)
    scaled -= scaled.max(-1, keepdims=True)
    p = np.exp(scaled)
    total = p.sum(-1, keepdims=True)
    ids = np.argpartition(-scaled, k - 1, -1)[:, :k]
    ids = np.take_along_axis(ids, np.argsort(-np.take_along_axis(scaled, ids, -1), -1, kind="stable"), -1)
    log_p = np.take_along_axis(scaled, ids, -1) - np.log(total)
    # Summed over the others themselves: 1 - sum would lose the small ones.
    np.put_along_axis(p, ids, 0, -1)
    with np.errstate(divide="ignore"):
        log_rest = np.log(p.sum(-1) / total[:, 0])
    return ids, np.maximum(log_p, _LEAST).astype(np.float16), np.maximum(log_rest, _LEAST).astype(np.float16)


def keep_top_k(
    folder: Path, teacher: Teacher, corpus: Corpus, seq_len: int, k: int, temperature: float
) -> TopK:
    """A teacher's answers to the training part of a corpus: those on disk, after those that are missing are computed.

    The folder says of which teacher, corpus, length, k and temperature it is, and how far it has come; whoever is
    stopped goes on where the last note was made.

    Args:
        folder: made where it is missing.
        teacher: whom to ask.
        corpus: what about.
        seq_len: of the sequences, which the student must be given as they are here.
        k: answers to keep; at most the vocabulary.
        temperature: of the probabilities.

    Raises:
        ValueError: the folder holds something else, or is damaged.
        OSError: the disk has no room for all answers, ...; nothing is computed then, and no file of them stays.
    """
    n_sequences = (len(corpus.train) - 1) // seq_len
    about = {
        "teacher_sha256": teacher.sha256,
        "corpus_sha256": corpus.sha256,
        "seq_len": seq_len,
        "k": k,
        "temperature": temperature,
        "precision": teacher.precision,
    }
    done = _done(folder, about)
    # An embedding may have rows that no token of the tokenizer has.
    n_vocab = teacher.model.config.vocab_size
    kept = _open(folder, n_vocab, n_sequences * seq_len, k, is_new=done == 0)
    device = next(teacher.model.parameters()).device
    at_once = max(1, min(STEP_TOKENS, STEP_LOGITS // n_vocab) // seq_len)
    noted = done
    with Progress(console=Console(stderr=True, quiet=not ranks.is_first())) as progress:
        bar = progress.add_task("teacher", total=n_sequences, completed=done)
        while done < n_sequences:
            end = min(done + at_once, n_sequences)
            span = slice(done * seq_len, end * seq_len)
            tokens_BT = torch.from_numpy(corpus.train[span].astype(np.int64).reshape(-1, seq_len)).to(device)
            logits_NV = teacher.logits(tokens_BT).flatten(0, 1).cpu().numpy()
            for array, values in zip(kept, top_k(logits_NV, k, temperature), strict=True):
                array[span] = values
            done = end
            progress.update(bar, completed=done)
            if done == n_sequences or (done - noted) * seq_len >= SAVE_TOKENS:
                for array in kept:
                    array.flush()
                # Only now: whatever it says is on the disk.
                write_file(folder / ABOUT, [json.dumps(about | {"sequences": done}).encode()])
                noted = done
    return kept


def _done(folder: Path, about: dict[str, object]) -> int:
    """Sequences that are on the disk."""
    if not (folder / ABOUT).exists():
        return 0
    try:
        found = json.loads((folder / ABOUT).read_text())
        done = int(found.pop("sequences"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / ABOUT}: damaged ({error}); delete the folder to make it again") from None
    for name, value in about.items():
        if found.get(name) != value:
            raise ValueError(
                f"{folder}: holds answers with {name} {found.get(name)}, not {value}; "
                f"delete the folder to make them again, or use the same"
            )
    return done


def _open(folder: Path, n_vocab: int, n_rows: int, k: int, is_new: bool) -> TopK:
    folder.mkdir(parents=True, exist_ok=True)
    kinds: dict[str, _Kind] = {
        "ids": (np.dtype(np.uint16 if n_vocab <= 2**16 else np.uint32), (n_rows, k)),
        "log_p": (np.dtype(np.float16), (n_rows, k)),
        "log_rest": (np.dtype(np.float16), (n_rows,)),
    }
    files = {folder / f"{name}.npy": kind for name, kind in kinds.items()}
    if is_new:
        _make(files)
    return TopK(*(_mapped(path, *kind) for path, kind in files.items()))


def _make(files: dict[Path, _Kind]) -> None:
    """Files of zeros, all or none, with all of their room on the disk.

    A process that writes to a mapped file is ended (SIGBUS) where a full disk has no room for what it writes.
    """
    sizes = {path: dtype.itemsize * math.prod(shape) for path, (dtype, shape) in files.items()}
    try:
        for path, (dtype, shape) in files.items():
            with open(path, "wb") as file:
                about = {"descr": dtype.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, about)
                _reserve(file, file.tell() + sizes[path])
    except OSError as error:
        for made in files:
            made.unlink(missing_ok=True)
        what = (
            f"{error.strerror}; the teacher's answers take {sum(sizes.values()):,} bytes here: make room for them, "
            f"or start another run with a smaller --cache-logits or a --corpus on another disk"
        )
        raise OSError(error.errno, what, str(path)) from None


def _reserve(file: BinaryIO, size: int) -> None:
    """Lengthen a new file so that each of its bytes has a place on the disk."""
    file.flush()
    # macOS and Windows have none.
    reserve = getattr(os, "posix_fallocate", None)
    if reserve:
        try:
            reserve(file.fileno(), 0, size)
            return
        except OSError as error:
            # Of a disk that cannot set room aside.
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    for at in range(file.seek(0, os.SEEK_END), size, len(_PIECE)):
        file.write(_PIECE[: size - at])
    file.flush()
    os.fsync(file.fileno())


def _mapped(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.memmap:
    try:
        array: np.memmap = np.load(path, mmap_mode="r+")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: damaged ({error}); delete the folder to make it again") from None
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(
            f"{path}: {array.dtype} {list(array.shape)}, expected {dtype} {list(shape)}; "
            f"delete the folder to make it again"
        )
    return array

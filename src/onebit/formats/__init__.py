"""Models on disk: read any known format, write it, convert between them.

    read("stories.onebit"), read("runs/stories"), read("model.gguf"), read("owner/name")    # -> Checkpoint
    convert("model.gguf", "model.onebit")                                                   # -> Report

Every format is a module with read(path) -> Checkpoint and write(checkpoint, path, ...).
"""

import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from onebit.checkpoint import Checkpoint, Stored, codes, holds_codes, plan, rows, with_temperature
from onebit.formats import gguf, hf, llama2c, native, run
from onebit.formats.compare import Change, compare, kind_of
from onebit.formats.hf import hub
from onebit.packing import Float32, Int8, from_bf16, to_bf16

SUFFIX = ".onebit"
GGUF_SUFFIX = ".gguf"

# Names of folders may have a dot too, as in bitnet-b1.58: these are certainly none.
_FILE_SUFFIXES = {".bin", ".ckpt", ".json", ".onnx", ".pt", ".pth", ".safetensors", ".txt", ".zip"}

_FIRST_ROWS = 64

# Of what is being done, and how much of it is done, from 0 to 1.
Progress = Callable[[str, float], None]


class Report(NamedTuple):
    """What a conversion did.

    Args:
        source: what was read.
        made: what was written, read again.
        changes: what became of each part.
        notes: fields of the config and other things that differ, in words.
    """

    source: Checkpoint
    made: Checkpoint
    changes: list[Change]
    notes: list[str]

    @property
    def losses(self) -> list[Change]:
        """Parts that lost values."""
        return [change for change in self.changes if change.is_lossy]


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a model, told by its content.

    Args:
        path: a .onebit or GGUF file, a checkpoint of llama2.c, a run folder, a folder of Hugging Face, or the name of a
            model there, which is downloaded: "owner/name", "owner/name@revision", "owner/name:file.gguf".

    Raises:
        ValueError: an unknown, damaged or unsupported file; the message says what was found and what to do.
        OSError: nothing is there, or it cannot be opened.
    """
    path = locate(path)
    if path.is_dir():
        if hf.is_model(path):
            return hf.read(path)
        if run.is_run(path):
            return run.read(path)
        raise ValueError(f"{path}: a folder without a model; expected {run.CONFIG} and {run.MODEL} in it")
    if gguf.is_model(path):
        return gguf.read(path)
    if llama2c.is_model(path):
        return llama2c.read(path)
    return native.read(path)


def locate(path: str | os.PathLike[str]) -> Path:
    """Where a model lies on this machine; one that is named by its place at Hugging Face is downloaded.

    Raises:
        ValueError: see `hub.download`.
        OSError: nothing is there.
    """
    if not os.fspath(path):
        raise ValueError("the name of the model is empty; expected a file, a folder, or owner/name")
    if Path(path).exists():
        if not (Path(path).is_file() or Path(path).is_dir()):
            raise ValueError(f"{path}: neither a file nor a folder; expected a model")
        return Path(path)
    if hub.is_hub_id(os.fspath(path)):
        return hub.download(os.fspath(path))
    raise FileNotFoundError(
        f"{path}: no such file or folder; expected a .onebit or GGUF file, a folder with a model, or owner/name"
    )


def is_native(path: Path) -> bool:
    """Whether a model on this machine is one of ours, which runs as it is: a .onebit file or a run folder."""
    if path.is_dir():
        return run.is_run(path) and not hf.is_model(path)
    return not (gguf.is_model(path) or llama2c.is_model(path))


def write(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    encoding: str | None = None,
    head: str | None = None,
) -> None:
    """Write a model in the format that the name asks for: .onebit, .gguf, or without a suffix a Hugging Face folder.

    Args:
        checkpoint: the model.
        path: what to make or to replace.
        encoding: how the linear layers are stored; `encodings` lists the names. None takes the usual one of the model,
            which keeps weight codes as codes.
        head: for a .onebit file, "q8" or "bf16"; see `onebit.checkpoint.quantize`.

    Raises:
        ValueError: another suffix, or an encoding or head that does not fit the format or the model.
        OSError: the folder is missing, the disk is full, ...
    """
    path = Path(path)
    names = encodings(path)
    if encoding is not None and encoding not in names:
        raise ValueError(f"encoding {encoding!r}: a {_format_name(path)} has {', '.join(names)}")
    if path.suffix.lower() == SUFFIX:
        return native.write(checkpoint, path, encoding, head)
    if head is not None:
        raise ValueError(f"head {head!r}: only a .onebit file has a choice of heads")
    if path.suffix.lower() == GGUF_SUFFIX:
        gguf.write(checkpoint, path, encoding or gguf.usual_kind(checkpoint))
    else:
        hf.write(checkpoint, path, encoding or hf.usual_kind(checkpoint))


def encodings(path: Path) -> tuple[str, ...]:
    """Names of the ways in which the format of a file name stores linear layers.

    Raises:
        ValueError: a suffix without a format.
    """
    if path.suffix.lower() == SUFFIX:
        return native.ENCODINGS
    if path.suffix.lower() == GGUF_SUFFIX:
        return gguf.KINDS
    if path.suffix.lower() in _FILE_SUFFIXES:
        raise ValueError(
            f"{path}: nothing is written to a {path.suffix} file; expected {SUFFIX}, {GGUF_SUFFIX}, or a folder's name"
        )
    return hf.KINDS


def ways_out(checkpoint: Checkpoint) -> dict[str, str]:
    """What a model can become: each format and encoding, and "yes", or why not, or what it would lose.

    By its config and its first rows: scales that GGUF rounds to float16 show when they are written.
    """
    loss = _certain_loss(checkpoint, None, None)
    reasons = {f"GGUF {kind}": reason for kind, reason in gguf.refusals(checkpoint).items()}
    reasons |= {f"Hugging Face {kind}": reason for kind, reason in hf.refusals(checkpoint).items()}
    found = {SUFFIX: f"only with --allow-lossy: {loss}" if loss else "yes"}
    return found | {name: f"no: {reason}" if reason else "yes" for name, reason in reasons.items()}


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    encoding: str | None = None,
    head: str | None = None,
    allow_lossy: bool = False,
    progress: Progress = lambda what, share: None,
    temperature: float = 1.0,
) -> Report:
    """Convert a model, one tensor after the other, and prove it: the result is read again and compared with the source.

    Args:
        src: see `read`.
        dst: what to make or to replace; its suffix is the format, see `write`.
        encoding: how the linear layers are stored; None takes the usual one, or keeps that of a .onebit file.
        head: for a .onebit file, "q8" or "bf16".
        allow_lossy: write also what changes values of the model. Rounding a master the way it was trained to be
            rounded is no loss.
        progress: called now and then.
        temperature: divides the logits of the result; see `onebit.checkpoint.with_temperature`.

    Returns:
        What became of each part.

    Raises:
        ValueError: an unreadable source, an encoding or head that does not fit, or losses that were not allowed;
            nothing is written then.
        OSError: a file cannot be read or written.
    """
    dst = Path(dst)
    if dst.is_symlink():
        # What the link names is written, and the link stays.
        dst = dst.resolve()
    if not dst.name:
        raise ValueError(f"{dst}: no name for a file or a folder; expected one, as in {dst / 'model.onebit'}")
    encodings(dst)
    if not dst.absolute().parent.is_dir():
        raise FileNotFoundError(f"{dst}: there is no folder {dst.parent}; make it first")
    if dst.suffix.lower() not in (SUFFIX, GGUF_SUFFIX):
        hf.check_replaceable(dst)
        if dst.exists() and Path(src).exists() and dst.samefile(src):
            raise ValueError(f"{dst}: is the source too, and would be lost; choose another folder")
    source = with_temperature(read(src), temperature)
    if dst.suffix.lower() == SUFFIX and not allow_lossy:
        # By the first rows of each matrix, before the work is done.
        if loss := _certain_loss(source, encoding, head):
            raise _lossy(dst, loss)
    # Its name keeps the suffix, which is the format.
    unfinished = dst.with_name(f".{secrets.token_hex(4)}.{dst.name}")
    try:
        write(_tracked(source, dst.suffix.lower() == SUFFIX, progress), unfinished, encoding, head)
        made = read(unfinished)
        changes = compare(source, made, _share(source, "comparing", progress))
        report = Report(source, made, changes, _notes(source, made))
        if report.losses and not allow_lossy:
            lost = "; ".join(change.describe() for change in report.losses)
            raise _lossy(dst, lost)
        _replace(unfinished, dst)
    except OSError as error:
        if error.filename != str(unfinished):
            raise
        # The file that the user asked for.
        raise OSError(error.errno, error.strerror, str(dst)) from error
    finally:
        _remove(unfinished)
    return report._replace(made=read(dst))


def _certain_loss(source: Checkpoint, encoding: str | None, head: str | None) -> str | None:
    """What a .onebit file would lose of a model, if the first rows of its matrices show it."""
    planned = plan(source, encoding, head)
    if planned.config.weights != source.config.weights:
        return f"its {source.config.weights} weights are rounded to {planned.config.weights}"
    for name, kind in planned.encodings.items():
        tensor = source.tensors.get(name)
        if kind != "bf16" or not isinstance(tensor, Stored) or tensor.kind == "BF16":
            continue
        values = rows(name, tensor, 0, _FIRST_ROWS)
        if not np.array_equal(from_bf16(to_bf16(values)), values):
            return f"{name}, {tensor.kind} to bf16, has values that bfloat16 does not hold"
    return None


def _lossy(dst: Path, lost: str) -> ValueError:
    return ValueError(
        f"{dst} is not written, it would not be the same model: {lost} (--allow-lossy writes it)"
    )


def _tracked(source: Checkpoint, to_native: bool, progress: Progress) -> Checkpoint:
    """A checkpoint that tells how much of it has been read."""
    report = _share(source, "writing", progress)
    tensors = dict(source.tensors)
    for name in source.config.tensor_shapes():
        tensor = tensors[name]
        # Packed layouts are copied as they are into a file of ours.
        if to_native and not isinstance(tensor, Stored):
            continue

        def read_rows(begin: int, end: int, name: str = name) -> Float32:
            found = rows(name, source.tensors[name], begin, end)
            report(found.size)
            return found

        def read_codes(name: str = name) -> tuple[Int8, Float32]:
            found = codes(name, source.tensors[name], source.config)
            report(found[0].size)
            return found

        kind = {"bf16": "BF16"}.get(kind_of(tensor), kind_of(tensor))
        size = tensor.n_bytes if isinstance(tensor, Stored) else 0
        coded = read_codes if holds_codes(tensor) else None
        tensors[name] = Stored(tensor.shape, kind, size, read_rows, coded)
    if not to_native:
        tensors = {name: tensors[name] for name in source.config.tensor_shapes()}
    return replace(source, tensors=tensors)


def _share(source: Checkpoint, what: str, progress: Progress) -> Callable[[int], None]:
    total = sum(_n_weights(shape) for shape in source.config.tensor_shapes().values())
    done = 0

    def add(n: int) -> None:
        nonlocal done
        done += n
        progress(what, min(done / total, 1.0))

    return add


def _n_weights(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) == 2 else 1)


def _notes(source: Checkpoint, made: Checkpoint) -> list[str]:
    """What differs besides weights."""
    notes = []
    about = source.provenance.get("source")
    if isinstance(about, dict) and "guessed" in str(about.get("activations")) and not source.is_packed:
        notes.append(f"activations of the source: {about['activations']}")
    for field in fields(source.config):
        before, after = getattr(source.config, field.name), getattr(made.config, field.name)
        if before != after:
            notes.append(f"{field.name}: {before} becomes {after}")
    if source.tokenizer is not None and made.tokenizer is None:
        notes.append("the tokenizer is left out")
    if source.chat_template is not None and made.chat_template != source.chat_template:
        notes.append(
            "the chat template is left out" if made.chat_template is None else "the chat template differs"
        )
    return notes


def _replace(unfinished: Path, dst: Path) -> None:
    if not unfinished.is_dir():
        os.replace(unfinished, dst)
        return
    # It took a while: what came meanwhile is not lost either.
    hf.check_replaceable(dst)
    hf.move_folder(unfinished, dst)


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _format_name(path: Path) -> str:
    return {SUFFIX: ".onebit file", GGUF_SUFFIX: "GGUF file"}.get(path.suffix.lower(), "Hugging Face folder")

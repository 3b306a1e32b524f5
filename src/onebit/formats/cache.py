"""Models of other formats, converted once and kept: ~/.cache/onebit, keyed by their content.

    path = ready("model.gguf")          # a .onebit file; later calls find it there

Any file of the folder may be deleted at any time.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from onebit import __version__, formats
from onebit.formats import llama2c, native
from onebit.formats.files import write_file

_PIECE = 1 << 22
# What beside the weights makes a model of a folder.
_TEXTS = {".json", ".jinja", ".model", ".txt"}
_WEIGHTS = {".safetensors", ".gguf", ".bin"}


def folder() -> Path:
    """Where the converted models are."""
    return Path.home() / ".cache" / "onebit"


def ready(
    path: str | os.PathLike[str], progress: formats.Progress = lambda what, share: None
) -> tuple[Path, formats.Report | None]:
    """A file or run folder that runs as it is: the model itself, or what it was converted to.

    Args:
        path: see `onebit.formats.read`.
        progress: called while a model is converted.

    Returns:
        Its place, and the report of the conversion if there was one just now. Values may have been rounded; the
        report tells.

    Raises:
        ValueError: an unreadable model.
        OSError: a file cannot be read, or the cache not be written.
    """
    path = formats.locate(path)
    if formats.is_native(path):
        return path, None
    kept = folder() / f"{_key(path, progress)}.onebit"
    if kept.is_file():
        try:
            native.read(kept)
            return kept, None
        except ValueError:
            # Written by another version, or damaged: it is only a copy.
            kept.unlink(missing_ok=True)
    kept.parent.mkdir(parents=True, exist_ok=True)
    report = formats.convert(path, kept, allow_lossy=True, progress=progress)
    return kept, report


def sha256(path: Path, progress: formats.Progress = lambda what, share: None) -> str:
    """The SHA-256 of a model: of its file, or of the names and hashes of the files of its folder."""
    if path.is_file():
        return _content(path, progress)
    total = hashlib.sha256()
    for file in _files(path):
        total.update(f"{file.name}\0{_content(file, progress)}\0".encode())
    return total.hexdigest()


def n_bytes(path: Path) -> int:
    """The size of a model: of its file, or of the files of its folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else _files(path)))


def _key(path: Path, progress: formats.Progress) -> str:
    """A hash of all that the conversion of a model depends on."""
    # Another version may read a file otherwise.
    total = hashlib.sha256(__version__.encode())
    for file in _files(path):
        # A model that is one file may have any name.
        name = file.name if file != path else ""
        total.update(f"{name}\0{_content(file, progress)}\0".encode())
    return total.hexdigest()


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from sorted(f for f in path.iterdir() if f.suffix in _TEXTS | _WEIGHTS and f.is_file())
        return
    yield path
    if llama2c.is_model(path):
        # Its tokenizer is beside it.
        yield from sorted(f for f in path.parent.glob("tok*.bin") if f != path)


def _content(file: Path, progress: formats.Progress) -> str:
    """The SHA-256 of a file, remembered for as long as its place, size and times stay the same."""
    status = file.resolve().stat()
    # A copy may keep the time of its original; nothing sets the other one back.
    seen = f"{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}"
    note = folder() / "hashes" / hashlib.sha256(seen.encode()).hexdigest()
    if note.is_file() and len(known := note.read_text("ascii")) == 64:
        return known
    digest, n_read = hashlib.sha256(), 0
    with open(file, "rb") as contents:
        while piece := contents.read(_PIECE):
            digest.update(piece)
            n_read += len(piece)
            progress("looking for it in the cache", n_read / status.st_size)
    note.parent.mkdir(parents=True, exist_ok=True)
    write_file(note, [digest.hexdigest().encode("ascii")])
    return digest.hexdigest()

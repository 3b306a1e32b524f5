"""Write a file whole or not at all; read pieces of one."""

import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

Buffer = bytes | memoryview


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears complete, or not at all, in place of an older one.

    The bytes go to a temporary file in the same folder, which is flushed to the disk and then renamed.
    Readers that have the older file mapped keep it.

    Args:
        path: the file to make or to replace.

    Raises:
        OSError: the folder is missing, the disk is full, ...; the older file stays, nothing else is left.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}; make it first")
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder; expected the name of a file")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename not in (None, str(temporary)):
            raise
        # The system names no file, or the temporary one: name the file that the user asked for.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    sync_folder(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put a name into every OSError that has none, as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_file(path: Path, chunks: Iterable[Buffer]) -> None:
    """Write chunks, in order, to a `new_file`."""
    with new_file(path) as file:
        for chunk in chunks:
            file.write(chunk)


def read_bytes(path: Path, begin: int, n_bytes: int) -> npt.NDArray[np.uint8]:
    """Read a piece of a file, without mapping it: what was read does not stay in the memory of the process.

    Returns:
        uint8 [n_bytes].

    Raises:
        ValueError: the file ends before.
        OSError: it cannot be opened.
    """
    piece = np.empty(n_bytes, np.uint8)
    with open(path, "rb", buffering=0) as file:
        file.seek(begin)
        n_read = 0
        while n_read < n_bytes and (n := file.readinto(piece[n_read:].data)):
            n_read += n
    if n_read < n_bytes:
        raise ValueError(f"the file ends at byte {begin + n_read} of {begin + n_bytes}; it was cut")
    return piece


def sync_folder(folder: Path) -> None:
    """Make the renaming itself survive a power cut, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

"""Write a file whole or not at all."""

import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

Buffer = bytes | memoryview


def write_file(path: Path, chunks: Iterable[Buffer]) -> None:
    """Write chunks to a file that appears complete, or not at all, in place of an older one.

    The bytes go to a temporary file in the same folder, which is flushed to the disk and then renamed.
    Readers that have the older file mapped keep it.

    Args:
        path: the file to make or to replace.
        chunks: bytes in order.

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
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # The system names no file, or the temporary one: name the file that the user asked for.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the renaming itself survive a power cut, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

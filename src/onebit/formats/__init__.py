"""Models on disk: read any known format, write it, convert between them.

    read("stories.onebit"), read("runs/stories")        # -> Checkpoint
    convert("runs/stories", "stories.onebit")           # quantise and pack

Every format is a module with read(path) -> Checkpoint and write(checkpoint, path).
"""

import os
from pathlib import Path

from onebit.checkpoint import Checkpoint
from onebit.formats import native, run

SUFFIX = ".onebit"


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a model: a .onebit file, told by its content, or a run folder.

    Raises:
        ValueError: an unknown, damaged or unsupported file; the message says what was found and what to do.
        OSError: nothing is there, or it cannot be opened.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; expected a .onebit file or a run folder")
    if path.is_dir():
        if not run.is_run(path):
            raise ValueError(f"{path}: a folder without a model; expected {run.CONFIG} and {run.MODEL} in it")
        return run.read(path)
    if not path.is_file():
        raise ValueError(f"{path}: neither a file nor a folder; expected a .onebit file or a run folder")
    return native.read(path)


def write(checkpoint: Checkpoint, path: str | os.PathLike[str]) -> None:
    """Write a model: to a .onebit file by that suffix, else to a run folder. Replaces what is there.

    Raises:
        ValueError: a float32 master for a .onebit file, or a packed model for a run folder.
        OSError: the folder is missing, the disk is full, ...
    """
    if Path(path).suffix == SUFFIX:
        native.write(checkpoint, path)
    else:
        run.write(checkpoint, path)


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    encoding: str | None = None,
    head: str | None = None,
) -> Checkpoint:
    """Quantise a run folder, or lay out a .onebit file anew, and write the result as a .onebit file.

    Args:
        src: a run folder or a .onebit file.
        dst: the .onebit file to make or to replace.
        encoding: layout of the linear layers; None takes the smallest, or keeps that of a .onebit file.
        head: "q8", int8 rows, or "bf16"; None takes int8 rows, or keeps those of a .onebit file.

    Returns:
        The packed model; `onebit.checkpoint.parts` has its sizes.

    Raises:
        ValueError: an unreadable source, another suffix, or an encoding or head that does not fit.
        OSError: a file cannot be read or written.
    """
    dst = Path(dst)
    if dst.suffix != SUFFIX:
        raise ValueError(f"{dst}: expected a file name that ends in {SUFFIX}")
    native.write(read(src), dst, encoding, head)
    return native.read(dst)

"""Files of measurements as one page: tables, pictures, and the command behind every figure.

write([Path("docs/results")], Path("report.html"))
"""

from collections.abc import Sequence
from pathlib import Path

from onebit.formats.files import write_file
from onebit.readings import File, read
from onebit.report.page import render

SUFFIXES = (".html", ".htm")


def write(paths: Sequence[Path], out: Path, mix: bool = False) -> list[File]:
    """Write one self-contained page about files of `onebit eval` and `onebit bench`.

    The same files in the same order give the same bytes.

    Args:
        paths: files, or folders whose .json files are read.
        out: the page.
        mix: put results of different labels into one table.

    Returns:
        What was read.

    Raises:
        ValueError: a file that is none of ours, damaged, or there twice; labels that would share a table.
        OSError: a file cannot be read, or the page not be written.
    """
    if out.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{out}: the page is HTML; expected a name that ends in {SUFFIXES[0]}")
    files = read(paths)
    write_file(out, [render(files, mix).encode()])
    return files

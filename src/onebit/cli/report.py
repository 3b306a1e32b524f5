"""`onebit report`: files of measurements as one page."""

import sys
from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Files of onebit eval --out and onebit bench --out, or folders of them.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="The page (.html).")] = Path("report.html"),
    mix: Annotated[
        bool, typer.Option("--mix", help="Put models of different labels into one table.")
    ] = False,
) -> None:
    """Make one page of measurements: tables and pictures, with the command behind every figure.

    Example: onebit report docs/results --mix -o report.html

    Example: onebit report mine.json theirs.json other-label.json --mix
    """
    from onebit.report import write
    from onebit.report.words import count

    files = write(runs, out, mix)
    n_results = count(sum(len(file.results) for file in files), "result")
    print(f"onebit: {out}: {n_results} of {count(len(files), 'file')}", file=sys.stderr)
    for file in files:
        if file.unfinished:
            print(f"onebit: {file.name}: a task in it is not finished; its command goes on", file=sys.stderr)
        if not file.quotable:
            print(f"onebit: {file.name}: is not to be quoted, and marked as such", file=sys.stderr)

"""`onebit convert`: pack a trained model into one file."""

import sys
from pathlib import Path
from typing import Annotated

import typer


def convert(
    src: Annotated[Path, typer.Argument(help="A run folder or a .onebit file.")],
    dst: Annotated[Path, typer.Argument(help="The .onebit file to write.")],
    encoding: Annotated[
        str | None,
        typer.Option(
            help="Layout of the linear layers; default: t80 for b1.58, b128 for b1, and a .onebit file keeps its own. "
            "r64 is the simplest for b1.58.",
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(help="How embedding and head are kept: q8 (default), int8 rows, or bf16, for fidelity."),
    ] = None,
) -> None:
    """Pack a trained model into one .onebit file.

    Example: onebit convert runs/stories stories.onebit
    """
    from rich.console import Console

    from onebit import formats
    from onebit.cli.info import parts_table

    packed = formats.convert(src, dst, encoding, head)
    console = Console(file=sys.stderr)
    console.print(parts_table(packed))
    console.print(f"{dst}: {packed.label}, {dst.stat().st_size:,} bytes", highlight=False, markup=False)

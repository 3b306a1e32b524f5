"""What the verbs that train share: their options, and how to go on after a stop."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from onebit.cli import say

Texts = Annotated[Path | None, typer.Option(help="Folder of text to learn from.", show_default=False)]
Out = Annotated[Path | None, typer.Option(help="Run folder to write.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="a.b=c", help="Change a field of the recipe, as steps=200; repeatable."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")]


@contextmanager
def resumable(verb: str, out: Path) -> Iterator[None]:
    """Say how to go on after Ctrl-C, a signal to end, or a failing disk."""
    again = shlex.join(["onebit", verb, "--out", str(out), "--resume"])
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        # Before its corpus is made, a run leaves nothing to go on with.
        if (out / "recipe.json").exists():
            say(f"stopped; go on with: {again}")
        raise
    except OSError as error:
        if error.errno is None or not (out / "recipe.json").exists():
            raise
        what = f"{error.strerror}; when that is mended, go on with: {again}"
        raise OSError(error.errno, what, error.filename) from None

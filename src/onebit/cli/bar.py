"""A progress bar on stderr, for what takes long; silent where nobody looks."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onebit.formats import Progress


@contextmanager
def bar() -> "Iterator[Progress]":
    """Show what is being done and how much of it is; gone when it is done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=1.0, visible=False)
        shown = ""

        def show(what: str, share: float) -> None:
            nonlocal shown
            if what != shown:
                progress.reset(task, description=what, total=1.0, visible=True)
                shown = what
            progress.update(task, completed=share)

        yield show

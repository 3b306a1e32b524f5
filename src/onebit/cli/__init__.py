"""The command line: one short file per verb, imported when it is needed.

Results go to stdout, everything else to stderr. Exit codes: 0, 2 for an error of the user, 130 for Ctrl-C.
"""

import os
import signal
import sys
from difflib import get_close_matches
from importlib import import_module
from io import TextIOWrapper
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

VERBS = ("run", "serve", "train", "distill", "tune", "eval", "bench", "report", "convert", "info", "doctor")


class _Verbs(TyperGroup):
    """Loads the module of a verb when the verb, or the list of all, is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            near = get_close_matches(cmd_name, VERBS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"there is no command {cmd_name!r}{hint}; commands: {', '.join(VERBS)}")
        app = typer.Typer(add_completion=False)
        app.command(cmd_name)(getattr(import_module(f"onebit.cli.{cmd_name}"), cmd_name))
        return typer.main.get_command(app)


app = typer.Typer(cls=_Verbs, add_completion=False, rich_markup_mode="rich")


def _print_version(asked: bool) -> None:
    if asked:
        from onebit import __version__

        print(f"onebit {__version__}")
        raise typer.Exit()


@app.callback()
def _onebit(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Train, pack and run 1-bit and 1.58-bit language models on ordinary CPUs."""


def main() -> None:
    """Run the command line and leave with its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # A terminal that lacks a character shows a question mark instead of ending the text.
            stream.reconfigure(errors="replace")
    args = sys.argv[1:] or ["--help"]
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            # Unfinished files are removed on the way out.
            signal.signal(getattr(signal, name), lambda number, frame: sys.exit(128 + number))
    try:
        code = typer.main.get_command(app).main(args, prog_name="onebit", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except ImportError as error:
        code = _fail(_missing(error))
    except (MemoryError, RuntimeError) as error:
        # torch reports a lack of memory as a RuntimeError.
        if isinstance(error, RuntimeError) and " memory" not in str(error):
            raise
        ours = isinstance(error, MemoryError) and "available" in str(error)
        code = _fail(str(error) if ours else "this machine has not enough memory for that")
    except OSError as error:
        named = error.strerror and error.filename
        code = _fail(f"{error.filename}: {error.strerror}" if named else str(error))
    except ValueError as error:
        code = _fail(str(error))
    except Exception as error:
        # Usage errors: typer keeps their base class to itself.
        if not hasattr(error, "format_message"):
            raise
        code = _fail(error.format_message())
    sys.exit(code or 0)


def _fail(message: str) -> int:
    say("error: " + " ".join(message.split()))
    return 2


def say(message: str) -> None:
    """Print why a command ends; of processes that torchrun started, which all end, the first to know says so."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from onebit.train import ranks

        if not ranks.may_speak():
            return
    print("onebit:", message, file=sys.stderr)


def _missing(error: ImportError) -> str:
    if error.name == "torch":
        return 'torch is not installed; training needs it: pip install "onebit[train]"'
    if error.name == "matplotlib":
        return 'matplotlib is not installed; pictures need it: pip install "onebit[report]"'
    if error.name in ("fastapi", "uvicorn", "prometheus_client", "llguidance", "pydantic", "starlette"):
        return f'{error.name} is not installed; the server needs it: pip install "onebit[serve]"'
    if error.name in ("lm_eval", "datasets"):
        return f'{error.name} is not installed; tasks need it: pip install "onebit[eval]"'
    return f"{error}; reinstall with: pip install onebit"

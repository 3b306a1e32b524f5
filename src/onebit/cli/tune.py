"""`onebit tune`: from a model and a file of conversations to an adapter."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from onebit.cli import say


def tune(
    model: Annotated[
        str | None,
        typer.Argument(
            help="What to tune: a .onebit or GGUF file, a run folder, a Hugging Face folder or owner/name there.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help='File of conversations, .jsonl: {"messages": [...]} or {"prompt": ..., "completion": ...}.',
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write.", show_default=False)] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Train all weights of a run folder instead of an adapter.")
    ] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="a.b=c", help="Change a field, as lora.r=8 or steps=200; repeatable."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
) -> None:
    """Teach a model to answer, from conversations.

    Example: onebit tune stories.onebit --data chat.jsonl --out runs/chat --set lora.r=8

    The result runs beside the model: onebit run -m stories.onebit --adapter runs/chat
    """
    if out is None:
        raise ValueError("--out is missing; it names the folder to write")
    if resume and (model or data or full or overrides):
        raise ValueError("--resume goes on with the run as it was; give --out alone")
    example = "onebit tune stories.onebit --data chat.jsonl --out runs/chat"
    if not resume and (model is None or data is None):
        raise ValueError(f"{'MODEL' if model is None else '--data'} is missing; as in: {example}")

    from onebit.train import tune as tuning

    if resume:
        recipe = tuning.read(out / "recipe.json")
    else:
        assert model is not None and data is not None
        recipe = tuning.plan(model, data, overrides, full)
    try:
        tuning.tune(recipe, out, resume)
    except KeyboardInterrupt:
        if not (out / "recipe.json").exists():
            raise
        again = shlex.join(["onebit", "tune", "--out", str(out), "--resume"])
        say(f"stopped; go on with: {again}")
        raise typer.Exit(130) from None

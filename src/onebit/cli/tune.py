"""`onebit tune`: from a model and a file of conversations to an adapter."""

from pathlib import Path
from typing import Annotated

import typer

from onebit.cli.runs import Out, Overrides, Resume, resumable


def tune(
    model: Annotated[
        str | None,
        typer.Argument(
            help="What to tune: a .onebit or GGUF file, a run folder, a Hugging Face folder or owner/name there; "
            "the shipped model by default.",
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
    out: Out = None,
    full: Annotated[
        bool,
        typer.Option("--full", help="Train all weights instead of an adapter; the result is a run folder."),
    ] = False,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="r=16",
            help="Change the adapter: r, alpha or targets; short for --set lora.r=16; repeatable.",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
    resume: Resume = False,
) -> None:
    """Teach a model to answer, from conversations.

    Example: onebit tune model.onebit --data chat.jsonl --out runs/chat --lora r=8

    The result runs beside the model: onebit run -m model.onebit --adapter runs/chat
    """
    if out is None:
        raise ValueError("--out is missing; it names the folder to write")
    if resume and (model or data or full):
        raise ValueError("--resume goes on with the model and the file of the run; leave them out")
    if not resume and data is None:
        raise ValueError(
            "--data is missing; as in: onebit tune model.onebit --data chat.jsonl --out runs/chat"
        )

    if wrong := [field for field in lora or [] if "=" not in field]:
        raise ValueError(
            f"--lora {wrong[0]}: expected NAME=VALUE, as in --lora r=16; names are r, alpha and targets"
        )
    overrides = [f"lora.{field}" for field in lora or []] + (overrides or [])
    from onebit.llm import SHIPPED_MODEL
    from onebit.train import tune as tuning
    from onebit.train.recipe import override

    if resume:
        recipe = override(tuning.read(out / "recipe.json"), overrides)
    else:
        assert data is not None
        recipe = tuning.plan(model or str(SHIPPED_MODEL), data, overrides, full)
    with resumable("tune", out):
        tuning.tune(recipe, out, resume)

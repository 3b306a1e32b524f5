"""`onebit distill`: from a full-precision model and a folder of text to a ternary student."""

from pathlib import Path
from typing import Annotated

import typer

from onebit.cli.runs import Out, Overrides, Resume, Texts, resumable


def distill(
    teacher: Annotated[
        str | None,
        typer.Option(
            help="GGUF file, Hugging Face folder or name, .onebit file, run folder, or llama2.c .bin.",
            show_default=False,
        ),
    ] = None,
    data: Texts = None,
    out: Out = None,
    cache_logits: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            help="Ask the teacher once, and keep its K likeliest tokens of every position on disk.",
            show_default=False,
        ),
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(help="Folder for tokens and kept answers, to share among runs.", show_default=False),
    ] = None,
    overrides: Overrides = None,
    resume: Resume = False,
) -> None:
    """Train a ternary student of a full-precision model, of the same shape and with its tokenizer.

    Example: onebit distill --teacher model.gguf --data texts --out runs/student --set steps=2000

    A run that was stopped goes on with: onebit distill --out runs/student --resume
    """
    if out is None:
        raise ValueError("--out is missing; it names the run folder")
    if not resume and (teacher is None or data is None and corpus is None):
        missing = "--teacher" if teacher is None else "--data"
        raise ValueError(
            f"{missing} is missing; as in: onebit distill --teacher model.gguf --data texts --out runs/student"
        )
    from onebit import formats
    from onebit.train import recipe as recipes
    from onebit.train.distill import build_distill
    from onebit.train.distill import distill as run

    changes = list(overrides or [])
    changes += [f"distill.cache_logits={cache_logits}"] if cache_logits is not None else []
    changes += [f"distill.corpus={corpus.absolute()}"] if corpus is not None else []
    if resume:
        built = recipes.override(recipes.read(out / "recipe.json"), changes)
        if built.distill is None:
            raise ValueError(f"{out} is no run of a student; go on with: onebit train --out {out} --resume")
        model = formats.read(teacher or built.distill.teacher)
    else:
        assert teacher is not None
        model = formats.read(teacher)
        built = build_distill(teacher, model, changes)
    with resumable("distill", out):
        run(built, model, data, out, resume)

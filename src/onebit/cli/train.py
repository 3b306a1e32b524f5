"""`onebit train`: from a folder of text to a run folder."""

from typing import Annotated

import typer

from onebit.cli.runs import Out, Overrides, Resume, Texts, resumable


def train(
    recipe: Annotated[
        str | None, typer.Argument(help="Name of a recipe; see --list.", show_default=False)
    ] = None,
    data: Texts = None,
    out: Out = None,
    size: Annotated[
        str | None,
        typer.Option(help="How large a model, for recipes that come in sizes: 1M to 3B.", show_default=False),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Go on from this model, packed or not, with its shape and tokenizer.",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
    resume: Resume = False,
    list_recipes: Annotated[bool, typer.Option("--list", help="Show the recipes and leave.")] = False,
) -> None:
    """Train a model by a recipe.

    Example: onebit train tiny --data texts --out runs/tiny --set steps=100

    Example: onebit train b1.58 --init model.onebit --data texts --out runs/more

    A run that was stopped goes on with: onebit train --out runs/tiny --resume
    """
    from onebit.train import recipes

    if list_recipes:
        for name, build in recipes.RECIPES.items():
            print(f"{name:22}{(build.__doc__ or '').splitlines()[0]}")
        return
    if not resume and recipe is None:
        raise ValueError("RECIPE is missing; as in: onebit train tiny --data texts --out runs/tiny")
    if out is None:
        raise ValueError("--out is missing; it names the run folder")
    if resume:
        if size is not None or init is not None:
            raise ValueError("--size or --init with --resume; a run keeps what it was started with")
        built = recipes.override(recipes.read(out / "recipe.json"), overrides or [])
        if recipe not in (None, built.name):
            raise ValueError(f"{out} is a run of the recipe {built.name}, not {recipe}")
    else:
        assert recipe is not None
        if data is None:
            raise ValueError("--data is missing; as in: onebit train tiny --data texts --out runs/tiny")
        built = recipes.build(recipe, overrides if init is None else None, size)
        if init is not None:
            from onebit import formats
            from onebit.train.origin import begin_with

            built = begin_with(built, init, formats.read(init), overrides)

    from onebit.train import train as run

    with resumable("train", out):
        run(built, data, out, resume)

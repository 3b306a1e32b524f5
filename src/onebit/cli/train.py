"""`onebit train`: from a folder of text to a run folder."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from onebit.cli import say


def train(
    recipe: Annotated[
        str | None, typer.Argument(help="Name of a recipe; see --list.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of text to learn from.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder to write.", show_default=False)] = None,
    size: Annotated[
        str | None,
        typer.Option(help="How large a model, for recipes that come in sizes: 1M to 3B.", show_default=False),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="a.b=c", help="Change a field of the recipe; repeatable."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    list_recipes: Annotated[bool, typer.Option("--list", help="Show the recipes and leave.")] = False,
) -> None:
    """Train a model by a recipe.

    Example: onebit train tiny --data texts --out runs/tiny --set steps=100

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
        if size is not None:
            raise ValueError("--size with --resume; a run keeps the size that it was started with")
        built = recipes.override(recipes.read(out / "recipe.json"), overrides or [])
        if recipe not in (None, built.name):
            raise ValueError(f"{out} is a run of the recipe {built.name}, not {recipe}")
    else:
        assert recipe is not None
        if data is None:
            raise ValueError("--data is missing; as in: onebit train tiny --data texts --out runs/tiny")
        built = recipes.build(recipe, overrides, size)

    from onebit.train import train as run

    try:
        run(built, data, out, resume)
    except KeyboardInterrupt:
        # Before its corpus is made, a run leaves nothing to go on with.
        if not (out / "recipe.json").exists():
            raise
        again = shlex.join(["onebit", "train", "--out", str(out), "--resume"])
        say(f"stopped; go on with: {again}")
        raise typer.Exit(130) from None

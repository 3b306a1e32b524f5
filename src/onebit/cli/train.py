"""`onebit train`: from a folder of text to a run folder."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[
        str | None, typer.Argument(help="Name of a recipe; see --list.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of text to learn from.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder to write.", show_default=False)] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="a.b=c", help="Change a field of the recipe; repeatable."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    list_recipes: Annotated[bool, typer.Option("--list", help="Show the recipes and leave.")] = False,
) -> None:
    """Train a model by a recipe.

    Example: onebit train tiny --data texts --out runs/tiny --set steps=100
    """
    for value, flag in ((recipe, "RECIPE"), (data, "--data"), (out, "--out")):
        if value is None and not list_recipes:
            raise ValueError(f"{flag} is missing; as in: onebit train tiny --data texts --out runs/tiny")

    from onebit.train import recipes

    if list_recipes:
        for name, build in recipes.RECIPES.items():
            print(f"{name:16}{(build.__doc__ or '').splitlines()[0]}")
        return
    assert recipe is not None and data is not None and out is not None
    built = recipes.build(recipe, overrides or [])

    from onebit.train import train as run

    run(built, data, out, resume)

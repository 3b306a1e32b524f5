"""Training: recipes, data, schedule and the loop. Needs the `train` extra.

train(build("tiny"), data=Path("texts"), out=Path("runs/tiny"))
"""

from typing import Any

from onebit.train.recipes import RECIPES, Recipe, build

__all__ = ["RECIPES", "Recipe", "build", "train"]


def __getattr__(name: str) -> Any:
    # A misspelt recipe should not wait for torch.
    if name == "train":
        from onebit.train.loop import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Training: recipes, data, schedule and the loop. Needs the `train` extra."""

from onebit.train.loop import train
from onebit.train.recipes import RECIPES, Recipe, build

__all__ = ["RECIPES", "Recipe", "build", "train"]

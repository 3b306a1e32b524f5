"""Recipes: each a function that returns the full description of a run, and nothing else.

    recipe = build("stories", ["optim.lr=1e-3", "steps=200"])

Adding a recipe is adding a function to RECIPES.
"""

from collections.abc import Callable
from dataclasses import replace

from onebit.config import ModelConfig
from onebit.train.optim import Schedule
from onebit.train.recipe import Data, Options, Recipe, near, override, read

__all__ = ["RECIPES", "Data", "Options", "Recipe", "build", "override", "read"]


def stories() -> Recipe:
    """The shipped model: 10 M ternary parameters that write stories for children, in hours on two CPU cores."""
    return Recipe(
        name="stories",
        model=ModelConfig(
            vocab_size=4096, d_model=384, n_layers=5, n_heads=4, n_kv_heads=2, d_head=96, d_ff=1024
        ),
        data=Data(include=("*tinystories_slices.dedup.jsonl",)),
        optim=Schedule(lr=3e-3, lr_second=2e-3, warmup_steps=200),
        steps=3750,
        batch_size=4,
        compile=True,
        threads=1,
        evaluate_every=200,
        save_every=150,
    )


def stories_dense() -> Recipe:
    """The full-precision twin of `stories`: same shape, data, tokens, schedule and seed."""
    recipe = stories()
    return replace(
        recipe, name="stories-dense", model=replace(recipe.model, weights="dense", activations="none")
    )


def tiny() -> Recipe:
    """A toy of a few seconds on any folder of text, to see the whole road work."""
    return Recipe(
        name="tiny",
        model=ModelConfig(
            vocab_size=512,
            d_model=64,
            n_layers=2,
            n_heads=4,
            n_kv_heads=2,
            d_head=16,
            d_ff=128,
            max_seq_len=128,
        ),
        data=Data(vocab_size=512, held_out=0.1, seq_len=64),
        optim=Schedule(warmup_steps=10),
        steps=60,
        precision="f32",
        threads=1,
        evaluate_every=30,
        save_every=20,
    )


RECIPES: dict[str, Callable[[], Recipe]] = {"stories": stories, "stories-dense": stories_dense, "tiny": tiny}


def build(name: str, overrides: list[str] | None = None) -> Recipe:
    """Build a recipe by name and apply overrides.

    Args:
        name: a key of RECIPES.
        overrides: "a.b=c" each; c is read as the type of the field.

    Raises:
        ValueError: an unknown recipe or field (with the near miss), or a value of the wrong type.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}{near(name, RECIPES)}; there are: {', '.join(RECIPES)}")
    return override(RECIPES[name](), overrides or [])

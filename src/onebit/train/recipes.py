"""Recipes: each a function that returns the full description of a run, and nothing else.

    recipe = build("stories", ["optim.lr=1e-3", "steps=200"])

Adding a recipe is adding a function to RECIPES.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from inspect import signature
from typing import Any

from onebit.config import ModelConfig
from onebit.train.optim import Schedule
from onebit.train.recipe import Data, Options, Recipe, near, override, read
from onebit.train.sizes import SIZES, shape

__all__ = ["RECIPES", "SIZES", "Data", "Options", "Recipe", "build", "override", "read"]


def stories() -> Recipe:
    """The shipped model: 10 M ternary parameters that write stories for children, in an hour and a half of one core."""
    return Recipe(
        name="stories",
        model=ModelConfig(
            vocab_size=4096,
            d_model=384,
            n_layers=5,
            n_heads=4,
            n_kv_heads=2,
            d_head=96,
            d_ff=1024,
            activation="silu",
        ),
        optim=Schedule(lr=1e-2, lr_second=6.7e-3, warmup_steps=100),
        options=Options(optimizer="muon"),
        steps=3150,
        batch_size=8,
        compile=True,
        threads=1,
        evaluate_every=200,
        save_every=150,
    )


def b1_58(size: str = "10M") -> Recipe:
    """Ternary weights, 8-bit activations: SwiGLU, a norm before every layer, two stages of rate and decay.

    Source: arXiv:2402.17764, and "The Era of 1-bit LLMs: Training Tips, Code and FAQ", section 1 and tables 1 and 2.
        Warm-up is 375 steps, a tenth of a run that is shorter than 3,750.
    """
    return _sized("b1.58", size, activation="silu")


def b1(size: str = "10M") -> Recipe:
    """Binary weights, 8-bit activations: sub-norms, one stage of linear decay, no clipping of gradients.

    The paper's feed-forward layer has no gate and its norms subtract the mean; ours are gated RMSNorm models, as all
    that run here.

    Source: arXiv:2310.11453, tables 5 and 6: Adam (0.9, 0.98), weight decay 0.01, polynomial decay of power 1,
        warm-up 750 of 40,000 steps, at most a fifth of a shorter run.
    """
    recipe = _sized("b1", size, activation="silu", weights="b1")
    lr = SIZES[size].binary
    optim = Schedule(
        lr=lr, lr_second=lr, weight_decay=0.01, weight_decay_second=0.01, switch=1.0,
        warmup_steps=min(750, recipe.steps // 5), beta1=0.9, beta2=0.98, grad_clip=0.0,
    )  # fmt: skip
    return replace(recipe, optim=optim)


def b1_58_a4(size: str = "10M") -> Recipe:
    """Ternary weights, 4-bit activations where they allow it (a4.8); 8 bits for the first 95 % of the steps.

    Source: arXiv:2411.04965, sections 2.2, 3.1 and 3.2; squared ReLU makes most inputs of down zero.
    """
    recipe = _sized("b1.58-a4", size, activation="relu2", activations="a4.8")
    return replace(recipe, options=Options(first_activations="a8"))


def b1_58_hadamard(size: str = "10M") -> Recipe:
    """Ternary weights, 4-bit activations throughout (v2): inputs of o and down are rotated; 8 bits for the first 95 %.

    Shapes are those of `b1.58` with powers of two for those inputs.

    Source: arXiv:2504.18415, sections 2.2 and 3.1.
    """
    recipe = _sized("b1.58-hadamard", size, activation="silu", activations="a4", hadamard=True)
    return replace(recipe, options=Options(first_activations="a8"))


def _sized(name: str, size: str, hadamard: bool = False, **flags: Any) -> Recipe:
    """The frame of the recipes with a dial: shape, data and the two-stage schedule of a size."""
    if size not in SIZES:
        raise ValueError(f"size is {size!r}{near(size, SIZES)}; there are: {', '.join(SIZES)}")
    s = SIZES[size]
    return Recipe(
        name=name,
        model=ModelConfig(**shape(s, powers_of_two=hadamard), hadamard=hadamard, **flags),
        data=Data(vocab_size=s.vocab_size, seq_len=s.seq_len),
        optim=Schedule(lr=s.ternary[0], lr_second=s.ternary[1], warmup_steps=min(375, s.steps // 10)),
        steps=s.steps,
        batch_size=s.batch_size,
        accumulate=s.accumulate,
        # Compiling takes a minute: worth it where a run takes hours.
        compile=size not in ("1M", "3M"),
    )


def dense(recipe: Recipe) -> Recipe:
    """The full-precision twin of a recipe: same shape, data, tokens, schedule and seed.

    What serves rounding alone goes: rotated inputs, a first phase, lambda, noise. Full precision may deserve a lower
    learning rate than its twin (the papers give it a sixth): `--set optim.lr=...`.
    """
    return replace(
        recipe,
        name=f"{recipe.name}-dense",
        model=replace(recipe.model, weights="dense", layer_weights=(), activations="none", hadamard=False),
        options=replace(
            recipe.options,
            first_activations=None,
            learned_scale=False,
            lambda_steps=0,
            noise=0.0,
            gradient_limit=0.0,
        ),
    )


def _twin(function: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """The function of the full-precision twin, with the same parameters."""

    @wraps(function)
    def twin(*args: Any, **kwargs: Any) -> Recipe:
        return dense(function(*args, **kwargs))

    twin.__doc__ = (
        f"The full-precision twin of {function().name}: same shape, data, tokens, schedule and seed."
    )
    return twin


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


_TERNARY_AND_BINARY = (stories, b1_58, b1, b1_58_a4, b1_58_hadamard)
RECIPES: dict[str, Callable[..., Recipe]] = {
    function().name: function for f in _TERNARY_AND_BINARY for function in (f, _twin(f))
} | {"tiny": tiny}


def build(name: str, overrides: list[str] | None = None, size: str | None = None) -> Recipe:
    """Build a recipe by name and apply overrides.

    Args:
        name: a key of RECIPES.
        overrides: "a.b=c" each; c is read as the type of the field. "size=10M" is the same as `size`.
        size: a key of SIZES, for recipes that come in sizes; everything else is set over it.

    Raises:
        ValueError: an unknown recipe, size or field (with the near miss), or a value of the wrong type.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}{near(name, RECIPES)}; there are: {', '.join(RECIPES)}")
    function, overrides = RECIPES[name], overrides or []
    sizes = [text.removeprefix("size=") for text in overrides if text.startswith("size=")]
    sizes += [] if size is None else [size]
    if sizes and "size" not in signature(function).parameters:
        sized = [n for n, f in RECIPES.items() if "size" in signature(f).parameters]
        raise ValueError(f"{name} has one size; recipes with a choice of size: {', '.join(sized)}")
    recipe = function(sizes[-1]) if sizes else function()
    return override(recipe, [text for text in overrides if not text.startswith("size=")])

"""What a run may do beyond the plain estimator: a small function for each field of `Options`.

    recipe = build("b1.58", ["options.lambda_steps=500", "options.ema=0.999"])

Off means off: a run without options computes the same bits as a loop that knows none.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from onebit.nn.bitlinear import Rounding
from onebit.nn.transformer import Transformer
from onebit.train import ranks
from onebit.train.recipe import Recipe

# How much of its distance to the target a mean keeps in a step.
_STABLE = 0.99
EMA, CODES = "ema", "codes"


def extra_keys(recipe: Recipe) -> tuple[str, ...]:
    """What is kept for a parameter between steps, besides what the optimiser remembers."""
    # Codes even where nobody looks: a resumed run may look less often.
    return (EMA, CODES) if recipe.options.ema else (CODES,)


def set_rounding(rounding: Rounding, recipe: Recipe, step: int, device: torch.device) -> None:
    """Say how the step rounds.

        lambda = min(1, (step + 1) / lambda_steps)      w + lambda (Q(w) - w), and so for its input
        activations: those of the first phase before first_share of the steps, then those of the model

    Source: for lambda, Hugging Face, "Fine-tuning LLMs to 1.58bit" (2024). Two phases, arXiv:2411.04965 section 3.2.
    """
    options = recipe.options
    strength = min(1.0, (step + 1) / options.lambda_steps) if options.lambda_steps else 1.0
    # A tensor, so that a compiled model need not be compiled again for each value.
    rounding.strength = torch.tensor(strength, device=device) if strength < 1 else None
    is_first = options.first_activations is not None and step < options.first_share * recipe.steps
    rounding.activations = options.first_activations if is_first else None
    rounding.temperature = options.noise
    rounding.gradient_limit = options.gradient_limit
    if options.noise:
        # Each step has random numbers of its own, so a resumed run draws those of the killed one; and each process.
        torch.manual_seed((recipe.seed * 1_000_003 + step + (ranks.index() << 40)) % 2**63)


def regularise(model: Transformer, l1: float, l2: float) -> None:
    """Add to the gradients those of l1 |w| + l2 / 2 w^2, summed over the linear layers' weights.

    Unlike decoupled weight decay these pass through the optimiser's moments. The loss that is reported is without them.
    """
    if l1 or l2:
        for weight in model.linear_weights().values():
            if weight.grad is not None:
                weight.grad += l1 * weight.detach().sign() + l2 * weight.detach()


@torch.no_grad()
def settle(model: Transformer, recipe: Recipe, extras: dict[str, Tensor]) -> None:
    """What happens to the weights after the optimiser's step: clipped, held at their size, averaged."""
    options = recipe.options
    for weight in model.linear_weights().values():
        if options.latent_clip:
            clip(weight, options.latent_clip)
        if options.stabilise:
            stabilise(weight, options.stabilise)
    if options.ema:
        for name, parameter in model.named_parameters():
            average(extras, f"{name}.{EMA}", parameter, options.ema)


def clip(weight: Tensor, multiple: float) -> None:
    """Limit magnitudes, so that no weight drifts so far that its code can never change again.

        w = clip(w, -c, c)        c = multiple * mean|w|

    Signs stay as they are. The scale of the codes, mean|w|, moves with the clipping.
    """
    limit = multiple * ranks.whole(weight.abs().mean())
    ranks.local(weight).clamp_(-limit, limit)


def stabilise(weight: Tensor, target: float) -> None:
    """Hold the mean magnitude of a matrix, and with it the scale of its codes, at a target t.

        w = w * t / (0.99 t + 0.01 mean|w|)

    The same as dividing by a moving average of mean|w| which is divided along with the weights, so that nothing has to
    be remembered. Codes do not change, as all weights of a matrix move alike.
    """
    mean = ranks.whole(weight.abs().mean())
    ranks.local(weight).mul_(target / (_STABLE * target + (1 - _STABLE) * mean))


def average(extras: dict[str, Tensor], name: str, value: Tensor, decay: float) -> None:
    """Move an average towards a value: a = decay * a + (1 - decay) * value, from the first value on."""
    if name in extras:
        extras[name].lerp_(value.detach(), 1 - decay)
    else:
        extras[name] = value.detach().clone()


@contextmanager
def averaged(model: Transformer, extras: dict[str, Tensor]) -> Iterator[None]:
    """The model with its averaged weights, where there are any; afterwards it has its own again."""
    own = {}
    for name, parameter in model.named_parameters():
        if (key := f"{name}.{EMA}") in extras:
            own[name] = ranks.put(parameter, extras[key])
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            if name in own:
                ranks.put(parameter, own[name])


@contextmanager
def as_packed(model: Transformer, extras: dict[str, Tensor]) -> Iterator[None]:
    """The model that would be saved, to measure it: averaged weights where there are any, wholly rounded, no noise.

    Inputs are rounded as its config says, also in a first phase that rounds them otherwise.
    """
    rounding = model.rounding
    before = rounding.strength, rounding.activations, rounding.temperature
    rounding.strength, rounding.activations, rounding.temperature = None, None, 0.0
    try:
        with averaged(model, extras):
            yield
    finally:
        rounding.strength, rounding.activations, rounding.temperature = before

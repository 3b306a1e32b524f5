"""The optimisers, and what each remembers of a parameter; their schedule is in optim.py, which needs no torch."""

from collections.abc import Iterable
from typing import Any

import torch

from onebit.train.optim import Schedule

# What an optimiser remembers of each parameter.
MOMENTS: dict[str, tuple[str, ...]] = {"adamw": ("exp_avg", "exp_avg_sq"), "signum": ("exp_avg",)}


def make(name: str, schedule: Schedule, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """An optimiser of two groups: matrices, whose weights decay, and vectors, which are not pulled towards zero.

    Args:
        name: "adamw" or "signum".
        schedule: its betas; learning rate and decay are set step by step.
        parameters: of the model.
    """
    parameters = list(parameters)
    decayed: dict[str, Any] = {"params": [p for p in parameters if p.ndim == 2]}
    others: dict[str, Any] = {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}
    if name == "signum":
        return Signum([decayed, others], schedule.lr, schedule.beta1)
    betas = schedule.beta1, schedule.beta2
    return torch.optim.AdamW([decayed, others], lr=schedule.lr, betas=betas, fused=True)


class Signum(torch.optim.Optimizer):
    """m = beta m + (1 - beta) g; w = w (1 - lr decay) - lr sign(m).

    One number is remembered of each weight, Adam's half, and all weights move by the same distance.

    Source: arXiv:1802.04434, with decoupled weight decay.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, beta: float) -> None:
        super().__init__(groups, {"lr": lr, "beta": beta, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move the parameters that have gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg"].lerp_(parameter.grad, 1 - group["beta"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(state["exp_avg"].sign(), alpha=-group["lr"])

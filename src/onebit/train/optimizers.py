"""The optimisers, and what each remembers of a parameter; their schedule is in optim.py, which needs no torch."""

from collections.abc import Iterable
from typing import Any

import torch

from onebit.train.optim import Schedule

# What an optimiser remembers of each parameter.
MOMENTS: dict[str, tuple[str, ...]] = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "signum": ("exp_avg",),
    "muon": ("exp_avg", "exp_avg_sq", "momentum_buffer"),
}


def make(
    name: str,
    schedule: Schedule,
    parameters: Iterable[torch.nn.Parameter],
    linear: Iterable[torch.nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """An optimiser of two groups: matrices, whose weights decay, and vectors, which are not pulled towards zero.

    Args:
        name: "adamw", "signum" or "muon".
        schedule: its betas; learning rate and decay are set step by step.
        parameters: of the model.
        linear: those of them that are the matrices of its layers; muon is for these.
    """
    parameters = list(parameters)
    decayed: dict[str, Any] = {"params": [p for p in parameters if p.ndim == 2]}
    others: dict[str, Any] = {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}
    if name == "signum":
        return Signum([decayed, others], schedule.lr, schedule.beta1)
    betas = schedule.beta1, schedule.beta2
    if name == "muon":
        return Muon([decayed, others], schedule.lr, betas, list(linear))
    return torch.optim.AdamW([decayed, others], lr=schedule.lr, betas=betas, fused=True)


class Muon(torch.optim.AdamW):
    """m = mu m + (1 - mu) g; w = w (1 - lr decay) - lr * 0.2 sqrt(max(out, in)) * O(mu m + (1 - mu) g), mu = 0.95.

    O makes a matrix nearly orthogonal: its singular values become about 1, so that all directions of a layer learn
    alike. The factor gives its elements the size of AdamW's steps, whose learning rate then fits. What is no matrix of
    a layer is left to AdamW.

    Args:
        groups: of parameters; the matrices are in the first.
        lr: learning rate.
        betas: of AdamW.
        matrices: parameters [out, in] that muon moves.

    Source: github.com/KellerJordan/Muon; the factor, arXiv:2502.16982 eq. 4.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        matrices: list[torch.nn.Parameter],
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, fused=True)
        self._muon = torch.optim.Muon(matrices, lr, adjust_lr_fn="match_rms_adamw")
        # One memory for both, which is saved and restored as that of any optimiser.
        self._muon.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move the parameters that have gradients."""
        (group,) = self._muon.param_groups
        group |= {name: self.param_groups[0][name] for name in ("lr", "weight_decay")}
        self._muon.step()
        # AdamW passes over what has no gradient.
        for matrix in group["params"]:
            matrix.grad = None
        super().step()


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

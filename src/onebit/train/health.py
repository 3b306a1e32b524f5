"""How a run is doing beyond its loss: gradients, codes and inputs of each layer; and losses that climb.

Reads only: nothing here changes what is trained.
"""

import math
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from onebit.nn.bitlinear import Seen
from onebit.nn.transformer import Transformer
from onebit.quant import quantize_weights
from onebit.train import ranks
from onebit.train.options import CODES

# A run has diverged when, for so many steps on end, the loss is above the best mean over as many steps by this share of
# the best, or this share of what was won since the first such mean, if that is more.
WINDOW = 20
RISE_SHARE, WON_SHARE = 0.5, 0.25


class Watch:
    """Whether the loss has climbed for good.

        high: loss > best + max(best / 2, (first - best) / 4)
        diverged: high for 20 steps on end

    first is the mean loss of the first 20 steps, best the least of any 20 successive ones so far. A loss that is
    multiplied by a number, as the weighted ones of distillation, is judged alike. One step that is high means nothing,
    but no state is saved then.
    """

    def __init__(self) -> None:
        self.first = self.best = math.inf
        self.n_high = 0
        self._recent: deque[float] = deque(maxlen=WINDOW)

    @property
    def bound(self) -> float:
        """What a loss should not exceed; infinity in the first steps."""
        if math.isinf(self.best):
            return math.inf
        return self.best + max(RISE_SHARE * self.best, WON_SHARE * (self.first - self.best))

    def add(self, loss: float) -> bool:
        """Take the loss of a step; return whether the run has diverged."""
        self.n_high = self.n_high + 1 if loss > self.bound else 0
        self._recent.append(loss)
        if len(self._recent) == WINDOW:
            mean = sum(self._recent) / WINDOW
            self.first = mean if math.isinf(self.first) else self.first
            self.best = min(self.best, mean)
        return self.n_high >= WINDOW


def gradient_norms(model: Transformer) -> list[float]:
    """Norm of the gradient of each layer, first to last.

        n_i = sqrt(sum over the parameters of layer i of |gradient|^2)

    Those that stand in no layer (embedding, head, last norm) are in the norm of all alone.

    Args:
        model: after a backward pass, before clipping; all processes must ask.

    Returns:
        a number for each layer.
    """
    norms = []
    for layer in model.layers:
        gradients = [p.grad for p in layer.parameters() if p.grad is not None]
        norms.append(ranks.whole(torch.nn.utils.get_total_norm(gradients)).item())
    return _short(norms)


@torch.no_grad()
def look(
    model: Transformer,
    losses: Callable[..., Tensor],
    arrays: tuple[Tensor, ...],
    precision: AbstractContextManager[Any],
    extras: dict[str, Tensor],
) -> dict[str, list[float]]:
    """Figures of each layer, first to last.

    Args:
        model: the model that is trained.
        losses: of the task, not compiled.
        arrays: a batch of the task; its first example runs once more.
        precision: the autocast of the run.
        extras: keeps the codes between looks.

    Returns:
        flips: share of the codes that differ from those of the last look; not there at the first.
        zeros: share of the codes that are zero; neither is there for dense layers and codes that do not learn.
        saturated: mean over the inputs of the linear layers of the share of least and largest codes.
        largest: largest magnitude of any such input.
        outliers: largest ratio of the largest magnitude of such an input to its root mean square.
    """
    blocks: list[Any] = list(model.layers)
    layers: list[list[Seen]] = [[] for _ in blocks]
    for block, notes in zip(blocks, layers, strict=True):
        block.rounding = replace(model.rounding, notes=notes)
    try:
        with precision:
            losses(model, *(array[:1] for array in arrays))
    finally:
        for block in blocks:
            block.rounding = model.rounding
    figures = {
        "saturated": [sum(seen.saturated for seen in layer) / max(len(layer), 1) for layer in layers],
        "largest": [max((seen.largest for seen in layer), default=0.0) for layer in layers],
        "outliers": [max((seen.outlier for seen in layer), default=0.0) for layer in layers],
    }
    # Codes below an adapter do not learn: no weights stand behind them.
    if model.config.weights != "dense" and model.linear_weights():
        figures = _codes(model, extras) | figures
    return {name: _short(values) for name, values in figures.items()}


def _short(values: list[float]) -> list[float]:
    # Six digits are plenty for a look, and a record stays a line.
    return [float(f"{value:.6g}") for value in values]


def _codes(model: Transformer, extras: dict[str, Tensor]) -> dict[str, list[float]]:
    config, masters = model.config, model.masters()
    n_layers = config.n_layers
    flips, zeros, total = [0] * n_layers, [0] * n_layers, [0] * n_layers
    seen = False
    for name in model.linear_weights():
        master = ranks.whole(masters[name])
        # From 0: the file of the state knows bytes without a sign.
        codes = (quantize_weights(master, config.weights_of(name), config.scale)[0] + 1).to(torch.uint8)
        layer, key = int(name.split(".")[1]), f"{name}.{CODES}"
        if key in extras:
            seen = True
            flips[layer] += int((codes != ranks.whole(extras[key])).sum())
        extras[key] = ranks.divided(codes, masters[name])
        zeros[layer] += int((codes == 1).sum())
        total[layer] += codes.numel()
    shares = {"zeros": [z / n for z, n in zip(zeros, total, strict=True)]}
    return {"flips": [f / n for f, n in zip(flips, total, strict=True)], **shares} if seen else shares

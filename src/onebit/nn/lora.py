"""Low-rank adapters on a model whose own weights stay as they are.

    attach(model, rank=16, alpha=32.0, targets=("q", "v"), seed=1)      # changes nothing yet: B is zero
    adapter = detach(model)                                             # for onebit.formats.adapter.write

In eval mode the numbers are those of the engine, bit for bit.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onebit.formats.adapter import Adapter, LowRank, parse_targets
from onebit.nn import ordered
from onebit.nn.bitlinear import bf16_rows
from onebit.nn.transformer import Transformer


class LoRA(nn.Module):
    """What is added to a layer's output: (B (A x)) * scale, of the float32 input before any quantiser.

    While it learns, A and B are rounded to bfloat16 in the forward pass, as the adapter's file holds them.

    Args:
        a: float32 [r, k].
        b: float32 [n, r].
        scale: alpha / r, a float32.

    Source: arXiv:2106.09685, section 4.1.
    """

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.a = nn.Parameter(a)
        self.b = nn.Parameter(b)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """The addition, float32 [..., n]. x: float32 [..., k]."""
        if not self.training:
            return ordered.low_rank(x, self.a, self.b, self.scale)
        return F.linear(F.linear(x, bf16_rows(self.a)), bf16_rows(self.b)).float() * self.scale


def attach(model: Transformer, rank: int, alpha: float, targets: tuple[str, ...], seed: int) -> None:
    """Freeze a model and give its layers adapters that do nothing yet: A is normal with deviation 1 / sqrt(in), B zero.

    Args:
        model: changed in place.
        rank: r, rows of A.
        alpha: scale times r.
        targets: names of linear layers, as ("q", "v").
        seed: of A.

    Raises:
        ValueError: unknown targets.
    """
    shapes = model.config.linear_shapes()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for i in range(model.config.n_layers):
        for target in parse_targets(targets):
            n, k = shapes[target]
            a = torch.randn(rank, k, generator=generator) / math.sqrt(k)
            tensors[f"layers.{i}.{target}.weight"] = LowRank(a.numpy(), torch.zeros(n, rank).numpy())
    load(model, Adapter(rank, alpha, tensors))


def load(model: Transformer, adapter: Adapter) -> None:
    """Freeze a model and give it an adapter, in place of an earlier one.

    Raises:
        ValueError: an adapter of another model.
    """
    adapter.check(model.config)
    model.requires_grad_(False)
    for i, block in enumerate(model.layers):
        for target in model.config.linear_shapes():
            pair = adapter.tensors.get(f"layers.{i}.{target}.weight")
            device = model.cos.device
            added = None
            if pair is not None:
                a, b = (torch.tensor(w, device=device) for w in pair)
                added = LoRA(a, b, adapter.scale)
            getattr(block, target).lora = added


def detach(model: Transformer, rank: int, alpha: float) -> Adapter:
    """The adapter that a model has learned, rounded to bfloat16 as the model used it.

    Args:
        model: with adapters attached.
        rank: they were attached with.
        alpha: likewise.

    Raises:
        ValueError: weights that are no longer numbers.
    """
    tensors = {}
    for i, block in enumerate(model.layers):
        for target in model.config.linear_shapes():
            lora = getattr(block, target).lora
            if lora is not None:
                pair = (bf16_rows(w.detach()).cpu().numpy() for w in (lora.a, lora.b))
                tensors[f"layers.{i}.{target}.weight"] = LowRank(*pair)
    return Adapter(rank, alpha, tensors)

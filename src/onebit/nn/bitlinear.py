"""Straight-through estimators around `quant.py`: layers compute with codes and learn the weights behind them.

    q, k, v = bit_linear(x, (w_q, w_k, w_v), "b1.58", "a8", "tensor")

Knows the definitions of the numbers; knows nothing of the transformer around it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from onebit.quant import (
    A8_LEVELS,
    A15_LEVELS,
    INPUT_QUANTIZERS,
    Granularity,
    dequantize,
    quantize_a15,
    quantize_rows,
    quantize_weights,
)

# Least and largest codes, where values are clipped; "a1" has two codes.
_LIMITS = {
    "a15": (-A15_LEVELS, A15_LEVELS),
    "a8": (-A8_LEVELS, A8_LEVELS),
    "a8-half": (-A8_LEVELS, A8_LEVELS),
    "a4": (-8.0, 7.0),
}


class Seen(NamedTuple):
    """What a group of layers with one input saw.

    Args:
        largest: magnitude in the input.
        saturated: share of its codes that are the least or the largest.
        outlier: largest magnitude / root mean square; 0 where all is zero.
    """

    largest: float
    saturated: float
    outlier: float


@dataclass
class Rounding:
    """How a training step rounds, and what it notes; the defaults are the definitions of `quant.py`, to the bit.

    Args:
        strength: lambda from 0 to 1, a tensor without axes: how far weights and inputs are moved to their rounded
            values; None is all the way, in exact products of codes.
        activations: instead of those of the model's config, or None.
        temperature: of stochastic rounding of the inputs; 0 rounds to nearest.
        gradient_limit: see `limit_gradient`; 0 is off.
        notes: a list that gets what each group of layers with one input sees, in the order in which they run; or None.
    """

    strength: Tensor | None = None
    activations: str | None = None
    temperature: float = 0.0
    gradient_limit: float = 0.0
    notes: list[Seen] | None = None

    def note(self, x: Tensor, kind: str) -> None:
        """Append to `notes`. x: [..., k]; kind: a key of `quant.INPUT_QUANTIZERS`, or "none"."""
        assert self.notes is not None
        x = x.detach().float()
        saturated = 0.0
        if kind in _LIMITS:
            codes = INPUT_QUANTIZERS[kind](x)[0]
            low, high = _LIMITS[kind]
            saturated = ((codes <= low) | (codes >= high)).float().mean().item()
        largest, root_mean_square = x.abs().max().item(), x.square().mean().sqrt().item()
        self.notes.append(Seen(largest, saturated, largest / root_mean_square if largest else 0.0))


def bit_linear(
    x: Tensor,
    weights: tuple[Tensor, ...],
    scheme: str,
    activations: str,
    granularity: Granularity,
    temperature: float = 0.0,
) -> tuple[Tensor, ...]:
    """Multiply one input by several quantised matrices; the input is quantised once for all of them.

        y = (x_codes @ w_codes.T) * w_scale * x_scale        dy/dx, dy/dw as if nothing were rounded

    The product of codes runs in the autocast dtype, which rounds no codes but those of a15. Without autocast their sums
    are exact, and rounded once to float32.

    Args:
        x: [..., k].
        weights: float32 [n_i, k] each.
        scheme: "b1.58" or "b1".
        activations: a key of `quant.INPUT_QUANTIZERS`.
        granularity: weights that share a scale.
        temperature: of stochastic rounding of x (`round_with_noise`); 0 rounds to nearest.

    Returns:
        float32 [..., n_i] for each matrix.
    """
    # Drawn here: torch.compile takes no random numbers inside of a function with its own gradient.
    uniform = torch.rand_like(x, dtype=torch.float32) if temperature else None
    y = _BitLinear.apply(x, scheme, activations, granularity, temperature, uniform, *weights)
    return y.split([w.shape[0] for w in weights], dim=-1)


def code_linear(
    x: Tensor, quantized: list[tuple[Tensor, Tensor]], activations: str, granularity: Granularity
) -> tuple[Tensor, ...]:
    """`bit_linear` with codes that do not learn: the same numbers, and a gradient for x alone.

    Args:
        x: [..., k].
        quantized: codes, int8 [n_i, k], and scale, float32, of each matrix.
        activations: a key of `quant.INPUT_QUANTIZERS`.
        granularity: weights that share a scale.

    Returns:
        float32 [..., n_i] for each matrix.
    """
    y = _CodeLinear.apply(x, activations, granularity, *(tensor for pair in quantized for tensor in pair))
    return y.split([codes.shape[0] for codes, _ in quantized], dim=-1)


class _BitLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scheme, activations, granularity, temperature, uniform, *weights):  # type: ignore[no-untyped-def]
        quantized = [quantize_weights(w, scheme, granularity) for w in weights]
        y, *saved = _multiply(x, quantized, activations, granularity, temperature, uniform)
        ctx.save_for_backward(*saved)
        ctx.rows = [w.shape[0] for w in weights]
        return y

    @staticmethod
    def backward(ctx, grad_y):  # type: ignore[no-untyped-def]
        x_codes, x_scale, w, w_scale = ctx.saved_tensors
        dtype = w.dtype
        grad_x = ((grad_y * w_scale).to(dtype) @ w).float()
        scaled = (grad_y * x_scale).to(dtype).flatten(0, -2)
        grad_w = (scaled.T @ x_codes.flatten(0, -2)).float()
        return grad_x, None, None, None, None, None, *grad_w.split(ctx.rows)


class _CodeLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, activations, granularity, *flat):  # type: ignore[no-untyped-def]
        quantized = list(zip(flat[::2], flat[1::2], strict=True))
        y, _, _, w, _ = _multiply(x, quantized, activations, granularity)
        # The codes alone: as floats they take four times as much memory, in every layer.
        ctx.save_for_backward(*flat)
        ctx.dtype, ctx.granularity = w.dtype, granularity
        return y

    @staticmethod
    def backward(ctx, grad_y):  # type: ignore[no-untyped-def]
        flat = ctx.saved_tensors
        quantized = list(zip(flat[::2], flat[1::2], strict=True))
        w, w_scale = _rows(quantized, ctx.granularity, ctx.dtype)
        grad_x = ((grad_y * w_scale).to(ctx.dtype) @ w).float()
        return grad_x, None, None, *(None for _ in flat)


def _multiply(
    x: Tensor,
    quantized: list[tuple[Tensor, Tensor]],
    activations: str,
    granularity: Granularity,
    temperature: float = 0.0,
    uniform: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The product, and what a gradient takes: codes and scale of x, rows and their scales."""
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    if activations == "a15" and dtype == torch.float32:
        # Sums of such codes leave the whole numbers of float32.
        dtype = torch.float64
    if uniform is not None:
        x_codes, x_scale = round_with_noise(x.float(), activations, temperature, uniform)
    else:
        x_codes, x_scale = INPUT_QUANTIZERS[activations](x.float())
    x_codes = x_codes.to(dtype)
    w, w_scale = _rows(quantized, granularity, dtype)
    if isinstance(granularity, int):
        if dtype in (torch.float32, torch.float64):
            y = _sum_groups(x_codes, quantized, granularity)
        else:
            y = F.linear(x_codes, w).float()
    else:
        y = F.linear(x_codes, w).float() * w_scale
    return y * x_scale, x_codes, x_scale, w, w_scale


def _rows(
    quantized: list[tuple[Tensor, Tensor]], granularity: Granularity, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The matrices one below another, and what their products are multiplied by: codes, or weights of groups."""
    if isinstance(granularity, int):
        w = torch.cat([dequantize(codes, scale) for codes, scale in quantized]).to(dtype)
        return w, torch.ones_like(w[:, 0], dtype=torch.float32)
    w = torch.cat([codes.to(dtype) for codes, _ in quantized])
    return w, torch.cat([scale.expand(codes.shape[0]) for codes, scale in quantized])


def _sum_groups(x_codes: Tensor, quantized: list[tuple[Tensor, Tensor]], group: int) -> Tensor:
    """The exact sum of each group times its scale, added in ascending order; float32 [..., n]."""
    w_codes, w_scale = (torch.cat(parts) for parts in zip(*quantized, strict=True))
    y = torch.zeros(())
    for g, start in enumerate(range(0, w_codes.shape[1], group)):
        inputs = slice(start, start + group)
        sums = F.linear(x_codes[..., inputs], w_codes[:, inputs].to(x_codes.dtype)).float()
        y = y + sums * w_scale[:, g]
    return y


def round_with_noise(
    x: Tensor, activations: str, temperature: float, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """Quantise activations by a draw: a code is more likely the nearer it is.

        P(upper neighbour) = sigmoid((fraction - 1/2) / temperature)        P(+1) = sigmoid(x / (scale temperature))

    The logistic noise that decides is a difference of two Gumbel variables; it goes to rounding to nearest as the
    temperature goes to 0. Scales, limits and values that "a8-half" drops are those of the definition.

    Args:
        x: float32 [..., n].
        activations: a key of `quant.INPUT_QUANTIZERS`.
        temperature: above 0, in steps between codes.
        uniform: random numbers between 0 and 1, like x.

    Returns:
        codes: [..., n]; scale: [..., 1].

    Source: the Gumbel-max draw, arXiv:1611.01144.
    """
    codes, scale = INPUT_QUANTIZERS[activations](x)
    exact, noise = x / scale, temperature * uniform.logit(eps=1e-6)
    if activations == "a1":
        return (exact + noise > 0) * 2.0 - 1, scale
    below = exact.floor()
    drawn = (below + (exact - below - 0.5 + noise > 0)).clamp(*_LIMITS[activations])
    return torch.where(codes == 0, 0.0, drawn) if activations == "a8-half" else drawn, scale


def blended_linear(
    x: Tensor,
    weights: tuple[Tensor, ...],
    scheme: str,
    activations: str,
    granularity: Granularity,
    strength: Tensor,
) -> tuple[Tensor, ...]:
    """`bit_linear` part of the way: what is multiplied is v + lambda (Q(v) - v), for the input and for each matrix.

    Args:
        x: [..., k].
        weights: float32 [n_i, k] each.
        scheme: "b1.58" or "b1".
        activations: a key of `quant.INPUT_QUANTIZERS`.
        granularity: weights that share a scale.
        strength: lambda, from 0 to 1.

    Returns:
        float32 [..., n_i] for each matrix; gradients as if nothing were rounded.
    """
    codes, scale = INPUT_QUANTIZERS[activations](x.detach().float())
    x = x + strength * (codes * scale - x).detach()
    moved = []
    for w in weights:
        rounded = dequantize(*quantize_weights(w.detach(), scheme, granularity))
        moved.append(w + strength * (rounded - w).detach())
    return F.linear(x, torch.cat(moved)).float().split([w.shape[0] for w in weights], dim=-1)


def hadamard(x: Tensor) -> Tensor:
    """Multiply by the normalised Hadamard matrix: outliers of a token spread over all its values.

        y = H x / sqrt(n),    H[i, j] = -1 to the number of ones that i and j share in binary

    With n = a b it is a product with the matrices of a and of b: n (a + b) multiplications, in float32 also under
    autocast. `ordered.hadamard` is the same in the engine's order.

    Args:
        x: float32 [..., n], n a power of two.

    Returns:
        float32 [..., n]; applied twice it gives x but for rounding.

    Source: arXiv:2504.18415 section 2.2.
    """
    n = x.shape[-1]
    a = 1 << (n.bit_length() - 1) // 2
    with torch.autocast(x.device.type, enabled=False):
        y = _signs(a, x.device) @ x.float().unflatten(-1, (a, n // a)) @ _signs(n // a, x.device)
    return y.flatten(-2) * n**-0.5


def _signs(n: int, device: torch.device) -> Tensor:
    """The Hadamard matrix of a power of two, without its norm; float32 [n, n]."""
    i = torch.arange(n, device=device)
    shared = i[:, None] & i
    odd = torch.zeros_like(shared)
    for bit in range(n.bit_length()):
        odd = odd ^ (shared >> bit & 1)
    return 1.0 - 2.0 * odd


def limit_gradient(y: Tensor, multiple: float) -> Tensor:
    """y, with the gradient of each token limited to `multiple` times the root mean square norm of all of them.

    Applied to the output of a linear layer: no single token moves the weights behind the codes at will.
    """
    limited: Tensor = _LimitGradient.apply(y, multiple)
    return limited


class _LimitGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, multiple):  # type: ignore[no-untyped-def]
        ctx.multiple = multiple
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad_y):  # type: ignore[no-untyped-def]
        norm = grad_y.norm(dim=-1, keepdim=True)
        limit = ctx.multiple * norm.square().mean().sqrt()
        return grad_y * (limit / norm.clamp_min(1e-30)).clamp_max(1), None


def straight_through(x: Tensor, quantizer: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """Replace x by codes * scale in the forward pass and pass the gradient through unchanged."""
    with torch.no_grad():
        codes, scale = quantizer(x.float())
        rounded = dequantize(codes, scale) if scale.ndim < x.ndim else codes * scale
    # The difference is exactly zero, so the value is the rounded one to the bit; its gradient is that of x.
    return rounded + (x - x.detach())


def int8_rows(w: Tensor) -> Tensor:
    """The embedding or head matrix as the engine keeps it: int8 with a scale per row. w: float32 [rows, n]."""
    return straight_through(w, lambda rows: quantize_rows(rows, 8))


def bf16_rows(w: Tensor) -> Tensor:
    """The embedding or head matrix rounded to bfloat16; gradients pass as they are. w: float32 [rows, n]."""
    return w.bfloat16().float()


def int15_activations(x: Tensor) -> Tensor:
    """The head's input as the engine keeps it: 15 bits per token. x: float32 [..., n]."""
    return straight_through(x, quantize_a15)

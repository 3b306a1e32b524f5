"""Straight-through estimators around `quant.py`: layers compute with codes and learn the weights behind them.

    q, k, v = bit_linear(x, (w_q, w_k, w_v), "b1.58", "a8", "tensor")

Knows the definitions of the numbers; knows nothing of the transformer around it.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from onebit.quant import (
    ACTIVATION_QUANTIZERS,
    Granularity,
    dequantize,
    quantize_a15,
    quantize_rows,
    quantize_weights,
)


def bit_linear(
    x: Tensor, weights: tuple[Tensor, ...], scheme: str, activations: str, granularity: Granularity
) -> tuple[Tensor, ...]:
    """Multiply one input by several quantised matrices; the input is quantised once for all of them.

        y = (x_codes @ w_codes.T) * w_scale * x_scale        dy/dx, dy/dw as if nothing were rounded

    The product of codes runs in the autocast dtype, which rounds no codes but those of a15. Without autocast their sums
    are exact, and rounded once to float32.

    Args:
        x: [..., k].
        weights: float32 [n_i, k] each.
        scheme: "b1.58" or "b1".
        activations: "a15", "a8", "a4" or "a1".
        granularity: weights that share a scale.

    Returns:
        float32 [..., n_i] for each matrix.
    """
    y = _BitLinear.apply(x, scheme, activations, granularity, *weights)
    return y.split([w.shape[0] for w in weights], dim=-1)


def code_linear(
    x: Tensor, quantized: list[tuple[Tensor, Tensor]], activations: str, granularity: Granularity
) -> tuple[Tensor, ...]:
    """`bit_linear` with codes that do not learn: the same numbers, and a gradient for x alone.

    Args:
        x: [..., k].
        quantized: codes, int8 [n_i, k], and scale, float32, of each matrix.
        activations: "a15", "a8", "a4" or "a1".
        granularity: weights that share a scale.

    Returns:
        float32 [..., n_i] for each matrix.
    """
    y = _CodeLinear.apply(x, activations, granularity, *(tensor for pair in quantized for tensor in pair))
    return y.split([codes.shape[0] for codes, _ in quantized], dim=-1)


class _BitLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scheme, activations, granularity, *weights):  # type: ignore[no-untyped-def]
        quantized = [quantize_weights(w, scheme, granularity) for w in weights]
        y, *saved = _multiply(x, quantized, activations, granularity)
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
        return grad_x, None, None, None, *grad_w.split(ctx.rows)


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
    x: Tensor, quantized: list[tuple[Tensor, Tensor]], activations: str, granularity: Granularity
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The product, and what a gradient takes: codes and scale of x, rows and their scales."""
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    if activations == "a15" and dtype == torch.float32:
        # Sums of such codes leave the whole numbers of float32.
        dtype = torch.float64
    x_codes, x_scale = ACTIVATION_QUANTIZERS[activations](x.float())
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

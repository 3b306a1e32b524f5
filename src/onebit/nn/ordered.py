"""Float work in the order that the engine follows, so that a model in eval mode gives its logits to the bit.

The definitions are in docs/numerics.md, the fast twins in core/src/kernels. Slow, and without gradients worth having:
training uses torch's own operations.

Legend: B batch, T tokens, N heads, H d_head, J keys of a block.
"""

import torch
from torch import Tensor

from onebit.quant import lane_sum, quantize_a15, quantize_rows

# Keys of a block, and blocks of a split.
BLOCK_KEYS = 64
SPLIT_BLOCKS = 8

_INVERSE_LN_2 = float.fromhex("0x1.715476p+0")
# ln 2 in two parts, the first short enough for a multiple of it to be exact.
_LN_2 = float.fromhex("0x1.62e4p-1"), float.fromhex("0x1.7f7d1cp-20")
_COEFFICIENTS = [
    float.fromhex(c)
    for c in ("0x1.6a23dcp-10", "0x1.123a26p-7", "0x1.5558f4p-5", "0x1.55549p-3", "0x1.fffffcp-2")
]


def exp(x: Tensor) -> Tensor:
    """The engine's exponential, float32: 0 below -87, infinity above 88, within 1e-7 between."""
    n = (x * _INVERSE_LN_2).round().clamp(-126, 127)
    r = (x - n * _LN_2[0]) - n * _LN_2[1]
    p = torch.full_like(x, _COEFFICIENTS[0])
    for coefficient in _COEFFICIENTS[1:]:
        p = p * r + coefficient
    power = ((n.nan_to_num().int() + 127) << 23).view(torch.float32)
    y = (1 + (r + (r * r) * p)) * power
    return torch.where(x < -87, 0.0, torch.where(x > 88, torch.inf, y))


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """(x * (1 / sqrt(lane_sum(x^2) / n + eps))) * gain, float32 [..., n]."""
    mean = lane_sum(x * x) / x.shape[-1]
    # torch's float32 square root is not correctly rounded; the float64 one, rounded once more, is.
    return x * (1 / (mean + eps).double().sqrt().float()) * gain


def silu(x: Tensor) -> Tensor:
    """The gate of SwiGLU: x / (1 + exp(-x)), float32."""
    return x / (1 + exp(-x))


def hadamard(x: Tensor) -> Tensor:
    """The normalised Hadamard transform in log2(n) rounds of sums and differences, of nearest pairs first.

    Args:
        x: float32 [..., n], n a power of two.

    Returns:
        float32 [..., n].
    """
    n, width = x.shape[-1], 1
    y = x
    while width < n:
        a, b = y.unflatten(-1, (n // (2 * width), 2, width)).unbind(-2)
        y = torch.stack((a + b, a - b), -2).flatten(-3)
        width *= 2
    return y * n**-0.5


# The largest score, the sum of the weights, and the weighted sum of the values.
State = tuple[Tensor, Tensor, Tensor]


def attend(q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor) -> Tensor:
    """Causal attention: blocks of 64 keys merge into splits of 512, and splits merge, both in ascending order.

    Args:
        q_BNTH: float32 [B, N, T, H].
        k_BNTH: float32 [B, N, T, H], values of bfloat16.
        v_BNTH: like k_BNTH.

    Returns:
        float32 [B, N, T, H].
    """
    n_tokens = q_BNTH.shape[2]
    split_keys = SPLIT_BLOCKS * BLOCK_KEYS
    total: State | None = None
    for split in range(0, n_tokens, split_keys):
        state: State | None = None
        for start in range(split, min(split + split_keys, n_tokens), BLOCK_KEYS):
            block = _attend_block(q_BNTH, k_BNTH, v_BNTH, start)
            state = block if state is None else _merge(state, block, start)
        assert state is not None
        total = state if total is None else _merge(total, state, split)
    assert total is not None
    return total[2] / total[1]


def _attend_block(q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor, start: int) -> State:
    n_tokens, width = q_BNTH.shape[-2:]
    inv_sqrt = 1 / torch.tensor(float(width), dtype=torch.float64).sqrt().float()
    at = torch.arange(n_tokens, device=q_BNTH.device)
    k_BNJH, v_BNJH = (x[:, :, start : start + BLOCK_KEYS] for x in (k_BNTH, v_BNTH))
    visible_TJ = at[:, None] >= at[start : start + BLOCK_KEYS]
    score = lane_sum(q_BNTH[:, :, :, None] * k_BNJH[:, :, None])[..., 0] * inv_sqrt
    score = score.masked_fill(~visible_TJ, -torch.inf)
    m = score.amax(-1, keepdim=True)
    p_BNTJ = torch.where(visible_TJ, exp(score - m), 0.0)
    o_BNTH = torch.zeros_like(q_BNTH)
    for j in range(k_BNJH.shape[2]):
        o_BNTH = o_BNTH + p_BNTJ[..., j : j + 1] * v_BNJH[:, :, None, j]
    return m, lane_sum(p_BNTJ), o_BNTH


def _merge(before: State, part: State, start: int) -> State:
    """Add a part that begins at `start`; tokens before it see none of it."""
    new_m = torch.maximum(before[0], part[0])
    keep, take = exp(before[0] - new_m), exp(part[0] - new_m)
    sees = (torch.arange(part[0].shape[2], device=part[0].device) >= start)[:, None]
    total, out = (
        torch.where(sees, x * keep + y * take, x) for x, y in zip(before[1:], part[1:], strict=True)
    )
    return torch.where(sees, new_m, before[0]), total, out


def head(x: Tensor, w: Tensor) -> Tensor:
    """Logits as the engine computes them: int8 rows times 15-bit activations, an exact sum rounded once.

    Args:
        x: float32 [..., n].
        w: float32 [V, n].

    Returns:
        float32 [..., V].
    """
    w_codes, w_scale = quantize_rows(w, 8)
    x_codes, x_scale = quantize_a15(x)
    # Whole numbers below 2^53: exact in float64 in any order.
    sums = x_codes.double() @ w_codes.double().T
    return (sums.float() * w_scale) * x_scale


def low_rank(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """What an adapter adds: (B (A x)) * scale, every dot product a lane sum.

    Args:
        x: float32 [..., k].
        a: float32 [r, k].
        b: float32 [n, r].
        scale: a float32.

    Returns:
        float32 [..., n].
    """
    return _dots(_dots(x, a), b) * scale


def _dots(x: Tensor, w: Tensor) -> Tensor:
    """Lane sums with a float32 matrix, as the sum of bfloat16 planes that it is. x: [..., k] -> [..., n]."""
    total, rest = None, w
    for _ in range(3):
        plane = rest.bfloat16().float()
        part = head_bf16(x, plane)
        total = part if total is None else total + part
        rest = rest - plane
    assert total is not None
    return total


def head_bf16(x: Tensor, w: Tensor) -> Tensor:
    """Logits of a head in bfloat16: the lane sum of x * bfloat16(w).

    Args:
        x: float32 [..., n].
        w: float32 [V, n].

    Returns:
        float32 [..., V].
    """
    rows = w.bfloat16().float()
    # One row of x at a time: the products take as much memory as the head.
    logits = [lane_sum(row * rows)[:, 0] for row in x.flatten(0, -2)]
    return torch.stack(logits).unflatten(0, x.shape[:-1])

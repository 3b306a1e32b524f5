"""The kernels' definitions in numpy: what a packed byte means, and the float work in its order.

Exact references are float32 and follow docs/numerics.md step by step; smooth ones are float64.
"""

import numpy as np

from onebit import quant

BLOCK_TOKENS = 64


def decode_tile(tile: np.ndarray, encoding: str) -> np.ndarray:
    """The weights of any bytes, packed or not: uint8 [units, 64] -> int64 [tile rows, inputs]."""
    byte = tile.reshape(-1, 16, 4).astype(np.int64)
    groups = {"t80": 5, "r64": 4, "b128": 8, "q8": 1, "q4": 2}[encoding]
    weights = []
    for j in range(groups):
        if encoding == "t80":
            weights.append(byte * 3 // 256 - 1)
            byte = byte * 3 % 256
        elif encoding == "b128":
            weights.append(2 * (byte >> j & 1) - 1)
        else:
            bits = 8 // groups
            zero = {"r64": 1, "q8": 128, "q4": 8}[encoding]
            weights.append((byte >> bits * j & 2**bits - 1) - zero)
    # [group, unit, lane, input] -> [group, lane, unit, input]
    return np.stack(weights).transpose(0, 2, 1, 3).reshape(groups * 16, -1)


def scale_sums(acc: np.ndarray, lo: np.ndarray | None, w_scale: np.ndarray) -> np.ndarray:
    """float32(acc) * w_scale, or with a second plane float32(acc * 128 + lo) * w_scale."""
    sums = acc if lo is None else acc.astype(np.int64) * 128 + lo
    return sums.astype(np.float32) * w_scale


def rms_norm(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    """(x * r) * gain, r = 1 / sqrt(lane_sum(x * x) / n + eps)."""
    mean = quant.lane_sum(x * x) / np.float32(x.size)
    return (x * (np.float32(1) / np.sqrt(mean + np.float32(eps)))) * gain


def rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Half-split rotation of each row."""
    a, b = np.split(x, 2, axis=1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=1)


def relu2_mul(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """max(gate, 0)^2 * up."""
    r = np.where(gate > 0, gate, np.float32(0))
    return (r * r) * up


def silu_mul(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """gate / (1 + exp(-gate)) * up, float64."""
    gate, up = gate.astype(np.float64), up.astype(np.float64)
    with np.errstate(over="ignore"):
        return gate / (1 + np.exp(-gate)) * up


def to_bf16(x: np.ndarray) -> np.ndarray:
    """The nearest bfloat16, ties to even, as uint16."""
    bits = x.view(np.uint32)
    low = bits & 0xFFFF
    up = (low > 0x8000) | ((low == 0x8000) & (bits >> 16 & 1 == 1))
    return ((bits >> 16) + up).astype(np.uint16)


def from_bf16(x: np.ndarray) -> np.ndarray:
    """uint16 bfloat16 -> float32, exactly."""
    return (x.astype(np.uint32) << 16).view(np.float32)


def fp8_values() -> np.ndarray:
    """The number of every code of e4m3 below the largest, as float32; NaN where there is none."""
    code = np.arange(256)
    sign = np.where(code & 0x80, -1.0, 1.0)
    exponent, mantissa = code >> 3 & 15, code & 7
    values = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    return np.where(code & 0x7F == 0x7F, np.nan, sign * values).astype(np.float32)


def to_fp8(x: np.ndarray) -> np.ndarray:
    """The nearest e4m3 as uint8, ties to even codes; at most 448, which stands for NaN too."""
    values = fp8_values()[:0x7F].astype(np.float64)
    magnitude = np.minimum(np.where(np.isnan(x), np.inf, abs(x.astype(np.float64))), values[-1])
    above = np.searchsorted(values, magnitude)
    below = np.maximum(above - 1, 0)
    up, down = values[above] - magnitude, magnitude - values[below]
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return (code | np.where(np.signbit(x), 0x80, 0)).astype(np.uint8)


def from_numbers(x: np.ndarray, kv_format: str) -> np.ndarray:
    """Numbers of a cache as float64."""
    return (from_bf16(x) if kv_format == "bf16" else fp8_values()[x]).astype(np.float64)


def attend(q: np.ndarray, keys: np.ndarray, values: np.ndarray, inv_sqrt_d: float) -> np.ndarray:
    """softmax(q k^T / sqrt(d)) v in float64; q [heads, d], k and v [keys, d]."""
    scores = q.astype(np.float64) @ keys.T * inv_sqrt_d
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True) @ values

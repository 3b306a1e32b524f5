"""The forward pass in plain numpy: one sequence at once, no cache, no kernels, written to be read beside the core's.

Quantisers are those of quant.py and integer sums are exact; smooth work is float32 with numpy's own order and exp.
"""

import numpy as np

from onebit import quant
from onebit.checkpoint import Checkpoint, to_dense
from onebit.config import ModelConfig
from onebit.packing import PackedTensor, unpack


def logits(checkpoint: Checkpoint, tokens: list[int]) -> np.ndarray:
    """float32 [T, V] of all tokens of a sequence."""
    config = checkpoint.config
    weights = checkpoint.tensors
    quantize = quant.ACTIVATION_QUANTIZERS[config.activations]
    cos_TH, sin_TH = angles(len(tokens), config)

    def norm(x, name):
        r = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(config.norm_eps))
        return x * r * weights[name]

    x_TD = to_dense(weights["embed.weight"])[tokens]
    for i in range(config.n_layers):
        layer = f"layers.{i}."

        def linear(x, name, layer=layer):
            return product(weights[f"{layer}{name}.weight"], *quantize(x))

        h_TD = norm(x_TD, f"{layer}attn_norm.weight")
        q_TNH = rotated(linear(h_TD, "q").reshape(len(tokens), config.n_heads, -1), cos_TH, sin_TH)
        k_TKH = rotated(linear(h_TD, "k").reshape(len(tokens), config.n_kv_heads, -1), cos_TH, sin_TH)
        v_TKH = linear(h_TD, "v").reshape(len(tokens), config.n_kv_heads, -1)
        a_TD = attention(q_TNH, bf16(k_TKH), bf16(v_TKH))
        if config.sub_norm:
            a_TD = norm(a_TD, f"{layer}attn_sub_norm.weight")
        x_TD = x_TD + linear(a_TD, "o")

        h_TD = norm(x_TD, f"{layer}ffn_norm.weight")
        gate_TF, up_TF = linear(h_TD, "gate"), linear(h_TD, "up")
        if config.activation == "silu":
            f_TF = gate_TF / (1 + np.exp(-gate_TF)) * up_TF
        else:
            f_TF = np.maximum(gate_TF, 0) ** 2 * up_TF
        if config.sub_norm:
            f_TF = norm(f_TF, f"{layer}ffn_sub_norm.weight")
        x_TD = x_TD + linear(f_TF, "down")
    head = weights["embed.weight" if config.tied_head else "head.weight"]
    return product(head, *quant.quantize_a15(norm(x_TD, "norm.weight")))


def product(tensor: PackedTensor, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Codes [T, K] times a packed matrix [N, K]: exact sums, one rounding each, groups in ascending order."""
    n, k = tensor.shape
    weights = unpack(tensor.data, tensor.encoding, tensor.shape).astype(np.float64)
    scale_NG = tensor.scale if tensor.scale.ndim == 2 else np.broadcast_to(tensor.scale[:, None], (n, 1))
    length = k // scale_NG.shape[1]
    y = np.zeros((len(codes), n), np.float32)
    for g in range(scale_NG.shape[1]):
        group = slice(g * length, (g + 1) * length)
        sums = codes[:, group].astype(np.float64) @ weights[:, group].T
        y = y + sums.astype(np.float32) * scale_NG[:, g]
    return y * scale


def attention(q_TNH: np.ndarray, k_TKH: np.ndarray, v_TKH: np.ndarray) -> np.ndarray:
    """Causal softmax attention of grouped heads, [T, N * H]."""
    n_tokens, n_heads, d_head = q_TNH.shape
    k_TNH = np.repeat(k_TKH, n_heads // k_TKH.shape[1], axis=1)
    v_TNH = np.repeat(v_TKH, n_heads // v_TKH.shape[1], axis=1)
    scores_NTS = np.einsum("tnh,snh->nts", q_TNH, k_TNH) * (np.float32(1) / np.sqrt(np.float32(d_head)))
    scores_NTS = np.where(np.tri(n_tokens, dtype=bool), scores_NTS, -np.inf)
    p_NTS = np.exp(scores_NTS - scores_NTS.max(-1, keepdims=True))
    p_NTS = p_NTS / p_NTS.sum(-1, keepdims=True)
    return np.einsum("nts,snh->tnh", p_NTS, v_TNH).reshape(n_tokens, -1)


def angles(n_tokens: int, config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of the rotary positions, float32 [T, H / 2]."""
    inv_freq = np.array(config.rope_frequencies(), np.float32).astype(np.float64)
    angle = np.arange(n_tokens)[:, None] * inv_freq
    factor = config.rope_attention_factor
    return (factor * np.cos(angle)).astype(np.float32), (factor * np.sin(angle)).astype(np.float32)


def rotated(x_TNH: np.ndarray, cos_TH: np.ndarray, sin_TH: np.ndarray) -> np.ndarray:
    """Half-split rotation."""
    a, b = np.split(x_TNH, 2, axis=-1)
    cos, sin = cos_TH[:, None], sin_TH[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def bf16(x: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16, ties to even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)

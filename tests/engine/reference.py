"""The forward pass in plain numpy: one sequence at once, no cache, no kernels, written to be read beside the core's.

Quantisers are those of quant.py and integer sums are exact; smooth work is float32 with numpy's own order and exp.
"""

import numpy as np

from core.reference import fp8_values, to_fp8
from onebit import quant
from onebit.checkpoint import Checkpoint, to_dense
from onebit.config import ModelConfig
from onebit.packing import PackedTensor, unpack


def logits(checkpoint: Checkpoint, tokens: list[int], kv_cache: str = "bf16") -> np.ndarray:
    """float32 [T, V] of all tokens of a sequence."""
    config = checkpoint.config
    weights = checkpoint.tensors
    quantize = as_it_is if config.weights == "dense" else quant.ACTIVATION_QUANTIZERS[config.activations]
    cos_TH, sin_TH = angles(len(tokens), config)

    def norm(x, name):
        r = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(config.norm_eps))
        return x * r * weights[name]

    x_TD = to_dense(weights["embed.weight"])[tokens]
    for i in range(config.n_layers):
        layer = f"layers.{i}."

        def linear(x, name, layer=layer):
            y = product(weights[f"{layer}{name}.weight"], *quantize(x))
            bias = weights.get(f"{layer}{name}.bias")
            return y if bias is None else y + bias

        h_TD = norm(x_TD, f"{layer}attn_norm.weight")
        q_TNH = linear(h_TD, "q").reshape(len(tokens), config.n_heads, -1)
        k_TKH = linear(h_TD, "k").reshape(len(tokens), config.n_kv_heads, -1)
        if config.qk_norm:
            q_TNH, k_TKH = norm(q_TNH, f"{layer}q_norm.weight"), norm(k_TKH, f"{layer}k_norm.weight")
        q_TNH, k_TKH = rotated(q_TNH, cos_TH, sin_TH), rotated(k_TKH, cos_TH, sin_TH)
        v_TKH = linear(h_TD, "v").reshape(len(tokens), config.n_kv_heads, -1)
        if kv_cache == "int8":
            a_TD = attention_int8(q_TNH, k_TKH, v_TKH)
        else:
            rounded = {"bf16": bf16, "fp8": fp8}[kv_cache]
            a_TD = attention(q_TNH, rounded(k_TKH), rounded(v_TKH))
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
    quantize = as_it_is if head.encoding == "bf16" else quant.quantize_a15
    return product(head, *quantize(norm(x_TD, "norm.weight")))


def as_it_is(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is not quantised: itself, with the scale 1."""
    return x, np.float32(1)


def product(tensor: PackedTensor, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Codes [T, K] times a packed matrix [N, K]: exact sums, one rounding each, groups in ascending order."""
    n, k = tensor.shape
    if tensor.encoding == "bf16":
        return codes @ to_dense(tensor).T
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


def attention_int8(q_TNH: np.ndarray, k_TKH: np.ndarray, v_TKH: np.ndarray) -> np.ndarray:
    """Attention over codes: queries of 15 bits, keys and values of 8, and weights of 15 in blocks of 64 keys."""
    n_tokens, n_heads, d_head = q_TNH.shape
    group = n_heads // k_TKH.shape[1]
    q_codes, q_scale = quant.quantize_a15(q_TNH)
    k_codes, k_scale = (np.repeat(x, group, axis=1) for x in quant.quantize_a8(k_TKH))
    v_codes, v_scale = (np.repeat(x, group, axis=1) for x in quant.quantize_a8(v_TKH))
    sums_NTS = np.einsum("tnh,snh->nts", q_codes.astype(np.float64), k_codes.astype(np.float64))
    factor_TN1 = q_scale * (np.float32(1) / np.sqrt(np.float32(d_head)))
    scores_NTS = sums_NTS.astype(np.float32) * k_scale.transpose(1, 2, 0) * factor_TN1.transpose(1, 0, 2)
    scores_NTS = np.where(np.tri(n_tokens, dtype=bool), scores_NTS, -np.inf)
    m_NT1 = scores_NTS.max(-1, keepdims=True)
    out_NTH = np.zeros((n_heads, n_tokens, d_head), np.float32)
    for start in range(0, n_tokens, 64):
        block = slice(start, start + 64)
        sees_NT1 = np.isfinite(scores_NTS[:, :, start : start + 1])
        block_m_NT1 = np.where(sees_NT1, scores_NTS[:, :, block].max(-1, keepdims=True), 0)
        w_NTJ = np.exp(scores_NTS[:, :, block] - block_m_NT1) * v_scale[block].transpose(1, 2, 0)
        step_NT1 = np.maximum(w_NTJ.max(-1, keepdims=True), np.float32(1e-30)) / np.float32(16256)
        o_NTH = np.rint(w_NTJ / step_NT1) @ v_codes[block].transpose(1, 0, 2).astype(np.float32) * step_NT1
        out_NTH += np.where(sees_NT1, o_NTH * np.exp(block_m_NT1 - m_NT1), 0)
    total_NT1 = np.exp(scores_NTS - m_NT1).sum(-1, keepdims=True)
    return (out_NTH / total_NT1).transpose(1, 0, 2).reshape(n_tokens, -1)


def fp8(x: np.ndarray) -> np.ndarray:
    """Rounded to e4m3, ties to even."""
    return fp8_values()[to_fp8(x)]


def bf16(x: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16, ties to even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)

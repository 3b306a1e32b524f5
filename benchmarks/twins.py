"""The same model for other engines: GGUF files for llama.cpp, a checkpoint for transformers.

Ternary codes are ours, weight for weight. What a peer rounds in its own way (Q4_K, Q6_K) holds random valid blocks
with scales of a usual size: speed does not depend on the values. Types of tensors are those that llama-quantize
chooses.

    write_gguf(checkpoint, Path("2b4t.tq2_0.gguf"), "TQ2_0")
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from onebit.checkpoint import Checkpoint, to_dense
from onebit.config import ModelConfig
from onebit.formats import names
from onebit.formats.hf.export import pack_codes
from onebit.packing import PackedTensor, unpack

GGUF_TYPES = ("TQ2_0", "TQ1_0", "Q4_K_M")
# Weights of a block in all the types used here, and how rows are cut so that float32 copies stay small.
BLOCK = 256
CHUNK_WEIGHTS = 2**24


def gguf_type(name: str, config: ModelConfig, kind: str) -> str:
    """The type that llama-quantize gives a matrix of ours in a file of this kind."""
    part, n = name.split(".")[-2], config.n_layers
    if part == "head" or (part == "embed" and config.tied_head):
        return "Q6_K"
    if part == "embed":
        return "Q4_K"
    if kind != "Q4_K_M":
        return kind
    i = int(name.split(".")[1])
    more_bits = i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2
    return "Q6_K" if part in ("v", "down") and more_bits else "Q4_K"


def write_gguf(checkpoint: Checkpoint, path: Path, kind: str) -> None:
    """Write a GGUF file of the same shape, whole or not at all.

    Ternary models with sub norms become the architecture "bitnet", all others "llama". The vocabulary is of the right
    size and without words, for only token ids are run.

    Args:
        checkpoint: packed, ternary, all widths multiples of 256.
        path: the file to make or to replace.
        kind: one of GGUF_TYPES.

    Raises:
        ValueError: widths that do not fit the blocks of GGUF.
    """
    import gguf

    config = checkpoint.config
    if config.d_model % BLOCK or config.d_ff % BLOCK:
        raise ValueError(
            f"d_model {config.d_model} and d_ff {config.d_ff}: GGUF needs multiples of {BLOCK}; take another shape"
        )
    # An ordinary 4-bit model has no sub norms.
    is_bitnet = config.sub_norm and kind != "Q4_K_M"
    unfinished = path.with_suffix(".part")
    writer = gguf.GGUFWriter(unfinished, "bitnet" if is_bitnet else "llama")
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_rope_dimension_count(config.d_head)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")

    fill: list[Callable[[], np.ndarray]] = []
    for name, tensor in checkpoint.tensors.items():
        if "sub_norm" in name and not is_bitnet:
            continue
        target = names.to_gguf(name)
        if not isinstance(tensor, PackedTensor):
            writer.add_tensor_info(target, tensor.shape, np.dtype(np.float32), tensor.nbytes)
            fill.append(lambda tensor=tensor: tensor)
            continue
        quantization = getattr(gguf.GGMLQuantizationType, gguf_type(name, config, kind))
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, quantization)
        writer.add_tensor_info(target, shape, np.dtype(np.uint8), int(np.prod(shape)), quantization)
        fill.append(lambda tensor=tensor, q=quantization, shape=shape: _blocks(tensor, q, shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    # The bytes are made one tensor at a time: a whole model need not fit into memory twice.
    for make in fill:
        writer.write_tensor_data(np.ascontiguousarray(make()))
    writer.close()
    os.replace(unfinished, path)


def _blocks(tensor: PackedTensor, quantization: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The bytes of a matrix: our own codes in a ternary type, else random blocks."""
    if quantization.name in ("TQ1_0", "TQ2_0"):
        from gguf import quants

        return np.concatenate([quants.quantize(rows, quantization) for rows in _dense_rows(tensor)])
    rng = np.random.default_rng(0)
    dtype = {"Q4_K": Q4_K, "Q6_K": Q6_K}[quantization.name]
    blocks = np.frombuffer(rng.bytes(int(np.prod(shape))), dtype).copy()
    # Weights of about 1 / sqrt(inputs), as those of a trained model.
    size = tensor.shape[1] ** -0.5
    if quantization.name == "Q4_K":
        # A weight is d * scale * code - dmin * minimum, with 6-bit scales and minima and 4-bit codes.
        blocks["d"], blocks["dmin"] = size / 32 / 8, size / 32
    else:
        # A weight is d * scale * code, with 8-bit scales and codes from -32 to 31.
        blocks["d"] = size / 64 / 16
    return blocks.view(np.uint8).reshape(shape)


Q4_K = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128)])
Q6_K = np.dtype([("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")])


def _dense_rows(tensor: PackedTensor) -> Iterator[np.ndarray]:
    """A matrix with one scale as float32, some rows at a time."""
    codes = unpack(tensor.data, tensor.encoding, tensor.shape)
    step = max(CHUNK_WEIGHTS // tensor.shape[1], 1)
    for start in range(0, len(codes), step):
        yield codes[start : start + step].astype(np.float32) * tensor.scale[0]


def hugging_face_config(config: ModelConfig, ternary: bool) -> dict[str, Any]:
    """The config.json of the shape: a packed BitNet or Llama as their authors publish them, or a plain bf16 Llama."""
    is_bitnet = ternary and config.sub_norm
    values = {
        "architectures": ["BitNetForCausalLM" if is_bitnet else "LlamaForCausalLM"],
        "model_type": "bitnet" if is_bitnet else "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.d_head,
        "hidden_act": config.activation if ternary else "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": "bfloat16",
    }
    if ternary:
        # As microsoft/bitnet-b1.58-2B-4T and HF1BitLLM/Llama3-8B-1.58 say it.
        values["quantization_config"] = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}
        if is_bitnet:
            values["quantization_config"] |= {"linear_class": "autobitlinear", "quantization_mode": "offline"}
    return values


def write_hugging_face(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a packed checkpoint for transformers: four codes in a byte, embedding and head in bfloat16."""
    import torch
    from safetensors.torch import save_file

    config = checkpoint.config
    tensors = {}
    for name, tensor in checkpoint.tensors.items():
        target = names.to_hf(name)
        if not isinstance(tensor, PackedTensor):
            tensors[target] = torch.tensor(tensor, dtype=torch.bfloat16)
        elif config.is_linear(name):
            packed = pack_codes(unpack(tensor.data, tensor.encoding, tensor.shape))
            scale = torch.tensor(tensor.scale, dtype=torch.bfloat16)
            tensors[target] = torch.from_numpy(packed)
            # BitLinear divides by its scale, AutoBitLinear multiplies.
            tensors[f"{target}_scale"] = scale if config.sub_norm else 1 / scale
        else:
            tensors[target] = torch.from_numpy(to_dense(tensor)).to(torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hugging_face_config(config, ternary=True), indent=1))
    unfinished = folder / "model.part"
    save_file(tensors, unfinished, metadata={"format": "pt"})
    os.replace(unfinished, folder / "model.safetensors")

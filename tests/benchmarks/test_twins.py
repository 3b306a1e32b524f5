"""Models made for other engines are ours, weight for weight, in files that their own tools read. Kind: oracle."""

from dataclasses import replace

import gguf
import numpy as np
import pytest
import shapes
import torch
import twins
from safetensors.torch import load_file

import tiny
from onebit.formats import names
from onebit.packing import unpack

CONFIG = replace(tiny.CONFIG, d_model=256, d_head=64, n_heads=4, n_kv_heads=2, d_ff=512, n_layers=3)


def codes(checkpoint, name):
    tensor = checkpoint.tensors[name]
    return unpack(tensor.data, tensor.encoding, tensor.shape)


def read(checkpoint, path, kind):
    twins.write_gguf(checkpoint, path, kind)
    reader = gguf.GGUFReader(path)
    return reader, {tensor.name: tensor for tensor in reader.tensors}


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
@pytest.mark.parametrize("sub_norm", [True, False])
def test_ternary_codes_survive(kind, sub_norm, tmp_path):
    checkpoint = shapes.synthetic(replace(CONFIG, sub_norm=sub_norm, tied_head=sub_norm))
    reader, found = read(checkpoint, tmp_path / "twin.gguf", kind)
    assert reader.get_field("general.architecture").contents() == ("bitnet" if sub_norm else "llama")
    for name, tensor in checkpoint.tensors.items():
        twin = found.pop(names.to_gguf(name))
        assert tuple(twin.shape[::-1]) == tuple(tensor.shape)
        if checkpoint.config.is_linear(name):
            assert twin.tensor_type.name == kind
            dense = gguf.quants.dequantize(twin.data, twin.tensor_type)
            assert np.array_equal(np.sign(dense), codes(checkpoint, name))
            assert set(np.unique(np.abs(dense))) <= {0, np.float32(np.float16(tensor.scale[0]))}
    assert not found


def test_an_ordinary_four_bit_model_has_the_types_of_llama_quantize(tmp_path):
    checkpoint = shapes.synthetic(replace(CONFIG, n_layers=8))
    reader, found = read(checkpoint, tmp_path / "twin.gguf", "Q4_K_M")
    assert reader.get_field("general.architecture").contents() == "llama"
    assert not any("sub_norm" in name for name in found)
    types = {name: tensor.tensor_type.name for name, tensor in found.items()}
    assert types["token_embd.weight"] == "Q6_K" and types["blk.0.attn_q.weight"] == "Q4_K"
    # Of eight layers the first, the last, and every third between them.
    assert [types[f"blk.{i}.ffn_down.weight"] == "Q6_K" for i in range(8)] == [
        i in (0, 3, 6, 7) for i in range(8)
    ]
    for tensor in found.values():
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.isfinite(values).all() and np.abs(values).max() < 8


def test_a_shape_that_gguf_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match="multiples of 256"):
        twins.write_gguf(shapes.synthetic(tiny.CONFIG), tmp_path / "twin.gguf", "TQ2_0")


def test_codes_for_transformers_survive(tmp_path):
    checkpoint = shapes.synthetic(CONFIG)
    twins.write_hugging_face(checkpoint, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "layers.1.down.weight"
    packed = tensors[names.to_hf(name)]
    rows = torch.cat([(packed >> shift & 3).to(torch.int8) - 1 for shift in (0, 2, 4, 6)])
    assert np.array_equal(rows.numpy(), codes(checkpoint, name))
    assert len(tensors) == len(checkpoint.tensors) + 7 * CONFIG.n_layers

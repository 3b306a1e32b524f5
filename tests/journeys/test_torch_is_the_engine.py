"""Oracle, exact: two implementations of one forward pass, torch in eval mode and the compiled core, to the bit."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny
from onebit.checkpoint import quantize
from onebit.config import RopeScaling
from onebit.engine.model import available_isas
from onebit.llm import LLM
from onebit.nn import lora
from onebit.nn.transformer import Transformer

CONFIGS = {
    "norms and biases": {"qk_norm": True, "qkv_bias": True},
    "relu2": {},
    "silu": {"activation": "silu", "sub_norm": False, "tied_head": False},
    "binary": {"weights": "b1", "scale": "row"},
    "groups": {"scale": 16},
    "binary beside ternary": {"layer_weights": ("b1", "b1.58")},
    "ternary beside binary in groups": {"layer_weights": ("b1.58", "b1"), "scale": 16, "activations": "a15"},
    "a4": {"activations": "a4", "n_kv_heads": 4},
    "a1": {"activations": "a1", "n_kv_heads": 1},
    "a15": {"activations": "a15", "d_model": 40},
    "a15, binary rows": {"activations": "a15", "weights": "b1", "scale": "row", "activation": "silu"},
    "a15 in groups": {"activations": "a15", "scale": 16, "tied_head": False},
    "a4.8": {"activations": "a4.8"},
    "a4.8, silu without sub-norms": {
        "activations": "a4.8",
        "activation": "silu",
        "sub_norm": False,
        "d_head": 18,
    },
    "hadamard": {"hadamard": True, "d_ff": 128},
    "hadamard, a4 without sub-norms": {"hadamard": True, "d_ff": 64, "activations": "a4", "sub_norm": False},
    "yarn": {"rope_scaling": RopeScaling("yarn", 8.0, 24)},
    "llama3": {"rope_scaling": RopeScaling("llama3", 8.0, 24)},
    "odd widths": {"d_model": 40, "d_head": 18, "d_ff": 70},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_same_bits(name, monkeypatch):
    master = tiny.master(tiny.config(**CONFIGS[name]), seed=5)
    tokens = np.random.default_rng(6).integers(0, 320, 150).tolist()
    with torch.no_grad():
        expected = Transformer.from_checkpoint(master).eval()(torch.tensor([tokens]))[0].numpy()
    assert np.isfinite(expected).all() and np.ptp(expected) > 1
    for isa in available_isas():
        monkeypatch.setenv("ONEBIT_ISA", isa)
        assert np.array_equal(LLM(quantize(master)).logits(tokens), expected)


@pytest.mark.parametrize("tied_head", [True, False])
def test_logits_of_a_bf16_head_are_the_same_bits(tied_head, monkeypatch):
    master = tiny.master(tiny.config(tied_head=tied_head, d_model=40), seed=5)
    tokens = np.random.default_rng(6).integers(0, 320, 70).tolist()
    with torch.no_grad():
        model = Transformer.from_checkpoint(master, head="bf16").eval()
        expected = model(torch.tensor([tokens]))[0].numpy()
    assert np.isfinite(expected).all() and np.ptp(expected) > 1
    for isa in available_isas():
        monkeypatch.setenv("ONEBIT_ISA", isa)
        assert np.array_equal(LLM(quantize(master, head="bf16")).logits(tokens), expected)


DENSE = {"weights": "dense", "activations": "none", "d_model": 40, "qkv_bias": True}


@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize("name", [*CONFIGS, "dense"])
def test_logits_with_an_adapter_are_the_same_bits(name, short, monkeypatch):
    config = tiny.config(**(CONFIGS | {"dense": DENSE})[name])
    packed, adapter = quantize(tiny.master(config, seed=5)), tiny.adapter(config, short=short)
    tokens = np.random.default_rng(6).integers(0, 320, 70).tolist()
    model = Transformer.from_packed(packed).eval()
    with torch.no_grad():
        without = model(torch.tensor([tokens]))[0].numpy()
        lora.load(model, adapter)
        expected = model.eval()(torch.tensor([tokens]))[0].numpy()
    for isa in available_isas():
        monkeypatch.setenv("ONEBIT_ISA", isa)
        llm = LLM(packed, adapters={"some": adapter})
        assert np.array_equal(llm.logits(tokens, "some"), expected)
        assert np.array_equal(llm.logits(tokens), without)
    assert np.isfinite(expected).all() and not np.array_equal(expected, without)


def test_a_library_that_flushes_denormals_changes_no_bit():
    config = tiny.config(tied_head=False, norm_eps=2e-38)
    packed = quantize(tiny.master(config))
    # Embeddings among the denormals, which the first norm lifts: flushed, they would all be zero.
    embed, gain = packed.tensors["embed.weight"], packed.tensors["layers.0.attn_norm.weight"]
    tensors = packed.tensors | {
        "embed.weight": embed._replace(scale=np.full_like(embed.scale, 1e-39)),
        "layers.0.attn_norm.weight": gain * np.float32(1e18),
    }
    llm = LLM(replace(packed, tensors=tensors), threads=2)
    kept = llm.logits(range(20))
    assert torch.set_flush_denormal(True)
    try:
        assert np.float32(1e-39) * np.float32(0.5) == 0
        assert np.array_equal(llm.logits(range(20)), kept)
        assert np.float32(1e-39) * np.float32(0.5) == 0
    finally:
        torch.set_flush_denormal(False)
    assert np.ptp(kept) > 1

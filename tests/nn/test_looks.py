"""The engine's counts of codes, and its cache, are those of the model in PyTorch. Kind: exact, oracle (torch)."""

import numpy as np
import pytest
import torch

import tiny
from core.reference import fp8_values, to_fp8
from onebit.checkpoint import quantize
from onebit.engine.memory import KV_FORMATS
from onebit.engine.model import BLOCK_TOKENS, LAYER_INPUTS, Model
from onebit.nn import transformer
from onebit.nn.transformer import Block, Transformer
from onebit.packing import from_bf16, to_bf16
from onebit.quant import INPUT_QUANTIZERS, quantize_a8

N_TOKENS = BLOCK_TOKENS
LARGEST = {"a8": (-127, 127), "a8-half": (-127, 127), "a15": (-16256, 16256), "a4": (-8, 7)}
VARIANTS = [
    {},
    {"activation": "silu", "sub_norm": False, "tied_head": False, "d_ff": 100},
    {"weights": "b1", "activations": "a1"},
    {"activations": "a15"},
    {"activations": "a4", "scale": 16},
    {"activations": "a4.8", "hadamard": True, "d_ff": 64},
    {"weights": "dense", "activations": "none"},
]


def run(master, kv_cache="bf16"):
    """Counts of one sequence, and the block that holds its keys and values in each layer."""
    packed = quantize(master)
    model = Model(packed, threads=2)
    cache = model.new_cache(1, kv_cache)
    counts = np.zeros((model.config.n_layers, len(LAYER_INPUTS), 2), np.int64)
    ids = np.arange(N_TOKENS, dtype=np.int32)
    table = np.zeros((1, 1), np.int32)
    model.forward(ids * 3, ids, np.array([0, N_TOKENS], np.int32), table, ids[-1:], cache, code_counts=counts)
    return counts, [model.read_block(cache, layer, 0) for layer in range(model.config.n_layers)]


@pytest.mark.parametrize("changes", VARIANTS)
def test_counts_are_those_of_the_model_in_torch(changes, monkeypatch):
    master = tiny.master(tiny.config(**changes), seed=4)
    inputs = []
    multiply = Block._multiply

    def spy(self, x, layers, first):
        inputs.append((self.config.input_quantizer(first), x[0].numpy().copy()))
        return multiply(self, x, layers, first)

    monkeypatch.setattr(Block, "_multiply", spy)
    nn = Transformer.from_checkpoint(master).eval()
    with torch.no_grad():
        nn(torch.arange(N_TOKENS)[None] * 3)
    expected = []
    for kind, x in inputs[: 4 * nn.config.n_layers]:
        codes = INPUT_QUANTIZERS[kind](x)[0] if kind in INPUT_QUANTIZERS else x
        low, high = LARGEST.get(kind, (-np.inf, np.inf))
        expected.append([((codes <= low) | (codes >= high)).sum(), (codes == 0).sum()])
    found = run(master)[0]
    assert found.reshape(-1, 2).tolist() == np.array(expected).tolist()
    # Of a1 there is nothing to count.
    assert found.any() == (nn.config.activations != "a1")


@pytest.mark.parametrize("kv_cache", KV_FORMATS)
def test_the_cache_holds_keys_and_values_rounded_to_its_format(kv_cache, monkeypatch):
    # Later layers see what attention made of rounded keys.
    master = tiny.master(tiny.config(n_layers=1, qk_norm=True), seed=4)
    turned, states = [], []
    rope = transformer.rope
    monkeypatch.setattr(transformer, "rope", lambda *args: turned.append(rope(*args)) or turned[-1])
    with torch.no_grad():
        Transformer.from_checkpoint(master).eval()(torch.arange(N_TOKENS)[None] * 3, layer=0, states=states)
    plain = np.stack([turned[1][0].numpy(), states[0][2][0].numpy()])
    if kv_cache == "int8":
        codes, scale = quantize_a8(plain)
        expected = codes * scale
    else:
        expected = from_bf16(to_bf16(plain)) if kv_cache == "bf16" else fp8_values()[to_fp8(plain)]
    found = run(master, kv_cache)[1][0]
    assert found.dtype == np.float32 and np.array_equal(found, expected)

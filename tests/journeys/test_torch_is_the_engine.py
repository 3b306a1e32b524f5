"""Oracle, exact: two implementations of one forward pass, torch in eval mode and the compiled core, to the bit."""

import numpy as np
import pytest
import torch

import tiny
from onebit.checkpoint import quantize
from onebit.engine.model import available_isas
from onebit.llm import LLM
from onebit.nn.transformer import Transformer

CONFIGS = {
    "relu2": {},
    "silu": {"activation": "silu", "sub_norm": False, "tied_head": False},
    "binary": {"weights": "b1", "scale": "row"},
    "groups": {"scale": 16},
    "a4": {"activations": "a4", "n_kv_heads": 4},
    "a1": {"activations": "a1", "n_kv_heads": 1},
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

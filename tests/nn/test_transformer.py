"""Invariants of the model in torch: shapes, causality, names, learning; and its refusal of bad input."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import tiny
from onebit.checkpoint import quantize
from onebit.nn.transformer import Transformer, rope, rope_tables

VARIANTS = [
    {},
    {"activation": "silu", "sub_norm": False, "tied_head": False},
    {"weights": "b1", "scale": "row"},
    {"scale": 16, "activations": "a4"},
    {"activations": "a15"},
    {"weights": "dense", "activations": "none"},
    {"qk_norm": True, "qkv_bias": True},
    {"activations": "a4.8"},
    {"hadamard": True, "d_ff": 64, "activations": "a4"},
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_names_and_shapes_are_the_canonical_ones(changes):
    config = tiny.config(**changes)
    model = Transformer(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes == config.tensor_shapes()


@pytest.mark.parametrize("changes", VARIANTS)
def test_a_token_never_sees_the_future(changes):
    model = Transformer(tiny.config(**changes), seed=3)
    tokens = torch.randint(0, 320, (1, 40), generator=torch.Generator().manual_seed(5))
    other = tokens.clone()
    other[0, 25:] = (other[0, 25:] + 7) % 320
    with torch.no_grad():
        a, b = model(tokens), model(other)
    torch.testing.assert_close(a[:, :25], b[:, :25], rtol=0, atol=1e-6)
    assert (a[:, 25:] - b[:, 25:]).abs().max() > 1e-3


@pytest.mark.parametrize("changes", VARIANTS)
def test_it_learns_a_text_by_heart(changes):
    torch.manual_seed(0)
    model = Transformer(tiny.config(**changes), seed=1)
    tokens = torch.randint(0, 320, (2, 33))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 5 and losses[-1] < 0.6 * losses[0]


def test_every_weight_gets_a_gradient():
    model = Transformer(tiny.config(tied_head=False))
    model(torch.randint(0, 320, (2, 16))).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_rope_keeps_lengths_and_depends_on_distance_alone():
    cos, sin = rope_tables(tiny.CONFIG)
    q, k = torch.randn(2, 1, 1, 16)
    at = [rope(torch.stack([q, k])[:, 0], cos[p : p + 1], sin[p : p + 1]) for p in (3, 10, 53, 60)]
    torch.testing.assert_close(at[0].norm(dim=-1), torch.stack([q, k])[:, 0].norm(dim=-1))
    near = (at[0][0] * at[1][1]).sum()
    far = (at[2][0] * at[3][1]).sum()
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)


def test_a_master_is_loaded_bit_by_bit_and_a_packed_model_refused():
    master = tiny.master()
    model = Transformer.from_checkpoint(master)
    for name, parameter in model.named_parameters():
        assert np.array_equal(parameter.detach().numpy(), master.tensors[name])
    with pytest.raises(ValueError, match="packed"):
        Transformer.from_checkpoint(quantize(master))


def test_seed_decides_the_weights():
    first, again, other = (Transformer(tiny.CONFIG, seed).layers[0].q.weight for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_too_long_a_sequence_is_refused():
    model = Transformer(replace(tiny.CONFIG, max_seq_len=8))
    with pytest.raises(ValueError, match="9 tokens exceed the context of 8"):
        model(torch.zeros(1, 9, dtype=torch.long))

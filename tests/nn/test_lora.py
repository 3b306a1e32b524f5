"""Exact, invariant: frozen layers compute what the masters compute, and adapters begin as nothing and alone learn."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny
from onebit.checkpoint import quantize
from onebit.formats.adapter import Adapter, LowRank
from onebit.llm import LLM
from onebit.nn import lora, ordered
from onebit.nn.transformer import Transformer
from onebit.packing import bf16_planes, from_bf16

CONFIGS = {
    "relu2": {},
    "own head": {"tied_head": False, "activation": "silu", "sub_norm": False},
    "norms and biases": {"qk_norm": True, "qkv_bias": True},
    "binary rows": {"weights": "b1", "scale": "row"},
    "groups": {"scale": 16},
    "a15": {"activations": "a15", "d_model": 40},
    "hadamard": {"hadamard": True, "d_ff": 64},
}
TOKENS = torch.from_numpy(np.random.default_rng(1).integers(0, 320, (2, 40)))


@pytest.mark.parametrize("head", ["q8", "bf16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_frozen_layers_are_the_masters_to_the_bit(name, head):
    master = tiny.master(tiny.config(**CONFIGS[name]), seed=2)
    model = Transformer.from_checkpoint(master, head)
    frozen = Transformer.from_packed(quantize(master, head=head))
    assert not list(frozen.parameters())
    with torch.no_grad():
        assert torch.equal(model.eval()(TOKENS), frozen.eval()(TOKENS))
        # In training sums have torch's order; all but the head's are exact or the same calls.
        assert torch.allclose(model.train()(TOKENS), frozen.train()(TOKENS), atol=1e-3)


def test_coded_rows_stay_codes():
    packed = tiny.coded(tiny.master(tiny.config(tied_head=False), seed=2))
    frozen = Transformer.from_packed(packed).eval()
    assert frozen.head.codes.unique().tolist() == [-1, 0, 1]
    with torch.no_grad():
        logits = frozen(TOKENS[:1])[0].numpy()
    assert np.array_equal(logits, LLM(packed).logits(TOKENS[0].tolist()))


def test_an_adapter_begins_as_nothing():
    frozen = Transformer.from_packed(quantize(tiny.master(seed=2)))
    with torch.no_grad():
        before = frozen.eval()(TOKENS)
        lora.attach(frozen, 4, 8.0, ("q", "down"), seed=1)
        after = frozen.eval()(TOKENS)
    # y + 0 is y, but for the sign of a zero.
    assert torch.equal(before, after)
    assert sorted({name.split(".")[2] for name, _ in frozen.named_parameters()}) == ["down", "q"]


def test_gradients_reach_every_adapter_through_the_codes():
    frozen = Transformer.from_packed(quantize(tiny.master(seed=2))).train()
    lora.attach(frozen, 4, 8.0, ("q", "k", "v", "o", "gate", "up", "down"), seed=1)
    for name, parameter in frozen.named_parameters():
        if name.endswith(".b"):
            torch.nn.init.normal_(parameter, std=0.05)
    frozen(TOKENS).square().mean().backward()
    gradients = {name: p.grad for name, p in frozen.named_parameters()}
    assert len(gradients) == 28 and all(g is not None and g.abs().max() > 0 for g in gradients.values())


def test_the_gradient_for_an_input_is_that_of_the_master():
    """The frozen product passes on what the straight-through estimator passes on."""
    from onebit.nn.bitlinear import bit_linear, code_linear
    from onebit.quant import quantize_weights

    for scale in ("tensor", "row", 16):
        w = torch.randn(24, 48, generator=torch.Generator().manual_seed(3))
        x = torch.randn(5, 48, generator=torch.Generator().manual_seed(4), requires_grad=True)
        codes, scales = quantize_weights(w, "b1.58", scale)
        ys = (
            bit_linear(x, (w,), "b1.58", "a8", scale)[0],
            code_linear(x, [(codes.to(torch.int8), scales)], "a8", scale)[0],
        )
        gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in ys]
        assert torch.equal(*ys) and torch.equal(*gradients)


def test_what_is_detached_is_what_was_used():
    frozen = Transformer.from_packed(quantize(tiny.master(seed=2)))
    lora.attach(frozen, 3, 6.0, ("v",), seed=1)
    for parameter in frozen.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(5))
    adapter = lora.detach(frozen, 3, 6.0)
    assert all(len(bf16_planes(w)) == 1 for pair in adapter.tensors.values() for w in pair)
    again = Transformer.from_packed(quantize(tiny.master(seed=2)))
    lora.load(again, adapter)
    with torch.no_grad():
        assert torch.equal(frozen.train()(TOKENS), again.train()(TOKENS))
    with pytest.raises(ValueError, match="another model"):
        lora.load(
            again, replace(adapter, tensors={"layers.0.q.weight": adapter.tensors["layers.0.v.weight"]})
        )


def test_planes_are_the_matrix():
    w = np.random.default_rng(0).standard_normal((5, 21)).astype(np.float32)
    planes = bf16_planes(w)
    assert planes.shape == (3, 5, 32) and not planes[:, :, 21:].any()
    assert np.array_equal(sum(from_bf16(p) for p in planes[::-1])[:, :21], w)
    assert bf16_planes(from_bf16(planes[0])).shape[0] == 1
    assert bf16_planes(np.zeros((2, 3), np.float32)).shape[0] == 1


def test_low_rank_is_the_product():
    rng = np.random.default_rng(0)
    a, b, x = (
        torch.from_numpy(rng.standard_normal(s).astype(np.float32)) for s in ((3, 40), (50, 3), (2, 40))
    )
    expected = (x.double() @ a.double().T @ b.double().T * 0.5).numpy()
    assert np.allclose(ordered.low_rank(x, a, b, 0.5).numpy(), expected, atol=1e-4)
    adapter = Adapter(3, 1.5, {"layers.0.q.weight": LowRank(a.numpy(), b.numpy())})
    assert np.allclose(x.numpy() @ adapter.delta("layers.0.q.weight").T, expected, atol=1e-4)

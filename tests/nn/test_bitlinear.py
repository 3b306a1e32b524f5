"""Exact and invariant: the quantised layer against its definition written with torch's own operations."""

import pytest
import torch

from onebit.nn import ordered
from onebit.nn.bitlinear import (
    bit_linear,
    blended_linear,
    hadamard,
    int8_rows,
    int15_activations,
    limit_gradient,
    round_with_noise,
)
from onebit.quant import INPUT_QUANTIZERS, dequantize, quantize_weights

CASES = [
    (scheme, activations, granularity)
    for scheme in ("b1.58", "b1")
    for activations in INPUT_QUANTIZERS
    for granularity in ("tensor", "row", 16)
]


def naive(x, w, scheme, activations, granularity):
    """The estimator as papers write it: x + (quantised(x) - x).detach()."""
    w_hat = dequantize(*quantize_weights(w.detach(), scheme, granularity))
    codes, scale = INPUT_QUANTIZERS[activations](x.detach())
    w_hat = w + (w_hat - w).detach()
    x_hat = x + (codes * scale - x).detach()
    return x_hat @ w_hat.T


@pytest.mark.parametrize(("scheme", "activations", "granularity"), CASES)
def test_outputs_and_gradients_equal_the_papers_estimator(scheme, activations, granularity):
    torch.manual_seed(1)
    x = torch.randn(3, 5, 48, requires_grad=True)
    ws = [torch.randn(n, 48, requires_grad=True) for n in (7, 32)]
    weight = torch.randn(3, 5, 39)

    ys = bit_linear(x, tuple(ws), scheme, activations, granularity)
    grads = torch.autograd.grad((torch.cat(ys, -1) * weight).sum(), [x, *ws])
    expected = torch.cat([naive(x, w, scheme, activations, granularity) for w in ws], -1)
    expected_grads = torch.autograd.grad((expected * weight).sum(), [x, *ws])

    assert [y.shape for y in ys] == [(3, 5, 7), (3, 5, 32)]
    torch.testing.assert_close(torch.cat(ys, -1), expected, rtol=1e-5, atol=1e-5)
    for got, want in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("activations", ["a8", "a15"])
def test_product_of_codes_is_exact_and_rounded_once(granularity, activations):
    torch.manual_seed(2)
    # Sums of a15 leave the whole numbers of float32: magnitudes of one sign.
    x, w = torch.rand(4, 8192), torch.rand(64, 8192)
    w_codes, w_scale = quantize_weights(w, "b1.58", granularity)
    x_codes, x_scale = INPUT_QUANTIZERS[activations](x)
    sums = x_codes.long() @ w_codes.long().T
    assert (sums.abs().max() > 2**24) == (activations == "a15")
    (y,) = bit_linear(x, (w,), "b1.58", activations, granularity)
    assert torch.equal(y, sums.float() * w_scale * x_scale)


def test_sharing_the_input_changes_nothing():
    torch.manual_seed(3)
    x = torch.randn(2, 48)
    ws = [torch.randn(n, 48) for n in (16, 8)]
    together = bit_linear(x, tuple(ws), "b1.58", "a8", "tensor")
    alone = [bit_linear(x, (w,), "b1.58", "a8", "tensor")[0] for w in ws]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_head_quantisers_round_forward_and_pass_gradients():
    torch.manual_seed(4)
    for function, step in ((int8_rows, 127), (int15_activations, 16256)):
        w = torch.randn(6, 32, requires_grad=True)
        y = function(w)
        largest = w.detach().abs().amax(-1, keepdim=True)
        assert 0 < (y - w).abs().max() <= (largest / step / 2 * 1.001).max()
        assert (y - w).abs().le(largest / step / 2 * 1.001).all()
        (grad,) = torch.autograd.grad(y.sum(), w)
        assert torch.equal(grad, torch.ones_like(grad))


def test_rounding_sets_in_between_full_precision_and_all_of_it():
    torch.manual_seed(5)
    x, w = torch.randn(4, 48), torch.randn(16, 48, requires_grad=True)
    for strength, expected in ((0.0, x @ w.T), (1.0, bit_linear(x, (w,), "b1.58", "a8", "tensor")[0])):
        (y,) = blended_linear(x, (w,), "b1.58", "a8", "tensor", torch.tensor(strength))
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    half = w + 0.5 * (dequantize(*quantize_weights(w, "b1.58", "tensor")) - w)
    codes, scale = INPUT_QUANTIZERS["a8"](x)
    (y,) = blended_linear(x, (w,), "b1.58", "a8", "tensor", torch.tensor(0.5))
    torch.testing.assert_close(y, (x + 0.5 * (codes * scale - x)) @ half.T)


@pytest.mark.parametrize("activations", INPUT_QUANTIZERS)
def test_draws_are_neighbours_and_follow_their_probabilities(activations):
    torch.manual_seed(6)
    x = torch.randn(1, 64).expand(4000, 64)
    codes, scale = INPUT_QUANTIZERS[activations](x)
    drawn, same_scale = round_with_noise(x, activations, 0.3, torch.rand_like(x))
    assert torch.equal(scale, same_scale) and torch.equal(drawn, drawn.round())
    assert (drawn - codes).abs().max() <= (2 if activations == "a1" else 1)
    assert drawn.min() >= codes.min() - 1 and drawn.max() <= codes.max() + 1
    exact = x[0] / scale[0]
    if activations == "a1":
        probability, share = torch.sigmoid(exact / 0.3), (drawn > 0).float().mean(0)
    else:
        inner = (codes[0] != codes.max()) & (codes[0] != codes.min()) & (codes[0] != 0)
        probability = torch.sigmoid((exact - exact.floor() - 0.5) / 0.3)[inner]
        share = (drawn > exact.floor()).float().mean(0)[inner]
    assert (share - probability).abs().max() < 0.05
    torch.testing.assert_close(round_with_noise(x[:1], activations, 1e-9, torch.rand(1, 64))[0], codes[:1])


@pytest.mark.parametrize("n", [1, 2, 8, 64])
@pytest.mark.parametrize("function", [hadamard, ordered.hadamard])
def test_hadamard_is_the_orthogonal_matrix_and_its_own_inverse(function, n):
    h = torch.ones(1, 1)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    torch.manual_seed(7)
    x, weight = torch.randn(2, 3, n, requires_grad=True), torch.randn(2, 3, n)
    y = function(x)
    torch.testing.assert_close(y, x @ h / n**0.5)
    torch.testing.assert_close(function(y), x)
    (grad,) = torch.autograd.grad((y * weight).sum(), x)
    torch.testing.assert_close(grad, weight @ h / n**0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(function(x), y)


def test_only_gradients_of_tokens_above_the_limit_are_shortened():
    x = torch.zeros(4, 2, requires_grad=True)
    weight = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.5], [0.0, 0.0]])
    y = limit_gradient(x, 1.0)
    assert torch.equal(y, x)
    (grad,) = torch.autograd.grad((y * weight).sum(), x)
    limit = ((25 + 0.25 + 0.25) / 4) ** 0.5
    torch.testing.assert_close(grad, torch.cat([weight[:1] * limit / 5, weight[1:]]))

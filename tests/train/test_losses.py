"""Oracle: every loss against its formula, written out in numpy and float64. Invariant: what merging tokens does."""

import numpy as np
import pytest
import torch

from onebit.train import losses

RNG = np.random.default_rng(0)
STUDENT, TEACHER = RNG.standard_normal((2, 6, 20)).astype(np.float32) * 3
# Sums of float32 in another order.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


def softmax(x):
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p, q):
    return (p * np.log(p / q)).sum(-1)


def top(logits, k, temperature):
    p = softmax(logits / temperature)
    ids = np.argsort(-logits, -1)[:, :k]
    kept = np.take_along_axis(p, ids, -1)
    return ids, kept, 1 - kept.sum(-1)


def test_cross_entropy():
    targets = RNG.integers(20, size=6)
    found = losses.cross_entropy(torch.tensor(STUDENT), torch.tensor(targets))
    np.testing.assert_allclose(found, -np.log(softmax(STUDENT)[np.arange(6), targets]), **CLOSE)


@pytest.mark.parametrize("tau", [1.0, 5.0])
@pytest.mark.parametrize("squared", [False, True])
def test_logit_kl(tau, squared):
    found = losses.logit_kl(torch.tensor(STUDENT), torch.tensor(TEACHER), tau, squared)
    expected = kl(softmax(TEACHER / tau), softmax(STUDENT / tau)) * (tau**2 if squared else 1)
    np.testing.assert_allclose(found, expected, **CLOSE)
    # Forward: the teacher's probabilities weigh.
    assert not np.allclose(found, kl(softmax(STUDENT / tau), softmax(TEACHER / tau)), rtol=0.01)


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 7, 19, 20])
def test_top_k_kl(tau, k):
    ids, kept, rest = top(TEACHER, k, tau)
    q = softmax(STUDENT / tau)
    q_kept = np.take_along_axis(q, ids, -1)
    expected = kl(kept, q_kept)
    if k < 20:
        expected = expected + rest * np.log(rest / (1 - q_kept.sum(-1)))
    arguments = [torch.tensor(ids), torch.tensor(np.log(kept)).float()]
    log_rest = torch.tensor(np.log(np.maximum(rest, 1e-30))).float()
    found = losses.top_k_kl(torch.tensor(STUDENT), *arguments, log_rest, tau, True)
    np.testing.assert_allclose(found, expected * tau**2, **CLOSE)
    whole = losses.logit_kl(torch.tensor(STUDENT), torch.tensor(TEACHER), tau, True)
    assert (found <= whole + 1e-5).all()
    assert k < 20 or torch.allclose(found, whole, atol=1e-5)


def test_gradients_of_a_student_that_is_right_are_zero_and_those_of_others_are_numbers():
    ids, kept, rest = top(TEACHER, 5, 1.0)
    logs = [torch.tensor(np.log(x)).float() for x in (kept, rest)]
    right = torch.tensor(TEACHER, requires_grad=True)
    losses.top_k_kl(right, torch.tensor(ids), *logs).sum().backward()
    assert right.grad.abs().max() < 1e-6
    # A student so sure that nothing is left for the rest.
    sure = torch.full((6, 20), -200.0).scatter(1, torch.tensor(ids), 200.0).requires_grad_()
    losses.top_k_kl(sure, torch.tensor(ids), *logs).sum().backward()
    assert torch.isfinite(sure.grad).all()


def relations(x, heads):
    """[B, N, T, H] to [B, A, T, T]."""
    b, n, t, h = x.shape
    parts = x.astype(np.float64).transpose(0, 2, 1, 3).reshape(b, t, heads, n * h // heads)
    parts = parts / np.linalg.norm(parts, axis=-1, keepdims=True)
    return softmax(np.einsum("btah,bsah->bats", parts, parts))


@pytest.mark.parametrize("twice", [False, True])
def test_relation_loss(twice):
    # Fewer heads of keys and values than of queries; the teacher is wider.
    shapes = [(2, 4, 5, 6), (2, 2, 5, 6), (2, 2, 5, 6)]
    student = [RNG.standard_normal(shape).astype(np.float32) for shape in shapes]
    teacher = [RNG.standard_normal((*s[:3], 12)).astype(np.float32) for s in shapes]
    found = losses.relation_loss(*(tuple(map(torch.tensor, x)) for x in (student, teacher)), 4, twice)
    expected = sum(
        kl(relations(t, 4), relations(s, 4)).mean(1) for s, t in zip(student, teacher, strict=True)
    )
    assert found.shape == (2, 5)
    np.testing.assert_allclose(found, expected / (4 if twice else 1), rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match="5 relation heads do not divide 24"):
        losses.relation_loss(*(tuple(map(torch.tensor, x)) for x in (student, teacher)), 5)

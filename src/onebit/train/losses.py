"""What a student learns from: the text, its teacher's probabilities, and how its teacher relates tokens to each other.

Pure functions of tensors; each gives one number for each token, so that its caller sums and divides. Knows no model.

Legend: N tokens (of all sequences), V vocabulary, K kept tokens, B batch, T tokens of a sequence, A relation heads.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Surprise at the text: -log softmax(logits)[target].

    Args:
        logits_NV: float32 [N, V].
        targets_N: int64 [N].

    Returns:
        float32 [N], nats.
    """
    return F.cross_entropy(logits_NV, targets_N, reduction="none")


def logit_kl(
    student_NV: Tensor, teacher_NV: Tensor, temperature: float = 1.0, tau_squared: bool = False
) -> Tensor:
    """Forward divergence of the teacher's probabilities from the student's, both softened.

        p = softmax(teacher / tau)    q = softmax(student / tau)    sum p (log p - log q)    [* tau^2]

    Args:
        student_NV: logits, float32 [N, V].
        teacher_NV: logits, float32 [N, V].
        temperature: tau.
        tau_squared: multiply by tau^2, so that gradients keep their size as tau grows.

    Returns:
        float32 [N], nats.

    Source: arXiv:1503.02531, section 2, with tau^2; arXiv:2510.13998, equations 8 and 9, without it, while its authors'
        code multiplies.
    """
    log_p = torch.log_softmax(teacher_NV.float() / temperature, -1)
    log_q = torch.log_softmax(student_NV.float() / temperature, -1)
    kl_N = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return kl_N * temperature**2 if tau_squared else kl_N


def top_k_kl(
    student_NV: Tensor,
    ids_NK: Tensor,
    log_p_NK: Tensor,
    log_rest_N: Tensor,
    temperature: float = 1.0,
    tau_squared: bool = False,
) -> Tensor:
    """`logit_kl` where of the teacher's probabilities the K largest are known, and of all others the sum.

        q = softmax(student / tau), its other tokens summed alike    sum over K + 1 of p (log p - log q)    [* tau^2]

    Merging tokens never makes a divergence larger, so this is at most `logit_kl`, and equal to it for K = V.

    Args:
        student_NV: logits, float32 [N, V].
        ids_NK: int64 [N, K], distinct in a row.
        log_p_NK: log probabilities of those under softmax(teacher / tau), float32 [N, K].
        log_rest_N: log of the sum of the others, float32 [N]; not used for K = V.
        temperature: tau, that of the teacher's probabilities.
        tau_squared: as in `logit_kl`.

    Returns:
        float32 [N], nats.
    """
    scaled_NV = student_NV.float() / temperature
    log_z_N1 = scaled_NV.logsumexp(-1, keepdim=True)
    log_q = scaled_NV.gather(-1, ids_NK) - log_z_N1
    log_p = log_p_NK
    if ids_NK.shape[-1] < student_NV.shape[-1]:
        # Summed over the others themselves: 1 - sum q would lose the small ones.
        others_NV = scaled_NV.scatter(-1, ids_NK, -torch.inf)
        log_q = torch.cat([log_q, others_NV.logsumexp(-1, keepdim=True) - log_z_N1], -1)
        log_p = torch.cat([log_p, log_rest_N[:, None]], -1)
    # Rounded on their way, they no longer sum to exactly one.
    log_p = torch.log_softmax(log_p, -1)
    kl_N = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return kl_N * temperature**2 if tau_squared else kl_N


def relation_loss(
    student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], heads: int, heads_twice: bool = False
) -> Tensor:
    """How differently two models relate the tokens of a sequence, by their queries, keys and values.

    The heads of each are joined, cut into A relation heads, and every token's part is brought to length one:

        R = softmax(s s^T)    [T, T] of each relation head
        sum over queries, keys, values of 1/A sum over heads of KL(R of the teacher || R of the student)    [/ A]

    Args:
        student: queries, keys and values of a layer, float32 [B, heads, T, d_head] each.
        teacher: the same; its number of heads and their width may differ.
        heads: A.
        heads_twice: divide by A once more.

    Returns:
        float32 [B, T], nats.

    Raises:
        ValueError: A does not divide the width of all heads of some of them together.

    Source: arXiv:2002.10957 and 2012.15828 for relations, arXiv:2510.13998, equations 10 to 12. Its authors' code
        divides by the number of heads twice, so that a weight there is A times as large for the same loss.
    """
    total_BT = torch.zeros(())
    for s, t in zip(student, teacher, strict=True):
        log_q, log_p = _relations(s, heads), _relations(t, heads)
        total_BT = total_BT + F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean(1)
    return total_BT / heads if heads_twice else total_BT


def _relations(x_BNTH: Tensor, heads: int) -> Tensor:
    """Logs of R of one of queries, keys and values, float32 [B, A, T, T]."""
    x_BTD = x_BNTH.float().transpose(1, 2).flatten(2)
    if x_BTD.shape[-1] % heads:
        raise ValueError(
            f"{heads} relation heads do not divide {x_BTD.shape[-1]}, the width of queries, keys or values of a layer; "
            f"choose a divisor of it"
        )
    parts_BATH = F.normalize(x_BTD.unflatten(-1, (heads, -1)).transpose(1, 2), dim=-1)
    return torch.log_softmax(parts_BATH @ parts_BATH.mT, -1)

"""How far a model's next-token probabilities are from those of a reference, whose answers are kept on disk.

reference = answers(Scorer(teacher), text, windows, keep=256)
divergence(Scorer(student), text, windows, reference)
"""

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onebit.engine.model import Float32, Int32
from onebit.eval.figures import Figure, Float64, proportion, token_mean
from onebit.eval.scoring import Scorer
from onebit.eval.texts import Perplexity, Windows, figures, predictions, tokens_of
from onebit.formats.files import new_file

# Tokens of a reference that are kept for each position: 8 bytes each.
KEEP = 256
Progress = Callable[[float], None]


@dataclass(frozen=True)
class Answers:
    """What a model says of every token of a text that counts.

    Args:
        tokens: int32 [T], the text.
        ids: int32 [N, K], its likeliest tokens, the likeliest first.
        log_probabilities: float32 [N, K], theirs, in nats.
        nll: float64 [N], negative log-probability of the token that came.
    """

    tokens: Int32
    ids: Int32
    log_probabilities: Float32
    nll: Float64


@dataclass(frozen=True)
class Divergence:
    """How far a model is from its reference.

    Args:
        kl: mean divergence of the model's probabilities from the reference's, in nats per token.
        top1: share of tokens for which both have the same likeliest next token.
        nll_difference: mean negative log-probability, the model's minus the reference's, in nats per token.
        reference: how well the reference predicts the text.
        own: likewise the model.
    """

    kl: Figure
    top1: Figure
    nll_difference: Figure
    reference: Perplexity
    own: Perplexity


def answers(
    scorer: Scorer,
    text: str,
    windows: Windows,
    keep: int = KEEP,
    limit: int | None = None,
    progress: Progress = lambda share: None,
) -> Answers:
    """What a reference says of a text.

    Args:
        scorer: of the reference.
        text: any text.
        windows: how it is cut.
        keep: how many tokens are kept for each position; the vocabulary keeps all.
        limit: read only so many of its first tokens.
        progress: called with the share that is done.

    Raises:
        ValueError: keep is no number of tokens, or the text has none to predict.
    """
    vocab_size = scorer.config.vocab_size
    if keep < 1:
        raise ValueError(f"keep is {keep}; expected at least 1 token for each position")
    keep = min(keep, vocab_size)
    tokens, _ = tokens_of(scorer.llm, text, limit)
    n = sum(len(w.ids) - w.first for w in windows.cut(tokens))
    ids, kept = np.empty((n, keep), np.int32), np.empty((n, keep), np.float32)
    nll = np.empty(n)
    for at, logits_RV, targets, log_sum in predictions(scorer, tokens, windows, progress):
        nll[at] = log_sum - logits_RV[np.arange(len(targets)), targets]
        best = np.argpartition(logits_RV, vocab_size - keep, axis=1)[:, vocab_size - keep :]
        found = np.take_along_axis(logits_RV, best, axis=1)
        # Descending; of equal ones the smaller id is first, as argmax has it.
        order = np.lexsort((best, -found), axis=1)
        ids[at] = np.take_along_axis(best, order, axis=1)
        kept[at] = np.take_along_axis(found, order, axis=1) - log_sum[:, None]
    return Answers(np.array(tokens, np.int32), ids, kept, nll)


def divergence(
    scorer: Scorer,
    text: str,
    windows: Windows,
    reference: Answers,
    limit: int | None = None,
    progress: Progress = lambda share: None,
) -> Divergence:
    """Compare a model with its reference on the same windows of a text.

        KL = sum_k p_k log(p_k / q_k) + p_rest log(p_rest / q_rest)

    over the tokens k that were kept of the reference p, and all others together; it is never more than the divergence
    over all tokens, and equal to it where all were kept.

    Args:
        scorer: of the model.
        text: that of the reference; likewise windows and limit.
        windows: how it is cut.
        reference: what the reference says.
        limit: read only so many of its first tokens.
        progress: called with the share that is done.

    Raises:
        ValueError: a model that makes other tokens of the text.
    """
    tokens, n_bytes = tokens_of(scorer.llm, text, limit)
    if not np.array_equal(np.array(tokens, np.int32), reference.tokens) or (
        reference.ids.size and int(reference.ids.max()) >= scorer.config.vocab_size
    ):
        raise ValueError(
            "model and reference make other tokens of the text: their probabilities cannot be compared"
        )
    n = len(reference.nll)
    kl, same, nll = np.empty(n), np.empty(n), np.empty(n)
    is_all = reference.ids.shape[1] == scorer.config.vocab_size
    for at, logits_RV, targets, log_sum in predictions(scorer, tokens, windows, progress):
        nll[at] = log_sum - logits_RV[np.arange(len(targets)), targets]
        same[at] = logits_RV.argmax(axis=1) == reference.ids[at, 0]
        # As the reference's were kept, so that equal models have equal numbers.
        log_q = (np.take_along_axis(logits_RV, reference.ids[at], axis=1) - log_sum[:, None]).astype(
            np.float32
        )
        log_p = reference.log_probabilities[at].astype(np.float64)
        kl[at] = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
        if not is_all:
            kl[at] += _of_rest(log_p, log_q.astype(np.float64))
    n_windows = len(windows.cut(tokens))
    return Divergence(
        token_mean(kl),
        proportion(same),
        token_mean(nll - reference.nll),
        figures(reference.nll, len(tokens), n_bytes, n_windows),
        figures(nll, len(tokens), n_bytes, n_windows),
    )


def write(answers: Answers, path: Path) -> None:
    """Keep the answers of a reference."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as file:
        np.savez(file, **vars(answers))


def read(path: Path) -> Answers | None:
    """The answers that were kept, or None where there are none that can be read."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            return Answers(**{name: kept[name] for name in Answers.__dataclass_fields__})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        # Absent, or cut short: they are only a copy.
        return None


def _of_rest(log_p: Float64, log_q: Float64) -> Float64:
    """The share of the divergence of all tokens that were not kept, as if they were one."""
    p, q = (np.maximum(1 - np.exp(x).sum(axis=1), 1e-12) for x in (log_p, log_q))
    found: Float64 = p * np.log(p / q)
    return found

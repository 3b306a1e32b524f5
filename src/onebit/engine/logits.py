"""Logits on their way to a draw: what a text and its user change of them, and logarithms of probabilities.

Rows are changed in place. The core draws the token.

    told = token_logprobs(logits_V, token, n_top=5)
    change(logits_RV, params, generated, request)
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from onebit.engine.model import Float32, Int32
from onebit.engine.sampling import SamplingParams, TokenLogprobs


def change(logits_RV: Float32, params: SamplingParams, generated: Int32, request: Any) -> None:
    """Apply logit_bias, presence_penalty, frequency_penalty, grammar and min_sigma.

        logit += logit_bias - presence_penalty * (count > 0) - frequency_penalty * count;  -infinity where not allowed
        -infinity where logit < min(mean + min_sigma * sd, largest logit)

    Mean and standard deviation are those of the model's own logits of that row, so neither a bias nor a grammar moves
    the cut. (Top-n-sigma, arXiv:2411.07641, measures the same distance down from the largest logit.)

    Args:
        logits_RV: float32 [R, V], changed in place; more than one row only where nothing but min_sigma changes them.
        params: of the text.
        generated: int32, the tokens after the prompt, which are counted.
        request: handed to the grammar.

    Raises:
        ValueError: a grammar that allows no token.
    """
    cuts = [_cut(logits_V, params.min_sigma) for logits_V in logits_RV] if params.min_sigma else []
    if params.goes_one_by_one:
        (logits_V,) = logits_RV
        _change_one(logits_V, params, generated, request)
    for logits_V, cut in zip(logits_RV, cuts, strict=False):
        logits_V[logits_V < min(cut, float(logits_V.max()))] = -np.inf


def _cut(logits_V: Float32, n_sigma: float) -> float:
    # Sums of numpy in float64 have one order on every CPU.
    return float(logits_V.mean(dtype=np.float64) + n_sigma * logits_V.std(dtype=np.float64))


def _change_one(logits_V: Float32, params: SamplingParams, generated: Int32, request: Any) -> None:
    for token, bias in (params.logit_bias or {}).items():
        logits_V[token] += np.float32(bias)
    if params.presence_penalty or params.frequency_penalty:
        ids, counts = np.unique(generated, return_counts=True)
        penalties = params.presence_penalty + params.frequency_penalty * counts
        logits_V[ids] -= penalties.astype(np.float32)
    if params.grammar is not None:
        mask = _as_bool(params.grammar.mask(request))[: len(logits_V)]
        if not mask.any():
            raise ValueError(
                "the grammar allows no token to follow; a finished one must allow the end-of-text token"
            )
        logits_V[: len(mask)][~mask] = -np.inf
        logits_V[len(mask) :] = -np.inf


def _as_bool(mask: npt.NDArray[np.bool_] | npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
    if mask.dtype == np.bool_:
        return mask.astype(np.bool_, copy=False)
    # The bytes of little-endian numbers lie in the order of their bits.
    return np.unpackbits(mask.astype("<u4", copy=False).view(np.uint8), bitorder="little").astype(np.bool_)


def token_logprobs(logits_V: Float32, token: int, n_top: int) -> TokenLogprobs:
    """How likely a token is, and the n_top most likely ones.

        logprob = logit - log(sum(exp(logits)))         in float64

    Args:
        logits_V: float32 [V], as the model gives them.
        token: whose logprob is wanted.
        n_top: most likely tokens to name.
    """
    largest = float(logits_V.max())
    log_sum = largest + float(np.log(np.exp(logits_V.astype(np.float64) - largest).sum()))
    top: list[tuple[int, float]] = []
    if n_top := min(n_top, len(logits_V)):
        # As many as share the last place are candidates; equal ones rank by their ids.
        worst = np.partition(logits_V, -n_top)[-n_top]
        ids = np.flatnonzero(logits_V >= worst)
        ids = ids[np.argsort(-logits_V[ids], kind="stable")][:n_top]
        top = [(int(i), float(logits_V[i]) - log_sum) for i in ids]
    return TokenLogprobs(token, float(logits_V[token]) - log_sum, top)


def entropy(logits_V: Float32) -> float:
    """How undecided a distribution is, in nats: 0 for a certain token, log V where all are alike.

        H = log(sum(exp(logits))) - sum(p * logits)         in float32, summed in float64

    Args:
        logits_V: float32 [V], all of them, as the model gives them.
    """
    shifted_V = logits_V - logits_V.max()
    weights_V = np.exp(shifted_V)
    total = float(weights_V.sum(dtype=np.float64))
    return max(float(np.log(total)) - float((weights_V * shifted_V).sum(dtype=np.float64)) / total, 0.0)

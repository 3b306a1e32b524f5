"""Is a model as sure as it is right: one temperature for its head, fitted on a text and judged on the rest of it.

    found = fit(llm, text)
    found.temperature, found.nll_before, found.nll_after
    calibrated = with_temperature(llm.checkpoint, found.temperature.value)

Dividing all logits by one number changes no order of tokens: greedy texts stay as they are. What changes are
probabilities, so perplexity, sampled texts, and the choice among answers of several tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from onebit.doctor.finding import Finding, command
from onebit.engine.memory import available_bytes
from onebit.engine.model import Float32, Int32
from onebit.eval.figures import RUN_TOKENS, Figure, Float64, Z, bootstrap, token_mean
from onebit.eval.scoring import Scorer, log_sums
from onebit.eval.texts import Windows, exp, predictions, tokens_of

if TYPE_CHECKING:
    from onebit.llm import LLM

# Tokens that are read; with a few thousand the temperature is known to a hundredth.
MAX_TOKENS = 4096
MIN_TOKENS = 128
# Logits that are kept while the temperature is looked for.
FIT_BYTES = 512 << 20
# It is looked for between 1/8 and 8.
LARGEST = 8.0
STEPS, PRECISION = 40, 1e-6
BINS = 15
# Nats per token from which it is worth a word.
WORTH = 0.005


@dataclass(frozen=True)
class Fit:
    """A temperature, and what it changes on tokens that it was not fitted on.

    Args:
        temperature: what the logits are divided by.
        nll_before: nats per token as the model is.
        nll_after: with the temperature.
        nll_difference: after minus before, of the same tokens.
        ece_before: mean distance of how sure the model is of its likeliest token from how often it is right.
        ece_after: with the temperature.
        n_fitted: tokens that it was fitted on.
    """

    temperature: Figure
    nll_before: Figure
    nll_after: Figure
    nll_difference: Figure
    ece_before: Figure
    ece_after: Figure
    n_fitted: int


def fit(
    llm: "LLM",
    text: str,
    limit: int | None = MAX_TOKENS,
    progress: Callable[[float], None] = lambda share: None,
) -> Fit:
    """Fit a temperature on the first half of a text, and judge it on the second.

    Args:
        llm: the model.
        text: of the kind that it is for.
        limit: read only so many of its first tokens.
        progress: called with the share that is done.

    Raises:
        ValueError: a model without tokenizer, or a text that is too short.
    """
    tokens, _ = tokens_of(llm, text, limit)
    if len(tokens) < MIN_TOKENS:
        raise ValueError(
            f"the text has {len(tokens)} tokens; a temperature needs at least {MIN_TOKENS}: give a longer text"
        )
    scorer, windows = Scorer(llm), Windows.of(llm)
    half = len(tokens) // 2
    room = min(FIT_BYTES, (available_bytes() or FIT_BYTES) // 4)
    n_fit = min(half, max(MIN_TOKENS // 2, room // (4 * llm.config.vocab_size)))
    kept, targets = _kept(scorer, tokens[:n_fit], windows)
    progress(0.4)
    beta, gradient, curvature = inverse_temperature(kept, targets)
    # By the scatter of the slope at the minimum: neighbouring tokens are alike.
    error = token_mean(gradient).stderr / curvature / beta if curvature > 0 else float("inf")
    bounds = float(np.exp(-Z * error)) / beta, float(np.exp(Z * error)) / beta
    temperature = Figure(1 / beta, error / beta, *bounds, len(targets))
    del kept
    n = sum(len(w.ids) - w.first for w in windows.cut(tokens[half:]))
    before, after = np.empty(n), np.empty(n)
    sure, cooled, right = np.empty(n), np.empty(n), np.empty(n)
    for at, logits_RV, came, log_sum in predictions(
        scorer, tokens[half:], windows, lambda share: progress(0.5 + share / 2)
    ):
        chosen = logits_RV[np.arange(len(came)), came].astype(np.float64)
        top = logits_RV.max(axis=1).astype(np.float64)
        scaled = log_sums(logits_RV * np.float32(beta))
        before[at], after[at] = log_sum - chosen, scaled - beta * chosen
        sure[at], cooled[at] = np.exp(top - log_sum), np.exp(beta * top - scaled)
        right[at] = logits_RV.argmax(axis=1) == came
    return Fit(
        temperature,
        token_mean(before),
        token_mean(after),
        token_mean(after - before),
        calibration_error(sure, right),
        calibration_error(cooled, right),
        len(targets),
    )


def inverse_temperature(logits_NV: Float32, targets_N: Int32) -> tuple[float, Float64, float]:
    """The number beta that logits are multiplied by to predict best; 1 / beta is the temperature.

        NLL(beta) = mean(log(sum(exp(beta z))) - beta z_target)

    is convex; its slope is mean(E[z] - z_target) and its curvature mean(Var[z]), under the scaled probabilities.
    Newton's steps lead to the minimum; where one would leave the bracket, the bracket is halved.

    Args:
        logits_NV: float32 [N, V].
        targets_N: int32 [N], the tokens that came.

    Returns:
        beta, from 1 / LARGEST to LARGEST; the slope of each token there, float64 [N]; and the curvature.
    """
    top = logits_NV.max(axis=1, keepdims=True)
    chosen = (logits_NV[np.arange(len(targets_N)), targets_N] - top[:, 0]).astype(np.float64)
    low, high, beta = 1 / LARGEST, LARGEST, 1.0
    for _ in range(STEPS):
        mean, square = _moments(logits_NV, top, beta)
        slopes, curvature = mean - chosen, float((square - mean * mean).mean())
        slope = float(slopes.mean())
        low, high = (low, beta) if slope > 0 else (beta, high)
        step = beta - slope / curvature if curvature > 0 else high if slope < 0 else low
        new = step if low < step < high else (low + high) / 2
        if abs(new - beta) < PRECISION * beta:
            break
        beta = new
    return beta, slopes, curvature


def calibration_error(sure_N: Float64, right_N: Float64) -> Figure:
    """The expected calibration error: how far a model's certainty is from its accuracy.

        ECE = sum over bins of n_b / N |mean(sure_b) - mean(right_b)|

    in BINS bins of equally many tokens, with the interval that runs of tokens show when they are drawn again.

    Args:
        sure_N: float64 [N], probability of the likeliest token.
        right_N: float64 [N], 1 where it came, else 0.

    Source: arXiv:1706.04599; bins of equal size, arXiv:1904.01685.
    """
    run = max(1, min(RUN_TOKENS, len(sure_N) // 8))
    places = range(0, len(sure_N), run)
    runs = [np.stack([sure_N[i : i + run], right_N[i : i + run]]) for i in places]
    return bootstrap(runs, lambda drawn: _ece(np.concatenate(drawn, axis=1)))


def unfitted(error: ValueError, model: str) -> Finding:
    """A text that no temperature can be fitted on."""
    return Finding(
        "note",
        "calibration",
        "No temperature was fitted",
        str(error),
        "The first half of a text fits it and the second judges it; a short one says little of either.",
        command("onebit", "doctor", model, "--text", "FILE"),
        "Give a longer text of the kind that the model is for.",
    )


def judge(found: Fit, model: str, text: str) -> Finding:
    """What a fit says of a model."""
    t, gain = found.temperature, found.nll_difference
    perplexities = f"{exp(found.nll_before.value):.4g} to {exp(found.nll_after.value):.4g}"
    evidence = (
        f"temperature {t.describe('.3f')} by {found.n_fitted:,} tokens; on {gain.n:,} others NLL "
        f"{found.nll_before.describe()} becomes {found.nll_after.describe()}, perplexity {perplexities}, difference "
        f"{gain.describe('+.4f')}; calibration error {found.ece_before.describe('.3f')} becomes "
        f"{found.ece_after.describe('.3f')}"
    )
    confirm = command("onebit", "eval", model, "--text", text)
    why = (
        "One number divides all logits; the order of tokens stays, so greedy answers do too. Perplexity, sampled texts "
        "and the choice among answers of several tokens change."
    )
    if gain.high >= 0 or gain.value > -WORTH:
        what = "The head is as sure as it is right: no temperature helps"
        return Finding("ok", "calibration", what, evidence, why, confirm)
    shape = "too sure" if t.value > 1 else "not sure enough"
    return Finding(
        "warning",
        "calibration",
        f"The model is {shape}: with its logits divided by {t.value:.2f} it predicts better",
        evidence,
        why,
        confirm,
        f"Sample with --temperature {t.value:.2f} where you would with 1, or keep it in the model: "
        f"{command('onebit', 'doctor', model, '--text', text, '--out', 'calibrated.onebit')}",
    )


def _kept(scorer: Scorer, tokens: list[int], windows: Windows) -> tuple[Float32, Int32]:
    """Logits and tokens of a text, all at once."""
    n = sum(len(w.ids) - w.first for w in windows.cut(tokens))
    kept = np.empty((n, scorer.config.vocab_size), np.float32)
    targets = np.empty(n, np.int32)
    for at, logits_RV, came, _ in predictions(scorer, tokens, windows):
        kept[at], targets[at] = logits_RV, came
    return kept, targets


def _moments(logits_NV: Float32, top: Float32, beta: float) -> tuple[Float64, Float64]:
    """Mean and mean square of each row's logits, relative to its largest, under the scaled probabilities."""
    mean, square = np.empty(len(logits_NV)), np.empty(len(logits_NV))
    for i in range(len(logits_NV)):
        z = logits_NV[i] - top[i]
        p = np.exp(z * np.float32(beta))
        total = p.sum(dtype=np.float64)
        p *= z
        mean[i] = p.sum(dtype=np.float64) / total
        square[i] = np.dot(p, z) / total
    return mean, square


def _ece(pairs_2N: npt.NDArray[np.float64]) -> float:
    order = np.argsort(pairs_2N[0], kind="stable")
    bins: Sequence[Float64] = np.array_split(pairs_2N[:, order], BINS, axis=1)
    gaps = (abs(part.sum(axis=1) @ [1, -1]) for part in bins if part.size)
    return float(sum(gaps) / pairs_2N.shape[1])

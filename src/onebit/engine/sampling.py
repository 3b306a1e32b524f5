"""How the next token is chosen, what is told of it, and when a text ends: the parameters and their limits.

Knows nothing of logits: logits.py changes them, and the core draws the token.

    SamplingParams(max_tokens=64, temperature=0)        # greedy
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt


class Grammar(Protocol):
    """Says which tokens may come next in one text; what it knows of the text is its own."""

    def mask(self, request: Any) -> npt.NDArray[np.bool_] | npt.NDArray[np.uint32]:
        """The tokens that may follow.

        Args:
            request: the `onebit.engine.engine.Generation` that goes on.

        Returns:
            bool [n], True where token i may follow, or the same as bits, uint32 [n / 32]: bit i % 32 of number
            i // 32. Tokens from n on may not.
        """

    def accept(self, token: int) -> None:
        """Take in the token that was drawn."""


class TokenLogprobs(NamedTuple):
    """How likely a token was, and what else was likely.

        logprob = logit - log(sum(exp(logits)))         in float64, of the model's own logits

    that is before penalties, biases, grammar and temperature.

    Args:
        token: its id.
        logprob: natural logarithm of its probability.
        top: (token, logprob) of the most likely tokens, best first, equal ones by ascending id.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class SamplingParams:
    """Choices for one text. Each change and filter looks at what the one before it left.

    Applied in this order: logit_bias, presence_penalty and frequency_penalty, grammar, min_sigma, repetition_penalty,
    temperature, top_k, top_p, min_p.

    Args:
        max_tokens: most tokens to generate.
        temperature: divides the logits; 0 always takes the most likely token.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the most likely tokens that together reach this probability; 1 keeps all.
        min_p: keep tokens at least this fraction as likely as the most likely one; 0 keeps all.
        min_sigma: keep tokens whose logit is at least so many standard deviations above the mean of the model's logits,
            and the most likely one; 0 keeps all. No temperature changes which those are.
        repetition_penalty: divides the positive and multiplies the negative logits of tokens already in
            the text or prompt; from 1e-6 to 1e6, 1 is off.
        seed: of the random draws; the same seed gives the same text. None draws a seed.
        stop: strings that end the text; they are not part of it. One string or several.
        ignore_eos: go on after the model's end-of-text token.
        logprobs: tell of every new token how likely it was, and so many of the most likely ones; None tells nothing.
        prompt_logprobs: the same for every token of the prompt but the first.
        presence_penalty: subtracted from the logits of tokens already generated; from -2 to 2.
        frequency_penalty: subtracted as often as a token was generated; from -2 to 2.
        logit_bias: added to the logits of some tokens, by their ids; from -100 to 100.
        grammar: says before each token which ones may follow. It follows one text only.

    Raises:
        ValueError: a value out of its range.
    """

    max_tokens: int = 256
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.0
    min_sigma: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        self._set("max_tokens", _whole("max_tokens", self.max_tokens, 1, 2**31 - 1))
        self._set("top_k", _whole("top_k", self.top_k, 0, 2**31 - 1))
        if self.seed is not None:
            self._set("seed", _whole("seed", self.seed, 0, 2**64 - 1))
        self._set("temperature", _real("temperature", self.temperature, 0.0, math.inf))
        self._set("top_p", _real("top_p", self.top_p, 0.0, 1.0, open_low=True))
        self._set("min_p", _real("min_p", self.min_p, 0.0, 1.0))
        self._set("min_sigma", _real("min_sigma", self.min_sigma, 0.0, 100.0))
        penalty = _real("repetition_penalty", self.repetition_penalty, 1e-6, 1e6)
        self._set("repetition_penalty", penalty)
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Sequence) or not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop is {self.stop!r}; expected a non-empty string or a list of them")
        self._set("stop", tuple(stop))
        # Not the type alone: numpy has its own True.
        if self.ignore_eos not in (True, False):
            raise ValueError(f"ignore_eos is {self.ignore_eos!r}; expected True or False")
        self._set("ignore_eos", bool(self.ignore_eos))
        for name in ("logprobs", "prompt_logprobs"):
            if (n_top := getattr(self, name)) is not None:
                self._set(name, _whole(name, n_top, 0, 2**31 - 1))
        for name in ("presence_penalty", "frequency_penalty"):
            self._set(name, _real(name, getattr(self, name), -2.0, 2.0))
        if self.logit_bias is not None:
            self._set("logit_bias", _biases(self.logit_bias))
        if self.grammar is not None and not all(
            callable(getattr(self.grammar, name, None)) for name in ("mask", "accept")
        ):
            raise ValueError(f"grammar is {self.grammar!r}; expected an object with mask and accept")

    @property
    def goes_one_by_one(self) -> bool:
        """Whether logits are changed by what the text holds, or by its user: no token can be guessed ahead then."""
        return bool(
            self.presence_penalty or self.frequency_penalty or self.logit_bias or self.grammar is not None
        )

    @property
    def changes_logits(self) -> bool:
        """Whether logits are changed before the core sees them."""
        return self.goes_one_by_one or self.min_sigma > 0

    @property
    def n_best(self) -> int:
        """How many of the best logits are needed; 0: all of them."""
        needs_all = self.repetition_penalty != 1 or self.changes_logits
        if needs_all or self.logprobs is not None or self.prompt_logprobs is not None:
            return 0
        return 1 if self.temperature == 0 else self.top_k

    def _set(self, name: str, value: Any) -> None:
        # The one moment at which a frozen value is still made: numpy numbers become Python's.
        object.__setattr__(self, name, value)


def random_seed() -> int:
    """A seed from the operating system, short enough to be typed in again."""
    return int.from_bytes(os.urandom(4), "little")


def _biases(biases: Any) -> dict[int, float]:
    if not isinstance(biases, Mapping):
        raise ValueError(f"logit_bias is {biases!r}; expected numbers by token ids")
    return {
        _whole("logit_bias: a token id", token, 0, 2**31 - 1): _real(
            f"logit_bias of {token}", bias, -100.0, 100.0
        )
        for token, bias in biases.items()
    }


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or not low <= int(value) <= high:
        raise ValueError(f"{name} is {value!r}; expected a whole number from {low} to {high}")
    return int(value)


def _real(name: str, value: Any, low: float, high: float, open_low: bool = False) -> float:
    number = _float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not low <= number <= high or math.isinf(number) or (open_low and number == low):
        above = f"above {low:g}" if open_low else f"at least {low:g}"
        limit = "" if math.isinf(high) else f" and at most {high:g}"
        raise ValueError(f"{name} is {value!r}; expected a number {above}{limit}")
    return number


def _float(value: Real) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf

"""Drives the model: prompts in, tokens and text out, one synchronous step after the other.

Owns a key-value cache and the requests in it. Prompts are token ids.

    engine = Engine(model, tokenizer, n_blocks=8)
    engine.add([1, 2, 3], SamplingParams(max_tokens=16))
    for piece in engine.run():
        print(piece.text, end="")
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from onebit.config import ModelConfig
from onebit.engine.blocks import BlockPool
from onebit.engine.model import BLOCK_TOKENS, Float32, Model, sample
from onebit.engine.sampling import SamplingParams, random_seed
from onebit.engine.scheduler import Batch, Request, Scheduler
from onebit.engine.tokenizer import Detokenizer, Tokenizer

# Tokens of one forward pass: enough to keep every thread busy, few enough that other texts do not wait long.
MAX_STEP_TOKENS = 512


@dataclass(eq=False, kw_only=True)
class Generation(Request):
    """A request and the text that grows from it.

    Args:
        n_prompt: leading tokens that are the prompt.
        max_tokens: most tokens to generate; the context may allow fewer than were asked for.
        params: how tokens are chosen.
        seed: of the random draws, also where params leave it open.
        detokenizer: turns tokens into text; None for a model without tokenizer.
        text: what was generated, without end-of-text token and stop string.
        finish_reason: None until the text has ended.
        started_s: when the request was made, on the monotonic clock; likewise first_token_s and last_token_s.
    """

    n_prompt: int
    max_tokens: int
    params: SamplingParams
    seed: int
    detokenizer: Detokenizer | None
    text: str = ""
    finish_reason: Literal["stop", "length"] | None = None
    started_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0

    @property
    def generated(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[self.n_prompt :]


class Step(NamedTuple):
    """One more token of a request, and the text that is certain since."""

    request: Generation
    token: int
    text: str


class Engine:
    """Requests that share one model and one cache.

    Args:
        model: shared and never changed.
        tokenizer: of the model, or None where texts are not needed.
        n_blocks: blocks in the cache; more requests than fit wait for each other.
        max_step_tokens: most tokens in one forward pass.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer | None,
        n_blocks: int,
        max_step_tokens: int = MAX_STEP_TOKENS,
    ) -> None:
        self.pool = BlockPool(n_blocks, BLOCK_TOKENS)
        self._model = model
        self._tokenizer = tokenizer
        self._cache = model.new_cache(n_blocks)
        self._scheduler: Scheduler[Generation] = Scheduler(self.pool, max_step_tokens)

    def add(self, prompt: Sequence[int], params: SamplingParams) -> Generation:
        """Queue a prompt.

        Raises:
            ValueError: see `count_positions`; stop strings for a model without tokenizer; a text that may
                outgrow the whole cache.
        """
        n_positions = count_positions(self._model.config, prompt, params)
        if self.pool.count(n_positions) > self.pool.n_blocks:
            most = self.pool.n_blocks * BLOCK_TOKENS
            raise ValueError(f"prompt and max_tokens need {n_positions} positions; the cache holds {most}")
        if params.stop and self._tokenizer is None:
            raise ValueError("stop strings need a tokenizer, which this model does not have")
        request = Generation(
            tokens=[int(token) for token in prompt],
            n_prompt=len(prompt),
            max_tokens=n_positions - len(prompt) + 1,
            params=params,
            seed=random_seed() if params.seed is None else params.seed,
            detokenizer=Detokenizer(self._tokenizer, params.stop) if self._tokenizer else None,
            started_s=time.perf_counter(),
        )
        self._scheduler.add(request)
        return request

    def cancel(self, request: Generation) -> None:
        """Free what a request holds; nothing happens if it has already ended."""
        if request in self._scheduler.requests:
            self._scheduler.remove(request)

    def run(self) -> Iterator[Step]:
        """Step until every request has ended."""
        while self._scheduler.requests:
            yield from self.step()

    def step(self) -> list[Step]:
        """Run the model once.

        Returns:
            One entry for each request that got a token; those still reading their prompt have none.

        Raises:
            ValueError: logits that are no numbers, ...; the requests of the step are gone then.
        """
        batch = self._scheduler.schedule()
        if not batch:
            return []
        ready = [part.request for part in batch if part.is_last]
        try:
            logits_RV = self._forward(batch)
            return [self._extend(request, row) for request, row in zip(ready, logits_RV, strict=True)]
        except BaseException:
            # What the cache holds of these texts is no longer known.
            for part in batch:
                self.cancel(part.request)
            raise

    def _forward(self, batch: Batch[Generation]) -> Float32:
        starts = np.cumsum([0, *(part.stop - part.start for part in batch)], dtype=np.int32)
        tables = np.zeros((len(batch), max(len(part.request.blocks) for part in batch)), np.int32)
        for table, part in zip(tables, batch, strict=True):
            table[: len(part.request.blocks)] = part.request.blocks
        return self._model.forward(
            np.concatenate([np.array(p.request.tokens[p.start : p.stop], np.int32) for p in batch]),
            np.concatenate([np.arange(p.start, p.stop, dtype=np.int32) for p in batch]),
            starts,
            tables,
            np.array([end - 1 for end, p in zip(starts[1:], batch, strict=True) if p.is_last], np.int32),
            self._cache,
        )

    def _extend(self, request: Generation, logits_V: Float32) -> Step:
        params = request.params
        token = sample(
            logits_V,
            np.array(request.tokens if params.repetition_penalty != 1 else [], np.int32),
            params.temperature,
            params.top_k,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            request.seed,
            len(request.generated),
        )
        request.tokens.append(token)
        request.last_token_s = time.perf_counter()
        request.first_token_s = request.first_token_s or request.last_token_s
        ended = token in self._model.config.eos_tokens and not params.ignore_eos
        text = ""
        if request.detokenizer:
            text = "" if ended else request.detokenizer.push(token)
            if ended or len(request.generated) == request.max_tokens:
                text += request.detokenizer.flush()
            ended = ended or request.detokenizer.stopped
        request.text += text
        if ended or len(request.generated) == request.max_tokens:
            request.finish_reason = "stop" if ended else "length"
            self._scheduler.remove(request)
        return Step(request, token, text)


def count_positions(config: ModelConfig, prompt: Sequence[int], params: SamplingParams) -> int:
    """Positions of the context that a text may come to fill: its last token is never read by the model.

    Raises:
        ValueError: a prompt that is empty, longer than the context, or holds ids outside the vocabulary.
    """
    check_tokens(config, prompt)
    return min(len(prompt) + params.max_tokens - 1, config.max_seq_len)


def check_tokens(config: ModelConfig, tokens: Sequence[int]) -> None:
    """Refuse tokens that the model cannot read.

    Raises:
        ValueError: no token, more tokens than the context holds, or ids outside the vocabulary.
    """
    if not len(tokens):
        raise ValueError("the prompt is empty, and this model has no token to start a text from")
    if len(tokens) > config.max_seq_len:
        raise ValueError(
            f"the prompt has {len(tokens)} tokens; the context of this model holds {config.max_seq_len}"
        )
    for token in tokens:
        if not 0 <= token < config.vocab_size:
            raise ValueError(f"token id {token} is outside the vocabulary of {config.vocab_size}")

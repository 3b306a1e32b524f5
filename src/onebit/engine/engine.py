"""Drives the model: prompts in, tokens and text out, one synchronous step after the other.

Owns a key-value cache and the requests in it. Prompts are token ids.

    engine = Engine(model, tokenizer, n_blocks=8)
    engine.add([1, 2, 3], SamplingParams(max_tokens=16))
    for piece in engine.run():
        print(piece.text, end="")
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from onebit.config import ModelConfig
from onebit.engine.blocks import BlockPool
from onebit.engine.model import BLOCK_TOKENS, Float32, Int32, Model, sample
from onebit.engine.sampling import SamplingParams, random_seed
from onebit.engine.scheduler import Batch, Request, Scheduler
from onebit.engine.speculation import Lookup, Speculation
from onebit.engine.tokenizer import Detokenizer, Tokenizer

# Tokens of one forward pass: enough to keep every thread busy, few enough that other texts do not wait long.
MAX_STEP_TOKENS = 512
# One in so many steps without guesses is timed.
TIMED_STEPS = 16
NO_DRAFTS: list[int] = []
NO_ADAPTER = -1


@dataclass(eq=False, kw_only=True)
class Generation(Request):
    """A request and the text that grows from it.

    Args:
        n_prompt: leading tokens that are the prompt.
        max_tokens: most tokens to generate; the context may allow fewer than were asked for.
        params: how tokens are chosen.
        n_best: how many of the best logits that takes; 0: all.
        seed: of the random draws, also where params leave it open.
        detokenizer: turns tokens into text; None for a model without tokenizer.
        ids: int32, the tokens once more, as the core reads them, with room for those to come.
        lookup: guesses the next tokens; None without speculation.
        adapter: which of the model's adapters the text runs with.
        finish_reason: None until the text has ended.
        drafted: guesses that were computed, and of these accepted: those that were right.
        started_s: when the request was made, on the monotonic clock; likewise first_token_s and last_token_s.
    """

    n_prompt: int
    max_tokens: int
    params: SamplingParams
    n_best: int
    seed: int
    detokenizer: Detokenizer | None
    ids: Int32
    lookup: Lookup | None
    adapter: int = NO_ADAPTER
    finish_reason: Literal["stop", "length"] | None = None
    drafted: int = 0
    accepted: int = 0
    started_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """What was generated, without end-of-text token and stop string."""
        return "".join(self.pieces)

    @property
    def generated(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[self.n_prompt :]

    @property
    def n_left(self) -> int:
        """Tokens that may still be generated."""
        return self.n_prompt + self.max_tokens - len(self.tokens)


class Step(NamedTuple):
    """One more token of a request, the text that is certain since, and whether it is the last."""

    request: Generation
    token: int
    text: str
    is_last: bool


class Engine:
    """Requests that share one model and one cache.

    Args:
        model: shared and never changed.
        tokenizer: of the model, or None where texts are not needed.
        n_blocks: blocks in the cache; more requests than fit wait for each other.
        max_step_tokens: most tokens in one forward pass.
        speculation: guesses tokens ahead, to compute several of a text in one step; None goes one by one. The
            tokens are the same.
        kv_cache: number format of keys and values.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer | None,
        n_blocks: int,
        max_step_tokens: int = MAX_STEP_TOKENS,
        speculation: Speculation | None = None,
        kv_cache: str = "bf16",
    ) -> None:
        self.pool = BlockPool(n_blocks, BLOCK_TOKENS)
        self._model = model
        self._tokenizer = tokenizer
        self._speculation = speculation
        self._cache = model.new_cache(n_blocks, kv_cache)
        self._scheduler: Scheduler[Generation] = Scheduler(self.pool, max_step_tokens)
        self._n_steps = self._next_draft = 0
        # What a step hands to the core; filled anew for each.
        self._numbers = np.arange(max(model.config.max_seq_len, max_step_tokens), dtype=np.int32)
        self._tokens = np.empty(max_step_tokens, np.int32)
        self._positions = np.empty(max_step_tokens, np.int32)
        self._rows = np.empty(max_step_tokens, np.int32)
        self._top_k = np.empty(max_step_tokens, np.int32)
        self._starts = np.zeros(1, np.int32)
        self._adapters = np.zeros(0, np.int32)
        self._tables = np.zeros((0, 0), np.int32)
        self._logits = np.empty((0, model.config.vocab_size), np.float32)

    def add(self, prompt: Sequence[int], params: SamplingParams, adapter: int = NO_ADAPTER) -> Generation:
        """Queue a prompt.

        Args:
            prompt: token ids.
            params: how tokens are chosen.
            adapter: which of the model's adapters the text runs with.

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
        tokens = [int(token) for token in prompt]
        ids = np.empty(n_positions + 1, np.int32)
        ids[: len(tokens)] = tokens
        request = Generation(
            tokens=tokens,
            n_prompt=len(tokens),
            max_tokens=n_positions - len(tokens) + 1,
            params=params,
            n_best=min(params.n_best, self._model.config.vocab_size),
            seed=random_seed() if params.seed is None else params.seed,
            detokenizer=Detokenizer(self._tokenizer, params.stop) if self._tokenizer else None,
            ids=ids,
            lookup=Lookup(tokens) if self._speculation else None,
            adapter=adapter,
            started_s=time.perf_counter(),
        )
        self._scheduler.add(request)
        return request

    @property
    def requests(self) -> list[Generation]:
        """Those that have not ended, in order of arrival."""
        return self._scheduler.requests

    def cancel(self, request: Generation) -> None:
        """Free what a request holds; nothing happens if it has already ended."""
        if request in self._scheduler.requests:
            self._scheduler.remove(request)

    def run(self) -> Iterator[Step]:
        """Step until every request has ended."""
        while self._scheduler.requests:
            for step in self.step():
                # Whoever takes the steps may have cancelled a text that got several tokens in one.
                if step.request.finish_reason or step.request in self._scheduler.requests:
                    yield step

    def step(self) -> list[Step]:
        """Run the model once.

        Returns:
            The new tokens: one of each request that has read its prompt, and more where guesses were right.

        Raises:
            ValueError: logits that are no numbers, ...; the requests of the step are gone then.
        """
        if self._speculation and self._n_steps >= self._next_draft:
            self._draft(self._speculation)
        batch = self._scheduler.schedule()
        if not batch:
            return []
        self._n_steps += 1
        try:
            logits_RV = self._forward(batch)
            steps: list[Step] = []
            row = 0
            for part in batch:
                if part.is_last:
                    n_rows = 1 + part.n_drafts
                    self._extend(part.request, logits_RV[row : row + n_rows], steps)
                    row += n_rows
            return steps
        except BaseException:
            # What the cache holds of these texts is no longer known.
            for part in batch:
                self.cancel(part.request)
            raise

    def _draft(self, speculation: Speculation) -> None:
        """Guess for every text that is caught up but for its latest token."""
        n_rows = 0
        texts = []
        for request in self._scheduler.requests:
            request.drafts = NO_DRAFTS
            if request.lookup and len(request.tokens) == request.n_computed + 1:
                n_rows += 1
                # The last token needs no guess: it is never read.
                if request.lookup.read() and request.n_left > 1:
                    texts.append((request, (request.lookup, request.n_left - 1)))
        self._next_draft = self._n_steps + speculation.pause
        if texts:
            drafts = speculation.draft([text for _, text in texts], n_rows)
            for (request, _), guesses in zip(texts, drafts, strict=True):
                request.drafts = guesses
                if guesses:
                    self._next_draft = self._n_steps + 1

    def _forward(self, batch: Batch[Generation]) -> Float32:
        """Compute a batch; returns the logits of the last token of each part that is_last, and of its drafts."""
        self._make_room(len(batch), max(len(part.request.blocks) for part in batch))
        numbers, starts = self._numbers, self._starts
        n_tokens = n_rows = 0
        is_decoding = self._speculation is not None
        for i, (request, start, stop, n_drafts) in enumerate(batch):
            begin = n_tokens
            self._tables[i, : len(request.blocks)] = request.blocks
            self._adapters[i] = request.adapter
            if stop - start == 1 and not n_drafts:
                self._tokens[begin] = request.tokens[start]
                self._positions[begin] = start
                n_tokens = begin + 1
            else:
                end = stop + n_drafts
                n_tokens = begin + end - start
                request.ids[stop:end] = request.drafts[:n_drafts]
                self._tokens[begin:n_tokens] = request.ids[start:end]
                self._positions[begin:n_tokens] = numbers[start:end]
                is_decoding = is_decoding and stop - start == 1
            starts[i + 1] = n_tokens
            if stop == len(request.tokens):
                self._top_k[n_rows : n_rows + 1 + n_drafts] = request.n_best
                for row in range(n_tokens - 1 - n_drafts, n_tokens):
                    self._rows[n_rows] = row
                    n_rows += 1
        # A few steps without guesses suffice to compare with.
        is_timed = is_decoding and (n_tokens > len(batch) or self._n_steps % TIMED_STEPS == 0)
        if len(self._logits) < n_rows:
            self._logits = np.empty((n_rows, self._logits.shape[1]), np.float32)
        begun_s = time.perf_counter() if is_timed else 0.0
        logits_RV = self._model.forward(
            self._tokens[:n_tokens],
            self._positions[:n_tokens],
            starts[: len(batch) + 1],
            self._tables[: len(batch)],
            self._rows[:n_rows],
            self._cache,
            self._top_k[:n_rows],
            self._logits[:n_rows],
            self._adapters[: len(batch)],
        )
        if self._speculation and is_timed:
            self._speculation.observe(n_tokens, time.perf_counter() - begun_s)
        return logits_RV

    def _make_room(self, n_seqs: int, n_blocks: int) -> None:
        if len(self._tables) < n_seqs or self._tables.shape[1] < n_blocks:
            n_seqs = max(n_seqs, len(self._tables))
            # Twice as wide as needed: a text gets its blocks one by one.
            self._tables = np.zeros((n_seqs, max(2 * n_blocks, self._tables.shape[1])), np.int32)
            self._starts = np.zeros(n_seqs + 1, np.int32)
            self._adapters = np.full(n_seqs, NO_ADAPTER, np.int32)

    def _extend(self, request: Generation, logits_RV: Float32, steps: list[Step]) -> None:
        """Draw the next token of a request, and go on for as long as its drafts are right."""
        params = request.params
        n_drafts = len(logits_RV) - 1
        drawn = sample(
            logits_RV,
            request.ids[: len(request.tokens) + n_drafts],
            params.temperature,
            params.top_k,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            request.seed,
            len(request.tokens) - request.n_prompt,
        )
        request.last_token_s = time.perf_counter()
        request.first_token_s = request.first_token_s or request.last_token_s
        request.drafted += n_drafts
        request.accepted -= 1
        for token in drawn:
            request.ids[len(request.tokens)] = token
            request.tokens.append(token)
            request.accepted += 1
            text, is_last = self._read(request, token)
            steps.append(Step(request, token, text, is_last))
            if is_last:
                self._scheduler.remove(request)
                break
        # What was accepted is in the cache; the next step overwrites what was not.
        request.n_computed = len(request.tokens) - 1

    def _read(self, request: Generation, token: int) -> tuple[str, bool]:
        """The text that a new token makes certain, and whether it ends the whole."""
        is_end = token in self._model.config.eos_tokens and not request.params.ignore_eos
        is_full = request.n_left == 0
        text = ""
        if detokenizer := request.detokenizer:
            if not is_end:
                text = detokenizer.push(token)
            if is_end or is_full:
                text += detokenizer.flush()
            is_end = is_end or detokenizer.stopped
            request.pieces.append(text)
        if is_end or is_full:
            request.finish_reason = "stop" if is_end else "length"
        return text, is_end or is_full


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

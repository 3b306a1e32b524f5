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
from onebit.engine.blocks import ROOT, BlockPool
from onebit.engine.logits import change, entropy, token_logprobs
from onebit.engine.model import BLOCK_TOKENS, LAYER_INPUTS, Float32, Int32, Int64, Model, sample
from onebit.engine.sampling import SamplingParams, TokenLogprobs, random_seed
from onebit.engine.scheduler import Batch, Request, Scheduler, Slice
from onebit.engine.speculation import Lookup, Speculation
from onebit.engine.tokenizer import Detokenizer, Tokenizer

# Tokens of one forward pass: enough to keep every thread busy, few enough that other texts do not wait long.
MAX_STEP_TOKENS = 512
# Most of them of prompts whose every token gives a row of logits, which takes 0.5 MB for a vocabulary of 128 thousand.
MAX_PROMPT_ROWS = 128
# One in so many steps without guesses is timed.
TIMED_STEPS = 16
NO_DRAFTS: list[int] = []
NO_ADAPTER = -1
NO_TOKEN = -1


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
        finish_reason: None until the text has ended; "error" if it could not go on.
        error: why it could not.
        logprobs: of every token generated, if params ask for them.
        prompt_logprobs: of the tokens of the prompt, as far as it is read, if params ask for them; None for the first,
            which follows nothing.
        entropies: of the distributions that some of its tokens were drawn from; see `Engine.probe_every`.
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
    finish_reason: Literal["stop", "length", "error"] | None = None
    error: BaseException | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
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
    """One more token of a request, or the news that it could not go on.

    Args:
        request: which one.
        token: what was drawn; NO_TOKEN after an error.
        text: what is certain of the text since.
        is_last: whether the request has ended.
        logprobs: of the token, if they are asked for; else empty.
    """

    request: Generation
    token: int
    text: str
    is_last: bool
    logprobs: list[TokenLogprobs]


class EngineStats(NamedTuple):
    """What an engine does now, and what it has done since it was made.

    Args:
        running: requests that hold blocks.
        waiting: requests that hold none yet, or none any more.
        blocks_total: blocks of the cache.
        blocks_used: blocks that running requests hold.
        blocks_cached: blocks that nobody holds and whose contents can still be found; they count as free.
        prefix_query_tokens: tokens of requests at the time they began, or began anew after they lost their blocks.
        prefix_hit_tokens: those of them that did not have to be computed.
        preemptions: how often a request lost its blocks to an older one.
        steps: forward passes.
        step_tokens: tokens computed in them, guesses included.
    """

    running: int
    waiting: int
    blocks_total: int
    blocks_used: int
    blocks_cached: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    preemptions: int
    steps: int
    step_tokens: int


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
        prefix_cache: compute the first tokens that texts have in common once, 64 at a time, for as long as nobody needs
            the memory. The tokens are the same.
        max_num_seqs: most texts at once; more wait. None: as many as the cache holds.

    Raises:
        ValueError: n_blocks, max_step_tokens or max_num_seqs below 1.
    """

    # One step in so many is probed: it counts codes, and tells one of its texts, each in turn, the entropy of its
    # distribution; 0: none is. The tokens are the same.
    probe_every = 0

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer | None,
        n_blocks: int,
        max_step_tokens: int = MAX_STEP_TOKENS,
        speculation: Speculation | None = None,
        kv_cache: str = "bf16",
        prefix_cache: bool = True,
        max_num_seqs: int | None = None,
    ) -> None:
        limits = {"n_blocks": n_blocks, "max_step_tokens": max_step_tokens, "max_num_seqs": max_num_seqs}
        for name, limit in limits.items():
            if limit is not None and limit < 1:
                raise ValueError(f"{name} is {limit}; expected at least 1")
        self.pool = BlockPool(n_blocks, BLOCK_TOKENS)
        self._model = model
        self._tokenizer = tokenizer
        self._speculation = speculation
        self._cache = model.new_cache(n_blocks, kv_cache)
        self._scheduler: Scheduler[Generation] = Scheduler(
            self.pool, max_step_tokens, min(max_step_tokens, MAX_PROMPT_ROWS), max_num_seqs, prefix_cache
        )
        self._n_steps = self._n_step_tokens = self._next_draft = 0
        self._is_probed = False
        self._probed: Generation | None = None
        # Of all probed steps, int64 [layers, LAYER_INPUTS, 3]: codes that linear layers read, how many of these were
        # the least or the largest, and how many zero; see `Model.forward`.
        self.code_counts: Int64 = np.zeros((model.config.n_layers, len(LAYER_INPUTS), 3), np.int64)
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
                outgrow the whole cache; a logit_bias of a token outside the vocabulary.
        """
        n_positions = count_positions(self._model.config, prompt, params)
        if self.pool.count(n_positions) > self.pool.n_blocks:
            most = self.pool.n_blocks * BLOCK_TOKENS
            raise ValueError(f"prompt and max_tokens need {n_positions} positions; the cache holds {most}")
        if params.stop and self._tokenizer is None:
            raise ValueError("stop strings need a tokenizer, which this model does not have")
        for token in params.logit_bias or ():
            if token >= self._model.config.vocab_size:
                size = self._model.config.vocab_size
                raise ValueError(f"logit_bias names token {token}, outside the vocabulary of {size}")
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
            # What changes logits counts on one token after the other.
            lookup=Lookup(tokens) if self._speculation and not params.goes_one_by_one else None,
            adapter=adapter,
            root=ROOT if adapter == NO_ADAPTER else ROOT - 1 - adapter,
            prompt_logprobs=[] if params.prompt_logprobs is None else [None],
            reads_all=params.prompt_logprobs is not None and len(tokens) > 1,
            started_s=time.perf_counter(),
        )
        self._scheduler.add(request)
        return request

    def cancel(self, request: Generation) -> None:
        """Free what a request holds; nothing happens if it has already ended."""
        if request in self._scheduler.requests:
            self._scheduler.remove(request)

    @property
    def n_layers(self) -> int:
        """Layers of the model, each with keys and values in the cache."""
        return self._model.config.n_layers

    @property
    def stats(self) -> EngineStats:
        """Counts of requests, blocks and tokens."""
        scheduler, pool = self._scheduler, self.pool
        running = sum(bool(request.blocks) for request in scheduler.requests)
        return EngineStats(
            running=running,
            waiting=len(scheduler.requests) - running,
            blocks_total=pool.n_blocks,
            blocks_used=pool.n_blocks - pool.n_free,
            blocks_cached=pool.n_cached,
            prefix_query_tokens=scheduler.n_queried,
            prefix_hit_tokens=scheduler.n_found,
            preemptions=scheduler.n_preempted,
            steps=self._n_steps,
            step_tokens=self._n_step_tokens,
        )

    def read_block(self, layer: int, nth: int) -> Float32 | None:
        """Copy the keys and values of one full block of a text under way.

        Args:
            layer: which layer's.
            nth: which block; they are counted over all texts, and then from the start again.

        Returns:
            float32 [2, kv heads, BLOCK_TOKENS, d_head]: keys, then values; None while no text fills a block.
        """
        full = [
            block
            for request in self._scheduler.requests
            for block in request.blocks[: request.n_computed // BLOCK_TOKENS]
        ]
        return self._model.read_block(self._cache, layer, full[nth % len(full)]) if full else None

    def run(self) -> Iterator[Step]:
        """Step until every request has ended."""
        while self._scheduler.requests:
            for step in self.step():
                # Whoever takes the steps may have cancelled a text that got several tokens in one.
                if step.request.finish_reason or step.request in self._scheduler.requests:
                    yield step

    def step(self) -> list[Step]:
        """Run the model once.

        A request that cannot go on, for its grammar or for logits that are no numbers, ends with an error; the others
        do not notice.

        Returns:
            The new tokens: one of each request that has read its prompt, and more where guesses were right. None while
            all are still reading; `stats` says whether there are requests left.

        Raises:
            MemoryError: the core has no room for its work, ...; the requests of the step are gone then, with an error.
        """
        if self._speculation and self._n_steps >= self._next_draft:
            self._draft(self._speculation)
        batch = self._scheduler.schedule()
        if not batch:
            return []
        self._n_steps += 1
        self._is_probed = bool(self.probe_every) and self._n_steps % self.probe_every == 0
        self._probed = self._choose_probed(batch) if self._is_probed else None
        try:
            logits_RV = self._forward(batch)
            steps: list[Step] = []
            row = 0
            for part in batch:
                rows = logits_RV[row : row + _n_rows(part)]
                row += len(rows)
                self._read_rows(part, rows, steps)
            return steps
        except BaseException as error:
            # What the cache holds of these tokens is not known.
            for part in batch:
                part.request.n_computed = min(part.request.n_computed, part.start)
                self._fail(part.request, error)
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

    def _choose_probed(self, batch: Batch[Generation]) -> Generation | None:
        drawing = [part.request for part in batch if part.is_last]
        return drawing[self._n_steps // self.probe_every % len(drawing)] if drawing else None

    def _forward(self, batch: Batch[Generation]) -> Float32:
        """Compute a batch; returns the logits of the last `_n_rows` tokens of each part."""
        self._make_room(len(batch), max(len(part.request.blocks) for part in batch))
        numbers, starts = self._numbers, self._starts
        n_tokens = n_rows = 0
        is_decoding = self._speculation is not None
        for i, part in enumerate(batch):
            request, start, stop, n_drafts = part
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
            if more_rows := _n_rows(part):
                self._top_k[n_rows : n_rows + more_rows] = request.n_best
                if request is self._probed:
                    # An entropy needs all logits.
                    self._top_k[n_rows + more_rows - 1 - n_drafts] = 0
                for row in range(n_tokens - more_rows, n_tokens):
                    self._rows[n_rows] = row
                    n_rows += 1
        self._n_step_tokens += n_tokens
        # A few steps without guesses suffice to compare with; one with a row of all logits takes longer.
        is_timed = (
            is_decoding
            and not self._is_probed
            and (n_tokens > len(batch) or self._n_steps % TIMED_STEPS == 0)
        )
        if len(self._logits) < n_rows:
            self._logits = np.empty((n_rows, self._logits.shape[1]), np.float32)
        counts = np.zeros((*self.code_counts.shape[:2], 2), np.int64) if self._is_probed else None
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
            counts,
        )
        if counts is not None:
            self._take_counts(counts, n_tokens)
        if self._speculation and is_timed:
            self._speculation.observe(n_tokens, time.perf_counter() - begun_s)
        return logits_RV

    def _take_counts(self, counts: Int64, n_tokens: int) -> None:
        n_codes = np.broadcast_to(n_tokens * np.array(self._model.input_widths()), counts.shape[:2])
        # A new array: whoever reads it on another thread has all of a step, or nothing.
        self.code_counts = self.code_counts + np.dstack([n_codes, counts])

    def _make_room(self, n_seqs: int, n_blocks: int) -> None:
        if len(self._tables) < n_seqs or self._tables.shape[1] < n_blocks:
            n_seqs = max(n_seqs, len(self._tables))
            # Twice as wide as needed: a text gets its blocks one by one.
            self._tables = np.zeros((n_seqs, max(2 * n_blocks, self._tables.shape[1])), np.int32)
            self._starts = np.zeros(n_seqs + 1, np.int32)
            self._adapters = np.full(n_seqs, NO_ADAPTER, np.int32)

    def _read_rows(self, part: Slice[Generation], logits_RV: Float32, steps: list[Step]) -> None:
        """Take from the logits of a part what is wanted of the prompt, then the next tokens."""
        request = part.request
        n_drawn = 1 + part.n_drafts if part.is_last else 0
        try:
            n_top = request.params.prompt_logprobs
            for logits_V in logits_RV[: len(logits_RV) - n_drawn]:
                assert n_top is not None
                token = request.tokens[len(request.prompt_logprobs)]
                request.prompt_logprobs.append(token_logprobs(logits_V, token, n_top))
            if n_drawn:
                request.reads_all = False
                self._extend(request, logits_RV[len(logits_RV) - n_drawn :], steps)
        except Exception as error:
            self._fail(request, error)
            steps.append(Step(request, NO_TOKEN, "", True, []))

    def _fail(self, request: Generation, error: BaseException) -> None:
        if not request.finish_reason:
            self.cancel(request)
            request.error, request.finish_reason = error, "error"

    def _extend(self, request: Generation, logits_RV: Float32, steps: list[Step]) -> None:
        """Draw the next token of a request, and go on for as long as its drafts are right."""
        params = request.params
        n_drafts = len(logits_RV) - 1
        plain_RV = logits_RV
        if params.changes_logits:
            is_told = params.logprobs is not None or request is self._probed
            plain_RV = logits_RV.copy() if is_told else logits_RV
            change(logits_RV, params, request.ids[request.n_prompt : len(request.tokens)], request)
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
        if request is self._probed:
            request.entropies.append(entropy(plain_RV[0]))
        request.last_token_s = time.perf_counter()
        request.first_token_s = request.first_token_s or request.last_token_s
        request.drafted += n_drafts
        request.accepted -= 1
        for token, plain_V in zip(drawn, plain_RV, strict=False):
            # What was accepted is in the cache; the next step overwrites what was not.
            request.n_computed = len(request.tokens)
            request.ids[len(request.tokens)] = token
            request.tokens.append(token)
            request.accepted += 1
            logprobs = [] if params.logprobs is None else [token_logprobs(plain_V, token, params.logprobs)]
            request.logprobs += logprobs
            if params.grammar is not None:
                params.grammar.accept(token)
            text, is_last = self._read(request, token)
            steps.append(Step(request, token, text, is_last, logprobs))
            if is_last:
                self._scheduler.remove(request)
                break

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


def _n_rows(part: Slice[Generation]) -> int:
    """How many logits of a part are wanted, those of its last tokens."""
    if part.request.reads_all:
        # What is told already was read before the request lost its blocks.
        first = max(part.start, len(part.request.prompt_logprobs) - 1)
        return max(part.stop - first, 0) + part.n_drafts
    return 1 + part.n_drafts if part.is_last else 0


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

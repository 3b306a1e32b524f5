"""What is measured of any engine, through the four things that each of them can do with texts.

All engines do the same: token ids in, a forward pass, the likeliest token out. Tokenizers, schedulers and servers are
left out.

    decode(engine, threads=2, seconds=0.5, context=1024)        # tokens per second
"""

import time
from typing import Any, Protocol

from onebit.bench.timing import per_second

# Tokens of a text between two looks at the clock.
PIECE = 8


class Texts(Protocol):
    """An engine: texts of one length that grow together, each by its likeliest tokens.

    Args:
        info: of the engine, ready for JSON: "version", "settings" and "kv_cache", in words.
        load_s: seconds that loading took.
        vocab_size: ids are smaller.
    """

    info: dict[str, Any]
    load_s: float
    vocab_size: int

    def use(self, threads: int) -> None:
        """Compute on so many threads from now on."""

    def begin(self, batch: int, positions: int) -> None:
        """Start empty texts, with room for so many tokens each."""

    def read(self, tokens: list[list[int]]) -> list[int]:
        """Append tokens to each text; returns the likeliest next one of each."""

    def rewind(self, n: int) -> None:
        """Keep only the first n tokens of each text."""


def decode(
    engine: Texts, threads: int, seconds: float, context: int = 0, batch: int = 1, tokens: int = PIECE
) -> float:
    """Tokens per second of texts that grow one token at a time, all of them together.

    Args:
        engine: that computes.
        threads: that it has.
        seconds: to go on for, about; 0: `tokens` steps.
        context: tokens that stand before, read and not counted.
        batch: texts at once.
        tokens: steps until the texts go back to their context.
    """
    engine.use(threads)
    engine.begin(batch, context + tokens)
    first = engine.read(prompts(engine, batch, context)) if context else [1] * batch

    def texts() -> int:
        engine.rewind(context)
        last = first
        for _ in range(tokens):
            last = engine.read([[token] for token in last])
        return tokens * batch

    return per_second(texts, seconds)


def prefill(engine: Texts, threads: int, seconds: float, tokens: int = 512, batch: int = 1) -> float:
    """Tokens per second of prompts, with the token that follows each; arguments as those of `decode`."""
    engine.use(threads)
    engine.begin(batch, tokens)
    ids = prompts(engine, batch, tokens)

    def read() -> int:
        engine.rewind(0)
        engine.read(ids)
        return tokens * batch

    return per_second(read, seconds)


def text(engine: Texts, threads: int, seconds: float, prompt: int, tokens: int) -> dict[str, list[float]]:
    """Seconds from a prompt to its first token ("ttft"), and from each token to the next ("inter_token").

    Args:
        engine: that computes.
        threads: that it has.
        seconds: to begin new texts for.
        prompt: tokens of a prompt.
        tokens: of each text.
    """
    engine.use(threads)
    engine.begin(1, prompt + tokens)
    ids = prompts(engine, 1, prompt)
    first: list[float] = []
    between: list[float] = []
    started = time.perf_counter()
    while not first or time.perf_counter() - started < seconds:
        engine.rewind(0)
        before = time.perf_counter()
        last = engine.read(ids)
        now = time.perf_counter()
        first.append(now - before)
        for _ in range(tokens - 1):
            before, last = now, engine.read([last])
            now = time.perf_counter()
            between.append(now - before)
    return {"ttft": first, "inter_token": between}


def one_text(engine: Texts, threads: int, seconds: float, prompt: int, tokens: int) -> float:
    """Seconds from the first token of one text to its last: what a process does after its cold start."""
    return sum(text(engine, threads, 0, prompt, tokens)["inter_token"])


def prompts(engine: Texts, batch: int, tokens: int) -> list[list[int]]:
    """Ids without meaning; speed does not depend on them."""
    return [[i % engine.vocab_size for i in range(tokens)]] * batch

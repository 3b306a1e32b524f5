"""Logits of many texts in large batches, in which common beginnings are computed once.

Knows tokens and logits, nothing of tasks. A *lane* is a piece of the cache that holds one text. Texts are sorted, and
each lane takes a stretch of them, one after another; of a text it computes only what differs from the one before: what
follows overwrites what is no longer needed. So the four answers to a question cost one question, and a lane reads a
few-shot prompt once.

    scorer = Scorer(llm)
    scores = scorer.score([([1, 2, 3], [4, 5]), ([1, 2, 3], [6])])
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from onebit.engine.memory import position_bytes
from onebit.engine.model import BLOCK_TOKENS, Float32, Int32, KvCache

if TYPE_CHECKING:
    from onebit.llm import LLM

Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]

# Tokens of one forward pass, and bytes of logits that it may return.
MAX_STEP_TOKENS = 512
MAX_LOGITS_BYTES = 2**26
# Texts side by side, and bytes of their keys and values.
MAX_LANES = 32
MAX_CACHE_BYTES = 2**30
# Rows whose exponentials are summed at once: they stay near the processor.
SUM_ROWS = 8


class Score(NamedTuple):
    """How a model takes the end of a text.

    Args:
        log_probabilities: float64 [n], of each token of the end, in nats.
        is_best: bool [n], whether it was the likeliest one.
    """

    log_probabilities: Float64
    is_best: Bool


class Lane:
    """A piece of the cache, and the tokens whose keys and values are in it."""

    def __init__(self, blocks: Int32) -> None:
        self.blocks = blocks
        self.tokens = np.empty(0, np.int32)


class Scorer:
    """A model that reads many texts. Logits are the same bits as those of each text alone.

    Args:
        llm: the model.
        on_tokens: called with the number of tokens of every pass that was computed.
    """

    def __init__(self, llm: "LLM", on_tokens: Callable[[int], None] = lambda n: None) -> None:
        self.llm = llm
        self.model = llm.model
        self.config = llm.config
        self.on_tokens = on_tokens
        self._lanes: list[Lane] = []
        self._cache: KvCache | None = None
        self._logits: Float32 | None = None

    def score(self, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
        """Log-probabilities of the ends of texts.

        Args:
            texts: of each its beginning, of at least one token, and the end that is scored.
        """
        ids = [np.array([*start, *end], np.int32) for start, end in texts]
        scores = [Score(np.empty(len(end)), np.empty(len(end), np.bool_)) for _, end in texts]
        # The last token is only predicted, never read.
        inputs, firsts = [text[:-1] for text in ids], [len(start) - 1 for start, _ in texts]
        for i, row, logits_RV in self.logits(inputs, firsts):
            targets = ids[i][row + 1 : row + 1 + len(logits_RV)]
            chosen = logits_RV[np.arange(len(targets)), targets]
            at = row - firsts[i]
            scores[i].log_probabilities[at : at + len(targets)] = chosen - log_sums(logits_RV)
            scores[i].is_best[at : at + len(targets)] = logits_RV.argmax(axis=1) == targets
        return scores

    def logits(self, texts: Sequence[Int32], firsts: Sequence[int]) -> Iterator[tuple[int, int, Float32]]:
        """Logits of the ends of texts, in any order.

        Args:
            texts: int32 [T] each, token ids, at most as many as the context of the model holds.
            firsts: of each text, the first token whose logits are wanted.

        Yields:
            Which text, its first token here, and float32 [R, V], the logits after that token and those that follow
            it; overwritten by the next ones.

        Raises:
            ValueError: a text that is empty or longer than the context, or ids outside the vocabulary.
            MemoryError: the keys and values of one text do not fit into memory.
        """
        for text in texts:
            if not 0 < len(text) <= self.config.max_seq_len:
                raise ValueError(f"a text has {len(text)} tokens; expected 1 to {self.config.max_seq_len}")
        if not texts:
            return
        groups, n_new = _groups(texts, firsts)
        # As many lanes as fill a pass.
        n_lanes = min(-(-MAX_STEP_TOKENS * len(texts) // n_new), len(groups), MAX_LANES)
        self._make_lanes(max(map(len, texts)), n_lanes)
        bounds = np.linspace(0, len(groups), len(self._lanes) + 1).astype(int)
        stretches = [
            [i for group in groups[begin:end] for i in group]
            for begin, end in zip(bounds, bounds[1:], strict=False)
        ]
        for step in range(max(map(len, stretches))):
            turn = [(lane, s[step]) for lane, s in zip(self._lanes, stretches, strict=True) if step < len(s)]
            yield from self._read([(lane, i, texts[i], firsts[i]) for lane, i in turn])

    def _make_lanes(self, n_tokens: int, n_lanes: int) -> None:
        """Lanes for texts of so many tokens; those that are there and long enough keep what they hold."""
        n_blocks = -(-n_tokens // BLOCK_TOKENS)
        block_bytes = BLOCK_TOKENS * position_bytes(self.config, self.llm.kv_cache)
        n_lanes = max(1, min(n_lanes, MAX_CACHE_BYTES // (n_blocks * block_bytes)))
        if len(self._lanes) == n_lanes and len(self._lanes[0].blocks) >= n_blocks:
            return
        self._cache = self.model.new_cache(n_lanes * n_blocks, self.llm.kv_cache)
        blocks = np.arange(n_lanes * n_blocks, dtype=np.int32).reshape(n_lanes, n_blocks)
        self._lanes = [Lane(row) for row in blocks]

    def _read(self, turn: list[tuple[Lane, int, Int32, int]]) -> Iterator[tuple[int, int, Float32]]:
        """Compute one text of each lane, in passes of bounded size."""
        assert self._cache is not None
        row_bytes = 4 * self.config.vocab_size
        max_rows = max(1, MAX_LOGITS_BYTES // row_bytes)
        if self._logits is None:
            self._logits = np.empty((min(max_rows, MAX_STEP_TOKENS), self.config.vocab_size), np.float32)
        waiting = [
            (lane, i, text, first, min(_n_common(lane.tokens, text), first)) for lane, i, text, first in turn
        ]
        waiting.reverse()
        while waiting:
            room, rows_left, batch = MAX_STEP_TOKENS, len(self._logits), []
            while waiting and room and rows_left:
                lane, i, text, first, start = waiting.pop()
                stop = min(len(text), start + room, max(start, first) + rows_left)
                batch.append((lane, i, text, first, start, stop))
                room -= stop - start
                rows_left -= max(0, stop - max(start, first))
                if stop < len(text):
                    waiting.append((lane, i, text, first, stop))
                    # A pass holds one piece of a text.
                    break
            yield from self._pass(batch)

    def _pass(
        self, batch: list[tuple[Lane, int, Int32, int, int, int]]
    ) -> Iterator[tuple[int, int, Float32]]:
        assert self._cache is not None and self._logits is not None
        tokens = np.concatenate([text[start:stop] for _, _, text, _, start, stop in batch])
        positions = np.concatenate([np.arange(start, stop, dtype=np.int32) for *_, start, stop in batch])
        starts = np.cumsum([0, *(stop - start for *_, start, stop in batch)], dtype=np.int32)
        tables = np.stack([lane.blocks for lane, *_ in batch])
        wanted = [
            np.arange(max(start, first), stop, dtype=np.int32) - start + begin
            for (_, _, _, first, start, stop), begin in zip(batch, starts[:-1].tolist(), strict=True)
        ]
        rows = np.concatenate(wanted).astype(np.int32)
        for lane, _, text, _, start, _ in batch:
            lane.tokens = text[:start]
        logits_RV = self.model.forward(
            tokens, positions, starts, tables, rows, self._cache, out=self._logits[: len(rows)]
        )
        self.on_tokens(len(tokens))
        at = 0
        for (lane, i, text, first, start, stop), its_rows in zip(batch, wanted, strict=True):
            lane.tokens = text[:stop]
            if len(its_rows):
                yield i, max(start, first), logits_RV[at : at + len(its_rows)]
                at += len(its_rows)


def log_sums(logits_RV: Float32) -> Float64:
    """log(sum(exp(logits))) of each row: float64 [R]; logits minus it are log-probabilities."""
    sums = np.empty(len(logits_RV))
    for begin in range(0, len(logits_RV), SUM_ROWS):
        x = logits_RV[begin : begin + SUM_ROWS]
        top = x.max(axis=1, keepdims=True)
        of_exp = np.exp(x - top).sum(axis=1, dtype=np.float64)
        sums[begin : begin + SUM_ROWS] = top[:, 0] + np.log(of_exp)
    return sums


def _groups(texts: Sequence[Int32], firsts: Sequence[int]) -> tuple[list[list[int]], int]:
    """Texts in order, in one group those that share half of themselves with the one before; and all new tokens."""
    order = sorted(range(len(texts)), key=lambda i: texts[i].tolist())
    groups, n_new = [[order[0]]], len(texts[order[0]])
    for before, i in itertools.pairwise(order):
        n_known = min(_n_common(texts[before], texts[i]), firsts[i])
        n_new += len(texts[i]) - n_known
        if 2 * n_known > len(texts[i]):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups, n_new


def _n_common(a: Int32, b: Int32) -> int:
    """How many tokens two texts begin with alike."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n

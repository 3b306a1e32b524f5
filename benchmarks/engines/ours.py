"""onebit, driven where its users drive it: `Model.forward`, and `LLM.generate` for what Python adds to it."""

import os
import time
from functools import cached_property

import numpy as np

import onebit
from onebit.bench.timing import memory_bytes, per_second
from onebit.engine.engine import MAX_STEP_TOKENS
from onebit.engine.memory import position_bytes
from onebit.engine.model import BLOCK_TOKENS, Float32, KvCache, Model, sample

# Steps between two looks at the clock.
STEPS = 16
SEQUENCES = 8
# A page of the system, in a cache that must not consist of pages that were never written.
PAGE_BYTES = 4096
OVERHEAD_TOKENS = 128


class Ours:
    """One .onebit file. Models for several numbers of threads share its mapped weights.

    Args:
        path: the file.
        isa: instruction set, None for the best.
        threads: of the model that is made at once, to time the loading.
    """

    def __init__(self, path: str, threads: int, isa: str | None = None) -> None:
        self._file_bytes = os.path.getsize(path)
        if isa is not None:
            os.environ["ONEBIT_ISA"] = isa
        started = time.perf_counter()
        self._llm = onebit.load(path, threads)
        self.load_s = time.perf_counter() - started
        default = self._llm.model
        self._models = {(threads, False, default.isa): default}
        self._caches: dict[str, KvCache] = {}
        self.info = {"version": f"onebit {onebit.__version__}", "isa": default.isa}

    def decode(
        self, threads: int, seconds: float, context: int = 0, shortlist: bool = False, kv_cache: str = "bf16"
    ) -> float:
        """Tokens per second of one text: the step, all exact logits or those of a shortlist, the greedy draw.

        Args:
            threads: that compute.
            seconds: to go on for, about.
            context: positions of the text at the end of the run, 0 for a text that begins.
            shortlist: find the best token through int4 rows.
            kv_cache: number format of keys and values.
        """
        model = self._model(threads, shortlist)
        cache = self._cache(model, max(context, STEPS), kv_cache)
        first = max(context - STEPS, 0)
        table = np.arange(-(-max(context, STEPS) // BLOCK_TOKENS), dtype=np.int32).reshape(1, -1)
        starts, row, top = (
            np.array([0, 1], np.int32),
            np.zeros(1, np.int32),
            np.array([int(shortlist)], np.int32),
        )

        def text() -> int:
            token = np.ones(1, np.int32)
            for position in range(first, first + STEPS):
                at = np.array([position], np.int32)
                logits = model.forward(token, at, starts, table, row, cache, top)
                token[0] = self._draw(logits, token)
            return STEPS

        return per_second(text, seconds)

    def linear(self, threads: int, seconds: float) -> float:
        """Steps per second of one token without its head, at the first position: the layers' matrices."""
        model = self._model(threads)
        cache = self._cache(model, STEPS)
        zero, starts, table = np.zeros(1, np.int32), np.array([0, 1], np.int32), np.zeros((1, 1), np.int32)
        none = np.zeros(0, np.int32)

        def steps() -> int:
            for _ in range(STEPS):
                model.forward(zero, zero, starts, table, none, cache)
            return STEPS

        return per_second(steps, seconds)

    def prefill(self, threads: int, seconds: float, tokens: int = 512, isa: str | None = None) -> float:
        """Tokens per second of a prompt, in the steps that the engine would take, with the logits of its end."""
        model = self._model(threads, isa=isa)
        cache = self._cache(model, tokens)
        table = np.arange(-(-tokens // BLOCK_TOKENS), dtype=np.int32).reshape(1, -1)
        ids = np.arange(tokens, dtype=np.int32) % model.config.vocab_size

        def prompt() -> int:
            for start in range(0, tokens, MAX_STEP_TOKENS):
                part = ids[start : start + MAX_STEP_TOKENS]
                is_last = start + len(part) == tokens
                rows = np.array([len(part) - 1] if is_last else [], np.int32)
                at = np.arange(start, start + len(part), dtype=np.int32)
                model.forward(part, at, np.array([0, len(part)], np.int32), table, rows, cache)
            return tokens

        return per_second(prompt, seconds)

    def batch(self, threads: int, seconds: float) -> float:
        """Tokens per second of eight texts together, each drawn greedily."""
        model = self._model(threads)
        cache = self._cache(model, SEQUENCES * BLOCK_TOKENS)
        table = np.arange(SEQUENCES, dtype=np.int32).reshape(-1, 1)
        starts, rows = np.arange(SEQUENCES + 1, dtype=np.int32), np.arange(SEQUENCES, dtype=np.int32)

        def texts() -> int:
            tokens = np.ones(SEQUENCES, np.int32)
            for position in range(STEPS):
                at = np.full(SEQUENCES, position, np.int32)
                logits = model.forward(tokens, at, starts, table, rows, cache)
                tokens = np.array([self._draw(logits[i : i + 1], tokens[i : i + 1]) for i in rows], np.int32)
            return STEPS * SEQUENCES

        return per_second(texts, seconds)

    def overhead(self, threads: int, seconds: float) -> float:
        """Share of a step of the shipped model that is not spent in `Model.forward`, in percent."""
        model = self._shipped.model
        forward, inside = model.forward, 0.0

        def timed(*arguments: object) -> Float32:
            nonlocal inside
            begun = time.perf_counter()
            logits = forward(*arguments)
            inside += time.perf_counter() - begun
            return logits

        model.forward = timed  # type: ignore[method-assign]
        try:
            whole, begun = 0.0, time.perf_counter()
            while whole == 0 or time.perf_counter() - begun < seconds:
                started = time.perf_counter()
                self._shipped.generate(
                    "Once upon a time", max_tokens=OVERHEAD_TOKENS, seed=7, ignore_eos=True
                )
                whole += time.perf_counter() - started
        finally:
            model.forward = forward  # type: ignore[method-assign]
        return 100 * (1 - inside / whole)

    def footprint(self, threads: int, seconds: float) -> float:
        """Bytes of the resident set, at its peak, that are neither file nor keys and values."""
        tokens = MAX_STEP_TOKENS + BLOCK_TOKENS
        self.prefill(threads, 0, tokens)
        self.decode(threads, 0, tokens)
        kv_bytes = tokens * position_bytes(self._llm.config)
        return memory_bytes()["peak_bytes"] - self._file_bytes - kv_bytes

    @cached_property
    def _shipped(self) -> onebit.LLM:
        # Guesses would make steps of several tokens, and hide what one costs.
        return onebit.load(threads=max(threads for threads, _, _ in self._models), speculation=False)

    def _model(self, threads: int, shortlist: bool = False, isa: str | None = None) -> Model:
        key = (threads, shortlist, isa or self._llm.model.isa)
        if key not in self._models:
            self._models[key] = Model(self._llm.checkpoint, threads, key[2], int4_shortlist=shortlist)
        return self._models[key]

    def _cache(self, model: Model, positions: int, kv_cache: str = "bf16") -> KvCache:
        """A cache for so many positions whose every page was written once.

        Zeros cost as much as real keys, but only in memory of their own: pages that nobody wrote are all one and the
        same page of the system's, which stays in the processor's cache. So a token is computed wherever a page may
        begin, as the text of its block alone.
        """
        n_blocks = -(-positions // BLOCK_TOKENS)
        held = self._caches.get(kv_cache)
        if held is not None and held.n_blocks >= n_blocks:
            return held
        cache = self._caches[kv_cache] = model.new_cache(n_blocks, kv_cache)
        # Half a page of one head's keys: wherever blocks begin, no page is missed. Other formats are no larger.
        step = min(max(PAGE_BYTES // 2 // (2 * model.config.d_head), 1), BLOCK_TOKENS)
        slots = np.arange(0, BLOCK_TOKENS, step, np.int32)
        at, blocks = np.tile(slots, n_blocks), np.repeat(np.arange(n_blocks, dtype=np.int32), len(slots))
        none = np.zeros(0, np.int32)
        for start in range(0, len(at), MAX_STEP_TOKENS):
            part = at[start : start + MAX_STEP_TOKENS]
            table = blocks[start : start + MAX_STEP_TOKENS].reshape(-1, 1)
            starts = np.arange(len(part) + 1, dtype=np.int32)
            model.forward(np.zeros(len(part), np.int32), part, starts, table, none, cache)
        return cache

    @staticmethod
    def _draw(logits: Float32, ids: np.ndarray) -> int:
        return sample(logits, ids, 0.0, 0, 1.0, 0.0, 1.0, 1, 1)[0]

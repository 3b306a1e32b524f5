"""onebit: `Model.forward` and the greedy draw, as `onebit.engine` calls them."""

import time
from dataclasses import replace

import numpy as np

from onebit import __version__, formats
from onebit.engine.engine import MAX_STEP_TOKENS
from onebit.engine.model import BLOCK_TOKENS, KvCache, Model, sample
from onebit.llm import LLM


class Ours:
    """One .onebit file or run folder. Models for several numbers of threads share its weights.

    Args:
        path: the file or folder.
        threads: of the model that is made at once, to time the loading.
        kv_cache: number format of keys and values.
        activations: run the model as if it had been trained for inputs of this width, None for its own: the speed is
            that of such a model, the text is not.
    """

    def __init__(
        self, path: str, threads: int, kv_cache: str = "bf16", activations: str | None = None
    ) -> None:
        started = time.perf_counter()
        checkpoint = formats.read(path)
        if activations is not None:
            # ModelConfig checks the name.
            config = replace(checkpoint.config, activations=activations)  # type: ignore[arg-type]
            checkpoint = replace(checkpoint, config=config)
        self._llm = LLM(checkpoint, threads, kv_cache, speculation=False)
        self.load_s = time.perf_counter() - started
        self._model = self._llm.model
        self._models = {threads: self._model}
        self._cache: KvCache | None = None
        self._tables = np.zeros((1, 1), np.int32)
        self._n = 0
        self.vocab_size = self._llm.config.vocab_size
        self.info = {
            "version": f"onebit {__version__}",
            "settings": f"{self._model.isa} kernels, steps of at most {MAX_STEP_TOKENS} tokens",
            "kv_cache": kv_cache,
            "label": self._llm.label,
        }

    def use(self, threads: int) -> None:
        """Compute on so many threads from now on."""
        if threads not in self._models:
            self._models[threads] = Model(self._llm.checkpoint, threads)
        self._model = self._models[threads]

    def begin(self, batch: int, positions: int) -> None:
        """Start empty texts, with room for so many tokens each."""
        n_blocks = -(-positions // BLOCK_TOKENS)
        if self._cache is None or self._cache.n_blocks < batch * n_blocks:
            self._cache = self._model.new_cache(batch * n_blocks, self._llm.kv_cache)
        self._tables = np.arange(batch * n_blocks, dtype=np.int32).reshape(batch, n_blocks)
        self._n = 0

    def read(self, tokens: list[list[int]]) -> list[int]:
        """Append tokens to each text; returns the likeliest next one of each."""
        assert self._cache is not None
        ids_BT = np.array(tokens, np.int32)
        batch, length = ids_BT.shape
        columns = max(MAX_STEP_TOKENS // batch, 1)
        for start in range(0, length, columns):
            part = np.ascontiguousarray(ids_BT[:, start : start + columns])
            width, first = part.shape[1], self._n + start
            starts = np.arange(0, batch * width + 1, width, dtype=np.int32)
            rows = starts[1:] - np.int32(1) if start + width == length else starts[:0]
            at = np.tile(np.arange(first, first + width, dtype=np.int32), batch)
            best = np.ones(len(rows), np.int32)
            logits = self._model.forward(part.reshape(-1), at, starts, self._tables, rows, self._cache, best)
        self._n += length
        last = ids_BT[:, -1:]
        return [
            sample(logits[i : i + 1], last[i], 0.0, 0, 1.0, 0.0, 1.0, 1, self._n)[0] for i in range(batch)
        ]

    def rewind(self, n: int) -> None:
        """Keep only the first n tokens of each text."""
        self._n = n

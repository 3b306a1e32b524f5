"""llama.cpp through llama-cpp-python, one GGUF file: the calls that its own benchmark makes.

Settings are those of a careful user: the file mapped, batches of 512, threads as asked. Keys and values are f16 and
flash attention is left to llama.cpp, as by default.
"""

import ctypes
import time

import llama_cpp as lib
import numpy as np

PROMPT = 512
# The library keeps it for as long as the process runs.
_QUIET = lib.llama_log_callback(lambda *_: None)


class Llama:
    """One GGUF file.

    Args:
        path: the file.
        threads: of the loading and the first context.
    """

    def __init__(self, path: str, threads: int) -> None:
        lib.llama_log_set(_QUIET, None)
        started = time.perf_counter()
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        if not self._model:
            raise ValueError(f"llama.cpp refuses {path}; expected a GGUF file that it can run")
        self.vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self._threads = threads
        self._context, self._room, self._n = None, (0, 0), 0
        self.begin(1, PROMPT)
        self.load_s = time.perf_counter() - started
        self.info = {
            "version": f"llama-cpp-python {lib.__version__}",
            "build": lib.llama_print_system_info().decode(),
            "settings": f"n_batch = n_ubatch = {PROMPT}, mmap, flash attention auto",
            "kv_cache": "f16",
        }

    def use(self, threads: int) -> None:
        """Compute on so many threads from now on."""
        self._threads = threads
        lib.llama_set_n_threads(self._context, threads, threads)

    def begin(self, batch: int, positions: int) -> None:
        """Start empty texts, with room for so many tokens each."""
        if self._room[0] != batch or self._room[1] < positions:
            if self._context:
                lib.llama_free(self._context)
            params = lib.llama_context_default_params()
            # It divides the room among texts, and rounds it.
            params.n_ctx, params.n_seq_max = batch * -(-positions // 256) * 256, batch
            params.n_batch = params.n_ubatch = PROMPT
            params.n_threads = params.n_threads_batch = self._threads
            self._context, self._room = lib.llama_init_from_model(self._model, params), (batch, positions)
            if not self._context:
                raise ValueError(
                    f"llama.cpp makes no context for {batch} texts of {positions} tokens; expected one"
                )
        self.rewind(0)

    def read(self, tokens: list[list[int]]) -> list[int]:
        """Append tokens to each text; returns the likeliest next one of each."""
        length = len(tokens[0])
        columns = max(PROMPT // len(tokens), 1)
        for start in range(0, length, columns):
            part = [ids[start : start + columns] for ids in tokens]
            self._run(part, is_last=start + columns >= length)
            self._n += len(part[0])
        if len(tokens) == 1:
            return [self._best(-1)]
        return [self._best((i + 1) * len(part[0]) - 1) for i in range(len(tokens))]

    def rewind(self, n: int) -> None:
        """Keep only the first n tokens of each text."""
        memory = lib.llama_get_memory(self._context)
        if n == 0:
            lib.llama_memory_clear(memory, False)
        else:
            lib.llama_memory_seq_rm(memory, -1, n, -1)
        self._n = n

    def _run(self, part: list[list[int]], is_last: bool) -> None:
        width, n = len(part[0]), len(part) * len(part[0])
        if len(part) == 1:
            # Positions follow from the memory. The batch points to the ids, which must live as long.
            ids = (ctypes.c_int32 * n)(*part[0])
            result = lib.llama_decode(self._context, lib.llama_batch_get_one(ids, n))
        else:
            batch = lib.llama_batch_init(n, 0, 1)
            batch.n_tokens = n
            for i in range(n):
                text, at = divmod(i, width)
                batch.token[i], batch.pos[i] = part[text][at], self._n + at
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, text
                batch.logits[i] = is_last and at == width - 1
            result = lib.llama_decode(self._context, batch)
            lib.llama_batch_free(batch)
        if result:
            raise ValueError(f"llama_decode of {n} tokens returned {result}; expected 0")
        lib.llama_synchronize(self._context)

    def _best(self, row: int) -> int:
        logits = lib.llama_get_logits_ith(self._context, row)
        return int(np.argmax(np.ctypeslib.as_array(logits, (self.vocab_size,))))

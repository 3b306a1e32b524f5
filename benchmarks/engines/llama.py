"""llama.cpp through llama-cpp-python, one GGUF file: the calls that its own benchmark makes.

Settings are those of a careful user: built from source for this machine, the file mapped, batches of 512, threads as
asked. Keys and values are f16 and flash attention is left to llama.cpp, as by default. No token is drawn.
"""

import ctypes
import time

import llama_cpp as lib

from engines.timing import per_second

PROMPT = 512
TEXT = 32
CONTEXT = 1024


class Llama:
    """One GGUF file.

    Args:
        path: the file.
        threads: of the loading and the first context.
    """

    def __init__(self, path: str, threads: int) -> None:
        self._quiet = lib.llama_log_callback(lambda *_: None)
        lib.llama_log_set(self._quiet, None)
        started = time.perf_counter()
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        if not self._model:
            raise ValueError(f"llama.cpp refuses {path}; expected a GGUF file that it can run")
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = CONTEXT, PROMPT, PROMPT
        params.n_threads = params.n_threads_batch = threads
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise ValueError(f"llama.cpp makes no context for {path}; its arguments may have changed")
        self.load_s = time.perf_counter() - started
        self.info = {
            "version": f"llama-cpp-python {lib.__version__}",
            "build": lib.llama_print_system_info().decode(),
            "settings": f"n_batch = n_ubatch = {PROMPT}, mmap, f16 keys and values, flash attention auto",
        }

    def decode(self, threads: int, seconds: float) -> float:
        """Tokens per second of a text that begins."""

        def text() -> int:
            self._clear(threads)
            for _ in range(TEXT):
                self._run([1])
            return TEXT

        return per_second(text, seconds)

    def prefill(self, threads: int, seconds: float, tokens: int = 512) -> float:
        """Tokens per second of a prompt, with the logits of its end."""

        def prompt() -> int:
            self._clear(threads)
            for start in range(0, tokens, PROMPT):
                self._run(range(start, min(start + PROMPT, tokens)))
            return tokens

        return per_second(prompt, seconds)

    def _clear(self, threads: int) -> None:
        lib.llama_set_n_threads(self._context, threads, threads)
        lib.llama_memory_clear(lib.llama_get_memory(self._context), False)

    def _run(self, tokens: list[int] | range) -> None:
        n = len(tokens)
        ids = (ctypes.c_int32 * n)(*tokens)
        result = lib.llama_decode(self._context, lib.llama_batch_get_one(ids, n))
        if result:
            raise ValueError(f"llama_decode of {n} tokens returned {result}; expected 0")
        lib.llama_synchronize(self._context)

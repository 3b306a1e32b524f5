"""The machine's memory as an engine: how fast it can be read, measured in turn with those who read it."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from onebit.bench.timing import per_second


class Memory:
    """Reads an array over and over with numpy, one thread for each part, and does next to nothing with it.

    A bitwise or over int64 is compiled for the widest vectors and lets other threads run meanwhile. Beside the best of
    four hand-written loops in C (benchmarks/limits.c) it read 0.96 to 1.00 times as fast on a Zen 4.

    Args:
        n_bytes: of the array: those that a step of the model reads, so that a cache of the processor helps this limit
            no more than it helps the model.
        threads: of the first measurement.
    """

    def __init__(self, n_bytes: int, threads: int) -> None:
        started = time.perf_counter()
        # Written, for pages that were never written are one and the same.
        self._data = np.ones(-(-n_bytes // 8), np.int64)
        self.load_s = time.perf_counter() - started
        self.info = {"version": f"numpy {np.__version__}", "settings": f"{self._data.nbytes:,} bytes"}

    def bandwidth(self, threads: int, seconds: float) -> float:
        """Bytes per second that threads read together, none waiting for another."""
        parts = np.array_split(self._data, threads)

        def one(part: np.ndarray) -> float:
            def read() -> int:
                np.bitwise_or.reduce(part)
                return part.nbytes

            return per_second(read, seconds)

        with ThreadPoolExecutor(threads) as pool:
            return sum(pool.map(one, parts))

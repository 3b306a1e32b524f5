"""The machine itself as an engine: what it could do, measured in turn with those who try."""

import time

import limits
import numpy as np


class Machine:
    """Limits of memory and arithmetic.

    Args:
        n_bytes: of the array that is read: those that a step of the model reads, so that a cache of the processor
            helps a limit no more than it helps the model.
        threads: ignored; each measurement has its own.
    """

    def __init__(self, n_bytes: int, threads: int) -> None:
        started = time.perf_counter()
        # Written, for pages that were never written are one and the same. numpy asks for large pages.
        self._data = np.ones(-(-n_bytes // 8), np.int64)
        self.load_s = time.perf_counter() - started
        self.info = {
            "dot": limits.dot_name(),
            "amx": limits.peak("amx", 1, 0) > 0,
            "read_bytes": self._data.nbytes,
        }

    def read(self, threads: int, seconds: float) -> float:
        """Bytes per second from memory: the best of one and four streams, with and without prefetch."""
        kinds = limits.READERS
        return max(limits.bandwidth(self._data, threads, *kind, seconds / len(kinds)) for kind in kinds)

    def dot(self, threads: int, seconds: float) -> float:
        """int8 multiply-adds per second of the best dot product."""
        return limits.peak("dot", threads, seconds)

    def amx(self, threads: int, seconds: float) -> float:
        """int8 multiply-adds per second of matrix tiles."""
        return limits.peak("amx", threads, seconds)

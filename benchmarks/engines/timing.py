"""What all engines share: a clock around their work, and the memory that their process holds."""

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path


def per_second(work: Callable[[], int], seconds: float) -> float:
    """How much is done per second, over at least one call and about so many seconds.

    Args:
        work: does something and returns how much that was, as in tokens.
        seconds: to go on for.
    """
    started, done = time.perf_counter(), 0
    while done == 0 or time.perf_counter() - started < seconds:
        done += work()
    return done / (time.perf_counter() - started)


def resident_bytes(peak: bool = False) -> int:
    """The resident set of this process now, or at its peak; mapped files are in it."""
    status = Path("/proc/self/status")
    if status.exists():
        name = "VmHWM:" if peak else "VmRSS:"
        return next(
            int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(name)
        )
    # Elsewhere the system tells the peak only, in kilobytes or, on macOS, in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

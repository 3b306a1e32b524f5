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


def memory_bytes() -> dict[str, int]:
    """At their peaks: the resident set of this process, mapped files in it, and where it is known its address space."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = (line.split() for line in status.read_text().splitlines())
        found = {words[0]: int(words[1]) * 1024 for words in lines if words[0] in ("VmHWM:", "VmPeak:")}
        return {"peak_bytes": found["VmHWM:"], "address_bytes": found["VmPeak:"]}
    # Elsewhere the system tells the resident set only, in kilobytes or, on macOS, in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"peak_bytes": peak, "address_bytes": 0}

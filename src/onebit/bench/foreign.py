"""Who else used the processors while something was measured: other processes, our own idle ones, the host.

meter = Meter()
before = meter.look(active=[worker.pid], idle=[other.pid])
...
share = usage(before, meter.look(...), meter.cpus).foreign
"""

import os
import resource
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

# Of all CPUs: above this a figure is not quoted.
LIMIT = 0.05


class Look(NamedTuple):
    """Seconds since some moment: on the clock, and of all processors together.

    Args:
        clock_s: that went by.
        busy_s: that processors worked, for whomever.
        stolen_s: that the host kept from this machine.
        active_s: that the measurement used: this process, its finished children, and the engine that is measured.
        idle_s: that our engines used which should have slept.
    """

    clock_s: float
    busy_s: float
    stolen_s: float
    active_s: float
    idle_s: float


class Usage(NamedTuple):
    """Shares of all processors during a measurement, from 0 to 1.

    Args:
        foreign: work of others, the host's among it: what no engine of the measurement did.
        stolen: of this, what the host kept.
        idle: of this, what our own sleeping engines did.
    """

    foreign: float
    stolen: float
    idle: float


class Meter:
    """Reads /proc of Linux; elsewhere nothing is known.

    Args:
        proc: the folder.
    """

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._tick_s = 1 / os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 0.01
        self.cpus = os.cpu_count() or 1

    def look(self, active: Iterable[int], idle: Iterable[int] = ()) -> Look | None:
        """The clocks now, or None where the system does not tell."""
        try:
            fields = (self._proc / "stat").read_text().split("\n", 1)[0].split()[1:]
        except OSError:
            return None
        user, nice, system, _, _, irq, softirq, steal, *_ = (int(field) * self._tick_s for field in fields)
        own = sum(
            sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        )
        return Look(
            time.perf_counter(),
            user + nice + system + irq + softirq,
            steal,
            own + sum(map(self._process_s, active)),
            sum(map(self._process_s, idle)),
        )

    def _process_s(self, pid: int) -> float:
        try:
            stat = (self._proc / str(pid) / "stat").read_text()
        except OSError:
            # It ended; what it used is among that of finished children.
            return 0.0
        # The name in parentheses may hold anything, also parentheses and spaces.
        utime, stime = stat.rpartition(")")[2].split()[11:13]
        return (int(utime) + int(stime)) * self._tick_s


def usage(before: Look, after: Look, cpus: int) -> Usage:
    """What others used between two looks."""
    clock, busy, stolen, active, idle = (b - a for a, b in zip(before, after, strict=True))
    capacity = max(clock * cpus, 1e-9)
    return Usage(max(busy - active, 0.0) / capacity + stolen / capacity, stolen / capacity, idle / capacity)

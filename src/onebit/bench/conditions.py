"""What a figure depends on besides the model: clock, load, pinning. Told with the result, and warned of.

conditions = look(threads=2)
for warning in conditions.warnings: ...
"""

import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from onebit.bench import clock
from onebit.bench.foreign import LIMIT, Meter, usage

# How long others are watched before the start.
PROBE_S = 0.3


@dataclass
class Conditions:
    """The state of the machine while it is measured.

    Args:
        governor: who sets the clock of the CPUs, as in "performance"; several joined by commas; None: not known.
        turbo: whether clocks above the nominal one are allowed; None: not known.
        load: averages of 1, 5 and 15 minutes; empty where the system does not tell.
        pinned: CPUs that the engines are bound to, or None.
        threads: that compute.
        memory_limit: bytes of address space that an engine may take, or None.
        warnings: what may disturb, in words.
        quotable: whether nothing is known that forbids to quote the figures.
    """

    governor: str | None
    turbo: bool | None
    load: list[float]
    pinned: list[int] | None
    threads: int
    memory_limit: int | None
    warnings: list[str] = field(default_factory=list)
    quotable: bool = False


def look(
    threads: int,
    pinned: list[int] | None = None,
    memory_limit: int | None = None,
    check: bool = True,
    root: Path = Path("/"),
) -> Conditions:
    """Look at the machine before a measurement.

    Args:
        threads: that will compute.
        pinned: CPUs that the engines are bound to, or None.
        memory_limit: bytes of address space that an engine may take, or None.
        check: warn of what may disturb.
        root: folder that holds proc/ and sys/, of Linux.
    """
    load = list(os.getloadavg()) if hasattr(os, "getloadavg") else []
    governor = ", ".join(sorted(clock.governors(root))) or None
    found = Conditions(governor, clock.turbo(root), load, pinned, threads, memory_limit)
    if not check:
        return found
    if found.governor is None:
        found.warnings.append(
            "the system shows no governor (a virtual machine?): its clock may change unseen"
        )
    elif found.governor != "performance" and not clock.is_clock_chosen_by_cpu(root):
        found.warnings.append(
            f"the governor is {found.governor}: clocks rise late; as root: cpupower frequency-set -g performance"
        )
    if found.turbo:
        found.warnings.append("turbo is on: clocks depend on heat and on how many cores work")
    cpus = len(pinned) if pinned else _usable_cpus()
    if threads > cpus:
        found.warnings.append(f"{threads} threads share {cpus} CPUs: they wait for each other")
    share = background(root)
    if share is not None and share > LIMIT:
        found.warnings.append(f"other programs used {min(share, 1):.0%} of the processors before the start")
    return found


def background(root: Path = Path("/"), seconds: float = PROBE_S) -> float | None:
    """Share of all processors that others use now; None where the system does not tell."""
    meter = Meter(root / "proc")
    before = meter.look([])
    time.sleep(seconds)
    after = meter.look([])
    return usage(before, after, meter.cpus).foreign if before and after else None


def parse_cpus(text: str, threads: int) -> list[int]:
    """CPUs to bind to: "0,2-3" as taskset has them, or "auto": one of each core, as many as threads.

    Raises:
        ValueError: not such a list, CPUs that this process may not use, or a system that binds nobody.
    """
    if not hasattr(os, "sched_getaffinity"):
        raise ValueError("--pin: this system binds no process to CPUs; leave it out")
    usable = os.sched_getaffinity(0)
    if text == "auto":
        cores: dict[str, int] = {}
        for cpu in sorted(usable):
            topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
            cores.setdefault(clock.read(topology) or str(cpu), cpu)
        return sorted([*cores.values(), *sorted(usable - set(cores.values()))][:threads])
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise ValueError(f"--pin is {text!r}; expected auto, or CPUs as in 0,2-3")
    found: set[int] = set()
    for item in text.split(","):
        first, _, last = item.partition("-")
        low, high = int(first), int(last or first)
        if low > high:
            raise ValueError(f"--pin is {text!r}; expected a range from the least CPU to the last, as in 2-3")
        # One beyond the last that may be used is enough to be refused; a range may name billions.
        found |= set(range(low, min(high, max(low, max(usable) + 1)) + 1))
    if missing := sorted(found - usable):
        raise ValueError(
            f"--pin names CPU {missing[0]}; this process may use {', '.join(map(str, sorted(usable)))}"
        )
    return sorted(found)


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

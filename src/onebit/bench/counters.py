"""Counters of the hardware: energy through RAPL, cache misses through perf. Each is there, or says why it is not.

rapl = Rapl()
counted = []
if rapl.reason is None:
    with rapl.watch(pid, counted):
        ...
    print(counted, "joules")
"""

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MISSES = "cache-misses"
# Until perf counts a process that it is attached to.
ATTACH_S = 0.2


class Rapl:
    """Energy that the packages of the processors took, all programs on them together.

    Args:
        root: folder of the power domains, of Linux.

    Source: https://docs.kernel.org/power/powercap/powercap.html
    """

    def __init__(self, root: Path = Path("/sys/class/powercap")) -> None:
        # Their parts, as cores and memory, have a second number in the name: intel-rapl:0:1.
        domains = sorted(d for d in root.glob("intel-rapl:*") if d.name.count(":") == 1)
        self._domains = [d for d in domains if (d / "name").read_text().startswith("package")]
        self.reason: str | None = None
        self._seen: list[int] = []
        self._wraps = [0] * len(self._domains)
        if not self._domains:
            self.reason = f"no package in {root}: a virtual machine, or a processor or system without RAPL"
            return
        try:
            self._seen = [int((d / "energy_uj").read_text()) for d in self._domains]
            self._ranges = [int((d / "max_energy_range_uj").read_text()) for d in self._domains]
        except PermissionError as error:
            self.reason = f"{error.filename} may not be read: run as root, or let root make it readable"
        except (OSError, ValueError) as error:
            self.reason = f"RAPL does not answer: {error}"

    def joules(self) -> float:
        """Joules since some moment; counters that began again at zero are continued."""
        assert self.reason is None
        total = 0
        for i, domain in enumerate(self._domains):
            now = int((domain / "energy_uj").read_text())
            if now < self._seen[i]:
                self._wraps[i] += self._ranges[i]
            self._seen[i] = now
            total += now + self._wraps[i]
        return total / 1e6

    @contextmanager
    def watch(self, pid: int, counted: list[float]) -> Iterator[None]:
        """Append the joules that go by meanwhile; they are those of all processes."""
        before = self.joules()
        yield
        counted.append(self.joules() - before)


class Perf:
    """An event that perf counts in another process.

    Args:
        program: its name or path.
        event: what it counts.
    """

    def __init__(self, program: str = "perf", event: str = MISSES) -> None:
        self._program, self._event = program, event
        self.reason = self._try()

    @contextmanager
    def watch(self, pid: int, counted: list[float]) -> Iterator[None]:
        """Append how often the event happens in a process and its threads meanwhile, if perf can tell."""
        command = [self._program, "stat", "-x", ",", "-e", self._event, "-p", str(pid)]
        perf = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            time.sleep(ATTACH_S)
            yield
        finally:
            perf.send_signal(signal.SIGINT)
            n = parse(perf.communicate()[1]).get(self._event)
            counted += [] if n is None else [n]

    def _try(self) -> str | None:
        if shutil.which(self._program) is None:
            return "perf is not installed (Debian: apt install linux-perf; Ubuntu: apt install linux-tools-generic)"
        command = [self._program, "stat", "-x", ",", "-e", self._event, "true"]
        try:
            tried = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"perf does not run: {error}"
        return why_not(tried.stderr, self._event)


def parse(text: str) -> dict[str, float | None]:
    """Counts by event from what `perf stat -x ,` writes: value, unit, event, ...; None: not counted.

    Source: perf-stat(1), CSV FORMAT
    """
    found: dict[str, float | None] = {}
    for line in text.splitlines():
        fields = line.split(",")
        if len(fields) < 3 or line.startswith("#"):
            continue
        # "cache-misses:u" where only the process itself may be looked at.
        event = fields[2].partition(":")[0]
        try:
            found[event] = float(fields[0])
        except ValueError:
            if not fields[0].startswith("<"):
                continue
            found[event] = None
    return found


def why_not(text: str, event: str = MISSES) -> str | None:
    """Why perf, which wrote this, does not count an event; None if it does."""
    if parse(text).get(event) is not None:
        return None
    if "<not supported>" in text:
        return "the processor, or the virtual machine, has no counter for that"
    if "paranoid" in text or "ermission" in text:
        return "perf may not count here: lower /proc/sys/kernel/perf_event_paranoid to 2, or run as root"
    lines = [line for line in text.splitlines() if line.strip()]
    return f"perf does not count that: {lines[0][:200] if lines else 'it says nothing'}"

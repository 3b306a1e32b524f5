"""What Linux tells of a machine, in files below a root: huge pages, limits of containers, who else computes.

    huge_pages(Path("/")), cpu_quota(Path("/")), ticks(Path("/"))

Everything is None, or empty, where the system does not tell: another system, a virtual machine, a container.
"""

from pathlib import Path
from typing import NamedTuple

from onebit.bench.clock import read
from onebit.engine.memory import cgroups

# Of control groups of version 2 and of version 1.
_MEMORY_LIMITS = ("memory.max", "memory.limit_in_bytes")


def cpu_flags(root: Path) -> set[str]:
    """The features of the CPU, in Linux' words."""
    for line in (read(root / "proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(value.split())
    return set()


def huge_pages(root: Path) -> str | None:
    """When programs get huge pages: "always", "madvise" (when they ask) or "never"."""
    modes = read(root / "sys/kernel/mm/transparent_hugepage/enabled") or ""
    return next((mode[1:-1] for mode in modes.split() if mode.startswith("[")), None)


def memory_nodes(root: Path) -> int:
    """Parts of the memory, each near to some of the CPUs."""
    return len(list((root / "sys/devices/system/node").glob("node[0-9]*")))


def cpu_quota(root: Path) -> float | None:
    """CPUs' worth of time that the control groups leave this process; None where nothing limits it."""
    found = []
    for folder in cgroups(root, "cpu"):
        # Version 2 has both numbers in one file.
        limit = read(folder / "cpu.max")
        if limit is None:
            limit = f"{read(folder / 'cpu.cfs_quota_us')} {read(folder / 'cpu.cfs_period_us')}"
        numbers = limit.split()
        if len(numbers) == 2 and all(number.isdecimal() for number in numbers) and int(numbers[1]):
            found.append(int(numbers[0]) / int(numbers[1]))
    return min(found, default=None)


def memory_limit(root: Path) -> tuple[int, int] | None:
    """Bytes that the control groups let this process's group fill, and those of the machine; None without a limit."""
    lines = [line.split() for line in (read(root / "proc/meminfo") or "").splitlines()]
    total = next((int(words[1]) * 1024 for words in lines if words[:1] == ["MemTotal:"]), None)
    limits = [read(folder / name) for folder in cgroups(root, "memory") for name in _MEMORY_LIMITS]
    found = min((int(limit) for limit in limits if limit and limit.isdecimal()), default=None)
    return None if total is None or found is None or found >= total else (found, total)


def throttled(root: Path) -> tuple[int, int]:
    """In how many periods such a limit has stopped the process's group, and of how many."""
    worst = (0, 0)
    for folder in cgroups(root, "cpu"):
        lines = [line.split() for line in (read(folder / "cpu.stat") or "").splitlines()]
        stat = {line[0]: int(line[1]) for line in lines if len(line) == 2 and line[1].isdecimal()}
        found = stat.get("nr_throttled", 0), stat.get("nr_periods", 0)
        worst = max(worst, found)
    return worst


class Ticks(NamedTuple):
    """Time that all CPUs spent since the system started, in ticks.

    Args:
        total: all of it.
        busy: in which they computed something.
        stolen: in which other virtual machines had them.
        processes: name and ticks of each process, by its id.
    """

    total: int
    busy: int
    stolen: int
    processes: dict[int, tuple[str, int]]


def ticks(root: Path) -> Ticks | None:
    """Who has used the CPUs until now."""
    line = (read(root / "proc/stat") or "").partition("\n")[0].split()
    if line[:1] != ["cpu"] or len(line) < 9 or not all(number.isdecimal() for number in line[1:9]):
        return None
    # user, nice, system, idle, iowait, irq, softirq, steal.
    spent = [int(number) for number in line[1:9]]
    processes = {}
    for folder in (root / "proc").glob("[0-9]*"):
        # 1234 (name) S ppid ...: the name may hold anything.
        name, _, rest = (read(folder / "stat") or "").partition("(")[2].rpartition(")")
        fields = rest.split()
        if len(fields) > 12:
            processes[int(folder.name)] = name, int(fields[11]) + int(fields[12])
    return Ticks(sum(spent), sum(spent) - spent[3] - spent[4] - spent[7], spent[7], processes)


class Neighbours(NamedTuple):
    """Who else computed while one looked, in shares of all CPUs.

    Args:
        others: all other processes.
        stolen: other virtual machines.
        busiest: the processes that took most, with their share, the busiest first.
    """

    others: float
    stolen: float
    busiest: list[tuple[str, float]]


def neighbours(before: Ticks, after: Ticks, own: int) -> Neighbours | None:
    """Who else computed between two looks.

    Args:
        before: the first look.
        after: the second.
        own: id of this process.
    """
    total = after.total - before.total
    if total <= 0:
        return None
    spent = {
        pid: (name, ticks - before.processes.get(pid, ("", 0))[1])
        for pid, (name, ticks) in after.processes.items()
    }
    mine = spent.pop(own, ("", 0))[1]
    ranked = sorted(spent.values(), key=lambda found: -found[1])
    return Neighbours(
        others=max(after.busy - before.busy - mine, 0) / total,
        stolen=max(after.stolen - before.stolen, 0) / total,
        busiest=[(name, ticks / total) for name, ticks in ranked[:3] if ticks > 0],
    )

"""The machine: do its kernels compute rightly, how fast is its memory, what slows it down, who else is on it.

    for finding in examine(): print(finding.what)

Each check is a function of plain values, which `onebit.doctor.system` reads below a root.
"""

import os
import platform
import time
from collections.abc import Set
from pathlib import Path

from onebit.bench import clock
from onebit.bench.clock import read
from onebit.bench.engines.memory import Memory
from onebit.doctor import system
from onebit.doctor.finding import Finding, Severity, listed
from onebit.doctor.system import Neighbours
from onebit.engine.memory import HUGE_FROM, HUGE_PAGE, available_bytes, free_huge_bytes
from onebit.engine.model import available_isas, choose_isa, choose_threads, default_threads, self_test

# What the CPU says it has, in Linux' words, and the kernels that are for it; as core/src/kernels/dispatch.cpp asks.
_AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}
KERNELS_OF_FLAGS = {
    "amx": {*_AVX512, "avx512vbmi", "amx_tile", "amx_int8"},
    "avx512vnni": _AVX512,
    "avxvnni": {"avx2", "avx_vnni"},
    "avx2": {"avx2"},
    "neon_i8mm": {"asimddp", "i8mm"},
    "neon_dotprod": {"asimddp"},
}
# Memory that is read to measure it: more than the caches hold.
READ_BYTES = 256 << 20
# Weights that larger caches than this would be needed for.
CACHED_BYTES = 64_000_000
# Shares of all CPUs from which neighbours are worth a warning, and time of which other machines took so much.
BUSY, STOLEN, THROTTLED = 0.10, 0.02, 0.05

_INFO = "onebit info"
_LOAD = "cat /proc/loadavg; ps -eo pcpu,comm --sort=-pcpu | head"


def examine(root: Path = Path("/"), token_bytes: int | None = None, seconds: float = 0.4) -> list[Finding]:
    """Look at this machine.

    Args:
        root: folder that holds proc/ and sys/, of Linux.
        token_bytes: bytes of weights that each token of a model reads, or None.
        seconds: how long the CPUs are watched, and then memory is read; 0 does neither.
    """
    before = system.ticks(root)
    time.sleep(seconds)
    after = system.ticks(root)
    seen = system.neighbours(before, after, os.getpid()) if before and after else None
    found = [
        kernels(available_isas(), self_test(), choose_isa()),
        missing_kernels(system.cpu_flags(root), set(self_test())),
        threads(choose_threads(), default_threads(), system.cpu_quota(root)),
        throttling(*system.throttled(root)),
        memory_limit(system.memory_limit(root), available_bytes(root)),
        neighbours(seen, os.cpu_count() or 1),
        governor(dict(clock.governors(root)), clock.is_clock_chosen_by_cpu(root)),
        turbo(clock.turbo(root)),
        huge_pages(system.huge_pages(root), free_huge_bytes(root), token_bytes),
        memory_nodes(system.memory_nodes(root)),
        unseen(_unseen(root)),
    ]
    if seconds:
        speed = bandwidth(choose_threads(), seconds, available_bytes(root))
        found.append(reads_per_second(speed, token_bytes, seen.others if seen else None))
    return [finding for finding in found if finding]


def kernels(available: list[str], tested: dict[str, list[str]], chosen: str) -> Finding:
    """Every kernel of every instruction set has to answer a small odd case as the scalar ones do, to the bit.

    Args:
        available: instruction sets that can be used, the best first.
        tested: kernels that answer otherwise, of each instruction set that the CPU should run.
        chosen: which one is used.
    """
    broken = [isa for isa in tested if tested[isa] or isa not in available]
    passed = f"asked now, every kernel of {', '.join(available)} gives the bits of the scalar ones; {chosen} is used"
    if broken:
        return Finding(
            "error",
            "kernels",
            f"The kernels of {', '.join(broken)} compute wrongly on this machine; they are not used",
            f"{listed([f'{isa}: {listed(tested[isa])}' for isa in broken])} differ from the scalar ones",
            "A CPU, an emulator or a compiler makes mistakes: what else was built or runs here may be wrong too.",
            _INFO,
            "Report the CPU and the compiler; rebuild with another compiler to tell which of both it is.",
        )
    if chosen != available[0]:
        return Finding(
            "warning",
            "kernels",
            f"ONEBIT_ISA chooses the {chosen} kernels; {available[0]} are faster here",
            passed,
            "Texts are the same with all of them, to the bit; only the time differs.",
            _INFO,
            "Unset ONEBIT_ISA.",
        )
    if available == ["scalar"]:
        return Finding(
            "warning",
            "kernels",
            "Only the plain C++ kernels run here",
            passed,
            "They are the reference, many times slower than those for AVX2 or dot products of ARM.",
            _INFO,
            "Use a CPU of the table in the README, or a virtual machine that shows the guest what its CPU has.",
        )
    why = "The self-test runs at every start; kernels that fail it are never used."
    return Finding("ok", "kernels", "All kernels compute rightly", passed, why, _INFO)


def missing_kernels(flags: Set[str], built: Set[str]) -> Finding | None:
    """Instruction sets that the CPU has, and no kernels of this build use."""
    missing = [isa for isa, needed in KERNELS_OF_FLAGS.items() if needed <= flags and isa not in built]
    if not missing:
        return None
    return Finding(
        "warning",
        "build",
        f"This CPU could run the {', '.join(missing)} kernels, which are not there",
        f"/proc/cpuinfo has {', '.join(sorted(KERNELS_OF_FLAGS[missing[0]]))}; "
        f"there are kernels for {', '.join(sorted(built))}",
        "The build left them out, or the system refuses the registers (AMX needs Linux 5.16 and a permission).",
        _INFO,
        "Build onebit again on this machine, with a compiler of the last years.",
    )


def threads(used: int, cores: int, quota: float | None) -> Finding:
    """Threads against cores, and against the CPU time that a container may take."""
    limit = "" if quota is None else f", and a limit of {quota:.3g} CPUs"
    evidence = f"{used} threads on {cores} cores that this process may use{limit}"
    confirm = "cat /proc/self/cgroup /proc/self/status; onebit info"
    if quota is not None and used > quota + 0.5:
        return Finding(
            "warning",
            "threads",
            "More threads than the container may run",
            evidence,
            "When the time of a period is used up all threads stand still until the next one: tokens come in bursts.",
            confirm,
            f"Set ONEBIT_THREADS={max(int(quota), 1)}, or raise the limit (docker run --cpus, resources.limits.cpu).",
        )
    if used > cores:
        return Finding(
            "warning",
            "threads",
            "More threads than cores",
            evidence,
            "Threads of one core share its arithmetic and its way to memory; they wait for each other in every layer.",
            confirm,
            f"Unset ONEBIT_THREADS, or set it to {cores}.",
        )
    if used < cores:
        why = "Some cores stay idle; where memory is the limit a few threads suffice, a prompt wants all."
        return Finding("note", "threads", "Fewer threads than cores", evidence, why, confirm)
    return Finding("ok", "threads", "A thread for each core", evidence, "More gain nothing.", confirm)


def throttling(stopped: int, periods: int) -> Finding | None:
    """How often the limit of a container has stopped this process's group."""
    if not periods or stopped / periods < THROTTLED:
        return None
    return Finding(
        "warning",
        "throttling",
        "The container's limit of CPU time stops its processes",
        f"stopped in {stopped:,} of {periods:,} periods ({stopped / periods:.0%})",
        "A thread that is stopped in the middle of a layer holds up all others.",
        "cat /sys/fs/cgroup/cpu.stat",
        "Raise the limit, or run fewer threads (ONEBIT_THREADS).",
    )


def memory_limit(found: tuple[int, int] | None, available: int | None) -> Finding | None:
    """Memory that a container may fill, where that is less than the machine has."""
    if found is None:
        return None
    limit, total = (f"{number / 1e9:.1f}" for number in found)
    left = "" if available is None else f"; {available / 1e9:.1f} GB are left"
    return Finding(
        "note",
        "memory limit",
        f"The container may fill {limit} of {total} GB",
        f"limit {found[0]:,} bytes{left}",
        "Who fills more is ended without a word. Mapped weights may leave memory and come back; keys and values, and "
        "weights in huge pages, may not.",
        "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory.current",
        "onebit info MODEL says what fits; --kv-cache int8 and --no-huge-pages take less.",
    )


def neighbours(seen: Neighbours | None, cpus: int) -> Finding | None:
    """Who else computes: other processes, and other virtual machines on the same CPU."""
    if seen is None:
        return None
    names = ", ".join(f"{name} {share * cpus:.2f}" for name, share in seen.busiest if share * cpus >= 0.05)
    evidence = (
        f"others take {seen.others * cpus:.2f} of {cpus} CPUs{f' ({names})' if names else ''}; "
        f"{seen.stolen:.1%} of the time other virtual machines had the CPU"
    )
    why = "A layer is done when its slowest thread is: one busy core slows all of them, and figures of speed with it."
    if seen.stolen >= STOLEN:
        advice = "Measure at another time, or on a machine of its own: nothing inside this one can change it."
        what = "Other virtual machines use this CPU"
        return Finding("warning", "neighbours", what, evidence, why, "vmstat 1 5  # the column st", advice)
    if seen.others >= BUSY:
        advice = "Stop them before anything is measured, or leave them cores: ONEBIT_THREADS."
        return Finding("warning", "neighbours", "Other programs compute here", evidence, why, _LOAD, advice)
    return Finding("ok", "neighbours", "The CPUs are free", evidence, why, _LOAD)


def governor(found: dict[str, int], chosen_by_cpu: bool) -> Finding | None:
    """The policy that sets the clock."""
    if not found:
        return None
    evidence = ", ".join(f"{name} on {number} CPUs" for name, number in found.items())
    confirm = "grep . /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
    why = "A clock that is held low, or follows the load late, makes every figure smaller and less steady."
    slow = {"powersave"} if not chosen_by_cpu else set()
    if slow & found.keys():
        advice = "sudo cpupower frequency-set -g performance"
        return Finding(
            "warning", "governor", "The clock is held at its lowest", evidence, why, confirm, advice
        )
    if found.keys() - {"performance"}:
        advice = "Before measuring: sudo cpupower frequency-set -g performance"
        return Finding("note", "governor", "The clock follows the load", evidence, why, confirm, advice)
    return Finding("ok", "governor", "The clock is steady", evidence, why, confirm)


def turbo(allowed: bool | None) -> Finding | None:
    """Whether the CPU may exceed its nominal clock."""
    if allowed is None:
        return None
    confirm = "grep . /sys/devices/system/cpu/intel_pstate/no_turbo /sys/devices/system/cpu/cpufreq/boost 2>/dev/null"
    if allowed:
        why = "Figures depend on heat and on how many cores are busy: compare only what ran side by side."
        return Finding("ok", "turbo", "Clocks above the nominal one are allowed", "boost is on", why, confirm)
    why = "Measurements are steadier so, and texts slower."
    return Finding("note", "turbo", "The clock stays at its nominal value", "boost is off", why, confirm)


def huge_pages(mode: str | None, free: int, token_bytes: int | None) -> Finding | None:
    """Whether a large model can lie in huge pages, which the CPU finds at once."""
    if mode is None:
        return None
    confirm = "cat /sys/kernel/mm/transparent_hugepage/enabled /proc/buddyinfo"
    evidence = f"transparent huge pages: {mode}; {free / 1e9:.1f} GB lie free in pieces of {HUGE_PAGE >> 20} MB or more"
    why = (
        f"Models from {HUGE_FROM / 1e6:.0f} MB move to huge pages where they are free, which makes a token faster by "
        "up to a third; smaller ones have no need."
    )
    is_large = token_bytes is not None and token_bytes >= HUGE_FROM
    severity: Severity = "warning" if is_large else "note"
    if mode == "never":
        advice = "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
        return Finding(severity, "huge pages", "Huge pages are switched off", evidence, why, confirm, advice)
    if is_large and token_bytes is not None and free < token_bytes:
        advice = "echo 1 | sudo tee /proc/sys/vm/compact_memory  # puts free memory together"
        what = "Memory is too scattered for huge pages"
        return Finding("warning", "huge pages", what, evidence, why, confirm, advice)
    return Finding("ok", "huge pages", "Huge pages are there", evidence, why, confirm)


def memory_nodes(number: int) -> Finding | None:
    """Memory that is near to some CPUs and far from others."""
    if number < 2:
        return None
    return Finding(
        "note",
        "memory nodes",
        "The memory has near and far parts",
        f"{number} nodes",
        "Weights lie in one of them, and the CPUs of the others read them through a slower way.",
        "lscpu | grep NUMA",
        "Try numactl --cpunodebind=0 --membind=0 onebit run ..., or --interleave=all, and keep the faster.",
    )


def bandwidth(n_threads: int, seconds: float, available: int | None) -> float:
    """Bytes per second that threads read from memory, of more than the caches hold; as `onebit bench` measures it.

    Args:
        n_threads: that read, each its part.
        seconds: to go on for.
        available: bytes of memory for this process, or None where that is not known.
    """
    size = READ_BYTES if available is None else min(READ_BYTES, available // 4)
    return Memory(size, n_threads).bandwidth(n_threads, seconds)


def reads_per_second(
    bytes_per_second: float, token_bytes: int | None, others: float | None = None
) -> Finding:
    """How often memory can deliver the weights of a token: the ceiling of texts, one at a time.

    Args:
        bytes_per_second: that memory delivers.
        token_bytes: bytes of weights that a token reads, or None.
        others: share of the CPUs that other programs took meanwhile, or None.
    """
    what = f"Memory delivers {bytes_per_second / 1e9:.0f} GB/s"
    evidence = f"{bytes_per_second / 1e9:.1f} GB/s read by all threads of onebit"
    if others is not None and others >= BUSY:
        evidence += f" while others took {others:.0%} of the CPUs, so alone it is more"
    if token_bytes:
        evidence += f"; a token reads {token_bytes / 1e6:,.1f} MB of weights"
        if token_bytes < CACHED_BYTES:
            evidence += ", which may stay in the caches"
        else:
            what += f": at most {bytes_per_second / token_bytes:,.3g} tokens/s of this model"
    return Finding(
        "ok",
        "bandwidth",
        what,
        evidence,
        "Each token of a text reads all weights once; only weights that stay in the caches come faster.",
        "onebit run 'Once upon a time' --max-tokens 200 --no-speculation",
    )


def unseen(names: list[str]) -> Finding | None:
    """What this system does not tell."""
    if not names:
        return None
    return Finding(
        "note",
        "unseen",
        f"This system does not tell of {', '.join(names)}",
        f"{platform.system()} has no files here that do",
        "Virtual machines and containers hide them, and only Linux has such files; what they would show may still cost "
        "speed.",
        "ls /sys/devices/system/cpu/cpu0/cpufreq /proc/stat /sys/kernel/mm/transparent_hugepage",
        "Ask whoever runs the host.",
    )


def _unseen(root: Path) -> list[str]:
    answers: dict[str, object] = {
        "the CPU's features": system.cpu_flags(root),
        "the policy of the clock": clock.governors(root),
        "turbo": clock.turbo(root) is not None,
        "neighbours": system.ticks(root),
        "huge pages": system.huge_pages(root),
        "limits of containers": read(root / "proc/self/cgroup") is not None,
    }
    return [name for name, answer in answers.items() if not answer]

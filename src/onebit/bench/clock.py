"""Who sets the clock of the CPUs, as Linux tells it in files below a root; None, or empty, where it does not."""

from collections import Counter
from pathlib import Path

_CPUS = "sys/devices/system/cpu"


def governors(root: Path) -> Counter[str]:
    """How many CPUs each policy of the clock governs, as in {"schedutil": 8}."""
    files = sorted((root / _CPUS).glob("cpu[0-9]*/cpufreq/scaling_governor"))
    return Counter(name for file in files if (name := read(file)))


def is_clock_chosen_by_cpu(root: Path) -> bool:
    """Whether the driver leaves the clock to the CPU: "powersave" is then its usual policy, and no brake."""
    return read(root / _CPUS / "cpu0/cpufreq/scaling_driver") in ("intel_pstate", "amd-pstate-epp")


def turbo(root: Path) -> bool | None:
    """Whether clocks above the nominal one are allowed."""
    if (off := read(root / _CPUS / "intel_pstate/no_turbo")) is not None:
        return off == "0"
    boost = read(root / _CPUS / "cpufreq/boost")
    return None if boost is None else boost == "1"


def read(path: Path) -> str | None:
    """The text of a file, or None where there is none."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None

"""What the doctor says of a machine, on trees that stand for /proc and /sys. Kind: exact."""

import pytest

from onebit.bench import clock
from onebit.doctor import machine, system
from onebit.doctor.system import Neighbours, neighbours, ticks
from onebit.engine.model import available_isas

CPU = "sys/devices/system/cpu"
AVX512 = "avx2 avx512f avx512bw avx512vl avx512dq avx512_vnni"


def tree(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def process(pid, name, user, kernel):
    return {f"proc/{pid}/stat": f"{pid} ({name}) S 1 1 1 0 -1 0 0 0 0 0 {user} {kernel} 0 0 20 0 1\n"}


def test_what_linux_tells(tmp_path):
    root = tree(
        tmp_path,
        {
            "proc/cpuinfo": "processor : 0\nflags : fpu avx2\n",
            f"{CPU}/cpu0/cpufreq/scaling_governor": "powersave\n",
            f"{CPU}/cpu1/cpufreq/scaling_governor": "performance\n",
            f"{CPU}/cpu0/cpufreq/scaling_driver": "intel_pstate\n",
            f"{CPU}/intel_pstate/no_turbo": "1\n",
            "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]\n",
            "sys/devices/system/node/node0/x": "",
            "sys/devices/system/node/node1/x": "",
        },
    )
    assert system.cpu_flags(root) == {"fpu", "avx2"}
    assert clock.governors(root) == {"powersave": 1, "performance": 1}
    assert clock.is_clock_chosen_by_cpu(root)
    assert clock.turbo(root) is False
    assert system.huge_pages(root) == "never"
    assert system.memory_nodes(root) == 2


def test_what_linux_does_not_tell(tmp_path):
    assert (system.cpu_flags(tmp_path), clock.governors(tmp_path)) == (set(), {})
    assert clock.turbo(tmp_path) is system.huge_pages(tmp_path) is system.ticks(tmp_path) is None
    assert system.cpu_quota(tmp_path) is None and system.throttled(tmp_path) == (0, 0)
    (tmp_path / CPU / "cpufreq").mkdir(parents=True)
    (tmp_path / CPU / "cpufreq/boost").write_text("1\n")
    assert clock.turbo(tmp_path) is True


@pytest.mark.parametrize(
    ("files", "quota", "stopped"),
    [
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "150000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
                "sys/fs/cgroup/a/cpu.stat": "usage_usec 5\nnr_periods 100\nnr_throttled 40\n",
            },
            1.5,
            (40, 100),
        ),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/a\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
            },
            0.5,
            (0, 0),
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/a\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
            },
            None,
            (0, 0),
        ),
    ],
    ids=["version 2", "version 1", "no limit"],
)
def test_limits_of_containers(tmp_path, files, quota, stopped):
    root = tree(tmp_path, files)
    assert system.cpu_quota(root) == quota
    assert system.throttled(root) == stopped


def test_limits_of_memory(tmp_path):
    files = {
        "proc/meminfo": "MemTotal:       16000000 kB\nMemFree: 1 kB\n",
        "proc/self/cgroup": "0::/a\n",
        "sys/fs/cgroup/a/memory.max": "2000000000\n",
        "sys/fs/cgroup/memory.max": "max\n",
    }
    found = system.memory_limit(tree(tmp_path / "a", files))
    assert found == (2_000_000_000, 16_384_000_000)
    assert machine.memory_limit(found, 10**9).what == "The container may fill 2.0 of 16.4 GB"
    # Version 1 says so where there is none.
    files["sys/fs/cgroup/a/memory.max"] = "9223372036854771712\n"
    assert system.memory_limit(tree(tmp_path / "b", files)) is None
    assert machine.memory_limit(None, 10**9) is None


def test_who_else_computes(tmp_path):
    before = ticks(
        tree(
            tmp_path / "a",
            {"proc/stat": "cpu  100 0 50 800 50 0 0 0 0 0\ncpu0 1\n"}
            | process(7, "me (x) y", 10, 5)
            | process(8, "other", 100, 0),
        )
    )
    after = ticks(
        tree(
            tmp_path / "b",
            {"proc/stat": "cpu  170 0 60 1000 50 0 0 20 0 0\ncpu0 1\n"}
            | process(7, "me (x) y", 50, 5)
            | process(8, "other", 125, 5)
            | process(9, "new", 5, 0),
        )
    )
    assert before.processes == {7: ("me (x) y", 15), 8: ("other", 100)}
    seen = neighbours(before, after, 7)
    # 300 ticks in all, 80 of them busy, 40 of these ours, 20 stolen.
    assert seen == Neighbours(40 / 300, 20 / 300, [("other", 30 / 300), ("new", 5 / 300)])
    assert neighbours(after, after, 7) is None


def test_kernels():
    fine = {"avx2": [], "scalar": []}
    assert machine.kernels(["avx2", "scalar"], fine, "avx2").severity == "ok"
    assert machine.kernels(["avx2", "scalar"], fine, "scalar").severity == "warning"
    assert machine.kernels(["scalar"], {"scalar": []}, "scalar").severity == "warning"
    found = machine.kernels(["scalar"], {"avx2": ["rope"], "scalar": []}, "scalar")
    assert found.severity == "error" and "avx2" in found.what and "avx2: rope" in found.evidence
    # What was right at the start may be wrong by now.
    later = machine.kernels(["avx2", "scalar"], {"avx2": ["add"], "scalar": []}, "avx2")
    assert later.severity == "error"


def test_kernels_that_the_build_lacks():
    flags = set(AVX512.split())
    assert machine.missing_kernels(flags, {"avx512vnni", "avx2", "scalar"}) is None
    found = machine.missing_kernels(flags, {"avx2", "scalar"})
    assert found.severity == "warning" and "avx512vnni" in found.what
    assert machine.missing_kernels({"asimddp", "i8mm"}, {"neon_i8mm", "neon_dotprod", "scalar"}) is None
    assert machine.missing_kernels(set(), {"scalar"}) is None


@pytest.mark.parametrize(
    ("used", "cores", "quota", "severity"),
    [
        (4, 4, None, "ok"),
        (4, 4, 4.0, "ok"),
        (4, 4, 2.0, "warning"),
        (8, 4, None, "warning"),
        (2, 4, None, "note"),
    ],
)
def test_threads(used, cores, quota, severity):
    assert machine.threads(used, cores, quota).severity == severity


def test_throttling():
    assert machine.throttling(0, 0) is None and machine.throttling(1, 100) is None
    assert machine.throttling(40, 100).severity == "warning"


@pytest.mark.parametrize(
    ("others", "stolen", "severity", "word"),
    [
        (0.01, 0.0, "ok", "free"),
        (0.4, 0.0, "warning", "Other programs"),
        (0.0, 0.1, "warning", "Other virtual machines"),
    ],
)
def test_neighbours(others, stolen, severity, word):
    found = machine.neighbours(Neighbours(others, stolen, [("build", others)]), 4)
    assert found.severity == severity and word in found.what
    assert ("build" in found.evidence) == (others > 0.1)
    assert machine.neighbours(None, 4) is None


@pytest.mark.parametrize(
    ("found", "chosen_by_cpu", "severity"),
    [
        ({"performance": 4}, False, "ok"),
        ({"powersave": 4}, False, "warning"),
        ({"powersave": 4}, True, "note"),
        ({"schedutil": 4}, False, "note"),
    ],
)
def test_governor(found, chosen_by_cpu, severity):
    assert machine.governor(found, chosen_by_cpu).severity == severity
    assert machine.governor({}, chosen_by_cpu) is None


@pytest.mark.parametrize(
    ("mode", "free", "token_bytes", "severity"),
    [
        ("madvise", 10**9, 5 * 10**8, "ok"),
        ("madvise", 10**8, 5 * 10**8, "warning"),
        ("madvise", 0, 10**6, "ok"),
        ("never", 10**9, 5 * 10**8, "warning"),
        ("never", 10**9, None, "note"),
    ],
)
def test_huge_pages(mode, free, token_bytes, severity):
    assert machine.huge_pages(mode, free, token_bytes).severity == severity
    assert machine.huge_pages(None, free, token_bytes) is None


def test_turbo_and_memory_nodes():
    severities = [machine.turbo(allowed).severity for allowed in (True, False)]
    assert severities == ["ok", "note"] and machine.turbo(None) is None
    assert machine.memory_nodes(1) is None and machine.memory_nodes(2).severity == "note"


def test_bandwidth_is_a_ceiling_for_large_models():
    assert "100 tokens/s" in machine.reads_per_second(1e11, 10**9).what
    assert "tokens/s" not in machine.reads_per_second(1e11, 10**6).what
    assert "alone it is more" in machine.reads_per_second(1e11, None, 0.5).evidence
    speed = machine.bandwidth(1, 0.0, 64 << 20)
    assert 1e8 < speed < 1e13


def test_a_system_without_such_files(tmp_path):
    found = {finding.check: finding for finding in machine.examine(tmp_path, seconds=0)}
    assert found.keys() == {"kernels", "threads", "unseen"}
    for words in ("features", "policy of the clock", "turbo", "neighbours", "huge pages", "containers"):
        assert words in found["unseen"].what
    assert all(isa in found["kernels"].evidence for isa in available_isas())

"""The state of the machine is read as the system writes it. Kind: exact."""

import os

import pytest

from onebit.bench import clock, conditions


@pytest.fixture
def root(tmp_path):
    """A machine of two CPUs whose clocks others set."""
    for cpu, governor in enumerate(("powersave", "performance")):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/cpufreq"
        folder.mkdir(parents=True)
        (folder / "scaling_governor").write_text(governor + "\n")
    return tmp_path


def test_governors(root, tmp_path):
    assert clock.governors(root) == {"performance": 1, "powersave": 1}
    assert clock.governors(tmp_path / "nowhere") == {} and not clock.is_clock_chosen_by_cpu(root)


def test_a_cpu_that_chooses_its_clock_is_not_slowed_by_powersave(root):
    (root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_driver").write_text("intel_pstate\n")
    found = conditions.look(1, [0, 1], root=root)
    assert found.governor == "performance, powersave" and found.warnings == []


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("intel_pstate/no_turbo", "0", True),
        ("intel_pstate/no_turbo", "1", False),
        ("cpufreq/boost", "1", True),
        ("cpufreq/boost", "0", False),
    ],
)
def test_turbo(root, file, text, expected):
    path = root / "sys/devices/system/cpu" / file
    path.parent.mkdir(exist_ok=True)
    assert clock.turbo(root) is None
    path.write_text(text + "\n")
    assert clock.turbo(root) is expected


def test_what_may_disturb_is_warned_of(root):
    (root / "sys/devices/system/cpu/cpufreq").mkdir()
    (root / "sys/devices/system/cpu/cpufreq/boost").write_text("1")
    found = conditions.look(4, [0, 1], 2**32, root=root)
    assert (found.governor, found.turbo, found.pinned) == ("performance, powersave", True, [0, 1])
    assert (found.threads, found.memory_limit, found.quotable) == (4, 2**32, False)
    words = ["the governor is performance, powersave", "turbo is on", "4 threads share 2 CPUs"]
    assert [w.startswith(word) for w, word in zip(found.warnings, words, strict=True)] == [True] * 3
    assert conditions.look(4, [0, 1], check=False, root=root).warnings == []


def test_a_machine_that_tells_nothing_is_no_quiet_one(tmp_path):
    found = conditions.look(1, root=tmp_path)
    assert (found.governor, found.turbo) == (None, None)
    assert len(found.warnings) == 1 and "shows no governor" in found.warnings[0]
    assert conditions.background(tmp_path, 0) is None


def test_load_before_the_start_is_what_proc_tells(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/stat").write_text("cpu  1 2 3 9 9 4 5 6 0 0\n")
    # The same clocks twice: nobody worked.
    assert conditions.background(tmp_path, 0.01) == 0


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system binds nobody")
def test_cpus_to_bind_to(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 6})
    assert conditions.parse_cpus("0,2-3", 2) == [0, 2, 3]
    assert conditions.parse_cpus("6", 2) == [6]
    assert len(conditions.parse_cpus("auto", 2)) == 2
    with pytest.raises(ValueError, match="names CPU 4; this process may use 0, 1, 2, 3, 6"):
        conditions.parse_cpus("3-4", 1)
    # Refused at once, not after billions of numbers.
    with pytest.raises(ValueError, match="names CPU 4;"):
        conditions.parse_cpus(f"3-{10**18}", 1)
    with pytest.raises(ValueError, match=f"names CPU {10**18};"):
        conditions.parse_cpus(f"{10**18}-{10**19}", 1)
    with pytest.raises(ValueError, match="'3-2'; expected a range from the least CPU"):
        conditions.parse_cpus("3-2", 1)
    for text in ("", "a", "1-", "1,,2", "-1"):
        with pytest.raises(ValueError, match="expected auto, or CPUs as in 0,2-3"):
            conditions.parse_cpus(text, 1)

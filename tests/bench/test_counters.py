"""Energy and cache misses are read as Linux and perf write them, or their lack is explained. Kind: exact."""

import os
import shutil
import subprocess
import sys

import pytest

from onebit.bench.counters import MISSES, Perf, Rapl, parse, why_not

COUNTED = "81234,,cache-misses:u,1234567,100.00,,\n99,,page-faults,1,100.00,,\n"
REFUSED = """Error:
Access to performance monitoring and observability operations is limited.
Consider adjusting /proc/sys/kernel/perf_event_paranoid setting to open
"""


@pytest.fixture
def powercap(tmp_path):
    """Two packages, of which one has a part, and the platform, which counts them again."""
    for name, kind, energy in (
        ("intel-rapl:0", "package-0", 5_000_000),
        ("intel-rapl:0:0", "core", 1_000_000),
        ("intel-rapl:1", "package-1", 7_000_000),
        ("intel-rapl:2", "psys", 90_000_000),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "name").write_text(kind + "\n")
        (folder / "energy_uj").write_text(f"{energy}\n")
        (folder / "max_energy_range_uj").write_text("10000000\n")
    return tmp_path


def test_packages_are_added_and_nothing_counts_twice(powercap):
    rapl = Rapl(powercap)
    assert rapl.reason is None and rapl.joules() == 12.0
    (powercap / "intel-rapl:0/energy_uj").write_text("6500000")
    assert rapl.joules() == 13.5


def test_a_counter_that_begins_again_is_continued(powercap):
    rapl = Rapl(powercap)
    before = rapl.joules()
    (powercap / "intel-rapl:1/energy_uj").write_text("500000")
    # From 7 J to the end at 10 J, and half a joule more.
    assert rapl.joules() - before == 3.5
    (powercap / "intel-rapl:1/energy_uj").write_text("600000")
    assert rapl.joules() - before == pytest.approx(3.6)


def test_why_there_is_no_energy(powercap, monkeypatch):
    assert "no package in" in Rapl(powercap / "nowhere").reason
    (powercap / "intel-rapl:0/energy_uj").unlink()
    assert "RAPL does not answer" in Rapl(powercap).reason
    if os.geteuid() != 0:
        (powercap / "intel-rapl:1/energy_uj").chmod(0)
        (powercap / "intel-rapl:0/energy_uj").write_text("1")
        assert "may not be read: run as root" in Rapl(powercap).reason


def test_what_perf_writes():
    assert parse(COUNTED) == {MISSES: 81234.0, "page-faults": 99.0}
    assert parse("# started on Sat\n\n<not counted>,,cache-misses,0,0.00,,\n") == {MISSES: None}
    assert parse(REFUSED) == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (COUNTED, None),
        ("<not supported>,,cache-misses,0,100.00,,\n", "has no counter for that"),
        (REFUSED, "lower /proc/sys/kernel/perf_event_paranoid"),
        ("event syntax error: 'cache-misses'\n", "perf does not count that: event syntax error"),
        ("", "it says nothing"),
    ],
)
def test_why_perf_does_not_count(text, words):
    reason = why_not(text)
    assert reason is None if words is None else words in reason


def test_perf_that_is_not_installed():
    assert "apt install linux-perf" in Perf("no-such-perf").reason


@pytest.mark.skipif(shutil.which("perf") is None, reason="perf is not installed")
def test_another_process_is_counted():
    """Of an event that every machine has: pages that a process touches for the first time."""
    perf = Perf(event="page-faults")
    if perf.reason is not None:
        assert "paranoid" in perf.reason
        return
    code = "input(); data = bytearray(1 << 24); print(len(data), flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        counted = []
        with perf.watch(child.pid, counted):
            child.stdin.write("\n")
            child.stdin.flush()
            child.stdout.readline()
        child.communicate("\n")
    assert len(counted) == 1 and counted[0] >= 8

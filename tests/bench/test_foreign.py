"""Who else used the processors is accounted as it says. Kinds: exact, invariant."""

import os
import subprocess
import sys
import time

import pytest

from onebit.bench.foreign import Look, Meter, Usage, usage


def test_usage_is_what_neither_we_nor_idleness_explain():
    before, after = Look(0, 100, 5, 10, 1), Look(10, 113, 6, 20, 2)
    # Of 20 seconds of two processors 13 were busy, 10 of them ours, and one was stolen.
    assert usage(before, after, 2) == pytest.approx(Usage((3 + 1) / 20, 1 / 20, 1 / 20))
    assert usage(before, Look(10, 109, 5, 20, 1), 2).foreign == 0


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="the system does not tell")
def test_another_process_that_works_is_seen():
    meter, spin = Meter(), "while True: pass"
    with subprocess.Popen([sys.executable, "-c", spin]) as other:
        try:
            looks = [(meter.look([]), meter.look([other.pid]), meter.look([], [other.pid]))]
            time.sleep(0.5)
            looks.append((meter.look([]), meter.look([other.pid]), meter.look([], [other.pid])))
        finally:
            other.kill()
    foreign, own, idle = (usage(a, b, meter.cpus) for a, b in zip(*looks, strict=True))
    # Where processors are short it gets less than a whole one.
    assert foreign.foreign > own.foreign + 0.1 / meter.cpus
    assert idle.idle > 0.1 / meter.cpus and idle.foreign >= idle.idle * 0.5


def test_the_meter_reads_what_linux_writes(tmp_path):
    tick = os.sysconf("SC_CLK_TCK")
    (tmp_path / "stat").write_text(
        f"cpu  {tick} {2 * tick} {3 * tick} 9 9 {4 * tick} {5 * tick} {6 * tick} 0 0\n"
    )
    (tmp_path / "7").mkdir()
    fields = " ".join(["S", *["0"] * 10, str(2 * tick), str(tick), "0"])
    (tmp_path / "7" / "stat").write_text(f"7 (a) b) {fields}\n")
    look = Meter(tmp_path).look([], [7, 8])
    assert (look.busy_s, look.stolen_s, look.idle_s) == (15, 6, 3)
    assert Meter(tmp_path / "nowhere").look([]) is None

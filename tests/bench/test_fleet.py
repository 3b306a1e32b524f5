"""Processes of engines start, answer, die and are named. Kind: invariant."""

import time

import pytest

import tiny
from onebit import formats
from onebit.bench import fleet as fleets
from onebit.bench.fleet import Absent, Engine, Fleet
from onebit.checkpoint import quantize

OURS = "onebit"
ENGINE = "onebit.bench.engines.ours:Ours"


def test_an_engine_that_cannot_start_says_why(tmp_path):
    arguments = {"engine": ENGINE, "path": str(tmp_path / "none.onebit"), "threads": 1}
    fleet = Fleet({OURS: Engine(arguments, 0), "large": Engine(arguments, 2**60)})
    with pytest.raises(Absent, match="none.onebit"):
        fleet.start(OURS)
    with pytest.raises(Absent, match="needs about 1152921504.6 GB of memory"):
        fleet.start("large")
    # It is not tried again.
    with pytest.raises(Absent, match="none.onebit"):
        fleet.ask(OURS, {"what": "decode", "threads": 1, "seconds": 0})
    fleet.close()


def test_a_fresh_process_tells_its_start_and_its_memory(tmp_path, monkeypatch):
    path = tmp_path / "tiny.onebit"
    formats.write(quantize(tiny.master()), path)
    fleet = Fleet({OURS: Engine({"engine": ENGINE, "path": str(path), "threads": 1}, 0, fresh=True)})
    request = {"what": "one_text", "threads": 1, "seconds": 0, "prompt": 4, "tokens": 3}
    looks, watched = [], []
    look = fleets.Meter.look
    monkeypatch.setattr(fleets.Meter, "look", lambda *args: looks.append(look(*args)) or looks[-1])

    class Watch:
        def __init__(self, pid):
            watched.append(pid)

        def __enter__(self):
            watched.append("open")

        def __exit__(self, *error):
            watched.append("closed")

    first, second = (fleet.ask(OURS, request, Watch) for _ in range(2))
    for answer in (first, second):
        assert 0 < answer.load_s < answer.elapsed_s and 0 < answer.value < answer.elapsed_s
        # Python with numpy takes more than ten megabytes; it reserves more than it uses.
        assert 10e6 < answer.peak_bytes < answer.address_bytes
    if None not in looks:
        # What others did is watched from before the start: the text alone is shorter than a tick of the system's clock.
        assert looks[1].clock_s - looks[0].clock_s > first.load_s
    assert watched[1:3] == watched[4:6] == ["open", "closed"] and watched[0] != watched[3]
    with pytest.raises(Absent, match="AttributeError: .*'nonsense'"):
        fleet.ask(OURS, {"what": "nonsense"})
    fleet.close()


def busy(folder):
    """An engine that loads for ever."""
    (folder / "busy.py").write_text("import time\ntime.sleep(600)\n")
    return Engine({"engine": "busy:Busy", "folders": [str(folder)]}, 0)


def test_an_engine_that_takes_too_long_is_ended_and_named(tmp_path):
    fleet = Fleet({"busy": busy(tmp_path)}, time_limit=1)
    with pytest.raises(Absent, match="took longer than 1 seconds; --time-limit allows more"):
        fleet.start("busy")
    assert not fleet._workers
    # It is not waited for again.
    started = time.perf_counter()
    with pytest.raises(Absent, match="--time-limit"):
        fleet.ask("busy", {"what": "decode"})
    assert time.perf_counter() - started < 0.5


def test_an_engine_that_computes_on_is_ended(tmp_path, monkeypatch):
    # Its pipe is closed while it loads, and it never looks.
    fleet = Fleet({"busy": busy(tmp_path)})
    monkeypatch.setattr(fleets, "FAREWELL_S", 0.1)
    monkeypatch.setattr(fleet, "_receive", lambda name: {"info": {}, "load_s": 0.0})
    fleet.start("busy")
    process = fleet._workers["busy"].process
    started = time.perf_counter()
    fleet.close()
    assert process.returncode == -9 and time.perf_counter() - started < 60

"""The processes that hold the engines: started once, asked one at a time, ended when memory is short.

fleet = Fleet({"ours": Engine({"engine": "onebit.bench.engines.ours:Ours", ...}, need)})
fleet.ask("ours", {"what": "decode", "threads": 2, "seconds": 0.5})
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from onebit.bench.foreign import Meter, Usage, usage
from onebit.engine.memory import available_bytes

# Threads of OpenMP spin for some milliseconds after their work; then they sleep, and the next turn may begin.
SETTLE_S = 0.05

# What ends when its pipe is closed has ended by then; what computes on is ended.
FAREWELL_S = 5.0

# Of one measurement, or of loading a model: what takes longer is not worth the wait.
TIME_LIMIT_S = 600.0

Watch = Callable[[int], AbstractContextManager[Any]]


class Absent(Exception):
    """An engine cannot run here; the message says why."""


@dataclass
class Engine:
    """How to start an engine.

    Args:
        arguments: of worker.py.
        need: bytes of memory that it takes at its peak, about.
        warm_up: times that each measurement runs before it counts.
        fresh: whether each measurement takes a process of its own.
    """

    arguments: dict[str, Any]
    need: int
    warm_up: int = 1
    fresh: bool = False


@dataclass
class Answer:
    """A measurement.

    Args:
        value: in the unit of what was asked for.
        usage: of the processors by others meanwhile; None where that is not known.
        elapsed_s: seconds since the process of the engine was started.
        load_s: of these, what loading took.
        peak_bytes: resident set of the process, at its peak.
        address_bytes: its address space, at its peak; 0 where that is not known.
    """

    value: Any
    usage: Usage | None
    elapsed_s: float
    load_s: float
    peak_bytes: int
    address_bytes: int


@dataclass
class Worker:
    """A running engine."""

    process: subprocess.Popen[str]
    started: float
    info: dict[str, Any] = field(default_factory=dict)
    load_s: float = 0.0
    warm: set[str] = field(default_factory=set)


class Fleet:
    """All engines of a run.

    Args:
        engines: by name.
        time_limit: seconds after which an engine that has not answered is ended.
    """

    def __init__(self, engines: dict[str, Engine], time_limit: float = TIME_LIMIT_S) -> None:
        self.engines = engines
        self.time_limit = time_limit
        self.info: dict[str, dict[str, Any]] = {}
        self.loads_s: dict[str, list[float]] = {name: [] for name in engines}
        self.peaks: dict[str, int] = {}
        self.absent: dict[str, str] = {}
        self._meter = Meter()
        self._workers: dict[str, Worker] = {}
        # Measurements that ended a process, by engine and request: they would end the next one too.
        self._deadly: dict[tuple[str, str], str] = {}

    def ask(self, name: str, request: dict[str, Any], watch: Watch = nullcontext) -> Answer:
        """Make one measurement; the first ones of their kind in a process are made before, and forgotten.

        Args:
            name: of the engine.
            request: for its process: "what", and its arguments.
            watch: makes, of the id of that process, something that is open for as long as it measures.

        Raises:
            Absent: this engine cannot do it; `absent` remembers an engine that cannot even start.
        """
        if name in self.absent:
            raise Absent(self.absent[name])
        engine, key = self.engines[name], json.dumps(request, sort_keys=True)
        if (name, key) in self._deadly:
            raise Absent(self._deadly[name, key])
        # Of a fresh one the start is watched too: its text alone is shorter than a tick of the system's clock.
        before = self._look(name)
        worker = self._workers.get(name) or self._start(name)
        try:
            # A fresh one is measured as it comes.
            if not engine.fresh:
                if key not in worker.warm:
                    for _ in range(engine.warm_up):
                        self._call(name, {**request, "seconds": 0})
                    worker.warm.add(key)
                time.sleep(SETTLE_S)
            with watch(worker.process.pid):
                if not engine.fresh:
                    before = self._look(name)
                answer = self._call(name, request)
                elapsed_s = time.perf_counter() - worker.started
                after = self._look(name)
        except Absent as reason:
            if worker.process.poll() is not None:
                self._deadly[name, key] = str(reason)
                self._stop(name)
            raise
        finally:
            if engine.fresh:
                self._stop(name)
        self.peaks[name] = max(self.peaks.get(name, 0), answer["peak_bytes"])
        others = before and after and usage(before, after, self._meter.cpus)
        return Answer(
            answer["value"], others, elapsed_s, worker.load_s, answer["peak_bytes"], answer["address_bytes"]
        )

    def close(self) -> None:
        """End all processes."""
        for name in list(self._workers):
            self._stop(name)

    def start(self, name: str) -> dict[str, Any]:
        """Start an engine and return what it says of itself.

        Raises:
            Absent: it cannot run here.
        """
        return (self._workers.get(name) or self._start(name)).info

    def _start(self, name: str) -> Worker:
        engine = self.engines[name]
        self._make_room(name)
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "onebit.bench.worker", json.dumps(engine.arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        worker = self._workers[name] = Worker(process, started)
        try:
            hello = self._receive(name)
        except Absent as reason:
            self.absent[name] = str(reason)
            self._stop(name)
            raise
        worker.info, worker.load_s = hello["info"], hello["load_s"]
        self.info[name] = worker.info
        self.loads_s[name].append(worker.load_s)
        return worker

    def _make_room(self, name: str) -> None:
        """End other engines, the largest first, until this one fits."""
        need = self.engines[name].need
        others = sorted(self._workers, key=lambda other: self.engines[other].need)
        while (left := available_bytes()) is not None and left < need:
            if not others:
                reason = f"needs about {need / 1e9:.1f} GB of memory; {left / 1e9:.1f} GB are available"
                self.absent[name] = reason
                raise Absent(reason)
            self._stop(others.pop())

    def _call(self, name: str, request: dict[str, Any]) -> dict[str, Any]:
        stdin = self._workers[name].process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
        except BrokenPipeError:
            # It died since its last answer; reading tells how.
            pass
        return self._receive(name)

    def _receive(self, name: str) -> dict[str, Any]:
        process = self._workers[name].process
        assert process.stdout is not None
        asked = time.perf_counter()
        overdue = threading.Timer(self.time_limit, process.kill)
        overdue.daemon = True
        overdue.start()
        line = process.stdout.readline()
        overdue.cancel()
        if not line:
            code = process.wait()
            if time.perf_counter() - asked >= self.time_limit:
                raise Absent(f"took longer than {self.time_limit:g} seconds; --time-limit allows more")
            raise Absent(
                f"its process died with signal {-code}" if code < 0 else f"its process ended with {code}"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Absent(answer["error"])
        return answer

    def _look(self, name: str) -> Any:
        pids = {worker: self._workers[worker].process.pid for worker in self._workers}
        measured = [pids.pop(name)] if name in pids else []
        return self._meter.look(measured, pids.values())

    def _stop(self, name: str) -> None:
        worker = self._workers.pop(name, None)
        if worker is None:
            return
        assert worker.process.stdin is not None
        try:
            worker.process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            worker.process.wait(FAREWELL_S)
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()

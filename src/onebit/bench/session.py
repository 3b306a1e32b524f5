"""One run: all engines in turn, round by round, and what their figures are.

    session = Session(path, checkpoint, plan, conditions)
    session.add_peer("llama.cpp", None, folder)
    session.run(progress)
    session.save(results)

What is compared is measured close together; a ratio is made within each round, and the median of the ratios is told.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, get_args

from onebit.bench import peers
from onebit.bench.conditions import Conditions
from onebit.bench.counters import Perf, Rapl
from onebit.bench.figures import Key, Series, figure
from onebit.bench.fleet import TIME_LIMIT_S, Absent, Answer, Engine, Fleet, Watch
from onebit.bench.foreign import LIMIT
from onebit.checkpoint import Checkpoint
from onebit.config import Activations, ModelConfig
from onebit.engine.memory import position_bytes
from onebit.formats import Progress
from onebit.parts import token_bytes
from onebit.results import Results

OURS, MACHINE = "onebit", "machine"
# Below this, a step reads so little that calls from Python would measure themselves.
LEAST_READ = 1_000_000
# More than a day for one measurement is a mistake; infinity, and what is no number, never end or begin.
MAX_SECONDS = 86_400
# Rounds without which nothing is quoted.
QUOTABLE_ROUNDS = 5
# The text of a cold start: a short prompt, and some tokens for the memory that they take.
COLD_PROMPT, COLD_TOKENS = 16, 16


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Args:
        threads: that compute.
        kv_cache: number format of our keys and values.
        rounds: times that everything is measured.
        seconds: of each measurement, about.
        contexts: tokens that stand before those of a single text that grows.
        batches: texts that grow at once, besides one.
        prompts: tokens of the prompts that are read.
        prompt: tokens of the prompt of a text whose latencies are measured.
        tokens: of that text.
        cpus: that engines are bound to, or None.
        memory_limit: bytes of address space that an engine may take, or None.
        time_limit: seconds that an engine may take for one measurement, or to load its model.
    """

    threads: int
    kv_cache: str = "bf16"
    rounds: int = 5
    seconds: float = 0.3
    contexts: tuple[int, ...] = (0, 256)
    batches: tuple[int, ...] = (8,)
    prompts: tuple[int, ...] = (128, 512)
    prompt: int = 64
    tokens: int = 32
    cpus: tuple[int, ...] | None = None
    memory_limit: int | None = None
    time_limit: float = TIME_LIMIT_S

    def check(self, max_seq_len: int) -> None:
        """Refuse what cannot be measured of a model with such a context.

        Raises:
            ValueError: a number that is too small, or a text that is too long.
        """
        if self.rounds < 1:
            raise ValueError(f"--rounds is {self.rounds}; expected at least 1")
        if not 0 <= self.seconds <= MAX_SECONDS:
            raise ValueError(f"--seconds is {self.seconds}; expected from 0 to {MAX_SECONDS}")
        if not self.seconds < self.time_limit <= MAX_SECONDS:
            raise ValueError(
                f"--time-limit is {self.time_limit:g}; expected more than --seconds, and at most {MAX_SECONDS}"
            )
        for name, least in (("contexts", 0), ("batches", 1), ("prompts", 1)):
            for value in getattr(self, name):
                if value < least:
                    raise ValueError(f"--{name} has {value}; expected at least {least}")
        longest = {"contexts": max_seq_len - self.tokens, "prompts": max_seq_len}
        for name, most in longest.items():
            for value in getattr(self, name):
                if value > most:
                    raise ValueError(f"--{name} has {value}; this model takes {most} at most")


class Session:
    """Engines, what is measured of them, and what was found.

    Args:
        path: our model, a .onebit file or a run folder.
        model: the same, packed.
        plan: what is measured.
        conditions: of the machine; what is noticed meanwhile is added.
        activations: further widths to run it with, as in ("a4", "a1").

    Raises:
        ValueError: a width that no model has, or a dense model, which rounds no activations.
    """

    def __init__(
        self,
        path: Path,
        model: Checkpoint,
        plan: Plan,
        conditions: Conditions,
        activations: tuple[str, ...] = (),
    ) -> None:
        self.plan, self.conditions, self.model = plan, conditions, model
        self.engines: dict[str, dict[str, Any]] = {}
        self.missing: dict[str, str] = {}
        self.series: dict[Key, Series] = {}
        self._started: dict[str, Engine] = {}
        self._counted_tokens: dict[str, int] = {}
        self._rapl, self._perf = Rapl(), Perf()
        for name, reason in (("energy", self._rapl.reason), ("cache misses", self._perf.reason)):
            if reason:
                self.missing[name] = reason
        _check_activations(activations, model.config)
        self.token_bytes = token_bytes(model)
        size = sum(f.stat().st_size for f in path.iterdir()) if path.is_dir() else path.stat().st_size
        caches = (max(plan.contexts, default=0) + max(plan.batches, default=1) * 64) * position_bytes(
            model.config
        )
        arguments = {
            "engine": "onebit.bench.engines.ours:Ours",
            "path": str(path),
            "threads": plan.threads,
            "kv_cache": plan.kv_cache,
        }
        # Its own width is what others are compared with.
        for width in (None, *(width for width in activations if width != model.config.activations)):
            engine = Engine({**arguments, "activations": width}, size + caches + peers.SMALL)
            self._add(OURS if width is None else f"{OURS} {width}", engine, model.label, size)
        self.engines[OURS]["token_weights"] = _token_weights(model.config)
        machine = {
            "engine": "onebit.bench.engines.memory:Memory",
            "n_bytes": self.token_bytes,
            "threads": plan.threads,
        }
        self._started[MACHINE] = Engine(self._bound(machine), self.token_bytes + peers.SMALL)

    def add_peer(self, name: str, file: Path | None, folder: Path) -> None:
        """Add an engine of others; one that cannot take part is named, with the reason.

        Args:
            name: one of `peers.PEERS`.
            file: what it runs, or None for our model.
            folder: for the files that are made.
        """
        shown = name if file is None else f"{name} {file.name}"
        reason = peers.missing(name)
        if reason is None:
            try:
                found = peers.prepare(name, file, self.model, folder, self.plan.threads)
            except ValueError as error:
                reason = " ".join(str(error).split())
        if reason is not None:
            self.missing[shown] = reason
            return
        self._add(shown, found.engine, found.label, found.file_bytes)

    def run(self, progress: Progress = lambda what, share: None) -> None:
        """Measure everything once a round; every second round backwards, so that nobody always follows the same one.

        Raises:
            ValueError: our own model does not run, or not within the memory and the time that it may take.
        """
        fleet = Fleet(self._started, self.plan.time_limit)
        try:
            self._start(fleet, progress)
            turns = list(self._turns())
            for i in range(self.plan.rounds):
                for j, (name, measure) in enumerate(turns if i % 2 == 0 else reversed(turns)):
                    share = (i + j / len(turns)) / self.plan.rounds
                    progress(f"round {i + 1} of {self.plan.rounds}: {name}", share)
                    measure(fleet)
        finally:
            fleet.close()
        self._derive()
        self._judge()

    def save(self, results: Results) -> None:
        """Put everything into a file of results, in place of what it has."""
        results.data |= {
            "conditions": asdict(self.conditions),
            "missing": self.missing,
            "engines": self.engines,
            "results": [],
        }
        for key, series in self.series.items():
            if series.measured:
                results.add("speed", key.name, dict(key.settings), self.figure(key))
        results.write()

    def figure(self, key: Key) -> dict[str, Any]:
        """A figure, ready for JSON, with its ratio to the same of our model."""
        ours = self.series.get(self._of_ours(key)) if key.engine != OURS else None
        return figure(key, self.series[key], ours)

    def _add(self, name: str, engine: Engine, label: str | None, file_bytes: int) -> None:
        self.engines[name] = {"label": label, "file_bytes": file_bytes}
        arguments = self._bound(engine.arguments) | {"memory_limit": self.plan.memory_limit}
        self._started[name] = replace(engine, arguments=arguments)
        self._started[_fresh(name)] = replace(engine, arguments=arguments, fresh=True)

    def _bound(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {**arguments, "cpus": self.plan.cpus}

    def _start(self, fleet: Fleet, progress: Progress) -> None:
        """Start everybody once: what cannot start is named, and what starts tells of itself."""
        for name in list(self.engines):
            progress(f"starting {name}", 0.0)
            try:
                info = fleet.start(name)
                # Says at once whether it can compute as well.
                fleet.ask(name, {"what": "one_text", **self._cold()})
            except Absent as error:
                reason = self._explain(name, str(error))
                if name == OURS:
                    raise ValueError(f"the model does not run: {reason}") from None
                self.missing[name] = reason
                del self.engines[name]
            else:
                self.engines[name] |= {key: info[key] for key in ("version", "settings", "kv_cache")}
                self.engines[name]["label"] = info.get("label") or self.engines[name]["label"]

    def _explain(self, name: str, reason: str) -> str:
        """Why an engine died, and if it may be the limit of memory, what it takes without one."""
        limit = self.plan.memory_limit
        if limit is None:
            return reason
        engine = self._started[_fresh(name)]
        unlimited = replace(engine, arguments={**engine.arguments, "memory_limit": None})
        fleet = Fleet({name: unlimited}, self.plan.time_limit)
        try:
            answer = fleet.ask(name, {"what": "one_text", **self._cold()})
        except Absent as error:
            return str(error)
        finally:
            fleet.close()
        if answer.address_bytes <= limit:
            return reason
        return (
            f"--memory-limit {limit:,} bytes is too little for {name} ({reason}): without a limit it took "
            f"{answer.address_bytes:,} bytes of address space, {answer.peak_bytes:,} of them resident"
        )

    def _cold(self) -> dict[str, Any]:
        return {"threads": self.plan.threads, "seconds": 0, "prompt": COLD_PROMPT, "tokens": COLD_TOKENS}

    def _turns(self) -> Iterator[tuple[str, Callable[[Fleet], None]]]:
        """Everything that a round measures, and what it is called."""
        plan = self.plan

        def turn(words: str, engine: str, measure: Callable[..., None], *arguments: Any) -> Any:
            return f"{engine}, {words}", lambda fleet: measure(fleet, engine, *arguments)

        for name in self.engines:
            yield turn("cold start", name, self._measure_cold)
        for name in self.engines:
            yield turn("text", name, self._measure_text)
        yield turn("memory", MACHINE, self._measure, "bandwidth", {})
        for context, batch in [*((c, 1) for c in plan.contexts), *((0, b) for b in plan.batches if b > 1)]:
            options = {"context": context, "batch": batch}
            for name in self.engines:
                yield turn("decode", name, self._measure, "decode", options)
        for name in self.engines:
            if not (self._rapl.reason and self._perf.reason):
                yield turn("counters", name, self._measure_counters)
        several = [(tokens, b) for tokens in plan.prompts[:1] for b in plan.batches if b > 1]
        for tokens, batch in [*((tokens, 1) for tokens in plan.prompts), *several]:
            options = {"tokens": tokens, "batch": batch}
            for name in self.engines:
                yield turn("prefill", name, self._measure, "prefill", options)

    def _measure(self, fleet: Fleet, engine: str, name: str, options: dict[str, Any]) -> None:
        """One value of one figure, which is what the engine answers."""
        key = self._key(name, engine, options)
        answer = self._ask(fleet, engine, [key], {"what": name, **options})
        if answer is not None:
            self._note(key, answer.value, answer)

    def _measure_cold(self, fleet: Fleet, engine: str) -> None:
        keys = {
            name: self._key(name, engine, {"prompt": COLD_PROMPT, "tokens": COLD_TOKENS})
            for name in ("cold_start", "load", "resident")
        }
        answer = self._ask(fleet, engine, list(keys.values()), {"what": "one_text", **self._cold()}, _fresh)
        if answer is not None:
            # What came after the first token is no part of the start.
            self._note(keys["cold_start"], answer.elapsed_s - answer.value, answer)
            self._note(keys["load"], answer.load_s, answer)
            self._note(keys["resident"], answer.peak_bytes, answer)

    def _measure_text(self, fleet: Fleet, engine: str) -> None:
        options = {"prompt": self.plan.prompt, "tokens": self.plan.tokens}
        keys = [self._key(name, engine, options) for name in ("ttft", "inter_token")]
        answer = self._ask(fleet, engine, keys, {"what": "text", **options})
        if answer is not None:
            for key in keys:
                samples = answer.value[key.name]
                self._note(key, median(samples), answer)
                self.series[key].samples += samples

    def _measure_counters(self, fleet: Fleet, engine: str) -> None:
        """Energy and cache misses of a text of known length, at about the time that decode takes."""
        decode = self.series.get(self._key("decode", engine, {"context": self.plan.contexts[0], "batch": 1}))
        if decode is None or not decode.measured:
            return
        room = self.model.config.max_seq_len
        n = self._counted_tokens.setdefault(
            engine, min(max(int(decode.measured[0] * self.plan.seconds), 8), room)
        )
        request = {"what": "decode", "seconds": 0, "tokens": n}
        for name, counter in (("energy_per_token", self._rapl), ("cache_misses_per_token", self._perf)):
            if counter.reason is not None:
                continue
            counted: list[float] = []
            key = self._key(name, engine, {})
            answer = self._ask(fleet, engine, [key], request, watch=partial(counter.watch, counted=counted))
            if answer is not None and counted:
                self._note(key, counted[0] / n, answer)

    def _ask(
        self,
        fleet: Fleet,
        engine: str,
        keys: list[Key],
        request: dict[str, Any],
        called: Callable[[str], str] = str,
        watch: Watch | None = None,
    ) -> Answer | None:
        request = {"threads": self.plan.threads, "seconds": self.plan.seconds, **request}
        try:
            return fleet.ask(called(engine), request, *([watch] if watch else []))
        except Absent as error:
            for key in keys:
                series = self.series.setdefault(key, Series())
                series.values.append(None)
                series.reason = str(error)
            return None

    def _note(self, key: Key, value: float, answer: Answer) -> None:
        series = self.series.setdefault(key, Series())
        series.values.append(value)
        series.usages += [answer.usage] if answer.usage else []

    def _key(self, name: str, engine: str, options: dict[str, Any]) -> Key:
        kv_cache = self.engines.get(engine, {}).get("kv_cache")
        settings = {"threads": self.plan.threads, "context": 0, "batch": 1, "kv_cache": kv_cache} | options
        if engine == MACHINE:
            settings = {"threads": self.plan.threads, "bytes": self.token_bytes}
        return Key(name, engine, tuple(sorted(settings.items())))

    def _of_ours(self, key: Key) -> Key:
        """The same figure of our model, as it is."""
        settings = dict(key.settings) | {"kv_cache": self.engines.get(OURS, {}).get("kv_cache")}
        return Key(key.name, OURS, tuple(sorted(settings.items())))

    def _derive(self) -> None:
        """Bytes that a step reads, and which share of the memory's bandwidth that is, round by round."""
        config = self.model.config
        if self.token_bytes < LEAST_READ:
            self.missing["memory bandwidth used"] = (
                f"a token reads {self.token_bytes:,} bytes, which lie in the caches"
            )
        read = self.series.get(self._key("bandwidth", MACHINE, {}), Series())
        for key, series in list(self.series.items()):
            options = dict(key.settings)
            if key.name != "decode" or not key.engine.startswith(OURS) or options["batch"] != 1:
                continue
            n_bytes = self.token_bytes + options["context"] * position_bytes(config, self.plan.kv_cache)
            self.series[replace(key, name="token_bytes")] = Series([n_bytes])
            if self.token_bytes < LEAST_READ:
                continue
            pairs = zip(series.values, read.values, strict=False)
            shares = [speed * n_bytes / most if speed and most else None for speed, most in pairs]
            self.series[replace(key, name="bandwidth_share")] = Series(shares)

    def _judge(self) -> None:
        """What failed, and whether the figures may be quoted."""
        for key, series in self.series.items():
            if not series.measured:
                options = dict(key.settings)
                words = f"{key.engine}: {key.name}, context {options['context']}, batch {options['batch']}"
                self.missing[words] = series.reason
        conditions, watched = self.conditions, [s for s in self.series.values() if s.usages]
        disturbed = [series for series in watched if series.is_disturbed]
        if disturbed:
            conditions.warnings.append(
                f"others used more than {LIMIT:.0%} of the processors in {len(disturbed)} of {len(watched)} figures"
            )
        if not watched:
            conditions.warnings.append("the system does not tell who else used the processors")
        if self.plan.rounds < QUOTABLE_ROUNDS:
            conditions.warnings.append(
                f"rounds: {self.plan.rounds}, which is a look; {QUOTABLE_ROUNDS} are a measurement"
            )
        conditions.quotable = bool(watched) and not disturbed and self.plan.rounds >= QUOTABLE_ROUNDS


def _fresh(name: str) -> str:
    return f"{name}, fresh process"


def _check_activations(activations: tuple[str, ...], config: ModelConfig) -> None:
    known = [width for width in get_args(Activations) if width != "none"]
    for width in activations:
        if width not in known:
            raise ValueError(f"--activations has {width!r}; expected some of {', '.join(known)}")
        if config.weights == "dense":
            raise ValueError("--activations: this model is dense and rounds no activations; leave it out")


def _token_weights(config: ModelConfig) -> int:
    """Weights that a token is multiplied with: those of the layers and the head."""
    linear = sum(n * k for n, k in config.linear_shapes().values())
    return config.n_layers * linear + config.vocab_size * config.d_model

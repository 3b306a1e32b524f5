"""What figures of `onebit bench` mean: rules as in `onebit.doctor.results`, for times, bytes and counters."""

from collections.abc import Callable

from onebit.doctor.finding import Finding, command, listed
from onebit.doctor.measured import Measured, Reading, pairs

OURS, MACHINE = "onebit", "machine"
# A first token that takes this much longer than its prompt and one step explain, and at least so many seconds.
TTFT_RATIO, TTFT_SECONDS = 1.5, 0.02
# Rounds that differ by more than this share are not steady.
SPREAD = 0.20
# The slowest hundredth of tokens against the usual one.
TAIL = 3.0
# Shares of the memory's bandwidth that a text reaches, where weights are too large for caches.
LOW_SHARE, CACHED_BYTES = 0.5, 64_000_000
CACHE_LINE = 64
# Misses against the bytes that a token has to read.
MISSES = 1.5
# Memory against the bytes of the file: once mapped, once in huge pages, and what Python takes.
RESIDENT, PROCESS_BYTES = 2.2, 250_000_000
# Eight texts at once against one.
BATCH_GAIN = 1.3
# A change of speed that is worth a word.
SLOWER = 0.05


def not_quotable(file: Reading) -> Finding | None:
    """Figures of a busy machine are not those of the program."""
    if file.conditions.get("quotable") is not False:
        return None
    warnings = [str(text) for text in file.conditions.get("warnings") or ()]
    return Finding(
        "warning",
        "conditions",
        "The machine was disturbed, or too few rounds were run: nothing to quote",
        listed(warnings, 4) or "quotable is false",
        "Other programs, a clock that changes and one lucky round move figures by more than most changes of code do.",
        _repeat(file),
        "Repeat it on a quiet machine, with 5 rounds or more; ratios within a round are worth more than either figure.",
    )


def unsteady(file: Reading) -> Finding | None:
    """Rounds of the same measurement should agree; where they do not, a difference between files is noise."""
    wide = [m for m in _speeds(file) if m.value > 0 and (m.high - m.low) / m.value > SPREAD]
    if not wide:
        return None
    wide.sort(key=lambda m: (m.low - m.high) / m.value)
    return Finding(
        "note",
        "unsteady",
        f"{len(wide)} figures differ by more than {SPREAD:.0%} from round to round",
        listed([_shown(m) for m in wide]),
        "Neighbours, heat and a clock that follows the load come and go; differences smaller than this say nothing.",
        _repeat(file),
        "onebit doctor names who else computes; more rounds narrow it.",
    )


def first_token_late(file: Reading) -> Finding | None:
    """A first token takes its prompt through the model, and no more: what is above that is not arithmetic."""
    late = []
    for first in file.find("speed", "ttft"):
        n = first.settings.get("prompt", 0)
        rates = [m for m in file.find("speed", "prefill", first.engine) if _threads(m) == _threads(first)]
        steps = [
            m
            for m in file.find("speed", "decode", first.engine)
            if _threads(m) == _threads(first) and m.settings.get("batch") == 1
        ]
        if not n or not rates or not steps:
            continue
        # The measured prompt that is nearest in length.
        rate = min(rates, key=lambda m: abs(m.settings.get("tokens", 0) - n)).value
        explained = n / rate + 1 / steps[0].value
        if first.value > TTFT_RATIO * explained and first.value - explained > TTFT_SECONDS:
            late.append(
                f"{first.engine}: {first.value:.3f} s for {n} tokens; {n} / {rate:.4g} + 1 / {steps[0].value:.4g} "
                f"tokens/s explain {explained:.3f} s"
            )
    if not late:
        return None
    return Finding(
        "warning",
        "first token",
        "The first token comes much later than its prompt explains",
        listed(late),
        "The rest is no arithmetic: pages of the file that are read for the first time, memory for the cache, a "
        "template or tokenizer, a queue before the engine.",
        command("onebit", "run", "Once upon a time", "-m", file.model_name, "--max-tokens", 1),
        "Run it twice: the second time the file is in memory. In a server look at its queue (/metrics).",
    )


def slow_tail(file: Reading) -> Finding | None:
    """Tokens take alike; a few slow ones are those in which a thread was taken away."""
    slow = [
        f"{m.engine}: p99 {1000 * m.more['p99']:.3g} ms, median {1000 * m.value:.3g} ms"
        for m in file.find("speed", "inter_token")
        if isinstance(m.more.get("p99"), int | float) and m.more["p99"] > TAIL * m.value > 0
    ]
    if not slow:
        return None
    return Finding(
        "warning",
        "tail",
        "Some tokens take far longer than the others",
        listed(slow),
        "Every layer waits for its slowest thread: one that loses its core for a moment holds up the token.",
        _repeat(file),
        "Leave a core to the rest of the machine (ONEBIT_THREADS), and look for neighbours with onebit doctor.",
    )


def far_from_memory(file: Reading) -> Finding | None:
    """A text of a large model is limited by memory; far below its bandwidth something else is in the way."""
    sizes = {_how(m): m.value for m in file.find("speed", "token_bytes")}
    low = [
        m
        for m in file.find("speed", "bandwidth_share", OURS)
        if m.high < LOW_SHARE and sizes.get(_how(m), 0) > CACHED_BYTES
    ]
    if not low:
        return None
    m = low[0]
    return Finding(
        "warning",
        "bandwidth",
        f"A text reaches {m.value:.0%} of what memory delivers",
        f"{sizes[_how(m)] / 1e6:,.0f} MB for each token, share {m.describe('.2f')} of the bandwidth measured beside, "
        f"{_threads(m)} threads, kernels {file.model.get('kernels')}",
        "Weights of this size come from memory for every token; good kernels reach 0.7 to 0.9. Slow kernels, few or "
        "too many threads, no huge pages, or memory of another node cost the rest.",
        command("onebit", "doctor", file.model_name),
        "onebit doctor looks at each of them.",
    )


def faster_than_memory(file: Reading) -> Finding | None:
    """No text of a large model reads more than memory delivers: then one of both figures is wrong."""
    sizes = {_how(m): m.value for m in file.find("speed", "token_bytes")}
    high = [
        m
        for m in file.find("speed", "bandwidth_share", OURS)
        if m.low > 1.05 and sizes.get(_how(m), 0) > CACHED_BYTES
    ]
    if not high:
        return None
    return Finding(
        "warning",
        "bandwidth",
        "The text was faster than memory: one of both was measured badly",
        listed([f"share {m.describe('.2f')}" for m in high]),
        "The bandwidth was measured while others read too, or the weights fit into a large cache.",
        _repeat(file),
        "Repeat it on a quiet machine; do not quote the share.",
    )


def many_misses(file: Reading) -> Finding | None:
    """A token has to bring its weights into the caches once; many more misses are reads for nothing."""
    sizes = [m.value for m in file.find("speed", "token_bytes", OURS)]
    found = file.find("speed", "cache_misses_per_token", OURS)
    if not sizes or not found:
        return None
    lines = min(sizes) / CACHE_LINE
    bad = [m for m in found if m.value > MISSES * lines]
    if not bad:
        return None
    return Finding(
        "warning",
        "cache misses",
        f"A token misses the caches {bad[0].value / lines:.1f} times as often as its weights explain",
        f"{bad[0].value:,.0f} misses; {min(sizes):,.0f} bytes are {lines:,.0f} cache lines",
        "Weights stream once, so they miss once. More comes from activations or a cache of keys and values that do not "
        "stay near, from threads that share a line, or from a neighbour that empties the caches.",
        "perf stat -e cache-misses,dTLB-load-misses "
        + command("onebit", "run", "Once upon a time", "-m", file.model_name, "--max-tokens", 200),
        "Try fewer threads, --kv-cache int8 for long texts, and a quiet machine.",
    )


def more_threads_than_cpus(file: Reading) -> Finding | None:
    """Threads without a CPU of their own wait for each other in every layer."""
    most = max((_threads(m) for m in file.measured if m.kind == "speed"), default=0)
    cpus = file.machine.get("hardware_threads")
    if not isinstance(cpus, int) or most <= cpus:
        return None
    return Finding(
        "warning",
        "threads",
        "More threads than the machine has CPUs",
        f"{most} threads, {cpus} hardware threads",
        "Every layer ends when its slowest thread does, and that one waits for a CPU.",
        _repeat(file),
        "Measure with one thread for each core.",
    )


def much_memory(file: Reading) -> Finding | None:
    """A mapped model needs its file, and a copy in huge pages at most; more is something else."""
    sizes = [m.value for m in file.find("speed", "token_bytes", OURS)]
    bad = [
        m
        for m in file.find("speed", "resident", OURS)
        if sizes and m.value > RESIDENT * min(sizes) + PROCESS_BYTES
    ]
    if not bad:
        return None
    return Finding(
        "note",
        "memory",
        "The process takes much more memory than its weights",
        f"{bad[0].value / 1e6:,.0f} MB resident; a token reads {min(sizes) / 1e6:,.0f} MB of weights",
        "Weights are mapped, and copied to huge pages where there is room. The rest is an embedding that a token does "
        "not read, a large vocabulary, and the cache of long contexts.",
        command("onebit", "info", file.model_name),
        "--no-huge-pages leaves weights in the file; --kv-cache int8 halves the cache.",
    )


def no_gain_at_once(file: Reading) -> Finding | None:
    """Several texts at once share the reading of weights; where that gains nothing, arithmetic is the limit."""
    found = file.find("speed", "decode", OURS)
    single = [m for m in found if m.settings.get("batch") == 1 and m.settings.get("context", 0) == 0]
    many = [m for m in found if m.settings.get("batch", 1) >= 4]
    bad = [m for m in many if single and m.high < BATCH_GAIN * single[0].value]
    if not bad:
        return None
    return Finding(
        "note",
        "batches",
        "Texts at once come no faster than one after the other",
        f"{bad[0].value:.4g} tokens/s for {bad[0].settings['batch']} texts, {single[0].value:.4g} for one",
        "A small model lies in the caches and computes all the time: there is nothing to share. A large one gains "
        "several times, unless its kernels are slow.",
        _repeat(file),
        "onebit doctor tells whether the best kernels are in use.",
    )


def not_measured(file: Reading) -> Finding | None:
    """What could not be measured is missing for a reason, which is told."""
    if not file.missing:
        return None
    return Finding(
        "note",
        "missing",
        f"{len(file.missing)} things were not measured",
        listed([f"{name}: {reason}" for name, reason in file.missing.items()]),
        "Counters of the hardware need rights that containers and virtual machines seldom give.",
        _repeat(file),
    )


def other_machine(before: Reading, after: Reading) -> Finding | None:
    """Speeds of two machines, or under two conditions, compare machines and not programs."""
    differ = [
        f"{name}: {old} and {new}"
        for name, old, new in [
            *((n, before.machine.get(n), after.machine.get(n)) for n in ("cpu", "hardware_threads")),
            *((n, before.model.get(n), after.model.get(n)) for n in ("kernels",)),
            *(
                (n, before.conditions.get(n), after.conditions.get(n))
                for n in ("governor", "turbo", "pinned")
            ),
        ]
        if old != new
    ]
    if not differ:
        return None
    return Finding(
        "warning",
        "machines",
        "The files are of different machines or conditions: their speeds do not compare programs",
        listed(differ, 5),
        "Only what ran side by side, round by round, differs by the program alone.",
        _repeat(after),
        "Measure both again on one machine; ratios within one file are sound.",
    )


def slower(before: Reading, after: Reading) -> Finding | None:
    """A speed whose rounds are all below those of before has changed, whatever the noise."""
    if other_machine(before, after):
        return None
    bad = [
        f"{_shown(old)} became {new.describe()} ({new.value / old.value - 1:+.0%})"
        for old, new in pairs(before, after)
        if old.kind == "speed"
        and old.figure in ("decode", "prefill")
        and new.high < old.low
        and new.value < (1 - SLOWER) * old.value
    ]
    if not bad:
        return None
    return Finding(
        "warning",
        "slower",
        f"{len(bad)} speeds fell, in every round",
        listed(bad),
        "The slowest round of before is faster than the fastest one of now.",
        _repeat(after),
        "Measure both again now, one after the other: a machine that is busier today looks the same.",
    )


def _speeds(file: Reading) -> list[Measured]:
    steady = ("decode", "prefill", "ttft", "inter_token", "bandwidth")
    return [m for m in file.measured if m.kind == "speed" and m.figure in steady]


def _shown(m: Measured) -> str:
    settings = {
        name: value for name, value in m.settings.items() if name in ("context", "batch", "tokens", "prompt")
    }
    words = ", ".join(f"{name} {value}" for name, value in settings.items())
    return f"{m.engine} {m.figure} {f'({words}) ' if words else ''}{m.describe()}"


def _threads(m: Measured) -> int:
    threads = m.settings.get("threads")
    return threads if isinstance(threads, int) else 0


def _how(m: Measured) -> str:
    """Engine and settings of a measurement, which its figures have in common."""
    return repr((m.engine, sorted(m.settings.items())))


def _repeat(file: Reading) -> str:
    """The command that measured a file."""
    return next((m.command for m in file.measured if m.command), command("onebit", "bench", file.model_name))


RULES: tuple[Callable[[Reading], Finding | None], ...] = (
    not_quotable,
    unsteady,
    first_token_late,
    slow_tail,
    far_from_memory,
    faster_than_memory,
    many_misses,
    more_threads_than_cpus,
    much_memory,
    no_gain_at_once,
    not_measured,
)
PAIR_RULES: tuple[Callable[[Reading, Reading], Finding | None], ...] = (other_machine, slower)

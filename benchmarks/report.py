"""From measurements to what is said about them: the table, the targets, the JSON line.

A comparison is made round by round, between neighbours in time; what is reported is the median of these ratios.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from plan import FRESH, LLAMA, MACHINE, OURS, UNITS, Facts, Task, task

from onebit.bench.figures import Series
from onebit.bench.foreign import LIMIT

Results = dict[Task, Series]


@dataclass
class Target:
    """What a figure should be, and is.

    Args:
        name: in words.
        goal: the limit.
        at_most: whether the limit is from above.
        unit: of goal and values.
        values: of each round.
        is_disturbed: whether others used the processors while a part of it was measured.
    """

    name: str
    goal: float
    at_most: bool
    unit: str
    values: list[float]
    is_disturbed: bool = False

    @property
    def met(self) -> bool | None:
        """None: not measured, or not alone on the machine: then others decided it."""
        if not self.values or self.is_disturbed:
            return None
        return median(self.values) <= self.goal if self.at_most else median(self.values) >= self.goal


def targets(results: Results, known: Facts) -> list[Target]:
    """Every target of decode, prompts, memory and Python, from one run."""
    most, found = known.threads, []

    def add(
        name: str, goal: float, unit: str, formula: Callable[..., float], *tasks: Task, at_most: bool = False
    ) -> None:
        series = [results.get(t, Series()) for t in tasks]
        rounds = zip(*(s.values for s in series), strict=False)
        values = [formula(*values) for values in rounds if None not in values]
        found.append(Target(name, goal, at_most, unit, values, any(s.is_disturbed for s in series)))

    tq2, q4 = f"{LLAMA} TQ2_0", f"{LLAMA} Q4_K_M"
    for t in sorted({1, most}):
        read, threads = task(MACHINE, "read", t), count(t, "thread")
        share = "% of memory read"
        for what, name, goal, n_bytes in (
            ("linear", "layers' matrices in decode", 90, known.linear_bytes),
            ("decode", "whole step, exact head", 80, known.token_bytes),
        ):
            add(
                f"{name}, {threads}", goal, share, lambda x, r, n=n_bytes: x * n / r / 1e7,
                task(OURS, what, t), read,
            )  # fmt: skip
    for t, goal in {most: 3.0, 1: 2.0}.items():
        name = f"decode against {tq2}, {count(t, 'thread')}"
        add(name, goal, "x", ratio, task(OURS, "decode", t), task(tq2, "decode", t))
    shortlist = task(OURS, "decode", most, shortlist=True)
    add(
        f"the same, int4 shortlist, {count(most, 'thread')}",
        3.7,
        "x",
        ratio,
        shortlist,
        task(tq2, "decode", most),
    )

    prompt = task(OURS, "prefill", most, tokens=512)
    peak = task(MACHINE, "dot", most)
    arithmetic = lambda x, p: x * known.linear_weights / p / 1e7  # noqa: E731
    add(f"prefill of 512, {known.isa} kernels", 80, "% of dot peak", arithmetic, prompt, peak)
    if known.isa == "amx":
        # What a machine without tiles would do; the peak of the tiles themselves is in the table.
        vnni = task(OURS, "prefill", most, tokens=512, isa="avx512vnni")
        add("prefill of 512, avx512vnni kernels", 80, "% of dot peak", arithmetic, vnni, peak)
    for peer, goal in ((tq2, 6.0), (q4, 3.0)):
        add(
            f"prefill of 512 against {peer}",
            goal,
            "x",
            ratio,
            prompt,
            task(peer, "prefill", most, tokens=512),
        )

    add(
        "8 texts together against one", 3.5, "x", ratio, task(OURS, "batch", most), task(OURS, "decode", most)
    )
    long = task(OURS, "decode", most, context=8192, kv_cache="int8")
    short = task(OURS, "decode", most)
    add("attention at 8,192, int8 cache", 8, "ms", lambda x, y: 1e3 / x - 1e3 / y, long, short, at_most=True)
    add(
        "memory beside file, keys and values",
        64,
        "MB",
        lambda x: x,
        task(FRESH, "footprint", most),
        at_most=True,
    )
    add("load of a warm file", 0.5, "s", lambda x: x, task(FRESH, "load", most), at_most=True)
    add(
        "shipped model: step outside forward",
        25,
        "%",
        lambda x: x,
        task(OURS, "overhead", most),
        at_most=True,
    )
    return found


def ratio(ours: float, peer: float) -> float:
    return ours / peer


def count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")


def number(value: float) -> str:
    """Three digits that matter."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def spread(values: list[float]) -> str:
    """Median, least and most."""
    return f"{number(median(values))} [{number(min(values))} .. {number(max(values))}]"


def is_quotable(results: Results) -> bool | None:
    """Whether others left the processors alone, over all and in every measurement; None: not known."""
    measured = [series for series in results.values() if series.measured and series.usages]
    return not any(series.is_disturbed for series in measured) if measured else None


def table(
    results: Results,
    known: Facts,
    absent: dict[str, str],
    peaks: dict[str, int],
    info: dict[str, dict[str, Any]],
) -> str:
    """All measurements, then the targets, in plain text."""
    lines, engine = [], None
    for t, series in results.items():
        if t.engine in absent and not series.measured:
            continue
        if t.engine != engine:
            engine = t.engine
            peak = f"   (resident at most {peaks[engine] / 1e6:,.0f} MB)" if engine in peaks else ""
            lines += ["", f"{engine}{peak}"]
            lines += [
                f"  ({info[engine][key]})" for key in ("version", "settings") if key in info.get(engine, {})
            ]
        unit = UNITS[t.what][1]
        shown = f"{spread(series.measured)} {unit}" if series.measured else f"not measured: {series.reason}"
        mark = " *" if series.is_disturbed else ""
        lines.append(f"  {t.title:<44} {count(t.threads, 'thread'):>10}   {shown}{mark}")
    lines += ["", *(f"{name}: not run: {reason}" for name, reason in absent.items())] if absent else []
    lines += ["", f"{'target':<50} {'goal':>24}   measured"]
    for target in targets(results, known):
        goal = f"{'<=' if target.at_most else '>='} {target.goal:g} {target.unit}"
        measured = spread(target.values) if target.values else "not measured"
        verdict = {True: "met", False: "NOT MET", None: "void *" if target.values else "-"}[target.met]
        lines.append(f"{target.name:<50} {goal:>24}   {measured:<28} {verdict}")
    if known.shape != "2b4t":
        lines.append("(targets are set for the shape 2b4t)")
    quotable = is_quotable(results)
    if quotable is None:
        lines.append("the system does not tell who else used the processors: nothing here is to be quoted")
    elif not quotable:
        lines.append(
            f"* others used more than {LIMIT:.0%} of the processors: NOT QUOTABLE; run again on a quiet machine"
        )
    return "\n".join(lines)


def as_json(
    results: Results, known: Facts, absent: dict[str, str], peaks: dict[str, int], **more: Any
) -> dict[str, Any]:
    """The whole run, ready for json.dumps."""
    return {
        "format": 1,
        "shape": known.shape,
        "encoding": known.encoding,
        "isa": known.isa,
        "threads": known.threads,
        "linear_weights": known.linear_weights,
        "linear_bytes": known.linear_bytes,
        "token_bytes": known.token_bytes,
        "file_bytes": known.file_bytes,
        **more,
        "quotable": is_quotable(results),
        "foreign": foreign(results.values()),
        "peak_resident_bytes": peaks,
        "absent": absent,
        "results": [
            {
                "engine": t.engine,
                "what": t.what,
                "threads": t.threads,
                **dict(t.options),
                "unit": UNITS[t.what][1],
                "median": rounded(median(series.measured)) if series.measured else None,
                "min": rounded(min(series.measured, default=None)),
                "max": rounded(max(series.measured, default=None)),
                "values": [rounded(value) for value in series.values],
                "foreign": rounded(series.foreign),
                **({"reason": series.reason} if series.reason else {}),
            }
            for t, series in results.items()
        ],
        "targets": [
            {
                "name": target.name,
                "goal": target.goal,
                "at_most": target.at_most,
                "unit": target.unit,
                "measured": rounded(median(target.values)) if target.values else None,
                "min": rounded(min(target.values, default=None)),
                "max": rounded(max(target.values, default=None)),
                "met": target.met,
                "disturbed": target.is_disturbed,
            }
            for target in targets(results, known)
        ],
    }


def foreign(series: Iterable[Series]) -> dict[str, float | None]:
    """Shares of all processors that others used, over the run and in the worst measurement."""
    usages = [usage for s in series for usage in s.usages]
    if not usages:
        return {"mean": None, "stolen": None, "idle_engines": None, "worst": None}
    n = len(usages)
    return {
        "mean": rounded(sum(u.foreign for u in usages) / n),
        "stolen": rounded(sum(u.stolen for u in usages) / n),
        "idle_engines": rounded(sum(u.idle for u in usages) / n),
        "worst": rounded(max(u.foreign for u in usages)),
    }


def rounded(value: float | None) -> float | None:
    """Five digits: more would be noise."""
    return None if value is None else float(f"{value:.5g}")


def slug(cpu: str, isa: str) -> str:
    """A CPU's name for a file, as in "amd-epyc-9r14"; with the kernels where the name says little."""
    words = re.sub(r"\((?:r|tm)\)|\bcpu\b|\bprocessor\b|\d+-core\b|@.*", " ", cpu.lower())
    name = "-".join(re.findall(r"[a-z0-9.]+", words)) or "cpu"
    return name if re.search(r"\d", name) else f"{name}-{isa}"

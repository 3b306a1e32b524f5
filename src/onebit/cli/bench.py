"""`onebit bench`: how fast a model is, beside what the machine allows and other engines."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onebit.cli.arguments import KvCache, Model, Threads, parse_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from onebit.bench.figures import Key
    from onebit.bench.session import Session

_WORDS = {
    "cold_start": "cold start", "load": "load", "ttft": "first token", "inter_token": "token to token",
    "decode": "text", "prefill": "prompt", "resident": "memory, resident", "token_bytes": "bytes per token",
    "bandwidth_share": "memory bandwidth used", "energy_per_token": "energy per token",
    "cache_misses_per_token": "cache misses per token",
}  # fmt: skip


def bench(
    model: Model = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ENGINE[=FILE]",
            help="Measure this engine in turn: llama.cpp, transformers, torch, onnxruntime; "
            "with the same model, or FILE as it is. Repeatable.",
            show_default=False,
        ),
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(
            help="Speed with inputs of other widths: a15, a8, a4.8, a4, a1, by commas.", show_default=False
        ),
    ] = None,
    contexts: Annotated[
        str | None,
        typer.Option(
            help="Tokens that stand before a text that grows, by commas; default: 0,256.", show_default=False
        ),
    ] = None,
    batches: Annotated[
        str | None, typer.Option(help="Texts that grow at once, by commas; default: 8.", show_default=False)
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="Tokens of prompts, by commas; default: 128,512.", show_default=False),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Times that everything is measured; below 5 is a look.")] = 5,
    seconds: Annotated[float, typer.Option(help="Of each measurement, about.")] = 0.3,
    threads: Threads = None,
    pin: Annotated[
        str | None,
        typer.Option(
            metavar="CPUS",
            help="Bind engines to CPUs: auto (one of each core), or 0,2-3.",
            show_default=False,
        ),
    ] = None,
    governor_check: Annotated[
        bool, typer.Option(help="Warn of governor, turbo, and other programs before the start.")
    ] = True,
    memory_limit: Annotated[
        str | None,
        typer.Option(help="Address space that each engine may take, as in 4GiB.", show_default=False),
    ] = None,
    time_limit: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="That an engine may take for one measurement, or to load."),
    ] = 600,
    kv_cache: KvCache = "bf16",
    out: Annotated[
        Path | None, typer.Option(help="File of results (.json) of this run.", show_default=False)
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(help="Draw roofline and latencies (.png; extra report).", show_default=False),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the results as one line of JSON, the table to stderr.")
    ] = False,
) -> None:
    """Measure how fast a model is: start, latencies, tokens per second, memory, limits of the machine.

    Example: onebit bench --picture speed.png

    Example: onebit bench model.gguf --against llama.cpp=model.gguf --out speed.json
    """
    from tempfile import TemporaryDirectory

    from rich.console import Console

    from onebit import formats
    from onebit.bench import conditions, peers
    from onebit.bench.session import Plan, Session
    from onebit.checkpoint import quantize
    from onebit.cli.bar import bar
    from onebit.cli.run import ready
    from onebit.engine.memory import KV_FORMATS
    from onebit.engine.model import choose_threads
    from onebit.llm import LLM, SHIPPED_MODEL
    from onebit.results import BENCH, Results, model_facts

    # What can be wrong is said before anything that takes long.
    threads = choose_threads(threads)
    if kv_cache not in KV_FORMATS:
        raise ValueError(f"--kv-cache is {kv_cache!r}; expected {', '.join(KV_FORMATS)}")
    chosen = [peers.parse(text) for text in dict.fromkeys(against or ())]
    limit = None if memory_limit is None else parse_bytes("--memory-limit", memory_limit)
    pinned = None if pin is None else conditions.parse_cpus(pin, threads)
    if picture is not None:
        from onebit.bench.picture import check, draw

        check(picture)
    path = SHIPPED_MODEL if model is None else ready(model)
    checkpoint = quantize(formats.read(path))
    context = checkpoint.config.max_seq_len
    plan = Plan(
        threads,
        kv_cache,
        rounds,
        seconds,
        _numbers("--contexts", contexts) or tuple(n for n in (0, 256) if 2 * n <= context),
        _numbers("--batches", batches) or (8,),
        _numbers("--prompts", prompts) or tuple(n for n in (128, 512) if n <= context) or (context // 2,),
        cpus=None if pinned is None else tuple(pinned),
        memory_limit=limit,
        time_limit=time_limit,
        **({} if context >= 128 else {"prompt": context // 4, "tokens": context // 4}),
    )
    plan.check(context)
    facts = model_facts(LLM(checkpoint, threads, kv_cache, huge_pages=False), model or path.name, path)
    results = Results(out, facts, BENCH)
    widths = tuple(width.strip() for width in activations.split(",")) if activations else ()
    state = conditions.look(threads, pinned, limit, governor_check)
    session = Session(path, checkpoint, plan, state, widths)
    # Said now: a run takes minutes.
    for warning in state.warnings:
        print(f"onebit: warning: {warning}", file=sys.stderr)
    with TemporaryDirectory(prefix="onebit-bench-") as folder:
        with bar() as progress:
            for name, file in chosen:
                progress(f"the model for {name}", 0.0)
                session.add_peer(name, file, Path(folder))
            session.run(progress)
    session.save(results)
    console = Console(stderr=as_json)
    for part in _report(session, results.data):
        console.print(part)
    if picture is not None:
        draw(results.data, picture)
    if as_json:
        print(json.dumps(results.data))


def _numbers(option: str, text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    try:
        return tuple(dict.fromkeys(int(item) for item in text.split(",")))
    except ValueError:
        raise ValueError(f"{option} is {text!r}; expected whole numbers with commas, as in 0,256") from None


def _report(session: "Session", data: dict[str, Any]) -> "Iterator[Table | str]":
    """The table, then what is missing, then what to think of it."""
    from rich.markup import escape

    conditions, machine = session.conditions, data["machine"]
    plan = session.plan
    read = [row for row in data["results"] if row["name"] == "bandwidth"]
    yield escape(
        f"{machine['cpu']}, {machine['hardware_threads']} CPUs; {_count(plan.threads, 'thread')}, "
        f"{data['model']['kernels']} kernels" + (f", pinned to CPUs {conditions.pinned}" if plan.cpus else "")
    )
    for row in read:
        yield escape(
            f"memory read: {_number(row['value'], 'bytes/s')}{_spread(row)}, over and over the "
            f"{_number(row['settings']['bytes'], 'bytes')} that a token reads"
        )
    yield _table(session)
    for name, facts in session.engines.items():
        yield escape(f"{name}: {facts['version']}; {facts['settings']}; {facts['kv_cache']} keys and values")
    if session.missing:
        yield ""
    for name, reason in session.missing.items():
        yield f"not measured: {escape(name)}: {escape(reason)}"
    for warning in conditions.warnings:
        yield f"[yellow]warning:[/yellow] {escape(warning)}"
    yield "[green]quotable[/green]" if conditions.quotable else "[red]not to be quoted[/red]"


def _table(session: "Session") -> "Table":
    from onebit.bench.figures import UNITS
    from onebit.bench.session import MACHINE
    from onebit.cli.info import new_table

    heads = [f"{name}\n{facts['label'] or 'label not known'}" for name, facts in session.engines.items()]
    table = new_table("", *heads)
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    rows: dict[tuple[str, str], dict[str, Key]] = {}
    for key in session.series:
        if key.engine != MACHINE:
            rows.setdefault((key.name, _settings(key)), {})[key.engine] = key
    order = list(UNITS)
    for name, words in sorted(rows, key=lambda row: order.index(row[0])):
        found = {
            engine: session.figure(key)
            for engine, key in rows[name, words].items()
            if session.series[key].measured
        }
        if not found:
            continue
        cells = {engine: _number(f["value"], f["unit"]) + _spread(f) for engine, f in found.items()}
        cells |= {e: f"{cells[e]}\n{f['ratio']['value']:.3g}x" for e, f in found.items() if "ratio" in f}
        table.add_row(_WORDS[name] + words, *(cells.get(engine, "") for engine in session.engines))
        for p in (95, 99):
            tails = {e: _number(f[f"p{p}"], f["unit"]) for e, f in found.items() if f"p{p}" in f}
            if tails:
                table.add_row(f"  {p} % within", *(tails.get(e, "") for e in session.engines))
    lines = [f"median of {_count(session.plan.rounds, 'round')}, in turn"]
    if session.plan.rounds > 1:
        lines.append("± half of least to most")
    if len(session.engines) > 1:
        lines.append("3x: onebit is three times as good")
    table.caption = "; ".join(lines)
    return table


def _settings(key: "Key") -> str:
    """What of the settings is not plain from the figure's name."""
    options = dict(key.settings)
    match key.name:
        case "decode" | "token_bytes" | "bandwidth_share":
            if options["batch"] > 1:
                return f", {options['batch']} at once"
            return f" after {options['context']:,}" if options["context"] else ""
        case "prefill":
            several = f", {options['batch']} at once" if options["batch"] > 1 else ""
            return f" of {options['tokens']:,}{several}"
        case "ttft":
            return f" after {options['prompt']:,}"
    return ""


def _number(value: float, unit: str) -> str:
    """A value with three digits that matter, in a unit of its size."""
    scales = {
        "s": ((1, "s"), (1e-3, "ms"), (1e-6, "µs")),
        "bytes": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes")),
        "bytes/s": ((1e9, "GB/s"), (1e6, "MB/s")),
        "share": ((0.01, "%"),),
        "J": ((1, "J"), (1e-3, "mJ"), (1e-6, "µJ")),
        "count": ((1e6, "million"), (1e3, "thousand"), (1, "")),
    }
    scale, word = next(((s, w) for s, w in scales.get(unit, ((1, unit),)) if abs(value) >= s), (1, unit))
    value /= scale
    shown = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{shown} {word}"


def _spread(found: dict[str, Any]) -> str:
    middle = found["value"]
    return f" ±{50 * (found['high'] - found['low']) / middle:.0f}%" if found["rounds"] > 1 and middle else ""


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")

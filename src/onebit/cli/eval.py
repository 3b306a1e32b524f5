"""`onebit eval`: how well a model predicts texts, how far it is from another, what it writes and reaches in tasks."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onebit.cli.arguments import KvCache, Model, Threads

if TYPE_CHECKING:
    from rich.table import Table

    from onebit.eval.tasks import Chosen


def eval(
    model: Model = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Perplexity and bits per byte of this text (plain, .xz, .bz2, .gz); repeatable.",
            show_default=False,
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(help="Tokens that the model reads at once; default: 512, or a shorter context."),
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens from one window to the next; default: half a window.")
    ] = None,
    bos: Annotated[
        str, typer.Option(help="Begin-of-text token of every window: auto (as the tokenizer), always, never.")
    ] = "auto",
    like_llama_cpp: Annotated[
        bool,
        typer.Option(
            "--like-llama-cpp", help="Windows of llama.cpp's perplexity: in a row, the first half only read."
        ),
    ] = False,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help="Read only so many of the first tokens of a text; of --generate write at most so many, 200.",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="Compare with this model on --text: KL divergence, top-1 agreement.", show_default=False
        ),
    ] = None,
    keep: Annotated[
        int, typer.Option(help="Tokens of the reference that are kept for each position, 8 bytes each.")
    ] = 256,
    generate: Annotated[
        Path | None,
        typer.Option(
            help="Continue the prompts in this file, one a line; measure repetition, words, entropy.",
            show_default=False,
        ),
    ] = None,
    sampling: Annotated[
        list[str] | None,
        typer.Option(
            help="With --generate: temperature=1,min_sigma=2; the rest is as in onebit run; repeatable.",
            show_default=False,
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(help="With --generate: bits per byte of the texts by this model.", show_default=False),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-evaluation-harness: hellaswag,arc_easy,...", show_default=False),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder with the files of the tasks; default: what the harness downloads.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Ask only the first items of every task.", show_default=False)
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(help="Examples before every item; default: the task's own.", show_default=False),
    ] = None,
    seeds: Annotated[
        int, typer.Option(help="How often examples are drawn, where they are; texts of each prompt.")
    ] = 3,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File of results (.json); what it has of this model is not measured again.",
            show_default=False,
        ),
    ] = None,
    threads: Threads = None,
    kv_cache: KvCache = "bf16",
) -> None:
    """Measure a model: perplexity of texts, distance from another model, texts that it writes, tasks.

    Example: onebit eval model.gguf --text wiki.test.raw.xz --like-llama-cpp

    Example: onebit eval model.onebit --text wiki.test.raw.xz --against model.gguf

    Example: onebit eval --generate prompts.txt --sampling temperature=0.8 --sampling temperature=0.8,min_sigma=2

    Example: onebit eval model.onebit --tasks hellaswag,piqa --data data --limit 200 --out results.json
    """
    if not text and not tasks and not generate:
        raise ValueError("nothing to measure: give --text FILE, --generate FILE or --tasks NAMES, or several")
    if against and not text:
        raise ValueError("--against compares models on a text; give --text FILE")
    if (sampling or judge) and not generate:
        raise ValueError("--sampling and --judge are about texts that are written; give --generate FILE")
    for name, number in (("--limit", limit), ("--max-tokens", max_tokens), ("--seeds", seeds)):
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}; expected at least 1")
    names = [name.strip() for name in tasks.split(",") if name.strip()] if tasks else []

    from rich.console import Console

    from onebit.cli.bar import bar
    from onebit.cli.run import ready
    from onebit.eval.samples import setting
    from onebit.eval.session import Session
    from onebit.eval.texts import Windows, read_text
    from onebit.llm import SHIPPED_MODEL, load
    from onebit.results import Results, model_facts

    # What can be wrong is read before anything that takes long.
    texts = [(str(file), read_text(file)) for file in text or ()]
    prompts = [line for line in read_text(generate).splitlines() if line.strip()] if generate else []
    if generate and not prompts:
        raise ValueError(f"{generate}: holds no prompt; expected one a line")
    settings = [(given, setting(given, max_tokens or 200)) for given in sampling or [""]] if generate else []
    chosen = _choose(names, data, shots) if names else []
    path = SHIPPED_MODEL if model is None else ready(model)
    llm = load(path, threads, kv_cache)
    results = Results(out, model_facts(llm, model or path.name, path))
    windows = Windows.of(llm, window, stride, bos, like_llama_cpp) if texts else None
    reference = None if against is None else ready(against)
    reader = None if judge is None else ready(judge)
    console = Console()
    try:
        with bar() as progress:
            session = Session(llm, results, progress)
            for name, content in texts:
                assert windows is not None
                if against is None or reference is None:
                    found = session.text(name, content, windows, max_tokens)
                else:
                    found = session.against(name, content, windows, against, reference, keep, max_tokens)
                console.print(_text_table(found, llm.label))
            written = [
                (given, session.samples(str(generate), prompts, params, seeds, judge, reader))
                for given, params in settings
            ]
            found_tasks = [session.task(task, limit, seeds) for task in chosen]
    except KeyboardInterrupt:
        if out is None:
            raise
        results.write()
        print("onebit: stopped; the same command goes on from here", file=sys.stderr)
        raise typer.Exit(130) from None
    if written:
        console.print(_samples_table(str(generate), written, llm.label))
    if found_tasks:
        console.print(_tasks_table(found_tasks, llm.label))
    for note in [note for found in found_tasks for note in _notes(found)]:
        print(f"onebit: {note}", file=sys.stderr)


def _choose(names: list[str], data: Path | None, shots: int | None) -> "list[Chosen]":
    from onebit.cli.bar import bar
    from onebit.eval import tasks

    with bar() as progress:
        progress("reading the items", 0.0)
        return tasks.choose(names, data, shots)


def _text_table(found: dict[str, Any], label: str) -> "Table":
    from onebit.cli.info import new_table

    settings = found["settings"]
    table = new_table(found["name"], label, "95 % from", "to")
    rows = dict(found["figures"])
    names = {"perplexity": "perplexity", "bits_per_byte": "bits per byte"}
    names |= {
        "kl": "KL, nats per token",
        "top1": "same likeliest token",
        "nll_difference": "nats more per token",
    }
    for name, figure in {**rows, **found.get("distance", {})}.items():
        table.add_row(names[name], *_cells(figure, is_share=name == "top1"))
    for name, figure in found.get("reference_figures", {}).items():
        table.add_row(f"{names[name]} of the reference", *_cells(figure))
    kind = "as llama.cpp" if settings["halves"] else f"stride {settings['stride']}"
    bos = "no begin token" if settings["bos"] is None else f"begin token {settings['bos']}"
    table.caption = (
        f"{found['n_scored']:,} of {found['n_tokens']:,} tokens count, in {found['n_windows']:,} windows of "
        f"{settings['window']}, {kind}, {bos}; {_speed(found)}"
    )
    return table


def _samples_table(name: str, written: list[tuple[str, dict[str, Any]]], label: str) -> "Table":
    from onebit.cli.info import new_table

    names = {
        "repetition": "3-grams repeated",
        "distinct_words": "distinct words",
        "entropy": "entropy, nats",
        "judge_bits_per_byte": "judge, bits per byte",
    }
    shown = {key: head for key, head in names.items() if key in written[0][1]["figures"]}
    table = new_table(name, *shown.values())
    for given, found in written:
        cells = []
        for key in shown:
            is_share = key in ("repetition", "distinct_words")
            figure = found["figures"].get(key)
            half = figure and figure["stderr"] is not None and (figure["high"] - figure["low"]) / 2
            value = _number(figure and figure["value"], is_share)
            cells.append(f"{value} ± {_number(half, is_share)}" if half else value)
        table.add_row(given or "default", *cells)
    found = written[0][1]
    settings = found["settings"]
    judge = f", judged by {settings['judge']}" if settings["judge"] else ""
    table.caption = (
        f"{label}: {found['n_texts']:,} texts of each setting, of up to {settings['max_tokens']} tokens, seeds 0 to "
        f"{settings['seeds'] - 1}{judge}; ± 95 %"
    )
    return table


def _tasks_table(found: list[dict[str, Any]], label: str) -> "Table":
    from onebit.cli.info import new_table

    table = new_table("task", "metric", label, "stderr", "95 % from", "to", "items", "shots", "tokens/s")
    for task in found:
        for i, (name, figure) in enumerate(task["figures"].items()):
            value, low, high = _cells(figure, is_share=name != "perplexity")
            stderr = _number(figure["stderr"], is_share=name != "perplexity")
            items = f"{task['n_items']:,} of {task['n_all']:,}"
            rate = f"{task['computed_tokens'] / task['seconds']:,.0f}" if task["seconds"] else ""
            rest = (items, str(task["shots"]), rate) if i == 0 else ("", "", "")
            table.add_row(task["name"] if i == 0 else "", name, value, stderr, low, high, *rest)
    return table


def _notes(task: dict[str, Any]) -> Iterator[str]:
    """What a reader of a result should know of it."""
    name = task["name"]
    if task["n_cut"]:
        yield (
            f"{name}: {task['n_cut']:,} of {task['n_requests']:,} requests were longer than the context and lost "
            "their beginning"
        )
    if task["n_published"] and task["n_all"] < task["n_published"]:
        yield f"{name}: the data has {task['n_all']:,} of the {task['n_published']:,} published items"
    if task["seeds"]:
        yield f"{name}: examples drawn with seeds {', '.join(map(str, task['seeds']))}"


def _cells(figure: dict[str, float | None], is_share: bool = False) -> tuple[str, str, str]:
    value, low, high = (_number(figure[key], is_share) for key in ("value", "low", "high"))
    return value, low, high


def _number(value: float | None, is_share: bool) -> str:
    if value is None:
        return ""
    return f"{value:.1%}" if is_share else f"{value:.4g}"


def _speed(found: dict[str, Any]) -> str:
    return f"{found['computed_tokens'] / found['seconds']:,.0f} tokens/s" if found["seconds"] else ""

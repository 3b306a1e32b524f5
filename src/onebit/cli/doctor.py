"""`onebit doctor`: what is wrong with this machine, a model, or what was measured, and what helps."""

import json
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated

import typer

from onebit.cli.arguments import Model, Threads

if TYPE_CHECKING:
    from rich.console import Console

    from onebit.doctor.finding import Finding
    from onebit.formats import Progress

# Colours and words of severities.
_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan", "ok": "green"}


def doctor(
    model: Model = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(
            help="Read this file of onebit eval or onebit bench; further ones are compared with the first.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="A text of the kind that the model is for: try what else its config could mean, and fit the "
            "temperature of its head.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the model with that temperature in it (.onebit).",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    threads: Threads = None,
) -> None:
    """Look for what is wrong with this machine, a model, or results; every finding has its evidence and a command.

    The worst comes first. The exit code is 1 if there is an error among the findings, 2 if the doctor could not look.

    Example: onebit doctor model.gguf

    Example: onebit doctor model.gguf --text wiki.test.raw.xz

    Example: onebit doctor --results before.json --results after.json
    """
    if out is not None and text is None:
        raise ValueError("--out writes the model with a fitted temperature; give --text FILE to fit it on")
    if out is not None and out.suffix != ".onebit":
        raise ValueError(f"--out is {out}; expected a file name that ends in .onebit")

    from onebit.cli.bar import bar
    from onebit.doctor.finding import worst_first
    from onebit.engine.model import choose_threads

    if threads is not None:
        choose_threads(threads)

    with bar() as progress:
        found = _examine(model, results or [], text, out, threads, progress)
    found = worst_first(found)
    if as_json:
        _print_json(found)
    else:
        _print(found)
    if any(finding.severity == "error" for finding in found):
        raise typer.Exit(1)


def _examine(
    model: str | None,
    results: list[Path],
    text: Path | None,
    out: Path | None,
    threads: int | None,
    progress: "Progress",
) -> "list[Finding]":
    from onebit import formats
    from onebit.llm import SHIPPED_MODEL

    found: list[Finding] = []
    if results:
        from onebit.doctor import results as rules

        found += rules.examine(results)
        # Of results alone the model may be elsewhere.
        if model is None and text is None:
            return found

    from onebit.doctor import machine
    from onebit.doctor import model as of_model
    from onebit.engine.memory import available_bytes
    from onebit.eval.texts import read_text
    from onebit.parts import token_bytes

    content = None if text is None else read_text(text)
    path = SHIPPED_MODEL if model is None else formats.locate(model)
    name = model or str(path)
    of_weights, checkpoint = of_model.examine(name, path, available_bytes(), progress)
    progress("watching the machine", 0.5)
    is_packed = checkpoint is not None and checkpoint.is_packed
    of_machine = machine.examine(token_bytes=token_bytes(checkpoint) if checkpoint and is_packed else None)
    found += [*of_weights, *of_machine]
    # A model without tokenizer reads no text, and was told so.
    reads = checkpoint is not None and checkpoint.tokenizer is not None
    if (
        reads
        and content is not None
        and text is not None
        and not any(f.severity == "error" for f in of_weights)
    ):
        found += _of_text(name, path, text, content, out, threads, progress)
    return found


def _of_text(
    name: str,
    path: Path,
    text: Path,
    content: str,
    out: Path | None,
    threads: int | None,
    progress: "Progress",
) -> "list[Finding]":
    """What reading a text tells of a model."""
    from onebit import formats
    from onebit.checkpoint import with_temperature
    from onebit.doctor import temperature, variants
    from onebit.formats import cache
    from onebit.llm import load

    ready, _ = cache.ready(path, progress)
    llm = load(ready, threads)
    found = variants.examine(
        llm.checkpoint,
        content,
        name,
        str(text),
        threads,
        lambda share: progress("trying other configs", share),
    )
    if out is None and any(finding.severity == "error" for finding in found):
        # Another config is another model: its certainty comes after.
        return found
    try:
        fitted = temperature.fit(
            llm, content, progress=lambda share: progress("fitting the temperature", share)
        )
    except ValueError as error:
        if out is not None:
            raise
        return [*found, temperature.unfitted(error, name)]
    if out is not None:
        changed = with_temperature(llm.checkpoint, fitted.temperature.value)
        formats.write(changed, out)
    return [*found, temperature.judge(fitted, name, str(text))]


def _print(found: "list[Finding]") -> None:
    from rich.console import Console
    from rich.text import Text

    from onebit.doctor.finding import SEVERITIES, count

    console = Console(highlight=False)
    for finding in found:
        style = _STYLES[finding.severity]
        if finding.severity == "ok":
            _print_wrapped(console, "ok", style, f"{finding.what}: {finding.evidence}")
            continue
        console.print(Text.assemble((f"{finding.severity}: ", style), (_plain(finding.what), "bold")))
        for word, said in (("seen", finding.evidence), ("why", finding.why), ("do", finding.advice)):
            if said:
                _print_wrapped(console, f"  {word}", "dim", said)
        # In one piece, to be copied.
        console.print(Text.assemble(("  try   ", "dim"), _plain(finding.confirm)), soft_wrap=True)
        console.print()
    numbers = count(found)
    words = (
        f"{numbers[name]} {name}{'s' if name != 'ok' and numbers[name] != 1 else ''}" for name in SEVERITIES
    )
    console.print(Text(", ".join(words), "bold"))


def _print_wrapped(console: "Console", word: str, style: str, said: str) -> None:
    """A word, and beside it a text of several lines."""
    from rich.text import Text

    lines = wrap(_plain(said), max(console.width, 40), initial_indent=f"{word:8}", subsequent_indent=" " * 8)
    shown = Text("\n".join(lines))
    shown.stylize(style, 0, len(word))
    console.print(shown, soft_wrap=True)


def _plain(text: str) -> str:
    """A text that may come from a file, without escapes of a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _print_json(found: "list[Finding]") -> None:
    from dataclasses import asdict

    from onebit import __version__
    from onebit.doctor.finding import count
    from onebit.results import machine_facts

    print(
        json.dumps(
            {
                "format": "onebit doctor 1",
                "version": __version__,
                "machine": machine_facts(),
                "count": count(found),
                "findings": [asdict(finding) for finding in found],
            },
            indent=1,
        )
    )

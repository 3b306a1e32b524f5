"""`onebit run`: continue a text, or talk."""

import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from onebit.cli.arguments import KvCache, Threads

if TYPE_CHECKING:
    from onebit.engine.sampling import SamplingParams
    from onebit.llm import LLM, Output, Prompt


# The name of the one adapter that a command can give.
_ADAPTER = "adapter"


def run(
    prompt: Annotated[
        str | None,
        typer.Argument(help="Start of the text; read from stdin when that is a pipe.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="A .onebit or GGUF file, a run folder, a Hugging Face folder or owner/name there; "
            "default: the shipped model.",
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Answer the prompt, as the model's chat template has it.")
    ] = False,
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of an adapter for the model, as onebit tune writes it.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 always takes the most likely token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Keep the k most likely tokens; 0 keeps all.")] = 40,
    top_p: Annotated[float, typer.Option(help="Keep tokens up to this total probability.")] = 0.95,
    min_p: Annotated[float, typer.Option(help="Keep tokens this likely, relative to the best.")] = 0.0,
    min_sigma: Annotated[
        float,
        typer.Option(help="Keep tokens so many standard deviations above the mean logit; 0 keeps all."),
    ] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages repetition.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Repeat a text; default: a random one.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="<str>", help="End the text before this string; repeatable.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the end of the text.")
    ] = False,
    normalize: Annotated[
        bool,
        typer.Option(
            "--normalize", help="Prompts lose soft hyphens, zero-width characters and runs of white space."
        ),
    ] = False,
    threads: Threads = None,
    kv_cache: KvCache = "bf16",
    speculation: Annotated[
        bool, typer.Option(help="Guess repeated tokens ahead; the text is the same.")
    ] = True,
    shortlist: Annotated[
        str | None,
        typer.Option(help="int4: find the best tokens through a 4-bit head; misses one next to never."),
    ] = None,
    huge_pages: Annotated[
        bool, typer.Option(help="Move a large model out of the mapped file, where there is memory for both.")
    ] = True,
) -> None:
    """Continue a text, or talk when there is no prompt.

    Example: onebit run "Once upon a time" --seed 7
    """
    from onebit.engine.sampling import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        min_sigma=min_sigma,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop or (),
        ignore_eos=ignore_eos,
    )
    is_chat = prompt is None and _is_terminal(sys.stdin)
    if prompt is None and not is_chat:
        prompt = _read_stdin()

    from onebit.llm import load

    path = None if model is None else ready(model)
    adapters = {} if adapter is None else {_ADAPTER: adapter}
    llm = load(path, threads, kv_cache, speculation, shortlist, huge_pages, adapters, normalize)
    if is_chat:
        _chat(llm, params)
        return
    assert prompt is not None
    if not chat and _is_terminal(sys.stdout) and _is_terminal(sys.stderr):
        # The whole text on a screen, the continuation alone in a file.
        print(prompt, end="", file=sys.stderr, flush=True)
    asked = llm.tokenizer.encode_chat([{"role": "user", "content": prompt}]) if chat else prompt
    _, ended = _stream(llm, asked, params)
    if not ended:
        raise typer.Exit(130)


def ready(model: str) -> Path:
    """A model that runs as it is; one of another format is converted the first time."""
    from onebit import formats

    path = formats.locate(model)
    if formats.is_native(path):
        return path

    from onebit.cli.bar import bar
    from onebit.formats import cache

    with bar() as progress:
        path, report = cache.ready(path, progress)
    if report:
        print(f"onebit: {model}: converted once, {report.made.label}, kept as {path}", file=sys.stderr)
        for change in report.losses:
            print(f"onebit: {change.describe()}", file=sys.stderr)
    return path


def _stream(llm: "LLM", prompt: "Prompt", params: "SamplingParams") -> tuple[str, bool]:
    """Print a text as it grows; returns it, and whether it ended before Ctrl-C did."""
    from onebit.engine.sampling import random_seed

    # Drawn here, so that a text that is stopped can name its seed too.
    seed = random_seed() if params.seed is None else params.seed
    params = replace(params, seed=seed)
    texts: list[str] = []
    output = None
    try:
        for piece in llm.stream(prompt, params, next(iter(llm.adapters), None)):
            print(piece.text, end="", flush=True)
            texts.append(piece.text)
            output = piece.output
    except KeyboardInterrupt:
        pass
    print(flush=True)
    print(_summary(llm, output, len(texts), seed), file=sys.stderr)
    return "".join(texts), output is not None


def _summary(llm: "LLM", output: "Output | None", n_tokens: int, seed: int) -> str:
    tokens = "1 token" if n_tokens == 1 else f"{n_tokens} tokens"
    if output is None:
        facts = [f"stopped after {tokens}"]
    else:
        facts = [tokens]
        # A text of one token has no rate.
        if output.timings.tok_per_s:
            facts.append(f"{output.timings.tok_per_s:.1f} tokens/s")
        facts.append(f"first token after {output.timings.first_token_s:.3f} s")
        if output.timings.drafted:
            facts.append(f"{output.timings.accepted} of {output.timings.drafted} guesses right")
    threads = "1 thread" if llm.model.threads == 1 else f"{llm.model.threads} threads"
    if llm.label != llm.checkpoint.label:
        facts.append(llm.label)
    return " | ".join([*facts, f"{llm.model.isa} kernels, {threads}", f"seed {seed}"])


def _chat(llm: "LLM", params: "SamplingParams") -> None:
    with suppress(ImportError):
        import readline  # noqa: F401, gives input() line editing and history
    talks = llm.tokenizer.chat_template is not None
    hint = "Talk to the model." if talks else "Write the start of a text; the model continues it."
    print(hint, "Ctrl-C stops a text, Ctrl-D or /exit leaves.", file=sys.stderr)
    messages: list[dict[str, str]] = []
    goes_on = True
    while goes_on:
        # Ctrl-C may also come between a text and the next question.
        with suppress(KeyboardInterrupt):
            goes_on = _turn(llm, params, messages)


def _turn(llm: "LLM", params: "SamplingParams", messages: list[dict[str, str]]) -> bool:
    """Ask the user, stream the answer and add both to the messages; False when the user leaves."""
    line = _ask()
    if line is None or not line.strip():
        return line is not None
    asked = [*messages, {"role": "user", "content": line}]
    talks = llm.tokenizer.chat_template is not None
    try:
        text, _ = _stream(llm, llm.tokenizer.encode_chat(asked) if talks else line, params)
    except ValueError as error:
        # Most often a conversation that outgrew the context: the chat goes on without this line.
        print(f"onebit: error: {error}", file=sys.stderr)
    else:
        messages[:] = [*asked, {"role": "assistant", "content": text}]
    return True


def _ask() -> str | None:
    """One line of the user, empty after Ctrl-C, or None to leave."""
    try:
        if _is_terminal(sys.stdout):
            line = input("> ")
        else:
            print("> ", end="", file=sys.stderr, flush=True)
            line = input()
    except EOFError:
        print(file=sys.stderr)
        return None
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return ""
    return None if line.strip() == "/exit" else line


def _read_stdin() -> str:
    data = b"" if sys.stdin is None else sys.stdin.buffer.read()
    try:
        return data.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise ValueError("stdin is not UTF-8 text") from None


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()

"""`onebit serve`: models behind OpenAI's API."""

import shlex
import sys
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onebit.cli.arguments import KvCache, Threads, parse_bytes

if TYPE_CHECKING:
    from onebit.llm import LLM


def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            metavar="[NAME=]MODEL",
            help="As for onebit run, with a name to call it by; repeatable. Default: the shipped model.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of them.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    threads: Threads = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[MODEL:]NAME=DIR", help="An adapter, served as a model of that name; repeatable."
        ),
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Texts computed at once.")] = 64,
    max_batched_tokens: Annotated[int, typer.Option(help="Most tokens of one forward pass.")] = 512,
    max_queue: Annotated[int, typer.Option(help="Texts that may wait; more are refused with 429.")] = 256,
    kv_cache: KvCache = "bf16",
    memory: Annotated[str, typer.Option(help="For keys and values of each model, as 2GiB or 500M.")] = "1GiB",
    context: Annotated[
        int | None, typer.Option(help="Most tokens of a text; default: as many as the model has.")
    ] = None,
    normalize: Annotated[
        bool,
        typer.Option(
            "--normalize", help="Prompts lose soft hyphens, zero-width characters and runs of white space."
        ),
    ] = False,
    api_key: Annotated[
        list[str] | None, typer.Option(help="A key that opens the server; repeatable. Default: open.")
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File with such keys, one a line.")] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="Web pages of others that may use the server, as https://example.com; repeatable."),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="A name that requests may call the server by; repeatable. Default: any, but for an open server on "
            "loopback its usual names."
        ),
    ] = None,
    log_file: Annotated[
        Path | None, typer.Option(help="Gets a line of JSON for each request; default: stderr.")
    ] = None,
    grace: Annotated[
        float, typer.Option(help="Seconds that running requests have to end after SIGTERM.")
    ] = 30.0,
) -> None:
    """Serve models to many users, with the API of OpenAI.

    Example: onebit serve -m model.gguf --port 8000
    """
    from onebit.serve.app import create_app
    from onebit.serve.server import Server, listen
    from onebit.serve.service import Options

    keys = _keys(api_key or [], api_key_file)
    options = Options(
        max_num_seqs=_at_least("--max-num-seqs", max_num_seqs, 1),
        max_batched_tokens=_at_least("--max-batched-tokens", max_batched_tokens, 1),
        max_queue=_at_least("--max-queue", max_queue, 0),
        context=None if context is None else _at_least("--context", context, 1),
        cache_bytes=parse_bytes("--memory", memory),
        api_keys=keys,
        allow_origins=allow_origin or (),
        allow_hosts=_hosts(host, allow_host or [], is_open=not keys),
    )
    # Before a large model is loaded for a port that is taken.
    with listen(host, port) as sock:
        models = _load(model or [], adapter or [], threads, kv_cache, normalize)
        app = create_app(models, options, log_file)
        shown = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        _welcome(f"http://{shown}:{sock.getsockname()[1]}", models, bool(options.api_keys))
        Server(app, grace).run([sock])


def _load(
    models: list[str], adapters: list[str], threads: int | None, kv_cache: str, normalize: bool
) -> "dict[str, LLM]":
    """The models by their names, each with its adapters."""
    from onebit.cli.run import ready
    from onebit.llm import SHIPPED_MODEL, load

    named: dict[str, str | None] = {}
    for given in models:
        name, is_named, path = given.partition("=")
        name, path = (name, path) if is_named and not Path(given).exists() else (_name(given), given)
        if name in named:
            raise ValueError(f"two models are called {name!r}; name one of them, as -m other={path}")
        named[name] = path
    named = named or {SHIPPED_MODEL.stem: None}
    folders: dict[str, dict[str, str]] = {name: {} for name in named}
    for given in adapters:
        name, is_named, folder = given.partition("=")
        if not is_named:
            raise ValueError(
                f"--adapter is {given!r}; expected NAME=DIR, the name to serve it by and its folder"
            )
        base, has_base, short = name.rpartition(":")
        if not has_base and len(named) > 1:
            raise ValueError(f"--adapter {given}: which model is it for? As in {next(iter(named))}:{given}")
        base = base if has_base else next(iter(named))
        if base not in named:
            raise ValueError(f"--adapter {given}: there is no model {base!r}; models: {', '.join(named)}")
        folders[base][short] = folder
    return {
        name: load(
            None if path is None else ready(path),
            threads,
            kv_cache,
            adapters=folders[name],
            normalize=normalize,
        )
        for name, path in named.items()
    }


def _name(path: str) -> str:
    """What to call a model: its file without ending, or its folder."""
    last = Path(path).resolve().name if Path(path).exists() else path
    return last.removesuffix(".onebit").removesuffix(".gguf")


def _keys(given: list[str], path: Path | None) -> list[str]:
    keys = [*given]
    if path is not None:
        keys += [line.strip() for line in path.read_text("utf-8").splitlines()]
        if not any(keys):
            # An open server would be the opposite of what was asked for.
            raise ValueError(f"{path} holds no key; expected one a line")
    elif "" in keys:
        raise ValueError("--api-key is empty; leave it out for a server that is open to all")
    return [key for key in keys if key]


def _hosts(host: str, allowed: list[str], is_open: bool) -> list[str]:
    """What the server may be called: if it is open and on loopback, its usual names; otherwise anything unless told."""
    try:
        is_loopback = host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    usual = [host, "localhost", "127.0.0.1", "::1"] if is_loopback and is_open else []
    return [name.lower() for name in [*usual, *allowed]]


def _at_least(name: str, value: int, least: int) -> int:
    if value < least:
        raise ValueError(f"{name} is {value}; expected at least {least}")
    return value


def _welcome(url: str, models: "dict[str, LLM]", is_locked: bool) -> None:
    first = next(iter(models))
    talks = models[first].checkpoint.chat_template is not None
    body = '"messages": [{"role": "user", "content": "Hello"}]' if talks else '"prompt": "Once upon a time"'
    path = "chat/completions" if talks else "completions"
    key = ' -H "Authorization: Bearer $KEY"' if is_locked else ""
    print(f"onebit: {url} serves {', '.join(models)}; Ctrl-C ends it. Try:", file=sys.stderr)
    data = shlex.quote(f'{{"model": "{first}", {body}}}')
    print(f"curl {url}/v1/{path} -H 'Content-Type: application/json'{key} -d {data}", file=sys.stderr)

"""What several verbs take: a model, threads, number formats of the cache, amounts of memory."""

import re
from typing import Annotated

import typer

Model = Annotated[
    str | None,
    typer.Argument(
        help="A .onebit or GGUF file, a run folder, a Hugging Face folder or owner/name there; "
        "default: the shipped model.",
        show_default=False,
    ),
]
Threads = Annotated[int | None, typer.Option(help="Default: one for each core.")]
KvCache = Annotated[str, typer.Option(help="Numbers of the key-value cache: bf16, int8 or fp8.")]

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_bytes(option: str, text: str) -> int:
    """Bytes of "2GiB", "500M" or "1000000"; units are powers of 1024.

    Raises:
        ValueError: no such text; the message names the option.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not found:
        raise ValueError(f"{option} is {text!r}; expected a size such as 2GiB or 500M")
    return int(float(found[1]) * _UNITS[found[2].upper()])

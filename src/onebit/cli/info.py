"""`onebit info`: what this machine offers, and what is in a model."""

import json
from collections.abc import Iterator
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onebit.cli.arguments import Model

if TYPE_CHECKING:
    from rich.table import Table

    from onebit.checkpoint import Checkpoint

# Characters of a text that comes with a file.
_MAX_CELL = 200


def info(
    model: Model = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every byte of a .onebit file against its hashes.")
    ] = False,
) -> None:
    """Show what this machine offers, what is in a model, and what it can become.

    Example: onebit info stories.onebit --verify

    Example: onebit info model.gguf
    """
    from rich.console import Console

    from onebit import formats
    from onebit.checkpoint import quantize
    from onebit.llm import SHIPPED_MODEL

    path = SHIPPED_MODEL if model is None else formats.locate(model)
    checkpoint = formats.read(path)
    is_native = formats.is_native(path)
    if verify:
        if path.is_dir() or not is_native:
            kind = "a run folder" if is_native else "of another format"
            raise ValueError(f"{path}: is {kind}; only .onebit files carry hashes to verify")
        formats.native.verify(path)
    console = Console()
    console.print(_machine_table())
    if is_native:
        # A run folder is shown as the engine packs it.
        checkpoint = quantize(checkpoint)
    console.print(_model_table(path, checkpoint))
    console.print(parts_table(checkpoint))
    if is_native:
        console.print(_memory_table(path, checkpoint))
    if any(_summary(checkpoint.provenance)):
        console.print(_provenance_table(checkpoint))
    console.print(_ways_out(checkpoint))
    if verify:
        console.print("verified: every byte is as it was written")


def parts_table(checkpoint: "Checkpoint") -> "Table":
    """Bits per weight and bytes of each part of a model."""
    from onebit.parts import Part, parts

    found = parts(checkpoint)
    weights = [part for part in found if part.n_weights]
    total = Part(
        "all weights", sum(part.n_weights for part in weights), sum(part.n_bytes for part in weights)
    )
    table = new_table("part", "weights", "bits per weight", "bytes")
    for part in [*weights, total, *(part for part in found if not part.n_weights)]:
        numbers = (f"{part.n_weights:,}", f"{part.bits_per_weight:.2f}") if part.n_weights else ("", "")
        table.add_row(part.name, *numbers, f"{part.n_bytes:,}")
    return table


def _machine_table() -> "Table":
    from onebit.engine.model import available_isas, broken_isas, choose_isa, choose_threads

    table = new_table("machine", "")
    table.add_row("kernels present", ", ".join(available_isas()))
    broken = broken_isas()
    table.add_row("self-test", f"failed, and not used: {', '.join(broken)}" if broken else "passed by all")
    table.add_row("kernels chosen", choose_isa())
    table.add_row("threads", str(choose_threads()))
    return table


def _model_table(path: Path, checkpoint: "Checkpoint") -> "Table":
    from onebit.formats.compare import kind_of
    from onebit.formats.families import family
    from onebit.parts import code_histogram

    config = checkpoint.config
    table = new_table("model", _plain(str(path)))
    source = checkpoint.provenance.get("source")
    if isinstance(source, dict) and not checkpoint.is_packed:
        for name, value in source.items():
            table.add_row(_plain(name), _plain(value if isinstance(value, str) else json.dumps(value)))
    if not checkpoint.is_packed:
        # None has these flags together: it runs nevertheless, and below stands why it cannot leave.
        with suppress(ValueError):
            table.add_row("family", family(config))
    table.add_row("label", checkpoint.label)
    table.add_row("layers", f"{config.n_layers} of width {config.d_model}")
    if config.layer_weights:
        table.add_row("weights of layers", _runs(config.layer_weights))
    table.add_row("feed-forward", f"width {config.d_ff}, {config.activation}")
    table.add_row(
        "heads", f"{config.n_heads} of width {config.d_head}, {config.n_kv_heads} for keys and values"
    )
    table.add_row("vocabulary", f"{config.vocab_size:,} tokens, {'tied' if config.tied_head else 'own'} head")
    table.add_row("context", f"{config.max_seq_len:,} tokens")
    linear = [(name, tensor) for name, tensor in checkpoint.tensors.items() if config.is_linear(name)]
    table.add_row("encoding", ", ".join(sorted({kind_of(tensor) for _, tensor in linear})))
    if checkpoint.is_packed:
        heads = {"q8": "int8 rows, 15-bit activations", "bf16": "bfloat16, exact through an int8 shortlist"}
        table.add_row(
            "head", heads.get(checkpoint.head or "", f"{checkpoint.head} codes, 15-bit activations")
        )
    if config.weights != "dense":
        table.add_row("scales", _scales(checkpoint))
    if config.weights != "dense" and checkpoint.is_packed:
        shares = code_histogram(checkpoint)
        table.add_row("codes", ", ".join(f"{code}: {share:.1%}" for code, share in shares.items()))
    table.add_row("tokenizer", "yes" if checkpoint.tokenizer else "no: token ids only")
    table.add_row("chat template", "yes" if checkpoint.chat_template else "no")
    return table


def _runs(schemes: tuple[str, ...]) -> str:
    """A scheme for each layer, equal neighbours together, as in "b1.58, 4 x b1, b1.58"."""
    found = [(scheme, len(list(group))) for scheme, group in groupby(schemes)]
    return ", ".join(scheme if n == 1 else f"{n} x {scheme}" for scheme, n in found)


def _scales(checkpoint: "Checkpoint") -> str:
    """Granularity of the scales, and the values of the first layer, as multipliers."""
    from onebit.checkpoint import codes

    config = checkpoint.config
    each = {"tensor": "one for each matrix", "row": "one for each row"}
    granularity = each.get(str(config.scale), f"one for every {config.scale} inputs of a row")
    first = [name for name in checkpoint.tensors if name.startswith("layers.0.") and config.is_linear(name)]
    values = [codes(name, checkpoint.tensors[name], config)[1] for name in first]
    low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
    return f"{granularity}, multipliers; {low:.4g} to {high:.4g} in layer 0"


def _ways_out(checkpoint: "Checkpoint") -> "Table":
    """The formats of others that a model can be converted to, or why it cannot."""
    from onebit import formats

    table = new_table("can become", "")
    for name, answer in formats.ways_out(checkpoint).items():
        table.add_row(name, answer)
    return table


def _memory_table(path: Path, checkpoint: "Checkpoint") -> "Table":
    from onebit.engine import memory
    from onebit.parts import parts, token_bytes

    config = checkpoint.config
    # A run folder is shown as the engine packs it.
    size = sum(part.n_bytes for part in parts(checkpoint)) if path.is_dir() else path.stat().st_size
    read, available = token_bytes(checkpoint), memory.available_bytes()
    table = new_table("memory", "")
    table.add_row("file", f"{size:,} bytes, mapped: pages that are not used may leave memory")
    table.add_row("read by each token", f"{read:,} bytes of weights")
    for kv_cache in memory.KV_FORMATS:
        size = 1000 * memory.position_bytes(config, kv_cache)
        table.add_row(f"keys, values as {kv_cache}", f"{size:,} bytes for 1,000 tokens")
    table.add_row("available now", "unknown" if available is None else f"{available:,} bytes")
    table.add_row("outlook", memory.outlook(config, read, memory.position_bytes(config), available))
    return table


def _provenance_table(checkpoint: "Checkpoint") -> "Table":
    table = new_table("provenance", "")
    for name, value in _summary(checkpoint.provenance):
        table.add_row(_plain(name), _plain(value))
    return table


def _summary(provenance: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The recipe by its name, a hash by its start, and what else is a plain value."""
    known = [name for name in ("recipe", "steps", "tokens", "corpus_sha256") if name in provenance]
    for name in dict.fromkeys([*known, *provenance]):
        value = provenance[name]
        if name == "recipe" and isinstance(value, dict):
            value = value.get("name")
        if value is None or isinstance(value, (dict, list)):
            continue
        text = value if isinstance(value, str) else json.dumps(value)
        yield name, text[:16] if name == "corpus_sha256" else text


def _plain(text: str) -> str:
    """A text from a file for a cell: no markup, no escapes of a terminal, and not too long."""
    from rich.markup import escape

    shown = "".join(c if c.isprintable() else "?" for c in text[:_MAX_CELL])
    return escape(shown + ("..." if len(text) > _MAX_CELL else ""))


def new_table(*columns: str) -> "Table":
    """A table without rows; the first column to the left, further ones to the right where there are more than two."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE)
    for i, column in enumerate(columns):
        # Text, so that brackets in a path or a recipe are not read as markup.
        table.add_column(Text(column), justify="right" if i and len(columns) > 2 else "left", overflow="fold")
    return table

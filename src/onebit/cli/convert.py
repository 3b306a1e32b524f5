"""`onebit convert`: from any format to any other, with a report."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from onebit.formats import Report


def convert(
    src: Annotated[
        str,
        typer.Argument(
            help="A .onebit or GGUF file, a run folder, a Hugging Face folder, or owner/name there."
        ),
    ],
    dst: Annotated[
        Path,
        typer.Argument(help="What to write: NAME.onebit, NAME.gguf, or the folder of a Hugging Face model."),
    ],
    encoding: Annotated[
        str | None,
        typer.Option(
            help="How linear layers are stored. .onebit: t80, r64, b128, bf16. GGUF: TQ2_0, TQ1_0, I2_S, Q2_0, Q1_0, "
            "Q2_0_128, BF16, F16, F32. Folder: packed, dense. Default: the usual one that keeps codes as codes; "
            "a .onebit file keeps its own.",
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            help="Of a .onebit file: how head and embedding are kept: q8, int8 rows (default for models trained here), "
            "or bf16 (default for others)."
        ),
    ] = None,
    allow_lossy: Annotated[
        bool, typer.Option("--allow-lossy", help="Write also what changes values of the model.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Run source and result, and compare logits and greedy text.")
    ] = False,
    temperature: Annotated[
        float, typer.Option(help="Divide the logits of the result by this, for good; 1 leaves them.")
    ] = 1.0,
    adapter: Annotated[
        Path | None, typer.Option(help="Merge this adapter into the weights; says what is lost by it.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="With --adapter: conversations (.jsonl) to measure the loss on.")
    ] = None,
    scale: Annotated[
        str,
        typer.Option(
            help="With --adapter, of weights that are codes: keep their scales, or absmean of the merged."
        ),
    ] = "keep",
) -> None:
    """Convert a model from any format to any other, and prove what became of it.

    Example: onebit convert runs/stories stories.onebit

    Example: onebit convert model.gguf model.onebit --verify
    """
    from rich.console import Console

    from onebit.cli.bar import bar
    from onebit.conversion import convert as run

    if adapter is not None:
        if verify or allow_lossy or temperature != 1:
            raise ValueError(
                "--adapter changes the model and says how; leave --verify, --allow-lossy and --temperature out"
            )
        _merge(src, adapter, dst, data, scale, encoding, head)
        return
    if data is not None or scale != "keep":
        raise ValueError("--data and --scale are for --adapter; name its folder, or leave them out")
    with bar() as progress:
        report, distance = run(src, dst, encoding, head, allow_lossy, verify, progress, temperature)
    console = Console(file=sys.stderr)
    console.print(changes_table(report))
    for change in report.losses:
        console.print(f"lost: {change.describe()}", highlight=False, markup=False)
    for note in report.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    if distance:
        console.print(f"verified, as onebit runs both: {distance.describe()}", highlight=False, markup=False)
    size = sum(file.stat().st_size for file in ([dst] if dst.is_file() else dst.iterdir()))
    before, after = report.source.label, report.made.label
    labels = after if before == after else f"{before} becomes {after}"
    console.print(f"{dst}: {labels}, {size:,} bytes", highlight=False, markup=False)


def _merge(
    src: str, adapter: Path, dst: Path, data: Path | None, scale: str, encoding: str | None, head: str | None
) -> None:
    """Merge an adapter and print what became of each layer."""
    from rich.console import Console

    from onebit.cli.bar import bar
    from onebit.cli.info import new_table
    from onebit.train.merge import merge

    with bar() as progress:
        merged = merge(src, adapter, dst, data, scale, encoding, head, progress)  # type: ignore[arg-type]
    table = new_table("layer", "weights", "flipped", "scale", "of the change lost")
    for layer in merged.layers:
        flipped = f"{layer.n_flipped:,} ({layer.n_flipped / layer.n_weights:.2%})"
        name = layer.name.removeprefix("layers.").removesuffix(".weight")
        table.add_row(
            name, f"{layer.n_weights:,}", flipped, f"x {layer.scale_ratio:.4g}", f"{layer.error:.0%}"
        )
    console = Console(file=sys.stderr)
    console.print(table)
    if merged.losses:
        before, unmerged, after, n_tokens = merged.losses
        console.print(
            f"loss of {n_tokens:,} answer tokens, nats: {before:.4f} before, {unmerged:.4f} with the adapter beside "
            f"the model, {after:.4f} merged",
            highlight=False,
        )


def changes_table(report: "Report") -> "Table":
    """What each part was, what it is, and how much of it changed."""
    from onebit.cli.info import new_table
    from onebit.parts import parts

    sizes = {part.name: part for part in parts(report.made)}
    table = new_table("part", "weights", "was", "is", "bits", "differ", "by up to")
    for change in report.changes:
        differ, worst = "none", ""
        if change.by_definition and change.source != change.made:
            # Only the model's own rounding, which is what it was trained for.
            differ = "as trained"
        elif change.n_changed:
            differ, worst = f"{change.n_changed / change.n_weights:.2%}", f"{change.worst:.2g}"
        bits = f"{sizes[change.part].bits_per_weight:.2f}" if change.part in sizes else ""
        weights = f"{change.n_weights:,}" if change.n_weights < 1e6 else f"{change.n_weights / 1e6:,.2f} M"
        table.add_row(change.part, weights, change.source, change.made, bits, differ, worst)
    return table

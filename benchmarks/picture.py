"""One picture of a run: decode, prompts and memory of each engine, with what the machine allows.

The background is transparent and the greys stand out against white and black, so that it can be read in both.
"""

from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from plan import FRESH, MACHINE, OURS

TEXT, GRID = "#7a828e", "#7a828e40"
COLOURS = {"ours": "#2f81f7", "peer": "#9a8c7c", "limit": "#e5534b"}

Bar = tuple[str, float, float, float]


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw a run.

    Args:
        result: as report.as_json makes it.
        path: the PNG to write.
    """
    matplotlib.use("Agg")
    threads = result["threads"]
    engines = [name for name in _engines(result) if name not in (MACHINE, FRESH)]
    height = 1.9 + 0.38 * (len(engines) + 1)
    with pyplot.rc_context(
        {"text.color": TEXT, "axes.labelcolor": TEXT, "xtick.color": TEXT, "ytick.color": TEXT}
    ):
        figure, axes = pyplot.subplots(1, 3, figsize=(13, height), layout="constrained", sharey=True)
        read = _value(result, MACHINE, "read", threads)
        amx = _value(result, MACHINE, "amx", threads)
        uses_amx = result["isa"] == "amx" and amx is not None
        peak = amx if uses_amx else _value(result, MACHINE, "dot", threads)
        shortlist = _bars(result, [OURS], "decode", threads, shortlist=True)
        decode = _bars(result, engines, "decode", threads)
        rows = [*engines[:1], *(["onebit, int4 shortlist"] if shortlist else []), *engines[1:]]
        decode += [("onebit, int4 shortlist", *bar[1:]) for bar in shortlist]
        _panel(
            axes[0], rows, decode, f"text, tokens per second\n(short context, {_threads(threads)})",
            read and read * 1e9 / result["token_bytes"], "memory read /\nour bytes", result["absent"],
        )  # fmt: skip
        _panel(
            axes[1], rows, _bars(result, engines, "prefill", threads, tokens=512),
            f"prompt, tokens per second\n(512 tokens, {_threads(threads)})",
            peak and peak * 1e9 / result["linear_weights"], f"int8 peak\n({'AMX' if uses_amx else 'dot product'})",
            result["absent"],
        )  # fmt: skip
        peaks = {**result["peak_resident_bytes"]}
        # Ours at work has caches and copies for all its measurements; a process of its own is what a user has.
        peaks[OURS] = peaks.get(FRESH, peaks.get(OURS))
        memory = [(n, peaks[n] / 1e6, peaks[n] / 1e6, peaks[n] / 1e6) for n in engines if peaks.get(n)]
        file_mb = result["file_bytes"].get(OURS)
        _panel(
            axes[2],
            rows,
            memory,
            "memory, MB resident\n(at its peak)",
            file_mb and file_mb / 1e6,
            "our file",
            {},
        )
        quotable = {True: "", False: "   NOT QUOTABLE: others used the processors", None: "   NOT QUOTABLE"}
        figure.suptitle(
            f"shape {result['shape']} on {result['machine']['cpu']}{quotable[result['quotable']]}",
            color=TEXT,
            fontsize=12,
        )
        figure.savefig(path, dpi=110, transparent=True)
        pyplot.close(figure)


def _panel(
    axis: Axes,
    rows: list[str],
    bars: list[Bar],
    title: str,
    limit: float | None,
    limit_name: str,
    absent: dict[str, str],
) -> None:
    """Bars from left to right, their values beside them, the limit as a line; why an engine has no bar."""
    at = [rows.index(name) for name, *_ in bars]
    values = [middle for _, middle, _, _ in bars]
    errors = [[m - low for _, m, low, _ in bars], [high - m for _, m, _, high in bars]]
    colours = [COLOURS["ours" if name.startswith(OURS) else "peer"] for name, *_ in bars]
    axis.barh(at, values, color=colours, height=0.66, xerr=errors, error_kw={"ecolor": TEXT, "elinewidth": 1})
    most = max([high for _, _, _, high in bars] + [limit or 0], default=1) or 1
    for row, (_, middle, _, high) in zip(at, bars, strict=True):
        text = f"{middle:,.0f}" if middle >= 100 else f"{middle:.3g}"
        # Beside the limit's line, and not across it.
        start = high if limit is None or not high <= limit <= high + 0.14 * most else limit
        axis.text(start + 0.015 * most, row, text, va="center", fontsize=9)
    for row, name in enumerate(rows):
        if name in absent and row not in at:
            axis.text(0, row, f" not run: {fill(absent[name][:90], 36)}", va="center", fontsize=8)
    if limit:
        axis.axvline(limit, color=COLOURS["limit"], linestyle="--", linewidth=1.3)
        axis.text(limit, -0.75, limit_name, color=COLOURS["limit"], ha="center", va="bottom", fontsize=8)
    axis.set(xlim=(0, 1.16 * most), ylim=(len(rows) - 0.4, -0.7), yticks=range(len(rows)), yticklabels=rows)
    axis.set_title(title, color=TEXT, fontsize=10, pad=30)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.grid(axis="x", color=GRID)
    axis.set_axisbelow(True)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _engines(result: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys([*(r["engine"] for r in result["results"]), *result["absent"]]))


def _find(
    result: dict[str, Any], engine: str, what: str, threads: int, **options: Any
) -> dict[str, Any] | None:
    keys = ("context", "kv_cache", "shortlist", "tokens", "isa")
    for row in result["results"]:
        found = {key: row[key] for key in keys if key in row}
        if (row["engine"], row["what"], row["threads"], found) == (engine, what, threads, options):
            return row if row["median"] is not None else None
    return None


def _value(result: dict[str, Any], engine: str, what: str, threads: int) -> float | None:
    row = _find(result, engine, what, threads)
    return row and row["median"]


def _bars(result: dict[str, Any], engines: list[str], what: str, threads: int, **options: Any) -> list[Bar]:
    rows = [(name, _find(result, name, what, threads, **options)) for name in engines]
    return [(name, row["median"], row["min"], row["max"]) for name, row in rows if row]


def _threads(n: int) -> str:
    return "1 thread" if n == 1 else f"{n} threads"

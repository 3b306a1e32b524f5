"""One picture of a run: how near the machine's limits our model comes, and how long one waits for a token.

The background is transparent and the greys stand out against white and black, so that it can be read in both.
"""

import os
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.text import Annotation

TEXT, GRID = "#7a828e", "#7a828e40"
OURS, LIMIT = "#2f81f7", "#e5534b"
COLOURS = (OURS, "#9a8c7c", "#57ab5a", "#c69026", "#b083f0", "#768390")


def check(path: Path) -> None:
    """Say before a long run that no picture can be written there.

    Raises:
        ValueError: another suffix, or a folder that is missing or read-only.
    """
    if path.suffix.lower() != ".png":
        raise ValueError(f"--picture is {path}; expected a name that ends in .png")
    folder = path.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"--picture {path}: nothing can be written to the folder {folder}")


def draw(data: dict[str, Any], path: Path) -> None:
    """Draw a run.

    Args:
        data: of a file of results of `onebit bench`.
        path: the PNG to write.
    """
    matplotlib.use("Agg")
    greys: Any = {"text.color": TEXT, "axes.labelcolor": TEXT, "xtick.color": TEXT, "ytick.color": TEXT}
    with pyplot.rc_context(greys):
        figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
        _roofline(axes[0], data)
        _latencies(axes[1], data)
        quotable = "" if data["conditions"]["quotable"] else "   (not to be quoted)"
        model = data["model"]
        threads = data["conditions"]["threads"]
        figure.suptitle(
            f"{Path(model['name']).name}, {model['label']}, on {data['machine']['cpu']}, "
            f"{threads} thread{'' if threads == 1 else 's'}{quotable}",
            color=TEXT,
            fontsize=11,
        )
        figure.savefig(path, dpi=110, transparent=True)
        pyplot.close(figure)


def _roofline(axis: Axes, data: dict[str, Any]) -> None:
    """Operations per second over operations per byte of weights: decode lies on the slope, prompts below the roof."""
    rows = [row for row in data["results"] if row["engine"] == "onebit"]
    read = next((row["value"] for row in data["results"] if row["name"] == "bandwidth"), None)
    n_ops = 2 * data["engines"]["onebit"]["token_weights"]
    n_bytes = next(
        row["value"] for row in rows if row["name"] == "token_bytes" and not row["settings"]["context"]
    )
    step = 512
    points: list[tuple[float, float, str]] = []
    for row in rows:
        settings = row["settings"]
        if row["name"] == "decode":
            context, batch = settings["context"], settings["batch"]
            own = next(
                (
                    r["value"]
                    for r in rows
                    if r["name"] == "token_bytes" and r["settings"]["context"] == context
                ),
                n_bytes,
            )
            words = f"{batch} texts" if batch > 1 else f"text after {context:,}" if context else "text"
            points.append((batch / own, row["value"], words))
        elif row["name"] == "prefill":
            tokens, batch = settings["tokens"], settings["batch"]
            words = f"{batch} prompts of {tokens:,}" if batch > 1 else f"prompt of {tokens:,}"
            points.append((min(tokens * batch, step) / n_bytes, row["value"], words))
    if not points:
        return
    xs = [n_ops * share for share, _, _ in points]
    ys = [n_ops * speed for _, speed, _ in points]
    best = max(ys)
    left, right = min(xs) / 2, max(xs) * 2
    if read:
        ridge = best / read
        left = min(left, ridge / 4)
        line = np.array([left, min(2 * ridge, right)])
        axis.plot(line, line * read, color=LIMIT, linestyle="--", linewidth=1.3)
        axis.annotate(
            f"memory, {read / 1e9:.3g} GB/s", (line[1], line[1] * read), (6, -4), textcoords="offset points",
            color=LIMIT, fontsize=8,
        )  # fmt: skip
    axis.set(xscale="log", yscale="log", xlim=(left, right), ylim=(min(ys) / 2, best * 4))
    axis.axhline(best, color=TEXT, linestyle=":", linewidth=1)
    axis.annotate(
        f"most that was reached, {best / 1e9:,.0f} Gop/s", (right, best), (-4, 4), textcoords="offset points",
        fontsize=8, ha="right",
    )  # fmt: skip
    axis.scatter(xs, ys, color=OURS, zorder=3)
    labels: list[Annotation] = []
    for x, y, (_, speed, words) in zip(xs, ys, points, strict=True):
        # Towards the middle, where there is room, and as far below the point as other labels are in the way.
        on_left = x * x > left * right
        for below in range(12, 72, 10):
            label = axis.annotate(
                f"{words}: {speed:,.0f} tok/s", (x, y), (-8 if on_left else 8, -below), textcoords="offset points",
                fontsize=8, ha="right" if on_left else "left",
            )  # fmt: skip
            if not any(label.get_window_extent().overlaps(other.get_window_extent()) for other in labels):
                break
            label.remove()
        else:
            axis.add_artist(label)
        labels.append(label)
    _frame(axis, "roofline: onebit below what the memory allows")
    axis.set_xlabel("operations per byte of weights, keys and values", fontsize=9)
    axis.set_ylabel("operations per second", fontsize=9)


def _latencies(axis: Axes, data: dict[str, Any]) -> None:
    """Median, and 95 and 99 of 100, of the time to the first token and from token to token, for each engine."""
    engines = [
        name
        for name in data["engines"]
        if any(r["engine"] == name for r in data["results"] if r["name"] == "ttft")
    ]
    labels = []
    for place, (name, words) in enumerate((("ttft", "first token"), ("inter_token", "next token"))):
        for i, engine in enumerate(engines):
            row = next((r for r in data["results"] if (r["name"], r["engine"]) == (name, engine)), None)
            at = place * (len(engines) + 0.7) + i
            labels.append((at, f"{words}, {engine}"))
            if row is None:
                continue
            colour = COLOURS[i % len(COLOURS)]
            values = [1e3 * row[key] for key in ("value", "p95", "p99")]
            axis.plot([values[0], values[2]], [at, at], color=colour, linewidth=2, alpha=0.5)
            for value, marker in zip(values, "o||", strict=True):
                axis.plot([value], [at], marker=marker, color=colour, markersize=8, markeredgewidth=2)
            axis.annotate(
                f"{values[0]:.3g} ms",
                (values[2], at),
                (8, 0),
                textcoords="offset points",
                fontsize=8,
                va="center",
            )
    axis.set(xscale="log", yticks=[at for at, _ in labels], yticklabels=[words for _, words in labels])
    axis.invert_yaxis()
    axis.margins(x=0.25)
    _frame(axis, "latency: median (dot), 95 and 99 of 100 (bars)")
    axis.set_xlabel("milliseconds", fontsize=9)


def _frame(axis: Axes, title: str) -> None:
    axis.set_title(title, color=TEXT, fontsize=10)
    axis.grid(color=GRID)
    axis.set_axisbelow(True)
    axis.tick_params(length=0, labelsize=8, which="both")
    for spine in axis.spines.values():
        spine.set_visible(False)

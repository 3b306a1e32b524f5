"""The pictures of a run folder, drawn from its metrics: loss.png and health.png."""

import io
import json
from pathlib import Path
from typing import Any

from onebit.formats.files import write_file
from onebit.train.state import METRICS

LOSS, HEALTH = "loss.png", "health.png"
_HELD_OUT = "held_out_"
_NAMES = {"held_out_kl": "nats per token from the teacher"}
_PANELS = {
    "grad_norms": "norm of the gradient, by layer",
    "flips": "codes that flipped since the last look",
    "zeros": "codes that are zero",
    "saturated": "inputs with the least or largest code",
    "largest": "largest input",
    "outliers": "largest input / root mean square",
}
_COLUMNS = 4


def draw(out: Path, loss: str) -> None:
    """Draw the losses and, where they are recorded, the figures of `health` into the run folder.

    Args:
        out: the run folder.
        loss: what the losses of training are, as "nats per token".
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    steps = [r["step"] for r in records]
    names = list(dict.fromkeys(name for r in records for name in r if name.startswith(_HELD_OUT)))
    width = 1 + len(names)
    figure, axes = pyplot.subplots(1, width, figsize=(5.5 * width, 4), layout="constrained", squeeze=False)
    axes = axes[0]
    axes[0].plot(steps, [r["loss"] for r in records], linewidth=0.6)
    axes[0].set(xlabel="step", ylabel=f"training loss: {loss}")
    for axis, name in zip(axes[1:], names, strict=True):
        some = [r for r in records if name in r]
        axis.plot([r["step"] for r in some], [r[name] for r in some], marker=".")
        label = _NAMES.get(name, name.removeprefix(_HELD_OUT).replace("_", " "))
        axis.set(xlabel="step", ylabel=f"held out: {label}")
    _write(figure, axes, out / LOSS)

    looks = [r for r in records if "largest" in r]
    if not looks:
        return
    panels = {name: label for name, label in _PANELS.items() if any(name in r for r in looks)}
    rows = -(-(1 + len(panels)) // _COLUMNS)
    figure = pyplot.figure(figsize=(5.5 * _COLUMNS, 4 * rows), layout="constrained")
    norm, *others = (figure.add_subplot(rows, _COLUMNS, i + 1) for i in range(1 + len(panels)))
    norm.semilogy(steps, [r["grad_norm"] for r in records], linewidth=0.6)
    norm.set(xlabel="step", ylabel="norm of the gradient")
    for axis, (name, label) in zip(others, panels.items(), strict=True):
        some = [r for r in looks if name in r]
        n_layers = len(some[0][name])
        for i in range(n_layers):
            colour = pyplot.colormaps["viridis"](i / max(n_layers - 1, 1))
            ends = f"layer {i}" if i in (0, n_layers - 1) else None
            axis.plot([r["step"] for r in some], [r[name][i] for r in some], color=colour, label=ends)
        axis.set(xlabel="step", ylabel=label, yscale="log" if name == "grad_norms" else "linear")
        axis.legend()
    _write(figure, [norm, *others], out / HEALTH)


def _write(figure: Any, axes: Any, path: Path) -> None:
    from matplotlib import pyplot

    for axis in axes:
        axis.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)
    write_file(path, [picture.getvalue()])

"""The folder of a run: what may be resumed, what is saved, and what comes back to the bit.

state.safetensors holds the parameters, what the optimiser remembers of each, and what options and health keep between
steps; model.safetensors beside it holds the model as others read it.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from onebit.checkpoint import Checkpoint
from onebit.formats import run, tensors
from onebit.formats.files import write_file
from onebit.nn.transformer import Transformer
from onebit.train import data as text
from onebit.train import options
from onebit.train.optimizers import MOMENTS
from onebit.train.recipe import Recipe, read
from onebit.train.task import Task

STATE = "state.safetensors"
METRICS = "metrics.jsonl"


def open_run(recipe: Recipe, data: Path | None, out: Path, resume: bool) -> bool:
    """Check that the folder may be used; return whether there is a state to restore.

    Raises:
        ValueError: a run that is already there, none to resume, or one of another recipe.
        OSError: the folder of texts is missing.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; --out expects a folder")
    path = out / run.RECIPE
    if not resume:
        if path.exists():
            raise ValueError(f"{out} already holds a run; continue it with --resume or choose another --out")
        text.check_folder(data)
        # A corpus without a recipe may be that of any other.
        (out / "corpus" / "corpus.json").unlink(missing_ok=True)
        return False
    before, now = read(path).to_dict(), recipe.to_dict()
    for name in now:
        if before[name] != now[name]:
            raise ValueError(
                f"{out}: the run's {name} is {json.dumps(before[name])}, this recipe's {json.dumps(now[name])}; "
                f"resume with the same recipe, or start another run"
            )
    return (out / STATE).exists()


def start(recipe: Recipe, out: Path) -> None:
    """Write the recipe: from here on the folder holds a run."""
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / run.RECIPE, [json.dumps(recipe.to_dict(), indent=2).encode() + b"\n"])


def save(
    out: Path,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    extras: dict[str, Tensor],
    task: Task,
    recipe: Recipe,
    step: int,
) -> None:
    """Write the state to resume from, then the model; each file is whole or the one before it.

    Raises:
        ValueError: weights that are no longer numbers; nothing is written then.
        OSError: the disk is full, ...
    """
    provenance = {
        "recipe": recipe.to_dict(),
        **task.provenance,
        "steps": step,
        "tokens": step * task.tokens_per_step,
    }
    with options.averaged(model, extras):
        weights = {name: _array(w) for name, w in model.masters().items()}
    # Made before anything is written: it refuses weights that are no longer numbers.
    checkpoint = Checkpoint(model.config, {**weights}, task.tokenizer, task.chat_template, provenance)
    state = {name: _array(p) for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        moments = optimizer.state[parameter]
        state |= {f"{name}.{key}": _array(moments[key]) for key in MOMENTS[recipe.options.optimizer]}
    state |= {name: _array(tensor) for name, tensor in extras.items()}
    tensors.write(out / STATE, {"step": str(step)}, state)
    run.write(checkpoint, out)


def restore(
    path: Path,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    extras: dict[str, Tensor],
    recipe: Recipe,
) -> int:
    """Load weights, moments and extras; return the number of steps that were done, at most those of the run.

    Raises:
        ValueError: a damaged file, or one of another model.
    """
    keys = MOMENTS[recipe.options.optimizer]
    with tensors.named(path):
        header, contents = tensors.split_header(tensors.map_file(path))
        state = {name: torch.from_numpy(a.copy()) for name, a in tensors.views(header, contents).items()}
        text = header["__metadata__"].get("step", "")
        step = int(text) if re.fullmatch("[0-9]{1,10}", text) else -1
        shapes = {n: p.shape for n, p in model.named_parameters()}
        expected = {
            f"{n}{k}": shape for n, shape in shapes.items() for k in ("", *(f".{key}" for key in keys))
        }
        kept = {name: a for name, a in state.items() if name not in expected}
        found = {name: a.shape for name, a in state.items() if name in expected}
        extra_names = {f"{n}.{key}" for n in shapes for key in options.extra_keys(recipe)}
        # Of the extras, codes exist from their first measurement on.
        fits = all(
            name in extra_names and a.shape == shapes[name.rpartition(".")[0]] for name, a in kept.items()
        )
        if found != expected or not fits or not 0 <= step <= recipe.steps:
            raise ValueError("not the state of this recipe's model; the file is damaged")
    for name, parameter in model.named_parameters():
        parameter.data.copy_(state[name])
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step), device=parameter.device),
            **{key: state[f"{name}.{key}"].to(parameter.device) for key in keys},
        }
    device = next(model.parameters()).device
    extras |= {name: tensor.to(device) for name, tensor in kept.items()}
    return step


def keep_metrics(path: Path, steps: int) -> list[dict[str, Any]]:
    """Drop the records of steps that will be done again, and a last line that a kill cut short; return the others."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    write_file(path, ["".join(lines[:steps]).encode()])
    return [json.loads(line) for line in lines[:steps]]


def _array(tensor: Tensor) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = tensor.detach().cpu().numpy()
    return array

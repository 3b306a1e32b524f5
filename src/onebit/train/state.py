"""The folder of a run: what may be resumed, what is saved, and what comes back to the bit.

state.safetensors holds the parameters, what the optimiser remembers of each, and what options and health keep between
steps; of several processes each writes its part, into a folder state-STEP (see shards.py). model.safetensors beside it
holds the model as others read it.
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
from onebit.train import options, ranks, shards
from onebit.train.optimizers import MOMENTS
from onebit.train.recipe import Recipe, read
from onebit.train.task import Task

STATE = "state.safetensors"
METRICS = "metrics.jsonl"


def open_run(recipe: Recipe, data: Path | None, out: Path, resume: bool) -> bool:
    """Check that the folder may be used; return whether there is a state to restore.

    Raises:
        ValueError: a run that is already there, none to resume, one of another recipe, or a batch that cannot be
            divided among the processes.
        OSError: the folder of texts is missing.
    """
    ranks.check(recipe.batch_size, recipe.accumulate)
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
    return latest(out) is not None


def latest(out: Path) -> Path | None:
    """The state to resume from: the file of one process or the folder of several, whichever has come further.

    Raises:
        ValueError: a damaged file.
    """
    path, folder = out / STATE, shards.latest(out)
    if folder is None or not path.exists():
        return folder or (path if path.exists() else None)
    with tensors.named(path):
        header, _ = tensors.split_header(tensors.map_file(path))
        return path if _step(header) >= shards.step_of(folder) else folder


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
    checkpoints: list[Checkpoint] = []
    if task.write is None:
        weights = {}
        with options.averaged(model, extras):
            for name, w in model.masters().items():
                full = ranks.whole(w)
                if ranks.is_first():
                    weights[name] = _array(full)

        def make() -> None:
            checkpoints.append(
                Checkpoint(model.config, {**weights}, task.tokenizer, task.chat_template, provenance)
            )

        # Made before anything is written: it refuses weights that are no longer numbers.
        ranks.first(make)
    state: dict[str, Tensor] = {name: p.detach() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        moments = optimizer.state[parameter]
        state |= {f"{name}.{key}": moments[key] for key in MOMENTS[recipe.options.optimizer]}
    state |= extras
    if ranks.count() > 1:
        shards.write(out, step, state)
        ranks.first(lambda: (out / STATE).unlink(missing_ok=True))
    else:
        tensors.write(out / STATE, {"step": str(step)}, {name: _array(t) for name, t in state.items()})
        shards.remove(out, keep=None)
    if task.write is None:
        ranks.first(lambda: run.write(checkpoints[0], out))
        return
    with options.averaged(model, extras), ranks.gathered(model):
        write = task.write
        ranks.first(lambda: write(model, provenance, out))


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
    parameters = dict(model.named_parameters())
    # What is kept of a parameter: itself, and more under longer names.
    owners = parameters | {
        f"{name}.{key}": parameter
        for name, parameter in parameters.items()
        for key in (*keys, *options.extra_keys(recipe))
    }
    needed = {*parameters, *(f"{name}.{key}" for name in parameters for key in keys)}
    with tensors.named(path):
        arrays: dict[str, npt.NDArray[Any]] = {}
        if path.is_dir():
            step, shapes = shards.step_of(path), shards.shapes(path)
        else:
            header, contents = tensors.split_header(tensors.map_file(path))
            step, arrays = _step(header), tensors.views(header, contents)
            shapes = {name: a.shape for name, a in arrays.items()}
        # Of the extras, codes exist from their first measurement on.
        fits = needed <= shapes.keys() <= owners.keys()
        fits = fits and all(shape == owners[name].shape for name, shape in shapes.items())
        if not fits or not 0 <= step <= recipe.steps:
            raise ValueError("not the state of this recipe's model; the file is damaged")
        if path.is_dir():
            state = shards.read(path, {name: owners[name] for name in shapes})
        else:
            state = {n: ranks.divided(torch.from_numpy(a.copy()), owners[n]) for n, a in arrays.items()}
    for name, parameter in parameters.items():
        parameter.detach().copy_(state[name])
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step), device=parameter.device),
            **{key: state[f"{name}.{key}"] for key in keys},
        }
    extras |= {name: tensor for name, tensor in state.items() if name not in needed}
    return step


def keep_metrics(path: Path, steps: int) -> list[dict[str, Any]]:
    """Drop the records of steps that will be done again, and a last line that a kill cut short; return the others."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    write_file(path, ["".join(lines[:steps]).encode()])
    return [json.loads(line) for line in lines[:steps]]


def _step(header: dict[str, Any]) -> int:
    text = header["__metadata__"].get("step", "")
    return int(text) if re.fullmatch("[0-9]{1,10}", text) else -1


def _array(tensor: Tensor) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = tensor.detach().cpu().numpy()
    return array

"""The folder of a run: what may be resumed, what is saved, and what comes back to the bit.

state.safetensors holds the parameters, what the optimiser remembers of each, and what options and health keep between
steps; of several processes each writes its part, into a folder state-STEP (see shards.py). model.safetensors beside it
holds the model as others read it.
"""

import json
import math
import os
import re
import zlib
from errno import EACCES
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from onebit.checkpoint import Checkpoint
from onebit.formats import adapter, run, tensors
from onebit.formats.files import write_file
from onebit.nn.transformer import Transformer
from onebit.train import board, options, ranks, shards
from onebit.train import data as text
from onebit.train.optimizers import MOMENTS
from onebit.train.recipe import Recipe, differences, read
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
    resumed = open_folder(recipe, out, read(out / run.RECIPE) if resume else None)
    if not resume:
        text.check_folder(data)
        # A corpus without a recipe may be that of any other.
        (out / "corpus" / "corpus.json").unlink(missing_ok=True)
    return resumed


def open_folder(recipe: Recipe, out: Path, before: Recipe | None) -> bool:
    """The part of `open_run` that does not depend on the kind of data.

    Args:
        recipe: to run.
        out: run folder.
        before: the recipe in it, to resume; else None.

    Raises:
        ValueError: see `open_run`; also a model whose state is gone, or no tensorboard where the recipe asks for it.
        OSError: the folder cannot be written.
    """
    ranks.check(recipe.batch_size, recipe.accumulate)
    if recipe.options.optimizer == "muon" and ranks.count() > 1:
        raise ValueError(
            f"options.optimizer=muon needs whole matrices, and {ranks.count()} processes have a part of each; "
            "run one process, or choose adamw"
        )
    if recipe.tensorboard:
        board.library()
    at = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not at.is_dir():
        raise ValueError(f"{at}: is a file; --out expects a folder")
    if not os.access(at, os.W_OK | os.X_OK):
        raise PermissionError(EACCES, "cannot be written; choose another --out", str(at))
    if before is None:
        if (out / run.RECIPE).exists():
            raise ValueError(f"{out} already holds a run; continue it with --resume or choose another --out")
        return False
    if differ := differences(before, recipe):
        raise ValueError(
            f"{out}: {'; '.join(differ)}. Resume with the values of the run (leave --set out), or start another run"
        )
    has_state = latest(out) is not None
    if not has_state and any((out / name).exists() for name in (run.MODEL, adapter.MODEL)):
        # To begin again would write over what was learned.
        raise ValueError(f"{out} holds a model, but no {STATE} to go on from; start another run")
    if recipe != before:
        ranks.first(lambda: start(recipe, out))
    return has_state


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
        return path if _step(header["__metadata__"]) >= shards.step_of(folder) else folder


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
        ValueError: numbers that are no longer finite; nothing is written then.
        OSError: the disk is full, ...
    """
    provenance = {
        "recipe": recipe.to_dict(),
        **task.provenance,
        "steps": step,
        "tokens": step * task.tokens_per_step,
    }
    state: dict[str, Tensor] = {name: p.detach() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        moments = optimizer.state[parameter]
        # What has had no gradient yet is not remembered yet.
        nothing = torch.zeros_like(parameter.detach())
        state |= {f"{name}.{key}": moments.get(key, nothing) for key in MOMENTS[recipe.options.optimizer]}
    state |= extras
    broken = next((name for name, t in state.items() if not torch.isfinite(ranks.local(t)).all()), None)
    if ranks.total(float(broken is not None)):
        raise ValueError(
            f"training diverged: after {step} steps {broken or 'a part of another process'} holds NaN or infinity; "
            f"what was saved before stays. Start another run with a lower optim.lr"
        )
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

        # Made before anything is written, as it may refuse them.
        ranks.first(make)
    about = {"step": str(step)} | _sources(task)
    if ranks.count() > 1:
        shards.write(out, step, state, about)
        ranks.first(lambda: (out / STATE).unlink(missing_ok=True))
    else:
        arrays = {name: _array(tensor) for name, tensor in state.items()}
        checksum = zlib.crc32(str(step).encode())
        for array in arrays.values():
            checksum = zlib.crc32(tensors.raw(array), checksum)
        tensors.write(out / STATE, about | {"crc32": str(checksum)}, arrays)
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
    task: Task,
) -> int:
    """Load weights, moments and extras; return the number of steps that were done, at most those of the run.

    Raises:
        ValueError: a damaged file, one of another model, or other data than that of the run.
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
            about, shapes = shards.about(path), shards.shapes(path)
        else:
            header, contents = tensors.split_header(tensors.map_file(path))
            about, arrays = header["__metadata__"], tensors.views(header, contents)
            shapes = {name: a.shape for name, a in arrays.items()}
        step = _step(about)
        # Of the extras, codes exist from their first measurement on.
        fits = needed <= shapes.keys() <= owners.keys()
        fits = fits and all(shape == owners[name].shape for name, shape in shapes.items())
        if not fits or not 0 <= step <= recipe.steps:
            raise ValueError("not the state of this recipe's model; the file is damaged")
        if "crc32" in about and about["crc32"] != str(
            zlib.crc32(contents.data, zlib.crc32(str(step).encode()))
        ):
            raise ValueError("its checksum is not that of its bytes; the file is damaged: start another run")
        for name, value in _sources(task).items():
            if about.get(name, value) != value:
                raise ValueError(
                    f"the data is not that of the run ({name} {about[name][:16]} in the run, {value[:16]} now); "
                    f"give that back, or start another run"
                )
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
    """Drop the records of steps that will be done again, and a last line that a kill cut short; return the others.

    Raises:
        ValueError: a line that is no record; the file stays as it is.
    """
    # What follows the last end of a line was cut, or is nothing.
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    kept, records = [], []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            is_kept = record["step"] < steps
            if not math.isfinite(record["loss"]):
                raise ValueError
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ValueError(
                f"{path}, line {number}: not the record of a step; delete the line, and the run goes on without it"
            ) from None
        if is_kept:
            kept.append(line + b"\n")
            records.append(record)
    write_file(path, kept)
    return records


def _sources(task: Task) -> dict[str, str]:
    """What names the data of a task."""
    return {name: str(value) for name, value in task.provenance.items() if name.endswith("_sha256")}


def _step(about: dict[str, str]) -> int:
    text = about.get("step", "")
    return int(text) if re.fullmatch("[0-9]{1,10}", text) else -1


def _array(tensor: Tensor) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = tensor.detach().cpu().numpy()
    return array

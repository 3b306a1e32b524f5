"""The state of a run of several processes: a folder state-STEP, in which each has a safetensors file of its rows.

The folder appears when all files are whole and on the disk; only then older states go. Any number of processes reads
what any other number wrote.
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onebit.formats.files import naming, sync_folder, write_file
from onebit.train import ranks

ABOUT = "about.json"
_NAME = re.compile("state-([0-9]{1,10})")


def latest(out: Path) -> Path | None:
    """The folder of the last state in a run folder, if there is one."""
    return max(_folders(out), key=step_of, default=None)


def step_of(folder: Path) -> int:
    """Steps that were done when a folder was written."""
    found = _NAME.fullmatch(folder.name)
    assert found
    return int(found[1])


def write(out: Path, step: int, state: Mapping[str, Tensor], about: dict[str, str]) -> None:
    """Write the state of all processes, then remove older folders.

    Args:
        out: run folder.
        step: steps that were done.
        state: tensors, divided among the processes.
        about: what is written beside them, the step among it.

    Raises:
        OSError: the disk is full, ...; the older folder stays, and nothing is left of the new one.
    """
    # Here and below, so that one process alone waits for none of it.
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    path = out / f"state-{step}"
    temporary = path.with_name(f".{path.name}.tmp")

    def make_room() -> None:
        for left in (path, *out.glob(".state-*.tmp")):
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir()

    def publish() -> None:
        write_file(temporary / ABOUT, [json.dumps(about).encode()])
        sync_folder(temporary)
        os.replace(temporary, path)
        sync_folder(out)
        remove(out, keep=path)

    ranks.first(make_room)
    try:
        with naming(path), _plain_errors():
            save(dict(state), storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True))
        ranks.first(publish)
    except OSError:
        # All have heard of it, so nobody writes there any more.
        if ranks.is_first():
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove(out: Path, keep: Path | None) -> None:
    """Remove all folders of states but one."""
    for folder in _folders(out):
        if folder != keep:
            shutil.rmtree(folder)


def about(folder: Path) -> dict[str, str]:
    """What was written beside the tensors.

    Raises:
        ValueError: a damaged file, or one that is missing.
    """
    try:
        found = json.loads((folder / ABOUT).read_bytes())
        if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
            raise ValueError("expected texts by name")
        if found.get("step") != str(step_of(folder)):
            raise ValueError(f"expected step {step_of(folder)}, that of the folder")
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{ABOUT} is damaged ({error})") from None
    return found


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the whole tensors in a folder.

    Raises:
        ValueError: a damaged file, or one that is missing.
    """
    return {name: tuple(meta.size) for name, meta in _contents(folder).items()}


def read(folder: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read tensors, divided among the processes as others are.

    Args:
        folder: of a state.
        like: for each name a tensor of the same shape.

    Raises:
        ValueError: a damaged file.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    dtypes = {name: meta.properties.dtype for name, meta in _contents(folder).items()}
    state = {name: torch.zeros_like(tensor.detach(), dtype=dtypes[name]) for name, tensor in like.items()}
    with _plain_errors(), warnings.catch_warnings():
        # That this process is alone.
        warnings.simplefilter("ignore", UserWarning)
        reader = HuggingFaceStorageReader(str(folder))
        load(state, storage_reader=reader, no_dist=ranks.count() == 1)
    return state


def _folders(out: Path) -> list[Path]:
    return [path for path in out.glob("state-*") if _NAME.fullmatch(path.name) and path.is_dir()]


def _contents(folder: Path) -> dict[str, Any]:
    """What torch says of each tensor in a folder."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    with _plain_errors():
        contents: dict[str, Any] = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    for name, meta in contents.items():
        if sum(chunk.sizes.numel() for chunk in meta.chunks) != meta.size.numel():
            raise ValueError(f"rows of {name} are missing; a file was deleted")
    return contents


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Errors as a file of one process would give them."""
    from safetensors import SafetensorError
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"damaged ({error})") from None

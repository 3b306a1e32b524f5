"""The run folder of a training, and in it the float32 master.

    checkpoint = read("runs/stories")       # config.json, model.safetensors, tokenizer.json, chat_template.jinja

The trainer keeps recipe.json, metrics.jsonl and its own state in the same folder.
"""

import json
import os
from pathlib import Path
from typing import TypeGuard

import numpy as np

from onebit.checkpoint import Checkpoint, Tensor, rows
from onebit.config import ModelConfig
from onebit.formats import tensors as container
from onebit.formats.files import write_file
from onebit.formats.tensors import Array, Json, named, parse_json, shorten
from onebit.packing import Float32

CONFIG = "config.json"
MODEL = "model.safetensors"
RECIPE = "recipe.json"
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"

_MAX_CONFIG_BYTES = 65536


def is_run(folder: Path) -> bool:
    """Whether a folder holds a trained model."""
    return (folder / CONFIG).is_file() and (folder / MODEL).is_file()


def read(folder: str | os.PathLike[str]) -> Checkpoint:
    """Read the float32 master of a run folder; its tensors are views of the mapped file.

    A recipe.json becomes `provenance["recipe"]`, where the model does not carry its recipe already.

    Raises:
        ValueError: a damaged file, or one that does not fit the config; the message names it.
        OSError: a file is missing or cannot be opened.
    """
    folder = Path(folder)
    with named(folder / CONFIG):
        config = _read_config(folder / CONFIG)
    with named(folder / MODEL):
        tensors, provenance = _read_model(folder / MODEL, config)
    if "recipe" not in provenance and (folder / RECIPE).is_file():
        with named(folder / RECIPE):
            provenance["recipe"] = parse_json((folder / RECIPE).read_bytes(), "recipe")
    tokenizer = (folder / TOKENIZER).read_bytes() if (folder / TOKENIZER).is_file() else None
    template = None
    if (folder / CHAT_TEMPLATE).is_file():
        with named(folder / CHAT_TEMPLATE):
            template = (folder / CHAT_TEMPLATE).read_text("utf-8")
    with named(folder / MODEL):
        return Checkpoint(config, tensors, tokenizer, template, provenance)


def write(checkpoint: Checkpoint, folder: str | os.PathLike[str]) -> None:
    """Write a float32 master into a run folder, each file whole or not at all, the weights last.

    Args:
        checkpoint: a float32 master.
        folder: made where it is missing; files of the trainer in it are left alone.

    Raises:
        ValueError: a packed model, whose float32 weights are gone.
        OSError: the disk is full, ...
    """
    if checkpoint.is_packed:
        raise ValueError("a run folder holds a float32 master; this model is packed: write a .onebit file")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / CONFIG, [json.dumps(checkpoint.config.to_dict(), indent=2).encode() + b"\n"])
    template = None if checkpoint.chat_template is None else checkpoint.chat_template.encode("utf-8")
    for name, contents in ((TOKENIZER, checkpoint.tokenizer), (CHAT_TEMPLATE, template)):
        if contents is None:
            (folder / name).unlink(missing_ok=True)
        else:
            write_file(folder / name, [contents])
    tensors = {name: rows(name, tensor) for name, tensor in checkpoint.tensors.items()}
    container.write(
        folder / MODEL, {"provenance": json.dumps(checkpoint.provenance, allow_nan=False)}, tensors
    )


def _read_config(path: Path) -> ModelConfig:
    with open(path, "rb") as file:
        text = file.read(_MAX_CONFIG_BYTES + 1)
    if len(text) > _MAX_CONFIG_BYTES:
        raise ValueError(f"the file is larger than {_MAX_CONFIG_BYTES} bytes; expected a model config")
    return ModelConfig.from_dict(parse_json(text, "config"))


def _read_model(path: Path, config: ModelConfig) -> tuple[dict[str, Tensor], Json]:
    """The float32 tensors of a file, as views of it, and the provenance it carries."""
    header, data = container.split_header(container.map_file(path))
    tensors: dict[str, Tensor] = {}
    for name, tensor in container.views(header, data).items():
        if not _is_float32(tensor):
            raise ValueError(f"tensor {shorten(name)} is {tensor.dtype}; a run folder holds float32")
        tensors[name] = tensor
    # Before the names of all layers are listed: a hostile config may claim millions.
    if config.n_layers > len(tensors):
        raise ValueError(f"the config claims {config.n_layers} layers; the file has {len(tensors)} tensors")
    return tensors, parse_json(header["__metadata__"].get("provenance", "{}"), "provenance")


def _is_float32(tensor: Array) -> TypeGuard[Float32]:
    return tensor.dtype == np.float32

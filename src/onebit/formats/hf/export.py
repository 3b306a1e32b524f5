"""Write a Hugging Face model: a folder that transformers loads, whole or not at all, one tensor at a time."""

import itertools
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from onebit.checkpoint import BLOCK_ROWS, Checkpoint, Tensor, codes, holds_codes, rows
from onebit.config import ModelConfig
from onebit.formats import names
from onebit.formats import tensors as container
from onebit.formats.files import Buffer, write_file
from onebit.formats.floats import decode, encode, width_of
from onebit.formats.hf import config_json, tokenizer_files
from onebit.formats.hf.shards import CONFIG, INDEX, MODEL, is_model
from onebit.formats.tensors import Json, shorten
from onebit.packing import Float32, Int8, UInt8, from_bf16, to_bf16
from onebit.quant import dequantize

KINDS = ("packed", "dense")
SHARD_BYTES = 5_000_000_000

# What a model consists of, and may be replaced with it.
_MODEL_FILES = re.compile(
    r"((generation|tokenizer)_)?config\.json|tokenizer\.(json|model)|(special_tokens_map|added_tokens|vocab)\.json"
    r"|merges\.txt|chat_template\.(jinja|json)|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
)
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


class _Entry(NamedTuple):
    """A tensor to write: its name, dtype and shape there, and its bytes, piece by piece."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[Buffer]]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * container.ITEM_BYTES[self.dtype]


class _Form(NamedTuple):
    """How numbers are written: in one width, or each tensor in its own; as a master; with scales that divide."""

    width: str | None
    is_master: bool
    divides: bool


def write(checkpoint: Checkpoint, folder: str | os.PathLike[str], kind: str) -> None:
    """Write a model as a folder for transformers, whole or not at all; a model that is there is replaced.

    "packed" has four ternary weights in a byte, and a scale in the width of the other numbers, which multiplies
    (linear_class autobitlinear), or divides (bitlinear) where only so bfloat16 holds it. Where bfloat16 does not hold
    all numbers, all are float32: transformers loads a packed model as it is. "dense" has weights in floating point:
    those of a dense model, or of a ternary master, which transformers then rounds as we do (quantization_mode online);
    of any other model codes * scale, whose activations transformers does not round.

    Args:
        checkpoint: any.
        folder: made, with its config.json, weights in shards of at most 5 GB, and tokenizer.
        kind: "packed" or "dense".

    Raises:
        ValueError: a model that transformers has no class for or cannot pack, a folder with anything but a model in
            it, or a damaged source.
        OSError: the disk is full, ...

    Source: transformers, integrations/bitnet.py.
    """
    folder = Path(os.path.abspath(folder))
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; expected {' or '.join(KINDS)}")
    check_replaceable(folder)
    config = checkpoint.config
    # Before anything is read or written: these refuse what has no class, or cannot be packed.
    config_json.build(config, "float32", None)
    quantization = _quantization(checkpoint, kind)
    files = tokenizer_files.build(checkpoint.tokenizer, checkpoint.chat_template, config)
    form = _form(checkpoint, kind, quantization)
    if form.divides and quantization:
        quantization["linear_class"] = "bitlinear"
    entries = list(_entries(checkpoint, kind, form))
    widths = {entry.dtype for entry in entries} - {"U8"}
    dtype = _DTYPES[widths.pop() if len(widths) == 1 else "F32"]
    files[CONFIG] = _dump(config_json.build(config, dtype, quantization))
    folder.parent.mkdir(parents=True, exist_ok=True)
    hidden = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    hidden.mkdir()
    try:
        _write_weights(hidden, entries)
        for name, contents in files.items():
            write_file(hidden / name, [contents])
        move_folder(hidden, folder)
    except OSError as error:
        if error.filename is None or not str(error.filename).startswith(str(hidden)):
            raise
        raise OSError(error.errno, error.strerror, str(folder)) from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def usual_kind(checkpoint: Checkpoint) -> str:
    """How a model is written unless one asks for something else; codes stay codes."""
    return "dense" if checkpoint.config.weights == "dense" else "packed"


def refusals(checkpoint: Checkpoint) -> dict[str, str | None]:
    """Why a model cannot be written as each of `KINDS`; None where it can."""
    found: dict[str, str | None] = {}
    try:
        tokenizer_files.build(checkpoint.tokenizer, checkpoint.chat_template, checkpoint.config)
    except ValueError as error:
        return dict.fromkeys(KINDS, str(error))
    for kind in KINDS:
        try:
            config_json.build(checkpoint.config, "float32", _quantization(checkpoint, kind))
            found[kind] = None
        except ValueError as error:
            found[kind] = str(error)
    return found


def pack_codes(codes: Int8) -> UInt8:
    """Four codes in a byte: uint8 [n / 4, k], rows r, r + n/4, r + n/2 and r + 3n/4 from the lowest bits up.

    Args:
        codes: int8 [n, k] in {-1, 0, +1}, n a multiple of 4.
    """
    n, k = codes.shape
    quarters = (codes.reshape(4, n // 4, k) + np.int8(1)).view(np.uint8)
    packed: UInt8 = quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6
    return packed


def check_replaceable(folder: Path) -> None:
    """Refuse to write where something else lies.

    Raises:
        ValueError: a file, or a folder with other things than a model of this format.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; expected the name of a folder to make")
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    # Neither the master of a run folder is to be lost, nor what stands beside a model, as the .git of its clone.
    others = [name for name in names if not _MODEL_FILES.fullmatch(name)]
    if others or (names and not is_model(folder)):
        found = shorten(others[0]) if others else "something else than a Hugging Face model"
        raise ValueError(f"{folder}: holds {found}, which would be lost; choose another folder")


def _quantization(checkpoint: Checkpoint, kind: str) -> Json | None:
    """What config.json says of the weights; refuses what cannot be packed."""
    config = checkpoint.config
    if config.layer_weights:
        raise ValueError(
            "layers with b1.58 and with b1 weights: such a folder has one scheme; write a .onebit file"
        )
    is_absmean = config.weights == "b1.58" and config.scale == "tensor" and config.activations == "a8"
    mode = "offline"
    if kind == "packed":
        if not is_absmean:
            found = (
                f"weights {config.weights}, activations {config.activations}, a scale for each {config.scale}"
            )
            raise ValueError(
                f"{found}: packed BitNets have weights b1.58, activations a8 and a scale for each tensor; write a "
                "dense one, or a .onebit file"
            )
        for name, (n, _) in config.linear_shapes().items():
            if n % 4:
                raise ValueError(
                    f"{name} has {n} rows; packed BitNets need a multiple of 4: write a dense one, or a .onebit file"
                )
    elif not is_absmean or holds_codes(checkpoint.tensors["layers.0.q.weight"]):
        return None
    else:
        mode = "online"
    return {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": mode,
        "modules_to_not_convert": ["lm_head"],
    }


def _form(checkpoint: Checkpoint, kind: str, quantization: Json | None) -> _Form:
    """Widths and scales with which no number is rounded."""
    config, shapes = checkpoint.config, checkpoint.config.tensor_shapes()
    if kind == "dense":
        # transformers rounds nothing while it loads a model that it quantises: all have to be of one width.
        widths = {width_of(tensor) for tensor in checkpoint.tensors.values()}
        return _Form("F32" if quantization and len(widths) > 1 else None, quantization is not None, False)
    if not all(_is_bf16(name, checkpoint.tensors[name]) for name in shapes if not config.is_linear(name)):
        return _Form("F32", False, False)
    multiplies = divides = True
    for name in shapes:
        if config.is_linear(name) and (multiplies or divides):
            scale = codes(name, checkpoint.tensors[name], config)[1]
            multiplies = multiplies and np.array_equal(_rounded(scale), scale)
            divides = divides and np.array_equal(np.float32(1) / _rounded(np.float32(1) / scale), scale)
    return _Form("BF16" if multiplies or divides else "F32", False, divides and not multiplies)


def _is_bf16(name: str, tensor: Tensor) -> bool:
    """Whether bfloat16 holds all values."""
    if width_of(tensor) == "BF16":
        return True
    blocks = (rows(name, tensor, i, i + BLOCK_ROWS) for i in range(0, tensor.shape[0], BLOCK_ROWS))
    return all(np.array_equal(_rounded(block), block) for block in blocks)


def _rounded(values: Float32) -> Float32:
    return from_bf16(to_bf16(values))


def _entries(checkpoint: Checkpoint, kind: str, form: _Form) -> Iterator[_Entry]:
    config = checkpoint.config
    for name in config.tensor_shapes():
        tensor = checkpoint.tensors[name]
        if config.is_linear(name) and kind == "packed":
            yield from _packed_entries(name, tensor, config, form)
        elif config.is_linear(name) and config.weights != "dense" and not form.is_master:
            yield _values_of_codes(name, tensor, config)
        else:
            yield _floats(name, tensor, form.width or width_of(tensor))


def _floats(name: str, tensor: Tensor, width: str) -> _Entry:
    def chunks() -> Iterator[Buffer]:
        for begin in range(0, tensor.shape[0], BLOCK_ROWS):
            yield container.raw(encode(rows(name, tensor, begin, begin + BLOCK_ROWS), width))

    return _Entry(names.to_hf(name), width, tensor.shape, chunks)


def _packed_entries(name: str, tensor: Tensor, config: ModelConfig, form: _Form) -> Iterator[_Entry]:
    n, k = tensor.shape
    scales: list[Float32] = []

    def weight() -> Iterator[Buffer]:
        found, scale = codes(name, tensor, config)
        scales.append(scale)
        yield container.raw(pack_codes(found))

    # Follows its weight in the file, so it is known by then.
    def stored_scale() -> Iterator[Buffer]:
        scale = scales.pop()
        with np.errstate(over="ignore"):
            stored = encode(np.float32(1) / scale if form.divides else scale, width)
            both = decode(stored.reshape(-1).view(np.uint8), width), np.float32(1) / scale
        if not all(np.isfinite(number).all() and number.all() for number in both):
            raise ValueError(
                f"tensor {name}: the scale {scale[0]:g} or its inverse is outside of float32, and readers need both; "
                "keep the model as a .onebit file"
            )
        yield container.raw(stored)

    target, width = names.to_hf(name), form.width or "F32"
    yield _Entry(target, "U8", (n // 4, k), weight)
    yield _Entry(f"{target}_scale", width, (1,), stored_scale)


def _values_of_codes(name: str, tensor: Tensor, config: ModelConfig) -> _Entry:
    n, k = tensor.shape

    def chunks() -> Iterator[Buffer]:
        found, scale = codes(name, tensor, config)
        for begin in range(0, n, BLOCK_ROWS):
            block = found[begin : begin + BLOCK_ROWS].astype(np.float32)
            values = dequantize(block, scale if scale.shape == (1,) else scale[begin : begin + BLOCK_ROWS])
            yield container.raw(values.astype("<f4"))

    return _Entry(names.to_hf(name), "F32", (n, k), chunks)


def _write_weights(folder: Path, entries: list[_Entry]) -> None:
    shards = _shards(entries)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = MODEL if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        specs = {entry.name: (entry.dtype, entry.shape) for entry in shard}
        chunks = itertools.chain.from_iterable(entry.chunks() for entry in shard)
        container.stream(folder / file, {"format": "pt"}, specs, chunks)
        weight_map |= dict.fromkeys(specs, file)
    if len(shards) > 1:
        metadata = {"total_size": sum(entry.n_bytes for entry in entries)}
        write_file(folder / INDEX, [_dump({"metadata": metadata, "weight_map": weight_map})])


def _shards(entries: list[_Entry]) -> list[list[_Entry]]:
    shards: list[list[_Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.n_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.n_bytes
    return shards


def move_folder(hidden: Path, folder: Path) -> None:
    """Put a finished folder in its place; what was there goes once the new one stands."""
    if not folder.is_dir():
        os.rename(hidden, folder)
        return
    old = folder.with_name(f"{hidden.name}.old")
    os.rename(folder, old)
    try:
        os.rename(hidden, folder)
    except OSError:
        with suppress(OSError):
            os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _dump(values: Json) -> bytes:
    return json.dumps(values, indent=2).encode() + b"\n"

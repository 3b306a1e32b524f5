"""Where the tensors of a Hugging Face model lie: in model.safetensors, or in shards that an index names.

    tensors = locate(folder)        # {"model.norm.weight": Located(path, "BF16", (2560,), begin, n_bytes), ...}

Trusts nothing in a file. Knows no models.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from onebit.formats import tensors as container
from onebit.formats.files import read_bytes
from onebit.formats.tensors import Json, named, parse_json, shorten
from onebit.packing import UInt8

CONFIG = "config.json"
MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Indices of models with thousands of tensors have some hundred kilobytes, tokenizers up to 40 MB.
MAX_JSON_BYTES = 128 << 20
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_MAX_SHARDS = 4096
_MAX_CONFIG_BYTES = 1 << 20


class Located(NamedTuple):
    """A tensor in a file.

    Args:
        path: the file.
        name: of the tensor there.
        dtype: one of `onebit.formats.tensors.ITEM_BYTES`.
        shape: its sizes.
        begin: its first byte in the file.
        n_bytes: its bytes.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    n_bytes: int

    def read(self, first: int = 0, n_bytes: int | None = None) -> UInt8:
        """Some of its bytes, uint8, from the first on."""
        return read_bytes(self.path, self.begin + first, self.n_bytes if n_bytes is None else n_bytes)


def is_model(folder: Path) -> bool:
    """Whether a folder holds a model of this format, told by its config.json."""
    path = folder / CONFIG
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        text = file.read(_MAX_CONFIG_BYTES)
    return b'"model_type"' in text or b'"architectures"' in text


def locate(folder: Path) -> dict[str, Located]:
    """Find all tensors of a model by its name, without reading any.

    Raises:
        ValueError: no safetensors, a damaged file or index, or a tensor that is missing or there twice.
        OSError: a file cannot be opened.
    """
    if (folder / MODEL).is_file():
        return _open(folder / MODEL)
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder}: {_what_is_missing(folder)}")
    with named(folder / INDEX):
        shards = _read_index(folder)
    found: dict[str, Located] = {}
    for shard, expected in shards.items():
        tensors = _open(folder / shard)
        for name in expected:
            if name not in tensors:
                raise ValueError(f"{folder / shard}: tensor {shorten(name)} is missing; {INDEX} has it here")
        for name, tensor in tensors.items():
            if name in found:
                raise ValueError(
                    f"{folder / shard}: tensor {shorten(name)} is in {found[name].path.name} too; expected it once"
                )
            found[name] = tensor
    return found


def read_json(path: Path, what: str) -> Json:
    """Parse a JSON file of bounded size; errors name it.

    Raises:
        ValueError: too large, or no strict JSON object.
        OSError: it cannot be opened.
    """
    with named(path):
        return parse_json(read_small(path), what)


def read_small(path: Path) -> bytes:
    """The contents of a file of at most `MAX_JSON_BYTES`.

    Raises:
        ValueError: a larger one.
        OSError: it cannot be opened.
    """
    with open(path, "rb") as file:
        contents = file.read(MAX_JSON_BYTES + 1)
    if len(contents) > MAX_JSON_BYTES:
        raise ValueError(f"the file is larger than {MAX_JSON_BYTES} bytes; it is damaged")
    return contents


def _open(path: Path) -> dict[str, Located]:
    with named(path):
        contents = container.map_file(path)
        header, data = container.split_header(contents, "safetensors file")
        start = contents.size - data.size
        return {
            name: Located(path, name, span.dtype, span.shape, start + span.begin, span.stop - span.begin)
            for name, span in container.spans(header, data.size, container.ITEM_BYTES).items()
        }


def _read_index(folder: Path) -> dict[str, list[str]]:
    """The tensors of each shard."""
    weight_map = parse_json(read_small(folder / INDEX), "index").get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise ValueError(f"weight_map is {shorten(weight_map)}; expected a table from tensors to files")
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain(shard):
            raise ValueError(
                f"weight_map has tensor {shorten(name)} in {shorten(shard)}; expected the name of a .safetensors file "
                "in the same folder"
            )
        shards.setdefault(shard, []).append(name)
    if len(shards) > _MAX_SHARDS:
        raise ValueError(f"weight_map names {len(shards)} files; expected at most {_MAX_SHARDS}")
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(shards)} files that weight_map names are missing, first {missing[0]}; fetch them"
        )
    return shards


def _is_plain(name: str) -> bool:
    """Whether it is the name of a safetensors file, and no path."""
    is_word = name.isascii() and name.isprintable() and len(name) < 256 and not name.startswith(".")
    return is_word and name.endswith(".safetensors") and not set(name) & set('/\\:*?"<>|')


def _what_is_missing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if name.endswith(_PICKLES) and name != "training_args.bin"]
    if pickles:
        return (
            f"holds {shorten(pickles[0])} and no {MODEL}; a pickle can run code, so onebit opens none: load the "
            "model with transformers and save it with save_pretrained, or make a revision of it with safetensors at "
            "huggingface.co/spaces/safetensors/convert"
        )
    others = [name for name in names if name.endswith(".safetensors")]
    hint = f", found {shorten(others[0])}" if others else ""
    return f"has no weights: expected {MODEL} or {INDEX}{hint}; fetch the whole model"

"""Hugging Face models: config.json, safetensors and a tokenizer in a folder.

    checkpoint = read(Path("bitnet-b1.58-2B-4T"))       # tensors stay in the file until they are needed
    write(checkpoint, Path("out"), "packed")

Reads BitNets (packed, or the floating-point master), ternary Llamas, and dense Llama, Mistral, Qwen2 and Qwen3.
Packed weights are uint8 [n / 4, k]: byte row r holds the codes + 1 of rows r, r + n/4, r + n/2 and r + 3n/4, from the
lowest bits up.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from onebit.checkpoint import Checkpoint, Stored, Tensor
from onebit.config import Activations, ModelConfig
from onebit.formats import names
from onebit.formats.floats import FLOATS, decode, in_file
from onebit.formats.hf import config_json, ternary, tokenizer_files
from onebit.formats.hf.config_json import Description
from onebit.formats.hf.export import KINDS, check_replaceable, move_folder, refusals, usual_kind, write
from onebit.formats.hf.shards import CONFIG, Located, is_model, locate, read_json
from onebit.formats.tensors import Json, named, shorten
from onebit.packing import Float32, Int8, UInt8
from onebit.quant import dequantize

__all__ = ["KINDS", "check_replaceable", "is_model", "move_folder", "read", "refusals", "usual_kind", "write"]

_SCALE = "_scale"
# Values that models keep beside their weights and compute anew.
_BUFFERS = ("rotary_emb.inv_freq", ".masked_bias", ".attn.bias")
# Scales of real models multiply by 0.001 to 1, or divide by 1 to 1000.
_LARGEST_MULTIPLIER = 4.0
_BLOCK_ROWS = 4096

_Tensors = dict[str, Located]


def read(folder: Path) -> Checkpoint:
    """Read a model; its tensors are `Stored`, and read when they are needed.

    Packed weights keep codes and scale. Weights in floating point are, by what config.json says, a master (b1.58, a8),
    or dense; those of a model without quantization_config that are {-s, 0, +s} to the last are b1.58 too.

    Args:
        folder: with config.json, model.safetensors or its shards, and a tokenizer.

    Raises:
        ValueError: another family or quantisation, a damaged file, scales that contradict the config, ...; the message
            names the file and what to do.
        OSError: a file is missing or cannot be opened.

    Source: transformers, integrations/bitnet.py.
    """
    folder = Path(folder)
    values = read_json(folder / CONFIG, "config")
    with named(folder / CONFIG):
        description = config_json.parse(values)
    config = description.config
    tokenizer = tokenizer_files.read(folder, config.vocab_size)
    config = _with_special_tokens(config, folder, tokenizer)
    tensors, scales = _by_our_names(folder, locate(folder))
    # Before the names of all layers are listed: a hostile config may claim millions.
    if config.n_layers > len(tensors):
        raise ValueError(
            f"{folder}: config.json claims {config.n_layers} layers; there are {len(tensors)} tensors"
        )
    config = replace(config, tied_head=config.tied_head and not _has_own_head(tensors))
    if config.tied_head:
        tensors.pop("head.weight", None)
    description = replace(description, config=config)
    with named(folder):
        found = _stored(description, tensors, scales)
    config, stored, meaning = _with_scheme(description, tensors, found)
    provenance: Json = {
        "source": {
            "format": "huggingface",
            "model_type": description.model_type,
            "folder": _name_of(folder),
            "scale": meaning,
            "dtype": tensors["norm.weight"].dtype,
        }
    }
    return Checkpoint(config, stored, tokenizer.tokenizer, tokenizer.chat_template, provenance)


def _name_of(folder: Path) -> str:
    """The name of a folder; of a snapshot in the cache of the hub the repository and its revision."""
    path = folder.absolute()
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return f"{path.parent.parent.name.removeprefix('models--').replace('--', '/', 1)}@{path.name}"
    return path.name


def _with_special_tokens(config: ModelConfig, folder: Path, tokenizer: tokenizer_files.Found) -> ModelConfig:
    """The config with the ids that texts begin with and end at."""
    eos = list(config.eos_tokens)
    path = folder / tokenizer_files.GENERATION
    if path.is_file():
        generation = read_json(path, "config")
        with named(path):
            eos += config_json.tokens(generation, "eos_token_id", config.vocab_size)
    if tokenizer.eos_token in eos:
        # A chat template knows the first one.
        eos.insert(0, tokenizer.eos_token)
    bos = config.bos_token
    if tokenizer.adds_bos is not None:
        found = tokenizer.bos_token
        bos = (bos if found is None else found) if tokenizer.adds_bos else None
    return replace(config, bos_token=bos, eos_tokens=tuple(dict.fromkeys(eos)))


def _by_our_names(folder: Path, located: Mapping[str, Located]) -> tuple[_Tensors, _Tensors]:
    """Tensors by canonical names, and scales by those of their matrices."""
    tensors: _Tensors = {}
    scales: _Tensors = {}
    unknown = []
    for name, tensor in located.items():
        ours = names.from_hf(name)
        scaled = names.from_hf(name.removesuffix(_SCALE)) if name.endswith(f".weight{_SCALE}") else None
        found, key = (scales, scaled) if scaled else (tensors, ours)
        if key is None:
            if not name.endswith(_BUFFERS):
                unknown.append(name)
        elif key in found:
            raise ValueError(
                f"{tensor.path}: tensor {shorten(name)} is {shorten(found[key].name)} by another name"
            )
        else:
            found[key] = tensor
    if unknown:
        listed = ", ".join(shorten(name) for name in unknown[:3])
        raise ValueError(
            f"{folder}: {len(unknown)} tensors have no place in the models that onebit runs, first {listed}"
        )
    return tensors, scales


def _has_own_head(tensors: _Tensors) -> bool:
    """Whether there is a head whose values are not those of the embedding."""
    head, embed = tensors.get("head.weight"), tensors.get("embed.weight")
    if head is None or embed is None or head.shape != embed.shape or len(head.shape) != 2:
        return head is not None
    if {head.dtype, embed.dtype} - set(FLOATS):
        return True
    pair = [_floats(tensor, tensor.shape) for tensor in (head, embed)]
    for begin in range(0, head.shape[0], _BLOCK_ROWS):
        end = min(head.shape[0], begin + _BLOCK_ROWS)
        rows = [stored.rows(begin, end) for stored in pair]
        if not np.array_equal(rows[0], rows[1], equal_nan=True):
            return True
    return False


def _stored(description: Description, tensors: _Tensors, scales: _Tensors) -> dict[str, Stored]:
    """The tensors, checked to be those of the config."""
    config = description.config
    shapes = config.tensor_shapes()
    for name in shapes:
        if name not in tensors:
            hint = "; config.json says that the head is not tied" if name == "head.weight" else ""
            raise ValueError(f"tensor {names.to_hf(name)} is missing; fetch the whole model{hint}")
    for name in tensors:
        if name not in shapes:
            raise ValueError(
                f"tensor {shorten(tensors[name].name)} has no place in a {description.model_type} of {config.n_layers} "
                "layers; expected what config.json describes"
            )
    linear = [name for name in shapes if config.is_linear(name)]
    packed = [name for name in linear if tensors[name].dtype == "U8"]
    if packed and len(packed) < len(linear):
        other = next(name for name in linear if name not in packed)
        raise ValueError(
            f"tensor {tensors[other].name} is {tensors[other].dtype}, but {tensors[packed[0]].name} is packed; onebit "
            "needs all seven linear layers of every block in one scheme"
        )
    stored = {name: _floats(tensors[name], shape) for name, shape in shapes.items() if name not in packed}
    if packed:
        multipliers = _multipliers(description, [tensors[name] for name in packed], scales, packed)
        for name in packed:
            n, k = shapes[name]
            stored[name] = _packed(tensors[name], (n, k), multipliers[name], scales[name].n_bytes)
    elif scales:
        found = next(iter(scales.values()))
        raise ValueError(f"tensor {shorten(found.name)} scales no packed weights; expected them as U8")
    return stored


def _with_scheme(
    description: Description, tensors: _Tensors, stored: dict[str, Stored]
) -> tuple[ModelConfig, dict[str, Tensor], str]:
    """The config with the scheme that its tensors have, the tensors, and what became of scales."""
    config = description.config
    linear = [name for name in stored if config.is_linear(name)]
    rounded = replace(config, weights="b1.58", activations="a8", scale="tensor")
    if stored[linear[0]].codes:
        return rounded, {**stored}, description.meaning or ""
    # What is said to be rounded in every pass is, whatever its values.
    first = [stored[name] for name in linear[:7]]
    exact = None
    if not description.meaning:
        exact = ternary.detect([t.rows for t in first], [(t.shape[0], t.shape[1]) for t in first])
    if exact:
        # Nobody rounds the activations of such a model, unless it is a BitNet.
        activations: Activations = "a8" if description.is_master else "a15"
        config = replace(config, weights=exact.weights, activations=activations, scale=exact.scale)
        coded = {name: _with_codes(tensors[name], stored[name], exact) for name in linear}
        return config, {**stored, **coded}, "part of the weights"
    return (rounded if description.is_master else config), {**stored}, "none"


def _floats(tensor: Located, shape: tuple[int, ...]) -> Stored:
    if tensor.dtype not in FLOATS:
        raise ValueError(f"tensor {tensor.name} is {tensor.dtype}; expected {', '.join(FLOATS)}")
    if tensor.shape != shape:
        raise ValueError(
            f"tensor {tensor.name} is {shorten(list(tensor.shape))}; config.json asks for {list(shape)}"
        )
    stored = in_file(tensor.path, tensor.begin, tensor.dtype, shape)

    def rows(begin: int, end: int) -> Float32:
        with named(tensor.path):
            values = stored.rows(begin, end)
            if not np.isfinite(values).all():
                raise ValueError(f"tensor {tensor.name} holds NaN or infinity; the file is damaged")
            return values

    return replace(stored, rows=rows)


def _multipliers(
    description: Description, packed: list[Located], scales: _Tensors, linear: list[str]
) -> dict[str, Float32]:
    """The multiplier of each packed matrix, float32 [1], checked to be of a likely size."""
    if description.meaning is None:
        raise ValueError(
            f"tensor {packed[0].name} is packed, but config.json does not say how; add its quantization_config: "
            '{"quant_method": "bitnet", "linear_class": "bitlinear"} if weight_scale divides, "autobitlinear" if it '
            "multiplies"
        )
    found: dict[str, Float32] = {}
    for name, weight in zip(linear, packed, strict=True):
        scale = scales.get(name)
        if scale is None:
            raise ValueError(f"tensor {weight.name}{_SCALE} is missing; fetch the whole model")
        if scale.dtype not in FLOATS or scale.shape not in ((), (1,)):
            raise ValueError(
                f"tensor {scale.name} is {scale.dtype} {shorten(list(scale.shape))}; expected one number in "
                f"{', '.join(FLOATS)}"
            )
        value = decode(scale.read(), scale.dtype).reshape(1)
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            both = (value, np.float32(1) / value)
        if not all(0 < number < np.inf for (number,) in both):
            raise ValueError(
                f"tensor {scale.name} holds {value[0]}; expected a positive finite number, the file is damaged"
            )
        found[name] = both[description.meaning == "divides"]
    for name, scale in scales.items():
        if name not in found:
            raise ValueError(f"tensor {shorten(scale.name)} scales no packed weights")
    _check_meaning(description, found)
    return found


def _check_meaning(description: Description, multipliers: Mapping[str, Float32]) -> None:
    """Refuse scales that are taken for their inverse: models load so, and talk nonsense."""
    typical = float(np.median([value[0] for value in multipliers.values()]))
    multiplies = description.meaning == "multiplies"
    if typical <= _LARGEST_MULTIPLIER:
        return
    found, says, other, means = (
        (typical, "autobitlinear", "bitlinear", "multiply")
        if multiplies
        else (1 / typical, "bitlinear", "autobitlinear", "divide")
    )
    raise ValueError(
        f"the linear_class {says} of config.json means that weights {means} by weight_scale, but its median is "
        f"{found:.3g}, which makes weights of {typical:.3g}, where real models have some below 1: set linear_class in "
        f"quantization_config to {other}"
    )


def _packed(tensor: Located, shape: tuple[int, int], multiplier: Float32, n_scale: int) -> Stored:
    """A matrix of packed codes, whose scale takes some bytes too."""
    n, k = shape
    if n % 4 or tensor.shape != (n // 4, k):
        expected = "rows in fours" if n % 4 else f"packed {[n // 4, k]}"
        raise ValueError(
            f"tensor {tensor.name} is U8 {shorten(list(tensor.shape))}; config.json asks for {[n, k]}: {expected}"
        )

    def some(begin: int, end: int) -> Int8:
        found = np.empty((end - begin, k), np.int8)
        at = begin
        while at < end:
            quarter, first = divmod(at, n // 4)
            last = min(first + end - at, n // 4)
            data = tensor.read(first * k, (last - first) * k).reshape(-1, k)
            found[at - begin : at - begin + last - first] = _quarter(data, quarter, tensor.name, at)
            at += last - first
        return found

    def codes() -> tuple[Int8, Float32]:
        with named(tensor.path):
            return some(0, n), multiplier

    def rows(begin: int, end: int) -> Float32:
        with named(tensor.path):
            values: Float32 = dequantize(some(begin, end).astype(np.float32), multiplier)
            return values

    return Stored(shape, tensor.dtype, tensor.n_bytes + n_scale, rows, codes)


def _quarter(data: UInt8, quarter: int, name: str, first: int) -> Int8:
    """The codes at one place of the bytes."""
    digits = data >> np.uint8(2 * quarter) & np.uint8(3)
    if (digits == 3).any():
        row, column = (int(i) for i in np.argwhere(digits == 3)[0])
        raise ValueError(
            f"tensor {name} holds the code 3 at [{first + row}, {column}]; expected 0, 1 or 2, the file is damaged"
        )
    return digits.view(np.int8) - np.int8(1)


def _with_codes(tensor: Located, stored: Stored, found: ternary.Found) -> Stored:
    rows = stored.rows

    def codes() -> tuple[Int8, Float32]:
        w = rows(0, tensor.shape[0])
        with named(tensor.path):
            return ternary.exact_codes(tensor.name, w, found)

    return replace(stored, codes=codes)

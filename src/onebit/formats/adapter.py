"""Adapters: low-rank changes of linear layers, in the folders of PEFT (adapter_config.json, adapter_model.safetensors).

    adapter = read("my-style", checkpoint.config)
    adapter.tensors["layers.0.q.weight"]        # A [r, in] and B [out, r], float32
    write(adapter, "my-style", base="stories.onebit")
    check_base(adapter, checkpoint)             # raises if the adapter was tuned beside other codes

A layer with an adapter gives y + (B (A x)) * scale. Trusts nothing in a file. Knows no arithmetic.
"""

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from onebit.checkpoint import Checkpoint, codes
from onebit.config import ModelConfig
from onebit.formats import tensors as container
from onebit.formats.files import write_file
from onebit.formats.floats import FLOATS, decode, encode
from onebit.formats.names import from_hf, to_hf
from onebit.formats.tensors import Json, named, parse_json, shorten
from onebit.packing import Float32, UInt8, from_bf16, to_bf16

CONFIG = "adapter_config.json"
MODEL = "adapter_model.safetensors"

# The seven linear layers of a block, in the order in which they run.
TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
MAX_RANK = 1 << 14

_MAX_CONFIG_BYTES = 1 << 20
_PREFIX = "base_model.model."
# In the metadata of the tensors, which PEFT leaves alone: `fingerprint` of the model that the adapter was tuned beside.
_BASE_CODES = "base_codes"
# Fields that describe the training or the tooling, not the function: any value will do.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights", "lora_dropout", "peft_type",
    "peft_version", "r", "lora_alpha", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
    "corda_config", "eva_config", "loftq_config", "exclude_modules", "layers_pattern", "layers_to_transform",
    "megatron_core", "megatron_config", "qalora_group_size", "low_cpu_mem_usage", "ensure_weight_tying",
}  # fmt: skip


class LowRank(NamedTuple):
    """What is added to one linear layer [out, in].

    Args:
        a: float32 [r, in].
        b: float32 [out, r].
    """

    a: Float32
    b: Float32


@dataclass(frozen=True)
class Adapter:
    """Low-rank changes of some linear layers of a model; checked when made.

        y' = y + (B (A x)) * scale        scale = alpha / r, or alpha / sqrt(r) with rank_stabilized

    Args:
        rank: r, the same for all layers.
        alpha: numerator of the scale.
        tensors: A and B by the canonical name of the layer, "layers.N.q.weight".
        rank_stabilized: divide by the root of the rank.
        base_codes: `fingerprint` of the model that it was tuned beside; None where nothing is known of it.

    Raises:
        ValueError: an impossible rank or alpha, no layer at all, misshapen matrices, or values that are not finite.

    Source: arXiv:2106.09685, section 4.1; arXiv:2312.03732 for the root.
    """

    rank: int
    alpha: float
    tensors: dict[str, LowRank]
    rank_stabilized: bool = False
    base_codes: str | None = None

    def __post_init__(self) -> None:
        if type(self.rank) is not int or not 1 <= self.rank <= MAX_RANK:
            raise ValueError(
                f"adapter: r is {shorten(self.rank)}; expected a whole number from 1 to {MAX_RANK}"
            )
        is_number = isinstance(self.alpha, (int, float)) and not isinstance(self.alpha, bool)
        if not is_number or not 0 < self.alpha < 2.0**31:
            raise ValueError(f"adapter: lora_alpha is {shorten(self.alpha)}; expected a positive number")
        if not self.tensors:
            raise ValueError("adapter: changes no layer; expected at least one")
        for name, (a, b) in self.tensors.items():
            if a.ndim != 2 or b.ndim != 2 or a.shape[0] != self.rank or b.shape[1] != self.rank:
                raise ValueError(
                    f"adapter: {name} has A {list(a.shape)} and B {list(b.shape)}; expected [{self.rank}, in] and "
                    f"[out, {self.rank}]"
                )
            # A little below the largest float32, so that it has a neighbour in bfloat16.
            if not all((np.abs(values) < 2.0**127).all() for values in (a, b)):
                raise ValueError(f"adapter: {name} holds NaN, infinity or a number beyond 2^127")

    @property
    def scale(self) -> float:
        """What the product of B and A is multiplied by, a float32."""
        return float(np.float32(self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)))

    def delta(self, name: str) -> Float32:
        """The change of one matrix, (B A) * scale, summed in float64: float32 [out, in]."""
        a, b = self.tensors[name]
        product: Float32 = (b.astype(np.float64) @ a.astype(np.float64) * self.scale).astype(np.float32)
        return product

    def check(self, config: ModelConfig) -> None:
        """Check that the layers are those of a model.

        Raises:
            ValueError: a layer that the model does not have, or has in another shape.
        """
        shapes = config.linear_shapes()
        for name, (a, b) in self.tensors.items():
            parts = name.split(".")
            if not config.is_linear(name) or not int(parts[1]) < config.n_layers:
                raise ValueError(f"adapter: {shorten(name)} is no linear layer of this model")
            n, k = shapes[parts[2]]
            if (b.shape[0], a.shape[1]) != (n, k):
                raise ValueError(
                    f"adapter: {name} is made for a layer of {[b.shape[0], a.shape[1]]}, this model's is {[n, k]}; "
                    "it belongs to another model"
                )


def fingerprint(checkpoint: Checkpoint) -> str | None:
    """What tells a model of weight codes from others of its shape, whatever format it is kept in.

    SHA-256 of the int8 codes [n, k] of the last block's o, in hexadecimal digits. None for a dense model, whose numbers
    are rounded to those of a format, and which people give adapters that were tuned beside a copy of fewer bits.

    Raises:
        ValueError: a code or scale that the scheme does not have, or a damaged file.
    """
    config = checkpoint.config
    if config.weights == "dense":
        return None
    name = f"layers.{config.n_layers - 1}.o.weight"
    found, _ = codes(name, checkpoint.tensors[name], config)
    return hashlib.sha256(found.tobytes()).hexdigest()


def check_base(adapter: Adapter, checkpoint: Checkpoint) -> None:
    """Check that an adapter was tuned beside this model, as far as it says.

    Raises:
        ValueError: the layers have other shapes, or the codes are not those of the model that it was tuned beside.
    """
    adapter.check(checkpoint.config)
    if adapter.base_codes and fingerprint(checkpoint) not in (None, adapter.base_codes):
        raise ValueError(
            "adapter: it was tuned beside another model of this shape, whose codes differ, and would change this one "
            f"into nonsense; run it with the model that {CONFIG} names, or tune one for this model"
        )


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter."""
    return (folder / CONFIG).is_file()


def read(folder: str | os.PathLike[str], config: ModelConfig) -> Adapter:
    """Read an adapter for a model.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors, as PEFT saves it.
        config: of the model.

    Raises:
        ValueError: a damaged file, a kind of adapter that adds something else than B A x, or one of another model.
        OSError: a file is missing or cannot be opened.
    """
    folder = Path(folder)
    if not is_adapter(folder):
        raise FileNotFoundError(
            f"{folder}: holds no {CONFIG}; expected an adapter's folder, as onebit tune writes it"
        )
    with named(folder / CONFIG):
        with open(folder / CONFIG, "rb") as file:
            text = file.read(_MAX_CONFIG_BYTES + 1)
        if len(text) > _MAX_CONFIG_BYTES:
            raise ValueError(f"the file is larger than {_MAX_CONFIG_BYTES} bytes; expected a config")
        fields = parse_json(text, "config")
        _check_kind(fields)
    if not (folder / MODEL).is_file():
        pickle = (
            ": a pickle can run code, so onebit opens none" if (folder / "adapter_model.bin").exists() else ""
        )
        raise FileNotFoundError(f"{folder}: holds no {MODEL}{pickle}; save it with safetensors")
    with named(folder / MODEL):
        tensors, base_codes = _read_tensors(folder / MODEL, config)
    with named(folder):
        is_rslora = bool(fields.get("use_rslora"))
        adapter = Adapter(fields.get("r"), fields.get("lora_alpha"), tensors, is_rslora, base_codes)  # type: ignore[arg-type]
        adapter.check(config)
    return adapter


def write(adapter: Adapter, folder: str | os.PathLike[str], base: str | None = None) -> None:
    """Write an adapter, so that PEFT opens it too; in bfloat16 where that holds every value, else in float32.

    Args:
        adapter: what to write.
        folder: made where it is missing.
        base: the model it was made for, a note for people.

    Raises:
        OSError: the disk is full, ...
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Float32] = {}
    for name, pair in adapter.tensors.items():
        stem = _PREFIX + to_hf(name).removesuffix(".weight")
        arrays |= {f"{stem}.lora_{part}.weight": w for part, w in zip("AB", pair, strict=True)}
    is_short = all(np.array_equal(from_bf16(to_bf16(w)), w) for w in arrays.values())
    dtype = "BF16" if is_short else "F32"
    specs = {name: (dtype, w.shape) for name, w in arrays.items()}
    chunks = (container.raw(encode(w, dtype)) for w in arrays.values())
    known = {_BASE_CODES: adapter.base_codes} if adapter.base_codes else {}
    container.stream(folder / MODEL, {"format": "pt"} | known, specs, chunks)
    hf_names = {to_hf(name).split(".")[-2] for name in adapter.tensors}
    fields: Json = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(hf_names),
        "layers_to_transform": _layers(adapter),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": adapter.rank_stabilized,
        "inference_mode": True,
    }
    # The config last: its presence says that the adapter is whole.
    write_file(folder / CONFIG, [json.dumps(fields, indent=2).encode() + b"\n"])


def _layers(adapter: Adapter) -> list[int]:
    return sorted({int(name.split(".")[1]) for name in adapter.tensors})


def _check_kind(fields: Json) -> None:
    if fields.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {shorten(fields.get('peft_type'))}; onebit runs LORA adapters")
    if type(fields.get("use_rslora", False)) is not bool:
        raise ValueError(f"use_rslora is {shorten(fields['use_rslora'])}; expected true or false")
    for name, value in fields.items():
        # Whatever else an adapter can be is switched on by a field that is empty otherwise.
        if name not in _HARMLESS and value not in (None, False, [], {}, "", "none", 0):
            raise ValueError(
                f"{shorten(name)} is {shorten(value)}; onebit runs adapters that add B A x to linear layers and "
                "change nothing else: merge it with PEFT instead"
            )


def _read_tensors(path: Path, config: ModelConfig) -> tuple[dict[str, LowRank], str | None]:
    """A and B by layer, and what the file says of the model it was tuned beside."""
    header, data = container.split_header(container.map_file(path), "safetensors file")
    found: dict[str, dict[str, Float32]] = {}
    for span in container.spans(header, data.size, FLOATS).values():
        name, part = _name(span.name)
        # Before anything is read: sizes of the file are bounded by the file, the layers by the model.
        if not config.is_linear(name) or int(name.split(".")[1]) >= config.n_layers:
            raise ValueError(f"tensor {shorten(span.name)} belongs to no linear layer of this model")
        if len(span.shape) != 2 or 0 in span.shape:
            raise ValueError(f"tensor {shorten(span.name)} is {list(span.shape)}; expected a matrix")
        pair = found.setdefault(name, {})
        if part in pair:
            raise ValueError(f"{name}: lora_{part} is there twice")
        raw: UInt8 = data[span.begin : span.stop].copy()
        pair[part] = decode(raw, span.dtype).reshape(span.shape)
    for name, pair in found.items():
        if len(pair) != 2:
            raise ValueError(f"{name}: lora_{next(iter(pair))} is there alone; expected lora_A and lora_B")
    # In the order of the model, whatever that of the file.
    ordered = {
        name: LowRank(found[name]["A"], found[name]["B"]) for name in config.tensor_shapes() if name in found
    }
    return ordered, header["__metadata__"].get(_BASE_CODES)


def _name(text: str) -> tuple[str, str]:
    """The canonical layer and "A" or "B" of a tensor of PEFT."""
    stem, _, end = text.removeprefix(_PREFIX).rpartition(".lora_")
    part = end.removesuffix(".weight")
    name = from_hf(f"{stem}.weight")
    if not text.startswith(_PREFIX) or end not in ("A.weight", "B.weight") or name is None:
        raise ValueError(
            f"tensor {shorten(text)}: expected {_PREFIX}model.layers.N.self_attn.q_proj.lora_A.weight and the like"
        )
    return name, part


def parse_targets(value: Any) -> tuple[str, ...]:
    """Check the names of linear layers.

    Raises:
        ValueError: none, an unknown one, or one twice.
    """
    names = tuple(value)
    if not names or len(set(names)) != len(names) or not set(names) <= set(TARGETS):
        raise ValueError(
            f"targets are {shorten(','.join(map(str, names)))}; expected some of {','.join(TARGETS)}"
        )
    return tuple(name for name in TARGETS if name in names)

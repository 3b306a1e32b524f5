"""GGUF files: models of llama.cpp and its relatives, in and out.

    checkpoint = read("falcon3-1.58.i2_s.gguf")         # Stored tensors: nothing but the header and scales are read
    write(checkpoint, "falcon3-1.58.tq2_0.gguf", "TQ2_0")

Knows what a whole model needs: which keys, which tensors, which scheme of weights they make together.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from onebit.checkpoint import Checkpoint, Tensor, holds_codes
from onebit.config import Activations, ModelConfig
from onebit.formats import names, vocabulary
from onebit.formats.families import family
from onebit.formats.files import Buffer, read_bytes
from onebit.formats.floats import FLOATS, decode, width_of
from onebit.formats.gguf import container, model_keys
from onebit.formats.gguf.blocks import BLOCKS, SCHEMES, Block
from onebit.formats.gguf.container import Header, Place
from onebit.formats.gguf.matrices import Source, pieces
from onebit.formats.tensors import named, raw, shorten
from onebit.packing import Float32
from onebit.quant import Granularity

# What `write` makes; Q2_0_128 is the Q2_0 of the PrismML fork, which llama.cpp takes for a damaged file.
KINDS = ("TQ2_0", "TQ1_0", "I2_S", "Q1_0", "Q2_0", "Q2_0_128", "F16", "BF16", "F32")

# general.file_type; that of I2_S is BitNet's, and means Q1_0 in llama.cpp.
_FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "BF16": 32,
    "TQ1_0": 36,
    "TQ2_0": 37,
    "I2_S": 40,
    "Q1_0": 40,
    "Q2_0": 41,
    "Q2_0_128": 41,
}

_ROPE_FACTORS = "rope_freqs.weight"
_ACTIVATIONS = "onebit.activations"
# What stands for activations that the authors of a model do not round.
_WEIGHT_ONLY = "a15"


def is_model(path: Path) -> bool:
    """Whether a file starts as GGUF files do."""
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a GGUF file; its tensors are `Stored`, and stay in the file until they are needed.

    The scheme of the weights follows from the types of the linear layers, and their granularity from the scales: the
    coarsest of "tensor", "row" and the blocks of the type that says the same. Rows of q and k come back in our order,
    in which the halves of a head are pairs.

    Raises:
        ValueError: a damaged file, an architecture, key or type that is not supported, or tensors that do not fit the
            keys; the message names the file and says what to do.
        OSError: it cannot be opened.
    """
    path = Path(path)
    with named(path):
        header = container.read(path)
        return _checkpoint(path, header)


def write(checkpoint: Checkpoint, path: str | os.PathLike[str], kind: str) -> None:
    """Write a model as a GGUF file, whole or not at all, one tensor after the other.

    Linear layers get the type; embedding and head too where they hold weight codes, or where it is a type of numbers,
    else they keep the width they have. Norms and biases are F32. A model with sub-norms and squared ReLU is of the
    architecture bitnet-b1.58, which BitNet's fork knows and llama.cpp refuses: its own bitnet computes a SiLU.

    Args:
        checkpoint: any; codes as `onebit.checkpoint.codes` has them.
        path: the file to make or to replace.
        kind: one of `KINDS`. Types of codes but I2_S keep scales in float16, to which they are rounded; types of
            numbers hold code * scale, and activations that are not rounded.

    Raises:
        ValueError: a model that does not fit the type, with those that it fits; or one that GGUF cannot express.
        OSError: the folder is missing, the disk is full, ...
    """
    config = checkpoint.config
    if kind not in KINDS:
        raise ValueError(f"type {shorten(kind)}: expected one of {', '.join(KINDS)}")
    if problem := _misfit(config, kind):
        fitting = ", ".join(other for other in KINDS if not _misfit(config, other))
        raise ValueError(f"{kind} {problem}; this model fits {fitting}")
    architecture = model_keys.architecture_for(config)
    specs: dict[str, tuple[tuple[int, ...], Block]] = {
        names.to_gguf(name): (shape, _block_for(name, checkpoint.tensors[name], config, kind))
        for name, shape in config.tensor_shapes().items()
    }
    factors = model_keys.rope_factors(config)
    if factors is not None:
        specs = {_ROPE_FACTORS: (factors.shape, BLOCKS["F32"])} | specs
    metadata = _metadata(checkpoint, architecture, kind)

    def chunks() -> Iterator[tuple[str, Buffer]]:
        if factors is not None:
            yield _ROPE_FACTORS, raw(factors.astype("<f4"))
        for name in config.tensor_shapes():
            target = names.to_gguf(name)
            heads = _heads(name, config, architecture)
            for chunk in pieces(name, checkpoint.tensors[name], config, specs[target][1], heads):
                yield target, chunk

    container.write(Path(path), metadata, specs, chunks())


def usual_kind(checkpoint: Checkpoint) -> str:
    """The type in which the programs that know such a model expect it; codes stay codes."""
    config = checkpoint.config
    if config.weights == "dense":
        widths = {width_of(tensor) for name, tensor in checkpoint.tensors.items() if config.is_linear(name)}
        return widths.pop() if len(widths) == 1 else "F32"
    kinds = ["TQ2_0", "Q2_0", "Q1_0"]
    if family(config) == "bitnet" and config.activation == "relu2":
        # llama.cpp does not run these; BitNet's fork does.
        kinds = ["I2_S", *kinds]
    coded = [kind for kind in kinds if SCHEMES[kind] == config.weights]
    return next((kind for kind in coded if _misfit(config, kind) is None), coded[0])


def refusals(checkpoint: Checkpoint) -> dict[str, str | None]:
    """Why a model cannot be written as each of `KINDS`; None where it can."""
    try:
        model_keys.architecture_for(checkpoint.config)
        _metadata(checkpoint, "llama", KINDS[0])
    except ValueError as error:
        return dict.fromkeys(KINDS, str(error))
    return {kind: _misfit(checkpoint.config, kind) for kind in KINDS}


def _checkpoint(path: Path, header: Header) -> Checkpoint:
    metadata, places = header
    architecture = model_keys.architecture(metadata)
    found, extra = _names(places)
    embed = places.get("token_embd.weight")
    if embed is None:
        raise ValueError("tensor token_embd.weight is missing; the file is not complete")
    factors = extra.pop(_ROPE_FACTORS, None)
    config = model_keys.read(
        metadata,
        embed.shape[0],
        tied_head="head.weight" not in found,
        qkv_bias=architecture == "qwen2" or "layers.0.q.bias" in found,
        rope_factors=None if factors is None else _vector(path, _ROPE_FACTORS, factors),
    )
    words = vocabulary.from_gguf(metadata)
    if words.tokenizer is not None and (n := len(metadata["tokenizer.ggml.tokens"])) != config.vocab_size:
        raise ValueError(f"the vocabulary has {n} tokens; the embedding has {config.vocab_size} rows")
    config = replace(config, bos_token=words.bos_token, eos_tokens=words.eos_tokens)
    _check_shapes(found, places, config)
    sources = {
        name: Source(
            path,
            there,
            places[there],
            _multiplier(path, there, places[there], extra),
            _heads(name, config, architecture),
        )
        for name, there in found.items()
    }
    if extra:
        raise ValueError(
            f"tensor {shorten(next(iter(extra)))} is no part of a {architecture} that onebit knows"
        )
    config = _with_weights(config, sources)
    activations, reason = _activations(config, sources, metadata, architecture)
    config = replace(config, activations=activations)  # type: ignore[arg-type]
    tensors: dict[str, Tensor] = {
        name: source.stored(_granularity(name, source, config)) for name, source in sources.items()
    }
    types = Counter(place.block.name for place in places.values())
    source = {"format": "gguf", "architecture": architecture, "file": path.name, "types": dict(types)}
    if reason:
        source["activations"] = f"{activations}, {reason}"
    if isinstance(name := metadata.get("general.name"), str):
        source["name"] = name
    return Checkpoint(config, tensors, words.tokenizer, words.chat_template, {"source": source})


def _names(places: dict[str, Place]) -> tuple[dict[str, str], dict[str, Place]]:
    """Our names and theirs, and the tensors that have none here."""
    found: dict[str, str] = {}
    extra: dict[str, Place] = {}
    for there, place in places.items():
        name = names.from_gguf(there)
        if name is None:
            extra[there] = place
        elif name in found:
            raise ValueError(f"tensors {found[name]} and {shorten(there)} are the same; the file is damaged")
        else:
            found[name] = there
    return found, extra


def _check_shapes(found: dict[str, str], places: dict[str, Place], config: ModelConfig) -> None:
    # Before the names of all layers are listed: a hostile file may claim millions.
    if config.n_layers > len(found):
        raise ValueError(f"the keys claim {config.n_layers} layers; the file has {len(places)} tensors")
    shapes = config.tensor_shapes()
    for name, shape in shapes.items():
        if name not in found:
            raise ValueError(f"tensor {names.to_gguf(name)} is missing; the keys ask for it")
        place = places[found[name]]
        if place.shape != shape:
            raise ValueError(f"tensor {found[name]} is {list(place.shape)}; the keys ask for {list(shape)}")
        if len(shape) == 1 and place.block.name not in FLOATS:
            raise ValueError(f"tensor {found[name]} is {place.block.name}; expected {', '.join(FLOATS)}")
    for name, there in found.items():
        if name not in shapes:
            raise ValueError(f"tensor {there} is not part of the model that the keys describe")


def _vector(path: Path, name: str, place: Place) -> Float32:
    """A vector of F32."""
    if place.block.name != "F32" or len(place.shape) != 1:
        raise ValueError(f"tensor {name} is {place.block.name} {list(place.shape)}; expected a vector of F32")
    return decode(read_bytes(path, place.begin, place.n_bytes), place.block.name)


def _multiplier(path: Path, there: str, place: Place, extra: dict[str, Place]) -> np.float32:
    """What the numbers of a matrix are multiplied by: the vector `.scale` beside it, or what follows its I2_S codes."""
    factor = np.float32(1)
    if place.block.name == "I2_S":
        data = read_bytes(path, place.begin + place.n_bytes - place.block.tail, 4)
        factor = data.view("<f4")[0]
    name = f"{there.removesuffix('.weight')}.scale"
    if name in extra:
        scale = _vector(path, name, extra.pop(name))
        if scale.shape != (1,):
            raise ValueError(f"tensor {name} has {scale.size} values; expected one")
        factor = np.float32(factor * scale[0])
    if not (np.isfinite(factor) and factor > 0):
        raise ValueError(f"tensor {there}: the scale {factor} is no positive number; the file is damaged")
    return factor


def _with_weights(config: ModelConfig, sources: dict[str, Source]) -> ModelConfig:
    """The config with the scheme and granularity of weights that the linear layers tell; activations come after."""
    linear = [source for name, source in sources.items() if config.is_linear(name)]
    kinds = Counter(source.block.name for source in linear)
    schemes = {SCHEMES.get(kind, "dense") for kind in kinds}
    if len(schemes) > 1:
        listed = ", ".join(f"{number} of {kind}" for kind, number in kinds.items())
        raise ValueError(
            f"the linear layers mix schemes of weights ({listed}); a GGUF file is read if all have one"
        )
    (scheme,) = schemes
    if scheme == "dense":
        return config
    shared = {source.shares() for source in linear}
    scale: Granularity = "row" if "row" in shared else "tensor"
    if not shared <= {"tensor", "row"}:
        scale = min(source.block.weights for source in linear)
    return replace(config, weights=scheme, activations="a8", scale=scale)  # type: ignore[arg-type]


def _activations(
    config: ModelConfig, sources: dict[str, Source], metadata: dict[str, Any], architecture: str
) -> tuple[str, str]:
    """How the inputs of linear layers are rounded, and why that is believed."""
    if config.weights == "dense":
        return "none", ""
    said = metadata.get(_ACTIVATIONS)
    if isinstance(said, str) and said in get_args(Activations) and said != "none":
        return said, "as the file says"
    kinds = {source.block.name for name, source in sources.items() if config.is_linear(name)}
    if architecture.startswith("bitnet") or "I2_S" in kinds:
        return "a8", "as BitNets define it"
    # One scale for a tensor is how models are made whose activations are rounded too.
    if config.scale == "tensor" and kinds <= {"TQ1_0", "TQ2_0"}:
        return "a8", "guessed: each matrix has one scale, as in models that round activations"
    return _WEIGHT_ONLY, "guessed: the scales are those of models that round weights alone"


def _granularity(name: str, source: Source, config: ModelConfig) -> Granularity | None:
    """What shares a scale in the codes of a tensor; None if it has none of the kind that the linear layers have."""
    if SCHEMES.get(source.block.name) != config.weights:
        return None
    if config.is_linear(name):
        return config.scale
    # Embedding and head had no say in it.
    if isinstance(config.scale, int):
        return config.scale if source.block.weights % config.scale == 0 else None
    return config.scale if source.shares() in ("tensor", config.scale) else None


def _heads(name: str, config: ModelConfig, architecture: str) -> int | None:
    """How many heads the rows of a tensor are, where the architecture has them in another order; else None."""
    if architecture not in model_keys.PERMUTED or not name.startswith("layers."):
        return None
    return {"q": config.n_heads, "k": config.n_kv_heads}.get(name.split(".")[2])


def _misfit(config: ModelConfig, kind: str) -> str | None:
    """Why a type cannot hold the linear layers of a model; None if it can."""
    if kind in FLOATS:
        return None
    if config.layer_weights:
        return (
            "holds weights of one scheme, and these mix b1.58 and b1: only a .onebit file keeps their codes"
        )
    scheme, weights = SCHEMES[kind], BLOCKS[kind].weights
    if config.weights != scheme:
        return f"holds {scheme} weights, and these are {config.weights}"
    for part, (_, k) in config.linear_shapes().items():
        if k % weights:
            return f"needs multiples of {weights} inputs, and {part} has {k}"
    if kind == "I2_S" and config.scale != "tensor":
        return f"has one scale for a tensor, and these weights have one for a {_unit(config.scale)}"
    if isinstance(config.scale, int) and config.scale % weights:
        return f"has one scale for {weights} weights, and these have one for {config.scale}"
    return None


def _unit(scale: Granularity) -> str:
    return f"group of {scale}" if isinstance(scale, int) else scale


def _block_for(name: str, tensor: Tensor, config: ModelConfig, kind: str) -> Block:
    """The type that a tensor gets in a file of a kind."""
    if len(tensor.shape) == 1:
        return BLOCKS["F32"]
    if config.is_linear(name) or kind in FLOATS:
        return BLOCKS[kind]
    return BLOCKS[kind if holds_codes(tensor) else width_of(tensor)]


def _metadata(checkpoint: Checkpoint, architecture: str, kind: str) -> dict[str, Any]:
    config = checkpoint.config
    metadata = {
        "general.architecture": architecture,
        "general.name": _title(checkpoint),
        "general.file_type": _FILE_TYPES[kind],
        "general.quantization_version": 2,
        "general.alignment": container.ALIGN,
    }
    metadata |= model_keys.keys(config, architecture)
    metadata |= {
        "onebit.label": checkpoint.label,
        _ACTIVATIONS: config.activations,
        "onebit.scale": str(config.scale),
    }
    if checkpoint.tokenizer is None:
        return metadata | {"tokenizer.ggml.model": "no_vocab"}
    return metadata | vocabulary.to_gguf(
        checkpoint.tokenizer, config.vocab_size, config.bos_token, config.eos_tokens, checkpoint.chat_template
    )


def _title(checkpoint: Checkpoint) -> str:
    """The name that the model came with, or that of its recipe, or its label."""
    for part in ("source", "recipe"):
        values = checkpoint.provenance.get(part)
        if isinstance(values, dict) and isinstance(name := values.get("name"), str):
            return name
    return checkpoint.label

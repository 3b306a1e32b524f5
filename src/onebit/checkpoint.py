"""A model in memory: config, canonical tensors (a float32 master or packed codes), tokenizer, provenance.

Every format reads and writes this. Knows no files.

    packed = quantize(master)           # linear layers to codes, embedding and head to int8 rows
    packed.label                        # "W1.58A8KV16"
"""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from onebit import quant
from onebit.config import ModelConfig
from onebit.packing import Float32, PackedTensor, count_codes, pack, packed_shape, unpack

Tensor = Float32 | PackedTensor

# Layouts that hold the codes of each weight scheme, the default first.
LINEAR_ENCODINGS: dict[str, tuple[str, ...]] = {"b1.58": ("t80", "r64"), "b1": ("b128",), "dense": ()}
ROW_ENCODING = "q8"


@dataclass(frozen=True)
class Checkpoint:
    """A model, either a float32 master or packed; checked when made, so that its users need not.

    Args:
        config: the model's shape and flags.
        tensors: by canonical name, exactly those of `config.tensor_shapes()`. A master holds float32 arrays;
            a packed model holds PackedTensors for linear layers, embedding and head, and float32 norms.
        tokenizer: bytes of tokenizer.json, or None.
        chat_template: a Jinja template, or None.
        provenance: where the model comes from, as JSON values.

    Raises:
        ValueError: a missing, extra or misshapen tensor, another dtype, a value that is not finite, a scale
            that is not positive, or an encoding that does not fit the config.
    """

    config: ModelConfig
    tensors: dict[str, Tensor]
    tokenizer: bytes | None = None
    chat_template: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shapes = self.config.tensor_shapes()
        for name in shapes:
            if name not in self.tensors:
                raise ValueError(f"tensor {name} is missing; the config asks for it")
        for name in self.tensors:
            if name not in shapes:
                raise ValueError(f"tensor {name} is not part of the model that the config describes")
        for name, shape in shapes.items():
            tensor = self.tensors[name]
            if self.is_packed and len(shape) == 2:
                _check_packed(name, tensor, shape, self.config)
            else:
                _check_dense(name, tensor, shape)

    @property
    def is_packed(self) -> bool:
        """Whether the matrices are packed codes, as the engine needs them."""
        return isinstance(self.tensors["embed.weight"], PackedTensor)

    @property
    def label(self) -> str:
        """Bit widths of weights, activations and reference KV cache, as in "W1.58A8KV16"."""
        return self.config.label


class Part(NamedTuple):
    """A part of a model and its size.

    Args:
        name: "embedding", "linear", "norms", "head" or "tokenizer".
        n_weights: weights in it; 0 for the tokenizer.
        n_bytes: bytes that hold them, scales and padding included.
    """

    name: str
    n_weights: int
    n_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits that one weight costs, scales and padding included; 0 for a part without weights."""
        return 8 * self.n_bytes / self.n_weights if self.n_weights else 0.0


def quantize(checkpoint: Checkpoint, encoding: str | None = None) -> Checkpoint:
    """Quantise and pack the linear layers; embedding and head become int8 rows, norms stay float32.

    A packed checkpoint keeps its codes and scales; only the layout of its linear layers changes.

    Args:
        checkpoint: a float32 master or a packed model.
        encoding: layout of the linear layers: "t80" (default) or "r64" for b1.58, "b128" for b1. None keeps
            the layout of a packed model.

    Raises:
        ValueError: a dense config, which has no codes, or an encoding that cannot hold the scheme.
    """
    config = checkpoint.config
    allowed = LINEAR_ENCODINGS[config.weights]
    if not allowed:
        raise ValueError("a dense model has no codes to pack; train one with weights b1.58 or b1")
    if encoding is None and checkpoint.is_packed:
        return checkpoint
    layout = allowed[0] if encoding is None else encoding
    if layout not in allowed:
        expected = " or ".join(allowed)
        raise ValueError(f"encoding {layout!r} cannot hold {config.weights} weights; expected {expected}")
    tensors = {
        name: _quantized(tensor, config, layout if config.is_linear(name) else ROW_ENCODING)
        for name, tensor in checkpoint.tensors.items()
    }
    return replace(checkpoint, tensors=tensors)


def dequantize(checkpoint: Checkpoint) -> Checkpoint:
    """Expand a packed model to float32 tensors, codes * scale. A master is returned as it is."""
    return replace(checkpoint, tensors={name: to_dense(t) for name, t in checkpoint.tensors.items()})


def to_dense(tensor: Tensor) -> Float32:
    """A tensor as float32: codes * scale of a packed one, any other unchanged."""
    if not isinstance(tensor, PackedTensor):
        return tensor
    codes = unpack(tensor.data, tensor.encoding, tensor.shape)
    dense: Float32 = quant.dequantize(codes.astype(np.float32), tensor.scale)
    return dense


def code_histogram(checkpoint: Checkpoint) -> dict[int, float]:
    """Share of each code in the linear layers of a packed model, as {-1: 0.31, 0: 0.38, 1: 0.31}.

    Raises:
        ValueError: a float32 master, which has no codes yet.
    """
    if not checkpoint.is_packed:
        raise ValueError("a float32 master has no codes; quantize it first")
    counts = dict.fromkeys((-1, 1) if checkpoint.config.weights == "b1" else (-1, 0, 1), 0)
    for name, tensor in checkpoint.tensors.items():
        if isinstance(tensor, PackedTensor) and checkpoint.config.is_linear(name):
            for code, number in count_codes(tensor.data, tensor.encoding, tensor.shape).items():
                counts[code] += number
    return {code: number / sum(counts.values()) for code, number in counts.items()}


def parts(checkpoint: Checkpoint) -> list[Part]:
    """Weights and bytes of each part of a model, those it lacks left out."""
    totals: dict[str, tuple[int, int]] = {}
    for name, tensor in checkpoint.tensors.items():
        part = _part_name(name, checkpoint.config)
        n_weights, n_bytes = totals.get(part, (0, 0))
        if isinstance(tensor, PackedTensor):
            n, k = tensor.shape
            totals[part] = n_weights + n * k, n_bytes + tensor.data.nbytes + tensor.scale.nbytes
        else:
            totals[part] = n_weights + tensor.size, n_bytes + tensor.nbytes
    if checkpoint.tokenizer is not None:
        totals["tokenizer"] = 0, len(checkpoint.tokenizer)
    order = ("embedding", "linear", "norms", "head", "tokenizer")
    return [Part(name, *totals[name]) for name in order if name in totals]


def token_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of weights that the engine reads for every token; of an embedding that is not the head too, one row."""
    total = sum(part.n_bytes for part in parts(checkpoint) if part.n_weights)
    if checkpoint.config.tied_head:
        return total
    embedding = next(part for part in parts(checkpoint) if part.name == "embedding")
    return total - embedding.n_bytes + embedding.n_bytes // checkpoint.config.vocab_size


def granularity(name: str, config: ModelConfig) -> quant.Granularity:
    """Weights of a packed matrix that share a scale; embedding and head have one scale per row."""
    return config.scale if config.is_linear(name) else "row"


def scale_shape(shape: tuple[int, int], granularity: quant.Granularity) -> tuple[int, ...]:
    """Shape of the scale of a packed matrix [n, k]: [1], [n] or [n, groups]."""
    n, k = shape
    if isinstance(granularity, int):
        return n, k // granularity
    return (1,) if granularity == "tensor" else (n,)


def _quantized(tensor: Tensor, config: ModelConfig, encoding: str) -> Tensor:
    if isinstance(tensor, PackedTensor):
        if tensor.encoding == encoding:
            return tensor
        codes = unpack(tensor.data, tensor.encoding, tensor.shape)
        return tensor._replace(encoding=encoding, data=pack(codes, encoding))
    if tensor.ndim == 1:
        return tensor
    if encoding == ROW_ENCODING:
        codes, scale = quant.quantize_rows(tensor, 8)
    else:
        codes, scale = quant.quantize_weights(tensor, config.weights, config.scale)
    n, k = tensor.shape
    return PackedTensor(encoding, (n, k), pack(codes.astype(np.int8), encoding), scale)


def _part_name(name: str, config: ModelConfig) -> str:
    if config.is_linear(name):
        return "linear"
    return {"embed.weight": "embedding", "head.weight": "head"}.get(name, "norms")


def _check_dense(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if isinstance(tensor, PackedTensor):
        raise ValueError(f"tensor {name} is packed, but the model is not: pack all matrices or none")
    if tensor.dtype != np.float32 or tensor.shape != shape:
        found = f"{tensor.dtype} {list(tensor.shape)}"
        raise ValueError(f"tensor {name} is {found}; expected float32 {list(shape)}")
    if not np.isfinite(tensor).all():
        raise ValueError(f"tensor {name} holds NaN or infinity; the file is damaged or training diverged")


def _check_packed(name: str, tensor: Tensor, shape: tuple[int, ...], config: ModelConfig) -> None:
    if not isinstance(tensor, PackedTensor):
        raise ValueError(f"tensor {name} is float32, but the model is packed: pack all matrices or none")
    allowed = LINEAR_ENCODINGS[config.weights] if config.is_linear(name) else (ROW_ENCODING,)
    if tensor.encoding not in allowed:
        expected = " or ".join(allowed) or "no packed tensor in a dense model"
        raise ValueError(f"tensor {name} has encoding {tensor.encoding!r}; expected {expected}")
    if tensor.shape != shape:
        raise ValueError(f"tensor {name} is {list(tensor.shape)}; the config asks for {list(shape)}")
    expected_data = packed_shape(tensor.encoding, tensor.shape)
    if tensor.data.dtype != np.uint8 or tensor.data.shape != expected_data:
        raise ValueError(
            f"tensor {name}: packed data is {tensor.data.dtype} {list(tensor.data.shape)}; "
            f"expected uint8 {list(expected_data)}"
        )
    scale, expected_scale = tensor.scale, scale_shape(tensor.shape, granularity(name, config))
    if scale.dtype != np.float32 or scale.shape != expected_scale:
        found = f"{scale.dtype} {list(scale.shape)}"
        raise ValueError(f"tensor {name}: scale is {found}; expected float32 {list(expected_scale)}")
    if not (np.isfinite(scale) & (scale > 0)).all():
        raise ValueError(f"tensor {name}: a scale is not a positive finite number; the file is damaged")

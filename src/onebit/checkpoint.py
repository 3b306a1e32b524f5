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
from onebit.packing import (
    Float32,
    PackedTensor,
    UInt16,
    bf16_rows,
    count_codes,
    from_bf16,
    pack,
    pack_bf16,
    packed_shape,
    to_bf16,
    unpack,
)

Tensor = Float32 | PackedTensor

# Layouts that hold the codes of each weight scheme, the default first.
LINEAR_ENCODINGS: dict[str, tuple[str, ...]] = {"b1.58": ("t80", "r64"), "b1": ("b128",), "dense": ("bf16",)}
ROW_ENCODING = "q8"

# How embedding and head are kept, both alike, the default first; imported models may also keep them as codes, in an
# encoding of their linear layers.
HEADS = (ROW_ENCODING, "bf16")
# What a bf16 head brings along: int8 rows, and float32 [2, V], at least the norms of their errors and of the rows.
SHORTLIST, SHORTLIST_BOUNDS = "shortlist.weight", "shortlist.bounds"
_HEAD_LABELS = {"q8": "H8", "bf16": "H16", "t80": "H1.58", "r64": "H1.58", "b128": "H1"}

# Rows whose float64 norms are computed at once.
_BLOCK_ROWS = 4096


@dataclass(frozen=True)
class Checkpoint:
    """A model, either a float32 master or packed; checked when made, so that its users need not.

    Args:
        config: the model's shape and flags.
        tensors: by canonical name, exactly those of `tensor_shapes(config, head)`. A master holds float32 arrays;
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
        shapes = tensor_shapes(self.config, self.head if "embed.weight" in self.tensors else None)
        for name in shapes:
            if name not in self.tensors:
                raise ValueError(f"tensor {name} is missing; the config asks for it")
        for name in self.tensors:
            if name not in shapes:
                raise ValueError(f"tensor {name} is not part of the model that the config describes")
        for name, shape in shapes.items():
            tensor = self.tensors[name]
            if self.is_packed and len(shape) == 2 and name != SHORTLIST_BOUNDS:
                _check_packed(name, tensor, shape, self.config, self.head)
            else:
                _check_dense(name, tensor, shape)

    @property
    def is_packed(self) -> bool:
        """Whether the matrices are packed codes, as the engine needs them."""
        return isinstance(self.tensors["embed.weight"], PackedTensor)

    @property
    def label(self) -> str:
        """Bits of weights, activations and reference cache, as in "W1.58A8KV16", and of an unusual head, as in H1."""
        usual = "bf16" if self.config.weights == "dense" else ROW_ENCODING
        if self.head is None or self.head == usual:
            return self.config.label
        return self.config.label + _HEAD_LABELS[self.head]

    @property
    def head(self) -> str | None:
        """How a packed model keeps its head: "q8", "bf16" or a layout of codes; None for a master."""
        tensor = self.tensors.get(head_name(self.config))
        return tensor.encoding if isinstance(tensor, PackedTensor) else None


def head_name(config: ModelConfig) -> str:
    """The tensor that is the head."""
    return "embed.weight" if config.tied_head else "head.weight"


def tensor_shapes(config: ModelConfig, head: str | None) -> dict[str, tuple[int, ...]]:
    """Canonical name and shape of every tensor of a checkpoint with this head, in file order."""
    shapes = config.tensor_shapes()
    if head == "bf16":
        shapes[SHORTLIST] = (config.vocab_size, config.d_model)
        shapes[SHORTLIST_BOUNDS] = (2, config.vocab_size)
    return shapes


class Part(NamedTuple):
    """A part of a model and its size.

    Args:
        name: "embedding", "linear", "norms", "head", "shortlist" or "tokenizer".
        n_weights: weights in it; 0 for the tokenizer, and for a shortlist, which repeats the head's.
        n_bytes: bytes that hold them, scales and padding included.
    """

    name: str
    n_weights: int
    n_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits that one weight costs, scales and padding included; 0 for a part without weights."""
        return 8 * self.n_bytes / self.n_weights if self.n_weights else 0.0


def quantize(checkpoint: Checkpoint, encoding: str | None = None, head: str | None = None) -> Checkpoint:
    """Quantise and pack the linear layers; embedding and head become int8 rows, norms and biases stay float32.

    Of a dense model, linear layers and embedding become bfloat16. A packed checkpoint keeps its codes and scales;
    only the layout of its linear layers changes, and of an embedding and head of such codes.

    Args:
        checkpoint: a float32 master or a packed model.
        encoding: layout of the linear layers: "t80" (default) or "r64" for b1.58, "b128" for b1, "bf16" for dense
            ones. None keeps the layout of a packed model.
        head: "q8" (default) or "bf16" (default of dense models), which keeps embedding and head in bfloat16, with a
            shortlist of int8 rows. None keeps the head of a packed model.

    Raises:
        ValueError: an encoding that cannot hold the scheme, or another head for a packed model.
    """
    config = checkpoint.config
    allowed = LINEAR_ENCODINGS[config.weights]
    if head is not None and head not in HEADS:
        raise ValueError(f"head is {head!r}; expected {' or '.join(HEADS)}")
    if checkpoint.is_packed and head not in (None, checkpoint.head):
        raise ValueError(
            f"the head of this packed model is {checkpoint.head}; its float32 rows are gone: "
            f"convert the run folder with head {head}"
        )
    if encoding is None and checkpoint.is_packed:
        return checkpoint
    layout = allowed[0] if encoding is None else encoding
    if layout not in allowed:
        expected = " or ".join(allowed)
        raise ValueError(f"encoding {layout!r} cannot hold {config.weights} weights; expected {expected}")
    if not checkpoint.is_packed:
        head = head or ("bf16" if config.weights == "dense" else ROW_ENCODING)
    tensors = dict(checkpoint.tensors)
    if head == "bf16" and not checkpoint.is_packed:
        tensors |= _bf16_head(head_name(config), checkpoint.tensors)
    for name, tensor in tensors.items():
        tensors[name] = _quantized(name, tensor, config, layout, head)
    return replace(checkpoint, tensors=tensors)


def dequantize(checkpoint: Checkpoint) -> Checkpoint:
    """Expand a packed model to float32 tensors, codes * scale. A master is returned as it is."""
    tensors: dict[str, Tensor] = {
        name: to_dense(checkpoint.tensors[name]) for name in checkpoint.config.tensor_shapes()
    }
    return replace(checkpoint, tensors=tensors)


def to_dense(tensor: Tensor) -> Float32:
    """A tensor as float32: codes * scale of a packed one, any other unchanged."""
    if not isinstance(tensor, PackedTensor):
        return tensor
    if tensor.encoding == "bf16":
        n, k = tensor.shape
        return from_bf16(bf16_rows(tensor)[:n, :k])
    codes = unpack(tensor.data, tensor.encoding, tensor.shape)
    dense: Float32 = quant.dequantize(codes.astype(np.float32), tensor.scale)
    return dense


def code_histogram(checkpoint: Checkpoint) -> dict[int, float]:
    """Share of each code in the linear layers of a packed model, as {-1: 0.31, 0: 0.38, 1: 0.31}.

    Raises:
        ValueError: a float32 master, which has no codes yet, or a dense model.
    """
    if not checkpoint.is_packed:
        raise ValueError("a float32 master has no codes; quantize it first")
    if checkpoint.config.weights == "dense":
        raise ValueError("a dense model has no codes")
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
            n, k = tensor.shape if part != "shortlist" else (0, 0)
            totals[part] = n_weights + n * k, n_bytes + tensor.data.nbytes + tensor.scale.nbytes
        else:
            size = 0 if part == "shortlist" else tensor.size
            totals[part] = n_weights + size, n_bytes + tensor.nbytes
    if checkpoint.tokenizer is not None:
        totals["tokenizer"] = 0, len(checkpoint.tokenizer)
    order = ("embedding", "linear", "norms", "head", "shortlist", "tokenizer")
    return [Part(name, *totals[name]) for name in order if name in totals]


def token_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of weights that the engine reads for a token; of an embedding, or a head with a shortlist, some rows."""
    config = checkpoint.config
    sizes = {part.name: part.n_bytes for part in parts(checkpoint) if part.name != "tokenizer"}
    rows = {"embedding"} if checkpoint.head == "bf16" or not config.tied_head else set()
    if checkpoint.head == "bf16" and not config.tied_head:
        rows.add("head")
    return sum(size // config.vocab_size if name in rows else size for name, size in sizes.items())


def granularity(name: str, config: ModelConfig, encoding: str) -> quant.Granularity:
    """Weights of a packed matrix that share a scale; rows of int8 have one each, and bf16 the number 1."""
    if encoding == "bf16":
        return "tensor"
    return config.scale if config.is_linear(name) or encoding != ROW_ENCODING else "row"


def scale_shape(shape: tuple[int, int], granularity: quant.Granularity) -> tuple[int, ...]:
    """Shape of the scale of a packed matrix [n, k]: [1], [n] or [n, groups]."""
    n, k = shape
    if isinstance(granularity, int):
        return n, k // granularity
    return (1,) if granularity == "tensor" else (n,)


def _quantized(name: str, tensor: Tensor, config: ModelConfig, layout: str, head: str | None) -> Tensor:
    if isinstance(tensor, PackedTensor):
        if tensor.encoding in (layout, *HEADS):
            return tensor
        codes = unpack(tensor.data, tensor.encoding, tensor.shape)
        return tensor._replace(encoding=layout, data=pack(codes, layout))
    if tensor.ndim == 1 or name == SHORTLIST_BOUNDS:
        return tensor
    n, k = tensor.shape
    encoding = layout if config.is_linear(name) else head or ROW_ENCODING
    if encoding == "bf16":
        return PackedTensor("bf16", (n, k), pack_bf16(_bf16(name, tensor)), np.ones(1, np.float32))
    if encoding == ROW_ENCODING:
        codes, scale = quant.quantize_rows(tensor, 8)
    else:
        codes, scale = quant.quantize_weights(tensor, config.weights, config.scale)
    return PackedTensor(encoding, (n, k), pack(codes.astype(np.int8), encoding), scale)


def _bf16_head(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The head of a master in bfloat16, int8 rows of it, and what bounds their errors."""
    master = tensors[name]
    assert not isinstance(master, PackedTensor)
    n, k = shape = master.shape
    rows = _bf16(name, master)
    all_codes, all_scales = np.empty(shape, np.int8), np.empty(n, np.float32)
    bounds = np.empty((2, n), np.float32)
    for start in range(0, n, _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        w = from_bf16(rows[block])
        codes, scale = quant.quantize_rows(w, 8)
        all_codes[block], all_scales[block] = codes, scale
        w64, q64 = w.astype(np.float64), codes.astype(np.float64) * scale.astype(np.float64)[:, None]
        # The float64 sums are good to 1e-11; what is stored must not be smaller than the norm.
        for bound, values in zip(bounds, (w64 - q64, w64), strict=True):
            norm = np.sqrt((values * values).sum(axis=1)) * (1 + 2**-30)
            with np.errstate(over="ignore"):
                bound[block] = np.nextafter(norm.astype(np.float32), np.float32(np.inf))
    return {
        name: PackedTensor("bf16", (n, k), pack_bf16(rows), np.ones(1, np.float32)),
        SHORTLIST: PackedTensor(ROW_ENCODING, (n, k), pack(all_codes, ROW_ENCODING), all_scales),
        SHORTLIST_BOUNDS: bounds,
    }


def _bf16(name: str, tensor: Float32) -> UInt16:
    rows = to_bf16(tensor)
    if (rows & 0x7F80 == 0x7F80).any():
        raise ValueError(f"tensor {name} holds a number that is too large for bfloat16")
    return rows


def _part_name(name: str, config: ModelConfig) -> str:
    if config.is_linear(name):
        return "linear"
    if name in (SHORTLIST, SHORTLIST_BOUNDS):
        return "shortlist"
    return {"embed.weight": "embedding", "head.weight": "head"}.get(name, "norms")


def _check_dense(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if isinstance(tensor, PackedTensor):
        raise ValueError(f"tensor {name} is packed, but the model is not: pack all matrices or none")
    if tensor.dtype != np.float32 or tensor.shape != shape:
        found = f"{tensor.dtype} {list(tensor.shape)}"
        raise ValueError(f"tensor {name} is {found}; expected float32 {list(shape)}")
    if name == SHORTLIST_BOUNDS and not (tensor >= 0).all():
        raise ValueError(f"tensor {name} holds a negative norm; the file is damaged")
    if not np.isfinite(tensor).all():
        raise ValueError(f"tensor {name} holds NaN or infinity; the file is damaged or training diverged")


def _allowed_encodings(name: str, config: ModelConfig, head: str | None) -> tuple[str, ...]:
    codes = LINEAR_ENCODINGS[config.weights]
    if config.is_linear(name):
        return codes
    if name == SHORTLIST:
        return (ROW_ENCODING,)
    # Embedding and head are of one kind: where the head's is possible, it is the embedding's.
    kinds = (*((encoding,) for encoding in HEADS), codes)
    return next((kind for kind in kinds if head in kind), tuple(dict.fromkeys(HEADS + codes)))


def _check_packed(
    name: str, tensor: Tensor, shape: tuple[int, ...], config: ModelConfig, head: str | None
) -> None:
    if not isinstance(tensor, PackedTensor):
        raise ValueError(f"tensor {name} is float32, but the model is packed: pack all matrices or none")
    allowed = _allowed_encodings(name, config, head)
    if tensor.encoding not in allowed:
        expected = " or ".join(allowed)
        if name != head_name(config) and not config.is_linear(name):
            expected += f", because the head is {head}; convert the model again"
        raise ValueError(f"tensor {name} has encoding {tensor.encoding!r}; expected {expected}")
    if tensor.shape != shape:
        raise ValueError(f"tensor {name} is {list(tensor.shape)}; the config asks for {list(shape)}")
    expected_data = packed_shape(tensor.encoding, tensor.shape)
    if tensor.data.dtype != np.uint8 or tensor.data.shape != expected_data:
        raise ValueError(
            f"tensor {name}: packed data is {tensor.data.dtype} {list(tensor.data.shape)}; "
            f"expected uint8 {list(expected_data)}"
        )
    scale, expected_scale = (
        tensor.scale,
        scale_shape(tensor.shape, granularity(name, config, tensor.encoding)),
    )
    if scale.dtype != np.float32 or scale.shape != expected_scale:
        found = f"{scale.dtype} {list(scale.shape)}"
        raise ValueError(f"tensor {name}: scale is {found}; expected float32 {list(expected_scale)}")
    if not (np.isfinite(scale) & (scale > 0)).all():
        raise ValueError(f"tensor {name}: a scale is not a positive finite number; the file is damaged")
    if tensor.encoding == "bf16" and scale[0] != 1:
        raise ValueError(f"tensor {name}: the scale of bf16 is {scale[0]}; expected 1")

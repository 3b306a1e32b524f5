"""A model: config, canonical tensors (a float32 master, packed codes, or still in a file), tokenizer, provenance.

Every format reads and writes this. Knows no files.

    packed = quantize(master)           # linear layers to codes, embedding and head to int8 rows
    packed.label                        # "W1.58A8KV16"
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from onebit import quant
from onebit.config import ModelConfig
from onebit.packing import (
    TILE_ROWS,
    Float32,
    Int8,
    PackedTensor,
    UInt16,
    bf16_rows,
    from_bf16,
    pack,
    pack_bf16,
    packed_shape,
    to_bf16,
    unpack,
)


@dataclass(frozen=True)
class Stored:
    """A tensor that is still in the file of another format: read when it is needed, and not kept.

    Args:
        shape: [n] or [n, k].
        kind: what the file calls its type, as "BF16" or "I2_S".
        n_bytes: bytes that it takes there, scales included.
        rows: from the first row and the one after the last to float32 [rows, k], exactly what the file holds (of a
            vector: its values). May raise ValueError for a damaged file.
        codes: the weight codes, int8 [n, k], and their scale, float32, of a matrix that is stored as such; else None.
    """

    shape: tuple[int, ...]
    kind: str
    n_bytes: int
    rows: Callable[[int, int], Float32]
    codes: Callable[[], tuple[Int8, Float32]] | None = None


Tensor = Float32 | PackedTensor | Stored
# What the engine takes.
ReadyTensor = Float32 | PackedTensor

# Layouts that hold the codes of each weight scheme, the default first.
LINEAR_ENCODINGS: dict[str, tuple[str, ...]] = {"b1.58": ("t80", "r64"), "b1": ("b128",), "dense": ("bf16",)}
ROW_ENCODING = "q8"

# How embedding and head are kept, both alike, the default first; imported models may also keep them as codes, in an
# encoding of their linear layers.
HEADS = (ROW_ENCODING, "bf16")
# What a bf16 head brings along: int8 rows, and float32 [2, V], at least the norms of their errors and of the rows.
SHORTLIST, SHORTLIST_BOUNDS = "shortlist.weight", "shortlist.bounds"
_HEAD_LABELS = {"q8": "H8", "bf16": "H16", "t80": "H1.58", "r64": "H1.58", "b128": "H1"}

# What each layout of linear layers holds.
_SCHEMES = {encoding: scheme for scheme, encodings in LINEAR_ENCODINGS.items() for encoding in encodings}

# Rows that are handled at once: copies stay small. Whole tiles of every layout.
BLOCK_ROWS = 1280


@dataclass(frozen=True)
class Checkpoint:
    """A model: a float32 master, packed, or in a file of another format; checked when made, so that its users need not.

    Args:
        config: the model's shape and flags.
        tensors: by canonical name, exactly those of `tensor_shapes(config, head)`. A master holds float32 arrays;
            a packed model holds PackedTensors for linear layers, embedding and head, and float32 norms. What another
            format holds is Stored, and its values are checked when they are read.
        tokenizer: bytes of tokenizer.json, or None.
        chat_template: a Jinja template, or None.
        provenance: where the model comes from, as JSON values.
        sha256: of the bytes of tensors, as the file that they come from says; empty where it says nothing.

    Raises:
        ValueError: a missing, extra or misshapen tensor, another dtype, a value that is not finite, a scale
            that is not positive, or an encoding that does not fit the config.
    """

    config: ModelConfig
    tensors: dict[str, Tensor]
    tokenizer: bytes | None = None
    chat_template: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Checkpoint({self.label}, {len(self.tensors)} tensors)"

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
            if isinstance(tensor, Stored):
                if tensor.shape != shape:
                    raise ValueError(
                        f"tensor {name} is {list(tensor.shape)}; the config asks for {list(shape)}"
                    )
            elif self.is_packed:
                check_tensor(name, tensor, shape, self.config, self.head)
            else:
                _check_dense(name, tensor, shape)

    @property
    def is_packed(self) -> bool:
        """Whether the matrices are packed codes, as the engine needs them."""
        return isinstance(self.tensors["embed.weight"], PackedTensor)

    @property
    def label(self) -> str:
        """Bits of weights, activations and reference cache, as in "W1.58A8KV16", and of an unusual head, as in H16.

        Of a model that is not packed, what `quantize` makes of it.
        """
        planned = plan(self)
        return label(planned.config, planned.head)

    @property
    def head(self) -> str | None:
        """How a packed model keeps its head: "q8", "bf16" or a layout of codes; None for a master."""
        tensor = self.tensors.get(head_name(self.config))
        return tensor.encoding if isinstance(tensor, PackedTensor) else None


def head_name(config: ModelConfig) -> str:
    """The tensor that is the head."""
    return "embed.weight" if config.tied_head else "head.weight"


def scale_name(name: str) -> str:
    """What files call the scale of a matrix."""
    return f"{name.removesuffix('.weight')}.scale"


def tensor_shapes(config: ModelConfig, head: str | None) -> dict[str, tuple[int, ...]]:
    """Canonical name and shape of every tensor of a checkpoint with this head, in file order."""
    shapes = config.tensor_shapes()
    if head == "bf16":
        shapes[SHORTLIST] = (config.vocab_size, config.d_model)
        shapes[SHORTLIST_BOUNDS] = (2, config.vocab_size)
    return shapes


class Plan(NamedTuple):
    """What `quantize` makes of a checkpoint.

    Args:
        config: of the result; differs where dense weights are to be rounded.
        head: how the head is kept.
        encodings: layout of each matrix of the result, by its name.
    """

    config: ModelConfig
    head: str
    encodings: dict[str, str]


def plan(checkpoint: Checkpoint, encoding: str | None = None, head: str | None = None) -> Plan:
    """Choose the layouts of a packed model; arguments and errors are those of `quantize`."""
    config = checkpoint.config
    if head is not None and head not in HEADS:
        raise ValueError(f"head is {head!r}; expected {' or '.join(HEADS)}")
    if checkpoint.is_packed and head not in (None, checkpoint.head):
        raise ValueError(
            f"the head of this packed model is {checkpoint.head}; its float32 rows are gone: "
            f"convert the run folder with head {head}"
        )
    is_dense = config.weights == "dense"
    if is_dense and not checkpoint.is_packed and _SCHEMES.get(encoding or "", "dense") != "dense":
        config = replace(config, weights=_SCHEMES[encoding or ""], activations="a8")  # type: ignore[arg-type]
    schemes = dict.fromkeys(config.layer_weights or (config.weights,))
    if encoding is not None and _SCHEMES.get(encoding) not in schemes:
        expected = " or ".join(kind for scheme in schemes for kind in LINEAR_ENCODINGS[scheme])
        found = " and ".join(schemes)
        raise ValueError(f"encoding {encoding!r} cannot hold {found} weights; expected {expected}")
    encodings: dict[str, str] = {}
    for name, tensor in checkpoint.tensors.items():
        if config.is_linear(name):
            allowed = LINEAR_ENCODINGS[config.weights_of(name)]
            kept = tensor.encoding if isinstance(tensor, PackedTensor) else allowed[0]
            encodings[name] = encoding if encoding in allowed else kept
    head = head or checkpoint.head or _usual_head(checkpoint)
    if head not in HEADS and encoding in LINEAR_ENCODINGS[config.weights]:
        head = encoding
    for name, shape in tensor_shapes(config, head).items():
        if len(shape) == 2 and name != SHORTLIST_BOUNDS and name not in encodings:
            encodings[name] = ROW_ENCODING if name == SHORTLIST else head
    return Plan(config, head, encodings)


def quantize(checkpoint: Checkpoint, encoding: str | None = None, head: str | None = None) -> Checkpoint:
    """Quantise and pack the linear layers, embedding and head; norms and biases stay float32.

    Of a master of ours embedding and head become int8 rows; of a dense model, and of one in another format, bfloat16,
    or weight codes where the format holds such. A packed checkpoint keeps its codes and scales; only the layout of its
    linear layers changes.

    Args:
        checkpoint: a float32 master, a packed model, or one in a file of another format.
        encoding: layout of the linear layers: "t80" (default) or "r64" for b1.58, "b128" for b1, "bf16" for dense
            ones, or one of the others to round dense ones to it, with 8-bit activations. Of mixed weights it is that of
            the layers that it fits. None keeps the layout of a packed model.
        head: "q8", int8 rows, or "bf16", which keeps the head and the embedding in bfloat16, with a shortlist of int8
            rows. None takes the default, or keeps the head of a packed model.

    Raises:
        ValueError: an encoding that cannot hold the scheme, another head for a packed model, or a damaged file.
    """
    if encoding is None and checkpoint.is_packed and head in (None, checkpoint.head):
        return checkpoint
    planned = plan(checkpoint, encoding, head)
    tensors: dict[str, Tensor] = dict(packed_tensors(checkpoint, planned))
    return replace(checkpoint, config=planned.config, tensors=tensors, sha256={})


def packed_tensors(checkpoint: Checkpoint, planned: Plan) -> Iterator[tuple[str, ReadyTensor]]:
    """Make the tensors of a packed model one by one, in file order; nothing is kept.

    Args:
        checkpoint: what they are made of.
        planned: from `plan`.

    Raises:
        ValueError: a damaged source; see `rows` and `codes`.
    """
    config, names = planned.config, tensor_shapes(planned.config, planned.head)
    for name, shape in names.items():
        if name == SHORTLIST and name not in checkpoint.tensors:
            yield from _shortlist(head_name(config), checkpoint.tensors[head_name(config)])
            return
        tensor = checkpoint.tensors[name]
        if name not in planned.encodings:
            made: ReadyTensor = rows(name, tensor)
        else:
            made = _packed(name, tensor, (shape[0], shape[1]), planned)
        yield name, made


def rows(name: str, tensor: Tensor, begin: int = 0, end: int | None = None) -> Float32:
    """Rows of a tensor as float32: codes * scale of a packed one, else the values themselves.

    Args:
        name: of the tensor, for the error.
        tensor: any.
        begin: the first row.
        end: the row after the last; None takes all.

    Raises:
        ValueError: NaN or infinity in it, or a damaged file.
    """
    end = tensor.shape[0] if end is None else min(end, tensor.shape[0])
    if isinstance(tensor, PackedTensor):
        values = _packed_rows(tensor, begin, end)
        # Codes times scales are finite; the bytes of bf16 rows were not read before.
        if tensor.encoding == "bf16":
            _check_dense(name, values, values.shape)
        return values
    if not isinstance(tensor, Stored):
        return tensor if (begin, end) == (0, len(tensor)) else tensor[begin:end]
    values = tensor.rows(begin, end)
    _check_dense(name, values, (end - begin, *tensor.shape[1:]))
    return values


def codes(name: str, tensor: Tensor, config: ModelConfig) -> tuple[Int8, Float32]:
    """Weight codes and scale of a matrix: those it holds, else those that its values are rounded to.

    Args:
        name: of the matrix.
        tensor: packed, stored, or float32.
        config: of the model, not dense; its scheme and granularity.

    Returns:
        int8 [n, k], and float32 multipliers of the shape of `scale_shape`.

    Raises:
        ValueError: a code or scale that the scheme does not have, NaN, or a damaged file.
    """
    if isinstance(tensor, PackedTensor):
        return unpack(tensor.data, tensor.encoding, tensor.shape), tensor.scale
    n, k = tensor.shape
    if isinstance(tensor, Stored) and tensor.codes:
        found, scale = tensor.codes()
        if found.shape != (n, k) or scale.shape != scale_shape((n, k), config.scale):
            shapes = f"{list(found.shape)} with scales {list(scale.shape)}"
            raise ValueError(
                f"tensor {name}: codes are {shapes}; the config asks for {[n, k]} with {config.scale}"
            )
        _check_scale(name, scale)
        return found, scale
    found, scale = quant.quantize_weights(rows(name, tensor), config.weights_of(name), config.scale)
    return found.astype(np.int8), scale


def holds_codes(tensor: Tensor) -> bool:
    """Whether a tensor is stored as weight codes and scales; int8 rows are numbers."""
    if isinstance(tensor, Stored):
        return tensor.codes is not None
    return isinstance(tensor, PackedTensor) and tensor.encoding not in HEADS


def arrays(checkpoint: Checkpoint) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a packed model by the names that its file has for them; those of `Checkpoint.sha256`."""
    found: dict[str, npt.NDArray[Any]] = {}
    for name, tensor in checkpoint.tensors.items():
        assert not isinstance(tensor, Stored)
        if isinstance(tensor, PackedTensor):
            found |= {name: tensor.data, scale_name(name): tensor.scale}
        else:
            found[name] = tensor
    return found


def dequantize(checkpoint: Checkpoint) -> Checkpoint:
    """Expand a packed model to float32 tensors, codes * scale. A master is returned as it is."""
    tensors: dict[str, Tensor] = {
        name: to_dense(checkpoint.tensors[name]) for name in checkpoint.config.tensor_shapes()
    }
    return replace(checkpoint, tensors=tensors, sha256={})


def with_temperature(checkpoint: Checkpoint, temperature: float) -> Checkpoint:
    """A model whose logits are those of another divided by a temperature, in every format and for every use.

        gain of the last norm / temperature

    The head rounds its input relative to the largest value, so that its codes stay the same but for float32's rounding
    of the gains; for powers of two logits are exactly those.

    Args:
        checkpoint: any model.
        temperature: above 1 makes it less sure of itself, below 1 more.

    Raises:
        ValueError: a temperature that is not between 1/1000 and 1000.
    """
    if not 1e-3 <= temperature <= 1e3:
        raise ValueError(f"temperature is {temperature}; expected a number from 0.001 to 1000")
    if temperature == 1:
        return checkpoint
    tensors = dict(checkpoint.tensors)
    tensors["norm.weight"] = to_dense(tensors["norm.weight"]) / np.float32(temperature)
    provenance = checkpoint.provenance | {"head_temperature": temperature}
    return replace(checkpoint, tensors=tensors, provenance=provenance, sha256={})


def to_dense(tensor: Tensor) -> Float32:
    """A tensor as float32: codes * scale of a packed one, any other unchanged."""
    return rows("", tensor)


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


def label(config: ModelConfig, head: str) -> str:
    """The label of a packed model with such a head."""
    usual = "bf16" if config.weights == "dense" else ROW_ENCODING
    return config.label + ("" if head == usual else _HEAD_LABELS[head])


def _usual_head(checkpoint: Checkpoint) -> str:
    """How the head of a model that is not packed is kept unless one asks for something else."""
    config = checkpoint.config
    tensors = [checkpoint.tensors[name] for name in {"embed.weight", head_name(config)}]
    if all(isinstance(tensor, Stored) and tensor.codes for tensor in tensors):
        return LINEAR_ENCODINGS[config.weights][0]
    # Rows of others keep their values; ours are trained to be rounded.
    is_foreign = any(isinstance(tensor, Stored) for tensor in tensors)
    return "bf16" if is_foreign or config.weights == "dense" else ROW_ENCODING


def _packed(name: str, tensor: Tensor, shape: tuple[int, int], planned: Plan) -> PackedTensor:
    """One matrix in the layout that the plan has for it."""
    config, encoding = planned.config, planned.encodings[name]
    if isinstance(tensor, PackedTensor) and tensor.encoding in (encoding, "bf16"):
        return tensor
    if encoding in LINEAR_ENCODINGS[config.weights_of(name)] and encoding != "bf16":
        found, scale = codes(name, tensor, config)
        return PackedTensor(encoding, shape, _pack(found, encoding), scale)
    data = np.zeros(packed_shape(encoding, shape), np.uint8)
    scale = np.ones(1 if encoding == "bf16" else shape[0], np.float32)
    tile = TILE_ROWS[encoding]
    for begin in range(0, shape[0], BLOCK_ROWS):
        block = rows(name, tensor, begin, begin + BLOCK_ROWS)
        if encoding == "bf16":
            made = pack_bf16(_bf16(name, block))
        else:
            found, scale[begin : begin + BLOCK_ROWS] = quant.quantize_rows(block, 8)
            made = pack(found.astype(np.int8), encoding)
        data[begin // tile : begin // tile + len(made)] = made
    return PackedTensor(encoding, shape, data, scale)


def _pack(found: Int8, encoding: str) -> npt.NDArray[np.uint8]:
    """`pack`, in blocks: it takes several copies of what it packs."""
    n, k = found.shape
    data, tile = np.empty(packed_shape(encoding, (n, k)), np.uint8), TILE_ROWS[encoding]
    for begin in range(0, n, BLOCK_ROWS):
        made = pack(found[begin : begin + BLOCK_ROWS], encoding)
        data[begin // tile : begin // tile + len(made)] = made
    return data


def _packed_rows(tensor: PackedTensor, begin: int, end: int) -> Float32:
    n, k = tensor.shape
    tile = TILE_ROWS[tensor.encoding]
    first = begin // tile
    data = tensor.data[first : -(-end // tile)]
    start, stop = first * tile, min(n, first * tile + len(data) * tile)
    if tensor.encoding == "bf16":
        block = tensor._replace(data=data, shape=(stop - start, k))
        return from_bf16(bf16_rows(block)[begin - start : end - start, :k])
    found = unpack(data, tensor.encoding, (stop - start, k))[begin - start : end - start]
    scale = tensor.scale if tensor.scale.shape == (1,) else tensor.scale[begin:end]
    dense: Float32 = quant.dequantize(found.astype(np.float32), scale)
    return dense


def _shortlist(name: str, head: Tensor) -> Iterator[tuple[str, ReadyTensor]]:
    """Int8 rows of a head in bfloat16, and what bounds their errors."""
    n, k = shape = head.shape[0], head.shape[1]
    data, scales = np.empty(packed_shape(ROW_ENCODING, shape), np.uint8), np.empty(n, np.float32)
    bounds = np.empty((2, n), np.float32)
    tile = TILE_ROWS[ROW_ENCODING]
    for start in range(0, n, BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        w = from_bf16(_bf16(name, rows(name, head, start, start + BLOCK_ROWS)))
        found, scale = quant.quantize_rows(w, 8)
        made = pack(found.astype(np.int8), ROW_ENCODING)
        data[start // tile : start // tile + len(made)] = made
        scales[block] = scale
        w64, q64 = w.astype(np.float64), found.astype(np.float64) * scale.astype(np.float64)[:, None]
        # The float64 sums are good to 1e-11; what is stored must not be smaller than the norm.
        for bound, values in zip(bounds, (w64 - q64, w64), strict=True):
            norm = np.sqrt((values * values).sum(axis=1)) * (1 + 2**-30)
            with np.errstate(over="ignore"):
                bound[block] = np.nextafter(norm.astype(np.float32), np.float32(np.inf))
    yield SHORTLIST, PackedTensor(ROW_ENCODING, (n, k), data, scales)
    yield SHORTLIST_BOUNDS, bounds


def _bf16(name: str, tensor: Float32) -> UInt16:
    rows = to_bf16(tensor)
    if (rows & 0x7F80 == 0x7F80).any():
        raise ValueError(f"tensor {name} holds a number that is too large for bfloat16")
    return rows


def check_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], config: ModelConfig, head: str | None
) -> None:
    """Check a tensor of a packed model with such a head.

    Raises:
        ValueError: see `Checkpoint`.
    """
    if len(shape) == 2 and name != SHORTLIST_BOUNDS:
        _check_packed(name, tensor, shape, config, head)
    else:
        _check_dense(name, tensor, shape)


def _check_dense(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(tensor, np.ndarray):
        raise ValueError(f"tensor {name} is packed, but the model is not: pack all matrices or none")
    if tensor.dtype != np.float32 or tensor.shape != shape:
        found = f"{tensor.dtype} {list(tensor.shape)}"
        raise ValueError(f"tensor {name} is {found}; expected float32 {list(shape)}")
    if name == SHORTLIST_BOUNDS and not (tensor >= 0).all():
        raise ValueError(f"tensor {name} holds a negative norm; the file is damaged")
    if not np.isfinite(tensor).all():
        raise ValueError(f"tensor {name} holds NaN or infinity; the file is damaged or training diverged")


def _check_scale(name: str, scale: Float32) -> None:
    if not (np.isfinite(scale) & (scale > 0)).all():
        raise ValueError(f"tensor {name}: a scale is not a positive finite number; the file is damaged")


def _allowed_encodings(name: str, config: ModelConfig, head: str | None) -> tuple[str, ...]:
    codes = LINEAR_ENCODINGS[config.weights_of(name)]
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
    _check_scale(name, scale)
    # An int8 row may hold -128, and the product has to be a number too.
    if tensor.encoding == ROW_ENCODING and (scale > np.finfo(np.float32).max / 128).any():
        raise ValueError(f"tensor {name}: a scale is too large for its codes; the file is damaged")
    if tensor.encoding == "bf16" and scale[0] != 1:
        raise ValueError(f"tensor {name}: the scale of bf16 is {scale[0]}; expected 1")

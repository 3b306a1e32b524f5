"""Numbers in the three widths that models of others hold them: F32, F16, BF16.

    stored = in_file(path, begin, "BF16", (4096, 2560))     # an onebit.checkpoint.Stored
    encode(rows, "F16")

Knows nothing of models or containers.
"""

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from onebit.checkpoint import Stored, Tensor
from onebit.formats.files import read_bytes
from onebit.packing import Float32, PackedTensor, UInt8, from_bf16, to_bf16

FLOATS = {"F32": 4, "F16": 2, "BF16": 2}


def decode(data: UInt8, dtype: str) -> Float32:
    """Numbers as float32, exactly.

    Args:
        data: uint8, little-endian.
        dtype: one of `FLOATS`.
    """
    if dtype == "BF16":
        return from_bf16(data.view("<u2"))
    return data.view("<f4" if dtype == "F32" else "<f2").astype(np.float32)


def encode(values: Float32, dtype: str) -> npt.NDArray[np.generic]:
    """Numbers rounded to a width, nearest, ties to even; what is too large becomes infinity.

    Args:
        values: float32.
        dtype: one of `FLOATS`.

    Returns:
        float32, float16, or uint16 for BF16, little-endian, of the same shape.
    """
    if dtype == "BF16":
        return to_bf16(values).astype("<u2")
    with np.errstate(over="ignore"):
        return values.astype("<f4" if dtype == "F32" else "<f2")


def in_file(path: Path, begin: int, dtype: str, shape: tuple[int, ...]) -> Stored:
    """A tensor of numbers in a file.

    Args:
        path: the file.
        begin: its first byte there.
        dtype: one of `FLOATS`.
        shape: [n] or [n, k], row after row.
    """
    row_bytes = FLOATS[dtype] * math.prod(shape[1:])

    def rows(first: int, end: int) -> Float32:
        data = read_bytes(path, begin + first * row_bytes, (end - first) * row_bytes)
        return decode(data, dtype).reshape(end - first, *shape[1:])

    return Stored(shape, dtype, row_bytes * shape[0], rows)


def width_of(tensor: Tensor) -> str:
    """The narrowest width that certainly holds a tensor: that of its file, BF16 of bf16 rows, else F32."""
    if isinstance(tensor, Stored) and tensor.kind in FLOATS:
        return tensor.kind
    return "BF16" if isinstance(tensor, PackedTensor) and tensor.encoding == "bf16" else "F32"

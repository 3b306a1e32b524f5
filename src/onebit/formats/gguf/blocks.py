"""The types of weights in GGUF files: small blocks of bytes to numbers or weight codes, and codes to blocks.

    decode(data, Q4_K)                      # uint8 [blocks, 144] -> float32 [blocks, 256]
    codes, scale = split(data, TQ2_0)       # uint8 [blocks, 66] -> int8 [blocks, 256], float32 [blocks]
    data = join(codes, scale, TQ2_0)        # the exact inverse, the scale rounded to float16

A block holds consecutive inputs of one row. Knows nothing of files and models.

Source: ggml, ggml-common.h and ggml-quants.c (layouts and the order of operations); BitNet, ggml-bitnet-mad.cpp (I2_S);
the PrismML fork of llama.cpp (Q2_0 in blocks of 128).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from onebit.formats.floats import FLOATS
from onebit.formats.floats import decode as decode_float
from onebit.packing import Float32, Int8, UInt8


class Block(NamedTuple):
    """A type.

    Args:
        name: what GGUF calls it; Q2_0_128 is ours, for a Q2_0 that is not llama.cpp's.
        number: its id in a file.
        weights: how many a block holds.
        n_bytes: what a block takes.
        tail: bytes that follow all blocks of a tensor.
    """

    name: str
    number: int
    weights: int
    n_bytes: int
    tail: int = 0


_ALL = (
    Block("F32", 0, 1, 4),
    Block("F16", 1, 1, 2),
    Block("BF16", 30, 1, 2),
    Block("Q4_0", 2, 32, 18),
    Block("Q4_1", 3, 32, 20),
    Block("Q5_0", 6, 32, 22),
    Block("Q5_1", 7, 32, 24),
    Block("Q8_0", 8, 32, 34),
    Block("Q2_K", 10, 256, 84),
    Block("Q3_K", 11, 256, 110),
    Block("Q4_K", 12, 256, 144),
    Block("Q5_K", 13, 256, 176),
    Block("Q6_K", 14, 256, 210),
    Block("TQ1_0", 34, 256, 54),
    Block("TQ2_0", 35, 256, 66),
    Block("I2_S", 36, 128, 32, 32),
    Block("Q1_0", 41, 128, 18),
    Block("Q2_0", 42, 64, 18),
    Block("Q2_0_128", 42, 128, 34),
)
BLOCKS = {block.name: block for block in _ALL}

# Scheme of the types that hold weight codes; the others hold numbers.
SCHEMES = {
    "TQ1_0": "b1.58",
    "TQ2_0": "b1.58",
    "I2_S": "b1.58",
    "Q2_0": "b1.58",
    "Q2_0_128": "b1.58",
    "Q1_0": "b1",
}

_ORIGINAL = "convert the original Hugging Face folder instead"
_TERNARY = f"{_ORIGINAL}, or ask for a file of I2_S or TQ2_0"
_OTHER = f"{_ORIGINAL}, or ask for a file of F16, Q8_0 or Q4_K_M"
_REFUSED = {
    **dict.fromkeys((4, 5, 31, 32, 33), ("a type that ggml has removed", _OTHER)),
    9: ("Q8_1", _OTHER),
    15: ("Q8_K", _OTHER),
    16: ("IQ2_XXS", _OTHER),
    17: ("IQ2_XS", _OTHER),
    18: ("IQ3_XXS", _OTHER),
    19: ("IQ1_S", _OTHER),
    20: ("IQ4_NL", _OTHER),
    21: ("IQ3_S", _OTHER),
    22: ("IQ2_S", _OTHER),
    23: ("IQ4_XS", _OTHER),
    **dict.fromkeys((24, 25, 26, 27), ("whole numbers", _ORIGINAL)),
    28: ("F64", _OTHER),
    29: ("IQ1_M", _OTHER),
    37: ("I8_S", _TERNARY),
    38: ("TL1, which is laid out for one CPU", _TERNARY),
    39: ("MXFP4, or in files of BitNet TL2, which is laid out for one CPU", _TERNARY),
    40: ("NVFP4", _OTHER),
    134: ("IQ1_BN", _TERNARY),
    135: ("IQ2_BN", _TERNARY),
    142: ("PQ2_0", _TERNARY),
    335: ("IQ2_BN_R4", _TERNARY),
}


def candidates(number: int) -> list[Block]:
    """The types that an id of a file may mean.

    Args:
        number: the id.

    Raises:
        ValueError: a type that cannot be read; the message says its name and the way out.
    """
    if found := [block for block in _ALL if block.number == number]:
        return found
    name, way_out = _REFUSED.get(number, ("unknown", _TERNARY))
    raise ValueError(f"has type {number} ({name}), which onebit does not read: {way_out}")


def decode(data: UInt8, block: Block) -> Float32:
    """Numbers of blocks, by the same float32 operations as ggml's reference.

    Args:
        data: uint8 [blocks, n_bytes], contiguous.
        block: the type.

    Returns:
        float32 [blocks, weights].

    Raises:
        ValueError: see `split`.
    """
    if block.name in FLOATS:
        return decode_float(data.reshape(-1), block.name).reshape(len(data), 1)
    if block.name in SCHEMES:
        codes, scale = split(data, block)
        return scale[:, None] * codes.astype(np.float32)
    # Damaged scales may be infinite; who reads the values refuses them.
    with np.errstate(invalid="ignore", over="ignore"):
        return _DECODERS[block.name](data)


def split(data: UInt8, block: Block, first: int = 0) -> tuple[Int8, Float32]:
    """Weight codes and scales of blocks.

        TQ1_0     48 bytes of 5 digits, 4 bytes of 4, float16 d; digits are base 3, the first one is the highest
        TQ2_0     64 bytes of 4 digits, float16 d
        I2_S      32 bytes of 4 digits; the scale follows all blocks, here it is 1
        Q1_0      float16 d, 16 bytes of 8 digits; code 2 digit - 1, others digit - 1
        Q2_0      float16 d, 16 or 32 bytes of 4 digits

    Args:
        data: uint8 [blocks, n_bytes], contiguous.
        block: the type, one of `SCHEMES`.
        first: number of the first block, for the error.

    Returns:
        codes: int8 [blocks, weights], -1, 0 and 1 (Q1_0: -1 and 1).
        scale: float32 [blocks], as it is in the file.

    Raises:
        ValueError: the digit 3, which no ternary type has.
    """
    name, scale = block.name, scales(data, block)
    if name == "TQ1_0":
        return _trits(data[:, :52]), scale
    if name == "Q1_0":
        return (2 * _planes(data[:, 2:], 1, 1)).view(np.int8) - np.int8(1), scale
    if name == "TQ2_0":
        digits = _planes(data[:, :64], 32, 2)
    elif name == "I2_S":
        # The first of four in the upper bits: the planes come in reverse.
        digits = _planes(data, 32, 2).reshape(-1, 4, 32)[:, ::-1].reshape(-1, 128)
    else:
        digits = _planes(data[:, 2:], 1, 2)
    if (digits == 3).any():
        i = first * block.weights + int((digits.reshape(-1) == 3).argmax())
        raise ValueError(
            f"weight {i} has the code 3; {name} has 0, 1 and 2: the file is damaged or no {name}"
        )
    return digits.view(np.int8) - np.int8(1), scale


def scales(data: UInt8, block: Block) -> Float32:
    """Scales of blocks, as `split` gives them.

    Args:
        data: uint8 [blocks, n_bytes], contiguous.
        block: the type, one of `SCHEMES`.
    """
    if block.name == "I2_S":
        return np.ones(len(data), np.float32)
    return _half(data, {"TQ1_0": 52, "TQ2_0": 64}.get(block.name, 0))[:, 0]


def join(codes: Int8, scale: Float32, block: Block) -> UInt8:
    """Blocks of weight codes: the inverse of `split`; scales are rounded to float16, those of I2_S are left out.

    Args:
        codes: int8 [blocks, weights] that the type has.
        scale: float32 [blocks], positive.
        block: the type, one of `SCHEMES`.

    Returns:
        uint8 [blocks, n_bytes].

    Raises:
        ValueError: a scale that is no positive number in float16.
    """
    digits = (codes > 0 if block.name == "Q1_0" else codes + np.int8(1)).view(np.uint8)
    if block.name == "I2_S":
        return _from_planes(digits.reshape(-1, 4, 32)[:, ::-1].reshape(-1, 128), 32, 2)
    with np.errstate(over="ignore"):
        d = scale.astype("<f2")
    if not (np.isfinite(d) & (d > 0)).all():
        i = int((~(np.isfinite(d) & (d > 0))).argmax())
        raise ValueError(f"the scale {scale[i]:g} is outside of float16, in which {block.name} keeps it")
    halves = d.view(np.uint8).reshape(-1, 2)
    if block.name == "TQ1_0":
        return np.concatenate([_from_trits(digits), halves], axis=1)
    if block.name == "TQ2_0":
        return np.concatenate([_from_planes(digits, 32, 2), halves], axis=1)
    return np.concatenate([halves, _from_planes(digits, 1, 1 if block.name == "Q1_0" else 2)], axis=1)


def _half(data: UInt8, at: int) -> Float32:
    """The float16 at a byte of every block, float32 [blocks, 1]."""
    return np.ascontiguousarray(data[:, at : at + 2]).view("<f2").astype(np.float32)


def _planes(data: UInt8, stride: int, bits: int) -> UInt8:
    """Fields of some bits: of each run of `stride` bytes first the lowest field of all, then the next, ..."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs = data.reshape(len(data), -1, 1, stride)
    return (runs >> shifts & np.uint8(2**bits - 1)).reshape(len(data), -1)


def _from_planes(fields: UInt8, stride: int, bits: int) -> UInt8:
    """The inverse of `_planes`."""
    runs = fields.reshape(len(fields), -1, 8 // bits, stride)
    data = np.zeros((len(fields), runs.shape[1], stride), np.uint8)
    for i in range(8 // bits):
        data |= runs[:, :, i] << np.uint8(bits * i)
    return data.reshape(len(fields), -1)


# Bytes of TQ1_0: from where to where, and how many digits each holds. Digit i of all comes before digit i + 1 of any.
_TRITS = ((0, 32, 5), (32, 48, 5), (48, 52, 4))


def _trits(data: UInt8) -> Int8:
    """Codes of the 52 bytes of TQ1_0: a multiplication by 3^i puts digit i on top."""
    codes = np.empty((len(data), 256), np.int8)
    at = 0
    for begin, end, digits in _TRITS:
        for i in range(digits):
            top = (data[:, begin:end] * np.uint8(3**i)).astype(np.uint16) * np.uint16(3) >> np.uint16(8)
            codes[:, at : at + end - begin] = top.astype(np.int8) - np.int8(1)
            at += end - begin
    return codes


def _from_trits(digits: UInt8) -> UInt8:
    """The inverse of `_trits`: ceil(256 c / 243) of the number c that the digits, filled up to five, make."""
    numbers = np.zeros((len(digits), 52), np.uint16)
    at = 0
    for begin, end, n in _TRITS:
        for i in range(n):
            numbers[:, begin:end] += digits[:, at : at + end - begin] * np.uint16(3 ** (4 - i))
            at += end - begin
    return ((numbers * np.uint32(256) + np.uint32(242)) // np.uint32(243)).astype(np.uint8)


def _q4_0(data: UInt8) -> Float32:
    return _half(data, 0) * (_planes(data[:, 2:], 16, 4).view(np.int8) - np.int8(8)).astype(np.float32)


def _q4_1(data: UInt8) -> Float32:
    return _half(data, 0) * _planes(data[:, 4:], 16, 4).astype(np.float32) + _half(data, 2)


def _q5_0(data: UInt8) -> Float32:
    q = _planes(data[:, 6:], 16, 4) | _planes(data[:, 2:6], 1, 1) << np.uint8(4)
    return _half(data, 0) * (q.view(np.int8) - np.int8(16)).astype(np.float32)


def _q5_1(data: UInt8) -> Float32:
    q = _planes(data[:, 8:], 16, 4) | _planes(data[:, 4:8], 1, 1) << np.uint8(4)
    return _half(data, 0) * q.astype(np.float32) + _half(data, 2)


def _q8_0(data: UInt8) -> Float32:
    return _half(data, 0) * data[:, 2:].view(np.int8).astype(np.float32)


def _q2_k(data: UInt8) -> Float32:
    low = _half(data, 80) * (data[:, :16] & np.uint8(15)).astype(np.float32)
    minimum = _half(data, 82) * (data[:, :16] >> np.uint8(4)).astype(np.float32)
    q = _planes(data[:, 16:80], 32, 2).astype(np.float32)
    return _affine(low, minimum, q)


def _q3_k(data: UInt8) -> Float32:
    # Six bits a scale: the lower four of all sixteen, then the upper two of all.
    scales = _planes(data[:, 96:104], 8, 4) | _planes(data[:, 104:108], 4, 2) << np.uint8(4)
    scale = _half(data, 108) * (scales.view(np.int8) - np.int8(32)).astype(np.float32)
    # Where the bit of the mask is missing, 4 is taken off.
    q = (_planes(data[:, 32:96], 32, 2) | _planes(data[:, :32], 32, 1) << np.uint8(2)).view(
        np.int8
    ) - np.int8(4)
    return _scaled(scale, q.astype(np.float32))


def _q4_k(data: UInt8) -> Float32:
    return _affine(*_k_scales(data), _planes(data[:, 16:], 32, 4).astype(np.float32))


def _q5_k(data: UInt8) -> Float32:
    q = _planes(data[:, 48:], 32, 4) | _planes(data[:, 16:48], 32, 1) << np.uint8(4)
    return _affine(*_k_scales(data), q.astype(np.float32))


def _q6_k(data: UInt8) -> Float32:
    q = _planes(data[:, :128], 64, 4) | _planes(data[:, 128:192], 32, 2) << np.uint8(4)
    scale = _half(data, 208) * data[:, 192:208].view(np.int8).astype(np.float32)
    return _scaled(scale, (q.view(np.int8) - np.int8(32)).astype(np.float32))


def _k_scales(data: UInt8) -> tuple[Float32, Float32]:
    """Scales and minima of the eight parts of a Q4_K or Q5_K block, six bits each in the bytes 4 to 15.

    The first four of both are the lower six bits of bytes 0 to 3 and 4 to 7; the last four have their lower four bits
    in bytes 8 to 11, and their upper two on top of the former.
    """
    first, second, third = (data[:, at : at + 4] for at in (4, 8, 12))
    low, six, top = np.uint8(15), np.uint8(63), np.uint8(48)
    scales = np.concatenate([first & six, third & low | first >> 2 & top], axis=1)
    minima = np.concatenate([second & six, third >> 4 | second >> 2 & top], axis=1)
    return _half(data, 0) * scales.astype(np.float32), _half(data, 2) * minima.astype(np.float32)


def _scaled(scale: Float32, q: Float32) -> Float32:
    """Scale * q, a scale for each part of a block."""
    parts = q.reshape(*scale.shape, -1)
    return (scale[:, :, None] * parts).reshape(q.shape)


def _affine(scale: Float32, minimum: Float32, q: Float32) -> Float32:
    """Scale * q - minimum, one of both for each part of a block."""
    parts = q.reshape(*scale.shape, -1)
    return (scale[:, :, None] * parts - minimum[:, :, None]).reshape(q.shape)


_DECODERS: dict[str, Callable[[UInt8], Float32]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}

"""Weight codes to bytes and back: the LANE16x4 family of bit layouts, drawn bit by bit in docs/format.md.

Knows codes and bytes; knows nothing of quantisers, models or files.

    data = pack(codes, "t80")                       # int8 [n, k] -> uint8 [tiles, k_padded / 4, 64]
    codes = unpack(data, "t80", codes.shape)        # the exact inverse

A unit is 64 bytes: 16 lanes x 4 consecutive inputs, byte 4 * lane + input. Each byte holds one code of each
of the tile's row groups at that lane and input; row = (tile * groups + group) * 16 + lane. Units of a tile
follow each other in ascending input, tiles in ascending row, so a thread reads one sequential stream.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

LANES = 16
UNIT_INPUTS = 4
UNIT_BYTES = LANES * UNIT_INPUTS
INPUT_ALIGN = 16

# Rows of one tile: 16 lanes x the codes that share a byte. bf16 has no codes: 8 rows, one after the other, are a tile.
TILE_ROWS: dict[str, int] = {"t80": 80, "r64": 64, "b128": 128, "q8": 16, "q4": 32, "bf16": 8}

# Largest code magnitude of each layout. b128 has no zero.
MAX_CODE: dict[str, int] = {"t80": 1, "r64": 1, "b128": 1, "q8": 127, "q4": 7}

Int8 = npt.NDArray[np.int8]
UInt8 = npt.NDArray[np.uint8]
UInt16 = npt.NDArray[np.uint16]
Float32 = npt.NDArray[np.float32]


class PackedTensor(NamedTuple):
    """A quantised matrix: w ~ codes * scale, the codes packed; or one of bfloat16, with the scale 1.

    Args:
        encoding: layout of data: "t80", "r64", "b128", "q8", "q4" or "bf16".
        shape: (n, k), rows and inputs without padding.
        data: uint8 [tiles, k_padded / 4, 64].
        scale: float32 multiplier, [1], [n] or [n, groups].
    """

    encoding: str
    shape: tuple[int, int]
    data: UInt8
    scale: Float32


def pad_inputs(k: int) -> int:
    """The number of inputs that a packed row of k inputs holds: k rounded up to a multiple of 16."""
    return -(-k // INPUT_ALIGN) * INPUT_ALIGN


def packed_shape(encoding: str, shape: tuple[int, int]) -> tuple[int, int, int]:
    """Shape of the packed bytes of a matrix: (tiles, k_padded / 4, 64).

    Raises:
        ValueError: an unknown encoding or a shape that is no matrix.
    """
    _check_encoding(encoding)
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"shape {tuple(shape)}: expected a matrix [n, k] of at least 1 x 1")
    n, k = shape
    return -(-n // TILE_ROWS[encoding]), pad_inputs(k) // UNIT_INPUTS, UNIT_BYTES


def pack(codes: Int8, encoding: str) -> UInt8:
    """Pack weight codes into tiles. Rows and inputs that only pad hold the code 0 (b128: the bit 0).

    Args:
        codes: int8 [n, k]; {-1, 0, 1} (t80, r64), {-1, 1} (b128), [-127, 127] (q8) or [-7, 7] (q4).
        encoding: the layout.

    Returns:
        uint8 [tiles, k_padded / 4, 64].

    Raises:
        ValueError: an unknown encoding, another dtype or rank, or a code that the layout cannot hold.
    """
    _check_codes(codes, encoding)
    tiles, units, _ = packed_shape(encoding, codes.shape)
    n, k = codes.shape
    groups = TILE_ROWS[encoding] // LANES
    padded = np.zeros((tiles * TILE_ROWS[encoding], units * UNIT_INPUTS), np.int8)
    padded[:n, :k] = codes
    digits = (padded > 0 if encoding == "b128" else padded + np.int8(_offset(encoding))).view(np.uint8)
    lanes = digits.reshape(tiles, groups, LANES, units, UNIT_INPUTS).transpose(1, 0, 3, 2, 4)
    if encoding == "t80":
        packed = _T80_BYTE[_horner(lanes)]
    else:
        packed = np.zeros(lanes.shape[1:], np.uint8)
        for group in range(groups):
            packed |= lanes[group] << np.uint8(8 // groups * group)
    return packed.reshape(tiles, units, UNIT_BYTES)


def unpack(data: UInt8, encoding: str, shape: tuple[int, int]) -> Int8:
    """Unpack the codes of a matrix: the exact inverse of `pack`.

    Args:
        data: uint8 [tiles, k_padded / 4, 64].
        encoding: the layout.
        shape: (n, k) without padding.

    Returns:
        int8 [n, k].

    Raises:
        ValueError: an unknown encoding, a data shape that does not fit, or a byte that `pack` never writes.
    """
    _check_layout(encoding)
    _check_shape(data, encoding, shape)
    codes_of_byte, is_valid = _DECODE[encoding]
    if not is_valid[data].all():
        _check_bytes(np.bincount(data.reshape(-1), minlength=256) > 0, encoding)
    (n, k), (tiles, units, _) = shape, data.shape
    groups = TILE_ROWS[encoding] // LANES
    codes = np.empty((tiles, groups, LANES, units, UNIT_INPUTS), np.int8)
    lanes = data.reshape(tiles, units, LANES, UNIT_INPUTS).transpose(0, 2, 1, 3)
    for group in range(groups):
        codes[:, group] = codes_of_byte[group][lanes]
    return codes.reshape(tiles * TILE_ROWS[encoding], units * UNIT_INPUTS)[:n, :k]


def count_codes(data: UInt8, encoding: str, shape: tuple[int, int]) -> dict[int, int]:
    """How often each code occurs in a packed matrix, padding left out; counts bytes instead of unpacking them.

    Args:
        data: uint8 [tiles, k_padded / 4, 64].
        encoding: the layout.
        shape: (n, k) without padding.

    Returns:
        Codes that occur, ascending, and their numbers.

    Raises:
        ValueError: see `unpack`.
    """
    _check_shape(data, encoding, shape)
    # One tile after the other: counting needs eight bytes for each of data.
    counts = np.zeros(256, np.int64)
    for tile in data:
        counts += np.bincount(tile.reshape(-1), minlength=256)
    _check_bytes(counts > 0, encoding)
    codes_of_byte = _DECODE[encoding][0]
    weights = np.broadcast_to(counts, codes_of_byte.shape)
    numbers = {int(code): int(weights[codes_of_byte == code].sum()) for code in np.unique(codes_of_byte)}
    padding = -1 if encoding == "b128" else 0
    numbers[padding] -= data.size * len(codes_of_byte) - shape[0] * shape[1]
    return {code: number for code, number in numbers.items() if number}


def _check_bytes(seen: npt.NDArray[np.bool_], encoding: str) -> None:
    """Refuse byte values that `pack` never writes; seen: bool [256]."""
    damaged = np.flatnonzero(seen & ~_DECODE[encoding][1])
    if damaged.size:
        raise ValueError(
            f"packed data holds the byte {damaged[0]}, which {encoding} never writes; it is damaged"
        )


def _check_shape(data: UInt8, encoding: str, shape: tuple[int, int]) -> None:
    expected = packed_shape(encoding, shape)
    if data.dtype != np.uint8 or data.shape != expected:
        raise ValueError(
            f"packed data is {data.dtype} {list(data.shape)}; "
            f"{encoding} of {list(shape)} needs uint8 {list(expected)}"
        )


def to_bf16(w: Float32) -> UInt16:
    """Round to bfloat16, nearest, ties to even.

    Args:
        w: float32, finite.

    Returns:
        uint16 of the same shape: the upper halves of the rounded values.
    """
    bits = np.ascontiguousarray(w).view(np.uint32)
    return (bits + (np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def pack_bf16(w: UInt16) -> UInt8:
    """Lay out rows of bfloat16, one after the other; what only pads is 0.

    Args:
        w: uint16 [n, k], bfloat16.

    Returns:
        uint8 [tiles, k_padded / 4, 64].
    """
    shape = packed_shape("bf16", w.shape)
    n, k = w.shape
    padded = np.zeros((shape[0] * TILE_ROWS["bf16"], pad_inputs(k)), "<u2")
    padded[:n, :k] = w
    return padded.view(np.uint8).reshape(shape)


def bf16_rows(tensor: PackedTensor) -> UInt16:
    """The rows of a bf16 tensor with their padding, uint16 [n_padded, k_padded], a view."""
    rows: UInt16 = tensor.data.view("<u2").reshape(-1, pad_inputs(tensor.shape[1]))
    return rows


def bf16_planes(w: Float32) -> UInt16:
    """A float32 matrix as a sum of bfloat16 ones: what is left after rounding is rounded again, until nothing is.

        w = p_0 + p_1 + p_2, exactly but for parts below 2^-133

    Args:
        w: float32 [n, k], of magnitudes below 2^127.

    Returns:
        bits of bfloat16, uint16 [planes, n, k_padded]: one plane for numbers of bfloat16, at most three.
    """
    n, k = w.shape
    planes: list[UInt16] = []
    rest: Float32 = np.ascontiguousarray(w, np.float32)
    while not planes or (len(planes) < 3 and rest.any()):
        plane = np.zeros((n, pad_inputs(k)), np.uint16)
        plane[:, :k] = to_bf16(rest)
        rest = rest - from_bf16(plane[:, :k])
        planes.append(plane)
    return np.stack(planes)


def from_bf16(w: UInt16) -> Float32:
    """bfloat16 as float32, exactly."""
    return (w.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _check_encoding(encoding: str) -> None:
    if encoding not in TILE_ROWS:
        raise ValueError(f"encoding {encoding!r}: expected one of {', '.join(TILE_ROWS)}")


def _check_layout(encoding: str) -> None:
    if encoding not in MAX_CODE:
        raise ValueError(f"encoding {encoding!r}: expected one of {', '.join(MAX_CODE)}")


def _check_codes(codes: Int8, encoding: str) -> None:
    _check_layout(encoding)
    if codes.dtype != np.int8:
        raise ValueError(f"codes are {codes.dtype}; expected int8")
    top = MAX_CODE[encoding]
    is_bad = (codes > top) | (codes < -top)
    if encoding == "b128":
        is_bad |= codes == 0
    if is_bad.any():
        row, column = (int(i) for i in np.argwhere(is_bad)[0])
        allowed = "-1 and 1" if encoding == "b128" else f"-{top} to {top}"
        raise ValueError(f"code {codes[row, column]} at [{row}, {column}]: {encoding} holds {allowed}")


def _offset(encoding: str) -> int:
    """What is added to a code so that it is stored without a sign."""
    return {"t80": 1, "r64": 1, "q8": -128, "q4": 8}[encoding]


def _horner(digits: UInt8) -> UInt8:
    """Five base-3 digits, the most significant first, as one number from 0 to 242."""
    number: UInt8 = digits[0]
    for digit in digits[1:]:
        number = number * np.uint8(3) + digit
    return number


def _decode_table(encoding: str) -> tuple[Int8, npt.NDArray[np.bool_]]:
    """Code of each group in each byte value, int8 [groups, 256], and which byte values `pack` writes."""
    groups = TILE_ROWS[encoding] // LANES
    byte = np.arange(256)
    if encoding == "t80":
        # byte = ceil(256 c / 243): each multiplication by 3 carries the next digit out of the byte.
        digits = np.stack([byte * 3**i % 256 * 3 // 256 for i in range(groups)])
        return (digits - 1).astype(np.int8), np.isin(byte, _T80_BYTE)
    bits = 8 // groups
    digits = np.stack([byte >> bits * group & 2**bits - 1 for group in range(groups)])
    if encoding == "b128":
        return (2 * digits - 1).astype(np.int8), np.ones(256, np.bool_)
    codes = digits - _offset(encoding) % 256
    return codes.astype(np.int8), np.all(abs(codes) <= MAX_CODE[encoding], axis=0)


# Byte of each number c = 0..242, rounded up so that the digits come out of the top by multiplication.
_T80_BYTE = ((256 * np.arange(243) + 242) // 243).astype(np.uint8)
_DECODE = {encoding: _decode_table(encoding) for encoding in MAX_CODE}

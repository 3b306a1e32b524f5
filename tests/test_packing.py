"""Bit layouts. Kinds: golden (literal bytes), exact (against a scalar twin), invariant (round trips)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebit.packing import (
    MAX_CODE,
    TILE_ROWS,
    PackedTensor,
    bf16_rows,
    count_codes,
    from_bf16,
    pack,
    pack_bf16,
    packed_shape,
    pad_inputs,
    to_bf16,
    unpack,
)

ENCODINGS = sorted(MAX_CODE)
AWKWARD = [(1, 1), (7, 13), (16, 16), (65, 257), (80, 64), (81, 17), (163, 500), (240, 1000), (257, 3)]


def random_codes(encoding: str, n: int, k: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if encoding == "b128":
        return rng.choice(np.array([-1, 1], np.int8), (n, k))
    top = MAX_CODE[encoding]
    return rng.integers(-top, top + 1, (n, k)).astype(np.int8)


def code_at(data: np.ndarray, encoding: str, row: int, column: int) -> int:
    """One code, read as docs/format.md says, one bit field or one multiplication at a time."""
    groups = TILE_ROWS[encoding] // 16
    tile, within = divmod(row, 16 * groups)
    group, lane = divmod(within, 16)
    byte = int(data[tile, column // 4, 4 * lane + column % 4])
    if encoding == "t80":
        for _ in range(group):
            byte = 3 * byte % 256
        return 3 * byte // 256 - 1
    if encoding == "r64":
        return (byte >> 2 * group) % 4 - 1
    if encoding == "b128":
        return 1 if byte >> group & 1 else -1
    if encoding == "q4":
        return (byte >> 4 * group) % 16 - 8
    return byte - 128


@pytest.mark.parametrize(
    ("encoding", "codes", "byte"),
    [
        # c = 0: all -1. c = 121: all 0. c = 242: all +1.
        ("t80", [-1, -1, -1, -1, -1], 0),
        ("t80", [0, 0, 0, 0, 0], 128),
        ("t80", [1, 1, 1, 1, 1], 255),
        # digits 2 1 0 1 2 are c = 194, and 256 * 194 / 243 rounded up is 205.
        ("t80", [1, 0, -1, 0, 1], 205),
        ("r64", [-1, -1, -1, -1], 0b00_00_00_00),
        ("r64", [0, 0, 0, 0], 0b01_01_01_01),
        ("r64", [1, 0, -1, 1], 0b10_00_01_10),
        ("b128", [1, -1, 1, 1, -1, -1, -1, 1], 0b1000_1101),
        ("q4", [-7, 7], 0xF1),
        ("q4", [0, 3], 0xB8),
        ("q8", [-127], 1),
        ("q8", [0], 128),
        ("q8", [127], 255),
    ],
)
def test_one_byte_is_drawn_as_documented(encoding, codes, byte):
    n = TILE_ROWS[encoding]
    matrix = np.full((n, 4), -1 if encoding == "b128" else 0, np.int8)
    matrix[5::16, 2] = codes
    assert pack(matrix, encoding)[0, 0, 4 * 5 + 2] == byte


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(("n", "k"), AWKWARD)
def test_pack_equals_the_scalar_twin_and_unpack_inverts_it(encoding, n, k):
    codes = random_codes(encoding, n, k)
    data = pack(codes, encoding)
    assert data.dtype == np.uint8 and data.flags.c_contiguous
    assert data.shape == packed_shape(encoding, (n, k))
    assert data.shape == (-(-n // TILE_ROWS[encoding]), pad_inputs(k) // 4, 64)
    rng = np.random.default_rng(1)
    for row, column in {
        (0, 0),
        (n - 1, k - 1),
        *zip(rng.integers(0, n, 30), rng.integers(0, k, 30), strict=True),
    }:
        assert code_at(data, encoding, int(row), int(column)) == codes[row, column]
    unpacked = unpack(data, encoding, (n, k))
    assert unpacked.dtype == np.int8 and np.array_equal(unpacked, codes)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_padding_holds_the_code_zero(encoding):
    data = pack(np.ones((1, 1), np.int8), encoding)
    n, k = TILE_ROWS[encoding], 16
    whole = unpack(data, encoding, (n, k)).astype(int)
    padding = -1 if encoding == "b128" else 0
    assert whole[0, 0] == 1 and whole.sum() == 1 + padding * (n * k - 1)


@given(st.sampled_from(ENCODINGS), st.integers(1, 150), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_round_trip_of_any_shape(encoding, n, k, seed):
    codes = random_codes(encoding, n, k, seed)
    data = pack(codes, encoding)
    assert np.array_equal(unpack(data, encoding, (n, k)), codes)
    assert np.array_equal(pack(unpack(data, encoding, (n, k)), encoding), data)


@given(st.sampled_from(ENCODINGS), st.binary(min_size=64, max_size=64))
def test_any_unit_either_unpacks_exactly_or_is_refused(encoding, unit):
    n = TILE_ROWS[encoding]
    # Four equal units: one would be less than the 16 inputs to which rows are padded.
    data = np.frombuffer(unit * 4, np.uint8).reshape(1, 4, 64)
    try:
        codes = unpack(data, encoding, (n, 16))
    except ValueError as error:
        assert "never writes" in str(error)
    else:
        assert np.array_equal(pack(codes, encoding), data)


@pytest.mark.parametrize(
    ("encoding", "used"), [("t80", 243), ("r64", 81), ("b128", 256), ("q8", 255), ("q4", 225)]
)
def test_number_of_bytes_that_a_layout_uses(encoding, used):
    n = TILE_ROWS[encoding]
    accepted = 0
    for byte in range(256):
        data = np.full((1, 4, 64), byte, np.uint8)
        try:
            codes = unpack(data, encoding, (n, 16))
        except ValueError:
            continue
        accepted += 1
        assert np.array_equal(pack(codes, encoding), data)
    assert accepted == used


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_codes_out_of_range_are_refused_with_their_place(encoding):
    codes = np.ones((3, 5), np.int8)
    for bad in (-MAX_CODE[encoding] - 1, -128):
        codes[2, 4] = bad
        with pytest.raises(ValueError, match=rf"code {bad} at \[2, 4\]: {encoding} holds"):
            pack(codes, encoding)


def test_binary_has_no_zero():
    with pytest.raises(ValueError, match="b128 holds -1 and 1"):
        pack(np.zeros((1, 1), np.int8), "b128")


def test_wrong_arguments_are_refused():
    codes = np.ones((2, 2), np.int8)
    with pytest.raises(ValueError, match="encoding 't81': expected one of t80, r64"):
        pack(codes, "t81")
    with pytest.raises(ValueError, match="expected int8"):
        pack(codes.astype(np.float32), "t80")
    for shape in ((4,), (0, 4), (4, 0), (1, 1, 1)):
        with pytest.raises(ValueError, match="expected a matrix"):
            pack(np.ones(shape, np.int8), "r64")
    data = pack(codes, "r64")
    with pytest.raises(ValueError, match="needs uint8"):
        unpack(data, "t80", (81, 2))
    with pytest.raises(ValueError, match="needs uint8"):
        unpack(data.astype(np.int8), "r64", (2, 2))


def test_t80_digits_come_out_by_multiplication():
    """The identity on which the kernels rest: digit i is the carry of the i-th multiplication by three."""
    for c in range(243):
        x = (256 * c + 242) // 243
        digits = []
        for _ in range(5):
            digits.append((3 * x - 3 * x % 256) // 256)
            x = 3 * x % 256
        assert sum(digit * 3 ** (4 - i) for i, digit in enumerate(digits)) == c


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("shape", AWKWARD)
def test_codes_are_counted_without_padding(encoding, shape):
    codes = random_codes(encoding, *shape)
    values, numbers = np.unique(codes, return_counts=True)
    counted = count_codes(pack(codes, encoding), encoding, shape)
    assert counted == dict(zip(values.tolist(), numbers.tolist(), strict=True))


@pytest.mark.parametrize(("n", "k"), [(1, 1), (8, 16), (17, 35)])
def test_bf16_rows_follow_each_other(n, k):
    w = np.random.default_rng(n).standard_normal((n, k)).astype(np.float32)
    data = pack_bf16(to_bf16(w))
    assert data.shape == packed_shape("bf16", (n, k)) and data.size % 64 == 0
    rows = bf16_rows(PackedTensor("bf16", (n, k), data, np.ones(1, np.float32)))
    assert np.shares_memory(rows, data) and rows.shape == (-(-n // 8) * 8, pad_inputs(k))
    assert np.array_equal(rows[:n, :k], to_bf16(w)) and not rows[n:].any() and not rows[:, k:].any()


def test_bf16_is_the_nearest_with_ties_to_even():
    w = np.array([1.0, -1.0, 1.00390625, 1.01171875, 1e-45, 3.3895314e38], np.float32)
    assert to_bf16(w).tolist() == [0x3F80, 0xBF80, 0x3F80, 0x3F82, 0, 0x7F7F]
    w = np.random.default_rng(1).standard_normal(1000).astype(np.float32)
    assert (abs(from_bf16(to_bf16(w)) - w) <= abs(w) * np.float32(2**-8)).all()
    assert np.array_equal(to_bf16(from_bf16(to_bf16(w))), to_bf16(w))


def test_bf16_has_no_codes():
    for call in (lambda: pack(np.ones((2, 2), np.int8), "bf16"), lambda: unpack(b"", "bf16", (1, 1))):
        with pytest.raises(ValueError, match="encoding 'bf16': expected one of t80, r64, b128, q8, q4"):
            call()

"""Every kernel of every instruction set. Kinds: exact (integers, ordered float work), invariant (equal bits).

All arrays given to a kernel end where unreadable memory begins, so each test also proves its bounds.
"""

import numpy as np
import pytest

from core import reference
from core.arrays import SPECIALS, assert_same_bits, empty, fenced, floats, with_specials
from onebit import quant
from onebit._core import available_isas, kernels
from onebit.packing import pack

ISAS = available_isas()
ENCODINGS = {"t80": 80, "r64": 64, "b128": 128, "q8": 16, "q4": 32}
SIZES = (1, 2, 15, 16, 17, 31, 48, 100, 257, 1000)
HEAD_WIDTHS = (2, 24, 32, 48, 64, 128)

# The polynomial for exp is good to 1e-7, and silu adds three roundings of 6e-8.
SILU_RTOL = 5e-7
# exp gives infinity above 88, where silu is below 1e-36 in magnitude.
SILU_ATOL = 1e-36


@pytest.fixture(params=ISAS)
def isa(request):
    return request.param


@pytest.fixture
def rng():
    return np.random.default_rng(7)


# ---- Tables ----


def test_scalar_is_the_last_resort():
    assert ISAS[-1] == "scalar"
    assert len(set(ISAS)) == len(ISAS)


def test_unknown_isa_is_refused():
    with pytest.raises(ValueError, match="isa 'mmx'"):
        kernels.sum_codes("mmx", np.zeros(16, np.int8))


# ---- Exact sums ----


def dot_tile(isa, encoding, tile, x, k):
    """out [tokens, tile rows] of the first k inputs of x."""
    sums = fenced(x[:, :k].sum(axis=1, dtype=np.int32))
    out = empty((x.shape[0], ENCODINGS[encoding]), np.int32)
    kernels.dot_tile(isa, encoding, fenced(tile), fenced(x), sums, out)
    return out


def exact_dot(encoding, tile, x):
    # float64 holds these sums exactly, and multiplies matrices fast.
    weights = reference.decode_tile(tile, encoding).astype(np.float64)
    return (x[:, : weights.shape[1]].astype(np.float64) @ weights.T).astype(np.int64)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("k", [16, 32, 48, 80, 208, 1040, 4096])
def test_dot_tile_equals_integers(isa, encoding, k, rng):
    """Any bytes at all, those that packing never writes included."""
    tile = rng.integers(0, 256, (k // 4, 64), np.uint8)
    for m in (1, 2, 3, 4, 5, 6, 7, 12, 16, 17, 31, 48, 64, 100):
        x = rng.integers(-127, 128, (m, k + 16 * (m % 3)), np.int8)
        np.testing.assert_array_equal(dot_tile(isa, encoding, tile, x, k), exact_dot(encoding, tile, x))


@pytest.mark.parametrize("m", [1, 2, 7, 8, 9, 16, 20])
@pytest.mark.parametrize("k", [16, 48, 64, 128, 2048])
def test_dot_pair_equals_two_tiles(isa, k, m, rng):
    tiles = rng.integers(0, 256, (2, k // 4 + 5, 64), np.uint8)
    x = rng.integers(-127, 128, (m, k + 16), np.int8)
    sums = fenced(x[:, :k].sum(axis=1, dtype=np.int32))
    out = empty((2, m, 16), np.int32)
    if kernels.dot_pair(isa, fenced(tiles), fenced(x), sums, k, out):
        for tile, found in zip(tiles, out, strict=True):
            np.testing.assert_array_equal(found, exact_dot("q8", tile[: k // 4], x))
    else:
        assert isa not in ("amx", "avx512vnni")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_dot_tile_holds_extreme_sums(isa, encoding):
    """The longest run of inputs, nothing but the largest activations, one byte everywhere: no sum saturates."""
    k = 32768
    x = np.full((4, k), 127, np.int8)
    x[1] = -127
    x[2, ::2] = -127
    x[3, k // 2 :] = -127
    for byte in (0, 86, 170, 255):
        tile = np.full((k // 4, 64), byte, np.uint8)
        weights = reference.decode_tile(tile[:1], encoding)[:, 0]
        expected = np.outer(x.sum(axis=1, dtype=np.int64), weights)
        np.testing.assert_array_equal(dot_tile(isa, encoding, tile, x, k), expected)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_dot_tile_holds_rows_of_opposite_extremes(isa, encoding):
    """Every code of a row has the sign of its activation, in one row group after the other."""
    k = 32768 if encoding in ("t80", "r64", "b128") else 4096
    top = {"q8": 127, "q4": 7}.get(encoding, 1)
    rows = ENCODINGS[encoding]
    signs = np.where(np.arange(k) % 3 == 0, -1, 1).astype(np.int8)
    codes = np.full((rows, k), -top, np.int8) * signs
    codes[::2] *= -1
    x = (127 * signs)[None].repeat(3, 0)
    expected = np.where(np.arange(rows) % 2 == 0, 127 * top * k, -127 * top * k)
    out = dot_tile(isa, encoding, pack(codes, encoding)[0], x, k)
    np.testing.assert_array_equal(out, expected[None].repeat(3, 0))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_dot_tile_reads_what_pack_writes(isa, encoding, rng):
    top = {"q8": 127, "q4": 7}.get(encoding, 1)
    rows, n, k = ENCODINGS[encoding], ENCODINGS[encoding] + 13, 100
    codes = rng.integers(-top, top + 1, (n, k)).astype(np.int8)
    if encoding == "b128":
        codes[codes == 0] = 1
    x = np.zeros((3, 112), np.int8)
    x[:, :k] = rng.integers(-127, 128, (3, k))
    data = pack(codes, encoding)
    out = np.concatenate([dot_tile(isa, encoding, tile, x, 112) for tile in data], axis=1)
    np.testing.assert_array_equal(out[:, :n], x[:, :k].astype(np.int64) @ codes.T)
    assert out.shape[1] == 2 * rows


@pytest.mark.parametrize("n", [16, 48, 256, 4096])
def test_sum_codes(isa, n, rng):
    for codes in (rng.integers(-127, 128, n).astype(np.int8), np.full(n, -127, np.int8)):
        assert kernels.sum_codes(isa, fenced(codes)) == codes.sum(dtype=np.int64)


# ---- Scales ----


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("planes", [1, 2])
def test_scale_sums(isa, n, per_row, m, planes, rng):
    # The largest sums: of a8, and of the planes of a15 with 8-bit rows.
    top = 2**24 if planes == 1 else 127 * 127 * 32768
    acc, lo = rng.integers(-top, top + 1, (2, m, n + n % 5)).astype(np.int32)
    acc[0, 0] = top
    lo = lo // 2 if planes == 2 else None
    w_scale = np.exp(floats(rng, n if per_row else 1))
    x_scale = floats(rng, m)

    def scaled(sign, factor, accumulate, y):
        planes = [None if plane is None else fenced(sign * plane[::sign]) for plane in (acc, lo)]
        kernels.scale_sums(isa, *planes, fenced(w_scale), per_row, factor, accumulate, y)
        planes = [None if plane is None else plane[:, :n] for plane in planes]
        return reference.scale_sums(*planes, w_scale)

    y = empty((m, n), np.float32)
    first = scaled(1, None, False, y)
    assert_same_bits(y, first)
    second = scaled(-1, fenced(x_scale), True, y)
    assert_same_bits(y, (first + second) * x_scale[:, None])
    scaled(1, fenced(x_scale), False, y)
    assert_same_bits(y, first * x_scale[:, None])


def test_scale_sums_rounds_two_planes_once(isa):
    """Sums halfway between two floats but for their last bit: rounding hi * 128 first would tie to even."""
    hi = np.array([[2**24 + 1, 2**24 + 1, -(2**24) - 1]], np.int32)
    lo = np.array([[1, -1, -1]], np.int32)
    y = empty((1, 3), np.float32)
    kernels.scale_sums(isa, fenced(hi), fenced(lo), fenced(np.ones(1, np.float32)), False, None, False, y)
    np.testing.assert_array_equal(y, np.array([[2**31 + 256, 2**31, -(2**31) - 256]], np.float32))


# ---- Quantisers ----


def activations(rng, n):
    """Rows that quantisers must get right: ordinary, ties, zeros, denormals, tiny, huge."""
    ties = rng.integers(-20, 21, n).astype(np.float32) / 2
    ties[0] = 127
    x = floats(rng, n)
    scaled = [x * np.float32(factor) for factor in (1, 0, 1e-42, 1e-7, 1e30)]
    return [ties, *scaled]


def quantize(isa, name, x, n_padded):
    """Codes and scale; the planes of a15 are checked and combined."""
    planes = [empty(n_padded, np.int8) for _ in range(2 if name == "a15" else 1)]
    scale = getattr(kernels, f"quantize_{name}")(isa, fenced(x), *planes)
    assert not any(plane[x.size :].any() for plane in planes)
    codes, *lo = (plane[: x.size].astype(np.int32) for plane in planes)
    if name == "a15":
        assert lo[0].min() >= -64 and lo[0].max() <= 63 and abs(codes).max() <= 127
        codes = codes * 128 + lo[0]
    return codes, np.float32(scale)


@pytest.mark.parametrize("name", quant.ACTIVATION_QUANTIZERS)
@pytest.mark.parametrize("n", SIZES)
def test_quantizers_equal_their_definition(isa, name, n, rng):
    for x in activations(rng, n):
        codes, scale = quantize(isa, name, x, n + 16 - n % 16)
        expected, expected_scale = quant.ACTIVATION_QUANTIZERS[name](x)
        np.testing.assert_array_equal(codes, expected)
        assert scale == expected_scale[0]


@pytest.mark.parametrize("special", SPECIALS)
def test_quantizers_agree_on_special_values(isa, special, rng):
    x = floats(rng, 37)
    x[11] = special
    for name in quant.ACTIVATION_QUANTIZERS:
        codes, scale = quantize(isa, name, x, 48)
        expected, expected_scale = quantize("scalar", name, x, 48)
        np.testing.assert_array_equal(codes, expected)
        assert_same_bits(scale[None], expected_scale[None])
        assert np.isnan(scale) == np.isnan(special)


# ---- Elementwise and norm ----


@pytest.mark.parametrize("n", SIZES)
def test_rms_norm(isa, n, rng):
    gain = floats(rng, n)
    for x in activations(rng, n)[:-1]:
        y = empty(n, np.float32)
        kernels.rms_norm(isa, fenced(x), fenced(gain), 1e-5, y)
        assert_same_bits(y, reference.rms_norm(x, gain, 1e-5))


@pytest.mark.parametrize("special", SPECIALS)
def test_rms_norm_agrees_on_special_values(isa, special, rng):
    x, gain = floats(rng, 37), floats(rng, 37)
    x[11] = special
    y, expected = empty(37, np.float32), empty(37, np.float32)
    kernels.rms_norm(isa, fenced(x), fenced(gain), 1e-5, y)
    kernels.rms_norm("scalar", fenced(x), fenced(gain), 1e-5, expected)
    assert_same_bits(y, expected)


@pytest.mark.parametrize("d_head", HEAD_WIDTHS)
def test_rope(isa, d_head, rng):
    x = floats(rng, 3 * d_head).reshape(3, d_head)
    angle = floats(rng, d_head // 2)
    cos, sin = np.cos(angle), np.sin(angle)
    rotated = fenced(x)
    kernels.rope(isa, rotated, fenced(cos), fenced(sin))
    assert_same_bits(rotated, reference.rope(x, cos, sin))


def gate_mul(isa, name, gate, up):
    y = empty(gate.size, np.float32)
    getattr(kernels, name)(isa, fenced(gate), fenced(up), y)
    return y


@pytest.mark.parametrize("n", SIZES)
def test_relu2_mul(isa, n, rng):
    gate, up = with_specials(rng, n), with_specials(rng, n)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = reference.relu2_mul(gate, up)
    assert_same_bits(gate_mul(isa, "relu2_mul", gate, up), expected)


@pytest.mark.parametrize("n", SIZES)
def test_silu_mul(isa, n, rng):
    gate, up = floats(rng, n) * np.float32(10), floats(rng, n)
    y = gate_mul(isa, "silu_mul", gate, up)
    np.testing.assert_allclose(y, reference.silu_mul(gate, up), rtol=SILU_RTOL, atol=SILU_ATOL)
    assert_same_bits(y, gate_mul("scalar", "silu_mul", gate, up))


def test_silu_mul_over_the_whole_range(isa):
    """Every sign and exponent of a gate, eight mantissas of each."""
    gate = np.arange(0, 2**32, 2**20, dtype=np.uint32).view(np.float32)
    y = gate_mul(isa, "silu_mul", gate, np.ones_like(gate))
    assert_same_bits(y, gate_mul("scalar", "silu_mul", gate, np.ones_like(gate)))
    tame = abs(gate) <= 1000
    ones = np.ones(tame.sum(), np.float32)
    np.testing.assert_allclose(y[tame], reference.silu_mul(gate[tame], ones), rtol=SILU_RTOL, atol=SILU_ATOL)
    assert np.isnan(y[np.isnan(gate)]).all()


@pytest.mark.parametrize("n", SIZES)
def test_add(isa, n, rng):
    x, y = with_specials(rng, n), with_specials(rng, n)
    total = fenced(x)
    kernels.add(isa, fenced(y), total)
    with np.errstate(over="ignore", invalid="ignore"):
        assert_same_bits(total, x + y)


@pytest.mark.parametrize("name", ["silu_mul", "relu2_mul"])
def test_outputs_may_be_inputs(isa, name, rng):
    gate, up = floats(rng, 1000), floats(rng, 1000)
    expected = gate_mul(isa, name, gate, up)
    for place in (0, 1):
        pair = [fenced(gate), fenced(up)]
        getattr(kernels, name)(isa, *pair, pair[place])
        assert_same_bits(pair[place], expected)


@pytest.mark.parametrize("n", [1, 3, 4, 9, 16, 38])
@pytest.mark.parametrize("k", [1, 16, 17, 100, 257, 1050])
@pytest.mark.parametrize("m", [1, 4, 6, 39, 101])
def test_dot_bf16(isa, n, k, m, rng):
    w_NK = reference.to_bf16(floats(rng, n * k)).reshape(n, k)
    x_MK = floats(rng, m * k).reshape(m, k)
    for scale in (1, 1e-39, 1e37):
        scaled_MK = x_MK * np.float32(scale)
        y_MN = empty((m, n), np.float32)
        kernels.dot_bf16(isa, fenced(w_NK), fenced(scaled_MK), y_MN)
        with np.errstate(over="ignore", invalid="ignore"):
            for y_N, x_K in zip(y_MN, scaled_MK, strict=True):
                assert_same_bits(y_N, quant.lane_sum(x_K * reference.from_bf16(w_NK))[:, 0])


# ---- Borders ----


def test_wrong_sizes_are_refused(isa):
    f = np.zeros(16, np.float32)
    i = np.zeros(16, np.int32)
    tile, x = np.zeros((4, 64), np.uint8), np.zeros((1, 16), np.int8)
    calls = [
        lambda: kernels.dot_tile(isa, "t81", tile, x, i[:1], np.zeros((1, 80), np.int32)),
        lambda: kernels.dot_tile(isa, "t80", tile[:3], x, i[:1], np.zeros((1, 80), np.int32)),
        lambda: kernels.dot_tile(isa, "t80", tile, x[:, :12], i[:1], np.zeros((1, 80), np.int32)),
        lambda: kernels.dot_tile(isa, "t80", tile, x, i[:2], np.zeros((1, 80), np.int32)),
        lambda: kernels.dot_tile(isa, "t80", tile, x, i[:1], np.zeros((1, 64), np.int32)),
        lambda: kernels.dot_pair(
            isa, np.zeros((2, 4, 64), np.uint8), x, i[:1], 32, np.zeros((2, 1, 16), np.int32)
        ),
        lambda: kernels.dot_pair(
            isa, np.zeros((2, 4, 64), np.uint8), x, i[:1], 16, np.zeros((1, 1, 16), np.int32)
        ),
        lambda: kernels.scale_sums(isa, i[None], None, f[:15], True, None, False, f[None]),
        lambda: kernels.scale_sums(isa, i[None], None, f, False, None, False, f[None]),
        lambda: kernels.scale_sums(isa, i[None], None, f, True, f[:2], False, f[None]),
        lambda: kernels.scale_sums(isa, i[None, :15], None, f, True, None, False, f[None]),
        lambda: kernels.scale_sums(isa, i[None], i[None, :15], f, True, None, False, f[None]),
        lambda: kernels.quantize_a8(isa, f, np.zeros(15, np.int8)),
        lambda: kernels.sum_codes(isa, np.zeros(15, np.int8)),
        lambda: kernels.rms_norm(isa, f, f[:3], 1e-5, f),
        lambda: kernels.rope(isa, np.zeros((1, 16), np.float32), f, f),
        lambda: kernels.silu_mul(isa, f, f[:8], f),
        lambda: kernels.add(isa, f, f[:8]),
        lambda: kernels.dot_bf16(isa, np.zeros((2, 15), np.uint16), f[None], f[None, :2]),
        lambda: kernels.dot_bf16(isa, np.zeros((2, 16), np.uint16), f[None], f[None, :1]),
        lambda: kernels.dot_bf16(isa, np.zeros((2, 16), np.uint16), f[None], f[:4].reshape(2, 2)),
        lambda: kernels.sum_codes(isa, np.zeros(0, np.int8)),
    ]
    for call in calls:
        with pytest.raises(ValueError):
            call()

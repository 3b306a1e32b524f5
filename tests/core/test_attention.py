"""Kernels of the key-value cache, on every instruction set. Kinds: exact (numbers, codes), invariant (equal bits)."""

import numpy as np
import pytest

from core import reference
from core.arrays import SPECIALS, assert_same_bits, empty, fenced, floats
from onebit._core import SPLIT_TOKENS, available_isas, kernels

FORMATS = ("bf16", "fp8")
HEAD_WIDTHS = (2, 24, 32, 48, 64, 128)
KEY_COUNTS = (1, 15, 63, 64, 65, 200, SPLIT_TOKENS)
DTYPES = {"bf16": np.uint16, "fp8": np.uint8}
ENCODE = {"bf16": reference.to_bf16, "fp8": reference.to_fp8}
NAN = {"bf16": 0x7FC0, "fp8": 0x7F}

# Sums of up to 512 float32 products, against float64, in units of the largest value.
ATTEND_ATOL = 2e-6
# exp is good to 1e-7; a weight is rounded to one of 16256 steps of the largest.
WEIGHT_RTOL = 1e-6
WEIGHT_STEP = 0.5 / 16256


@pytest.fixture(params=available_isas())
def isa(request):
    return request.param


@pytest.fixture
def rng():
    return np.random.default_rng(7)


# ---- Numbers ----


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("n", [1, 15, 16, 17, 100, 1000])
def test_to_cache_rounds_to_the_nearest(isa, kv_format, n, rng):
    bits = rng.integers(0, 2**32, n, np.uint32)
    # Half-way between two numbers of either format.
    bits[::3] = bits[::3] & 0xFFFF0000 | 0x8000
    bits[1::3] = bits[1::3] & 0xFFF00000 | 0x80000
    x = np.where(np.isnan(bits.view(np.float32)), np.float32(0), bits.view(np.float32))
    for values in (x, floats(rng, n), floats(rng, n) * np.float32(0.002)):
        y = empty(n, DTYPES[kv_format])
        kernels.to_cache(isa, kv_format, fenced(values), y)
        np.testing.assert_array_equal(y, ENCODE[kv_format](values))


def test_fp8_knows_all_its_numbers_and_the_middles_between_them(isa):
    values = reference.fp8_values()
    numbers = np.flatnonzero(~np.isnan(values))
    y = empty(len(numbers), np.uint8)
    kernels.to_cache(isa, "fp8", fenced(values[numbers]), y)
    np.testing.assert_array_equal(y, numbers)
    middles = (values[:0x7E] + values[1:0x7F]) / 2
    y = empty(len(middles), np.uint8)
    kernels.to_cache(isa, "fp8", fenced(middles), y)
    lower = np.arange(len(middles))
    np.testing.assert_array_equal(y, lower + lower % 2)


def test_to_bf16_keeps_nan_and_infinity(isa):
    bits = np.array(
        [0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800000, 0xFF800000, 0x7F7FFFFF], np.uint32
    )
    y = empty(bits.size, np.uint16)
    kernels.to_cache(isa, "bf16", fenced(bits.view(np.float32)), y)
    expected = np.array([0x7FC0, 0xFFC0, 0x7FFF, 0xFFFF, 0x7F80, 0xFF80, 0x7F80], np.uint16)
    np.testing.assert_array_equal(y, expected)


def test_fp8_ends_at_its_largest_number(isa):
    x = np.array([448, 464, 1e30, np.inf, np.nan, -448, -1e30, -np.inf], np.float32)
    y = empty(x.size, np.uint8)
    kernels.to_cache(isa, "fp8", fenced(x), y)
    np.testing.assert_array_equal(y, [0x7E] * 5 + [0xFE] * 3)


# ---- Floats ----


def cache(rng, n_keys, d, kv_format="bf16"):
    """Blocks of keys and values [2, keys, d]; what no number is where no key is."""
    n_blocks = -(-n_keys // reference.BLOCK_TOKENS)
    shape = 2, n_blocks * reference.BLOCK_TOKENS, d
    rows = np.full(shape, NAN[kv_format], DTYPES[kv_format])
    rows[:, :n_keys] = ENCODE[kv_format](floats(rng, 2 * n_keys * d)).reshape(2, n_keys, d)
    return rows


def attend(isa, kv_format, q, rows, n_keys, inv_sqrt_d):
    """m, l and o."""
    k, v = (
        [fenced(block) for block in side.reshape(-1, reference.BLOCK_TOKENS, q.shape[1])] for side in rows
    )
    m, l, o = empty(len(q), np.float32), empty(len(q), np.float32), empty(q.shape, np.float32)  # noqa: E741
    kernels.attend(isa, kv_format, fenced(q), inv_sqrt_d, k, v, n_keys, m, l, o)
    return m, l, o


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("d", HEAD_WIDTHS)
@pytest.mark.parametrize("n_keys", KEY_COUNTS)
def test_attend(isa, kv_format, d, n_keys, rng):
    rows = cache(rng, n_keys, d, kv_format)
    inv_sqrt_d = float(np.float32(1) / np.sqrt(np.float32(d)))
    k, v = (reference.from_numbers(side, kv_format) for side in rows[:, :n_keys])
    for heads in (1, 2, 3, 4, 5):
        q = floats(rng, heads * d).reshape(heads, d)
        found = attend(isa, kv_format, q, rows, n_keys, inv_sqrt_d)
        expected = reference.attend(q, k, v, inv_sqrt_d)
        np.testing.assert_allclose(
            found[2] / found[1][:, None] / abs(v).max(), expected / abs(v).max(), atol=ATTEND_ATOL
        )
        if isa != "scalar":
            for ours, plain in zip(
                found, attend("scalar", kv_format, q, rows, n_keys, inv_sqrt_d), strict=True
            ):
                assert_same_bits(ours, plain)
        for ours, alone in zip(found, attend(isa, kv_format, q[-1:], rows, n_keys, inv_sqrt_d), strict=True):
            assert_same_bits(ours[-1:], alone)


@pytest.mark.parametrize("special", [0x7F80, 0xFF80, 0x7FC0, 0x7F7F, 0xFF7F, 0x0001, 0x8000])
@pytest.mark.parametrize("side", ["k", "v"])
def test_attend_agrees_on_special_values(isa, side, special, rng):
    rows = cache(rng, 130, 32)
    rows["kv".index(side), [3, 70, 129], [0, 5, 31]] = special
    q = floats(rng, 3 * 32).reshape(3, 32)
    found, plain = (attend(name, "bf16", q, rows, 130, 0.25) for name in (isa, "scalar"))
    for a, b in zip(found, plain, strict=True):
        assert_same_bits(a, b)


def test_attend_skips_no_block_of_equal_scores(isa):
    """Zero queries weigh all keys alike: the mean of the values, exactly."""
    values = np.tile(np.array([1.0, 3.0], np.float32), 64).repeat(16).reshape(128, 16)
    rows = np.stack(
        [np.full((128, 16), 0x3F80, np.uint16), reference.to_bf16(values.ravel()).reshape(128, 16)]
    )
    m, l, o = attend(isa, "bf16", np.zeros((2, 16), np.float32), rows, 128, 0.25)  # noqa: E741
    np.testing.assert_array_equal(o / l[:, None], np.full((2, 16), 2.0, np.float32))
    np.testing.assert_array_equal(m, [0, 0])


@pytest.mark.parametrize("d", HEAD_WIDTHS)
def test_merge_splits(isa, d, rng):
    """Two halves of the keys, merged, are the whole."""
    rows, q = cache(rng, 128, d), floats(rng, 3 * d).reshape(3, d)
    for first, second in ((0, 64), (64, 0)):
        merged = [fenced(x) for x in attend(isa, "bf16", q, rows[:, first : first + 64], 64, 0.25)]
        part = attend(isa, "bf16", q, rows[:, second : second + 64], 64, 0.25)
        kernels.merge_splits(isa, *map(fenced, part), *merged)
        whole = attend(
            isa, "bf16", q, np.concatenate(np.split(rows, 2, 1)[:: 1 if first == 0 else -1], 1), 128, 0.25
        )
        for a, b in zip(merged, whole, strict=True):
            assert_same_bits(a, b)


# ---- int8 ----


def weigh(isa, hi, lo, k_scale, v_scale, q_scale, n, m=-np.inf, l=0.0):  # noqa: E741
    planes = empty(64, np.int8), empty(64, np.int8)
    scales = fenced(k_scale), fenced(v_scale)
    hi_sum, lo_sum, *rest = kernels.weigh_int8(
        isa, fenced(hi), fenced(lo), *scales, q_scale, n, *planes, m, l
    )
    assert (hi_sum, lo_sum) == tuple(int(plane.astype(int).sum()) for plane in planes)
    return planes, np.array(rest, np.float32)


def products(rng, tiles=4):
    hi = rng.integers(-2000, 2000, (tiles, 16), np.int32)
    return hi, rng.integers(-2000, 2000, (tiles, 16), np.int32)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 63, 64])
def test_weigh_int8(isa, n, rng):
    hi, lo = products(rng, -(-n // 16))
    k_scale, v_scale = (rng.random(64).astype(np.float32) * 0.01 + 0.001 for _ in range(2))
    # Scales of slots that hold no key are not looked at.
    v_scale[n:] = np.nan
    q_scale, m, l = np.float32(0.003), np.float32(0.5), np.float32(3.0)  # noqa: E741
    planes, (scale, keep, take, new_m, new_l) = weigh(isa, hi, lo, k_scale, v_scale, q_scale, n, m, l)

    score = (hi.astype(np.float64) * 128 + lo).ravel()[:n] * k_scale[:n] * q_scale
    p = np.exp(score - score.max())
    largest = max(score.max(), m)
    factors = np.exp(m - largest), np.exp(score.max() - largest)
    np.testing.assert_allclose([keep, take, new_m], [*factors, largest], rtol=1e-5)
    np.testing.assert_allclose(new_l, l * factors[0] + p.sum() * factors[1], rtol=1e-5)
    weights = p * v_scale[:n]
    codes = planes[0].astype(np.int64) * 128 + planes[1]
    np.testing.assert_array_equal(codes[n:], 0)
    np.testing.assert_allclose(
        codes[:n] * scale, weights, rtol=WEIGHT_RTOL, atol=(WEIGHT_STEP + WEIGHT_RTOL) * weights.max()
    )
    assert codes.max() == 16256

    same, rest = weigh("scalar", hi, lo, k_scale, v_scale, q_scale, n, m, l)
    np.testing.assert_array_equal(planes, same)
    assert_same_bits(np.array([scale, keep, take, new_m, new_l], np.float32), rest)


@pytest.mark.parametrize("special", SPECIALS)
@pytest.mark.parametrize("where", ["k_scale", "v_scale", "m", "l"])
def test_weigh_int8_agrees_on_special_values(isa, special, where, rng):
    hi, lo = products(rng)
    values = {
        "k_scale": np.full(64, 0.01, np.float32),
        "v_scale": np.full(64, 0.02, np.float32),
        "m": 0.5,
        "l": 3.0,
    }
    if where.endswith("scale"):
        # Scales are magnitudes.
        values[where][11] = abs(special)
    else:
        values[where] = float(special)
    found, plain = (weigh(name, hi, lo, q_scale=0.001, n=50, **values) for name in (isa, "scalar"))
    np.testing.assert_array_equal(found[0], plain[0])
    assert_same_bits(found[1], plain[1])


@pytest.mark.parametrize("d", HEAD_WIDTHS)
def test_mix_int8(isa, d, rng):
    hi, lo = products(rng, -(-d // 16))
    before = floats(rng, d)
    scale, keep, take = np.float32(0.01), np.float32(0.25), np.float32(0.75)
    o = fenced(before)
    kernels.mix_int8(isa, fenced(hi), fenced(lo), scale, keep, take, o)
    value = (hi * 128 + lo).ravel()[:d].astype(np.float32) * scale
    assert_same_bits(o, before * keep + value * take)


# ---- Borders ----


def test_wrong_sizes_are_refused(isa):
    f, i, c = np.zeros(16, np.float32), np.zeros((4, 16), np.int32), np.zeros(64, np.int8)
    wide = np.zeros(64, np.float32)
    block, one, o = np.zeros((64, 16), np.uint16), f[:1], np.zeros((1, 16), np.float32)
    calls = [
        lambda: kernels.to_cache(isa, "bf16", f, np.zeros(8, np.uint16)),
        lambda: kernels.to_cache(isa, "bf16", f, np.zeros(16, np.uint8)),
        lambda: kernels.to_cache(isa, "fp8", f, np.zeros(16, np.uint16)),
        lambda: kernels.to_cache(isa, "int8", f, np.zeros(16, np.uint8)),
        lambda: kernels.attend(isa, "bf16", f[None], 1.0, [block], [block], 65, one, one, o),
        lambda: kernels.attend(isa, "bf16", f[None], 1.0, [block], [], 1, one, one, o),
        lambda: kernels.attend(isa, "bf16", f[None], 1.0, [block[:5]], [block], 1, one, one, o),
        lambda: kernels.attend(isa, "bf16", f[None], 1.0, [block] * 9, [block] * 9, 1, one, one, o),
        lambda: kernels.attend(isa, "bf16", f[None], 1.0, [block], [block], 1, f, one, o),
        lambda: kernels.attend(isa, "fp8", f[None], 1.0, [block], [block], 1, one, one, o),
        lambda: kernels.merge_splits(isa, one, one, o, f, one, o),
        lambda: kernels.merge_splits(isa, one, one, o[:, :8], one, one, o),
        lambda: kernels.weigh_int8(isa, i[:1], i[:1], wide, wide, 1.0, 17, c, c, 0.0, 0.0),
        lambda: kernels.weigh_int8(isa, i, i, wide, wide, 1.0, 65, c, c, 0.0, 0.0),
        lambda: kernels.weigh_int8(isa, i, i, f, wide, 1.0, 1, c, c, 0.0, 0.0),
        lambda: kernels.weigh_int8(isa, i, i, wide, wide, 1.0, 1, c, c[:63], 0.0, 0.0),
        lambda: kernels.mix_int8(isa, i, i[:2], 1.0, 1.0, 1.0, f),
        lambda: kernels.mix_int8(isa, i[:1], i[:1], 1.0, 1.0, 1.0, wide),
    ]
    for call in calls:
        with pytest.raises(ValueError):
            call()

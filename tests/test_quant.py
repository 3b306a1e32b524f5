"""Quantisers. Kinds: exact (hand-computed values, numpy == torch to the bit), invariant (hypothesis)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from onebit import quant

F = np.float32
ACTIVATIONS = quant.INPUT_QUANTIZERS
GRANULARITIES = ["tensor", "row", 4]

floats = st.floats(-100, 100, width=32, allow_subnormal=False)
matrices = arrays(F, st.tuples(st.integers(1, 6), st.sampled_from([4, 8, 20])), elements=floats)
rows = arrays(F, st.tuples(st.integers(1, 4), st.integers(1, 70)), elements=floats)


def f32(*values: float) -> np.ndarray:
    return np.array(values, F)


def test_ternary_by_hand():
    w = np.array([[0.4, -2.0, 1.0, 0.6]], F)  # the mean magnitude is 1
    codes, scale = quant.quantize_ternary(w)
    assert scale.shape == (1,) and scale[0] == F(1)
    assert codes.tolist() == [[0, -1, 1, 1]]


def test_ternary_ties_round_to_even():
    w = np.array([[0.5, -0.5, 1.5, 1.5]], F)  # mean 1: 0.5 -> 0, 1.5 -> 2 -> clipped to 1
    codes, _ = quant.quantize_ternary(w)
    assert codes.tolist() == [[0, 0, 1, 1]]


def test_binary_by_hand():
    w = np.array([[3.0, 1.0, 2.0, 2.0]], F)  # a weight equal to the mean becomes -1
    codes, scale = quant.quantize_binary(w)
    assert codes.tolist() == [[1, -1, -1, -1]] and scale.tolist() == [2.0]


@pytest.mark.parametrize(("granularity", "shape"), [("tensor", (1,)), ("row", (2,)), (4, (2, 2))])
def test_scale_shape_and_values_per_granularity(granularity, shape):
    w = np.array([[1, 1, 1, 1, 3, 3, 3, 3], [5, 5, 5, 5, 7, 7, 7, 7]], F)
    for quantize in (quant.quantize_ternary, quant.quantize_binary):
        _, scale = quantize(w, granularity)
        assert scale.shape == shape and scale.dtype == F
    expected = {"tensor": [4.0], "row": [2.0, 6.0], 4: [1.0, 3.0, 5.0, 7.0]}
    assert quant.quantize_ternary(w, granularity)[1].ravel().tolist() == expected[granularity]


def test_a8_by_hand():
    codes, scale = quant.quantize_a8(np.array([[127.0, -127.0, 0.5, 1.5, -2.5]], F))
    assert codes.tolist() == [[127, -127, 0, 2, -2]] and scale.tolist() == [[1.0]]


def test_a8_half_by_hand():
    # Of five values the two largest stay, and what equals the smaller of them.
    codes, scale = quant.quantize_a8_half(f32(127, 1, -2, 50, 0.5)[None])
    assert codes.tolist() == [[127, 0, 0, 50, 0]] and scale.tolist() == [[1.0]]
    codes, _ = quant.quantize_a8_half(f32(127, -3, 3, 2)[None])
    assert codes.tolist() == [[127, -3, 3, 0]]


def test_a4_by_hand():
    # The mean magnitude is 1, so codes = round(x * sqrt(7)): 2.646 -> 3, 5.29 -> 5; and +-8 clip at -8, 7.
    codes, scale = quant.quantize_a4(f32(1, -1, 2, 0)[None])
    assert codes.tolist() == [[3, -3, 5, 0]]
    assert scale[0, 0] == F(1) / F(quant.A4_LEVELS)
    far = np.zeros((1, 32), F)
    far[0, :2] = 16, -16
    assert quant.quantize_a4(far)[0][0, :2].tolist() == [7, -8]


def test_a1_by_hand():
    codes, scale = quant.quantize_a1(f32(3, -1, 0, 0)[None])
    assert codes.tolist() == [[1, -1, -1, -1]] and scale.tolist() == [[1.0]]


def test_a15_splits_into_two_signed_bytes():
    x = np.linspace(-1, 1, 40001, dtype=F)[None]
    codes = quant.quantize_a15(x)[0].astype(np.int64)
    assert codes.min() == -16256 and codes.max() == 16256
    high = (codes + 64) >> 7
    low = codes - 128 * high
    assert abs(high).max() <= 127 and low.min() >= -64 and low.max() <= 63
    assert np.array_equal(np.unique(codes), np.arange(-16256, 16257))


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_reach_their_largest_code(bits):
    top = 2 ** (bits - 1) - 1
    w = np.array([[1.0, -0.5, 0.25], [0.0, 0.0, 0.0], [-3.0, 0.0, 0.0]], F)
    codes, scale = quant.quantize_rows(w, bits)
    assert codes[0, 0] == top and codes[2, 0] == -top and not codes[1].any()
    assert scale.tolist() == [F(1) / F(top), F(quant.EPSILON) / F(top), F(3) / F(top)]


def test_zero_weights_stay_zero_with_a_positive_scale():
    zeros = np.zeros((2, 8), F)
    codes, scale = quant.quantize_ternary(zeros)
    assert not codes.any() and scale[0] == F(1e-5)
    for quantize in (quant.quantize_a8, quant.quantize_a4, quant.quantize_a15):
        codes, scale = quantize(zeros)
        assert not codes.any() and (scale > 0).all()


@given(matrices, st.sampled_from(GRANULARITIES))
def test_ternary_error_is_half_a_scale_where_it_does_not_clip(w, granularity):
    codes, scale = quant.quantize_ternary(w, granularity)
    assert set(np.unique(codes)) <= {-1, 0, 1}
    spread = quant.dequantize(np.ones_like(w), scale).astype(np.float64)
    error = abs(w - codes * spread)
    inside = abs(w) <= 1.5 * spread
    # A hair above one half: w / scale is itself rounded to float32.
    assert (error[inside] <= 0.5 * spread[inside] * (1 + 1e-6)).all()
    assert (codes[~inside] == np.sign(w[~inside])).all()


@given(matrices, st.sampled_from(GRANULARITIES))
def test_codes_are_stable_under_requantisation_with_their_scale(w, granularity):
    codes, scale = quant.quantize_ternary(w, granularity)
    dense = quant.dequantize(codes, scale)
    assert np.array_equal(np.clip(np.rint(dense / quant.dequantize(np.ones_like(w), scale)), -1, 1), codes)
    binary, scale = quant.quantize_binary(w, granularity)
    assert set(np.unique(binary)) <= {-1, 1}
    assert np.array_equal(np.sign(quant.dequantize(binary, scale)), binary)


@given(matrices, st.sampled_from(["row", 4]))
def test_rows_and_groups_do_not_see_each_other(w, granularity):
    for quantize in (quant.quantize_ternary, quant.quantize_binary):
        codes, scale = quantize(w, granularity)
        for i, row in enumerate(w):
            alone, alone_scale = quantize(row[None], granularity)
            assert np.array_equal(alone[0], codes[i]) and np.array_equal(alone_scale[0], scale[i])


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
@given(rows)
def test_activation_codes_are_whole_and_bounded(name, x):
    codes, scale = ACTIVATIONS[name](x)
    low, high = {
        "a8": (-127, 127),
        "a8-half": (-127, 127),
        "a4": (-8, 7),
        "a1": (-1, 1),
        "a15": (-16256, 16256),
    }[name]
    assert np.array_equal(codes, np.rint(codes)) and codes.min() >= low and codes.max() <= high
    assert scale.shape == (len(x), 1) and scale.dtype == F and (scale > 0).all()
    if name in ("a8", "a15"):
        assert (
            abs(x - codes.astype(np.float64) * scale) <= 0.5001 * scale.astype(np.float64) + 1e-6 * abs(x)
        ).all()


@pytest.mark.parametrize("n", [1, 7, 15, 16, 17, 40, 64])
def test_lane_sum_follows_its_order(n):
    x = np.random.default_rng(n).standard_normal(n).astype(F)
    lanes = [F(0)] * 16
    for i, value in enumerate(x):
        lanes[i % 16] = F(lanes[i % 16] + value)
    for width in (8, 4, 2, 1):
        lanes = [F(lanes[i] + lanes[i + width]) for i in range(width)]
    assert quant.lane_sum(x[None])[0, 0] == lanes[0]


def test_dequantize_spreads_each_scale():
    codes = np.array([[1, -1, 1, 0]], F)
    assert quant.dequantize(codes, f32(2)).tolist() == [[2, -2, 2, 0]]
    assert quant.dequantize(codes, np.array([[2, 3]], F)).tolist() == [[2, -2, 3, 0]]


def test_wrong_arguments_are_refused():
    w = np.ones((2, 6), F)
    with pytest.raises(ValueError, match="group size 4 does not divide the 6 inputs"):
        quant.quantize_ternary(w, 4)
    for bad in ("column", 0, -1, 2.0):
        with pytest.raises(ValueError, match="scale granularity"):
            quant.quantize_binary(w, bad)
    with pytest.raises(ValueError, match="16-bit rows"):
        quant.quantize_rows(w, 16)
    with pytest.raises(ValueError, match="weight scheme 'b2'"):
        quant.quantize_weights(w, "b2", "tensor")


class TestTorchEqualsNumpy:
    """Training sees the very bits that packing sees."""

    @pytest.fixture(autouse=True)
    def torch(self):
        self.torch = pytest.importorskip("torch")

    def both(self, function, x, *args):
        for ours, theirs in zip(function(x, *args), function(self.torch.from_numpy(x), *args), strict=True):
            assert np.array_equal(ours, theirs.numpy()) and ours.shape == tuple(theirs.shape)
            # As unsigned words: also the sign of zero is the same.
            assert np.array_equal(ours.view(np.uint32), theirs.numpy().view(np.uint32))

    @pytest.mark.parametrize("granularity", ["tensor", "row", 16])
    @pytest.mark.parametrize("size", [1e-8, 1e-3, 1.0, 1e4])
    def test_weights(self, granularity, size):
        w = (np.random.default_rng(3).standard_normal((33, 48)) * size).astype(F)
        w[3] = 0
        self.both(quant.quantize_ternary, w, granularity)
        self.both(quant.quantize_binary, w, granularity)
        self.both(quant.quantize_rows, w, 8)
        self.both(quant.quantize_rows, w, 4)

    @pytest.mark.parametrize("name", sorted(ACTIVATIONS))
    @pytest.mark.parametrize("n", [1, 13, 16, 100])
    def test_activations(self, name, n):
        x = np.random.default_rng(n).standard_normal((50, n)).astype(F)
        x[7] = 0
        self.both(ACTIVATIONS[name], x)

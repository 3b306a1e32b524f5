"""Oracle: numpy's float64 sine and cosine."""

import numpy as np
import pytest

from onebit import _core


def test_sine_and_cosine_equal_numpy():
    rng = np.random.default_rng(0)
    positions = np.concatenate([np.arange(600), rng.integers(0, 2**24, 400)]).astype(np.float64)
    inv_freq = np.float32(10000.0) ** -rng.random(len(positions), np.float32)
    # Multiples of pi / 2 are where a reduction loses digits.
    x = np.concatenate(
        [positions, positions * inv_freq.astype(np.float64), np.arange(1, 2**20, 997) * (np.pi / 2)]
    )
    ours = np.array([_core.sincos(value) for value in x])
    assert abs(ours - np.stack([np.sin(x), np.cos(x)], axis=1)).max() < 1e-15


@pytest.mark.parametrize("x", [-1.0, 2.0**24, float("nan"), float("inf")])
def test_values_outside_the_reduction_are_refused(x):
    with pytest.raises(ValueError, match="expected 0 to 2"):
        _core.sincos(x)

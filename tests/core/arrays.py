"""Arrays for kernels: they end where unreadable memory begins, and hold what is awkward."""

import ctypes
import mmap
import sys

import numpy as np

TINY = [1e-45, -1e-40, 1.1754944e-38, 1e-5]
EXP_EDGES = [87.5, -87.5, 88.5, -88.5, 104.0, -104.0]
HUGE = [1e30, -1e30, 3.4028235e38, -3.4028235e38, np.inf, -np.inf, np.nan]
# A NaN with payload bits, which must not leak into codes.
NAN = np.array([0x7FC12345], np.uint32).view(np.float32)
SPECIALS = np.array([0.0, -0.0, 0.5, -0.5, 1.5, 2.5, *TINY, *EXP_EDGES, *HUGE], np.float32)
SPECIALS = np.concatenate([SPECIALS, NAN])


def fenced(array):
    """A copy whose last byte is followed by a page that nobody may touch."""
    array = np.ascontiguousarray(array)
    if sys.platform != "linux":
        return array.copy()
    page = mmap.PAGESIZE
    size = -(-array.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    anchor = ctypes.c_char.from_buffer(memory)
    forbidden = ctypes.c_void_p(ctypes.addressof(anchor) + size)
    assert ctypes.CDLL(None).mprotect(forbidden, ctypes.c_size_t(page), 0) == 0
    copy = np.frombuffer(memory, array.dtype, array.size, size - array.nbytes).reshape(array.shape)
    copy[...] = array
    return copy


def empty(shape, dtype):
    """Fenced memory for an output, filled with a pattern that no kernel leaves behind by luck."""
    out = fenced(np.zeros(shape, dtype))
    out.view(np.uint8)[...] = 0xA5
    return out


def floats(rng, n):
    return rng.standard_normal(n).astype(np.float32) * np.float32(3)


def with_specials(rng, n):
    """Random values, about half of them special: all of SPECIALS where there is room."""
    x = floats(rng, n)
    at = rng.permutation(n)[: SPECIALS.size]
    x[at] = rng.permutation(SPECIALS)[: at.size]
    return x


def assert_same_bits(actual, expected):
    """Equal bits, zeros' signs included; any NaN equals any NaN."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    is_nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), is_nan)
    bits = np.uint32 if actual.dtype == np.float32 else actual.dtype
    np.testing.assert_array_equal(actual.view(bits)[~is_nan], expected.view(bits)[~is_nan])

"""Limits of the machine are measured with loops that do what they say. Kind: invariant."""

import shutil

import limits
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="the loops are compiled where they run")


@pytest.mark.parametrize(("streams", "ahead"), limits.READERS)
def test_a_reader_reads_every_byte(streams, ahead):
    name = "read_4_streams" if streams == 4 else "read_1_stream"
    read = getattr(limits.library(), name)
    read.restype = np.ctypeslib.ctypes.c_uint64
    data = np.random.default_rng(0).integers(0, 2**63, 16 * 8 * 5, np.uint64)
    got = read(data.ctypes.data, data.nbytes // 64, ahead // 64)
    assert got == np.bitwise_xor.reduce(data)


def test_twice_the_threads_read_the_same_array():
    data = np.ones(2**16)
    for threads in (1, 2):
        assert limits.bandwidth(data, threads, 4, 0, seconds=0) > 0


def test_peaks_are_positive_where_the_instruction_exists():
    exists = limits.dot_name() != "none"
    assert (limits.peak("dot", 1, 0.01) > 0) == exists
    assert limits.peak("amx", 1, 0.01) >= 0

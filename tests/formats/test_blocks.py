"""Types of GGUF. Kinds: oracle (the gguf package, ggml's own C code), golden (blocks worked out by hand), exact."""

import ctypes
from pathlib import Path

import numpy as np
import pytest

from onebit.formats.gguf.blocks import BLOCKS, SCHEMES, candidates, decode, join, split

# Those with a Python reference; Q1_0 and Q2_0 are judged by ggml's C code, I2_S and Q2_0_128 by hand.
IN_PYTHON = [name for name in BLOCKS if name not in ("F32", "F16", "I2_S", "Q1_0", "Q2_0", "Q2_0_128")]
IN_C = [name for name in BLOCKS if name not in ("I2_S", "Q2_0_128")]
TERNARY = [name for name, scheme in SCHEMES.items() if scheme == "b1.58"]

# Where the float16 scales of a block begin.
SCALES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "TQ1_0": [52], "TQ2_0": [64], "Q1_0": [0], "Q2_0": [0],
    "Q2_0_128": [0],
}  # fmt: skip


def random_blocks(name: str, n: int = 600, seed: int = 0) -> np.ndarray:
    """Random bytes, every value among them, with finite scales and without the digit 3."""
    block, rng = BLOCKS[name], np.random.default_rng(seed)
    data = rng.integers(0, 256, (n, block.n_bytes)).astype(np.uint8)
    data[:256] = np.arange(256)[:, None]
    if name in ("TQ2_0", "Q2_0", "Q2_0_128", "I2_S"):
        data &= ~(data >> 1 & data & 0x55).astype(np.uint8)
    for at in SCALES.get(name, []):
        scale = (rng.standard_normal(n) * np.exp2(rng.integers(-20, 8, n))).astype("<f2")
        data[:, at : at + 2] = scale.view(np.uint8).reshape(-1, 2)
    if name in ("F32", "F16", "BF16"):
        data[:, -1] &= 0xBF
    return data


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    """The library in which llama.cpp keeps its reference functions."""
    import llama_cpp

    (path,) = (Path(llama_cpp.__file__).parent / "lib").glob("*ggml-base.*[!0-9]")
    library = ctypes.CDLL(str(path))
    library.ggml_type_size.restype = ctypes.c_size_t
    library.ggml_blck_size.restype = ctypes.c_int64
    return library


@pytest.mark.parametrize("name", IN_PYTHON)
def test_numbers_are_those_of_the_gguf_package(name):
    from gguf import GGMLQuantizationType, quants

    data = random_blocks(name)
    theirs = quants.dequantize(data, GGMLQuantizationType[name])
    assert decode(data, BLOCKS[name]).view(np.uint32).tolist() == theirs.view(np.uint32).tolist()


@pytest.mark.parametrize("name", [name for name in IN_C if name not in ("F32", "F16", "BF16")])
def test_numbers_are_those_of_ggml(name, ggml):
    block, data = BLOCKS[name], random_blocks(name)
    assert ggml.ggml_type_size(block.number) == block.n_bytes
    assert ggml.ggml_blck_size(block.number) == block.weights
    theirs = np.empty((len(data), block.weights), np.float32)
    function = getattr(ggml, f"dequantize_row_{name.replace('TQ', 'tq').replace('Q', 'q')}")
    function(data.ctypes.data_as(ctypes.c_void_p), theirs.ctypes.data_as(ctypes.c_void_p),
             ctypes.c_int64(theirs.size))  # fmt: skip
    ours = decode(data, block)
    # A compiler may fuse a multiplication with the addition that follows.
    if name in ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"):
        assert np.allclose(ours, theirs, rtol=2e-6, atol=2e-6)
    else:
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0"])
def test_codes_become_the_bytes_of_the_gguf_package(name):
    from gguf import GGMLQuantizationType, quants

    rng = np.random.default_rng(1)
    codes = rng.integers(-1, 2, (300, 256)).astype(np.int8)
    scale = np.exp2(rng.uniform(-12, 4, 300)).astype(np.float16).astype(np.float32)
    data = join(codes, scale, BLOCKS[name])
    theirs = quants.quantize(codes * scale[:, None], GGMLQuantizationType[name])
    assert data.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0", "Q1_0", "Q2_0"])
def test_codes_become_the_bytes_of_ggml(name, ggml):
    block, rng = BLOCKS[name], np.random.default_rng(2)
    codes = rng.integers(-1, 2, (300, block.weights)).astype(np.int8)
    codes = codes | 1 if name == "Q1_0" else codes
    scale = np.exp2(rng.uniform(-12, 4, 300)).astype(np.float16).astype(np.float32)
    w = codes * scale[:, None]
    theirs = np.empty((300, block.n_bytes), np.uint8)
    function = getattr(ggml, f"quantize_row_{name.lower()}_ref")
    function(w.ctypes.data_as(ctypes.c_void_p), theirs.ctypes.data_as(ctypes.c_void_p),
             ctypes.c_int64(w.size))  # fmt: skip
    assert join(codes, scale, block).tobytes() == theirs.tobytes()


@pytest.mark.parametrize("name", SCHEMES)
def test_codes_there_and_back(name):
    block, rng = BLOCKS[name], np.random.default_rng(3)
    codes = rng.integers(-1, 2, (50, block.weights)).astype(np.int8)
    codes = codes | 1 if name == "Q1_0" else codes
    scale = np.float32(1) + np.arange(50, dtype=np.float32)
    data = join(codes, scale, block)
    assert data.shape == (50, block.n_bytes)
    found, d = split(data, block)
    assert np.array_equal(found, codes) and (name == "I2_S" or np.array_equal(d, scale))
    assert np.array_equal(decode(data, block), found * d[:, None])


def test_golden_i2_s():
    # Values p, 32 + p, 64 + p and 96 + p share byte p, the first in the upper two bits.
    codes = np.zeros((1, 128), np.int8)
    codes[0, [0, 32, 64, 96]] = 1, -1, 0, 1
    codes[0, [31, 63, 95, 127]] = -1, 1, 1, -1
    data = join(codes, np.ones(1, np.float32), BLOCKS["I2_S"])
    assert data[0].tolist() == [0b10_00_01_10, *[0b01_01_01_01] * 30, 0b00_10_10_00]


def test_golden_q1_0():
    # Half of 1 is 0x3800; the lowest bit comes first.
    codes = np.full((1, 128), -1, np.int8)
    codes[0, [0, 9, 127]] = 1
    data = join(codes, np.full(1, 0.5, np.float32), BLOCKS["Q1_0"])
    assert data[0].tolist() == [0x00, 0x38, 0b00000001, 0b00000010, *[0] * 13, 0b10000000]


@pytest.mark.parametrize(("name", "n"), [("Q2_0", 64), ("Q2_0_128", 128)])
def test_golden_q2_0(name, n):
    codes = np.zeros((1, n), np.int8)
    codes[0, :5] = -1, 0, 1, 1, -1
    data = join(codes, np.full(1, 2, np.float32), BLOCKS[name])
    assert data[0].tolist() == [0x00, 0x40, 0b10_10_01_00, 0b01_01_01_00, *[0b01_01_01_01] * (n // 4 - 2)]


@pytest.mark.parametrize("name", [name for name in TERNARY if name != "TQ1_0"])
def test_the_digit_3_is_refused(name):
    block = BLOCKS[name]
    codes = np.zeros((3, block.weights), np.int8)
    codes[2, 17] = 2
    data = join(codes, np.ones(3, np.float32), block)
    with pytest.raises(ValueError, match=rf"weight {(2 + 5) * block.weights + 17} has the code 3"):
        split(data, block, first=5)


@pytest.mark.parametrize("scale", [0.0, 1e-9, 70000.0, np.inf, np.nan])
def test_a_scale_outside_of_float16_is_refused(scale):
    with pytest.raises(ValueError, match="outside of float16"):
        join(np.zeros((1, 256), np.int8), np.array([scale], np.float32), BLOCKS["TQ2_0"])


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (38, "TL1"),
        (39, "TL2"),
        (16, "IQ2_XXS"),
        (134, "IQ1_BN"),
        (142, "PQ2_0"),
        (335, "IQ2_BN_R4"),
        (77, "unknown"),
    ],
)
def test_other_types_are_refused_by_name(number, words):
    with pytest.raises(
        ValueError, match=rf"type {number} \(.*{words}.*convert the original Hugging Face folder"
    ):
        candidates(number)

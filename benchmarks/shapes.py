"""Synthetic models of real shapes, to measure speed without anybody's weights: packed .onebit files of random codes.

    python benchmarks/shapes.py 2b4t 2b4t.onebit --encoding r64

Bytes are drawn as the packed file holds them, so the largest shape needs no more memory than its file. Speed does
not depend on the values, with one exception that is kept real: 40 % of the codes are zeros, as trained models have.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from onebit.checkpoint import LINEAR_ENCODINGS, ROW_ENCODING, Checkpoint, granularity, scale_shape
from onebit.config import ModelConfig
from onebit.formats import native
from onebit.packing import TILE_ROWS, PackedTensor, UInt8, pack, packed_shape, unpack

# Real widths; the context is longer than some of these models were trained for, to measure long ones.
CONTEXT = 32768
SHAPES = {
    # microsoft/bitnet-b1.58-2B-4T
    "2b4t": ModelConfig(
        128256, 2560, 30, 20, 5, 128, 6912, max_seq_len=CONTEXT, rope_theta=500000.0, activation="relu2"
    ),
    # 1bitLLM/bitnet_b1_58-large
    "large": ModelConfig(32002, 1536, 24, 16, 16, 96, 4096, max_seq_len=CONTEXT, activation="silu"),
    # HF1BitLLM/Llama3-8B-1.58
    "8b": ModelConfig(
        128256, 4096, 32, 32, 8, 128, 14336, max_seq_len=CONTEXT, rope_theta=500000.0, activation="silu",
        sub_norm=False, tied_head=False,
    ),
    # The smallest model of the BitNet papers.
    "125m": ModelConfig(32002, 768, 12, 12, 12, 64, 3072, max_seq_len=CONTEXT, activation="silu"),
}  # fmt: skip

ZEROS = 0.4
TILE_INPUTS = 4096  # 65536 bytes in each layout


def synthetic(config: ModelConfig, encoding: str = "t80", seed: int = 0) -> Checkpoint:
    """A packed model of random codes: 40 % zeros in ternary layers, Gaussian rows in embedding and head.

    Args:
        config: the shape, all widths multiples of 16; its weights scheme becomes that of the encoding.
        encoding: layout of the linear layers, "t80", "r64" or "b128".
        seed: of all random draws.
    """
    config = replace(config, weights="b1" if encoding == "b128" else "b1.58")
    rng = np.random.default_rng(seed)
    pools = {name: _pool(name, rng) for name in (encoding, ROW_ENCODING)}
    tensors: dict[str, np.ndarray | PackedTensor] = {}
    for name, shape in config.tensor_shapes().items():
        if len(shape) == 1:
            tensors[name] = np.ones(shape, np.float32)
            continue
        layout = encoding if config.is_linear(name) else ROW_ENCODING
        data = pools[layout][rng.integers(0, 2**16, packed_shape(layout, shape), np.uint16)]
        # Rows that only pad the last tile hold zeros.
        last = shape[0] - (len(data) - 1) * TILE_ROWS[layout]
        data[-1:] = pack(unpack(data[-1:], layout, (last, shape[1])), layout)
        # Outputs of a layer as large as its inputs, logits of about 1.
        scale = (shape[1] * (1 - ZEROS)) ** -0.5 if config.is_linear(name) else 4 / 127 * shape[1] ** -0.5
        scales = np.full(scale_shape(shape, granularity(name, config, layout)), scale, np.float32)
        tensors[name] = PackedTensor(layout, shape, data, scales)
    return Checkpoint(config, tensors, provenance={"synthetic": {"seed": seed, "zeros": ZEROS}})


def _pool(encoding: str, rng: np.random.Generator) -> UInt8:
    """The 65536 bytes of one packed tile, to draw from: random codes in the shares that real weights have."""
    shape = TILE_ROWS[encoding], TILE_INPUTS
    if encoding == ROW_ENCODING:
        codes = np.clip(np.rint(rng.standard_normal(shape) * 127 / 4), -127, 127)
    elif encoding == "b128":
        codes = rng.choice([-1, 1], shape)
    else:
        codes = rng.choice([-1, 0, 1], shape, p=[(1 - ZEROS) / 2, ZEROS, (1 - ZEROS) / 2])
    return pack(codes.astype(np.int8), encoding).reshape(-1)


def main() -> None:
    """Write one file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("path", type=Path, help="the .onebit file to make or to replace")
    encodings = [encoding for names in LINEAR_ENCODINGS.values() for encoding in names]
    parser.add_argument("--encoding", choices=encodings, default=encodings[0], help="of the linear layers")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    begun_s = time.perf_counter()
    checkpoint = synthetic(SHAPES[arguments.shape], arguments.encoding, arguments.seed)
    native.write(checkpoint, arguments.path)
    megabytes, seconds = arguments.path.stat().st_size / 1e6, time.perf_counter() - begun_s
    print(f"{arguments.path}: {megabytes:,.1f} MB, {checkpoint.label}, in {seconds:.1f} s")


if __name__ == "__main__":
    main()

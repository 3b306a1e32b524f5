"""Tensors of a GGUF file: their rows, codes and scales in our order, and the bytes of ours in theirs.

source = Source(path, "blk.0.attn_q.weight", place, factor, heads)
source.rows(0, 64), source.codes("tensor")
pieces("layers.0.q.weight", tensor, config, BLOCKS["TQ2_0"], heads)     # bytes, one chunk after the other
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onebit import quant
from onebit.checkpoint import Stored, Tensor, codes, rows
from onebit.config import ModelConfig
from onebit.formats.files import Buffer, read_bytes
from onebit.formats.floats import encode
from onebit.formats.gguf import blocks
from onebit.formats.gguf.blocks import SCHEMES, Block
from onebit.formats.gguf.container import Place
from onebit.formats.rotary import join_pairs, split_pairs, whole_heads
from onebit.formats.tensors import named, raw
from onebit.packing import Float32, Int8, UInt8

# Weights that are handled at once: copies stay small.
_CHUNK = 2**20


@dataclass(frozen=True)
class Source:
    """A tensor in a file.

    Args:
        path: the file.
        name: what it is called there.
        place: where it is.
        factor: multiplies all numbers.
        heads: how many heads its rows are, where their pairs are neighbours; else None.
    """

    path: Path
    name: str
    place: Place
    factor: np.float32
    heads: int | None

    @property
    def block(self) -> Block:
        """The type."""
        return self.place.block

    @property
    def row_blocks(self) -> int:
        """Blocks of a row."""
        return math.prod(self.place.shape[1:]) // self.block.weights

    def stored(self, granularity: quant.Granularity | None) -> Stored:
        """The tensor as a checkpoint has it.

        Args:
            granularity: weights that share a scale, where it gives codes; None if it gives none.
        """

        def read_rows(begin: int, end: int) -> Float32:
            with named(self.path):
                return self.rows(begin, end)

        def read_codes() -> tuple[Int8, Float32]:
            assert granularity is not None
            with named(self.path):
                return self.codes(granularity)

        place = self.place
        has_codes = granularity is not None
        return Stored(
            place.shape, place.block.name, place.n_bytes, read_rows, read_codes if has_codes else None
        )

    def rows(self, begin: int, end: int) -> Float32:
        """Some rows as numbers.

        Returns:
            float32 [rows, k], or [rows] of a vector.

        Raises:
            ValueError: a damaged file.
        """
        # Rows of a head are mixed, so whole heads are read.
        unit = self.place.shape[0] // self.heads if self.heads else 1
        first, last = whole_heads(begin, end, unit)
        values = np.empty((last - first, *self.place.shape[1:]), np.float32)
        for start, stop, data in self._chunks(first, last):
            made = self._numbers(data, start).reshape(stop - start, *self.place.shape[1:])
            values[start - first : stop - first] = made
        return split_pairs(values, unit)[begin - first : end - first]

    def codes(self, granularity: quant.Granularity) -> tuple[Int8, Float32]:
        """Weight codes and scales.

        Args:
            granularity: weights that share a scale; no coarser than `shares` allows.

        Returns:
            codes: int8 [n, k].
            scale: float32 [1], [n] or [n, groups]. Weights that are all 0 get the largest one of the tensor.

        Raises:
            ValueError: a damaged file.
        """
        n, k = self.place.shape
        found = np.empty((n, k), np.int8)
        scale = np.empty((n, self.row_blocks), np.float32)
        for start, stop, data in self._chunks(0, n):
            part, d = self._split(data, start)
            found[start:stop], scale[start:stop] = part.reshape(-1, k), d.reshape(-1, self.row_blocks)
        unit = n // self.heads if self.heads else 1
        found, scale = split_pairs(found, unit), split_pairs(scale, unit)
        is_live = found.reshape(n, self.row_blocks, -1).any(axis=2)
        largest = scale.max(where=is_live, initial=0) or scale.max() or np.float32(1)
        if granularity == "tensor":
            return found, np.array([largest], np.float32)
        if granularity == "row":
            of_row = scale.max(axis=1, where=is_live, initial=0)
            return found, np.where(of_row > 0, of_row, largest)
        assert isinstance(granularity, int)
        scale = np.where(scale > 0, scale, largest)
        return found, np.repeat(scale, self.block.weights // granularity, axis=1)

    def shares(self) -> quant.Granularity:
        """What has one scale, weights that are all 0 left out: "tensor", "row", or the weights of a block.

        Reads the scales of a tensor of codes.

        Raises:
            ValueError: a damaged file.
        """
        if self.block.name == "I2_S":
            return "tensor"
        found: quant.Granularity = "tensor"
        known = np.float32(0)
        for start, stop, data in self._chunks(0, self.place.shape[0]):
            scale = self._scales(data, start).reshape(stop - start, -1)
            if np.any(scale != scale[0, 0]):
                is_live = self._split(data, start)[0].any(axis=1)
                scale = np.where(is_live.reshape(scale.shape), scale, np.float32(0))
            largest = scale.max()
            if np.any((scale != largest) & (scale > 0)) or 0 < largest != known > 0:
                of_row = scale.max(axis=1, keepdims=True)
                if np.any((scale != of_row) & (scale > 0)):
                    return self.block.weights
                found = "row"
            known = known or largest
        return found

    def _chunks(self, begin: int, end: int) -> Iterator[tuple[int, int, UInt8]]:
        """Some rows after the others: first row, the one after the last, and their blocks, uint8 [blocks, n_bytes]."""
        row_bytes = self.row_blocks * self.block.n_bytes
        step = max(_CHUNK // (self.row_blocks * self.block.weights), 1)
        for start in range(begin, end, step):
            stop = min(start + step, end)
            data = read_bytes(self.path, self.place.begin + start * row_bytes, (stop - start) * row_bytes)
            yield start, stop, data.reshape(-1, self.block.n_bytes)

    def _numbers(self, data: UInt8, row: int) -> Float32:
        if self.block.name in SCHEMES:
            found, scale = self._split(data, row)
            return found * scale[:, None]
        with np.errstate(invalid="ignore", over="ignore"):
            return blocks.decode(data, self.block) * self.factor

    def _split(self, data: UInt8, row: int) -> tuple[Int8, Float32]:
        """Codes and scales of blocks that start at a row; where the scale is 0 so are the codes."""
        with _blame(self.name):
            found, _ = blocks.split(data, self.block, row * self.row_blocks)
        scale = self._scales(data, row)
        if not scale.all():
            found[scale == 0] = 0
        return found, scale

    def _scales(self, data: UInt8, row: int) -> Float32:
        """Scales of blocks that start at a row."""
        with np.errstate(invalid="ignore", over="ignore"):
            scale = blocks.scales(data, self.block) * self.factor
        # A binary weight cannot be 0.
        is_good = np.isfinite(scale) & (scale > 0 if self.block.name == "Q1_0" else scale >= 0)
        if not is_good.all():
            i = int((~is_good).argmax())
            raise ValueError(
                f"tensor {self.name}: block {row * self.row_blocks + i} has the scale {scale[i]}; expected a positive "
                "number: the file is damaged"
            )
        return scale


def pieces(
    name: str, tensor: Tensor, config: ModelConfig, block: Block, heads: int | None
) -> Iterator[Buffer]:
    """The bytes of a tensor in a file, one chunk after the other.

    Args:
        name: of the tensor, for an error.
        tensor: any.
        config: of the model.
        block: the type in the file.
        heads: how many heads its rows are, where their pairs are to be neighbours; else None.

    Raises:
        ValueError: a number or scale that the type does not have, or a damaged source.
    """
    n, k = tensor.shape[0], math.prod(tensor.shape[1:])
    unit = n // heads if heads else 1
    step = max(_CHUNK // k // unit, 1) * unit
    starts = range(0, n, step)
    if block.name in SCHEMES:
        found, scale = codes(name, tensor, config)
        for start in starts:
            part = join_pairs(found[start : start + step], unit)
            d = join_pairs(_of_blocks(scale, start, len(part), k // block.weights), unit)
            with _blame(name):
                yield raw(blocks.join(part.reshape(-1, block.weights), d.reshape(-1), block))
        if block.tail:
            yield scale.astype("<f4").tobytes() + bytes(block.tail - 4)
    elif config.is_linear(name) and config.weights != "dense":
        found, scale = codes(name, tensor, config)
        for start in starts:
            part = found[start : start + step].astype(np.float32)
            w = quant.dequantize(part, scale if scale.shape == (1,) else scale[start : start + step])
            yield _encoded(name, join_pairs(w, unit), block)
    else:
        for start in starts:
            yield _encoded(name, join_pairs(rows(name, tensor, start, start + step), unit), block)


def _encoded(name: str, values: Float32, block: Block) -> Buffer:
    made = encode(values, block.name)
    # The exponent of infinity: float16 ends at 65504.
    if block.name != "F32" and np.any(
        made.view("<u2") & (top := 0x7C00 if block.name == "F16" else 0x7F80) == top
    ):
        raise ValueError(f"tensor {name} holds a number that is too large for {block.name}; take F32")
    return raw(made)


def _of_blocks(scale: Float32, start: int, n: int, row_blocks: int) -> Float32:
    """Scales of the blocks of some rows, float32 [n, blocks], of scales of any granularity."""
    if scale.shape == (1,):
        return np.full((n, row_blocks), scale[0])
    part = scale[start : start + n].reshape(n, -1)
    return np.repeat(part, row_blocks // part.shape[1], axis=1)


@contextmanager
def _blame(name: str) -> Iterator[None]:
    """Put the name of a tensor in front of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"tensor {name}: {error}") from None

"""Models whose float weights are ternary or binary already: which scheme they have, and their codes.

    found = detect([stored.rows for stored in matrices], shapes)       # Found("b1.58", "row"), or None
    codes, scale = exact_codes("layers.0.q.weight", w, found)

Some ternary models are published as {-s, 0, +s} in 16 bits. Knows no files.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from onebit.formats.tensors import shorten
from onebit.packing import Float32, Int8
from onebit.quant import Granularity, dequantize, weight_groups

Rows = Callable[[int, int], Float32]

# Inputs that may share a scale, the coarsest first; models trained on several machines have one for each part.
GROUPS = (256, 128, 64)
# Rows that tell an ordinary model, and rows that are handled at once.
_FIRST_ROWS, _BLOCK_ROWS = 4, 4096


class Found(NamedTuple):
    """What weights were found to be.

    Args:
        weights: "b1.58" for {-s, 0, +s}, "b1" for {-s, +s}.
        scale: weights that share s.
    """

    weights: Literal["b1.58", "b1"]
    scale: Granularity


def detect(matrices: Sequence[Rows], shapes: Sequence[tuple[int, int]]) -> Found | None:
    """Tell whether matrices hold {-s, 0, +s} alone, and how many weights share s, at most.

    Ordinary weights are told by the first rows of the first matrix.

    Args:
        matrices: from the first row and the one after the last to float32 [rows, k].
        shapes: [n, k] of each.

    Returns:
        The coarsest granularity that reproduces all of them exactly, or None.
    """
    unit = GROUPS[-1] if all(k % GROUPS[-1] == 0 for _, k in shapes) else None
    scales, has_zero = [], False
    for rows, (n, k) in zip(matrices, shapes, strict=True):
        if not _is_exact(rows(0, min(n, _FIRST_ROWS)), unit):
            return None
        largest = np.empty((n, k // (unit or k)), np.float32)
        signs: set[float] = set()
        for begin in range(0, n, _BLOCK_ROWS):
            w = rows(begin, min(n, begin + _BLOCK_ROWS))
            if not _is_exact(w, unit):
                return None
            largest[begin : begin + len(w)] = _groups(w, unit).max(axis=-1)
            has_zero = has_zero or not w.all()
            signs |= {float(sign) for sign in np.unique(np.sign(w))}
        # Constant matrices say nothing.
        if not {-1.0, 1.0} <= signs:
            return None
        scales.append(largest)
    candidates: list[Granularity] = ["tensor", "row", *(GROUPS if unit else ())]
    for granularity in candidates:
        if all(_share(largest, granularity, unit) for largest in scales):
            if isinstance(granularity, int) and any(k % granularity for _, k in shapes):
                continue
            return Found("b1.58" if has_zero else "b1", granularity)
    return None


def exact_codes(name: str, w: Float32, found: Found) -> tuple[Int8, Float32]:
    """The codes and scales that a matrix consists of; a group of zeros has the largest scale of the matrix.

    Args:
        name: of the matrix, for the error.
        w: float32 [n, k].
        found: scheme and granularity.

    Returns:
        int8 [n, k], and float32 multipliers [1], [n] or [n, groups].

    Raises:
        ValueError: w is no product of such codes and scales.
    """
    largest = abs(weight_groups(w, found.scale)).max(axis=-1)
    # A matrix of zeros has no scale; any will do.
    scale = np.where(largest > 0, largest, largest.max() or np.float32(1)).astype(np.float32)
    scale = scale if isinstance(found.scale, int) else scale.reshape(-1)
    codes = np.sign(w).astype(np.int8)
    wrong = dequantize(codes.astype(np.float32), scale) != w
    if found.weights == "b1":
        wrong |= codes == 0
    if wrong.any():
        row, column = (int(i) for i in np.argwhere(wrong)[0])
        values = "{-s, +s}" if found.weights == "b1" else "{-s, 0, +s}"
        raise ValueError(
            f"tensor {shorten(name)} holds {w[row, column]} at [{row}, {column}]; all weights of the first layer are "
            f"{values} with one s for each {found.scale}, so all have to be: the file is damaged, or mixed"
        )
    return codes, scale


def _groups(w: Float32, unit: int | None) -> Float32:
    """Magnitudes, float32 [rows, groups, inputs]."""
    groups: Float32 = abs(w).reshape(len(w), -1, unit or w.shape[1])
    return groups


def _is_exact(w: Float32, unit: int | None) -> bool:
    return _is_uniform(_groups(w, unit))


def _is_uniform(magnitudes: npt.NDArray[np.float32]) -> bool:
    """Whether along the last axis all values are zero or the largest one."""
    largest = magnitudes.max(axis=-1, keepdims=True)
    return bool(((magnitudes == 0) | (magnitudes == largest)).all())


def _share(largest: Float32, granularity: Granularity, unit: int | None) -> bool:
    """Whether the scales of units agree within a coarser granularity."""
    if granularity == "tensor":
        return _is_uniform(largest.reshape(1, -1))
    if granularity == "row":
        return _is_uniform(largest)
    assert isinstance(granularity, int) and unit
    if largest.shape[1] % (granularity // unit):
        return False
    return _is_uniform(largest.reshape(len(largest), -1, granularity // unit))

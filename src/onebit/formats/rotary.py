"""The order of the rows of a query or key matrix: which two of a head the rotary positions turn as a pair.

    split_pairs(rows, d_head)       # neighbours, as in llama2.c and in GGUF files of llama, to halves, as here
    join_pairs(rows, d_head)        # and back

Of a head with d rows, the rows j and j + d / 2 are a pair here, and 2 j and 2 j + 1 there. Rows stay in their head.
"""

from typing import Any

import numpy.typing as npt


def split_pairs(values: npt.NDArray[Any], d_head: int) -> npt.NDArray[Any]:
    """Rows of whole heads whose pairs are neighbours, so that pairs are the halves of a head."""
    if d_head == 1:
        return values
    return values.reshape(-1, d_head // 2, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def join_pairs(values: npt.NDArray[Any], d_head: int) -> npt.NDArray[Any]:
    """The inverse of `split_pairs`."""
    if d_head == 1:
        return values
    return values.reshape(-1, 2, d_head // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def whole_heads(begin: int, end: int, d_head: int) -> tuple[int, int]:
    """The rows of all heads that some rows are of: the first, and the one after the last."""
    return begin // d_head * d_head, -(-end // d_head) * d_head

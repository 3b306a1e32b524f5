"""How large a model is: one dial for shape, vocabulary, batch and length of a run.

    shape(SIZES["10M"])      # fields of a ModelConfig

The three largest shapes are those of the papers, the others ours. What is not published says so here.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Size:
    """A size and what goes with it.

    Args:
        shape: d_model, n_layers, n_heads, n_kv_heads, d_head, d_ff.
        vocab_size: of the tokenizer; small models would spend their weights on a large one.
        seq_len: tokens in a sequence, and the context.
        steps: optimiser steps.
        batch_size: sequences in a step.
        accumulate: parts of a batch.
        ternary: peak learning rates of the two stages for b1.58.
        binary: peak learning rate for b1.
    """

    shape: tuple[int, int, int, int, int, int]
    vocab_size: int
    seq_len: int
    steps: int
    batch_size: int
    accumulate: int
    ternary: tuple[float, float]
    binary: float


# Rates of 1M, 3M and 30M follow that of 10M, which is that of the first model that shipped, with AdamW; 125M lies
# between it and the 1.8e-3 that arXiv:2411.04965 gives for 400M. Published: b1.58 from 700M, "Training Tips, Code and
# FAQ", table 2; b1 from 125M, arXiv:2310.11453, table 5 (its 760M and 2.7B stand for 700M and 3B). The papers' runs
# are 100 B tokens.
SIZES = {
    "1M": Size((128, 3, 4, 2, 32, 256), 4096, 256, 1000, 8, 1, (3e-3, 2e-3), 3e-3),
    "3M": Size((256, 3, 4, 2, 64, 512), 4096, 256, 2000, 8, 1, (3e-3, 2e-3), 3e-3),
    "10M": Size((384, 5, 4, 2, 96, 1024), 4096, 512, 3750, 4, 1, (3e-3, 2e-3), 3e-3),
    "30M": Size((512, 7, 8, 4, 64, 2048), 4096, 512, 10000, 8, 1, (3e-3, 2e-3), 3e-3),
    "125M": Size((768, 12, 12, 12, 64, 2560), 32000, 1024, 20000, 64, 8, (2.4e-3, 1.6e-3), 2.4e-3),
    "700M": Size((1536, 24, 24, 24, 64, 4096), 32000, 2048, 100000, 512, 64, (1.5e-3, 1e-3), 1e-3),
    "1.3B": Size((2048, 24, 32, 32, 64, 5460), 32000, 2048, 100000, 512, 128, (1.2e-3, 8e-4), 8e-4),
    "3B": Size((3200, 26, 32, 32, 100, 8640), 32000, 2048, 100000, 512, 256, (1.2e-3, 8e-4), 6.4e-4),
}


def shape(size: Size, powers_of_two: bool = False) -> dict[str, Any]:
    """The fields of a ModelConfig that a size decides.

    Args:
        size: one of SIZES.
        powers_of_two: round the width of a head and d_ff, and with them the inputs of o and down, to the nearest power
            of two, the larger where two are equally near; the number of heads too.
    """
    d_model, n_layers, n_heads, n_kv_heads, d_head, d_ff = size.shape
    if powers_of_two:
        group = n_heads // n_kv_heads
        n_heads, d_head, d_ff = (_power_of_two(n) for n in (n_heads, d_head, d_ff))
        n_kv_heads = n_heads // group
    return {
        "vocab_size": size.vocab_size,
        "d_model": d_model,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "d_head": d_head,
        "d_ff": d_ff,
        "max_seq_len": size.seq_len,
        # From 700M on the vocabulary is a small part of the weights, and the papers' heads are their own.
        "tied_head": d_model < 1536,
    }


def _power_of_two(n: int) -> int:
    below = 1 << (n.bit_length() - 1)
    return below if n - below < 2 * below - n else 2 * below

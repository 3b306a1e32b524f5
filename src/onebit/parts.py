"""What a checkpoint is made of and what that weighs: its parts, what a token reads, how often each code occurs.

for part in parts(checkpoint):
print(part.name, part.n_weights, part.bits_per_weight)
"""

import math
from typing import NamedTuple

from onebit.checkpoint import SHORTLIST, SHORTLIST_BOUNDS, Checkpoint, Stored
from onebit.config import ModelConfig
from onebit.packing import PackedTensor, count_codes


class Part(NamedTuple):
    """A part of a model and its size.

    Args:
        name: "embedding", "linear", "norms", "head", "shortlist" or "tokenizer".
        n_weights: weights in it; 0 for the tokenizer, and for a shortlist, which repeats the head's.
        n_bytes: bytes that hold them, scales and padding included.
    """

    name: str
    n_weights: int
    n_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits that one weight costs, scales and padding included; 0 for a part without weights."""
        return 8 * self.n_bytes / self.n_weights if self.n_weights else 0.0


def parts(checkpoint: Checkpoint) -> list[Part]:
    """Weights and bytes of each part of a model, those it lacks left out."""
    totals: dict[str, tuple[int, int]] = {}
    for name, tensor in checkpoint.tensors.items():
        part = part_name(name, checkpoint.config)
        n_weights, n_bytes = totals.get(part, (0, 0))
        if isinstance(tensor, PackedTensor):
            n, k = tensor.shape if part != "shortlist" else (0, 0)
            totals[part] = n_weights + n * k, n_bytes + tensor.data.nbytes + tensor.scale.nbytes
        elif isinstance(tensor, Stored):
            totals[part] = n_weights + math.prod(tensor.shape), n_bytes + tensor.n_bytes
        else:
            size = 0 if part == "shortlist" else tensor.size
            totals[part] = n_weights + size, n_bytes + tensor.nbytes
    if checkpoint.tokenizer is not None:
        totals["tokenizer"] = 0, len(checkpoint.tokenizer)
    order = ("embedding", "linear", "norms", "head", "shortlist", "tokenizer")
    return [Part(name, *totals[name]) for name in order if name in totals]


def token_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of weights that the engine reads for a token; of an embedding, or a head with a shortlist, some rows."""
    config = checkpoint.config
    sizes = {part.name: part.n_bytes for part in parts(checkpoint) if part.name != "tokenizer"}
    rows = {"embedding"} if checkpoint.head == "bf16" or not config.tied_head else set()
    if checkpoint.head == "bf16" and not config.tied_head:
        rows.add("head")
    return sum(size // config.vocab_size if name in rows else size for name, size in sizes.items())


def code_histogram(checkpoint: Checkpoint) -> dict[int, float]:
    """Share of each code in the linear layers of a packed model, as {-1: 0.31, 0: 0.38, 1: 0.31}.

    Raises:
        ValueError: a float32 master, which has no codes yet, or a dense model.
    """
    if not checkpoint.is_packed:
        raise ValueError("a float32 master has no codes; quantize it first")
    if checkpoint.config.weights == "dense":
        raise ValueError("a dense model has no codes")
    schemes = {checkpoint.config.weights, *checkpoint.config.layer_weights}
    counts = dict.fromkeys((-1, 1) if schemes == {"b1"} else (-1, 0, 1), 0)
    for name, tensor in checkpoint.tensors.items():
        if isinstance(tensor, PackedTensor) and checkpoint.config.is_linear(name):
            for code, number in count_codes(tensor.data, tensor.encoding, tensor.shape).items():
                counts[code] += number
    return {code: number / sum(counts.values()) for code, number in counts.items()}


def part_name(name: str, config: ModelConfig) -> str:
    """The `Part` that a tensor belongs to."""
    if config.is_linear(name):
        return "linear"
    if name in (SHORTLIST, SHORTLIST_BOUNDS):
        return "shortlist"
    return {"embed.weight": "embedding", "head.weight": "head"}.get(name, "norms")

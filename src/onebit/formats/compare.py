"""Two checkpoints side by side: what a conversion kept and what it changed, weight by weight.

    changes = compare(source, made)
    [change for change in changes if change.is_lossy]

Compares what is really there: the made file is read again by its own reader.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from onebit import quant
from onebit.checkpoint import (
    BLOCK_ROWS,
    Checkpoint,
    Stored,
    Tensor,
    codes,
    holds_codes,
    rows,
)
from onebit.config import ModelConfig
from onebit.packing import Float32, Int8, PackedTensor
from onebit.parts import part_name

Progress = Callable[[int], None]


@dataclass
class Change:
    """What became of a part of a model.

    Args:
        part: "embedding", "linear", "norms" or "head".
        n_weights: weights in it.
        source: what they were stored as, as "BF16" or "I2_S".
        made: what they are stored as now.
        by_definition: rounding is all that happened, and what the model means: it was trained to be rounded so.
        n_changed: weights whose value differs, of a master from the one that it is rounded to.
        n_codes: weights whose sign, or being zero, differs.
        worst: largest difference, in units of the largest magnitude of its tensor.
        scale_ratio: smallest and largest ratio of weights after to before, where neither is zero.
        worst_tensor: where the largest difference is.
    """

    part: str
    n_weights: int = 0
    source: str = ""
    made: str = ""
    by_definition: bool = False
    n_changed: int = 0
    n_codes: int = 0
    worst: float = 0.0
    scale_ratio: tuple[float, float] = (1.0, 1.0)
    worst_tensor: str = ""

    @property
    def is_lossy(self) -> bool:
        """Whether values were lost that the model has."""
        return self.n_changed > 0 and not self.by_definition

    def describe(self) -> str:
        """The change in words."""
        text = f"{self.part}, {self.source} to {self.made}: {self.n_changed / self.n_weights:.2%} of the values differ"
        text += f", by up to {self.worst:.2g} of the largest ({self.worst_tensor})"
        if self.n_codes:
            text += f"; {self.n_codes:,} codes differ"
        low, high = self.scale_ratio
        return text + (
            f"; scales x {low:.6g} to {high:.6g}" if high - low < 0.01 and not self.n_codes else ""
        )


def compare(source: Checkpoint, made: Checkpoint, progress: Progress = lambda n: None) -> list[Change]:
    """Compare all weights that two checkpoints of one model have in common.

    Args:
        source: what was converted.
        made: the result, read again.
        progress: called with numbers of weights as they are compared.

    Returns:
        A change for each part, in the order of a file; also of parts that are the same.

    Raises:
        ValueError: models of different shapes, or a damaged file.
    """
    names = source.config.tensor_shapes()
    if (shapes := made.config.tensor_shapes()) != names:
        odd = next(iter(set(names.items()) ^ set(shapes.items())))
        raise ValueError(f"these are two different models: only one has the tensor {odd[0]} {list(odd[1])}")
    changes: dict[str, Change] = {}
    kinds: dict[str, tuple[set[str], set[str]]] = {}
    for name in names:
        before, after = source.tensors[name], made.tensors[name]
        part = part_name(name, source.config)
        change = changes.setdefault(part, Change(part, by_definition=True))
        seen = kinds.setdefault(part, (set(), set()))
        for kind, tensor in zip(seen, (before, after), strict=True):
            kind.add(kind_of(tensor))
        change.n_weights += math.prod(names[name])
        _compare(change, name, before, after, source.config, made.config)
        progress(math.prod(names[name]))
        change.by_definition &= _is_by_definition(name, before, change, source.config, made)
    for part, change in changes.items():
        change.source, change.made = (", ".join(sorted(kind)) for kind in kinds[part])
    order = ("embedding", "linear", "norms", "head")
    return [changes[part] for part in order if part in changes]


def kind_of(tensor: Tensor) -> str:
    """What a tensor is stored as."""
    if isinstance(tensor, Stored):
        return tensor.kind
    return tensor.encoding if isinstance(tensor, PackedTensor) else "F32"


def _is_by_definition(
    name: str, before: Tensor, change: Change, config: ModelConfig, made: Checkpoint
) -> bool:
    if config.is_linear(name) and config.weights != "dense":
        # What still differs after the rounding is no part of it.
        return not holds_codes(before) and not change.n_changed
    # A master of ours was trained to be packed.
    return isinstance(before, np.ndarray) and made.is_packed and made.config.weights == config.weights


def _compare(
    change: Change, name: str, before: Tensor, after: Tensor, config: ModelConfig, made: ModelConfig
) -> None:
    n = before.shape[0]
    is_linear = config.is_linear(name)
    if is_linear and config.weights != "dense":
        old_codes, old_scale = codes(name, before, config)
        # Of a master that stays one, the codes that it is rounded to are compared.
        if made.weights_of(name) == config.weights_of(name):
            new_codes, new_scale = codes(name, after, made)
            if np.array_equal(old_codes, new_codes) and np.array_equal(old_scale, new_scale):
                return
            new = _expanded(new_codes, new_scale)
        else:
            new = rows(name, after)
        _count(change, name, _expanded(old_codes, old_scale), new)
        return
    for begin in range(0, n, BLOCK_ROWS):
        old, new = (rows(name, tensor, begin, begin + BLOCK_ROWS) for tensor in (before, after))
        _count(change, name, old, new)


def _expanded(found: Int8, scale: Float32) -> Float32:
    dense: Float32 = quant.dequantize(found.astype(np.float32), scale)
    return dense


def _count(change: Change, name: str, old: Float32, new: Float32) -> None:
    differs = old != new
    n_changed = int(np.count_nonzero(differs))
    if not n_changed:
        return
    change.n_changed += n_changed
    largest = float(abs(old).max()) or 1.0
    old, new = old[differs], new[differs]
    change.n_codes += int(np.count_nonzero(np.sign(old) != np.sign(new)))
    worst = float(abs(old - new).max()) / largest
    if worst > change.worst:
        change.worst, change.worst_tensor = worst, name
    both = (old != 0) & (new != 0)
    if both.any():
        ratio = new[both] / old[both]
        low, high = change.scale_ratio
        change.scale_ratio = min(low, float(ratio.min())), max(high, float(ratio.max()))

"""The weights of a model: damaged values, dead rows, odd shares of codes, scales that stand out.

    seen = look(checkpoint)
    for check in CHECKS: check(seen, "model.onebit")

Every tensor is read once, and one at a time.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from onebit.checkpoint import (
    BLOCK_ROWS,
    SHORTLIST,
    SHORTLIST_BOUNDS,
    Checkpoint,
    Stored,
    Tensor,
    codes,
    holds_codes,
    rows,
)
from onebit.config import ModelConfig
from onebit.doctor.finding import Finding, command, listed
from onebit.formats.floats import FLOATS

# Share of zeros that ternary layers have: rounding by the mean magnitude gives 0.25 of uniform weights, 0.31 of normal
# and 0.39 of Laplacian ones, and published models have up to a half.
FEWEST_ZEROS, MOST_ZEROS = 0.15, 0.65
# Share of ones that binary layers have.
FEWEST_ONES, MOST_ONES = 0.35, 0.65
# Rows of one layer that may be dead, or alike, before it is worth a warning.
FEW_ROWS = 0.01
# A scale this much larger, or smaller, than the median of its kind stands out.
OUTLIER = 10.0
# Real models have multipliers of 0.001 to 1; their inverses are larger.
LARGEST_SCALE = 4.0

Progress = Callable[[float], None]


@dataclass(frozen=True)
class Matrix:
    """What one matrix is like.

    Args:
        name: canonical.
        n_rows: of the matrix.
        n_dead: rows of zeros.
        n_constant: other rows of one value.
        n_repeated: other rows that are equal to an earlier one.
        zeros: share of the code 0; nan of a matrix without codes.
        ones: share of the code +1 among those that are not 0; nan of a matrix without codes.
        scale: smallest, median and largest multiplier; nan of a matrix without codes.
    """

    name: str
    n_rows: int
    n_dead: int
    n_constant: int
    n_repeated: int
    zeros: float = float("nan")
    ones: float = float("nan")
    scale: tuple[float, float, float] = (float("nan"),) * 3

    @property
    def layer(self) -> int:
        """Which block it is in."""
        return int(self.name.split(".")[1])

    @property
    def kind(self) -> str:
        """Which of the seven layers of a block it is."""
        return self.name.split(".")[2]


@dataclass
class Weights:
    """What the tensors of a model are like.

    Args:
        config: of the model.
        stored: types of linear layers that are still in a file of another format, and hold codes.
        linear: the layers of its blocks.
        tables: embedding and head.
        norms: smallest and largest value of each norm, by its name.
        damaged: what is wrong with tensors that cannot be read, by their names.
    """

    config: ModelConfig
    stored: set[str]
    linear: list[Matrix] = field(default_factory=list)
    tables: list[Matrix] = field(default_factory=list)
    norms: dict[str, tuple[float, float]] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)

    @property
    def coded(self) -> bool:
        """Whether the linear layers have codes."""
        return self.config.weights != "dense"


def look(checkpoint: Checkpoint, progress: Progress = lambda share: None) -> Weights:
    """Read all tensors of a model."""
    config = checkpoint.config
    coded = [t for n, t in checkpoint.tensors.items() if config.is_linear(n) and holds_codes(t)]
    seen = Weights(config, {tensor.kind for tensor in coded if isinstance(tensor, Stored)})
    for i, (name, tensor) in enumerate(checkpoint.tensors.items()):
        try:
            if name in (SHORTLIST, SHORTLIST_BOUNDS):
                continue
            if len(tensor.shape) == 1:
                values = rows(name, tensor)
                seen.norms[name] = float(values.min()), float(values.max())
            elif not config.is_linear(name):
                seen.tables.append(_of_rows(name, tensor))
            else:
                seen.linear.append((_of_codes if seen.coded else _of_rows)(name, tensor, config))
        except ValueError as error:
            seen.damaged[name] = str(error)
        progress((i + 1) / len(checkpoint.tensors))
    return seen


def _of_codes(name: str, tensor: Tensor, config: ModelConfig) -> Matrix:
    found, scale = codes(name, tensor, config)
    n_zero, n_one = int((found == 0).sum()), int((found == 1).sum())
    scales = float(scale.min()), float(np.median(scale)), float(scale.max())
    shares = n_zero / found.size, n_one / max(found.size - n_zero, 1)
    return Matrix(name, len(found), *_odd_rows([found]), *shares, scales)


def _of_rows(name: str, tensor: Tensor, config: ModelConfig | None = None) -> Matrix:
    n = tensor.shape[0]
    blocks = (rows(name, tensor, begin, begin + BLOCK_ROWS) for begin in range(0, n, BLOCK_ROWS))
    return Matrix(name, n, *_odd_rows(blocks))


def _odd_rows(blocks: Iterable[npt.NDArray[np.generic]]) -> tuple[int, int, int]:
    """How many rows are zero, of one other value, and repeat an earlier one."""
    n_dead = n_constant = n_repeated = 0
    known: set[int] = set()
    for block in blocks:
        dead = ~block.any(axis=1)
        constant = (block == block[:, :1]).all(axis=1) & ~dead
        n_dead, n_constant = n_dead + int(dead.sum()), n_constant + int(constant.sum())
        for row in block[~dead & ~constant]:
            key = hash(row.tobytes())
            n_repeated += key in known
            known.add(key)
    return n_dead, n_constant, n_repeated


def damaged(seen: Weights, name: str) -> Finding | None:
    """Tensors that hold NaN, infinity, or codes that their format does not have."""
    if not seen.damaged:
        return None
    first = next(iter(seen.damaged))
    return Finding(
        "error",
        "values",
        f"{len(seen.damaged)} of {_n_tensors(seen)} tensors cannot be used",
        f"{listed(list(seen.damaged))}; the first: {seen.damaged[first]}",
        "One NaN in a layer makes every logit NaN; an unknown code means that the bytes are something else.",
        command("onebit", "convert", name, "checked.onebit"),
        "Fetch the file again and compare its hash; after a training, take an earlier state.",
    )


def zeros(seen: Weights, name: str) -> Finding | None:
    """The share of zeros in ternary layers, about a third to a half."""
    ternary = [m for m in seen.linear if seen.coded and seen.config.weights_of(m.name) == "b1.58"]
    if not ternary:
        return None
    odd = [m for m in ternary if not FEWEST_ZEROS <= m.zeros <= MOST_ZEROS]
    lowest, highest = min(m.zeros for m in ternary), max(m.zeros for m in ternary)
    why = (
        "Rounding by the mean magnitude gives 31 % of normal weights, 25 % of uniform and 39 % of Laplacian ones. "
        "Fewer means binary or shuffled codes, more a scale that was wrong, or capacity that is not used."
    )
    confirm = command("onebit", "info", name)
    evidence = f"zeros of the {len(ternary)} ternary matrices: {lowest:.0%} to {highest:.0%}"
    if not odd:
        return Finding("ok", "zeros", "The share of zeros is usual", evidence, why, confirm)
    shown = listed([f"{m.name} {m.zeros:.0%}" for m in odd])
    return Finding(
        "warning",
        "zeros",
        f"{len(odd)} of {len(ternary)} ternary matrices have an odd share of zeros",
        f"{evidence}; {shown}",
        why,
        confirm,
        "Compare with the model it was made of: onebit eval MODEL --text FILE --against ORIGINAL.",
    )


def balance(seen: Weights, name: str) -> Finding | None:
    """The share of +1 among codes that are not 0, about a half."""
    if not seen.coded or not seen.linear:
        return None
    odd = [m for m in seen.linear if not FEWEST_ONES <= m.ones <= MOST_ONES]
    if not odd:
        return None
    return Finding(
        "warning",
        "balance",
        f"{len(odd)} of {len(seen.linear)} matrices have many more codes of one sign",
        listed([f"{m.name}: {m.ones:.0%} are +1" for m in odd]),
        "Weights are centred; codes of one sign alone come from bytes that mean something else, as 0 and 1.",
        command("onebit", "info", name),
        "Compare with the model it was made of: onebit eval MODEL --text FILE --against ORIGINAL.",
    )


def dead_rows(seen: Weights, name: str) -> Finding | None:
    """Rows of zeros, of one value, and rows that are there twice."""
    confirm = command("onebit", "doctor", name, "--json")
    why = (
        "A row of zeros computes nothing, and two that are equal compute the same twice: capacity that is paid for and "
        "not used, or a file whose pieces were put together wrongly."
    )
    n = sum(m.n_rows for m in seen.linear)
    odd = [(m, m.n_dead + m.n_constant + m.n_repeated) for m in seen.linear]
    odd = [(m, number) for m, number in odd if number]
    if not odd:
        what = "Every row of the linear layers is one of its own"
        return Finding("ok", "rows", what, f"{n:,} rows", why, confirm) if n else None
    odd.sort(key=lambda pair: -pair[1] / pair[0].n_rows)
    shown = listed(
        [
            f"{m.name}: {m.n_dead} dead, {m.n_constant} of one value, {m.n_repeated} repeated of {m.n_rows:,}"
            for m, _ in odd
        ]
    )
    worst = odd[0][1] / odd[0][0].n_rows
    what = f"{sum(number for _, number in odd):,} of {n:,} rows are zero, constant or repeated"
    advice = "Train further, with a warmer rate or another seed, or compare with the original file."
    return Finding("warning" if worst > FEW_ROWS else "note", "rows", what, shown, why, confirm, advice)


def untrained_tokens(seen: Weights, name: str) -> Finding | None:
    """Rows of embedding and head that are zero, of one value, or repeated: tokens that nobody trained."""
    odd = [(m, m.n_dead + m.n_constant + m.n_repeated) for m in seen.tables]
    odd = [(m, number) for m, number in odd if number > FEW_ROWS * m.n_rows]
    if not odd:
        return None
    return Finding(
        "note",
        "tokens",
        "Tokens share their row of the embedding, or have none",
        listed(
            [f"{m.name}: {number:,} of {m.n_rows:,} rows are zero, constant or repeated" for m, number in odd]
        ),
        "Rows that pad a vocabulary stay as they began; a text that holds such a token means nothing to the model.",
        command("onebit", "doctor", name, "--json"),
        "Nothing, where they are padding; else compare with the embedding of the original.",
    )


def scale_meaning(seen: Weights, name: str) -> Finding | None:
    """Scales that are taken for multipliers, and look like divisors."""
    if not seen.coded or not seen.linear:
        return None
    typical = float(np.median([m.scale[1] for m in seen.linear]))
    low, high = min(m.scale[0] for m in seen.linear), max(m.scale[2] for m in seen.linear)
    evidence = f"multipliers from {low:.4g} to {high:.4g}, median {typical:.4g}"
    confirm = command("onebit", "info", name)
    why = (
        "Formats keep the mean magnitude of weights, or one divided by it; a model with the wrong one loads, and "
        "talks nonsense. Real weights are far below 1."
    )
    if typical > LARGEST_SCALE:
        advice = (
            "Convert the original again with a converter that knows what its scale means: in Hugging Face folders "
            "linear_class autobitlinear multiplies, bitlinear divides."
        )
        return Finding("error", "scales", "The scales look like divisors", evidence, why, confirm, advice)
    if low == high == 1:
        advice = "Look whether the original has scales of its own (weight_scale, .scale)."
        return Finding(
            "warning", "scales", "All scales are 1: they may be lost", evidence, why, confirm, advice
        )
    return Finding("ok", "scales", "Scales are multipliers of a usual size", evidence, why, confirm)


def scale_outliers(seen: Weights, name: str) -> Finding | None:
    """Layers whose scale is far from that of the same layer in other blocks."""
    if not seen.coded:
        return None
    odd = []
    for kind in seen.config.linear_shapes():
        same = [m for m in seen.linear if m.kind == kind]
        middle = float(np.median([m.scale[1] for m in same])) if same else 1.0
        odd += [(m, m.scale[1] / middle) for m in same if not 1 / OUTLIER <= m.scale[1] / middle <= OUTLIER]
    if not odd:
        return None
    return Finding(
        "warning",
        "scale outliers",
        f"{len(odd)} matrices have a scale far from that of the same layer in other blocks",
        listed([f"{m.name} {m.scale[1]:.3g}, {ratio:.3g} times the median" for m, ratio in odd]),
        "The blocks of a model are alike; one that stands out was damaged, scaled twice, or has diverged.",
        command("onebit", "doctor", name, "--json"),
        "Compare with the original: onebit convert ORIGINAL copy.onebit --verify.",
    )


def norms(seen: Weights, name: str) -> Finding | None:
    """Norms that are zero, or were never trained."""
    found = {n: pair for n, pair in seen.norms.items() if n.endswith("norm.weight")}
    confirm = command("onebit", "doctor", name, "--json")
    dead = [n for n, pair in found.items() if pair == (0, 0)]
    if dead:
        return Finding(
            "error",
            "norms",
            f"{len(dead)} of {len(found)} norms are zero",
            listed(dead),
            "What passes through such a norm is zero: the layer behind it does nothing.",
            confirm,
            "Fetch the file again; after a training, take an earlier state.",
        )
    if found and all(pair == (1, 1) for pair in found.values()):
        return Finding(
            "warning",
            "norms",
            "All norms are exactly 1",
            f"{len(found)} norms",
            "That is how they begin: the model is untrained, or its norms were not loaded.",
            confirm,
            "Look whether the original has norms by other names.",
        )
    return None


def stored_wide(seen: Weights, name: str) -> Finding | None:
    """Ternary or binary weights that take 16 or 32 bits each."""
    wide = sorted(seen.stored & set(FLOATS))
    if not wide or not seen.coded:
        return None
    return Finding(
        "note",
        "stored wide",
        f"The weights are {seen.config.weights}, and stored as {', '.join(wide)}",
        "all linear layers hold {-s, 0, +s} alone",
        "Some converters write floats and call them 1.58 bits: the file is ten times larger than its content.",
        command("onebit", "convert", name, "small.onebit"),
        "Convert it once: no value changes.",
    )


def _n_tensors(seen: Weights) -> int:
    return len(seen.linear) + len(seen.tables) + len(seen.norms) + len(seen.damaged)


CHECKS: tuple[Callable[[Weights, str], Finding | None], ...] = (
    damaged,
    zeros,
    balance,
    dead_rows,
    untrained_tokens,
    scale_meaning,
    scale_outliers,
    norms,
    stored_wide,
)

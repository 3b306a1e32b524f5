"""Recipes: each a function that returns the full description of a run, and nothing else.

    recipe = build("stories", ["optim.lr=1e-3", "steps=200"])

Adding a recipe is adding a function to RECIPES. Every field can be overridden by `--set a.b=c`.
"""

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from onebit.config import ModelConfig
from onebit.train.optim import Schedule

_ANY_COUNT = (1, 2**31 - 1)
_ANY_SIZE = (0.0, sys.float_info.max)
_BELOW_ONE = (0.0, math.nextafter(1, 0))
# Smallest and largest value of the numbers in a recipe: whole ones where the limits are. The model checks its own.
_LIMITS: dict[str, tuple[int, int] | tuple[float, float]] = {
    "data.vocab_size": (257, 2**24 - 1),  # every byte and the end of a text have a token
    "data.held_out": (0.0, 1.0),
    "data.seq_len": _ANY_COUNT,
    "optim.lr": _ANY_SIZE,
    "optim.lr_second": _ANY_SIZE,
    "optim.weight_decay": _ANY_SIZE,
    "optim.weight_decay_second": _ANY_SIZE,
    "optim.switch": (0.0, 1.0),
    "optim.warmup_steps": (0, 2**31 - 1),
    "optim.beta1": _BELOW_ONE,
    "optim.beta2": _BELOW_ONE,
    "optim.grad_clip": _ANY_SIZE,
    "steps": _ANY_COUNT,
    "batch_size": _ANY_COUNT,
    "accumulate": _ANY_COUNT,
    "threads": (0, 1024),
    "seed": (0, 2**63 - 1),
    "evaluate_every": _ANY_COUNT,
    "evaluate_sequences": _ANY_COUNT,
    "save_every": _ANY_COUNT,
}


@dataclass(frozen=True)
class Data:
    """What is read and how it is cut.

    Args:
        include: glob patterns over the files of the data folder and the members of its archives.
        vocab_size: of the byte-level BPE tokenizer that is trained on the text.
        held_out: share of the documents that are never trained on.
        seq_len: tokens in a sequence.
    """

    include: tuple[str, ...] = ("*",)
    vocab_size: int = 4096
    held_out: float = 0.01
    seq_len: int = 512


@dataclass(frozen=True)
class Recipe:
    """A training run, whole: two runs of the same recipe on the same data and machine are the same run.

    Args:
        name: under which it is built.
        model: its vocab_size and special tokens are set from the tokenizer.
        data: what is read.
        optim: schedule of the optimiser.
        steps: optimiser steps.
        batch_size: sequences in a step.
        accumulate: parts into which a batch is split to save memory; divides batch_size.
        precision: "bf16" (autocast over float32 masters) or "f32".
        compile: fuse the model with torch.compile; needs a C++ compiler.
        threads: of torch; 0 for its default. Another number may change the last bits.
        seed: of weights and data order.
        evaluate_every: steps between measurements on held-out text.
        evaluate_sequences: held-out sequences in each; the last measurement takes them all.
        save_every: steps between checkpoints.
    """

    name: str
    model: ModelConfig
    data: Data = field(default_factory=Data)
    optim: Schedule = field(default_factory=Schedule)
    steps: int = 1000
    batch_size: int = 8
    accumulate: int = 1
    precision: Literal["bf16", "f32"] = "bf16"
    compile: bool = False
    threads: int = 0
    seed: int = 1
    evaluate_every: int = 250
    evaluate_sequences: int = 16
    save_every: int = 250

    def __post_init__(self) -> None:
        for path, (low, high) in _LIMITS.items():
            value = attrgetter(path)(self)
            is_whole = isinstance(low, int)
            fits = isinstance(value, int if is_whole else (int, float)) and not isinstance(value, bool)
            if not fits or not low <= value <= high:
                kind = "whole number" if is_whole else "number"
                raise ValueError(f"recipe: {path} is {value!r}; expected a {kind} from {low} to {high}")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"recipe: accumulate {self.accumulate} does not divide batch_size {self.batch_size}"
            )
        if self.data.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"recipe: data.seq_len {self.data.seq_len} exceeds model.max_seq_len {self.model.max_seq_len}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON-ready values."""
        return json.loads(json.dumps(asdict(self)))


def stories() -> Recipe:
    """The shipped model: 10 M ternary parameters that write stories for children, in hours on two CPU cores."""
    return Recipe(
        name="stories",
        model=ModelConfig(
            vocab_size=4096, d_model=384, n_layers=5, n_heads=4, n_kv_heads=2, d_head=96, d_ff=1024
        ),
        data=Data(include=("*tinystories_slices.dedup.jsonl",)),
        optim=Schedule(lr=3e-3, lr_second=2e-3, warmup_steps=200),
        steps=3750,
        batch_size=4,
        compile=True,
        threads=1,
        evaluate_every=200,
        save_every=150,
    )


def stories_dense() -> Recipe:
    """The full-precision twin of `stories`: same shape, data, tokens, schedule and seed."""
    recipe = stories()
    return replace(
        recipe, name="stories-dense", model=replace(recipe.model, weights="dense", activations="none")
    )


def tiny() -> Recipe:
    """A toy of a few seconds on any folder of text, to see the whole road work."""
    return Recipe(
        name="tiny",
        model=ModelConfig(
            vocab_size=512,
            d_model=64,
            n_layers=2,
            n_heads=4,
            n_kv_heads=2,
            d_head=16,
            d_ff=128,
            max_seq_len=128,
        ),
        data=Data(vocab_size=512, held_out=0.1, seq_len=64),
        optim=Schedule(warmup_steps=10),
        steps=60,
        precision="f32",
        threads=1,
        evaluate_every=30,
        save_every=20,
    )


RECIPES: dict[str, Callable[[], Recipe]] = {"stories": stories, "stories-dense": stories_dense, "tiny": tiny}


def build(name: str, overrides: list[str] | None = None) -> Recipe:
    """Build a recipe by name and apply overrides.

    Args:
        name: a key of RECIPES.
        overrides: "a.b=c" each; c is read as the type of the field.

    Raises:
        ValueError: an unknown recipe or field (with the near miss), or a value of the wrong type.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}{_near(name, RECIPES)}; there are: {', '.join(RECIPES)}")
    return override(RECIPES[name](), overrides or [])


def override(recipe: Recipe, overrides: list[str]) -> Recipe:
    """Apply "a.b=c" overrides to a recipe, all at once: fields that must fit together come in any order.

    Raises:
        ValueError: an unknown field (with the near miss), or a value of the wrong type.
    """
    changes: dict[str, Any] = {}
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text}: expected a.b=c")
        _note(changes, recipe, path.split("."), value, path)
    changed: Recipe = _changed(recipe, changes)
    return changed


def read(path: Path) -> Recipe:
    """The recipe that a run folder was started with.

    Args:
        path: its recipe.json.

    Raises:
        ValueError: there is none, or not one of this version.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} holds no run to resume; start it without --resume")
    try:
        values = json.loads(path.read_text())
        values["model"] = ModelConfig.from_dict(values["model"])
        values["data"]["include"] = tuple(values["data"]["include"])
        values["data"], values["optim"] = Data(**values["data"]), Schedule(**values["optim"])
        return Recipe(**values)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not a recipe that this version of onebit can read ({error})") from None


def _note(changes: dict[str, Any], node: Any, path: list[str], text: str, whole: str) -> None:
    """Put an override into the tree of changes to a dataclass."""
    names = {f.name: f for f in fields(node)}
    if path[0] not in names:
        raise ValueError(f"--set {whole}: {type(node).__name__} has no {path[0]!r}{_near(path[0], names)}")
    value = getattr(node, path[0])
    if is_dataclass(value):
        if len(path) == 1:
            inner = ", ".join(f.name for f in fields(value))
            raise ValueError(f"--set {whole}: expected one of its fields, as {whole}.NAME={text} ({inner})")
        _note(changes.setdefault(path[0], {}), value, path[1:], text, whole)
        return
    if len(path) > 1:
        raise ValueError(
            f"--set {whole}: {path[0]} is a single value; there is no {'.'.join(path[1:])} in it"
        )
    changes[path[0]] = _parse(text, get_type_hints(type(node))[path[0]], whole)


def _changed(node: Any, changes: dict[str, Any]) -> Any:
    inner = {name: _changed(getattr(node, name), c) for name, c in changes.items() if isinstance(c, dict)}
    return replace(node, **(changes | inner))


def _parse(text: str, kind: Any, whole: str) -> Any:
    options = get_args(kind) if get_origin(kind) is not tuple else ()
    literals = [a for o in (kind, *options) if get_origin(o) is Literal for a in get_args(o)]
    if text in literals:
        return text
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        return tuple(_parse(part, item, whole) for part in text.split(",") if part)
    if type(None) in options and text in ("none", "null"):
        return None
    if kind is bool and text in ("true", "false"):
        return text == "true"
    if kind is str:
        return text
    for number in (int, float):
        if kind is number or number in options:
            try:
                return number(text)
            except ValueError:
                break
    names = {bool: "true or false", int: "a whole number", float: "a number", type(None): "none"}
    expected = [*map(str, literals), *(names[o] for o in (kind, *options) if o in names)]
    raise ValueError(f"--set {whole}: {text!r} does not fit; expected {' or '.join(expected)}")


def _near(name: str, known: Mapping[str, Any]) -> str:
    near = get_close_matches(name, known, 1)
    return f"; did you mean {near[0]!r}?" if near else ""

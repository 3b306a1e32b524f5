"""The fields of a recipe: the whole description of a run, how it is changed, and how it is read back.

    recipe = override(recipe, ["optim.lr=1e-3", "steps=200"])

Every field can be overridden by `--set a.b=c`. Knows no recipe by name: those are in recipes.py.
"""

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from onebit.config import ModelConfig
from onebit.formats.tensors import named, parse_json
from onebit.train.optim import Schedule

# What a resumed run may change: where things lie and what is written of them, but no loss.
_MAY_CHANGE = {
    "distill.corpus", "evaluate_every", "evaluate_sequences", "save_every", "health_every", "tensorboard",
}  # fmt: skip
# Fields of a model that may change when training goes on from another one.
ROUNDING = ("weights", "layer_weights", "activations", "scale", "hadamard")
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
    "options.lambda_steps": (0, 2**31 - 1),
    "options.noise": _ANY_SIZE,
    "options.gradient_limit": _ANY_SIZE,
    "options.latent_clip": _ANY_SIZE,
    "options.stabilise": _ANY_SIZE,
    "options.l1": _ANY_SIZE,
    "options.l2": _ANY_SIZE,
    "options.ema": _BELOW_ONE,
    "options.first_share": (0.0, 1.0),
    "steps": _ANY_COUNT,
    "batch_size": _ANY_COUNT,
    "accumulate": _ANY_COUNT,
    "threads": (0, 1024),
    "seed": (0, 2**63 - 1),
    "evaluate_every": _ANY_COUNT,
    "evaluate_sequences": _ANY_COUNT,
    "save_every": _ANY_COUNT,
    "health_every": (0, 2**31 - 1),
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
class Options:
    """What a run does beyond the plain estimator; all of it is off by default, and off changes no bit.

    Args:
        optimizer: "adamw"; "signum": w -= lr * sign(moving average of gradients), which wants a lower lr; "muon":
            steps of the layers' matrices are made orthogonal, at the lr of AdamW.
        lambda_steps: over so many steps rounding sets in: w + lambda (Q(w) - w), lambda rising to 1.
        noise: temperature of stochastic rounding of activations: a code is the upper neighbour with probability
            sigmoid((fraction - 1/2) / noise), a sign is + with sigmoid(x / (scale * noise)).
        gradient_limit: largest norm of a token's gradient at the output of a linear layer, before it passes through
            the rounding, as a multiple of the root mean square over all tokens: our reading of clipping before the
            estimator.
        latent_clip: largest magnitude of a weight behind a code, as a multiple of the mean magnitude of its matrix.
        stabilise: mean magnitude of the weights of each matrix, and so the scale of its codes, that is held.
        l1: times sign(w), added to the gradient of the linear layers' weights.
        l2: times w, the same.
        learned_scale: a learned gain of each output channel multiplies its weights before they are rounded; it needs
            model.scale = "row", and is part of the weights when the model is saved.
        ema: decay of a moving average of all weights, which is what is measured and saved; ternary models lose by it.
        first_activations: quantiser of the first phase of the run: "a8" before a model of "a4" or "a4.8".
        first_share: share of the steps in the first phase.

    Source: signum, arXiv:1802.04434; muon, arXiv:2502.16982; lambda, the Hugging Face article on fine-tuning to 1.58
        bits (2024); clipping of latent weights, arXiv:1511.00363; two phases, arXiv:2411.04965 and arXiv:2504.18415.
    """

    optimizer: Literal["adamw", "signum", "muon"] = "adamw"
    lambda_steps: int = 0
    noise: float = 0.0
    gradient_limit: float = 0.0
    latent_clip: float = 0.0
    stabilise: float = 0.0
    l1: float = 0.0
    l2: float = 0.0
    learned_scale: bool = False
    ema: float = 0.0
    first_activations: Literal["a15", "a8", "a4", "a1"] | None = None
    first_share: float = 0.95


@dataclass(frozen=True)
class Distill:
    """What a student learns from its teacher; see `losses` for the formulas.

    Args:
        teacher: where the teacher was read from.
        teacher_sha256: of its config, tokenizer and weights.
        sub_norm: "none", or "calibrated", which puts norms before the o and down projections, with gains that change
            the teacher the least; that is not nothing. Those of the teacher stay.
        text: weight of the cross-entropy of the text.
        logits: weight of the divergence from the teacher's probabilities.
        temperature: softens both sides of it.
        tau_squared: multiply it by temperature^2.
        cache_logits: so many of the teacher's likeliest tokens are kept on disk, for all positions, and the teacher is
            not asked again; 0 asks it in every step, for all tokens.
        corpus: folder for tokens and cached logits, which several runs may share; "" takes the run's own.
        relations: weight of the relation loss of one layer.
        relation_layer: which; negative numbers count from the last.
        relation_heads: into how many parts queries, keys and values are cut.
        relation_heads_twice: divide by their number once more.
        relation_rope: queries and keys have their rotary positions.

    Source: BitDistill, arXiv:2510.13998. Of the three things in which its authors' code differs from its equations two
        are choices here: `tau_squared` and `relation_heads_twice` are on in the code. The third, a norm before every
        linear layer instead of two, is not: what q, k, v, gate and up read is normed already, and a second norm
        would change little and cost each its own rounding; docs/log.md has the figures. (Theirs: temperature 5, logits
        10 and relations 1e5 for classification, 1 and 1e3 for summaries, queries and keys after rotation.)
    """

    teacher: str
    teacher_sha256: str
    sub_norm: Literal["none", "calibrated"] = "none"
    text: float = 0.0
    logits: float = 1.0
    temperature: float = 1.0
    tau_squared: bool = False
    cache_logits: int = 0
    corpus: str = ""
    relations: float = 0.0
    relation_layer: int = -1
    relation_heads: int = 1
    relation_heads_twice: bool = False
    relation_rope: bool = True

    def __post_init__(self) -> None:
        for name in ("text", "logits", "relations", "temperature"):
            value = getattr(self, name)
            fits = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not fits or not 0 <= value < math.inf or (name == "temperature" and not value):
                least = "above 0" if name == "temperature" else "from 0"
                raise ValueError(f"recipe: distill.{name} is {value!r}; expected a number {least}")
        for name, least_count in (("cache_logits", 0), ("relation_heads", 1)):
            value = getattr(self, name)
            if type(value) is not int or not least_count <= value < 2**24:
                raise ValueError(
                    f"recipe: distill.{name} is {value!r}; expected a whole number from {least_count}"
                )
        for name, kind in get_type_hints(Distill).items():
            allowed = _literals(kind)
            if allowed and getattr(self, name) not in allowed:
                raise ValueError(
                    f"recipe: distill.{name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}"
                )
        if not self.text + self.logits + self.relations:
            raise ValueError("recipe: distill.text, logits and relations are all 0; nothing would be learned")


@dataclass(frozen=True)
class Recipe:
    """A training run, whole: two runs of the same recipe on the same data and machine are the same run.

    Args:
        name: under which it is built.
        model: its vocab_size and special tokens are set from the tokenizer.
        data: what is read.
        optim: schedule of the optimiser.
        options: what goes beyond the plain estimator.
        distill: the teacher and what is learned from it, or None.
        init: the model whose weights and tokenizer the run begins with, as `formats.read` takes it; "" begins anew.
        init_sha256: of its config, tokenizer and weights.
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
        health_every: steps between looks at codes and activations; 0 for none.
        tensorboard: write the metrics as event files of TensorBoard too; needs tensorboard.
    """

    name: str
    model: ModelConfig
    data: Data = field(default_factory=Data)
    optim: Schedule = field(default_factory=Schedule)
    options: Options = field(default_factory=Options)
    distill: Distill | None = None
    init: str = ""
    init_sha256: str = ""
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
    health_every: int = 50
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for path, (low, high) in _LIMITS.items():
            value = attrgetter(path)(self)
            is_whole = isinstance(low, int)
            fits = isinstance(value, int if is_whole else (int, float)) and not isinstance(value, bool)
            if not fits or not low <= value <= high:
                kind = "whole number" if is_whole else "number"
                raise ValueError(f"recipe: {path} is {value!r}; expected a {kind} from {low} to {high}")
        self._check_options()
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"recipe: accumulate {self.accumulate} does not divide batch_size {self.batch_size}"
            )
        if self.data.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"recipe: data.seq_len {self.data.seq_len} exceeds model.max_seq_len {self.model.max_seq_len}, the "
                f"longest text that the model reads"
            )

    def _check_options(self) -> None:
        for name, kind in get_type_hints(Options).items():
            value, allowed = getattr(self.options, name), _literals(kind)
            if allowed and value not in allowed and not (value is None and type(None) in get_args(kind)):
                raise ValueError(f"recipe: options.{name} is {value!r}; expected one of {', '.join(allowed)}")
        is_dense = self.model.weights == "dense"
        if self.options.learned_scale and (is_dense or self.model.scale != "row"):
            raise ValueError(
                f"recipe: options.learned_scale with model.weights {self.model.weights} and model.scale "
                f"{self.model.scale}; it needs rounded weights and --set model.scale=row"
            )
        if self.options.first_activations and is_dense:
            raise ValueError(
                "recipe: options.first_activations with dense weights; their inputs are not rounded"
            )

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON-ready values; distill and init only where there is a teacher, or a model to begin with."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        if self.distill is None:
            del values["distill"]
        if not self.init:
            del values["init"], values["init_sha256"]
        return values


_R = TypeVar("_R", bound=Recipe)


def override(recipe: _R, overrides: list[str]) -> _R:
    """Apply "a.b=c" overrides to a recipe, all at once: fields that must fit together come in any order.

    `optim.lr` alone moves the rates of both stages: `optim.lr_second` keeps its share of it.

    Raises:
        ValueError: an unknown field (with the near miss), or a value of the wrong type.
    """
    changes: dict[str, Any] = {}
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals:
            raise ValueError(
                f"--set {text}: expected NAME=VALUE, as in --set steps=200 or --set optim.lr=1e-3"
            )
        _note(changes, recipe, path.split("."), value, path)
    rates = changes.get("optim", {})
    if "lr" in rates and "lr_second" not in rates and recipe.optim.lr:
        rates["lr_second"] = rates["lr"] * (recipe.optim.lr_second / recipe.optim.lr)
    changed: _R = _changed(recipe, changes)
    return changed


def fields_of(path: Path) -> dict[str, Any]:
    """The fields of a recipe as a run folder keeps them, of whatever kind of run.

    Args:
        path: its recipe.json.

    Raises:
        ValueError: there is none, or it is no JSON object.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} holds no run to resume; start it without --resume")
    with named(path):
        return parse_json(path.read_bytes(), "the recipe")


def read(path: Path) -> Recipe:
    """The recipe that a run folder was started with.

    Args:
        path: its recipe.json.

    Raises:
        ValueError: there is none, that of a tuning run, or not one of this version.
    """
    values = fields_of(path)
    if "chats" in values:
        raise ValueError(
            f"{path.parent}: is a tuning run; go on with: onebit tune --out {path.parent} --resume"
        )
    try:
        values["model"] = ModelConfig.from_dict(values["model"])
        values["data"]["include"] = tuple(values["data"]["include"])
        values["data"], values["optim"] = Data(**values["data"]), Schedule(**values["optim"])
        # Runs that are older than the options have none.
        values["options"] = Options(**values.get("options", {}))
        if "distill" in values:
            values["distill"] = Distill(**values["distill"])
        return Recipe(**values)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not a recipe that this version of onebit can read ({error})") from None


def check_shape(
    chosen: ModelConfig, given: ModelConfig, whose: str, free: tuple[str, ...] = ROUNDING, more: str = ""
) -> None:
    """Check that a model has the shape of the one that it begins as.

    Args:
        chosen: the config to run.
        given: that of the other.
        whose: the middle of the error: what the shape is.
        free: fields that may differ.
        more: the end of the error: what can be chosen besides ROUNDING.

    Raises:
        ValueError: another value of another field.
    """
    for name in (f.name for f in fields(given) if f.name not in free):
        if getattr(chosen, name) != getattr(given, name):
            choices = " ".join(filter(None, (", ".join(ROUNDING), more)))
            raise ValueError(
                f"model.{name} is {getattr(chosen, name)!r}; {whose}, {getattr(given, name)!r}: "
                f"only {choices} can be chosen"
            )


def given_vocabulary(n_tokens: int) -> int:
    """The `data.vocab_size` for a given tokenizer: its size, or the least that a recipe may say."""
    return max(n_tokens, 257)


def check_vocabulary(chosen: Data, given: Data, whose: str) -> None:
    """Check that nobody asked for a vocabulary of another size where the tokenizer is given.

    Raises:
        ValueError: somebody did.
    """
    if chosen.vocab_size != given.vocab_size:
        raise ValueError(f"--set data.vocab_size: the tokenizer is {whose}; leave it out")


def differences(before: Recipe, now: Recipe) -> list[str]:
    """The fields, with both values, in which a recipe differs so that its losses would not be those of the run."""
    then, today = _flat(before.to_dict()), _flat(now.to_dict())
    return [
        f"{path}: {json.dumps(then.get(path))} in the run, {json.dumps(today.get(path))} now"
        for path in then | today
        if then.get(path) != today.get(path) and path not in _MAY_CHANGE
    ]


def _flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Nested values by their dotted paths."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{above}{name}.") if isinstance(value, dict) else {above + name: value}
    return flat


def _note(changes: dict[str, Any], node: Any, path: list[str], text: str, whole: str) -> None:
    """Put an override into the tree of changes to a dataclass."""
    names = {f.name: f for f in fields(node)}
    if path[0] not in names:
        where = whole.removesuffix(".".join(path)).rstrip(".") or "a recipe"
        raise ValueError(
            f"--set {whole}: {where} has no {path[0]!r}{near(path[0], names)}; there are {', '.join(names)}"
        )
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
    literals = _literals(kind)
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


def _literals(kind: Any) -> list[Any]:
    """The texts that a type hint allows, where it names them."""
    options = (kind, *get_args(kind)) if get_origin(kind) is not tuple else ()
    return [a for o in options if get_origin(o) is Literal for a in get_args(o)]


def near(name: str, known: Mapping[str, Any]) -> str:
    """The end of an error message: the known name that comes near, if one does."""
    found = get_close_matches(name, known, 1)
    return f"; did you mean {found[0]!r}?" if found else ""

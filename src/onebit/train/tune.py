"""Supervised fine-tuning: a model and a file of conversations in, an adapter or a tuned master out.

    tune(plan("stories.onebit", Path("chat.jsonl"), ["lora.r=8"]), Path("runs/chat"))

The base is any model that runs; with adapters its weights stay as they are, packed codes included. `full` trains all
weights instead, of a packed model those that stand in for the ones behind its codes (see origin.py). Only answers are
learned (see chat.py).
"""

import shlex
from dataclasses import dataclass, field, fields, replace
from math import ceil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from onebit import formats
from onebit.checkpoint import Checkpoint, quantize
from onebit.config import ModelConfig
from onebit.engine.tokenizer import Tokenizer
from onebit.formats import adapter as adapters
from onebit.formats import run
from onebit.formats.adapter import MAX_RANK, TARGETS
from onebit.nn import lora
from onebit.nn.transformer import Transformer
from onebit.train import chat, ranks, state
from onebit.train.loop import fit
from onebit.train.optim import Schedule
from onebit.train.origin import first_model
from onebit.train.recipe import Data, Options, Recipe, check_vocabulary, fields_of, given_vocabulary, override
from onebit.train.task import Batch, Task

# Times that the conversations are read unless steps are given.
PASSES = 3
_WARMUP_SHARE = 0.05


@dataclass(frozen=True)
class Lora:
    """The size of an adapter.

    Args:
        r: rank of the change of each layer.
        alpha: the change is multiplied by alpha / r.
        targets: linear layers that get one.
    """

    r: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        if type(self.r) is not int or not 1 <= self.r <= MAX_RANK:
            raise ValueError(f"lora.r is {self.r!r}; expected a whole number from 1 to {MAX_RANK}")
        if not 0 < self.alpha < 2.0**31:
            raise ValueError(f"lora.alpha is {self.alpha!r}; expected a positive number")
        adapters.parse_targets(self.targets)


@dataclass(frozen=True, kw_only=True)
class TuneRecipe(Recipe):
    """A tuning run, whole: `data.seq_len` is its longest conversation, `model` and `data.vocab_size` are the base's.

    Args:
        base: the model, as `onebit.formats.read` takes it.
        chats: the file of conversations.
        sha256: of its tokens: a resumed run reads the same.
        full: train all weights instead of an adapter.
        lora: the adapter.
        too_long: conversations longer than `data.seq_len`: "drop", or "cut" at the end.
    """

    base: str
    chats: str
    sha256: str = ""
    full: bool = False
    lora: Lora = field(default_factory=Lora)
    too_long: chat.TooLong = "drop"


def plan(base: str, chats: Path, overrides: list[str] | None = None, full: bool = False) -> TuneRecipe:
    """The recipe of a tuning run: its sizes follow from the model and the file.

    Args:
        base: the model.
        chats: the file of conversations.
        overrides: "a.b=c" each.
        full: train all weights instead of an adapter.

    Raises:
        ValueError: an unreadable model or file, a model that cannot be trained so, or a field that is not one.
        OSError: a file that cannot be opened.
    """
    config = _base(base)[0].config
    n_tokens = given_vocabulary(config.vocab_size)
    data = Data(include=(), vocab_size=n_tokens, held_out=0.1, seq_len=config.max_seq_len)
    # Codes move only when the weights behind them do, by as much as they lie from the next code.
    lr = (1e-4 if config.weights == "dense" else 2e-3) if full else 1e-3
    optim = Schedule(lr=lr, lr_second=lr, weight_decay=0.0, switch=1.0, warmup_steps=0, beta2=0.999)
    recipe = TuneRecipe(
        name="tune", model=config, data=data, optim=optim, steps=1, batch_size=8, base=base, chats=str(chats),
        full=full, health_every=50 if full else 0, evaluate_every=50, save_every=100,
    )  # fmt: skip
    changed = override(recipe, overrides or [])
    if changed.model != config or changed.base != base or changed.chats != str(chats):
        raise ValueError("--set model, base, chats: they are those of the model and the file; leave them out")
    check_vocabulary(changed.data, data, "the model's")
    if full and changed.lora != Lora():
        raise ValueError("--set lora with --full, which makes no adapter; leave one of them out")
    if not full and changed.options != Options(optimizer=changed.options.optimizer):
        raise ValueError(
            "--set options: they are about learning the weights behind codes, which an adapter leaves alone"
        )
    if not full and changed.options.optimizer == "muon":
        raise ValueError(
            "options.optimizer=muon is for the matrices of layers, which an adapter leaves as they are; "
            "choose adamw or signum"
        )
    given = {text.partition("=")[0] for text in overrides or []}
    examples = _read(changed)
    steps = changed.steps if "steps" in given else ceil(PASSES * len(examples.train) / changed.batch_size)
    optim = changed.optim
    if "optim.warmup_steps" not in given:
        optim = replace(optim, warmup_steps=round(_WARMUP_SHARE * steps))
    return replace(changed, steps=steps, optim=optim, sha256=examples.sha256)


def read(path: Path) -> TuneRecipe:
    """The recipe that a tuning run was started with.

    Raises:
        ValueError: there is none, or not one of tuning.
    """
    values = fields_of(path)
    if "chats" not in values:
        verb = "distill" if "distill" in values else "train"
        raise ValueError(
            f"{path.parent}: is no tuning run; go on with: onebit {verb} --out {path.parent} --resume"
        )
    try:
        values["model"] = ModelConfig.from_dict(values["model"])
        values["data"]["include"] = tuple(values["data"]["include"])
        values["lora"]["targets"] = tuple(values["lora"]["targets"])
        for name, kind in (("data", Data), ("optim", Schedule), ("options", Options), ("lora", Lora)):
            values[name] = kind(**values[name])
        return TuneRecipe(**{f.name: values[f.name] for f in fields(TuneRecipe) if f.name in values})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path}: not the recipe of a tuning run of this version of onebit ({error})"
        ) from None


@ranks.together()
def tune(recipe: TuneRecipe, out: Path, resume: bool = False) -> None:
    """Tune a model.

    Args:
        recipe: from `plan`, or `read` to resume.
        out: folder of the run; with an adapter it is the adapter's folder too, else a run folder like any other.
        resume: continue from the last saved state.

    Raises:
        ValueError: a run that is already there, conversations that have changed, a damaged state, or a loss that is no
            longer a number.
        OSError: a full disk, ...
    """
    resumed = state.open_folder(recipe, out, read(out / run.RECIPE) if resume else None)
    examples = _read(recipe)
    if examples.sha256 != recipe.sha256:
        raise ValueError(
            f"{recipe.chats}: its tokens are not those that the run began with; give it back, or start another run"
        )
    checkpoint, tokenizer = _base(recipe.base)
    model = _model(checkpoint, recipe)
    if not resume:
        ranks.first(lambda: state.start(recipe, out))
    console = Console(stderr=True, quiet=not ranks.is_first())
    console.print(_summary(examples), highlight=False, soft_wrap=True)
    task = answers(recipe, examples, checkpoint, out)
    fit(recipe, task, model, out, resumed)


def answers(recipe: TuneRecipe, chats: chat.Chats, checkpoint: Checkpoint, out: Path) -> Task:
    """The task of saying the answers of conversations.

        loss = mean over the answer tokens of a batch of -log p(token | those before it)

    Args:
        recipe: of the run.
        chats: its examples.
        checkpoint: the base, for what the result says of itself.
        out: where the result goes, for the command that runs it.
    """
    evaluated = chats.held_out
    base_codes = None if recipe.full else adapters.fingerprint(checkpoint)
    mean_tokens = sum(len(e.tokens) for e in chats.train) / len(chats.train)

    def batch(step: int) -> Batch:
        made = chat.batch(chats.train, step, recipe.batch_size, recipe.seed)
        return Batch((made.tokens, made.targets), made.n_answer_tokens)

    def measure(model: Transformer, full: bool) -> dict[str, float]:
        some = evaluated if full else evaluated[: recipe.evaluate_sequences]
        return {"held_out_nats_per_token": answer_loss(model, some)} if some else {}

    def write(model: Transformer, provenance: dict[str, Any], folder: Path) -> None:
        learned = lora.detach(model, recipe.lora.r, recipe.lora.alpha)
        adapters.write(replace(learned, base_codes=base_codes), folder, recipe.base)

    again = shlex.join(["onebit", "run", "-m", recipe.base, "--adapter", str(out)])
    return Task(
        batch, answer_losses, measure, round(mean_tokens * recipe.batch_size), checkpoint.tokenizer,
        checkpoint.chat_template, {"chats_sha256": chats.sha256, "base": checkpoint.provenance},
        None if recipe.full else write, None if recipe.full else again, "nats per answer token",
    )  # fmt: skip


def answer_losses(model: Transformer, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """Negative log likelihood of each answer token, float32 [B * T]; 0 for all other tokens."""
    logits = model(tokens_BT).flatten(0, 1)
    return F.cross_entropy(logits, targets_BT.flatten(), reduction="none", ignore_index=chat.IGNORED)


def answer_loss(model: Transformer, examples: list[chat.Example]) -> float:
    """Mean loss of the answer tokens of some examples, in nats."""
    device = model.cos.device
    nats, n_tokens = 0.0, 0
    with torch.no_grad():
        for example in examples:
            made = chat.pad([example])
            arrays = (torch.from_numpy(array).to(device) for array in made[:2])
            nats += answer_losses(model, *arrays).double().sum().item()
            n_tokens += made.n_answer_tokens
    return nats / n_tokens


def _base(base: str) -> tuple[Checkpoint, Tokenizer]:
    """The model to start from, and its tokenizer."""
    checkpoint = formats.read(base)
    config = checkpoint.config
    if checkpoint.tokenizer is None:
        raise ValueError(f"{base}: has no tokenizer, and conversations are texts")
    end = next(iter(config.eos_tokens), None)
    return checkpoint, Tokenizer(checkpoint.tokenizer, config.bos_token, checkpoint.chat_template, end)


def _read(recipe: TuneRecipe) -> chat.Chats:
    checkpoint, tokenizer = _base(recipe.base)
    source = recipe.data
    return chat.read(
        Path(recipe.chats), tokenizer, checkpoint.config, source.seq_len, source.held_out, recipe.too_long
    )


def _model(checkpoint: Checkpoint, recipe: TuneRecipe) -> Transformer:
    if recipe.full:
        return first_model(checkpoint)
    model = Transformer.from_packed(quantize(checkpoint))
    lora.attach(model, recipe.lora.r, recipe.lora.alpha, recipe.lora.targets, recipe.seed)
    return model


def _summary(chats: chat.Chats) -> str:
    n_answer = sum(int(e.is_answer.sum()) for e in chats.train)
    n_tokens = sum(len(e.tokens) for e in chats.train)
    facts = [f"{len(chats.train)} conversations, {n_tokens:,} tokens, {n_answer:,} of them answers"]
    facts += [f"{len(chats.held_out)} held out"] if chats.held_out else []
    facts += [f"{chats.n_dropped} too long and left out"] if chats.n_dropped else []
    facts += [f"{chats.n_cut} cut at the end"] if chats.n_cut else []
    return "; ".join(facts)

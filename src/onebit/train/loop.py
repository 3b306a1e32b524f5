"""The whole training loop: forward, backward, step, measure, save; nothing hidden behind callbacks.

    train(build("stories"), data=Path("texts"), out=Path("runs/stories"))

A run folder holds everything: recipe.json, corpus/, metrics.jsonl, loss.png, health.png, state.safetensors (to resume)
and the model itself (config.json, model.safetensors, tokenizer.json). Killing a run at any moment and resuming it gives
the losses, to the bit, of a run that was never killed.

What is learned is a `Task`; `train` is the one of predicting the next token, `fit` the loop for all of them.
"""

import json
import math
import os
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from onebit import formats
from onebit.checkpoint import Checkpoint
from onebit.formats.files import naming
from onebit.nn.transformer import Transformer
from onebit.train import data as text
from onebit.train import health, optimizers, options, ranks, state
from onebit.train.board import Board
from onebit.train.origin import fingerprint, first_model, given_tokenizer
from onebit.train.pictures import draw
from onebit.train.recipe import Recipe
from onebit.train.state import METRICS
from onebit.train.task import Task, next_token


@ranks.together()
def train(recipe: Recipe, data: Path | None, out: Path, resume: bool = False) -> None:
    """Train a recipe on a folder of text.

    Args:
        recipe: what to do.
        data: folder with text; None to resume a run whose corpus is made.
        out: run folder; made, and refused if it already holds a run, unless resume is set.
        resume: continue from the last saved state.

    Raises:
        ValueError: bad data, a run that is already there, nothing to resume, a recipe that is not the run's, a damaged
            state, or a loss that is no longer a number or has climbed for good (the last good state is kept).
        OSError: a missing folder, a full disk, ...
    """
    if recipe.distill is not None:
        raise ValueError(f"{out} is the run of a student; go on with: onebit distill --out {out} --resume")
    begun = _begun_with(recipe)
    resumed = state.open_run(recipe, data, out, resume)
    source, given = recipe.data, given_tokenizer(begun) if begun else None
    corpus = ranks.in_turn(
        lambda: text.prepare(
            data, out / "corpus", source.include, source.vocab_size, source.held_out, source.seq_len, given
        ),
        out / "corpus" / "corpus.json",
    )
    if not resume:
        # Bad data has left no trace in the folder.
        ranks.first(lambda: state.start(recipe, out))
    task = next_token(recipe, corpus)
    if begun:
        model = first_model(replace(begun, config=recipe.model))
        task = replace(task, chat_template=begun.chat_template)
        task.provenance["init"] = begun.provenance
    else:
        end = corpus.end_token
        config = replace(recipe.model, vocab_size=source.vocab_size, bos_token=end, eos_tokens=(end,))
        model = Transformer(config, recipe.seed, learned_scale=recipe.options.learned_scale)
    fit(recipe, task, model, out, resumed)


def _begun_with(recipe: Recipe) -> Checkpoint | None:
    """The model that a run begins with, if there is one."""
    if not recipe.init:
        return None
    model = formats.read(recipe.init)
    if (found := fingerprint(model)) != recipe.init_sha256:
        raise ValueError(
            f"{recipe.init}: not the model that the run began with ({found[:16]}, expected "
            f"{recipe.init_sha256[:16]}); give it back, or start another run"
        )
    return model


@ranks.together()
def fit(recipe: Recipe, task: Task, model: Transformer, out: Path, resumed: bool = False) -> None:
    """Train a model by a recipe on any task.

    Args:
        recipe: schedule, precision, options; its `data` is the task's business.
        task: batches, losses and measurements.
        model: with the weights to start from.
        out: run folder, which holds the recipe; see `state.open_run` and `state.start`.
        resumed: continue from the state in it.

    Raises:
        ValueError: see `train`.
        OSError: a full disk, ...
    """
    ranks.check(recipe.batch_size, recipe.accumulate)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ranks.shard(model, model.layers, device)
    optim = recipe.optim
    linear = [p for name, p in model.named_parameters() if model.config.is_linear(name)]
    optimizer = optimizers.make(recipe.options.optimizer, optim, model.parameters(), linear)
    extras: dict[str, Tensor] = {}
    saved_in = state.latest(out) if resumed else None
    first = state.restore(saved_in, model, optimizer, extras, recipe, task) if saved_in else 0
    watch = health.Watch()
    for past in ranks.first(lambda: state.keep_metrics(out / METRICS, first)):
        if past["step"] >= recipe.options.lambda_steps:
            watch.add(past["loss"])
    losses = ranks.fused(task.losses, model.layers) if recipe.compile else task.losses

    console = Console(stderr=True, quiet=not ranks.is_first())
    console.print(_ahead(recipe, model, task, first), highlight=False, soft_wrap=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    seconds = 0.0
    saved = first
    measured: dict[str, float] = {}
    path = out / METRICS if ranks.is_first() else Path(os.devnull)
    with ExitStack() as stack:
        stack.enter_context(naming(path))
        progress = stack.enter_context(Progress(*columns, console=console))
        metrics = stack.enter_context(path.open("a", buffering=1))
        board = Board(out, first) if recipe.tensorboard and ranks.is_first() else None
        if board:
            stack.callback(board.close)
        bar = progress.add_task(recipe.name, total=recipe.steps, completed=first, note="")
        for step in range(first, recipe.steps):
            started = time.perf_counter()
            lr, decay = optim.at(step, recipe.steps)
            optimizer.param_groups[0]["weight_decay"] = decay
            for group in optimizer.param_groups:
                group["lr"] = lr
            options.set_rounding(model.rounding, recipe, step, device)
            batch = task.batch(step)
            arrays = tuple(torch.from_numpy(ranks.mine(array)).to(device) for array in batch.arrays)
            loss = 0.0
            for part in zip(*(array.chunk(recipe.accumulate) for array in arrays), strict=True):
                with _precision(recipe, device):
                    part_loss = losses(model, *part).sum() / batch.n_losses
                # Gradients of several processes are averaged.
                (part_loss * ranks.count()).backward()
                loss += part_loss.item()
            loss = ranks.total(loss)
            options.regularise(model, recipe.options.l1, recipe.options.l2)
            is_look = recipe.health_every > 0 and (step + 1) % recipe.health_every == 0
            # Before clipping, which changes gradients in place.
            norms = health.gradient_norms(model) if is_look else []
            norm_of_all = torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip or math.inf)
            norm = ranks.whole(norm_of_all).item()
            # While rounding sets in the loss may climb: a student begins as its teacher.
            is_watched = step >= recipe.options.lambda_steps
            if not math.isfinite(loss + norm) or (is_watched and watch.add(loss)):
                raise ValueError(_diverged(step, loss, norm, watch, saved, out))
            optimizer.step()
            optimizer.zero_grad()
            options.settle(model, recipe, extras)

            record: dict[str, Any] = {
                "step": step,
                "loss": loss,
                "lr": lr,
                "weight_decay": decay,
                "grad_norm": norm,
            }
            done = step + 1 == recipe.steps
            if is_look:
                record["grad_norms"] = norms
                record |= health.look(model, task.losses, arrays, _precision(recipe, device), extras)
            if done or (step + 1) % recipe.evaluate_every == 0:
                with options.as_packed(model, extras):
                    measured = task.measure(model, done)
                record |= measured
            seconds += time.perf_counter() - started
            record["tok_per_s"] = round((step + 1 - first) * task.tokens_per_step / seconds)
            metrics.write(json.dumps(record) + "\n")
            if board:
                board.add(record)
            if done or ((step + 1) % recipe.save_every == 0 and not watch.n_high):
                if ranks.is_first():
                    os.fsync(metrics.fileno())
                if board:
                    board.flush()
                state.save(out, model, optimizer, extras, task, recipe, step + 1)
                saved = step + 1
            if ranks.is_first() and (done or (step + 1) % recipe.evaluate_every == 0):
                try:
                    draw(out, task.loss)
                except Exception as error:
                    # No picture is worth a run; a disk that is full stops it at its next file.
                    console.print(f"onebit: no picture after step {step}: {error}", highlight=False)
            note = f"loss {loss:.3f}, {record['tok_per_s']} tok/s"
            progress.update(bar, completed=step + 1, note=note)
    if first < recipe.steps:
        named = {name.removeprefix("held_out_").replace("_", " "): value for name, value in measured.items()}
        figures = ", ".join(f"{value:.3f} {name}" for name, value in named.items())
        if figures:
            console.print(f"Held out: {figures}.", highlight=False)
    command = task.command or f"onebit run -m {out}"
    what = "adapter" if task.command else "model"
    console.print(f"The {what} is in {out}: {command}", highlight=False, soft_wrap=True)


def _ahead(recipe: Recipe, model: Transformer, task: Task, first: int) -> str:
    """What a run is about to do."""
    left = recipe.steps - first
    if not left:
        return f"Nothing is left to do: all {first} steps of this run are done."
    n_weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    what = f"{n_weights:,} weights to train, {left:,} steps of {task.tokens_per_step:,} tokens"
    if recipe.compile:
        what += "; the first takes a minute longer, to compile"
    steps, warmup = recipe.steps, recipe.optim.warmup_steps
    if 2 * warmup > steps:
        highest = max(recipe.optim.at(step, steps)[0] for step in range(steps))
        what += (
            f".\nThe learning rate rises for {warmup} of {steps} steps, and gets to {highest:.2g} of "
            f"{recipe.optim.lr:g}; a short run wants less, as --set optim.warmup_steps={steps // 10}"
        )
    return f"{what}."


def _diverged(step: int, loss: float, norm: float, watch: health.Watch, saved: int, out: Path) -> str:
    """Why a run stops, and what is left of it."""
    what = f"step {step}: loss {loss}, gradient norm {norm}"
    if math.isfinite(loss + norm):
        what = f"step {step}: loss {loss:.4f}, for {watch.n_high} steps above {watch.bound:.4f} (best {watch.best:.4f})"
    kept = (
        f"{state.latest(out)} holds the last good state, after {saved} steps"
        if saved
        else "no state was saved yet"
    )
    return f"training diverged at {what}; {kept}. Start another run with a lower optim.lr"


def _precision(recipe: Recipe, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if recipe.precision == "bf16" else nullcontext()

"""The whole training loop: forward, backward, step, measure, save; nothing hidden behind callbacks.

    train(build("stories"), data=Path("texts"), out=Path("runs/stories"))

A run folder holds everything: recipe.json, corpus/, metrics.jsonl, loss.png, state.safetensors (to resume) and the
model itself (config.json, model.safetensors, tokenizer.json). Killing a run at any moment and resuming it gives the
losses, to the bit, of a run that was never killed.
"""

import io
import json
import math
import os
import re
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional as F

from onebit.checkpoint import Checkpoint
from onebit.formats import run, tensors
from onebit.formats.files import write_file
from onebit.nn.transformer import Transformer
from onebit.train import data as text
from onebit.train.recipes import Recipe, read

STATE = "state.safetensors"
METRICS = "metrics.jsonl"
PICTURE = "loss.png"
_MOMENTS = (".exp_avg", ".exp_avg_sq")


def train(recipe: Recipe, data: Path | None, out: Path, resume: bool = False) -> None:
    """Train a recipe on a folder of text.

    Args:
        recipe: what to do.
        data: folder with text; None to resume a run whose corpus is made.
        out: run folder; made, and refused if it already holds a run, unless resume is set.
        resume: continue from the last saved state.

    Raises:
        ValueError: bad data, a run that is already there, nothing to resume, a recipe that is not the run's, a damaged
            state, or a loss that is no longer a number (the last saved state is kept).
        OSError: a missing folder, a full disk, ...
    """
    resumed = _open_run(recipe, data, out, resume)
    source = recipe.data
    corpus = text.prepare(
        data, out / "corpus", source.include, source.vocab_size, source.held_out, source.seq_len
    )
    if not resume:
        # From here on the folder holds a run; bad data has left no trace in it.
        write_file(out / run.RECIPE, [json.dumps(recipe.to_dict(), indent=2).encode() + b"\n"])
    end = corpus.end_token
    config = replace(recipe.model, vocab_size=source.vocab_size, bos_token=end, eos_tokens=(end,))

    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Transformer(config, recipe.seed).to(device)
    optim = recipe.optim
    # Norm gains are not pulled towards zero.
    decayed: dict[str, Any] = {"params": [p for p in model.parameters() if p.ndim == 2]}
    others: dict[str, Any] = {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW(
        [decayed, others], lr=optim.lr, betas=(optim.beta1, optim.beta2), fused=True
    )
    first = _restore(out / STATE, model, optimizer, recipe.steps) if resumed else 0
    _keep_metrics(out / METRICS, first)
    token_losses = torch.compile(_token_losses) if recipe.compile else _token_losses

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    seconds = 0.0
    with Progress(*columns, console=console) as progress, (out / METRICS).open("a", buffering=1) as metrics:
        bar = progress.add_task(recipe.name, total=recipe.steps, completed=first, note="")
        for step in range(first, recipe.steps):
            started = time.perf_counter()
            lr, decay = optim.at(step, recipe.steps)
            optimizer.param_groups[0]["weight_decay"] = decay
            for group in optimizer.param_groups:
                group["lr"] = lr
            tokens = text.batch(corpus.train, step, recipe.batch_size, source.seq_len, recipe.seed)
            loss = 0.0
            for part in torch.from_numpy(tokens).to(device).chunk(recipe.accumulate):
                with _precision(recipe, device):
                    part_loss = token_losses(model, part).sum() / (recipe.batch_size * source.seq_len)
                part_loss.backward()
                loss += part_loss.item()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip or math.inf).item()
            if not math.isfinite(loss + norm):
                raise ValueError(
                    f"step {step}: loss {loss}, gradient norm {norm}; lower optim.lr and resume from the last "
                    f"saved state in {out}"
                )
            optimizer.step()
            optimizer.zero_grad()

            record: dict[str, Any] = {
                "step": step,
                "loss": loss,
                "lr": lr,
                "weight_decay": decay,
                "grad_norm": norm,
            }
            done = step + 1 == recipe.steps
            if done or (step + 1) % recipe.evaluate_every == 0:
                limit = None if done else recipe.evaluate_sequences
                record["held_out_bits_per_byte"] = bits_per_byte(model, corpus, source.seq_len, limit)
            seconds += time.perf_counter() - started
            record["tok_per_s"] = round((step + 1 - first) * recipe.batch_size * source.seq_len / seconds)
            metrics.write(json.dumps(record) + "\n")
            if "held_out_bits_per_byte" in record:
                draw(out)
            if done or (step + 1) % recipe.save_every == 0:
                os.fsync(metrics.fileno())
                _save(out, model, optimizer, corpus, recipe, step + 1)
            note = f"loss {loss:.3f}, {record['tok_per_s']} tok/s"
            progress.update(bar, completed=step + 1, note=note)
    if first < recipe.steps:
        console.print(
            f"Held-out text: {record['held_out_bits_per_byte']:.3f} bits per byte.", highlight=False
        )
    console.print(f"The model is in {out}: onebit run -m {out}", highlight=False, soft_wrap=True)


def bits_per_byte(model: Transformer, corpus: text.Corpus, seq_len: int, limit: int | None = None) -> float:
    """Cross-entropy of the held-out text in bits per byte of UTF-8, in float32.

        sum of -log2 p(token | those before it in its sequence) / bytes of those tokens

    Args:
        model: the model that is trained.
        corpus: its held-out tokens, cut into consecutive sequences.
        seq_len: tokens predicted in each.
        limit: sequences at most, evenly spread; None for all.
    """
    tokens = corpus.held_out
    starts = np.arange((len(tokens) - 1) // seq_len) * seq_len
    if limit is not None and limit < len(starts):
        starts = starts[np.linspace(0, len(starts) - 1, limit).astype(int)]
    device = next(model.parameters()).device
    nats, n_bytes = 0.0, 0
    with torch.no_grad():
        for start in starts:
            row = np.asarray(tokens[start : start + seq_len + 1]).astype(np.int64)
            nats += _token_losses(model, torch.from_numpy(row[None]).to(device)).double().sum().item()
            n_bytes += int(corpus.token_bytes[row[1:]].sum())
    return nats / math.log(2) / n_bytes


def draw(out: Path) -> None:
    """Draw the training and held-out losses of a run folder into its loss.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    axes[0].plot([r["step"] for r in records], [r["loss"] for r in records], linewidth=0.6)
    axes[0].set(xlabel="step", ylabel="training loss, nats per token")
    held_out = [r for r in records if "held_out_bits_per_byte" in r]
    axes[1].plot([r["step"] for r in held_out], [r["held_out_bits_per_byte"] for r in held_out], marker=".")
    axes[1].set(xlabel="step", ylabel="held-out text, bits per byte")
    for axis in axes:
        axis.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)
    write_file(out / PICTURE, [picture.getvalue()])


def _token_losses(model: Transformer, tokens_BT: Tensor) -> Tensor:
    """Negative log likelihood of each token after the first, float32 [B * (T - 1)]."""
    logits = model(tokens_BT[:, :-1]).flatten(0, 1)
    return F.cross_entropy(logits, tokens_BT[:, 1:].flatten(), reduction="none")


def _precision(recipe: Recipe, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if recipe.precision == "bf16" else nullcontext()


def _open_run(recipe: Recipe, data: Path | None, out: Path, resume: bool) -> bool:
    """Check that the folder may be used; return whether there is a state to restore."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; --out expects a folder")
    path = out / run.RECIPE
    if not resume:
        if path.exists():
            raise ValueError(f"{out} already holds a run; continue it with --resume or choose another --out")
        text.check_folder(data)
        # A corpus without a recipe may be that of any other.
        (out / "corpus" / "corpus.json").unlink(missing_ok=True)
        return False
    before, now = read(path).to_dict(), recipe.to_dict()
    for name in now:
        if before[name] != now[name]:
            raise ValueError(
                f"{out}: the run's {name} is {json.dumps(before[name])}, this recipe's {json.dumps(now[name])}; "
                f"resume with the same recipe, or start another run"
            )
    return (out / STATE).exists()


def _save(
    out: Path,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    corpus: text.Corpus,
    recipe: Recipe,
    step: int,
) -> None:
    """Write the state to resume from, then the model; each file is whole or the one before it."""
    weights = {name: _array(p) for name, p in model.named_parameters()}
    provenance = {
        "recipe": recipe.to_dict(),
        "corpus_sha256": corpus.sha256,
        "steps": step,
        "tokens": step * recipe.batch_size * recipe.data.seq_len,
    }
    # Made before anything is written: it refuses weights that are no longer numbers.
    checkpoint = Checkpoint(model.config, {**weights}, corpus.tokenizer, None, provenance)
    state = dict(weights)
    for name, parameter in model.named_parameters():
        moments = optimizer.state[parameter]
        state |= {f"{name}{key}": _array(moments[key[1:]]) for key in _MOMENTS}
    tensors.write(out / STATE, {"step": str(step)}, state)
    run.write(checkpoint, out)


def _restore(path: Path, model: Transformer, optimizer: torch.optim.Optimizer, steps: int) -> int:
    """Load weights and moments; return the number of steps that were done, at most those of the run."""
    with tensors.named(path):
        header, contents = tensors.split_header(tensors.map_file(path))
        state = {name: torch.from_numpy(a.copy()) for name, a in tensors.views(header, contents).items()}
        text = header["__metadata__"].get("step", "")
        step = int(text) if re.fullmatch("[0-9]{1,10}", text) else -1
        shapes = {f"{n}{k}": p.shape for n, p in model.named_parameters() for k in ("", *_MOMENTS)}
        if {name: a.shape for name, a in state.items()} != shapes or not 0 <= step <= steps:
            raise ValueError("not the state of this recipe's model; the file is damaged")
    for name, parameter in model.named_parameters():
        parameter.data.copy_(state[name])
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step), device=parameter.device),
            "exp_avg": state[f"{name}.exp_avg"].to(parameter.device),
            "exp_avg_sq": state[f"{name}.exp_avg_sq"].to(parameter.device),
        }
    return step


def _keep_metrics(path: Path, steps: int) -> None:
    """Drop the records of steps that will be done again, and a last line that a kill cut short."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    write_file(path, ["".join(lines[:steps]).encode()])


def _array(tensor: Tensor) -> npt.NDArray[np.float32]:
    array: npt.NDArray[np.float32] = tensor.detach().cpu().numpy()
    return array

"""What a run learns, apart from how: its batches, its losses, its measurements. The loop knows nothing else of it.

    task = next_token(recipe, corpus)          # or one of your own: distillation, tuning, ...
    fit(recipe, task, Transformer(config, recipe.seed), out, first)

A task is three functions and what they need lies in their closures. Each is a pure function of its arguments, so that a
resumed run does what the killed one would have done.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from onebit.nn.transformer import Transformer
from onebit.train import data as text
from onebit.train.recipe import Recipe


class Batch(NamedTuple):
    """The examples of one step.

    Args:
        arrays: each [batch_size, ...]; all are cut alike where a batch is split into parts.
        n_losses: what the sum of the losses of all parts is divided by: the number of tokens that count.
    """

    arrays: tuple[np.ndarray, ...]
    n_losses: int


@dataclass(frozen=True)
class Task:
    """What the loop asks of whatever is trained.

        loss of a step = (sum of losses(model, *part) over its parts) / n_losses

    Args:
        batch: from the number of a step to its examples.
        losses: from the model and the arrays of a part, as tensors on its device, to losses of any shape, float32. It
            runs under autocast where the recipe asks for bf16, and is what `compile` fuses.
        measure: from the model, and whether to take everything that is held out, to figures by name. Names that begin
            with "held_out_" are drawn.
        tokens_per_step: of `batch`, for the speed and the provenance.
        tokenizer: bytes of the model's tokenizer.json.
        chat_template: of the model, or None.
        provenance: what the model's file says of the data, besides the recipe.
        write: writes what was learned into the run folder, from the model and its provenance; None writes the float32
            master.
        command: how the result is run; None for that of a run folder.
        loss: what the losses are, for the picture.
    """

    batch: Callable[[int], Batch]
    losses: Callable[..., Tensor]
    measure: Callable[[Transformer, bool], dict[str, float]]
    tokens_per_step: int
    tokenizer: bytes | None
    chat_template: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    write: Callable[[Transformer, dict[str, Any], Path], None] | None = None
    command: str | None = None
    loss: str = "nats per token"


def next_token(recipe: Recipe, corpus: text.Corpus) -> Task:
    """Predicting every token of a corpus from those before it; measured in bits per byte of held-out text."""
    seq_len, n_tokens = recipe.data.seq_len, recipe.batch_size * recipe.data.seq_len

    def batch(step: int) -> Batch:
        tokens = text.batch(corpus.train, step, recipe.batch_size, seq_len, recipe.seed)
        return Batch((tokens,), n_tokens)

    def measure(model: Transformer, full: bool) -> dict[str, float]:
        limit = None if full else recipe.evaluate_sequences
        return {"held_out_bits_per_byte": bits_per_byte(model, corpus, seq_len, limit)}

    provenance = {"corpus_sha256": corpus.sha256}
    return Task(batch, token_losses, measure, n_tokens, corpus.tokenizer, provenance=provenance)


def token_losses(model: Transformer, tokens_BT: Tensor) -> Tensor:
    """Negative log likelihood of each token after the first, float32 [B * (T - 1)]."""
    logits = model(tokens_BT[:, :-1]).flatten(0, 1)
    return F.cross_entropy(logits, tokens_BT[:, 1:].flatten(), reduction="none")


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
            nats += token_losses(model, torch.from_numpy(row[None]).to(device)).double().sum().item()
            n_bytes += int(corpus.token_bytes[row[1:]].sum())
    return nats / math.log(2) / n_bytes

"""An adapter merged into the weights of its model, and what that costs. Needs no torch.

    merged = merge("stories.onebit", "runs/chat", Path("chat.onebit"), data=Path("chat.jsonl"))
    merged.layers[0].n_flipped, merged.losses

Codes are few: a change smaller than half a step of them leaves no trace. An adapter beside its model loses nothing, so
the report says what merging would lose.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from onebit import formats, quant
from onebit.checkpoint import Checkpoint, Tensor, codes, quantize, rows
from onebit.config import ModelConfig, Weights
from onebit.engine.model import BLOCK_TOKENS, Model
from onebit.engine.tokenizer import Tokenizer
from onebit.formats import adapter as adapters
from onebit.formats.adapter import Adapter
from onebit.packing import Float32, Int8, PackedTensor, pack, pack_bf16, to_bf16
from onebit.train import chat

Scale = Literal["keep", "absmean"]


class Layer(NamedTuple):
    """What became of one matrix.

    Args:
        name: canonical.
        n_weights: in it.
        n_flipped: codes that differ from the model's; of dense weights, numbers that differ.
        scale_ratio: mean scale now, divided by the mean scale before.
        error: |W'' - W'| / |change|, where W'' is what was stored for W' = W + change: 0 where the change was taken
            over whole; 1 where nothing of it was, if W itself needed no rounding.
    """

    name: str
    n_weights: int
    n_flipped: int
    scale_ratio: float
    error: float


class Losses(NamedTuple):
    """Mean loss of answer tokens, in nats.

    Args:
        before: of the model alone.
        unmerged: of the model with the adapter beside it.
        merged: of the result.
        n_tokens: that were measured.
    """

    before: float
    unmerged: float
    merged: float
    n_tokens: int


class Merged(NamedTuple):
    """A finished merge.

    Args:
        layers: in the order of the model.
        losses: None without examples.
    """

    layers: list[Layer]
    losses: Losses | None


def merge(
    model: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: Path,
    data: Path | None = None,
    scale: Scale = "keep",
    encoding: str | None = None,
    head: str | None = None,
    progress: formats.Progress = lambda what, share: None,
) -> Merged:
    """Merge an adapter into its model and write the result.

        W' = W + (B A) * scale of the adapter, rounded as the model rounds its weights

    W is the float32 master where the model has one, else codes * scale.

    Args:
        model: see `onebit.formats.read`.
        adapter: its adapter's folder.
        out: what to write; the suffix is the format, see `onebit.formats.write`.
        data: conversations to measure the loss on, best those that were not trained on.
        scale: of a model that holds codes: "keep" leaves the scales, so that only codes can change; "absmean" takes
            those of W', which are smaller where many codes are zero: W has no values between the codes.
        encoding: see `onebit.formats.write`.
        head: likewise.
        progress: called now and then.

    Raises:
        ValueError: an adapter of another model, bad data, or a format that cannot hold the result.
        OSError: a file cannot be read or written.
    """
    if scale not in ("keep", "absmean"):
        raise ValueError(f"scale is {scale!r}; expected keep or absmean")
    formats.encodings(out)
    checkpoint = formats.read(model)
    change = adapters.read(adapter, checkpoint.config)
    adapters.check_base(change, checkpoint)
    examples = _examples(checkpoint, data) if data else []
    is_master = all(isinstance(tensor, np.ndarray) for tensor in checkpoint.tensors.values())
    base = checkpoint if is_master else quantize(checkpoint)
    tensors, layers = dict(base.tensors), []
    for i, name in enumerate(change.tensors):
        tensors[name], layer = _merged(name, base, change, scale)
        layers.append(layer)
        progress("merging", (i + 1) / len(change.tensors))
    note = {"adapter": {"folder": Path(adapter).name, "rank": change.rank, "alpha": change.alpha}}
    made = replace(base, tensors=tensors, provenance=base.provenance | note)
    formats.write(made, out, encoding, head)
    if not examples:
        return Merged(layers, None)
    losses, n_tokens = [], 0
    for which, adapted in ((base, ()), (base, (change,)), (formats.read(out), ())):
        # One model in memory at a time.
        loss, n_tokens = answer_loss(Model(quantize(which), adapters=adapted), examples)
        losses.append(loss)
        progress("measuring", len(losses) / 3)
    before, unmerged, merged = losses
    return Merged(layers, Losses(before, unmerged, merged, n_tokens))


def answer_loss(model: Model, examples: Sequence[chat.Example]) -> tuple[float, int]:
    """Mean loss of the answer tokens in nats, as the engine computes it, and their number.

    Args:
        model: packed; its first adapter is used if it has one.
        examples: from `onebit.train.chat`.
    """
    nats, n_tokens = 0.0, 0
    for tokens, is_answer in examples:
        ids = tokens[:-1].astype(np.int32)
        at = np.arange(len(ids), dtype=np.int32)
        some = at[is_answer[1:]]
        n_blocks = -(-len(ids) // BLOCK_TOKENS)
        table = np.arange(n_blocks, dtype=np.int32)[None]
        ends, which = np.array([0, len(ids)], np.int32), np.array([0 if model.n_adapters else -1], np.int32)
        cache = model.new_cache(n_blocks)
        logits = model.forward(ids, at, ends, table, some, cache, adapters=which).astype(np.float64)
        best = logits.max(axis=-1)
        total = best + np.log(np.exp(logits - best[:, None]).sum(axis=-1))
        nats += float((total - logits[np.arange(len(some)), tokens[some + 1]]).sum())
        n_tokens += len(some)
    return nats / n_tokens, n_tokens


def _examples(checkpoint: Checkpoint, data: Path) -> list[chat.Example]:
    config = checkpoint.config
    if checkpoint.tokenizer is None:
        raise ValueError("the model has no tokenizer, and conversations are texts; leave --data out")
    end = next(iter(config.eos_tokens), None)
    tokenizer = Tokenizer(checkpoint.tokenizer, config.bos_token, checkpoint.chat_template, end)
    return chat.read(data, tokenizer, config, config.max_seq_len).train


def _merged(name: str, base: Checkpoint, adapter: Adapter, scale: Scale) -> tuple[Tensor, Layer]:
    """One matrix with the change in it, and what became of it."""
    tensor, config = base.tensors[name], base.config
    w, change = rows(name, tensor), adapter.delta(name)
    wanted = w + change
    size = float(np.linalg.norm(change.astype(np.float64))) or 1.0
    if config.weights == "dense":
        kept = wanted
        made: Tensor = wanted
        if isinstance(tensor, PackedTensor):
            made = tensor._replace(data=pack_bf16(to_bf16(wanted)))
            kept = rows(name, made)
        layer = Layer(name, w.size, int((kept != w).sum()), 1.0, _norm(kept - wanted) / size)
        return made, layer
    before, old_scale = codes(name, tensor, config)
    if isinstance(tensor, PackedTensor) and scale == "keep":
        after, new_scale = _round(wanted, old_scale, config, config.weights_of(name)), old_scale
    else:
        found, new_scale = quant.quantize_weights(wanted, config.weights_of(name), config.scale)
        after = found.astype(np.int8)
    kept = quant.dequantize(after.astype(np.float32), new_scale)
    made = wanted
    if isinstance(tensor, PackedTensor):
        made = tensor._replace(data=pack(after, tensor.encoding), scale=new_scale)
    ratio = float(new_scale.mean(dtype=np.float64) / old_scale.mean(dtype=np.float64))
    n_flipped = int((after != before).sum())
    return made, Layer(name, w.size, n_flipped, ratio, _norm(kept - wanted) / size)


def _round(w: Float32, scale: Float32, config: ModelConfig, scheme: Weights) -> Int8:
    """Codes of a scheme for scales that are given: the nearest ones."""
    if scheme == "b1":
        return np.where(w > 0, 1, -1).astype(np.int8)
    groups = quant.weight_groups(w, config.scale)
    found = (groups / scale.reshape(*groups.shape[:2], 1)).round().clip(-1, 1)
    return found.reshape(w.shape).astype(np.int8)


def _norm(values: Float32) -> float:
    return float(np.linalg.norm(values.astype(np.float64)))

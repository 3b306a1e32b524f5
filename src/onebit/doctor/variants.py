"""What else a config could mean, tried: the model reads a text with one setting changed at a time.

    for finding in examine(checkpoint, text, "model.gguf"): ...

A wrong activation function, base of positions, or order of rows loads without a word, and only figures tell.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from onebit.checkpoint import Checkpoint, Tensor, codes, rows
from onebit.config import FfnActivation, ModelConfig
from onebit.doctor.finding import Finding, command
from onebit.eval.figures import Figure, Float64, token_mean
from onebit.eval.scoring import Scorer
from onebit.eval.texts import Windows, exp, perplexity
from onebit.formats.rotary import join_pairs, split_pairs
from onebit.llm import LLM
from onebit.packing import PackedTensor, pack, pack_bf16, to_bf16

# Of the text; enough for differences that matter.
TOKENS = 1024
# Bases that published models have.
THETAS = (10_000.0, 100_000.0, 500_000.0, 1_000_000.0)
# Nats per token that a setting has to gain before the config is doubted, and before it is certainly wrong.
DOUBT, WRONG = 0.02, 0.30


class Variant(NamedTuple):
    """The model with one setting changed.

    Args:
        what: the setting and its value, in words.
        field: what to look at in the original's config.
        checkpoint: the model.
    """

    what: str
    field: str
    checkpoint: Checkpoint


def examine(
    checkpoint: Checkpoint,
    text: str,
    name: str,
    file: str,
    threads: int | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> list[Finding]:
    """Read a text with every variant, and doubt the config where one of them predicts better.

    Args:
        checkpoint: packed, with a tokenizer.
        text: of the kind that the model is for.
        name: of the model, for the commands.
        file: of the text.
        threads: None takes one for each core.
        progress: called with the share that is done.

    Raises:
        ValueError: a model without tokenizer, or a text without a token to predict.
    """
    tried = list(variants(checkpoint))
    base = _nll(checkpoint, text, threads)
    better, others = [], []
    for i, variant in enumerate(tried):
        progress((i + 1) / (len(tried) + 1))
        gain = token_mean(_nll(variant.checkpoint, text, threads) - base)
        others.append((variant, gain))
        if gain.high < 0 and gain.value < -DOUBT:
            better.append((variant, gain))
    return [doubt(base, variant, gain, name, file) for variant, gain in better] or [
        confirmed(base, others, name, file)
    ]


def variants(checkpoint: Checkpoint) -> Iterator[Variant]:
    """The model with each setting that readers get wrong: activation, positions, order of rows, begin token."""
    config = checkpoint.config
    other: FfnActivation = "silu" if config.activation == "relu2" else "relu2"
    yield Variant(f"{other} as gate", "hidden_act", _with(checkpoint, activation=other))
    for theta in THETAS:
        if theta != config.rope_theta:
            changed = _with(checkpoint, rope_theta=theta)
            yield Variant(f"positions of base {theta:,.0f}", "rope_theta", changed)
    if config.rope_scaling:
        yield Variant("positions without rope_scaling", "rope_scaling", _with(checkpoint, rope_scaling=None))
    for how, order in (("neighbours", join_pairs), ("halves", split_pairs)):
        swapped = {n: _reordered(n, t, order, config) for n, t in checkpoint.tensors.items() if _is_qk(n)}
        tensors = checkpoint.tensors | swapped
        changed = replace(checkpoint, tensors=tensors, sha256={})
        yield Variant(f"rows of q and k for pairs of {how}", "the converter's order of q and k", changed)
    if config.bos_token is not None:
        yield Variant("no begin token", "add_bos_token", _with(checkpoint, bos_token=None))
    elif config.eos_tokens:
        begin = config.eos_tokens[-1]
        yield Variant(f"begin token {begin}", "add_bos_token", _with(checkpoint, bos_token=begin))


def doubt(base: Float64, variant: Variant, gain: Figure, name: str, file: str) -> Finding:
    """A setting that predicts the text better than that of the config."""
    before, after = exp(float(base.mean())), exp(float(base.mean()) + gain.value)
    return Finding(
        "error" if gain.value < -WRONG else "warning",
        "config",
        f"The model reads better with {variant.what}: its config may be wrong",
        f"perplexity {before:.4g} becomes {after:.4g} on {gain.n:,} tokens, {gain.describe('+.3f')} nats per token",
        "A model was trained with one setting, and any other makes it worse. One that makes it better is likely the "
        "right one.",
        command("onebit", "doctor", name, "--text", file),
        f"Compare {variant.field} with the original, correct it there, and convert again.",
    )


def confirmed(base: Float64, tried: list[tuple[Variant, Figure]], name: str, file: str) -> Finding:
    """A config that none of its variants beats."""
    tried = sorted(tried, key=lambda pair: pair[1].value)
    nearest = "; ".join(f"{variant.what}: {gain.value:+.3f}" for variant, gain in tried)
    return Finding(
        "ok",
        "config",
        "No other setting predicts the text better",
        f"perplexity {exp(float(base.mean())):.4g} on {len(base):,} tokens; nats per token with {nearest}",
        "A model was trained with one activation function, one base of positions, one order of rows; any other costs.",
        command("onebit", "doctor", name, "--text", file),
    )


def _nll(checkpoint: Checkpoint, text: str, threads: int | None) -> Float64:
    # Without huge pages: each variant reads a little, and the weights are those of the file.
    llm = LLM(checkpoint, threads, speculation=False, huge_pages=False)
    windows = Windows.of(llm, bos="auto")
    # The first token has none before it where no begin token is, so it counts in none of them.
    return perplexity(Scorer(llm), text, windows, TOKENS).nll[1 if windows.bos is not None else 0 :]


def _with(checkpoint: Checkpoint, **changes: object) -> Checkpoint:
    return replace(checkpoint, config=replace(checkpoint.config, **changes))  # type: ignore[arg-type]


def _is_qk(name: str) -> bool:
    return name.startswith("layers.") and name.split(".")[2] in ("q", "k")


def _reordered(name: str, tensor: Tensor, order: Callable[..., np.ndarray], config: ModelConfig) -> Tensor:
    """A matrix, bias or norm of q or k with its rows in another order within each head."""
    unit = config.d_head
    if not isinstance(tensor, PackedTensor):
        return np.ascontiguousarray(order(rows(name, tensor), unit))
    if tensor.encoding == "bf16":
        data = pack_bf16(to_bf16(np.ascontiguousarray(order(rows(name, tensor), unit))))
        return tensor._replace(data=data)
    found, scale = codes(name, tensor, config)
    if scale.shape[0] != 1 or scale.ndim > 1:
        scale = np.ascontiguousarray(order(scale, unit))
    return tensor._replace(data=pack(np.ascontiguousarray(order(found, unit)), tensor.encoding), scale=scale)

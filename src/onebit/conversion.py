"""Converting a model, and proving it by running both: the same probe through source and result.

result = convert("hf-folder", "model.onebit", verify=True)
result.distance.kl          # nats per token, 0.0 where nothing was rounded
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from onebit import formats
from onebit.checkpoint import Checkpoint, quantize
from onebit.engine.model import BLOCK_TOKENS, Float32, Model
from onebit.engine.tokenizer import Tokenizer

# A text of everyday words, figures and names: what most models have seen the like of.
PROBE = (
    "The lighthouse keeper counted 14 ships before breakfast. When the fog came in, he lit the lamp, wrote the time "
    "into his book and waited. Nobody knew why the bell at the old harbour rang twice that night; in the morning "
    "the children found footprints in the sand that led straight into the sea."
)
MAX_PROBE_TOKENS = 96
GREEDY_TOKENS = 32


class Distance(NamedTuple):
    """How far the answers of two models are from each other, on a probe text.

    Args:
        n_tokens: of the probe.
        perplexity: of the first and of the second model.
        kl: mean divergence of the second's next-token probabilities from the first's, in nats.
        largest: largest difference of two logits.
        top1: share of positions where both have the same likeliest token.
        n_same: greedy tokens that are the same before the first that differs.
        n_greedy: greedy tokens that were compared.
        same_tokens: whether both tokenizers make the same tokens of the probe, and of these the same text; also where
            one of the models has none.
    """

    n_tokens: int
    perplexity: tuple[float, float]
    kl: float
    largest: float
    top1: float
    n_same: int
    n_greedy: int
    same_tokens: bool

    def describe(self) -> str:
        """The distance in words."""
        return self._of_answers() + (
            "" if self.same_tokens else "; the tokenizers differ: a text gets other tokens"
        )

    def _of_answers(self) -> str:
        if self.largest == 0 and self.n_same == self.n_greedy:
            return f"all logits of {self.n_tokens} tokens and {self.n_greedy} greedy tokens are the same, bit for bit"
        before, after = self.perplexity
        return (
            f"on {self.n_tokens} tokens KL {self.kl:.2g} nats, logits differ by up to {self.largest:.2g}, "
            f"the likeliest token is the same for {self.top1:.1%}, perplexity {before:.4g} becomes {after:.4g}; "
            f"{self.n_same} of {self.n_greedy} greedy tokens are the same"
        )


class Converted(NamedTuple):
    """A finished conversion.

    Args:
        report: what became of each part.
        distance: between the answers of source and result; None if it was not asked for.
    """

    report: formats.Report
    distance: Distance | None


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    encoding: str | None = None,
    head: str | None = None,
    allow_lossy: bool = False,
    verify: bool = False,
    progress: formats.Progress = lambda what, share: None,
    temperature: float = 1.0,
) -> Converted:
    """Convert a model; arguments and errors are those of `onebit.formats.convert`.

    Args:
        src: a .onebit or GGUF file, a run folder, a Hugging Face folder or its name there, ...
        dst: the .onebit or GGUF file or the folder to make or to replace.
        encoding: how the linear layers are stored.
        head: for a .onebit file, "q8" or "bf16".
        allow_lossy: write also what changes values of the model.
        verify: run source and result on a probe text and compare logits and greedy text.
        progress: called now and then.
        temperature: divides the logits of the result; 1 leaves them.
    """
    if verify and Path(dst).exists() and Path(src).exists() and Path(src).samefile(dst):
        raise ValueError(
            f"{dst}: would replace its source, which could not be compared then; choose another name"
        )
    report = formats.convert(src, dst, encoding, head, allow_lossy, progress, temperature)
    if temperature != 1:
        report.notes.append(f"logits are those of the source divided by {temperature:g}")
    if not _has_same_tokens(report.source, report.made):
        report.notes.append("the tokenizer of the result makes other tokens of a text")
    if not verify:
        return Converted(report, None)
    progress("verifying", 0.0)
    return Converted(report, distance(report.source, report.made, progress))


def distance(
    first: Checkpoint, second: Checkpoint, progress: formats.Progress = lambda what, share: None
) -> Distance:
    """Run two models on the same probe and compare their answers.

    Args:
        first: with its tokenizer if it has one; else the probe is token ids without a meaning.
        second: a model with the same vocabulary.
        progress: called now and then.
    """
    tokens = _probe(first)
    logits, texts = [], []
    for i, checkpoint in enumerate((first, second)):
        found, text = _answers(checkpoint, tokens)
        logits.append(found)
        texts.append(text)
        progress("verifying", (i + 1) / 2)
    a, b = (_log_probabilities(values) for values in logits)
    kl = float((np.exp(a) * (a - b)).sum(axis=-1).mean())
    differing = [i for i, (x, y) in enumerate(zip(*texts, strict=True)) if x != y]
    return Distance(
        n_tokens=len(tokens),
        perplexity=(_perplexity(a, tokens), _perplexity(b, tokens)),
        kl=max(kl, 0.0),
        largest=float(abs(logits[0] - logits[1]).max()),
        top1=float((logits[0].argmax(-1) == logits[1].argmax(-1)).mean()),
        n_same=differing[0] if differing else len(texts[0]),
        n_greedy=len(texts[0]),
        same_tokens=_has_same_tokens(first, second),
    )


def _probe(checkpoint: Checkpoint) -> list[int]:
    config = checkpoint.config
    if checkpoint.tokenizer is None:
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, MAX_PROBE_TOKENS).tolist()
    else:
        tokens = Tokenizer(checkpoint.tokenizer, config.bos_token).encode(PROBE)
    return [int(token) for token in tokens[: min(MAX_PROBE_TOKENS, config.max_seq_len // 2)]]


def _has_same_tokens(first: Checkpoint, second: Checkpoint) -> bool:
    if first.tokenizer is None or second.tokenizer is None:
        return True
    a, b = (Tokenizer(c.tokenizer, c.config.bos_token) for c in (first, second) if c.tokenizer is not None)
    tokens = a.encode(PROBE)
    return tokens == b.encode(PROBE) and a.decode(tokens) == b.decode(tokens)


def _answers(checkpoint: Checkpoint, tokens: list[int]) -> tuple[Float32, list[int]]:
    """Logits and a greedy text. The model is gone afterwards: one at a time fits into memory."""
    model = Model(quantize(checkpoint))
    return _logits(model, tokens), _greedy(model, tokens[: len(tokens) // 4 or 1])


def _logits(model: Model, tokens: list[int]) -> Float32:
    ids = np.array(tokens, np.int32)
    rows = np.arange(len(ids), dtype=np.int32)
    return _step(model, ids, rows, rows, model.new_cache(_n_blocks(len(ids))))


def _greedy(model: Model, prompt: list[int]) -> list[int]:
    n_greedy = min(GREEDY_TOKENS, model.config.max_seq_len - len(prompt))
    cache = model.new_cache(_n_blocks(len(prompt) + n_greedy))
    ids, positions, found = np.array(prompt, np.int32), np.arange(len(prompt), dtype=np.int32), []
    for _ in range(n_greedy):
        last = np.array([len(ids) - 1], np.int32)
        found.append(int(_step(model, ids, positions, last, cache)[0].argmax()))
        ids, positions = np.array(found[-1:], np.int32), positions[-1:] + np.int32(1)
    return found


def _step(model: Model, ids: np.ndarray, positions: np.ndarray, rows: np.ndarray, cache: object) -> Float32:
    positions_needed = int(positions[-1]) + 1
    table = np.arange(_n_blocks(positions_needed), dtype=np.int32).reshape(1, -1)
    return model.forward(ids, positions, np.array([0, len(ids)], np.int32), table, rows, cache)  # type: ignore[arg-type]


def _n_blocks(n_positions: int) -> int:
    return -(-n_positions // BLOCK_TOKENS)


def _log_probabilities(logits: Float32) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    found: np.ndarray = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return found


def _perplexity(log_probabilities: np.ndarray, tokens: list[int]) -> float:
    of_next = log_probabilities[np.arange(len(tokens) - 1), tokens[1:]]
    return float(np.exp(-of_next.mean())) if len(of_next) else float("nan")

"""Texts that a model writes under a setting of sampling: how much they repeat, and how sure the model was of them.

params = setting("temperature=1,top_k=0,top_p=1,min_sigma=2", max_tokens=200)
samples(llm, ["Once upon a time"], params, seeds=range(3)).figures["repetition"]
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from onebit.engine.diversity import distinct, repetition
from onebit.engine.logits import entropy
from onebit.engine.sampling import SamplingParams
from onebit.eval.figures import Figure, mean
from onebit.eval.scoring import Scorer

if TYPE_CHECKING:
    from onebit.llm import LLM, Output

# What a setting may say; the rest is as `onebit run` has it.
NAMES = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "min_sigma",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


class Samples(NamedTuple):
    """What was found in the texts.

    Args:
        figures: "repetition", the share of 3-grams of tokens that were there before; "distinct_words", the share of
            words that are the first of their kind; "entropy" of the model's own distribution before each token, in
            nats, filters and temperature aside; "judge_bits_per_byte" where there is a judge. Each is a mean of texts.
        n_texts: texts.
        n_tokens: tokens in them.
    """

    figures: dict[str, Figure]
    n_texts: int
    n_tokens: int


def setting(text: str, max_tokens: int) -> SamplingParams:
    """Parameters as they are written: "temperature=1,min_sigma=2"; empty: those of `onebit run`.

    Args:
        text: names of `NAMES` and numbers.
        max_tokens: most tokens of a text.

    Raises:
        ValueError: another name, a name that is there twice, no number, or one out of its range.
    """
    values: dict[str, float] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, _, number = part.partition("=")
        if name not in NAMES:
            raise ValueError(f"sampling {part!r}: expected NAME=NUMBER with one of {', '.join(NAMES)}")
        if name in values:
            raise ValueError(
                f"sampling {text!r}: {name} is there twice; another setting is another --sampling"
            )
        try:
            values[name] = int(number) if name == "top_k" else float(number)
        except ValueError:
            raise ValueError(f"sampling {part!r}: {number!r} is no number that {name} can have") from None
    return SamplingParams(max_tokens=max_tokens, **values)  # type: ignore[arg-type]


def samples(
    llm: "LLM",
    prompts: Sequence[str],
    params: SamplingParams,
    seeds: Sequence[int],
    judge: "LLM | None" = None,
    on_tokens: Callable[[int], None] = lambda n: None,
    progress: Callable[[float], None] = lambda share: None,
) -> Samples:
    """Continue every prompt once with each seed, and measure the continuations.

    Texts count as independent, so an interval tells what other prompts and seeds of the kind would give.

    Args:
        llm: the model.
        prompts: what texts begin with.
        params: how tokens are chosen; the seeds replace theirs.
        seeds: of the random draws.
        judge: a model that reads the continuations; its bits per byte are low for what it expects.
        on_tokens: called with the number of tokens computed.
        progress: called with the share that is done.

    Raises:
        ValueError: a prompt that is too long, or texts longer than the context of the judge.
    """
    outputs: list[tuple[str, Output]] = []
    for i, seed in enumerate(seeds):
        found = llm.generate(list(prompts), replace(params, seed=seed))
        outputs += zip(prompts, found, strict=True)
        on_tokens(sum(output.usage.prompt_tokens + output.usage.completion_tokens for output in found))
        progress((i + 1) / (len(seeds) + 1))
    texts = [output.text for _, output in outputs]
    values = {
        "repetition": [repetition(output.tokens) for _, output in outputs],
        "distinct_words": [distinct(text) for text in texts],
        "entropy": _entropies(Scorer(llm, on_tokens), outputs),
        "judge_bits_per_byte": _judged(Scorer(judge, on_tokens), outputs) if judge else [],
    }
    figures = {
        name: mean(kept) for name, all in values.items() if (kept := [x for x in all if x is not None])
    }
    progress(1.0)
    return Samples(figures, len(outputs), sum(len(output.tokens) for _, output in outputs))


def _entropies(scorer: Scorer, outputs: "Sequence[tuple[str, Output]]") -> list[float | None]:
    """The mean entropy of the distributions that each text was drawn from."""
    starts = [scorer.llm.encode(prompt) for prompt, _ in outputs]
    inputs = [
        np.array([*start, *output.tokens[:-1]], np.int32)
        for start, (_, output) in zip(starts, outputs, strict=True)
    ]
    sums = [0.0] * len(outputs)
    for i, _, logits_RV in scorer.logits(inputs, [len(start) - 1 for start in starts]):
        sums[i] += sum(map(entropy, logits_RV))
    return [total / len(output.tokens) for total, (_, output) in zip(sums, outputs, strict=True)]


def _judged(scorer: Scorer, outputs: "Sequence[tuple[str, Output]]") -> list[float | None]:
    """Bits per byte of each text by another model, which reads the prompt first; None for an empty text."""
    tokenizer = scorer.llm.tokenizer
    read = [(scorer.llm.encode(p), tokenizer.encode(output.text, begin=False)) for p, output in outputs]
    scores = scorer.score(read)
    return [
        -float(score.log_probabilities.sum()) / math.log(2) / len(output.text.encode())
        if output.text
        else None
        for score, (_, output) in zip(scores, outputs, strict=True)
    ]

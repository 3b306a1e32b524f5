"""Texts that a model writes, measured. Kinds: exact (settings), oracle (figures of each text alone, by hand)."""

import math

import numpy as np
import pytest

import tiny
from onebit.engine.diversity import distinct, repetition
from onebit.engine.logits import entropy
from onebit.engine.sampling import SamplingParams
from onebit.eval.samples import samples, setting
from onebit.llm import LLM

PROMPTS = ["Once upon a time", "The dog", ""]


def test_figures_are_the_means_of_the_texts_alone():
    llm, judge = LLM(tiny.master(), threads=1), LLM(tiny.master(seed=1), threads=1)
    params = SamplingParams(max_tokens=20, temperature=1.5, min_sigma=0.5, top_k=0, seed=99)
    found = samples(llm, PROMPTS, params, (3, 4), judge)
    values = {name: [] for name in ("repetition", "distinct_words", "entropy", "judge_bits_per_byte")}
    for seed in (3, 4):
        for prompt in PROMPTS:
            output = llm.generate(prompt, max_tokens=20, temperature=1.5, min_sigma=0.5, top_k=0, seed=seed)
            start = llm.encode(prompt)
            rows = llm.logits([*start, *output.tokens[:-1]])[len(start) - 1 :]
            values["repetition"].append(repetition(output.tokens))
            values["distinct_words"].append(distinct(output.text))
            values["entropy"].append(np.mean([entropy(row) for row in rows]))
            end = judge.tokenizer.encode(output.text)
            told = judge.generate(
                [*judge.encode(prompt), *end], max_tokens=1, prompt_logprobs=0
            ).prompt_logprobs
            nats = -sum(entry.logprob for entry in told[-len(end) :])
            values["judge_bits_per_byte"].append(nats / math.log(2) / len(output.text.encode()))
    assert found.n_texts == 6 and 6 < found.n_tokens <= 120
    for name, all in values.items():
        kept = [value for value in all if value is not None]
        assert found.figures[name].n == len(kept)
        assert found.figures[name].value == pytest.approx(np.mean(kept), rel=1e-6), name
    assert samples(llm, PROMPTS, params, (3, 4)).figures.keys() == values.keys() - {"judge_bits_per_byte"}


def test_settings_are_parameters():
    assert setting("", 9) == SamplingParams(max_tokens=9)
    given = setting("temperature=1, top_k=0,min_sigma=2.5,presence_penalty=-1", 9)
    assert given == SamplingParams(max_tokens=9, temperature=1, top_k=0, min_sigma=2.5, presence_penalty=-1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("temprature=1", "expected NAME=NUMBER with one of temperature, top_k"),
        ("seed=1", "'seed=1': expected NAME=NUMBER"),
        ("top_k=1.5", "'1.5' is no number that top_k can have"),
        ("top_p", "'' is no number that top_p can have"),
        ("min_p=2", "min_p is 2.0; expected"),
        ("min_p=0.1,min_p=0.2", "min_p is there twice; another setting is another --sampling"),
    ],
)
def test_settings_that_are_none_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        setting(text, 9)

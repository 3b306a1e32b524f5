"""Oracle: numbers are those of torch. Invariant: a text has the same ones in any company, chunks and after preemption.

Runs the compiled core on a tiny model with random weights.
"""

import time

import numpy as np
import pytest
import torch

import tiny
from onebit.checkpoint import quantize
from onebit.engine import engine as engines
from onebit.engine.logits import change, token_logprobs
from onebit.engine.memory import KV_FORMATS
from onebit.engine.sampling import SamplingParams
from onebit.engine.speculation import Speculation
from onebit.llm import LLM
from onebit.nn.transformer import Transformer

MASTER = tiny.master(seed=3)
PREFIX = np.random.default_rng(1).integers(1, 320, 123).tolist()
PROMPTS = [[*PREFIX, *more] for more in ([], [5], [6, 7, 8] * 4, [9] * 30)]


def outcome(request):
    assert request.finish_reason == "length"
    return request.generated, request.logprobs, request.prompt_logprobs


def params(**options):
    return SamplingParams(**{"max_tokens": 12, "temperature": 1.0, "seed": 4, "ignore_eos": True} | options)


def alone(llm, prompt, options, adapter=-1):
    engine = llm.engine(4, prefix_cache=False)
    request = engine.add(prompt, options, adapter)
    assert len(list(engine.run())) == 12
    return outcome(request)


@pytest.mark.parametrize("kv_cache", KV_FORMATS)
def test_a_text_and_its_logprobs_are_those_of_a_request_alone(kv_cache):
    adapters = {"a": tiny.adapter(seed=1), "b": tiny.adapter(seed=2)}
    llm = LLM(quantize(MASTER), threads=1, kv_cache=kv_cache, adapters=adapters)
    engine = llm.engine(4)
    jobs = [
        (prompt, params(logprobs=2, prompt_logprobs=1 if i in (1, 8) else None, temperature=i % 2), adapter)
        for i, (prompt, adapter) in enumerate(
            [(PROMPTS[0], -1), (PROMPTS[1], -1), (PROMPTS[1], 0), (PROMPTS[2], 0), (PROMPTS[3], 1)] * 2
        )
    ]
    requests = []
    for job in jobs:
        requests.append(engine.add(*job))
        engine.step()
    for _ in engine.run():
        pass
    for request, (prompt, options, adapter) in zip(requests, jobs, strict=True):
        assert outcome(request) == alone(llm, prompt, options, adapter)
    stats = engine.stats
    assert stats.prefix_hit_tokens >= 4 * 64 and stats.preemptions > 0
    assert stats.blocks_used == 0


def test_logprobs_are_those_of_the_logits(monkeypatch):
    monkeypatch.setattr(engines, "MAX_PROMPT_ROWS", 50)
    llm = LLM(quantize(MASTER), threads=1)
    output = llm.generate(PROMPTS[2], params(logprobs=3, prompt_logprobs=320))
    text = PROMPTS[2] + output.tokens
    logits = torch.tensor(llm.logits(text[:-1]))
    expected = torch.log_softmax(logits.double(), -1).numpy()
    assert output.prompt_logprobs[0] is None
    told = [*output.prompt_logprobs[1:], *output.logprobs]
    assert [entry.token for entry in told] == text[1:]
    for row, entry in zip(expected, told, strict=True):
        assert entry.logprob == pytest.approx(row[entry.token], abs=1e-12)
        ids = np.argsort(-row, kind="stable")[: len(entry.top)]
        assert [token for token, _ in entry.top] == ids.tolist()
        np.testing.assert_allclose([p for _, p in entry.top], row[ids], atol=1e-12)
    assert {len(entry.top) for entry in told} == {320, 3}
    # Telling them changes nothing.
    plain = llm.generate(PROMPTS[2], params())
    assert (plain.tokens, plain.logprobs, plain.prompt_logprobs) == (output.tokens, [], [])


def test_equal_logits_rank_by_id_and_minus_infinity_is_a_logprob():
    logits = np.array([1, 3, -np.inf, 3, 1, 3], np.float32)
    told = token_logprobs(logits, 2, 4)
    assert [token for token, _ in told.top] == [1, 3, 5, 0]
    assert told.logprob == -np.inf and told.top[0][1] == told.top[2][1]
    assert token_logprobs(np.zeros(4, np.float32), 1, 9).top == [(i, -np.log(4)) for i in range(4)]
    assert token_logprobs(np.zeros(4, np.float32), 1, 0).top == []


def test_logprobs_come_before_biases_penalties_and_temperature():
    llm = LLM(quantize(MASTER), threads=1)
    output = llm.generate(PREFIX, params(max_tokens=1, temperature=0, logit_bias={7: 100}, logprobs=0))
    assert output.tokens == [7]
    (told,) = output.logprobs
    assert told == token_logprobs(llm.logits(PREFIX)[-1], 7, 0)


def test_changes_add_up():
    logits = np.zeros(5, np.float32)
    options = SamplingParams(logit_bias={1: 2, 4: -1}, presence_penalty=0.5, frequency_penalty=0.25)
    change(logits[None], options, np.array([1, 1, 3], np.int32), None)
    assert logits.tolist() == [0, 1, 0, -0.75, -1]


def test_a_cut_at_so_many_deviations_is_that_of_numpy_and_leaves_the_best():
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.normal(0, 3, (4, 320)), np.zeros((1, 320))]).astype(np.float32)
    for n_sigma in (0.5, 2, 3.5, 100):
        cut = rows.copy()
        change(cut, SamplingParams(min_sigma=n_sigma), np.array([], np.int32), None)
        for before, after in zip(rows.astype(np.float64), cut, strict=True):
            kept = before >= min(before.mean() + n_sigma * before.std(), before.max())
            assert np.array_equal(np.isfinite(after), kept) and np.array_equal(after[kept], before[kept])
    # Equal logits are all the best; nothing reaches 100 deviations but the best.
    assert np.isfinite(cut).sum(axis=1).tolist() == [1, 1, 1, 1, 320]


def test_neither_a_bias_nor_a_grammar_moves_the_cut():
    class Odd:
        def mask(self, request):
            return np.arange(8) % 2 == 1

        def accept(self, token):
            pass

    def kept(**options):
        logits = np.array([[9, 8, 5, 5, 5, 5, 5, 0]], np.float32)
        change(logits, SamplingParams(min_sigma=0.5, **options), np.array([], np.int32), None)
        return np.flatnonzero(np.isfinite(logits)).tolist()

    # Mean 5.25, deviation 2.5: the cut is at 6.5.
    assert kept() == [0, 1]
    assert kept(grammar=Odd()) == [1]
    assert kept(grammar=Odd(), logit_bias={1: -4, 3: 1.25}) == [3]
    assert kept(logit_bias={2: 100}) == [0, 1, 2]


class Eager(Speculation):
    """Drafts whatever there is to guess."""

    pause = 1

    def draft(self, texts, n_rows):
        return [lookup.guesses(min(most, 9)) for lookup, most in texts]


@pytest.mark.parametrize("more", [{}, {"top_k": 5, "top_p": 0.9}, {"repetition_penalty": 0.8, "min_p": 0.01}])
def test_cut_texts_are_the_same_alone_in_batches_and_with_guesses(more):
    options = {"min_sigma": 2.5, "temperature": 1.5, "top_k": 0, "top_p": 1.0} | more
    llm = LLM(quantize(MASTER), threads=1, speculation=False)
    texts = [alone(llm, prompt, params(**options, logprobs=1)) for prompt in PROMPTS]
    # As many guesses as there can be.
    llm._speculation = Eager()
    engine = llm.engine(16)
    requests = [engine.add(prompt, params(**options, logprobs=1)) for prompt in PROMPTS]
    for _ in engine.run():
        pass
    assert [outcome(request) for request in requests] == texts
    assert 0 < sum(request.accepted for request in requests) < sum(request.drafted for request in requests)
    assert [alone(llm, p, params(**options | {"min_sigma": 0}, logprobs=1)) for p in PROMPTS] != texts


def test_numbers_of_a_large_vocabulary_come_in_a_few_milliseconds():
    logits = np.random.default_rng(0).standard_normal(128_000).astype(np.float32)
    begun = time.process_time()
    for _ in range(10):
        token_logprobs(logits, 3, 20)
    assert time.process_time() - begun < 10 * 0.02


@pytest.mark.parametrize("changes", [{}, {"tied_head": False, "activation": "silu", "sub_norm": False}])
def test_an_embedding_is_the_mean_of_the_hidden_states_of_torch(changes, monkeypatch):
    master = tiny.master(tiny.config(**changes), seed=5)
    model = Transformer.from_checkpoint(master).eval()
    hidden = []
    model.norm.register_forward_hook(lambda *call: hidden.append(call[2]))
    with torch.no_grad():
        model(torch.tensor([PREFIX]))
    total = hidden[0][0].double().sum(0).numpy()
    llm = LLM(quantize(master), threads=2, adapters={"a": tiny.adapter(master.config)})
    embedding = llm.embed(PREFIX)
    assert embedding.dtype == np.float32 and embedding.shape == (48,)
    assert np.array_equal(embedding, (total / np.linalg.norm(total)).astype(np.float32))
    assert not np.array_equal(embedding, llm.embed(PREFIX, "a"))
    monkeypatch.setattr("onebit.llm.MAX_STEP_TOKENS", 50)
    np.testing.assert_allclose(llm.embed(PREFIX), embedding, atol=1e-7)
    assert np.array_equal(llm.embed("The dog"), llm.embed(llm.tokenizer.encode("The dog")))
    with pytest.raises(ValueError, match="outside the vocabulary"):
        llm.embed([1000])


def test_an_engine_of_ones_own_takes_texts_at_any_time():
    llm = LLM(quantize(MASTER), threads=1)
    engine = llm.engine(n_blocks=8, max_num_seqs=2)
    request = engine.add(PREFIX, params())
    engine.step()
    late = engine.add(PREFIX, params())
    for _ in engine.run():
        pass
    assert late.generated == request.generated == llm.generate(PREFIX, params()).tokens
    assert engine.stats.prefix_hit_tokens == 64


def test_one_grammar_follows_one_text():
    class Anything:
        def mask(self, request):
            return np.ones(320, bool)

        def accept(self, token):
            raise RuntimeError("the grammar is broken")

    llm = LLM(quantize(MASTER), threads=1)
    with pytest.raises(ValueError, match="a grammar follows one text, and there are 2 prompts"):
        llm.generate([PREFIX, PREFIX], params(grammar=Anything()))
    with pytest.raises(RuntimeError, match="the grammar is broken"):
        llm.generate(PREFIX, params(grammar=Anything()))
    with pytest.raises(RuntimeError, match="the grammar is broken"):
        list(llm.stream(PREFIX, params(grammar=Anything())))

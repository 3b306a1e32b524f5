"""Invariant: a text is the same alone, in a batch, in any chunks and after preemption.

The model needs no weights: its next token is a function of what its cache holds.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from onebit.engine.engine import Engine
from onebit.engine.model import BLOCK_TOKENS
from onebit.engine.sampling import SamplingParams
from onebit.engine.speculation import Speculation
from onebit.engine.tokenizer import Tokenizer

TOKENIZER = Tokenizer(tiny.tokenizer_json())
VOCAB = tiny.CONFIG.vocab_size
GREEDY = SamplingParams(max_tokens=30, temperature=0)


def mixed(tokens):
    """A next token that depends on all tokens and their order, and is never the end of the text."""
    value = 7
    for token in tokens:
        value = (value * 31 + token + 1) % 65521
    return 1 + value % (VOCAB - 1)


def script(text, prompt_tokens=1):
    """A next_token function that says text and then ends it."""
    answer = TOKENIZER.encode(text)
    return lambda tokens: [*answer, tiny.EOS][min(len(tokens) - prompt_tokens, len(answer))]


def make(next_token, n_blocks=3, **options):
    return Engine(tiny.FakeModel(next_token, block_tokens=BLOCK_TOKENS), TOKENIZER, n_blocks, **options)


def finish(engine, request):
    for _ in engine.run():
        pass
    assert engine.pool.n_free == engine.pool.n_blocks
    return request


def expected(prompt, n, adapter=-1, next_token=mixed):
    shift = 1000 * (adapter + 1)
    tokens = [token + shift for token in prompt]
    for _ in range(n):
        tokens.append(next_token(tokens) + shift)
    return [token - shift for token in tokens[len(prompt) :]]


PROMPTS = [[1 + (i * j) % 50 for j in range(1 + 17 * i)] for i in range(6)]


@pytest.mark.parametrize("max_step_tokens", [1, 7, 64, 512])
@pytest.mark.parametrize("n_blocks", [3, 4, 20])
def test_text_does_not_depend_on_company_chunks_or_preemption(max_step_tokens, n_blocks):
    engine = make(mixed, n_blocks, max_step_tokens=max_step_tokens)
    requests = [engine.add(prompt, SamplingParams(max_tokens=70, temperature=0)) for prompt in PROMPTS]
    for _ in engine.run():
        pass
    for prompt, request in zip(PROMPTS, requests, strict=True):
        assert request.generated == expected(prompt, 70)
        assert request.text == TOKENIZER.decode(request.generated)
        assert request.finish_reason == "length"
    assert max(engine._model.n_tokens) <= max_step_tokens
    assert engine.pool.n_free == n_blocks


def test_steps_carry_every_token_and_all_the_text():
    engine = make(mixed)
    request = engine.add([5], GREEDY)
    steps = list(engine.run())
    assert [step.token for step in steps] == request.generated == expected([5], 30)
    assert "".join(step.text for step in steps) == request.text
    assert all(step.request is request for step in steps)


def test_end_of_text_token_ends_the_text_and_is_not_in_it():
    engine = make(script("a ball"))
    request = finish(engine, engine.add([5], GREEDY))
    assert (request.text, request.finish_reason) == ("a ball", "stop")
    assert request.generated == [*TOKENIZER.encode("a ball"), tiny.EOS]


def test_ignore_eos_goes_on():
    engine = make(script("a"))
    request = finish(engine, engine.add([5], SamplingParams(max_tokens=9, temperature=0, ignore_eos=True)))
    assert (request.finish_reason, len(request.generated), request.text) == ("length", 9, "a")


def test_stop_string_ends_the_text_before_it():
    engine = make(script("the dog ran home"))
    request = finish(engine, engine.add([5], SamplingParams(temperature=0, stop=["nope", "g ran"])))
    assert (request.text, request.finish_reason) == ("the do", "stop")


def test_text_held_back_for_a_stop_string_is_shown_at_the_end():
    engine = make(script("the dog"))
    request = finish(engine, engine.add([5], SamplingParams(temperature=0, stop="dogs")))
    assert (request.text, request.finish_reason) == ("the dog", "stop")


def test_context_limits_the_text():
    limit = tiny.CONFIG.max_seq_len
    for n_prompt in (limit - 2, limit):
        engine = make(mixed)
        prompt = [1 + i % 9 for i in range(n_prompt)]
        request = finish(engine, engine.add(prompt, GREEDY))
        # The last token needs no position: the model never reads it.
        assert request.generated == expected(prompt, limit - n_prompt + 1)
        assert request.finish_reason == "length"


def test_cancel_frees_blocks_at_once():
    engine = make(mixed)
    stays, goes = engine.add([1, 2], GREEDY), engine.add([3], GREEDY)
    engine.step()
    engine.cancel(goes)
    assert engine.pool.n_free == engine.pool.n_blocks - 1
    engine.cancel(goes)
    assert finish(engine, stays).generated == expected([1, 2], 30)
    assert goes.finish_reason is None


def test_a_model_without_tokenizer_gives_tokens():
    engine = Engine(tiny.FakeModel(mixed, block_tokens=BLOCK_TOKENS), None, 1)
    request = finish(engine, engine.add([5], GREEDY))
    assert (request.text, request.generated) == ("", expected([5], 30))
    with pytest.raises(ValueError, match="tokenizer"):
        engine.add([5], SamplingParams(max_tokens=3, stop="x"))


def test_a_seed_decides_the_text():
    def flat(tokens):
        return 1

    def sample(seed):
        engine = make(flat)
        request = finish(engine, engine.add([5], SamplingParams(max_tokens=20, top_k=0, top_p=1, seed=seed)))
        return request.generated, request.seed

    assert sample(3) == sample(3)
    assert sample(3) != sample(4)
    tokens, seed = sample(None)
    assert sample(seed) == (tokens, seed)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt is empty"),
        ([1] * (tiny.CONFIG.max_seq_len + 1), "context of this model holds"),
        ([VOCAB], "outside the vocabulary"),
        ([-1], "outside the vocabulary"),
    ],
)
def test_impossible_prompts_are_refused(prompt, message):
    engine = make(mixed)
    with pytest.raises(ValueError, match=message):
        engine.add(prompt, GREEDY)
    assert list(engine.run()) == []


def test_a_text_larger_than_the_cache_is_refused():
    engine = make(mixed, n_blocks=1)
    with pytest.raises(ValueError, match="cache holds 64"):
        engine.add([1] * 60, SamplingParams(max_tokens=6))
    engine.add(np.ones(60, np.int64), SamplingParams(max_tokens=5))


def test_a_step_that_fails_ends_its_texts_and_frees_their_blocks():
    def next_token(seen):
        if len(seen) == 5:
            raise ValueError("no number")
        return 7

    engine = Engine(tiny.FakeModel(next_token), None, n_blocks=4)
    request = engine.add([1, 2], SamplingParams(max_tokens=20, temperature=0))
    with pytest.raises(ValueError, match="no number") as error:
        list(engine.run())
    assert (request.finish_reason, request.error) == ("error", error.value)
    assert engine.pool.n_free == engine.pool.n_blocks
    assert list(engine.run()) == []


class Eager(Speculation):
    """Drafts whatever there is to guess, so that tests see drafts in every step, however fast steps are."""

    pause = 1

    def draft(self, texts, n_rows):
        return [lookup.guesses(min(most, 9)) for lookup, most in texts]


def looping(tokens):
    """Repeats the prompt, with a slip now and then: guesses are often right and often wrong."""
    period = 5
    slip = len(tokens) % 13 == 0
    return mixed(tokens) if slip else tokens[-period] if len(tokens) >= period else 1 + len(tokens)


@pytest.mark.parametrize("next_token", [looping, mixed])
@pytest.mark.parametrize("max_step_tokens", [1, 3, 512])
@pytest.mark.parametrize("n_blocks", [3, 4, 20])
def test_text_does_not_depend_on_speculation(next_token, n_blocks, max_step_tokens):
    def texts(speculation):
        engine = make(next_token, n_blocks, max_step_tokens=max_step_tokens, speculation=speculation)
        requests = [engine.add(prompt, SamplingParams(max_tokens=70, temperature=0)) for prompt in PROMPTS]
        steps = list(engine.run())
        assert engine.pool.n_free == n_blocks
        assert max(engine._model.n_tokens) <= max_step_tokens
        assert sum(step.is_last for step in steps) == len(requests)
        for request in requests:
            assert [step.token for step in steps if step.request is request] == request.generated
        return requests, len(engine._model.n_tokens)

    plain, n_plain = texts(None)
    eager, n_eager = texts(Eager())
    for a, b in zip(plain, eager, strict=True):
        assert (a.generated, a.text, a.finish_reason) == (b.generated, b.text, b.finish_reason)
        assert a.drafted == 0 <= b.accepted <= b.drafted
    if next_token is looping and max_step_tokens == 512:
        assert n_eager < n_plain
        assert sum(request.accepted for request in eager) > 100


def test_an_end_within_accepted_guesses_is_the_end():
    said = "a b a b a b a b a b a b"
    for stop in ((), "b a b a b a", "zz"):
        ends = []
        for speculation in (None, Eager()):
            engine = make(script(said), speculation=speculation)
            request = finish(engine, engine.add([5], SamplingParams(temperature=0, stop=stop)))
            ends.append((request.generated, request.text, request.finish_reason))
        assert ends[0] == ends[1]
        assert request.accepted > 0
    for max_tokens in range(1, 30):
        engine = make(looping, speculation=Eager())
        request = finish(engine, engine.add([5], SamplingParams(temperature=0, max_tokens=max_tokens)))
        plain = make(looping)
        assert request.generated == finish(plain, plain.add([5], request.params)).generated
        assert len(request.generated) == max_tokens


def test_guesses_respect_the_context():
    limit = tiny.CONFIG.max_seq_len
    prompt = [1 + i % 5 for i in range(limit - 12)]
    engine = make(looping, speculation=Eager())
    request = finish(engine, engine.add(prompt, SamplingParams(temperature=0)))
    plain = make(looping)
    assert request.generated == finish(plain, plain.add(prompt, request.params)).generated
    assert request.accepted > 0


def test_a_draw_depends_on_its_place_not_on_the_step():
    def flat(tokens):
        return 1 + tokens[-1] % 3

    params = SamplingParams(max_tokens=100, temperature=0.3, top_k=5, repetition_penalty=1.1, seed=5)
    drawn = []
    for speculation in (None, Eager()):
        engine = make(flat, speculation=speculation)
        request = finish(engine, engine.add([1, 2, 3, 1, 2, 3], params))
        drawn.append(request.generated)
    assert drawn[0] == drawn[1]
    assert 0 < request.accepted < request.drafted


def test_cancel_within_a_step_of_several_tokens_ends_the_text_there():
    engine = make(looping, speculation=Eager())
    goes, stays = engine.add([1, 2, 3, 4, 5], GREEDY), engine.add([1, 2], GREEDY)
    seen = []
    for step in engine.run():
        if step.request is goes:
            seen.append(step.token)
            if goes.accepted:
                engine.cancel(goes)
    assert goes.accepted > 1 and goes.finish_reason is None
    assert len(goes.generated) > len(seen)
    assert engine.pool.n_free == engine.pool.n_blocks
    assert stays.finish_reason == "length"


def test_a_step_with_guesses_that_fails_frees_their_blocks():
    def next_token(tokens):
        if len(tokens) > 75:
            raise ValueError("no number")
        return looping(tokens)

    engine = make(next_token, n_blocks=8, speculation=Eager())
    engine.add([1, 2], SamplingParams(max_tokens=100, temperature=0))
    with pytest.raises(ValueError, match="no number"):
        list(engine.run())
    assert engine.pool.n_free == engine.pool.n_blocks
    assert list(engine.run()) == []


@st.composite
def crowds(draw):
    """Texts of some families as (family, prompt, new tokens, adapter, step of arrival, step of cancellation)."""
    texts = draw(
        st.lists(
            st.tuples(
                st.integers(0, 1),
                st.integers(1, 150),
                st.integers(1, 40),
                st.sampled_from([-1, -1, 0, 1]),
                st.integers(0, 12),
                st.none() | st.integers(0, 30),
            ),
            min_size=2,
            max_size=6,
        )
    )
    options = {
        "n_blocks": draw(st.integers(3, 8)),
        "max_step_tokens": draw(st.sampled_from([3, 50, 512])),
        "speculation": draw(st.sampled_from([None, Eager()])),
        "prefix_cache": draw(st.sampled_from([True, True, False])),
        "max_num_seqs": draw(st.sampled_from([None, 1, 2])),
    }
    return texts, options


@settings(max_examples=60)
@given(crowds())
def test_a_text_is_that_of_a_request_alone(crowd):
    """Whatever is found, preempted, cancelled, guessed, or runs with another adapter."""
    texts, options = crowd

    def next_token(seen):
        return looping(seen) % 1000

    engine = make(next_token, **options)
    requests, step = {}, 0
    while len(requests) < len(texts) or engine.stats.running or engine.stats.waiting:
        for i, (family, n_prompt, n, adapter, arrival, cancelled) in enumerate(texts):
            if arrival == step:
                prompt = [1 + (7 * j + family * (j > 70)) % 11 for j in range(n_prompt)]
                params = SamplingParams(max_tokens=n, temperature=0, ignore_eos=True)
                requests[i] = engine.add(prompt, params, adapter)
            if i in requests and cancelled is not None and arrival + cancelled == step:
                engine.cancel(requests[i])
        engine.step()
        step += 1
    for i, (_, n_prompt, n, adapter, _, cancelled) in enumerate(texts):
        tokens = expected(requests[i].tokens[:n_prompt], n, adapter, next_token)
        assert requests[i].generated == tokens[: len(requests[i].generated)]
        assert cancelled is not None or requests[i].finish_reason == "length"
    stats = engine.stats
    assert stats[:4] == (0, 0, engine.pool.n_blocks, 0)
    assert options["prefix_cache"] or stats.prefix_query_tokens == stats.blocks_cached == 0
    assert 0 <= stats.prefix_hit_tokens <= stats.prefix_query_tokens
    assert stats.steps == len(engine._model.n_tokens) and stats.step_tokens == sum(engine._model.n_tokens)


def test_what_texts_begin_with_is_computed_once():
    engine = make(mixed, n_blocks=20)
    prompt = [1 + i % 9 for i in range(140)]
    for more in ([], [3], [4, 5]):
        request = finish(engine, engine.add(prompt + more, GREEDY))
        assert request.generated == expected(prompt + more, 30)
    # Two full blocks of the prompt each time; one token must be computed for its logits.
    assert engine.stats.prefix_hit_tokens == 2 * 128
    assert engine.stats.step_tokens == 140 + 13 + 14 + 3 * 29
    # A conversation goes on where the answer ended.
    turn = prompt + [4, 5] + request.generated + [6, 7, 8]
    assert finish(engine, engine.add(turn[:192], GREEDY)).generated[:1] == expected(turn[:192], 1)
    assert engine.stats.prefix_hit_tokens == 3 * 128
    assert finish(engine, engine.add(prompt[:128], GREEDY)).generated == expected(prompt[:128], 30)
    assert engine.stats.prefix_hit_tokens == 3 * 128 + 64


def test_copies_of_a_prompt_that_come_together_read_it_once():
    engine = make(mixed, 40)
    prompt = [1 + i % 50 for i in range(2 * BLOCK_TOKENS + 10)]
    requests = [engine.add(prompt, GREEDY) for _ in range(8)]
    for _ in engine.run():
        pass
    assert all(request.generated == expected(prompt, 30) for request in requests)
    # The first reads all, the others what no full block holds.
    assert engine._model.n_tokens[:2] == [len(prompt), 1 + 7 * 10]
    assert engine.stats.prefix_hit_tokens == 7 * 2 * BLOCK_TOKENS


def test_texts_wait_for_their_turn():
    engine = make(mixed, n_blocks=20, max_num_seqs=2)
    for i in range(5):
        engine.add([1 + i], GREEDY)
    engine.step()
    assert (engine.stats.running, engine.stats.waiting, engine.stats.blocks_used) == (2, 3, 2)
    assert len([step for step in engine.run() if step.is_last]) == 5
    for name in ("n_blocks", "max_step_tokens", "max_num_seqs"):
        with pytest.raises(ValueError, match=f"{name} is 0; expected at least 1"):
            make(mixed, **{name: 0})


class Alternating:
    """A grammar: the tokens of two sets by turns, up to a length, then the end of the text."""

    def __init__(self, as_bits, n=8):
        self.as_bits, self.n, self.seen = as_bits, n, []

    def mask(self, request):
        assert request.generated == self.seen
        allowed = np.zeros(VOCAB, bool)
        allowed[range(1 + len(self.seen) % 2, 200, 2)] = True
        if len(self.seen) == self.n:
            allowed[:] = False
            allowed[tiny.EOS] = True
        return np.packbits(allowed, bitorder="little").view("<u4") if self.as_bits else allowed[:250]

    def accept(self, token):
        self.seen.append(token)


@pytest.mark.parametrize("as_bits", [False, True])
def test_a_grammar_decides_what_may_follow(as_bits):
    engine = make(looping, speculation=Eager())
    free = engine.add([1, 2, 3], GREEDY)
    grammar = Alternating(as_bits)
    params = SamplingParams(max_tokens=30, temperature=1, top_k=0, top_p=1, seed=3, grammar=grammar)
    bound = finish(engine, engine.add([1, 2, 3], params))
    assert [token % 2 for token in bound.generated[:-1]] == [1, 0] * 4
    assert (bound.generated[-1], bound.finish_reason) == (tiny.EOS, "stop")
    assert max(bound.generated) < 200 and grammar.seen == bound.generated
    assert free.generated == expected([1, 2, 3], 30, next_token=looping)


def test_a_text_that_cannot_go_on_ends_alone():
    class Dead(Alternating):
        def mask(self, request):
            return super().mask(request) & (len(self.seen) < 3)

    engine = make(mixed)
    stays = engine.add([1, 2], GREEDY)
    goes = engine.add([1, 2], SamplingParams(temperature=0, grammar=Dead(False)))
    steps = [step for step in engine.run() if step.request is goes]
    assert [step.is_last for step in steps] == [False] * 3 + [True]
    assert (steps[-1].token, steps[-1].text) == (-1, "")
    assert goes.finish_reason == "error" and "allows no token" in str(goes.error)
    assert stays.generated == expected([1, 2], 30)
    assert engine.pool.n_free == engine.pool.n_blocks


def test_biases_and_penalties_change_what_comes():
    def flat(tokens):
        return 5

    def greedy(**options):
        engine = make(flat, speculation=Eager())
        params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, **options)
        return finish(engine, engine.add([5, 5], params)).generated

    assert greedy() == [5] * 6
    assert greedy(logit_bias={9: 1.5}) == [9] * 6
    assert greedy(logit_bias={5: -100}) == [0] * 6
    # Only what was generated counts: 5 is worth 1, others 0.
    assert greedy(presence_penalty=1.5) == [5, 0, 1, 2, 3, 4]
    assert greedy(frequency_penalty=0.4) == [5, 5, 5, 0, 1, 2]
    assert greedy(frequency_penalty=-1, logit_bias={9: 0.5, 5: 0.25}) == [5] * 6
    with pytest.raises(ValueError, match=f"logit_bias names token {VOCAB}"):
        greedy(logit_bias={VOCAB: 1})

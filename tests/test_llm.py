"""Invariant: one text has one result: alone, in a list, streamed, or computed by hand from its logits.

Runs the compiled core on a tiny model with random weights.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import onebit
import tiny
from onebit import formats
from onebit.checkpoint import quantize
from onebit.llm import LLM

PROMPTS = ["Once upon a time", "The dog", "Lily ran to the park. " * 4, "x"]


@pytest.fixture(scope="module")
def llm():
    return LLM(tiny.master(), threads=1)


@pytest.fixture(scope="module")
def chat_llm():
    return LLM(tiny.master(chat_template=tiny.CHAT_TEMPLATE), threads=1)


def test_a_text_alone_equals_the_same_in_a_list(llm):
    params = onebit.SamplingParams(max_tokens=60, temperature=1.0, seed=7, repetition_penalty=1.1)
    together = llm.generate(PROMPTS, params)
    for prompt, output in zip(PROMPTS, together, strict=True):
        alone = llm.generate(prompt, params)
        assert (alone.text, alone.tokens, alone.finish_reason) == (
            output.text,
            output.tokens,
            output.finish_reason,
        )
        assert alone.usage == output.usage
        assert (alone.seed, output.seed) == (7, 7)


def test_a_stream_equals_generate(llm):
    params = onebit.SamplingParams(max_tokens=60, temperature=1.0, seed=7)
    output = llm.generate("Once", params)
    pieces = list(llm.stream("Once", params))
    assert "".join(piece.text for piece in pieces) == output.text
    assert [piece.token for piece in pieces] == output.tokens
    assert [piece.output for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert dataclasses.replace(pieces[-1].output, timings=output.timings) == output


def test_streams_that_take_turns_do_not_disturb_each_other(llm):
    params = onebit.SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    streams = [llm.stream(prompt, params) for prompt in PROMPTS[:2]]
    turns = list(zip(*streams, strict=True))
    for i, prompt in enumerate(PROMPTS[:2]):
        assert [turn[i].token for turn in turns] == llm.generate(prompt, params).tokens


def test_greedy_tokens_are_the_largest_logits(llm):
    prompt = llm.tokenizer.encode("Once upon")
    output = llm.generate(prompt, max_tokens=40, temperature=0, ignore_eos=True)
    logits = llm.logits([*prompt, *output.tokens[:-1]])
    assert logits.dtype == np.float32
    assert logits.shape == (len(prompt) + 39, tiny.CONFIG.vocab_size)
    assert logits[len(prompt) - 1 :].argmax(axis=1).tolist() == output.tokens


def test_logits_of_a_long_prompt_are_those_of_its_parts(monkeypatch):
    llm = LLM(tiny.master(), threads=1)
    tokens = [i % 300 for i in range(150)]
    whole = llm.logits(tokens)
    monkeypatch.setattr("onebit.llm.MAX_STEP_TOKENS", 64)
    assert np.array_equal(llm.logits(tokens), whole)
    assert np.array_equal(llm.logits(tokens[:70]), whole[:70])


def test_texts_that_share_a_small_cache_do_not_change(llm, monkeypatch):
    params = onebit.SamplingParams(max_tokens=100, temperature=1.0, seed=3, ignore_eos=True)
    roomy = [output.tokens for output in llm.generate(PROMPTS, params)]
    monkeypatch.setattr("onebit.llm.MAX_CACHE_BYTES", 1)
    assert [output.tokens for output in llm.generate(PROMPTS, params)] == roomy


def test_text_and_token_ids_are_the_same_prompt(llm):
    ids = llm.tokenizer.encode("Once upon")
    by_text = llm.generate("Once upon", max_tokens=10, seed=1)
    for prompt in (ids, tuple(ids), np.array(ids)):
        assert llm.generate(prompt, max_tokens=10, seed=1).tokens == by_text.tokens
    both = llm.generate(["Once upon", ids], max_tokens=10, seed=1)
    assert [output.tokens for output in both] == [by_text.tokens] * 2
    assert [len(llm.generate(list(prompts), max_tokens=1)) for prompts in ([ids], ["Once"])] == [1, 1]


def test_seeds(llm):
    def tokens(seed):
        return llm.generate("Once", max_tokens=30, temperature=1.5, top_k=0, top_p=1, seed=seed)

    assert tokens(5).tokens == tokens(5).tokens != tokens(6).tokens
    drawn = tokens(None)
    assert tokens(drawn.seed).tokens == drawn.tokens
    twice = llm.generate(["Once", "Once"], max_tokens=30, temperature=1.5, top_k=0, top_p=1)
    assert twice[0].seed != twice[1].seed
    assert twice[0].tokens != twice[1].tokens


def test_stop_string_is_cut_off(llm):
    params = {"max_tokens": 60, "temperature": 1.0, "seed": 7, "ignore_eos": True}
    text = llm.generate("Once", **params).text
    stop = text[20:23]
    output = llm.generate("Once", stop=[stop], **params)
    assert output.finish_reason == "stop"
    assert output.text == text[: text.find(stop)]


def test_usage_and_timings(llm):
    output = llm.generate("Once upon", max_tokens=10, ignore_eos=True)
    assert output.usage == (len(llm.tokenizer.encode("Once upon")), 10)
    assert 0 < output.timings.first_token_s < output.timings.total_s
    assert output.timings.tok_per_s > 0
    assert output.finish_reason == "length"


def test_empty_prompt_starts_from_a_special_token():
    by_eos = LLM(tiny.master(), threads=1)
    start = by_eos.generate([tiny.EOS], max_tokens=8, seed=1).tokens
    assert by_eos.generate("", max_tokens=8, seed=1).tokens == start
    assert by_eos.generate([], max_tokens=8, seed=1).tokens == start
    by_bos = LLM(tiny.master(tiny.config(bos_token=5, eos_tokens=())), threads=1)
    start = by_bos.generate([5], max_tokens=8, seed=1)
    assert by_bos.generate("", max_tokens=8, seed=1).tokens == start.tokens
    assert by_bos.tokenizer.encode("") == [5]
    neither = LLM(tiny.master(tiny.config(eos_tokens=())), threads=1)
    with pytest.raises(ValueError, match="prompt is empty"):
        neither.generate("")


def test_chat_is_the_template_continued(chat_llm):
    messages = [{"role": "user", "content": "Hi"}]
    by_hand = chat_llm.generate("user: Hi\nassistant: ", max_tokens=20, seed=2)
    assert chat_llm.chat(messages, max_tokens=20, seed=2).tokens == by_hand.tokens


def test_chat_without_template_says_so(llm):
    with pytest.raises(ValueError, match="no chat template; use generate"):
        llm.chat([{"role": "user", "content": "Hi"}])


def test_a_model_without_tokenizer_takes_token_ids():
    llm = LLM(dataclasses.replace(tiny.master(), tokenizer=None), threads=1)
    output = llm.generate([1, 2, 3], max_tokens=5, seed=1)
    assert (len(output.tokens), output.text) == (5, "")
    with pytest.raises(ValueError, match="no tokenizer; give token ids"):
        llm.generate("Once")


def test_a_run_folder_is_the_file_packed_from_it(tmp_path):
    formats.run.write(tiny.master(), tmp_path / "run")
    onebit.convert(tmp_path / "run", tmp_path / "model.onebit")
    logits = [onebit.load(tmp_path / name, threads=1).logits([1, 2, 3]) for name in ("run", "model.onebit")]
    assert np.array_equal(logits[0], logits[1])


@pytest.mark.parametrize("weights", ["b1.58", "b1"])
@pytest.mark.parametrize("activations", ["a15", "a8", "a4", "a1"])
def test_every_scheme_runs(weights, activations):
    checkpoint = tiny.master(
        tiny.config(weights=weights, activations=activations, activation="silu", tied_head=False)
    )
    logits = LLM(checkpoint, threads=2).logits([1, 2, 3])
    assert np.isfinite(logits).all() and logits.std() > 0


def test_full_precision_models_run_too():
    llm = LLM(tiny.master(tiny.config(weights="dense", activations="none")))
    assert llm.label == "W16A16KV16"
    assert len(llm.generate([1, 2, 3], max_tokens=8, ignore_eos=True).tokens) == 8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.generate("Lily " * 300), "context of this model holds 192"),
        (lambda llm: llm.generate([1, 320]), "token id 320 is outside"),
        (lambda llm: llm.generate([1, -1]), "token id -1 is outside"),
        (lambda llm: llm.generate([[1, 2], [None]]), "prompt holds None"),
        (lambda llm: llm.generate(None), "prompt is None; expected a text or a list"),
        (lambda llm: llm.generate(["a", None]), "prompt is None"),
        (lambda llm: llm.generate([1.5]), "prompt is 1.5"),
        (lambda llm: llm.generate(b"Once"), "prompt is b'Once'"),
        (lambda llm: llm.generate(iter([1, 2])), "prompt is <list_iterator"),
        (lambda llm: llm.generate({1, 2}), "prompt is {1, 2}"),
        (lambda llm: llm.generate(np.array(5)), r"prompt is array\(5\)"),
        (lambda llm: llm.stream(3), "prompt is 3"),
        (lambda llm: llm.logits(None), "prompt is None"),
        (lambda llm: llm.generate("a", 64), "params is 64; expected SamplingParams"),
        (lambda llm: llm.generate("a", temperature=-1), "temperature is -1"),
        (lambda llm: llm.generate("a", onebit.SamplingParams(), seed=1), "either params or seed"),
        (lambda llm: llm.stream("a", max_tokens=0), "max_tokens is 0"),
        (lambda llm: llm.stream([320]), "token id 320 is outside"),
        (lambda llm: llm.logits([1] * 193), "context of this model holds 192"),
        (lambda llm: llm.logits([320]), "token id 320 is outside"),
    ],
)
def test_bad_arguments_are_one_line_value_errors(llm, call, message):
    # A stream refuses when it is made, not when its first token is asked for.
    with pytest.raises(ValueError, match=message) as error:
        call(llm)
    assert "\n" not in str(error.value)


def test_an_empty_list_of_texts_is_an_empty_prompt(llm):
    assert isinstance(llm.generate([], max_tokens=1), onebit.llm.Output)


def test_load_refuses_what_it_cannot_run(tmp_path):
    formats.write(quantize(tiny.master()), tmp_path / "model.onebit")
    with pytest.raises(ValueError, match="kv_cache is 'int3'; expected bf16, int8, fp8"):
        onebit.load(tmp_path / "model.onebit", kv_cache="int3")
    with pytest.raises(ValueError, match="threads is 0"):
        onebit.load(tmp_path / "model.onebit", threads=0)
    with pytest.raises(OSError, match="nowhere"):
        onebit.load(tmp_path / "nowhere")


def test_version_is_that_of_the_package():
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert f'\nversion = "{onebit.__version__}"\n' in project


def test_public_names_exist():
    for name in onebit.__all__:
        assert getattr(onebit, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        onebit.nothing  # noqa: B018


def test_a_text_that_memory_cannot_hold_is_refused(llm, monkeypatch):
    monkeypatch.setattr("onebit.llm.available_bytes", lambda: 40_000)
    with pytest.raises(MemoryError, match="up to 192 tokens needs .* lower max_tokens"):
        llm.generate([1, 2, 3], max_tokens=1000)
    assert len(llm.generate([1, 2, 3], max_tokens=5, ignore_eos=True).tokens) == 5


def test_the_cache_is_as_large_as_it_is_said_to_be(llm):
    assert llm.model.new_cache(3).bytes == 3 * llm._block_bytes()

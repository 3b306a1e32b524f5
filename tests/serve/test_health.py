"""Exact and oracle: repetition by hand, entropy against all logits of the model, weights against their file."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

import onebit
import tiny
from onebit import formats
from onebit.checkpoint import arrays, quantize
from onebit.engine.logits import entropy
from onebit.engine.sampling import SamplingParams
from onebit.formats import native
from onebit.llm import LLM
from onebit.serve.health import LEAST_TOKENS, MOST_TOKENS, WeightCheck, repetition
from serve.running import running, tiny_llm


def test_repetition_counts_trigrams_that_were_there_before():
    assert repetition(range(20)) == 0
    assert repetition([1, 2, 3, 4] * 5) == pytest.approx(1 - 4 / 18)
    assert repetition([7] * LEAST_TOKENS) == pytest.approx(1 - 1 / (LEAST_TOKENS - 2))
    assert repetition(range(LEAST_TOKENS - 1)) is None
    # Only the end of a long text counts.
    assert repetition([7] * 5000 + list(range(MOST_TOKENS))) == 0


@pytest.mark.parametrize(
    "params", [{"temperature": 0}, {"top_k": 5, "temperature": 1.0}, {"presence_penalty": 1.0}]
)
@pytest.mark.parametrize("speculation", [True, False])
def test_entropies_are_those_of_all_logits_and_change_no_token(params, speculation):
    llm = LLM(tiny.master(), threads=1, speculation=speculation)
    prompts = [llm.encode(text) for text in ("Once upon", "Lily ran. Lily ran. Lily", "The dog")]
    texts = []
    for every in (0, 1):
        engine = llm.engine(16)
        engine.entropy_every = every
        params_of = SamplingParams(max_tokens=40, seed=3, ignore_eos=True, **params)
        requests = [engine.add(prompt, params_of) for prompt in prompts]
        for _ in engine.run():
            pass
        texts.append([request.tokens for request in requests])
    assert texts[0] == texts[1]
    n_told = [len(request.entropies) for request in requests]
    assert all(n_told)
    # Each in its turn, and one in each step.
    assert max(n_told) - min(n_told) <= 2 or speculation
    for request in requests:
        logits = llm.logits(request.tokens)[request.n_prompt - 1 : -1].astype(np.float64)
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        expected = -(p * np.log(p)).sum(axis=1)
        for told in request.entropies:
            assert np.abs(expected - told).min() < 1e-4


def test_entropy_of_a_row_of_equal_logits_is_the_logarithm_of_their_number():
    assert entropy(np.full(300, 5, np.float32)) == pytest.approx(math.log(300))
    certain = np.full(300, -200, np.float32)
    certain[7] = 3
    assert entropy(certain) == 0


def passes(checkpoint, n=1, **options):
    """What the first passes of a check find."""
    found = []
    check = WeightCheck(
        checkpoint, lambda changed: (found.append(changed), n <= len(found) and done()), 0, 0.01
    )
    done = check._closing.set
    check.start()
    check._thread.join(30)
    return found[:n]


@pytest.fixture
def checkpoint(tmp_path):
    """A model that comes from a file, with arrays of its own."""
    formats.write(quantize(tiny.master()), tmp_path / "tiny.onebit")
    read = native.read(tmp_path / "tiny.onebit")
    tensors = {
        name: tensor._replace(data=tensor.data.copy(), scale=tensor.scale.copy())
        if hasattr(tensor, "data") and hasattr(tensor, "scale")
        else tensor.copy()
        for name, tensor in read.tensors.items()
    }
    return replace(read, tensors=tensors)


def test_the_file_says_the_hash_of_every_array(checkpoint):
    names = arrays(checkpoint).keys()
    assert names and names <= checkpoint.sha256.keys()
    assert passes(checkpoint) == [[]]


def test_one_flipped_bit_is_found_in_codes_scales_and_norms(checkpoint):
    for name in ("layers.0.q.weight", "layers.0.q.scale", "norm.weight"):
        array = arrays(checkpoint)[name].reshape(-1).view(np.uint8)
        array[-1] ^= 1
        assert passes(checkpoint) == [[name]]
        array[-1] ^= 1
    assert passes(checkpoint) == [[]]


def test_a_model_without_file_is_compared_with_its_beginning():
    checkpoint = quantize(tiny.master())
    assert checkpoint.sha256 == {}
    assert passes(checkpoint, n=3) == [[], [], []]


def test_another_layout_forgets_the_hashes_of_the_file(checkpoint):
    assert quantize(checkpoint).sha256
    other = quantize(checkpoint, "r64")
    assert other.sha256 == {} and passes(other) == [[]]


def test_requests_tell_how_they_did(tmp_path):
    log = tmp_path / "log.jsonl"
    llm = onebit.load(threads=1)
    with running({"stories": llm}, log_file=log) as server:
        server.service.served[0].runner.engine.entropy_every = 5
        body = {"model": "stories", "prompt": "Once", "max_tokens": 60, "seed": 1, "logit_bias": {"13": 100}}
        for _ in range(2):
            assert server.post("/v1/completions", body).status_code == 200
        server.wait_for(lambda: server.figure("weight_checks_total") == 1)
        assert server.figure("flipped_tensors") == 0
        assert server.figure("repetition_count") == 2
        # A bias that leaves one token: the text goes round in a circle, and the model is as undecided as ever.
        assert server.figure("repetition_sum") > 1.8
        assert server.figure("entropy_nats_sum") > 0.1
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    told = [line for line in lines if line["path"] == "/v1/completions"]
    assert [line["repetition"] > 0.9 and line["entropy"] > 0 for line in told] == [True, True]


def test_a_flipped_weight_reaches_the_figures(checkpoint):
    checkpoint.tensors["norm.weight"][0] *= 2
    with running({"tiny": LLM(checkpoint, threads=1), "other": tiny_llm()}) as server:
        server.wait_for(lambda: server.figure("weight_checks_total") >= 2)
        assert server.figure("flipped_tensors") == 1

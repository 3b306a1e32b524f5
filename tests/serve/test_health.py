"""Exact and oracle: entropy against all logits of the model, weights against their file."""

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
from onebit.serve.health import CacheLook, WeightCheck, kv_entropy
from serve.running import running, tiny_llm


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
        engine.probe_every = every
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


def test_kv_entropy_is_that_of_int8_codes():
    block = np.zeros((2, 3, 64, 8), np.float32)
    assert kv_entropy(block) == (0, 0)
    block[0] = -2.5
    # Two codes, half and half; an outlier beside which the rest vanishes.
    block[1, ..., ::2] = 7e-3
    assert kv_entropy(block) == (0, 1)
    block[1] = 1e-3
    block[1, ..., 0] = 300
    assert kv_entropy(block)[1] == pytest.approx(-(7 * math.log2(7 / 8) + math.log2(1 / 8)) / 8)
    # Every code but -128 equally often, whatever the scale of a vector.
    scales = np.float32(2.0) ** np.arange(64)[:, None]
    every = np.arange(-127, 128, dtype=np.float32) * scales
    assert kv_entropy(np.stack([every, -every])[:, None]) == pytest.approx((math.log2(255),) * 2)
    block[0, 1, 5, 3], block[1, 2, 5, 3] = np.nan, np.inf
    assert all(0 <= bits < 1 for bits in kv_entropy(block))


def test_kv_entropy_hardly_depends_on_the_format_of_the_cache():
    """The shipped model: rounding to bfloat16 or e4m3 first moves codes, and the entropy by little."""
    bits = {}
    for kv_cache in ("bf16", "int8", "fp8"):
        llm = onebit.load(threads=1, kv_cache=kv_cache)
        engine = llm.engine(4)
        engine.add(llm.encode("Once upon a time there was a dog. " * 12), SamplingParams(max_tokens=9))
        engine.step()
        bits[kv_cache] = np.array([kv_entropy(engine.read_block(layer, 0)) for layer in range(5)])
    # Rows are layers: keys and values.
    assert abs(bits["int8"] - bits["bf16"]).max() < 0.05
    assert abs(bits["fp8"] - bits["bf16"]).max() < 2
    assert 7 < bits["bf16"].min() < bits["bf16"].max() < 8


def test_a_look_takes_layers_and_blocks_in_turn_and_its_time():
    told = []
    llm = LLM(tiny.master(), threads=1)
    engine = llm.engine(8)
    look = CacheLook(engine, lambda *values: told.append(values), every_s=10)
    look.after_step(0)
    assert told == []
    for seed in (0, 1):
        ids = np.random.default_rng(seed).integers(1, 300, 70 + 64 * seed).tolist()
        engine.add(ids, SamplingParams(max_tokens=9, ignore_eos=True))
    engine.step()
    for now in range(1, 101):
        look.after_step(float(now))
    expected = [(n % 2, *kv_entropy(engine.read_block(n % 2, n // 2))) for n in range(10)]
    assert told == expected
    # Of three full blocks.
    assert len(set(told)) == 6 and told[0] == told[6]


def passes(checkpoint, n=1, more=None):
    """What the first passes of a check find."""
    found = []
    check = WeightCheck(
        checkpoint, lambda changed: (found.append(changed), n <= len(found) and done()), more or {}, 0, 0.01
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


def test_an_adapter_is_compared_with_its_beginning():
    llm = tiny_llm()
    watched = llm.model.adapter_arrays
    assert len(watched) == 2 * 2 * 2 * 7
    assert passes(llm.checkpoint, n=2, more=watched) == [[], []]
    text = llm.generate("Once", max_tokens=9, temperature=0, adapter="blue").text
    name = "adapter 1, layers.1.down.weight.b"
    found, done = [], []

    def on_pass(changed):
        found.append(changed)
        if len(found) == 1:
            # The memory that is computed with, not a copy of it.
            watched[name][...] = 0x4000
        else:
            done.append(check._closing.set())

    check = WeightCheck(llm.checkpoint, on_pass, watched, 0, 0.01)
    check.start()
    check._thread.join(30)
    assert found[:2] == [[], [name]] and done
    assert llm.generate("Once", max_tokens=9, temperature=0, adapter="blue").text != text


def test_another_layout_forgets_the_hashes_of_the_file(checkpoint):
    assert quantize(checkpoint).sha256
    other = quantize(checkpoint, "r64")
    assert other.sha256 == {} and passes(other) == [[]]


def test_requests_tell_how_they_did(tmp_path):
    log = tmp_path / "log.jsonl"
    llm = onebit.load(threads=1)
    with running({"stories": llm}, log_file=log) as server:
        server.service.served[0].runner.engine.probe_every = 5
        body = {"model": "stories", "prompt": "Once", "max_tokens": 90, "seed": 1, "logit_bias": {"13": 100}}
        for _ in range(2):
            assert server.post("/v1/completions", body).status_code == 200
        server.wait_for(lambda: server.figure("weight_checks_total") == 1)
        assert server.figure("flipped_tensors") == 0
        assert server.figure("repetition_count") == 2
        # A bias that leaves one token: the text goes round in a circle, and the model is as undecided as ever.
        assert server.figure("repetition_sum") > 1.8
        assert server.figure("entropy_nats_sum") > 0.1
        assert server.figure("input_codes_total") > 1000 * server.figure("entropy_nats_count")
        assert 0 < server.figure("saturated_codes_total") < server.figure("zero_codes_total")
        assert server.figure("kv_entropy_bits_count") >= 2
        mean_bits = server.figure("kv_entropy_bits_sum") / server.figure("kv_entropy_bits_count")
        assert 6 < mean_bits < 8
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    told = [line for line in lines if line["path"] == "/v1/completions"]
    assert [line["repetition"] > 0.9 and line["entropy"] > 0 for line in told] == [True, True]


def test_a_flipped_weight_reaches_the_figures(checkpoint):
    checkpoint.tensors["norm.weight"][0] *= 2
    with running({"tiny": LLM(checkpoint, threads=1), "other": tiny_llm()}) as server:
        server.wait_for(lambda: server.figure("weight_checks_total") >= 2)
        assert server.figure("flipped_tensors") == 1

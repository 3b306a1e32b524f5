"""The table of formats compares with the model as it is. Kinds: exact (the reference), oracle (loss by hand)."""

import bits
import numpy as np
import pytest

import tiny
from onebit import formats
from onebit.checkpoint import quantize
from onebit.llm import LLM


def test_every_format_is_compared_with_the_model_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(bits, "N_PROMPT", 20)
    monkeypatch.setattr(bits, "N_TEXT", 150)
    formats.write(quantize(tiny.master()), tmp_path / "tiny.onebit")
    models = bits.variants(tmp_path / "tiny.onebit", 1)
    labels = ["A8KV16", "A8KV8", "A8KVfp8", "A15KV16", "A4.8KV16", "A4KV16", "A1KV16"]
    assert [llm.label.removeprefix("W1.58") for llm in models.values()] == labels
    tokens = next(iter(models.values())).encode(2 * tiny.TEXT)
    found = bits.quality(models, tokens[:400])
    reference, *others = found.values()
    assert reference["more"]["value"] == reference["kl"]["value"] == 0 and reference["same_best"] == 1
    assert all(row["kl"]["value"] > 0 and row["n_tokens"] == 2 * 191 for row in others)
    assert found["inputs a1"]["kl"]["value"] > found["inputs a15"]["kl"]["value"]
    llm, nats, n_bytes = LLM(tiny.master(), threads=1), 0.0, 0
    for window in (tokens[:192], tokens[192:384]):
        told = llm.generate(window, max_tokens=1, prompt_logprobs=0).prompt_logprobs
        nats -= sum(entry.logprob for entry in told[1:])
        n_bytes += len(llm.tokenizer.decode(window[1:]).encode())
    assert reference["bits_per_byte"]["value"] == pytest.approx(nats / np.log(2) / n_bytes, rel=1e-6)
    rates = bits.speed(models, tokens, 2)
    assert rates[next(iter(models))]["text_ratio"] == {"median": 1, "least": 1, "most": 1}
    assert all(row["text_tokens_per_s"]["least"] > 0 for row in rates.values())

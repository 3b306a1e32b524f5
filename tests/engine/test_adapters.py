"""Exact, invariant: adapters in the core give a text its bits, whatever else is in the batch.

That they are those of nn, test_torch_is_the_engine.py says.
"""

import numpy as np
import pytest

import tiny
from onebit.checkpoint import quantize
from onebit.engine.model import Model
from onebit.formats.adapter import Adapter, LowRank
from onebit.llm import LLM


def forward(model: Model, texts, adapters, splits=(None,)) -> list[np.ndarray]:
    """Logits of all tokens of several texts in one batch; later tokens in later calls where it is split."""
    n_blocks = max(-(-len(text) // 64) for text in texts)
    cache = model.new_cache(n_blocks * len(texts))
    tables = np.arange(n_blocks * len(texts), dtype=np.int32).reshape(len(texts), -1)
    found = [[] for _ in texts]
    for begin, end in zip((0, *splits[:-1]), splits, strict=True):
        pieces = [text[begin:end] for text in texts]
        starts = np.cumsum([0, *map(len, pieces)]).astype(np.int32)
        ids = np.array([t for piece in pieces for t in piece], np.int32)
        at = np.array([begin + i for piece in pieces for i in range(len(piece))], np.int32)
        rows = np.arange(len(ids), dtype=np.int32)
        logits = model.forward(ids, at, starts, tables, rows, cache, adapters=np.array(adapters, np.int32))
        for i in range(len(texts)):
            found[i].append(logits[starts[i] : starts[i + 1]])
    return [np.concatenate(parts) for parts in found]


def test_bits_do_not_depend_on_company_threads_or_cuts():
    config = tiny.config(qkv_bias=True)
    packed = quantize(tiny.master(config, seed=5))
    rng = np.random.default_rng(6)
    texts = [rng.integers(0, 320, n).tolist() for n in (190, 3, 64, 70, 1)]
    adapters = [
        tiny.adapter(config, 5),
        tiny.adapter(config, 2, 1, ("v",)),
        tiny.adapter(config, 17, 2, short=False, layers=[1]),
    ]
    which = [2, 0, -1, 1, 0]
    one = Model(packed, 1, adapters=adapters)
    alone = [forward(one, [text], [a])[0] for text, a in zip(texts, which, strict=True)]
    for threads in (1, 2, 5):
        model = Model(packed, threads, adapters=adapters)
        for splits in ((None,), (1, 2, 65, None)):
            together = forward(model, texts, which, splits)
            assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_a_float32_adapter_that_is_bfloat16_gives_its_bits():
    """Planes of zeros change nothing: how a file holds the numbers does not matter."""
    config = tiny.config()
    packed = quantize(tiny.master(config, seed=5))
    adapter = tiny.adapter(config, targets=("q",))
    a, b = adapter.tensors["layers.0.q.weight"]
    tail = np.zeros_like(a)
    tail[0, 0] = 2.0**-40
    wide = Adapter(5, 7.5, adapter.tensors | {"layers.0.q.weight": LowRank(a + tail, b)})
    tokens = list(range(20))
    found = forward(Model(packed, adapters=[adapter, wide]), [tokens] * 2, [0, 1])
    assert np.array_equal(a + tail, a) and np.array_equal(*found)


def test_texts_of_one_call_have_adapters_of_their_own():
    config = tiny.config()
    adapters = {"one": tiny.adapter(config, 4, 1), "two": tiny.adapter(config, 8, 2, ("gate", "down"))}
    llm = LLM(tiny.master(config, seed=5), threads=2, adapters=adapters)
    prompts, names = [[5, 6, 7], [5, 6, 7], [5, 6, 7], [9]], ["one", None, "two", "one"]
    sampling = {"max_tokens": 40, "seed": 3, "ignore_eos": True}
    alone = [llm.generate(p, adapter=n, **sampling).tokens for p, n in zip(prompts, names, strict=True)]
    together = llm.generate(prompts, adapter=names, **sampling)
    assert [out.tokens for out in together] == alone
    assert len({tuple(tokens) for tokens in alone[:3]}) == 3
    pieces = [piece.token for piece in llm.stream(prompts[0], adapter="one", **sampling)]
    assert pieces == alone[0]
    assert np.array_equal(llm.logits(range(9)), LLM(tiny.master(config, seed=5)).logits(range(9)))
    assert not np.array_equal(llm.logits(range(9)), llm.logits(range(9), adapter="one"))


def test_what_is_unknown_or_does_not_fit_is_refused():
    config = tiny.config()
    llm = LLM(tiny.master(config), adapters={"one": tiny.adapter(config)})
    with pytest.raises(ValueError, match="adapter 'two' is unknown; this model has one"):
        llm.generate([5], adapter="two")
    with pytest.raises(ValueError, match="1 names for 2 prompts"):
        llm.generate([[5], [6]], adapter=["one"])
    with pytest.raises(ValueError, match="another model"):
        LLM(tiny.master(config), adapters={"wide": tiny.adapter(tiny.config(d_model=64))})
    for which in ([1], [-2]):
        with pytest.raises(ValueError, match=r"adapters\[0\] is -?\d; the model has 1"):
            forward(llm.model, [[5]], which)
    with pytest.raises(ValueError, match="one for each of the 1 sequences"):
        forward(llm.model, [[5]], [0, 0])

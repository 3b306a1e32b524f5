"""Looking changes nothing; counts of codes and blocks of the cache are the same however computed. Kind: invariant."""

import numpy as np
import pytest

import tiny
from core.reference import fp8_values, to_fp8
from engine.test_model import CONFIGS, prompt, same_bits
from onebit.checkpoint import quantize
from onebit.engine.engine import Engine
from onebit.engine.memory import KV_FORMATS
from onebit.engine.model import BLOCK_TOKENS, LAYER_INPUTS, Model, available_isas
from onebit.engine.sampling import SamplingParams
from onebit.packing import from_bf16, to_bf16

N_TOKENS = BLOCK_TOKENS + 9
LOOKED_AT = {name: CONFIGS[name] for name in ("ternary", "groups-a4", "binary-a1", "a15", "dense")}
LOOKED_AT["a4.8-hadamard"] = (tiny.config(activations="a4.8", hadamard=True, d_ff=64), "t80")


def looked(model: Model, n_tokens: int = N_TOKENS, chunk: int = N_TOKENS, kv_cache: str = "bf16"):
    """Logits of the last token of two sequences, counts of both, and what the cache then holds of all layers."""
    tables = np.array([[3, 0], [1, 4]], np.int32)
    cache = model.new_cache(5, kv_cache)
    counts = np.zeros((model.config.n_layers, len(LAYER_INPUTS), 2), np.int64)
    ids = np.array([prompt(n_tokens), prompt(n_tokens, seed=1)], np.int32)
    for start in range(0, n_tokens, chunk):
        n = min(chunk, n_tokens - start)
        at = np.tile(np.arange(start, start + n, dtype=np.int32), 2)
        logits = model.forward(
            ids[:, start : start + n].reshape(-1).copy(), at, np.array([0, n, 2 * n], np.int32), tables,
            np.array([n - 1, 2 * n - 1], np.int32), cache, code_counts=counts,
        )  # fmt: skip
    held = [[model.read_block(cache, layer, b) for b in range(5)] for layer in range(model.config.n_layers)]
    return logits, counts, np.array(held)


@pytest.mark.parametrize("name", LOOKED_AT)
def test_counts_are_the_same_however_they_are_computed(name):
    config, encoding = LOOKED_AT[name]
    checkpoint = quantize(tiny.master(config, seed=3), encoding)
    plain = Model(checkpoint, threads=1, isa="scalar")
    logits, counts, held = looked(plain)
    for isa in available_isas():
        for threads, chunk in ((1, N_TOKENS), (3, 7)):
            again = looked(Model(checkpoint, threads=threads, isa=isa), chunk=chunk)
            assert same_bits(again[0], logits) and same_bits(again[2], held)
            assert np.array_equal(again[1], counts)
    n_codes = 2 * N_TOKENS * np.array(plain.input_widths())
    saturated, zero = counts[..., 0], counts[..., 1]
    assert (zero >= 0).all() and (zero < n_codes).all() and (saturated < n_codes).all()
    # Of absmax codes one at least is the largest; a1 and floats have no such thing.
    if name in ("ternary", "a15"):
        assert (saturated >= 2 * N_TOKENS).all()
    if name in ("binary-a1", "dense"):
        assert not saturated.any()
    if name == "a4.8-hadamard":
        assert (zero[:, 1] >= n_codes[1] // 2).all()


def test_counts_are_added():
    model = Model(quantize(tiny.master()), threads=1)
    counts = looked(model)[1]
    ids, table = np.zeros(1, np.int32), np.zeros((1, 1), np.int32)
    call = (ids, ids, np.array([0, 1], np.int32), table, ids, model.new_cache(1))
    more = counts.copy()
    model.forward(*call, code_counts=more)
    assert (more[..., 0] > counts[..., 0]).all()
    with pytest.raises(ValueError, match=r"code_counts: expected \[2, 4, 2\]"):
        model.forward(*call, code_counts=np.zeros((2, 4, 3), np.int64))
    frozen = counts.copy()
    frozen.setflags(write=False)
    for wrong in (counts.astype(np.int32), counts[:, ::2], frozen):
        with pytest.raises((TypeError, ValueError)):
            model.forward(*call, code_counts=wrong)


@pytest.mark.parametrize("kv_cache", KV_FORMATS)
@pytest.mark.parametrize("n_kv_heads", [1, 4])
def test_blocks_hold_what_the_format_can(kv_cache, n_kv_heads):
    config = tiny.config(d_model=72, n_heads=4, d_head=18, n_kv_heads=n_kv_heads)
    held = looked(Model(quantize(tiny.master(config)), threads=2), kv_cache=kv_cache)[2]
    # [layers, blocks, 2, heads, 64, d]; block 2 was never used, and 0 and 4 have 9 positions.
    assert held.shape == (2, 5, 2, n_kv_heads, BLOCK_TOKENS, 18)
    assert not held[:, 2].any() and not held[:, [0, 4], ..., 9:, :].any()
    written = np.concatenate([held[:, [3, 1]].ravel(), held[:, [0, 4], ..., :9, :].ravel()]).reshape(-1, 18)
    assert (abs(written).max(axis=1) > 0).all()
    if kv_cache == "int8":
        scale = abs(written).max(axis=1, keepdims=True) / 127
        assert abs(written / scale - np.rint(written / scale)).max() < 1e-4
    else:
        back = from_bf16(to_bf16(written)) if kv_cache == "bf16" else fp8_values()[to_fp8(written)]
        assert same_bits(back, written)


def test_blocks_that_do_not_exist_are_refused():
    model = Model(quantize(tiny.master()), threads=1)
    cache = model.new_cache(3)
    for layer, block, message in (
        (2, 0, "layer is 2"),
        (-1, 0, "layer is -1"),
        (0, 3, "block is 3; expected 0 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            model.read_block(cache, layer, block)
    with pytest.raises(ValueError, match=r"out: expected \[2, 2, 64, 16\]"):
        cache.read_block(0, 0, np.empty((2, 2, 64, 8), np.float32))


def test_an_engine_counts_probed_steps_and_shows_full_blocks():
    config = tiny.config(max_seq_len=400)
    model = Model(quantize(tiny.master(config)), threads=1)
    counts = {}
    for every in (0, 1, 3):
        engine = Engine(model, None, n_blocks=12)
        engine.probe_every = every
        request = engine.add(prompt(150), SamplingParams(max_tokens=9, temperature=0, ignore_eos=True))
        assert engine.read_block(0, 0) is None
        engine.step()
        for nth, block in ((0, 0), (1, 1), (2, 0)):
            expected = model.read_block(engine._cache, 1, request.blocks[block])
            assert expected.any() and same_bits(engine.read_block(1, nth), expected)
        for _ in engine.run():
            pass
        counts[every] = engine.code_counts, request.tokens
        assert engine.read_block(0, 0) is None
    assert counts[0][1] == counts[1][1] == counts[3][1]
    assert not counts[0][0].any()
    widths = np.array(model.input_widths())
    # Of nine steps, the first of 150 tokens: all, or the third, the sixth and the ninth.
    assert np.array_equal(counts[1][0][..., 0], np.broadcast_to(158 * widths, (2, 4)))
    assert np.array_equal(counts[3][0][..., 0], np.broadcast_to(3 * widths, (2, 4)))
    assert (counts[1][0][..., 1:] >= counts[3][0][..., 1:]).all()

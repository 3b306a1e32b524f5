"""Invariant: 32,768 positions, stretched by yarn, give the same bits however they are cut, and text to the last one."""

import numpy as np

import tiny
from onebit.checkpoint import quantize
from onebit.config import RopeScaling
from onebit.engine.model import BLOCK_TOKENS, Model
from onebit.llm import LLM

LENGTH = 32768
CONFIG = tiny.config(
    d_model=16,
    n_layers=1,
    n_heads=1,
    n_kv_heads=1,
    d_ff=16,
    max_seq_len=LENGTH,
    rope_scaling=RopeScaling("yarn", 16.0, 2048),
)


def last_logits(model: Model, tokens: list[int], chunks: list[int], n_rows: int) -> np.ndarray:
    """Logits of the last n_rows tokens, the text read in chunks of these sizes."""
    assert sum(chunks) == len(tokens)
    cache = model.new_cache(-(-len(tokens) // BLOCK_TOKENS))
    table = np.arange(cache.n_blocks, dtype=np.int32)[None]
    ids = np.array(tokens, np.int32)
    found, start = [], 0
    for size in chunks:
        at = np.arange(start, start + size, dtype=np.int32)
        rows = np.flatnonzero(at >= len(tokens) - n_rows).astype(np.int32)
        ends = np.array([0, size], np.int32)
        found.append(model.forward(ids[at], at, ends, table, rows, cache))
        start += size
    return np.concatenate(found)


def test_the_last_positions_have_the_same_bits_however_the_text_is_cut():
    packed = quantize(tiny.master(CONFIG))
    prompt = np.random.default_rng(0).integers(0, CONFIG.vocab_size, LENGTH - 12).tolist()
    llm = LLM(packed)
    output = llm.generate(prompt, max_tokens=100, temperature=0, ignore_eos=True)
    # The context is full: its last token is drawn, but has no place to be read from.
    assert (output.finish_reason, len(output.tokens)) == ("length", 13)
    tokens = prompt + output.tokens[:-1]
    assert len(tokens) == LENGTH
    by_token = last_logits(llm.model, tokens, [4096] * 7 + [4000] + [1] * 96, n_rows=13)
    in_odd_chunks = last_logits(llm.model, tokens, [511] * 64 + [64], n_rows=13)
    assert by_token.tobytes() == in_odd_chunks.tobytes()
    assert by_token.argmax(-1).tolist() == output.tokens
    assert np.ptp(by_token) > 1

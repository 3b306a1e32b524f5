"""Invariant: logits are the same bits however they are computed. Oracle: a forward pass in plain numpy."""

import numpy as np
import pytest

import tiny
from engine import reference
from onebit.checkpoint import Checkpoint, quantize
from onebit.engine.memory import KV_FORMATS, position_bytes
from onebit.engine.model import (
    BLOCK_TOKENS,
    SPLIT_TOKENS,
    Model,
    available_isas,
    choose_isa,
    choose_threads,
    default_threads,
    self_test,
)
from onebit.llm import LLM, load

# Awkward widths on purpose: inputs that need padding, tiles that are mostly empty, heads that share keys. With each the
# encoding, and how embedding and head are kept where it is not as usual.
CONFIGS = {
    "ternary": (tiny.config(), "t80"),
    "ternary-r64": (tiny.config(), "r64"),
    "rows-silu-untied": (
        tiny.config(
            d_model=72,
            n_heads=6,
            d_head=18,
            d_ff=100,
            scale="row",
            activation="silu",
            sub_norm=False,
            tied_head=False,
        ),
        "t80",
    ),
    "groups-r64": (tiny.config(scale=16, n_kv_heads=1, activation="silu"), "r64"),
    "groups-a4": (tiny.config(scale=16, n_heads=3, n_kv_heads=3, activations="a4", tied_head=False), "t80"),
    "binary": (tiny.config(weights="b1", sub_norm=False, scale="row"), "b128"),
    "norms-and-biases": (tiny.config(qk_norm=True, qkv_bias=True, scale="row"), "t80"),
    "dense": (
        tiny.config(
            weights="dense",
            activations="none",
            d_model=72,
            n_heads=6,
            d_head=18,
            d_ff=100,
            qk_norm=True,
            activation="silu",
            sub_norm=False,
        ),
        "bf16",
    ),
    "dense-untied": (
        tiny.config(weights="dense", activations="none", qkv_bias=True, sub_norm=False, tied_head=False),
        "bf16",
    ),
    "binary-a1": (tiny.config(weights="b1", activations="a1", scale=16, activation="silu"), "b128"),
    "a15": (tiny.config(activations="a15", d_model=72, n_heads=6, d_head=18, d_ff=100), "t80"),
    "a15-rows-bf16-untied": (
        tiny.config(activations="a15", scale="row", activation="silu", sub_norm=False, tied_head=False),
        "r64",
        "bf16",
    ),
    "a15-binary-groups-coded": (
        tiny.config(weights="b1", activations="a15", scale=16, activation="silu", qk_norm=True),
        "b128",
        "codes",
    ),
    "coded-untied": (tiny.config(d_model=72, n_heads=6, d_head=18, tied_head=False), "t80", "codes"),
    "a15-r64-rows-coded": (tiny.config(activations="a15", scale="row", n_kv_heads=1), "r64", "codes"),
}

# Longer than two blocks, so that attention merges blocks, and not a whole number of them.
N_TOKENS = 2 * BLOCK_TOKENS + 9

# Largest difference of a token's logits from the reference, in units of the largest logit: rounding alone for
# most, more where rounding moves an activation across the middle between two codes, and one code changes.
MEDIAN_TOLERANCE = 1e-6
CODE_TOLERANCE = 1e-2
# With an int8 cache the weights of values are rounded too, to 15 bits: more tokens meet a code that changes, or two.
INT8_TOLERANCE = 1e-4
INT8_SHARE = 0.25

# Nothing between rounds but the cache, where a key or value may go to the other neighbour of bfloat16.
DENSE_TOLERANCE = 1e-3
# Of a15 many codes change, by little.
A15_TOLERANCE = 1e-4

# Model, its encoding, and the number format of the cache.
CASES = [(name, "bf16") for name in CONFIGS]
CASES += [(name, kv) for name in ("ternary", "rows-silu-untied", "groups-r64") for kv in ("int8", "fp8")]


@pytest.fixture(params=CASES, ids="-".join, scope="module")
def case(request) -> tuple[Checkpoint, str]:
    """A model, and the number format of its cache."""
    config, encoding, *head = CONFIGS[request.param[0]]
    master = tiny.master(config, seed=3)
    packed = tiny.coded(master, encoding) if head == ["codes"] else quantize(master, encoding, *head)
    return packed, request.param[1]


@pytest.fixture
def checkpoint(case) -> Checkpoint:
    return case[0]


@pytest.fixture
def kv_cache(case) -> str:
    return case[1]


@pytest.fixture(scope="module")
def baseline(case) -> np.ndarray:
    """Logits of the whole prompt on one thread of the plainest kernels."""
    checkpoint, kv_cache = case
    return whole(Model(checkpoint, threads=1, isa="scalar"), prompt(N_TOKENS), kv_cache)


def prompt(n_tokens: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, tiny.CONFIG.vocab_size, n_tokens).tolist()


def whole(model: Model, tokens: list[int], kv_cache: str = "bf16") -> np.ndarray:
    return run(model, [tokens], len(tokens), kv_cache)[0]


def run(model: Model, sequences: list[list[int]], chunk: int, kv_cache: str = "bf16") -> list[np.ndarray]:
    """Logits of all tokens of each sequence, up to `chunk` tokens of every sequence a call, in scattered blocks."""
    width = max(-(-len(tokens) // BLOCK_TOKENS) for tokens in sequences)
    blocks = np.random.default_rng(1).permutation(width * len(sequences) + 3)
    tables = blocks[: width * len(sequences)].reshape(len(sequences), width).astype(np.int32)
    cache = model.new_cache(len(blocks), kv_cache)
    logits = [[] for _ in sequences]
    for start in range(0, max(map(len, sequences)), chunk):
        parts = [tokens[start : start + chunk] for tokens in sequences]
        counts = [len(part) for part in parts]
        n_tokens = sum(counts)
        result = model.forward(
            np.array([token for part in parts for token in part], np.int32),
            np.array([start + i for count in counts for i in range(count)], np.int32),
            np.cumsum([0, *counts], dtype=np.int32),
            tables,
            np.arange(n_tokens, dtype=np.int32),
            cache,
        )
        for rows, part in zip(logits, np.split(result, np.cumsum(counts)[:-1]), strict=True):
            rows.append(part)
    return [np.concatenate(rows) for rows in logits]


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype == np.float32 and a.tobytes() == b.tobytes()


def test_every_kernel_answers_like_the_scalar_one():
    assert self_test() == {isa: [] for isa in available_isas()}


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_isa_and_number_of_threads_gives_the_same_bits(checkpoint, kv_cache, baseline, isa, threads):
    model = Model(checkpoint, threads=threads, isa=isa)
    assert (model.isa, model.threads) == (isa, threads)
    assert same_bits(whole(model, prompt(N_TOKENS), kv_cache), baseline)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_every_division_into_calls_gives_the_same_bits(checkpoint, kv_cache, baseline, chunk):
    model = Model(checkpoint, threads=2)
    assert same_bits(run(model, [prompt(N_TOKENS)], chunk, kv_cache)[0], baseline)


@pytest.mark.parametrize("chunk", [1, 50, 1000])
def test_a_sequence_among_seven_others_gives_the_same_bits(checkpoint, kv_cache, baseline, chunk):
    others = [prompt(n, seed=n) for n in (1, 3, 64, 65, 100, 128, 150)]
    model = Model(checkpoint, threads=2)
    logits = run(model, [*others[:4], prompt(N_TOKENS), *others[4:]], chunk, kv_cache)
    assert same_bits(logits[4], baseline)
    assert same_bits(logits[6], whole(model, others[5], kv_cache))


def test_logits_equal_plain_numpy(checkpoint, kv_cache, baseline):
    expected = reference.logits(checkpoint, prompt(N_TOKENS), kv_cache)
    error = abs(baseline - expected).max(axis=1) / abs(expected).max()
    same = baseline.argmax(axis=1) == expected.argmax(axis=1)
    if kv_cache == "int8":
        assert np.quantile(error, INT8_SHARE) < INT8_TOLERANCE
        assert error.max() < 2 * CODE_TOLERANCE and same.mean() > 0.97
    elif checkpoint.config.weights == "dense":
        assert error.max() < DENSE_TOLERANCE and same.all()
    elif checkpoint.config.activations == "a15":
        assert np.median(error) < A15_TOLERANCE and error.max() < DENSE_TOLERANCE and same.all()
    else:
        assert np.median(error) < MEDIAN_TOLERANCE
        assert error.max() < CODE_TOLERANCE and same.all()


@pytest.mark.parametrize("kv_cache", KV_FORMATS)
@pytest.mark.parametrize("n_kv_heads", [1, 4])
def test_splits_of_the_keys_give_the_same_bits_whoever_computes_them(kv_cache, n_kv_heads):
    """Few heads leave splits to share between threads; many heads or tokens do not."""
    n = 2 * SPLIT_TOKENS + BLOCK_TOKENS + 5
    config = tiny.config(n_layers=1, n_kv_heads=n_kv_heads, max_seq_len=n)
    checkpoint, tokens = quantize(tiny.master(config)), prompt(n)
    expected = whole(Model(checkpoint, threads=1, isa="scalar"), tokens, kv_cache)
    for threads in (1, 2, 5):
        model = Model(checkpoint, threads=threads)
        assert same_bits(whole(model, tokens, kv_cache), expected)
        table = np.arange(-(-n // BLOCK_TOKENS), dtype=np.int32)[None]
        cache = model.new_cache(table.size, kv_cache)
        start, ends = 0, [n - 40, n - 30, n - 13, *range(n - 12, n + 1)]
        for end in ends:
            at = np.arange(start, end, dtype=np.int32)
            ids = np.array(tokens[start:end], np.int32)
            count = np.array([0, end - start], np.int32)
            logits = model.forward(ids, at, count, table, at - np.int32(start), cache)
            assert same_bits(logits, expected[start:end])
            start = end


def test_caches_of_eight_bits_stay_close_to_the_reference():
    """On the shipped model: differences of logits, in standard deviations of all."""
    text = "Once upon a time, there was a little girl named Lily. She loved to play"
    llm = {kv: load(kv_cache=kv) for kv in KV_FORMATS}
    logits = {kv: one.logits(text) for kv, one in llm.items()}
    spread = logits["bf16"].std()
    error = {kv: np.sqrt(np.mean((x - logits["bf16"]) ** 2)) / spread for kv, x in logits.items()}
    assert 0 < error["int8"] < 0.02 and error["int8"] < error["fp8"] < 0.06
    assert [one.label for one in llm.values()] == ["W1.58A8KV16", "W1.58A8KV8", "W1.58A8KVfp8"]


@pytest.mark.parametrize("pack", [quantize, tiny.coded])
def test_t80_and_r64_give_the_same_bits(pack):
    models = [Model(pack(tiny.master(), encoding)) for encoding in ("t80", "r64")]
    a, b = (whole(model, prompt(40)) for model in models)
    assert same_bits(a, b)


@pytest.mark.parametrize("activations", ["a8", "a15"])
def test_inputs_longer_than_one_exact_dot_are_summed_in_parts(activations):
    config = tiny.config(d_ff=2**15 + 48, n_layers=1, activations=activations)
    checkpoint = quantize(tiny.master(config))
    # More than pass over a tile of such inputs at a time.
    tokens = prompt(100)
    logits = [whole(Model(checkpoint, threads=1, isa=isa), tokens) for isa in available_isas()]
    assert all(same_bits(other, logits[0]) for other in logits)
    expected = reference.logits(checkpoint, tokens)
    assert abs(logits[0] - expected).max() < CODE_TOLERANCE * abs(expected).max()


def test_only_rows_asked_for_come_back():
    model = Model(quantize(tiny.master()))
    call = arguments(model, n_tokens=5)
    everything = model.forward(**call | {"rows": np.arange(5, dtype=np.int32)})
    some = model.forward(**call | {"rows": np.array([4, 0, 4], np.int32)})
    assert same_bits(some, everything[[4, 0, 4]])
    assert model.forward(**call | {"rows": np.array([], np.int32)}).shape == (0, model.config.vocab_size)


def test_logits_go_where_they_are_wanted():
    model = Model(quantize(tiny.master()))
    call = arguments(model, n_tokens=5)
    room = np.empty((3, model.config.vocab_size), np.float32)
    logits = model.forward(**call, out=room[:1])
    assert np.shares_memory(logits, room) and same_bits(logits, model.forward(**call))
    frozen = room[:1].copy()
    frozen.setflags(write=False)
    for wrong in (room, room[:1, ::2], room[:1].astype(np.float64), frozen):
        with pytest.raises((ValueError, TypeError)):
            model.forward(**call, out=wrong)


def test_sequences_without_tokens_are_skipped():
    model = Model(quantize(tiny.master()))
    call = arguments(model, n_tokens=5)
    alone = model.forward(**call)
    tables = np.array([[-7], [0], [99]], np.int32)
    among = model.forward(**call | {"seq_starts": np.array([0, 0, 5, 5], np.int32), "block_tables": tables})
    assert same_bits(among, alone)


def test_weights_are_used_in_place():
    checkpoint = quantize(tiny.master())
    model = Model(checkpoint)
    call = arguments(model, n_tokens=5)
    before = model.forward(**call)
    gain = checkpoint.tensors["norm.weight"]
    gain *= 2
    after = model.forward(**call)
    gain /= 2
    assert not same_bits(after, before)
    del checkpoint, gain
    assert same_bits(model.forward(**call), before)


def arguments(model: Model, n_tokens: int) -> dict:
    """A valid call: one sequence at position 0 in one block, the last row."""
    return {
        "tokens": np.arange(n_tokens, dtype=np.int32),
        "positions": np.arange(n_tokens, dtype=np.int32),
        "seq_starts": np.array([0, n_tokens], np.int32),
        "block_tables": np.array([[0]], np.int32),
        "rows": np.array([n_tokens - 1], np.int32),
        "cache": model.new_cache(1),
    }


def ints(*values) -> np.ndarray:
    return np.array(values, np.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": [0, 1, 2]}, "tokens: expected a contiguous int32 array"),
        ({"tokens": np.arange(3)}, "tokens: expected a contiguous int32 array"),
        ({"tokens": np.arange(6, dtype=np.int32)[::2]}, "tokens: expected a contiguous int32 array"),
        ({"tokens": np.zeros((3, 1), np.int32)}, "tokens: expected a contiguous int32 array of 1 dim"),
        ({"tokens": ints()}, "tokens: expected 1"),
        ({"tokens": ints(0, 320, 1)}, r"tokens\[1\] is 320; expected 0 to 319"),
        ({"tokens": ints(0, 1, -1)}, r"tokens\[2\] is -1"),
        ({"positions": ints(0, 1)}, "positions: expected one for each of the 3 tokens"),
        ({"positions": ints(-1, 0, 1)}, r"positions\[0\] is -1; expected 0 to 191"),
        ({"positions": ints(190, 191, 192)}, r"positions\[2\] is 192"),
        ({"positions": ints(0, 2, 3)}, r"positions\[1\] does not follow"),
        ({"positions": ints(62, 63, 64)}, "sequence 0 needs 2 blocks, the table has 1"),
        ({"seq_starts": ints(0)}, "seq_starts: expected one more value"),
        ({"seq_starts": ints(0, 2)}, "seq_starts: expected to begin with 0 and end with"),
        ({"seq_starts": ints(1, 3)}, "seq_starts: expected to begin with 0 and end with"),
        (
            {"seq_starts": ints(0, 4, 3), "block_tables": ints(0, 0).reshape(2, 1)},
            "seq_starts: expected ascending",
        ),
        (
            {"seq_starts": ints(0, -1, 3), "block_tables": ints(0, 0).reshape(2, 1)},
            "seq_starts: expected ascending",
        ),
        ({"block_tables": ints(0)}, "block_tables: expected a contiguous int32 array of 2 dim"),
        ({"block_tables": ints(1).reshape(1, 1)}, r"block_tables\[0, 0\] is 1; expected 0 to 0"),
        ({"block_tables": ints(-1).reshape(1, 1)}, r"block_tables\[0, 0\] is -1"),
        ({"block_tables": np.zeros((1, 0), np.int32)}, "sequence 0 needs 1 blocks, the table has 0"),
        ({"rows": ints(3)}, r"rows\[0\] is 3; expected 0 to 2"),
        ({"rows": ints(-1)}, r"rows\[0\] is -1"),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    model = Model(quantize(tiny.master()), threads=1)
    with pytest.raises(ValueError, match=message):
        model.forward(**arguments(model, n_tokens=3) | changes)


def test_a_cache_of_another_model_is_refused():
    model = Model(quantize(tiny.master()), threads=1)
    other = Model(quantize(tiny.master(tiny.config(n_layers=1))), threads=1)
    call = arguments(model, n_tokens=3)
    with pytest.raises(ValueError, match="cache: made for a model of another shape"):
        model.forward(**call | {"cache": other.new_cache(1)})
    with pytest.raises(ValueError, match="n_blocks: expected at least 1"):
        model.new_cache(0)
    with pytest.raises(ValueError, match="kv_cache int3"):
        model.new_cache(1, "int3")
    with pytest.raises(MemoryError):
        model.new_cache(2**30 - 1)


@pytest.mark.parametrize("kv_cache", KV_FORMATS)
def test_a_position_takes_what_is_said(kv_cache):
    for d_head in (18, 32):
        config = tiny.config(d_model=72, n_heads=4, n_kv_heads=2, d_head=d_head)
        cache = Model(quantize(tiny.master(config))).new_cache(3, kv_cache)
        assert cache.bytes == 3 * BLOCK_TOKENS * position_bytes(config, kv_cache)


def test_heads_too_wide_for_exact_int8_sums_are_refused():
    config = tiny.config(n_layers=1, n_heads=1, n_kv_heads=1, d_head=1026)
    with pytest.raises(ValueError, match="heads of width 1026 are too wide"):
        LLM(quantize(tiny.master(config)), kv_cache="int8")


def test_a_float_checkpoint_is_refused():
    with pytest.raises(ValueError, match="quantize it first"):
        Model(tiny.master())


def test_choices_come_from_the_argument_then_the_environment(monkeypatch):
    assert choose_isa() == available_isas()[0]
    assert choose_threads() == default_threads() >= 1
    monkeypatch.setenv("ONEBIT_ISA", "scalar")
    monkeypatch.setenv("ONEBIT_THREADS", "3")
    assert (choose_isa(), choose_threads()) == ("scalar", 3)
    assert (choose_isa(available_isas()[0]), choose_threads(np.int64(2))) == (available_isas()[0], 2)
    model = Model(quantize(tiny.master()))
    assert (model.isa, model.threads) == ("scalar", 3)


def test_broken_kernels_are_named(monkeypatch):
    monkeypatch.setattr("onebit._core.broken_isas", lambda: ["avx9"])
    with pytest.warns(RuntimeWarning, match="avx9 kernels give wrong results"):
        assert choose_isa() == available_isas()[0]


@pytest.mark.parametrize("threads", ["0", "-1", "two", "1.5", "1025", "99999999999999999999"])
def test_a_bad_number_of_threads_is_refused(monkeypatch, threads):
    monkeypatch.setenv("ONEBIT_THREADS", threads)
    with pytest.raises(ValueError, match=r"ONEBIT_THREADS is .*; expected a whole number from 1 to 1024"):
        choose_threads()


def test_threads_that_the_system_refuses_are_named(monkeypatch):
    def refuse(*args):
        raise RuntimeError("Resource temporarily unavailable")

    monkeypatch.setattr("onebit.engine.model._core.Model", refuse)
    with pytest.raises(OSError, match=r"refuses 900 threads \(Resource temporarily unavailable\)"):
        Model(quantize(tiny.master()), threads=900)


def test_a_bad_choice_is_refused(monkeypatch):
    for threads in (0, True, 1.5):
        with pytest.raises(ValueError, match="threads is"):
            choose_threads(threads)
    with pytest.raises(ValueError, match="isa is 'sse'; this machine has .*scalar"):
        choose_isa("sse")
    monkeypatch.setenv("ONEBIT_ISA", "AVX2")
    with pytest.raises(ValueError, match="ONEBIT_ISA is 'AVX2'; this machine has .*scalar"):
        choose_isa()


def test_hardware_threads_of_a_core_count_once(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr("onebit.engine.model._siblings", lambda cpu: str(cpu % 2))
    assert default_threads() == 2
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert default_threads() == 1

"""bfloat16 heads and shortlists. Kinds: oracle (numpy), exact (bits), invariant (the best are all there)."""

from dataclasses import replace

import numpy as np
import pytest

import tiny
from engine import reference
from onebit import quant
from onebit.checkpoint import HEADS, SHORTLIST_BOUNDS, Checkpoint, quantize, to_dense
from onebit.engine.model import Model, available_isas
from onebit.engine.sampling import SamplingParams
from onebit.llm import LLM
from onebit.packing import from_bf16, to_bf16

# An odd number of int8 tiles, the last one not full.
V, D = 1481, 100


def config(**changes):
    return tiny.config(
        vocab_size=V,
        d_model=D,
        n_layers=1,
        n_heads=1,
        n_kv_heads=1,
        d_head=2,
        d_ff=16,
        max_seq_len=64,
        **changes,
    )


def model_of(embed, gain=None, head="bf16", **options) -> tuple[Checkpoint, Model]:
    """A model that hands the normalised embedding of a token to its head: attention and feed-forward add nothing."""
    master = tiny.master(config())
    tensors = master.tensors | {"embed.weight": np.ascontiguousarray(embed, np.float32)}
    if gain is not None:
        tensors["norm.weight"] = np.asarray(gain, np.float32)
    # Sub-norms without gain make both branches zero.
    tensors |= {name: np.zeros_like(t) for name, t in tensors.items() if "sub_norm" in name}
    packed = quantize(replace(master, tensors=tensors, tokenizer=None), head=head)
    return packed, Model(packed, **options)


def logits(model: Model, tokens, top_k=0) -> np.ndarray:
    """float32 [T, V] of each token at the start of its own sequence."""
    n = len(tokens)
    return model.forward(
        np.array(tokens, np.int32),
        np.zeros(n, np.int32),
        np.arange(n + 1, dtype=np.int32),
        np.arange(n, dtype=np.int32)[:, None],
        np.arange(n, dtype=np.int32),
        model.new_cache(n),
        np.broadcast_to(np.int32(top_k), n).copy(),
    )


def input_of(packed: Checkpoint, tokens) -> np.ndarray:
    """What the head of model_of reads."""
    x = to_dense(packed.tensors["embed.weight"])[np.array(tokens)]
    mean = quant.lane_sum(x * x) / np.float32(D)
    r = np.float32(1) / np.sqrt(mean + np.float32(packed.config.norm_eps))
    return (x * r) * packed.tensors["norm.weight"]


def best(row: np.ndarray, k: int) -> np.ndarray:
    return np.lexsort((np.arange(row.size), -row))[:k]


def assert_keeps_the_best(full: np.ndarray, short: np.ndarray, k: int, n_most: int | None = None) -> None:
    """The k best of every row, ties included, have their bits, and what else is there has its own."""
    for exact, row in zip(full, short, strict=True):
        kept = row > -np.inf
        assert np.array_equal(row[kept].view(np.int32), exact[kept].view(np.int32))
        kth = exact[best(exact, k)[-1]]
        assert kept[exact >= kth].all()
        assert n_most is None or kept.sum() <= n_most


def gaussian(seed=1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((V, D)).astype(np.float32)


def adversaries() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    w = gaussian()
    near = np.repeat(w[:15], 100, axis=0)[:V] * (1 + 2e-3 * rng.standard_normal((V, 1)))
    doubles = w[rng.integers(0, 40, V)]
    sizes = w * np.float32(10) ** rng.integers(-6, 7, (V, 1))
    tiny_rows = w * np.float32(1e-38)
    # One value carries the row, the rest of its int8 codes are 0 or 1: the worst relative error.
    spikes = w * np.float32(0.004)
    spikes[np.arange(V), rng.integers(0, D, V)] = 1.0
    ties = np.round(w)
    mixed = np.where(rng.random((V, 1)) < 0.5, 0, w)
    heads = {
        "gaussian": w,
        "near": near,
        "doubles": doubles,
        "sizes": sizes,
        "tiny": tiny_rows,
        "spikes": spikes,
        "ties": ties,
        "zeros": mixed,
    }
    return {name: head.astype(np.float32) for name, head in heads.items()}


@pytest.mark.parametrize("isa", available_isas())
def test_bf16_logits_are_ordered_lane_sums(isa):
    packed, model = model_of(gaussian(), head="bf16", isa=isa, threads=2)
    tokens = [3, V - 1, 16]
    rows = from_bf16(to_bf16(gaussian()))
    assert np.array_equal(to_dense(packed.tensors["embed.weight"]), rows)
    expected = np.stack([quant.lane_sum(x * rows)[:, 0] for x in input_of(packed, tokens)])
    assert np.array_equal(logits(model, tokens), expected)


def test_stored_norms_are_upper_bounds_and_tight():
    w = adversaries()["sizes"]
    packed, _ = model_of(w)
    exact = from_bf16(to_bf16(w)).astype(np.longdouble)
    int8 = packed.tensors["shortlist.weight"]
    codes, scale = quant.quantize_rows(from_bf16(to_bf16(w)), 8)
    assert np.array_equal(to_dense(int8), quant.dequantize(codes, scale))
    rows = codes.astype(np.longdouble) * scale.astype(np.longdouble)[:, None]
    for bound, values in zip(packed.tensors[SHORTLIST_BOUNDS], (exact - rows, exact), strict=True):
        norm = np.sqrt((values * values).sum(axis=1))
        assert (bound >= norm).all() and (bound <= norm * (1 + 1e-6) + 1e-44).all()


@pytest.mark.parametrize("name", adversaries())
@pytest.mark.parametrize("k", [1, 2, 40])
def test_a_bf16_head_misses_none_of_the_best(name, k):
    _, model = model_of(adversaries()[name], threads=2)
    tokens = list(range(0, V, 150))
    assert_keeps_the_best(logits(model, tokens), logits(model, tokens, k), k)


def test_the_bound_alone_decides(monkeypatch):
    """Weights below the int8 step of their row: the approximation ranks them by chance, the bound must not."""
    rng = np.random.default_rng(5)
    w = np.zeros((V, D), np.float32)
    w[:, 0] = 1
    w[:, 1:] = rng.uniform(-0.0039, 0.0039, (V, D - 1))
    # A direction of activations in which the hidden weights matter most.
    gain = np.full(D, 200, np.float32)
    gain[0] = 1e-3
    packed, model = model_of(w, gain, threads=1)
    tokens = list(range(0, V, 50))
    full, short = logits(model, tokens), logits(model, tokens, 1)
    codes, scale = quant.quantize_rows(from_bf16(to_bf16(w)), 8)
    guess = input_of(packed, tokens).astype(np.float64) @ (codes * scale[:, None]).T
    assert (guess.argmax(1) != full.argmax(1)).any()
    assert_keeps_the_best(full, short, 1)


def test_the_bound_holds_what_15_bits_and_float_sums_lose():
    """Rows of whole numbers are exact in 8 bits, and an input below its 15-bit step ranks them by what is rounded."""
    rng = np.random.default_rng(6)
    values = np.concatenate([[127], rng.integers(0, 128, D // 2 - 1)])
    # All approximations are 0: every row has the same sum, of no weight.
    values = np.concatenate([values, -values])
    master = tiny.master(config(tied_head=False))
    tensors = {name: np.zeros_like(t) if "sub_norm" in name else t for name, t in master.tensors.items()}
    tensors["head.weight"] = np.stack([rng.permutation(values) for _ in range(V)]).astype(np.float32)
    tensors["embed.weight"] = np.ones((V, D), np.float32)
    tensors["norm.weight"] = (1 + 1e-5 * rng.random(D)).astype(np.float32)
    packed = quantize(replace(master, tensors=tensors, tokenizer=None), head="bf16")
    assert packed.tensors[SHORTLIST_BOUNDS][0].max() < 1e-40
    model = Model(packed, threads=2)
    full, short = logits(model, [0]), logits(model, [0], 1)
    assert full.argmax() != 0 and np.ptp(full) > 0
    assert_keeps_the_best(full, short, 1)


def test_the_shortlist_is_short():
    _, model = model_of(gaussian(), threads=2)
    tokens = list(range(30))
    full = logits(model, tokens)
    assert_keeps_the_best(full, logits(model, tokens, 1), 1, n_most=12)
    assert_keeps_the_best(full, logits(model, tokens, 40), 40, n_most=200)


def test_ties_at_the_threshold_stay():
    w = adversaries()["doubles"]
    _, model = model_of(w, threads=2)
    full, short = logits(model, [7, 8], 0), logits(model, [7, 8], 3)
    for exact, row in zip(full, short, strict=True):
        kth = exact[best(exact, 3)[-1]]
        assert (exact == kth).sum() > 1 and (row[exact == kth] == kth).all()
        assert np.array_equal(best(exact, 3), best(row, 3))


@pytest.mark.parametrize("gain", [np.inf, np.nan, 3e38, 1e-38, 1e-45])
def test_what_has_no_bound_gives_all_logits_or_the_right_ones(gain):
    """Checkpoints hold no such gains, but activations may overflow: the head is given them directly."""
    gains = np.ones(D, np.float32)
    gains[5] = gain
    packed, _ = model_of(gaussian())
    tensors = packed.tensors | {"norm.weight": np.ones(D, np.float32)}
    packed = replace(packed, tensors=tensors)
    tensors["norm.weight"][:] = gains
    for int4 in (False, True):
        model = Model(packed, threads=2, int4_shortlist=int4)
        full, short = logits(model, [1, 2]), logits(model, [1, 2], 2)
        if np.isfinite(full).all():
            assert_keeps_the_best(full, short, 2)
        else:
            assert np.array_equal(full.view(np.int32), short.view(np.int32))


@pytest.mark.parametrize("head", HEADS)
def test_int4_finds_the_best_and_scores_them_exactly(head):
    packed, exact = model_of(gaussian(), head=head)
    short = Model(packed, threads=2, int4_shortlist=True)
    tokens = list(range(0, V, 25))
    full = logits(exact, tokens)
    for k in (1, 40):
        assert_keeps_the_best(full, logits(short, tokens, k), k)
    kept = (logits(short, tokens, 1) > -np.inf).sum(axis=1)
    assert kept.mean() < V / 4
    assert np.array_equal(logits(short, tokens), full)


@pytest.mark.parametrize("options", [{"threads": t, "isa": isa} for t in (1, 3) for isa in available_isas()])
@pytest.mark.parametrize("int4", [False, True])
def test_candidates_depend_on_nothing_but_the_row(options, int4):
    packed, plainest = model_of(adversaries()["near"], threads=1, isa="scalar", int4_shortlist=int4)
    tokens = list(range(0, V, 400))
    expected = logits(plainest, tokens, 5)
    model = Model(packed, int4_shortlist=int4, **options)
    assert np.array_equal(logits(model, tokens, 5), expected)
    for token, row in zip(tokens, expected, strict=True):
        assert np.array_equal(logits(model, [token], 5)[0], row)


def test_one_row_that_needs_all_logits_gives_them_to_all():
    _, model = model_of(gaussian())
    full = logits(model, [1, 2, 3])
    assert np.array_equal(logits(model, [1, 2, 3], [1, 0, 2]), full)
    # More than an eighth of the vocabulary is no short list.
    assert np.array_equal(logits(model, [1, 2, 3], V // 8 + 1), full)
    mixed = logits(model, [1, 2, 3], [1, 5, 2])
    for i, k in enumerate((1, 5, 2)):
        assert_keeps_the_best(full[i : i + 1], mixed[i : i + 1], k)


@pytest.mark.parametrize(
    ("params", "n_best"),
    [
        ({"temperature": 0}, 1),
        ({"temperature": 0, "top_k": 0}, 1),
        ({"top_k": 7}, 7),
        ({"top_k": 0}, 0),
        ({"temperature": 0, "repetition_penalty": 1.1}, 0),
        ({"top_k": 7, "repetition_penalty": 0.9}, 0),
    ],
)
def test_sampling_says_how_many_it_needs(params, n_best):
    assert SamplingParams(**params).n_best == n_best


@pytest.mark.parametrize("head", HEADS)
def test_texts_are_the_same_with_a_shortlist(head):
    master = tiny.master(tiny.config(tied_head=False, max_seq_len=96))
    packed = quantize(master, head=head)
    llm, short = LLM(packed), LLM(packed, shortlist="int4")
    assert short.label == llm.label + " + int4 shortlist" == packed.label + " + int4 shortlist"

    class Full(Model):
        def forward(self, *args):
            return super().forward(*args[:6])

    full = LLM(packed)
    full.model = Full(packed)
    for sampling in ({"temperature": 0}, {"top_k": 8, "temperature": 1.5}, {"top_k": 0}):
        texts = [
            one.generate([5, 6, 7], max_tokens=60, seed=3, ignore_eos=True, **sampling).tokens
            for one in (full, llm, short)
        ]
        assert texts[0] == texts[1] == texts[2]


CODED = [
    {"weights": weights, "scale": scale, "activations": activations}
    for weights in ("b1.58", "b1")
    for scale in ("tensor", "row", 16)
    for activations in ("a8", "a15")
]


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("changes", CODED)
def test_coded_rows_are_linear_layers_of_15_bits(isa, changes):
    """The embedding is codes * scale, and logits are the linear layer of the final norm, whatever the layers read."""
    master = tiny.master(tiny.config(vocab_size=V, d_model=96, n_layers=1, **changes))
    tensors = {name: np.zeros_like(t) if "sub_norm" in name else t for name, t in master.tensors.items()}
    packed = tiny.coded(replace(master, tensors=tensors, tokenizer=None))
    tokens = [0, 3, 16, 127, 128, V - 1]
    x = to_dense(packed.tensors["embed.weight"])[tokens]
    r = np.float32(1) / np.sqrt(quant.lane_sum(x * x) / np.float32(96) + np.float32(1e-5))
    codes, scale = quant.quantize_a15((x * r) * packed.tensors["norm.weight"])
    expected = reference.product(packed.tensors["embed.weight"], codes, scale)
    model = Model(packed, isa=isa, threads=2)
    assert np.array_equal(logits(model, tokens), expected)
    # There is no shortlist, so all logits come.
    assert np.array_equal(logits(model, tokens, 1), expected)
    with pytest.raises(ValueError, match=r"shortlist int4: the head is (t80|b128) codes"):
        Model(packed, isa=isa, int4_shortlist=True)


def test_an_unknown_shortlist_is_refused():
    with pytest.raises(ValueError, match=r"shortlist is 'int2'; expected 'int4' or None"):
        LLM(tiny.master(), shortlist="int2")

"""Models in GGUF files give in llama.cpp what they give here. Kind: oracle (llama-cpp-python).

Both compute the same function in different roundings. Dense: with keys and values in bfloat16, as here, the first token
has no other rounding; later ones differ in the attention, where llama.cpp rounds queries and weights too. Codes:
llama.cpp rounds activations in blocks of 256, here a row is one. The bounds are three times what was measured, and
models that are wrong in one thing are far outside.
"""

from dataclasses import replace
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

import onebit
import tiny
from onebit import formats
from onebit.checkpoint import Checkpoint, Stored, quantize
from onebit.config import ModelConfig, RopeScaling
from onebit.eval.scoring import Scorer
from onebit.eval.texts import Windows, perplexity
from onebit.formats import gguf, native
from onebit.formats.compare import compare
from onebit.formats.gguf import matrices, model_keys
from onebit.packing import PackedTensor, from_bf16, to_bf16

PLAIN = {"sub_norm": False, "activation": "silu"}
FAMILIES = {
    "llama": PLAIN,
    "llama, own head": PLAIN | {"tied_head": False},
    "qwen2": PLAIN | {"qkv_bias": True},
    "qwen3": PLAIN | {"qk_norm": True},
    "bitnet": {"sub_norm": True, "activation": "silu"},
}
SCALINGS = {
    "linear": RopeScaling("linear", 4.0),
    "llama3": RopeScaling("llama3", 32.0, 64),
    "yarn": RopeScaling("yarn", 4.0, 64),
    "yarn, louder": RopeScaling("yarn", 4.0, 64, attention_factor=1.3),
}

# Mean divergence in nats and largest difference of logits with deviation 1, by what llama.cpp multiplies with.
BOUNDS = {"F32": (2e-5, 0.06), "F16": (2e-5, 0.06), "BF16": (1e-4, 0.15), "TQ2_0": (1e-3, 0.45), "TQ1_0": (1e-3, 0.45),
          "Q2_0": (1.2e-3, 0.45), "Q1_0": (1.7e-3, 0.5)}  # fmt: skip

TOKENS = [int(token) for token in np.random.default_rng(5).integers(1, tiny.CONFIG.vocab_size, 160)]
BF16 = 30


def model(kind: str, **flags) -> Checkpoint:
    """A random model whose weights bfloat16 holds, in a scheme that fits a type."""
    schemes = {"Q1_0": ("b1", "a8", 128), "Q2_0": ("b1.58", "a8", 64)}
    scheme = ("dense", "none", "tensor") if kind in ("F32", "F16", "BF16") else ("b1.58", "a8", "tensor")
    weights, activations, scale = schemes.get(kind, scheme)
    config: ModelConfig = tiny.config(
        d_model=256, d_ff=512, d_head=64, weights=weights, activations=activations, scale=scale, **flags
    )
    tensors = {name: from_bf16(to_bf16(w)) for name, w in tiny.tensors(config, seed=3).items()}
    return Checkpoint(config, tensors, tiny.tokenizer_json(config.vocab_size))


def ours(checkpoint: Checkpoint, folder: Path) -> onebit.LLM:
    native.write(checkpoint, folder / "x.onebit", head="bf16")
    return onebit.load(folder / "x.onebit", threads=1)


class Llama:
    """llama.cpp with one file."""

    def __init__(self, path: Path) -> None:
        self.model = llama_cpp.Llama(
            str(path), n_ctx=192, n_batch=192, logits_all=True, n_threads=1, n_threads_batch=1, type_k=BF16,
            type_v=BF16, verbose=False,
        )  # fmt: skip

    def logits(self, tokens: list[int]) -> np.ndarray:
        self.model.reset()
        self.model.eval(tokens)
        return np.array(self.model.scores[: len(tokens)])

    def greedy(self, tokens: list[int], n: int) -> list[int]:
        self.model.reset()
        self.model.eval(tokens)
        found = []
        for _ in range(n):
            found.append(int(self.model.scores[self.model.n_tokens - 1].argmax()))
            self.model.eval(found[-1:])
        return found


def distance(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Mean divergence of b from a, and the largest difference."""
    p, q = (
        x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (a.astype(np.float64), b.astype(np.float64))
    )
    return float((np.exp(p) * (p - q)).sum(axis=1).mean()), float(abs(a - b).max())


def agree(a: np.ndarray, b: np.ndarray, kind: str) -> bool:
    return all(found < bound for found, bound in zip(distance(a, b), BOUNDS[kind], strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", BOUNDS)
def test_logits_are_those_of_llama_cpp(family, kind, tmp_path):
    path = tmp_path / "x.gguf"
    gguf.write(model(kind, **FAMILIES[family]), path, kind)
    expected, found = Llama(path).logits(TOKENS), ours(gguf.read(path), tmp_path).logits(TOKENS)
    assert agree(expected, found, kind), distance(expected, found)
    if kind == "F32":
        assert abs(expected[0] - found[0]).max() < 5e-6


@pytest.mark.parametrize("scaling", SCALINGS)
def test_stretched_positions_are_those_of_llama_cpp(scaling, tmp_path):
    path, kind = tmp_path / "x.gguf", "F32"
    written = model(kind, **PLAIN, rope_theta=500000.0, rope_scaling=SCALINGS[scaling])
    gguf.write(written, path, kind)
    read = gguf.read(path)
    assert read.config.rope_scaling is not None
    assert np.allclose(read.config.rope_frequencies(), written.config.rope_frequencies(), rtol=1e-6)
    assert np.isclose(read.config.rope_attention_factor, written.config.rope_attention_factor, rtol=1e-6)
    expected, found = Llama(path).logits(TOKENS), ours(read, tmp_path).logits(TOKENS)
    assert agree(expected, found, kind), distance(expected, found)
    plain = replace(read, config=replace(read.config, rope_scaling=None))
    assert not agree(expected, ours(plain, tmp_path).logits(TOKENS), kind)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_texts_are_those_of_llama_cpp(family, tmp_path):
    path = tmp_path / "x.gguf"
    gguf.write(model("F32", **FAMILIES[family]), path, "F32")
    prompt = TOKENS[:20]
    found = (
        ours(gguf.read(path), tmp_path).generate(prompt, max_tokens=32, temperature=0, ignore_eos=True).tokens
    )
    assert found == Llama(path).greedy(prompt, 32)


@pytest.mark.parametrize("kind", ["F32", "TQ2_0"])
def test_the_bounds_catch_a_wrong_order_of_rows(kind, tmp_path, monkeypatch):
    path = tmp_path / "x.gguf"
    gguf.write(model(kind, **PLAIN), path, kind)
    expected = Llama(path).logits(TOKENS)
    monkeypatch.setattr(matrices, "split_pairs", lambda values, d_head: values)
    found = ours(gguf.read(path), tmp_path).logits(TOKENS)
    assert distance(expected, found)[0] > 10 * BOUNDS[kind][0]


@pytest.mark.parametrize("kind", ["F32", "TQ2_0"])
def test_the_bounds_catch_a_wrong_activation_and_a_wrong_scale(kind, tmp_path):
    path = tmp_path / "x.gguf"
    gguf.write(model(kind, sub_norm=True, activation="silu"), path, kind)
    expected, read = Llama(path).logits(TOKENS), gguf.read(path)
    squared = replace(read, config=replace(read.config, activation="relu2"))
    assert distance(expected, ours(squared, tmp_path).logits(TOKENS))[0] > 10 * BOUNDS[kind][0]

    name = "layers.0.down.weight"
    stored = read.tensors[name]
    assert isinstance(stored, Stored)
    louder = np.float32(1.5)

    def codes() -> tuple:
        found, scale = stored.codes()
        return found, scale * louder

    wrong = replace(
        stored, rows=lambda begin, end: stored.rows(begin, end) * louder, codes=stored.codes and codes
    )
    found = ours(replace(read, tensors=read.tensors | {name: wrong}), tmp_path).logits(TOKENS)
    assert distance(expected, found)[0] > 10 * BOUNDS[kind][0]


def test_tokens_are_those_of_llama_cpp(tmp_path):
    path = tmp_path / "x.gguf"
    gguf.write(model("F16", **PLAIN), path, "F16")
    text = "Once upon a time, Lily's dog went 12 times\n\n to the  park \u00e9."
    llm = ours(gguf.read(path), tmp_path)
    assert llm.tokenizer.encode(text) == Llama(path).model.tokenize(text.encode(), add_bos=False)


def test_llama_cpp_refuses_what_it_would_compute_wrongly(tmp_path):
    path = tmp_path / "x.gguf"
    gguf.write(model("TQ2_0", sub_norm=True, activation="relu2"), path, "TQ2_0")
    assert model_keys.architecture_for(gguf.read(path).config) == "bitnet-b1.58"
    with pytest.raises(ValueError, match="Failed to load model"):
        Llama(path)


# As their authors publish them: weights alone are rounded, in groups; embedding and head like the rest.
WEIGHTS_ONLY = {
    "Bonsai, binary": ("Q1_0", {"weights": "b1", "scale": 128, "qk_norm": True, "tied_head": False}),
    "Bonsai, ternary": ("Q2_0", {"weights": "b1.58", "scale": 64, "qk_norm": True}),
    "TriLM": ("TQ2_0", {"weights": "b1.58", "scale": "row"}),
}


@pytest.mark.parametrize("name", WEIGHTS_ONLY)
def test_models_with_rounded_weights_alone(name, tmp_path):
    kind, flags = WEIGHTS_ONLY[name]
    config = tiny.config(d_model=256, d_ff=512, d_head=64, activations="a15", **PLAIN | flags)
    master = Checkpoint(config, tiny.tensors(config, seed=3), tiny.tokenizer_json(config.vocab_size))
    # Scales that float16 holds.
    packed = tiny.coded(master) if name.startswith("Bonsai") else quantize(master, head="bf16")
    halves = {
        tensor: t._replace(scale=t.scale.astype(np.float16).astype(np.float32))
        for tensor, t in packed.tensors.items()
        if isinstance(t, PackedTensor) and t.encoding != "q8"
    }
    packed = replace(packed, tensors=packed.tensors | halves)
    path = tmp_path / "x.gguf"
    gguf.write(packed, path, kind)
    read = gguf.read(path)
    assert (read.config.activations, read.config.scale) == ("a15", config.scale)
    report = formats.convert(path, tmp_path / "x.onebit")
    assert not report.losses and report.made.label == packed.label
    assert not any(change.n_changed for change in compare(packed, report.made))
    expected, found = Llama(path).logits(TOKENS), onebit.load(tmp_path / "x.onebit", threads=1).logits(TOKENS)
    # What llama.cpp loses by 8-bit activations, and we do not.
    assert agree(expected, found, kind), distance(expected, found)


@pytest.mark.parametrize("bos", [None, 5])
def test_perplexity_is_that_of_llama_cpp(bos, tmp_path):
    """In the windows of its `perplexity` program: each by itself, the second half counts."""
    path, window = tmp_path / "x.gguf", 64
    gguf.write(model("F32", **PLAIN, bos_token=bos), path, "F32")
    theirs, llm = Llama(path), ours(gguf.read(path), tmp_path)
    tokens = theirs.model.tokenize(tiny.TEXT.encode(), add_bos=True, special=False)
    assert (tokens[0] == bos) == (bos is not None) and len(tokens) > 3 * window
    nll = []
    for begin in range(0, len(tokens) - window + 1, window):
        piece = [*([] if bos is None else [bos]), *tokens[begin + (bos is not None) : begin + window]]
        x = theirs.logits(piece).astype(np.float64)
        x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
        nll += [-x[i, piece[i + 1]] for i in range(window // 2, window - 1)]
    found = perplexity(Scorer(llm), tiny.TEXT, Windows.of(llm, window, halves=True))
    assert len(found.nll) == len(nll)
    assert found.perplexity.value == pytest.approx(np.exp(np.mean(nll)), rel=5e-4)

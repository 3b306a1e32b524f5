"""Checkpoints of llama2.c. Kinds: oracle (a forward pass as run.c computes it), exact (bytes, refusals)."""

import struct

import numpy as np
import pytest

import tiny
from onebit import formats
from onebit.checkpoint import rows
from onebit.formats import llama2c
from onebit.llm import LLM
from onebit.packing import from_bf16, to_bf16

DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCAB, CONTEXT = 32, 48, 2, 4, 2, 300, 64
WIDTH = DIM // HEADS
HEADER = (DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCAB, CONTEXT)


def weights(tied: bool, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights by the names of run.c, in the order of the file; bfloat16 numbers, which the engine keeps."""
    rng = np.random.default_rng(seed)
    shapes = {
        "tok_emb": (VOCAB, DIM), "rms_att": (LAYERS, DIM), "wq": (LAYERS, DIM, DIM),
        "wk": (LAYERS, KV_HEADS * WIDTH, DIM), "wv": (LAYERS, KV_HEADS * WIDTH, DIM), "wo": (LAYERS, DIM, DIM),
        "rms_ffn": (LAYERS, DIM), "w1": (LAYERS, HIDDEN, DIM), "w2": (LAYERS, DIM, HIDDEN),
        "w3": (LAYERS, HIDDEN, DIM), "rms_final": (DIM,), "freqs": (CONTEXT, WIDTH),
    }  # fmt: skip
    if not tied:
        shapes["wcls"] = (VOCAB, DIM)
    drawn = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return {
        name: w if name.startswith("rms") else from_bf16(to_bf16(w / np.float32(np.sqrt(w.shape[-1]))))
        for name, w in drawn.items()
    }


def contents(w: dict[str, np.ndarray], tied: bool) -> bytes:
    *sizes, vocab, context = HEADER
    header = struct.pack("<7i", *sizes, vocab if tied else -vocab, context)
    return header + b"".join(tensor.tobytes() for tensor in w.values())


def forward(w: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """Logits of all tokens, in float64; rotary pairs lie side by side."""

    def norm(x, gain):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * gain

    def rotate(x):
        angle = np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(0, WIDTH, 2) / WIDTH)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = x[..., ::2], x[..., 1::2]
        return np.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape)

    x = w["tok_emb"][tokens].astype(np.float64)
    n = len(tokens)
    for i in range(LAYERS):
        h = norm(x, w["rms_att"][i])
        q = rotate((h @ w["wq"][i].T).reshape(n, HEADS, WIDTH))
        k = rotate((h @ w["wk"][i].T).reshape(n, KV_HEADS, WIDTH)).repeat(HEADS // KV_HEADS, 1)
        v = (h @ w["wv"][i].T).reshape(n, KV_HEADS, WIDTH).repeat(HEADS // KV_HEADS, 1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(WIDTH)
        scores += np.triu(np.full((n, n), -np.inf), 1)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", p, v).reshape(n, DIM) @ w["wo"][i].T
        h = norm(x, w["rms_ffn"][i])
        gate = h @ w["w1"][i].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["w3"][i].T)) @ w["w2"][i].T
    return norm(x, w["rms_final"]) @ w.get("wcls", w["tok_emb"]).T


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_run_c(tied, tmp_path):
    w = weights(tied)
    path = tmp_path / "model.bin"
    path.write_bytes(contents(w, tied))
    assert llama2c.is_model(path) and not formats.is_native(path)
    checkpoint = formats.read(path)
    assert checkpoint.config.tied_head == tied and checkpoint.tokenizer is None
    tokens = np.random.default_rng(1).integers(0, VOCAB, 40).tolist()
    expected = forward(w, tokens)
    found = LLM(checkpoint).logits(tokens)
    # Keys and values are kept in bfloat16.
    assert abs(found - expected).max() < 0.02 * abs(expected).max()
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.95


def test_values_are_those_of_the_file(tmp_path):
    w = weights(False)
    (tmp_path / "model.bin").write_bytes(contents(w, False))
    tensors = llama2c.read(tmp_path / "model.bin").tensors
    for part, name in (("v", "wv"), ("o", "wo"), ("gate", "w1"), ("down", "w2"), ("up", "w3")):
        assert np.array_equal(rows("", tensors[f"layers.1.{part}.weight"]), w[name][1])
    assert np.array_equal(rows("", tensors["head.weight"]), w["wcls"])
    pairs = w["wq"][1].reshape(HEADS, WIDTH // 2, 2, DIM)
    q = rows("", tensors["layers.1.q.weight"])
    assert np.array_equal(q, pairs.transpose(0, 2, 1, 3).reshape(DIM, DIM))
    assert np.array_equal(rows("", tensors["layers.1.q.weight"], 3, 11), q[3:11])


def test_the_tokenizer_lies_beside_it(tmp_path):
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(f"<0x{i:02X}>".encode() for i in range(256))]
    pieces += [b" ", b"a", b"b", b"ab", b" ab"]
    pieces += [f"word{i}".encode() for i in range(VOCAB - len(pieces))]
    data = struct.pack("<i", 8)
    for i, piece in enumerate(pieces):
        data += struct.pack("<fi", -float(i), len(piece)) + piece
    (tmp_path / f"tok{VOCAB}.bin").write_bytes(data)
    (tmp_path / "model.bin").write_bytes(contents(weights(True), True))
    llm = LLM(formats.read(tmp_path / "model.bin"))
    tokens = llm.tokenizer.encode("ab")
    assert tokens[0] == 1 and llm.tokenizer.decode(tokens) == "ab"
    (tmp_path / f"tok{VOCAB}.bin").write_bytes(data[:-3])
    with pytest.raises(ValueError, match=f"tok{VOCAB}.bin"):
        formats.read(tmp_path / "model.bin")


def test_other_files_are_none(tmp_path):
    data = contents(weights(True), True)
    for i, damaged in enumerate([b"", data[:20], data[:-1], data + b"x", b"\xff" * 64, bytes(64)]):
        path = tmp_path / f"{i}.bin"
        path.write_bytes(damaged)
        assert not llama2c.is_model(path)
        with pytest.raises(ValueError, match=r"\.bin: "):
            llama2c.read(path)
    formats.write(tiny.synthetic(tiny.CONFIG), tmp_path / "x.onebit")
    assert not llama2c.is_model(tmp_path / "x.onebit")

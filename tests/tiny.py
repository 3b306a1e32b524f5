"""The only fixture library: tiny configs, checkpoints, a tokenizer and a model that needs no weights."""

import json
import struct
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tokenizers

from onebit.checkpoint import Checkpoint, granularity, quantize, scale_shape
from onebit.config import ModelConfig
from onebit.formats.adapter import TARGETS, Adapter, LowRank
from onebit.packing import MAX_CODE, TILE_ROWS, PackedTensor, from_bf16, pack, packed_shape, to_bf16
from onebit.quant import quantize_weights

EOS = 0
TEXT = (
    "Once upon a time there was a little girl named Lily. She had a red ball and a small dog. The dog ran "
    "to the park, and Lily ran after it. They played all day long, and then they went home to sleep.\n\n"
) * 4

CONFIG = ModelConfig(
    vocab_size=320,
    d_model=48,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    d_head=16,
    d_ff=80,
    max_seq_len=192,
    eos_tokens=(EOS,),
)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def config(**changes) -> ModelConfig:
    """CONFIG with other values."""
    return replace(CONFIG, **changes)


@cache
def tokenizer_json(vocab_size: int = CONFIG.vocab_size) -> bytes:
    """A byte-level BPE tokenizer with <|endoftext|> as token 0."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT], trainer)
    return bpe.to_str().encode()


def sentencepiece_model(
    pieces,
    model_type: int = 2,
    byte_fallback: bool = True,
    add_dummy_prefix: bool = True,
    remove_extra_whitespaces: bool = False,
) -> bytes:
    """A SentencePiece tokenizer.model, written by hand.

    Args:
        pieces: of (text, score, type), in the order of their ids.
        model_type: 1 is unigram, 2 BPE.
        byte_fallback: unknown characters are spelled in bytes.
        add_dummy_prefix: texts begin with a space.
        remove_extra_whitespaces: spaces at the ends and after spaces go.
    """

    def varint(value: int) -> bytes:
        return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)

    def number(field: int, value: int) -> bytes:
        return varint(field << 3) + varint(value)

    def message(field: int, content: bytes) -> bytes:
        return varint(field << 3 | 2) + varint(len(content)) + content

    parts = [
        message(1, message(1, text.encode()) + b"\x15" + struct.pack("<f", score) + number(3, kind))
        for text, score, kind in pieces
    ]
    parts.append(message(2, number(3, model_type) + number(35, byte_fallback)))
    spaces = number(3, add_dummy_prefix) + number(4, remove_extra_whitespaces) + number(5, True)
    parts.append(message(3, message(1, b"identity") + spaces))
    return b"".join(parts)


# What every SentencePiece vocabulary here begins with: unknown, begin, end, and the bytes.
SENTENCEPIECE_HEAD = [
    ("<unk>", 0.0, 2),
    ("<s>", 0.0, 3),
    ("</s>", 0.0, 3),
    *[(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)],
]


def tensors(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights, drawn so that activations keep their size."""
    rng = np.random.default_rng(seed)
    drawn = {}
    for name, shape in config.tensor_shapes().items():
        if len(shape) == 1:
            drawn[name] = 1 + 0.1 * rng.standard_normal(shape)
        else:
            drawn[name] = rng.standard_normal(shape) * shape[-1] ** -0.5
    return {name: value.astype(np.float32) for name, value in drawn.items()}


def master(config: ModelConfig = CONFIG, seed: int = 0, chat_template: str | None = None) -> Checkpoint:
    """A float32 checkpoint with random weights and, if it fits the vocabulary, the tokenizer."""
    tokenizer = tokenizer_json(config.vocab_size) if config.vocab_size >= 257 else None
    return Checkpoint(
        config, tensors(config, seed), tokenizer, chat_template, {"recipe": {"name": "tiny", "seed": seed}}
    )


def coded(master: Checkpoint, encoding: str | None = None) -> Checkpoint:
    """The packed model with embedding and head as codes too, as imported models may have them."""
    packed, config = quantize(master, encoding), master.config
    layout = packed.tensors["layers.0.q.weight"].encoding
    rows = {}
    for name in {"embed.weight", "head.weight"} & packed.tensors.keys():
        codes, scale = quantize_weights(master.tensors[name], config.weights, config.scale)
        rows[name] = PackedTensor(layout, codes.shape, pack(codes.astype(np.int8), layout), scale)
    return replace(packed, tensors=packed.tensors | rows)


def adapter(
    config: ModelConfig = CONFIG,
    rank: int = 5,
    seed: int = 0,
    targets=TARGETS,
    short: bool = True,
    layers=None,
) -> Adapter:
    """A random adapter; with `short`, of numbers that bfloat16 holds."""
    rng, pairs = np.random.default_rng(seed), {}
    for i in range(config.n_layers) if layers is None else layers:
        for target in targets:
            n, k = config.linear_shapes()[target]
            drawn = [rng.standard_normal((rank, k)) * k**-0.5, rng.standard_normal((n, rank)) * 0.2]
            drawn = [w.astype(np.float32) for w in drawn]
            pair = (from_bf16(to_bf16(w)) if short else w for w in drawn)
            pairs[f"layers.{i}.{target}.weight"] = LowRank(*pair)
    return Adapter(rank, 1.5 * rank, pairs)


def synthetic(config: ModelConfig, encoding: str = "t80") -> Checkpoint:
    """A packed model of any size in no time: valid bytes and scales, repeated, without meaning."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in config.tensor_shapes().items():
        if len(shape) == 1:
            tensors[name] = np.ones(shape, np.float32)
            continue
        layout = encoding if config.is_linear(name) else "q8"
        codes = rng.integers(-MAX_CODE[layout], MAX_CODE[layout] + 1, (TILE_ROWS[layout], 4 * 4096)).astype(
            np.int8
        )
        data = np.resize(pack(codes, layout), packed_shape(layout, shape))
        scale = np.full(scale_shape(shape, granularity(name, config, layout)), shape[-1] ** -0.5, np.float32)
        tensors[name] = PackedTensor(layout, shape, data, scale)
    return Checkpoint(config, tensors)


class FakeModel:
    """Stands where engine.model.Model does: the next token is a function of the sequence that its cache holds.

    It reads what it wrote to cache blocks, so a wrong table, position, adapter or lost block gives another text. With
    adapter a, token t counts as t + 1000 * (a + 1).

    Args:
        next_token: from all tokens of a text to the one that follows.
    """

    isa = "fake"
    threads = 1

    def __init__(self, next_token, config: ModelConfig = CONFIG, block_tokens: int = 64) -> None:
        self.config = config
        self.next_token = next_token
        self.block_tokens = block_tokens
        self.n_tokens: list[int] = []

    def new_cache(self, n_blocks: int, kv_cache: str) -> SimpleNamespace:
        return SimpleNamespace(tokens=np.full((n_blocks, self.block_tokens), -1))

    def forward(
        self, tokens, positions, seq_starts, block_tables, rows, cache, top_k, out, adapters, code_counts=None
    ) -> np.ndarray:
        self.n_tokens.append(len(tokens))
        out[:] = 0
        for i, table in enumerate(block_tables):
            for j in range(seq_starts[i], seq_starts[i + 1]):
                block, slot = table[positions[j] // self.block_tokens], positions[j] % self.block_tokens
                cache.tokens[block, slot] = tokens[j] + 1000 * (adapters[i] + 1)
                for row in np.flatnonzero(rows == j):
                    seen = cache.tokens[table].reshape(-1)[: positions[j] + 1]
                    out[row, self.next_token(seen.tolist())] = 1.0
        return out


# A model that transformers has a class for: its sub-norm needs n_heads * d_head = d_model.
BITNET = replace(CONFIG, d_head=12)


def bf16_exact(checkpoint: Checkpoint) -> Checkpoint:
    """A float32 checkpoint with all values rounded to bfloat16."""
    tensors = {name: from_bf16(to_bf16(w)) for name, w in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=tensors)


def edit_json(path: Path, **changes) -> None:
    """Change fields of a JSON file; one that becomes ... is removed."""
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({name: x for name, x in (values | changes).items() if x is not ...}))


def read_safetensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Dtype, shape and bytes of all tensors of a file."""
    contents = path.read_bytes()
    end = 8 + int.from_bytes(contents[:8], "little")
    header = json.loads(contents[8:end])
    header.pop("__metadata__", None)
    return {
        name: (entry["dtype"], entry["shape"], contents[end:][slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }


def write_safetensors(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    """The inverse of read_safetensors."""
    header, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)

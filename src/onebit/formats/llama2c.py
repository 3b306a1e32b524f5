"""Checkpoints of llama2.c: small full-precision Llamas in one file of float32, tokenizer in a second one.

checkpoint = read("stories260K.bin")        # and its tok512.bin or tokenizer.bin, from the same folder
"""

import math
import os
import struct
from dataclasses import replace
from pathlib import Path

from onebit.checkpoint import Checkpoint, Stored
from onebit.config import ModelConfig
from onebit.formats import vocabulary
from onebit.formats.files import read_bytes
from onebit.formats.floats import in_file
from onebit.formats.rotary import split_pairs, whole_heads
from onebit.formats.tensors import named
from onebit.packing import Float32

# dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size (negative where the head is not tied), seq_len.
_HEADER = struct.Struct("<7i")
_BOS, _EOS = 1, 2
# Order of the file: each of these for all layers, one after the other.
_BEFORE = ("attn_norm", "q", "k", "v", "o", "ffn_norm", "gate", "down", "up")


def is_model(path: Path) -> bool:
    """Whether a file has the header and the size of such a checkpoint."""
    try:
        with named(path):
            _config(path)
    except ValueError:
        return False
    return True


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint of llama2.c (its first version, float32); tensors stay in the file.

    The tokenizer is tokNNN.bin (NNN tokens) or tokenizer.bin beside it; without one, the model runs token ids.

    Raises:
        ValueError: another kind of file, or a tokenizer that does not fit; the message names it.
        OSError: the file cannot be opened.
    """
    path = Path(path)
    with named(path):
        config = _config(path)
        tensors = _tensors(path, config)
    tokenizer = None
    for name in (f"tok{config.vocab_size}.bin", "tokenizer.bin"):
        if (path.parent / name).is_file():
            with named(path.parent / name):
                tokenizer = vocabulary.from_llama2c((path.parent / name).read_bytes(), config.vocab_size)
            break
    source = {"format": "llama2.c", "file": path.name}
    return Checkpoint(config, dict(tensors), tokenizer, None, {"source": source})


def _config(path: Path) -> ModelConfig:
    size = path.stat().st_size
    if size < _HEADER.size:
        raise ValueError(f"the file has {size} bytes; a llama2.c checkpoint starts with 7 numbers")
    d_model, d_ff, n_layers, n_heads, n_kv_heads, vocab_size, seq_len = _HEADER.unpack(
        read_bytes(path, 0, _HEADER.size).tobytes()
    )
    if n_heads < 1 or d_model % n_heads:
        raise ValueError(f"{n_heads} heads for a width of {d_model}: no llama2.c checkpoint")
    config = ModelConfig(
        vocab_size=abs(vocab_size),
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_head=d_model // n_heads,
        d_ff=d_ff,
        max_seq_len=seq_len,
        activation="silu",
        sub_norm=False,
        tied_head=vocab_size > 0,
        weights="dense",
        activations="none",
        bos_token=_BOS,
        # Its texts end where the next one would begin.
        eos_tokens=(_BOS, _EOS),
    )
    expected = _HEADER.size + 4 * _n_numbers(config)
    if size != expected:
        raise ValueError(f"the file has {size} bytes; a llama2.c checkpoint with its header has {expected}")
    return config


def _n_numbers(config: ModelConfig) -> int:
    attention = config.n_heads + config.n_kv_heads
    layer = 2 * config.d_model * (config.d_head * attention + 1) + 3 * config.d_model * config.d_ff
    top = config.vocab_size * config.d_model * (1 if config.tied_head else 2) + config.d_model
    return top + config.n_layers * layer + config.max_seq_len * config.d_head


def _tensors(path: Path, config: ModelConfig) -> dict[str, Stored]:
    shapes = config.tensor_shapes()
    names = ["embed.weight"]
    names += [f"layers.{i}.{part}.weight" for part in _BEFORE for i in range(config.n_layers)]
    at = _HEADER.size
    tensors: dict[str, Stored] = {}
    for name in [*names, "norm.weight"]:
        tensors[name] = in_file(path, at, "F32", shapes[name])
        at += 4 * math.prod(shapes[name])
    if not config.tied_head:
        # Tables of sines and cosines lie before it.
        at += 4 * config.max_seq_len * config.d_head
        tensors["head.weight"] = in_file(path, at, "F32", shapes["head.weight"])
    for i in range(config.n_layers):
        for name in (f"layers.{i}.q.weight", f"layers.{i}.k.weight"):
            tensors[name] = _split(tensors[name], config.d_head)
    return {name: tensors[name] for name in shapes}


def _split(tensor: Stored, d_head: int) -> Stored:
    """A query or key matrix in our order."""

    def rows(begin: int, end: int) -> Float32:
        first, last = whole_heads(begin, end, d_head)
        return split_pairs(tensor.rows(first, last), d_head)[begin - first : end - first]

    return replace(tensor, rows=rows)

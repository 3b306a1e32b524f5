"""Small valid models and vocabularies of every kind, for a fuzzer to start from: bundles of a few kilobytes."""

import base64
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import tiny
from fuzz.mutations import bundle
from onebit.checkpoint import Checkpoint, quantize
from onebit.config import RopeScaling
from onebit.formats import gguf, hf, llama2c, native, run, vocabulary
from onebit.formats.gguf import container as gguf_file
from onebit.formats.gguf.blocks import BLOCKS, SCHEMES, join
from onebit.formats.vocabulary import bpe, presplit

# All sizes differ, so that a change of one is a change of one.
SMALL = {
    "vocab_size": 24, "d_model": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_head": 4, "d_ff": 12,
    "max_seq_len": 32, "eos_tokens": (0,),
}  # fmt: skip
LLAMA = SMALL | {"sub_norm": False, "activation": "silu"}
DENSE = LLAMA | {"weights": "dense", "activations": "none"}
SPECIAL = ["<unk>", "<s>", "</s>"]


def seeds(reader: str, folder: Path) -> dict[str, bytes]:
    """The bundles of a reader, by name.

    Args:
        reader: one of `fuzz.readers.READERS`.
        folder: an empty one, to write in.
    """
    made = {
        "gguf": _gguf, "hf": _hf, "native": _native, "run": _run, "llama2c": _llama2c, "vocabularies": _vocabularies,
    }  # fmt: skip
    return {name: bundle(files) for name, files in made[reader](folder).items()}


def tokenizer(n: int = SMALL["vocab_size"]) -> bytes:
    """A byte-level tokenizer of few tokens."""
    texts = ["<|endoftext|>", *"abcdefghijklmnopq", "\u0120", "ab", "abc", "\u0120a"]
    vocab = bpe.ids([*texts, *(f"[PAD{i}]" for i in range(len(texts), n))][:n])
    merges = [("a", "b"), ("ab", "c"), ("\u0120", "a")]
    return bpe.byte_level(vocab, merges, {0: True}, presplit.to_json(presplit.PRESPLITS["gpt-2"].steps))


def _models() -> dict[str, Checkpoint]:
    yarn = RopeScaling("yarn", 2.0, 16)
    llama3 = RopeScaling("llama3", 8.0, 16)
    configs = {
        "llama": LLAMA,
        "bitnet": SMALL,
        "qwen2": DENSE | {"qkv_bias": True, "rope_scaling": yarn},
        "qwen3": DENSE | {"qk_norm": True, "tied_head": False},
        "dense": DENSE | {"rope_scaling": llama3},
    }
    models = {name: tiny.master(tiny.config(**flags)) for name, flags in configs.items()}
    template = "{{ messages[0]['content'] }}"
    return {
        name: replace(model, tokenizer=tokenizer(), chat_template=template if name == "llama" else None)
        for name, model in models.items()
    }


def _native(folder: Path) -> dict[str, dict[str, bytes]]:
    models = {name: quantize(model) for name, model in _models().items()}
    binary = tiny.master(
        tiny.config(**LLAMA | {"weights": "b1", "d_model": 16, "d_ff": 16, "d_head": 8, "scale": 16})
    )
    models |= {"b1": quantize(binary), "r64": quantize(_models()["llama"], "r64", "bf16")}
    models["codes"] = tiny.coded(_models()["llama"])
    made = {}
    for name, model in models.items():
        native.write(model, folder / "x.onebit")
        made[name] = {"model.onebit": (folder / "x.onebit").read_bytes()}
    return made


def _run(folder: Path) -> dict[str, dict[str, bytes]]:
    made = {}
    for name, model in _models().items():
        run.write(model, folder / name)
        made[name] = {file.name: file.read_bytes() for file in sorted((folder / name).iterdir())}
        made[name]["recipe.json"] = b'{"name": "tiny"}'
    return made


def _gguf(folder: Path) -> dict[str, dict[str, bytes]]:
    path = folder / "x.gguf"
    made = {}
    for name, model in _models().items():
        gguf.write(model, path, "F16" if name == "qwen2" else "BF16" if name == "qwen3" else "F32")
        made[name] = {"model.gguf": path.read_bytes()}
    # Types of blocks, as many as small matrices can have: each layer has another one.
    wide = LLAMA | {"d_model": 64, "d_ff": 256, "n_heads": 2, "d_head": 64, "n_kv_heads": 1, "vocab_size": 5}
    kinds = {
        "ternary": {"down": "TQ2_0", "gate": "Q2_0", "up": "Q2_0", "o": "Q2_0_128", "q": "Q2_0", "k": "Q2_0"},
        "i2_s": dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), "I2_S"),
        "q1_0": dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), "Q1_0"),
        "numbers": {
            "down": "Q4_K",
            "q": "Q4_0",
            "k": "Q4_1",
            "v": "Q5_0",
            "o": "Q5_1",
            "gate": "Q8_0",
            "up": "Q8_0",
        },
        "more": {
            "down": "Q6_K",
            "q": "Q4_0",
            "k": "Q8_0",
            "v": "BF16",
            "o": "Q5_0",
            "gate": "Q5_1",
            "up": "Q4_1",
        },
    }
    for name, blocks in kinds.items():
        sizes = wide
        if name in ("i2_s", "q1_0"):
            sizes = wide | {"d_model": 128, "d_ff": 128, "d_head": 64}
        if name in ("numbers", "more"):
            sizes = wide | {"d_model": 32, "d_head": 16}
        gguf.write(
            tiny.master(tiny.config(**DENSE | sizes | {"weights": "dense", "activations": "none"})),
            path,
            "F16",
        )
        if name == "ternary":
            blocks |= {"v": "Q2_0"}
        _retype(path, blocks)
        made[name] = {"model.gguf": path.read_bytes()}
    # A vocabulary of SentencePiece needs a piece for every byte.
    pieces = [*SPECIAL, *bpe.BYTE_PIECES, "\u2581", "a", "b", "ab", "\u2581a"]
    narrow = DENSE | {"vocab_size": len(pieces), "d_model": 2, "d_head": 2, "n_heads": 1, "d_ff": 4}
    words = bpe.ids(pieces)
    data = bpe.spaced(words, [("a", "b"), ("\u2581", "a")], {0: True, 1: True, 2: True}, "<unk>", True, True)
    model = replace(tiny.master(tiny.config(**narrow | {"bos_token": 1, "eos_tokens": (2,)})), tokenizer=data)
    gguf.write(model, path, "F16")
    made["spaced"] = {"model.gguf": path.read_bytes()}
    return made


def _retype(path: Path, kinds: dict[str, str]) -> None:
    """Give linear layers of a file other types, and weights that these have."""
    header, contents = gguf_file.read(path), path.read_bytes()
    metadata = header.metadata | {"tokenizer.ggml.model": "no_vocab"}
    metadata = {key: value for key, value in metadata.items() if not key.startswith("onebit")}
    rng = np.random.default_rng(0)
    specs, chunks = {}, []
    for name, place in header.tensors.items():
        part = {"attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_output": "o"}.get(name.split(".")[-2])
        block = BLOCKS[kinds.get(part or name.split(".")[-2].removeprefix("ffn_"), place.block.name)]
        specs[name] = place.shape, block
        if block == place.block:
            chunks.append((name, contents[place.begin : place.begin + place.n_bytes]))
            continue
        n = int(np.prod(place.shape)) // block.weights
        if block.name in SCHEMES:
            codes = rng.integers(-1, 2, (n, block.weights)).astype(np.int8)
            data = join(
                codes if block.name != "Q1_0" else codes | 1, np.full(n, 0.5, np.float32), block
            ).tobytes()
            data += (struct.pack("<f", 0.5) + bytes(28)) if block.tail else b""
        else:
            data = bytes(n * block.n_bytes)
        chunks.append((name, data))
    gguf_file.write(path, metadata, specs, chunks)


def _hf(folder: Path) -> dict[str, dict[str, bytes]]:
    made = {}
    for name, model in _models().items():
        if name == "bitnet":
            model = replace(tiny.master(model.config), tokenizer=model.tokenizer)
        for kind in hf.KINDS:
            if hf.refusals(model)[kind] is None and (
                name in ("llama", "bitnet") or kind == hf.usual_kind(model)
            ):
                hf.write(model, folder / f"{name}-{kind}", kind)
                made[f"{name}-{kind}"] = {
                    file.name: file.read_bytes() for file in sorted((folder / f"{name}-{kind}").iterdir())
                }
    dense = next(files for name, files in made.items() if name.startswith("dense"))
    weights = tiny.read_safetensors(_put(folder / "w.safetensors", dense["model.safetensors"]))
    plain = {"config.json": dense["config.json"]}
    halves: list[dict[str, Any]] = [dict(list(weights.items())[:5]), dict(list(weights.items())[5:])]
    shards, places = {}, {}
    for file, half in zip(("a.safetensors", "b.safetensors"), halves, strict=True):
        tiny.write_safetensors(folder / file, half)
        shards[file] = (folder / file).read_bytes()
        places |= dict.fromkeys(half, file)
    index = {"model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": places}).encode()}
    made["shards"] = plain | shards | index
    # Weights that are {-s, 0, +s} to the last.
    exact = {
        name: (
            dtype,
            shape,
            np.resize(np.array([0.5, -0.5, 0], "<f4"), shape).tobytes() if "proj" in name else data,
        )
        for name, (dtype, shape, data) in weights.items()
        if dtype == "F32"
    }
    if exact:
        tiny.write_safetensors(folder / "w.safetensors", exact)
        made["exact"] = plain | {"model.safetensors": (folder / "w.safetensors").read_bytes()}
    model = {"model.safetensors": dense["model.safetensors"]}
    for name, files in _vocabularies(folder).items():
        if not files.keys() & {"tokenizer.bin", "ranks.tiktoken"}:
            made[f"with-{name}"] = plain | model | files
    settings = {
        "bos_token": {"content": "a"},
        "eos_token": "b",
        "add_bos_token": True,
        "chat_template": [{"name": "default", "template": "{{ messages }}"}],
        "added_tokens_decoder": {"22": {"content": "<x>", "special": True}},
    }
    made["settings"] = (
        plain
        | model
        | {
            "tokenizer.json": tokenizer(22),
            "tokenizer_config.json": json.dumps(settings).encode(),
            "added_tokens.json": b'{"<y>": 23}',
            "special_tokens_map.json": b'{"bos_token": "a"}',
            "generation_config.json": b'{"eos_token_id": [1, 2]}',
            "chat_template.json": b'{"chat_template": "{{ messages }}"}',
        }
    )
    return made


def _put(path: Path, contents: bytes) -> Path:
    path.write_bytes(contents)
    return path


def _llama2c(folder: Path) -> dict[str, dict[str, bytes]]:
    made = {}
    sizes = {"plain": (4, 6, 1, 2, 1, 9, 5), "own": (4, 6, 2, 2, 2, -9, 5), "words": (2, 4, 1, 1, 1, 264, 4)}
    for name, header in sizes.items():
        path = folder / "x.bin"
        path.write_bytes(struct.pack("<7i", *header))
        try:
            llama2c._config(path)
        except ValueError as error:
            # It says how many bytes such a model has.
            n = int(str(error).split()[-1]) - 28
            numbers = np.random.default_rng(0).standard_normal(n // 4).astype("<f4").tobytes()
        made[name] = {"model.bin": struct.pack("<7i", *header) + numbers}
    made["words"] |= {"tokenizer.bin": _llama2c_words(264)}
    return made


def _llama2c_words(n: int) -> bytes:
    pieces = [*SPECIAL, *bpe.BYTE_PIECES, " ", "a", "b", "ab", " a"][:n]
    parts = [struct.pack("<fi", -float(i), len(piece)) + piece.encode() for i, piece in enumerate(pieces)]
    return struct.pack("<i", 7) + b"".join(parts)


def _vocabularies(folder: Path) -> dict[str, dict[str, bytes]]:
    pieces = [
        ("<unk>", 0.0, 2),
        ("<s>", 0.0, 3),
        ("a", -1.0, 1),
        ("b", -2.0, 1),
        ("ab", -3.0, 1),
        ("\u2581", -4.0, 1),
    ]
    more = [*pieces, ("\u2581a", -5.0, 1), ("aba", -6.0, 1), ("<x y>", 0.0, 4)]
    options = {"byte_fallback": False}
    parsed = json.loads(tokenizer())["model"]
    merges = "\n".join(" ".join(pair) for pair in parsed["merges"])
    ranks = [bytes([byte]) for byte in range(256)] + [b"ab", b"abc"]
    lines = [base64.b64encode(token).decode() + f" {i}" for i, token in enumerate(ranks)]
    return {
        "bpe": {"tokenizer.model": tiny.sentencepiece_model(more, **options)},
        "unigram": {"tokenizer.model": tiny.sentencepiece_model(pieces, model_type=1, **options)},
        "spaces": {
            "tokenizer.model": tiny.sentencepiece_model(pieces, remove_extra_whitespaces=True, **options)
        },
        "mapped": {
            "tokenizer.model": tiny.sentencepiece_model(pieces, **options)
            # A map of characters that changes none: a trie of 256 units that lead nowhere.
            + b"\x1a\x87\x08\x12\x84\x08\x00\x04\x00\x00"
            + bytes(1024)
        },
        "gpt2": {"vocab.json": json.dumps(parsed["vocab"]).encode(), "merges.txt": merges.encode()},
        "json": {"tokenizer.json": tokenizer()},
        "spaced": {
            "tokenizer.json": vocabulary.from_sentencepiece(tiny.sentencepiece_model(more, **options))
        },
        "words": {"tokenizer.bin": _llama2c_words(264)},
        "ranks": {"ranks.tiktoken": "\n".join(lines).encode()},
    }

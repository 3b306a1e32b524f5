"""What `make fuzz` has found, each in its smallest form. Kind: exact (the refusal, by its words)."""

import json
import struct
import warnings
from dataclasses import replace

import numpy as np
import pytest

import tiny
from onebit.checkpoint import Checkpoint, quantize, rows
from onebit.config import ModelConfig, RopeScaling
from onebit.engine.tokenizer import Tokenizer
from onebit.formats import gguf, hf, vocabulary
from onebit.formats.gguf import container as gguf_file

DENSE = {
    "sub_norm": False, "activation": "silu", "weights": "dense", "activations": "none", "n_layers": 1, "d_head": 12,
}  # fmt: skip
LONG = "x" * 5000
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}


def refusal(call, *arguments, **named) -> str:
    with warnings.catch_warnings(), pytest.raises(ValueError) as caught:
        warnings.simplefilter("error")
        call(*arguments, **named)
    message = str(caught.value)
    assert message.isascii() and message.isprintable() and len(message) < 600
    return message


CONFIGS = {
    "an alphabet": ({"activation": "r\u00e9lu"}, r"activation is 'r\xe9lu'"),
    "a long text": ({"weights": LONG}, "weights is 'xxx"),
    "a long number": ({"scale": 16 * 10**400}, "scale group 1600"),
    "a long list": ({"d_model": [None] * 5000}, "d_model is [None, None"),
    "a long token": ({"eos_tokens": [[None] * 5000]}, "special token [None, None"),
    "an unknown field": ({"\u202e" + LONG: 1}, r"unknown field '\u202exxx"),
    "a table": ({"rope_scaling": [LONG]}, "rope_scaling is ['xxx"),
    "a field of a table": ({"rope_scaling": YARN | {LONG: 1}}, "unknown field 'xxx"),
    "a type": ({"rope_scaling": YARN | {"rope_type": "\u00e9"}}, r"rope_type is '\xe9'"),
    "no float": (
        {"rope_scaling": YARN | {"mscale": 10**400, "mscale_all_dim": 1}},
        "mscale_all_dim to be numbers",
    ),
    "an overflow": (
        {"rope_scaling": YARN | {"beta_slow": 1e-310}, "rope_theta": 1.0000000000000002},
        "beta_slow is 1e-310",
    ),
    "zero in float32": ({"norm_eps": 1e-300}, "norm_eps is 1e-300"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_refused_in_one_line(name):
    changes, words = CONFIGS[name]
    assert words in refusal(ModelConfig.from_dict, tiny.CONFIG.to_dict() | changes)


def test_numbers_of_a_gguf_key_are_told_in_one_line(tmp_path):
    gguf.write(tiny.master(tiny.config(**DENSE)), tmp_path / "x.gguf", "F32")
    header, contents = gguf_file.read(tmp_path / "x.gguf"), (tmp_path / "x.gguf").read_bytes()
    metadata = header.metadata | {"llama.rope.freq_base": np.full(300, 2**64 - 18, np.uint64)}
    specs = {name: (place.shape, place.block) for name, place in header.tensors.items()}
    chunks = [(name, contents[place.begin :][: place.n_bytes]) for name, place in header.tensors.items()]
    gguf_file.write(tmp_path / "y.gguf", metadata, specs, chunks)
    assert "freq_base is array([18446744073709551598, " in refusal(gguf.read, tmp_path / "y.gguf")


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FC00000])
def test_a_scale_that_is_no_number_is_refused_without_a_warning(bits, tmp_path):
    hf.write(quantize(tiny.bf16_exact(tiny.master(tiny.BITNET)), head="bf16"), tmp_path / "x", "packed")
    path = tmp_path / "x" / "model.safetensors"
    tensors = tiny.read_safetensors(path)
    name = next(name for name in tensors if name.endswith("weight_scale"))
    tiny.write_safetensors(path, tensors | {name: ("F32", [1], struct.pack("<I", bits))})
    assert "holds nan; expected a positive finite number" in refusal(hf.read, tmp_path / "x")


def packed(head: str) -> Checkpoint:
    return quantize(tiny.master(), head=head)


def test_rows_whose_scale_is_too_large_are_refused():
    model = packed("q8")
    embed = model.tensors["embed.weight"]
    tensors = model.tensors | {"embed.weight": embed._replace(scale=np.full_like(embed.scale, 3e38))}
    assert "a scale is too large for its codes" in refusal(replace, model, tensors=tensors)


def test_rows_in_bfloat16_that_are_no_numbers_are_refused_where_they_are_read():
    embed = packed("bf16").tensors["embed.weight"]
    damaged = embed._replace(data=np.full_like(embed.data, 0xFF))
    assert "tensor embed.weight holds NaN or infinity" in refusal(rows, "embed.weight", damaged)


def test_words_of_the_tokenizer_library_are_made_short():
    document = json.loads(tiny.tokenizer_json()) | {"version": f"\u00e9\n{LONG}"}
    assert "not a readable tokenizer.json" in refusal(Tokenizer, json.dumps(document).encode())


def characters(units: list[int], texts: bytes = b"") -> bytes:
    """A SentencePiece model with a map of characters: its trie, filled up to 256 units, and its texts."""
    trie = struct.pack("<256I", *units, *[0] * (256 - len(units)))
    charsmap = struct.pack("<I", len(trie)) + trie + texts
    field = b"\x12" + bytes([len(charsmap) & 127 | 128, len(charsmap) >> 7]) + charsmap
    pieces = [("<unk>", 0.0, 2), ("a", -1.0, 1), ("b", -2.0, 1)]
    model = tiny.sentencepiece_model(pieces, model_type=1, byte_fallback=False)
    return model + b"\x1a" + bytes([len(field) & 127 | 128, len(field) >> 7]) + field


A, LEAF = ord("a"), 1 << 8
# From the first unit "a" leads to the unit 97, and its offset, 3, to the leaf 98.
TO_LEAF = [0] * A + [A | LEAF | 3 << 10]


def test_a_map_of_characters_is_followed():
    made = Tokenizer(vocabulary.from_sentencepiece(characters([*TO_LEAF, 0], b"b\0")))
    assert made.encode("a")[-1] == 2


MAPS = {
    "out of the trie": (characters([1 << 10 | 1 << 9]), "outside of itself"),
    "later out of the trie": (characters([0] * A + [A | 4096 << 10]), "outside of itself"),
    "leaf out of the trie": (characters([0] * A + [A | LEAF | 2**20 << 10]), "outside of its texts"),
    "text out of the texts": (characters([*TO_LEAF, 9], b"b\0"), "outside of its texts"),
    "text inside a character": (characters([*TO_LEAF, 1], "\u00e9\0".encode()), "outside of its texts"),
    "no UTF-8": (characters([*TO_LEAF, 0], b"\xff\0"), "a text that is not UTF-8"),
}


@pytest.mark.parametrize("name", MAPS)
def test_a_map_of_characters_that_leads_out_of_itself_is_refused(name):
    model, words = MAPS[name]
    assert words in refusal(vocabulary.from_sentencepiece, model)


def test_a_scale_without_an_inverse_is_not_written_to_a_folder(tmp_path):
    model = quantize(tiny.master(tiny.BITNET))
    scale = np.full(1, 1e-41, np.float32)
    tensors = {
        name: tensor._replace(scale=scale) if model.config.is_linear(name) else tensor
        for name, tensor in model.tensors.items()
    }
    message = refusal(hf.write, replace(model, tensors=tensors), tmp_path / "x", "packed")
    assert "its inverse is outside of float32" in message and not (tmp_path / "x").exists()


def test_a_tokenizer_of_a_larger_model_is_not_written_to_a_folder(tmp_path):
    small = tiny.master(tiny.config(**DENSE, vocab_size=256))
    model = replace(small, tokenizer=tiny.tokenizer_json())
    assert "the model's vocab_size is 256" in refusal(hf.write, model, tmp_path / "x", "dense")


@pytest.mark.parametrize("changes", [{"high_freq_factor": 8.0}, {"low_freq_factor": 0.5}])
def test_positions_that_cannot_be_told_from_their_divisors_are_not_written(changes, tmp_path):
    scaling = RopeScaling.from_dict(LLAMA3 | changes)
    model = tiny.master(tiny.config(**DENSE, rope_scaling=scaling))
    assert "cannot be told" in refusal(gguf.write, model, tmp_path / "x.gguf", "F32")
    assert "cannot be told" in str(gguf.refusals(model)["F32"])
    plain = replace(model, config=tiny.config(**DENSE, rope_scaling=RopeScaling.from_dict(LLAMA3)))
    gguf.write(plain, tmp_path / "x.gguf", "F32")
    assert gguf.read(tmp_path / "x.gguf").config.rope_scaling == RopeScaling.from_dict(LLAMA3)

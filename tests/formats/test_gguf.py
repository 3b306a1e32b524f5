"""Models in GGUF files. Kinds: oracle (the gguf package reads what we write, we read what it writes), exact, invariant
(there and back gives the same bytes)."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tiny
from onebit.checkpoint import Checkpoint, Stored, codes, quantize, rows
from onebit.config import Activations, ModelConfig, RopeScaling
from onebit.formats import gguf, names, native
from onebit.formats.gguf import container, model_keys
from onebit.formats.gguf.blocks import BLOCKS, join
from onebit.packing import PackedTensor

WIDE = {"d_model": 256, "d_ff": 512, "d_head": 64}
PLAIN = {"sub_norm": False, "activation": "silu"}
TOP = {"tied_head": False}
FAMILIES = {
    "llama": PLAIN,
    "qwen2": PLAIN | {"qkv_bias": True},
    "qwen3": PLAIN | {"qk_norm": True} | TOP,
    "bitnet": {"sub_norm": True, "activation": "silu"},
    "bitnet-b1.58": {"sub_norm": True, "activation": "relu2"} | TOP,
}
# Scheme and granularity of a model that a type of codes holds without another rounding than that of the scales.
SCHEMES = {
    "TQ2_0": ("b1.58", "row"), "TQ1_0": ("b1.58", 256), "I2_S": ("b1.58", "tensor"), "Q1_0": ("b1", 128),
    "Q2_0": ("b1.58", 64), "Q2_0_128": ("b1.58", 128),
}  # fmt: skip
DENSE = ("F16", "BF16", "F32")


def config(kind: str, **changes) -> ModelConfig:
    weights, scale = SCHEMES.get(kind, ("dense", "tensor"))
    activations = "none" if weights == "dense" else "a8"
    return tiny.config(**WIDE, weights=weights, scale=scale, activations=activations, **changes)


def written(path: Path, kind: str, **changes) -> Checkpoint:
    """A random model, written."""
    master = tiny.master(config(kind, **changes), chat_template="{{ x }}")
    gguf.write(master, path, kind)
    return master


def contents(path: Path) -> dict[str, tuple[tuple[int, ...], str, bytes]]:
    """Shape, type and bytes of all tensors."""
    data = path.read_bytes()
    return {
        name: (place.shape, place.block.name, data[place.begin : place.begin + place.n_bytes])
        for name, place in container.read(path).tensors.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", gguf.KINDS)
def test_there_and_back(family, kind, tmp_path):
    path, again, packed = tmp_path / "x.gguf", tmp_path / "y.gguf", tmp_path / "x.onebit"
    master = written(path, kind, **FAMILIES[family])
    read = gguf.read(path)
    assert read.config == master.config
    assert (read.chat_template, read.provenance["source"]["architecture"]) == ("{{ x }}", family)
    assert all(isinstance(tensor, Stored) for tensor in read.tensors.values())
    for name, tensor in read.tensors.items():
        if master.config.is_linear(name) and kind in SCHEMES:
            found, scale = codes(name, tensor, read.config)
            expected, exact = codes(name, master.tensors[name], master.config)
            assert np.array_equal(found, expected)
            if kind == "I2_S":
                assert np.array_equal(scale, exact)
            else:
                assert np.array_equal(scale, exact.astype(np.float16))
        elif len(tensor.shape) == 1 or kind in ("F32", *SCHEMES):
            assert np.array_equal(rows(name, tensor), master.tensors[name])
    gguf.write(read, again, kind)
    assert contents(again) == contents(path)
    # Packed as a .onebit file, codes and scales remain.
    if kind in SCHEMES:
        native.write(read, packed, head="bf16")
        gguf.write(native.read(packed), again, kind)
        there, back = contents(path), contents(again)
        linear = [names.to_gguf(name) for name in master.tensors if master.config.is_linear(name)]
        assert all(there[name] == back[name] for name in linear)


@pytest.mark.parametrize("kind", ["TQ2_0", "TQ1_0", "F16", "BF16", "F32"])
def test_the_gguf_package_reads_what_we_write(kind, tmp_path):
    from gguf import GGUFReader, quants

    path = tmp_path / "x.gguf"
    master = written(path, kind, **PLAIN)
    reader = GGUFReader(path)
    keys = {key: field.contents() for key, field in reader.fields.items()}
    assert keys["general.architecture"] == "llama" and keys["llama.rope.freq_base"] == 10000.0
    assert keys["tokenizer.ggml.tokens"] == container.read(path).metadata["tokenizer.ggml.tokens"]
    assert keys["onebit.label"] == master.label and keys["onebit.activations"] == master.config.activations
    places = container.read(path).tensors
    assert [tensor.name for tensor in reader.tensors] == list(places)
    read = gguf.read(path)
    for tensor in reader.tensors:
        place = places[tensor.name]
        assert (tensor.data_offset, tensor.n_bytes) == (place.begin, place.n_bytes)
        assert tuple(tensor.shape[::-1]) == place.shape and tensor.tensor_type.name == place.block.name
        if "attn_q" in tensor.name or "attn_k" in tensor.name:
            continue
        values = quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(
            rows("", read.tensors[names.from_gguf(tensor.name)]), values.reshape(place.shape)
        )


def permuted(w: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows in the order of llama.cpp's converter: as it is written there."""
    return w.reshape(n_heads, 2, w.shape[0] // n_heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def other_writer(path: Path, architecture: str, tensors: dict[str, np.ndarray], **keys) -> None:
    """A file of the gguf package: F32 tensors, unless they are given as bytes with a type."""
    from gguf import GGUFWriter

    c = tiny.CONFIG
    writer = GGUFWriter(path, architecture)
    values = {
        "context_length": 192, "embedding_length": 256, "block_count": 1, "feed_forward_length": 512,
        "attention.head_count": c.n_heads, "attention.head_count_kv": c.n_kv_heads,
        "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 1e6,
    } | keys  # fmt: skip
    for key, value in values.items():
        key = (
            key if "." in key and key.split(".")[0] in ("general", "split", "x") else f"{architecture}.{key}"
        )
        if value is None:
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_string(key, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors_of(**changes) -> dict[str, np.ndarray]:
    """Random float32 tensors of a model of one layer, by their names in GGUF."""
    drawn = tiny.tensors(tiny.config(**WIDE, n_layers=1, **PLAIN | changes))
    return {names.to_gguf(name): w for name, w in drawn.items()}


def ours(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {names.from_gguf(name): w for name, w in tensors.items()}


def test_rows_of_q_and_k_are_put_in_our_order(tmp_path):
    tensors = tensors_of(qkv_bias=True)
    there = {
        name: permuted(w, 4) if "attn_q" in name else permuted(w, 2) if "attn_k" in name else w
        for name, w in tensors.items()
    }
    other_writer(tmp_path / "x.gguf", "llama", there)
    other_writer(tmp_path / "y.gguf", "qwen2", tensors)
    for path in (tmp_path / "x.gguf", tmp_path / "y.gguf"):
        read = gguf.read(path)
        assert read.config.qkv_bias and read.config.rope_theta == 1e6 and read.config.norm_eps == 1e-5
        for name, w in ours(tensors).items():
            assert np.array_equal(rows(name, read.tensors[name]), w)
            # Also where a piece begins and ends inside of a head.
            assert np.array_equal(rows(name, read.tensors[name], 3, 71), w[3:71])


def ternary(tensors: dict[str, np.ndarray], scale) -> dict[str, tuple | np.ndarray]:
    """Linear layers as TQ2_0, with the scales of blocks that a function gives."""
    from gguf import GGMLQuantizationType

    rng = np.random.default_rng(0)
    made: dict[str, tuple | np.ndarray] = dict(tensors)
    for name, w in tensors.items():
        if w.ndim == 2 and name.startswith("blk."):
            codes = rng.integers(-1, 2, w.shape).astype(np.int8)
            codes[0] = 0
            d = np.broadcast_to(scale(w.shape[0], w.shape[1] // 256), (w.shape[0], w.shape[1] // 256)).copy()
            data = join(codes.reshape(-1, 256), d.astype(np.float32).reshape(-1), BLOCKS["TQ2_0"])
            # Blocks without codes have the scale 0.
            data.reshape(w.shape[0], -1)[0, 64:66] = 0
            made[name] = data.reshape(w.shape[0], -1), GGMLQuantizationType.TQ2_0
    return made


@pytest.mark.parametrize(
    ("scale", "granularity"),
    [
        (lambda n, blocks: np.float32(0.5), "tensor"),
        (lambda n, blocks: np.arange(1, n + 1)[:, None] / 64, "row"),
        (lambda n, blocks: np.arange(1, n * blocks + 1).reshape(n, blocks) / 64, 256),
    ],
)
def test_granularity_follows_from_the_scales(scale, granularity, tmp_path):
    path = tmp_path / "x.gguf"
    other_writer(path, "qwen3", ternary(tensors_of(qk_norm=True), scale))
    read = gguf.read(path)
    # Of matrices with one block in a row a row is a block: those with two tell.
    assert (read.config.weights, read.config.scale) == ("b1.58", granularity)
    weight_only = "a15" if "a15" in Activations.__args__ else "a8"
    assert read.config.activations == ("a8" if granularity == "tensor" else weight_only)
    name = "layers.0.down.weight"
    found, d = codes(name, read.tensors[name], read.config)
    w = rows(name, read.tensors[name])
    expected = np.broadcast_to(scale(256, 2), (256, 2)).astype(np.float32)
    assert not w[0, :256].any() and (d > 0).all()
    if granularity == "tensor":
        assert d.tolist() == [0.5]
    else:
        assert np.array_equal(d[1:].reshape(255, -1)[:, 0], expected[1:, 0])
    assert np.array_equal(w[1:].reshape(255, 2, 256), found[1:].reshape(255, 2, 256) * expected[1:, :, None])
    native.write(read, tmp_path / "x.onebit", head="bf16")


@pytest.mark.parametrize("kind", ["TQ2_0", "F32"])
def test_scales_beside_a_matrix_multiply_it(kind, tmp_path):
    path = tmp_path / "x.gguf"
    tensors = tensors_of(sub_norm=True)
    stored = ternary(tensors, lambda n, blocks: np.float32(1)) if kind == "TQ2_0" else dict(tensors)
    scales = {
        name.replace(".weight", ".scale"): np.array([0.25], np.float32)
        for name, w in tensors.items()
        if w.ndim == 2 and name.startswith("blk.")
    }
    other_writer(path, "bitnet", stored | scales)
    read = gguf.read(path)
    assert read.config.sub_norm and read.config.activation == "silu"
    name = "layers.0.up.weight"
    if kind == "F32":
        assert np.array_equal(
            rows(name, read.tensors[name]), tensors["blk.0.ffn_up.weight"] * np.float32(0.25)
        )
    else:
        assert (read.config.scale, read.config.activations) == ("tensor", "a8")
        found, scale = codes(name, read.tensors[name], read.config)
        assert scale.tolist() == [0.25] and np.array_equal(rows(name, read.tensors[name]), found * scale)


@pytest.mark.parametrize("architecture", ["bitnet-b1.58", "bitnet-25"])
def test_bitnets_with_squared_relu(architecture, tmp_path):
    path = tmp_path / "x.gguf"
    other_writer(path, architecture, tensors_of(sub_norm=True))
    assert gguf.read(path).config.activation == "relu2"
    other_writer(path, architecture, tensors_of(sub_norm=True), hidden_activation="silu")
    assert gguf.read(path).config.activation == "silu"


def test_embedding_and_head_of_codes_stay_codes(tmp_path):
    path, again = tmp_path / "x.gguf", tmp_path / "y.gguf"
    master = tiny.master(config("Q1_0", **PLAIN, **TOP))
    coded = {
        name: Stored(w.shape, "Q1_0", w.size // 8, lambda begin, end, w=w: w[begin:end],
                     lambda name=name, w=w: codes(name, w, master.config))
        for name, w in master.tensors.items() if w.ndim == 2
    }  # fmt: skip
    gguf.write(replace(master, tensors=master.tensors | coded), path, "Q1_0")
    read = gguf.read(path)
    assert {read.tensors[name].kind for name in ("embed.weight", "head.weight")} == {"Q1_0"}
    for name in ("embed.weight", "head.weight"):
        found, scale = codes(name, read.tensors[name], read.config)
        assert np.array_equal(found, codes(name, master.tensors[name], master.config)[0])
        assert np.array_equal(rows(name, read.tensors[name]), found * np.repeat(scale, 128, axis=1))
    gguf.write(read, again, "Q1_0")
    assert contents(again) == contents(path)


def test_a_packed_model_is_written_as_it_is(tmp_path):
    path = tmp_path / "x.gguf"
    packed = quantize(tiny.master(config("I2_S", **PLAIN)))
    gguf.write(packed, path, "I2_S")
    read = gguf.read(path)
    for name, tensor in packed.tensors.items():
        assert np.array_equal(rows(name, read.tensors[name]), rows(name, tensor))
    assert isinstance(packed.tensors["embed.weight"], PackedTensor)
    assert read.tensors["embed.weight"].kind == "F32"
    gguf.write(packed, path, "F32")
    assert all(
        np.array_equal(rows("", t), rows("", packed.tensors[n])) for n, t in gguf.read(path).tensors.items()
    )


def test_a_model_without_vocabulary(tmp_path):
    path = tmp_path / "x.gguf"
    master = replace(tiny.master(config("F32", **PLAIN, eos_tokens=())), tokenizer=None)
    gguf.write(master, path, "F32")
    assert gguf.read(path).tokenizer is None and gguf.read(path).config == master.config


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({}, "IQ2_XXS", "expected one of TQ2_0"),
        (
            {"d_ff": 384},
            "TQ2_0",
            "TQ2_0 needs multiples of 256 inputs, and down has 384; this model fits I2_S, Q2_0",
        ),
        (
            {"scale": "row"},
            "I2_S",
            "one scale for a tensor, and these weights have one for a row; .* TQ2_0, TQ1_0",
        ),
        (
            {"scale": 64},
            "TQ1_0",
            "has one scale for 256 weights, and these have one for 64; this model fits Q2_0, F16",
        ),
        ({"weights": "b1"}, "TQ2_0", "holds b1.58 weights, and these are b1; this model fits Q1_0, F16"),
        (
            {"weights": "dense", "activations": "none"},
            "Q2_0",
            "these are dense; this model fits F16, BF16, F32$",
        ),
        ({"activation": "relu2"}, "F32", "no architecture of GGUF has relu2 without sub-norms"),
        ({"qk_norm": True, "sub_norm": True}, "F32", "it can only be kept as a .onebit file"),
        ({"hadamard": True, "d_ff": 256}, "F32", "it can only be kept as a .onebit file"),
        ({"rope_scaling": RopeScaling("yarn", 2.0, 64, truncate=False)}, "F32", "no yarn without truncate"),
        (
            {"rope_scaling": RopeScaling("yarn", 2.0, 64, beta_fast=16.0)},
            "F32",
            "than beta_fast 32 and beta_slow 1",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes, kind, words, tmp_path):
    master = tiny.master(tiny.config(**WIDE | PLAIN | changes))
    with pytest.raises(ValueError, match=words):
        gguf.write(master, tmp_path / "x.gguf", kind)
    assert not list(tmp_path.iterdir())


def test_numbers_outside_of_a_type_are_refused(tmp_path):
    master = tiny.master(config("F16", **PLAIN))
    master.tensors["layers.0.q.weight"][3, 5] = 1e5
    with pytest.raises(
        ValueError, match="tensor layers.0.q.weight holds a number that is too large for F16; take F32"
    ):
        gguf.write(master, tmp_path / "x.gguf", "F16")
    large = replace(master, config=config("TQ2_0", **PLAIN))
    large.tensors["layers.0.q.weight"][:] *= np.float32(1e7)
    with pytest.raises(ValueError, match="layers.0.q.weight: the scale .* is outside of float16"):
        gguf.write(quantize(large), tmp_path / "x.gguf", "TQ2_0")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_positions_of_llama_3(factor, tmp_path):
    path = tmp_path / "x.gguf"
    scaling = RopeScaling("llama3", factor, 8192)
    master = tiny.master(config("F32", **PLAIN, rope_theta=500000.0, rope_scaling=scaling))
    factors = model_keys.rope_factors(master.config)
    assert factors[0] == 1 and np.isclose(factors[-1], factor)
    there = tensors_of() | {"rope_freqs.weight": factors}
    other_writer(path, "llama", there, **{"rope.freq_base": 500000.0})
    assert gguf.read(path).config.rope_scaling == scaling
    there["rope_freqs.weight"] = factors * np.linspace(1, 1.1, 32).astype(np.float32)
    other_writer(path, "llama", there, **{"rope.freq_base": 500000.0})
    with pytest.raises(ValueError, match="rope_freqs.weight is not that of Llama 3"):
        gguf.read(path)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"expert_count": 8}, "'llama.expert_count' is 8; onebit does not know it"),
        ({"attention.sliding_window": 128}, "llama.attention.sliding_window"),
        ({"attn_logit_softcapping": 50.0}, "llama.attn_logit_softcapping"),
        ({"rope.dimension_count": 32}, "rope.dimension_count is 32, and a head is 64 wide"),
        ({"attention.value_length": 32}, "value_length is 32, and a head is 64 wide"),
        ({"attention.head_count": None}, "key llama.attention.head_count is missing"),
        ({"attention.head_count_kv": [2, 1]}, "the same in every layer"),
        ({"attention.causal": False}, "attention.causal is not true"),
        ({"vocab_size": 321}, "vocab_size is 321; the embedding has 320 rows"),
        ({"hidden_activation": "gelu"}, "hidden_activation is 'gelu'; onebit has silu and relu2"),
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0}, "longrope changes all positions"),
        ({"rope.scaling.attn_factor": 1.5}, "attn_factor is 1.5; onebit has it for yarn only"),
        ({"block_count": 3}, "tensor blk.1.attn_norm.weight is missing"),
        ({"block_count": 2**23}, "the keys claim 8388608 layers"),
        (
            {"feed_forward_length": 256},
            r"tensor blk.0.ffn_gate.weight is \[512, 256\]; the keys ask for \[256, 256\]",
        ),
        ({"x.hadamard_block": 1}, "no Hadamard transforms"),
        ({"split.count": 2}, "join them with llama-gguf-split --merge"),
        ({"general.alignment": 33}, "alignment is 33; expected a power of two"),
    ],
)
def test_keys_that_change_the_model_are_refused(keys, words, tmp_path):
    path = tmp_path / "x.gguf"
    other_writer(path, "llama", tensors_of(), **keys)
    with pytest.raises(ValueError, match=words) as caught:
        gguf.read(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    "keys",
    [
        {"expert_count": 0, "attention.sliding_window": 0, "attention.causal": True, "vocab_size": 320},
        {
            "attention.head_count": [4],
            "tensor_data_layout": "Meta AI original pth",
            "rope.scaling.type": "none",
        },
        {"rope.scaling.type": "linear", "rope.scaling.factor": 1.0, "rope.scaling.finetuned": True},
        {"attention.sliding_window": 192},
    ],
)
def test_keys_that_change_nothing_are_passed_over(keys, tmp_path):
    other_writer(tmp_path / "x.gguf", "llama", tensors_of(), **keys)
    assert gguf.read(tmp_path / "x.gguf").config.rope_scaling is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("blk.0.attn_q_norm.weight", "is not part of the model that the keys describe"),
        ("blk.00.attn_q.weight", "'blk.00.attn_q.weight' are the same"),
        ("blk.0.ffn_gate_inp.weight", "'blk.0.ffn_gate_inp.weight' is no part of a llama that onebit knows"),
    ],
)
def test_other_tensors_are_refused(name, words, tmp_path):
    other_writer(tmp_path / "x.gguf", "llama", tensors_of() | {name: np.ones(64, np.float32)})
    with pytest.raises(ValueError, match=words):
        gguf.read(tmp_path / "x.gguf")


def test_other_architectures_are_refused(tmp_path):
    other_writer(tmp_path / "x.gguf", "gemma3", tensors_of())
    with pytest.raises(
        ValueError, match="general.architecture is 'gemma3'; onebit reads llama, qwen2, qwen3, bitnet"
    ):
        gguf.read(tmp_path / "x.gguf")


def test_mixed_schemes_are_refused(tmp_path):
    stored = ternary(tensors_of(), lambda n, blocks: np.float32(1))
    stored["blk.0.ffn_up.weight"] = tensors_of()["blk.0.ffn_up.weight"]
    other_writer(tmp_path / "x.gguf", "llama", stored)
    with pytest.raises(ValueError, match=r"mix schemes of weights \(6 of TQ2_0, 1 of F32\)"):
        gguf.read(tmp_path / "x.gguf")


def test_a_large_vocabulary_is_read_fast(tmp_path):
    import time

    path = tmp_path / "x.gguf"
    metadata = {"general.architecture": "llama", "words": [f"token {i}" for i in range(150_000)],
                "scores": np.arange(150_000, dtype=np.float32)}  # fmt: skip
    container.write(path, metadata, {}, iter(()))
    started = time.perf_counter()
    read = container.read(path).metadata
    assert time.perf_counter() - started < 2
    assert read["words"] == metadata["words"] and np.array_equal(read["scores"], metadata["scores"])

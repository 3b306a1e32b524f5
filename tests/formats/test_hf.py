"""Hugging Face folders. Kinds: invariant (round trips), exact (bytes, refusals), oracle (the safetensors package)."""

import base64
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import tokenizers

import tiny
from onebit.checkpoint import Checkpoint, Stored, codes, quantize, rows
from onebit.formats import hf, names, native, run, vocabulary
from onebit.formats.hf import export, ternary
from onebit.packing import from_bf16, to_bf16
from onebit.quant import dequantize

Q = "model.layers.0.self_attn.q_proj.weight"
DENSE = replace(tiny.CONFIG, weights="dense", activations="none", sub_norm=False, activation="silu")
WEIGHTS_ONLY = "a15"


def bitnet(**changes) -> Checkpoint:
    return tiny.bf16_exact(tiny.master(replace(tiny.BITNET, **changes), chat_template=tiny.CHAT_TEMPLATE))


def packed(divides: bool = False, **changes) -> Checkpoint:
    """A packed model whose scales bfloat16 holds, or whose inverse scales it holds."""
    model = quantize(bitnet(**changes), head="bf16")
    tensors = dict(model.tensors)
    for name, tensor in tensors.items():
        if model.config.is_linear(name):
            scale = tensor.scale if not divides else 1 / tensor.scale
            scale = from_bf16(to_bf16(scale))
            tensors[name] = tensor._replace(scale=np.float32(1) / scale if divides else scale)
    return replace(model, tensors=tensors)


@pytest.fixture
def folder(tmp_path):
    hf.write(packed(), tmp_path / "model", "packed")
    return tmp_path / "model"


def assert_equal(read: Checkpoint, expected: Checkpoint) -> None:
    assert read.config == expected.config
    assert set(read.tensors) == set(expected.config.tensor_shapes())
    for name, tensor in read.tensors.items():
        assert isinstance(tensor, Stored)
        if tensor.codes:
            for found, known in zip(
                tensor.codes(), codes(name, expected.tensors[name], expected.config), strict=True
            ):
                assert found.dtype == known.dtype and np.array_equal(found, known), name
        for begin, end in ((0, None), (1, 3), (len(tensor.rows(0, 1)), tensor.shape[0])):
            assert np.array_equal(
                rows(name, tensor, begin, end), rows(name, expected.tensors[name], begin, end)
            )


@pytest.mark.parametrize("tied_head", [True, False])
@pytest.mark.parametrize(
    ("divides", "linear_class", "dtype"),
    [(False, "autobitlinear", "BF16"), (True, "bitlinear", "BF16"), (None, "autobitlinear", "F32")],
)
def test_packed_and_back(divides, linear_class, dtype, tied_head, tmp_path):
    """Codes and multipliers to the bit; all numbers in bfloat16 where it holds them, as the originals are."""
    changes = {"tied_head": tied_head, "rope_theta": 77.0, "bos_token": 0}
    model = quantize(bitnet(**changes), head="bf16") if divides is None else packed(divides, **changes)
    hf.write(model, tmp_path / "model", "packed")
    read = hf.read(tmp_path / "model")
    assert_equal(read, model)
    stored = sum(tensor.n_bytes for tensor in read.tensors.values())
    header = (tmp_path / "model" / "model.safetensors").read_bytes()[:8]
    assert stored == (tmp_path / "model" / "model.safetensors").stat().st_size - 8 - int.from_bytes(
        header, "little"
    )
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["quantization_config"]["linear_class"] == linear_class
    tensors = tiny.read_safetensors(tmp_path / "model" / "model.safetensors")
    assert {entry[0] for entry in tensors.values()} == {"U8", dtype}
    assert tensors[f"{Q}_scale"][:2] == (dtype, [1]) and tensors[Q][:2] == ("U8", [12, 48])
    again = tmp_path / "again"
    hf.write(hf.read(tmp_path / "model"), again, "packed")
    for path in (tmp_path / "model").iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def test_rows_that_share_a_byte():
    found = np.random.default_rng(0).integers(-1, 2, (12, 5)).astype(np.int8)
    data = export.pack_codes(found)
    for row in range(12):
        assert np.array_equal((data[row % 3] >> 2 * (row // 3) & 3).astype(np.int8) - 1, found[row])


def test_master_and_back(tmp_path):
    """A master keeps its values in their own width, and is rounded by definition."""
    master = bitnet(tied_head=False, activation="silu")
    hf.write(master, tmp_path / "f32", "dense")
    read = hf.read(tmp_path / "f32")
    assert_equal(read, master)
    assert read.tensors["layers.0.q.weight"].kind == "F32" and not read.tensors["layers.0.q.weight"].codes
    config = json.loads((tmp_path / "f32" / "config.json").read_text())
    assert (
        config["quantization_config"]["quantization_mode"] == "online" and config["torch_dtype"] == "float32"
    )
    expected = quantize(master, head="bf16")
    for name, tensor in quantize(read).tensors.items():
        known = expected.tensors[name]
        if isinstance(known, np.ndarray):
            assert np.array_equal(tensor, known)
        else:
            assert np.array_equal(tensor.data, known.data) and np.array_equal(tensor.scale, known.scale)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_sixteen_bits_stay_sixteen_bits(dtype, tmp_path):
    folder = cast(tmp_path / "a", bitnet(), dtype)
    hf.write(hf.read(folder), tmp_path / "b", "dense")
    assert tiny.read_safetensors(tmp_path / "b" / "model.safetensors") == tiny.read_safetensors(
        folder / "model.safetensors"
    )
    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    assert json.loads((tmp_path / "b" / "config.json").read_text())["torch_dtype"] == names[dtype]


def cast(folder, master, dtype):
    """A folder whose numbers are all of one width."""
    hf.write(master, folder, "dense")
    path = folder / "model.safetensors"
    tensors = {}
    for name, (_, shape, raw) in tiny.read_safetensors(path).items():
        values = np.frombuffer(raw, np.float32)
        made = {"BF16": to_bf16, "F16": lambda w: w.astype(np.float16), "F32": lambda w: w}[dtype](values)
        tensors[name] = (dtype, shape, made.tobytes())
    tiny.write_safetensors(path, tensors)
    return folder


def test_a_master_is_packed_as_it_is_quantized(tmp_path):
    hf.write(bitnet(), tmp_path / "a", "packed")
    hf.write(quantize(bitnet(), head="bf16"), tmp_path / "b", "packed")
    hf.write(bitnet(), tmp_path / "master", "dense")
    hf.write(hf.read(tmp_path / "master"), tmp_path / "c", "packed")
    contents = (tmp_path / "a" / "model.safetensors").read_bytes()
    for name in "bc":
        assert (tmp_path / name / "model.safetensors").read_bytes() == contents


def test_a_run_folder_is_no_hugging_face_model(folder, tmp_path):
    run.write(tiny.master(), tmp_path / "run")
    assert hf.is_model(folder) and not hf.is_model(tmp_path / "run") and not hf.is_model(tmp_path)


def test_what_stands_in_the_folder(folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert hf.read(folder).provenance == {
        "source": {
            "format": "huggingface",
            "model_type": "bitnet",
            "folder": "model",
            "scale": "multiplies",
            "dtype": "BF16",
        }
    }


def test_the_safetensors_package_reads_it(folder):
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tiny.read_safetensors(folder / "model.safetensors"))


def test_onebit_files_are_made_of_it(folder, tmp_path):
    native.write(hf.read(folder), tmp_path / "x.onebit")
    made, model = native.read(tmp_path / "x.onebit"), packed()
    assert made.label == "W1.58A8KV16H16" and made.tokenizer == model.tokenizer
    for name, tensor in model.tensors.items():
        for found, known in zip(made.tensors[name], tensor, strict=True):
            assert np.array_equal(found, known), name


def test_writing_replaces_a_model_and_nothing_else(folder, tmp_path):
    hf.write(bitnet(), folder, "dense")
    assert not hf.read(folder).tensors["layers.0.q.weight"].codes
    run.write(tiny.master(), tmp_path / "run")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("x")
    hf.write(bitnet(), tmp_path / "clone", "dense")
    (tmp_path / "clone" / ".git").mkdir()
    for other in ("run", "notes", "notes/todo.txt", "clone"):
        with pytest.raises(ValueError, match="choose another folder|is a file"):
            hf.write(bitnet(), tmp_path / other, "dense")
    (tmp_path / "empty").mkdir()
    hf.write(bitnet(), tmp_path / "empty", "dense")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clone", "empty", "model", "notes", "run"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    broken = bitnet()
    stored = Stored((48, 48), "F32", 0, lambda begin, end: np.full((end - begin, 48), np.nan, np.float32))
    broken = replace(broken, tensors=broken.tensors | {"layers.1.q.weight": stored})
    with pytest.raises(ValueError, match="NaN"):
        hf.write(broken, tmp_path / "model", "dense")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left on device.*model'"):
        hf.write(bitnet(), tmp_path / "model", "dense")
    assert not list(tmp_path.iterdir())


def test_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SHARD_BYTES", 30_000)
    hf.write(packed(), tmp_path / "model", "packed")
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all((tmp_path / "model" / name).stat().st_size < 35_000 for name in files[1:])
    assert_equal(hf.read(tmp_path / "model"), packed())


def test_links_of_the_hub_cache(folder, tmp_path):
    cache = tmp_path / "models--owner--name"
    snapshot = cache / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for i, path in enumerate(folder.iterdir()):
        path.rename(cache / "blobs" / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    assert_equal(hf.read(snapshot), packed())
    assert hf.read(snapshot).provenance["source"]["folder"] == "owner/name@0123abc"


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("packed", {"weights": "b1"}, "packed BitNets have weights b1.58"),
        ("packed", {"scale": "row"}, "a scale for each row: packed BitNets"),
        ("packed", {"activations": "a4"}, "activations a4"),
        ("packed", {"d_ff": 82}, "gate has 82 rows"),
        ("dense", {"qk_norm": True}, "no other program has a model with these together"),
        ("mlx", {}, "kind is 'mlx'; expected packed or dense"),
    ],
)
def test_what_cannot_be_written(kind, changes, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        hf.write(bitnet(**changes), tmp_path / "model", kind)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("changes", [{"weights": "b1"}, {"scale": "row"}, {"activations": "a4"}])
def test_other_schemes_are_written_as_values(changes, tmp_path):
    master = bitnet(sub_norm=False, **changes)
    hf.write(master, tmp_path / "model", "dense")
    assert "quantization_config" not in json.loads((tmp_path / "model" / "config.json").read_text())
    tensors = tiny.read_safetensors(tmp_path / "model" / "model.safetensors")
    for name, tensor in master.tensors.items():
        expected = tensor
        if master.config.is_linear(name):
            found, scale = codes(name, tensor, master.config)
            expected = dequantize(found.astype(np.float32), scale)
        assert np.array_equal(np.frombuffer(tensors[names.to_hf(name)][2], np.float32), expected.reshape(-1))


@pytest.mark.parametrize("changes", [{}, {"weights": "b1"}, {"scale": "row"}])
def test_values_of_codes_are_those_codes_again(changes, tmp_path):
    model = quantize(bitnet(**changes), head="bf16")
    hf.write(model, tmp_path / "model", "dense")
    assert_equal(hf.read(tmp_path / "model"), model)


WIDE = replace(DENSE, d_model=512, n_heads=4, n_kv_heads=4, d_head=128, d_ff=768, n_layers=2)


def dense(config, weights: str = "none", scale="tensor") -> Checkpoint:
    """A model without quantization_config, its linear weights rounded already."""
    master = tiny.bf16_exact(tiny.master(config))
    if weights == "none":
        return master
    tensors = dict(master.tensors)
    for name in tensors:
        if config.is_linear(name):
            rounded = replace(config, weights=weights, activations="a8", scale=scale)
            found, s = codes(name, tensors[name], rounded)
            tensors[name] = dequantize(found.astype(np.float32), from_bf16(to_bf16(s)))
    return replace(master, tensors=tensors)


@pytest.mark.parametrize("weights", ["b1.58", "b1"])
@pytest.mark.parametrize("scale", ["tensor", "row", 256, 128, 64])
def test_ternary_weights_in_floating_point(weights, scale, tmp_path):
    """TriLMs come so: told by their values, whatever shares a scale, and kept exactly."""
    master = dense(WIDE, weights, scale)
    cast(tmp_path, master, "BF16")
    read = hf.read(tmp_path)
    assert (read.config.weights, read.config.scale, read.config.activations) == (weights, scale, WEIGHTS_ONLY)
    for name, tensor in master.tensors.items():
        if read.config.is_linear(name):
            found, s = codes(name, read.tensors[name], read.config)
            assert np.array_equal(dequantize(found.astype(np.float32), s), tensor), name
        assert np.array_equal(rows(name, read.tensors[name]), tensor)


def test_parts_of_several_machines(tmp_path):
    """Trained on two machines, a matrix has two scales: by halves of the rows, or of the inputs."""
    master = dense(WIDE, "b1.58")
    tensors = dict(master.tensors)
    for name, w in tensors.items():
        if WIDE.is_linear(name):
            w = w.copy()
            half = w[:, w.shape[1] // 2 :] if ".o." in name or ".down." in name else w[w.shape[0] // 2 :]
            half *= 2
            tensors[name] = w
    read = hf.read(cast(tmp_path, replace(master, tensors=tensors), "BF16"))
    # 384 of the 768 inputs of down: the largest group that divides both.
    assert (read.config.weights, read.config.scale) == ("b1.58", 128)
    found, scale = codes("", read.tensors["layers.0.down.weight"], read.config)
    assert np.array_equal(
        dequantize(found.astype(np.float32), scale), tensors["layers.0.down.weight"]
    ) and scale.shape == (512, 6)


def test_zeros_take_the_largest_scale(tmp_path):
    master = dense(WIDE, "b1.58", "row")
    tensors = dict(master.tensors)
    for name in ("layers.0.q.weight", "layers.1.up.weight"):
        tensors[name] = tensors[name].copy()
        tensors[name][3] = 0
    tensors["layers.1.k.weight"] = np.zeros_like(tensors["layers.1.k.weight"])
    read = hf.read(cast(tmp_path, replace(master, tensors=tensors), "BF16"))
    assert read.config.scale == "row"
    for name in ("layers.0.q.weight", "layers.1.up.weight"):
        found, scale = codes(name, read.tensors[name], read.config)
        assert scale[3] == scale.max() and not found[3].any()
    assert not codes("", read.tensors["layers.1.k.weight"], read.config)[0].any()


def test_a_later_matrix_that_is_not_ternary_is_named(tmp_path):
    master = dense(WIDE, "b1.58", "row")
    tensors = dict(master.tensors)
    tensors["layers.1.up.weight"] = tensors["layers.1.up.weight"].copy()
    tensors["layers.1.up.weight"][7, 9] = 1.5
    read = hf.read(cast(tmp_path, replace(master, tensors=tensors), "BF16"))
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.up_proj.weight' holds .* at \[7, "):
        quantize(read)


@pytest.mark.parametrize("config", [WIDE, DENSE, replace(DENSE, qkv_bias=True), replace(DENSE, qk_norm=True)])
def test_ordinary_models_are_dense(config, tmp_path):
    read = hf.read(cast(tmp_path, dense(config), "BF16"))
    assert read.label == "W16A16KV16" and not any(tensor.codes for tensor in read.tensors.values())


def test_ordinary_weights_cost_a_few_rows():
    asked = []

    def rows(begin, end):
        asked.append((begin, end))
        return np.random.default_rng(0).standard_normal((end - begin, 512)).astype(np.float32)

    assert ternary.detect([rows] * 7, [(100_000, 512)] * 7) is None and asked == [(0, 4)]
    constant = np.ones((8, 512), np.float32)
    assert ternary.detect([lambda begin, end: constant[begin:end]], [(8, 512)]) is None


def test_the_first_bitnets(tmp_path):
    """Their norms have other names, their class another spelling, and no quantization_config says what they are."""
    master = bitnet(activation="silu")
    cast(tmp_path, master, "F16")
    path = tmp_path / "model.safetensors"
    older = {"attn_sub_norm": "inner_attn_ln", "ffn_sub_norm": "ffn_layernorm"}
    tensors = {}
    for name, entry in tiny.read_safetensors(path).items():
        for new, old in older.items():
            name = name.replace(new, old)
        tensors[name] = entry
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = ("F32", [6], bytes(24))
    tiny.write_safetensors(path, tensors)
    tiny.edit_json(
        tmp_path / "config.json", architectures=["BitnetForCausalLM"], model_type="llama", weight_bits=1,
        input_bits=8, quantization_config=...,
    )  # fmt: skip
    read = hf.read(tmp_path)
    assert read.config == master.config and read.label == "W1.58A8KV16H16"
    rounded = replace(
        master, tensors={n: w.astype(np.float16).astype(np.float32) for n, w in master.tensors.items()}
    )
    assert_equal(read, rounded)


def test_a_head_beside_a_tied_one(folder):
    path = folder / "model.safetensors"
    tensors = tiny.read_safetensors(path)
    dtype, shape, raw = tensors["model.embed_tokens.weight"]
    tiny.write_safetensors(path, tensors | {"lm_head.weight": (dtype, shape, raw)})
    assert_equal(hf.read(folder), packed())
    tiny.write_safetensors(path, tensors | {"lm_head.weight": (dtype, shape, raw[2:] + raw[:2])})
    read = hf.read(folder)
    assert not read.config.tied_head and "head.weight" in read.tensors


def test_scales_that_contradict_the_config(folder):
    """Taken for its inverse, a scale gives a model that runs and talks nonsense."""
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    tiny.edit_json(folder / "config.json", quantization_config=quantization | {"linear_class": "bitlinear"})
    with pytest.raises(ValueError, match=r"divide by weight_scale, but its median is 0\.1.*to autobitlinear"):
        hf.read(folder)
    hf.write(packed(divides=True), folder, "packed")
    tiny.edit_json(
        folder / "config.json", quantization_config=quantization | {"linear_class": "autobitlinear"}
    )
    with pytest.raises(ValueError, match=r"multiply by weight_scale, but its median is 8\.\d.*to bitlinear"):
        hf.read(folder)


def test_special_tokens_of_several_files(folder):
    """Chat models stop on what generation_config.json adds; their templates know the tokenizer's own end token."""
    tiny.edit_json(folder / "config.json", eos_token_id=[1, 2])
    tiny.edit_json(folder / "generation_config.json", eos_token_id=[2, 0])
    assert hf.read(folder).config.eos_tokens == (0, 1, 2)
    tiny.edit_json(folder / "tokenizer_config.json", eos_token={"content": "!"})
    assert hf.read(folder).config.eos_tokens == (1, 2, 0)
    (folder / "generation_config.json").unlink()
    assert hf.read(folder).config.eos_tokens == (1, 2)


def test_a_begin_token_is_what_the_tokenizer_puts_there(folder, tmp_path):
    """Many a config.json has a bos_token_id that no text begins with."""
    tiny.edit_json(folder / "config.json", bos_token_id=5)
    assert hf.read(folder).config.bos_token is None
    hf.write(packed(bos_token=0), folder, "packed")
    tiny.edit_json(folder / "config.json", bos_token_id=5)
    assert hf.read(folder).config.bos_token == 0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert hf.read(folder).config.bos_token == 5 and hf.read(folder).tokenizer is None


def test_chat_templates_of_all_ages(folder):
    assert hf.read(folder).chat_template == tiny.CHAT_TEMPLATE
    (folder / "chat_template.jinja").unlink()
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    for template, expected in (("one", "one"), (several, "plain"), (several[:1], None), (None, None)):
        tiny.edit_json(folder / "tokenizer_config.json", chat_template=template)
        assert hf.read(folder).chat_template == expected
    (folder / "chat_template.json").write_text('{"chat_template": "apart"}')
    assert hf.read(folder).chat_template == "apart"


def test_tokens_that_other_files_add(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    taken = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)[-2:]
    for token in taken:
        del tokenizer["model"]["vocab"][token]
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-2]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    same = hf.read(folder).tokenizer
    assert same == (folder / "tokenizer.json").read_bytes()
    tiny.edit_json(
        folder / "tokenizer_config.json", added_tokens_decoder={"318": {"content": "<|a|>", "special": True}}
    )
    (folder / "added_tokens.json").write_text('{"<|b|>": 319, "<|a|>": 318}')
    made = tokenizers.Tokenizer.from_buffer(hf.read(folder).tokenizer)
    assert made.encode("<|b|><|a|>").ids == [319, 318] and made.get_vocab_size() == 320
    assert made.decode([319, 318], skip_special_tokens=True) == ""
    (folder / "added_tokens.json").write_text('{"<|b|>": 317, "<|endoftext|>": 7}')
    with pytest.raises(ValueError, match=r"'<\|endoftext\|>' has the id 0, but 7"):
        hf.read(folder)


@pytest.mark.parametrize("told", [None, True, False])
def test_a_sentencepiece_model(told, folder, monkeypatch):
    """Where there is no tokenizer.json, the settings say whether a text begins with bos_token; the default is yes."""
    seen = []
    tokenizer = (folder / "tokenizer.json").read_bytes()
    monkeypatch.setattr(vocabulary, "from_sentencepiece", lambda data: seen.append(data) or tokenizer)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"pieces")
    tiny.edit_json(folder / "tokenizer_config.json", add_bos_token=told, bos_token="<|endoftext|>")
    read = hf.read(folder)
    assert seen == [b"pieces"] and read.tokenizer == tokenizer
    assert read.config.bos_token == (None if told is False else 0)


def test_a_rank_file_of_llama3(folder):
    (folder / "tokenizer.json").unlink()
    ranks = [base64.b64encode(bytes([i])).decode() + f" {i}" for i in range(256)]
    (folder / "tokenizer.model").write_text("\n".join(ranks) + "\n")
    tiny.edit_json(folder / "config.json", vocab_size=512, bos_token_id=256)
    path = folder / "model.safetensors"
    stored = tiny.read_safetensors(path)
    stored["model.embed_tokens.weight"] = ("BF16", [512, 48], bytes(512 * 96))
    tiny.write_safetensors(path, stored)
    read = hf.read(folder)
    made = tokenizers.Tokenizer.from_buffer(read.tokenizer)
    assert made.encode("<|begin_of_text|>hi").ids == [256, 104, 105] and read.config.bos_token == 256


def test_older_tokenizers(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"] | {"<|endoftext|>": 0}))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    made = tokenizers.Tokenizer.from_buffer(hf.read(folder).tokenizer)
    expected = tokenizers.Tokenizer.from_buffer(tiny.tokenizer_json())
    for text in ("Once upon a time", "She had a red ball", "<|endoftext|>"):
        assert made.encode(text).ids == expected.encode(text).ids

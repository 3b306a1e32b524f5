"""Hostile Hugging Face folders: each is refused in one clear line. Kind: exact (the refusal, by its words).

Every folder is a valid one with one thing wrong.
"""

import json
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from onebit.checkpoint import quantize
from onebit.formats import hf
from onebit.formats.hf import export

Edit = Callable[[Path], Any]
Q = "model.layers.0.self_attn.q_proj.weight"
SCALE = f"{Q}_scale"
NORM = "model.norm.weight"
MODEL = "model.safetensors"
INDEX = f"{MODEL}.index.json"

# What hardly a field expects.
ODD = [
    None, True, False, 0, -1, 1, 7, 2**24, 2**63, 10**400, 0.5, -0.0, 1e300, 1e-320, "", "x", "\n\u202e", "9" * 5000,
    [], [[]], [1], ["x"] * 9999, {}, {"a": {"b": 1}}, [[[[[[1]]]]]],
]  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "model"
    master = tiny.bf16_exact(tiny.master(tiny.BITNET, chat_template=tiny.CHAT_TEMPLATE))
    hf.write(quantize(master, head="bf16"), path, "packed")
    return path


@pytest.fixture
def sharded(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(export, "SHARD_BYTES", 60_000)
    path = tmp_path / "model"
    hf.write(tiny.bf16_exact(tiny.master(tiny.BITNET)), path, "dense")
    return path


def refusal(folder: Path) -> str:
    """The one line with which a model is refused, at once or when its weights are read."""
    hf.is_model(folder)
    with pytest.raises((ValueError, OSError)) as caught:
        quantize(hf.read(folder))
    message = str(caught.value)
    assert "\n" not in message and message.isprintable() and len(message) < 450 + len(str(folder))
    assert message.count(str(folder)) == 1
    return message


def survives(folder: Path) -> None:
    """Nothing but a refusal or a model comes of it."""
    try:
        quantize(hf.read(folder))
    except (ValueError, OSError):
        refusal(folder)


def config(**changes: Any) -> Edit:
    return lambda folder: tiny.edit_json(folder / "config.json", **changes)


def quantization(**changes: Any) -> Edit:
    def edit(folder: Path) -> None:
        table = json.loads((folder / "config.json").read_text())["quantization_config"]
        tiny.edit_json(folder / "config.json", quantization_config=table | changes)

    return edit


def text(name: str, contents: str | bytes) -> Edit:
    raw = contents if isinstance(contents, bytes) else contents.encode()
    return lambda folder: (folder / name).write_bytes(raw)


def fields(name: str, **changes: Any) -> Edit:
    return lambda folder: tiny.edit_json(folder / name, **changes)


def tensor(name: str, dtype=None, shape=None, raw=None) -> Edit:
    """Another dtype, shape or contents."""

    def edit(folder: Path) -> None:
        tensors = tiny.read_safetensors(folder / MODEL)
        old = tensors.get(name, ("F32", [1], bytes(4)))
        tensors[name] = (dtype or old[0], old[1] if shape is None else shape, old[2] if raw is None else raw)
        tiny.write_safetensors(folder / MODEL, tensors)

    return edit


def without(*names: str) -> Edit:
    def edit(folder: Path) -> None:
        tensors = tiny.read_safetensors(folder / MODEL)
        tiny.write_safetensors(folder / MODEL, {n: t for n, t in tensors.items() if n not in names})

    return edit


def scale(value: float) -> Edit:
    return tensor(SCALE, "F32", [1], struct.pack("<f", value))


def byte(name: str, at: int, value: int) -> Edit:
    def edit(folder: Path) -> None:
        dtype, shape, raw = tiny.read_safetensors(folder / MODEL)[name]
        tensor(name, dtype, shape, raw[:at] + bytes([value]) + raw[at + 1 :])(folder)

    return edit


def cut(name: str, n_bytes: int) -> Edit:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-n_bytes])


def as_pickle(name: str) -> Edit:
    return lambda folder: (folder / MODEL).rename(folder / name)


def looped(name: str) -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(name)

    return edit


NESTED = '{"a":' + "[" * 99999 + "]" * 99999 + "}"
HOSTILE: dict[str, tuple[Edit, str]] = {
    # config.json
    "config empty": (text("config.json", ""), "config is not valid JSON"),
    "config a list": (text("config.json", "[]"), "config is not a JSON object"),
    "config nested": (text("config.json", NESTED), "nested too deeply"),
    "config with NaN": (text("config.json", '{"rms_norm_eps": NaN}'), "NaN is no JSON number"),
    "config twice": (text("config.json", '{"a": 1, "a": 2}'), "'a' appears twice"),
    "config not UTF-8": (text("config.json", b"\xff"), "not UTF-8"),
    "config of long numbers": (text("config.json", '{"hidden_size": ' + "9" * 9999 + "}"), "not valid JSON"),
    "config a link to itself": (looped("config.json"), "Too many levels|symbolic"),
    "layers without end": (config(num_hidden_layers=2**24 - 1), "claims 16777215 layers"),
    "more layers": (config(num_hidden_layers=3), r"model.layers.2.* is missing"),
    "fewer layers": (config(num_hidden_layers=1), r"model.layers.1.* has no place in a bitnet of 1 layers"),
    "another width": (config(intermediate_size=96), r"ffn_sub_norm.weight is \[80\]; config.json asks for \[96\]"),
    "rows not in fours": (
        config(num_attention_heads=24, head_dim=2, num_key_value_heads=3),
        r"k_proj.weight is U8 \[6, 48\]; config.json asks for \[6, 48\]: rows in fours",
    ),
    "odd heads": (config(head_dim=11), "d_head 11 is odd"),
    "a base of infinity": (config(rope_theta=1e300), "rope_theta is 1e"),
    "rope with a bomb": (config(rope_scaling={"x" * 999: 1}), "rope_scaling holds 'xxx"),
    "rope with a list": (config(rope_scaling={"factor": [2] * 99}), "expected a number or a short word"),
    "another family": (config(model_type="llama", architectures=["LlamaForCausalLM"]), "has no place in a llama"),
    "untied without a head": (config(tie_word_embeddings=False), "lm_head.weight is missing.*not tied"),
    "no word of packing": (config(quantization_config=...), "is packed, but config.json does not say how"),
    "a scale taken for its inverse": (quantization(linear_class="bitlinear"), "set linear_class .*to autobitlin"),
    "eos outside": (config(eos_token_id=320), "eos_token_id is 320"),
    "eos of generation outside": (fields("generation_config.json", eos_token_id=[1, 999]), r"is \[1, 999\]"),
    "generation damaged": (text("generation_config.json", "{"), "generation_config.json: config is not valid"),
    # Weights
    "weights cut": (cut(MODEL, 1), "the file is truncated"),
    "weights empty": (text(MODEL, ""), "has 0 bytes"),
    "weights a pickle": (text(MODEL, b"\x80\x02}q\x00X\x04\x00" + bytes(99)), "this is a Python pickle"),
    "weights of another file": (text(MODEL, b"GGUF\x03\x00\x00\x00" + bytes(99)), "expected a safetensors file"),
    "weights nowhere": (lambda folder: (folder / MODEL).unlink(), "has no weights: expected model.safetensors"),
    "weights a loop": (looped(MODEL), "has no weights"),
    "pickle": (as_pickle("pytorch_model.bin"), "a pickle can run code, so onebit opens none.*save_pretrained"),
    "old pickle": (as_pickle("consolidated.00.pth"), "a pickle can run code"),
    "torch pickle": (as_pickle("model.pt"), "a pickle can run code"),
    "header nested": (
        text(MODEL, len(NESTED).to_bytes(8, "little") + NESTED.encode()),
        "nested too deeply",
    ),
    "tensor missing": (without(NORM), f"tensor {NORM} is missing"),
    "matrix missing": (without(Q, SCALE), f"tensor {Q} is missing"),
    "scale missing": (without(SCALE), f"tensor {SCALE} is missing"),
    "tensors unknown": (tensor("evil\u202e\n", "F32", [1]), r"1 tensors have no place.*'evil\\u202e\\n'"),
    "scale of nothing": (tensor("model.norm.weight_scale", "F32", [1]), "scales no packed weights"),
    "biases": (tensor("model.layers.0.self_attn.o_proj.bias", "F32", [48], bytes(192)), "o_proj.bias' has no"),
    "a matrix by two names": (
        tensor("model.layers.0.self_attn.inner_attn_ln.weight", "F32", [48], bytes(192)),
        "by another name",
    ),
    "one matrix not packed": (tensor(Q, "BF16", [48, 48], bytes(4608)), "is BF16, but .* is packed; onebit"),
    "packed in another shape": (tensor(Q, "U8", [48, 12]), rf"tensor {Q} is U8 \[48, 12\]"),
    "packed unpacked": (tensor(Q, "U8", [48, 48], bytes(2304)), r"is U8 \[48, 48\].*packed \[12, 48\]"),
    "packed signed": (tensor(Q, "I8"), "is I8, but .* is packed"),
    "norm of integers": (tensor(NORM, "I32", [48], bytes(192)), f"{NORM} is I32; expected F32, F16, BF16"),
    "norm of another size": (tensor(NORM, "F32", [12], bytes(48)), r"asks for \[48\]"),
    "eight-bit floats": (tensor(NORM, "F8_E4M3", [192]), "has dtype 'F8_E4M3'"),
    "code 3": (byte(Q, 50, 0b01110101), rf"tensor {Q} holds the code 3 at \[25, 2\]"),
    "code 3 in the top bits": (byte(Q, 50, 0b11010101), r"holds the code 3 at \[37, 2\]"),
    "scale NaN": (scale(float("nan")), f"tensor {SCALE} holds nan; expected a positive finite number"),
    "scale infinite": (scale(float("inf")), "expected a positive finite number"),
    "scale negative": (scale(-0.1), "expected a positive finite number"),
    "scale zero": (scale(0.0), "expected a positive finite number"),
    "scale of nearly zero": (scale(1e-45), "expected a positive finite number"),
    "scale for each row": (tensor(SCALE, "F32", [48], bytes(192)), r"is F32 \[48\]; expected one number"),
    "scale an integer": (tensor(SCALE, "I32", [1]), "is I32"),
    "norm NaN": (tensor(NORM, "F32", [48], b"\xff" * 192), f"tensor {NORM} holds NaN or infinity"),
    "embedding infinite": (
        tensor("model.embed_tokens.weight", "BF16", [320, 48], b"\x80\x7f" * 15360),
        "embed_tokens.weight holds NaN or infinity",
    ),
    # Tokenizers
    "tokenizer damaged": (text("tokenizer.json", "{"), "tokenizer.json: tokenizer is not valid JSON"),
    "tokenizer without words": (text("tokenizer.json", "{}"), "has no vocabulary"),
    "tokenizer with odd ids": (text("tokenizer.json", '{"model": {"vocab": {"a": 1.5}}}'), "no vocabulary"),
    "tokenizer too large": (
        text("tokenizer.json", '{"model": {"vocab": {"a": 0, "b\\n": 320}}}'),
        r"token 'b\\n' has the id 320, but the model's vocab_size is 320",
    ),
    "added token too large": (
        text("tokenizer.json", '{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 999, "content": "b"}]}'),
        "'b' has the id 999",
    ),
    "added tokens odd": (text("tokenizer.json", '{"model": {"vocab": {}}, "added_tokens": [7]}'), "added_tokens is"),
    "declared tokens odd": (fields("tokenizer_config.json", added_tokens_decoder=[1]), "expected a table"),
    "declared ids odd": (fields("tokenizer_config.json", added_tokens_decoder={"-1": {"content": "x"}}), "'-1'"),
    "declared with a gap": (
        fields("tokenizer_config.json", added_tokens_decoder={"9999": {"content": "<x>"}}),
        "expected no gap",
    ),
    "added tokens damaged": (text("added_tokens.json", "{"), "added_tokens.json: added tokens is not valid JSON"),
    "special tokens damaged": (text("special_tokens_map.json", "{"), "special_tokens_map.json: special tokens is not"),
    "settings damaged": (text("tokenizer_config.json", "{"), "tokenizer_config.json: settings is not valid JSON"),
    "added ids odd": (text("added_tokens.json", '{"x": "1"}'), "expected an id"),
    "template odd": (
        lambda folder: [
            (folder / "chat_template.jinja").unlink(),
            tiny.edit_json(folder / "tokenizer_config.json", chat_template=7),
        ],
        "chat_template is 7; expected a text",
    ),
    "template not UTF-8": (text("chat_template.jinja", b"\xff"), "not UTF-8"),
    "SentencePiece damaged": (
        lambda folder: [(folder / "tokenizer.json").unlink(), text("tokenizer.model", b"\xff" * 99)(folder)],
        "tokenizer.model: ",
    ),
    "tiktoken damaged": (
        lambda folder: [(folder / "tokenizer.json").unlink(), text("tokenizer.model", b"IQ== 0\n?")(folder)],
        "tokenizer.model: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_folder_is_refused_in_one_line(name, folder):
    edit, message = HOSTILE[name]
    edit(folder)
    assert re.search(message, refusal(folder))


def index(**weight_map: Any) -> Edit:
    """Other places of tensors: by their first three letters, of all."""

    def edit(folder: Path) -> None:
        table = json.loads((folder / INDEX).read_text())["weight_map"]
        tiny.edit_json(folder / INDEX, weight_map=table | weight_map)

    return edit


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def move_a_tensor(folder: Path) -> None:
    """The index has it elsewhere."""
    table = json.loads((folder / INDEX).read_text())["weight_map"]
    name = next(iter(table))
    tiny.edit_json(folder / INDEX, weight_map=table | {name: max(table.values())})


def repeat_a_tensor(folder: Path) -> None:
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    extra = next(iter(tiny.read_safetensors(first).items()))
    tiny.write_safetensors(second, tiny.read_safetensors(second) | dict([extra]))


SHARDED: dict[str, tuple[Edit, str]] = {
    "index damaged": (text(INDEX, "{"), "index is not valid JSON"),
    "index nested": (text(INDEX, NESTED), "nested too deeply"),
    "index without a map": (text(INDEX, "{}"), "weight_map is None; expected a table"),
    "map a list": (text(INDEX, '{"weight_map": []}'), "expected a table"),
    "map empty": (text(INDEX, '{"weight_map": {}}'), "expected a table"),
    "a path upwards": (index(x="../model.safetensors"), "expected the name of a .safetensors file"),
    "an absolute path": (index(x="/etc/x.safetensors"), "expected the name of a .safetensors file"),
    "a path of Windows": (index(x="..\\x.safetensors"), "expected the name"),
    "a stream of Windows": (index(x="c:x.safetensors"), "expected the name"),
    "the index itself": (index(x=INDEX), "expected the name"),
    "a pickle": (index(x="pytorch_model.bin"), "expected the name"),
    "a hidden file": (index(x=".x.safetensors"), "expected the name"),
    "a line break": (index(x="a\n.safetensors"), r"'a\\n.safetensors'; expected the name"),
    "no text": (index(x=7), "expected the name"),
    "a long name": (index(x="x" * 999 + ".safetensors"), "expected the name"),
    "a missing file": (index(x="model-00009-of-00009.safetensors"), "missing, first model-00009-of-00009"),
    "a file that went": (lambda folder: first_shard(folder).unlink(), "missing, first model-00001"),
    "a file that loops": (lambda folder: looped(first_shard(folder).name)(folder), "missing, first model-00001"),
    "a missing tensor": (lambda folder: index(x=first_shard(folder).name)(folder), "'x' is missing; .* has it here"),
    "a tensor elsewhere": (move_a_tensor, r"is missing; model.safetensors.index.json has it here"),
    "a tensor twice": (repeat_a_tensor, "is in model-00001-of-.* too; expected it once"),
    "a cut file": (lambda folder: cut(first_shard(folder).name, 9)(folder), "model-00001.*the file is truncated"),
    "files without end": (
        lambda folder: index(**{f"t{i}": f"{i}.safetensors" for i in range(5000)})(folder),
        "expected at most 4096",
    ),
    "no index": (lambda folder: (folder / INDEX).unlink(), "expected model.safetensors or .* found 'model-00001"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARDED)
def test_hostile_index_is_refused_in_one_line(name, sharded):
    quantize(hf.read(sharded))
    edit, message = SHARDED[name]
    edit(sharded)
    assert re.search(message, refusal(sharded))


def test_every_field_survives_every_value(folder):
    """Of config.json, its tables, and the files beside it."""
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        path = folder / name
        contents = path.read_text()
        values = json.loads(contents)
        extra = (
            "sliding_window", "layer_types", "rope_scaling", "head_dim", "attention_bias", "weight_bits", "num_experts",
            "is_bitnet_config", "original_max_position_embeddings", "partial_rotary_factor", "added_tokens_decoder",
            "add_bos_token", "bos_token", "chat_template", "compression_config",
        )  # fmt: skip
        for field in [*values, *extra]:
            for odd in ODD:
                write_json(path, values | {field: odd})
                survives(folder)
        for table in ("quantization_config", "rope_parameters"):
            for field in [*values.get(table, {}), "factor", "beta_fast", "type", "mscale", "use_rms_norm"]:
                for odd in ODD if table in values else []:
                    kind = {"rope_type": "yarn", "factor": 2.0} if table == "rope_parameters" else {}
                    write_json(path, values | {table: values[table] | kind | {field: odd}})
                    survives(folder)
        path.write_text(contents)
    quantize(hf.read(folder))


def write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values))


def test_every_truncation_survives(folder):
    drawn = random.Random(0)
    for path in sorted(folder.iterdir()):
        contents = path.read_bytes()
        for size in [0, 1, 8, *drawn.sample(range(len(contents)), min(12, len(contents)))]:
            path.write_bytes(contents[:size])
            survives(folder)
        path.write_bytes(contents)
    quantize(hf.read(folder))


def test_random_damage_survives(folder):
    drawn = random.Random(1)
    for path in sorted(folder.iterdir()):
        contents = path.read_bytes()
        limit = 8 + int.from_bytes(contents[:8], "little") if path.suffix == ".safetensors" else len(contents)
        for _ in range(40):
            damaged = bytearray(contents)
            for _ in range(drawn.choice([1, 1, 3, 20])):
                damaged[drawn.randrange(limit)] = drawn.choice(b'"{}[],:0159eE.-\x00\xff\\nxtf ')
            path.write_bytes(damaged)
            survives(folder)
        path.write_bytes(contents)

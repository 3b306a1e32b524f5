"""transformers reads the same files and says the same. Kind: oracle (its own forward passes).

Our cache rounds keys and values to bfloat16, so here theirs does too; all else is transformers' own code, in float32
unless said otherwise. Tolerances are root mean squares over logits whose standard deviation is about 1. Measured:

    dense                         at most 0.0002     a key or value at a tie of bfloat16 rounds the other way
    ternary, float32              at most 0.01       an activation at a tie of a8 rounds the other way
    ternary, bfloat16             about 0.03         transformers rounds every sum, activation and scale to bfloat16
    wrong scale, activation, ...  at least 0.39
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitNetConfig,
    BitNetForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.integrations.bitnet import pack_weights
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

import tiny
from onebit.checkpoint import Checkpoint, quantize, rows, to_dense
from onebit.formats import hf, names
from onebit.llm import LLM

DENSE, TERNARY, TERNARY_BF16, WRONG = 1e-3, 0.03, 0.06, 0.2
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 192,
    "bos_token_id": None,
    "eos_token_id": 0,
}
TOKENS = np.random.default_rng(0).integers(1, 320, 60).tolist()


@pytest.fixture(scope="module", autouse=True)
def quiet_and_eager():
    """Their kernels are compiled by a C++ compiler on first use: minutes."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    AttentionInterface.register("bf16_cache", bf16_cache)
    AttentionMaskInterface.register("bf16_cache", eager_mask)
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        yield


def bf16_cache(module, query, key, value, attention_mask, **kwargs):
    key, value = (x.to(torch.bfloat16).to(query.dtype) for x in (key, value))
    return eager_attention_forward(module, query, key, value, attention_mask, **kwargs)


def make(model_class, config_class, seed: int = 0, **changes):
    """A model of theirs with random weights that bfloat16 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    model = model_class(config_class(**SHAPE | changes)).eval()
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        value = noise * parameter.shape[1] ** -0.5 if noise.ndim == 2 else 1 + 0.1 * noise
        parameter.copy_(value.to(torch.bfloat16))
    return model


def load(folder: Path, dtype="auto"):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="bf16_cache")
    return model.eval()


def logits(model) -> np.ndarray:
    return model(torch.tensor([TOKENS])).logits[0].float().numpy()


def distance(checkpoint: Checkpoint, expected: np.ndarray) -> float:
    found = LLM(checkpoint, threads=1).logits(TOKENS)
    return float(np.sqrt(np.mean((found - expected) ** 2)))


def assert_same(folder: Path, tolerance: float, dtype=torch.float32) -> Checkpoint:
    """Logits within the tolerance, and the same greedy text."""
    model, checkpoint = load(folder, dtype), hf.read(folder)
    found = distance(checkpoint, logits(model))
    print(f"{folder.name}: {found:.1e} of {tolerance}")
    assert found < tolerance
    if dtype != torch.bfloat16:
        prompt = TOKENS[:16]
        theirs = model.generate(
            torch.tensor([prompt]), max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        ours = LLM(checkpoint, threads=1).generate(prompt, max_tokens=32, temperature=0, ignore_eos=True)
        assert ours.tokens == theirs[0, 16:].tolist()
    return checkpoint


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 6.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}


@pytest.mark.parametrize(
    ("model_class", "config_class", "changes"),
    [
        (LlamaForCausalLM, LlamaConfig, {}),
        (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True, "rms_norm_eps": 1e-2}),
        (LlamaForCausalLM, LlamaConfig, {"head_dim": 24, "rope_parameters": LLAMA3}),
        (LlamaForCausalLM, LlamaConfig, {"rope_parameters": YARN, "num_key_value_heads": 4}),
        (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LINEAR, "hidden_act": "relu2"}),
        (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True, "head_dim": 16}),
        (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
        (MistralForCausalLM, MistralConfig, {"sliding_window": None, "num_key_value_heads": 1}),
    ],
)
def test_dense_models(model_class, config_class, changes, tmp_path):
    make(model_class, config_class, **changes).to(torch.bfloat16).save_pretrained(tmp_path)
    checkpoint = assert_same(tmp_path, DENSE)
    assert checkpoint.label == "W16A16KV16"
    hf.write(checkpoint, tmp_path / "back", "dense")
    assert_same(tmp_path / "back", DENSE)
    assert weights(tmp_path / "back") == weights(tmp_path)


def weights(folder: Path) -> dict[str, bytes]:
    tensors = load_file(folder / "model.safetensors")
    return {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


def save_bitnet(model, folder: Path, linear_class: str | None, mode: str, dtype=torch.float32) -> Path:
    """Save a model of theirs as a BitNet: the master, or packed by their function."""
    model.config.save_pretrained(folder)
    tensors = {name: w.to(dtype) for name, w in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    if mode == "offline":
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            mean = tensors[name].float().abs().mean()
            codes = (tensors[name].float() / mean).round().clamp(-1, 1)
            scale = mean if linear_class == "autobitlinear" else 1 / mean
            tensors[name] = pack_weights(codes)
            tensors[f"{name}_scale"] = scale.reshape(1).to(dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    quantization = {
        "quant_method": "bitnet",
        "quantization_mode": mode,
        "modules_to_not_convert": ["lm_head"],
    }
    if linear_class:
        quantization["linear_class"] = linear_class
    tiny.edit_json(
        folder / "config.json", quantization_config=quantization, dtype=str(dtype).removeprefix("torch.")
    )
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("linear_class", "mode"),
    [("autobitlinear", "online"), ("autobitlinear", "offline"), ("bitlinear", "offline"), (None, "offline")],
)
@pytest.mark.parametrize(
    ("model_class", "config_class", "changes"),
    [
        (BitNetForCausalLM, BitNetConfig, {"tie_word_embeddings": True}),
        (LlamaForCausalLM, LlamaConfig, {"head_dim": 16}),
    ],
)
def test_bitnets(model_class, config_class, changes, linear_class, mode, dtype, tmp_path):
    """Also in bfloat16, as they are published: their scales are rounded then, and ours with them."""
    model = make(model_class, config_class, **changes)
    folder = save_bitnet(model, tmp_path / "theirs", linear_class, mode, dtype)
    tolerance = TERNARY if dtype == torch.float32 else TERNARY_BF16
    checkpoint = assert_same(folder, tolerance, dtype)
    assert checkpoint.label == "W1.58A8KV16H16"
    kind = "dense" if mode == "online" else "packed"
    hf.write(checkpoint, tmp_path / "back", kind)
    assert_same(tmp_path / "back", tolerance, dtype)
    again = hf.read(tmp_path / "back")
    for name, tensor in again.tensors.items():
        assert np.array_equal(rows(name, tensor), rows(name, checkpoint.tensors[name]))
    if linear_class == "autobitlinear" or dtype == torch.bfloat16:
        assert weights(tmp_path / "back") == weights(folder)


def test_a_wrong_reading_would_show(tmp_path):
    """Each of the mistakes that BitNets invite is far outside of the tolerance."""
    model = make(BitNetForCausalLM, BitNetConfig)
    folder = save_bitnet(model, tmp_path, "autobitlinear", "offline")
    expected, right = logits(load(folder)), hf.read(folder)
    inverse = {
        name: replace(t, codes=lambda t=t: (t.codes()[0], 1 / t.codes()[1]))
        if right.config.is_linear(name)
        else t
        for name, t in right.tensors.items()
    }
    no_sub_norms = {name: t for name, t in right.tensors.items() if "sub_norm" not in name}
    tensors = right.tensors
    swapped = tensors | {f"layers.0.{a}.weight": tensors[f"layers.0.{b}.weight"] for a, b in ("kv", "vk")}
    interleaved = {
        name: replace(t, codes=lambda t=t: (interleave(t.codes()[0]), t.codes()[1]))
        if right.config.is_linear(name)
        else t
        for name, t in tensors.items()
    }
    wrong = {
        "scale": replace(right, tensors=inverse),
        "activation": replace(right, config=replace(right.config, activation="silu")),
        "sub-norms": replace(right, config=replace(right.config, sub_norm=False), tensors=no_sub_norms),
        "keys for values": replace(right, tensors=swapped),
        "rope base": replace(right, config=replace(right.config, rope_theta=10.0)),
        "order of rows": replace(right, tensors=interleaved),
    }
    assert distance(right, expected) < TERNARY
    for mistake, checkpoint in wrong.items():
        found = distance(checkpoint, expected)
        print(f"{mistake}: {found:.2f}")
        assert found > WRONG, mistake


def interleave(codes: np.ndarray) -> np.ndarray:
    """Rows as if the four codes of a byte were neighbours."""
    n, k = codes.shape
    return np.ascontiguousarray(codes.reshape(4, n // 4, k).transpose(1, 0, 2)).reshape(n, k)


@pytest.mark.parametrize("activation", ["relu2", "silu"])
@pytest.mark.parametrize(("kind", "head"), [("dense", None), ("packed", "bf16"), ("packed", "q8")])
def test_models_of_ours(kind, head, activation, tmp_path):
    """Our masters, and our packed models with heads of bfloat16 or of 8 bits, run there as here."""
    config = replace(tiny.BITNET, tied_head=head != "q8", activation=activation)
    master = tiny.bf16_exact(tiny.master(config, chat_template=tiny.CHAT_TEMPLATE))
    checkpoint = quantize(master, head=head) if head else master
    hf.write(checkpoint, tmp_path, kind)
    model, ours = load(tmp_path), quantize(checkpoint, head=head or "bf16")
    # The 8-bit head rounds its input too, to 15 bits.
    assert distance(ours, logits(model)) < TERNARY
    assert model.dtype == torch.float32


def test_a_dense_copy_of_packed_codes(tmp_path):
    """Weights only: transformers runs the ternary weights and leaves activations alone."""
    packed = quantize(
        tiny.bf16_exact(tiny.master(tiny.config(sub_norm=False, activation="silu"))), head="bf16"
    )
    hf.write(packed, tmp_path, "dense")
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    model = load(tmp_path)
    assert distance(packed, logits(model)) < TERNARY
    for name in packed.config.tensor_shapes():
        theirs = model.state_dict()[names.to_hf(name)].numpy()
        assert np.array_equal(theirs, to_dense(packed.tensors[name])), name
    # Read again it is the same ternary model, to the code.
    again = quantize(hf.read(tmp_path))
    assert again.config.weights == "b1.58" and again.config.scale == "tensor"
    for name in packed.config.tensor_shapes():
        if packed.config.is_linear(name):
            assert np.array_equal(again.tensors[name].data, packed.tensors[name].data)
            assert np.array_equal(again.tensors[name].scale, packed.tensors[name].scale)


@pytest.mark.parametrize("bos", [None, 0])
def test_tokenizer(bos, tmp_path):
    config = replace(tiny.BITNET, bos_token=bos, eos_tokens=(0, 7))
    checkpoint = tiny.master(config, chat_template=tiny.CHAT_TEMPLATE)
    hf.write(checkpoint, tmp_path, "dense")
    theirs, read = AutoTokenizer.from_pretrained(tmp_path), hf.read(tmp_path)
    assert read.config == config and read.chat_template == tiny.CHAT_TEMPLATE
    ours = LLM(read, threads=1).tokenizer
    for text in ("Once upon a time", " two  spaces", "<|endoftext|>x", "naïve 日本"):
        assert theirs(text).input_ids == ours.encode(text)
    messages = [{"role": "user", "content": "Tell me a story"}]
    assert theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == ours.encode_chat(
        messages
    )
    assert theirs.eos_token_id == 0 and theirs.bos_token_id == bos
    assert load(tmp_path).generation_config.eos_token_id == [0, 7]

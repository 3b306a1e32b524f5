"""config.json of Hugging Face models, both ways. Kinds: exact (values, refusals), invariant (round trip)."""

from dataclasses import replace

import pytest

import tiny
from onebit.config import RopeScaling
from onebit.formats.hf import config_json

# What the config.json of each model says, without what no reader looks at.
BITNET_2B_4T = {
    "architectures": ["BitNetForCausalLM"],
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "relu2",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 4096,
    "model_type": "bitnet",
    "rms_norm_eps": 1e-05,
    "num_attention_heads": 20,
    "num_hidden_layers": 30,
    "num_key_value_heads": 5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
    "quantization_config": {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "offline",
    },
}
BITNET_3B = {
    "architectures": ["BitnetForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 3200,
    "input_bits": 8,
    "intermediate_size": 8640,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 26,
    "num_key_value_heads": 32,
    "pad_token_id": 32000,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float16",
    "vocab_size": 32002,
    "weight_bits": 1,
}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "bos_token_id": 151643,
    "eos_token_id": [151645, 151643],
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def test_bitnet_2b_4t():
    found = config_json.parse(BITNET_2B_4T)
    config = found.config
    assert (found.model_type, found.meaning, found.is_master) == ("bitnet", "multiplies", True)
    assert (config.d_model, config.d_ff, config.n_layers, config.n_heads, config.n_kv_heads) == (
        2560,
        6912,
        30,
        20,
        5,
    )
    assert (config.d_head, config.activation, config.sub_norm, config.tied_head) == (128, "relu2", True, True)
    assert (config.rope_theta, config.norm_eps, config.eos_tokens) == (500000.0, 1e-5, (128001,))


def test_the_first_bitnets():
    found = config_json.parse(BITNET_3B)
    assert (found.model_type, found.meaning, found.is_master) == ("bitnet", None, True)
    config = found.config
    assert (config.activation, config.sub_norm, config.d_head, config.tied_head) == ("silu", True, 100, True)


def test_qwen2():
    config = config_json.parse(QWEN2).config
    assert (config.qkv_bias, config.qk_norm, config.sub_norm, config.d_head) == (True, False, False, 64)
    assert config.eos_tokens == (151645, 151643)


def test_what_is_not_said_is_what_transformers_takes():
    config = config_json.parse(LLAMA).config
    assert (config.n_kv_heads, config.d_head, config.rope_theta, config.norm_eps) == (4, 64, 10000.0, 1e-6)
    assert (config.activation, config.tied_head, config.max_seq_len) == ("silu", False, 2048)
    assert (config.bos_token, config.eos_tokens, config.rope_scaling) == (None, (), None)
    bitnet = config_json.parse(LLAMA | {"architectures": None, "model_type": "bitnet"}).config
    assert (bitnet.rope_theta, bitnet.norm_eps, bitnet.activation) == (500000.0, 1e-5, "relu2")
    qwen3 = config_json.parse(LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}).config
    assert (qwen3.d_head, qwen3.qk_norm) == (128, True)
    mistral = LLAMA | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": None,
    }
    assert config_json.parse(mistral).config.max_seq_len == 131072


@pytest.mark.parametrize(
    ("changes", "theta", "scaling"),
    [
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 1e4, RopeScaling("linear", 2.0)),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}, "rope_theta": 7.0},
            5e5,
            RopeScaling("linear", 2.0),
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": None}},
            5e5,
            RopeScaling("yarn", 4.0, 2048),
        ),
        (
            {
                "rope_scaling": {"rope_type": "llama3", "factor": 8, "original_max_position_embeddings": 64},
                "original_max_position_embeddings": 32,
            },
            1e4,
            RopeScaling("llama3", 8, 32),
        ),
        (
            {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 512}},
            1e4,
            RopeScaling("yarn", 4.0, 512),
        ),
    ],
)
def test_rope_in_both_spellings(changes, theta, scaling):
    config = config_json.parse(LLAMA | changes).config
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("quantization", "meaning"),
    [
        ({"quant_method": "bitnet"}, "divides"),
        ({"quant_method": "bitnet", "linear_class": "bitlinear"}, "divides"),
        ({"quant_method": "bitnet", "linear_class": "autobitlinear"}, "multiplies"),
        ({"quant_method": "bitnet", "modules_to_not_convert": ["lm_head", "model.norm"]}, "divides"),
    ],
)
def test_what_the_scale_means(quantization, meaning):
    found = config_json.parse(LLAMA | {"quantization_config": quantization})
    assert (found.meaning, found.is_master) == (meaning, True)


def test_masters_are_told():
    assert config_json.parse(LLAMA | {"is_bitnet_config": True}).is_master
    assert config_json.parse(LLAMA | {"weight_bits": 1, "input_bits": 8}).is_master
    assert not config_json.parse(LLAMA).is_master


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "qwen3_moe"}, "'qwen3_moe', a kind of model that does not run here; onebit reads bitnet"),
        ({"model_type": "gemma2"}, "gemma2"),
        ({"model_type": None}, "model_type is None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "expected LlamaForCausalLM"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"use_sliding_window": True, "sliding_window": 64}, "see the whole text"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "full_attention in every layer"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "rotates whole heads"),
        ({"num_local_experts": 8}, "mixtures of experts"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; expected silu or relu2"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic positions"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "positions that differ by layer"),
        ({"weight_bits": 1, "input_bits": 4}, "expected 1 and 8"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantization is"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quant_method is 'gptq'; onebit reads bitnet"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization_config": {"load_in_4bit": True}}, "quant_method is None"),
        ({"quantization_config": {"quant_method": "bitnet", "use_rms_norm": True}}, "use_rms_norm is true"),
        ({"quantization_config": {"quant_method": "bitnet", "linear_class": "x"}}, "linear_class is 'x'"),
        ({"quantization_config": {"quant_method": "bitnet", "quantization_mode": "x"}}, "quantization_mode"),
        (
            {"quantization_config": {"quant_method": "bitnet", "modules_to_not_convert": ["model.layers.0.mlp"]}},
            "needs all seven linear layers",
        ),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"eos_token_id": 1000}, "eos_token_id is 1000; expected token ids below the vocab_size of 1000"),
    ],
)  # fmt: skip
def test_what_does_not_run_is_refused_by_name(changes, words):
    with pytest.raises(ValueError) as caught:
        config_json.parse(LLAMA | changes)
    assert words in str(caught.value)


def test_a_window_of_mistral_is_refused():
    mistral = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    assert config_json.parse(mistral).model_type == "mistral"
    with pytest.raises(ValueError, match="sliding_window is 4096 and in use"):
        config_json.parse(mistral | {"sliding_window": 4096})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_head": False, "bos_token": 3, "eos_tokens": (0, 7), "activation": "silu"},
        {"sub_norm": False, "d_head": 20},
        {"sub_norm": False, "qkv_bias": True, "rope_scaling": RopeScaling("linear", 2.0)},
        {"sub_norm": False, "qk_norm": True, "d_head": 20, "norm_eps": 1e-3},
        {
            "sub_norm": False,
            "rope_scaling": RopeScaling("yarn", 4.0, 64, truncate=False, attention_factor=1.5),
        },
        {"rope_scaling": RopeScaling("llama3", 8.0, 64, low_freq_factor=2.0), "rope_theta": 77.0},
    ],
)
def test_what_is_written_is_read(changes):
    config = replace(tiny.BITNET, weights="dense", activations="none", **changes)
    assert config_json.parse(config_json.build(config, "float32", None)).config == config


def test_what_no_class_of_transformers_has():
    with pytest.raises(ValueError, match="4 heads of 16 are 64 wide, the model 48"):
        config_json.build(tiny.CONFIG, "float32", None)
    with pytest.raises(ValueError, match="no multiple of the 5 heads"):
        config_json.build(tiny.config(n_heads=5, n_kv_heads=5, sub_norm=False), "float32", None)
    with pytest.raises(ValueError, match="no other program has a model with these together"):
        config_json.build(tiny.config(qk_norm=True), "float32", None)
    with pytest.raises(ValueError, match="no other program rotates the inputs"):
        config_json.build(tiny.config(hadamard=True, d_ff=64), "float32", None)

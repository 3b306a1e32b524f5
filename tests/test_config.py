"""ModelConfig. Kinds: exact (shapes, labels, refusals), invariant (JSON round trip)."""

import json

import pytest

import tiny
from onebit.config import ModelConfig, RopeScaling


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({}, "W1.58A8KV16"),
        ({"activations": "a4"}, "W1.58A4KV16"),
        ({"activations": "a15"}, "W1.58A15KV16"),
        ({"weights": "b1", "activations": "a1"}, "W1A1KV16"),
        ({"weights": "dense", "activations": "none"}, "W16A16KV16"),
        ({"layer_weights": ("b1.58", "b1")}, "W1.29A8KV16"),
        ({"n_layers": 12, "layer_weights": ("b1.58", *["b1"] * 11)}, "W1.05A8KV16"),
    ],
)
def test_label_names_every_width(changes, label):
    assert tiny.config(**changes).label == label


def test_tensor_shapes_of_a_block():
    shapes = tiny.config(n_layers=1).tensor_shapes()
    assert shapes == {
        "embed.weight": (320, 48),
        "layers.0.attn_norm.weight": (48,),
        "layers.0.ffn_norm.weight": (48,),
        "layers.0.attn_sub_norm.weight": (64,),
        "layers.0.ffn_sub_norm.weight": (80,),
        "layers.0.q.weight": (64, 48),
        "layers.0.k.weight": (32, 48),
        "layers.0.v.weight": (32, 48),
        "layers.0.o.weight": (48, 64),
        "layers.0.gate.weight": (80, 48),
        "layers.0.up.weight": (80, 48),
        "layers.0.down.weight": (48, 80),
        "norm.weight": (48,),
    }


def test_flags_add_and_remove_tensors():
    shapes = tiny.config(sub_norm=False, tied_head=False).tensor_shapes()
    assert shapes["head.weight"] == (320, 48) and not any("sub_norm" in name for name in shapes)


def test_linear_layers_are_told_from_the_rest():
    config = tiny.config(n_layers=1, tied_head=False)
    linear = [name for name in config.tensor_shapes() if config.is_linear(name)]
    assert linear == [f"layers.0.{name}.weight" for name in ("q", "k", "v", "o", "gate", "up", "down")]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scale": "row"},
        {"scale": 16},
        {"weights": "b1", "layer_weights": ("b1.58", "b1")},
        {"eos_tokens": (1, 2), "bos_token": 3},
        {"rope_scaling": RopeScaling("yarn", 4.0, 48, attention_factor=1.1)},
    ],
)
def test_json_round_trip(changes):
    config = tiny.config(**changes)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 0}, "d_model is 0; expected a whole number"),
        ({"d_model": 2**24}, "d_model is 16777216"),
        ({"n_layers": 2.0}, "n_layers is 2.0"),
        ({"n_layers": True}, "n_layers is True"),
        ({"vocab_size": "320"}, "vocab_size is '320'"),
        ({"n_kv_heads": 3}, "n_kv_heads 3 does not divide n_heads 4"),
        ({"d_head": 15}, "d_head 15 is odd"),
        ({"activation": "gelu"}, "activation is 'gelu'; expected one of silu, relu2"),
        ({"weights": ["b1"]}, "expected one of b1.58, b1, dense"),
        ({"activations": "a2"}, "expected one of a15, a8, a4.8, a4, a1, none"),
        ({"layer_weights": ("b1.58", "b2")}, "expected b1.58 or b1 for each layer"),
        ({"layer_weights": ("dense", "b1")}, "dense layers do not mix with others, whose inputs are rounded"),
        ({"layer_weights": (["b1"], "b1.58")}, "expected b1.58 or b1 for each layer"),
        ({"layer_weights": ["b1", "b1.58"]}, "expected b1.58 or b1 for each layer"),
        ({"layer_weights": ("b1", "b1.58", "b1")}, "has 3 schemes; expected one for each of 2 layers"),
        ({"layer_weights": ("b1", "b1")}, "all of layer_weights are b1; expected two schemes, or weights b1"),
        (
            {"layer_weights": ("b1", "b1.58"), "weights": "dense", "activations": "none"},
            "layer_weights with weights dense; expected weights b1.58 or b1",
        ),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"rope_theta": 10**400}, "expected a positive number"),
        ({"rope_theta": 0.5}, "rope_theta is 0.5; expected at least 1"),
        ({"norm_eps": 0}, "norm_eps is 0"),
        ({"norm_eps": True}, "norm_eps is True"),
        ({"sub_norm": 1}, "sub_norm is 1; expected true or false"),
        ({"weights": "dense"}, "dense weights go with activations none"),
        ({"activations": "none"}, "dense weights go with activations none"),
        ({"scale": 24}, "multiple of 16"),
        ({"scale": "column"}, "multiple of 16"),
        ({"scale": 64}, "scale group 64 does not divide the 48 inputs of q"),
        ({"eos_tokens": (320,)}, "special token 320 is outside the vocabulary of 320"),
        ({"bos_token": -1}, "special token -1"),
        ({"eos_tokens": (1.0,)}, "special token 1.0"),
    ],
)
def test_impossible_values_are_refused(changes, message):
    with pytest.raises(ValueError, match=message.replace("^", r"\^")):
        tiny.config(**changes)


def test_unknown_and_missing_fields_are_named():
    values = tiny.CONFIG.to_dict()
    with pytest.raises(ValueError, match="unknown field 'd_modle'; did you mean d_model"):
        ModelConfig.from_dict(values | {"d_modle": 3})
    del values["d_ff"], values["n_heads"]
    with pytest.raises(ValueError, match="n_heads, d_ff missing"):
        ModelConfig.from_dict(values)
    with pytest.raises(ValueError, match="eos_tokens is 5; expected a list"):
        ModelConfig.from_dict(tiny.CONFIG.to_dict() | {"eos_tokens": 5})
    with pytest.raises(ValueError, match="layer_weights is 'b1'; expected a list of schemes"):
        ModelConfig.from_dict(tiny.CONFIG.to_dict() | {"layer_weights": "b1"})


# theta, d_head, rope_scaling as in config.json; its attention factor and 8 of its frequencies, evenly spread, by
# transformers 5.23.0: ROPE_INIT_FUNCTIONS[type](LlamaConfig(head_dim=d_head, rope_parameters=...), "cpu").
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
MSCALE = YARN | {
    "rope_type": "yarn",
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "mscale": 1.0,
    "mscale_all_dim": 0.707,
}
OPEN = YARN | {"factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
NARROW = YARN | {"factor": 2.0, "original_max_position_embeddings": 256, "attention_factor": 1.5}
TRANSFORMERS = [
    (1e4, 16, {"type": "linear", "factor": 4.0}, 1.0,
     [0.25, 0.07905694, 0.025, 0.007905695, 0.0025, 0.0007905695, 0.00025, 7.905695e-05]),
    (5e5, 64, LLAMA3, 1.0,
     [1.0, 0.1939228, 0.03760603, 0.007292665, 0.000524846, 3.428102e-05, 6.64787e-06, 1.289173e-06]),
    (5e5, 64, LLAMA3 | {"factor": 32.0}, 1.0,
     [1.0, 0.1939228, 0.03760603, 0.007292665, 0.0004295567, 8.570256e-06, 1.661967e-06, 3.222933e-07]),
    (1e6, 64, YARN, 1.138629436111989,
     [1.0, 0.1778279, 0.03162278, 0.005154795, 0.0005833334, 4.445699e-05, 7.905694e-06, 1.405853e-06]),
    (1e4, 64, MSCALE, 1.0857263992561355,
     [1.0, 0.3162278, 0.1, 0.02687936, 0.0055, 0.0007905694, 2.5e-05, 7.905694e-06]),
    (1.5e5, 64, OPEN, 1.3465735902799727,
     [1.0, 0.225418, 0.05081327, 0.006794959, 0.0004564839, 1.818834e-05, 4.099978e-06, 9.24209e-07]),
    (1e1, 16, NARROW, 1.5,
     [1.0, 0.7210521, 0.5190843, 0.3730392, 0.2675774, 0.191534, 0.1367907, 0.09744965]),
]  # fmt: skip


@pytest.mark.parametrize(("theta", "d_head", "scaling", "factor", "frequencies"), TRANSFORMERS)
def test_scaled_positions_are_those_of_transformers(theta, d_head, scaling, factor, frequencies):
    values = tiny.CONFIG.to_dict() | {"rope_theta": theta, "d_head": d_head, "rope_scaling": scaling}
    config = ModelConfig.from_dict(values)
    ours = config.rope_frequencies()
    assert len(ours) == d_head // 2
    assert ours[:: max(1, d_head // 16)] == pytest.approx(frequencies, rel=5e-7)
    assert config.rope_attention_factor == pytest.approx(factor, rel=1e-15)
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_a_config_without_scaling_does_not_mention_it():
    assert "rope_scaling" not in tiny.CONFIG.to_dict()
    for scaling in (None, {"rope_type": "default"}):
        assert ModelConfig.from_dict(tiny.CONFIG.to_dict() | {"rope_scaling": scaling}) == tiny.CONFIG


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"type": "dynamic", "factor": 2.0}, "dynamic positions depend on how long a text becomes"),
        ({"rope_type": "longrope", "short_factor": [1.0]}, "longrope changes all positions"),
        ({"rope_type": "su", "factor": 2.0}, "rope_type is 'su'; expected one of linear, llama3, yarn"),
        ({"factor": 2.0}, "rope_type is None"),
        ({"rope_type": ["yarn"], "factor": 2.0}, "expected one of linear, llama3, yarn"),
        ({"type": "linear"}, "factor is missing"),
        ({"type": "linear", "factor": 0.5}, "factor is 0.5; expected at least 1"),
        ({"type": "linear", "factor": True}, "factor is True; expected a positive number"),
        ({"type": "linear", "factor": float("nan")}, "factor is nan"),
        ({"type": "linear", "factor": 2.0, "beta": 1}, "unknown field 'beta'"),
        ({"type": "yarn", "factor": 2.0}, "original_max_position_embeddings is None; yarn needs"),
        (YARN | {"beta_fast": 1.0}, "expected low_freq_factor < high_freq_factor and beta_slow < beta_fast"),
        (YARN | {"truncate": 1}, "truncate is 1; expected true or false"),
        (YARN | {"attention_factor": 0}, "attention_factor is 0; expected a positive number"),
        (YARN | {"mscale": "x", "mscale_all_dim": 1}, "expected mscale and mscale_all_dim to be numbers"),
        (LLAMA3 | {"original_max_position_embeddings": 8192.0}, "original_max_position_embeddings is 8192.0"),
        ("yarn", "rope_scaling is 'yarn'; expected a table"),
    ],
)
def test_scalings_that_cannot_be_served_are_refused(scaling, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict(tiny.CONFIG.to_dict() | {"rope_scaling": scaling})


def test_each_block_has_the_scheme_of_its_place():
    table = ("b1", "b1.58", "b1", "b1.58", *["b1"] * 7)
    config = tiny.config(n_layers=11, layer_weights=table)
    assert [config.weights_of(f"layers.{i}.q.weight") for i in range(11)] == list(table)
    assert config.weights_of("embed.weight") == "b1.58"
    assert tiny.config(weights="b1").weights_of("layers.1.up.weight") == "b1"
    assert "layer_weights" not in tiny.CONFIG.to_dict()


def test_rotated_inputs_need_powers_of_two_and_are_written_only_where_they_are():
    config = tiny.config(hadamard=True, d_ff=64)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    # Configs of models without them stay as they were.
    assert "hadamard" not in tiny.CONFIG.to_dict()
    with pytest.raises(ValueError, match="hadamard with 80 inputs of down; expected a power of two"):
        tiny.config(hadamard=True)
    with pytest.raises(ValueError, match="hadamard is 1; expected true or false"):
        tiny.config(hadamard=1)


def test_inputs_of_a4_8_differ_by_layer():
    config = tiny.config(activations="a4.8")
    kinds = {name: config.input_quantizer(name) for name in config.linear_shapes()}
    assert kinds == dict.fromkeys(kinds, "a4") | {"o": "a8-half", "down": "a8"}
    assert config.label == "W1.58A4.8KV16"
    assert {tiny.CONFIG.input_quantizer(name) for name in kinds} == {"a8"}

"""ModelConfig. Kinds: exact (shapes, labels, refusals), invariant (JSON round trip)."""

import json

import pytest

import tiny
from onebit.config import ModelConfig


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({}, "W1.58A8KV16"),
        ({"activations": "a4"}, "W1.58A4KV16"),
        ({"weights": "b1", "activations": "a1"}, "W1A1KV16"),
        ({"weights": "dense", "activations": "none"}, "W16A16KV16"),
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
    "changes", [{}, {"scale": "row"}, {"scale": 16}, {"eos_tokens": (1, 2), "bos_token": 3}]
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
        ({"activations": "a2"}, "expected one of a8, a4, a1, none"),
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

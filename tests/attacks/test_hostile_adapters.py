"""Invariant: whatever is in an adapter's folder, reading it gives an adapter that fits, or a ValueError."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny
from onebit.formats import adapter as adapters

CONFIG = tiny.config()
Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.fixture
def folder(tmp_path):
    adapters.write(tiny.adapter(rank=3), tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"peft_type": "LOHA"}, "peft_type"),
        ({"peft_type": ...}, "peft_type"),
        ({"r": 0}, "r is 0"),
        ({"r": True}, "r is True"),
        ({"r": 4}, "expected \\[4, in\\]"),
        ({"r": 10**30}, "r is"),
        ({"r": ...}, "r is None"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"lora_alpha": -1}, "lora_alpha"),
        ({"lora_alpha": 1e300}, "lora_alpha"),
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"something_new": {"x": 1}}, "something_new"),
    ],
)
def test_configs_that_say_something_else_are_refused(folder, changes, problem):
    tiny.edit_json(folder / adapters.CONFIG, **changes)
    with pytest.raises(ValueError, match=problem):
        adapters.read(folder, CONFIG)


def test_fields_that_are_empty_or_of_the_tools_do_no_harm(folder):
    tiny.edit_json(
        folder / adapters.CONFIG, something_new=None, use_dora=False, rank_pattern={}, peft_version="9"
    )
    assert adapters.read(folder, CONFIG).rank == 3


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{", b'{"r": NaN}', b'{"r": 3, "r": 3}', b"\xff", b"[" * 10**5]
)
def test_damaged_configs_are_refused(folder, text):
    (folder / adapters.CONFIG).write_bytes(text)
    with pytest.raises(ValueError, match=adapters.CONFIG):
        adapters.read(folder, CONFIG)


def test_a_config_of_any_size_is_not_read_whole(folder):
    (folder / adapters.CONFIG).write_bytes(b"{" + b" " * (1 << 20))
    with pytest.raises(ValueError, match="larger than"):
        adapters.read(folder, CONFIG)


def edited(old, **changes):
    """A tensor renamed, reshaped, retyped, removed."""

    def edit(tensors):
        dtype, shape, raw = tensors.pop(old)
        if changes:
            new = changes.get("name", old)
            tensors[new] = (changes.get("dtype", dtype), changes.get("shape", shape), changes.get("raw", raw))

    return edit


NAN = np.full(3 * 48, 0x7FC0, "<u2").tobytes()
HUGE = np.full(3 * 48, 0x7F7F, "<u2").tobytes()


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (edited(Q.format("A")), "lora_B is there alone"),
        (edited(Q.format("A"), name="x"), "expected base_model"),
        (edited(Q.format("A"), name=Q.format("C")), "expected base_model"),
        (edited(Q.format("A"), name=Q.format("A").replace("layers.0", "layers.2")), "no linear layer"),
        (edited(Q.format("A"), name=Q.format("A").replace("layers.0", "layers.-1")), "expected base_model"),
        (
            edited(Q.format("A"), name=Q.format("A").replace("layers.0", "layers.99999999")),
            "expected base_model",
        ),
        (edited(Q.format("A"), name=Q.format("A").replace("q_proj", "q_norm")), "no linear layer"),
        (edited(Q.format("A"), name="base_model.model.lm_head.lora_A.weight"), "no linear layer"),
        (
            lambda tensors: tensors.update({Q.format("A").replace(".0", ".00"): tensors[Q.format("A")]}),
            "twice",
        ),
        (edited(Q.format("A"), shape=[48, 3]), "expected"),
        (edited(Q.format("A"), shape=[144]), "expected a matrix"),
        (edited(Q.format("A"), shape=[3, 48, 0], raw=b""), "expected a matrix"),
        (edited(Q.format("A"), dtype="I16"), "dtype"),
        (edited(Q.format("A"), raw=NAN), "NaN"),
        (edited(Q.format("A"), raw=HUGE), "2\\^127"),
        (lambda tensors: tensors.clear(), "changes no layer"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(folder, edit, problem):
    tensors = tiny.read_safetensors(folder / adapters.MODEL)
    edit(tensors)
    tiny.write_safetensors(folder / adapters.MODEL, tensors)
    with pytest.raises(ValueError, match=problem):
        adapters.read(folder, CONFIG)


def test_a_pickle_is_not_opened(folder):
    (folder / adapters.MODEL).rename(folder / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="a pickle can run code"):
        adapters.read(folder, CONFIG)
    (folder / adapters.CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match="holds no adapter_config.json"):
        adapters.read(folder, CONFIG)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_bytes_give_an_adapter_or_an_error(folder, data):
    """A few bytes of either file changed, or its end cut."""
    adapters.write(tiny.adapter(rank=3, targets=("q",)), folder)
    path = folder / data.draw(st.sampled_from([adapters.CONFIG, adapters.MODEL]))
    contents = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        # Mostly the header: the rest is numbers.
        contents[data.draw(st.integers(0, min(len(contents), 600) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(contents[: data.draw(st.integers(len(contents) // 2, len(contents)))])
    try:
        found = adapters.read(folder, CONFIG)
    except ValueError as error:
        assert str(folder) in str(error) and "\n" not in str(error)
    else:
        found.check(CONFIG)
        assert json.dumps(found.alpha)

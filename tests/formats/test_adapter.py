"""Exact, oracle: adapters are written and read again, and PEFT reads and writes the same folders."""

import json
from dataclasses import replace

import numpy as np
import pytest

import tiny
from onebit.formats import adapter as adapters
from onebit.formats.adapter import Adapter

CONFIG = tiny.config()


def same(one: Adapter, other: Adapter) -> bool:
    arrays = [[w.tobytes() for pair in a.tensors.values() for w in pair] for a in (one, other)]
    return list(one.tensors) == list(other.tensors) and arrays[0] == arrays[1] and one.scale == other.scale


@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize("targets", [adapters.TARGETS, ("q", "v")])
def test_what_is_written_is_read(short, targets, tmp_path):
    adapter = tiny.adapter(rank=3, targets=targets, short=short)
    adapters.write(adapter, tmp_path / "a", base="some.onebit")
    assert same(adapters.read(tmp_path / "a", CONFIG), adapter)
    found = tiny.read_safetensors(tmp_path / "a" / adapters.MODEL)
    assert {dtype for dtype, _, _ in found.values()} == {"BF16" if short else "F32"}
    assert "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight" in found


def test_names_and_shapes_are_those_of_peft(tmp_path):
    adapters.write(tiny.adapter(rank=3), tmp_path)
    shapes = {name: shape for name, (_, shape, _) in tiny.read_safetensors(tmp_path / adapters.MODEL).items()}
    for i in range(2):
        prefix = f"base_model.model.model.layers.{i}."
        assert shapes[prefix + "self_attn.q_proj.lora_A.weight"] == [3, 48]
        assert shapes[prefix + "self_attn.k_proj.lora_B.weight"] == [32, 3]
        assert shapes[prefix + "self_attn.o_proj.lora_A.weight"] == [3, 64]
        assert shapes[prefix + "mlp.gate_proj.lora_B.weight"] == [80, 3]
        assert shapes[prefix + "mlp.down_proj.lora_A.weight"] == [3, 80]
    assert len(shapes) == 28
    fields = json.loads((tmp_path / adapters.CONFIG).read_text())
    assert fields["peft_type"] == "LORA" and fields["r"] == 3 and fields["lora_alpha"] == 4.5


def test_the_scale_follows_the_rank():
    adapter = tiny.adapter(rank=4)
    assert adapter.scale == 1.5 and replace(adapter, rank_stabilized=True).scale == 3.0
    assert replace(adapter, alpha=0.4).scale == float(np.float32(0.1))
    a, b = adapter.tensors["layers.0.q.weight"]
    assert np.allclose(adapter.delta("layers.0.q.weight"), 1.5 * b @ a, atol=1e-6)


@pytest.mark.parametrize("other", [{"d_model": 64}, {"n_layers": 1}, {"d_ff": 96}])
def test_an_adapter_of_another_model_is_refused(other, tmp_path):
    adapters.write(tiny.adapter(rank=3), tmp_path)
    with pytest.raises(ValueError, match="another model|no linear layer"):
        adapters.read(tmp_path, tiny.config(**other))


def test_peft_reads_ours_and_we_read_theirs(tmp_path):
    """A Llama of transformers with our adapter, in PEFT: the same change of the same matrices."""
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = tiny.config(sub_norm=False, activation="silu", weights="dense", activations="none", d_head=12)
    shape = transformers.LlamaConfig(
        vocab_size=320, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=80, max_position_embeddings=192, tie_word_embeddings=True,
    )  # fmt: skip
    adapter = tiny.adapter(config, targets=("q", "v", "down"), layers=[1])
    adapters.write(adapter, tmp_path / "ours", base="base")
    base = transformers.LlamaForCausalLM(shape).eval()
    before = {name: w.detach().clone() for name, w in base.named_parameters()}
    model = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    assert same(adapters.read(tmp_path / "theirs", config), adapter)
    merged = dict(model.merge_and_unload().named_parameters())
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    assert changed == {
        f"model.layers.1.{n}.weight" for n in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    }
    for name, here in (("self_attn.q_proj", "q"), ("mlp.down_proj", "down")):
        delta = (merged[f"model.layers.1.{name}.weight"] - before[f"model.layers.1.{name}.weight"]).detach()
        assert np.allclose(delta.numpy(), adapter.delta(f"layers.1.{here}.weight"), atol=1e-6)


def test_peft_made_adapters_open(tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    shape = transformers.LlamaConfig(
        vocab_size=320, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=80, max_position_embeddings=192,
    )  # fmt: skip
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", use_rslora=True, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(transformers.LlamaForCausalLM(shape), settings)
    model.save_pretrained(tmp_path)
    found = adapters.read(tmp_path, tiny.config(sub_norm=False, activation="silu", d_head=12))
    assert len(found.tensors) == 14 and found.scale == 4.0 and found.rank == 4

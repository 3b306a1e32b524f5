"""Names of tensors. Kinds: invariant (there and back), exact (what is no name of ours)."""

import pytest

import tiny
from onebit.formats import names

CONFIG = tiny.config(n_layers=11, tied_head=False, qk_norm=True, qkv_bias=True)


def test_every_tensor_of_every_model_has_one_name_in_each_format():
    ours = list(CONFIG.tensor_shapes())
    for there, back in ((names.to_hf, names.from_hf), (names.to_gguf, names.from_gguf)):
        foreign = [there(name) for name in ours]
        assert len(set(foreign)) == len(ours)
        assert [back(name) for name in foreign] == ours


def test_the_words_of_each_format():
    assert names.to_hf("layers.10.attn_sub_norm.weight") == "model.layers.10.self_attn.attn_sub_norm.weight"
    assert names.from_hf("model.layers.3.self_attn.inner_attn_ln.weight") == "layers.3.attn_sub_norm.weight"
    assert names.from_hf("model.layers.3.mlp.ffn_layernorm.weight") == "layers.3.ffn_sub_norm.weight"
    assert names.to_gguf("layers.0.o.weight") == "blk.0.attn_output.weight"
    assert names.from_gguf("output_norm.weight") == "norm.weight"


@pytest.mark.parametrize(
    "name",
    ["", ".", "weight", "model.layers.0.mlp.up_proj", "model.layers.-1.mlp.up_proj.weight", "model.norm.gain",
     "model.layers.999999.mlp.up_proj.weight", "model.layers.\u0663.mlp.up_proj.weight", "model.layers.norm.weight",
     "blk.x.attn_q.weight", "blk..attn_q.weight", "layers.0.q.weight"],
)  # fmt: skip
def test_other_names_are_none_of_ours(name):
    assert names.from_hf(name) is None and names.from_gguf(name) is None

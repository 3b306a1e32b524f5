"""Checkpoint. Kinds: exact (codes, shares, sizes), invariant (round trips)."""

from dataclasses import replace

import numpy as np
import pytest

import tiny
from onebit import quant
from onebit.checkpoint import Checkpoint, dequantize, quantize
from onebit.packing import PackedTensor, unpack
from onebit.parts import code_histogram, parts, token_bytes

VARIANTS = [
    {},
    {"scale": "row", "tied_head": False},
    {"scale": 16, "sub_norm": False},
    {"weights": "b1", "activations": "a4"},
    {"weights": "b1", "scale": 16},
    {"layer_weights": ("b1", "b1.58")},
]
NAME = "layers.0.q.weight"


def changed(checkpoint: Checkpoint, name: str, **changes) -> Checkpoint:
    return replace(
        checkpoint, tensors=checkpoint.tensors | {name: checkpoint.tensors[name]._replace(**changes)}
    )


@pytest.mark.parametrize("changes", VARIANTS)
def test_quantize_holds_the_codes_and_scales_of_quant(changes):
    config = tiny.config(**changes)
    master = tiny.master(config)
    packed = quantize(master)
    assert packed.is_packed and not master.is_packed and packed.label == config.label
    for name, w in master.tensors.items():
        tensor = packed.tensors[name]
        if w.ndim == 1:
            assert tensor is w
            continue
        if config.is_linear(name):
            scheme = {"0": "b1", "1": "b1.58"}[name.split(".")[1]] if config.layer_weights else config.weights
            codes, scale = quant.quantize_weights(w, scheme, config.scale)
        else:
            codes, scale = quant.quantize_rows(w, 8)
            assert tensor.encoding == "q8"
        assert np.array_equal(unpack(tensor.data, tensor.encoding, tensor.shape), codes)
        assert np.array_equal(tensor.scale, scale) and tensor.shape == w.shape
        assert np.array_equal(dequantize(packed).tensors[name], quant.dequantize(codes, scale))


def test_layouts_hold_the_same_model():
    t80 = quantize(tiny.master())
    r64 = quantize(tiny.master(), "r64")
    assert t80.tensors[NAME].encoding == "t80" and r64.tensors[NAME].encoding == "r64"
    there_and_back = quantize(quantize(t80, "r64"), "t80")
    for name, tensor in t80.tensors.items():
        other = there_and_back.tensors[name]
        pairs = [(tensor, other)] if isinstance(tensor, np.ndarray) else [(tensor.data, other.data)]
        assert all(np.array_equal(a, b) for a, b in pairs)
        assert np.array_equal(dequantize(t80).tensors[name], dequantize(r64).tensors[name])
    assert quantize(r64) is r64


def test_a_layout_is_that_of_the_layers_it_fits():
    def layouts(checkpoint):
        return [checkpoint.tensors[f"layers.{i}.q.weight"].encoding for i in range(2)]

    master = tiny.master(tiny.config(layer_weights=("b1", "b1.58")))
    packed = quantize(master)
    assert layouts(packed) == ["b128", "t80"]
    assert layouts(quantize(packed, "r64")) == layouts(quantize(master, "r64")) == ["b128", "r64"]
    assert layouts(quantize(packed, "b128")) == ["b128", "t80"]
    assert set(code_histogram(packed)) == {-1, 0, 1}
    with pytest.raises(
        ValueError, match="'bf16' cannot hold b1 and b1.58 weights; expected b128 or t80 or r64"
    ):
        quantize(packed, "bf16")
    uniform = quantize(tiny.master())
    with pytest.raises(ValueError, match=r"layers.0.q.weight has encoding 't80'; expected b128"):
        replace(uniform, config=packed.config)


def test_dequantize_leaves_a_master_as_it_is():
    master = tiny.master()
    assert all(dequantize(master).tensors[name] is w for name, w in master.tensors.items())


def test_histogram_counts_codes_without_padding():
    config = tiny.config(n_layers=1)
    master = tiny.master(config)
    for name in master.tensors:
        if config.is_linear(name):
            master.tensors[name][:] = 0
            master.tensors[name][:, ::4] = 1
            master.tensors[name][:, 1::8] = -1
    assert code_histogram(quantize(master)) == {-1: 0.125, 0: 0.625, 1: 0.25}
    binary = code_histogram(quantize(tiny.master(tiny.config(weights="b1"))))
    assert set(binary) == {-1, 1} and sum(binary.values()) == pytest.approx(1, abs=1e-12)
    with pytest.raises(ValueError, match="quantize it first"):
        code_histogram(master)


@pytest.mark.parametrize("scale", ["tensor", "row", 16])
def test_coded_rows_change_their_layout_with_the_layers(scale):
    master = tiny.master(tiny.config(scale=scale, tied_head=False))
    t80, r64 = (tiny.coded(master, encoding) for encoding in ("t80", "r64"))
    assert (t80.head, r64.head) == ("t80", "r64") and quantize(t80) is t80
    for there in (quantize(t80, "r64"), quantize(quantize(r64, "t80"), "r64")):
        for name, tensor in there.tensors.items():
            other = r64.tensors[name]
            pairs = (
                [(tensor, other)]
                if isinstance(tensor, np.ndarray)
                else zip(tensor[2:], other[2:], strict=True)
            )
            assert all(np.array_equal(a, b) for a, b in pairs)
    codes, scales = quant.quantize_weights(master.tensors["head.weight"], "b1.58", scale)
    assert np.array_equal(dequantize(t80).tensors["head.weight"], quant.dequantize(codes, scales))
    assert t80.tensors["head.weight"].scale.shape == scales.shape
    assert code_histogram(t80) == code_histogram(r64)
    with pytest.raises(ValueError, match="the head of this packed model is t80"):
        quantize(t80, head="q8")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pack", [quantize, tiny.coded])
def test_a_token_reads_the_head_and_a_row_of_the_embedding(tied, pack):
    packed = pack(tiny.master(tiny.config(tied_head=tied)))
    arrays = [a for t in packed.tensors.values() for a in (t[2:] if isinstance(t, PackedTensor) else [t])]
    embedding = packed.tensors["embed.weight"]
    size = embedding.data.nbytes + embedding.scale.nbytes
    unread = 0 if tied else size - size // 320
    assert token_bytes(packed) == sum(array.nbytes for array in arrays) - unread


def test_parts_add_up():
    config = tiny.config(tied_head=False)
    master = tiny.master(config)
    sizes = {part.name: part for part in parts(master)}
    assert list(sizes) == ["embedding", "linear", "norms", "head", "tokenizer"]
    weights = sum(int(np.prod(shape)) for shape in config.tensor_shapes().values())
    assert sum(part.n_weights for part in sizes.values()) == weights
    assert all(part.bits_per_weight == (0 if name == "tokenizer" else 32) for name, part in sizes.items())
    assert sizes["tokenizer"].n_bytes == len(tiny.tokenizer_json())
    packed = {part.name: part for part in parts(quantize(master))}
    # 320 rows of 48 int8 codes, and a float32 for each row.
    assert packed["embedding"].n_bytes == 320 * 48 + 320 * 4 and packed["norms"] == sizes["norms"]


def test_bits_per_weight_come_close_to_the_layout():
    config = tiny.config(d_model=320, n_heads=4, n_kv_heads=4, d_head=80, d_ff=640, n_layers=1)
    master = tiny.master(config)
    for encoding, bits in (("t80", 1.6), ("r64", 2.0)):
        linear = parts(quantize(master, encoding))[1]
        assert linear.name == "linear" and bits < linear.bits_per_weight < bits + 0.01


def test_quantize_refuses_what_has_no_codes_or_does_not_fit():
    with pytest.raises(ValueError, match="a dense model has no codes"):
        code_histogram(quantize(tiny.master(tiny.config(weights="dense", activations="none"))))
    with pytest.raises(ValueError, match=r"'b128' cannot hold b1.58 weights; expected t80 or r64"):
        quantize(tiny.master(), "b128")
    with pytest.raises(ValueError, match="'t80' cannot hold b1 weights; expected b128"):
        quantize(tiny.master(tiny.config(weights="b1")), "t80")


def test_a_checkpoint_holds_exactly_the_tensors_of_its_config():
    tensors = tiny.tensors(tiny.CONFIG)
    with pytest.raises(ValueError, match=r"tensor layers.1.up.weight is missing"):
        Checkpoint(tiny.CONFIG, {name: t for name, t in tensors.items() if name != "layers.1.up.weight"})
    with pytest.raises(ValueError, match=r"tensor head.weight is not part"):
        Checkpoint(tiny.CONFIG, tensors | {"head.weight": tensors["embed.weight"]})


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (np.ones((64, 47), np.float32), r"is float32 \[64, 47\]; expected float32 \[64, 48\]"),
        (np.ones((64, 48), np.float64), r"is float64"),
        (np.full((64, 48), np.nan, np.float32), "NaN or infinity"),
        (np.full((64, 48), np.inf, np.float32), "NaN or infinity"),
    ],
)
def test_a_master_is_checked(tensor, message):
    with pytest.raises(ValueError, match=f"tensor {NAME} .*{message}"):
        Checkpoint(tiny.CONFIG, tiny.tensors(tiny.CONFIG) | {NAME: tensor})


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, -1.0])
def test_scales_are_positive_and_finite(value):
    with pytest.raises(ValueError, match=f"tensor {NAME}: a scale is not a positive finite number"):
        changed(quantize(tiny.master()), NAME, scale=np.array([value], np.float32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoding": "q8"}, "has encoding 'q8'; expected t80 or r64"),
        ({"shape": (48, 64)}, r"is \[48, 64\]; the config asks for \[64, 48\]"),
        ({"data": np.zeros((1, 12, 63), np.uint8)}, r"expected uint8 \[1, 12, 64\]"),
        ({"data": np.zeros((1, 12, 64), np.int8)}, r"packed data is int8"),
        ({"scale": np.ones(64, np.float32)}, r"scale is float32 \[64\]; expected float32 \[1\]"),
        ({"scale": np.ones(1, np.float64)}, "scale is float64"),
    ],
)
def test_a_packed_matrix_is_checked(changes, message):
    with pytest.raises(ValueError, match=f"tensor {NAME}.*{message}"):
        changed(quantize(tiny.master()), NAME, **changes)


def test_matrices_are_packed_together_or_not_at_all():
    master, packed = tiny.master(), quantize(tiny.master())
    with pytest.raises(ValueError, match="pack all matrices or none"):
        replace(packed, tensors=packed.tensors | {NAME: master.tensors[NAME]})
    with pytest.raises(ValueError, match="pack all matrices or none"):
        replace(master, tensors=master.tensors | {NAME: packed.tensors[NAME]})
    assert isinstance(packed.tensors[NAME], PackedTensor)


def test_a_bf16_head_is_checked():
    packed = quantize(tiny.master(), head="bf16")
    bounds = packed.tensors["shortlist.bounds"]
    for value, message in ((-1.0, "negative norm"), (np.nan, "negative norm"), (np.inf, "NaN or infinity")):
        damaged = bounds.copy()
        damaged[1, 5] = value
        with pytest.raises(ValueError, match=f"tensor shortlist.bounds holds .*{message}"):
            replace(packed, tensors=packed.tensors | {"shortlist.bounds": damaged})
    with pytest.raises(ValueError, match=r"the scale of bf16 is 2.0; expected 1"):
        changed(packed, "embed.weight", scale=np.full(1, 2, np.float32))
    with pytest.raises(ValueError, match="layers.0.q.weight has encoding 'bf16'"):
        changed(packed, NAME, encoding="bf16")


def test_a_bf16_head_comes_from_a_master_only():
    master = tiny.master()
    with pytest.raises(ValueError, match=r"head is 'bf15'; expected q8 or bf16"):
        quantize(master, head="bf15")
    for head, other in (("q8", "bf16"), ("bf16", "q8")):
        packed = quantize(master, head=head)
        assert quantize(packed, head=head) is packed
        with pytest.raises(ValueError, match=f"is {head}; its float32 rows are gone.*head {other}"):
            quantize(packed, head=other)
    huge = master.tensors["embed.weight"].copy()
    huge[3, 3] = np.finfo(np.float32).max
    with pytest.raises(ValueError, match=r"embed.weight holds a number that is too large for bfloat16"):
        quantize(replace(master, tensors=master.tensors | {"embed.weight": huge}), head="bf16")


def test_parts_of_a_bf16_head():
    untied = quantize(tiny.master(tiny.config(tied_head=False)), head="bf16")
    assert untied.tensors["embed.weight"].encoding == untied.tensors["head.weight"].encoding == "bf16"
    packed = quantize(tiny.master(), head="bf16")
    sizes = {part.name: part for part in parts(packed)}
    assert list(sizes) == ["embedding", "linear", "norms", "shortlist", "tokenizer"]
    assert sizes["embedding"].n_bytes == 320 * 48 * 2 + 4 and sizes["embedding"].n_weights == 320 * 48
    assert sizes["shortlist"] == ("shortlist", 0, 320 * 48 + 320 * 4 + 2 * 320 * 4)
    dense = dequantize(packed)
    assert not dense.is_packed and dense.head is None and dense.label == "W1.58A8KV16"
    w = tiny.master().tensors["embed.weight"]
    assert (abs(dense.tensors["embed.weight"] - w) <= abs(w) * np.float32(2**-8)).all()

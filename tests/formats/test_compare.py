"""What a conversion changed. Kinds: exact (counts of damage that a test did), invariant (a copy is a copy)."""

from dataclasses import replace

import numpy as np
import pytest

import tiny
from onebit.checkpoint import quantize
from onebit.formats.compare import compare
from onebit.packing import pack, unpack

NAME = "layers.1.up.weight"


def with_tensor(checkpoint, name, tensor):
    return replace(checkpoint, tensors=checkpoint.tensors | {name: tensor})


@pytest.mark.parametrize(
    "changes",
    [{}, {"weights": "b1"}, {"scale": 16}, {"tied_head": False}, {"layer_weights": ("b1", "b1.58")}],
)
def test_layouts_do_not_count(changes):
    packed = quantize(tiny.master(tiny.config(**changes)))
    other = quantize(packed, "r64") if packed.config.weights == "b1.58" else packed
    found = compare(packed, other)
    assert not any(change.n_changed for change in found)
    assert sum(change.n_weights for change in found) == sum(
        t.size for t in tiny.master(packed.config).tensors.values()
    )


def test_one_code_is_found():
    packed = quantize(tiny.master())
    tensor = packed.tensors[NAME]
    codes = unpack(tensor.data, "t80", tensor.shape)
    at = np.argwhere(codes == 0)[7]
    codes[tuple(at)] = 1
    damaged = with_tensor(packed, NAME, tensor._replace(data=pack(codes, "t80")))
    linear = {change.part: change for change in compare(packed, damaged)}["linear"]
    assert (linear.n_changed, linear.n_codes, linear.worst_tensor) == (1, 1, NAME) and linear.is_lossy
    assert NAME in linear.describe() and "1 codes differ" in linear.describe()


def test_a_scale_is_found():
    packed = quantize(tiny.master())
    tensor = packed.tensors[NAME]
    damaged = with_tensor(packed, NAME, tensor._replace(scale=tensor.scale * np.float32(1.25)))
    linear = {change.part: change for change in compare(packed, damaged)}["linear"]
    n_nonzero = int(np.count_nonzero(unpack(tensor.data, "t80", tensor.shape)))
    assert (linear.n_changed, linear.n_codes) == (n_nonzero, 0)
    assert linear.scale_ratio == pytest.approx((1, 1.25)) and linear.worst == pytest.approx(0.25)


def test_a_master_is_compared_with_what_it_was_trained_to_be():
    master = tiny.master()
    assert not any(change.is_lossy for change in compare(master, quantize(master)))
    other = {change.part: change for change in compare(tiny.master(seed=1), quantize(master))}["linear"]
    assert other.n_codes > 1000 and other.is_lossy


def test_a_scale_that_is_rounded_besides_is_no_part_of_the_training():
    master = tiny.master()
    packed = quantize(master)
    scale = np.float32(np.float16(packed.tensors[NAME].scale))
    made = with_tensor(packed, NAME, packed.tensors[NAME]._replace(scale=scale))
    linear = {change.part: change for change in compare(master, made)}["linear"]
    assert linear.is_lossy and linear.n_codes == 0 and linear.worst_tensor == NAME


def test_a_master_that_stays_one_is_the_same():
    master = tiny.master()
    assert not any(change.n_changed for change in compare(master, master))


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="two different models"):
        compare(tiny.master(), tiny.master(tiny.config(n_layers=1)))

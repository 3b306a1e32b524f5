"""Synthetic models are real models: files that load and run, with the codes that were promised. Kind: invariant."""

from dataclasses import replace

import numpy as np
import pytest
from shapes import SHAPES, ZEROS, synthetic

import onebit
import tiny
from onebit.formats import native
from onebit.parts import code_histogram


@pytest.mark.parametrize("encoding", ["t80", "r64", "b128"])
def test_a_synthetic_file_loads_and_generates(encoding, tmp_path):
    config = replace(tiny.CONFIG, d_model=64, d_ff=160)
    native.write(synthetic(config, encoding), tmp_path / "model.onebit")
    native.verify(tmp_path / "model.onebit")
    llm = onebit.load(tmp_path / "model.onebit")
    assert np.isfinite(llm.logits([1, 2, 3])).all()
    output = llm.generate([1, 2, 3], max_tokens=8, temperature=0, ignore_eos=True)
    assert len(output.tokens) == 8


def test_codes_have_the_shares_of_trained_models():
    shares = code_histogram(synthetic(replace(tiny.CONFIG, d_model=256, d_ff=512)))
    assert abs(shares[0] - ZEROS) < 0.01 and abs(shares[1] - shares[-1]) < 0.01


def test_the_same_seed_gives_the_same_model():
    one, same, other = (synthetic(tiny.CONFIG, seed=seed).tensors["layers.0.q.weight"] for seed in (1, 1, 2))
    assert np.array_equal(one.data, same.data) and not np.array_equal(one.data, other.data)


def test_weights_of_the_2b_shape():
    n_weights = sum(n * k for n, k in SHAPES["2b4t"].linear_shapes().values()) * SHAPES["2b4t"].n_layers
    assert n_weights == 2_084_044_800

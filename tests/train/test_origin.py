"""Exact and invariant: training that goes on from a model begins with its codes, its scales and its tokenizer."""

import json
from dataclasses import replace

import numpy as np
import pytest

import tiny
from onebit import formats, quant
from onebit.checkpoint import codes, quantize
from onebit.formats import native
from onebit.formats import run as run_folder
from onebit.train import build, train
from onebit.train.origin import begin_with, fingerprint, latent_master, latent_weights

SHORT = ["data.seq_len=32", "batch_size=4", "steps=2", "save_every=1", "optim.warmup_steps=0"]


@pytest.fixture
def packed(tmp_path):
    """A packed model with the tokenizer of tiny.py, in a file."""
    path = tmp_path / "packed.onebit"
    native.write(quantize(tiny.master(tiny.config(bos_token=tiny.EOS))), path)
    return path


@pytest.mark.parametrize("granularity", ["tensor", "row", 4])
@pytest.mark.parametrize("scheme", ["b1.58", "b1"])
def test_latent_weights_are_rounded_to_the_codes_that_they_are_made_of(scheme, granularity):
    w = np.random.default_rng(5).standard_normal((6, 16)).astype(np.float32)
    found, scale = quant.quantize_weights(w, scheme, granularity)
    again, scale_again = quant.quantize_weights(
        latent_weights(found.astype(np.int8), scale, granularity), scheme, granularity
    )
    assert np.array_equal(found, again)
    np.testing.assert_allclose(scale_again, scale, rtol=3e-7)


def test_a_group_of_zeros_stays_zero():
    zeros = np.zeros((2, 4), np.int8)
    made = latent_weights(zeros, np.array([0.5, 0.25], np.float32), "row")
    assert np.array_equal(quant.quantize_ternary(made, "row")[0], zeros)


@pytest.mark.parametrize("weights", ["b1.58", "b1"])
def test_a_master_has_the_codes_of_the_packed_model(weights):
    model = quantize(tiny.master(tiny.config(weights=weights)))
    master = latent_master(model)
    assert not master.is_packed
    for name, tensor in model.tensors.items():
        if model.config.is_linear(name):
            ours, theirs = codes(name, master.tensors[name], model.config), codes(name, tensor, model.config)
            assert np.array_equal(ours[0], theirs[0])
            np.testing.assert_allclose(ours[1], theirs[1], rtol=3e-7)


def test_a_run_goes_on_from_a_packed_model_and_resumes(texts, packed, tmp_path):
    model = formats.read(packed)
    still = begin_with(build("tiny"), str(packed), model, [*SHORT, "optim.lr=0", "optim.lr_second=0"])
    train(still, texts, tmp_path / "still")
    made = run_folder.read(tmp_path / "still")
    assert (made.tokenizer, made.config) == (model.tokenizer, model.config)
    for name in filter(model.config.is_linear, model.tensors):
        assert np.array_equal(
            codes(name, made.tensors[name], made.config)[0], codes(name, model.tensors[name], model.config)[0]
        )
    recipe = begin_with(build("tiny"), str(packed), model, SHORT)
    train(recipe, texts, tmp_path / "run")
    train(replace(recipe, steps=2), None, tmp_path / "run", resume=True)
    assert any(
        not np.array_equal(w, made.tensors[name])
        for name, w in run_folder.read(tmp_path / "run").tensors.items()
    )
    written = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert written["init_sha256"] == fingerprint(model)


def test_another_model_in_its_place_is_refused(texts, packed, tmp_path):
    recipe = begin_with(build("tiny"), str(packed), formats.read(packed), SHORT)
    native.write(quantize(tiny.master(tiny.config(bos_token=tiny.EOS), seed=9)), packed)
    with pytest.raises(ValueError, match="not the model that the run began with"):
        train(recipe, texts, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "overrides", "message"),
    [
        (
            {},
            ["model.d_ff=64"],
            r"model.d_ff is 64; a run has that of the model it begins with, 80: only weights",
        ),
        ({"weights": "b1"}, [], "has b1 weights, and the recipe tiny b1.58 ones; choose a recipe for b1"),
        ({}, ["init=other"], "named by --init"),
        ({}, ["data.vocab_size=999"], "the tokenizer is that of the model to begin with"),
        ({}, ["options.learned_scale=true", "model.scale=row"], "scales are what they are"),
        ({"eos_tokens": ()}, [], "names no token that ends a text"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(change, overrides, message):
    model = tiny.master(tiny.config(**change))
    with pytest.raises(ValueError, match=message):
        begin_with(build("tiny"), "model", model, overrides)


def test_a_model_without_a_tokenizer_is_refused():
    with pytest.raises(ValueError, match="the model has no tokenizer"):
        begin_with(build("tiny"), "model", replace(tiny.master(tiny.config()), tokenizer=None))


def test_a_full_precision_model_is_rounded_as_the_recipe_says():
    model = tiny.master(tiny.config(weights="dense", activations="none"))
    recipe = begin_with(build("b1", size="1M"), "model", model)
    assert (recipe.model.weights, recipe.model.activations, recipe.model.d_model) == ("b1", "a8", 48)

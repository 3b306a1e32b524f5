"""Invariants of recipes and exact behaviour of overrides; every recipe trains for two steps, one of each phase."""

import json
import math
from dataclasses import replace

import pytest

import tiny
from onebit.train import RECIPES, build, options, train
from onebit.train.recipes import SIZES, Options, read


def test_overrides_reach_every_kind_of_field():
    recipe = build(
        "stories",
        [
            "steps=7",
            "optim.lr=1e-3",
            "model.sub_norm=false",
            "model.scale=row",
            "data.include=*.txt,*.md",
            "precision=f32",
        ],
    )
    assert (recipe.steps, recipe.optim.lr, recipe.model.sub_norm) == (7, 1e-3, False)
    assert recipe.model.scale == "row"
    assert recipe.data.include == ("*.txt", "*.md")
    assert recipe.precision == "f32"
    assert build("stories", ["model.scale=64"]).model.scale == 64
    assert build("stories", ["model.bos_token=none"]).model.bos_token is None


def test_overrides_that_must_fit_together_come_in_any_order():
    settings = [
        "data.seq_len=1024",
        "model.max_seq_len=1024",
        "model.weights=dense",
        "model.activations=none",
    ]
    assert build("stories", settings) == build("stories", settings[::-1])
    assert build("stories", ["steps=3", "steps=5"]).steps == 5


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("storys", [], "unknown recipe 'storys'; did you mean 'stories'"),
        ("stories", ["size=1M"], "stories has one size; recipes with a choice of size: b1.58"),
        ("b1.58", ["size=2M"], "size is '2M'; did you mean"),
        ("b1.58-hadamard", ["model.d_ff=96"], "hadamard with 96 inputs of down; expected a power of two"),
        ("stories", ["stepz=3"], "did you mean 'steps'"),
        ("stories", ["optim.lrr=3"], "optim has no 'lrr'; did you mean 'lr'.*; there are lr, lr_second, "),
        ("stories", ["steps"], "expected NAME=VALUE, as in --set steps=200"),
        ("stories", ["steps=many"], "'many' does not fit; expected a whole number"),
        ("stories", ["model.rope_scaling=yarn"], "'yarn' does not fit; expected none"),
        ("stories", ["steps=0"], "steps is 0; expected a whole number from 1 to"),
        ("stories", ["batch_size=-4"], "batch_size is -4"),
        ("stories", ["seed=-1"], "seed is -1"),
        ("stories", ["seed=9223372036854775808"], "seed is 9223372036854775808"),
        ("stories", ["threads=-1"], "threads is -1"),
        ("stories", ["data.vocab_size=256"], "data.vocab_size is 256; expected a whole number from 257 to"),
        ("stories", ["data.seq_len=0"], "data.seq_len is 0"),
        ("stories", ["data.held_out=nan"], "data.held_out is nan; expected a number from 0.0 to 1.0"),
        ("stories", ["optim.lr=nan"], "optim.lr is nan"),
        ("stories", ["optim.lr=inf"], "optim.lr is inf"),
        ("stories", ["optim.beta2=1"], "optim.beta2 is 1.0; expected a number from 0.0 to 0.999"),
        ("stories", ["optim.warmup_steps=-1"], "optim.warmup_steps is -1"),
        ("stories", ["optim.lr=fast"], "expected a number"),
        ("stories", ["compile=maybe"], "expected true or false"),
        ("stories", ["precision=f64"], "expected bf16 or f32"),
        ("stories", ["optim=3"], "expected one of its fields"),
        ("stories", ["steps.x=3"], "single value"),
        ("stories", ["model.n_heads=5"], "n_kv_heads 2 does not divide n_heads 5"),
        ("stories", ["accumulate=3"], "does not divide batch_size"),
        ("stories", ["data.seq_len=513"], "exceeds model.max_seq_len"),
    ],
)
def test_bad_names_and_values_are_refused_with_the_near_miss(name, overrides, message):
    with pytest.raises(ValueError, match=message):
        build(name, overrides)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_comes_back_from_its_file(name, tmp_path):
    recipe = build(name, ["model.eos_tokens=3,4", "optim.lr=1e-4"])
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe.to_dict()))
    assert read(path) == recipe
    text = path.read_text()
    damaged = [text.replace("steps", "stepz"), text.replace('"seed": 1', '"seed": 1.5')]
    damaged += [text.replace('"threads": ', '"threads": true, "x": '), "[" * 100000]
    for content in ("{", "{}", "[]", '{"name": "x"}', '{"model": {}, "data": []}', *damaged):
        path.write_text(content)
        with pytest.raises(ValueError, match="not a recipe|the recipe is n"):
            read(path)


def test_a_run_that_is_older_than_the_options_is_read(tmp_path):
    values = build("b1.58").to_dict()
    del values["options"], values["health_every"], values["model"]["hadamard"]
    (tmp_path / "recipe.json").write_text(json.dumps(values))
    assert read(tmp_path / "recipe.json") == build("b1.58")


@pytest.mark.parametrize("name", [name for name in RECIPES if f"{name}-dense" in RECIPES])
def test_twin_differs_in_its_weights_alone(name):
    recipe, twin = build(name), build(f"{name}-dense")
    assert twin.options == Options(optimizer=recipe.options.optimizer)
    assert replace(twin, name=name, model=recipe.model, options=recipe.options) == recipe
    rounding = {field: getattr(recipe.model, field) for field in ("weights", "activations", "hadamard")}
    assert replace(twin.model, **rounding) == recipe.model


# What each size has in weights, and the published shapes.
@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_what_they_are_called(size):
    recipe = build("b1.58", size=size)
    assert build("b1.58", [f"size={size}"]) == recipe
    n_weights = sum(math.prod(shape) for shape in recipe.model.tensor_shapes().values())
    named = float(size[:-1]) * {"M": 1e6, "B": 1e9}[size[-1]]
    assert named * 0.9 < n_weights < named * 1.15
    assert build("b1.58", [f"size={size}", "model.n_layers=2"]).model.n_layers == 2
    rotated = build("b1.58-hadamard", size=size).model
    assert all(rotated.linear_shapes()[name][1].bit_count() == 1 for name in ("o", "down"))


def test_schedules_are_the_published_ones():
    assert [build("b1.58", size=s).optim.at(374, 100000)[0] for s in ("700M", "3B")] == pytest.approx(
        [1.5e-3 * (1 - 374e-5), 1.2e-3 * (1 - 374e-5)]
    )
    assert build("b1.58", size="1.3B").optim.at(50000, 100000) == (pytest.approx(4e-4), 0.0)
    binary = build("b1", size="125M", overrides=["steps=40000", "optim.warmup_steps=750"]).optim
    assert (binary.beta1, binary.beta2, binary.grad_clip) == (0.9, 0.98, 0.0)
    assert binary.at(749, 40000) == (pytest.approx(2.4e-3 * (1 - 749 / 40000)), 0.01)
    assert binary.at(30000, 40000) == (pytest.approx(2.4e-3 / 4), 0.01)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_for_two_steps(name, tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"Story {i}. {tiny.TEXT}{i * i}")
    small = ["data.include=*", "data.vocab_size=300", "data.held_out=0.2", "data.seq_len=32", "steps=2"]
    if name not in ("tiny", "stories", "stories-dense"):
        small += ["size=1M", "health_every=1"]
    small += ["compile=false", "evaluate_sequences=1", "threads=1", "options.first_share=0.5"]
    recipe = build(name, small)
    set_rounding, phases = options.set_rounding, []

    def noted(rounding, *rest):
        set_rounding(rounding, *rest)
        phases.append(rounding.activations)

    monkeypatch.setattr(options, "set_rounding", noted)
    train(recipe, tmp_path / "texts", tmp_path / "run")
    has_phases = name in ("b1.58-a4", "b1.58-hadamard")
    assert phases == (["a8", None] if has_phases else [None, None])
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")

"""Journey, exact: three conversations, an adapter, the engine's text with it, and the same merged.

Locked: the loss of answers falls; the engine's greedy text is that of nn, alone and beside others; a stopped run goes
on to the same bytes; what merging loses is reported.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import onebit
import tiny
from onebit import formats
from onebit.checkpoint import quantize
from onebit.formats import adapter as adapters
from onebit.formats import run as run_folder
from onebit.nn import lora
from onebit.nn.transformer import Transformer
from onebit.train import build, state, tune
from onebit.train.merge import merge
from onebit.train.recipe import override
from onebit.train.recipe import read as read_recipe

TALKS = [
    [("user", "Who are you?"), ("assistant", "I am a small dog.")],
    [("user", "What do you like?"), ("assistant", "I like the park.")],
    [("user", "Hello"), ("assistant", "Hello, Lily."), ("user", "Bye"), ("assistant", "Good day.")],
]
SETTINGS = [
    "steps=20", "batch_size=3", "precision=f32", "threads=1", "lora.r=4", "data.held_out=0", "optim.lr=1e-2",
    "save_every=7",
]  # fmt: skip


@pytest.fixture
def model(tmp_path):
    formats.write(tiny.master(seed=3, chat_template=tiny.CHAT_TEMPLATE), tmp_path / "model.onebit")
    return tmp_path / "model.onebit"


@pytest.fixture
def chats(tmp_path):
    lines = [{"messages": [{"role": r, "content": c} for r, c in talk]} for talk in TALKS]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "chat.jsonl"


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_from_conversations_to_a_talking_model(model, chats, tmp_path):
    out = tmp_path / "run"
    tune.tune(tune.plan(str(model), chats, SETTINGS), out)
    found = losses(out)
    assert len(found) == 20 and found[-1] < found[0] / 2

    # The engine says what nn says, token by token.
    packed = quantize(formats.read(model))
    adapter = adapters.read(out, packed.config)
    nn_model = Transformer.from_packed(packed)
    lora.load(nn_model, adapter)
    nn_model.eval()
    llm = onebit.load(model, adapters={"style": out})
    question = [{"role": "user", "content": "Who are you?"}]
    ids = llm.tokenizer.encode_chat(question)
    expected: list[int] = []
    with torch.no_grad():
        while len(expected) < 24 and tiny.EOS not in expected:
            expected.append(int(nn_model(torch.tensor([ids + expected]))[0, -1].argmax()))
    answer = llm.chat(question, adapter="style", temperature=0, max_tokens=24)
    assert answer.tokens == expected and answer.text != llm.chat(question, temperature=0, max_tokens=24).text
    both = llm.generate([ids, ids], adapter=[None, "style"], temperature=0, max_tokens=24)
    assert both[1].tokens == expected

    # Merging reports what it loses, and writes what it measured.
    merged = merge(model, out, tmp_path / "merged.onebit", data=chats)
    assert [layer.name for layer in merged.layers] == list(adapter.tensors)
    assert merged.losses and merged.losses.unmerged < merged.losses.before
    assert merged.losses.n_tokens > 30
    assert abs(merged.losses.unmerged - found[-1]) < 0.5
    made = formats.read(tmp_path / "merged.onebit")
    for layer in merged.layers:
        before, after = (formats.codes(layer.name, c.tensors[layer.name], c.config) for c in (packed, made))
        assert layer.n_flipped == (before[0] != after[0]).sum()
        assert np.array_equal(before[1], after[1]) and layer.scale_ratio == 1
        assert 0 <= layer.error <= 1.5


def test_a_stopped_run_goes_on_to_the_same_bytes(model, chats, tmp_path, monkeypatch):
    recipe = tune.plan(str(model), chats, SETTINGS)
    tune.tune(recipe, tmp_path / "whole")

    class Killed(Exception):
        pass

    real = tune.chat.batch

    def batch(examples, step, *rest):
        if step == 10:
            raise Killed
        return real(examples, step, *rest)

    monkeypatch.setattr(tune.chat, "batch", batch)
    with pytest.raises(Killed):
        tune.tune(recipe, tmp_path / "cut")
    monkeypatch.setattr(tune.chat, "batch", real)
    again = tune.read(tmp_path / "cut" / "recipe.json")
    assert again == recipe
    tune.tune(again, tmp_path / "cut", resume=True)
    for name in (adapters.MODEL, adapters.CONFIG, "state.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@pytest.mark.parametrize("is_packed", [False, True], ids=["run folder", "packed"])
def test_full_tuning(is_packed, model, chats, tmp_path):
    master = tiny.master(seed=3, chat_template=tiny.CHAT_TEMPLATE)
    run_folder.write(master, tmp_path / "master")
    base = model if is_packed else tmp_path / "master"
    settings = [s for s in SETTINGS if not s.startswith(("lora", "optim"))] + ["optim.lr=3e-3"]
    tune.tune(tune.plan(str(base), chats, settings, full=True), tmp_path / "run")
    # Weights that stand in for those behind codes are all far from another code.
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0] * (0.7 if is_packed else 0.5)
    tuned = formats.read(tmp_path / "run")
    assert not tuned.is_packed and tuned.chat_template == tiny.CHAT_TEMPLATE
    assert tuned.tokenizer == master.tokenizer


def test_an_adapter_knows_its_model_in_every_format(chats, tmp_path):
    """Tuned beside a master it runs beside its packed file and folder for transformers, and beside no other model."""
    config = tiny.config(d_model=64)
    master = tiny.master(config, seed=3, chat_template=tiny.CHAT_TEMPLATE)
    run_folder.write(master, tmp_path / "run")
    tune.tune(tune.plan(str(tmp_path / "run"), chats, [*SETTINGS, "steps=2"]), tmp_path / "mine")
    for name in ("same.onebit", "same"):
        formats.write(master, tmp_path / name)
        assert onebit.load(tmp_path / name, adapters={"mine": tmp_path / "mine"}).adapters == ("mine",)
    formats.write(tiny.master(config, seed=4), tmp_path / "other.onebit")
    with pytest.raises(ValueError, match="tuned beside another model of this shape"):
        onebit.load(tmp_path / "other.onebit", adapters={"mine": tmp_path / "mine"})
    with pytest.raises(ValueError, match="tuned beside another model of this shape"):
        merge(tmp_path / "other.onebit", tmp_path / "mine", tmp_path / "merged.onebit")


def test_the_master_keeps_its_precision_when_merged(chats, model, tmp_path):
    """W + BA is rounded once, as training would round it."""
    master = tiny.master(seed=3)
    run_folder.write(master, tmp_path / "master")
    adapter = tiny.adapter()
    adapters.write(adapter, tmp_path / "adapter")
    merge(tmp_path / "master", tmp_path / "adapter", tmp_path / "merged.onebit")
    tensors = {n: w + adapter.delta(n) if n in adapter.tensors else w for n, w in master.tensors.items()}
    expected = quantize(tiny.replace(master, tensors=tensors))
    made = formats.read(tmp_path / "merged.onebit")
    for name in adapter.tensors:
        for part in ("data", "scale"):
            assert np.array_equal(getattr(made.tensors[name], part), getattr(expected.tensors[name], part))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weights": "b1", "scale": "row"},
        {"scale": 16},
        {"layer_weights": ("b1.58", "b1"), "weights": "b1"},
    ],
)
def test_a_small_change_flips_no_code(changes, tmp_path):
    config = tiny.config(**changes)
    formats.write(tiny.master(config), tmp_path / "model.onebit")
    adapter = tiny.adapter(config)
    pairs = {name: adapters.LowRank(a, b * np.float32(1e-4)) for name, (a, b) in adapter.tensors.items()}
    adapters.write(tiny.replace(adapter, tensors=pairs), tmp_path / "adapter")
    merged = merge(tmp_path / "model.onebit", tmp_path / "adapter", tmp_path / "merged.onebit")
    assert all(layer.n_flipped == 0 and abs(layer.error - 1) < 1e-3 for layer in merged.layers)
    moved = merge(tmp_path / "model.onebit", tmp_path / "adapter", tmp_path / "moved.onebit", scale="absmean")
    if config.weights == "b1.58":
        # Codes of zero make the mean smaller than the scale.
        assert all(layer.scale_ratio < 0.8 for layer in moved.layers)


def test_dense_weights_take_the_change_over(tmp_path):
    config = tiny.config(weights="dense", activations="none")
    formats.write(tiny.master(config), tmp_path / "model.onebit")
    adapters.write(tiny.adapter(config), tmp_path / "adapter")
    merged = merge(tmp_path / "model.onebit", tmp_path / "adapter", tmp_path / "merged.onebit")
    assert all(layer.n_flipped > 0.9 * layer.n_weights and layer.error < 0.02 for layer in merged.layers)


def test_codes_take_a_higher_rate_than_full_precision(model, chats, tmp_path):
    dense = tiny.config(weights="dense", activations="none")
    formats.write(tiny.master(dense, chat_template=tiny.CHAT_TEMPLATE), tmp_path / "dense.onebit")
    rates = [tune.plan(str(path), chats, full=True).optim.lr for path in (model, tmp_path / "dense.onebit")]
    assert rates == [2e-3, 1e-4]
    assert tune.plan(str(model), chats).optim.lr == 1e-3


def test_the_command_line_goes_the_same_way(model, chats, tmp_path):
    def onebit_(*words):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, "-m", "onebit", *map(str, words)],
            capture_output=True,
            text=True,
            env=environment,
        )

    out = tmp_path / "run"
    changes = [word for setting in SETTINGS if "lora" not in setting for word in ("--set", setting)]
    changes += ["--lora", "r=3", "--lora", "targets=q,v"]
    made = onebit_("tune", model, "--data", chats, "--out", out, *changes)
    assert made.returncode == 0 and "3 conversations" in made.stderr, made.stderr
    assert tune.read(out / "recipe.json").lora == tune.Lora(r=3, targets=("q", "v"))
    assert f"onebit run -m {model} --adapter {out}" in made.stderr.replace("\n", " ")
    asked = ("run", "user: Hello\nassistant: ", "-m", model, "--temperature", 0, "--max-tokens", 16)
    with_it, without = onebit_(*asked, "--adapter", out), onebit_(*asked)
    assert with_it.returncode == without.returncode == 0 and with_it.stdout != without.stdout
    merged = onebit_("convert", model, tmp_path / "m.onebit", "--adapter", out, "--data", chats)
    assert merged.returncode == 0 and "answer tokens, nats" in merged.stderr
    for words, problem in (
        (("tune", model, "--out", out), "--data is missing"),
        (("tune", "--data", tmp_path / "none.jsonl", "--out", "x"), "none.jsonl"),
        (("tune", model, "--data", chats, "--out", out), "already holds a run"),
        (("tune", "--out", tmp_path / "none", "--resume"), "no run to resume"),
        (("tune", model, "--data", chats, "--out", "x", "--set", "lora.rank=3"), "no 'rank'"),
        (("tune", model, "--data", chats, "--out", "x", "--lora", "r=0"), "lora.r is 0"),
        (("tune", model, "--data", chats, "--out", "x", "--lora", "8"), "--lora 8: expected NAME=VALUE"),
        (("tune", model, "--data", chats, "--out", "x", "--set", "lora.targets=q,x"), "targets are"),
        (("tune", model, "--data", chats, "--out", "x", "--set", "options.noise=1"), "--set options"),
        (
            ("tune", model, "--data", chats, "--out", "x", "--full", "--set", "lora.r=8"),
            "leave one of them out",
        ),
        (
            ("tune", model, "--data", chats, "--out", "x", "--set", "options.optimizer=muon"),
            "choose adamw or signum",
        ),
        (("convert", model, tmp_path / "m.onebit", "--data", chats), "are for --adapter"),
        (("run", "x", "-m", model, "--adapter", tmp_path), "holds no adapter_config.json"),
    ):
        result = onebit_(*words)
        assert result.returncode == 2 and problem in result.stderr, result.stderr


def test_what_a_tuning_run_refuses(model, chats, tmp_path):
    out = tmp_path / "run"
    planned = tune.plan(str(model), chats, [*SETTINGS, "steps=2"])
    with pytest.raises(ValueError, match=r"training diverged: after 1 steps .*lower optim\.lr"):
        tune.tune(
            tune.plan(str(model), chats, [*SETTINGS, "save_every=1", "optim.lr=1e300"]), tmp_path / "bad"
        )
    assert sorted(p.name for p in (tmp_path / "bad").iterdir()) == ["metrics.jsonl", "recipe.json"]
    tune.tune(planned, out)
    changed = override(tune.read(out / "recipe.json"), ["lora.r=3", "optim.lr=2", "optim.lr_second=0.01"])
    with pytest.raises(
        ValueError, match=r"optim\.lr: 0\.01 in the run, 2\.0 now; lora\.r: 4 in the run, 3 now"
    ):
        tune.tune(changed, out, resume=True)
    tune.tune(override(planned, ["save_every=1"]), out, resume=True)
    assert tune.read(out / "recipe.json").save_every == 1
    with pytest.raises(ValueError, match="tuning run; go on with: onebit tune --out"):
        read_recipe(out / "recipe.json")
    state.start(build("tiny"), tmp_path)
    with pytest.raises(ValueError, match="go on with: onebit train --out"):
        tune.read(tmp_path / "recipe.json")

"""Exact and invariant: what is counted of codes, inputs and gradients, and when a run is stopped."""

import json
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import tiny
from onebit.checkpoint import quantize
from onebit.formats import run as run_folder
from onebit.nn.transformer import Transformer
from onebit.quant import quantize_weights
from onebit.train import build, health, pictures, state, train
from onebit.train import task as tasks
from onebit.train.pictures import HEALTH
from onebit.train.state import METRICS

SMALL = ["data.vocab_size=300", "data.seq_len=32", "model.d_model=48", "model.d_ff=64", "batch_size=4"]


def look(model, extras):
    tokens = torch.randint(0, 320, (2, 20), generator=torch.Generator().manual_seed(1))
    return health.look(model, tasks.token_losses, (tokens,), nullcontext(), extras)


def test_flips_and_zeros_are_those_of_the_codes():
    model, extras = Transformer(tiny.CONFIG, seed=1), {}
    first = look(model, extras)
    assert "flips" not in first and model.rounding.notes is None
    names = [n for n in model.linear_weights() if n.startswith("layers.1.")]
    before = {n: quantize_weights(model.linear_weights()[n].detach(), "b1.58", "tensor")[0] for n in names}
    zeros = sum(int((c == 0).sum()) for c in before.values()) / sum(c.numel() for c in before.values())
    assert first["zeros"][1] == pytest.approx(zeros, rel=1e-5)
    with torch.no_grad():
        model.layers[1].q.weight.neg_()
    second = look(model, extras)
    flipped = int((before["layers.1.q.weight"] != 0).sum()) / sum(c.numel() for c in before.values())
    assert second["flips"] == [0.0, pytest.approx(flipped, rel=1e-5)]


def test_saturation_and_largest_inputs():
    model = Transformer(tiny.config(activations="a4"), seed=1)
    plain = look(model, {})
    assert all(0 < share < 0.1 for share in plain["saturated"])
    with torch.no_grad():
        model.layers[0].attn_norm.weight.mul_(1000)
    assert look(model, {})["largest"][0] > 100 * plain["largest"][0]
    dense = look(Transformer(tiny.config(weights="dense", activations="none")), {})
    assert dense.keys() == {"saturated", "largest", "outliers"} and dense["saturated"] == [0.0, 0.0]
    frozen = Transformer.from_packed(quantize(tiny.master()))
    assert look(frozen, {}).keys() == dense.keys() and health.gradient_norms(frozen) == [0.0, 0.0]


def test_an_outlier_is_measured_by_its_root_mean_square():
    model = Transformer(tiny.CONFIG, seed=1)
    plain, inputs = look(model, {})["outliers"], []
    with torch.no_grad():
        # One channel is all that q, k and v read.
        model.layers[1].attn_norm.weight[1:] = 0
    handle = model.layers[1].attn_norm.register_forward_hook(
        lambda _, x, y: inputs.append(y.numpy().astype(np.float64))
    )
    outliers = look(model, {})["outliers"]
    handle.remove()
    assert outliers[0] == plain[0] and all(ratio > 1 for ratio in plain)
    (x,) = inputs
    assert outliers[1] == pytest.approx(np.abs(x).max() / np.sqrt(np.square(x).mean()), rel=1e-5)
    assert outliers[1] >= tiny.CONFIG.d_model**0.5
    assert all(block.rounding is model.rounding for block in model.layers)
    with torch.no_grad():
        for layer in model.layers:
            layer.attn_norm.weight.zero_()
            layer.ffn_norm.weight.zero_()
    assert look(model, {})["outliers"] == [0.0, 0.0]


def test_norms_of_layers_are_those_of_their_gradients():
    model = Transformer(tiny.CONFIG, seed=1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    model.layers[0].q.weight.grad[1, 2], model.layers[0].ffn_norm.weight.grad[3] = 3.0, -4.0
    model.layers[1].down.weight.grad[0, 0], model.embed.weight.grad[0, 0] = 12.0, 84.0
    assert health.gradient_norms(model) == [5.0, 12.0]
    # 5, 12 and 84 make 85.
    assert torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item() == 85.0
    model.layers[1].requires_grad_(False)
    for p in model.layers[1].parameters():
        p.grad = None
    assert health.gradient_norms(model) == [5.0, 0.0]


def test_looks_change_nothing_that_is_trained_and_see_gradients_before_clipping(texts, tmp_path):
    settings = [*SMALL, "steps=4", "evaluate_every=4", "options.noise=0.1", "optim.grad_clip=1e-3"]
    seen = []
    for every in (0, 1):
        out = tmp_path / str(every)
        train(build("tiny", [*settings, f"health_every={every}"]), texts, out)
        seen.append([json.loads(line) for line in (out / METRICS).read_text().splitlines()])
    kept = seen[0][0].keys() - {"tok_per_s"}
    assert all(
        {name: b[name] for name in kept} == {name: a[name] for name in kept}
        for a, b in zip(*seen, strict=True)
    )
    plain, looked = (run_folder.read(tmp_path / str(every)).tensors for every in (0, 1))
    assert all(np.array_equal(w, looked[name]) for name, w in plain.items())
    for record in seen[1]:
        assert 0.1 < math.hypot(*record["grad_norms"]) <= record["grad_norm"] and len(record["outliers"]) == 2
    assert not any("grad_norms" in record for record in seen[0])


def test_the_picture_shows_what_was_recorded_by_layer(tmp_path, monkeypatch):
    look = {"grad_norms": [1.0, 100.0], "largest": [3.0, 4.0], "outliers": [5.0, 60.0]}
    records = [{"step": step, "loss": 1.0, "grad_norm": 1.0} | look for step in range(2)]
    (tmp_path / METRICS).write_text("".join(json.dumps(record) + "\n" for record in records))
    drawn = {}
    monkeypatch.setattr(pictures, "_write", lambda figure, axes, path: drawn.update({path.name: axes}))
    pictures.draw(tmp_path, "nats per token")
    norm, *panels = drawn[HEALTH]
    assert norm.get_yscale() == "log" and len(panels) == len(look)
    for axis, (name, layers) in zip(panels, look.items(), strict=True):
        assert [list(line.get_ydata()) for line in axis.lines] == [[figure] * 2 for figure in layers]
        assert axis.get_yscale() == ("log" if name == "grad_norms" else "linear")


def test_a_run_has_diverged_when_losses_stay_above_the_bound_and_not_before():
    watch = health.Watch()
    assert not any(watch.add(5 - 0.1 * i) for i in range(30))
    best = np.mean([5 - 0.1 * i for i in range(10, 30)])
    assert watch.best == pytest.approx(best) and watch.bound == pytest.approx(best + best / 2)
    assert not any(watch.add(watch.bound + 1) for _ in range(health.WINDOW - 1))
    assert not watch.add(best) and watch.n_high == 0
    climbing = [watch.add(100.0) for _ in range(health.WINDOW)]
    assert climbing == [False] * (health.WINDOW - 1) + [True]


def fallen(scale, risen):
    """Whether and when a loss that falls from 4 to 0.1 and then rises is said to diverge."""
    watch = health.Watch()
    noise = np.random.default_rng(1).uniform(0.8, 1.2, 300)
    losses = [max(4 - 0.05 * i, 0.1) if i < 150 else risen for i in range(300)] * noise
    return [watch.add(scale * loss) for loss in losses]


@pytest.mark.parametrize("scale", [2.0**-20, 1.0, 2.0**17])
def test_a_weighted_loss_is_judged_as_the_plain_one(scale):
    # Far above the best, but near what it was when the run began: little of what was won is lost.
    assert not any(fallen(scale, 0.5))
    diverged = fallen(scale, 2.0)
    assert diverged == fallen(1.0, 2.0) and diverged.index(True) == 150 + health.WINDOW - 1


def test_a_run_that_climbs_stops_and_names_the_last_good_state(tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"Story {i}. {tiny.TEXT}{i * i}")
    recipe = build("tiny", [*SMALL, "steps=200", "save_every=10", "health_every=10"])
    batch = tasks.text.batch

    def spoiled(tokens, step, *rest):
        # From step 45 on nothing of it is language.
        good = batch(tokens, step, *rest)
        return good if step < 45 else np.random.default_rng(step).integers(0, 300, good.shape)

    monkeypatch.setattr(tasks.text, "batch", spoiled)
    out = tmp_path / "run"
    with pytest.raises(
        ValueError, match=r"above .*state\.safetensors holds the last good state, after 40 steps"
    ):
        train(recipe, tmp_path / "texts", out)
    records = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    assert 45 + health.WINDOW - 1 <= len(records) < 100
    monkeypatch.undo()
    assert (out / HEALTH).read_bytes().startswith(b"\x89PNG")
    assert [r["step"] for r in records if "largest" in r][:2] == [9, 19]
    assert state.read(out / "recipe.json") == recipe

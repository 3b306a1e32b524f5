"""Exact and invariant: what is counted of codes and inputs, and when a run is stopped."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import tiny
from onebit.nn.transformer import Transformer
from onebit.quant import quantize_weights
from onebit.train import build, health, state, train
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
    assert dense.keys() == {"saturated", "largest"} and dense["saturated"] == [0.0, 0.0]


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

"""Exact: the loop is the plain loop, to the bit, for the next token and for any other task."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import tiny
from onebit.formats import run as run_folder
from onebit.nn.transformer import Transformer
from onebit.train import build, data, state, train
from onebit.train.loop import fit
from onebit.train.state import METRICS
from onebit.train.task import Batch, Task

SMALL = ["data.vocab_size=300", "data.seq_len=32", "model.d_model=48", "model.d_ff=64", "batch_size=4"]


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_the_loop_is_the_plain_loop_to_the_bit(precision, tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"Story {i}. {tiny.TEXT}{i * i}")
    recipe = build("tiny", [*SMALL, "steps=12", f"precision={precision}", "accumulate=2"])
    train(recipe, tmp_path / "texts", tmp_path / "run")
    found = [json.loads(line)["loss"] for line in (tmp_path / "run" / METRICS).read_text().splitlines()]

    corpus = data.prepare(None, tmp_path / "run" / "corpus", ("*",), 300, 0.1, 32)
    end = corpus.end_token
    model = Transformer(replace(recipe.model, vocab_size=300, bos_token=end, eos_tokens=(end,)), recipe.seed)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    expected = []
    for step in range(12):
        rate, optimizer.param_groups[0]["weight_decay"] = recipe.optim.at(step, 12)
        for group in optimizer.param_groups:
            group["lr"] = rate
        total = 0.0
        for part in torch.from_numpy(data.batch(corpus.train, step, 4, 32, recipe.seed)).chunk(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                logits = model(part[:, :-1]).flatten(0, 1)
                losses = F.cross_entropy(logits, part[:, 1:].flatten(), reduction="none")
                loss = losses.sum() / (4 * 32)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(total)
    assert found == expected
    saved = run_folder.read(tmp_path / "run").tensors
    assert all(np.array_equal(p.detach().numpy(), saved[name]) for name, p in model.named_parameters())


def test_any_task_fits_with_arrays_of_its_own(tmp_path):
    """Answers only count: the second array says which targets do."""
    recipe = build(
        "tiny",
        [
            *SMALL,
            "threads=1",
            "precision=f32",
            "data.vocab_size=320",
            "steps=60",
            "accumulate=2",
            "evaluate_every=20",
        ],
    )
    tokens = np.random.default_rng(1).integers(1, 320, (4, 33))
    counts = np.arange(33)[None, 1:] >= np.array([[4], [8], [12], [30]])

    def losses(model, tokens_BT, counts_BT):
        logits = model(tokens_BT[:, :-1]).flatten(0, 1)
        return F.cross_entropy(logits, tokens_BT[:, 1:].flatten(), reduction="none") * counts_BT.flatten()

    asked = []

    def measure(model, full):
        asked.append(full)
        with torch.no_grad():
            part = losses(model, torch.from_numpy(tokens), torch.from_numpy(counts))
        return {"held_out_nats": part.sum().item() / int(counts.sum())}

    task = Task(
        batch=lambda step: Batch((tokens, counts), int(counts.sum())),
        losses=losses,
        measure=measure,
        tokens_per_step=int(counts.sum()),
        tokenizer=tiny.tokenizer_json(),
        chat_template=tiny.CHAT_TEMPLATE,
        provenance={"answers_sha256": "0"},
    )
    state.start(recipe, tmp_path)
    model = Transformer(replace(recipe.model, vocab_size=320), recipe.seed)
    fit(recipe, task, model, tmp_path)
    records = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert asked == [False, False, True]
    # Who has learned nothing has log(320); 60 steps come to less than half of it.
    assert records[-1]["held_out_nats"] < 0.7 * np.log(320)
    assert records[0]["loss"] == pytest.approx(np.log(320), rel=0.1)
    checkpoint = run_folder.read(tmp_path)
    assert checkpoint.chat_template == tiny.CHAT_TEMPLATE
    assert checkpoint.provenance["answers_sha256"] == "0"
    assert checkpoint.provenance["tokens"] == 60 * counts.sum()

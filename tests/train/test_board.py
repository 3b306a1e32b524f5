"""Oracle: TensorBoard reads back what the metrics say, once for each step, also of a resumed run."""

import json
import sys

import numpy as np
import pytest

from onebit.train import board, build, recipe, train
from onebit.train.board import FOLDER
from onebit.train.state import METRICS

SMALL = ["data.vocab_size=300", "data.seq_len=32", "model.d_model=48", "model.d_ff=64", "batch_size=4"]
SMALL += ["threads=1", "precision=f32", "steps=8", "save_every=3", "evaluate_every=8", "health_every=2"]


def test_tensorboard_reads_the_metrics_once(texts, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, asked = tmp_path / "run", build("tiny", [*SMALL, "tensorboard=true"])
    add = board.Board.add

    def add_and_stop(self, record):
        add(self, record)
        if record["step"] == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(board.Board, "add", add_and_stop)
        train(asked, texts, out)
    # Saved after three steps: two were written that are done again.
    train(asked, None, out, resume=True)

    read = EventAccumulator(str(out / FOLDER), size_guidance={"scalars": 0})
    read.Reload()
    expected = {}
    for line in (out / METRICS).read_text().splitlines():
        record = json.loads(line)
        step = record.pop("step")
        for name, value in record.items():
            is_layers = isinstance(value, list)
            figures = {f"{name}/layer_{i}": v for i, v in enumerate(value)} if is_layers else {name: value}
            for tag, figure in figures.items():
                expected.setdefault(tag, []).append((step, float(np.float32(figure))))
    assert {"loss", "lr", "flips/layer_0", "saturated/layer_1", "held_out_bits_per_byte"} <= expected.keys()
    assert [step for step, _ in expected["loss"]] == list(range(8))
    assert {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]} == expected


def test_without_tensorboard_only_who_asks_for_it_is_refused(texts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    train(build("tiny", SMALL), texts, tmp_path / "plain")
    assert not (tmp_path / "plain" / FOLDER).exists()
    with pytest.raises(ValueError, match=r'install it with: pip install "onebit\[tensorboard\]"'):
        train(build("tiny", [*SMALL, "tensorboard=true"]), texts, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    built = recipe.override(recipe.read(tmp_path / "plain" / "recipe.json"), ["tensorboard=true"])
    with pytest.raises(ValueError, match="tensorboard=false"):
        train(built, None, tmp_path / "plain", resume=True)

"""Exact: what stands at the axes of the pictures, and what is drawn."""

import json

import pytest

from onebit.train import pictures
from onebit.train.state import METRICS

LOOK = {name: [0.1, 0.2] for name in ("flips", "zeros", "saturated", "largest")}


@pytest.mark.parametrize(
    ("loss", "held_out", "labels"),
    [
        ("nats per token", ["held_out_bits_per_byte"], ["bits per byte"]),
        ("nats per answer token", [], []),
        (
            "0.5 text + 1e+05 relations, nats per token",
            ["held_out_bits_per_byte", "held_out_kl"],
            ["bits per byte", "nats per token from the teacher"],
        ),
    ],
)
def test_each_axis_says_what_it_shows(loss, held_out, labels, tmp_path, monkeypatch):
    records = [
        {"step": step, "loss": 3.0 - step, "grad_norm": 1.0} | dict.fromkeys(held_out, 2.0 - step) | LOOK
        for step in range(3)
    ]
    (tmp_path / METRICS).write_text("".join(json.dumps(record) + "\n" for record in records))
    drawn = {}
    write = pictures._write

    def noted(figure, axes, path):
        drawn[path.name] = [
            (axis.get_ylabel(), [list(line.get_ydata()) for line in axis.lines]) for axis in axes
        ]
        write(figure, axes, path)

    monkeypatch.setattr(pictures, "_write", noted)
    pictures.draw(tmp_path, loss)
    first, *others = drawn[pictures.LOSS]
    assert first == (f"training loss: {loss}", [[3.0, 2.0, 1.0]])
    assert others == [(f"held out: {label}", [[2.0, 1.0, 0.0]]) for label in labels]
    assert len(drawn[pictures.HEALTH]) == 5 and drawn[pictures.HEALTH][1][1] == [[0.1] * 3, [0.2] * 3]
    for name in (pictures.LOSS, pictures.HEALTH):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")

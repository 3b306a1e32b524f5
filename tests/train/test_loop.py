"""Invariant: a run killed at any moment and resumed is the run that was never killed; bad input leaves no trace."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from onebit.checkpoint import quantize
from onebit.formats import run as run_folder
from onebit.formats import tensors
from onebit.llm import LLM
from onebit.nn.transformer import Transformer
from onebit.train import build, state, train
from onebit.train.pictures import HEALTH, LOSS
from onebit.train.state import METRICS, STATE

SMALL = ["data.vocab_size=300", "data.seq_len=32", "model.d_model=48", "model.d_ff=64", "batch_size=4"]


def losses(out):
    records = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(len(records)))
    for record in records:
        del record["tok_per_s"]
    return records


def weights(out):
    return {name: np.array(tensor) for name, tensor in run_folder.read(out).tensors.items()}


def assert_same_run(a, b):
    assert losses(a) == losses(b)
    assert all(np.array_equal(w, weights(b)[name]) for name, w in weights(a).items())


def test_a_killed_run_resumes_to_the_bit(texts, tmp_path):
    settings = [*SMALL, "steps=40", "save_every=7", "evaluate_every=10"]
    recipe = build("tiny", settings)
    train(recipe, texts, tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 40

    program = (
        "import sys; from pathlib import Path; from onebit.train import build, train;"
        f"train(build('tiny', {settings!r}), Path(sys.argv[1]), Path(sys.argv[2]), resume=len(sys.argv) > 3)"
    )
    out = tmp_path / "killed"
    arguments = [sys.executable, "-c", program, str(texts), str(out)]
    for after in (3, 12, 20):
        done = (out / METRICS).read_text().count("\n") if out.exists() else 0
        process = subprocess.Popen([*arguments, *(["resume"] if done else [])], stderr=subprocess.DEVNULL)
        while process.poll() is None and (
            not (out / STATE).exists() or (out / METRICS).read_text().count("\n") < after
        ):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with (out / METRICS).open("a") as metrics:
        metrics.write('{"step": 39, "lo')
    train(recipe, texts, out, resume=True)
    assert_same_run(tmp_path / "whole", out)


def test_accumulation_in_parts_gives_the_same_losses_within_float_error(texts, tmp_path):
    for parts in (1, 4):
        train(build("tiny", [*SMALL, "steps=8", f"accumulate={parts}"]), texts, tmp_path / str(parts))
    whole, split = ([r["loss"] for r in losses(tmp_path / str(parts))] for parts in (1, 4))
    # A different order of float sums may flip single codes later on; the first steps are equal to rounding.
    np.testing.assert_allclose(whole[:3], split[:3], rtol=1e-3)


def test_training_lowers_the_loss_and_the_folder_says_where_it_came_from(texts, tmp_path):
    train(build("tiny", [*SMALL, "steps=60"]), texts, tmp_path / "run")
    records = losses(tmp_path / "run")
    assert records[-1]["loss"] < 0.7 * records[0]["loss"]
    assert records[-1]["held_out_bits_per_byte"] < records[29]["held_out_bits_per_byte"]
    checkpoint = run_folder.read(tmp_path / "run")
    assert checkpoint.provenance["recipe"]["name"] == "tiny"
    assert checkpoint.provenance["tokens"] == 60 * 4 * 32
    assert len(checkpoint.provenance["corpus_sha256"]) == 64
    assert checkpoint.config.eos_tokens == (checkpoint.config.bos_token,)


def test_a_run_says_what_it_will_do(texts, tmp_path, capsys):
    recipe = build("tiny", [*SMALL, "steps=4", "optim.warmup_steps=3"])
    train(recipe, texts, tmp_path / "run")
    n_weights = sum(tensor.size for tensor in run_folder.read(tmp_path / "run").tensors.values())
    said = capsys.readouterr().err
    assert f"{n_weights:,} weights to train, 4 steps of 128 tokens" in said
    # The highest of lr (1 - step / 4) (step + 1) / 3: the rate falls while it rises.
    assert re.search(r"rises for 3 of 4 steps, and gets to 0\.\d+ of 0\.\d+; .*warmup_steps=0", said)
    train(recipe, texts, tmp_path / "run", resume=True)
    assert "Nothing is left to do: all 4 steps of this run are done." in capsys.readouterr().err
    train(build("tiny", [*SMALL, "steps=4", "optim.warmup_steps=1"]), texts, tmp_path / "other")
    assert "rises for" not in capsys.readouterr().err


def test_layers_of_two_schemes_learn_and_run(texts, tmp_path):
    """The recipe, resumed; the codes that training saw; the engine's logits."""
    settings = [*SMALL, "model.n_layers=3", "model.layer_weights=b1.58,b1,b1.58", "steps=2", "health_every=1"]
    train(build("tiny", settings), texts, tmp_path / "run")
    master = run_folder.read(tmp_path / "run")
    assert master.config.layer_weights == ("b1.58", "b1", "b1.58")
    assert state.open_run(build("tiny", settings), texts, tmp_path / "run", resume=True) is True
    zeros = losses(tmp_path / "run")[-1]["zeros"]
    assert zeros[1] == 0 < min(zeros[0], zeros[2])
    with torch.no_grad():
        expected = Transformer.from_checkpoint(master).eval()(torch.arange(20)[None])[0].numpy()
    assert np.array_equal(LLM(quantize(master)).logits(range(20)), expected)


def test_what_is_refused(texts, tmp_path):
    recipe = build("tiny", [*SMALL, "steps=2"])
    with pytest.raises(FileNotFoundError, match="no such folder"):
        train(recipe, tmp_path / "nowhere", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="name a folder"):
        train(recipe, None, tmp_path / "run")
    with pytest.raises(ValueError, match="no run to resume"):
        train(recipe, texts, tmp_path / "run", resume=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no text found"):
        train(recipe, tmp_path / "empty", tmp_path / "other")
    assert not (tmp_path / "other").exists()
    train(recipe, texts, tmp_path / "run")
    with pytest.raises(ValueError, match="already holds a run"):
        train(recipe, texts, tmp_path / "run")
    with pytest.raises(ValueError, match=r"optim.lr: 0.003 in the run, 1.0 now"):
        train(build("tiny", [*SMALL, "steps=2", "optim.lr=1"]), texts, tmp_path / "run", resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        train(recipe, texts, tmp_path / "file")


def test_a_corpus_without_a_recipe_is_made_again(texts, tmp_path):
    # What a kill leaves behind between the two.
    train(build("tiny", [*SMALL, "steps=1"]), texts, tmp_path / "run")
    before = (tmp_path / "run" / "corpus" / "train.npy").read_bytes()
    (tmp_path / "run" / "recipe.json").unlink()
    train(build("tiny", [*SMALL, "steps=1", "data.vocab_size=290"]), texts, tmp_path / "run")
    assert (tmp_path / "run" / "corpus" / "train.npy").read_bytes() != before


def test_a_damaged_state_is_named(texts, tmp_path):
    recipe = build("tiny", [*SMALL, "steps=2"])
    train(recipe, texts, tmp_path / "run")
    path = tmp_path / "run" / STATE
    header, contents = tensors.split_header(tensors.map_file(path))
    whole = {name: np.array(a) for name, a in tensors.views(header, contents).items()}
    states = [("x", whole), ("3", whole), ("", whole), ("1", {}), ("1", dict(list(whole.items())[1:]))]
    for step, contents in states:
        tensors.write(path, {"step": step}, contents)
        with pytest.raises(ValueError, match=rf"{STATE}: not the state"):
            train(recipe, None, tmp_path / "run", resume=True)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{STATE}: .*truncated"):
        train(recipe, None, tmp_path / "run", resume=True)


def test_weights_that_are_no_numbers_are_never_saved(texts, tmp_path):
    out = tmp_path / "run"
    # The first step's loss is fine; its update is not.
    settings = [*SMALL, "steps=3", "save_every=1", "optim.warmup_steps=0", "optim.lr=1e300"]
    with pytest.raises(ValueError, match="training diverged"):
        train(build("tiny", settings), texts, out)
    assert not (out / STATE).exists()


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_its_state(texts, tmp_path):
    recipe = build("tiny", [*SMALL, "steps=40", "save_every=1", "optim.lr=1e30", "optim.warmup_steps=0"])
    with pytest.raises(ValueError, match="lower optim.lr"):
        train(recipe, texts, tmp_path / "run")
    assert 0 < len(losses(tmp_path / "run")) < 40
    assert all(np.isfinite(tensor).all() for tensor in weights(tmp_path / "run").values())


def test_bf16_on_cpu(texts, tmp_path):
    train(build("tiny", [*SMALL, "steps=30", "precision=bf16"]), texts, tmp_path / "run")
    records = losses(tmp_path / "run")
    assert records[-1]["loss"] < 0.85 * records[0]["loss"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on file sizes")
def test_a_disk_without_room_leaves_the_saved_state(texts, tmp_path, monkeypatch):
    out = tmp_path / "run"
    settings = [*SMALL, "steps=4", "save_every=2"]
    save = state.save

    def save_once(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(state, "save", save_once)
        train(build("tiny", settings), texts, out)
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000));"
        "from pathlib import Path; from onebit.train import build, train;"
        f"train(build('tiny', {settings!r}), Path(sys.argv[1]), Path(sys.argv[2]), resume=True)"
    )
    process = subprocess.run([sys.executable, "-c", program, texts, out], capture_output=True, text=True)
    assert process.returncode == 1 and f"{STATE}'" in process.stderr.splitlines()[-1]
    after = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert after.keys() - {out / LOSS, out / HEALTH} == before.keys()
    assert all(after[path] == before[path] for path in before if path.name != METRICS)
    train(build("tiny", settings), None, out, resume=True)
    assert len(losses(out)) == 4

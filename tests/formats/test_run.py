"""The run folder. Kinds: invariant (round trip), exact (refusals), oracle (safetensors writes one)."""

import json
from dataclasses import replace

import numpy as np
import pytest

import tiny
from onebit.checkpoint import quantize
from onebit.formats import run


@pytest.fixture
def folder(tmp_path):
    run.write(tiny.master(chat_template=tiny.CHAT_TEMPLATE), tmp_path / "run")
    return tmp_path / "run"


def test_round_trip(folder):
    master, read = tiny.master(chat_template=tiny.CHAT_TEMPLATE), run.read(folder)
    assert (read.config, read.tokenizer, read.chat_template) == (
        master.config,
        master.tokenizer,
        master.chat_template,
    )
    assert read.provenance == master.provenance and set(read.tensors) == set(master.tensors)
    for name, w in master.tensors.items():
        assert np.array_equal(read.tensors[name], w) and not read.tensors[name].flags.writeable


def test_files_of_the_folder(folder):
    names = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert json.loads((folder / "config.json").read_text()) == tiny.CONFIG.to_dict()
    assert (folder / "tokenizer.json").read_bytes() == tiny.tokenizer_json()


def test_writing_again_replaces_and_removes(folder):
    (folder / "metrics.jsonl").write_text("{}\n")
    run.write(replace(tiny.master(seed=1), tokenizer=None), folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
    ]
    assert np.array_equal(run.read(folder).tensors["norm.weight"], tiny.master(seed=1).tensors["norm.weight"])


def test_recipe_file_becomes_provenance(folder):
    (folder / "recipe.json").write_text('{"steps": 10}')
    assert run.read(folder).provenance == {"recipe": {"name": "tiny", "seed": 0}}
    run.write(replace(tiny.master(), provenance={}), folder)
    assert run.read(folder).provenance == {"recipe": {"steps": 10}}


def test_a_file_of_the_safetensors_package_is_read(folder):
    safetensors = pytest.importorskip("safetensors.numpy")
    tensors = tiny.tensors(tiny.CONFIG, seed=5)
    safetensors.save_file(tensors, folder / "model.safetensors")
    read = run.read(folder)
    assert all(np.array_equal(read.tensors[name], w) for name, w in tensors.items())


def test_a_packed_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"write a \.onebit file"):
        run.write(quantize(tiny.master()), tmp_path / "run")
    assert not list(tmp_path.iterdir())

"""Converted models that are kept. Kinds: invariant (once is enough), exact (what makes a new one necessary)."""

import os
from pathlib import Path

import pytest

import tiny
from formats.test_llama2c import contents, weights
from onebit import formats, load
from onebit.checkpoint import quantize
from onebit.formats import cache


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    path = tmp_path / "model.bin"
    path.write_bytes(contents(weights(True), True))
    return path


def test_a_model_is_converted_once(model):
    kept, report = cache.ready(model)
    assert report and report.made.is_packed and kept.parent == cache.folder()
    assert cache.ready(model) == (kept, None)
    # The same content elsewhere is the same model.
    other = model.with_name("other.bin")
    other.write_bytes(model.read_bytes())
    assert cache.ready(other) == (kept, None)


def test_content_and_neighbours_count(model):
    kept, _ = cache.ready(model)
    data = bytearray(model.read_bytes())
    data[40] ^= 1
    model.write_bytes(data)
    changed, report = cache.ready(model)
    assert changed != kept and report
    (model.parent / "tokenizer.bin").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"tokenizer\.bin"):
        cache.ready(model)
    assert len(list(cache.folder().glob("*"))) == 3


def test_a_model_that_keeps_size_and_time_is_another_one(model):
    kept, _ = cache.ready(model)
    status = model.stat()
    data = bytearray(model.read_bytes())
    data[40] ^= 1
    model.write_bytes(data)
    os.utime(model, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert cache.ready(model)[0] != kept


def test_neighbours_count_whatever_the_model_is_called(model):
    model = model.rename(model.with_suffix(".model"))
    kept, _ = cache.ready(model)
    (model.parent / "tokenizer.bin").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"tokenizer\.bin"):
        cache.ready(model)


def test_a_damaged_copy_is_made_again(model):
    kept, _ = cache.ready(model)
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-100])
    again, report = cache.ready(model)
    assert again == kept and report and kept.read_bytes() == whole


def test_a_touched_file_is_hashed_again_and_found(model):
    kept, _ = cache.ready(model)
    os.utime(model, (1, 1))
    assert cache.ready(model) == (kept, None)


def test_models_of_ours_run_where_they_are(tmp_path, model):
    formats.write(quantize(tiny.master()), tmp_path / "x.onebit")
    formats.run.write(tiny.master(), tmp_path / "run")
    for path in (tmp_path / "x.onebit", tmp_path / "run"):
        assert cache.ready(path) == (path, None)
    assert not cache.folder().exists()


def test_load_says_what_was_rounded(model):
    model.write_bytes(contents({name: w * 1.001 for name, w in weights(True).items()}, True))
    with pytest.warns(UserWarning, match="embedding, F32 to bf16: .* of the values differ"):
        first = load(model)
    assert load(model).generate([1], max_tokens=5, temperature=0) is not None
    assert first.label == "W16A16KV16"

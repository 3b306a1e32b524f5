"""Exact: how kept answers lie on the disk. Invariant: a disk without room for them costs no run, and leaves no half."""

import errno
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny
from onebit.cli import main
from onebit.formats import run as run_folder
from onebit.train import data, teacher
from onebit.train.origin import given_tokenizer
from onebit.train.state import METRICS

DENSE = tiny.config(weights="dense", activations="none", sub_norm=False, activation="silu")
NAMES = ["ids.npy", "log_p.npy", "log_rest.npy"]
SETTINGS = ["steps=2", "data.seq_len=32", "batch_size=4", "threads=1", "precision=f32"]


@pytest.fixture(scope="module")
def asked():
    return teacher.Teacher(tiny.master(DENSE), "f32", torch.device("cpu"))


@pytest.fixture(scope="module")
def corpus(texts, tmp_path_factory):
    given = given_tokenizer(tiny.master(DENSE))
    return data.prepare(texts, tmp_path_factory.mktemp("corpus"), ("*",), 0, 0.1, 32, given)


def cannot(*_):
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


@pytest.mark.skipif(os.name == "nt", reason="Windows counts no blocks")
@pytest.mark.parametrize("system", ["as it is", "sets no room aside", "cannot here"])
def test_files_have_their_room_before_the_first_answer(system, asked, corpus, tmp_path, monkeypatch):
    """A file with holes has fewer blocks of 512 bytes than its length asks for, and a full disk ends who fills them."""
    if system == "sets no room aside":
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    elif system == "cannot here":
        monkeypatch.setattr(os, "posix_fallocate", cannot, raising=False)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(asked, "logits", stop)
        teacher.keep_top_k(tmp_path / "answers", asked, corpus, 32, 200, 1.0)
    found = {path.name: path.stat() for path in (tmp_path / "answers").iterdir()}
    assert sorted(found) == NAMES
    assert all(stat.st_blocks * 512 >= stat.st_size > 128 for stat in found.values())
    # Nothing was noted, so they are no answers yet.
    kept = teacher.keep_top_k(tmp_path / "answers", asked, corpus, 32, 200, 1.0)
    np.testing.assert_array_equal(kept.ids[:32], _likeliest(asked, corpus.train[:32], 200))


def _likeliest(asked, tokens, k):
    logits = asked.logits(torch.from_numpy(tokens.astype(np.int64))[None])[0]
    return logits.topk(k).indices.numpy()


def test_a_disk_without_room_for_the_answers(texts, tmp_path, monkeypatch, capsys):
    run_folder.write(tiny.master(DENSE), tmp_path / "dense")
    out, calls = tmp_path / "run", []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def onebit(*words):
        monkeypatch.setattr("sys.argv", ["onebit", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr().err.splitlines()[-1]

    words = [word for setting in SETTINGS for word in ("--set", setting)]
    words = ["--teacher", tmp_path / "dense", "--data", texts, "--out", out, "--cache-logits", 8, *words]
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full, raising=False)
        code, error = onebit("distill", *words)
    n_tokens = (len(np.load(out / "corpus" / "train.npy")) - 1) // 32 * 32
    assert (code, error) == (
        2,
        f"onebit: error: {out / 'corpus' / 'teacher' / 'log_p.npy'}: {os.strerror(errno.ENOSPC)}; the teacher's "
        f"answers take {(4 * 8 + 2) * n_tokens:,} bytes here: make room for them, or start another run with a smaller "
        f"--cache-logits or a --corpus on another disk; when that is mended, go on with: "
        f"onebit distill --out {out} --resume",
    )
    assert not list((out / "corpus" / "teacher").iterdir()) and not (out / METRICS).exists()
    assert onebit("distill", "--out", out, "--resume")[0] == 0
    assert len((out / METRICS).read_text().splitlines()) == 2
    about = json.loads((out / "corpus" / "teacher" / teacher.ABOUT).read_text())
    assert about["sequences"] == n_tokens // 32


@pytest.mark.parametrize(("n_rows", "width"), [(2**16, 2), (2**16 + 64, 4)])
def test_bytes_of_an_answer(n_rows, width, corpus, tmp_path):
    """Of the rows of the teacher's embedding, which may be more than its tokenizer has tokens."""
    checkpoint = tiny.master(DENSE)
    embed = np.zeros((n_rows, DENSE.d_model), np.float32)
    # In the last rows the same tokens again, with twice the logits.
    embed[:320], embed[-320:] = checkpoint.tensors["embed.weight"], 2 * checkpoint.tensors["embed.weight"]
    wide = replace(
        checkpoint,
        config=replace(DENSE, vocab_size=n_rows),
        tensors=checkpoint.tensors | {"embed.weight": embed},
    )
    short = replace(corpus, train=corpus.train[:65])
    asked = teacher.Teacher(wide, "f32", torch.device("cpu"))
    kept = teacher.keep_top_k(tmp_path, asked, short, 32, 5, 1.0)
    sizes = [(tmp_path / name).stat().st_size - 128 for name in NAMES]
    assert sizes == [64 * 5 * width, 64 * 5 * 2, 64 * 2]
    expected = _likeliest(asked, corpus.train[:32], 5)
    np.testing.assert_array_equal(kept.ids[:32], expected)
    assert expected.max() >= n_rows - 320


def test_a_large_vocabulary_is_read_in_smaller_steps(asked, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "STEP_LOGITS", 3 * 32 * 320 + 5)
    seen, logits = [], asked.logits
    monkeypatch.setattr(
        asked, "logits", lambda tokens, *rest: seen.append(len(tokens)) or logits(tokens, *rest)
    )
    kept = teacher.keep_top_k(tmp_path, asked, corpus, 32, 4, 1.0)
    assert max(seen) == 3 and sum(seen) == len(kept.ids) // 32

"""`onebit eval`: what it prints, the file it writes, how it goes on, and what it refuses. Kinds: exact, invariant."""

import json
import subprocess
import sys

import pytest
import typer

import tiny
from onebit import formats
from onebit.checkpoint import quantize
from onebit.cli.eval import eval as measure
from onebit.eval import scoring
from onebit.eval.texts import Windows, perplexity
from onebit.llm import LLM, load

ITEM = "Dog: The dog ran. it\n1\nslept.\nran home.\nwas red.\nplayed.\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two models, a text, and the items of a task; the cache is in it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    formats.write(quantize(tiny.master()), tmp_path / "tiny.onebit")
    formats.write(quantize(tiny.master(seed=1)), tmp_path / "other.onebit")
    (tmp_path / "text.txt").write_text(tiny.TEXT)
    (tmp_path / "hellaswag").mkdir()
    (tmp_path / "hellaswag/hellaswag_val_full.txt").write_text(4 * ITEM)
    return tmp_path


def read(path):
    return json.loads(path.read_text())


def test_a_text_is_measured_and_written_down(folder, capsys):
    model, out = str(folder / "tiny.onebit"), folder / "out.json"
    measure(model, [folder / "text.txt"], window=64, threads=1, out=out, kv_cache="int8")
    llm = load(model, threads=1, kv_cache="int8")
    expected = perplexity(scoring.Scorer(llm), tiny.TEXT, Windows.of(llm, 64))
    (result,) = read(out)["results"]
    assert result["figures"]["perplexity"] == expected.perplexity._asdict()
    assert (result["kind"], result["n_scored"]) == ("text", len(expected.nll))
    assert {"window": 64, "stride": 32, "bos": None, "halves": False}.items() <= result["settings"].items()
    assert read(out)["model"]["label"] == "W1.58A8KV8"
    shown = capsys.readouterr().out
    assert "W1.58A8KV8" in shown and f"{expected.perplexity.value:.4g}" in shown and "bits per byte" in shown


def test_what_is_there_is_not_measured_again(folder, monkeypatch):
    model, out, text = str(folder / "tiny.onebit"), folder / "out.json", folder / "text.txt"
    measure(model, [text], window=64, threads=1, out=out)
    first = read(out)
    monkeypatch.setattr(scoring.Scorer, "logits", None)
    measure(model, [text], window=64, threads=1, out=out)
    assert read(out) == first
    with pytest.raises(TypeError):
        measure(model, [text], window=32, threads=1, out=out)


def test_results_of_another_model_are_not_mixed_in(folder):
    out, text = folder / "out.json", [folder / "text.txt"]
    measure(str(folder / "tiny.onebit"), text, window=64, threads=1, out=out)
    with pytest.raises(ValueError, match="holds results of another model"):
        measure(str(folder / "other.onebit"), text, window=64, threads=1, out=out)
    with pytest.raises(ValueError, match="label W1.58A8KV16, now W1.58A8KV8"):
        measure(str(folder / "tiny.onebit"), text, window=64, threads=1, out=out, kv_cache="int8")
    out.write_text("{}")
    with pytest.raises(ValueError, match="is no file of results"):
        measure(str(folder / "tiny.onebit"), text, window=64, threads=1, out=out)


def test_the_answers_of_a_reference_are_kept(folder, capsys, monkeypatch):
    model, reference, text = str(folder / "tiny.onebit"), str(folder / "other.onebit"), [folder / "text.txt"]
    passes = []
    logits = scoring.Scorer.logits
    monkeypatch.setattr(
        scoring.Scorer, "logits", lambda self, *args: passes.append(self) or logits(self, *args)
    )
    measure(model, text, window=192, threads=1, against=reference, out=folder / "a.json")
    assert len({id(scorer) for scorer in passes}) == 2
    passes.clear()
    measure(model, text, window=192, threads=1, against=reference, out=folder / "b.json")
    assert len({id(scorer) for scorer in passes}) == 1
    (a,), (b,) = (read(folder / name)["results"] for name in ("a.json", "b.json"))
    assert a["distance"] == b["distance"] and a["distance"]["kl"]["value"] > 0
    assert "KL, nats per token" in capsys.readouterr().out
    measure(reference, text, window=192, threads=1, against=reference, out=folder / "c.json")
    assert read(folder / "c.json")["results"][0]["distance"]["kl"]["value"] == 0


def test_texts_are_written_under_each_setting_and_judged(folder, capsys, monkeypatch):
    (folder / "prompts.txt").write_text("Once upon\n\nThe dog\n")
    model, judge, out = str(folder / "tiny.onebit"), str(folder / "other.onebit"), folder / "out.json"
    settings = {
        "generate": folder / "prompts.txt",
        "sampling": ["", "temperature=2,top_k=0,min_sigma=2"],
        "judge": judge,
        "max_tokens": 30,
        "seeds": 2,
        "threads": 1,
        "out": out,
    }
    measure(model, **settings)
    plain, cut = read(out)["results"]
    assert (cut["kind"], cut["n_texts"], cut["settings"]["min_sigma"]) == ("samples", 4, 2.0)
    assert plain["settings"]["temperature"] == 0.8 and plain["figures"] != cut["figures"]
    shown = capsys.readouterr().out
    for word in ("default", "3-grams", "entropy", "judge", f"{cut['figures']['entropy']['value']:.4g}"):
        assert word in shown
    first = read(out)
    monkeypatch.setattr(LLM, "generate", None)
    measure(model, **settings)
    assert read(out) == first


def test_a_task_goes_on_after_a_stop(folder, monkeypatch, capsys):
    from onebit.eval import tasks

    monkeypatch.setattr(tasks, "REQUESTS_AT_ONCE", 6)
    model, asked = str(folder / "tiny.onebit"), []
    score = scoring.Scorer.score

    def crash(self, texts):
        asked.append(len(texts))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return score(self, texts)

    monkeypatch.setattr(scoring.Scorer, "score", crash)
    settings = {"tasks": "hellaswag", "data": folder, "threads": 1}
    with pytest.raises(typer.Exit):
        measure(model, **settings, out=folder / "out.json")
    assert "the same command goes on" in capsys.readouterr().err
    assert len(next(iter(read(folder / "out.json")["unfinished"].values()))["answers"]) == 6
    measure(model, **settings, out=folder / "out.json")
    assert asked == [6, 6, 6, 4]
    measure(model, **settings, out=folder / "whole.json")
    (found,), (whole,) = (read(folder / name)["results"] for name in ("out.json", "whole.json"))
    assert found["figures"] == whole["figures"] and found["n_items"] == 4
    assert read(folder / "out.json")["unfinished"] == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "nothing to measure: give --text FILE, --generate FILE or --tasks"),
        ({"tasks": "hellaswag", "judge": "x"}, "--sampling and --judge are about texts that are written"),
        ({"tasks": "hellaswag", "against": "x"}, "--against compares models on a text"),
        ({"tasks": "hellaswag", "limit": 0}, "--limit is 0; expected at least 1"),
        ({"tasks": "hellaswag", "shots": -1}, "shots is -1"),
        ({"tasks": "helaswag"}, "did you mean 'hellaswag'"),
    ],
)
def test_what_cannot_be_measured_is_refused(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        measure(str(folder / "tiny.onebit"), data=folder, **settings)


def test_the_command_line_says_what_is_wrong(folder):
    command = [sys.executable, "-m", "onebit", "eval", str(folder / "tiny.onebit"), "--text", "absent.txt"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "onebit: error: absent.txt: No such file or directory\n"

"""Invariant: a student comes nearer to its teacher; kept answers are live ones; a stopped run is the same run.

Exact: gains, tokens around documents. What does not fit is refused.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny
from onebit import formats, llm
from onebit.formats import run as run_folder
from onebit.nn.transformer import Transformer
from onebit.train import build, data, distill, health, losses, recipe, student, teacher, train
from onebit.train.state import METRICS

SMALL = ["data.seq_len=32", "data.held_out=0.1", "batch_size=4", "threads=1", "precision=f32", "save_every=5"]


@pytest.fixture(scope="module")
def dense(texts, tmp_path_factory):
    """A trained full-precision model without sub-norms, as others have."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    settings = ["data.vocab_size=300", "data.seq_len=32", "model.d_model=48", "model.d_ff=80", "batch_size=8"]
    settings += [
        "model.weights=dense",
        "model.activations=none",
        "model.sub_norm=false",
        "model.activation=silu",
    ]
    train(build("tiny", [*settings, "steps=150", "evaluate_every=150", "save_every=150"]), texts, out)
    return out


def student_of(dense, texts, out, *settings, resume=False):
    checkpoint = formats.read(dense)
    built = distill.build_distill(str(dense), checkpoint, [*SMALL, *settings])
    distill.distill(built, checkpoint, texts, out, resume)
    return [json.loads(line) for line in (out / METRICS).read_text().splitlines()]


def corpus_of(dense, texts, out, seq_len=32):
    given = distill.given_tokenizer(formats.read(dense))
    return data.prepare(texts, out, ("*",), 0, 0.1, seq_len, given)


def without_speed(records):
    return [{name: value for name, value in r.items() if name != "tok_per_s"} for r in records]


@pytest.mark.parametrize("sub_norm", ["calibrated", "none"])
def test_the_student_comes_nearer_and_runs(dense, texts, tmp_path, sub_norm):
    out = tmp_path / "run"
    records = student_of(
        dense,
        texts,
        out,
        f"distill.sub_norm={sub_norm}",
        "steps=40",
        "evaluate_every=10",
        "optim.warmup_steps=5",
    )
    kl = [r["held_out_kl"] for r in records if "held_out_kl" in r]
    assert len(kl) == 4 and kl[-1] < 0.5 * kl[0]
    assert np.mean([r["loss"] for r in records[-5:]]) < 0.5 * np.mean([r["loss"] for r in records[:5]])
    made, source = run_folder.read(out), formats.read(dense)
    assert made.config.weights == "b1.58" and made.config.sub_norm == (sub_norm == "calibrated")
    assert made.tokenizer == source.tokenizer
    assert made.provenance["teacher_sha256"] == teacher.fingerprint(source)
    formats.convert(out, tmp_path / "student.onebit")
    assert llm.load(tmp_path / "student.onebit").generate("Once", max_tokens=8, seed=1).tokens


def test_a_binary_student_of_every_loss(dense, texts, tmp_path):
    settings = [
        "model.weights=b1",
        "distill.text=0.5",
        "distill.relations=1",
        "distill.relation_heads=2",
        "steps=20",
    ]
    records = student_of(dense, texts, tmp_path / "run", *settings, "optim.warmup_steps=5")
    assert records[-1]["loss"] < records[0]["loss"]
    assert run_folder.read(tmp_path / "run").config.label == "W1A8KV16"


def test_layers_of_a_student_may_differ(dense):
    checkpoint = formats.read(dense)
    table = ("b1.58", *["b1"] * (checkpoint.config.n_layers - 1))
    built = distill.build_distill(str(dense), checkpoint, [f"model.layer_weights={','.join(table)}"])
    assert built.model == tiny.replace(
        checkpoint.config, layer_weights=table, weights="b1.58", activations="a8"
    )


def test_rounding_that_sets_in_slowly_begins_at_the_teacher(dense, texts, tmp_path):
    settings = ["steps=1", "distill.sub_norm=none", "optim.lr=0", "optim.lr_second=0"]
    (slow,) = student_of(dense, texts, tmp_path / "slow", *settings, "options.lambda_steps=1000")
    (fast,) = student_of(dense, texts, tmp_path / "fast", *settings)
    assert slow["loss"] < 0.05 * fast["loss"]


def test_a_loss_that_climbs_while_rounding_sets_in_is_no_divergence(dense, texts, tmp_path, monkeypatch):
    for name, value in (("WINDOW", 4), ("RISE_SHARE", 0.0), ("WON_SHARE", 0.0)):
        monkeypatch.setattr(health, name, value)
    settings = ["steps=20", "optim.lr=0", "optim.lr_second=0", "options.lambda_steps=20"]
    records = student_of(dense, texts, tmp_path / "run", *settings)
    assert records[-1]["loss"] > 3 * records[0]["loss"]


def test_calibrated_norms_are_the_nearest_to_the_identity(dense, texts, tmp_path):
    """Of a dense model with them: nearer to the teacher than with any other common gain, and by far than with 1."""
    checkpoint = student.to_master(formats.read(dense))
    corpus = corpus_of(dense, texts, tmp_path / "corpus")
    tokens = torch.from_numpy(data.batch(corpus.train, 0, 8, 32, 1)[:, :-1])
    gains = student.sub_norm_gains(checkpoint, tokens)
    assert {g.shape for g in gains.values()} == {(64,), (80,)} and all(
        len(set(g)) == 1 for g in gains.values()
    )
    with_norms = replace(checkpoint.config, sub_norm=True)

    def kl(factor):
        scaled = checkpoint.tensors | {name: gain * np.float32(factor) for name, gain in gains.items()}
        inserted = replace(
            checkpoint, config=with_norms, tensors={name: scaled[name] for name in with_norms.tensor_shapes()}
        )
        asked = [Transformer.from_checkpoint(c)(tokens).flatten(0, 1) for c in (inserted, checkpoint)]
        return losses.logit_kl(*asked).mean().item()

    with torch.no_grad():
        assert kl(1) < min(kl(0.5), kl(2.0))
        assert kl(1) < 0.1


def test_gains_by_their_formula(dense):
    checkpoint = student.to_master(formats.read(dense))
    tokens = torch.randint(300, (3, 20), generator=torch.Generator().manual_seed(0))
    gains = student.sub_norm_gains(checkpoint, tokens)
    model = Transformer.from_checkpoint(checkpoint)
    block, c = model.layers[0], model.config
    seen = []
    block.linear = lambda x, *names: (
        seen.append(x) if names == ("o",) else None,
        type(block).linear(block, x, *names),
    )[1]
    with torch.no_grad():
        model(tokens)
    rms = (seen[0].double().square().mean(-1) + c.norm_eps).sqrt().mean().item()
    np.testing.assert_allclose(gains["layers.0.attn_sub_norm.weight"], rms, rtol=1e-5)


def test_kept_answers_are_those_that_are_asked_for(dense, texts, tmp_path):
    """All tokens kept: the loss of the live teacher, within the rounding of logs to float16, 2^-11 of each."""
    checkpoint = formats.read(dense)
    corpus = corpus_of(dense, texts, tmp_path / "corpus")
    asked = teacher.Teacher(checkpoint, "f32", torch.device("cpu"))
    built = distill.build_distill(str(dense), checkpoint, [*SMALL, "distill.temperature=2"])
    model = distill.first_student(checkpoint, built, corpus)
    live = distill.distillation(built, corpus, asked, None)
    for k in (300, 16):
        answers = teacher.keep_top_k(tmp_path / str(k), asked, corpus, 32, k, 2.0)
        task = distill.distillation(built, corpus, asked, answers)
        arrays = task.batch(3).arrays
        found = task.losses(model, *map(torch.from_numpy, arrays))
        whole = live.losses(model, torch.from_numpy(arrays[0]))
        assert k < 300 or abs(found - whole).max() < 5e-3
        # What is merged is lost, and nothing is added.
        assert (found < whole + 5e-3).all()


def test_answers_are_resumed_and_checked(dense, texts, tmp_path, monkeypatch):
    checkpoint = formats.read(dense)
    corpus = corpus_of(dense, texts, tmp_path / "corpus")
    asked = teacher.Teacher(checkpoint, "f32", torch.device("cpu"))
    whole = teacher.keep_top_k(tmp_path / "whole", asked, corpus, 32, 8, 1.0)
    monkeypatch.setattr(teacher, "STEP_TOKENS", 64)
    monkeypatch.setattr(teacher, "SAVE_TOKENS", 128)
    calls, logits = [], asked.logits

    def stop_after(n):
        def counted(tokens, *rest):
            calls.append(len(tokens))
            if len(calls) > n:
                raise KeyboardInterrupt
            return logits(tokens, *rest)

        return counted

    monkeypatch.setattr(asked, "logits", stop_after(7))
    with pytest.raises(KeyboardInterrupt):
        teacher.keep_top_k(tmp_path / "part", asked, corpus, 32, 8, 1.0)
    assert json.loads((tmp_path / "part" / teacher.ABOUT).read_text())["sequences"] == 12
    calls.clear()
    monkeypatch.setattr(asked, "logits", stop_after(10**6))
    again = teacher.keep_top_k(tmp_path / "part", asked, corpus, 32, 8, 1.0)
    assert sum(calls) == len(whole.log_rest) // 32 - 12
    assert np.array_equal(again.ids, whole.ids)
    # Products of other sizes may be summed in another order.
    np.testing.assert_allclose(again.log_p, whole.log_p, rtol=2e-3, atol=2e-3)
    for change, message in (((32, 9, 1.0), "k 8, not 9"), ((32, 8, 2.0), "temperature 1.0, not 2.0")):
        with pytest.raises(ValueError, match=message):
            teacher.keep_top_k(tmp_path / "part", asked, corpus, *change)
    asked.sha256 = "0"
    with pytest.raises(ValueError, match="teacher_sha256 .*delete the folder"):
        teacher.keep_top_k(tmp_path / "part", asked, corpus, 32, 8, 1.0)
    asked.sha256 = teacher.fingerprint(checkpoint)
    (tmp_path / "part" / "ids.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"ids.npy: .*delete the folder"):
        teacher.keep_top_k(tmp_path / "part", asked, corpus, 32, 8, 1.0)


@pytest.mark.parametrize("cache", [0, 8])
def test_a_stopped_run_goes_on_to_the_bit(dense, texts, tmp_path, monkeypatch, cache):
    settings = [f"distill.cache_logits={cache}", "steps=12", "evaluate_every=4"]
    whole = student_of(dense, texts, tmp_path / "whole", *settings)
    fit, made = distill.fit, []

    def stopping(built, task, *rest):
        def batch(step):
            if step == 8 and not made:
                made.append(step)
                raise KeyboardInterrupt
            return task.batch(step)

        fit(built, replace(task, batch=batch), *rest)

    monkeypatch.setattr(distill, "fit", stopping)
    with pytest.raises(KeyboardInterrupt):
        student_of(dense, texts, tmp_path / "stopped", *settings)
    again = student_of(dense, None, tmp_path / "stopped", *settings, resume=True)
    assert made and without_speed(again) == without_speed(whole)
    weights = [run_folder.read(tmp_path / name).tensors for name in ("whole", "stopped")]
    assert all(np.array_equal(w, weights[1][name]) for name, w in weights[0].items())


def test_runs_share_a_corpus(dense, texts, tmp_path):
    shared = [f"distill.corpus={tmp_path / 'corpus'}", "distill.cache_logits=4", "steps=2"]
    student_of(dense, texts, tmp_path / "a", *shared)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "corpus").rglob("*.npy")}
    student_of(dense, None, tmp_path / "b", *shared, "optim.lr=1e-4")
    assert len(times) == 5 and all(path.stat().st_mtime_ns == before for path, before in times.items())


def test_documents_stand_between_the_teachers_tokens(dense, texts, tmp_path):
    checkpoint = formats.read(dense)
    end = checkpoint.config.eos_tokens[0]
    # bos and eos are one token here, which stands once between two texts.
    assert distill.given_tokenizer(checkpoint) == data.Given(checkpoint.tokenizer, None, end)
    other = replace(checkpoint, config=replace(checkpoint.config, bos_token=5))
    given = distill.given_tokenizer(other)
    assert given == data.Given(checkpoint.tokenizer, 5, end)
    corpus = data.prepare(texts, tmp_path / "corpus", ("*",), 0, 0.1, 32, given)
    assert corpus.tokenizer == checkpoint.tokenizer and corpus.train[0] == 5 and corpus.train[-1] == end
    ends = np.flatnonzero(corpus.train == end)[:-1]
    assert (corpus.train[ends + 1] == 5).all()


def test_what_is_refused(dense, texts, tmp_path):
    checkpoint = formats.read(dense)
    built = distill.build_distill(str(dense), checkpoint, [*SMALL, "steps=1"])
    with pytest.raises(ValueError, match=r"the teacher has b1.58 weights; expected a full-precision model"):
        distill.build_distill("x", tiny.master())
    with pytest.raises(ValueError, match="no tokenizer"):
        distill.build_distill("x", replace(checkpoint, tokenizer=None))
    with pytest.raises(ValueError, match=r"model.d_model is 64; the student has that of its teacher, 48"):
        distill.build_distill("x", checkpoint, ["model.d_model=64"])
    with pytest.raises(ValueError, match="goes up to token 319, its embedding has 300 rows"):
        distill.given_tokenizer(replace(checkpoint, tokenizer=tiny.tokenizer_json(320)))
    with pytest.raises(ValueError, match="names no token that ends a text"):
        distill.given_tokenizer(replace(checkpoint, config=replace(checkpoint.config, eos_tokens=())))
    with pytest.raises(ValueError, match="all 0; nothing would be learned"):
        distill.build_distill("x", checkpoint, ["distill.logits=0"])
    with pytest.raises(ValueError, match="data.vocab_size: the tokenizer is that of the teacher"):
        distill.build_distill("x", checkpoint, ["data.vocab_size=999"])
    with pytest.raises(ValueError, match=r"distill.temperature is 0.0; expected a number above 0"):
        distill.build_distill("x", checkpoint, ["distill.temperature=0"])
    # Another teacher, of another vocabulary, for the same run and for the same corpus.
    config = tiny.config(weights="dense", activations="none", sub_norm=False)
    other = tiny.master(config)
    with pytest.raises(ValueError, match="not the teacher of this run, which was "):
        distill.distill(built, other, texts, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    corpus_of(dense, texts, tmp_path / "corpus")
    shared = distill.build_distill("x", other, [*SMALL, f"distill.corpus={tmp_path / 'corpus'}"])
    with pytest.raises(ValueError, match="made with another tokenizer"):
        distill.distill(shared, other, None, tmp_path / "run")
    distill.distill(built, checkpoint, texts, tmp_path / "run")
    with pytest.raises(ValueError, match="is the run of a student; go on with: onebit distill"):
        train(recipe.read(tmp_path / "run" / "recipe.json"), None, tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="has no teacher"):
        distill.distill(build("tiny"), checkpoint, texts, tmp_path / "other")

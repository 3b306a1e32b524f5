"""Invariant: a student comes nearer to its teacher; kept answers are live ones; a stopped run is the same run.

Exact: gains, tokens around documents. Oracle: relations of a layer in numpy and float64. What does not fit is refused.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny
from onebit import formats, llm
from onebit.cli import main
from onebit.config import RopeScaling
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


def queries_keys_values(model, tokens):
    """Of each layer, as its linear layers give them: float64 [B, heads, T, H], before their rotary positions."""
    found, c = [], model.config
    for block in model.layers:

        def noting(x, *names, block=block):
            results = type(block).linear(block, x, *names)
            if names == ("q", "k", "v"):
                heads = zip(results, (c.n_heads, c.n_kv_heads, c.n_kv_heads), strict=True)
                found.append([y.unflatten(-1, (n, -1)).transpose(1, 2).double().numpy() for y, n in heads])
            return results

        block.linear = noting
    with torch.no_grad():
        model(tokens)
    for block in model.layers:
        del block.linear
    return found


def turned(x, theta):
    """Rotary positions: pair i of place t turns by t * theta^(-2 i / H)."""
    n = x.shape[-1] // 2
    angle = np.arange(x.shape[2])[:, None] * theta ** (-np.arange(n) / n)
    a, b = x[..., :n], x[..., n:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], -1)


def log_relations(x, heads):
    """[B, N, T, H] to logs of [B, A, T, T]."""
    parts = x.transpose(0, 2, 1, 3).reshape(len(x), x.shape[2], heads, -1).swapaxes(1, 2)
    parts = parts / np.linalg.norm(parts, axis=-1, keepdims=True)
    scores = np.exp(parts @ parts.swapaxes(-1, -2))
    return np.log(scores / scores.sum(-1, keepdims=True))


@pytest.mark.parametrize("has_positions", [True, False])
def test_relations_are_those_of_their_layer_and_positions(dense, texts, tmp_path, has_positions):
    checkpoint = formats.read(dense)
    corpus = corpus_of(dense, texts, tmp_path / "corpus")
    asked = teacher.Teacher(checkpoint, "f32", torch.device("cpu"))
    settings = [*SMALL, "distill.logits=0", "distill.relations=3", "distill.relation_heads=2"]
    settings += [f"distill.relation_rope={str(has_positions).lower()}"]
    built = distill.build_distill("x", checkpoint, settings)
    model = distill.first_student(checkpoint, built, corpus)
    tokens = torch.from_numpy(data.batch(corpus.train, 0, 4, 32, 1))
    mine, theirs = (queries_keys_values(m, tokens[:, :-1]) for m in (model, asked.model))
    assert len(mine) == checkpoint.config.n_layers == 2
    expected = []
    for layer in range(2):
        total = 0
        for place, (s, t) in enumerate(zip(mine[layer], theirs[layer], strict=True)):
            # Values have no positions.
            if has_positions and place < 2:
                s, t = (turned(x, checkpoint.config.rope_theta) for x in (s, t))
            log_q, log_p = log_relations(s, 2), log_relations(t, 2)
            total = total + (np.exp(log_p) * (log_p - log_q)).sum(-1).mean(1)
        expected.append(3 * total.flatten())
    for layer in (-2, -1, 0, 1):
        chosen = distill.build_distill("x", checkpoint, [*settings, f"distill.relation_layer={layer}"])
        found = distill.distillation(chosen, corpus, asked, None).losses(model, tokens)
        np.testing.assert_allclose(found.detach(), expected[layer], rtol=2e-4, atol=5e-6)
    assert np.abs(expected[0] - expected[1]).max() > 0.1 * np.abs(expected[0]).max()


FAMILIES = {
    "Llama": {"tied_head": False},
    "Llama 3": {"tied_head": False, "rope_scaling": RopeScaling("llama3", 8.0, 64), "n_kv_heads": 1},
    "SmolLM": {"rope_theta": 1e5},
    "Qwen2": {"qkv_bias": True, "norm_eps": 1e-6},
    "Qwen3": {"qk_norm": True, "norm_eps": 1e-6},
    "sub-norms": {"sub_norm": True, "activation": "relu2"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_teachers_of_all_families(family, texts, tmp_path):
    """While rounding is hardly begun the student is its teacher: every flag and tensor has come over."""
    flags = {"sub_norm": False, "activation": "silu"} | FAMILIES[family]
    config = tiny.config(weights="dense", activations="none", **flags)
    run_folder.write(tiny.master(config), tmp_path / "teacher")
    settings = ["steps=2", "evaluate_every=2", "distill.relations=1", "distill.relation_heads=2"]
    settings += ["options.lambda_steps=1000000"]
    first, last = student_of(tmp_path / "teacher", texts, tmp_path / "run", *settings)
    # Measured is the student as it will be packed, wholly rounded.
    assert first["loss"] < 2e-3 * last["held_out_kl"] and np.isfinite(last["loss"])
    made = run_folder.read(tmp_path / "run")
    assert made.config == replace(config, weights="b1.58", activations="a8")
    before = tiny.tensors(config)
    assert made.tensors.keys() == before.keys()
    assert not [name for name, w in before.items() if np.array_equal(w, made.tensors[name])]


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


REFUSALS = {
    "layer": "is {}; the teacher has 2 layers: expected a number from 0 to 1, or from -1 (the last) to -2\n",
    "heads": "is {}; expected a divisor of the widths of queries, keys and values of a layer (q 64, k 32, v 32): "
    "choose a divisor of 32\n",
}


# 64 would do for the queries alone.
@pytest.mark.parametrize(
    ("name", "value"), [("layer", 40), ("layer", 2), ("layer", -3), ("heads", 5), ("heads", 64)]
)
def test_relations_that_cannot_be_are_refused_before_anything_is_written(
    name, value, texts, tmp_path, monkeypatch, capsys
):
    config = tiny.config(weights="dense", activations="none", sub_norm=False, activation="silu")
    run_folder.write(tiny.master(config), tmp_path / "teacher")
    words = [
        "--teacher",
        tmp_path / "teacher",
        "--data",
        texts,
        "--out",
        tmp_path / "run",
        "--cache-logits",
        4,
    ]
    words += ["--set", "distill.relations=1", "--set", f"distill.relation_{name}={value}"]
    monkeypatch.setattr("sys.argv", ["onebit", "distill", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    expected = f"onebit: error: distill.relation_{name} {REFUSALS[name].format(value)}"
    assert (ended.value.code, capsys.readouterr().err) == (2, expected)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


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

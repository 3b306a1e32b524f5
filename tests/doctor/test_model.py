"""Tiny models, broken in one way each, and what the doctor finds. Kinds: exact, invariant."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

import tiny
from onebit import formats
from onebit.checkpoint import Checkpoint, Stored, quantize
from onebit.doctor import model, variants, weights, words
from onebit.doctor.finding import SEVERITIES, Finding, count, worst_first
from onebit.llm import SHIPPED_MODEL

NAME = "some.onebit"
Q = "layers.0.q.weight"
CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
STORY = (
    "Once upon a time there was a little girl named Lily. She had a red ball and a small dog. One day, they went to "
    "the park to play. The dog ran after the ball, but it rolled into the water. Lily was sad. A kind man saw her and "
    "got the ball out. Lily smiled and said thank you. They all played together until it was time to go home.\n"
    "The next day, it was raining and the park was wet. Lily looked out of the window and saw a little bird under a "
    'tree. "Mom, the bird is cold," she said. "Can we help it?" Her mom nodded and gave her a small box with a soft '
    "cloth. They went outside and put the bird into the box. Lily gave it some bread and water. The bird ate the bread "
    "and began to sing. Lily was very happy. When the sun came out again, she opened the box, and the bird flew up to "
    'its nest. "Good bye, little bird," said Lily. "Come and see me soon!" The bird came back every morning and sang '
    "a song for her. Lily learned that it is good to be kind to small animals.\n"
)


def master(change=lambda name, w: w, **config):
    """A float32 model, each of whose arrays is changed."""
    made = tiny.master(tiny.config(**config))
    return replace(made, tensors={n: change(n, w.copy()).astype(np.float32) for n, w in made.tensors.items()})


def scaled(factor_of):
    """A packed model of three layers, whose scales are multiplied."""
    packed = quantize(tiny.master(tiny.config(n_layers=3)))
    tensors = dict(packed.tensors)
    for name in tensors:
        if packed.config.is_linear(name):
            tensor = tensors[name]
            scale = (tensor.scale * np.float32(factor_of(name))).astype(np.float32)
            tensors[name] = tensor._replace(scale=scale)
    return replace(packed, tensors=tensors)


def linear_only(change):
    return lambda name, w: change(w) if w.ndim == 2 and name.startswith("layers.") else w


def of_weights(checkpoint, check):
    return check(weights.look(checkpoint), NAME)


def severity(found):
    return None if found is None else found.severity


def test_a_healthy_model(tmp_path):
    formats.write(quantize(tiny.master(chat_template=CHAT)), tmp_path / "a.onebit")
    found, checkpoint = model.examine("a.onebit", tmp_path / "a.onebit", 10**9)
    assert checkpoint is not None
    assert {finding.severity for finding in found} == {"ok"}
    assert {"file", "zeros", "rows", "scales", "tokenizer", "end of text", "chat", "memory"} <= {
        finding.check for finding in found
    }


def test_every_finding_has_all_its_parts(tmp_path):
    formats.write(tiny.master(), tmp_path / "run.onebit")
    found, _ = model.examine("x.onebit", tmp_path / "run.onebit", 10**9)
    for finding in found:
        assert all((finding.check, finding.what, finding.evidence, finding.why, finding.confirm))
        assert finding.severity in ("ok", "note") or finding.advice


def test_a_file_that_is_refused(tmp_path):
    (tmp_path / "a.onebit").write_bytes(b"nothing" * 9)
    (found,), checkpoint = model.examine("a.onebit", tmp_path / "a.onebit")
    assert checkpoint is None and found.severity == "error"
    assert "a.onebit" in found.evidence


def test_a_flipped_bit(tmp_path):
    path = tmp_path / "a.onebit"
    formats.write(quantize(tiny.master()), path)
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)
    found, _ = model.examine("a.onebit", path)
    assert [(f.check, f.severity) for f in worst_first(found)][0] == ("file", "error")


def test_values_that_are_no_numbers():
    whole = master()
    bad = Stored((64, 48), "F32", 0, lambda begin, end: np.full((end - begin, 48), np.nan, np.float32))
    broken = replace(whole, tensors=whole.tensors | {Q: bad})
    found = of_weights(broken, weights.damaged)
    assert found.severity == "error" and Q in found.evidence
    assert of_weights(whole, weights.damaged) is None


def test_shares_of_zeros():
    few = master(linear_only(lambda w: np.sign(w)))
    many = master(linear_only(lambda w: w * (np.random.default_rng(1).random(w.shape) < 0.2)))
    assert severity(of_weights(master(), weights.zeros)) == "ok"
    assert severity(of_weights(few, weights.zeros)) == "warning"
    assert severity(of_weights(many, weights.zeros)) == "warning"
    binary = tiny.master(tiny.config(weights="b1"))
    assert of_weights(binary, weights.zeros) is None


def test_codes_of_one_sign():
    assert of_weights(master(), weights.balance) is None
    found = of_weights(master(linear_only(abs)), weights.balance)
    assert found.severity == "warning" and "14 of 14" in found.what


def test_rows_that_say_nothing():
    def spoil(w):
        w[0], w[1], w[2] = 0, 1, w[3]
        return w

    found = of_weights(master(linear_only(spoil)), weights.dead_rows)
    assert found.severity == "warning"
    assert "1 dead, 1 of one value, 1 repeated" in found.evidence
    assert severity(of_weights(master(), weights.dead_rows)) == "ok"
    dense = master(linear_only(spoil), weights="dense", activations="none")
    assert severity(of_weights(dense, weights.dead_rows)) == "warning"


def test_tokens_that_nobody_trained():
    def repeat(name, w):
        if name == "embed.weight":
            w[200:260] = w[200]
        return w

    assert of_weights(master(), weights.untrained_tokens) is None
    found = of_weights(master(repeat), weights.untrained_tokens)
    assert found.severity == "note" and "59 of 320" in found.evidence


def test_scales_that_divide():
    assert severity(of_weights(scaled(lambda name: 1), weights.scale_meaning)) == "ok"
    assert severity(of_weights(scaled(lambda name: 1000), weights.scale_meaning)) == "error"


def test_scales_that_are_lost():
    packed = scaled(lambda name: 1)
    ones = {
        n: t._replace(scale=np.ones_like(t.scale)) if packed.config.is_linear(n) else t
        for n, t in packed.tensors.items()
    }
    found = of_weights(replace(packed, tensors=ones), weights.scale_meaning)
    assert found.severity == "warning" and "lost" in found.what


def test_scales_that_stand_out():
    assert of_weights(scaled(lambda name: 1), weights.scale_outliers) is None
    found = of_weights(
        scaled(lambda name: 50 if name == "layers.1.down.weight" else 1), weights.scale_outliers
    )
    assert found.severity == "warning" and "layers.1.down.weight" in found.evidence
    assert "1 matrices" in found.what


def test_norms():
    assert of_weights(master(), weights.norms) is None
    ones = master(lambda name, w: np.ones_like(w) if w.ndim == 1 else w)
    assert severity(of_weights(ones, weights.norms)) == "warning"
    dead = master(lambda name, w: 0 * w if name == "layers.1.ffn_norm.weight" else w)
    found = of_weights(dead, weights.norms)
    assert found.severity == "error" and "layers.1.ffn_norm.weight" in found.evidence


def test_ternary_weights_in_wide_numbers():
    packed = quantize(tiny.master())
    config = packed.config

    def stored(name, tensor, kind):
        values = weights.rows(name, tensor)
        coded = (lambda: weights.codes(name, tensor, config)) if config.is_linear(name) else None
        return Stored(tensor.shape, kind, 0, lambda begin, end: values[begin:end], coded)

    for kind, expected in (("F16", "note"), ("I2_S", None)):
        foreign = Checkpoint(config, {n: stored(n, t, kind) for n, t in packed.tensors.items()})
        assert severity(of_weights(foreign, weights.stored_wide)) == expected
    assert of_weights(packed, weights.stored_wide) is None


def test_labels_of_full_precision():
    assert model.label(quantize(tiny.master()), NAME).severity == "ok"
    dense = tiny.master(tiny.config(weights="dense", activations="none"))
    found = model.label(dense, NAME)
    assert found.severity == "note" and "distill" in found.advice


def test_guesses_are_named():
    guessed = {"source": {"activations": "a8, guessed: each matrix has one scale"}}
    assert severity(model.activations(replace(tiny.master(), provenance=guessed), NAME)) == "note"
    assert model.activations(tiny.master(), NAME) is None


@pytest.mark.parametrize(
    ("sub_norm", "activation", "expected"),
    [(True, "relu2", "ok"), (False, "silu", "ok"), (True, "silu", "note"), (False, "relu2", "note")],
)
def test_activation_functions(sub_norm, activation, expected):
    made = replace(tiny.master(tiny.config(sub_norm=sub_norm, activation=activation)), provenance={})
    assert model.feed_forward(made, NAME).severity == expected
    for trained, found in ((activation, "ok"), ({"silu": "relu2", "relu2": "silu"}[activation], "warning")):
        provenance = {"recipe": {"model": {"activation": trained}}}
        assert model.feed_forward(replace(made, provenance=provenance), NAME).severity == found
    for recipe in ("stories", {}, {"model": ["silu"]}, {"model": {"activation": ["silu"]}}):
        strange = replace(made, provenance={"recipe": recipe})
        assert model.feed_forward(strange, NAME).severity == expected


def test_positions_and_epsilon_and_flags():
    assert model.rotary(tiny.master(), NAME).severity == "ok"
    assert model.rotary(tiny.master(tiny.config(rope_theta=2.0)), NAME).severity == "warning"
    assert model.norm_eps(tiny.master(), NAME) is None
    assert severity(model.norm_eps(tiny.master(tiny.config(norm_eps=0.1)), NAME)) == "warning"
    assert model.ways_out(tiny.master(), NAME) is None
    assert severity(model.ways_out(tiny.master(tiny.config(qkv_bias=True)), NAME)) == "note"


@pytest.mark.parametrize(
    ("available", "expected"), [(10**9, "ok"), (64_300_000, "note"), (10**6, "warning"), (None, None)]
)
def test_memory(available, expected):
    packed = quantize(tiny.master(tiny.config(max_seq_len=8192)))
    assert severity(model.fits(packed, NAME, available)) == expected


def test_tokenizers():
    assert words.has_tokenizer(tiny.master(), NAME).severity == "ok"
    assert words.has_tokenizer(replace(tiny.master(), tokenizer=None), NAME).severity == "warning"
    assert words.has_tokenizer(replace(tiny.master(), tokenizer=b"{}"), NAME).severity == "error"
    lossy = tiny.tokenizer_json().replace(b'"normalizer":null', b'"normalizer":{"type":"Lowercase"}')
    assert lossy != tiny.tokenizer_json()
    assert words.has_tokenizer(replace(tiny.master(), tokenizer=lossy), NAME).severity == "warning"


@pytest.mark.parametrize(("n_rows", "expected"), [(320, "ok"), (330, "ok"), (2000, "note"), (300, "error")])
def test_rows_and_tokens(n_rows, expected):
    config = tiny.config(vocab_size=n_rows)
    made = Checkpoint(config, tiny.tensors(config), tiny.tokenizer_json())
    assert words.vocabulary(made, NAME).severity == expected


@pytest.mark.parametrize(
    ("eos", "bos", "expected"),
    [
        ((0,), None, "ok"),
        ((0,), 0, "ok"),
        ((), None, "warning"),
        ((900,), None, "error"),
        ((0,), 900, "error"),
    ],
)
def test_tokens_that_end_texts(eos, bos, expected):
    config = tiny.config(vocab_size=1000, eos_tokens=eos, bos_token=bos)
    made = Checkpoint(config, tiny.tensors(config), tiny.tokenizer_json())
    assert words.end_of_text(made, NAME).severity == expected


@pytest.mark.parametrize(
    ("template", "expected", "word"),
    [
        (None, "note", "no chat template"),
        (CHAT, "ok", "works"),
        (tiny.CHAT_TEMPLATE, "warning", "does not end"),
        (CHAT.replace("endoftext", "im_end"), "warning", "apart"),
        ("{{ raise_exception('a system message first') }}", "warning", "fails"),
        ("{{ messages[0]['content'] }}", "warning", "fails"),
    ],
)
def test_chat_templates(template, expected, word):
    found = words.chat(tiny.master(chat_template=template), NAME)
    assert found.severity == expected and word in found.what
    assert words.chat(replace(tiny.master(), tokenizer=None), NAME) is None


def test_tokens_of_both_kinds_of_vocabularies():
    unigram = b'{"model": {"vocab": [["a", -1], ["b", -2]]}, "added_tokens": [{"id": 2, "content": "<s>"}]}'
    assert words.tokens_of(unigram) == {0: "a", 1: "b", 2: "<s>"}
    assert words.tokens_of(tiny.tokenizer_json())[0] == "<|endoftext|>"


@cache
def shipped():
    return formats.read(SHIPPED_MODEL)


def changed(checkpoint, what):
    return next(v.checkpoint for v in variants.variants(checkpoint) if what in v.what)


def test_a_right_config_is_confirmed():
    (found,) = variants.examine(shipped(), STORY, NAME, "text.txt", 1)
    assert found.severity == "ok" and "relu2 as gate: +" in found.evidence


@pytest.mark.parametrize(
    ("broken", "repaired"),
    [
        ("relu2 as gate", "silu as gate"),
        ("base 500,000", "base 10,000"),
        ("pairs of neighbours", "pairs of halves"),
        ("pairs of halves", "pairs of neighbours"),
    ],
)
def test_a_wrong_config_is_found(broken, repaired):
    found = variants.examine(changed(shipped(), broken), STORY, NAME, "text.txt", 1)
    assert any(repaired in finding.what and finding.severity in ("warning", "error") for finding in found)


@pytest.mark.parametrize("scale", ["tensor", "row"])
@pytest.mark.parametrize("kind", [{}, {"weights": "dense", "activations": "none"}])
def test_orders_of_rows_are_each_others_inverse(kind, scale):
    packed = quantize(tiny.master(tiny.config(qk_norm=True, qkv_bias=True, scale=scale, **kind)))
    there = changed(packed, "pairs of neighbours")
    back = changed(there, "pairs of halves")
    for name, tensor in packed.tensors.items():
        for before, after in zip(flat(tensor), flat(back.tensors[name]), strict=True):
            assert np.array_equal(before, after), name
    assert not np.array_equal(flat(there.tensors[Q])[0], flat(packed.tensors[Q])[0])


def flat(tensor):
    return (tensor.data, tensor.scale) if hasattr(tensor, "data") and hasattr(tensor, "scale") else (tensor,)


def test_the_worst_comes_first():
    made = [
        Finding(s, str(i), "", "", "", "") for i, s in enumerate(["ok", "note", "error", "note", "warning"])
    ]
    assert [f.check for f in worst_first(made)] == ["2", "4", "1", "3", "0"]
    assert list(count(made)) == list(SEVERITIES) and count(made)["note"] == 2

"""Exact, invariant: conversations become token ids and masks of answers, and bad lines are refused by their number."""

import json

import numpy as np
import pytest

import tiny
from onebit.engine.tokenizer import Tokenizer
from onebit.train import chat

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A dog."},
    {"role": "user", "content": "Run!"},
    {"role": "assistant", "content": "To the park."},
]
CONFIG = tiny.config()


def tokenizer(template: str | None = tiny.CHAT_TEMPLATE) -> Tokenizer:
    return Tokenizer(tiny.tokenizer_json(), CONFIG.bos_token, template, tiny.EOS)


def answers(example: chat.Example, of: Tokenizer) -> list[str]:
    """The texts of the runs of answer tokens; the end token reads as nothing."""
    found, run = [], []
    for token, is_answer in [*zip(*example, strict=True), (0, False)]:
        if is_answer:
            run.append(int(token))
        elif run:
            found.append(of.decode(run))
            run = []
    return found


def write(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def test_every_answer_is_marked_and_nothing_else():
    of = tokenizer()
    example = chat.encode(TALK, of, CONFIG)
    assert answers(example, of) == ["A dog.\n", "To the park.\n"]
    assert of.decode(example.tokens.tolist()) == of.render_chat(TALK, add_generation_prompt=False)
    # The end of the text is learned although the template does not write it.
    assert example.tokens[-1] == tiny.EOS and example.is_answer[-1]


def test_an_answer_begins_where_the_model_will_be_asked():
    for template in (tiny.CHAT_TEMPLATE, CHATML):
        of = tokenizer(template)
        example = chat.encode(TALK[:2], of, CONFIG)
        asked = of.encode_chat(TALK[:1])
        first = int(np.argmax(example.is_answer))
        assert example.tokens[:first].tolist() == asked


def test_what_follows_the_end_token_is_read_and_not_said():
    of = tokenizer(CHATML)
    example = chat.encode(TALK, of, CONFIG)
    ends = np.flatnonzero(example.is_answer & (example.tokens == tiny.EOS))
    assert len(ends) == 2 and answers(example, of) == ["A dog.", "To the park."]
    assert not example.is_answer[ends + 1].any()
    # The line break after the last end is there, and there is no second end.
    assert len(example.tokens) == ends[-1] + 2


def test_plain_texts_without_a_template():
    of = tokenizer(None)
    example = chat.encode(("Once upon", " a time"), of, CONFIG)
    assert answers(example, of) == [" a time"]
    assert of.decode(example.tokens.tolist()) == "Once upon a time" and example.tokens[-1] == tiny.EOS
    with pytest.raises(ValueError, match="no chat template.*prompt"):
        chat.encode(TALK, of, CONFIG)


def test_prompts_become_turns_where_there_is_a_template():
    of = tokenizer()
    made = chat.encode(("Who are you?", "A dog."), of, CONFIG)
    assert np.array_equal(made.tokens, chat.encode(TALK[:2], of, CONFIG).tokens)


def test_a_tokenizer_of_another_model_is_refused():
    small = tiny.config(vocab_size=270)
    with pytest.raises(
        ValueError, match=r"gives the token \d+, and the model knows 270; expected the tokenizer"
    ):
        chat.encode(("Once upon a time, a dog", " ran."), tokenizer(None), small)


def test_a_template_that_rewrites_the_past_is_refused():
    forgets = "{% for m in messages[-1:] %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(ValueError, match="conversations with one answer"):
        chat.encode(TALK, tokenizer(forgets), CONFIG)


BAD = {
    "not JSON": (b"{", "not valid JSON"),
    "a list": (b"[1]", "expected an object"),
    "other keys": (b'{"text": "x"}', "found the keys"),
    "no messages": (b'{"messages": []}', "expected a list"),
    "a number": (b'{"messages": 3}', "expected a list"),
    "a role": (b'{"messages": [{"role": "robot", "content": "x"}]}', "role 'robot'"),
    "more keys": (
        b'{"messages": [{"role": "user", "content": "x", "tool_calls": 1}]}',
        "exactly role and content",
    ),
    "no answer": (b'{"messages": [{"role": "user", "content": "x"}]}', "last message is of the user"),
    "no question": (b'{"messages": [{"role": "assistant", "content": "x"}]}', "question before"),
    "empty": (b'{"messages": [{"role": "user", "content": ""}]}', "not empty"),
    "null": (b'{"prompt": null, "completion": "x"}', "prompt is None"),
    "half a character": (b'{"prompt": "\\ud800", "completion": "x"}', "valid Unicode"),
    "deep": (b"[" * 100_000, "not valid JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_lines_are_named(name, tmp_path):
    line, problem = BAD[name]
    path = tmp_path / "chat.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "b"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=f"chat.jsonl, line 3: .*{problem}"):
        chat.read(path, tokenizer(), CONFIG, 64)


@pytest.mark.parametrize(
    ("contents", "problem"), [(b"", "no conversation"), (b"\0\1", "binary"), (b"\xff\xfe", "not UTF-8")]
)
def test_bad_files_are_refused(contents, problem, tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=problem):
        chat.read(path, tokenizer(), CONFIG, 64)
    with pytest.raises(ValueError, match="folder"):
        chat.read(tmp_path, tokenizer(), CONFIG, 64)


def test_long_conversations_are_dropped_or_cut(tmp_path):
    short, long = {"prompt": "Hi", "completion": "Yes"}, {"prompt": "Hi", "completion": "The dog ran " * 20}
    asked = {"prompt": "The dog ran " * 20, "completion": "Yes"}
    path = write(tmp_path / "chat.jsonl", short, long, asked)
    dropped = chat.read(path, tokenizer(), CONFIG, 40)
    assert (len(dropped.train), dropped.n_dropped, dropped.n_cut) == (1, 2, 0)
    cut = chat.read(path, tokenizer(), CONFIG, 40, too_long="cut")
    # Of the last nothing of the answer would be left.
    assert (len(cut.train), cut.n_dropped, cut.n_cut) == (2, 1, 1)
    assert max(len(e.tokens) for e in cut.train) == 40
    with pytest.raises(ValueError, match="none of 3 conversations fits into 4 tokens"):
        chat.read(path, tokenizer(), CONFIG, 4)


def test_what_is_held_out_depends_on_the_texts_alone(tmp_path):
    values = [{"prompt": f"{i} + 1", "completion": f"{i + 1}"} for i in range(30)]
    one = chat.read(write(tmp_path / "a.jsonl", *values), tokenizer(), CONFIG, 64, 0.2)
    other = chat.read(write(tmp_path / "b.jsonl", *values[::-1]), tokenizer(), CONFIG, 64, 0.2)
    assert len(one.held_out) == 6 and len(one.train) == 24
    assert {e.tokens.tobytes() for e in one.held_out} == {e.tokens.tobytes() for e in other.held_out}
    assert one.sha256 != other.sha256


def test_batches_are_padded_and_pure(tmp_path):
    values = [{"prompt": "Hi", "completion": "dog " * n} for n in range(1, 8)]
    examples = chat.read(write(tmp_path / "a.jsonl", *values), tokenizer(), CONFIG, 64).train
    seen = []
    for step in range(7):
        made, again = (chat.batch(examples, step, 2, seed=3) for _ in range(2))
        assert np.array_equal(made.tokens, again.tokens) and np.array_equal(made.targets, again.targets)
        assert made.n_answer_tokens == (made.targets != chat.IGNORED).sum() > 0
        for ids, targets in zip(made.tokens, made.targets, strict=True):
            n = int(np.flatnonzero(targets != chat.IGNORED)[-1]) + 1
            whole = [*ids[:n].tolist(), int(targets[n - 1])]
            found = next(e for e in examples if e.tokens.tolist() == whole)
            expected = np.where(found.is_answer[1:], found.tokens[1:], chat.IGNORED)
            assert np.array_equal(targets[:n], expected) and (ids[n:] == 0).all()
            seen.append(len(whole))
    # Two epochs of seven: each example comes twice.
    assert sorted(seen) == sorted(2 * [len(e.tokens) for e in examples])

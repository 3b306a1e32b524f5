"""Invariant: an answer that ends fits its schema or grammar, and no schema takes more than its share of time."""

import json
import time

import pytest

import tiny
from onebit.serve.grammar import GrammarError, Vocabulary

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "pets": {"type": "array", "items": {"enum": ["cat", "dog"]}, "maxItems": 3},
    },
    "required": ["name", "age", "pets"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary(tiny.tokenizer_json(), tiny.CONFIG.vocab_size, (tiny.EOS,))


def choices(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


def test_a_schema_is_kept(server):
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Who?"}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}},
        "max_tokens": 150,
        "temperature": 1.0,
        "seed": 5,
        "n": 8,
    }
    found = choices(server.post("/v1/chat/completions", body))
    assert [choice["finish_reason"] for choice in found] == ["stop"] * 8
    people = [json.loads(choice["message"]["content"]) for choice in found]
    for person in people:
        assert set(person) == {"name", "age", "pets"}
        assert len(person["name"]) <= 12 and 0 <= person["age"] <= 120
        assert set(person["pets"]) <= {"cat", "dog"} and len(person["pets"]) <= 3
    assert len({person["name"] for person in people}) > 1


def test_any_object_parses_once_it_ends(server):
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Who?"}],
        "response_format": {"type": "json_object"},
        "logit_bias": {str(tiny.EOS): 5},
        "seed": 1,
        "n": 8,
    }
    ended = [c for c in choices(server.post("/v1/chat/completions", body)) if c["finish_reason"] == "stop"]
    assert ended
    assert all(isinstance(json.loads(choice["message"]["content"]), dict) for choice in ended)


@pytest.mark.parametrize("grammar", ['start: "yes" | "no"', 'root ::= "yes" | "no"'], ids=["lark", "gbnf"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_is_kept(server, grammar, stream):
    """By the shipped model, whose tokenizer is one that was trained."""
    body = {
        "model": "stories",
        "prompt": ["Once", "Is it so?"],
        "grammar": grammar,
        "n": 4,
        "seed": 1,
        "stream": stream,
    }
    answer = server.post("/v1/completions", body)
    if stream:
        texts = [""] * 8
        for line in answer.text.splitlines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    texts[choice["index"]] += choice["text"]
    else:
        texts = [choice["text"] for choice in choices(answer)]
    assert set(texts) <= {"yes", "no"}


def doubling(n):
    """2 ** n ways to read one value."""
    names = [{"$ref": f"#/$defs/a{i}"} for i in range(n + 1)]
    ways = {f"a{i}": {"anyOf": [names[i + 1], {"type": "array", "items": names[i + 1]}]} for i in range(n)}
    return {"$defs": ways | {f"a{n}": {"type": "number"}}, "$ref": "#/$defs/a0"}


def crossed(n):
    return {
        "allOf": [{"oneOf": [{"properties": {f"p{i}": {"const": j}}} for j in range(4)]} for i in range(n)]
    }


HOSTILE = {
    "crossed": crossed(12),
    "doubling": doubling(40),
    "itself": {"$ref": "#"},
    "circle": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "recursive": {"$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"},
    "pattern": {"type": "string", "pattern": "^((a+)+(b{1,1000}){1,1000})+$"},
    "repeats": {"type": "string", "pattern": "(.{0,5000}x){0,5000}"},
    "enum": {"enum": [f"x{i}" for i in range(20_000)]},
    "long": {"type": "array", "items": {"type": "string"}, "minItems": 100_000},
    "wide": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}},
    "huge": {"enum": [f"x{i}" for i in range(200_000)]},
    "never": {"allOf": [{"type": "string"}, {"type": "integer"}]},
    "remote": {"$ref": "https://example.com/schema.json"},
    "file": {"$ref": "file:///etc/passwd"},
    "wrong": {"type": "king"},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_end_soon(vocabulary, name):
    begun = time.process_time()
    try:
        grammar = vocabulary.from_schema(HOSTILE[name])
        # As an engine does; any allowed token, so that it goes far astray.
        for i in range(20):
            mask = grammar.mask(None)
            allowed = [t for t in range(tiny.CONFIG.vocab_size) if mask[t // 32] >> (t % 32) & 1]
            grammar.accept(allowed[(7 * i) % len(allowed)])
            if allowed == [tiny.EOS]:
                break
    except GrammarError as error:
        assert 0 < len(str(error)) <= 300
    # Seconds of this process, so that a busy machine fails nobody.
    assert time.process_time() - begun < 5


def test_wrong_grammars_say_why(server):
    for grammar in (
        "start: /[/",
        "nonsense",
        "start: start",
        "root ::= nothing",
        "start: a\n" * 5000,
    ):
        answer = server.post(
            "/v1/completions",
            content=json.dumps({"model": "tiny", "prompt": "x", "grammar": grammar}),
            headers={"content-type": "application/json"},
        )
        assert answer.status_code == 400, grammar[:20]
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("invalid_grammar", "grammar")
        assert error["message"].startswith("grammar cannot be followed: ")


def test_nested_too_deeply_is_an_error(vocabulary):
    schema = {}
    for _ in range(5000):
        schema = {"items": schema}
    with pytest.raises(GrammarError):
        vocabulary.from_schema(schema)


def test_a_model_that_never_ends_takes_no_grammar():
    with pytest.raises(GrammarError, match="no end-of-text token"):
        Vocabulary(tiny.tokenizer_json(), tiny.CONFIG.vocab_size, ()).from_text('start: "x"')


def test_token_bytes(vocabulary):
    assert vocabulary.token_bytes(tiny.EOS) == b"<|endoftext|>"
    # 0xff is no byte of any character; llguidance marks special tokens with it.
    expected = {bytes([byte]) for byte in range(255)}
    assert expected <= {vocabulary.token_bytes(token) for token in range(1, 257)}

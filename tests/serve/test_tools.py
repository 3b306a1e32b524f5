"""Tool calls reach OpenAI's client as such, streamed or not. Kinds: exact, invariant, oracle (openai)."""

import json

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebit.serve.protocol import Message
from onebit.serve.tools import BEGIN, END, Call, ToolReader

OSLO = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": [1, 2.50]}}\n</tool_call>'
BERN = '<tool_call>{"arguments": "{\\"city\\": \\"Bern \\u00e9\\"}", "name": "weather"}</tool_call>'
CALLS = [
    Call("weather", '{"city": "Oslo", "days": [1, 2.5]}'),
    Call("weather", '{"city": "Bern é"}'),
]
# Short, for a small context.
NOW = '<tool_call>{"name": "now"}</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "now"}}]
MESSAGES = [{"role": "user", "content": "Hi"}]


def read(*pieces):
    reader = ToolReader()
    found = [*map(reader.push, pieces), reader.flush()]
    return "".join(content for content, _ in found), [call for _, calls in found for call in calls]


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("", "", []),
        (" Nothing to call.\n", " Nothing to call.\n", []),
        (OSLO, "", CALLS[:1]),
        (f"Let me see.\n\n{OSLO}\n{BERN}\n", "Let me see.", CALLS),
        (f"One {OSLO} and two {BERN} done.", "One and two done.", CALLS),
        ('<tool_call>{"name": "now"}', "", [Call("now", "{}")]),
        (OSLO.removesuffix(END), "", CALLS[:1]),
        ('<tool_call>{"name": "weath', '<tool_call>{"name": "weath', []),
        ("a <tool_call>what?</tool_call> b", "a <tool_call>what?</tool_call> b", []),
        ("a </tool_call> <tool_cal <tool_", "a </tool_call> <tool_cal <tool_", []),
        (f"{OSLO} one\n", " one\n", CALLS[:1]),
        (f"<tool_call> {OSLO}", f"<tool_call> {OSLO}", []),
        *((f"<tool_call>{bad}</tool_call>", f"<tool_call>{bad}</tool_call>", []) for bad in (
            "", "[]", "7", '{"name": 7}', '{"arguments": {}}', '{"name": "a", "arguments": [1]}',
            '{"name": "a", "arguments": {"x": 1e999}}', '{"name": "a", "arguments": {"x": NaN}}',
            '{"name": "\\ud800"}', '{"name": "a", "arguments": ' + 100_000 * "[" + "}",
            '{"name": "a", "arguments": "{"}',
        )),
    ],
)  # fmt: skip
def test_texts_are_divided(text, content, calls):
    assert read(text) == (content, calls)


PARTS = st.sampled_from([BEGIN, END, OSLO, BERN, "<", "<tool_", "call>", " ", "\n", "Yes.", '{"name": "a"}'])


@given(st.lists(PARTS, max_size=8).map("".join), st.randoms(use_true_random=False))
def test_how_a_text_is_cut_changes_nothing(text, random):
    cuts = sorted(random.randrange(len(text) + 1) for _ in range(random.randrange(12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(*pieces) == read(text)
    # Without a call nothing is lost.
    if not read(text)[1]:
        assert read(text)[0] == text


def test_nothing_is_held_back_without_need():
    reader = ToolReader()
    assert reader.push("A word, ")[0] == "A word,"
    assert reader.push("then <")[0] == " then"
    assert reader.push("b>")[0] == " <b>"


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def forced(text, **more):
    """A request whose answer is this text, word for word."""
    grammar = {"grammar": f"start: {json.dumps(text, ensure_ascii=False)}"}
    return {
        "model": "tiny",
        "messages": MESSAGES,
        "tools": TOOLS,
        "max_tokens": 160,
        "extra_body": grammar,
    } | more


ANSWERS = [
    (f"Wait. {NOW}\n{NOW}", "Wait.", [Call("now", "{}")] * 2, "tool_calls"),
    (BERN, None, CALLS[1:], "tool_calls"),
    ("Hello <tool", "Hello <tool", [], "stop"),
]


@pytest.mark.parametrize(("text", "content", "calls", "reason"), ANSWERS)
@pytest.mark.parametrize("n", [1, 2])
def test_calls_of_a_whole_answer(client, text, content, calls, reason, n):
    answer = client.chat.completions.create(**forced(text), n=n, parallel_tool_calls=True, tool_choice="auto")
    assert len(answer.choices) == n
    for choice in answer.choices:
        assert (choice.message.content, choice.finish_reason) == (content, reason)
        told = choice.message.tool_calls or []
        assert [(call.type, call.function.name, call.function.arguments) for call in told] == [
            ("function", *call) for call in calls
        ]
    ids = [call.id for choice in answer.choices for call in choice.message.tool_calls or []]
    assert len(set(ids)) == n * len(calls)


@pytest.mark.parametrize(("text", "content", "calls", "reason"), ANSWERS)
def test_calls_of_a_stream(client, text, content, calls, reason):
    request = forced(text, stream=True, logprobs=True, n=2)
    texts, told, reasons, n_tokens = ["", ""], [{}, {}], [[], []], [0, 0]
    for chunk in client.chat.completions.create(**request):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        for call in choice.delta.tool_calls or []:
            assert call.index not in told[choice.index] and call.id and call.type == "function"
            told[choice.index][call.index] = Call(call.function.name, call.function.arguments)
        reasons[choice.index] += [choice.finish_reason] if choice.finish_reason else []
        n_tokens[choice.index] += len(choice.logprobs.content) if choice.logprobs else 0
    assert texts == [content or ""] * 2
    assert [list(of.values()) for of in told] == [calls] * 2
    assert reasons == [[reason]] * 2
    # Logprobs are of all tokens, also of those that became a call.
    usage = client.chat.completions.create(**forced(text)).usage.completion_tokens
    assert n_tokens == [usage] * 2


@pytest.mark.parametrize("more", [{"tool_choice": "none"}, {"tools": openai.NOT_GIVEN}, {"tools": []}])
def test_without_tools_a_call_is_text(client, more):
    choice = client.chat.completions.create(**forced(BERN, **more)).choices[0]
    assert (choice.message.content, choice.finish_reason) == (BERN, "stop")
    assert choice.message.tool_calls is None


def test_a_call_that_is_cut_off_is_text(client):
    choice = client.chat.completions.create(**forced(NOW, max_tokens=20)).choices[0]
    assert choice.finish_reason == "length" and choice.message.tool_calls is None
    assert NOW.startswith(choice.message.content) and choice.message.content.startswith(BEGIN)


def test_a_conversation_with_calls_goes_on(client):
    said = client.chat.completions.create(**forced(NOW)).choices[0].message
    result = {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "sunny"}
    answer = client.chat.completions.create(**forced("Sunny.", messages=[*MESSAGES, said, result]))
    assert answer.choices[0].message.content == "Sunny."


def test_templates_get_arguments_as_objects():
    def turn(arguments):
        call = {"id": "1", "type": "function", "function": {"name": "a", "arguments": arguments}}
        return Message(role="assistant", tool_calls=[call]).for_template["tool_calls"][0]["function"][
            "arguments"
        ]

    assert turn('{"x": [1, "é"]}') == {"x": [1, "é"]}
    for other in ("", "[1]", "{", "7", {"x": 1}, None, 100_000 * "["):
        assert turn(other) == other
    odd = [{"function": "a"}, {"name": "a"}]
    assert Message(role="assistant", tool_calls=odd).for_template["tool_calls"] == odd

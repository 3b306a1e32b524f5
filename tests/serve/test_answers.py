"""Oracle: OpenAI's own client understands every answer, and finds in it what `LLM` says alone."""

import asyncio
import base64
import json
from functools import partial

import httpx
import numpy as np
import openai
import pytest

import tiny
from onebit.serve.service import Options
from serve.running import running, tiny_llm

PROMPTS = ["Once upon a time", "The dog", "Lily ran to the park. " * 4, "x"]
GREEDY = {"temperature": 0.0}
DRAWN = {"temperature": 1.2, "top_p": 0.9, "seed": 7}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def alone(llm, prompt, adapter=None, **params):
    """What the model says, filters off as for a request that says how to draw."""
    return llm.generate(prompt, adapter=adapter, **({"top_k": 0, "top_p": 1.0} | params))


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "seeded"])
def test_completions_are_those_of_generate(client, llm, params):
    answer = client.completions.create(model="tiny", prompt=PROMPTS, max_tokens=40, **params)
    expected = [alone(llm, prompt, max_tokens=40, **params) for prompt in PROMPTS]
    assert [choice.text for choice in answer.choices] == [output.text for output in expected]
    assert [choice.finish_reason for choice in answer.choices] == [o.finish_reason for o in expected]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == sum(output.usage.prompt_tokens for output in expected)
    assert answer.usage.completion_tokens == sum(output.usage.completion_tokens for output in expected)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_token_ids_are_the_same_prompt(client, llm):
    ids = llm.tokenizer.encode("The dog")
    texts = [
        client.completions.create(model="tiny", prompt=prompt, **DRAWN).choices[0].text
        for prompt in ("The dog", ids, [ids], ["The dog"])
    ]
    assert set(texts) == {alone(llm, "The dog", max_tokens=16, **DRAWN).text}


def test_a_request_that_says_nothing_draws_as_generate_does(server, llm):
    answer = server.post("/v1/completions", {"model": "tiny", "prompt": "Once", "seed": 3}).json()
    assert answer["choices"][0]["text"] == llm.generate("Once", max_tokens=16, seed=3).text
    both = [server.post("/v1/completions", {"model": "tiny", "prompt": "Once"}).json() for _ in range(4)]
    assert len({answer["choices"][0]["text"] for answer in both}) > 1


def test_every_parameter_is_that_of_generate(client, llm):
    extra = {"top_k": 30, "min_p": 0.01, "min_sigma": 1.2, "repetition_penalty": 1.2, "ignore_eos": True}
    plain = {"presence_penalty": 0.5, "frequency_penalty": 0.3, "stop": ["q", "zz"]} | DRAWN
    bias = {"40": 3.0, "41": -100.0}
    answer = client.completions.create(
        model="tiny", prompt="Once", max_tokens=60, logit_bias=bias, extra_body=extra, **plain
    )
    ours = extra | plain | {"logit_bias": {40: 3.0, 41: -100.0}}
    output = llm.generate("Once", max_tokens=60, **ours)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (output.text, output.finish_reason)


def test_n_choices_count_the_seed_up(client, llm):
    answer = client.completions.create(model="tiny", prompt=PROMPTS[:2], n=3, **DRAWN)
    seeds = [7, 8, 9]
    expected = [alone(llm, p, max_tokens=16, **DRAWN | {"seed": s}).text for p in PROMPTS[:2] for s in seeds]
    assert [choice.text for choice in answer.choices] == expected
    assert len(set(expected)) > 4


def test_a_stream_is_the_same_text(client):
    whole = client.completions.create(model="tiny", prompt=PROMPTS, n=2, max_tokens=30, **DRAWN)
    texts, reasons, usage = [""] * 8, [None] * 8, None
    options = {"include_usage": True}
    for chunk in client.completions.create(
        model="tiny", prompt=PROMPTS, n=2, max_tokens=30, stream=True, stream_options=options, **DRAWN
    ):
        assert usage is None, "usage comes last"
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        usage = chunk.usage
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage


def test_a_stream_is_of_events(server):
    body = {"model": "tiny", "prompt": "Once", "max_tokens": 100, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", server.url + "/v1/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"


def test_chat_is_that_of_the_model(client, llm):
    messages = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=30, **DRAWN)
    said = [{"role": "system", "content": "Be kind."}, messages[1]]
    output = llm.chat(said, max_tokens=30, top_k=0, **DRAWN)
    assert answer.choices[0].message.content == output.text
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == output.usage.prompt_tokens
    longer = [
        *messages,
        answer.choices[0].message,
        {"role": "user", "content": [{"type": "text", "text": "So"}]},
    ]
    again = client.chat.completions.create(model="tiny", messages=longer, max_completion_tokens=5, **GREEDY)
    said += [{"role": "assistant", "content": output.text}, {"role": "user", "content": "So"}]
    assert again.choices[0].message.content == llm.chat(said, max_tokens=5, **GREEDY).text


def test_a_streamed_chat_begins_with_the_role(client, llm):
    messages = [{"role": "user", "content": "Hi"}]
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=20, n=2, stream=True, **DRAWN
        )
    )
    roles = [choice.delta.role for chunk in chunks for choice in chunk.choices]
    assert roles.count("assistant") == 2
    for i in range(2):
        deltas = [choice.delta for chunk in chunks for choice in chunk.choices if choice.index == i]
        assert deltas[0].role == "assistant"
        text = llm.chat(messages, max_tokens=20, top_k=0, **DRAWN | {"seed": 7 + i}).text
        assert "".join(delta.content or "" for delta in deltas) == text
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert len(reasons) == 2


def test_tools_reach_the_template(server):
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    messages = [{"role": "user", "content": "Hi"}]

    def prompt(**more):
        tokens = server.post("/tokenize", {"model": "tiny", "messages": messages} | more).json()["tokens"]
        return server.post("/detokenize", {"model": "tiny", "tokens": tokens}).json()["prompt"]

    assert prompt() == "user: Hi\nassistant: "
    assert prompt(tools=tools) == json.dumps(tools) + "\nuser: Hi\nassistant: "
    body = {"model": "tiny", "messages": messages, "tools": tools, "max_tokens": 1}
    n = [
        server.post("/v1/chat/completions", body | more).json()["usage"]["prompt_tokens"]
        for more in ({}, {"tool_choice": "none"})
    ]
    assert n[0] > n[1]


def test_tool_turns_may_have_no_content(server):
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    tokens = server.post("/tokenize", {"model": "tiny", "messages": messages}).json()["tokens"]
    text = server.post("/detokenize", {"model": "tiny", "tokens": tokens}).json()["prompt"]
    assert text == "user: Hi\nassistant: \ntool: sunny\nassistant: "


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return (
        logits
        - logits.max(-1, keepdims=True)
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    )


def test_logprobs_of_prompt_and_text_are_those_of_the_logits(client, llm):
    """As evaluation harnesses ask: token ids, echo, logprobs and a token more."""
    ids = llm.tokenizer.encode("Once upon a time there was")
    answer = client.completions.create(
        model="tiny", prompt=[ids], max_tokens=1, logprobs=1, echo=True, **GREEDY
    )
    told = answer.choices[0].logprobs
    output = alone(llm, ids, max_tokens=1, **GREEDY)
    expected = log_softmax(llm.logits(ids))
    tokens = [*ids, output.tokens[0]]
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(tokens)
    assert (told.token_logprobs[0], told.top_logprobs[0]) == (None, None)
    values = [expected[i, token] for i, token in enumerate(tokens[1:])]
    np.testing.assert_allclose(told.token_logprobs[1:], values, rtol=0, atol=1e-9)
    np.testing.assert_allclose(
        [max(top.values()) for top in told.top_logprobs[1:]], expected.max(-1), rtol=0, atol=1e-9
    )
    assert answer.choices[0].text == "Once upon a time there was" + output.text
    starts = [sum(map(len, told.tokens[:i])) for i in range(len(tokens))]
    assert told.text_offset == starts


def test_an_echo_alone(client, llm):
    answer = client.completions.create(model="tiny", prompt="The dog", max_tokens=0, logprobs=0, echo=True)
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason) == ("The dog", "length")
    assert len(choice.logprobs.tokens) == len(llm.tokenizer.encode("The dog"))
    assert answer.usage.completion_tokens == 0


def test_a_streamed_echo_is_the_same(server):
    body = {"model": "tiny", "prompt": PROMPTS[:2], "max_tokens": 8, "logprobs": 2, "echo": True, "seed": 1}
    whole = server.post("/v1/completions", body).json()["choices"]
    streamed = [{"text": "", "tokens": [], "token_logprobs": [], "text_offset": []} for _ in whole]
    with httpx.stream("POST", server.url + "/v1/completions", json=body | {"stream": True}) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    mine = streamed[choice["index"]]
                    mine["text"] += choice["text"]
                    for name in ("tokens", "token_logprobs", "text_offset"):
                        mine[name] += choice["logprobs"][name]
    for one, mine in zip(whole, streamed, strict=True):
        assert mine.pop("text") == one["text"]
        assert mine == {name: one["logprobs"][name] for name in mine}


def test_chat_logprobs(client, llm):
    messages = [{"role": "user", "content": "Hi"}]
    answer = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=6, logprobs=True, top_logprobs=3, **GREEDY
    )
    content = answer.choices[0].logprobs.content
    output = llm.chat(messages, max_tokens=6, **GREEDY)
    assert len(content) == len(output.tokens)
    assert all(one.logprob == one.top_logprobs[0].logprob for one in content)
    written = b"".join(bytes(one.bytes) for one in content if one.token != "<|endoftext|>")
    assert written.decode(errors="replace").startswith(output.text)


def test_embeddings(client, llm):
    texts = ["The dog", "Once upon a time"]
    # The client asks for base64 by default.
    vectors = [item.embedding for item in client.embeddings.create(model="tiny", input=texts).data]
    plain = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    expected = [llm.embed(text) for text in texts]
    for vector, item, own in zip(vectors, plain.data, expected, strict=True):
        assert np.array_equal(np.array(vector, np.float32), own)
        assert np.array_equal(np.array(item.embedding, np.float32), own)
    assert plain.usage.prompt_tokens == sum(len(llm.tokenizer.encode(text)) for text in texts)
    red = client.embeddings.create(model="tiny:red", input="The dog").data[0].embedding
    assert np.array_equal(np.array(red, np.float32), llm.embed("The dog", adapter="red"))


def test_base64_is_little_endian_float32(server, llm):
    body = {"model": "tiny", "input": llm.tokenizer.encode("x"), "encoding_format": "base64"}
    raw = base64.b64decode(server.post("/v1/embeddings", body).json()["data"][0]["embedding"])
    assert np.array_equal(np.frombuffer(raw, "<f4"), llm.embed("x"))


def test_adapters_are_models(client, llm):
    names = [model.id for model in client.models.list().data]
    assert names == ["tiny", "stories", "tiny:red", "tiny:blue"]
    assert client.models.retrieve("tiny:red").parent == "tiny"
    texts = {}
    for model, adapter in (("tiny", None), ("tiny:red", "red"), ("blue", "blue")):
        answer = client.completions.create(model=model, prompt="Once", max_tokens=30, **GREEDY)
        texts[adapter] = answer.choices[0].text
        assert texts[adapter] == alone(llm, "Once", adapter, max_tokens=30, **GREEDY).text
    assert len(set(texts.values())) == 3


def test_tokenize_and_back(server, llm):
    answer = server.post("/tokenize", {"model": "tiny", "prompt": "Once upon"}).json()
    assert answer == {
        "tokens": llm.tokenizer.encode("Once upon"),
        "count": len(answer["tokens"]),
        "max_model_len": 192,
    }
    assert server.post("/detokenize", {"model": "tiny", "tokens": answer["tokens"]}).json() == {
        "prompt": "Once upon"
    }


def test_a_server_that_normalizes_reads_every_text_so():
    seen, written = "Once upon", "Once  up\u00ad\u200bon"
    bodies = {
        "/v1/completions": lambda text: {"prompt": text, "max_tokens": 3, "temperature": 0},
        "/v1/chat/completions": lambda text: {
            "messages": [{"role": "user", "content": text}],
            "max_tokens": 3,
            "temperature": 0,
        },
        "/tokenize": lambda text: {"prompt": text},
    }
    for normalize in (True, False):
        with running({"tiny": tiny_llm(normalize=normalize)}) as here:
            for path, body in bodies.items():
                a, b = (here.post(path, body(text)).json() for text in (seen, written))
                counts = [answer.get("count") or answer["usage"]["prompt_tokens"] for answer in (a, b)]
                assert (counts[0] == counts[1]) == normalize, path
                assert not normalize or a.get("choices") == b.get("choices")


@pytest.mark.parametrize("blocks", [64, 5], ids=["roomy", "preempted"])
def test_many_at_once_get_what_they_get_alone(llm, blocks):
    """In company, under preemption, with prefix hits and others who go away."""
    shared = "Once upon a time there was a little girl named Lily. She had a red ball and a small dog. " * 2
    jobs = [
        {
            "prompt": (shared if i % 3 else "") + PROMPTS[i % 4],
            "max_tokens": 10 + i,
            "temperature": 0 if i % 2 else 1.1,
            "seed": i,
            "stream": i % 5 == 0,
        }
        for i in range(40)
    ]
    options = Options(cache_bytes=blocks * 64 * 2 * 2 * 2 * 16 * 2, max_batched_tokens=48)

    async def one(client, job):
        answer = await client.post("/v1/completions", json=job)
        assert answer.status_code == 200, answer.text
        if not job["stream"]:
            return answer.json()["choices"][0]["text"]
        events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        return "".join(event["choices"][0]["text"] for event in events)

    async def gone(client):
        with pytest.raises(httpx.TimeoutException):
            await client.post("/v1/completions", json={"prompt": shared, "max_tokens": 90}, timeout=0.01)

    async def together(url):
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
            leaving = [gone(client) for _ in range(8)]
            return (await asyncio.gather(*map(partial(one, client), jobs), *leaving))[: len(jobs)]

    with running({"tiny": tiny_llm()}, options) as server:
        texts = asyncio.run(together(server.url))
        server.wait_for(lambda: server.figure("texts_running") == 0)
        assert server.figure("kv_blocks_used") == 0
        assert server.figure("kv_blocks") == blocks
        if blocks == 5:
            assert server.figure("preemptions_total") > 0
        else:
            assert server.figure("prefix_hit_tokens_total") > 0
    for job, text in zip(jobs, texts, strict=True):
        params = {name: job[name] for name in ("max_tokens", "temperature", "seed")}
        assert text == alone(llm, job["prompt"], **params).text


def test_the_context_ends_a_text(client, llm):
    room = tiny.CONFIG.max_seq_len
    ids = [5] * (room - 3)
    answer = client.completions.create(
        model="tiny", prompt=ids, max_tokens=100, extra_body={"ignore_eos": True}, **GREEDY
    )
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (4, "length")
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hi"}], extra_body={"ignore_eos": True}, **GREEDY
    )
    assert chat.usage.total_tokens == room + 1

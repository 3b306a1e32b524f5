"""Invariant: requests that bend HTTP, and grammars that ask for too much, get a clear answer; others notice nothing."""

import gzip
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from onebit.serve.service import Options
from serve.running import running, tiny_llm
from serve.test_refusals import raw

BODY = b'{"prompt": "Hi", "max_tokens": 1}'
GET = b"GET %s HTTP/1.1\r\nhost: x\r\nconnection: close\r\n%s\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n%s\r\n\r\n"
LENGTH = b"content-length: %d" % len(BODY)
CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
BOMB = gzip.compress(b"[" + b"0," * 10_000_000 + b"0]")

REQUESTS = {
    "many headers": (GET % (b"/health", b"".join(b"a%d: b\r\n" % i for i in range(10_000))), 400),
    "long header": (GET % (b"/health", b"a: " + b"x" * 1_000_000 + b"\r\n"), 400),
    "long address": (GET % (b"/" + b"x" * 1_000_000, b""), 400),
    "NUL in the address": (GET % (b"/v1/models/\0", b""), 400),
    "NUL in a header": (GET % (b"/health", b"a: \0\r\n"), 400),
    "coded NUL": (GET % (b"/v1/models/%00", b""), 404),
    "parents": (GET % (b"/../../etc/passwd", b""), 404),
    "coded parents": (GET % (b"/%2e%2e/%2e%2e/etc/passwd", b""), 404),
    "two slashes": (GET % (b"//evil.example/%2f..", b""), 404),
    "slash at the end": (GET % (b"/health/", b""), 404),
    "absolute": (GET % (b"http://evil.example/health", b""), 404),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", 400),
    "two hosts": (GET % (b"/health", b"host: y\r\n"), 400),
    "HTTP/0.9": (b"GET /health\r\n\r\n", 400),
    "HTTP/1.0": (b"GET /health HTTP/1.0\r\n\r\n", 200),
    "proxy": (b"CONNECT evil.example:443 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", 404),
    "websocket": (GET % (b"/v1/completions", b"upgrade: websocket\r\nsec-websocket-version: 13\r\n"), 405),
    "HEAD": (b"HEAD /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", 405),
    "OPTIONS": (b"OPTIONS /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", 405),
    "TRACE": (b"TRACE /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", 405),
    "two lengths": (POST % (LENGTH + b"\r\ncontent-length: 4") + BODY, 400),
    "negative length": (POST % b"content-length: -4" + BODY, 400),
    "length and chunks": (POST % (b"content-length: 4\r\ntransfer-encoding: chunked") + CHUNKS, 400),
    "chunks": (POST % b"transfer-encoding: chunked" + CHUNKS, 200),
    "two codings": (POST % b"transfer-encoding: gzip, chunked" + CHUNKS, 400),
    "unknown coding": (POST % b"transfer-encoding: xchunked" + CHUNKS, 400),
    "negative chunk": (POST % b"transfer-encoding: chunked" + b"-5\r\nabcde\r\n0\r\n\r\n", 400),
    "long extension": (POST % b"transfer-encoding: chunked" + b"5;" + b"a" * 1_000_000 + b"\r\n", 400),
    "gzip": (POST % (b"content-encoding: gzip\r\ncontent-length: %d" % len(BOMB)) + BOMB, 415),
    # As most readers do it, the last one counts.
    "field twice": (POST % b"content-length: 49" + b'{"max_tokens": 1, "prompt": "", "max_tokens": -5}', 400),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_bent_requests_are_answered_and_closed(server, name):
    data, status = REQUESTS[name]
    try:
        answer = raw(server, data)
    except BrokenPipeError:
        answer = b""
    # The connection may be reset before the answer to a flood has been read.
    if answer or len(data) < 500_000:
        assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:300]
    assert b"evil.example" not in answer.partition(b"\r\n\r\n")[0]
    assert server.get("/health").status_code == 200


def test_requests_in_one_go_are_answered_in_order(server):
    one = b"GET /v1/models/%s HTTP/1.1\r\nhost: x\r\n\r\n"
    answer = raw(server, one % b"tiny" + one % b"none" + GET % (b"/v1/models/stories", b""))
    assert [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]] == [b"200", b"404", b"200"]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("Box:8000", 200),
        ("[::1]:80", 200),
        ("evil.example", 403),
        ("box.evil", 403),
        ("", 403),
    ],
)
def test_a_server_with_names_hears_no_others(named, host, status):
    """A page whose own name was made to point here is of the same origin, but says that name."""
    answer = named.get("/v1/models", headers={"host": host, "origin": f"http://{host}"})
    assert answer.status_code == status
    if status == 403:
        assert "--allow-host" in answer.json()["error"]["message"]


@pytest.fixture(scope="module")
def named():
    with running(
        {"tiny": tiny_llm()}, Options(cache_bytes=2**20, allow_hosts=("127.0.0.1", "::1", "box"))
    ) as here:
        yield here


CHAIN = "start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(4000)) + '\na4000: "x"'
GRAMMARS = {
    "chain": CHAIN,
    "left": 'start: start "a" | "a"',
    "both": 'start: start start | "a"',
    "empty": 'start: (""*)*',
    "repeated": "start: /(a{0,1000}){0,1000}/",
    "huge": 'start: "a"{1000000000}',
    "nested": "start: " + "(" * 10_000 + '"a"' + ")" * 10_000,
    "nested regex": "start: /" + "(" * 5000 + "a" + ")" * 5000 + "/",
    "many": "start: " + "|".join(['"ab"'] * 10_000),
}
SCHEMAS = {
    "long": {"type": "array", "minItems": 10**9},
    "backtracking": {"type": "string", "pattern": "^(a|a)*(a|aa)+(.*)*$"},
    "counted": {"type": "string", "pattern": "((((a{0,100}){0,100}){0,100}){0,100})"},
    "crossed": {"allOf": [{"type": "string", "pattern": f"^.*a.{{{i}}}b.*$"} for i in range(20)]},
    "digits": {"type": "integer", "multipleOf": 10**300},
    "itself": {"$ref": "#"},
}


def test_hostile_grammars_and_a_stream_side_by_side(server):
    """They end, with a text that keeps them or with an error that names them, and the stream goes on meanwhile."""
    text = {"model": "stories", "prompt": "Once", "max_tokens": 200, "ignore_eos": True, "temperature": 0}
    expected = server.post("/v1/completions", text).json()["choices"][0]["text"]
    asked = [{"grammar": grammar} for grammar in GRAMMARS.values()]
    asked += [
        {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
        for schema in SCHEMAS.values()
    ]
    answers, done = [], threading.Event()

    def attack():
        with ThreadPoolExecutor(4) as pool:
            answers.extend(pool.map(ask, asked))
        done.set()

    def ask(limits):
        body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 8}
        return server.post("/v1/chat/completions", body | limits)

    attacker = threading.Thread(target=attack)
    attacker.start()
    times, texts = [], []
    while not done.is_set() or not texts:
        got = ""
        begun = time.monotonic()
        with httpx.stream(
            "POST", server.url + "/v1/completions", json=text | {"stream": True}, timeout=60
        ) as stream:
            for line in stream.iter_lines():
                if line.startswith("data: {"):
                    times.append(time.monotonic() - begun)
                    begun = time.monotonic()
                    got += json.loads(line[6:])["choices"][0]["text"]
        texts.append(got)
    attacker.join()
    assert set(texts) == {expected}
    # A grammar that held up the engine would do so for seconds; a busy machine for less.
    assert max(times) < 3
    for answer, limits in zip(answers, asked, strict=True):
        assert answer.status_code in (200, 400), limits
        if answer.status_code == 400:
            assert answer.json()["error"]["code"] == "invalid_grammar", answer.text
    assert {answer.status_code for answer in answers} == {200, 400}

"""Exact: what a server does not do gets a status, OpenAI's shape and a reason, and disturbs nobody."""

import json
import socket
import time

import httpx
import openai
import pytest

from onebit.serve.service import Options
from serve.running import running, tiny_llm

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
TEXT = {"model": "tiny", "prompt": "Hi"}
IMAGE = [{"type": "image_url", "image_url": {"url": "x"}}]
DEEP = "[" * 100_000

# Path, body, status, and what the message says.
BODIES = [
    ("completions", TEXT | {"temperature": "hot"}, 400, "temperature: Input should be a valid number"),
    ("completions", TEXT | {"temperature": -1}, 400, "temperature: Input should be greater than"),
    ("completions", TEXT | {"temperature": 1e300}, 400, "temperature: Input should be less than"),
    ("completions", TEXT | {"temperature": True}, 400, "temperature: Input should be a valid number"),
    ("completions", TEXT | {"top_p": 0}, 400, "top_p: Input should be greater than 0"),
    ("completions", TEXT | {"max_tokens": -5}, 400, "max_tokens: Input should be greater than"),
    ("completions", TEXT | {"max_tokens": 10**30}, 400, "max_tokens: Input should be less than"),
    ("completions", TEXT | {"max_tokens": 1.5}, 400, "max_tokens: Input should be a valid integer"),
    ("completions", TEXT | {"n": 1000}, 400, "n: Input should be less than or equal to 16"),
    ("completions", TEXT | {"n": 0}, 400, "n: Input should be greater than or equal to 1"),
    ("completions", TEXT | {"seed": 2**64}, 400, "seed: "),
    ("completions", TEXT | {"stop": [""]}, 400, "stop: "),
    ("completions", TEXT | {"stop": ["a"] * 17}, 400, "stop: "),
    ("completions", TEXT | {"logit_bias": {"x": 1}}, 400, "logit_bias: "),
    ("completions", TEXT | {"logit_bias": {"1": 101}}, 400, "logit_bias: "),
    ("completions", TEXT | {"logit_bias": {str(i): 1 for i in range(301)}}, 400, "logit_bias: "),
    ("completions", TEXT | {"logit_bias": {"320": 1}}, 400, "outside the vocabulary of 320"),
    ("completions", TEXT | {"logprobs": 21}, 400, "logprobs: "),
    ("completions", TEXT | {"logprobs": True}, 400, "logprobs: "),
    ("completions", TEXT | {"suffix": "end"}, 400, "suffix is not supported"),
    ("completions", TEXT | {"best_of": 3}, 400, "best_of is not supported"),
    ("completions", TEXT | {"temprature": 1}, 400, "temprature: this server does not know this field"),
    ("completions", TEXT | {"stream": "yes"}, 400, "stream: "),
    ("completions", TEXT | {"prompt": 5}, 400, "prompt: Input should be a valid string; or "),
    ("completions", TEXT | {"prompt": None}, 400, "prompt: "),
    ("completions", TEXT | {"prompt": ["a"] * 257}, 400, "prompt: "),
    ("completions", TEXT | {"prompt": ["a", 5]}, 400, "prompt: "),
    ("completions", TEXT | {"prompt": [320]}, 400, "320"),
    ("completions", TEXT | {"prompt": [-1]}, 400, "prompt: "),
    (
        "completions",
        TEXT | {"prompt": [5] * 193},
        400,
        "prompt has 193 tokens; the context of this model has 192",
    ),
    ("completions", TEXT | {"prompt": "\ud800"}, 400, "not valid Unicode at character 0"),
    ("completions", {"model": "tiny"}, 400, "prompt: Field required"),
    (
        "completions",
        TEXT | {"model": "gpt-5"},
        404,
        "model 'gpt-5' is unknown; this server has tiny, stories",
    ),
    ("completions", TEXT | {"model": "../etc/passwd"}, 404, "is unknown"),
    ("completions", TEXT | {"model": "\U0001f600"}, 404, r"'\U0001f600' is unknown"),
    ("completions", TEXT | {"grammar": ""}, 400, "grammar: "),
    ("completions", [], 400, "Input should be a valid dictionary"),
    ("completions", None, 400, "valid dictionary"),
    ("completions", {"\ud800": 1} | TEXT, 400, "unable to parse raw data as a unicode string"),
    ("chat/completions", CHAT | {"messages": []}, 400, "messages: "),
    ("chat/completions", CHAT | {"messages": [{"role": "king", "content": "x"}]}, 400, "messages: "),
    ("chat/completions", CHAT | {"messages": [{"role": "user", "content": 5}]}, 400, "messages: "),
    (
        "chat/completions",
        CHAT | {"messages": [{"role": "user", "content": IMAGE}]},
        400,
        "messages: ",
    ),
    ("chat/completions", CHAT | {"messages": [{"role": "user", "content": "a" * 5000}]}, 400, "messages has"),
    (
        "chat/completions",
        CHAT | {"messages": [{"role": "user", "content": "\udfff"}]},
        400,
        "not valid Unicode",
    ),
    (
        "chat/completions",
        CHAT | {"model": "stories"},
        400,
        "stories has no chat template; use /v1/completions",
    ),
    ("chat/completions", CHAT | {"top_logprobs": 3}, 400, "top_logprobs needs logprobs"),
    ("chat/completions", CHAT | {"tool_choice": "required"}, 400, "tool_choice: "),
    ("chat/completions", CHAT | {"modalities": ["audio"]}, 400, "modalities: "),
    ("chat/completions", CHAT | {"response_format": {"type": "xml"}}, 400, "response_format: "),
    (
        "chat/completions",
        CHAT | {"response_format": {"type": "json_schema"}},
        400,
        "needs json_schema.schema",
    ),
    (
        "chat/completions",
        CHAT | {"response_format": {"type": "json_object"}, "grammar": "start: /a/"},
        400,
        "exclude each other",
    ),
    (
        "embeddings",
        {"model": "tiny", "input": "x", "dimensions": 5},
        400,
        "dimensions is 5; this model gives 48",
    ),
    ("embeddings", {"model": "tiny", "input": "x", "encoding_format": "hex"}, 400, "encoding_format: "),
    ("embeddings", {"model": "tiny", "input": [5] * 193}, 400, "input has 193 tokens"),
]


def check_error(answer, status, says):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert says in error["message"]
    assert len(answer.content) < 2000
    assert "Traceback" not in answer.text
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(("path", "body", "status", "says"), BODIES, ids=[str(i) for i in range(len(BODIES))])
def test_bodies(server, path, body, status, says):
    content = json.dumps(body)
    headers = {"content-type": "application/json"}
    check_error(server.post(f"/v1/{path}", content=content, headers=headers), status, says)


RAW = [
    (b"", 400, "Field required"),
    (b"{", 400, "the body is not JSON"),
    (b'{"prompt": "\xff"}', 400, "the body is not JSON"),
    (b'{"prompt": "x", "temperature": NaN}', 400, "temperature: Input should be a finite number"),
    (b'{"prompt": "x", "temperature": 1e999}', 400, "temperature: Input should be a finite number"),
    (b'{"prompt": "x", "seed": ' + b"9" * 10_000 + b"}", 400, "the body is not JSON"),
    (DEEP.encode(), 400, "the body is not JSON"),
    (b'{"prompt": ' + DEEP.encode(), 400, "the body is not JSON"),
    (b'{"prompt": "' + b"a" * 5_000_000 + b'"}', 413, "larger than the 4,194,304 bytes"),
    (b'"' + b"a" * 4_000_000 + b'"', 400, "valid dictionary"),
    (
        b'{"prompt": "' + b"a" * 4_000_000 + b'"}',
        400,
        "has 4,000,000 characters; the context of this model has 192",
    ),
]


@pytest.mark.parametrize(("content", "status", "says"), RAW, ids=[str(i) for i in range(len(RAW))])
def test_bytes(server, content, status, says):
    headers = {"content-type": "application/json"}
    check_error(server.post("/v1/completions", content=content, headers=headers), status, says)


def test_a_body_without_length_is_counted_while_it_comes(server):
    def endless():
        for _ in range(100):
            yield b"a" * 100_000

    headers = {"content-type": "application/json"}
    check_error(server.post("/v1/completions", content=endless(), headers=headers), 413, "larger than")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_other_content_types(server, kind):
    """A form on a web page can send those without being asked by its browser."""
    headers = {} if kind is None else {"content-type": kind}
    answer = server.post("/v1/completions", content=b'{"prompt": "x"}', headers=headers)
    check_error(answer, 400, f"the content type is '{kind or 'none'}'; send application/json")


@pytest.mark.parametrize(
    ("method", "path", "status", "says"),
    [
        ("GET", "/v1/nothing", 404, "there is nothing at '/v1/nothing'"),
        ("GET", "/static/../../../etc/passwd", 404, "there is nothing at"),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404, "there is nothing at"),
        ("GET", "/v1/models/..%2f..%2fetc", 404, "is unknown"),
        ("GET", "/v1/completions", 405, "'/v1/completions' does not take GET"),
        ("DELETE", "/v1/models/tiny", 405, "does not take DELETE"),
        ("GET", "/docs", 404, "there is nothing"),
        ("GET", "/\u20ac%ff", 404, "there is nothing"),
    ],
)
def test_places(server, method, path, status, says):
    check_error(httpx.request(method, server.url + path), status, says)


def test_the_client_knows_these_errors(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError, match="gpt-5") as caught:
            client.completions.create(model="gpt-5", prompt="x")
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="tiny", prompt=[5] * 193)
        assert caught.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError, match="suffix is not supported"):
            client.completions.create(model="tiny", prompt="x", suffix="y")


def test_request_ids_come_back(server):
    def id_of(given):
        return server.get("/health", headers={"x-request-id": given}).headers["x-request-id"]

    assert id_of("abc-123") == "abc-123"
    for given in ("a b", "x" * 129, '"', ""):
        assert len(id_of(given)) == 32


def raw(server, data, timeout_s=10.0):
    """What comes back for bytes, until the server closes."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=timeout_s) as sock:
        sock.sendall(data)
        answer = b""
        try:
            while part := sock.recv(65536):
                answer += part
        except ConnectionResetError:
            pass
        return answer


def test_headers_without_end_are_cut(server):
    flood = b"GET / HTTP/1.1\r\n" + b"".join(b"x-%d: %s\r\n" % (i, b"a" * 100) for i in range(2000))
    assert raw(server, flood).startswith(b"HTTP/1.1 400")
    assert raw(server, b"\x16\x03\x01 not http \r\n\r\n").startswith(b"HTTP/1.1 400")
    assert server.get("/health").status_code == 200


def test_silent_and_slow_connections_are_ended(server, monkeypatch):
    monkeypatch.setattr("onebit.serve.server.HEADER_SECONDS", 0.3)
    begun = time.monotonic()
    assert raw(server, b"") == b""
    assert raw(server, b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n") == b""
    assert time.monotonic() - begun < 5


def test_a_body_that_does_not_arrive_is_given_up():
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 50\r\n"
    with running({"tiny": tiny_llm()}, Options(cache_bytes=2**20, read_s=0.3)) as server:
        answer = raw(server, head + b"connection: close\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"did not arrive within 0.3 s" in answer


def test_too_many_connections(server, monkeypatch):
    monkeypatch.setattr("onebit.serve.server.MAX_CONNECTIONS", 0)
    answer = raw(server, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 503")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "server_error"


@pytest.fixture(scope="module")
def locked():
    options = Options(
        cache_bytes=2**20, api_keys=("first", "zweiter-Schlüssel"), allow_origins=("https://ours.example",)
    )
    with running({"tiny": tiny_llm()}, options) as server:
        yield server


def test_keys(locked):
    def status(*headers):
        return locked.get("/v1/models", headers=list(headers)).status_code

    for key in ("first", "zweiter-Schlüssel"):
        assert status(("authorization", f"Bearer {key}".encode())) == 200
    assert status(("authorization", "bearer first")) == 200
    wrong = ["Bearer", "Bearer firs", "Bearer first2", "Bearer Second", "Basic first", "first", ""]
    assert {status(("authorization", value)) for value in wrong} == {401}
    answer = locked.get("/v1/models")
    check_error(answer, 401, "the API key is missing or wrong")
    assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/metrics", "/openapi.json", "/v1/nothing", "/tokenize"):
        assert locked.get(path).status_code == 401
    for path in ("/health", "/ready"):
        assert locked.get(path).status_code == 200
    with openai.OpenAI(base_url=locked.url + "/v1", api_key="nonsense", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_web_pages_of_others_are_not_let_in(server):
    assert server.get("/v1/models", headers={"origin": server.url}).status_code == 200
    answer = server.get("/v1/models", headers={"origin": "https://evil.example"})
    check_error(answer, 403, "web pages of other origins are not let in")
    assert "access-control-allow-origin" not in answer.headers
    ask = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    preflight = httpx.options(server.url + "/v1/completions", headers=ask)
    assert preflight.status_code == 403
    assert server.get("/v1/models", headers={"origin": "null"}).status_code == 403


def test_web_pages_that_are_named_are(locked):
    ask = {"origin": "https://ours.example", "access-control-request-method": "POST"}
    preflight = httpx.options(locked.url + "/v1/completions", headers=ask)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://ours.example"
    key = {"authorization": "Bearer first"}
    for origin, status in (("https://ours.example", 200), ("https://evil.example", 403)):
        assert locked.get("/v1/models", headers=key | {"origin": origin}).status_code == status
    # A page can read what went wrong.
    refused = locked.get("/v1/models", headers={"origin": "https://ours.example"})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (
        401,
        "https://ours.example",
    )


def test_the_openapi_document_tells_the_bodies(server):
    document = server.get("/openapi.json").json()
    assert {"/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize"} <= set(
        document["paths"]
    )
    assert "min_p" in document["components"]["schemas"]["ChatRequest"]["properties"]

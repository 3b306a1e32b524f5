"""Invariant: whatever one client, one step or one signal does, the others get their answers and nothing stays held."""

import asyncio
import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest

import tiny
from onebit import formats
from onebit.checkpoint import quantize
from onebit.serve.gate import Log
from onebit.serve.service import Options
from serve.running import running, tiny_llm

LONG = {"prompt": "Once", "max_tokens": 180, "ignore_eos": True, "temperature": 0}


def slow_llm(step_s=0.02):
    """A model whose steps take a while, so that there is time for something to happen."""
    llm = tiny_llm(speculation=False)
    forward = llm.model.forward

    def slowly(*args, **more):
        time.sleep(step_s)
        return forward(*args, **more)

    llm.model.forward = slowly
    return llm


@pytest.fixture(scope="module")
def slow():
    options = Options(cache_bytes=2**20, max_num_seqs=2, max_queue=1, write_s=1.0)
    with running({"tiny": slow_llm()}, options) as server:
        yield server


def is_idle(server):
    return server.figure("texts_running") == server.figure("kv_blocks_used") == 0


def opened(server, body):
    """A connection on which a streamed answer has begun."""
    host, port = server.url.removeprefix("http://").split(":")
    sock = socket.create_connection((host, int(port)), timeout=30)
    data = json.dumps(body | {"stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
    sock.sendall(head.encode() + b"\r\n\r\n" + data)
    assert sock.recv(100).startswith(b"HTTP/1.1 200")
    return sock


def test_a_full_server_says_when_to_come_back(slow):
    streams = [opened(slow, LONG) for _ in range(2)]
    waiting = threading.Thread(target=slow.post, args=("/v1/completions", LONG | {"max_tokens": 1}))
    waiting.start()
    slow.wait_for(lambda: slow.service.served[0].runner.n_reserved == 3)
    answer = slow.post("/v1/completions", LONG)
    assert answer.status_code == 429
    assert answer.json()["error"]["message"].startswith("the server is full: 3 of 3 texts in flight")
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    with openai.OpenAI(base_url=slow.url + "/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model="tiny", prompt="x")
    for sock in streams:
        sock.close()
    waiting.join()
    slow.wait_for(lambda: is_idle(slow))
    assert slow.post("/v1/completions", LONG | {"max_tokens": 2}).status_code == 200
    many = slow.post("/v1/completions", LONG | {"n": 4})
    assert (many.status_code, "takes 3 at a time" in many.text) == (400, True)


def test_a_stream_comes_while_its_text_grows(slow):
    with opened(slow, LONG) as sock:
        sock.recv(1000)
        assert slow.figure("texts_running") == 1
    slow.wait_for(lambda: is_idle(slow))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_vanishes_frees_its_blocks(slow, stream):
    if stream:
        opened(slow, LONG).close()
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(slow.url + "/v1/completions", json=LONG, timeout=0.3)
    begun = slow.figure("completion_tokens_total")
    slow.wait_for(lambda: is_idle(slow))
    assert slow.figure("completion_tokens_total") - begun < 100


def test_a_reader_that_stops_is_ended_and_stalls_nobody(slow):
    """At the seam of ASGI, where it takes no megabytes to fill the buffers of a connection."""
    body = json.dumps(LONG | {"stream": True}).encode()
    asked = [{"type": "http.request", "body": body, "more_body": False}]

    async def stuck():
        async def receive():
            return asked.pop() if asked else await asyncio.Event().wait()

        async def send(message):
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "headers": [(b"content-type", b"application/json")],
            "query_string": b"",
        }
        with pytest.raises(TimeoutError):
            await slow.app(scope, receive, send)

    loop = next(iter({served.runner._loop for served in slow.service.served}))
    future = asyncio.run_coroutine_threadsafe(stuck(), loop)
    slow.wait_for(lambda: slow.figure("texts_running") == 1)
    assert slow.post("/v1/completions", LONG | {"max_tokens": 3}).status_code == 200
    future.result(30)
    slow.wait_for(lambda: is_idle(slow))
    assert 'outcome="slow_reader"' in slow.get("/metrics").text


def test_pieces_that_pile_up_end_their_text(slow, monkeypatch):
    monkeypatch.setattr("onebit.serve.runner.MAX_PENDING", 5)
    runner = slow.service.served[0].runner

    async def forgetful():
        from onebit.engine.sampling import SamplingParams

        params = SamplingParams(max_tokens=100, ignore_eos=True, temperature=0)
        ticket = runner.submit([([1, 2, 3], params, -1)], is_streamed=True)
        await asyncio.sleep(1)
        async for _ in ticket.pieces():
            pass

    with pytest.raises(Exception, match="not read fast enough"):
        asyncio.run_coroutine_threadsafe(forgetful(), runner._loop).result(30)
    slow.wait_for(lambda: is_idle(slow))


def test_a_failed_step_fails_its_texts_only():
    llm = slow_llm()
    forward = llm.model.forward
    fails = threading.Event()

    def failing(*args, **more):
        if fails.is_set():
            fails.clear()
            raise MemoryError("secret words")
        return forward(*args, **more)

    llm.model.forward = failing
    with running({"tiny": llm}, Options(cache_bytes=2**20, max_num_seqs=1)) as server:
        with opened(server, LONG) as sock:
            answers = []
            ask = {"prompt": "The dog", "max_tokens": 3, "temperature": 0}
            other = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", ask)))
            other.start()
            server.wait_for(lambda: server.figure("texts_waiting") == 1)
            fails.set()
            data = b""
            while not data.endswith(b"0\r\n\r\n"):
                data += sock.recv(65536)
        assert b'"message":"the model failed (MemoryError)"' in data
        assert b"secret" not in data and b"[DONE]" not in data
        other.join()
        assert answers[0].status_code == 200
        output = tiny_llm().generate("The dog", max_tokens=3, temperature=0)
        assert answers[0].json()["choices"][0]["text"] == output.text
        assert server.figure("failed_steps_total") == 1
        assert server.get("/health").status_code == 200
        fails.set()
        failed = server.post("/v1/completions", ask)
        assert (failed.status_code, failed.json()["error"]["type"]) == (500, "server_error")
        server.wait_for(lambda: is_idle(server))


def test_running_streams_end_within_the_grace_period():
    with running({"tiny": slow_llm()}, Options(cache_bytes=2**20), grace_s=60) as server:
        sock = opened(server, LONG | {"max_tokens": 60})
        server.server.should_exit = True
        server.wait_for(lambda: server.get("/ready").status_code == 503)
        refused = server.post("/v1/completions", LONG)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert refused.headers["retry-after"]
        data = b""
        while part := sock.recv(65536):
            data += part
        assert b"data: [DONE]" in data
        assert data.endswith(b"0\r\n\r\n")


def test_longer_ones_end_with_an_error():
    with running({"tiny": slow_llm()}, Options(cache_bytes=2**20), grace_s=0.2) as server:
        sock = opened(server, LONG)
        server.server.should_exit = True
        data = b""
        while part := sock.recv(65536):
            data += part
        assert b'"message":"the server is shutting down"' in data
        assert b"[DONE]" not in data
        assert data.endswith(b"0\r\n\r\n")


def test_sigterm_under_load(tmp_path):
    """A process of its own: every stream ends well, and so does the process."""
    formats.write(quantize(tiny.master()), tmp_path / "tiny.onebit")
    command = [sys.executable, "-m", "onebit", "serve", "-m", str(tmp_path / "tiny.onebit"), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--log-file", str(tmp_path / "log"), "--memory", "4MiB"], stderr=subprocess.PIPE, text=True
    )
    try:
        first = process.stderr.readline()
        url = first.split()[1]
        assert first.startswith("onebit: http://127.0.0.1:") and "serves tiny" in first
        line = process.stderr.readline()
        assert line.startswith(f"curl {url}/v1/completions -H")
        if shutil.which("curl"):
            told = subprocess.run([*shlex.split(line), "-sS"], capture_output=True, check=True, timeout=60)
            # A text that is drawn may end before its limit.
            assert 1 <= json.loads(told.stdout)["usage"]["completion_tokens"] <= 16
        results = []

        def client():
            with suppressed():
                while True:
                    body = LONG | {"stream": True}
                    answer = httpx.post(url + "/v1/completions", json=body, timeout=60)
                    results.append((answer.status_code, answer.text.endswith("data: [DONE]\n\n")))

        clients = [threading.Thread(target=client) for _ in range(8)]
        for thread in clients:
            thread.start()
        end = time.monotonic() + 60
        while len(results) < 8 and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        for thread in clients:
            thread.join(60)
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.stderr.close()
        process.wait()
    assert {result for result in results} <= {(200, True), (503, False)}
    assert results.count((200, True)) >= 8
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert len([line for line in lines if line["outcome"] == "ok"]) >= results.count((200, True))


class suppressed:
    """Until the server is gone."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        return kind is not None and issubclass(kind, httpx.TransportError)


def test_the_log_tells_everything_but_the_text(server, log_path):
    secret = "Rumpelstiltskin"
    ids = {}
    for name, body in (
        ("ok", {"prompt": secret, "max_tokens": 5, "ignore_eos": True}),
        ("refused", {"prompt": secret, "max_tokens": -5}),
        ("refused", {"prompt": secret, secret: 1}),
        ("refused", {"model": secret, "prompt": "x"}),
    ):
        answer = server.post(f"/v1/completions?{secret}", body)
        ids[answer.headers["x-request-id"]] = name
    server.wait_for(
        lambda: set(ids) <= {json.loads(line)["id"] for line in log_path.read_text().splitlines()}
    )
    text = log_path.read_text()
    assert secret not in text
    lines = {line["id"]: line for line in map(json.loads, text.splitlines())}
    assert {i: lines[i]["outcome"] for i in ids} == ids
    line = next(lines[i] for i, name in ids.items() if name == "ok")
    assert (line["model"], line["path"], line["status"], line["completion_tokens"]) == (
        "tiny",
        "/v1/completions",
        200,
        5,
    )
    assert 0 < line["first_token_s"] <= line["duration_s"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_loses_lines_and_nothing_else(tmp_path):
    from pathlib import Path

    with running({"tiny": tiny_llm()}, Options(cache_bytes=2**20), log_file=Path("/dev/full")) as server:
        for _ in range(3):
            assert server.post("/v1/completions", {"prompt": "x"}).status_code == 200
        server.wait_for(lambda: server.figure("lost_log_lines_total") >= 3)


def test_a_stuck_log_loses_lines_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr("onebit.serve.gate.MAX_LOG_LINES", 2)
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    lost = []
    log = Log(tmp_path / "pipe", lambda: lost.append(1))
    begun = time.monotonic()
    for _ in range(100):
        log.write({"text": "x" * 10_000})
    assert lost and time.monotonic() - begun < 5
    while log._lines.qsize():
        with contextlib.suppress(BlockingIOError):
            os.read(reader, 2**20)
        time.sleep(0.01)
    log.close()
    os.close(reader)


def test_figures(server):
    names = (
        "prompt_tokens_total",
        "completion_tokens_total",
        "request_seconds_count",
        "time_to_first_token_seconds_count",
    )
    before = [server.figure(name) for name in names]
    server.post(
        "/v1/completions", {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}
    )
    after = [server.figure(name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [3, 4, 1, 1]
    # As the format asks: what a figure is stands once before all of its lines.
    kinds = [
        line.split()[2] for line in server.get("/metrics").text.splitlines() if line.startswith("# TYPE")
    ]
    assert len(kinds) == len(set(kinds))

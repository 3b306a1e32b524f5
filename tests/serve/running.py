"""Servers to test: in this process, on a free port, in a thread of their own."""

import threading
import time
from contextlib import contextmanager

import httpx

import tiny
from onebit.llm import LLM
from onebit.serve.app import create_app
from onebit.serve.server import Server, listen
from onebit.serve.service import Options

TEMPLATE = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + tiny.CHAT_TEMPLATE


def tiny_llm(**changes) -> LLM:
    adapters = {"red": tiny.adapter(seed=1), "blue": tiny.adapter(seed=2)}
    return LLM(tiny.master(chat_template=TEMPLATE), threads=1, adapters=adapters, **changes)


class Running:
    """A server that runs."""

    def __init__(self, app, url):
        self.app = app
        self.url = url
        self.service = app.state.service

    def post(self, path, body=None, **more):
        return httpx.post(self.url + path, json=body, timeout=60, **more)

    def get(self, path, **more):
        return httpx.get(self.url + path, timeout=60, **more)

    def figure(self, name):
        """A figure of /metrics, summed over labels."""
        lines = self.get("/metrics").text.splitlines()
        found = [line for line in lines if line.split("{")[0].split(" ")[0] == f"onebit_{name}"]
        assert found, name
        return sum(float(line.rpartition(" ")[2]) for line in found)

    def wait_for(self, condition, timeout_s=30):
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, "it never came true"
            time.sleep(0.01)


@contextmanager
def running(models, options=None, log_file=None, grace_s=0.0):
    app = create_app(models, options or Options(cache_bytes=2**22), log_file)
    with listen("127.0.0.1", 0) as sock:
        server = Server(app, grace_s)
        thread = threading.Thread(target=server.run, args=([sock],))
        thread.start()
        here = Running(app, f"http://127.0.0.1:{sock.getsockname()[1]}")
        here.server = server
        try:
            here.wait_for(lambda: here.get("/ready").status_code == 200)
            yield here
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()

"""Two replicas under Ray Serve: both answer with the texts of the model alone, and one is killed under load.

make ray
"""

import json
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import ray
from ray import serve

import onebit
from onebit.engine.sampling import SamplingParams
from onebit.serve.ray import Arguments, app

URL = "http://127.0.0.1:8000"
PROMPTS = [f"Once upon a time there was a {who}" for who in "cat dog cow pig hen fox bee ant".split()]
USERS = 6
SECONDS = 120


def answer(prompt: str, stream: bool, session: str = "") -> str:
    """The text, or what went wrong instead."""
    body = {"prompt": prompt, "max_tokens": 40, "temperature": 0, "stream": stream}
    headers = {"x-session-id": session} if session else {}
    try:
        got = httpx.post(URL + "/v1/completions", json=body, headers=headers, timeout=SECONDS)
    except httpx.HTTPError as error:
        return f"! {type(error).__name__}"
    if got.status_code != 200:
        return f"! {got.status_code}"
    if not stream:
        return got.json()["choices"][0]["text"]
    chunks = [line.removeprefix("data: ") for line in got.text.splitlines() if line.startswith("data: ")]
    if chunks[-1] != "[DONE]":
        return "! cut off"
    return "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks[:-1])


def replicas() -> list[int]:
    """Their processes."""
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [
        int(line.split()[0]) for line in listed.splitlines() if "ray::ServeReplica:default:onebit" in line
    ]


def ask(n: int, expected: dict[str, str], begun: threading.Semaphore | None = None) -> Counter:
    """How n requests ended: right, wrong, or with which error."""

    def one(i: int) -> str:
        prompt = PROMPTS[i % len(PROMPTS)]
        text = answer(prompt, stream=i % 3 == 0)
        if begun:
            begun.release()
        return text if text.startswith("! ") else "right" if text == expected[prompt] else "wrong"

    with ThreadPoolExecutor(USERS) as pool:
        return Counter(pool.map(one, range(n)))


def readers() -> set[str]:
    """The totals of prompt tokens that the replicas tell, asked until each must have answered."""
    pages = [httpx.get(URL + "/metrics").text.splitlines() for _ in range(20)]
    return {line for page in pages for line in page if line.startswith("onebit_prompt_tokens_total{")}


def main() -> None:
    llm = onebit.load(threads=1)
    params = SamplingParams(max_tokens=40, temperature=0)
    expected = {prompt: llm.generate(prompt, params).text for prompt in PROMPTS}
    ray.init(num_cpus=4, include_dashboard=False)
    try:
        serve.run(app(Arguments.model_validate({"replicas": "2", "memory": "64MiB"})))
        first = ask(48, expected)
        print("two replicas:", dict(first))
        assert first == {"right": 48}
        totals = readers()
        assert len(totals) == 2 and all(float(line.split()[-1]) > 0 for line in totals), totals

        begun = threading.Semaphore(0)
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(ask, 60, expected, begun)
            for _ in range(10):
                begun.acquire()
            os.kill(replicas()[0], signal.SIGKILL)
            killed = asked.result()
        print("one killed:", dict(killed))
        assert not killed["wrong"] and killed["right"] >= 60 - USERS

        end = time.monotonic() + SECONDS
        while len(replicas()) < 2:
            assert time.monotonic() < end, "no new replica"
            time.sleep(0.5)
        last = ask(24, expected)
        print("with a new one:", dict(last))
        assert last == {"right": 24}

        serve.run(app(Arguments.model_validate({"replicas": "2", "memory": "64MiB", "sessions": "true"})))
        for i in range(12):
            assert answer(PROMPTS[i % 3], stream=False, session="one") == expected[PROMPTS[i % 3]]
        read = sorted(float(line.split()[-1]) for line in readers())
        print("prompt tokens read by each, of one session:", read)
        assert len(read) <= 1 or read[0] == 0
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()

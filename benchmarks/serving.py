"""What `onebit serve` keeps of the engine's speed, how it shares it among users, and whether it stays right and small.

    python benchmarks/serving.py --shape 125m --rounds 3
    python benchmarks/serving.py --shape 125m --only peer        # beside llama-cpp-python's server
    python benchmarks/serving.py --only soak --soak 30           # minutes

The server, the engine that it is compared with and the clients are a process each, the clients with lower priority. In
each round server and engine get the same new prompts, one after the other; a ratio is made within a round, and its
median is told.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from onebit import formats
from onebit.llm import SHIPPED_MODEL

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "build/bench/models"
Body = dict[str, Any]
# As a chat asks; random models would repeat themselves if they were greedy, and guesses would hide what a step costs.
DRAWN = {"temperature": 0.8, "top_k": 40, "top_p": 1.0, "min_p": 0.0}
GREEDY = {"temperature": 0.0}


# --- the clients -------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """What a client got: status, text, tokens as counted by the server, seconds from the request to each event."""

    status: int
    text: str = ""
    tokens: int = 0
    times: list[float] = []
    retry_after: str = ""
    outcome: str = "ok"

    @property
    def first_s(self) -> float:
        return self.times[0]

    @property
    def speed(self) -> float:
        """Tokens per second after the first one."""
        return (self.tokens - 1) / (self.times[-1] - self.times[0])


async def ask(port: int, body: Body, give_up_after: int | None = None) -> Answer:
    """Stream one answer; after so many events the client goes away."""
    begun_s = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    try:
        data = json.dumps(body | {"stream": True}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        status = int((await reader.readline()).split()[1])
        headers = {}
        while (line := (await reader.readline()).strip()) != b"":
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        if status != 200:
            return Answer(status, retry_after=headers.get("retry-after", ""), outcome="refused")
        text, tokens, times = "", 0, []
        async for line in reader:
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                return Answer(status, text, tokens or len(times), times)
            event = json.loads(line[6:])
            if "error" in event:
                return Answer(status, text, tokens, times, outcome=str(event["error"]))
            tokens = (event.get("usage") or {}).get("completion_tokens", 0)
            if event["choices"] and event["choices"][0]["text"]:
                times.append(time.perf_counter() - begun_s)
                text += event["choices"][0]["text"]
            if give_up_after is not None and len(times) >= give_up_after:
                return Answer(status, text, tokens, times, outcome="gone")
        return Answer(status, text, tokens, times, outcome="cut off")
    finally:
        writer.close()


def ask_all(port: int, bodies: Sequence[Body]) -> tuple[list[Answer], float]:
    """Ask at the same time, and the seconds until all have an answer."""

    async def gather() -> list[Answer]:
        return await asyncio.gather(*(ask(port, body) for body in bodies))

    begun_s = time.perf_counter()
    answers = asyncio.run(gather())
    return answers, time.perf_counter() - begun_s


# --- the engine --------------------------------------------------------------------------------------------------


class Computed(NamedTuple):
    """What the engine alone made of the same requests: texts, seconds in all, and of each text to its first token,
    and its tokens per second after that."""

    texts: list[str]
    tokens: int
    seconds: float
    first_s: list[float]
    speed: list[float]


def load_engine(path: str, threads: int, adapters: dict[str, str]) -> None:
    from onebit.llm import load

    global llm
    llm = load(path, threads, adapters=adapters)


def compute(bodies: Sequence[Body], at_once: int) -> Computed:
    """Texts in static batches: each begins when all of the one before have ended."""
    from onebit.engine.sampling import SamplingParams

    engine = llm.engine(n_blocks=2048, prefix_cache=False)
    done, begun_s = [], time.perf_counter()
    for i in range(0, len(bodies), at_once):
        for body in bodies[i : i + at_once]:
            params = {
                name: value for name, value in body.items() if name not in ("prompt", "model", *STREAMED)
            }
            adapter = llm.adapters.index(body["model"]) if body.get("model") in llm.adapters else -1
            done.append(engine.add(llm.encode(body["prompt"]), SamplingParams(**params), adapter))
        for _ in engine.run():
            pass
    seconds = time.perf_counter() - begun_s
    return Computed(
        [one.text for one in done],
        sum(len(one.generated) for one in done),
        seconds,
        [one.first_token_s - one.started_s for one in done],
        [(len(one.generated) - 1) / max(one.last_token_s - one.first_token_s, 1e-9) for one in done],
    )


STREAMED = {"stream_options": {"include_usage": True}}


# --- processes ---------------------------------------------------------------------------------------------------


class Bench(NamedTuple):
    """What the scenarios share."""

    args: argparse.Namespace
    path: Path
    vocab_size: int
    engine: ProcessPoolExecutor
    client: ProcessPoolExecutor

    def compute(self, bodies: Sequence[Body], at_once: int) -> Computed:
        return self.engine.submit(compute, bodies, at_once).result()

    def ask(self, port: int, bodies: Sequence[Body]) -> tuple[list[Answer], float]:
        return self.client.submit(ask_all, port, [body | STREAMED for body in bodies]).result()

    def prompts(self, n: int, length: int) -> list[list[int]]:
        """Prompts that nobody had before."""
        return [[random.randrange(300, self.vocab_size) for _ in range(length)] for _ in range(n)]

    @contextlib.contextmanager
    def serving(self, *options: str) -> Iterator[int]:
        command = [
            "-m",
            "onebit",
            "serve",
            "-m",
            str(self.path),
            "--threads",
            str(self.args.threads),
            *options,
        ]
        with serving(command) as (port, _):
            yield port


@contextlib.contextmanager
def serving(command: Sequence[str]) -> Iterator[tuple[int, int]]:
    """A server in a process of its own: its port and process id."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([sys.executable, *command, "--port", str(port)], stdout=log, stderr=log)
        try:
            for path in ("/v1/models", "/ready"):
                while not _answers(f"http://127.0.0.1:{port}{path}"):
                    if process.poll() is not None:
                        log.seek(0)
                        sys.exit(f"serving: the server ended: {log.read()[-2000:]}")
                    time.sleep(0.2)
                if "llama_cpp.server" in command:
                    break
            yield port, process.pid
        finally:
            process.terminate()
            process.wait(60)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def make_model(shape: str) -> Path:
    """The shipped model, or random weights of a real shape with a tokenizer of as many words."""
    if shape == "shipped":
        return SHIPPED_MODEL
    from shapes import SHAPES, synthetic

    path = MODELS / f"serving-{shape}.onebit"
    if not path.exists():
        MODELS.mkdir(parents=True, exist_ok=True)
        config = SHAPES[shape]
        formats.write(replace(synthetic(config), tokenizer=words(config.vocab_size)), path)
    return path


def words(n: int) -> bytes:
    """A tokenizer of n tokens: all bytes, then a to z, aa to zz and so on."""
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary, grown, merges = [*alphabet], [*letters], []
    for word in grown:
        for letter in letters[: n - len(vocabulary)]:
            merges.append((word, letter))
            vocabulary.append(word + letter)
            grown.append(word + letter)
        if len(vocabulary) == n:
            break
    model = tokenizers.models.BPE({word: i for i, word in enumerate(vocabulary)}, merges)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer.to_str().encode()


# --- the table ---------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A figure, and what it should be: at least or at most."""

    what: str
    value: float
    target: str = ""

    @property
    def verdict(self) -> str:
        if not self.target:
            return ""
        sign, _, bound = self.target.partition(" ")
        reached = self.value >= float(bound) if sign == ">=" else self.value <= float(bound)
        return "reached" if reached else "MISSED"


def over_rounds(rounds: int, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The median of each figure."""
    found = [measure() for _ in range(rounds)]
    return {name: statistics.median(one[name] for one in found) for name in found[0]}


# --- scenarios ---------------------------------------------------------------------------------------------------


def one_user(bench: Bench) -> list[Row]:
    """One user over HTTP, beside the engine."""
    args = bench.args

    def measure() -> dict[str, float]:
        (prompt,) = bench.prompts(1, args.prompt)
        body = {"prompt": prompt, "max_tokens": args.tokens, "ignore_eos": True, "seed": 1, **DRAWN}
        (answer,), _ = bench.ask(port, [body])
        own = bench.compute([body], 1)
        return {
            "engine": own.speed[0],
            "http": answer.speed,
            "kept": answer.speed / own.speed[0],
            "prefill": 1000 * own.first_s[0],
            "wait": 1000 * (answer.first_s - own.first_s[0]),
        }

    with bench.serving() as port:
        measure()
        found = over_rounds(2 * args.rounds + 1, measure)
    return [
        Row("decode of the engine alone, tokens/s", found["engine"]),
        Row("decode over HTTP, tokens/s", found["http"]),
        Row("share of the engine's decode speed", found["kept"], ">= 0.95"),
        Row("prefill of the engine alone, ms", found["prefill"]),
        Row("TTFT less prefill, ms", found["wait"], "<= 20"),
    ]


def eight_users(bench: Bench) -> list[Row]:
    """Eight users who come at once, beside one."""
    args = bench.args

    def measure() -> dict[str, float]:
        prompts = bench.prompts(9, args.prompt)
        bodies = [
            {"prompt": prompt, "max_tokens": args.tokens, "ignore_eos": True, "seed": i, **DRAWN}
            for i, prompt in enumerate(prompts)
        ]
        (one,), one_s = bench.ask(port, bodies[8:])
        answers, seconds = bench.ask(port, bodies[:8])
        prefill = bench.compute([body | {"max_tokens": 1} for body in bodies[:8]], 8)
        gaps = np.concatenate([np.diff(answer.times) for answer in answers])
        total = sum(answer.tokens for answer in answers) / seconds
        return {
            "one": one.tokens / one_s,
            "total": total,
            "times": total / (one.tokens / one_s),
            "first": float(np.quantile([answer.first_s for answer in answers], 0.95)) / prefill.seconds,
            "median_ms": 1000 * float(np.median(gaps)),
            "tail": float(np.quantile(gaps, 0.99) / np.median(gaps)),
        }

    with bench.serving() as port:
        measure()
        found = over_rounds(args.rounds, measure)
    return [
        Row("1 user, tokens/s with its prompt", found["one"]),
        Row("8 users, tokens/s in all", found["total"]),
        Row("8 users / 1 user", found["times"], ">= 3"),
        Row("p95 TTFT / prefill of all eight", found["first"], "<= 2"),
        Row("between two tokens, median, ms", found["median_ms"]),
        Row("between two tokens, p99 / median", found["tail"], "<= 3"),
    ]


def stories(n: int, seed: int) -> list[Body]:
    """Requests for texts of 16 to 160 tokens, half of them greedy."""
    rng = random.Random(seed)
    names = ["Tim", "Lily", "Sue", "Tom", "Anna", "Max", "Mia", "Ben"]
    things = ["dog", "ball", "tree", "boat", "bird", "cake", "star", "shoe"]
    bodies = []
    for i in range(n):
        prompt = f"Once upon a time {rng.choice(names)} and {rng.choice(names)} found a {rng.choice(things)}"
        drawn = DRAWN if i % 2 else GREEDY
        bodies.append({"prompt": prompt, "max_tokens": rng.randint(16, 160), "seed": i, **drawn})
    return bodies


def many_users(bench: Bench) -> list[Row]:
    """128 users at once, beside static batches; and more than there is room for."""
    bodies = stories(128, seed=0)
    alone = bench.compute(bodies, 1)

    def measure() -> dict[str, float]:
        answers, seconds = bench.ask(port, bodies)
        own, full = bench.compute(bodies, 16), bench.compute(bodies, 128)
        speed = sum(answer.tokens for answer in answers) / seconds
        return {
            "answered": sum(answer.outcome == "ok" for answer in answers),
            "wrong": sum(a.text != text for a, text in zip(answers, alone.texts, strict=True)),
            "speed": speed,
            "static": own.tokens / own.seconds,
            "engine": full.tokens / full.seconds,
            "times": speed / (own.tokens / own.seconds),
            "kept": speed / (full.tokens / full.seconds),
        }

    with bench.serving("--max-num-seqs", "128", "--max-queue", "0") as port:
        found = over_rounds(bench.args.rounds, measure)
        crowd, _ = bench.ask(port, stories(160, seed=1))
    refused = [answer for answer in crowd if answer.status == 429]
    polite = sum(answer.retry_after.isdecimal() for answer in refused)
    return [
        Row("128 users: answered", found["answered"], ">= 128"),
        Row("128 users: other text than alone", found["wrong"], "<= 0"),
        Row("static batches of 16, engine, tokens/s", found["static"]),
        Row("all 128 at once, engine, tokens/s", found["engine"]),
        Row("128 users, tokens/s", found["speed"]),
        Row("128 users / static batches of 16", found["times"], ">= 2.4"),
        Row("128 users / engine with all at once", found["kept"]),
        Row("of 160 where 128 fit: 429 with Retry-After", polite, ">= 32"),
    ]


def crowd(bench: Bench) -> list[Row]:
    """200 clients at once, with the limits that a server has by itself."""
    with bench.serving() as port:
        answers, seconds = bench.ask(port, stories(200, seed=2))
    done = [answer for answer in answers if answer.outcome == "ok"]
    return [
        Row("200 clients: answered", len(done), ">= 200"),
        Row("200 clients, tokens/s", sum(answer.tokens for answer in done) / seconds),
        Row("200 clients, slowest answer, s", max(answer.times[-1] for answer in done)),
    ]


def shared_prompt(bench: Bench) -> list[Row]:
    """Two users, one after the other, with a system prompt in common."""

    def measure() -> dict[str, float]:
        (shared,) = bench.prompts(1, 1000)
        bodies = [{"prompt": shared + own, "max_tokens": 4, **GREEDY} for own in bench.prompts(2, 8)]
        first, second = (bench.ask(port, [body])[0][0].first_s for body in bodies)
        return {"first": 1000 * first, "second": 1000 * second, "ratio": second / first}

    with bench.serving() as port:
        found = over_rounds(bench.args.rounds, measure)
    return [
        Row("1,000 tokens that nobody had, TTFT, ms", found["first"]),
        Row("the same with another end, TTFT, ms", found["second"]),
        Row("second / first", found["ratio"], "<= 0.1"),
    ]


def peer(bench: Bench) -> list[Row]:
    """The same eight texts from llama-cpp-python's server, with the same codes in TQ2_0."""
    args = bench.args
    twin = bench.path.with_suffix(".tq2_0.gguf")
    if not twin.exists():
        formats.convert(bench.path, twin, "TQ2_0", allow_lossy=True)
    # Letters and blanks, which every tokenizer of this shape cuts alike.
    length = args.prompt // 2

    def measure() -> dict[str, float]:
        texts = [
            " ".join("".join(random.choices("abcdefghij", k=3)) for _ in range(length)) for _ in range(8)
        ]
        bodies = [{"prompt": t, "max_tokens": args.tokens, "seed": i, **DRAWN} for i, t in enumerate(texts)]
        ours, our_s = bench.ask(port, [body | {"ignore_eos": True} for body in bodies])
        # It knows no usage of streams.
        theirs, their_s = bench.client.submit(ask_all, other, bodies).result()
        result = {}
        for name, answers, seconds in (("ours", ours, our_s), ("theirs", theirs, their_s)):
            assert all(answer.outcome == "ok" for answer in answers), answers
            result[name] = sum(answer.tokens for answer in answers) / seconds
            result[f"{name}_first"] = float(np.quantile([answer.first_s for answer in answers], 0.95))
        return result | {"times": result["ours"] / result["theirs"]}

    command = ["-m", "llama_cpp.server", "--model", str(twin), "--interrupt_requests", "False"]
    command += ["--n_threads", str(args.threads), "--n_threads_batch", str(args.threads), "--n_ctx", "2048"]
    with bench.serving() as port, serving(command) as (other, _):
        found = over_rounds(args.rounds, measure)
    return [
        Row("8 users, onebit, tokens/s in all", found["ours"]),
        Row("8 users, llama-cpp-python, tokens/s in all", found["theirs"]),
        Row("onebit / llama-cpp-python", found["times"], ">= 3"),
        Row("p95 TTFT, onebit, s", found["ours_first"]),
        Row("p95 TTFT, llama-cpp-python, s", found["theirs_first"]),
    ]


N_USERS = 16


def use_for_minutes(port: int, pid: int, known: list[tuple[Body, str]], minutes: float) -> dict[str, Any]:
    """Users who ask without pause, and of whom every fifth goes away before the end."""
    rng = random.Random(3)
    counts = dict.fromkeys(("right", "wrong", "gone", "stuck", "failed"), 0)
    resident: list[float] = []

    async def user() -> None:
        while time.monotonic() < end_s:
            body, text = rng.choice(known)
            patience = rng.randint(0, 12) if rng.random() < 0.2 else None
            try:
                async with asyncio.timeout(60):
                    answer = await ask(port, body, patience)
            except TimeoutError:
                counts["stuck"] += 1
            else:
                is_right = answer.text == text
                kind = {"ok": "right" if is_right else "wrong", "gone": "gone"}.get(answer.outcome, "failed")
                counts[kind] += 1

    async def watch() -> None:
        while time.monotonic() < end_s:
            status = Path(f"/proc/{pid}/status").read_text()
            resident.append(int(status.split("VmRSS:")[1].split()[0]) / 1024)
            await asyncio.sleep(2)

    async def all_of_them() -> None:
        await asyncio.gather(watch(), *(user() for _ in range(N_USERS)))

    end_s = time.monotonic() + 60 * minutes
    asyncio.run(all_of_them())
    return counts | {"resident_mib": resident}


def soak(bench: Bench) -> list[Row]:
    """Mixed traffic for minutes, in a cache that is too small for it."""
    from adapters import random_adapter

    from onebit.formats import adapter as adapter_format

    shared = "Once upon a time there was a little girl named Lily. She loved to play in the park. " * 4
    bodies = stories(24, seed=4)
    bodies += [body | {"prompt": shared + body["prompt"]} for body in stories(8, seed=5)]
    bodies += [body | {"model": "red"} for body in stories(8, seed=6)]
    bodies += [body | {"stop": [".", "and"]} for body in stories(4, seed=7)]
    bodies += [body | {"repetition_penalty": 1.2, "frequency_penalty": 0.5} for body in stories(4, seed=8)]
    with tempfile.TemporaryDirectory() as folder:
        config = formats.read(bench.path).config
        adapter_format.write(random_adapter(config, rank=8, seed=0, short=True), folder)
        options = ["--adapter", f"red={folder}", "--memory", "6MiB", "--max-queue", "64"]
        command = [
            "-m",
            "onebit",
            "serve",
            "-m",
            str(bench.path),
            "--threads",
            str(bench.args.threads),
            *options,
        ]
        with worker(load_engine, str(bench.path), bench.args.threads, {"red": folder}) as engine:
            texts = engine.submit(compute, bodies, 1).result().texts
        with serving(command) as (port, pid):
            known = [(body | STREAMED, text) for body, text in zip(bodies, texts, strict=True)]
            found = bench.client.submit(use_for_minutes, port, pid, known, bench.args.soak).result()
            url = f"http://127.0.0.1:{port}/metrics"
            figures = urllib.request.urlopen(url, timeout=10).read().decode()
    resident = found["resident_mib"]
    third = len(resident) // 3
    growth = max(resident[-third:]) - max(resident[:third])
    figure = {
        line.split("{")[0]: float(line.split()[-1]) for line in figures.splitlines() if "model=" in line
    }
    return [
        Row("right answers", found["right"]),
        Row("clients that went away", found["gone"]),
        Row("texts that lost their blocks to others", figure["onebit_preemptions_total"]),
        Row("prompt tokens found in the prefix cache", figure["onebit_prefix_hit_tokens_total"]),
        Row("wrong answers", found["wrong"], "<= 0"),
        Row("stuck or failed requests", found["stuck"] + found["failed"], "<= 0"),
        Row("texts that run when all have ended", figure["onebit_texts_running"], "<= 0"),
        Row("resident set at the end, MiB", resident[-1]),
        Row("most of the last third less of the first, MiB", growth, "<= 32"),
    ]


# What each is measured with, unless --shape says otherwise.
SCENARIOS: dict[str, tuple[Callable[[Bench], list[Row]], str]] = {
    "one": (one_user, "125m"),
    "eight": (eight_users, "125m"),
    "shared": (shared_prompt, "125m"),
    "peer": (peer, "125m"),
    "many": (many_users, "shipped"),
    "crowd": (crowd, "shipped"),
    "soak": (soak, "shipped"),
}


@contextlib.contextmanager
def worker(initializer: Callable[..., object], *initargs: object) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer, initargs) as pool:
        yield pool


def main() -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", choices=["2b4t", "125m"], default="125m", help="of one, eight, shared, peer"
    )
    parser.add_argument(
        "--only", default="one,eight,shared,many,crowd", help=f"some of {','.join(SCENARIOS)}"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of a text")
    parser.add_argument("--soak", type=float, default=30, help="minutes")
    parser.add_argument("--out", type=Path, help="file for the JSON too")
    args = parser.parse_args()
    if unknown := set(args.only.split(",")) - set(SCENARIOS):
        parser.error(f"--only: unknown {', '.join(unknown)}; expected some of {', '.join(SCENARIOS)}")
    if "peer" in args.only.split(",") and args.shape == "2b4t":
        parser.error("--only peer: llama.cpp has no architecture with squared ReLU; expected --shape 125m")
    results: dict[str, Any] = {}
    with worker(os.nice, 5) as client:
        for name in args.only.split(","):
            scenario, kind = SCENARIOS[name]
            path = make_model("shipped" if kind == "shipped" else args.shape)
            vocab_size = formats.read(path).config.vocab_size
            with worker(load_engine, str(path), args.threads, {}) as engine:
                rows = scenario(Bench(args, path, vocab_size, engine, client))
            print(f"{name}: {(scenario.__doc__ or '').strip()} ({path.stem}; load {os.getloadavg()[0]:.1f})")
            for row in rows:
                print(f"  {row.what:52}{row.value:10,.2f}  {row.target:>9}  {row.verdict}", flush=True)
            results[name] = {"model": path.stem, "load": os.getloadavg()[0]}
            results[name] |= {row.what: [row.value, row.target, row.verdict] for row in rows}
    asked = {name: value for name, value in vars(args).items() if name != "out"}
    line = json.dumps({"date": time.strftime("%Y-%m-%d"), **asked, **results})
    if args.out:
        args.out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()

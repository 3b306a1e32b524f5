"""How often onebit and llama.cpp have the same likeliest token, on a real text and the same GGUF file, and how many
last words of LAMBADA each of them has right.

    python benchmarks/agreement.py --model SmolLM2-135M-Instruct.Q4_1.gguf --text wiki.txt --exact smollm2-f32.gguf
    python benchmarks/agreement.py --model SmolLM2-135M-Instruct.Q4_1.gguf --lambada lambada_test.jsonl.xz --items 2000

With --exact, a file of the same weights in F32 (onebit convert MODEL FILE --encoding F32), llama.cpp is also compared
with itself: what it loses by rounding activations for quantised weights.
"""

import argparse
import json
import lzma
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

import onebit
from onebit.engine.model import choose_threads

CONTEXT = 512


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


Logits = Callable[[list[int]], np.ndarray]


def llama(path: Path, threads: int) -> Logits:
    """The logits of all positions of a text, with a cache of bfloat16."""
    import llama_cpp

    bf16 = 30
    model = llama_cpp.Llama(
        str(path),
        n_threads=threads,
        n_threads_batch=threads,
        n_ctx=CONTEXT,
        n_batch=CONTEXT,
        logits_all=True,
        type_k=bf16,
        type_v=bf16,
        verbose=False,
    )

    def logits(tokens: list[int]) -> np.ndarray:
        model.reset()
        model.eval(tokens)
        return np.array(model.scores[: len(tokens)])

    return logits


def report(name: str, first: list[np.ndarray], second: list[np.ndarray], chunks: list[list[int]]) -> None:
    same = np.concatenate([a.argmax(-1) == b.argmax(-1) for a, b in zip(first, second, strict=True)])
    kl = np.concatenate([(np.exp(a) * (a - b)).sum(-1) for a, b in zip(first, second, strict=True)])
    losses = [
        -np.concatenate([p[np.arange(len(c) - 1), c[1:]] for p, c in zip(of, chunks, strict=True)]).mean()
        for of in (first, second)
    ]
    print(
        f"{name}: top token the same at {same.mean():.2%} of {len(same)} positions, KL {kl.mean():.2g} nats, "
        f"nats per token {losses[0]:.4f} and {losses[1]:.4f}"
    )


def compare_lambada(llm: onebit.LLM, theirs: Logits, path: Path, n_items: int) -> None:
    """Accuracy and perplexity of the last words of both, and how often only one of them is right.

    A word is right when each of its tokens is the likeliest one, as lm-evaluation-harness has it.
    """
    both: list[list[tuple[bool, float]]] = []
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in list(lines)[:n_items]:
            text = json.loads(line)["text"]
            tokens = llm.tokenizer.encode(text)
            begin = len(llm.tokenizer.encode(text.rsplit(" ", 1)[0]))
            word = tokens[begin:]
            answers = []
            for logits in (llm.logits, theirs):
                scores = log_probabilities(logits(tokens[:-1])[begin - 1 :])
                right = bool((scores.argmax(-1) == word).all())
                answers.append((right, float(scores[np.arange(len(word)), word].sum())))
            both.append(answers)
            if len(both) % 100 == 0:
                print(f"\r{len(both)} of {n_items} items", end="", flush=True)
    right = np.array([[answer[0] for answer in answers] for answers in both])
    nats = -np.array([[answer[1] for answer in answers] for answers in both])
    # Items are the same, so what differs are those that one alone has right.
    only = right[:, 0].astype(float) - right[:, 1]
    for name, i in (("onebit", 0), ("llama.cpp", 1)):
        print(
            f"\n{name}: {right[:, i].mean():.2%} right, perplexity {math.exp(nats[:, i].mean()):.3f}", end=""
        )
    half = 1.96 * only.std(ddof=1) / math.sqrt(len(only))
    print(
        f"\n{len(both)} items: onebit alone right {(only > 0).sum()}, llama.cpp alone {(only < 0).sum()}; "
        f"onebit ahead by {100 * only.mean():.2f} points, 95 % interval {100 * (only.mean() - half):.2f} to "
        f"{100 * (only.mean() + half):.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--lambada", type=Path, help="lambada_test.jsonl.xz")
    parser.add_argument("--items", type=int, default=1000, help="of LAMBADA, from the first on")
    parser.add_argument("--exact", type=Path)
    parser.add_argument("--threads", type=int, help="of both, all by default")
    parser.add_argument("--tokens", type=int, default=4096)
    asked = parser.parse_args()
    if not (asked.text or asked.lambada):
        parser.error("nothing to compare on; give --text or --lambada")
    threads = choose_threads(asked.threads)
    llm = onebit.load(asked.model, threads=threads)
    if asked.lambada:
        compare_lambada(llm, llama(asked.model, threads), asked.lambada, asked.items)
    if not asked.text:
        return
    tokens = llm.tokenizer.encode(asked.text.read_text("utf-8")[: 8 * asked.tokens])[: asked.tokens]
    chunks = [tokens[i : i + CONTEXT] for i in range(0, len(tokens), CONTEXT)]

    def of(logits: Logits) -> list[np.ndarray]:
        return [log_probabilities(logits(chunk)) for chunk in chunks]

    ours, theirs = of(llm.logits), of(llama(asked.model, threads))
    report(f"llama.cpp with {asked.model.name}, and onebit", theirs, ours, chunks)
    if asked.exact:
        exact = of(llama(asked.exact, threads))
        report(f"llama.cpp with {asked.exact.name}, and onebit", exact, ours, chunks)
        report(f"llama.cpp with {asked.exact.name}, and with {asked.model.name}", exact, theirs, chunks)


if __name__ == "__main__":
    main()

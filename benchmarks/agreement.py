"""How often onebit and llama.cpp have the same likeliest token, on a real text and the same GGUF file.

    python benchmarks/agreement.py --model SmolLM2-135M-Instruct.Q4_1.gguf --text wiki.txt --exact smollm2-f32.gguf

With --exact, a file of the same weights in F32 (onebit convert MODEL FILE --encoding F32), llama.cpp is also compared
with itself: what it loses by rounding activations for quantised weights.
"""

import argparse
from pathlib import Path

import numpy as np

import onebit

CONTEXT = 512


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def llama(path: Path, chunks: list[list[int]]) -> list[np.ndarray]:
    import llama_cpp

    bf16 = 30
    model = llama_cpp.Llama(
        str(path), n_ctx=CONTEXT, n_batch=CONTEXT, logits_all=True, type_k=bf16, type_v=bf16, verbose=False
    )
    found = []
    for chunk in chunks:
        model.reset()
        model.eval(chunk)
        found.append(log_probabilities(np.array(model.scores[: len(chunk)])))
    return found


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--exact", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    asked = parser.parse_args()
    llm = onebit.load(asked.model)
    tokens = llm.tokenizer.encode(asked.text.read_text("utf-8")[: 8 * asked.tokens])[: asked.tokens]
    chunks = [tokens[i : i + CONTEXT] for i in range(0, len(tokens), CONTEXT)]
    ours = [log_probabilities(llm.logits(chunk)) for chunk in chunks]
    theirs = llama(asked.model, chunks)
    report(f"llama.cpp with {asked.model.name}, and onebit", theirs, ours, chunks)
    if asked.exact:
        exact = llama(asked.exact, chunks)
        report(f"llama.cpp with {asked.exact.name}, and onebit", exact, ours, chunks)
        report(f"llama.cpp with {asked.exact.name}, and with {asked.model.name}", exact, theirs, chunks)


if __name__ == "__main__":
    main()

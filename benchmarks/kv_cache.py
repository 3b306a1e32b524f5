"""What the number formats of the key-value cache cost in quality: bits per byte, and distance from bfloat16.

    python benchmarks/kv_cache.py --text tinystories_val.txt.xz --tokens 16384

The text is read in windows as long as the context; each position predicts the next token. KL divergence is from the
reference, in nats per token.
"""

import argparse
import json
import lzma
from pathlib import Path

import numpy as np

import onebit
from onebit.engine.memory import KV_FORMATS, position_bytes
from onebit.llm import LLM


def log_probabilities(llm: LLM, tokens: list[int]) -> np.ndarray:
    """float64 [T, V]."""
    logits = llm.logits(tokens).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def main() -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16384)
    args = parser.parse_args()

    models = {kv: onebit.load(args.model, kv_cache=kv) for kv in KV_FORMATS}
    reference = models["bf16"]
    text = lzma.open(args.text, "rt").read() if args.text.suffix == ".xz" else args.text.read_text()
    # A token is at least one byte, so this is text enough.
    tokens = reference.tokenizer.encode(text[: 16 * args.tokens])[: args.tokens]
    window = reference.config.max_seq_len
    sums = {kv: np.zeros(3) for kv in KV_FORMATS}
    n_bytes = n_tokens = 0
    for start in range(0, len(tokens) - window + 1, window):
        ids = tokens[start : start + window]
        expected = log_probabilities(reference, ids)[:-1]
        for kv, llm in models.items():
            found = log_probabilities(llm, ids)[:-1]
            loss = -found[np.arange(window - 1), ids[1:]].sum() / np.log(2)
            distance = (np.exp(expected) * (expected - found)).sum()
            sums[kv] += loss, distance, (expected.argmax(1) == found.argmax(1)).sum()
        n_bytes += len(reference.tokenizer.decode(ids[1:]).encode())
        n_tokens += window - 1
    result = {}
    print(f"{n_tokens} tokens in windows of {window}")
    print(f"{'':10}{'bits per byte':>14}{'KL':>10}{'same best':>11}{'bytes a position':>18}")
    for kv, (loss, distance, same) in sums.items():
        size = position_bytes(reference.config, kv)
        result[kv] = {
            "bits_per_byte": loss / n_bytes,
            "kl": distance / n_tokens,
            "same_best": same / n_tokens,
        }
        print(f"{kv:10}{loss / n_bytes:14.5f}{distance / n_tokens:10.2e}{same / n_tokens:11.4f}{size:18}")
    print(json.dumps({"text": args.text.name, "tokens": n_tokens, **result}))


if __name__ == "__main__":
    main()

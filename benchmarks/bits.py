"""What fewer bits in the key-value cache and in the inputs of layers cost in quality, and gain in speed.

    python benchmarks/bits.py --text tinystories_val.txt.xz --tokens 16384 --out bits.json

Quality: the text is read in windows as long as the context; each position predicts the next token, and every format is
compared with the reference (a bf16 cache, inputs as the model was trained) on the same positions. KL divergence is from
the reference, in nats per token. Other inputs are set after training: nothing has adapted to them.

Speed: tokens per second of processor time, which other programs disturb less than a clock. Each round reads one prompt
and writes one text with every format, in turn, every second round backwards; a ratio is taken within the round, and the
median of the rounds is told with the least and the most.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

import onebit
from onebit.eval.figures import token_mean
from onebit.eval.texts import read_text
from onebit.llm import LLM, SHIPPED_MODEL
from onebit.results import machine_facts, model_facts, versions

CACHES = ("bf16", "int8", "fp8")
INPUTS = ("a15", "a8", "a4.8", "a4", "a1")
N_PROMPT, N_TEXT = 256, 192


def variants(path: Path, threads: int) -> dict[str, LLM]:
    """The model with every format; the first is the reference."""
    plain = onebit.load(path, threads, speculation=False)
    config = plain.config
    models = {f"cache {kv}": onebit.load(path, threads, kv, speculation=False) for kv in CACHES[1:]}
    for name in INPUTS:
        if name != config.activations:
            checkpoint = replace(plain.checkpoint, config=replace(config, activations=name))
            models[f"inputs {name}"] = LLM(checkpoint, threads, speculation=False)
    return {f"cache bf16, inputs {config.activations}": plain, **models}


def log_probabilities(llm: LLM, tokens: list[int]) -> np.ndarray:
    """float64 [T, V]."""
    logits = llm.logits(tokens).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def quality(models: dict[str, LLM], tokens: list[int]) -> dict[str, dict]:
    """Figures of every format on the same positions."""
    reference = next(iter(models.values()))
    window = reference.config.max_seq_len
    found: dict[str, list[np.ndarray]] = {name: [] for name in models}
    n_bytes = 0
    for start in range(0, len(tokens) - window + 1, window):
        ids = tokens[start : start + window]
        expected = log_probabilities(reference, ids)[:-1]
        for name, llm in models.items():
            own = log_probabilities(llm, ids)[:-1]
            bits = -own[np.arange(window - 1), ids[1:]] / np.log(2)
            kl = (np.exp(expected) * (expected - own)).sum(axis=1)
            found[name].append(np.stack([bits, kl, expected.argmax(1) == own.argmax(1)]))
        n_bytes += len(reference.tokenizer.decode(ids[1:]).encode())
    rows = {name: np.concatenate(parts, axis=1) for name, parts in found.items()}
    plain = next(iter(rows.values()))[0]
    per_byte = len(plain) / n_bytes
    return {
        name: {
            "bits_per_byte": token_mean(bits).through(lambda x: x * per_byte)._asdict(),
            "more": token_mean(bits - plain).through(lambda x: x * per_byte)._asdict(),
            "kl": token_mean(kl)._asdict(),
            "same_best": float(same.mean()),
            "n_tokens": len(bits),
        }
        for name, (bits, kl, same) in rows.items()
    }


def speed(models: dict[str, LLM], tokens: list[int], rounds: int) -> dict[str, dict]:
    """Tokens per second of processor time, of prompt and text, as ratios to the reference within each round."""
    first = next(iter(models))
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for i in range(rounds + 1):
        for name in list(models)[:: 1 if i % 2 else -1]:
            prompt, seconds = tokens[i * N_PROMPT : (i + 1) * N_PROMPT], []
            for n in (1, 1 + N_TEXT):
                begun = time.process_time()
                models[name].generate(prompt, max_tokens=n, temperature=0, ignore_eos=True)
                seconds.append(time.process_time() - begun)
            # The first round warms up.
            if i:
                taken[name].append((N_PROMPT / seconds[0], N_TEXT / (seconds[1] - seconds[0])))

    def spread(values: list[float]) -> dict[str, float]:
        return {"median": statistics.median(values), "least": min(values), "most": max(values)}

    return {
        name: {
            f"{what}_ratio": spread([own[j] / ref[j] for own, ref in zip(rates, taken[first], strict=True)])
            for j, what in enumerate(("prompt", "text"))
        }
        | {"text_tokens_per_s": spread([rate for _, rate in rates])}
        for name, rates in taken.items()
    }


def main() -> None:
    """Measure, print a table and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=SHIPPED_MODEL)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()

    models = variants(args.model, args.threads)
    reference = next(iter(models.values()))
    # A token is at least one byte, so this is text enough.
    text = read_text(args.text)[: 16 * args.tokens]
    tokens = reference.tokenizer.encode(text)[: max(args.tokens, (args.rounds + 1) * N_PROMPT)]
    rates = speed(models, tokens, args.rounds)
    found = quality(models, tokens[: args.tokens])
    rows = {name: {"label": llm.label, **found[name], **rates[name]} for name, llm in models.items()}
    print(f"{found[next(iter(found))]['n_tokens']} tokens; speed in {args.rounds} rounds\n")
    print("| | label | bits per byte | more, 95 % | KL | same best | prompt, tokens/s | text, tokens/s |")
    print("|---|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        more, ratios = row["more"], (row["prompt_ratio"], row["text_ratio"])
        shown = [f"{r['median']:.2f} ({r['least']:.2f} to {r['most']:.2f})" for r in ratios]
        print(
            f"| {name} | {row['label']} | {row['bits_per_byte']['value']:.4f} | {more['value']:+.4f} "
            f"({more['low']:+.4f} to {more['high']:+.4f}) | {row['kl']['value']:.2g} | {row['same_best']:.1%} | "
            f"{' | '.join(shown)} |"
        )
    result = {
        "model": model_facts(reference, args.model.name, args.model),
        "machine": machine_facts(),
        "versions": versions(),
        "settings": {
            "text": args.text.name,
            "tokens": args.tokens,
            "rounds": args.rounds,
            "threads": args.threads,
        },
        "formats": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

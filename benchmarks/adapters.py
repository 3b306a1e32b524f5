"""What adapters cost while decoding: one text without and with one, and eight texts that have one each.

    python benchmarks/adapters.py --rank 16

Greedy, one thread, without speculation, random weights on all linear layers. Variants take turns in one process. A
figure is tokens per second of CPU time, which other programs disturb less: the median with the least and the most; a
ratio is made within each round.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

from onebit import formats
from onebit.config import ModelConfig
from onebit.formats.adapter import TARGETS, Adapter, LowRank
from onebit.llm import LLM, SHIPPED_MODEL
from onebit.packing import from_bf16, to_bf16

N_TEXTS = 8
PROMPT = "Once upon a time"


def random_adapter(config: ModelConfig, rank: int, seed: int, short: bool) -> Adapter:
    """An adapter on all linear layers; with `short`, of numbers that bfloat16 holds, as PEFT may save them."""
    rng, pairs = np.random.default_rng(seed), {}
    for i in range(config.n_layers):
        for target in TARGETS:
            n, k = config.linear_shapes()[target]
            drawn = (
                rng.standard_normal(shape, np.float32) * np.float32(0.01) for shape in ((rank, k), (n, rank))
            )
            pairs[f"layers.{i}.{target}.weight"] = LowRank(
                *(from_bf16(to_bf16(w)) if short else w for w in drawn)
            )
    return Adapter(rank, 2.0 * rank, pairs)


def main() -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=SHIPPED_MODEL)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()

    checkpoint = formats.read(args.model)
    models = {}
    for width, short in (("float32", False), ("bfloat16", True)):
        drawn = {str(i): random_adapter(checkpoint.config, args.rank, i, short) for i in range(N_TEXTS)}
        models[width] = LLM(checkpoint, 1, speculation=False, adapters=drawn)
    each = [str(i) for i in range(N_TEXTS)]
    variants: dict[str, tuple[str, list[str | None]]] = {"1 text": ("float32", [None])}
    variants |= {f"1 text, {width} adapter": (width, ["0"]) for width in models}
    variants[f"{N_TEXTS} texts"] = "float32", [None] * N_TEXTS
    variants |= {f"{N_TEXTS} texts, {N_TEXTS} {width} adapters": (width, [*each]) for width in models}

    speeds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(-1, args.rounds):
        for name in variants if turn % 2 else reversed(variants):
            width, adapters = variants[name]
            started = time.process_time()
            outputs = models[width].generate(
                [PROMPT] * len(adapters),
                adapter=adapters,
                temperature=0,
                max_tokens=args.tokens,
                ignore_eos=True,
            )
            # The first round warms up.
            if turn >= 0:
                n_tokens = sum(len(output.tokens) for output in outputs)
                speeds[name].append(n_tokens / (time.process_time() - started))
    result = {}
    print(f"{models['float32'].label}, {models['float32'].model.isa}, rank {args.rank}")
    for name, found in speeds.items():
        base = speeds[name.partition(",")[0]]
        ratios = [a / b for a, b in zip(found, base, strict=True)]
        result[name] = [statistics.median(found), min(found), max(found), statistics.median(ratios)]
        speed, low, high, ratio = result[name]
        spread = f"[{low:.1f} .. {high:.1f}]  x {ratio:.3f} [{min(ratios):.3f} .. {max(ratios):.3f}]"
        print(f"{name:34}{speed:8.1f} tok/s {spread}")
    print(json.dumps({"rank": args.rank, "rounds": args.rounds, **result}))


if __name__ == "__main__":
    main()

"""What the head of a large vocabulary costs per token: int8, bfloat16, and through shortlists.

    python benchmarks/heads.py --vocab 128256 --width 2560 --threads 2

Rows are Gaussian; an input has its best token Z standard deviations above the mean of all logits. Variants take
turns in one process, beside a plain read of as many bytes; a time is the median.
"""

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
from limits import reader

from onebit.checkpoint import Checkpoint, quantize
from onebit.config import ModelConfig
from onebit.engine.model import Float32, Model, sample

# Standard deviations of the best logit above the mean: a doubtful token, a usual one, a certain one.
DEVIATIONS = (4.8, 6.4, 11.0)
INPUTS = 4


def master(vocab: int, width: int, seed: int) -> Checkpoint:
    """Gaussian head; the first rows of the embedding are inputs for it, all else is next to nothing."""
    config = ModelConfig(
        vocab, width, 1, 1, 1, 2, 16, max_seq_len=64, tied_head=False, activation="relu2", sub_norm=True
    )
    rng = np.random.default_rng(seed)
    tensors = {name: np.zeros(shape, np.float32) for name, shape in config.tensor_shapes().items()}
    head = tensors["head.weight"]
    rng.standard_normal(dtype=np.float32, out=head)
    tensors["norm.weight"] += 1
    inputs = tensors["embed.weight"]
    for i, deviations in enumerate(np.repeat(DEVIATIONS, INPUTS)):
        w = head[100 + i].astype(np.float64)
        noise = rng.standard_normal(width)
        noise -= noise @ w / (w @ w) * w
        # Logits have the deviation |x|; that of w is |w| |x| cos.
        cosine = deviations / np.linalg.norm(w)
        x = cosine * w / np.linalg.norm(w) + np.sqrt(1 - cosine**2) * noise / np.linalg.norm(noise)
        inputs[i] = np.sqrt(width) * x
    return Checkpoint(config, tensors)


def forward(model: Model, token: int, top_k: int, rows: int = 1) -> Float32:
    """Logits [rows, V] of one token."""
    zero = np.zeros(1, np.int32)
    starts, table = np.array([0, 1], np.int32), np.zeros((1, 1), np.int32)
    wanted = np.full(rows, top_k, np.int32)
    return model.forward(
        np.array([token], np.int32), zero, starts, table, np.zeros(rows, np.int32), model.cache, wanted
    )


def main() -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--width", type=int, default=2560)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()

    float_head = master(args.vocab, args.width, seed=1)
    q8, bf16 = quantize(float_head), quantize(float_head, head="bf16")
    del float_head
    started = time.perf_counter()
    int4 = Model(q8, args.threads, int4_shortlist=True)
    halving_s = time.perf_counter() - started
    models = {"q8": Model(q8, args.threads), "bf16": Model(bf16, args.threads), "q8, int4 shortlist": int4}
    models["bf16, int4 shortlist"] = Model(bf16, args.threads, int4_shortlist=True)
    for model in models.values():
        model.cache = model.new_cache(1)
    n_tokens = len(DEVIATIONS) * INPUTS

    candidates = {}
    for name, reference in (("bf16", "bf16"), ("q8, int4 shortlist", "q8"), ("bf16, int4 shortlist", "bf16")):
        for k in (1, 40):
            counts = []
            for token in range(n_tokens):
                short, full = forward(models[name], token, k)[0], forward(models[reference], token, 0)[0]
                kept = short > -np.inf
                best = np.argsort(-full, kind="stable")[:k]
                assert kept[best].all() and np.array_equal(short[kept], full[kept])
                counts.append(int(kept.sum()))
            means = np.reshape(counts, (len(DEVIATIONS), INPUTS)).mean(axis=1)
            candidates[f"{name}, top {k}"] = means.round(1).tolist()

    read, data = reader(models["q8"].threads), q8.tensors["head.weight"].data
    variants: dict[str, Callable[[int], object]] = {"raw read of the int8 bytes": lambda _: read(data)}
    for name, model in models.items():
        if "int4" not in name:
            variants[f"{name}, all logits"] = lambda token, model=model: forward(model, token, 0)
        if name != "q8":
            variants[f"{name}, greedy"] = lambda token, model=model: forward(model, token, 1)
            variants[f"{name}, top 40"] = lambda token, model=model: forward(model, token, 40)
    variants["all but the head"] = lambda token: forward(models["q8"], token, 0, rows=0)
    greedy, ids = forward(models["bf16"], 0, 1), np.zeros(1, np.int32)
    variants["draw, greedy"] = lambda _: sample(greedy, ids, 0.0, 0, 1.0, 0.0, 1.0, 1, 1)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(args.rounds + 2):
        for name, run in variants.items():
            started = time.perf_counter()
            run(i % n_tokens)
            times[name].append(1e3 * (time.perf_counter() - started))
    median = {name: float(np.median(values[2:])) for name, values in times.items()}
    raw = median["raw read of the int8 bytes"]
    model = models["q8"]
    print(f"{args.vocab} x {args.width}, {model.isa}, {model.threads} threads, median of {args.rounds}")
    for name, ms in median.items():
        print(f"  {name:32} {ms:8.3f} ms   {ms / raw:6.2f} x raw   least {min(times[name]):.3f}")
    print(f"  raw read: {data.nbytes / raw / 1e6:.1f} GB/s; int4 plane made in {halving_s:.3f} s")
    print(f"  candidates at {', '.join(map(str, DEVIATIONS))} deviations:")
    for name, counts in candidates.items():
        print(f"    {name:32} {counts}")
    print(json.dumps({"isa": model.isa, "threads": model.threads, "ms": median, "candidates": candidates}))


if __name__ == "__main__":
    main()

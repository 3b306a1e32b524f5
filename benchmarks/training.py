"""What rounding costs in training, as a function of size, and what each option of a recipe is worth.

    python benchmarks/training.py rates --data texts --runs runs/law --sizes 276K    # tries learning rates
    python benchmarks/training.py law --data texts --runs runs/law --out law.json
    python benchmarks/training.py options --data texts --runs runs/law --out options.json
    python benchmarks/training.py options --sizes 8.1M --known law.json --only SwiGLU,EMA --data texts --runs runs/law

Every run is a run folder of its own with a recipe.json; what is finished is not done again, and what was stopped goes
on; nor is what --known, a result of this script, holds. All runs see the same tokens in the same order for a seed.
Prints a table, and last a JSON line, which --out keeps; the picture goes to a PNG beside it.
"""

import argparse
import itertools
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from onebit.train import recipes
from onebit.train.recipe import Recipe

# Every kind has the schedule of the shipped model, at a rate of its own. SwiGLU, which that has, is an option here.
PLAIN = "model.activation=relu2"
KINDS = {
    "ternary": ("stories", ["model.weights=b1.58", PLAIN]),
    "binary": ("stories", ["model.weights=b1", PLAIN]),
    "full precision": ("stories-dense", [PLAIN]),
}
SHIPPED = recipes.build("stories")
# Width, layers, heads of queries and of keys, width of a head and of the feed-forward layer, by the weights in linear
# layers. The last is the shipped model.
SHAPES = {
    "82K": (64, 2, 2, 2, 32, 128),
    "276K": (96, 3, 3, 3, 32, 192),
    "655K": (128, 4, 4, 4, 32, 256),
    "1.8M": (192, 5, 6, 6, 32, 384),
    "8.1M": (384, 5, 4, 2, 96, 1024),
}
# Where options are tried, unless --sizes says another one.
ABLATED = "655K"
# Sequences in a step: half of the shipped model's, for runs that are short.
BATCH = 4
# The rate of the second stage, as a share of the first.
SECOND = 2 / 3
# The largest size is dear, and one binary model of it tells enough: they are far behind at every size.
N_SEEDS = 3
FEWER_SEEDS = {("binary", "8.1M"): 1}
RATES = (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 0.128)
# Of each kind, in the order of KINDS: the best that was tried (docs/log.md), or that of the nearest size.
PEAKS = {
    "82K": (3.2e-2, 3.2e-2, 3.2e-2),
    "276K": (3.2e-2, 3.2e-2, 3.2e-2),
    "655K": (3.2e-2, 3.2e-2, 3.2e-2),
    "1.8M": (3.2e-2, 3.2e-2, 1.6e-2),
    "8.1M": (1.6e-2, 1.6e-2, 8e-3),
}
# Other optimisers take steps of another size.
RATE_SHARES = {"options.optimizer=adamw": 1 / 5, "options.optimizer=signum": 1 / 10}
# Each alone against the default, at one size.
OPTIONS = {
    "stochastic rounding, temperature 0.1": ["options.noise=0.1"],
    "stochastic rounding, temperature 0.5": ["options.noise=0.5"],
    "AdamW, rate / 5": ["options.optimizer=adamw"],
    "sign-SGD (signum), rate / 10": ["options.optimizer=signum"],
    "L1 1e-6": ["options.l1=1e-6"],
    "L1 1e-6 + L2 1e-5": ["options.l1=1e-6", "options.l2=1e-5"],
    "stabilised, mean 0.02": ["options.stabilise=0.02"],
    "scale per row": ["model.scale=row"],
    "scale per row, learned": ["model.scale=row", "options.learned_scale=true"],
    "scale per group of 64": ["model.scale=64"],
    "latent clipping at 3 means": ["options.latent_clip=3"],
    "lambda warm-up, 20 % of the steps": ["options.lambda_steps={steps//5}"],
    "gradient limit 2": ["options.gradient_limit=2"],
    "EMA 0.99": ["options.ema=0.99"],
    "no warm-up": ["optim.warmup_steps=0"],
    "no decay": ["optim.weight_decay=0"],
    "decay to the end": ["optim.weight_decay_second=0.1"],
    "one stage": ["optim.switch=1"],
    "no clipping of gradients": ["optim.grad_clip=0"],
    "no sub-norms": ["model.sub_norm=false"],
    "SwiGLU": ["model.activation=silu"],
    "binary but for the first and last layer": ["model.layer_weights={middle}"],
    "a4.8, 8 bits first": ["model.activations=a4.8", "options.first_activations=a8"],
    "4-bit inputs, 8 bits first": ["model.activations=a4", "options.first_activations=a8"],
    "4-bit inputs, rotated, 8 bits first": [
        "model.activations=a4", "model.hadamard=true", "options.first_activations=a8"
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A run: where it belongs in the result, and its recipe."""

    kind: str
    size: str
    label: str
    recipe: Recipe


def make(kind: str, size: str, rate: float, seed: int, steps: int, sets: Iterable[str] = ()) -> Recipe:
    """The recipe of a kind at one of the shapes."""
    name, overrides = KINDS[kind]
    recipe = recipes.build(name, overrides)
    names = ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_head", "d_ff")
    overrides = [f"model.{name}={value}" for name, value in zip(names, SHAPES[size], strict=True)]
    middle = ",".join(["b1.58", *["b1"] * (SHAPES[size][1] - 2), "b1.58"])
    sets = [text.replace("{steps//5}", str(steps // 5)).replace("{middle}", middle) for text in sets]
    rate *= math.prod(RATE_SHARES.get(text, 1) for text in sets)
    overrides += [
        f"steps={steps}", f"batch_size={BATCH}", f"optim.lr={rate}", f"optim.lr_second={rate * SECOND}",
        f"optim.warmup_steps={steps // 10}", "options.optimizer=muon", "compile=true",
        f"seed={seed}", f"evaluate_every={steps // 4}", "evaluate_sequences=128", "save_every=100",
        "health_every=0", *sets,
    ]  # fmt: skip
    return recipes.override(recipe, overrides)


def n_weights(recipe: Recipe) -> int:
    """Weights of the linear layers: what is rounded, and what grows with the size."""
    shapes = recipe.model.linear_shapes().values()
    return recipe.model.n_layers * sum(n * k for n, k in shapes)


def n_tokens(recipe: Recipe) -> int:
    """Tokens that a run reads."""
    return recipe.steps * recipe.batch_size * recipe.data.seq_len


def run(job: Job, corpus: Path, out: Path) -> dict[str, Any]:
    """Train, or go on, or read what is finished; returns held-out bits per byte, None where it diverged."""
    from onebit.nn.transformer import Transformer
    from onebit.train import data, loop, state
    from onebit.train.task import next_token

    recipe, diverged = job.recipe, out / "diverged.txt"
    done = last_record(out)
    if not diverged.exists() and done.get("step") != recipe.steps - 1:
        resumed = (out / state.STATE).exists()
        if not resumed:
            shutil.rmtree(out, ignore_errors=True)
            state.start(recipe, out)
        text = data.prepare(
            None, corpus, (), recipe.data.vocab_size, recipe.data.held_out, recipe.data.seq_len
        )
        end = text.end_token
        config = replace(recipe.model, bos_token=end, eos_tokens=(end,))
        model = Transformer(config, recipe.seed, learned_scale=recipe.options.learned_scale)
        try:
            loop.fit(recipe, next_token(recipe, text), model, out, resumed)
        except ValueError as error:
            diverged.write_text(str(error))
        done = last_record(out)
    return {
        "kind": job.kind, "size": job.size, "label": job.label, "seed": recipe.seed, "rate": recipe.optim.lr,
        "weights": n_weights(recipe), "tokens": n_tokens(recipe),
        "bits_per_byte": None if diverged.exists() else done["held_out_bits_per_byte"],
        "tok_per_s": done.get("tok_per_s"),
    }  # fmt: skip


def last_record(out: Path) -> dict[str, Any]:
    """The last line of a run's metrics."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1]) if lines else {}


def run_all(
    jobs: list[Job], data_folder: Path, include: str, runs: Path, processes: int, known: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """All jobs but those that are known, some at a time; the corpus is made once for all."""
    from onebit.train import data

    corpus = runs / "corpus"
    cut = SHIPPED.data
    data.prepare(data_folder, corpus, (include,), cut.vocab_size, cut.held_out, cut.seq_len)
    results = []
    with ProcessPoolExecutor(processes) as pool:
        waiting = {}
        for job in jobs:
            same = (job.kind, job.size, job.label, job.recipe.seed, job.recipe.optim.lr, n_tokens(job.recipe))
            fields = ("kind", "size", "label", "seed", "rate", "tokens")
            found = [r for r in known if tuple(r[field] for field in fields) == same]
            if found:
                results += found[:1]
                continue
            name = "-".join([job.kind, job.size, job.label, str(job.recipe.seed), f"{job.recipe.optim.lr:g}"])
            folder = runs / "".join(
                c if c.isalnum() or c in ".-" else "_" for c in f"{name}-{job.recipe.steps}"
            )
            waiting[pool.submit(run, job, corpus, folder)] = name
        for i, (future, name) in enumerate(waiting.items(), 1):
            result = future.result()
            results.append(result)
            print(
                f"{time.strftime('%H:%M')} {i}/{len(waiting)} {name}: {result['bits_per_byte']}", flush=True
            )
    return results


def fit_law(points: list[tuple[float, float]]) -> dict[str, float] | None:
    """L(N) = a (N / 1M)^-b + c by least squares, a and c at least 0: for each b of a grid they are linear.

    None where sizes are few, or where the seeds of a size differ by more than half of what the law explains. Besides
    the best b the largest of its 95 % (a sum of squares up to 1 + 4 / (runs - 3) of the least, as if all were one law
    with noise); the smallest is seldom bounded by the data, but by c, which gets to 0.
    """
    n, loss = (np.array(values, float) for values in zip(*points, strict=True))
    if len(set(n)) < 4:
        return None
    fits = []
    for b in np.arange(0.005, 1.5, 0.005):
        columns = np.stack([(n / 1e6) ** -b, np.ones_like(n)], axis=1)
        (a, c), *_ = np.linalg.lstsq(columns, loss, rcond=None)
        rms = float(np.sqrt(np.mean((columns @ (a, c) - loss) ** 2)))
        if a >= 0 and c >= 0:
            fits.append((rms, float(a), float(b), float(c)))
    if not fits or min(fits)[0] > 0.5 * loss.std():
        return None
    rms, a, b, c = min(fits)
    as_good = [fit[2] for fit in fits if fit[0] ** 2 <= rms**2 * (1 + 4 / (len(loss) - 3))]
    return {"a_at_1M": a, "b": b, "b_most": max(as_good), "c": c, "rms": rms}


def mean_and_spread(values: list[float]) -> str:
    """A mean, and the standard deviation over seeds where there are several."""
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def law(results: list[dict[str, Any]], path: Path | None) -> dict[str, Any]:
    """Table, fits and picture of losses over sizes."""
    sizes = sorted({r["weights"] for r in results})
    by_seed = {
        (k, n): {r["seed"]: r["bits_per_byte"] for r in results if r["kind"] == k and r["weights"] == n}
        for k in KINDS
        for n in sizes
    }
    by = {at: list(runs.values()) for at, runs in by_seed.items()}
    fits = {
        k: fit_law([(r["weights"], r["bits_per_byte"]) for r in results if r["kind"] == k]) for k in KINDS
    }
    print("| weights in linear layers | " + " | ".join(KINDS) + " | ternary behind by | binary behind by |")
    print("|---" * (3 + len(KINDS)) + "|")
    gaps: dict[str, dict[int, list[float]]] = {"ternary": {}, "binary": {}}
    for n in sizes:
        twin = by_seed["full precision", n]
        for kind in gaps:
            # Seeds in pairs: the same data order on both sides.
            gaps[kind][n] = [100 * (loss / twin[seed] - 1) for seed, loss in by_seed[kind, n].items()]
        cells = [mean_and_spread(by[k, n]) for k in KINDS] + [
            f"{statistics.mean(gaps[k][n]):.1f} %" for k in gaps
        ]
        print(f"| {n:,} | " + " | ".join(cells) + " |")
    for kind, found in fits.items():
        if not found:
            print(f"{kind}: no law fits; seeds differ as much as sizes")
        else:
            formula = f"{found['a_at_1M']:.3f} (N / 1M)^-{found['b']:.3f} + {found['c']:.3f}"
            print(f"{kind}: L = {formula}, rms {found['rms']:.4f}; b at most {found['b_most']:.3f} (95 %)")
    if path:
        draw_law(by, fits, gaps, sizes, path)
    return {"fits": fits, "gap_percent": {k: {str(n): v for n, v in g.items()} for k, g in gaps.items()}}


def draw_law(by: Any, fits: Any, gaps: Any, sizes: list[int], path: Path) -> None:
    """Losses and gaps over sizes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    smooth = np.geomspace(sizes[0], sizes[-1], 50)
    for i, kind in enumerate(KINDS):
        means = [statistics.mean(by[kind, n]) for n in sizes]
        for n in sizes:
            left.plot([n] * len(by[kind, n]), by[kind, n], ".", color=f"C{i}", alpha=0.5)
        if found := fits[kind]:
            label = f"{kind}: {found['a_at_1M']:.2f} (N/1M)^-{found['b']:.2f} + {found['c']:.2f}"
            left.plot(
                smooth,
                found["a_at_1M"] * (smooth / 1e6) ** -found["b"] + found["c"],
                color=f"C{i}",
                label=label,
            )
        else:
            left.plot(sizes, means, color=f"C{i}", label=kind)
        if kind in gaps:
            right.errorbar(
                sizes, [statistics.mean(gaps[kind][n]) for n in sizes],
                [statistics.stdev(gaps[kind][n]) if len(gaps[kind][n]) > 1 else 0 for n in sizes],
                color=f"C{i}", marker="o", capsize=3, label=kind,
            )  # fmt: skip
    left.set(xscale="log", xlabel="weights in linear layers", ylabel="held-out bits per byte")
    right.set(xscale="log", xlabel="weights in linear layers", ylabel="behind full precision, %")
    right.axhline(0, color="black", linewidth=0.8)
    for axis in (left, right):
        axis.set_xticks(sizes, [f"{n:,}" for n in sizes], fontsize=8)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)


def options(results: list[dict[str, Any]], path: Path | None) -> dict[str, Any]:
    """Table and picture of options against the default, seed by seed."""
    default = {r["seed"]: r["bits_per_byte"] for r in results if r["label"] == "default"}
    noise = statistics.stdev(default.values()) if len(default) > 1 else math.nan
    rows = []
    for label in dict.fromkeys(r["label"] for r in results if r["label"] != "default"):
        some = [r for r in results if r["label"] == label]
        changes = [100 * (r["bits_per_byte"] / default[r["seed"]] - 1) for r in some if r["bits_per_byte"]]
        rows.append((label, changes, len(some) - len(changes)))
    rows.sort(key=lambda row: statistics.mean(row[1]) if row[1] else math.inf)
    percent = 100 * noise / statistics.mean(default.values())
    print(
        f"default: {mean_and_spread(list(default.values()))} bits per byte; noise of a seed {percent:.2f} %"
    )
    print("| option | change of bits per byte | seeds |\n|---|---|---|")
    for label, changes, n_diverged in rows:
        text = f"{statistics.mean(changes):+.2f} %" if changes else "diverged"
        if len(changes) > 1:
            text += f" ({min(changes):+.2f} to {max(changes):+.2f})"
        print(f"| {label} | {text} | {len(changes)}{f', {n_diverged} diverged' if n_diverged else ''} |")
    if path:
        draw_options([row for row in rows if row[1]], percent, path)
    return {"default": default, "noise_percent": percent, "change_percent": {r[0]: r[1] for r in rows}}


def draw_options(rows: list[tuple[str, list[float], int]], noise: float, path: Path) -> None:
    """A dot for each seed of each option, and twice the noise of seeds as a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 0.32 * len(rows) + 1.2), layout="constrained")
    axis.axvspan(-2 * noise, 2 * noise, alpha=0.15, label="two deviations of a seed")
    for y, (_, changes, _) in enumerate(reversed(rows)):
        axis.plot(changes, [y] * len(changes), "o", color="C0", markersize=5)
    axis.axvline(0, color="black", linewidth=0.8)
    # Most are within the noise; some are far off.
    axis.set_xscale("symlog", linthresh=5, linscale=2)
    low, *_, high = sorted((-5, 5, *(1.2 * change for row in rows for change in row[1])))
    ticks = [t for t in (-20, -10, -5, -2, 0, 2, 5, 10, 20, 50) if low <= t <= high]
    axis.set_xticks(ticks, [f"{t:+d}" if t else "0" for t in ticks])
    axis.set_yticks(range(len(rows)), [row[0] for row in reversed(rows)])
    axis.set(xlabel="change of held-out bits per byte against the default, % (less is better)")
    axis.grid(alpha=0.3)
    axis.legend(loc="upper right")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train what is missing, then print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["rates", "law", "options"])
    parser.add_argument("--data", type=Path, required=True, help="folder of text")
    parser.add_argument("--include", default="*", help="glob pattern of the files in it")
    parser.add_argument("--runs", type=Path, required=True, help="where the run folders go")
    parser.add_argument("--sizes", help=f"some of {', '.join(SHAPES)}")
    parser.add_argument("--steps", type=int, default=300, help=f"of {BATCH} x {SHIPPED.data.seq_len} tokens")
    parser.add_argument("--seeds", type=int, default=1, help="of each option; the default has at least three")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, a thread each")
    parser.add_argument(
        "--only",
        help="names of options, or parts of names, as in SwiGLU,EMA; all by default",
    )
    parser.add_argument("--known", type=Path, help="a result of this script, whose runs are not done again")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    steps = arguments.steps
    sizes = arguments.sizes.split(",") if arguments.sizes else list(SHAPES)
    jobs: list[Job] = []
    if arguments.what == "rates":
        for size, kind, rate in itertools.product(sizes, KINDS, RATES):
            jobs.append(Job(kind, size, "default", make(kind, size, rate, 1, steps)))
    if arguments.what == "law":
        for size, n in itertools.product(sizes, range(len(KINDS))):
            kind, peak = list(KINDS)[n], PEAKS[size][n]
            for seed in range(1, FEWER_SEEDS.get((kind, size), N_SEEDS) + 1):
                jobs.append(Job(kind, size, "default", make(kind, size, peak, seed, steps)))
    if arguments.what == "options":
        size = sizes[0] if arguments.sizes else ABLATED
        peak = PEAKS[size][0]
        for seed in range(1, max(arguments.seeds, 3) + 1):
            jobs.append(Job("ternary", size, "default", make("ternary", size, peak, seed, steps)))
        asked = arguments.only.split(",") if arguments.only else [""]
        # A whole name means that option alone.
        parts = [part for part in asked if part not in OPTIONS]
        chosen = {
            label: sets
            for label, sets in OPTIONS.items()
            if label in asked or any(part in label for part in parts)
        }
        for seed, (label, sets) in itertools.product(range(1, arguments.seeds + 1), chosen.items()):
            try:
                jobs.append(Job("ternary", size, label, make("ternary", size, peak, seed, steps, sets)))
            except ValueError as reason:
                print(f"{label}: left out at {size}: {reason}")
    known = json.loads(arguments.known.read_text())["runs"] if arguments.known else []
    results = run_all(jobs, arguments.data, arguments.include, arguments.runs, arguments.jobs, known)
    summary: dict[str, Any] = {}
    if arguments.what != "rates":
        picture = arguments.out.with_suffix(".png") if arguments.out else None
        summary = {"law": law, "options": options}[arguments.what](results, picture)
    line = json.dumps({"what": arguments.what, **summary, "runs": results})
    print(line)
    if arguments.out:
        arguments.out.write_text(line + "\n")


if __name__ == "__main__":
    main()

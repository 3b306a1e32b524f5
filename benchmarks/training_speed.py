"""How fast a ternary step is beside that of its full-precision twin.

python benchmarks/training_speed.py                      # b1.58 at 10M, 15 steps of each in turn, after 2

Both models train in one process on the same random tokens: fused, in bfloat16, with the recipe's own optimiser. Steps
are timed by the clock and by the processor, which other work on the machine disturbs less. Prints a table, then one
JSON line, which --out keeps.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from onebit.nn.transformer import Transformer
from onebit.results import machine_facts, versions
from onebit.train import build, optimizers, options, ranks
from onebit.train.recipe import Recipe
from onebit.train.task import token_losses


def steps(recipe: Recipe, tokens_BT: torch.Tensor) -> Iterator[None]:
    """The steps of a run on the same tokens, as the loop of training takes them; one for each `next`."""
    model = Transformer(recipe.model, recipe.seed)
    linear = [p for name, p in model.named_parameters() if recipe.model.is_linear(name)]
    optimizer = optimizers.make(recipe.options.optimizer, recipe.optim, model.parameters(), linear)
    losses = ranks.fused(token_losses, model.layers)
    while True:
        options.set_rounding(model.rounding, recipe, 0, tokens_BT.device)
        with torch.autocast("cpu", torch.bfloat16):
            loss = losses(model, tokens_BT).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        yield


def main() -> None:
    """Time steps of both in turn and print their ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="10M")
    parser.add_argument("--batch", type=int, default=4, help="sequences of 512 tokens in a step")
    parser.add_argument("--steps", type=int, default=15, help="of each that are timed, after 2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="file for the JSON too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipes = [build(name, size=args.size) for name in ("b1.58", "b1.58-dense")]
    generator = torch.Generator().manual_seed(0)
    shape = (args.batch, recipes[0].data.seq_len + 1)
    tokens = torch.randint(recipes[0].model.vocab_size, shape, generator=generator)
    runs = {recipe.name: steps(recipe, tokens) for recipe in recipes}
    per_second: dict[str, dict[str, list[float]]] = {name: {"clock": [], "processor": []} for name in runs}
    n_tokens = args.batch * (shape[1] - 1)
    for turn in range(2 + args.steps):
        for name, run in runs.items():
            clock, processor_time = time.perf_counter(), time.process_time()
            next(run)
            if turn >= 2:
                per_second[name]["clock"].append(n_tokens / (time.perf_counter() - clock))
                per_second[name]["processor"].append(n_tokens / (time.process_time() - processor_time))
    print("| tokens a second: median (least to most) | of the clock | of the processor |\n|---|---|---|")
    for recipe in recipes:
        cells = [
            f"{statistics.median(v):,.0f} ({min(v):,.0f} to {max(v):,.0f})"
            for v in per_second[recipe.name].values()
        ]
        print(f"| `{recipe.name}`, {recipe.model.label} | {' | '.join(cells)} |")
    ratios = {
        kind: [a / b for a, b in zip(*(per_second[r.name][kind] for r in recipes), strict=True)]
        for kind in ("clock", "processor")
    }
    for kind, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4)
        print(
            f"ternary beside full precision, {kind}: {middle:.3f} ({low:.3f} to {high:.3f}, quartiles of pairs)"
        )
    about = {name: value for name, value in vars(args).items() if name != "out"}
    used = versions() | {"torch": torch.__version__}
    line = json.dumps({**about, "tokens_per_s": per_second, "machine": machine_facts(), "versions": used})
    print(line)
    if args.out:
        args.out.write_text(line + "\n")


if __name__ == "__main__":
    main()

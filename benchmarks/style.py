"""What an adapter takes over of another style, and what is left of it in the weights: held-out loss, samples.

    python benchmarks/style.py --data pb-en/en asp-en/en --seeds 1 2 3 --out runs/style

Reads picture books in Markdown, as African Storybook and Pratham Books have them: those under CC BY alone. The title
is the prompt, the beginning of the story the answer. Every tenth book is held out.
"""

import argparse
import json
import re
from pathlib import Path

import onebit
from onebit.llm import SHIPPED_MODEL
from onebit.train.merge import merge
from onebit.train.tune import plan, tune

WORDS = 80  # of a story
HELD_OUT = 10
SAMPLES = 3


def book(path: Path) -> dict[str, str] | None:
    """A book as a prompt and its answer; None for one of another licence, or without a text."""
    text = path.read_text("utf-8")
    title = re.search(r"^# (.+)$", text, re.MULTILINE)
    if not title or not re.search(r"^\* License: \[CC-BY\]\s*$", text, re.MULTILINE):
        return None
    pages = re.sub(r"^(#|\* ).*$", "", text, flags=re.MULTILINE)
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", pages)]
    words = re.findall(r"\S+\s*", "\n".join(part for part in paragraphs if part))
    story = "".join(words[:WORDS]).strip()
    return {"prompt": f"{title[1].strip()}\n", "completion": story} if story else None


def main() -> None:
    """Tune for each seed, merge, print the losses and samples, and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=SHIPPED_MODEL)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()

    files = sorted(path for folder in args.data for path in folder.glob("*.md"))
    books = [found for path in files if (found := book(path))]
    args.out.mkdir(parents=True)
    held_out = books[::HELD_OUT]
    parts = {"train": [made for i, made in enumerate(books) if i % HELD_OUT], "held_out": held_out}
    for name, part in parts.items():
        lines = "".join(json.dumps(made) + "\n" for made in part)
        (args.out / f"{name}.jsonl").write_text(lines, "utf-8")
    settings = ["precision=f32", "data.held_out=0", "threads=1", *args.set]
    result = {}
    for seed in args.seeds:
        run = args.out / str(seed)
        tune(plan(str(args.model), args.out / "train.jsonl", [*settings, f"seed={seed}"]), run)
        for scale in ("keep", "absmean"):
            target = args.out / f"{seed}-{scale}.onebit"
            merged = merge(args.model, run, target, args.out / "held_out.jsonl", scale)
            flipped = sum(layer.n_flipped for layer in merged.layers)
            share = flipped / sum(layer.n_weights for layer in merged.layers)
            result[f"{seed}, {scale}"] = {**merged.losses._asdict(), "flipped": share}
            print(
                f"seed {seed}, scales {scale}: {merged.losses}, {share:.3%} of the codes changed", flush=True
            )
    first = args.out / str(args.seeds[0])
    tuned = onebit.load(args.model, threads=1, adapters={"style": first})
    merged_llm = onebit.load(f"{first}-keep.onebit", threads=1)
    for made in held_out[:SAMPLES]:
        print(f"\n== {made['prompt']}")
        ways = (("before", tuned, None), ("adapter", tuned, "style"), ("merged", merged_llm, None))
        for name, llm, adapter in ways:
            text = llm.generate(made["prompt"], adapter=adapter, seed=1, temperature=0.7, max_tokens=60).text
            print(f"-- {name}: {text}")
    print(json.dumps({"train": len(parts["train"]), "held_out": len(held_out), **result}))


if __name__ == "__main__":
    main()

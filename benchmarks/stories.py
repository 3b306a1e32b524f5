"""What the shipped model is worth, beside its full-precision twin or the model before it: held-out bits per byte,
agreement, samples.

    python benchmarks/stories.py --run runs/stories --twin runs/stories-dense --text held_out.txt --out results.json
    python benchmarks/stories.py --run runs/stories-2 --before stories-1.onebit --text held_out.txt --out results.json

Figures of packed models are those of the engine, the twin is computed in torch. All are measured on the stories that
the run held out. Prints the samples and, last, one JSON line, which --out keeps; the curves go to a PNG beside it.
"""

import argparse
import json
import lzma
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot

import onebit
from onebit.formats import run
from onebit.nn.transformer import Transformer
from onebit.train.data import END_OF_TEXT

OPENINGS = [
    "Once upon a time", "One day, a little girl named Lily", "Tom and Mia", "The dog", "There was a big bear",
    "In the forest", "Ben liked to", "A small bird", "Mom said", "It was raining", "The cat and the mouse",
    "Sara had a red ball", "Once there was a king", "Max wanted to", "The sun was", "Anna was sad because",
    "Grandma made", "A boy found a key", "The little train", "Every night",
]  # fmt: skip
GREEDY_TOKENS = 100
SMOOTH = 50  # steps

Logits = Callable[[list[int]], np.ndarray]


def torch_logits(folder: Path, in_order: bool) -> Logits:
    """The logits of a run's float32 master, in the engine's order of operations or in torch's own, which is faster."""
    model = Transformer.from_checkpoint(run.read(folder)).train(not in_order)

    @torch.no_grad()
    def logits(tokens: list[int]) -> np.ndarray:
        return model(torch.tensor([tokens]))[0].numpy()

    return logits


def bits_per_byte(
    logits: Logits, encode: Callable[[str], list[int]], texts: Iterable[str], context: int
) -> float:
    """Cross-entropy in bits per byte; every window of a text starts after the begin-of-text token."""
    nats, n_bytes = 0.0, 0
    for text in texts:
        begin, *ids = encode(text)
        n_bytes += len(text.encode())
        for start in range(0, len(ids), context):
            window = ids[start : start + context]
            scores = logits([begin, *window[:-1]]).astype(np.float64)
            scores -= scores.max(-1, keepdims=True)
            nats += float(np.sum(np.log(np.exp(scores).sum(-1)) - scores[np.arange(len(window)), window]))
    return nats / math.log(2) / n_bytes


def compare_greedy(llm: onebit.LLM, reference: Logits) -> dict[str, float]:
    """Greedy texts of the engine against torch: where they part, and how close the two best logits were there."""
    equal, parted = 0, []
    for opening in OPENINGS:
        prompt = llm.tokenizer.encode(opening)
        tokens = llm.generate(opening, temperature=0, max_tokens=GREEDY_TOKENS, ignore_eos=True).tokens
        scores = reference([*prompt, *tokens[:-1]])[len(prompt) - 1 :]
        best = scores.argmax(-1)
        if np.array_equal(best, tokens):
            equal += 1
            continue
        at = int(np.argmax(best != tokens))
        parted.append(float(scores[at, best[at]] - scores[at, tokens[at]]))
    return {"texts": len(OPENINGS), "equal": equal, "largest_gap_where_they_part": max(parted, default=0.0)}


def draw(folders: dict[str, Path], path: Path) -> None:
    """Draw the training and held-out losses of several runs into one picture."""
    matplotlib.use("Agg")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, folder in folders.items():
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses = np.convolve([r["loss"] for r in records], np.ones(SMOOTH) / SMOOTH, "valid")
        left.plot(np.arange(len(losses)) + SMOOTH // 2, losses, label=name)
        held_out = [r for r in records if "held_out_bits_per_byte" in r]
        steps, values = zip(*((r["step"] + 1, r["held_out_bits_per_byte"]) for r in held_out), strict=True)
        right.plot(steps, values, marker=".", label=name)
    left.set(xlabel="step", ylabel=f"training loss, nats per token (mean of {SMOOTH})")
    right.set(xlabel="step", ylabel="held-out stories, bits per byte (a part; last point: all)")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="run folder of the ternary model")
    parser.add_argument("--twin", type=Path, help="run folder of its full-precision twin")
    parser.add_argument(
        "--before", type=Path, help="an earlier model, which never read what this run held out"
    )
    parser.add_argument("--text", type=Path, required=True, help="held-out text, .txt or .txt.xz")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()

    llm = onebit.load(arguments.run)
    encode, context = llm.tokenizer.encode, llm.config.max_seq_len
    models: dict[str, tuple[Logits, Callable[[str], list[int]]]] = {"ternary": (llm.logits, encode)}
    folders = {"ternary": arguments.run}
    if arguments.twin:
        models["full_precision"] = torch_logits(arguments.twin, in_order=False), encode
        folders["full precision"] = arguments.twin
    if arguments.before:
        before = onebit.load(arguments.before)
        models["before"] = before.logits, before.tokenizer.encode
    held_out = np.load(arguments.run / "corpus" / "held_out.npy")
    ends = np.flatnonzero(held_out == llm.config.eos_tokens[0])
    stories = [llm.tokenizer.decode(part.tolist()) for part in np.split(held_out, ends + 1)[:-1]]
    opener = lzma.open if arguments.text.suffix == ".xz" else open
    with opener(arguments.text, "rt", encoding="utf-8") as file:
        text = file.read().replace(END_OF_TEXT, "")

    result: dict[str, object] = {"label": llm.config.label, "held_out_stories": len(stories)}
    for name, (logits, words) in models.items():
        result[name] = {
            "held_out_bits_per_byte": round(bits_per_byte(logits, words, stories, context), 4),
            "text_bits_per_byte": round(bits_per_byte(logits, words, [text], context), 4),
        }
    result["greedy_engine_against_torch"] = compare_greedy(llm, torch_logits(arguments.run, in_order=True))
    for seed in range(10):
        output = llm.generate("Once upon a time", seed=seed, max_tokens=300)
        print(f"--- seed {seed}, {output.finish_reason}\nOnce upon a time{output.text}\n")
    draw(folders, arguments.out.with_suffix(".png"))
    line = json.dumps(result)
    print(line)
    arguments.out.write_text(line + "\n")


if __name__ == "__main__":
    main()
